"""One recipe of ours on SmolLM2 in a process of its own: perplexity, seconds and memory for `benchmarks.quant_peers`.

    python -m benchmarks.quant_worker --model FOLDER --tokens tokens.safetensors --recipe '[{"name": "QuantizeWeights", ...}]'

The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import benchmarks.torchvision_cpu  # noqa: F401  lets transformers import torchvision beside a CPU build of torch
import fxcompress as fxc
import fxcompress.passes  # recipes name passes
from benchmarks import smollm
from benchmarks.quant_peer import load, memory
from fxcompress.passbase import Pass


def compressed(model: Any, recipe: list[dict[str, Any]], calibration: Tensor) -> fxc.Program:
    """The model captured at any sequence length, behind all passes of the recipe."""
    model.config.use_cache = False
    auto = torch.export.Dim.AUTO
    program = fxc.capture(
        model, (), {"input_ids": calibration[:2, :32]}, dynamic_shapes={"input_ids": {0: auto, 1: auto}}
    )
    context = fxc.Context(calibration=[{"input_ids": row[None]} for row in calibration], verify=False)
    program = fxc.Pipeline(tuple(Pass.from_dict(entry) for entry in recipe))(program, context).program
    program.gm.eval()
    return program


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="A recipe of fxcompress on a language model.")
    parser.add_argument("--model", required=True, help="folder that transformers reads, with a model 'tiny' in it")
    parser.add_argument(
        "--tokens", required=True, help="safetensors file: 'calibration' and 'evaluation' [count, length]"
    )
    parser.add_argument("--recipe", required=True, help="list of passes as JSON")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokens, recipe = load_file(options.tokens), json.loads(options.recipe)
    compressed(load(f"{options.model}/tiny"), recipe, tokens["calibration"][:2, :64])
    base = memory("VmRSS")
    model = load(options.model)
    start = time.perf_counter()
    program = compressed(model, recipe, tokens["calibration"])
    seconds, most = time.perf_counter() - start, memory("VmHWM")
    value = smollm.perplexity(lambda ids: program(input_ids=ids).logits, tokens["evaluation"])
    print(json.dumps({"perplexity": value, "seconds": seconds, "peak_bytes": most - base}))


if __name__ == "__main__":
    main()
