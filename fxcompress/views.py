"""Inverse of views: the base of a view with the view's values replaced."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, Node

__all__ = ["MutationError", "call", "put_back", "sizes_of"]

_aten = torch.ops.aten
_SAME = (
    "alias", "detach", "detach_", "to", "type_as", "contiguous", "dropout", "feature_dropout", "alpha_dropout", "positive",
    "lift_fresh", "resolve_conj", "resolve_neg",
)  # fmt: skip
_RESHAPES = (
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "squeeze_", "unsqueeze", "unsqueeze_", "view_as",
    "reshape_as", "ravel",
)  # fmt: skip
_TRANSPOSES = ("transpose", "transpose_", "swapdims", "swapdims_", "swapaxes", "swapaxes_")
_PIECES = ("split", "split_with_sizes", "chunk", "tensor_split")


class MutationError(Exception):
    """An in-place write that cannot be expressed without one; the caller falls back to a slower way."""


def put_back(view: Node, piece: int | None, parent: Node, value: Node) -> Node:
    """The value of ``parent`` after ``value`` was written through ``view``.

    Args:
        view: The view operator on (an older value of) ``parent``.
        piece: Which result, for operators that return a list.
        parent: Current value of the viewed tensor.
        value: New value of the view.

    Raises:
        MutationError: the view has no simple inverse.
    """
    name = cast(Any, view.target)._schema.name.split("::")[1]
    handler = _HANDLERS.get(name)
    if handler is None:
        raise MutationError(f"{view.name} ({view.target}) is written through and has no simple inverse")
    return cast(Node, handler(parent.graph, view, piece, parent, value))


def sizes_of(graph: Graph, node: Node) -> list[Any]:
    """Sizes of a tensor node for a reshape: numbers, and nodes for what is dynamic."""
    shape = node.meta["val"].shape
    return [
        s if isinstance(s, int) else call(graph, _aten.sym_size.int, (node, i), s, node) for i, s in enumerate(shape)
    ]


def call(graph: Graph, target: Any, args: tuple[Any, ...], val: Any, like: Node) -> Node:
    """A new operator node with the value ``val`` and the source line of ``like``."""
    node = graph.call_function(target, args)
    node.meta = {**like.meta, "val": val}
    return node


def _argument(view: Node, index: int, name: str, default: Any) -> Any:
    return view.args[index] if len(view.args) > index else view.kwargs.get(name, default)


def _same(graph: Graph, view: Node, piece: int | None, parent: Node, value: Node) -> Node:
    return value


def _reshape(graph: Graph, view: Node, piece: int | None, parent: Node, value: Node) -> Node:
    sizes = sizes_of(graph, parent)
    if sum(isinstance(s, Node) for s in sizes) == 1:
        sizes = [-1 if isinstance(s, Node) else s for s in sizes]
    return call(graph, _aten.reshape.default, (value, sizes), parent.meta["val"], value)


def _transpose(graph: Graph, view: Node, piece: int | None, parent: Node, value: Node) -> Node:
    return call(graph, _aten.transpose.int, (value, view.args[1], view.args[2]), parent.meta["val"], value)


def _matrix_transpose(graph: Graph, view: Node, piece: int | None, parent: Node, value: Node) -> Node:
    return call(graph, _aten.t.default, (value,), parent.meta["val"], value)


def _permute(graph: Graph, view: Node, piece: int | None, parent: Node, value: Node) -> Node:
    order = [d % value.meta["val"].dim() for d in cast(list[int], view.args[1])]
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return call(graph, _aten.permute.default, (value, inverse), parent.meta["val"], value)


def _expand(graph: Graph, view: Node, piece: int | None, parent: Node, value: Node) -> Node:
    if value.meta["val"].shape != parent.meta["val"].shape:
        raise MutationError(f"{view.name} repeats memory and is written through")
    return value


def _select(graph: Graph, view: Node, piece: int | None, parent: Node, value: Node) -> Node:
    dim, index = cast(int, view.args[1]), view.args[2]
    size = _size(parent, dim)
    if not isinstance(index, int) or not isinstance(size, int):
        return call(graph, _aten.select_scatter.default, (parent, value, dim, index), parent.meta["val"], value)
    start = index % size
    row = call(graph, _aten.unsqueeze.default, (value, dim), value.meta["val"].unsqueeze(dim), value)
    return _replace_range(graph, parent, row, dim, start, start + 1)


def _unbind(graph: Graph, view: Node, piece: int | None, parent: Node, value: Node) -> Node:
    dim = _argument(view, 1, "dim", 0)
    row = call(graph, _aten.unsqueeze.default, (value, dim), value.meta["val"].unsqueeze(dim), value)
    start = cast(int, piece)
    return _replace_range(graph, parent, row, dim, start, start + 1)


def _slice(graph: Graph, view: Node, piece: int | None, parent: Node, value: Node) -> Node:
    dim, step = _argument(view, 1, "dim", 0), _argument(view, 4, "step", 1)
    start, end = _argument(view, 2, "start", None), _argument(view, 3, "end", None)
    size = _size(parent, dim)
    if start in (None, 0) and step == 1 and (end is None or (isinstance(end, int) and end >= 2**62)):
        return value
    if step != 1 or not all(isinstance(v, (int, type(None))) for v in (start, end)) or not isinstance(size, int):
        return call(
            graph, _aten.slice_scatter.default, (parent, value, dim, start, end, step), parent.meta["val"], value
        )
    first, last, _ = slice(start, end).indices(size)
    return _replace_range(graph, parent, value, dim, first, last)


def _piece(graph: Graph, view: Node, piece: int | None, parent: Node, value: Node) -> Node:
    dim = _argument(view, 2, "dim", 0)
    lengths = [v.shape[dim] for v in view.meta["val"]]
    if not all(isinstance(n, int) for n in lengths):
        raise MutationError(f"{view.name} is written through and its pieces have no fixed size")
    start = sum(lengths[: cast(int, piece)])
    return _replace_range(graph, parent, value, dim, start, start + lengths[cast(int, piece)])


def _diagonal(graph: Graph, view: Node, piece: int | None, parent: Node, value: Node) -> Node:
    return call(graph, _aten.diagonal_scatter.default, (parent, value, *view.args[1:]), parent.meta["val"], value)


def _size(node: Node, dim: int) -> Any:
    return node.meta["val"].shape[dim]


def _replace_range(graph: Graph, parent: Node, value: Node, dim: int, start: int, end: int) -> Node:
    """``parent`` with ``[start, end)`` of dimension ``dim`` replaced: a concatenation every engine has."""
    size = _size(parent, dim)
    if start >= end:
        return parent
    parts = [_part(graph, parent, dim, 0, start)] if start > 0 else []
    parts.append(value)
    if end < size:
        parts.append(_part(graph, parent, dim, end, size))
    return value if len(parts) == 1 else call(graph, _aten.cat.default, (parts, dim), parent.meta["val"], value)


def _part(graph: Graph, parent: Node, dim: int, start: int, end: int) -> Node:
    val = cast(Tensor, parent.meta["val"]).narrow(dim, start, end - start)
    return call(graph, _aten.slice.Tensor, (parent, dim, start, end), val, parent)


_HANDLERS: dict[str, Any] = {
    **dict.fromkeys(_SAME, _same),
    **dict.fromkeys(_RESHAPES, _reshape),
    **dict.fromkeys(_TRANSPOSES, _transpose),
    **dict.fromkeys(_PIECES, _piece),
    "t": _matrix_transpose,
    "t_": _matrix_transpose,
    "permute": _permute,
    "expand": _expand,
    "expand_as": _expand,
    "select": _select,
    "unbind": _unbind,
    "slice": _slice,
    "diagonal": _diagonal,
}
