"""Reductions, softmax, pooling, resizing and attention as ONNX."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

from fxcompress.lowering.builder import Builder, Unsupported, dtype_of, lowers, rank_of
from fxcompress.lowering.layers import repeat

_aten = torch.ops.aten
_REDUCE = {"mean": "ReduceMean", "sum": "ReduceSum", "amax": "ReduceMax", "amin": "ReduceMin", "prod": "ReduceProd"}


# ------------------------------------------------------------------------------------------------ reductions
@lowers(
    _aten.mean.dim, _aten.mean.default, _aten.sum.dim_IntList, _aten.sum.default, _aten.amax.default, _aten.amin.default,
    _aten.prod.dim_int, _aten.prod.default,
)  # fmt: skip
def _reduce(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    kind = _REDUCE[str(node.target).split(".")[1]]
    dims = a.get("dim")
    dims = dims if dims is None or isinstance(dims, (list, tuple)) else [dims]
    axes = None if not dims else b.ints(dims)
    return b.op(kind, b.value(a["self"], dtype_of(node)), axes, keepdims=int(a.get("keepdim", False)))


@lowers(_aten.max.default, _aten.min.default)
def _global_extreme(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    return b.op("ReduceMax" if "max" in str(node.target) else "ReduceMin", b.value(a["self"]), keepdims=0)


@lowers(_aten.max.dim, _aten.min.dim)
def _extreme_with_index(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    side = "Max" if "max" in str(node.target) else "Min"
    x, dim, keep = b.value(a["self"]), a["dim"], int(a["keepdim"])
    return b.op(f"Reduce{side}", x, b.ints([dim]), keepdims=keep), b.op(f"Arg{side}", x, axis=dim, keepdims=keep)


@lowers(_aten.argmax.default, _aten.argmin.default)
def _arg_extreme(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    x, dim = b.value(a["self"]), a["dim"]
    if dim is None:
        x, dim = b.op("Reshape", x, b.ints([-1])), 0
    kind = "ArgMax" if "argmax" in str(node.target) else "ArgMin"
    return b.op(kind, x, axis=dim, keepdims=int(a["keepdim"]))


@lowers(_aten.any.dim, _aten.any.default, _aten.all.dim, _aten.all.default)
def _any_all(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    kind = "ReduceMax" if "any" in str(node.target) else "ReduceMin"
    axes = b.ints([a["dim"]]) if "dim" in a else None
    number = b.cast(b.value(a["self"], torch.bool), torch.bool, torch.int32)
    return b.cast(b.op(kind, number, axes, keepdims=int(a.get("keepdim", False))), torch.int32, torch.bool)


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
    kind = {2: "ReduceL2", 1: "ReduceL1", None: "ReduceL2"}.get(order)
    if kind is None:
        raise Unsupported(f"a norm of order {order}")
    dims = a["dim"] if a["dim"] is None or isinstance(a["dim"], (list, tuple)) else [a["dim"]]
    axes = None if not dims else b.ints(dims)
    return b.op(kind, b.value(a["self"], dtype_of(node)), axes, keepdims=int(a["keepdim"]))


@lowers(_aten.softmax.int, _aten._softmax.default, _aten.log_softmax.int, _aten._log_softmax.default)
def _softmax(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    kind = "LogSoftmax" if "log" in str(node.target) else "Softmax"
    return b.op(kind, b.value(a["self"], dtype_of(node)), axis=a["dim"])


@lowers(_aten.topk.default)
def _topk(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    count = b.sizes([a["k"]])
    return b.multi(
        "TopK", 2, b.value(a["self"]), count, axis=a["dim"], largest=int(a["largest"]), sorted=int(a["sorted"])
    )


# ------------------------------------------------------------------------------------------------ pooling
@lowers(*(getattr(_aten, f"max_pool{d}d").default for d in (1, 2, 3)))
def _max_pool(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    dims = int(str(node.target).split("max_pool")[1][0])
    return b.op("MaxPool", b.value(a["self"]), **_window(a, dims), dilations=repeat(a["dilation"], dims))


@lowers(*(getattr(_aten, f"avg_pool{d}d").default for d in (1, 2, 3)))
def _avg_pool(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    dims = int(str(node.target).split("avg_pool")[1][0])
    if a.get("divisor_override") is not None or (
        a["ceil_mode"] and a["count_include_pad"] and any(repeat(a["padding"], dims))
    ):
        raise Unsupported("an average pool with its own divisor, or that counts padding beyond the edge")
    return b.op("AveragePool", b.value(a["self"]), **_window(a, dims), count_include_pad=int(a["count_include_pad"]))


def _window(a: dict[str, Any], dims: int) -> dict[str, Any]:
    kernel = repeat(a["kernel_size"], dims)
    stride = repeat(a["stride"], dims) if a["stride"] else kernel
    padding = repeat(a["padding"], dims)
    return {"kernel_shape": kernel, "strides": stride, "pads": padding * 2, "ceil_mode": int(a["ceil_mode"])}


@lowers(
    *(getattr(_aten, f"adaptive_avg_pool{d}d").default for d in (1, 2, 3)),
    *(getattr(_aten, f"adaptive_max_pool{d}d").default for d in (1, 2, 3))
)  # fmt: skip
def _adaptive_pool(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    kind = "Max" if "max" in str(node.target) else "Average"
    x, shape = b.value(a["self"]), a["self"].meta["val"].shape
    dims = int(str(node.target).split("_pool")[1][0])
    want = repeat(a["output_size"], dims)
    have = list(shape[-dims:])
    if all(w == 1 for w in want):
        y: Any = (
            b.op(f"Global{kind}Pool", x)
            if len(shape) == dims + 2
            else b.op(f"Reduce{kind[:3]}", x, b.ints(range(-dims, 0)))
        )
    elif want == have:
        y = x
    elif all(isinstance(h, int) and h % w == 0 for h, w in zip(have, want, strict=True)):
        size = [h // w for h, w in zip(have, want, strict=True)]
        y = b.op(f"{kind}Pool", x, kernel_shape=size, strides=size)
    else:
        raise Unsupported("an adaptive pool whose windows differ in size")
    return (y, None) if kind == "Max" else y


# ------------------------------------------------------------------------------------------------ resizing
_RESIZE = {"nearest": "nearest", "linear": "linear", "bilinear": "linear", "bicubic": "cubic", "trilinear": "linear"}


@lowers(
    *(getattr(_aten, f"upsample_{k}d").vec for k in ("nearest1", "nearest2", "nearest3", "trilinear3")),
    *(getattr(_aten, f"upsample_{k}2d").vec for k in ("bilinear", "bicubic")),
    _aten.upsample_linear1d.vec,
)
def _upsample(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    mode = _RESIZE[str(node.target).split("upsample_")[1].split(".")[0][:-2]]
    sizes, factors = a["output_size"], a["scale_factors"]
    coordinates = (
        "align_corners" if a.get("align_corners") else "half_pixel" if mode == "cubic" else "pytorch_half_pixel"
    )
    coordinates = "asymmetric" if mode == "nearest" else coordinates
    extra = {"nearest_mode": "floor"} if mode == "nearest" else {"cubic_coeff_a": -0.75} if mode == "cubic" else {}
    attributes: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": coordinates, **extra}
    axes: dict[str, Any] = {"axes": list(range(2, rank_of(node)))}
    if sizes is not None:
        return b.op("Resize", b.value(a["input"]), None, None, b.sizes(list(sizes)), **attributes, **axes)
    scales = b.constant(torch.tensor([float(f) for f in factors], dtype=torch.float32))
    return b.op("Resize", b.value(a["input"]), None, scales, **attributes, **axes)


@lowers(_aten.pixel_shuffle.default)
def _pixel_shuffle(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    return b.op("DepthToSpace", b.value(a["self"]), blocksize=a["upscale_factor"], mode="CRD")


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
