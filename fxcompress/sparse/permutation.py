"""An order of the input channels in which an N:M pattern keeps more magnitude (Pool and Yu, "Channel Permutations for
N:M Sparsity", 2021).

Stripes are the groups of M channels. In each round the stripes are paired at random and every pair is split anew in
the best of all ways (35 for M = 4); a round never makes it worse. The search is bounded by its rounds.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from fxcompress.sparse.pattern import Pattern

__all__ = ["find_permutation", "kept_magnitude"]

_ROUNDS = 200
_PATIENCE = 12
#: Splits of a pair that are tried at most; all 35 of M = 4.
_SPLITS = 64
_VALUES = 1 << 23
#: A round that gains less than this share of all magnitude is idle; the search ends after `_PATIENCE` idle ones.
_IDLE = 1e-4
#: Gain in kept magnitude below which an order counts as no better.
_GAIN = 1e-6


def kept_magnitude(magnitudes: Tensor, pattern: Pattern) -> float:
    """Share of ``magnitudes`` [rows, channels] that the best N:M mask keeps, 0 to 1."""
    grouped = magnitudes.double().unflatten(1, (-1, pattern.m))
    total = float(grouped.sum())
    return float(grouped.topk(pattern.n, dim=-1).values.sum()) / total if total else 1.0


def find_permutation(magnitudes: Tensor, pattern: Pattern, seed: int = 0) -> Tensor | None:
    """A better order of the channels: index tensor ``p`` to use as ``weight[:, p]``, or None when none was found.

    Args:
        magnitudes: Absolute weights [rows, channels]; ``channels`` is a multiple of M.
        pattern: N:M.
        seed: Of the pairing of stripes.
    """
    channels = magnitudes.shape[1]
    if channels < 2 * pattern.m:
        return None
    columns = magnitudes.detach().float().t().contiguous()
    splits = _splits(pattern.m).to(columns.device)
    order = torch.arange(channels, device=columns.device).view(-1, pattern.m)
    generator = torch.Generator().manual_seed(seed)
    threshold = _IDLE * float(columns.sum())
    idle = 0
    for _ in range(_ROUNDS):
        gain = _round(columns, order, splits, pattern, generator)
        idle = 0 if gain > threshold else idle + 1
        if idle == _PATIENCE:
            break
    permutation = order.flatten()
    before, after = (kept_magnitude(m, pattern) for m in (magnitudes, magnitudes[:, permutation]))
    return permutation if after > before + _GAIN else None


def _round(columns: Tensor, order: Tensor, splits: Tensor, pattern: Pattern, generator: torch.Generator) -> float:
    """Split each of a random set of pairs of stripes in the best way; ``order`` is rewritten. Gives the gain."""
    stripes = torch.randperm(len(order), generator=generator)[: len(order) // 2 * 2].view(-1, 2).to(order.device)
    gain = 0.0
    for pairs in stripes.split(max(1, _VALUES // (len(splits) * 2 * columns.shape[1]))):
        members = order[pairs].flatten(1)  # [pairs, 2 m]
        values = columns[members]  # [pairs, 2 m, rows]
        kept = torch.stack([_kept(values, split, pattern) for split in splits])  # [splits, pairs]
        best = kept.argmax(0)
        rise = kept.gather(0, best.unsqueeze(0))[0] - kept[0]
        best = torch.where(rise > 0, best, torch.zeros_like(best))  # the first split is the present one
        order[pairs] = members.gather(1, splits[best]).view(-1, 2, pattern.m)
        gain += float(rise.clamp(min=0).sum())
    return gain


def _kept(values: Tensor, split: Tensor, pattern: Pattern) -> Tensor:
    """Magnitude that each pair keeps when its 2 m channels ``values`` [pairs, 2 m, rows] are split like that."""
    halves = split.view(2, pattern.m).tolist()
    return torch.stack([_top(values, half, pattern.n).sum(-1) for half in halves]).sum(0)


def _top(values: Tensor, channels: list[int], n: int) -> Tensor:
    """Sum of the ``n`` largest of some channels, per pair and row; by exchanges, as sorting few values is slow."""
    items = [values[:, c] for c in channels]
    for done in range(n):
        for i in range(len(items) - 1 - done):
            low, high = torch.minimum(items[i], items[i + 1]), torch.maximum(items[i], items[i + 1])
            items[i], items[i + 1] = low, high
    return torch.stack(items[len(items) - n :]).sum(0)


def _splits(m: int) -> Tensor:
    """Ways to split 2 m channels into two stripes [ways, 2 m], the present one first; at most `_SPLITS` of them."""
    everything = range(2 * m)
    halves = (half for half in itertools.combinations(everything, m) if half[0] == 0)  # the other half is implied
    chosen = list(itertools.islice(halves, 1 << 12))
    if len(chosen) > _SPLITS:
        picked = torch.randperm(len(chosen) - 1, generator=torch.Generator().manual_seed(0))[: _SPLITS - 1] + 1
        chosen = [chosen[0], *(chosen[i] for i in picked.tolist())]
    return torch.tensor([[*half, *(c for c in everything if c not in half)] for half in chosen])
