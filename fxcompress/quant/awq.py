"""AWQ: scales for input channels that make rounding hurt the layer's output least.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", 2024, equations 4 and 5:
``s = s_X^a`` with ``s_X`` the mean magnitude of each input channel, and ``a`` searched so that
``||Q(W diag(s)) (diag(s)^-1 X) - W X||`` is least. With ``H = X^T X`` that is ``tr(E H E^T)`` for
``E = Q(W diag(s)) diag(s)^-1 - W``, so the inputs themselves need not be kept. As in the authors' code, a second family
``s_X^a / s_W^(1 - a)`` is searched, with ``s_W`` the mean magnitude of a channel's weights within their groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxcompress.quant.grids import row_grid
from fxcompress.quant.migration import Migration
from fxcompress.quant.spec import QuantSpec

__all__ = ["output_error", "search_factors"]

_STEPS = 20
#: Rows that are looked at in the search.
_ROWS = 512


def search_factors(rows: Tensor, moments: Tensor, magnitude: Tensor, spec: QuantSpec, migration: Migration) -> Tensor:
    """The best factors [migration.count] to multiply the columns of ``rows`` by; ones when nothing is better.

    Args:
        rows: Weights of all layers that read the channels, [out, in].
        moments: ``H`` [in, in].
        magnitude: ``s_X`` [in].
        spec: The grid of the rows.
        migration: Which channels share a factor.
    """
    rows = rows[torch.linspace(0, len(rows) - 1, min(_ROWS, len(rows))).long()].float()
    hessian = (moments / moments.diagonal().mean()).float()
    given = migration.pooled(magnitude.float()).clamp(min=1e-4)
    weight = migration.pooled(_weight_magnitude(rows, spec)).clamp(min=1e-4)
    best = torch.ones(migration.count)
    least = output_error(rows, _rounded_scaled(rows, best[migration.groups], spec), hessian)
    for step in range(_STEPS):
        alpha = step / _STEPS
        for factors in (given**alpha, given**alpha / weight ** (1 - alpha)):
            factors = factors.clamp(min=1e-4)
            factors = factors / (factors.max() * factors.min()).sqrt()
            error = output_error(rows, _rounded_scaled(rows, factors[migration.groups], spec), hessian)
            if error < least:
                least, best = error, factors
    return best


def output_error(rows: Tensor, new: Tensor, moments: Tensor) -> float:
    """``tr(E H E^T)`` for ``E = new - rows``."""
    error = new - rows
    return float(((error @ moments) * error).sum())


def _rounded_scaled(rows: Tensor, factors: Tensor, spec: QuantSpec) -> Tensor:
    """``Q(W diag(s)) diag(s)^-1``, ranges being extremes."""
    scaled = rows * factors
    return row_grid(scaled, spec, "minmax").round(scaled) / factors


def _weight_magnitude(rows: Tensor, spec: QuantSpec) -> Tensor:
    """Mean over the rows of ``|w|`` in units of the largest weight of its group."""
    groups = rows.abs().unflatten(1, (-1, spec.group_size or rows.shape[1]))
    shares: Tensor = groups / groups.amax(-1, keepdim=True).clamp(min=1e-30)
    return shares.flatten(1).mean(0)
