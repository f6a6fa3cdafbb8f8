"""``sp24_w8a8_linear``: 8-bit activations times 2:4 sparse 8-bit weights, summed exactly in 32 bits, then scaled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxcompress.kernels.int8_common import check_epilogue, check_tensor, exact_product, row_values, scaled, tolerance
from fxcompress.kernels.sp24 import sparse_sample
from fxcompress.kernels.sparse_common import I8, check_packed
from fxcompress.kernels.sparse_layout import pack_sp24_i8, unpack_sp24_i8
from fxcompress.ops import KernelOp, register

__all__ = ["check", "sp24_w8a8_linear"]


def check(
    x: Tensor, values: Tensor, meta: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None,
    out_dtype: torch.dtype, activation: str, residual: Tensor | None,
) -> None:  # fmt: skip
    """Raise UsageError for arguments that do not fit together."""
    n = w_scale.numel()
    check_tensor("w_scale", w_scale, (torch.float32,), (n,), x.device)
    check_packed(x, values, meta, n, I8)
    check_tensor("x", x, (torch.int8,), x.shape, x.device)
    check_tensor("x_scale", x_scale, (torch.float32,), row_values(x, x_scale), x.device)
    check_epilogue(x.shape[-1], n, (*x.shape[:-1], n), x.device, out_dtype, activation, bias, residual)


def _reference(
    x: Tensor, values: Tensor, meta: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None,
    out_dtype: torch.dtype, activation: str = "", residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``activation(x weight^T x_scale w_scale + bias + residual)``.

    The sums of products are exact, in int32; what follows is float32, in this order.

    Args:
        x: int8 [..., K], K at most 65536.
        values: Layout ``sp24_i8``, see `fxcompress.kernels.sparse_layout.pack_sp24_i8`.
        meta: Its metadata, int32.
        x_scale: float32, one for each row [..., 1], or one [1].
        w_scale: float32 [N]; its length is the number of output features.
        bias: Float [N].
        out_dtype: float16, bfloat16, float32; int32 for ``x weight^T`` itself, which takes no scales.
        activation: Name in ``fxcompress.kernels.epilogue.ACTIVATIONS``.
        residual: Float [..., N].

    Returns:
        [..., N] in ``out_dtype``.

    Raises:
        UsageError: dtypes, shapes or devices do not fit (FXC-USAGE-402, 420 to 425, 444 to 446).
    """
    check(x, values, meta, x_scale, w_scale, bias, out_dtype, activation, residual)
    weight = unpack_sp24_i8(values, meta, len(w_scale), x.shape[-1])
    return scaled(exact_product(x, weight), x_scale, w_scale, bias, residual, activation, out_dtype)


def _fake(
    x: Tensor, values: Tensor, meta: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None,
    out_dtype: torch.dtype, activation: str = "", residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], w_scale.shape[0]), dtype=out_dtype)


def _samples(device: str) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    weight = (sparse_sample(40, 200, generator) * 40).clamp(-128, 127).to(torch.int8)
    values, meta = (t.to(device) for t in pack_sp24_i8(weight))

    def integers(*shape: int) -> Tensor:
        return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8).to(device)

    def floats(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).to(device) * 0.01 + 0.01

    w_scale = floats(40)
    yield integers(5, 200), values, meta, floats(5, 1), w_scale, None, torch.float16
    yield (
        integers(2, 200, 3).transpose(1, 2), values, meta, floats(2, 3, 1), w_scale, floats(40), torch.float32, "gelu",
        floats(2, 3, 40),
    )  # fmt: skip
    yield integers(0, 200), values, meta, floats(1), w_scale, None, torch.float16, "relu"
    yield integers(17, 200), values, meta, floats(1), w_scale, None, torch.int32


sp24_w8a8_linear = register(
    KernelOp(
        "sp24_w8a8_linear",
        _reference,
        _fake,
        "fxcompress.kernels.sp24_w8a8_triton:launch",
        samples=_samples,
        tolerance=tolerance,
    )
)
