"""Linear layers as ONNX Runtime runs them on integers: matrix products with an int32 bias in one Gemm."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

    from fxcompress.engines.quantized import Realizer

__all__ = ["bias_behind", "gemm_form"]


def gemm_form(r: Realizer) -> None:
    """Quantized ``MatMul(x, weight) + bias`` on more than two dimensions becomes Reshape, Gemm, Reshape.

    ONNX Runtime turns a quantized Gemm with an int32 bias into one integer kernel; of a MatMul and an Add it makes a
    float Gemm that dequantizes the weight at every call.
    """
    for node in list(r.graph):
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        x = node.inputs[0] if weight is not None else None
        if weight is None or x is None or not r.is_weight(weight) or not r.on_grid(x):
            continue
        if x.shape is not None and len(x.shape) > 2:
            _rewrite(r, node, x, weight)


def _rewrite(r: Realizer, node: ir.Node, x: ir.Value, weight: ir.Value) -> None:
    bias, last = bias_behind(node)
    name, result = str(node.name).removesuffix("/MatMul"), last.outputs[0]
    width, features = r.weight_shape(weight)
    flat = r.emit(node, "Reshape", x, r.shape_constant([-1, width]), name=f"{name}/Reshape_in")
    inputs = (flat, weight) if bias is None else (flat, weight, bias)
    product = r.emit(node, "Gemm", *inputs, name=f"{name}/Gemm")
    lead = r.emit(node, "Shape", x, name=f"{name}/Shape", start=0, end=-1)
    shape = r.emit(node, "Concat", lead, r.shape_constant([features]), name=f"{name}/Concat", axis=0)
    new = r.emit(node, "Reshape", product, shape, name=f"{name}/Reshape_out")
    r.replace(result, new)
    for old in (last, node) if last is not node else (node,):
        r.graph.remove(old, safe=True)


def bias_behind(node: ir.Node) -> tuple[ir.Value | None, ir.Node]:
    """The bias of an Add that is the only reader of the product, and that Add."""
    uses = list(node.outputs[0].uses())
    if len(uses) == 1 and uses[0].node.op_type == "Add" and not node.outputs[0].is_graph_output():
        add = uses[0].node
        other = add.inputs[1 - uses[0].idx]
        if other is not None and other.const_value is not None and len(other.const_value.shape) == 1:
            return other, add
    return None, node
