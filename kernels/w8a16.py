"""Linear layers with 8-bit weights and 16-bit activations: ``torch.ops.fxcompress.w8a16_linear``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fxcompress.kernels.epilogue import finish
from fxcompress.kernels.layouts import check_groups
from fxcompress.kernels.w4a16 import check_dtype, check_ends, check_shape
from fxcompress.ops import KernelOp, register

__all__ = ["check", "dequantize_w8", "w8a16_linear"]


def check(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, group_size: int, activation: str, residual: Tensor | None
) -> None:  # fmt: skip
    """Raise UsageError for arguments of ``w8a16_linear`` that do not fit together."""
    check_dtype("weight", weight, (torch.int8,))
    k = x.shape[-1] if x.dim() else 0
    n = weight.shape[0] if weight.dim() == 2 else 0
    check_shape("weight", weight, (n, k))
    check_ends(x, k, n, scales, bias, group_size, activation, residual)


def dequantize_w8(weight: Tensor, scales: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """The weights ``weight * scale`` in ``dtype``, computed in it.

    Args:
        weight: int8 [N, K].
        scales: Floats [groups, N].
        group_size: Weights that share a scale; -1: the whole row.
        dtype: float32, float64 ...

    Returns:
        [N, K].

    Raises:
        UsageError: the groups do not divide K.
    """
    each = weight.shape[1] // check_groups(weight.shape[1], group_size)
    return weight.to(dtype) * scales.to(dtype).repeat_interleave(each, 0).T


def _reference(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    group_size: int = -1,
    activation: str = "",
    residual: Tensor | None = None,
    deterministic: bool = True,
) -> Tensor:
    """``activation(x W^T + bias + residual)`` with 8-bit weights ``W = weight * scale``.

    Args:
        x: float16 or bfloat16 [..., K]; also float32 and float64 where no kernel runs.
        weight: int8 [N, K].
        scales: Floats [K / group_size, N], of any dtype.
        bias: Floats [N], or None.
        group_size: Consecutive input features that share a scale, a multiple of 32 that divides K; -1: all.
        activation: One of `epilogue.ACTIVATIONS`.
        residual: Floats [..., N], or None.
        deterministic: The kernel adds the parts of a sum in a fixed order; False: in any order, which saves memory traffic.

    Returns:
        [..., N] in the dtype of ``x``. The kernel may round the weights to that dtype; sums are float32.

    Raises:
        UsageError: arguments that do not fit together.
    """
    check(x, weight, scales, bias, group_size, activation, residual)
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    w = dequantize_w8(weight, scales, group_size, work)
    return finish(torch.nn.functional.linear(x.to(work), w), bias, residual, activation, x.dtype)


def _fake(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    group_size: int = -1,
    activation: str = "",
    residual: Tensor | None = None,
    deterministic: bool = True,
) -> Tensor:
    check(x, weight, scales, bias, group_size, activation, residual)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _samples(device: str) -> Iterable[tuple[Any, ...]]:
    random = torch.Generator().manual_seed(8)
    for shape, n, k, group, dtype in (
        ((3,), 40, 256, -1, torch.float16),
        ((2, 17), 136, 160, 32, torch.float16),
        ((5,), 33, 190, -1, torch.bfloat16),
        ((0,), 64, 128, 64, torch.float16),
    ):
        weight = torch.randint(-128, 128, (n, k), generator=random, dtype=torch.int8).to(device)
        x = torch.randn((k, *shape), generator=random).to(device, dtype).movedim(0, -1)  # not contiguous
        scales = (torch.rand((check_groups(k, group), n), generator=random) * 0.01 + 0.001).to(device, dtype)
        bias = torch.randn(n, generator=random).to(device, dtype)
        yield x, weight, scales, bias, group, "gelu" if group > 0 else ""


w8a16_linear = register(
    KernelOp(
        name="w8a16_linear",
        reference=_reference,
        fake=_fake,
        launcher="fxcompress.kernels.w8a16_triton:launch",
        autocast=("x", "bias", "residual"),
        dtypes=(torch.float16, torch.bfloat16),
        samples=_samples,
    )
)
