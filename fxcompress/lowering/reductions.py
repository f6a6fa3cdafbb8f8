"""Reductions, softmax, order and attention as ONNX."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

from fxcompress.lowering.builder import Builder, Unsupported, dtype_of, lowers, rank_of

_aten = torch.ops.aten
_REDUCE = {"mean": "ReduceMean", "sum": "ReduceSum", "amax": "ReduceMax", "amin": "ReduceMin", "prod": "ReduceProd"}


# ------------------------------------------------------------------------------------------------ reductions
@lowers(
    _aten.mean.dim, _aten.mean.default, _aten.sum.dim_IntList, _aten.sum.default, _aten.amax.default, _aten.amin.default,
    _aten.prod.dim_int, _aten.prod.default,
)  # fmt: skip
def _reduce(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    kind = _REDUCE[str(node.target).split(".")[1]]
    return b.op(kind, b.value(a["self"], dtype_of(node)), _axes(b, a), keepdims=int(a.get("keepdim", False)))


def _axes(b: Builder, a: dict[str, Any]) -> Any:
    """The dimensions to reduce, written out: OpenVINO cannot read a reduction over all of them that names none."""
    dims = a.get("dim")
    dims = dims if dims is None or isinstance(dims, (list, tuple)) else [dims]
    return b.ints(dims or range(rank_of(a["self"])))


@lowers(_aten.max.default, _aten.min.default)
def _global_extreme(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    kind = "ReduceMax" if "max" in str(node.target) else "ReduceMin"
    return b.op(kind, b.value(a["self"]), _axes(b, a), keepdims=0)


@lowers(_aten.max.dim, _aten.min.dim)
def _extreme_with_index(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    side = "Max" if "max" in str(node.target) else "Min"
    x, dim, keep = b.value(a["self"]), a["dim"], int(a["keepdim"])
    return b.op(f"Reduce{side}", x, b.ints([dim]), keepdims=keep), b.op(f"Arg{side}", x, axis=dim, keepdims=keep)


@lowers(_aten.argmax.default, _aten.argmin.default)
def _arg_extreme(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    x, dim = b.value(a["self"]), a["dim"]
    kind = "ArgMax" if "argmax" in str(node.target) else "ArgMin"
    if dim is not None:
        return b.op(kind, x, axis=dim, keepdims=int(a["keepdim"]))
    flat = b.op(kind, b.op("Reshape", x, b.ints([-1])), axis=0, keepdims=0)
    return b.op("Reshape", flat, b.ints([1] * rank_of(node))) if a["keepdim"] else flat


@lowers(_aten.any.dim, _aten.any.default, _aten.all.dim, _aten.all.default)
def _any_all(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    kind = "ReduceMax" if "any" in str(node.target) else "ReduceMin"
    number = b.cast(b.value(a["self"], torch.bool), torch.bool, torch.int32)
    return b.cast(b.op(kind, number, _axes(b, a), keepdims=int(a.get("keepdim", False))), torch.int32, torch.bool)


@lowers(_aten.cumsum.default)
def _cumsum(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    return b.op("CumSum", b.value(a["self"], dtype_of(node)), b.scalar(a["dim"], torch.int64))


@lowers(
    _aten.var.correction,
    _aten.std.correction,
    _aten.var.dim,
    _aten.std.dim,
    _aten.var_mean.correction,
    _aten.std_mean.correction,
    _aten.var_mean.dim,
    _aten.std_mean.dim,
)
def _variance(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    x, shape = b.value(a["self"]), a["self"].meta["val"].shape
    dims = [d % len(shape) for d in (a["dim"] if a["dim"] is not None else range(len(shape)))]
    correction = a.get("correction", 1 if a.get("unbiased", True) else 0)
    correction = 1 if correction is None else correction
    count = math.prod(shape[d] for d in dims)
    if correction and not isinstance(count, int):
        raise Unsupported("an unbiased variance over a dynamic dimension")
    dtype, keep = dtype_of(a["self"]), int(a.get("keepdim", False))
    centred = b.op("Sub", x, b.op("ReduceMean", x, b.ints(dims), keepdims=1))
    result = b.op("ReduceMean", b.op("Mul", centred, centred), b.ints(dims), keepdims=keep)
    if correction:
        result = b.op("Mul", result, b.scalar(count / (count - correction), dtype))
    name = str(node.target)
    result = b.op("Sqrt", result) if "std" in name else result
    return (result, b.op("ReduceMean", x, b.ints(dims), keepdims=keep)) if "_mean" in name else result


@lowers(_aten.linalg_vector_norm.default, _aten.norm.ScalarOpt_dim)
def _norm(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    order = a.get("ord", a.get("p"))
    kind = {2: "ReduceL2", 1: "ReduceL1", None: "ReduceL2", math.inf: "ReduceMax"}.get(order)
    if kind is None:
        raise Unsupported(f"a norm of order {order}")
    if kind == "ReduceMax":
        return b.op(kind, b.op("Abs", b.value(a["self"], dtype_of(node))), _axes(b, a), keepdims=int(a["keepdim"]))
    return b.op(kind, b.value(a["self"], dtype_of(node)), _axes(b, a), keepdims=int(a["keepdim"]))


@lowers(_aten.softmax.int, _aten._softmax.default, _aten.log_softmax.int, _aten._log_softmax.default)
def _softmax(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    kind = "LogSoftmax" if "log" in str(node.target) else "Softmax"
    return b.op(kind, b.value(a["self"], dtype_of(node)), axis=a["dim"])


@lowers(_aten.logsumexp.default)
def _logsumexp(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    """``max + log(sum(exp(x - max)))``."""
    x, axes = b.value(a["self"], dtype_of(node)), _axes(b, a)
    largest = b.op("ReduceMax", x, axes, keepdims=1)
    total = b.op("ReduceSum", b.op("Exp", b.op("Sub", x, largest)), axes, keepdims=1)
    result = b.op("Add", b.op("Log", total), largest)
    return result if a["keepdim"] else b.op("Squeeze", result, axes)


@lowers(_aten.sort.default, _aten.sort.stable, _aten.argsort.default)
def _sort(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    x, dim, name = b.value(a["self"]), a["dim"] % rank_of(a["self"]), str(node.target)
    if a.get("stable"):
        raise Unsupported("a stable sort")
    count = b.op("Shape", x, start=dim, end=dim + 1)
    values = b.multi("TopK", 2, x, count, axis=dim, largest=int(a["descending"]), sorted=1)
    return values[1] if "argsort" in name else values


@lowers(_aten.topk.default)
def _topk(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    count = b.sizes([a["k"]])
    return b.multi(
        "TopK", 2, b.value(a["self"]), count, axis=a["dim"], largest=int(a["largest"]), sorted=int(a["sorted"])
    )


# ------------------------------------------------------------------------------------------------ attention
@lowers(_aten.scaled_dot_product_attention.default)
def _attention(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    query, key, mask = a["query"], a["key"], a["attn_mask"]
    dtype, width = dtype_of(query), query.meta["val"].shape[-1]
    if a["dropout_p"]:
        raise Unsupported("attention with dropout")
    scale = a["scale"] if a["scale"] is not None else 1.0 / math.sqrt(width)
    k, v = (_grouped(b, a, name) for name in ("key", "value"))
    rank = rank_of(key)
    order = [*range(rank - 2), rank - 1, rank - 2]
    scaled = b.op("Mul", b.value(query), b.scalar(scale, dtype))
    scores = b.op("MatMul", scaled, b.op("Transpose", k, perm=order))
    if a["is_causal"]:
        scores = _masked(b, scores, _causal(b, query, key), dtype)
    if mask is not None:
        bias = b.value(mask)
        scores = _masked(b, scores, bias, dtype) if dtype_of(mask) == torch.bool else b.op("Add", scores, bias)
    return b.op("MatMul", b.op("Softmax", scores, axis=-1), v)


def _masked(b: Builder, scores: Any, keep: Any, dtype: torch.dtype) -> Any:
    """Scores with a very low number where ``keep`` is False; finite, so that a row without any key is no NaN."""
    return b.op("Where", keep, scores, b.scalar(torch.finfo(dtype).min, dtype))


def _causal(b: Builder, query: Node, key: Node) -> Any:
    rows, columns = query.meta["val"].shape[-2], key.meta["val"].shape[-2]
    if isinstance(rows, int) and isinstance(columns, int):
        return b.constant(torch.ones(rows, columns, dtype=torch.bool).tril())
    lengths = [b.op("Shape", b.value(n), start=-2, end=-1) for n in (query, key)]
    ones = b.op("Expand", b.scalar(1, torch.int64), b.op("Concat", *lengths, axis=0))
    return b.cast(b.op("Trilu", ones, None, upper=0), torch.int64, torch.bool)


def _grouped(b: Builder, a: dict[str, Any], name: str) -> Any:
    """Key or value with its heads repeated to the number of query heads (grouped-query attention)."""
    value, shape = b.value(a[name]), a[name].meta["val"].shape
    heads = a["query"].meta["val"].shape[-3] if len(shape) > 2 else 0
    if not a.get("enable_gqa") or shape[-3] == heads:
        return value
    if len(shape) != 4:
        raise Unsupported("grouped-query attention on tensors that are not [batch, heads, length, width]")
    wide = b.op("Expand", b.op("Unsqueeze", value, b.ints([2])), b.ints([1, 1, heads // shape[1], 1, 1]))
    target = b.op(
        "Concat", b.ints([0, heads]), b.ints([-1 if not isinstance(shape[2], int) else shape[2], shape[3]]), axis=0
    )
    return b.op("Reshape", wide, target)
