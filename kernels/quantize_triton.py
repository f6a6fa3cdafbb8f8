"""The Triton kernels of `fxcompress.kernels.quantize`: one row a program, or a block of a tensor."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxcompress.kernels.epilogue import check_activation
from fxcompress.kernels.epilogue_triton import CompileCase, activate
from fxcompress.kernels.int8_common import FLOATS, check_tensor
from fxcompress.kernels.int8_triton import device_guard
from fxcompress.kernels.quantize import check_range, check_rows

__all__ = [
    "activation_quantize",
    "compile_cases",
    "layer_norm_quantize",
    "quantize_per_tensor",
    "quantize_per_token",
    "rms_norm_quantize",
    "rows_kernel",
    "silu_mul_quantize",
    "tensor_kernel",
]

#: Values of a row that stay in registers; longer rows are read again for each pass.
_BLOCK = 8192


@triton.jit
def _round(x):
    """Half to even, for magnitudes below 2 ** 22: the sum has no bits left behind the point."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _value(x, columns, mask, x2, weight, bias, mean, inverse, KIND: tl.constexpr, ACTIVATION: tl.constexpr):
    """What is quantized, float32 with the precision of the input: see the operators for what is rounded when."""
    raw = tl.load(x + columns, mask=mask, other=0.0)
    y = raw.to(tl.float32)
    if KIND == "silu_mul":
        y = activate(y, "silu").to(raw.dtype).to(tl.float32) * tl.load(x2 + columns, mask=mask, other=0.0).to(
            tl.float32
        )
    elif KIND == "norm" or KIND == "rounded_norm":
        y = (y - mean) * inverse
        if KIND == "rounded_norm":
            y = y.to(raw.dtype).to(tl.float32)
        if weight is not None:
            y *= tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
        if bias is not None:
            y += tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)
        y = tl.where(mask, y, 0.0)
    else:
        y = tl.where(mask, activate(y, ACTIVATION), 0.0)
    return y.to(raw.dtype).to(tl.float32)


@triton.jit
def _sums(x, K, mean, SQUARES: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of a row, or of the squares of its distances to ``mean``."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        y = tl.load(x + columns, mask=columns < K, other=0.0).to(tl.float32)
        if SQUARES:
            y = tl.where(columns < K, (y - mean) * (y - mean), 0.0)
        total += y
    return tl.sum(total, 0)


@triton.jit
def rows_kernel(
    x, x2, weight, bias, q, scales, K, eps,
    KIND: tl.constexpr, CENTRED: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Quantize a row of K values: int8 ``q`` and its scale.

    KIND is ``norm`` (``CENTRED``: LayerNorm, else RMSNorm), ``rounded_norm`` (RMSNorm, also rounded before its weight),
    ``silu_mul`` or ``activation``; ``WHOLE``: K <= BLOCK.
    """
    row = tl.program_id(0).to(tl.int64)
    x += row * K
    q += row * K
    if x2 is not None:
        x2 += row * K
    mean = 0.0
    inverse = 1.0
    if KIND == "norm" or KIND == "rounded_norm":
        if CENTRED:
            mean = _sums(x, K, 0.0, False, BLOCK) / K
        inverse = 1.0 / tl.sqrt_rn(_sums(x, K, mean, True, BLOCK) / K + eps)
    columns = tl.arange(0, BLOCK)
    if WHOLE:
        y = _value(x, columns, columns < K, x2, weight, bias, mean, inverse, KIND, ACTIVATION)
        largest = tl.max(tl.abs(y), 0)
    else:
        most = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, K, BLOCK):
            here = start + columns
            most = tl.maximum(
                most, tl.abs(_value(x, here, here < K, x2, weight, bias, mean, inverse, KIND, ACTIVATION))
            )  # fmt: skip
        largest = tl.max(most, 0)
    scale = tl.div_rn(largest, 127.0)
    scale = tl.where(scale > 0.0, scale, 1.0)
    tl.store(scales + row, scale)
    if WHOLE:
        levels = tl.minimum(tl.maximum(_round(tl.div_rn(y, scale)), -127.0), 127.0)
        tl.store(q + columns, levels.to(tl.int8), mask=columns < K)
    else:
        for start in range(0, K, BLOCK):
            here = start + columns
            y = _value(x, here, here < K, x2, weight, bias, mean, inverse, KIND, ACTIVATION)
            levels = tl.minimum(tl.maximum(_round(tl.div_rn(y, scale)), -127.0), 127.0)
            tl.store(q + here, levels.to(tl.int8), mask=here < K)


@triton.jit(do_not_specialize=["COUNT"])
def tensor_kernel(x, q, scale, zero, COUNT, QMIN, QMAX, BLOCK: tl.constexpr):
    """Quantize ``COUNT`` values with one ``scale`` and ``zero``."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(x + place, mask=place < COUNT, other=0.0).to(tl.float32)
    y = tl.div_rn(y, tl.load(scale))
    level = _round(tl.minimum(tl.maximum(y, -65536.0), 65536.0))
    if zero is not None:
        level += tl.load(zero).to(tl.float32)
    level = tl.minimum(tl.maximum(level, QMIN.to(tl.float32)), QMAX.to(tl.float32))
    tl.store(q + place, level.to(tl.int8), mask=place < COUNT)


def _rows(
    x: Tensor, kind: str, x2: Tensor | None = None, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 0.0, activation: str = "", centred: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    k = x.shape[-1]
    q = x.new_empty(x.shape, dtype=torch.int8)
    scales = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    if scales.numel() == 0:
        return q, scales
    block = min(triton.next_power_of_2(k), _BLOCK)
    given = [None if value is None else value.contiguous() for value in (x, x2, weight, bias)]
    with device_guard(x):
        rows_kernel[(scales.numel(),)](
            *given, q, scales, k, eps, KIND=kind, CENTRED=centred, ACTIVATION=activation, BLOCK=block, WHOLE=k <= block,
            num_warps=_warps(block), enable_fp_fusion=False,
        )  # fmt: skip
    return q, scales


def _warps(block: int) -> int:
    return 1 if block <= 256 else 4 if block <= 2048 else 8


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `fxcompress.kernels.quantize`."""
    check_rows(x)
    return _rows(x, "activation")


def rms_norm_quantize(
    x: Tensor, weight: Tensor | None, eps: float, round_normed: bool = False
) -> tuple[Tensor, Tensor]:
    """See `fxcompress.kernels.quantize`."""
    check_rows(x, weight=weight)
    return _rows(x, "rounded_norm" if round_normed else "norm", weight=weight, eps=eps)


def layer_norm_quantize(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """See `fxcompress.kernels.quantize`."""
    check_rows(x, weight=weight, bias=bias)
    return _rows(x, "norm", weight=weight, bias=bias, eps=eps, centred=True)


def activation_quantize(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """See `fxcompress.kernels.quantize`."""
    check_rows(x)
    check_activation(activation)
    return _rows(x, "activation", activation=activation)


def silu_mul_quantize(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """See `fxcompress.kernels.quantize`."""
    check_rows(gate, up=up)
    return _rows(gate, "silu_mul", up)


def quantize_per_tensor(x: Tensor, scale: Tensor, zero: Tensor | None, qmin: int, qmax: int) -> Tensor:
    """See `fxcompress.kernels.quantize`."""
    check_tensor("x", x, FLOATS, x.shape, x.device)
    check_tensor("scale", scale, (torch.float32,), (1,), x.device)
    check_tensor("zero", zero, (torch.int32,), (1,), x.device)
    check_range(qmin, qmax)
    q = torch.empty_like(x, dtype=torch.int8)
    if x.numel() == 0:
        return q
    if x.stride() != q.stride():  # gaps or overlaps: values in the order of the result
        x = torch.empty_like(q, dtype=x.dtype).copy_(x)
    with device_guard(x):
        tensor_kernel[(triton.cdiv(x.numel(), 4096),)](
            x, q, scale, zero, x.numel(), qmin, qmax, BLOCK=4096, enable_fp_fusion=False
        )  # fmt: skip
    return q


def compile_cases(sm: int) -> list[CompileCase]:
    """Every kind of row, short and long, and a tensor; the same for every ``sm``."""
    kinds: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
        "rms_norm": ({"weight": "*fp16"}, {"KIND": "norm", "CENTRED": False, "x2": None, "bias": None}),
        "layer_norm": ({"weight": "*fp16", "bias": "*fp16"}, {"KIND": "norm", "CENTRED": True, "x2": None}),
        "silu_mul": ({"x2": "*fp16"}, {"KIND": "silu_mul", "CENTRED": False, "weight": None, "bias": None}),
        "gelu": ({}, {"KIND": "activation", "CENTRED": False, "x2": None, "weight": None, "bias": None}),
    }
    cases = []
    for name, (kinds_of, constants) in kinds.items():
        for whole in (True, False):
            chosen = {"ACTIVATION": "gelu" if name == "gelu" else "", "BLOCK": _BLOCK, "WHOLE": whole}
            signature = {"x": "*fp16", "q": "*i8", "scales": "*fp32", "K": "i32", "eps": "fp32"} | kinds_of
            title = f"quantize {name}{'' if whole else ' long rows'}"
            cases.append(
                CompileCase(
                    title, "quantize", rows_kernel, signature, constants | chosen, _warps(_BLOCK), asynchronous=False
                )
            )
    signature = {
        "x": "*fp16",
        "q": "*i8",
        "scale": "*fp32",
        "zero": "*i32",
        "COUNT": "i64",
        "QMIN": "i32",
        "QMAX": "i32",
    }
    cases.append(
        CompileCase(
            "quantize per tensor", "quantize", tensor_kernel, signature, {"BLOCK": 4096},
            unaligned=("COUNT", "QMIN", "QMAX"), asynchronous=False,
        )
    )  # fmt: skip
    return cases
