"""Views: reshapes, transpositions, expansions, and the channel shuffles that they spell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.fx import Node

from fxcompress.prune.flow import Flow, Shuffle, Value
from fxcompress.prune.labels import Columns
from fxcompress.prune.transfer.registry import arguments, operator

__all__ = ["blocks", "shuffled", "source"]

_LARGEST = 1 << 24


def source(flow: Flow, node: Node) -> Value:
    """Value of the first argument."""
    value = flow.of(node.args[0])
    assert value is not None
    return value


# ------------------------------------------------------------------------------------------------ shape
def blocks(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of dimensions with equal products: ``(2, 12) -> (2, 3, 4)`` gives ``[0]->[0]`` and ``[1]->[1, 2]``."""
    result: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        left, right = [], []
        a = b = 1
        if i < len(before):
            left.append(i)
            a, i = before[i], i + 1
        if j < len(after):
            right.append(j)
            b, j = after[j], j + 1
        while a != b:
            if a < b and i < len(before):
                left.append(i)
                a, i = a * before[i], i + 1
            elif j < len(after):
                right.append(j)
                b, j = b * after[j], j + 1
            else:
                left += range(i, len(before))
                i, b = len(before), a
        result.append((left, right))
    return result


@operator(
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "reshape_as", "view_as", "ravel"
)
def _reshape(flow: Flow, node: Node) -> Any:
    value, sizes = source(flow, node), flow.sizes(node.meta["val"])
    if str(node.target).endswith(".dtype") or 0 in value.sizes or int(np.prod(value.sizes)) != int(np.prod(sizes)):
        return flow.give_up(node, "its sizes cannot be followed")
    if node.name in flow.shuffles:
        return shuffled(flow, flow.shuffles[node.name])
    shuffle = find_shuffle(flow, node)
    if shuffle is not None:
        flow.shuffles[shuffle[0].name] = shuffle[1]
        return flow.plain(node.meta["val"])
    real = [d for d, n in enumerate(value.sizes) if n > 1]
    kept = [d for d, n in enumerate(sizes) if n > 1]
    dims: list[Columns] = [()] * len(sizes)
    for left, right in blocks([value.sizes[d] for d in real], [sizes[d] for d in kept]):
        for d, columns in _block(flow, node, value, [real[i] for i in left], sizes, [kept[j] for j in right]):
            dims[d] = columns
    return Value(sizes, tuple(dims))


def _block(
    flow: Flow, node: Node, value: Value, left: list[int], sizes: tuple[int, ...], right: list[int]
) -> list[tuple[int, Columns]]:
    sources = [flow.columns(value, d) for d in left]
    if not any(sources):
        return []
    if len(left) == len(right) == 1:
        return [(right[0], sources[0])]
    if int(np.prod([value.sizes[d] for d in left])) > _LARGEST:
        for source in sources:
            flow.pin(source, node, "the dimension is too large to follow")
        return []
    merged = flow.labels.merge(sources, [value.sizes[d] for d in left])
    reason = f"{node}: a part of the view would be removed whole"
    return list(zip(right, flow.labels.split(merged, [sizes[d] for d in right], reason), strict=True))


@operator(
    "permute", "transpose", "t", "swapaxes", "swapdims", "movedim", "numpy_T", "mT", "transpose_copy", "permute_copy"
)
def _permute(flow: Flow, node: Node) -> Any:
    value = source(flow, node)
    rank = len(value.sizes)
    order = _order(arguments(node), rank, node)
    return Value(tuple(value.sizes[d] for d in order), tuple(value.dims[d] for d in order))


def _order(args: dict[str, Any], rank: int, node: Node) -> list[int]:
    if "dims" in args:
        return [d % rank for d in args["dims"]]
    if "source" in args:
        origin, destination = (
            list(a) if isinstance(a, (list, tuple)) else [a] for a in (args["source"], args["destination"])
        )
        order = [d for d in range(rank) if d not in [s % rank for s in origin]]
        for s, d in sorted(zip(origin, destination, strict=True), key=lambda p: p[1] % rank):
            order.insert(d % rank, s % rank)
        return order
    pair = [v for k, v in args.items() if k != "self"]
    name = str(node.target)
    if "numpy_T" in name:
        return list(reversed(range(rank)))
    a, b = (pair[0] % rank, pair[1] % rank) if pair else ((rank - 2) % rank, (rank - 1) % rank)
    order = list(range(rank))
    order[a], order[b] = order[b], order[a]
    return order


@operator("expand", "expand_as", "broadcast_to", "expand_copy")
def _expand(flow: Flow, node: Node) -> Any:
    value, sizes = source(flow, node), flow.sizes(node.meta["val"])
    other = flow.of(node.args[1]) if "expand_as" in str(node.target) else None
    offset = len(sizes) - len(value.sizes)
    dims = []
    for d, n in enumerate(sizes):
        own = d - offset
        if own >= 0 and value.sizes[own] == n:
            dims.append(value.dims[own])
        elif other is not None:  # the size comes from the other tensor, so it shrinks with it
            dims.append(tuple(c.filled(np.nan) for c in flow.columns(other, d)))
        else:  # copies: each may go with what it is combined with
            dims.append((flow.labels.column(n, np.nan),) if n > 1 and _is_fixed(node, d) else ())
    return Value(sizes, tuple(dims))


def _is_fixed(node: Node, dim: int) -> bool:
    return isinstance(node.meta["val"].shape[dim], int)


@operator("repeat", "tile")
def _repeat(flow: Flow, node: Node) -> Any:
    value, sizes = source(flow, node), flow.sizes(node.meta["val"])
    offset = len(sizes) - len(value.sizes)
    dims: list[Columns] = []
    for d, n in enumerate(sizes):
        own = d - offset
        old = value.sizes[own] if own >= 0 else 1
        if old == n:
            dims.append(value.dims[own] if own >= 0 else ())
        elif old == 1:
            dims.append((flow.labels.column(n, np.nan),) if _is_fixed(node, d) else ())
        else:
            dims.append(tuple(c.take(np.tile(np.arange(old), n // old)) for c in flow.columns(value, own)))
    return Value(sizes, tuple(dims))


@operator("repeat_interleave")
def _repeat_interleave(flow: Flow, node: Node) -> Any:
    args = arguments(node)
    value = flow.of(args.get("self"))
    times, dim = args.get("repeats"), args.get("dim")
    if value is None or not isinstance(times, int) or dim is None:
        return flow.give_up(node, "the repeats are computed")
    sizes, d = flow.sizes(node.meta["val"]), value.dim(dim)
    dims = list(value.dims)
    dims[d] = tuple(c.take(np.repeat(np.arange(value.sizes[d]), times)) for c in flow.columns(value, d))
    if value.sizes[d] == 1:
        dims[d] = (flow.labels.column(sizes[d], np.nan),) if sizes[d] > 1 else ()
    return Value(sizes, tuple(dims))


_VIEWS = ("view", "reshape", "_unsafe_view", "flatten")
_TRANSPOSITIONS = ("permute", "transpose", "swapaxes", "swapdims")


def _packet(node: Node) -> str:
    return getattr(getattr(node.target, "overloadpacket", None), "__name__", "")


def find_shuffle(flow: Flow, node: Node) -> tuple[Node, Shuffle] | None:
    """The channel shuffle that ``node`` begins: view, transposition, view back, nothing else reading what lies between."""
    chain = [node]
    while len(chain) < 5 and len(chain[-1].users) == 1:
        user = next(iter(chain[-1].users))
        if user.args[0] is not chain[-1]:
            return None
        chain.append(user)
        if _packet(user) in _VIEWS:
            break
    moves = [n for n in chain[1:-1] if _packet(n) not in ("contiguous", "clone")]
    if (
        len(chain) < 3
        or _packet(chain[-1]) not in _VIEWS
        or len(moves) != 1
        or _packet(moves[0]) not in _TRANSPOSITIONS
    ):
        return None
    value = source(flow, node)
    before, after, inner = value.sizes, flow.sizes(chain[-1].meta["val"]), flow.sizes(node.meta["val"])
    if before != after or len(inner) <= len(before):
        return None
    return _shuffle_of(chain, before, inner, _order(arguments(moves[0]), len(inner), moves[0]))


def _shuffle_of(
    chain: list[Node], before: tuple[int, ...], inner: tuple[int, ...], order: list[int]
) -> tuple[Node, Shuffle] | None:
    extra = len(inner) - len(before)
    for d in range(len(before)):
        factors = list(range(d, d + extra + 1))
        fixed = [i for i in range(len(inner)) if i not in factors]
        split = inner[:d] + inner[d + extra + 1 :] == before[:d] + before[d + 1 :]
        if split and all(order[i] == i for i in fixed) and order != sorted(order):
            local = [order[i] - d for i in factors]
            n = before[d]
            moved = np.arange(n).reshape([inner[i] for i in factors]).transpose(local).reshape(-1)
            start = chain[0].args[0]
            assert isinstance(start, Node)
            return chain[-1], Shuffle(start, d, moved)
    return None


def shuffled(flow: Flow, shuffle: Shuffle) -> Value:
    """The value behind a shuffle."""
    value = flow.of(shuffle.source)
    assert value is not None
    dims = list(value.dims)
    dims[shuffle.dim] = tuple(c.take(shuffle.order) for c in flow.columns(value, shuffle.dim))
    return Value(value.sizes, tuple(dims))
