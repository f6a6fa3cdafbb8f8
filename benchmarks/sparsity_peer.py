"""LLM Compressor's SparseGPT and Wanda on a causal language model: writes the sparse weights for `benchmarks.sparsity_llm`.

    python benchmarks/sparsity_peer.py --model FOLDER --tokens tokens.safetensors --method sparsegpt --pattern 2:4 --out FILE

It runs in an environment of its own that has ``llmcompressor`` and ``torch``, so that its versions do not have to fit
ours, and imports nothing of this project.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
from typing import Any

import torch


def main() -> None:
    """Command line; the last line printed is JSON with the versions used."""
    parser = argparse.ArgumentParser(description="Sparse weights by LLM Compressor.")
    parser.add_argument("--model", required=True, help="folder that transformers reads")
    parser.add_argument(
        "--tokens", required=True, help="safetensors file with calibration sequences 'tokens' [count, length]"
    )
    parser.add_argument("--method", choices=("sparsegpt", "wanda"), required=True)
    parser.add_argument("--pattern", required=True, help="0:0 for unstructured, or N:M")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    compressor: Any = importlib.import_module("llmcompressor")
    datasets: Any = importlib.import_module("datasets")
    safetensors: Any = importlib.import_module("safetensors.torch")
    transformers: Any = importlib.import_module("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    rows = safetensors.load_file(options.tokens)["tokens"].tolist()
    dataset = datasets.Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(r) for r in rows]})
    compressor.oneshot(
        model=model,
        processor=transformers.AutoTokenizer.from_pretrained(options.model),
        dataset=dataset,
        recipe=modifier(options.method, options.pattern),
        num_calibration_samples=len(rows),
        max_seq_length=len(rows[0]),
        shuffle_calibration_samples=False,
    )
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    safetensors.save_file({n: m.weight.detach().float().contiguous() for n, m in linear.items()}, options.out)
    print(json.dumps({name: importlib.metadata.version(name) for name in ("llmcompressor", "torch", "transformers")}))


def modifier(method: str, pattern: str) -> Any:
    """The peer's recipe: its defaults, half of the weights of all linear layers but the head."""
    pruning: Any = importlib.import_module("llmcompressor.modifiers.pruning")
    kind = pruning.SparseGPTModifier if method == "sparsegpt" else pruning.WandaPruningModifier
    return kind(sparsity=0.5, mask_structure=pattern, targets=["LlamaDecoderLayer"], ignore=["re:.*lm_head"])


if __name__ == "__main__":
    main()
