"""Rounding to an integer grid with gradients: straight-through, and LSQ's for a learned scale and offset.

With ``s`` the scale, ``z`` the integer zero point and ``[qmin, qmax]`` the grid, both functions give
``y = (clamp(round(x / s) + z, qmin, qmax) - z) s``, to the last bit what `fxcompress.ops.fake_quantize` gives. It is
computed as ``round(clamp(x, lo, hi) / s) s`` with ``lo = (qmin - z) s`` and ``hi = (qmax - z) s``: the borders are integers,
so that the order of rounding and clamping does not matter, and ``lo <= x <= hi`` is the mask of the backward pass.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["round_learned", "round_straight_through"]


def round_straight_through(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, qmin: int, qmax: int) -> Tensor:
    """``x`` on the grid; the gradient passes inside ``[lo, hi]`` and is 0 outside (Jacob et al. 2018).

    Args:
        x: Float tensor of any shape.
        scale: Float [] or [channels], positive; takes no gradient.
        zero_point: Integers, same shape.
        axis: Dimension of ``x`` that ``scale`` runs along; -1 for one scale.
        qmin: Smallest integer.
        qmax: Largest integer.
    """
    function: Any = _StraightThrough.apply
    return cast(Tensor, function(x, scale, zero_point, axis, qmin, qmax))


def round_learned(
    x: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    zero_point: Tensor,
    axis: int,
    limits: tuple[int, int],
    share: float,
    *,
    moves: bool = True,
) -> Tensor:
    """``x`` on a grid whose scale, and offset when there is one, get LSQ's gradients.

    Esser et al., "Learned Step Size Quantization", 2020, eq. 3, and Bhalgat et al., "LSQ+", 2020, eq. 5 and 6, where the
    offset is the real value of integer 0. Engines have an integer zero point, so the forward pass has
    ``zero_point = round(-offset / s)``, and its rounding is straight-through:

    * inside: ``dy/dx = 1``, ``dy/ds = round(x / s) - x / s``, ``dy/doffset = 0``;
    * below: ``dy/dx = 0``, ``dy/ds = qmin``, ``dy/doffset = 1``; above: the same with ``qmax``;
    * without an offset the zero point is a constant, and ``dy/ds = qmin - z`` below and ``qmax - z`` above.

    Args:
        x: Float tensor of any shape.
        scale: Float [] or [channels], positive.
        offset: Float [], or None.
        zero_point: Integers in the shape of ``scale``.
        axis: Dimension of ``x`` that ``scale`` runs along; -1 for one scale.
        limits: ``(qmin, qmax)``.
        share: The gradients of scale and offset are multiplied by this.
        moves: Without it the zero point is a constant although there is an offset, whose gradient is 0.
    """
    function: Any = _Learned.apply
    return cast(Tensor, function(x, scale, offset, zero_point, axis, limits, share, moves))


def _along(values: Tensor, x: Tensor, axis: int) -> Tensor:
    typed = values.to(x.dtype)
    return typed if axis < 0 else typed.reshape([-1 if d == axis else 1 for d in range(x.dim())])


def _forward(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, qmin: int, qmax: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, the mask and the broadcast scale; 16-bit floats are computed with in float32."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    s, z = _along(scale, wide, axis), _along(zero_point, wide, axis)
    y = torch.maximum(torch.minimum(wide, (qmax - z) * s), (qmin - z) * s)
    inside = y == wide
    return y.div_(s).round_().mul_(s), inside, s


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, qmin: int, qmax: int) -> Tensor:
        y, inside, _ = _forward(x, scale, zero_point, axis, qmin, qmax)
        ctx.save_for_backward(inside)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return torch.where(inside, grad, 0.0), None, None, None, None, None


class _Learned(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        offset: Tensor | None,
        zero_point: Tensor,
        axis: int,
        limits: tuple[int, int],
        share: float,
        moves: bool,
    ) -> Tensor:
        y, inside, _ = _forward(x, scale, zero_point, axis, *limits)
        y = y.to(x.dtype)
        ctx.save_for_backward(x, y, inside, scale, zero_point)
        ctx.axis, ctx.share, ctx.has_offset, ctx.moves = axis, share, offset is not None, moves
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, inside, scale, zero_point = ctx.saved_tensors
        passed = torch.where(inside, grad, 0.0)
        kept = [ctx.axis] if ctx.axis >= 0 else []
        dims = [d for d in range(x.dim()) if d not in kept]
        # Inside dy/ds = (y - x) / s, outside y / s: both are (grad y - passed x) / s.
        wide = torch.promote_types(x.dtype, scale.dtype)
        d_scale = (grad.to(wide) * y).addcmul_(passed.to(wide), x.to(wide), value=-1).sum(dims) / scale
        d_offset = None
        if ctx.has_offset:
            clipped = grad.to(wide).sum() - passed.to(wide).sum() if ctx.moves else torch.zeros_like(d_scale)
            d_scale = d_scale + zero_point * clipped  # the zero point moves with the scale
            d_offset = clipped * ctx.share
        return passed, (d_scale * ctx.share).to(scale.dtype), d_offset, None, None, None, None, None
