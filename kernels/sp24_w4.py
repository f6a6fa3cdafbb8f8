"""``sp24_w4_linear``: 16-bit activations times 2:4 sparse 4-bit weights with scales of groups (Sparse-Marlin's format).

Frantar et al. 2024, "MARLIN: Mixed-Precision Auto-Regressive Parallel Inference on Large Language Models", section 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxcompress.kernels.epilogue import finish
from fxcompress.kernels.int8_common import FLOATS, check_tensor
from fxcompress.kernels.layouts import check_groups
from fxcompress.kernels.sp24 import check_finish, sparse_sample
from fxcompress.kernels.sparse_common import W4, check_packed
from fxcompress.kernels.sparse_layout import pack_sp24_w4, unpack_sp24_w4
from fxcompress.ops import KernelOp, register

__all__ = ["check", "sp24_w4_linear"]


def check(
    x: Tensor, values: Tensor, meta: Tensor, scales: Tensor, bias: Tensor | None, group_size: int, activation: str,
    residual: Tensor | None,
) -> None:  # fmt: skip
    """Raise UsageError for arguments that do not fit together."""
    n = scales.shape[-1] if scales.dim() else 0
    check_packed(x, values, meta, n, W4)
    check_finish(x, n, bias, activation, residual)
    groups = check_groups(x.shape[-1], group_size)
    check_tensor("scales", scales, (*FLOATS, torch.float64), (groups, n), x.device)


def _reference(
    x: Tensor, values: Tensor, meta: Tensor, scales: Tensor, bias: Tensor | None, group_size: int, activation: str = "",
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``activation(x (weight scales)^T + bias + residual)``, in float32 (float64 for float64 ``x``).

    Args:
        x: [..., K], float16 or bfloat16. (The reference alone takes float32 and float64 too.)
        values: Layout ``sp24_w4``, see `fxcompress.kernels.sparse_layout.pack_sp24_w4`.
        meta: Its metadata, int32.
        scales: Float [G, N], of the G groups of ``group_size`` along K; its width is the number of output features.
        bias: Float [N].
        group_size: A multiple of 32 that divides K (of the dense weight), or -1 for the whole row.
        activation: Name in ``fxcompress.kernels.epilogue.ACTIVATIONS``.
        residual: Float [..., N].

    Returns:
        [..., N] in the dtype of ``x``.

    Raises:
        UsageError: dtypes, shapes or devices do not fit (FXC-USAGE-401, 402, 420 to 422, 444 to 446).
    """
    check(x, values, meta, scales, bias, group_size, activation, residual)
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    k = x.shape[-1]
    integers = unpack_sp24_w4(values, meta, scales.shape[1], k)
    weight = integers.to(exact) * scales.to(exact).T.repeat_interleave(k // scales.shape[0], 1)
    return finish(x.to(exact) @ weight.T, bias, residual, activation, x.dtype)


def _fake(
    x: Tensor, values: Tensor, meta: Tensor, scales: Tensor, bias: Tensor | None, group_size: int, activation: str = "",
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], scales.shape[1]))


def _samples(device: str) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)

    def halves(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).half().to(device)

    for k, group in ((192, 32), (256, 128), (160, -1)):
        weight = (sparse_sample(40, k, generator) * 4).clamp(-8, 7).to(torch.int8)
        values, meta = (t.to(device) for t in pack_sp24_w4(weight))
        scales = halves(1 if group == -1 else k // group, 40).abs() * 0.1
        yield halves(5, k), values, meta, scales, None, group
        yield halves(2, k, 3).transpose(1, 2), values, meta, scales, halves(40), group, "silu", halves(2, 3, 40)
    yield halves(0, 160), values, meta, scales, None, -1, "relu"


sp24_w4_linear = register(
    KernelOp(
        "sp24_w4_linear",
        _reference,
        _fake,
        "fxcompress.kernels.sp24_w4_triton:launch",
        autocast=("x",),
        dtypes=(torch.float16, torch.bfloat16),
        samples=_samples,
    )
)
