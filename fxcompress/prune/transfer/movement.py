"""Data movement that cuts, joins and pads: slices, concatenations, shuffles of pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from fxcompress.prune.flow import Flow, Shuffle, Value
from fxcompress.prune.labels import FREE, Column, Columns
from fxcompress.prune.transfer.registry import arguments, operator
from fxcompress.prune.transfer.views import shuffled, source

__all__ = ["cut"]


# ------------------------------------------------------------------------------------------------ cut
def cut(flow: Flow, node: Node, value: Value, dim: int, indices: Any, sizes: tuple[int, ...]) -> Value:
    """The value with only ``indices`` of ``dim``. A single index left cannot go."""
    dims = list(value.dims)
    dims[dim] = tuple(c.take(indices) for c in flow.columns(value, dim))
    if sizes[dim] <= 1:
        flow.pin(dims[dim], node, "a single index is used")
        dims[dim] = ()
    return Value(sizes, tuple(dims))


@operator("slice", "narrow")
def _slice(flow: Flow, node: Node) -> Any:
    value, args, sizes = source(flow, node), arguments(node), flow.sizes(node.meta["val"])
    d = value.dim(args["dim"])
    if sizes == value.sizes or not flow.columns(value, d):
        return Value(sizes, value.dims)
    if "length" in args:
        bounds = (args["start"], args["start"] + args["length"] if isinstance(args["length"], int) else None, 1)
    else:
        bounds = (args["start"], args["end"], args["step"])
    if any(b is not None and not isinstance(b, int) for b in bounds):
        return flow.give_up(node, "its bounds are computed")
    return cut(flow, node, value, d, np.arange(value.sizes[d])[slice(*bounds)], sizes)


@operator("split", "chunk", "split_with_sizes", "tensor_split", "unsafe_split", "unsafe_chunk", "hsplit", "vsplit")
def _split(flow: Flow, node: Node) -> Any:
    value, parts = source(flow, node), [flow.sizes(v) for v in node.meta["val"]]
    d = value.dim(arguments(node).get("dim", 0))
    result, start = [], 0
    for sizes in parts:
        result.append(cut(flow, node, value, d, np.arange(start, start + sizes[d]), sizes))
        start += sizes[d]
    return result


@operator("select", "unbind")
def _select(flow: Flow, node: Node) -> Any:
    value, args = source(flow, node), arguments(node)
    d = value.dim(args["dim"])
    flow.pin(value.dims[d], node, "single indices are used")

    def without(v: Value) -> Value:
        return Value(v.sizes[:d] + v.sizes[d + 1 :], v.dims[:d] + v.dims[d + 1 :])

    return without(value) if isinstance(node.meta["val"], Tensor) else [without(value) for _ in node.meta["val"]]


@operator("index_select")
def _index_select(flow: Flow, node: Node) -> Any:
    value, args = source(flow, node), arguments(node)
    return _picked(flow, node, value, value.dim(args["dim"]), args["index"])


@operator("index")
def _index(flow: Flow, node: Node) -> Any:
    value, indices = source(flow, node), list(arguments(node)["indices"])
    used = [d for d, index in enumerate(indices) if index is not None]
    if len(used) == 1 and len(node.meta["val"].shape) == len(value.sizes):
        return _picked(flow, node, value, used[0], indices[used[0]])
    if used != list(range(used[0], used[-1] + 1)):
        return flow.give_up(node, "indices of dimensions that are not adjacent")
    flow.pin_value(value, node, "its index is no constant list", used)
    for d in used:
        flow.pin_value(flow.of(indices[d]), node, "it is an index")
    sizes = flow.sizes(node.meta["val"])
    inserted = len(sizes) - (len(value.sizes) - len(used))
    dims = value.dims[: used[0]] + ((),) * inserted + value.dims[used[-1] + 1 :]
    return Value(sizes, dims)


def _picked(flow: Flow, node: Node, value: Value, d: int, index: Any) -> Value:
    """Indices from a constant list move the channels; from anything else they pin them."""
    sizes = flow.sizes(node.meta["val"])
    if flow.columns(value, d) and isinstance(index, Node) and index.op == "get_attr":
        chosen = flow.program.tensor(index)
        if chosen.dim() == 1 and not chosen.is_floating_point() and chosen.dtype != torch.bool:
            wrapped = chosen.detach().cpu().numpy() % value.sizes[d]
            return cut(flow, node, value, d, wrapped, sizes)
    flow.pin(value.dims[d], node, "its index is no constant list")
    return Value(sizes, (*value.dims[:d], (), *value.dims[d + 1 :]))


# ------------------------------------------------------------------------------------------------ join
def chained(flow: Flow, parts: Sequence[Columns], lengths: Sequence[int]) -> Columns:
    """What a dimension carries that holds ``parts`` one behind the other."""
    resolved = [flow.labels.resolve(p) for p in parts]
    depth = max((len(p) for p in resolved), default=0)
    result = []
    for level in range(depth):
        atoms = [p[level].atoms if level < len(p) else np.full(n, FREE) for p, n in zip(resolved, lengths, strict=True)]
        fills = [p[level].fill if level < len(p) else np.zeros(n) for p, n in zip(resolved, lengths, strict=True)]
        result.append(Column(np.concatenate(atoms), np.concatenate(fills)))
    return tuple(result)


@operator("cat", "concat", "concatenate", "stack", "column_stack")
def _cat(flow: Flow, node: Node) -> Any:
    args, sizes = arguments(node), flow.sizes(node.meta["val"])
    parts = [v for v in (flow.of(t) for t in args["tensors"]) if v is not None and v.sizes != (0,)]
    d = (args["dim"] or 0) % len(sizes)
    if "stack" in str(node.target):
        parts = [Value((*p.sizes[:d], 1, *p.sizes[d:]), (*p.dims[:d], (), *p.dims[d:])) for p in parts]
    dims: list[Columns] = []
    for other in range(len(sizes)):
        if other == d:
            dims.append(chained(flow, [p.dims[d] for p in parts], [p.sizes[d] for p in parts]))
        else:
            dims.append(flow.join([p.dims[other] for p in parts], node, _agreeing))
    return Value(sizes, tuple(dims))


def _agreeing(fills: list[Any]) -> Any:
    first = fills[0]
    same = np.all([f == first for f in fills], axis=0)
    return np.where(same, first, np.nan)


@operator("pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d")
def _pad(flow: Flow, node: Node) -> Any:
    value, args, sizes = source(flow, node), arguments(node), flow.sizes(node.meta["val"])
    amounts = list(args["pad"] if "pad" in args else args["padding"])
    if any(not isinstance(a, int) for a in amounts):
        return flow.give_up(node, "its amounts are computed")
    constant = args.get("mode", "constant") == "constant" and "pad" in args
    content = float(args.get("value") or 0.0) if constant else None
    dims = list(value.dims)
    padded = {len(sizes) - 1 - i: (amounts[2 * i], amounts[2 * i + 1]) for i in range(len(amounts) // 2)}
    for d, (before, after) in padded.items():
        if (before or after) and flow.columns(value, d):
            dims[d] = _padded(flow, node, value, d, before, after, content)
    if any(a for pair in padded.values() for a in pair):
        others = [d for d in range(len(sizes)) if d not in padded or padded[d] == (0, 0)]
        for d in others:
            dims[d] = tuple(c.filled(np.where(c.fill == content, c.fill, np.nan)) for c in flow.columns(value, d))
    return Value(sizes, tuple(dims))


def _padded(flow: Flow, node: Node, value: Value, d: int, before: int, after: int, content: float | None) -> Columns:
    if content is None or before < 0 or after < 0:
        flow.pin(value.dims[d], node, "the channels themselves are padded")
        return ()
    parts = [(flow.labels.column(n, content),) if n else () for n in (before, after)]
    return chained(flow, [parts[0], value.dims[d], parts[1]], [before, value.sizes[d], after])


@operator("roll")
def _roll(flow: Flow, node: Node) -> Any:
    value, args = source(flow, node), arguments(node)
    moved = [value.dim(d) for d in args["dims"]] or list(range(len(value.sizes)))
    start = node.args[0]
    if len(moved) == 1 and args["dims"] and flow.columns(value, moved[0]) and isinstance(args["shifts"][0], int):
        assert isinstance(start, Node)
        order = np.roll(np.arange(value.sizes[moved[0]]), args["shifts"][0])
        shuffle = flow.shuffles[node.name] = Shuffle(start, moved[0], order)
        return shuffled(flow, shuffle)
    flow.pin_value(value, node, "channels are rolled", moved)
    return value


@operator("flip")
def _flip(flow: Flow, node: Node) -> Any:
    value = source(flow, node)
    flipped = {value.dim(d) for d in arguments(node)["dims"]}
    dims = [
        tuple(c.take(np.arange(n)[::-1]) for c in flow.columns(value, d)) if d in flipped else value.dims[d]
        for d, n in enumerate(value.sizes)
    ]
    return Value(value.sizes, tuple(dims))


@operator("pixel_shuffle", "pixel_unshuffle", "channel_shuffle")
def _shuffle(flow: Flow, node: Node) -> Any:
    value, sizes = source(flow, node), flow.sizes(node.meta["val"])
    d = len(sizes) - 3 if "pixel" in str(node.target) else 1
    n, factor = (
        value.sizes[d],
        int(arguments(node).get("groups") or max(sizes[d], value.sizes[d]) // min(sizes[d], value.sizes[d])),
    )
    dims = list(value.dims)
    if "unshuffle" in str(node.target):
        dims[d] = flow.labels.merge([flow.columns(value, d), ()], [n, factor])
    elif "pixel" in str(node.target):
        channels, inner = flow.labels.split(value.dims[d], [n // factor, factor], f"{node}: one channel")
        flow.pin(inner, node, "positions inside a pixel block")
        dims[d] = channels
    else:
        order = np.arange(n).reshape(factor, n // factor).T.reshape(-1)
        start = node.args[0]
        assert isinstance(start, Node)
        shuffle = flow.shuffles[node.name] = Shuffle(start, d, order)
        return shuffled(flow, shuffle)
    if "pixel" in str(node.target):
        flow.pin_value(value, node, "positions", [d + 1, d + 2])
        dims[d + 1] = dims[d + 2] = ()
    return Value(sizes, tuple(dims))


@operator("unfold")
def _unfold(flow: Flow, node: Node) -> Any:
    value, sizes = source(flow, node), flow.sizes(node.meta["val"])
    d = value.dim(arguments(node)["dimension"])
    flow.pin(value.dims[d], node, "windows run over it")
    return Value(sizes, (*value.dims[:d], (), *value.dims[d + 1 :], ()))


@operator("im2col", "col2im")
def _im2col(flow: Flow, node: Node) -> Any:
    value, args, sizes = source(flow, node), arguments(node), flow.sizes(node.meta["val"])
    window, d = int(np.prod(args["kernel_size"])), len(value.sizes) - (3 if "im2col" in str(node.target) else 2)
    if "im2col" in str(node.target):
        zeros = tuple(
            c.filled(np.where(c.fill == 0, 0.0, np.nan)) for c in flow.columns(value, d)
        )  # windows are padded
        channels = flow.labels.merge([zeros, ()], [value.sizes[d], window])
        positions: tuple[Columns, ...] = ((),)
        flow.pin_value(value, node, "positions", [-1, -2])
    else:
        channels, inner = flow.labels.split(value.dims[d], [value.sizes[d] // window, window], f"{node}: one channel")
        flow.pin(inner, node, "positions inside a window")
        flow.pin_value(value, node, "positions", [-1])
        positions = ((), ())
    return Value(sizes, (*value.dims[:d], channels, *positions))
