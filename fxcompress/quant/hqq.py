"""Half-quadratic fitting of a grid to a weight, without data.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023: the error is measured with
``sum |e|^p``, ``p = 0.7``, which lets few weights err much, and is split into a sparse part ``e`` (a generalized
soft-thresholding of the residual) and a grid that is fitted to ``w - e``. They fit a real zero point; zero points are
integers here, as engines want them, so the scale is fitted as well, by least squares.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fxcompress.quant.grids import RowGrid, rounded, row_grid
from fxcompress.quant.spec import SCALE_FLOOR, QuantSpec, stored_scale

__all__ = ["hqq_grid"]

_POWER, _BETA, _KAPPA, _STEPS = 0.7, 10.0, 1.01, 20
_CHUNK = 1 << 20


def hqq_grid(rows: Tensor, spec: QuantSpec, dtype: torch.dtype | None = None) -> RowGrid:
    """The grid of every group of ``rows`` [out, in]; ``sum |e|^p`` is never more than that of the ``mse`` range."""
    start = row_grid(rows, spec, "mse", None, dtype)
    groups = rows.float().unflatten(1, (start.scale.shape[1], -1)).flatten(0, 1)
    scale, zero = start.scale.reshape(-1, 1).clone(), start.zero_point.reshape(-1, 1).clone()
    for part in torch.arange(len(groups)).split(max(1, _CHUNK // groups.shape[1])):
        scale[part], zero[part] = _fitted(groups[part], scale[part], zero[part], spec)
    shape = start.scale.shape
    return dataclasses.replace(start, scale=stored_scale(scale, dtype).reshape(shape), zero_point=zero.reshape(shape))


def _fitted(values: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point [groups, 1] of ``values`` [groups, size]."""
    best = (scale, zero)
    least = _cost(values, scale, zero, spec)
    beta = _BETA
    for _ in range(_STEPS):
        steps = torch.round(values / scale).add_(zero).clamp_(spec.qmin, spec.qmax)
        residual = values / scale - (steps - zero)
        shrunk = residual.abs() - residual.abs().clamp(min=1e-6).pow(_POWER - 1) / beta
        target = values - residual.sign() * shrunk.clamp_(min=0) * scale
        if not spec.symmetric:
            zero = (steps - target / scale).mean(1, keepdim=True).round_().clamp_(spec.qmin, spec.qmax)
        integers = steps - zero
        square = integers.square().sum(1, keepdim=True)
        fitted = (integers * target).sum(1, keepdim=True) / square.clamp(min=1)
        scale = torch.where((fitted > SCALE_FLOOR) & (square > 0), fitted, scale)
        cost = _cost(values, scale, zero, spec)
        better = cost < least
        least = torch.where(better, cost, least)
        best = (torch.where(better, scale, best[0]), torch.where(better, zero, best[1]))
        beta *= _KAPPA
    return best


def _cost(values: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
    return (rounded(values, scale, zero, spec) - values).abs_().pow_(_POWER).sum(1, keepdim=True)
