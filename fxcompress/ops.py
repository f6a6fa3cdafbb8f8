"""Custom operators, registered in one place under ``torch.ops.fxcompress``."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

__all__ = ["fake_quantize"]


def _broadcast(values: Tensor, x: Tensor, axis: int) -> Tensor:
    """Per-channel ``values`` [C] in the dtype of ``x``, shaped to broadcast along ``axis``."""
    typed = values if values.dtype == x.dtype else values.to(x.dtype)
    return typed if axis < 0 else typed.reshape([-1 if i == axis else 1 for i in range(x.dim())])


@torch.library.custom_op("fxcompress::fake_quantize", mutates_args=())
def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, qmin: int, qmax: int) -> Tensor:
    """Round ``x`` to the integer grid and back.

    ``(clamp(round(x / scale) + zero_point, qmin, qmax) - zero_point) * scale``

    Rounding is half to even, as in ONNX ``QuantizeLinear``. The gradient is the straight-through estimator: 1 inside
    the representable range, 0 outside (Bengio et al. 2013; Jacob et al. 2018).

    Args:
        x: Float tensor of any shape.
        scale: float32, shape [] or [C].
        zero_point: int32, same shape as ``scale``.
        axis: Dimension of ``x`` that ``scale`` runs along; -1 for one scale.
        qmin: Smallest integer.
        qmax: Largest integer.

    Returns:
        A tensor like ``x`` on the grid.
    """
    s, z = _broadcast(scale, x, axis), _broadcast(zero_point, x, axis)
    q = torch.div(x, s).round_().add_(z).clamp_(qmin, qmax)
    return q.sub_(z).mul_(s)


@fake_quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, qmin: int, qmax: int) -> Tensor:
    return torch.empty_like(x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, zero_point, axis, qmin, qmax = inputs
    s, z = _broadcast(scale, x, axis), _broadcast(zero_point, x, axis)
    q = torch.round(x / s) + z
    ctx.save_for_backward((q >= qmin) & (q <= qmax))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (inside,) = ctx.saved_tensors
    return cast(Tensor, grad * inside), None, None, None, None, None


fake_quantize.register_autograd(_backward, setup_context=_setup)
