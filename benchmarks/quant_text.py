"""MiniLM on STS-B with every way to quantize a text encoder: Spearman correlation, ours and the peers'.

    python -m benchmarks.quant_text [--quick] [--peers-only] [--only onnxruntime|openvino] [--rows TEXT] [--resume]

Samples, calibration and score are those of :mod:`benchmarks.accuracy`: the embedding of each sentence by itself, in the
engine that ships. ``drop`` is the float32 score minus the row's. ``--resume`` keeps the rows of an interrupted run;
``--rows`` runs those whose name holds the text.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, Final

import fxcompress as fxc
from benchmarks import accuracy, export, harness, ours, peers
from benchmarks.harness import Contestant, Json
from benchmarks.models import MODELS, work_folder
from fxcompress.passbase import Pass

GROUP: Final = 64
FLOAT: Final = "FP32"
BARS: Final[dict[str, float]] = {"INT8 dynamic": 0.003, "INT8 static, SmoothQuant": 0.003, "INT4 weights": 0.01}
"""Largest drop that is allowed; of the rows of ours whose name begins so."""


def recipes() -> dict[str, list[Pass]]:
    """Name of a row of ours -> its passes."""
    four: dict[str, Any] = {"bits": 4, "group_size": GROUP}
    smooth: dict[str, Any] = {"alpha": "auto"}
    return {
        "INT8 dynamic": [fxc.QuantizeDynamic()],
        "INT8 dynamic, embeddings too": [fxc.QuantizeDynamic(embeddings=True)],
        "INT8 dynamic, SmoothQuant": [fxc.SmoothQuant(**smooth, activations="token"), fxc.QuantizeDynamic()],
        "INT8 static": [fxc.QuantizeStatic()],
        "INT8 static, SmoothQuant": [fxc.SmoothQuant(**smooth), fxc.QuantizeStatic()],
        "INT8 weights": [fxc.QuantizeWeights(bits=8)],
        "INT4 weights": [fxc.QuantizeWeights(**four)],
        "INT4 weights, GPTQ": [fxc.QuantizeWeights(**four, method="gptq")],
        "INT4 weights, int8 activations": [fxc.QuantizeWeights(**four), fxc.QuantizeDynamic()],
    }


class Bench:
    """The task and the rows measured so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.task = accuracy.sentences(options.quick)
        self.model = MODELS["minilm"]
        self.settings: dict[str, Json] = {
            "calibration": self.task.count,
            "samples": len(next(iter(self.task.inputs.values()))),
            "group_size": GROUP,
        }
        self.rows: dict[str, Any] = harness.known("quant_text", self.settings, options)
        self.reference = self._run(Contestant(FLOAT, "onnxruntime", str(export.to_onnx(self.model, True))))
        if FLOAT not in self.rows:
            self._keep(FLOAT, self.reference, {})

    def _run(self, contestant: Contestant) -> accuracy.Array:
        return harness.predict(contestant, self.task.inputs, self.options.threads, trim=self.task.trim)

    def _keep(self, name: str, y: accuracy.Array, extra: dict[str, Json]) -> None:
        row: dict[str, Any] = {**self.task.score(y, self.reference), **extra}
        row["drop"] = self.rows.get(FLOAT, row)["spearman"] - row["spearman"]
        bar = BARS.get(name.partition(" -> ")[0])
        if bar is not None:
            row["allowed"], row["holds"] = bar, bool(row["drop"] <= bar)
        self.rows[name] = row
        self._write()
        print(f"{name}: Spearman {row['spearman']:.4f}, drop {row['drop']:.4f}", flush=True)

    def _write(self) -> None:
        options = argparse.Namespace(**{**vars(self.options), "only": ""})
        harness.write("quant_text", self.rows, self.settings, options)

    def measure(self, name: str, build: Callable[[], Contestant]) -> None:
        """Build an engine, score it, keep the row; an engine that cannot be made is a row with its error."""
        if name in self.rows or self.options.rows not in name:
            return
        try:
            contestant = build()
            y = self._run(contestant)
        except (RuntimeError, ValueError, fxc.FxcError) as error:
            self.rows[name] = {"error": str(error)[:600]}
            self._write()
            print(f"{name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
            return
        self._keep(name, y, {"runtime": contestant.runtime, "settings": contestant.settings})

    def mine(self, target: str) -> None:
        """Every recipe of ours on one runtime."""
        for name, passes in recipes().items():

            def build(name: str = name, passes: list[Pass] = passes) -> Contestant:
                folder = "".join(c if c.isalnum() else "_" for c in name.lower())
                extra: dict[str, Any] = {"passes": passes, "measure": False, "folder": folder}
                return ours.compile_to(self.model, target, self.task.count, **extra)

            self.measure(f"{name} -> {target}", build)

    def others(self, target: str) -> None:
        """The peers' recipes on one runtime, and weights in 4 bits by NNCF."""
        for recipe in peers.recipes(self.model, self.options.quick):
            if recipe.runtime == target:
                self.measure(recipe.name, lambda recipe=recipe: peers.contestant(recipe, self.model, self.task.count))  # type: ignore[misc]
        if target == "openvino":
            self.measure(f"NNCF int4_sym groups of {GROUP}", self._nncf)

    def _nncf(self) -> Contestant:
        import nncf
        import openvino as ov

        path = work_folder() / self.model.name / "nncf-int4.xml"
        mode = nncf.CompressWeightsMode.INT4_SYM
        with export.quiet():
            model = nncf.compress_weights(export.convert_openvino(self.model), mode=mode, group_size=GROUP, ratio=1.0)
        path.parent.mkdir(parents=True, exist_ok=True)
        ov.save_model(model, path)
        return Contestant(f"NNCF int4_sym groups of {GROUP}", "openvino", str(path), {"recipe": "compress_weights"})


def main() -> None:
    """Command line."""
    options = harness.arguments("MiniLM on STS-B, quantized in every way.", only="", rows="", resume=False)
    bench = Bench(options)
    for target in ours.TARGETS:
        if options.only in ("", target):
            if not options.peers_only:
                bench.mine(target)
            bench.others(target)
    rows = [[n, r.get("spearman", "-"), r.get("drop", "-"), r.get("holds", "")] for n, r in bench.rows.items()]
    print(harness.table(["MiniLM STS-B", "Spearman", "drop", "holds its bar"], rows))


if __name__ == "__main__":
    main()
