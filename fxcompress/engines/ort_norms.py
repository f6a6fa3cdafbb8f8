"""RMSNorm as ONNX Runtime recognizes it, and in one kernel with the residual sum in front of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import onnx_ir as ir

    from fxcompress.engines.quantized import Realizer

__all__ = ["in_float32", "rms_norms"]


def rms_norms(r: Realizer) -> None:
    """``x * (1 / sqrt(mean(x * x) + e))`` becomes ``x / sqrt(mean(x ** 2) + e)``, of which the runtime makes one kernel.

    Where ``x`` is the sum of two values of the same shape and a weight follows, the sum goes into that kernel
    (SkipSimplifiedLayerNormalization).
    """
    for node in list(r.graph):
        if node.op_type != "Mul" or node.graph is None:
            continue
        for x, inverse in (node.inputs, node.inputs[::-1]):
            square = _square_behind(inverse, x)
            if square is not None and x is not None and inverse is not None and in_float32(x):
                if not _with_sum(r, node, x, square):
                    _rewrite(r, node, x, inverse, square)
                break


def _with_sum(r: Realizer, node: ir.Node, x: ir.Value, square: ir.Node) -> bool:
    """Write the sum in front, the normalization and the weight behind it as one operator."""
    total, uses = x.producer(), list(node.outputs[0].uses())
    scaling = uses[0].node if len(uses) == 1 and uses[0].node.op_type == "Mul" else None
    if total is None or total.op_type != "Add" or scaling is None or x.is_graph_output():
        return False
    weight, epsilon = scaling.inputs[1 - uses[0].idx], _epsilon(square)
    if weight is None or epsilon is None or not _same_shape(*total.inputs) or not _is_row(weight, x):
        return False
    name = f"{scaling.name}/SkipSimplifiedLayerNormalization"
    inputs = (*total.inputs, weight)
    made = r.emit_many(total, "SkipSimplifiedLayerNormalization", *inputs, count=4, name=name, epsilon=epsilon)
    r.replace(scaling.outputs[0], made[0])
    r.replace(x, made[3])
    return True


def in_float32(value: ir.Value) -> bool:
    """The runtime's own operators have no kernels for float64, or compute in float32 there."""
    return value.dtype is not None and value.dtype.name == "FLOAT"


def _epsilon(square: ir.Node) -> float | None:
    """What is added to the mean over the last dimension of the squares; None when it is no such mean."""
    mean = next(iter(square.outputs[0].uses())).node
    add = next(iter(mean.outputs[0].uses())).node
    axes = mean.inputs[1].const_value if len(mean.inputs) > 1 and mean.inputs[1] is not None else None
    number = next((v.const_value for v in add.inputs if v is not None and v.const_value is not None), None)
    shape = square.outputs[0].shape
    if axes is None or number is None or shape is None or number.size != 1:
        return None
    last = [int(a) % len(shape) for a in axes.numpy().reshape(-1)] == [len(shape) - 1]
    return float(number.numpy().reshape(-1)[0]) if last else None


def _same_shape(first: ir.Value | None, second: ir.Value | None) -> bool:
    known = first is not None and second is not None and first.shape is not None and second.shape is not None
    return known and first.shape == second.shape and len(first.shape) in (2, 3)  # type: ignore[union-attr,arg-type]


def _is_row(weight: ir.Value, x: ir.Value) -> bool:
    held = weight.const_value
    return held is not None and x.shape is not None and list(held.shape) == [x.shape[-1]]


def _square_behind(inverse: ir.Value | None, x: ir.Value | None) -> ir.Node | None:
    """The product ``x * x`` that ``inverse`` is computed from."""
    value = inverse
    for kind in ("Reciprocal", "Sqrt", "Add", "ReduceMean"):
        node = None if value is None else value.producer()
        if node is None or node.op_type != kind or len(list(node.outputs[0].uses())) != 1:
            return None
        value = node.inputs[0]
    square = None if value is None else value.producer()
    is_square = square is not None and square.op_type == "Mul" and square.inputs[0] is x and square.inputs[1] is x
    return square if is_square else None


def _rewrite(r: Realizer, node: ir.Node, x: ir.Value, inverse: ir.Value, square: ir.Node) -> None:
    reciprocal = inverse.producer()
    assert reciprocal is not None
    power = r.emit(square, "Pow", x, r.constant(torch.tensor(2.0)), name=f"{square.name}/Pow")
    r.replace(square.outputs[0], power)
    r.graph.remove(square, safe=True)
    r.replace(node.outputs[0], r.emit(node, "Div", x, reciprocal.inputs[0], name=f"{node.name}/Div"))
    for old in (node, reciprocal):
        r.graph.remove(old, safe=True)
