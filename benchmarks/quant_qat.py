"""ResNet-20 on CIFAR-10 with few bits: float, PTQ, plain QAT and LSQ after the same training.

    python -m benchmarks.quant_qat --threads 1                 # every variant on every seed; resumes where it stopped
    python -m benchmarks.quant_qat --threads 1 --only "lsq*"   # some of them
    python -m benchmarks.quant_qat --finished                  # put together what earlier runs found

All begin with the same float network of a seed. Float, plain QAT and LSQ train on the same images in the same order, for
the same epochs at the same rate (:data:`TUNING`); PTQ does not train, its float network is the one that was trained as
long. The first and the last layer stay at 8 bits, as in Esser et al. 2020, in PTQ in floating point. Accuracy is that of
the simulation, which ``fxc.lower`` compares with the engine of ``--target``. Each run is kept in a folder
(``--cache``), by default that of ``pruning_resnet20``, whose dense networks are the same.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import statistics
import tempfile
import time
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, cast

import torch

import fxcompress as fxc
from benchmarks import cifar, harness
from benchmarks.cifar import Split
from benchmarks.harness import Json
from fxcompress.errors import ParityError

FIRST_AND_LAST: Final = ("conv", "fc")
CALIBRATION_IMAGES: Final = 256
TUNING: Final = cifar.Training((16,) * 4 + (24,) * 2 + (32,) * 2, rate=0.02, decay=1e-4, warm=0.1)


@dataclass(frozen=True)
class Variant:
    """A row of the table: how it quantizes (``float``, ``ptq``, ``qat`` or ``lsq``) and to how many bits."""

    method: str
    bits: int = 32

    @property
    def name(self) -> str:
        """``lsq w4a4``."""
        return self.method if self.bits == 32 else f"{self.method} w{self.bits}a{self.bits}"


VARIANTS: Final = (
    Variant("float"),
    *(Variant(method, bits) for bits in (4, 3, 2) for method in ("ptq", "qat", "lsq")),
)


@dataclass(frozen=True)
class Bench:
    """The images, where runs are kept, how networks are trained, and the engine they are for."""

    training: Split
    test: Split
    folder: Path
    target: str
    dense: cifar.Training = cifar.DENSE
    tuning: cifar.Training = TUNING

    def dense_network(self, seed: int) -> cifar.ResNet20:
        """The float network of a seed, from the folder or trained now."""
        return self._network(f"dense_{seed}", seed, None, self.dense)

    def tuned_network(self, seed: int) -> cifar.ResNet20:
        """The float network, trained on as long as the quantized ones are."""
        settings = zlib.crc32(json.dumps([self.dense.record(), self.tuning.record()]).encode())
        return self._network(f"tuned_{settings:08x}_{seed}", seed, self.dense_network(seed), self.tuning)

    def _network(self, name: str, seed: int, model: Any, how: cifar.Training) -> cifar.ResNet20:
        from safetensors.torch import load_file, save_file

        path = self.folder / f"{name}.safetensors"
        torch.manual_seed(seed)
        network: cifar.ResNet20 = cifar.ResNet20() if model is None else model
        cifar.lay_out(network)
        if not path.exists():
            print(f"training {name}", flush=True)
            cifar.train(network, network, self.training, how, seed)
            save_file({n: value.contiguous() for n, value in network.state_dict().items()}, path)
        network.load_state_dict(load_file(path))
        return network.eval()

    def calibration(self) -> list[torch.Tensor]:
        """Training images without augmentation."""
        return list(self.training.images[:CALIBRATION_IMAGES].split(64))

    def finished(self, variant: Variant, seed: int) -> dict[str, Any] | None:
        """What an earlier run with these settings found."""
        record = self._record(variant, seed)
        found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
        return found if found.get("settings") == self._settings() else None

    def run(self, variant: Variant, seed: int) -> dict[str, Any]:
        """Quantizes, trains and measures."""
        begin = time.perf_counter()
        row = self._float(seed) if variant.method == "float" else self._quantized(variant, seed)
        row |= {"settings": self._settings(), "seconds": round(time.perf_counter() - begin, 1)}
        self._record(variant, seed).write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
        return row

    def _record(self, variant: Variant, seed: int) -> Path:
        return self.folder / f"{variant.name.replace(' ', '_')}_{self.target}_{seed}.json"

    def _settings(self) -> dict[str, Any]:
        settings = {"tuning": self.tuning.record(), "dense": self.dense.record(), "images": len(self.training.labels)}
        return cast(dict[str, Any], json.loads(json.dumps(settings)))

    def _float(self, seed: int) -> dict[str, Any]:
        model = self.tuned_network(seed)
        return {"accuracy": cifar.accuracy(model, model, self.test)}

    def _quantized(self, variant: Variant, seed: int) -> dict[str, Any]:
        model = self.tuned_network(seed) if variant.method == "ptq" else self.dense_network(seed)
        free = dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)  # training begins with small images
        captured = fxc.capture(model, (self.training.images[:2].contiguous(),), dynamic_shapes=(free,))
        scheme = fxc.target(self.target).scheme()
        row: dict[str, Any] = {}
        if variant.method == "ptq":
            program = self._static(captured, scheme, variant.bits)
        else:
            program, row = self._trained(captured, scheme, variant, seed)
        row["accuracy"] = cifar.accuracy(program.gm, program, self.test)
        return row | self._engine(program)

    def _static(self, captured: fxc.Program, scheme: fxc.QuantScheme, bits: int) -> fxc.Program:
        """Post-training quantization at its best: ranges of least squared error, corrected biases."""
        narrow = replace(
            scheme,
            activation=fxc.QuantSpec(bits, scheme.activation.signed, scheme.activation.symmetric),
            weight=fxc.QuantSpec(bits, signed=True, symmetric=True, axis=0),
        )
        passes = (*fxc.default_passes(quantize=False), fxc.QuantizeStatic(ignore=FIRST_AND_LAST))
        context = fxc.Context(calibration=self.calibration(), scheme=narrow)
        return fxc.Pipeline(passes=passes)(captured, context).program

    def _trained(
        self, captured: fxc.Program, scheme: fxc.QuantScheme, variant: Variant, seed: int
    ) -> tuple[fxc.QATProgram, dict[str, Any]]:
        program = fxc.prepare_qat(
            captured,
            scheme,
            learn_scale=variant.method == "lsq",
            weight_bits=variant.bits,
            activation_bits=variant.bits,
            calibration=self.calibration(),
            keep_8bit=FIRST_AND_LAST,
        )
        cifar.lay_out(program.gm)
        before = cifar.accuracy(program.gm, program, self.test)
        losses = cifar.train(program.gm, program, self.training, self.tuning, seed)
        return program, {"accuracy_before_training": before, "losses": losses}

    def _engine(self, program: fxc.Program) -> dict[str, Any]:
        """Parity and accuracy of the engine; the refusal, where there is one, is a result too."""
        program.gm.eval()
        cifar.lay_out(program.gm, torch.contiguous_format)
        try:
            engine = fxc.lower(program, self.target, data=[self.test.images[:64].contiguous()], threads=1)
        except ParityError as error:
            return {"parity": error.what, "engine_accuracy": None}
        return {
            "parity": engine.report.parity,
            "engine_accuracy": cifar.accuracy(torch.nn.Module(), engine, self.test),
        }


def summary(rows: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Per variant: accuracy of each seed in the simulation and in the engine, mean and deviation, parity."""
    found = [rows[seed]["accuracy"] for seed in sorted(rows)]
    return {
        "accuracy": {str(seed): rows[seed]["accuracy"] for seed in sorted(rows)},
        "engine_accuracy": {str(seed): rows[seed].get("engine_accuracy") for seed in sorted(rows)},
        "mean_accuracy": statistics.mean(found),
        "deviation": statistics.stdev(found) if len(found) > 1 else None,
        "parity": {str(seed): rows[seed].get("parity") for seed in sorted(rows)},
        "seconds": statistics.mean(row["seconds"] for row in rows.values()),
    }


def bars(results: dict[str, dict[str, Any]]) -> dict[str, Json]:
    """Whether LSQ is above plain QAT above PTQ at each width, and W4A4 within a point of float."""
    mean = {name: float(row["mean_accuracy"]) for name, row in results.items()}
    found: dict[str, Json] = {}
    for bits in (4, 3, 2):
        ptq, qat, lsq = (mean.get(Variant(m, bits).name) for m in ("ptq", "qat", "lsq"))
        if ptq is not None and qat is not None and lsq is not None:
            found[f"w{bits}a{bits}: lsq above qat above ptq"] = lsq > qat > ptq
    best = [mean[n] for n in ("qat w4a4", "lsq w4a4") if n in mean]
    if best and "float" in mean:
        found["w4a4 within 1 point of float"] = max(best) >= mean["float"] - 1.0
    return found


def measure(bench: Bench, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Runs what is asked for; a line is printed as each run ends."""
    chosen = [v for v in VARIANTS if fnmatch.fnmatch(v.name, options.only or "*")]
    seeds = [int(seed) for seed in options.seeds.split(",")]
    rows: dict[str, dict[int, dict[str, Any]]] = {v.name: {} for v in chosen}
    for seed in seeds:
        for variant in chosen:
            found = bench.finished(variant, seed)
            if found is None and options.finished:
                continue
            row = rows[variant.name][seed] = found or bench.run(variant, seed)
            engine = row.get("engine_accuracy")
            text = "" if engine is None else f", engine {engine:.2f} %"
            print(f"{variant.name}, seed {seed}: {row['accuracy']:.2f} %{text}", flush=True)
    return {name: summary(found) for name, found in rows.items() if found}


def prepare(options: argparse.Namespace) -> Bench:
    """Loads the images; a quick bench has few of them and trains for one epoch."""
    default = Path(tempfile.gettempdir()) / "fxcompress-benchmarks" / "resnet20"
    folder = Path(options.cache) if options.cache else default
    training = cifar.load("train", 320 if options.quick else cifar.TRAINING_IMAGES)
    test = cifar.load("test", 250 if options.quick else None)
    if options.quick:
        short = (cifar.Training((16,), rate=0.05), cifar.Training((32,), rate=0.02))
        bench = Bench(training, test, folder.with_name(f"{folder.name}-qat-quick"), options.target, *short)
    else:
        bench = Bench(training, test, folder, options.target)
    bench.folder.mkdir(parents=True, exist_ok=True)
    return bench


def main() -> None:
    """Command line."""
    what = "Quantization-aware training of ResNet-20 on CIFAR-10."
    options = harness.arguments(what, only="", cache="", seeds="0,1,2", target="openvino", finished=False)
    torch.set_num_threads(options.threads)
    bench = prepare(options)
    results = measure(bench, options)
    lines = [
        [n, f"{r['mean_accuracy']:.2f}", *(f"{a:.2f}" for a in r["accuracy"].values())] for n, r in results.items()
    ]
    print(harness.table(["variant", "mean", *(f"seed {s}" for s in options.seeds.split(","))], lines))
    settings: dict[str, Any] = {
        "target": bench.target,
        "training_images": len(bench.training.labels),
        "test_images": len(bench.test.labels),
        "calibration_images": CALIBRATION_IMAGES,
        "kept_at_8_bits": list(FIRST_AND_LAST),
        "dense_training": bench.dense.record(),
        "tuning": bench.tuning.record(),
    }
    content: dict[str, Any] = {"bars": bars(results), "variants": results}
    if not options.only:
        print(harness.write("quant_qat", content, settings, options))


if __name__ == "__main__":
    main()
