"""Grids of a weight seen as rows: one scale and zero point per row and group of neighbouring input features.

Every layer's weight is worked on as ``[out, in]`` (`to_rows` / `from_rows`), whatever its own layout. The ranges of the
groups are the extremes, what errs least in the weight, or what errs least in the layer's *output*: for inputs with the
second moments ``H = X^T X`` the error of one group of a row is ``e H_gg e^T`` with ``e`` the change of its weights
(Lin et al., "AWQ", 2024, section 3.2 and their clip search; the moments say the same as the inputs themselves).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from fxcompress.quant.fake_quantize import FakeQuantize
from fxcompress.quant.rounding_options import RangeChoice
from fxcompress.quant.spec import QuantSpec, solve, stored_scale
from fxcompress.quant.weights import weight_range

__all__ = ["RowGrid", "rounded", "row_grid"]

#: Shrinking factors that the ``output`` search tries.
_FACTORS = tuple(1.0 - 0.02 * i for i in range(31))
#: Weights worked on at once.
_CHUNK = 1 << 18


@dataclass
class RowGrid:
    """Integers of the rows of a weight.

    Attributes:
        spec: Bits and symmetry; ``axis`` and ``group_size`` are those of the rows.
        scale: float32 [rows, groups].
        zero_point: float32 with whole numbers [rows, groups]; of a signed symmetric grid zeros that take no memory.
    """

    spec: QuantSpec
    scale: Tensor
    zero_point: Tensor

    def __post_init__(self) -> None:
        if self.spec.symmetric and self.spec.signed:
            self.zero_point = self.scale.new_zeros(()).expand(self.scale.shape)

    def round(self, rows: Tensor) -> Tensor:
        """``rows`` [out, in] on the grid."""
        groups = rows.unflatten(1, (self.scale.shape[1], -1))
        scale, zero_point = self.scale.to(rows).unsqueeze(-1), self.zero_point.to(rows).unsqueeze(-1)
        return rounded(groups, scale, zero_point, self.spec).flatten(1)

    def quantizer(self, axis: int) -> FakeQuantize:
        """The frozen fake-quantizer of a weight whose output channels are dimension ``axis``."""
        quantizer = FakeQuantize(dataclasses.replace(self.spec, axis=axis), device=self.scale.device)
        flat = self.spec.group_size is None
        quantizer.scale = (self.scale[:, 0] if flat else self.scale).clone()
        quantizer.zero_point = (self.zero_point[:, 0] if flat else self.zero_point).to(torch.int32)
        return quantizer


def rounded(values: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """``values`` on a grid whose tensors broadcast to them."""
    q = torch.div(values, scale).round_().add_(zero_point).clamp_(spec.qmin, spec.qmax)
    return q.sub_(zero_point).mul_(scale)


def row_grid(
    rows: Tensor, spec: QuantSpec, method: RangeChoice, moments: Tensor | None = None, dtype: torch.dtype | None = None
) -> RowGrid:
    """The grid of every group of ``rows``.

    Args:
        rows: Weight [out, in].
        spec: Bits, symmetry and group size; the group size divides ``in``.
        method: ``minmax``: the extremes; ``mse``: see `weight_range`; ``output``: the extremes times the factor among
            1.00, 0.98 ... 0.40 that makes ``e H_gg e^T`` least.
        moments: ``H`` [in, in], for ``output``.
        dtype: Of the weight; scales of a 16-bit weight are rounded to it, because engines keep them so.
    """
    size = spec.group_size or rows.shape[1]
    groups = rows.detach().reshape(-1, size)
    flat = dataclasses.replace(spec, axis=0, group_size=None)
    if method == "output" and moments is not None:
        low, high = _least_output_error(groups, flat, _blocks(moments, size))
    else:
        low, high = weight_range(groups, flat, "minmax" if method == "minmax" else "mse")
    scale, zero_point = (t.float().reshape(rows.shape[0], -1) for t in solve(low, high, spec))
    return RowGrid(dataclasses.replace(spec, axis=0), stored_scale(scale, dtype), zero_point)


def _blocks(moments: Tensor, size: int) -> Tensor:
    """The diagonal blocks of ``H``, [groups, size, size] in float32, scaled to a mean diagonal of 1."""
    count = moments.shape[0] // size
    blocks = torch.stack([moments[i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(count)])
    return (blocks / moments.diagonal().mean().clamp(min=1e-30)).float()


def _least_output_error(groups: Tensor, spec: QuantSpec, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Ranges [rows * groups] of ``groups`` [rows * groups, size]."""
    values = groups.float().unflatten(0, (-1, blocks.shape[0]))
    low, high = values.amin(-1), values.amax(-1)
    step = max(1, _CHUNK // values[0].numel())
    factors = torch.cat(
        [
            _best_factors(values[i : i + step], low[i : i + step], high[i : i + step], spec, blocks)
            for i in range(0, values.shape[0], step)
        ]
    )
    return (low * factors).flatten(), (high * factors).flatten()


def _best_factors(values: Tensor, low: Tensor, high: Tensor, spec: QuantSpec, blocks: Tensor) -> Tensor:
    """Factor of each range; ``values`` [rows, groups, size], ``low``, ``high`` [rows, groups]."""
    best, least = torch.ones_like(low), torch.full_like(low, torch.inf)
    for factor in _FACTORS:
        scale, zero_point = solve(low * factor, high * factor, spec)
        error = rounded(values, scale.float().unsqueeze(-1), zero_point.float().unsqueeze(-1), spec).sub_(values)
        cost = (torch.einsum("rgi,gij->rgj", error, blocks) * error).sum(-1)
        better = cost < least
        least, best = torch.where(better, cost, least), torch.where(better, factor, best)
    return best
