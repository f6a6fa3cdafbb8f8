"""GPTQ: rounds a weight column by column; the columns still open take up each rounding error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2023, algorithm 1.
With ``H = X^T X + damping``, ``C`` the upper Cholesky factor of ``H^-1`` and ``w`` a row: rounding ``w_j`` to ``q_j``
costs ``((w_j - q_j) / C_jj)^2``, and ``w_k -= (w_j - q_j) / C_jj * C_jk`` for all ``k > j`` takes the error up as well as
those columns can.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxcompress.data import all_finite
from fxcompress.errors import PassError
from fxcompress.quant.grids import RowGrid, rounded, row_grid
from fxcompress.quant.rounding_options import RangeChoice

__all__ = ["Curvature", "factorize", "gptq"]

#: Columns after which the columns to the right are updated.
_BLOCK = 128
#: How often damping is made ten times as large before GPTQ gives up.
_ESCALATIONS = 6


@dataclass(frozen=True)
class Curvature:
    """What GPTQ needs of a layer's inputs.

    Attributes:
        factor: Upper Cholesky factor of the inverse of the damped Hessian, columns in the order of ``order``.
        order: Columns in the order in which they are rounded.
        damping: Share of the mean diagonal that was added; more than asked for when that was not enough.
    """

    factor: Tensor
    order: Tensor
    damping: float


def factorize(moments: Tensor, damping: float, act_order: bool, out: Tensor | None = None) -> Curvature:
    """Damp, order and factorize ``H``.

    Inputs that are always zero say nothing: they get a curvature of 1 of their own, so their weights are just rounded.

    Args:
        moments: ``H = X^T X`` [in, in].
        damping: Share of the mean of the diagonal to add to the diagonal.
        act_order: Round the columns with the largest inputs first.
        out: Where to put the factor [in, in], in any dtype: it is computed in float64. It may be ``moments``. Default: a
            new float64 tensor.

    Raises:
        PassError: ``H`` is not finite or not positive definite even with much more damping.
    """
    sizes = moments.diagonal()
    order = torch.argsort(sizes, descending=True, stable=True) if act_order else torch.arange(len(moments))
    mean = float(sizes.double().mean()) or 1.0
    for _ in range(_ESCALATIONS + 1):
        factor = _inverse_factor(moments, order, damping * mean)
        if factor is not None:
            place = torch.empty_like(moments, dtype=torch.float64) if out is None else out
            return Curvature(_turned(factor, place), order, damping)
        damping = max(damping, 1e-3) * 10
    raise PassError(
        60,
        "the second moments of a layer's inputs cannot be factorized",
        why="they are not finite, or not positive definite even when damped",
        fix="check the calibration data, use more of it, or leave the layer out with ignore=...",
    )


def _inverse_factor(moments: Tensor, order: Tensor, damping: float) -> Tensor | None:
    """Upper ``C`` with ``C^T C = H^-1``, its rows and columns in reverse order; None: ``H`` is not positive definite.

    With the columns in reverse order ``H = L L^T``, so that ``L^-1``, put in order again, is ``C``.
    """
    order = order.flip(0)
    hessian = torch.empty_like(moments, dtype=torch.float64)
    for part, rows in zip(hessian.split(_BLOCK), order.split(_BLOCK), strict=True):
        part.copy_(moments[rows[:, None], order])  # in parts: of a large layer there is no memory for another copy
    diagonal = hessian.diagonal()
    diagonal.add_((diagonal <= 0).double() + damping)
    lower, bad = hessian.t(), torch.empty((), dtype=torch.int32, device=hessian.device)
    torch.linalg.cholesky_ex(lower, out=(lower, bad))  # where it lies: columns in one piece, as LAPACK wants them
    if int(bad) or not all_finite(hessian):
        return None
    _invert(lower)
    return lower if all_finite(hessian) else None


def _turned(matrix: Tensor, result: Tensor) -> Tensor:
    """Rows and columns in reverse order, put into ``result``; in parts, as above."""
    for begin in range(0, len(matrix), _BLOCK):
        part = matrix[begin : begin + _BLOCK].flip(0, 1)
        result[len(matrix) - begin - len(part) : len(matrix) - begin] = part
    return result


def _invert(lower: Tensor) -> None:
    """Invert a lower triangular matrix where it lies, from its last columns to its first."""
    for begin in reversed(range(0, len(lower), _BLOCK)):
        end = min(begin + _BLOCK, len(lower))
        corner, below = lower[begin:end, begin:end], lower[end:, begin:end]
        inverse = torch.linalg.solve_triangular(corner, torch.eye(end - begin).to(corner), upper=False)
        below.copy_((lower[end:, end:] @ below @ inverse).neg_())
        corner.copy_(inverse)


def gptq(
    rows: Tensor, curvature: Curvature, grid: RowGrid, regrid: RangeChoice | None = None
) -> tuple[Tensor, RowGrid]:
    """Round ``rows`` to ``grid``.

    Args:
        rows: Weight [out, in]; float64 is worked on in float64, all else in float32.
        curvature: Of the layer's inputs.
        grid: Static groups: one grid for the whole act, so that columns can be rounded in any order.
        regrid: Take each group's range anew, in this way, from what its weights have become when its first column is
            reached. Only for columns in their own order.

    Returns:
        The rounded rows and the grid they lie on.
    """
    work = rows.to(torch.float64 if rows.dtype == torch.float64 else torch.float32)[:, curvature.order].t().contiguous()
    solver = _Solver(curvature, grid, regrid, work)
    width = _BLOCK if regrid is None else max(1, _BLOCK // solver.size) * solver.size
    for begin in range(0, len(work), width):
        block = work[begin : begin + width]
        errors = solver.round_block(block, begin)
        work[begin + width :].addmm_(solver.factor[begin : begin + width, begin + width :].t(), errors, alpha=-1)
    result = torch.empty_like(work)
    result[curvature.order] = work
    return result.t().contiguous(), solver.grid


class _Solver:
    """One rounding; everything is laid out [columns, rows], so that a column lies in one piece."""

    def __init__(self, curvature: Curvature, grid: RowGrid, regrid: RangeChoice | None, work: Tensor) -> None:
        self.factor, self.regrid = curvature.factor.to(work), regrid
        self.size = grid.spec.group_size or len(work)
        self.group_of: list[int] = (curvature.order // self.size).tolist()
        self.spec = grid.spec
        self.scale, self.zero_point = grid.scale.t().to(work, copy=True), grid.zero_point.t().to(work, copy=True)

    @property
    def grid(self) -> RowGrid:
        """The grid as it is now."""
        return RowGrid(self.spec, self.scale.t().float().contiguous(), self.zero_point.t().float().contiguous())

    def round_block(self, block: Tensor, begin: int) -> Tensor:
        """Round ``block`` [columns, rows] in place; its scaled errors, of the same shape."""
        errors = torch.empty_like(block)
        for j in range(len(block)):
            group = self.group_of[begin + j]
            if self.regrid is not None and (begin + j) % self.size == 0:
                self._take_range(block[j : j + self.size], group)
            new = rounded(block[j], self.scale[group], self.zero_point[group], self.spec)
            ahead = self.factor[begin + j, begin + j : begin + len(block)]
            errors[j] = (block[j] - new) / ahead[0]
            block[j + 1 :].addr_(ahead[1:], errors[j], alpha=-1)
            block[j] = new
        return errors

    def _take_range(self, group: Tensor, index: int) -> None:
        fresh = row_grid(group.t(), self.spec, self.regrid or "minmax")
        self.scale[index], self.zero_point[index] = fresh.scale[:, 0].to(group), fresh.zero_point[:, 0].to(group)
