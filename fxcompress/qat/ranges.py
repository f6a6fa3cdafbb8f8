"""Ranges of least squared error: a search to begin with, and a step of it in every training step.

Some widths around that of LSQ's first step are tried; Lloyd's algorithm ("Least squares quantization in PCM", 1982) goes on
from the best on a uniform grid: values are rounded, then the grid is the line ``scale q + offset`` that fits them best.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxcompress.quant.spec import QuantSpec, solve

__all__ = ["fitted_range", "least_error_range"]

_WIDTHS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.15, 1.3, 1.5, 1.75, 2.0, 2.5)
_ROUNDS = 3
#: Values of a tensor that are looked at where it has one range.
_SAMPLE = 1 << 14


@torch.no_grad()
def least_error_range(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """A range whose grid has nearly the least squared error, never more than that of the extremes.

    Args:
        x: Finite values; about 16,000 of them are looked at where there is one range.
        spec: The grid, with one range for each channel ``spec.axis`` or one for all.

    Returns:
        The ends, float32 [channels] or [].
    """
    rows = _rows(x.detach(), spec)
    low, high = rows.amin(1), rows.amax(1)
    best, least = (low, high), _error(rows, low, high, spec)

    def consider(begin: Tensor, end: Tensor) -> None:
        nonlocal best, least
        begin, end = torch.maximum(begin, low), torch.minimum(end, high)
        error = _error(rows, begin, end, spec)
        better = error < least
        best = torch.where(better, begin, best[0]), torch.where(better, end, best[1])
        least = torch.where(better, error, least)

    centre, reach = _first(rows, low, spec)
    for width in _WIDTHS:
        consider(centre - width * reach, centre + width * reach)
    for _ in range(_ROUNDS):
        consider(*_fitted(rows, *best, spec)[:2])
    return (best[0][0], best[1][0]) if spec.axis is None else best


@torch.no_grad()
def fitted_range(x: Tensor, spec: QuantSpec, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """One step of Lloyd's algorithm from a range near the best one; arguments and result as in `least_error_range`."""
    rows = _rows(x.detach(), spec)
    begin, end, usable = _fitted(rows, low.reshape(-1), high.reshape(-1), spec)
    if bool((~usable & rows.any(1)).any()):  # far too wide: all values have one integer
        return least_error_range(x, spec)
    return begin.reshape(low.shape), end.reshape(high.shape)


def _rows(x: Tensor, spec: QuantSpec) -> Tensor:
    if spec.axis is not None:
        return x.movedim(spec.axis, 0).flatten(1).float() if x.dim() > 1 else x.reshape(-1, 1).float()
    flat = x.reshape(-1)
    return flat[:: max(1, len(flat) // _SAMPLE)].float()[None]


def _first(rows: Tensor, low: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Centre and reach; a step is twice the mean magnitude over the root of the largest integer, as in LSQ."""
    one_sided = bool((low >= 0).all())
    centre = torch.zeros_like(low) if spec.symmetric or one_sided else rows.mean(1)
    most = spec.qmax if spec.symmetric else spec.steps if one_sided else (spec.steps + 1) // 2
    step = (rows - centre[:, None]).abs().mean(1) * (2.0 / math.sqrt(most))
    return centre, step * most


def _fitted(rows: Tensor, low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor, Tensor]:
    """The range of the line that fits ``rows`` best, given the integers they have in this range, and where there is one."""
    scale, zero_point = (t.float()[:, None] for t in solve(low, high, spec))
    q = (rows / scale).round_().clamp_(spec.qmin - zero_point, spec.qmax - zero_point)
    offset: Tensor | float = 0.0
    if not spec.symmetric and bool((low < 0).any()):
        mean_q, mean_x = q.mean(1, keepdim=True), rows.mean(1, keepdim=True)
        slope = ((q - mean_q) * (rows - mean_x)).sum(1, keepdim=True) / (q - mean_q).square().sum(1, keepdim=True)
        offset = mean_x - slope * mean_q
    else:
        slope = (q * rows).sum(1, keepdim=True) / q.square().sum(1, keepdim=True)
    usable = (torch.isfinite(slope) & (slope > 0))[:, 0]  # else all have the same integer
    ends = (slope * (spec.qmin - zero_point) + offset, slope * (spec.qmax - zero_point) + offset)
    begin, end = (torch.where(usable, new[:, 0], old) for new, old in zip(ends, (low, high), strict=True))
    return begin, end, usable


def _error(rows: Tensor, low: Tensor, high: Tensor, spec: QuantSpec) -> Tensor:
    scale, zero_point = (t.float()[:, None] for t in solve(low, high, spec))
    q = (rows / scale).round_().clamp_(spec.qmin - zero_point, spec.qmax - zero_point)
    return (q * scale - rows).square().sum(1)
