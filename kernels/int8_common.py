"""What the int8 operators share: checks of their arguments, the exact product, the scaled epilogue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from fxcompress.errors import UsageError
from fxcompress.kernels.epilogue import check_activation, finish

__all__ = ["FLOATS", "MAX_K", "check_epilogue", "check_tensor", "exact_product", "row_values", "scaled", "tolerance"]

#: Products added into one int32: 255 * 128 * 65536 is below 2 ** 31.
MAX_K: Final = 65536
#: Dtypes of float results and of what is added to them.
FLOATS: Final = (torch.float16, torch.bfloat16, torch.float32)

#: Tolerances of operators with integers inside (see `fxcompress.ops.KernelOp`): int32 is exact.
tolerance: Final = {torch.float16: 5e-4, torch.bfloat16: 4e-3, torch.float32: 1e-5, torch.int32: 0.0}


def check_tensor(
    name: str, value: Tensor | None, dtypes: Sequence[torch.dtype], shape: Sequence[int], device: torch.device
) -> None:
    """Raise UsageError unless ``value`` is None or has one of ``dtypes``, exactly ``shape`` and lies on ``device``."""
    if value is None:
        return
    if value.dtype not in dtypes:
        raise UsageError(
            420,
            f"{name} has dtype {str(value.dtype).removeprefix('torch.')}",
            fix=f"pass {' or '.join(str(d).removeprefix('torch.') for d in dtypes)}",
        )
    if tuple(value.shape) != tuple(shape):
        raise UsageError(
            421, f"{name} has shape {list(value.shape)}, not {list(shape)}", why="the other arguments say so"
        )
    if value.device != device:
        raise UsageError(422, f"{name} lies on {value.device}, x on {device}", fix="move it")


def row_values(x: Tensor, value: Tensor | None) -> Sequence[int]:
    """The shape a scale or zero point of ``x`` [..., K] must have: as it is when [1], else [..., 1]."""
    return (1,) if value is not None and value.dim() == 1 else (*x.shape[:-1], 1)


def check_epilogue(
    k: int, n: int, shape: Sequence[int], device: torch.device, out_dtype: torch.dtype, activation: str,
    bias: Tensor | None, residual: Tensor | None,
) -> None:  # fmt: skip
    """Check what comes after a product of depth ``k`` with a result of ``shape`` with ``n`` channels.

    Raises:
        UsageError: ``k`` is 0 or over `MAX_K`, the output dtype is none that kernels write, the raw integers (int32) are asked
            for together with a bias, residual or activation, or one of these does not fit.
    """
    if k < 1:
        raise UsageError(432, "x has no features to multiply", fix="pass x [..., K] with K of at least 1")
    if k > MAX_K:
        raise UsageError(
            423, f"{k} products of 8-bit integers may overflow 32 bits", fix=f"keep to {MAX_K} input features"
        )
    if out_dtype not in (*FLOATS, torch.int32):
        raise UsageError(424, f"no int8 kernel writes {out_dtype}", fix="use float16, bfloat16, float32 or int32")
    check_activation(activation)
    if out_dtype == torch.int32 and (bias is not None or residual is not None or activation):
        raise UsageError(425, "int32 results take no bias, residual or activation", fix="ask for a float dtype")
    check_tensor("bias", bias, FLOATS, (n,), device)
    check_tensor("residual", residual, FLOATS, shape, device)


def exact_product(x: Tensor, weight: Tensor) -> Tensor:
    """``x weight^T`` of integers [..., K] and [N, K], exact: int32 [..., N].

    In float64, whose sums of integers below 2 ** 53 are exact; integer products of tensors are slower, or saturate inside.
    """
    return (x.double() @ weight.double().T).to(torch.int32)


def scaled(
    acc: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """``activation(acc x_scale w_scale + bias + residual)`` of int32 [..., N]; ``acc`` itself as int32."""
    if out_dtype == torch.int32:
        return acc
    return finish(acc.float() * x_scale * w_scale, bias, residual, activation, out_dtype).contiguous()
