"""Rotary position embeddings as ONNX Runtime's one operator instead of six."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

from fxcompress.engines.ort_norms import in_float32

if TYPE_CHECKING:
    import onnx_ir as ir

    from fxcompress.engines.quantized import Realizer

__all__ = ["rotary_embeddings"]

#: Operators that do the same to both halves of the last dimension, all of whose inputs then must have equal halves.
_ELEMENTWISE = frozenset({"Add", "Cast", "Cos", "Identity", "Mul", "Neg", "Sin"})


def rotary_embeddings(r: Realizer) -> None:
    """``x * cos + cat(-x[half:], x[:half]) * sin`` becomes RotaryEmbedding (Su et al. 2021, equation 34).

    The operator reads one half of the tables, so both must have equal halves: constants, or what a concatenation of a
    value with itself leads to.
    """
    for node in list(r.graph):
        if node.op_type != "Add":
            continue
        for straight, turned in (node.inputs, node.inputs[::-1]):
            found = _parts(straight, turned)
            if found is not None:
                _rewrite(r, node, *found)
                break


def _parts(straight: ir.Value | None, turned: ir.Value | None) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """The rotated value, cosines and sines."""
    for rotation, sin in _factors(turned):
        x = _rotated(rotation)
        cos = None if x is None else next((b for a, b in _factors(straight) if a is x), None)
        if x is not None and cos is not None and _fits(x, cos, sin):
            return x, cos, sin
    return None


def _factors(value: ir.Value | None) -> list[tuple[ir.Value, ir.Value]]:
    """Both orders of the factors of a product."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Mul":
        return []
    first, second = node.inputs
    return [] if first is None or second is None else [(first, second), (second, first)]


def _rotated(value: ir.Value) -> ir.Value | None:
    """``x`` where the value is ``cat(-x[half:], x[:half])`` along the last dimension."""
    node = value.producer()
    if node is None or node.op_type != "Concat" or len(node.inputs) != 2:
        return None
    minus, first = node.inputs
    negation = None if minus is None else minus.producer()
    if first is None or negation is None or negation.op_type != "Neg" or not _is_last(value, _axis(node)):
        return None
    left, right = _half(first), _half(negation.inputs[0])
    same = left is not None and right is not None and left[0] is right[0] and (left[1], right[1]) == (0, 1)
    return left[0] if same and left is not None else None


def _half(value: ir.Value | None) -> tuple[ir.Value, int] | None:
    """What the value is the first (0) or second (1) half of, along the last dimension."""
    node = None if value is None else value.producer()
    x = None if node is None or not node.inputs else node.inputs[0]
    if node is None or x is None or x.shape is None or not isinstance(x.shape[-1], int) or x.shape[-1] % 2:
        return None
    half = x.shape[-1] // 2
    if node.op_type == "Split" and len(node.outputs) == 2 and _is_last(x, _axis(node)):
        sizes = _integers(node, 1)
        return (x, list(node.outputs).index(value)) if sizes in (None, [half, half]) else None  # type: ignore[arg-type]
    if node.op_type == "Slice" and _integers(node, 4) in (None, [1]) and _is_last(x, *(_integers(node, 3) or [0])):
        start, end = _integers(node, 1), _integers(node, 2)
        if start is not None and end is not None:
            bounds = (start[0], min(end[0], 2 * half))
            return {(0, half): (x, 0), (half, 2 * half): (x, 1)}.get(bounds)
    return None


def _axis(node: ir.Node) -> int:
    return node.attributes["axis"].as_int() if "axis" in node.attributes else 0


def _is_last(value: ir.Value, *axes: int) -> bool:
    return value.shape is not None and all(a in (-1, len(value.shape) - 1) for a in axes)


def _integers(node: ir.Node, place: int) -> list[int] | None:
    """Values of a constant input; None where there is none."""
    value = node.inputs[place] if len(node.inputs) > place else None
    return None if value is None or value.const_value is None else value.const_value.numpy().reshape(-1).tolist()


def _fits(x: ir.Value, *tables: ir.Value) -> bool:
    """[batch, heads, tokens, size] and tables [1 or batch, 1, tokens, size] in float32 with equal halves."""
    if x.shape is None or len(x.shape) != 4 or not isinstance(x.shape[3], int) or not in_float32(x):
        return False
    for table in tables:
        shape = table.shape
        if shape is None or len(shape) != 4 or (shape[1], shape[3]) != (1, x.shape[3]) or shape[2] != x.shape[2]:
            return False
        if shape[0] not in (1, x.shape[0]) or not _equal_halves(table):
            return False
    return tables[0].shape is not None and tables[1].shape is not None and tables[0].shape[0] == tables[1].shape[0]


def _equal_halves(value: ir.Value | None) -> bool:
    """The first half of a value's last dimension is the second."""
    if value is None or value.shape is None:
        return False
    if value.const_value is not None and value.producer() is None:
        return _constant_halves(torch.from_numpy(value.const_value.numpy()))
    node = value.producer()
    if node is None:
        return False
    if node.op_type == "Concat" and _is_last(value, _axis(node)):
        return len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]
    if node.op_type in _ELEMENTWISE:
        return all(_equal_halves(v) for v in node.inputs)
    source = node.inputs[0] if node.inputs else None
    if source is None or source.shape is None:
        return False
    moves_rows = node.op_type == "Gather" and _axis(node) == 0 and len(source.shape) > 1
    moves_rows |= node.op_type == "Unsqueeze" and not any(_is_last(value, a) for a in _integers(node, 1) or [-1])
    moves_rows |= node.op_type == "Slice" and not any(_is_last(value, a) for a in _integers(node, 3) or [-1])
    return moves_rows and _equal_halves(source)


def _constant_halves(table: torch.Tensor) -> bool:
    if table.dim() == 0 or table.shape[-1] == 1:
        return True
    first, second = table.tensor_split(2, dim=-1)
    return torch.equal(first, second)


def _rewrite(r: Realizer, node: ir.Node, x: ir.Value, cos: ir.Value, sin: ir.Value) -> None:
    assert x.shape is not None and cos.shape is not None
    size, name, at = cast("int", x.shape[3]), str(node.name), node
    tables = [_flat_half(r, at, table, size // 2) for table in (cos, sin)]
    positions = _positions(r, at, cos)
    new = r.emit(at, "RotaryEmbedding", x, positions, *tables, name=f"{name}/RotaryEmbedding", domain="com.microsoft")
    r.replace(node.outputs[0], new)
    r.graph.remove(node, safe=True)


def _flat_half(r: Realizer, at: ir.Node, table: ir.Value, half: int) -> ir.Value:
    """The first half of every row, [rows, half]; made once for all layers."""
    key = ("half of", id(table))
    if key not in r.memo:
        first = r.split(at, table, r.shape_constant([half, half]), 2, name=f"{table.name}/Split")[0]
        r.memo[key] = r.emit(at, "Reshape", first, r.shape_constant([-1, half]), name=f"{table.name}/Rows")
    found: ir.Value = r.memo[key]
    return found


def _positions(r: Realizer, at: ir.Node, table: ir.Value) -> ir.Value:
    """Row of the flat table for every token: from 0 on for all of them when the tables are shared, [1]; else [batch, tokens]."""
    assert table.shape is not None
    if table.shape[0] == 1:
        return r.shape_constant([0])
    key = ("rows of", id(table))
    if key not in r.memo:
        name = str(table.name)
        batch, tokens = (r.emit(at, "Shape", table, name=f"{name}/Shape_{i}", start=i, end=i + 1) for i in (0, 2))
        count = r.emit(at, "Mul", batch, tokens, name=f"{name}/Count")
        scalar = r.emit(at, "Squeeze", count, name=f"{name}/Squeeze")
        zero, one = (r.constant(torch.tensor(n)) for n in (0, 1))
        rows = r.emit(at, "Range", zero, scalar, one, name=f"{name}/Range")
        shape = r.emit(at, "Concat", batch, tokens, name=f"{name}/Concat", axis=0)
        r.memo[key] = r.emit(at, "Reshape", rows, shape, name=f"{name}/Positions")
    found: ir.Value = r.memo[key]
    return found
