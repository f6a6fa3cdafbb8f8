"""ResNet-20 on CIFAR-10 at half the MACs: accuracy after equal fine-tuning, and what the smaller network gains in time.

    python -m benchmarks.pruning_resnet20 --threads 1                # train, prune, fine-tune; resumes where it stopped
    python -m benchmarks.pruning_resnet20 --threads 1 --latency      # time the pruned networks in their engines

Every method starts from the same dense network of a seed, prunes until at most half of the MACs are left, and trains on
the same images in the same order at the same rate. Torch-Pruning is run as its documentation says: in small steps until
the MACs are reached, the importance measured anew at every step, the classifier's outputs left alone.
Every criterion runs on the first seed, the best few of each library on the others too.
Each run is kept in a folder (``--cache``) and not made twice.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional

from benchmarks import cifar, harness
from benchmarks.cifar import Network, Split, macs, parameters, widths
from benchmarks.export import OPSET, quiet
from benchmarks.harness import Contestant, Json

TARGET: Final = 0.5
"""Share of the MACs that may be left."""
GRADIENT_IMAGES: Final = 512
"""Training images, without augmentation, that the criteria that need gradients see."""
PEER_STEPS: Final = 100
PEER_CRITERIA: Final = ("l2", "taylor", "bn_scale", "lamp", "fpgm", "hessian", "random")
PEER_LOCAL: Final = ("l2", "taylor", "bn_scale")
OUR_CRITERIA: Final = ("taylor", "l2", "hessian", "bn_scale")
FINALISTS: Final = 3
"""All variants run on the first seed; this many of each library, the best there, run on the others too."""


@dataclass(frozen=True)
class Variant:
    """One way to prune: ``library``, ``criterion`` and ``scope`` name it, ``prune`` does it.

    ``prune`` takes the dense network and a few training images, and gives the smaller network.
    """

    library: str
    criterion: str
    scope: str
    prune: Callable[[cifar.ResNet20, Split, int], Network]

    @property
    def name(self) -> str:
        """The row of the tables."""
        return f"{self.library} {self.criterion} {self.scope}".strip()


def not_pruned(model: cifar.ResNet20, sample: Split, seed: int) -> Network:
    """The dense network: fine-tuned as the others are, it says what the extra training alone brings."""
    return Network(model, model)


def with_torch_pruning(criterion: str, scope: str) -> Callable[[cifar.ResNet20, Split, int], Network]:
    """Torch-Pruning's ``BasePruner`` in :data:`PEER_STEPS` linear steps, until the MACs are reached."""

    def prune(model: cifar.ResNet20, sample: Split, seed: int) -> Network:
        tp: Any = importlib.import_module("torch_pruning")

        importance = {
            "l2": lambda: tp.importance.MagnitudeImportance(p=2),
            "taylor": tp.importance.TaylorImportance,
            "bn_scale": tp.importance.BNScaleImportance,
            "lamp": tp.importance.LAMPImportance,
            "fpgm": tp.importance.FPGMImportance,
            "hessian": tp.importance.HessianImportance,
            "random": tp.importance.RandomImportance,
        }[criterion]()
        torch.manual_seed(seed)
        model.eval()
        network = Network(model, model)
        dense = macs(network)
        pruner = tp.pruner.BasePruner(
            model,
            torch.zeros(1, 3, 32, 32),
            importance=importance,
            global_pruning=scope == "global",
            pruning_ratio=1.0,
            iterative_steps=PEER_STEPS,
            ignored_layers=[model.fc],
        )
        while macs(network) > TARGET * dense:
            model.zero_grad()
            if criterion == "taylor":
                _gradients(model, sample)
            if criterion == "hessian":
                _squared_gradients(model, sample, importance)
            pruner.step()
        model.zero_grad()
        return network

    return prune


def _gradients(model: nn.Module, sample: Split, batch: int = 64) -> None:
    for images, labels in zip(sample.images.split(batch), sample.labels.split(batch), strict=True):
        functional.cross_entropy(model(images), labels).backward()


def _squared_gradients(model: nn.Module, sample: Split, importance: Any) -> None:
    """Image by image, as Torch-Pruning's ``HessianImportance`` wants it; 1.6.1 keeps only the last one's gradient."""
    importance.zero_grad()
    for image, label in zip(sample.images[:16], sample.labels[:16], strict=True):
        model.zero_grad()
        functional.cross_entropy(model(image[None]), label[None]).backward()
        importance.accumulate_grad(model)


def with_fxcompress(criterion: str, scope: str) -> Callable[[cifar.ResNet20, Split, int], Network]:
    """``plan_pruning(program, macs=0.5)``, in one step."""

    def prune(model: cifar.ResNet20, sample: Split, seed: int) -> Network:
        import fxcompress as fxc
        from fxcompress.prune.plan import plan_pruning

        images = torch.zeros(2, 3, 32, 32)
        program = fxc.capture(model.eval(), (images,))
        train = list(zip(sample.images.split(64), sample.labels.split(64), strict=True))
        plan = plan_pruning(
            program,
            macs=TARGET,
            importance=criterion,
            scope=scope,
            ignore=["fc"],
            example_inputs=(images,),
            train=train,
            seed=seed,
        )
        pruned = plan.apply(program)
        plan.certify(program, pruned)
        return Network(pruned.gm, pruned)

    return prune


def variants(options: argparse.Namespace) -> list[Variant]:
    """The dense network, Torch-Pruning's and ours that ``--only`` (a pattern of names) and ``--peers-only`` leave."""
    peer = [(c, "global") for c in PEER_CRITERIA] + [(c, "local") for c in PEER_LOCAL]
    every = [Variant("dense", "", "", not_pruned)]
    every += [Variant("torch-pruning", c, scope, with_torch_pruning(c, scope)) for c, scope in peer]
    if not options.peers_only:
        every += [Variant("fxcompress", c, "global", with_fxcompress(c, "global")) for c in OUR_CRITERIA]
    wanted = options.only or "*"
    return [v for v in every if fnmatch.fnmatch(v.name, wanted)]


@dataclass(frozen=True)
class Bench:
    """The images, where runs are kept, and how networks are trained."""

    training: Split
    test: Split
    folder: Path
    dense: cifar.Training = cifar.DENSE
    tuning: cifar.Training = cifar.FINE_TUNING

    def dense_network(self, seed: int) -> cifar.ResNet20:
        """The trained dense network of a seed, from the folder or trained now."""
        from safetensors.torch import load_file, save_file

        path = self.folder / f"dense_{seed}.safetensors"
        torch.manual_seed(seed)
        model = cifar.ResNet20()
        cifar.lay_out(model)
        if not path.exists():
            print(f"training the dense network of seed {seed}", flush=True)
            cifar.train(model, model, self.training, self.dense, seed)
            save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)
        model.load_state_dict(load_file(path))
        model.eval()
        return model

    def sample(self, seed: int) -> Split:
        """The images the importance is measured on."""
        rows = torch.randperm(len(self.training.labels), generator=torch.Generator().manual_seed(seed))
        rows = rows[:GRADIENT_IMAGES]
        return Split(self.training.images[rows], self.training.labels[rows])

    def stem(self, variant: Variant, seed: int) -> Path:
        """Path of a run's files, without their suffix."""
        return self.folder / f"{variant.name.replace(' ', '_')}_{seed}"

    def run(self, variant: Variant, seed: int) -> dict[str, Any]:
        """Prunes and fine-tunes, or reads what an earlier run found."""
        stem = self.stem(variant, seed)
        record = stem.with_suffix(".json")
        settings = json.loads(json.dumps(self.tuning.record()))
        if record.exists():
            found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
            if found["settings"] == settings:
                return found
        model = self.dense_network(seed)
        dense = Network(model, model)
        before = {"macs": macs(dense), "parameters": parameters(dense)}
        begin = time.perf_counter()
        network = variant.prune(model, self.sample(seed), seed)
        seconds = time.perf_counter() - begin
        row: dict[str, Any] = {
            "settings": settings,
            "macs": macs(network),
            "macs_ratio": macs(network) / before["macs"],
            "parameters_ratio": parameters(network) / before["parameters"],
            "widths": widths(network),
            "pruning_seconds": round(seconds, 3),
            "accuracy_before_tuning": cifar.accuracy(network.module, network.forward, self.test),
        }
        cifar.lay_out(network.module)
        row["losses"] = cifar.train(network.module, network.forward, self.training, self.tuning, seed)
        row["accuracy"] = cifar.accuracy(network.module, network.forward, self.test)
        to_onnx(network, stem.with_suffix(".onnx"))
        record.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
        return row


def to_onnx(network: Network, path: Path) -> None:
    """The network in eval mode as ONNX for a batch of 1, the same exporter for all."""

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network.module

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: object = self.inner(x)
            return torch.as_tensor(result[0] if isinstance(result, list | tuple) else result)

    module = Whole().eval()
    cifar.lay_out(module, torch.contiguous_format)
    names: dict[str, Any] = {"input_names": ["x"], "output_names": ["y"]}
    with quiet():
        torch.onnx.export(
            module, (torch.zeros(1, 3, 32, 32),), path, opset_version=OPSET, dynamo=True, external_data=False, **names
        )


def summary(rows: dict[int, dict[str, Any]]) -> dict[str, Json]:
    """Per variant: accuracy of each seed, their mean and deviation, and the sizes."""
    found = [rows[seed]["accuracy"] for seed in sorted(rows)]
    return {
        "accuracy": {str(seed): rows[seed]["accuracy"] for seed in sorted(rows)},
        "mean_accuracy": statistics.mean(found),
        "deviation": statistics.stdev(found) if len(found) > 1 else None,
        "mean_accuracy_before_tuning": statistics.mean(r["accuracy_before_tuning"] for r in rows.values()),
        "macs_ratio": {str(seed): round(rows[seed]["macs_ratio"], 4) for seed in sorted(rows)},
        "parameters_ratio": {str(seed): round(rows[seed]["parameters_ratio"], 4) for seed in sorted(rows)},
        "pruning_seconds": statistics.mean(r["pruning_seconds"] for r in rows.values()),
        "widths": {str(seed): rows[seed]["widths"] for seed in sorted(rows)},
    }


def best(results: dict[str, dict[str, Any]], library: str) -> str | None:
    """The variant of a library with the highest mean accuracy, of those that ran on every seed."""
    seeds = max(len(row["accuracy"]) for row in results.values())
    names = [name for name, row in results.items() if name.startswith(library) and len(row["accuracy"]) == seeds]
    return max(names, key=lambda name: float(results[name]["mean_accuracy"])) if names else None


def measure(bench: Bench, chosen: list[Variant], seeds: list[int], finished: bool) -> dict[str, dict[str, Any]]:
    """Accuracy of every variant on the first seed and of the finalists on all; a line is printed as each run ends.

    With ``finished`` nothing is run: what earlier runs found is put together.
    """
    rows: dict[str, dict[int, dict[str, Any]]] = {variant.name: {} for variant in chosen}
    if finished:
        for variant in chosen:
            rows[variant.name] = {
                s: bench.run(variant, s) for s in seeds if bench.stem(variant, s).with_suffix(".json").exists()
            }
        return {name: summary(found) for name, found in rows.items() if found}
    for turn, seed in enumerate(seeds):
        for variant in (
            chosen if turn == 0 else finalists(chosen, {n: r[seeds[0]]["accuracy"] for n, r in rows.items()})
        ):
            row = rows[variant.name][seed] = bench.run(variant, seed)
            text = f"{row['accuracy_before_tuning']:.2f} -> {row['accuracy']:.2f} %, MACs x {row['macs_ratio']:.3f}"
            print(f"{variant.name}, seed {seed}: {text}", flush=True)
    return {name: summary(found) for name, found in rows.items()}


def finalists(chosen: list[Variant], accuracy: dict[str, float]) -> list[Variant]:
    """The most accurate :data:`FINALISTS` of each library."""
    order = sorted(chosen, key=lambda variant: -accuracy[variant.name])
    libraries = dict.fromkeys(variant.library for variant in chosen)
    return [v for library in libraries for v in [v for v in order if v.library == library][:FINALISTS]]


def latency(bench: Bench, results: dict[str, dict[str, Any]], options: argparse.Namespace) -> dict[str, Json]:
    """Races dense and the best pruned network of each library in ONNX Runtime and OpenVINO, batch 1, seed 0."""
    picked = [name for name in ("dense", best(results, "torch-pruning"), best(results, "fxcompress")) if name]
    model = bench.dense_network(0)
    to_onnx(Network(model, model), bench.folder / "dense_0.onnx")
    contestants = [
        Contestant(f"{name}, {runtime}", runtime, str(bench.folder / f"{name.replace(' ', '_')}_0.onnx"))
        for name in picked
        for runtime in ("onnxruntime", "openvino")
    ]
    image = bench.test.images[:1].contiguous().numpy()
    race = harness.race(contestants, {"x": image}, harness.timing_of(options))
    ratios: dict[str, Json] = {}
    for name in picked[1:]:
        for runtime in ("onnxruntime", "openvino"):
            found = race.ratio(f"{name}, {runtime}", f"dense, {runtime}")
            ratios[f"{name}, {runtime}"] = {
                "time_ratio": round(found.median, 4),
                "interval": [round(found.low, 4), round(found.high, 4)],
                "macs_ratio": results[name]["macs_ratio"]["0"],
                "verdict": found.verdict,
            }
    return {"engines": race.summary(), "against_dense": ratios}


def show(results: dict[str, dict[str, Any]]) -> None:
    """Prints the table, the most accurate first."""
    order = sorted(results, key=lambda name: -float(results[name]["mean_accuracy"]))
    seeds = sorted({seed for row in results.values() for seed in row["accuracy"]})
    lines = [
        [
            name,
            *(f"{results[name]['accuracy'][s]:.2f}" if s in results[name]["accuracy"] else "" for s in seeds),
            f"{results[name]['mean_accuracy']:.2f}",
            f"{results[name]['mean_accuracy_before_tuning']:.2f}",
            f"{statistics.mean(results[name]['macs_ratio'].values()):.3f}",
        ]
        for name in order
    ]
    print(harness.table(["variant", *(f"seed {s}" for s in seeds), "mean", "before tuning", "MACs"], lines))


def prepare(options: argparse.Namespace) -> Bench:
    """Loads the images; a quick bench has few of them and trains for one epoch."""
    folder = (
        Path(options.cache) if options.cache else Path(tempfile.gettempdir()) / "fxcompress-benchmarks" / "resnet20"
    )
    training = cifar.load("train", 640 if options.quick else cifar.TRAINING_IMAGES)
    test = cifar.load("test", 1000 if options.quick else None)
    if options.quick:
        short = cifar.Training((16, 32), rate=0.05)
        bench = Bench(training, test, folder.with_name(f"{folder.name}-quick"), short, cifar.Training((32,), rate=0.02))
    else:
        bench = Bench(training, test, folder)
    bench.folder.mkdir(parents=True, exist_ok=True)
    return bench


def main() -> None:
    """Command line."""
    what = "ResNet-20 on CIFAR-10 at half the MACs."
    options = harness.arguments(what, only="", cache="", seeds="0,1,2", latency=False, finished=False)
    torch.set_num_threads(options.threads)
    bench = prepare(options)
    results = measure(bench, variants(options), [int(seed) for seed in options.seeds.split(",")], options.finished)
    show(results)
    settings: dict[str, Any] = {
        "target_macs": TARGET,
        "training_images": len(bench.training.labels),
        "test_images": len(bench.test.labels),
        "gradient_images": GRADIENT_IMAGES,
        "torch_pruning_steps": PEER_STEPS,
        "finalists": FINALISTS,
        "dense_training": bench.dense.record(),
        "fine_tuning": bench.tuning.record(),
        "torch_pruning": harness._version("torch-pruning"),
    }
    content: dict[str, Any] = {
        "best": {library: best(results, library) for library in ("torch-pruning", "fxcompress")},
        "variants": results,
    }
    if options.latency:
        content["latency"] = latency(bench, results, options)
        settings["timing"] = harness.timing_of(options).record()
    if not options.only:
        print(harness.write("pruning_resnet20", content, settings, options))


if __name__ == "__main__":
    main()
