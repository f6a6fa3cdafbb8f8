"""RMSNorm as ONNX Runtime recognizes it: with a power and a division, of which it makes one kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import onnx_ir as ir

    from fxcompress.engines.quantized import Realizer

__all__ = ["rms_norms"]


def rms_norms(r: Realizer) -> None:
    """``x * (1 / sqrt(mean(x * x) + e))`` becomes ``x / sqrt(mean(x ** 2) + e)``."""
    for node in list(r.graph):
        if node.op_type != "Mul":
            continue
        for x, inverse in (node.inputs, node.inputs[::-1]):
            square = _square_behind(inverse, x)
            if square is not None and x is not None and inverse is not None:
                _rewrite(r, node, x, inverse, square)
                break


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
