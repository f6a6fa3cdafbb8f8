"""Products with keys and values that were just appended to a cache, without copying the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    import onnx_ir as ir

    from fxcompress.engines.quantized import Realizer

__all__ = ["products_in_parts"]

#: Rows of the other factor up to which two products cost less than copying a matrix with this many times more columns.
_FEWER: Final = 4


def products_in_parts(r: Realizer) -> None:
    """``q @ cat(a, b).T`` becomes ``cat(q @ a.T, q @ b.T)``, and ``p @ cat(a, b)`` becomes ``p1 @ a + p2 @ b``.

    Only where the concatenation serves nothing else and ``q`` or ``p`` has few rows, as in a decoder that reads one
    token: copying the cache there takes longer than reading it.
    """
    for node in list(r.graph):
        if node.op_type != "MatMul" or node.domain:
            continue
        left, right = node.inputs
        if left is None or right is None:
            continue
        keys = _turned(right)
        if keys is not None and _joined(keys, left) is not None:
            _scores(r, node, left, keys)
        elif _joined(right, left) is not None:
            _mixture(r, node, left, right)


def _turned(value: ir.Value) -> ir.Value | None:
    """What a value is the transposed of."""
    node = value.producer()
    if node is None or node.op_type != "Transpose" or value.is_graph_output() or len(value.uses()) != 1:
        return None
    perm = list(node.attributes["perm"].as_ints()) if "perm" in node.attributes else []
    rank = len(perm)
    return node.inputs[0] if rank > 1 and perm == [*range(rank - 2), rank - 1, rank - 2] else None


def _joined(value: ir.Value, left: ir.Value) -> ir.Node | None:
    """The concatenation of two matrices along their rows that a value is, and that is worth avoiding."""
    node = value.producer()
    if node is None or node.op_type != "Concat" or len(node.inputs) != 2:
        return None
    if value.is_graph_output() or len(value.uses()) != 1 or value.shape is None:
        return None
    along_rows = node.attributes["axis"].as_int() in (-2, len(value.shape) - 2)
    rows, columns = _rows_of(left), value.shape[-1]
    few = isinstance(rows, int) and isinstance(columns, int) and rows * _FEWER <= columns
    return node if along_rows and few else None


def _rows_of(value: ir.Value | None) -> Any:
    """Rows of a matrix, looked up in what it was computed from; None when they are not known."""
    while value is not None and value.shape is None:
        node = value.producer()
        known = node is not None and node.op_type in ("Add", "Concat", "Div", "MatMul", "Mul", "Softmax", "Where")
        value = node.inputs[1 if node.op_type == "Where" else 0] if known and node is not None else None
    return value.shape[-2] if value is not None and value.shape is not None and len(value.shape) > 1 else None


def _scores(r: Realizer, node: ir.Node, left: ir.Value, keys: ir.Value) -> None:
    join, name = keys.producer(), str(node.name)
    assert join is not None and keys.shape is not None
    rank = len(keys.shape)
    perm = [*range(rank - 2), rank - 1, rank - 2]
    parts = []
    for i, part in enumerate(join.inputs):
        turned = r.emit(node, "Transpose", part, name=f"{name}/Transpose_{i}", perm=perm)
        parts.append(r.emit(node, "MatMul", left, turned, name=f"{name}/MatMul_{i}"))
    _take_place(r, node, r.emit(node, "Concat", *parts, name=f"{name}/Concat", axis=-1))


def _mixture(r: Realizer, node: ir.Node, left: ir.Value, values: ir.Value) -> None:
    join, name = values.producer(), str(node.name)
    assert join is not None
    weights = r.split(node, left, _rows(r, node, join), 2, name=f"{name}/Split")
    pairs = enumerate(zip(weights, join.inputs, strict=True))
    parts = [r.emit(node, "MatMul", w, part, name=f"{name}/MatMul_{i}") for i, (w, part) in pairs]
    _take_place(r, node, r.emit(node, "Add", *parts, name=f"{name}/Add"))


def _rows(r: Realizer, at: ir.Node, join: ir.Node) -> ir.Value:
    """Rows of the two matrices, int64 [2]."""
    sizes = [None if v is None or v.shape is None else v.shape[-2] for v in join.inputs]
    if all(isinstance(n, int) for n in sizes):
        return r.constant(torch.tensor(sizes, dtype=torch.int64))
    read: dict[str, Any] = {"start": -2, "end": -1}
    found = [r.emit(at, "Shape", v, name=f"{at.name}/Shape_{i}", **read) for i, v in enumerate(join.inputs)]
    return r.emit(at, "Concat", *found, name=f"{at.name}/Sizes", axis=0)


def _take_place(r: Realizer, node: ir.Node, new: ir.Value) -> None:
    r.replace(node.outputs[0], new)
    r.graph.remove(node, safe=True)
