"""``w8a8_linear``: 8-bit activations times 8-bit weights, summed exactly in 32 bits, then scaled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxcompress.kernels.int8_common import check_epilogue, check_tensor, exact_product, row_values, scaled, tolerance
from fxcompress.ops import KernelOp, register

__all__ = ["check", "w8a8_linear"]


def check(
    x: Tensor, weight: Tensor, x_scale: Tensor, w_scale: Tensor, x_zero: Tensor | None, w_sum: Tensor | None,
    bias: Tensor | None, out_dtype: torch.dtype, activation: str, residual: Tensor | None,
) -> None:  # fmt: skip
    """Raise UsageError for arguments that do not fit together."""
    k, n = x.shape[-1] if x.dim() else 0, weight.shape[0]
    check_tensor("x", x, (torch.int8,), x.shape, x.device)
    check_tensor("weight", weight, (torch.int8,), (n, k), x.device)
    check_tensor("x_scale", x_scale, (torch.float32,), row_values(x, x_scale), x.device)
    check_tensor("w_scale", w_scale, (torch.float32,), (n,), x.device)
    check_tensor("x_zero", x_zero, (torch.int32,), x_scale.shape, x.device)
    check_tensor("w_sum", w_sum, (torch.int32,), (n,), x.device)
    check_epilogue(k, n, (*x.shape[:-1], n), x.device, out_dtype, activation, bias, residual)


def _reference(
    x: Tensor, weight: Tensor, x_scale: Tensor, w_scale: Tensor, x_zero: Tensor | None, w_sum: Tensor | None,
    bias: Tensor | None, out_dtype: torch.dtype, activation: str = "", residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``activation((x - x_zero) weight^T x_scale w_scale + bias + residual)``.

    The sums of products are exact, in int32; what follows is float32, in this order.

    Args:
        x: int8 [..., K], K at most 65536. Stands for ``(x - x_zero) * x_scale``.
        weight: int8 [N, K].
        x_scale: float32, one for each row [..., 1], or one [1].
        w_scale: float32 [N].
        x_zero: int32, shape of ``x_scale``, -128 to 127; None for 0.
        w_sum: int32 [N], the sums of the rows of ``weight``, which ``x_zero`` needs; None to compute them here.
        bias: Float [N].
        out_dtype: float16, bfloat16, float32; int32 for ``(x - x_zero) weight^T`` itself, which takes no scales.
        activation: Name in ``fxcompress.kernels.epilogue.ACTIVATIONS``.
        residual: Float [..., N].

    Returns:
        [..., N] in ``out_dtype``.

    Raises:
        UsageError: dtypes, shapes or devices do not fit (FXC-USAGE-420 to 425, 432).
    """
    check(x, weight, x_scale, w_scale, x_zero, w_sum, bias, out_dtype, activation, residual)
    acc = exact_product(x, weight)
    if x_zero is not None:
        acc = acc - x_zero * (weight.sum(1, dtype=torch.int32) if w_sum is None else w_sum)
    return scaled(acc, x_scale, w_scale, bias, residual, activation, out_dtype)


def _fake(
    x: Tensor, weight: Tensor, x_scale: Tensor, w_scale: Tensor, x_zero: Tensor | None, w_sum: Tensor | None,
    bias: Tensor | None, out_dtype: torch.dtype, activation: str = "", residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype)


def _samples(device: str) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8).to(device)

    def floats(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).to(device) * 0.01 + 0.01

    weight, w_scale = integers(72, 96), floats(72)
    yield integers(5, 96), weight, floats(5, 1), w_scale, None, None, None, torch.float16
    zero = integers(2, 3, 1).to(torch.int32)
    yield (
        integers(2, 96, 3).transpose(1, 2), weight, floats(2, 3, 1), w_scale, zero, None, floats(72), torch.float32,
        "gelu", floats(2, 3, 72),
    )  # fmt: skip
    yield integers(0, 96), weight, floats(1), w_scale, None, None, None, torch.float16, "relu"
    yield integers(17, 96), weight, floats(1), w_scale, zero[0, 0], weight.sum(1, dtype=torch.int32), None, torch.int32


w8a8_linear = register(
    KernelOp(
        "w8a8_linear", _reference, _fake, "fxcompress.kernels.w8a8_triton:launch", samples=_samples, tolerance=tolerance
    )
)
