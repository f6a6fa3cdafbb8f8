"""Views, joins, slices and symbolic sizes as ONNX."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from fxcompress.lowering.builder import Builder, Unsupported, dtype_of, lowers, rank_of
from fxcompress.lowering.elementwise import floor_divide

_aten = torch.ops.aten
_END = torch.iinfo(torch.int64).max


# ------------------------------------------------------------------------------------------------ symbolic sizes
@lowers(_aten.sym_size.int)
def _sym_size(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    size = node.meta.get("val")
    if isinstance(size, int):
        return size
    dim = a["dim"] % rank_of(a["self"])
    return b.op("Shape", b.value(a["self"]), start=dim, end=dim + 1)


@lowers(_aten.sym_numel.default, _aten.numel.default)
def _sym_numel(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    return b.op("Reshape", b.op("Size", b.value(a["self"])), b.ints([1]))


@lowers(operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, torch.sym_max, torch.sym_min)
def _size_arithmetic(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    if isinstance(node.meta.get("val"), int):
        return node.meta["val"]
    x, y = b.value(a["0"]), b.value(a["1"])
    if dtype_of(node) != torch.int64:
        raise Unsupported("arithmetic on sizes that gives no integer")
    if node.target is operator.floordiv:
        return floor_divide(b, x, y)
    kinds = {operator.add: "Add", operator.sub: "Sub", operator.mul: "Mul", operator.mod: "Mod", torch.sym_max: "Max"}
    return b.op(kinds.get(node.target, "Min"), x, y)  # type: ignore[arg-type]


@lowers(operator.truediv)
def _size_ratio(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    return b.op("Div", *(b.cast(b.value(a[k]), dtype_of(a[k]), torch.float32) for k in ("0", "1")))


@lowers(operator.neg)
def _size_negated(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    return b.op("Neg", b.value(a["0"]))


@lowers(torch.sym_float, torch.sym_int, math.trunc, math.floor, math.ceil)
def _size_cast(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    value, source = b.value(a["0"]), dtype_of(a["0"])
    kind = {math.floor: "Floor", math.ceil: "Ceil"}.get(node.target)  # type: ignore[arg-type]
    if kind and source.is_floating_point:
        value = b.op(kind, value)
    return b.cast(value, source, torch.float32 if node.target is torch.sym_float else torch.int64)


@lowers(operator.getitem)
def _getitem(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    return b.values[a["0"]][a["1"]]


# ------------------------------------------------------------------------------------------------ views
@lowers(
    _aten.view.default, _aten.reshape.default, _aten._unsafe_view.default, _aten.flatten.using_ints, _aten.unflatten.int,
    _aten.view_as.default, _aten.reshape_as.default,
)  # fmt: skip
def _reshape(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    return reshape(b, a["self"], node, a.get("size", a.get("shape")))


def reshape(b: Builder, x: Node, node: Node, sizes: Sequence[Any] | None) -> Any:
    """``x`` in the shape of ``node``: with a constant shape (0 copies a dimension, -1 is inferred) where that can be said."""
    before, after = x.meta["val"].shape, node.meta["val"].shape
    if tuple(map(str, before)) == tuple(map(str, after)):
        return b.value(x)
    target = _constant_target(before, after)
    if target is not None:
        return b.op("Reshape", b.value(x), b.ints(target))
    if sizes is None:
        raise Unsupported("a shape that is computed inside the operator")
    return b.op("Reshape", b.value(x), b.sizes(list(sizes)))


def _constant_target(before: Sequence[Any], after: Sequence[Any]) -> list[int] | None:
    target: list[int] = []
    for i, size in enumerate(after):
        if isinstance(size, int):
            target.append(size)
        elif i < len(before) and str(before[i]) == str(size):
            target.append(0)
        else:
            target.append(-1)
    fits = target.count(-1) <= 1 and not any(isinstance(s, int) and s == 0 for s in (*before, *after))
    return target if fits else None


@lowers(_aten.view.dtype)
def _view_dtype(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    raise Unsupported("the bits of a tensor read as another type")


@lowers(_aten.unsqueeze.default)
def _unsqueeze(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    return b.op("Unsqueeze", b.value(a["self"]), b.ints([a["dim"] % rank_of(node)]))


@lowers(_aten.squeeze.default, _aten.squeeze.dim, _aten.squeeze.dims)
def _squeeze(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    shape = a["self"].meta["val"].shape
    dims = a.get("dim", list(range(len(shape))))
    dims = [d % len(shape) for d in (dims if isinstance(dims, (list, tuple)) else [dims])]
    ones = [d for d in dims if isinstance(shape[d], int) and shape[d] == 1]
    return b.op("Squeeze", b.value(a["self"]), b.ints(ones)) if ones else b.value(a["self"])


@lowers(_aten.permute.default)
def _permute(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    rank = rank_of(node)
    return b.op("Transpose", b.value(a["self"]), perm=[d % rank for d in a["dims"]])


@lowers(_aten.transpose.int, _aten.t.default, _aten.numpy_T.default, _aten.swapaxes.default, _aten.mT.default)
def _transpose(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    rank = rank_of(node)
    if rank < 2:
        return b.value(a["self"])
    first, second = (a.get(k, a.get(o, d)) % rank for k, o, d in (("dim0", "axis0", -2), ("dim1", "axis1", -1)))
    order = list(range(rank))
    if node.target is _aten.numpy_T.default:
        order.reverse()
    else:
        order[first], order[second] = order[second], order[first]
    return b.op("Transpose", b.value(a["self"]), perm=order)


@lowers(_aten.movedim.int, _aten.movedim.intlist)
def _movedim(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    rank = rank_of(node)
    source, target = (
        [d % rank for d in (v if isinstance(v, (list, tuple)) else [v])] for v in (a["source"], a["destination"])
    )
    order: list[int] = [d for d in range(rank) if d not in source]
    for to, dim in sorted(zip(target, source, strict=True)):
        order.insert(to, dim)
    return b.op("Transpose", b.value(a["self"]), perm=order)


@lowers(_aten.expand.default, _aten.expand_as.default, _aten.broadcast_to.default)
def _expand(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    before, after = a["self"].meta["val"].shape, node.meta["val"].shape
    lead = len(after) - len(before)
    kept = [i >= lead and str(before[i - lead]) == str(after[i]) for i in range(len(after))]
    if all(kept):
        return b.value(a["self"])
    if "size" not in a:
        return b.op("Expand", b.value(a["self"]), b.op("Shape", b.value(a["other"])))
    return b.op("Expand", b.value(a["self"]), b.sizes([1 if k else s for k, s in zip(kept, a["size"], strict=True)]))


@lowers(_aten.repeat.default)
def _repeat(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    x, extra = b.value(a["self"]), len(a["repeats"]) - rank_of(a["self"])
    x = b.op("Unsqueeze", x, b.ints(range(extra))) if extra else x
    return b.op("Tile", x, b.sizes(a["repeats"]))


@lowers(_aten.tile.default)
def _tile(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    x, missing = b.value(a["self"]), rank_of(node) - rank_of(a["self"])
    x = b.op("Unsqueeze", x, b.ints(range(missing))) if missing else x
    return b.op("Tile", x, b.sizes([*[1] * (rank_of(node) - len(a["dims"])), *a["dims"]]))


@lowers(_aten.repeat_interleave.self_int)
def _repeat_interleave(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    if a["dim"] is None or not isinstance(a["repeats"], int):
        raise Unsupported("repeat_interleave without a dimension, or with computed repeats")
    rank = rank_of(node)
    dim = a["dim"] % rank
    x = b.op("Unsqueeze", b.value(a["self"]), b.ints([dim + 1]))
    tiled = b.op("Tile", x, b.ints([a["repeats"] if i == dim + 1 else 1 for i in range(rank + 1)]))
    sizes = [s if isinstance(s, int) else 0 for s in node.meta["val"].shape]
    if sizes[dim] == 0:
        raise Unsupported("repeat_interleave along a dynamic dimension")
    return b.op("Reshape", tiled, b.ints(sizes))


@lowers(_aten.roll.default)
def _roll(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    x, dims = b.value(a["self"]), b.static(a["dims"])
    if not dims:
        raise Unsupported("roll over the flattened tensor")
    for shift, dim in zip(b.static(a["shifts"]), dims, strict=True):
        # What lies behind the cut comes first; the shift may be larger than the size.
        size = a["self"].meta["val"].shape[dim]
        if isinstance(size, int):
            cut = b.ints([size - shift % size if size else 0])
        else:
            axis = dim % rank_of(node)
            length = b.op("Shape", x, start=axis, end=axis + 1)
            cut = b.op("Sub", length, b.op("Mod", b.ints([shift]), length))
        parts = b.op("Slice", x, cut, b.ints([_END]), b.ints([dim])), b.op("Slice", x, b.ints([0]), cut, b.ints([dim]))
        x = b.op("Concat", *parts, axis=dim)
    return x


@lowers(_aten.flip.default)
def _flip(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    dims = b.static(a["dims"])
    count = len(dims)
    return b.op(
        "Slice", b.value(a["self"]), b.ints([-1] * count), b.ints([-_END] * count), b.ints(dims), b.ints([-1] * count)
    )


# ------------------------------------------------------------------------------------------------ slices
@lowers(_aten.slice.Tensor)
def _slice(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    start, end, dim = (d if v is None else v for v, d in ((a["start"], 0), (a["end"], _END), (a["dim"], 0)))
    if start == 0 and end == _END and a["step"] == 1:
        return b.value(a["self"])
    return b.op("Slice", b.value(a["self"]), b.sizes([start]), b.sizes([end]), b.ints([dim]), b.sizes([a["step"]]))


@lowers(_aten.narrow.default)
def _narrow(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    start, length = a["start"], a["length"]
    if not isinstance(start, int) or not isinstance(length, int):
        raise Unsupported("narrow with computed limits")
    end = _END if start + length == 0 and start < 0 else start + length
    return b.op("Slice", b.value(a["self"]), b.ints([start]), b.ints([end]), b.ints([a["dim"]]))


@lowers(_aten.diff.default)
def _diff(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    if a["n"] != 1 or (a["prepend"] is not None and a["append"] is not None):
        raise Unsupported("differences of higher order")
    x, dim, dtype = b.value(a["self"]), a["dim"], dtype_of(node)
    if a["prepend"] is not None:
        x = b.op("Concat", b.value(a["prepend"], dtype), x, axis=dim)
    if a["append"] is not None:
        x = b.op("Concat", x, b.value(a["append"], dtype), axis=dim)
    later = b.op("Slice", x, b.ints([1]), b.ints([_END]), b.ints([dim]))
    earlier = b.op("Slice", x, b.ints([0]), b.ints([-1]), b.ints([dim]))
    return b.op("Xor" if dtype == torch.bool else "Sub", later, earlier)


@lowers(_aten.slice_scatter.default)
def _slice_scatter(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    shape, dim = a["self"].meta["val"].shape, a["dim"] % rank_of(node)
    start, end, size = a["start"] or 0, _END if a["end"] is None else a["end"], shape[dim]
    if a["step"] == 1 and start == 0 and end == _END:
        return b.value(a["src"])
    if a["step"] != 1 or not all(isinstance(v, int) for v in (start, end, size)):
        raise Unsupported("writing into a computed or strided slice")
    start, end = (max(0, min(v + size if v < 0 else v, size)) for v in (start, end))
    x, parts = b.value(a["self"]), [b.value(a["src"])]
    if start > 0:
        parts.insert(0, b.op("Slice", x, b.ints([0]), b.ints([start]), b.ints([dim])))
    if end < size:
        parts.append(b.op("Slice", x, b.ints([end]), b.ints([_END]), b.ints([dim])))
    return parts[0] if len(parts) == 1 else b.op("Concat", *parts, axis=dim)


@lowers(_aten.select.int)
def _select(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    index = a["index"]
    if isinstance(index, int):
        return b.op("Gather", b.value(a["self"]), b.scalar(index, torch.int64), axis=a["dim"])
    return b.op("Gather", b.value(a["self"]), b.op("Squeeze", b.value(index)), axis=a["dim"])


@lowers(_aten.index_select.default)
def _index_select(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    return b.op("Gather", b.value(a["self"]), b.value(a["index"]), axis=a["dim"])


@lowers(_aten.gather.default)
def _gather(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    return b.op("GatherElements", b.value(a["self"]), b.value(a["index"]), axis=a["dim"] % rank_of(node))


@lowers(_aten.index.Tensor)
def _index(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    given = {i: index for i, index in enumerate(a["indices"]) if index is not None}
    if any(dtype_of(index) == torch.bool for index in given.values()):
        raise Unsupported("indexing with a mask, whose result has no fixed size")
    first, count = min(given), len(given)
    if count == 1:
        return b.op("Gather", b.value(a["self"]), b.value(given[first], torch.int64), axis=first)
    if sorted(given) != list(range(count)):
        raise Unsupported("indexing with several tensors that do not come first")
    parts = [_broadcast_index(b, given[i], given) for i in range(count)]
    return b.op("GatherND", b.value(a["self"]), b.op("Concat", *parts, axis=-1))


def _broadcast_index(b: Builder, index: Node, all_given: dict[int, Node]) -> Any:
    """``index`` broadcast against the others, with a last dimension of 1."""
    value = b.value(index, torch.int64)
    rank = max(rank_of(n) for n in all_given.values())
    for other in all_given.values():
        if other is not index:
            value = b.op("Expand", value, b.op("Shape", b.value(other)))
    return b.op("Unsqueeze", value, b.ints([rank]))


@lowers(_aten.cat.default, _aten.concat.default)
def _cat(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    dtype = dtype_of(node)
    kept = [t for t in a["tensors"] if tuple(t.meta["val"].shape) != (0,)]
    return b.op("Concat", *(b.value(t, dtype) for t in kept), axis=a["dim"])


@lowers(_aten.stack.default)
def _stack(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    dim = a["dim"] % rank_of(node)
    parts = [b.op("Unsqueeze", b.value(t, dtype_of(node)), b.ints([dim])) for t in a["tensors"]]
    return b.op("Concat", *parts, axis=dim)


@lowers(
    _aten.split.Tensor, _aten.split_with_sizes.default, _aten.split.sizes, _aten.chunk.default, _aten.unsafe_split.Tensor,
    _aten.unsafe_chunk.default, _aten.tensor_split.sections,
)  # fmt: skip
def _split(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    dim = a["dim"]
    sizes = [t.shape[dim] for t in node.meta["val"]]
    if not all(isinstance(s, int) for s in sizes):
        raise Unsupported("a split of a dynamic dimension")
    return (
        b.multi("Split", len(sizes), b.value(a["self"]), b.ints(sizes), axis=dim)
        if len(sizes) > 1
        else (b.value(a["self"]),)
    )


@lowers(_aten.unbind.int)
def _unbind(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    x, dim = b.value(a["self"]), a["dim"]
    return tuple(b.op("Gather", x, b.scalar(i, torch.int64), axis=dim) for i in range(len(node.meta["val"])))
