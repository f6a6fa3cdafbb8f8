"""``w4a8_linear``: 8-bit activations times 4-bit weights, summed exactly in 32 bits, then scaled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxcompress.kernels.int8_common import check_epilogue, check_tensor, exact_product, row_values, scaled, tolerance
from fxcompress.kernels.layouts import K_BLOCK, pack_int4x8, unpack_int4x8
from fxcompress.ops import KernelOp, register

__all__ = ["check", "w4a8_linear"]


def check(
    x: Tensor, packed: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype,
    activation: str, residual: Tensor | None,
) -> None:  # fmt: skip
    """Raise UsageError for arguments that do not fit together."""
    k, n = x.shape[-1] if x.dim() else 0, w_scale.shape[0]
    check_tensor("x", x, (torch.int8,), x.shape, x.device)
    check_tensor("packed", packed, (torch.uint8,), (-(-k // K_BLOCK), n, K_BLOCK // 2), x.device)
    check_tensor("x_scale", x_scale, (torch.float32,), row_values(x, x_scale), x.device)
    check_tensor("w_scale", w_scale, (torch.float32,), (n,), x.device)
    check_epilogue(k, n, (*x.shape[:-1], n), x.device, out_dtype, activation, bias, residual)


def _reference(
    x: Tensor, packed: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype,
    activation: str = "", residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``activation(x weight^T x_scale w_scale + bias + residual)``, one scale for each output feature.

    The sums of products are exact, in int32; what follows is float32, in this order.

    Args:
        x: int8 [..., K], K at most 65536.
        packed: uint8 [ceil(K / 128), N, 64], ``planes4x8`` of `fxcompress.kernels.layouts`: weights -8 to 7.
        x_scale: float32, one for each row [..., 1], or one [1].
        w_scale: float32 [N].
        bias: Float [N].
        out_dtype: float16, bfloat16, float32; int32 for ``x weight^T`` itself, which takes no scales.
        activation: Name in ``fxcompress.kernels.epilogue.ACTIVATIONS``.
        residual: Float [..., N].

    Returns:
        [..., N] in ``out_dtype``.

    Raises:
        UsageError: dtypes, shapes or devices do not fit (FXC-USAGE-420 to 425, 432).
    """
    check(x, packed, x_scale, w_scale, bias, out_dtype, activation, residual)
    acc = exact_product(x, unpack_int4x8(packed, x.shape[-1]))
    return scaled(acc, x_scale, w_scale, bias, residual, activation, out_dtype)


def _fake(
    x: Tensor, packed: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype,
    activation: str = "", residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], w_scale.shape[0]), dtype=out_dtype)


def _samples(device: str) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int8).to(device)

    def floats(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).to(device) * 0.01 + 0.01

    packed, w_scale = pack_int4x8(integers(-8, 8, 72, 160)), floats(72)
    yield integers(-128, 128, 5, 160), packed, floats(5, 1), w_scale, None, torch.float16
    strided = integers(-128, 128, 2, 160, 3).transpose(1, 2)
    yield strided, packed, floats(2, 3, 1), w_scale, floats(72), torch.float32, "silu", floats(2, 3, 72)
    yield integers(-128, 128, 0, 160), packed, floats(1), w_scale, None, torch.float16
    yield integers(-128, 128, 17, 160), packed, floats(1), w_scale, None, torch.int32


w4a8_linear = register(
    KernelOp(
        "w4a8_linear", _reference, _fake, "fxcompress.kernels.w4a8_triton:launch", samples=_samples, tolerance=tolerance
    )
)
