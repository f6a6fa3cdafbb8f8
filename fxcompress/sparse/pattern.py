"""Which weights go: N of every M, or a share of a row, of a layer, of the whole model. Ties never change the count."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxcompress.errors import PruneError

__all__ = ["Pattern", "lowest", "lowest_of_all", "parse_pattern"]


@dataclass(frozen=True)
class Pattern:
    """``n`` weights are kept of every ``m`` neighbours along the reduction axis."""

    n: int
    m: int

    @property
    def sparsity(self) -> float:
        """Share of zeros: 0.5 for 2:4."""
        return 1 - self.n / self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def prune(self, scores: Tensor) -> Tensor:
        """Where to put zeros (bool): the ``m - n`` lowest of every ``m`` scores along the last axis."""
        grouped = scores.unflatten(-1, (-1, self.m))
        order = grouped.argsort(dim=-1, stable=True)
        pruned = torch.zeros_like(grouped, dtype=torch.bool)
        return pruned.scatter_(-1, order[..., : self.m - self.n], True).flatten(-2)


def parse_pattern(pattern: Any) -> Pattern | None:
    """A pattern from ``"2:4"``, ``(2, 4)`` or ``[2, 4]``: 2 kept of every 4. None stays None.

    Raises:
        PruneError: something else, or not ``0 < n < m``.
    """
    if pattern is None or isinstance(pattern, Pattern):
        return pattern
    pair: Sequence[Any] = ()
    if isinstance(pattern, str) and re.fullmatch(r"\d+:\d+", pattern):
        pair = [int(part) for part in pattern.split(":")]
    elif isinstance(pattern, (list, tuple)):
        pair = pattern
    whole = len(pair) == 2 and all(isinstance(v, int) and not isinstance(v, bool) for v in pair)
    if not whole or not 0 < pair[0] < pair[1]:
        fix = "write '2:4' or (2, 4) for two weights kept of every four"
        raise PruneError(202, f"pattern={pattern!r} is not N:M with 0 < N < M", fix=fix)
    return Pattern(pair[0], pair[1])


def lowest(scores: Tensor, sparsity: float, dims: int) -> Tensor:
    """The ``round(sparsity * size)`` lowest scores of each slice over the last ``dims`` axes, as bool."""
    flat = scores.flatten(-dims)
    count = round(sparsity * flat.shape[-1])
    pruned = torch.zeros_like(flat, dtype=torch.bool)
    chosen = flat.topk(count, dim=-1, largest=False, sorted=False).indices
    return pruned.scatter_(-1, chosen, True).reshape(scores.shape)


def lowest_of_all(scores: Sequence[Tensor], sparsity: float) -> list[Tensor]:
    """The ``round(sparsity * size)`` lowest of all scores together, as one bool tensor for each."""
    everything = torch.cat([s.flatten().cpu() for s in scores])
    pruned = lowest(everything, sparsity, 1)
    parts = pruned.split([s.numel() for s in scores])
    return [part.reshape(s.shape).to(s.device) for part, s in zip(parts, scores, strict=True)]
