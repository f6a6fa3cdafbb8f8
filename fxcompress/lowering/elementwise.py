"""Elementwise operators as ONNX, with torch's type promotion written out as Cast nodes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxcompress.lowering.builder import Builder, Unsupported, dtype_of, lowers

__all__ = ["common_dtype", "emit_activation", "pair"]

_aten = torch.ops.aten

# ------------------------------------------------------------------------------------------------ one input
_SAME = {
    "abs": "Abs", "neg": "Neg", "ceil": "Ceil", "floor": "Floor", "round": "Round", "sign": "Sign", "logical_not": "Not",
}  # fmt: skip
_FLOAT = {
    "sqrt": "Sqrt", "exp": "Exp", "log": "Log", "sin": "Sin", "cos": "Cos", "tan": "Tan", "tanh": "Tanh", "sigmoid": "Sigmoid",
    "erf": "Erf", "reciprocal": "Reciprocal", "relu": "Relu", "selu": "Selu", "mish": "Mish", "hardswish": "HardSwish",
    "atan": "Atan", "asin": "Asin", "acos": "Acos", "sinh": "Sinh", "cosh": "Cosh",
}  # fmt: skip


def _overload(name: str) -> Any:
    return getattr(_aten, name).default


def _unary(kind: str) -> Callable[[Builder, Node, dict[str, Any]], Any]:
    def emit(b: Builder, node: Node, a: dict[str, Any]) -> Any:
        return b.op(kind, b.value(a["self"], dtype_of(node)))

    return emit


for _name, _kind in {**_SAME, **_FLOAT}.items():
    lowers(_overload(_name))(_unary(_kind))


@lowers(_aten.relu.default)
def _relu(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    x, dtype = b.value(a["self"]), dtype_of(node)
    return b.op("Relu", x) if dtype.is_floating_point else b.op("Max", x, b.scalar(0, dtype))


@lowers(_aten.bitwise_not.default)
def _bitwise_not(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    return b.op("Not" if dtype_of(node) == torch.bool else "BitwiseNot", b.value(a["self"]))


@lowers(_aten.trunc.default)
def _trunc(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    return truncated(b, b.value(a["self"]))


def truncated(b: Builder, x: Any) -> Any:
    """A float without its fraction, rounded towards zero; infinities stay."""
    return b.op("Mul", b.op("Sign", x), b.op("Floor", b.op("Abs", x)))


@lowers(_aten.log2.default)
def _log2(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    dtype = dtype_of(node)
    return b.op("Mul", b.op("Log", b.value(a["self"], dtype)), b.scalar(1 / math.log(2), dtype))


@lowers(_aten.exp2.default)
def _exp2(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    dtype = dtype_of(node)
    return b.op("Pow", b.scalar(2, dtype), b.value(a["self"], dtype))


@lowers(_aten.rsqrt.default)
def _rsqrt(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    return b.op("Reciprocal", b.op("Sqrt", b.value(a["self"], dtype_of(node))))


@lowers(_aten.square.default)
def _square(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    x = b.value(a["self"])
    return b.op("Mul", x, x)


@lowers(_aten.isnan.default)
def _isnan(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    return b.op("IsNaN", b.value(a["self"]))


@lowers(_aten.isinf.default)
def _isinf(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    return b.op("IsInf", b.value(a["self"]))


@lowers(_aten.log1p.default)
def _log1p(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    dtype = dtype_of(node)
    return b.op("Log", b.op("Add", b.value(a["self"], dtype), b.scalar(1, dtype)))


# ------------------------------------------------------------------------------------------------ activations
_ACTIVATIONS = (
    "relu6",
    "hardtanh",
    "leaky_relu",
    "silu",
    "gelu",
    "hardsigmoid",
    "elu",
    "celu",
    "softplus",
    "threshold",
)


def emit_activation(
    b: Builder, overload: Any, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype
) -> Any:
    """An activation with its constants, on an ONNX value."""
    schema = overload._schema.arguments[1:]
    given = {s.name: s.default_value for s in schema} | dict(zip((s.name for s in schema), args, strict=False)) | kwargs
    name = overload._schema.name.split("::")[1]
    if name in _FLOAT:
        return b.op(_FLOAT[name], x)
    return _PARAMETRIC[name](b, x, given, dtype)


def _clip(b: Builder, x: Any, low: Any, high: Any, dtype: torch.dtype) -> Any:
    limits = [None if v is None else b.scalar(b.static(v), dtype) for v in (low, high)]
    return b.op("Clip", x, *(limits if limits[1] is not None else limits[:1]))


def _gelu(b: Builder, x: Any, a: dict[str, Any], dtype: torch.dtype) -> Any:
    return b.op("Gelu", x, approximate=a["approximate"])


def _elu(b: Builder, x: Any, a: dict[str, Any], dtype: torch.dtype) -> Any:
    if a["scale"] != 1 or a["input_scale"] != 1:
        raise Unsupported("ELU with a scale")
    return b.op("Elu", x, alpha=float(a["alpha"]))


def _softplus(b: Builder, x: Any, a: dict[str, Any], dtype: torch.dtype) -> Any:
    """``log(1 + exp(beta x)) / beta``; torch's threshold only keeps exp from overflowing."""
    if a["beta"] == 1:
        return b.op("Softplus", x)
    beta = b.scalar(a["beta"], dtype)
    return b.op("Div", b.op("Softplus", b.op("Mul", x, beta)), beta)


def _threshold(b: Builder, x: Any, a: dict[str, Any], dtype: torch.dtype) -> Any:
    below = b.op("LessOrEqual", x, b.scalar(a["threshold"], dtype))
    return b.op("Where", below, b.scalar(a["value"], dtype), x)


_PARAMETRIC: dict[str, Callable[[Builder, Any, dict[str, Any], torch.dtype], Any]] = {
    "relu6": lambda b, x, a, t: _clip(b, x, 0.0, 6.0, t),
    "hardtanh": lambda b, x, a, t: _clip(b, x, a["min_val"], a["max_val"], t),
    "leaky_relu": lambda b, x, a, t: b.op("LeakyRelu", x, alpha=float(a["negative_slope"])),
    "silu": lambda b, x, a, t: b.op("Mul", x, b.op("Sigmoid", x)),
    "gelu": _gelu,
    "hardsigmoid": lambda b, x, a, t: b.op("HardSigmoid", x, alpha=1.0 / 6.0, beta=0.5),
    "elu": _elu,
    "celu": lambda b, x, a, t: b.op("Celu", x, alpha=float(a["alpha"])),
    "softplus": _softplus,
    "threshold": _threshold,
}


@lowers(*(_overload(name) for name in _ACTIVATIONS))
def _activation(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    name = str(node.target).split(".")[1]
    return _PARAMETRIC[name](
        b, b.value(a["self"]), {k: b.static(v) for k, v in a.items() if k != "self"}, dtype_of(node)
    )


@lowers(_aten.prelu.default, _aten._prelu_kernel.default)
def _prelu(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    weight, rank = a["weight"], a["self"].meta["val"].dim()
    slope = b.value(weight)
    if weight.meta["val"].dim() == 1 and rank > 2:
        slope = b.op("Reshape", slope, b.ints([-1, *[1] * (rank - 2)]))
    return b.op("PRelu", b.value(a["self"]), slope)


@lowers(_aten.log_sigmoid.default)
def _log_sigmoid(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    return b.op("Neg", b.op("Softplus", b.op("Neg", b.value(a["self"]))))


@lowers(_aten.glu.default)
def _glu(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    x, gate = b.multi("Split", 2, b.value(a["self"]), axis=a["dim"], num_outputs=2)
    return b.op("Mul", x, b.op("Sigmoid", gate))


@lowers(_aten.clamp.default, _aten.clamp_min.default, _aten.clamp_max.default)
def _clamp(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    dtype = dtype_of(node)
    return _clip(b, b.value(a["self"], dtype), a.get("min"), a.get("max"), dtype)


@lowers(_aten.clamp.Tensor)
def _clamp_tensor(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    dtype = dtype_of(node)
    x = b.value(a["self"], dtype)
    x = x if a["min"] is None else b.op("Max", x, b.value(a["min"], dtype))
    return x if a["max"] is None else b.op("Min", x, b.value(a["max"], dtype))


# ------------------------------------------------------------------------------------------------ two inputs
def common_dtype(*operands: Any) -> torch.dtype:
    """Dtype torch computes in for these operands (its promotion rules; Python numbers are weak)."""
    samples = [_sample(o) for o in operands]
    dtype = torch.result_type(samples[0], samples[-1])
    for other in samples[1:-1]:
        dtype = torch.promote_types(dtype, other.dtype if isinstance(other, Tensor) else dtype)
    return dtype


def _sample(operand: Any) -> Any:
    if not isinstance(operand, Node):
        return operand
    val = operand.meta["val"]
    if isinstance(val, Tensor):
        return torch.empty([1] * min(val.dim(), 1), dtype=val.dtype)
    return {torch.bool: True, torch.int64: 1}.get(dtype_of(operand), 1.0)


def pair(b: Builder, x: Any, y: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """Both operands as ONNX values of ``dtype``; sizes become scalars so that they do not add a dimension."""
    return _operand(b, x, dtype), _operand(b, y, dtype)


def _operand(b: Builder, x: Any, dtype: torch.dtype) -> Any:
    value = b.value(x, dtype)
    is_size = isinstance(x, Node) and not isinstance(x.meta["val"], Tensor)
    return b.op("Squeeze", value) if is_size and value.producer() is not None else value


def _scaled(b: Builder, y: Any, alpha: Any, dtype: torch.dtype) -> Any:
    return y if alpha == 1 else b.op("Mul", y, b.scalar(b.static(alpha), dtype))


@lowers(_aten.add.Tensor, _aten.sub.Tensor, _aten.add.Scalar, _aten.sub.Scalar)
def _add(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    dtype = dtype_of(node)
    x, y = pair(b, a["self"], a["other"], dtype)
    if dtype == torch.bool:
        return b.op("Or", x, y)  # torch refuses to subtract booleans
    return b.op("Add" if "add" in str(node.target) else "Sub", x, _scaled(b, y, a["alpha"], dtype))


@lowers(_aten.rsub.Scalar, _aten.rsub.Tensor)
def _rsub(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    dtype = dtype_of(node)
    x, y = pair(b, a["self"], a["other"], dtype)
    return b.op("Sub", y, _scaled(b, x, a["alpha"], dtype))


@lowers(_aten.addcmul.default, _aten.addcdiv.default)
def _addc(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    dtype = dtype_of(node)
    first, second = (b.value(a[k], dtype) for k in ("tensor1", "tensor2"))
    term = b.op("Mul" if "mul" in str(node.target) else "Div", first, second)
    return b.op("Add", b.value(a["self"], dtype), _scaled(b, term, a["value"], dtype))


@lowers(_aten.mul.Tensor, _aten.mul.Scalar)
def _mul(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    dtype = dtype_of(node)
    x, y = pair(b, a["self"], a["other"], dtype)
    return b.op("And" if dtype == torch.bool else "Mul", x, y)


@lowers(_aten.div.Tensor, _aten.div.Scalar, _aten.div.Tensor_mode, _aten.div.Scalar_mode, _aten.floor_divide.default)
def _div(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    dtype, mode = dtype_of(node), a.get("rounding_mode", "floor" if "floor" in str(node.target) else None)
    x, y = pair(b, a["self"], a["other"], dtype)
    if mode is None:
        return b.op("Div", x, y)
    if dtype.is_floating_point:
        quotient = b.op("Div", x, y)
        return b.op("Floor", quotient) if mode == "floor" else truncated(b, quotient)
    return b.op("Div", x, y) if mode == "trunc" else floor_divide(b, x, y)


def floor_divide(b: Builder, x: Any, y: Any) -> Any:
    """Integer division that rounds down: ``(x - x mod y) / y``; the ONNX Div truncates."""
    return b.op("Div", b.op("Sub", x, b.op("Mod", x, y)), y)


@lowers(_aten.remainder.Scalar, _aten.remainder.Tensor)
def _remainder(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    dtype = dtype_of(node)
    x, y = pair(b, a["self"], a["other"], dtype)
    if not dtype.is_floating_point:
        return b.op("Mod", x, y)
    return b.op("Sub", x, b.op("Mul", b.op("Floor", b.op("Div", x, y)), y))


@lowers(_aten.fmod.Scalar, _aten.fmod.Tensor)
def _fmod(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    return b.op("Mod", *pair(b, a["self"], a["other"], dtype_of(node)), fmod=1)


@lowers(_aten.pow.Tensor_Scalar, _aten.pow.Tensor_Tensor, _aten.pow.Scalar)
def _pow(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    dtype = dtype_of(node)
    x = b.value(a["self"], dtype)
    if a["exponent"] == 2:
        return b.op("Mul", x, x)
    return b.op("Sqrt", x) if a["exponent"] == 0.5 else b.op("Pow", x, b.value(a["exponent"], dtype))


_COMPARE = {"eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual", "ne": "Equal"}


@lowers(*(getattr(getattr(_aten, name), kind) for name in _COMPARE for kind in ("Tensor", "Scalar")))
def _compare(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    name = str(node.target).split(".")[1]
    dtype = common_dtype(a["self"], a["other"])
    if dtype == torch.bool and name not in ("eq", "ne"):
        dtype = torch.int32
    value = b.op(_COMPARE[name], *pair(b, a["self"], a["other"], dtype))
    return b.op("Not", value) if name == "ne" else value


_LOGICAL = {"and": "And", "or": "Or", "xor": "Xor"}


@lowers(
    *(getattr(_aten, f"logical_{name}").default for name in _LOGICAL),
    *(getattr(getattr(_aten, f"bitwise_{name}"), kind) for name in _LOGICAL for kind in ("Tensor", "Scalar")),
    *(getattr(getattr(_aten, f"__{name}__"), kind) for name in _LOGICAL for kind in ("Tensor", "Scalar")),
)
def _logical(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    kind = _LOGICAL[str(node.target).split(".")[1].strip("_").removeprefix("logical_").removeprefix("bitwise_")]
    if dtype_of(node) != torch.bool:
        return b.op(f"Bitwise{kind}", *pair(b, a["self"], a["other"], dtype_of(node)))
    return b.op(kind, *pair(b, a["self"], a["other"], torch.bool))


@lowers(_aten.maximum.default, _aten.minimum.default, _aten.max.other, _aten.min.other)
def _extreme(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    return b.op("Max" if "max" in str(node.target) else "Min", *pair(b, a["self"], a["other"], dtype_of(node)))


# ------------------------------------------------------------------------------------------------ choice, type
@lowers(_aten.where.self, _aten.where.ScalarOther, _aten.where.ScalarSelf, _aten.where.Scalar)
def _where(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    dtype = dtype_of(node)
    return choice(b, b.value(a["condition"], torch.bool), *pair(b, a["self"], a["other"], dtype), dtype)


def choice(b: Builder, condition: Any, x: Any, y: Any, dtype: torch.dtype) -> Any:
    """``x`` where ``condition`` holds, else ``y``; booleans as logic, since ONNX Runtime has no Where for them."""
    if dtype != torch.bool:
        return b.op("Where", condition, x, y)
    return b.op("Or", b.op("And", condition, x), b.op("And", b.op("Not", condition), y))


@lowers(_aten.masked_fill.Scalar, _aten.masked_fill.Tensor)
def _masked_fill(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    dtype = dtype_of(node)
    fill = a["value"]
    if isinstance(fill, float) and not math.isfinite(fill) and not dtype.is_floating_point:
        raise Unsupported("filling integers with an infinity")
    return choice(b, b.value(a["mask"], torch.bool), b.value(fill, dtype), b.value(a["self"]), dtype)


@lowers(
    _aten.to.dtype,
    _aten.to.dtype_layout,
    _aten.to.device,
    _aten.to.other,
    _aten._to_copy.default,
    _aten.type_as.default,
)
def _to(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    return b.value(a["self"], dtype_of(node))


@lowers(
    _aten.clone.default, _aten.contiguous.default, _aten.detach.default, _aten.alias.default, _aten.lift_fresh_copy.default,
    _aten.detach_.default, _aten.positive.default,
)  # fmt: skip
def _same(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    return b.value(a["self"])
