"""Explicit quantization as TensorRT reads it: an ONNX file whose quantizers say which kernels run on integers.

What TensorRT asks for, all of it checked against the layer list of its builder: int8 activations with one scale and zero
point 0 (the scale has no dimension: one of shape [1] silently leaves the layer in float), int8 weights with one scale
per output channel, int4 weights in blocks, and networks that are strongly typed: a value has the type the file gives it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxcompress.engines.packed import Integers, Product, find_products, integers_of, stored
from fxcompress.engines.quantized import Grid, Realizer
from fxcompress.engines.tensorrt_split import PART, split_products
from fxcompress.errors import EngineError
from fxcompress.lowering import HALF, PortableModel

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["ExplicitModel", "explicit_quantization"]

#: From this operator set on a quantizer may have another type than its scale.
_MIXED_TYPES_OPSET = 23
_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_CLIPS = ("Relu", "Clip")
_MOVES = (
    "Concat", "DequantizeLinear", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Pad", "Reshape", "Resize", "Slice",
    "Split", "Squeeze", "Transpose", "Unsqueeze",
)  # fmt: skip


@dataclass
class ExplicitModel:
    """An ONNX model with explicit quantization.

    Attributes:
        portable: The model.
        products: Name of each quantized Conv, Gemm or MatMul node -> ``{"layer", "weight", "input"}``: path of the layer,
            type of its weight (``Int8``, ``Int4``), type of its input (``Int8``, or empty when it stays float).
        adds: Name of each Add node that joins a quantized value and a convolution, and whose result is quantized -> name
            of the quantizer of that value.
    """

    portable: PortableModel
    products: dict[str, dict[str, str]] = field(default_factory=dict)
    adds: dict[str, str] = field(default_factory=dict)


def explicit_quantization(portable: PortableModel) -> ExplicitModel:
    """Write the quantizers of a portable model as TensorRT wants them.

    Args:
        portable: Left untouched. 16-bit floats stay what they are.

    Raises:
        EngineError: a grid that TensorRT has no integers for (not int8 around zero, one scale per activation), or a value
            in float64.
    """
    _refuse_double(portable)
    found = ExplicitModel(portable)
    realizer = _Realizer(
        portable, _quantize_dequantize, packed=lambda r: _weight_only(r, found), linear_form=split_products
    )
    found.portable = realizer.run()
    _requantize_pools(realizer)
    _record(realizer, found)
    graph = found.portable.model.graph
    halves = [realizer.ir.tensor_adapters.from_torch_dtype(d) for d in HALF]
    if any(v.dtype in halves for n in graph for v in n.outputs):
        graph.opset_imports[""] = max(graph.opset_imports[""], _MIXED_TYPES_OPSET)
    return found


def _requantize_pools(r: Realizer) -> None:
    """In bfloat16 a quantizer behind every max-pool, too, where nothing is rounded any more.

    The builder has no such pool for bfloat16, and behind one in float32 it does not find the quantizer in front.
    """
    for node in [n for n in r.graph if n.op_type == "MaxPool"]:
        source, result = node.inputs[0], node.outputs[0]
        pair = None if source is None else source.producer()
        if pair is None or pair.op_type != "DequantizeLinear" or _is_wide(r, source):
            continue
        uses = list(result.uses())
        scale, zero, name = pair.inputs[1], pair.inputs[2], str(node.name)
        first = min((u.node for u in uses), key=list(r.graph).index)
        q = r.emit(first, "QuantizeLinear", result, scale, zero, name=f"{name}/QuantizeLinear")
        q.type = r.ir.TensorType(r.ir.DataType.INT8)
        again = r.emit(first, "DequantizeLinear", q, scale, zero, name=f"{name}/DequantizeLinear")
        _set_type(r, again, source)
        for use in uses:
            use.node.replace_input_with(use.idx, again)


def _is_wide(r: Realizer, value: ir.Value | None) -> bool:
    return value is None or value.dtype != r.ir.DataType.BFLOAT16


def _refuse_double(portable: PortableModel) -> None:
    import onnx_ir as ir

    graph = portable.model.graph
    values = [*graph.inputs, *graph.initializers.values(), *(v for n in graph for v in n.outputs)]
    names = [str(v.name) for v in values if v.dtype == ir.DataType.DOUBLE]
    if names:
        fix = "convert the model with .float(), or the values that are made in float64"
        raise EngineError(600, "TensorRT has no float64", where=", ".join(names[:3]), fix=fix)


class _Realizer(Realizer):
    """Dequantized weights have the type that the layer computes in, whatever the type of their scales."""

    def dequantize(
        self, at: ir.Node, stored: ir.Value, scale: Tensor, zero_point: Tensor, kind: torch.dtype, axis: int
    ) -> ir.Value:
        if bool(zero_point.any()) or kind != torch.int8:
            raise _odd_grid(str(at.name), "its weight is not in signed 8 bits around zero")
        value = super().dequantize(at, stored, scale, zero_point, kind, axis)
        _set_type(self, value, at.inputs[0])
        return value


def _set_type(r: Realizer, value: ir.Value, like: ir.Value | None) -> None:
    """Let a DequantizeLinear give values of the type of ``like``."""
    producer = value.producer()
    kind = None if like is None else like.dtype
    assert producer is not None
    if kind is not None and kind in (r.ir.DataType.FLOAT16, r.ir.DataType.BFLOAT16):
        producer.attributes["output_dtype"] = r.ir.AttrInt64("output_dtype", int(kind))
    value.type = r.ir.TensorType(kind or r.ir.DataType.FLOAT)


def _odd_grid(where: str, why: str) -> EngineError:
    fix = "quantize for this target: fxc.compile(..., target='tensorrt'), or with its scheme"
    return EngineError(601, "TensorRT has no integers for this grid", where=where, why=why, fix=fix)


def _quantize_dequantize(r: Realizer, node: ir.Node, grid: Grid) -> ir.Value:
    """QuantizeLinear and DequantizeLinear around int8."""
    x, name = node.inputs[0], str(node.name)
    assert x is not None
    if grid.axis >= 0:
        raise _odd_grid(name, "an activation has one scale per channel")
    if bool(grid.zero_point.any()) or grid.container != torch.int8:
        raise _odd_grid(name, f"it has integers from {grid.qmin} to {grid.qmax} and zero at {int(grid.zero_point)}")
    value = x
    if not grid.fills_container:
        kind = torch.float32 if x.dtype is None else r.ir.tensor_adapters.to_torch_dtype(x.dtype)
        low, high = (r.constant(end.to(kind)) for end in grid.limits())
        value = r.emit(node, "Clip", x, low, high, name=f"{name}/Clip")
    scale, zero = r.constant(grid.scale.reshape(())), r.constant(grid.zero_point.reshape(()).to(torch.int8))
    q = r.emit(node, "QuantizeLinear", value, scale, zero, name=f"{name}/QuantizeLinear")
    q.name, q.type = f"{name}/quantized", r.ir.TensorType(r.ir.DataType.INT8)
    result = r.emit(node, "DequantizeLinear", q, scale, zero, name=f"{name}/DequantizeLinear")
    _set_type(r, result, x)
    return result


# ------------------------------------------------------------------------------------------------ weights alone
def _weight_only(r: Realizer, found: ExplicitModel) -> None:
    """Products with quantized weights and float inputs: the weight is dequantized inside the product's kernel."""
    dynamic: list[str] = []
    asymmetric: list[str] = []
    rounded: list[str] = []
    for p in list(find_products(r)):
        w = integers_of(p)
        by_rows = p.node.op_type == "Gemm" and "transB" in p.node.attributes and p.node.attributes["transB"].as_int()
        key = ("tensorrt weight", id(p.quantizer), bool(by_rows))
        if key not in r.memo:
            r.memo[key] = (
                _dequantized(r, p, w, bool(by_rows), rounded) if w.symmetric else _on_grid(r, p, w, bool(by_rows))
            )
        p.node.replace_input_with(1, r.memo[key])
        if w.symmetric:
            kind = "Int4" if w.bits <= 4 else "Int8"
            found.products[str(p.node.name)] = {"layer": p.name, "weight": kind, "input": ""}
        else:
            asymmetric.append(p.name)
        if p.dynamic is not None:
            dynamic.append(p.name)
    _note(
        r,
        asymmetric,
        "stored in floating point, on the grid: TensorRT has no zero points (QuantizeWeights(symmetric=True))",
    )
    _note(r, dynamic, "quantization of the input at run time is computed in floating point (TensorRT has no kernel)")
    _note(r, rounded, "scales are rounded to 16 bits: run Cast before QuantizeWeights to have that simulated")


def _note(r: Realizer, names: list[str], what: str) -> None:
    if names:
        r.notes.append(f"{', '.join(dict.fromkeys(names))}: {what}")


def _dequantized(r: Realizer, p: Product, w: Integers, by_rows: bool, rounded: list[str]) -> ir.Value:
    """DequantizeLinear on int4 or int8, [rows, features] or transposed, with one scale per row or per group of it."""
    name, axis = str(p.weight.name), 1 if by_rows else 0
    values, scale = (w.values, w.scale) if by_rows else (w.values.t().contiguous(), w.scale.t().contiguous())
    bits = 4 if w.bits <= 4 else 8
    block = w.group if w.groups > 1 else _block(w.group) if bits == 4 else 0
    extra: dict[str, Any] = {"axis": 1 - axis}
    if block:
        scale = scale.repeat_interleave(w.group // block, axis)
        extra = {"axis": axis, "block_size": block}
    else:
        scale = scale.flatten()
    kind = _torch_type(r, p.weight)
    if kind in HALF and ("block_size" in extra or bits == 4):
        # With scales of another type the builder dequantizes blocks in a kernel of their own, or not at all.
        if bool((scale.to(kind).float() != scale).any()):
            rounded.append(p.name)
        scale = scale.to(kind)
    integers = stored(r, f"{name}_quantized", values, True, bits)
    inputs = (integers, r.initializer(f"{name}_scale", scale))
    value = r.emit(p.quantizer, "DequantizeLinear", *inputs, name=f"{name}_quantized/DequantizeLinear", **extra)
    if scale.dtype == torch.float32:
        _set_type(r, value, p.weight)
    else:
        value.type = r.ir.TensorType(p.weight.dtype)
    return value


def _block(features: int) -> int:
    """Block size for a row of 4-bit weights with one scale; 0 when no size divides it.

    Only weights of two blocks or more are unpacked inside the product's kernel.
    """
    return next((size for size in (128, 64, 32, 16) if features % size == 0 and features > size), 0)


def _on_grid(r: Realizer, p: Product, w: Integers, by_rows: bool) -> ir.Value:
    """The weight in the layer's own type, rounded to its grid."""
    real = w.real() if by_rows else w.real().t()
    return r.initializer(f"{p.weight.name}_rounded", real.to(_torch_type(r, p.weight)).contiguous())


def _torch_type(r: Realizer, value: ir.Value) -> torch.dtype:
    kind: torch.dtype = r.ir.tensor_adapters.to_torch_dtype(value.dtype) if value.dtype is not None else torch.float32
    return kind


# ------------------------------------------------------------------------------------------------ for the layer list
def _record(r: Realizer, found: ExplicitModel) -> None:
    """Which nodes are to run on integers."""
    for node in r.graph:
        weight = node.inputs[1] if len(node.inputs) > 1 else None
        if node.op_type in _PRODUCTS and weight is not None and r.is_weight(weight):
            layer = str(node.name).removesuffix(f"/{node.op_type}").partition(PART)[0]
            found.products[str(node.name)] = {"layer": layer, "weight": "Int8", "input": ""}
        if str(node.name) in found.products and _quantizer_behind(node.inputs[0]):
            found.products[str(node.name)]["input"] = "Int8"
        if node.op_type == "Add" and _is_quantized_next(node):
            quantizers = [q for v in node.inputs if (q := _quantizer_behind(v))]
            if quantizers:
                found.adds[str(node.name)] = quantizers[0]


def _quantizer_behind(value: ir.Value | None) -> str:
    """Name of the QuantizeLinear node that a value comes from, through data movement; empty without one."""
    while value is not None and (producer := value.producer()) is not None:
        if producer.op_type == "QuantizeLinear":
            return str(producer.name)
        if producer.op_type not in _MOVES:
            return ""
        value = producer.inputs[0]
    return ""


def _is_quantized_next(node: ir.Node) -> bool:
    """True when a result goes into quantizers alone, directly or through clipping activations."""
    value, seen = node.outputs[0], 0
    while len(value.uses()) == 1 and seen < 2 and next(iter(value.uses())).node.op_type in _CLIPS:
        value, seen = next(iter(value.uses())).node.outputs[0], seen + 1
    readers = [u.node.op_type for u in value.uses()]
    return bool(readers) and all(kind == "QuantizeLinear" for kind in readers)
