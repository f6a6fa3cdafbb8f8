"""``sp24_linear``: 16-bit activations times 2:4 sparse 16-bit weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxcompress.kernels.epilogue import check_activation, finish
from fxcompress.kernels.int8_common import FLOATS, check_tensor
from fxcompress.kernels.sparse_common import F16, HALVES, check_packed
from fxcompress.kernels.sparse_layout import pack_sp24, unpack_sp24
from fxcompress.ops import KernelOp, register

__all__ = ["check", "check_finish", "sp24_linear", "sparse_sample"]


def check_finish(x: Tensor, n: int, bias: Tensor | None, activation: str, residual: Tensor | None) -> None:
    """Check the activations of a float product and what comes after it."""
    check_tensor("x", x, (*HALVES, torch.float32, torch.float64), x.shape, x.device)
    check_activation(activation)
    check_tensor("bias", bias, (*FLOATS, torch.float64), (n,), x.device)
    check_tensor("residual", residual, (*FLOATS, torch.float64), (*x.shape[:-1], n), x.device)


def check(
    x: Tensor, values: Tensor, meta: Tensor, n: int, bias: Tensor | None, activation: str, residual: Tensor | None
) -> None:
    """Raise UsageError for arguments that do not fit together."""
    check_packed(x, values, meta, n, F16)
    check_finish(x, n, bias, activation, residual)
    if x.dtype in HALVES:
        check_tensor("values", values, (x.dtype,), values.shape, x.device)


def _reference(
    x: Tensor, values: Tensor, meta: Tensor, n: int, bias: Tensor | None = None, activation: str = "",
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``activation(x weight^T + bias + residual)``, added up in float32 (float64 for float64 ``x``).

    Autocast casts ``x`` and the values, at each call: pack the weight in the dtype it will be used in.

    Args:
        x: [..., K], float16 or bfloat16. (The reference alone takes float32 and float64 too.)
        values: Layout ``sp24_f16``, see `fxcompress.kernels.sparse_layout.pack_sp24`, in the dtype of ``x``.
        meta: Its metadata, int32.
        n: Output features N. The packed shapes tell them only up to the filling to 16.
        bias: Float [N].
        activation: Name in ``fxcompress.kernels.epilogue.ACTIVATIONS``.
        residual: Float [..., N].

    Returns:
        [..., N] in the dtype of ``x``.

    Raises:
        UsageError: dtypes, shapes or devices do not fit (FXC-USAGE-402, 420 to 422, 444 to 446).
    """
    check(x, values, meta, n, bias, activation, residual)
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = unpack_sp24(values, meta, n, x.shape[-1])
    return finish(x.to(exact) @ weight.to(exact).T, bias, residual, activation, x.dtype)


def _fake(
    x: Tensor, values: Tensor, meta: Tensor, n: int, bias: Tensor | None = None, activation: str = "",
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], n))


def sparse_sample(n: int, k: int, generator: torch.Generator) -> Tensor:
    """Normal [n, k] with two nonzeros in every four along K."""
    groups = -(-k // 4)
    keep = torch.rand(n, groups, 4, generator=generator).argsort(-1) < 2
    return torch.randn(n, k, generator=generator) * keep.reshape(n, -1)[:, :k]


def _samples(device: str) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)

    def halves(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).half().to(device)

    values, meta = (t.to(device) for t in pack_sp24(sparse_sample(40, 200, generator).half()))
    yield halves(5, 200), values, meta, 40
    yield halves(2, 200, 3).transpose(1, 2), values, meta, 40, halves(40), "silu", halves(2, 3, 40)
    yield halves(0, 200), values, meta, 40, None, "relu"


sp24_linear = register(
    KernelOp(
        "sp24_linear",
        _reference,
        _fake,
        "fxcompress.kernels.sp24_triton:launch",
        autocast=("x", "values"),
        dtypes=(torch.float16, torch.bfloat16),
        samples=_samples,
    )
)
