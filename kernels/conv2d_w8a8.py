"""``conv2d_w8a8``: convolution of 8-bit images with 8-bit filters, summed exactly in 32 bits, then scaled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.errors import UsageError
from fxcompress.kernels.int8_common import check_epilogue, check_tensor, scaled, tolerance
from fxcompress.ops import KernelOp, register

__all__ = ["check", "conv2d_w8a8", "output_shape"]


def output_shape(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int, int, int]:
    """[N, O, OH, OW] of the result."""
    sizes = (
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[1 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    )
    return (x.shape[0], weight.shape[0], *sizes)  # type: ignore[return-value]


def _check_geometry(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> None:
    if x.dim() != 4 or weight.dim() != 4:
        raise UsageError(
            428,
            f"a 2-D convolution got x with {x.dim()} and weight with {weight.dim()} dimensions",
            fix="pass x [N, C, H, W] and weight [O, KH, KW, C / groups]",
        )
    for name, values, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(values) != 2 or min(values) < least:
            raise UsageError(429, f"{name} is {list(values)}", fix=f"pass two numbers of at least {least}")
    if groups < 1 or x.shape[1] % groups or weight.shape[0] % groups:
        raise UsageError(
            430, f"{x.shape[1]} input and {weight.shape[0]} output channels cannot be cut into {groups} groups"
        )


def check(
    x: Tensor, weight: Tensor, x_scale: Tensor, w_scale: Tensor, x_zero: Tensor | None, bias: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int, out_dtype: torch.dtype,
    activation: str, residual: Tensor | None, w_sum: Tensor | None,
) -> tuple[int, int, int, int]:  # fmt: skip
    """The shape of the result; raises UsageError for arguments that do not fit together."""
    check_tensor("x", x, (torch.int8,), x.shape, x.device)
    _check_geometry(x, weight, stride, padding, dilation, groups)
    n, kh, kw, _ = weight.shape
    depth = x.shape[1] // groups
    check_tensor("weight", weight, (torch.int8,), (n, kh, kw, depth), x.device)
    check_tensor("x_scale", x_scale, (torch.float32,), (1,), x.device)
    check_tensor("w_scale", w_scale, (torch.float32,), (n,), x.device)
    check_tensor("x_zero", x_zero, (torch.int32,), (1,), x.device)
    check_tensor("w_sum", w_sum, (torch.int32,), (n,), x.device)
    shape = output_shape(x, weight, stride, padding, dilation)
    if min(shape[2:]) < 1:
        raise UsageError(
            431, f"filters of {kh} x {kw} do not fit into images of {x.shape[2]} x {x.shape[3]}", fix="pad more"
        )
    check_epilogue(kh * kw * depth, n, shape, x.device, out_dtype, activation, bias, residual)
    return shape


def _reference(
    x: Tensor, weight: Tensor, x_scale: Tensor, w_scale: Tensor, x_zero: Tensor | None, bias: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int, out_dtype: torch.dtype,
    activation: str = "", residual: Tensor | None = None, w_sum: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``activation(conv(x - x_zero, weight) x_scale w_scale + bias + residual)``.

    The sums of products are exact, in int32; what follows is float32, in this order. Padding adds zeros to
    ``x - x_zero``: the padded pixels hold ``x_zero``.

    Args:
        x: int8 [N, C, H, W], stored channels last (anything else is copied first). Stands for ``(x - x_zero) * x_scale``.
        weight: int8 [O, KH, KW, C / groups], KH * KW * C / groups at most 65536.
        x_scale: float32 [1].
        w_scale: float32 [O].
        x_zero: int32 [1], -128 to 127; None for 0.
        bias: Float [O].
        stride: Two numbers.
        padding: Two numbers, the same on both sides.
        dilation: Two numbers.
        groups: Divides C and O.
        out_dtype: float16, bfloat16, float32; int32 for the sums themselves, which take no scales.
        activation: Name in ``fxcompress.kernels.epilogue.ACTIVATIONS``.
        residual: Float [N, O, OH, OW].
        w_sum: int32 [O], the sums of the filters, which ``x_zero`` needs; None to compute them here.

    Returns:
        [N, O, OH, OW] in ``out_dtype``, stored channels last.

    Raises:
        UsageError: dtypes, shapes or devices do not fit (FXC-USAGE-420 to 425, 428 to 432).
    """
    shape = check(
        x, weight, x_scale, w_scale, x_zero, bias, stride, padding, dilation, groups, out_dtype, activation, residual,
        w_sum,
    )  # fmt: skip
    out = torch.empty(shape, dtype=out_dtype, device=x.device, memory_format=torch.channels_last)
    if out.numel() == 0:
        return out
    centred = x.double() if x_zero is None else x.double() - x_zero
    filters = weight.permute(0, 3, 1, 2).double()
    acc = F.conv2d(centred, filters, None, list(stride), list(padding), list(dilation), groups).to(torch.int32)
    last = None if residual is None else residual.permute(0, 2, 3, 1)
    y = scaled(acc.permute(0, 2, 3, 1), x_scale, w_scale, bias, last, activation, out_dtype)
    return out.copy_(y.permute(0, 3, 1, 2))


def _fake(
    x: Tensor, weight: Tensor, x_scale: Tensor, w_scale: Tensor, x_zero: Tensor | None, bias: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int, out_dtype: torch.dtype,
    activation: str = "", residual: Tensor | None = None, w_sum: Tensor | None = None,
) -> Tensor:  # fmt: skip
    shape = output_shape(x, weight, stride, padding, dilation)
    return torch.empty(shape, dtype=out_dtype, device=x.device, memory_format=torch.channels_last)


def _samples(device: str) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8).to(device)

    def floats(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).to(device) * 0.01 + 0.01

    def image(*shape: int) -> Tensor:
        return integers(*shape).contiguous(memory_format=torch.channels_last)

    scale, zero = floats(1), torch.tensor([-9], dtype=torch.int32, device=device)
    one, none = [1, 1], [0, 0]
    yield image(2, 32, 9, 7), integers(24, 3, 3, 32), scale, floats(24), None, None, one, one, one, 1, torch.float16
    yield (
        image(2, 48, 9, 7), integers(40, 3, 3, 48), scale, floats(40), zero, floats(40), [2, 2], [2, 1], [2, 1], 1,
        torch.float32, "relu", floats(2, 40, 5, 4),
    )  # fmt: skip
    yield image(2, 3, 9, 9), integers(16, 3, 3, 3), scale, floats(16), zero, None, [2, 2], one, one, 1, torch.int32
    yield integers(1, 40, 5, 5), integers(8, 1, 1, 40), scale, floats(8), zero, None, one, none, one, 1, torch.float16
    yield image(2, 24, 7, 7), integers(24, 3, 3, 1), scale, floats(24), zero, None, one, one, one, 24, torch.float16
    yield image(1, 8, 5, 5), integers(12, 3, 3, 4), scale, floats(12), None, None, one, one, one, 2, torch.float32
    yield image(0, 32, 9, 7), integers(24, 3, 3, 32), scale, floats(24), None, None, one, one, one, 1, torch.float16


conv2d_w8a8 = register(
    KernelOp(
        "conv2d_w8a8",
        _reference,
        _fake,
        "fxcompress.kernels.conv2d_w8a8_triton:launch",
        samples=_samples,
        tolerance=tolerance,
    )
)
