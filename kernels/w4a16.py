"""Linear layers with 4-bit weights and 16-bit activations: ``torch.ops.fxcompress.w4a16_linear``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import Tensor

from fxcompress.errors import UsageError
from fxcompress.kernels.epilogue import check_activation, finish
from fxcompress.kernels.layouts import K_BLOCK, check_groups, pack_int4, unpack_int4
from fxcompress.ops import KernelOp, register

__all__ = ["check", "check_device", "check_dtype", "check_ends", "check_shape", "dequantize_w4", "w4a16_linear"]

_FLOATS: Final = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_shape(name: str, tensor: Tensor | None, expected: tuple[Any, ...]) -> None:
    """Raise UsageError unless ``tensor`` is None or has the expected shape."""
    if tensor is not None and tuple(tensor.shape) != expected:
        raise UsageError(
            410,
            f"{name} has shape {tuple(tensor.shape)}, but {expected} is needed",
            why="it must fit the other arguments",
        )


def check_dtype(name: str, tensor: Tensor | None, allowed: tuple[torch.dtype, ...]) -> None:
    """Raise UsageError unless ``tensor`` is None or has one of the allowed dtypes."""
    if tensor is not None and tensor.dtype not in allowed:
        raise UsageError(
            411,
            f"{name} has dtype {tensor.dtype}",
            fix=f"use {' or '.join(str(d).removeprefix('torch.') for d in allowed)}",
        )


def check_device(name: str, tensor: Tensor | None, device: torch.device) -> None:
    """Raise UsageError unless ``tensor`` is None or lies on ``device``."""
    if tensor is not None and tensor.device != device:
        raise UsageError(412, f"{name} is on {tensor.device}, x on {device}", fix="move all arguments to one device")


def check_ends(
    x: Tensor, k: Any, n: Any, scales: Tensor, bias: Tensor | None, group_size: int, activation: str, residual: Tensor | None
) -> None:  # fmt: skip
    """Check what every product with weights [``n``, ``k``] and group-wise scales has.

    Raises:
        UsageError: a shape, dtype, group size or activation that does not fit.
    """
    check_activation(activation)
    groups = check_groups(k, group_size)
    check_shape("scales", scales, (groups, n))
    check_shape("bias", bias, (n,))
    check_shape("residual", residual, (*x.shape[:-1], n))
    for name, tensor in (("x", x), ("scales", scales), ("bias", bias), ("residual", residual)):
        check_dtype(name, tensor, _FLOATS)


def check(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, group_size: int, activation: str,
    residual: Tensor | None,
) -> None:  # fmt: skip
    """Raise UsageError for arguments of ``w4a16_linear`` that do not fit together."""
    check_dtype("packed", packed, (torch.int16,))
    check_dtype("zeros", zeros, (torch.uint8,))
    k = x.shape[-1] if x.dim() else 0
    n = packed.shape[1] if packed.dim() == 3 else 0
    check_shape("packed", packed, (-(-k // K_BLOCK), n, 32))
    check_ends(x, k, n, scales, bias, group_size, activation, residual)
    check_shape("zeros", zeros, tuple(scales.shape))


def dequantize_w4(
    packed: Tensor, scales: Tensor, zeros: Tensor | None, k: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    """The weights ``(q - zero) * scale`` in ``dtype``, computed in it.

    Args:
        packed: int16 [ceil(k / 128), N, 32], layout ``planes4``.
        scales: Floats [groups, N].
        zeros: uint8 [groups, N]; None: 8 everywhere.
        k: Input features.
        group_size: Weights that share a scale; -1: the whole row.
        dtype: float32, float64 ...

    Returns:
        [N, k].

    Raises:
        UsageError: the groups do not divide ``k``.
    """
    each = k // check_groups(k, group_size)
    q = unpack_int4(packed, k).to(dtype)
    zero = torch.tensor(8, dtype=dtype, device=packed.device)
    if zeros is not None:
        zero = zeros.to(dtype).repeat_interleave(each, 0).T
    return (q - zero) * scales.to(dtype).repeat_interleave(each, 0).T


def _reference(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    activation: str = "",
    residual: Tensor | None = None,
    deterministic: bool = True,
) -> Tensor:
    """``activation(x W^T + bias + residual)`` with 4-bit weights ``W = (q - zero) * scale``.

    Args:
        x: float16 or bfloat16 [..., K]; also float32 and float64 where no kernel runs.
        packed: int16 [ceil(K / 128), N, 32], layout ``planes4`` of `layouts.pack_int4`.
        scales: Floats [K / group_size, N], of any dtype.
        zeros: Zero points 0 to 15, uint8, shape of ``scales``; None: 8 everywhere.
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
    check(x, packed, scales, zeros, bias, group_size, activation, residual)
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    w = dequantize_w4(packed, scales, zeros, x.shape[-1], group_size, work)
    return finish(torch.nn.functional.linear(x.to(work), w), bias, residual, activation, x.dtype)


def _fake(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    activation: str = "",
    residual: Tensor | None = None,
    deterministic: bool = True,
) -> Tensor:
    check(x, packed, scales, zeros, bias, group_size, activation, residual)
    return x.new_empty((*x.shape[:-1], packed.shape[1]))


def _samples(device: str) -> Iterable[tuple[Any, ...]]:
    random = torch.Generator().manual_seed(4)
    for shape, n, k, group, dtype in (
        ((3,), 40, 256, 128, torch.float16),
        ((2, 17), 136, 160, 32, torch.float16),
        ((5,), 33, 192, -1, torch.bfloat16),
        ((0,), 64, 128, 64, torch.float16),
    ):
        groups = check_groups(k, group)
        q = torch.randint(0, 16, (n, k), generator=random)
        x = torch.randn((k, *shape), generator=random).to(device, dtype).movedim(0, -1)  # not contiguous
        scales = (torch.rand((groups, n), generator=random) * 0.02 + 0.01).to(device, dtype)
        zeros = (
            torch.randint(0, 16, (groups, n), generator=random, dtype=torch.uint8).to(device) if group != 128 else None
        )
        bias = torch.randn(n, generator=random).to(device, dtype)
        yield x, pack_int4(q).to(device), scales, zeros, bias, group, "relu" if group > 0 else ""


w4a16_linear = register(
    KernelOp(
        name="w4a16_linear",
        reference=_reference,
        fake=_fake,
        launcher="fxcompress.kernels.w4a16_triton:launch",
        autocast=("x", "bias", "residual"),
        dtypes=(torch.float16, torch.bfloat16),
        samples=_samples,
    )
)
