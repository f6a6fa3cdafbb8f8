"""Tokens that a model's vocabulary does not have, named before an embedding fails on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.errors import CalibrationError
from fxcompress.ir import Program

__all__ = ["check_tokens", "tokens_checked"]


def check_tokens(number: int, name: str, embedding: nn.Embedding, tokens: Tensor) -> None:
    """Raise CalibrationError when ``tokens`` of calibration batch ``number`` are none of ``embedding``'s."""
    if tokens.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(tokens))
    if low < 0 or high >= embedding.num_embeddings:
        raise CalibrationError(
            208,
            f"calibration batch {number} holds the token {low if low < 0 else high}",
            where=name,
            why=f"the vocabulary has {embedding.num_embeddings} tokens, 0 to {embedding.num_embeddings - 1}",
            fix="use the tokenizer of this very model",
        )


@contextmanager
def tokens_checked(program: Program, number: int) -> Iterator[None]:
    """All embeddings check their tokens while calibration batch ``number`` is run."""
    with ExitStack() as stack:
        for name, module in program.gm.named_modules():
            if isinstance(module, nn.Embedding):
                stack.callback(module.register_forward_pre_hook(_check(number, name)).remove)
        yield


def _check(number: int, name: str) -> Any:
    return lambda module, args: check_tokens(number, name, module, args[0])
