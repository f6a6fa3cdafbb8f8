"""One quantizer of another project on a causal language model: perplexity, seconds and memory for `benchmarks.quant_peers`.

    python benchmarks/quant_peer.py --model FOLDER --tokens tokens.safetensors --method "LLM Compressor GPTQ"

It runs in an environment of its own that has the peer and ``torch``, so that its versions do not have to fit ours, and
imports nothing of this project. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GROUP = 64


def scheme(bits: int, symmetric: bool) -> dict[str, Any]:
    """Compressed-tensors' name for groups of 64 in all linear layers."""
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": GROUP}
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}


def recipe(method: str, bits: int, symmetric: bool) -> list[Any]:
    """LLM Compressor's modifiers, their defaults untouched but for SmoothQuant's strength, which its examples set to 0.8."""
    quantization: Any = importlib.import_module("llmcompressor.modifiers.quantization")
    transform: Any = importlib.import_module("llmcompressor.modifiers.transform")
    gptq: Any = importlib.import_module("llmcompressor.modifiers.gptq")
    plain = quantization.QuantizationModifier
    grid = scheme(bits, symmetric)
    if method == "RTN":
        return [plain(**grid)]
    if method == "GPTQ":
        return [gptq.GPTQModifier(**grid)]
    if method == "AWQ":
        return [importlib.import_module("llmcompressor.modifiers.transform.awq").AWQModifier(), plain(**grid)]
    if method == "W8A8":
        return [plain(targets="Linear", scheme="W8A8", ignore=["lm_head"])]
    if method in ("SmoothQuant, W8A8", "SmoothQuant, GPTQ, W8A8"):
        rounding = gptq.GPTQModifier if "GPTQ" in method else plain
        smooth = transform.SmoothQuantModifier(smoothing_strength=0.8)
        return [smooth, rounding(targets="Linear", scheme="W8A8", ignore=["lm_head"])]
    raise ValueError(f"LLM Compressor {method} is not known")


def llm_compressor(model: Any, folder: str, rows: list[list[int]], method: str, bits: int, symmetric: bool) -> Any:
    """``oneshot``; the model quantizes as it runs afterwards."""
    compressor: Any = importlib.import_module("llmcompressor")
    datasets: Any = importlib.import_module("datasets")
    cache: Any = importlib.import_module("llmcompressor.pipelines.cache")
    cache.IntermediatesCache.pin_memory = lambda *_: None  # its AWQ asks for memory that only an accelerator pins
    transformers: Any = importlib.import_module("transformers")
    dataset = datasets.Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(r) for r in rows]})
    return compressor.oneshot(
        model=model,
        processor=transformers.AutoTokenizer.from_pretrained(folder),
        dataset=dataset,
        recipe=recipe(method, bits, symmetric),
        num_calibration_samples=len(rows),
        max_seq_length=len(rows[0]),
        shuffle_calibration_samples=False,
    )


def auto_round(model: Any, folder: str, rows: list[list[int]], method: str, bits: int, symmetric: bool) -> Any:
    """AutoRound's tuning by one of its recipes: ``default`` or ``light``."""
    iters, rate = {"default": (200, None), "light": (50, 5e-3)}[method]
    transformers: Any = importlib.import_module("transformers")
    rounding: Any = importlib.import_module("auto_round").AutoRound(
        model,
        transformers.AutoTokenizer.from_pretrained(folder),
        bits=bits,
        group_size=GROUP,
        sym=symmetric,
        iters=iters,
        lr=rate,
        dataset=[{"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row))} for row in rows],
        seqlen=len(rows[0]),
        nsamples=len(rows),
        device_map="cpu",
        enable_torch_compile=False,
        low_gpu_mem_usage=False,
    )
    return rounding.quantize()[0]


PEERS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "LLM Compressor": (llm_compressor, ("llmcompressor", "compressed-tensors")),
    "AutoRound": (auto_round, ("auto-round",)),
}


def memory(name: str) -> int:
    """``VmRSS`` or ``VmHWM`` (the most so far) of this process in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def load(folder: str) -> Any:
    """The model in float32."""
    transformers: Any = importlib.import_module("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def perplexity(model: Any, sequences: Tensor) -> float:
    """``exp`` of the mean negative log-likelihood of every token but the first of each sequence."""
    losses = []
    for row in sequences:
        logits = model(input_ids=row[None], use_cache=False).logits[0, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, row[1:]).double())
    return math.exp(float(torch.stack(losses).mean()))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="A peer's quantizer on a language model.")
    parser.add_argument("--model", required=True, help="folder that transformers reads, with a model 'tiny' in it")
    parser.add_argument(
        "--tokens", required=True, help="safetensors file: 'calibration' and 'evaluation' [count, length]"
    )
    parser.add_argument("--method", required=True, help=f"one of {', '.join(PEERS)}, and its method")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    peer = next(name for name in PEERS if options.method.startswith(name))
    run, packages = PEERS[peer]
    safetensors: Any = importlib.import_module("safetensors.torch")
    tokens = safetensors.load_file(options.tokens)
    rows, method = tokens["calibration"].tolist(), options.method.removeprefix(peer).strip()
    how = (method, options.bits, not options.asymmetric)
    run(load(f"{options.model}/tiny"), options.model, [row[:64] for row in rows[:2]], *how)
    base = memory("VmRSS")
    model = load(options.model)
    start = time.perf_counter()
    quantized = run(model, options.model, rows, *how)
    seconds, most = time.perf_counter() - start, memory("VmHWM")
    found = {
        "perplexity": perplexity(quantized if quantized is not None else model, tokens["evaluation"]),
        "seconds": seconds,
        "peak_bytes": most - base,
        "versions": {name: importlib.metadata.version(name) for name in (*packages, "torch", "transformers")},
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
