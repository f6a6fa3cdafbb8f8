"""Matrix products with quantized weights and float or run-time quantized inputs, and the forms any runtime can read.

Static quantization is not meant here: what reads a static grid is written as `quantized.Realizer` does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from fxcompress.engines.ort_linear import bias_behind
from fxcompress.errors import EngineError
from fxcompress.lowering import DOMAIN

if TYPE_CHECKING:
    import onnx_ir as ir

    from fxcompress.engines.quantized import Grid, Realizer

__all__ = [
    "Integers", "Product", "container_bits", "emulate", "find_products", "finish", "integers_of", "pack", "readers", "rounded",
    "unpack",
]  # fmt: skip

#: Below it the scale of a block is as good as zero.
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Integers:
    """A weight on its grid.

    Attributes:
        values: int16, [rows, features].
        scale: float32, [rows, groups].
        zero_point: int32, [rows, groups].
        group: Features of a group; all of them when there is one.
        signed: Negative integers are used.
        bits: Width that holds them: 2, 4 or 8.
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor
    group: int
    signed: bool
    bits: int

    @property
    def symmetric(self) -> bool:
        """Zero is stored as zero."""
        return self.signed and not bool(self.zero_point.any())

    @property
    def groups(self) -> int:
        """Groups of a row."""
        return int(self.scale.shape[1])

    def real(self) -> Tensor:
        """The values the integers stand for, float32 [rows, features]."""
        scale, zero = (t.repeat_interleave(self.group, 1) for t in (self.scale, self.zero_point))
        return (self.values.float() - zero) * scale


@dataclass
class Product:
    """``x @ weight.T (+ bias)`` with a quantized weight.

    Attributes:
        node: The Gemm or MatMul.
        x: What it multiplies, in front of the dynamic quantizer if there is one.
        dynamic: The DynamicFakeQuantize node in front of it, or None.
        quantizer: The FakeQuantize node of the weight.
        weight: The float weight as stored.
        transposed: It is stored as [features, rows].
        grid: Its grid; the axis is that of the stored form.
    """

    node: ir.Node
    x: ir.Value
    dynamic: ir.Node | None
    quantizer: ir.Node
    weight: ir.Value
    transposed: bool
    grid: Grid

    @property
    def name(self) -> str:
        """Path of the layer."""
        return str(self.quantizer.name).removesuffix(".weight_fake_quantize")

    @property
    def block(self) -> int | None:
        """Features that share a scale at run time; 0: the whole token; None: the input stays float."""
        return None if self.dynamic is None else self.dynamic.attributes["block"].as_int()

    @property
    def shape(self) -> tuple[int, int]:
        """Output rows and input features."""
        from fxcompress.engines.quantized import as_torch

        first, second = as_torch(self.weight).shape
        return (second, first) if self.transposed else (first, second)

    @property
    def rank(self) -> int:
        """Dimensions of the input."""
        return 0 if self.x.shape is None else len(self.x.shape)


# ------------------------------------------------------------------------------------------------ finding
def find_products(r: Realizer) -> Iterator[Product]:
    """Products of the graph, in execution order, that do not read a static grid; earlier ones may be rewritten meanwhile."""
    for node in list(r.graph):
        found = _product(r, node) if node.op_type in ("Gemm", "MatMul") and node.domain == "" else None
        if found is not None:
            yield found


def readers(r: Realizer, x: ir.Value) -> list[Product]:
    """Products of ``x``, read as it is or quantized at run time."""
    nodes = [use.node for use in x.uses()]
    nodes += [use.node for n in nodes if n.op_type == "DynamicFakeQuantize" for use in n.outputs[0].uses()]
    found = [_product(r, n) for n in dict.fromkeys(nodes) if n.op_type in ("Gemm", "MatMul") and n.domain == ""]
    return [p for p in found if p is not None and p.x is x]


def _product(r: Realizer, node: ir.Node) -> Product | None:
    quantizer, transposed = _weight_behind(node)
    x = node.inputs[0]
    if quantizer is None or x is None or r.static_grid_behind(x) or not _plain_gemm(node):
        return None
    grid, weight = r.grid(quantizer), quantizer.inputs[0]
    if grid.axis not in (-1, int(transposed)):
        return None
    producer = x.producer()
    dynamic = producer if producer is not None and producer.op_type == "DynamicFakeQuantize" else None
    source = x if dynamic is None else dynamic.inputs[0]
    return Product(node, cast("ir.Value", source), dynamic, quantizer, cast("ir.Value", weight), transposed, grid)


def _weight_behind(node: ir.Node) -> tuple[ir.Node | None, bool]:
    """The FakeQuantize node of a stored weight and whether that is [features, rows]."""
    value = node.inputs[1]
    producer = None if value is None else value.producer()
    by_rows = node.op_type == "Gemm" and "transB" in node.attributes and node.attributes["transB"].as_int() == 1
    if producer is not None and producer.op_type == "Transpose" and not by_rows:
        by_rows = True
        producer = cast("ir.Value", producer.inputs[0]).producer()
    if producer is None or producer.domain != DOMAIN or producer.op_type != "FakeQuantize":
        return None, False
    source = producer.inputs[0]
    stored = source is not None and source.const_value is not None and source.producer() is None
    is_matrix = stored and len(cast("ir.Value", source).const_value.shape) == 2  # type: ignore[union-attr]
    return (producer, not by_rows) if is_matrix else (None, False)


def _plain_gemm(node: ir.Node) -> bool:
    given = node.attributes
    scaled = any(k in given and given[k].as_float() != 1.0 for k in ("alpha", "beta"))
    return not scaled and not ("transA" in given and given["transA"].as_int())


def integers_of(p: Product) -> Integers:
    """The weight of a product, rounded as the simulation rounds it; errors as `container_bits`."""
    from fxcompress.engines.quantized import as_torch

    grid, weight = p.grid, as_torch(p.weight).detach().float()
    weight = weight.t() if p.transposed else weight
    rows, features = weight.shape
    bits = container_bits(grid, p.name)
    group = grid.group or features
    scale, zero = (t.reshape(-1, 1 if grid.group == 0 else features // group) for t in (grid.scale, grid.zero_point))
    scale, zero = scale.float().expand(rows, -1), zero.int().expand(rows, -1)
    parts = weight.reshape(rows, -1, group)
    values = torch.div(parts, scale[..., None]).round_().add_(zero[..., None]).clamp_(grid.qmin, grid.qmax)
    integers = values.reshape(rows, features).to(torch.int16)
    return Integers(integers, scale, zero, group, grid.qmin < 0, bits)


def container_bits(grid: Grid, name: str) -> int:
    """Narrowest width among 2, 4 and 8 bits that holds the grid of weight ``name``.

    Raises:
        EngineError: it has more than 8 bits.
    """
    signed = int(grid.qmin < 0)
    for bits in (2, 4, 8):
        if grid.qmax <= (1 << (bits - signed)) - 1 and grid.qmin >= -(1 << (bits - 1)):
            return bits
    why = f"its integers reach from {grid.qmin} to {grid.qmax}"
    raise EngineError(60, "a quantized weight of more than 8 bits", where=name, why=why, fix="use 2 to 8 bits")


# ------------------------------------------------------------------------------------------------ plain forms
def pack(values: Tensor, bits: int) -> Tensor:
    """Unsigned integers below ``2**bits`` as bytes, the first in the lowest bits; rows are filled up with zeros.

    Args:
        values: [..., n].
        bits: 2, 4 or 8.

    Returns:
        uint8 [..., ceil(n * bits / 8)].
    """
    per = 8 // bits
    padded = torch.nn.functional.pad(values.to(torch.uint8), (0, -values.shape[-1] % per))
    parts = padded.unflatten(-1, (-1, per))
    packed: Tensor = parts[..., 0].clone()
    for i in range(1, per):
        packed |= parts[..., i] << (bits * i)
    return packed


def stored(r: Realizer, name: str, values: Tensor, signed: bool, bits: int) -> ir.Value:
    """An initializer of int4, uint4, int8 or uint8 (narrower ones in 4 bits)."""
    if bits == 8:
        return r.initializer(name, values.to(torch.int8 if signed else torch.uint8))
    kind = r.ir.DataType.INT4 if signed else r.ir.DataType.UINT4
    data = pack(values.reshape(-1) & 0xF, 4).numpy()
    return r.add_initializer(r.ir.PackedTensor(data, kind, shape=list(values.shape), name=r.free_name(name)))


def unpack(r: Realizer, p: Product, *, at_load: bool = False) -> None:
    """Write the weight as integers, Cast, Sub, Mul: what OpenVINO keeps compressed and ONNX Runtime unpacks at load.

    Args:
        r: The graph.
        p: Its weight is written.
        at_load: OpenVINO unpacks it at load, too: integers that are cast twice are no compressed weight to it.
    """
    key = ("unpacked", id(p.quantizer), at_load)
    if key not in r.memo:
        r.memo[key] = _unpacked(r, p, integers_of(p), at_load)
    _use_weight(r, p, r.memo[key])


def _unpacked(r: Realizer, p: Product, w: Integers, at_load: bool) -> ir.Value:
    rows, features = w.values.shape
    name, at = str(p.weight.name), p.quantizer
    grouped = w.groups > 1
    shape = (rows, w.groups, w.group) if grouped else (rows, features)
    small = (rows, w.groups, 1) if grouped else (rows, 1)
    value = stored(r, f"{name}_quantized", w.values.reshape(shape), w.signed, w.bits)
    if at_load:
        value = r.emit(at, "Cast", value, name=f"{name}/Cast_int32", to=6)
    value = r.emit(at, "Cast", value, name=f"{name}/Cast", to=1)
    if not w.symmetric:
        zero = stored(r, f"{name}_zero_point", w.zero_point.reshape(small), w.signed, w.bits)
        zero = r.emit(at, "Cast", zero, name=f"{name}/Cast_zero", to=1)
        value = r.emit(at, "Sub", value, zero, name=f"{name}/Sub")
    scale = r.initializer(f"{name}_scale", w.scale.reshape(small).contiguous())
    value = r.emit(at, "Mul", value, scale, name=f"{name}/Mul")
    return (
        r.emit(at, "Reshape", value, r.shape_constant([rows, features]), name=f"{name}/Reshape") if grouped else value
    )


def rounded(r: Realizer, p: Product) -> None:
    """Write the weight in float32, on its grid."""
    key = ("rounded", id(p.quantizer))
    if key not in r.memo:
        r.memo[key] = r.initializer(f"{p.weight.name}_rounded", integers_of(p).real())
    _use_weight(r, p, r.memo[key])


def _use_weight(r: Realizer, p: Product, weight: ir.Value) -> None:
    """Let the product read ``weight`` [rows, features]."""
    by_rows = p.node.op_type == "Gemm" and "transB" in p.node.attributes and p.node.attributes["transB"].as_int() == 1
    if not by_rows:
        key = ("columns", id(weight))
        if key not in r.memo:
            r.memo[key] = r.emit(p.quantizer, "Transpose", weight, name=f"{p.weight.name}/Transpose", perm=[1, 0])
        weight = r.memo[key]
    p.node.replace_input_with(1, weight)


def finish(r: Realizer, p: Product, product: ir.Value, *, has_bias: bool) -> None:
    """Put ``product`` in the place of the product and of its bias; without ``has_bias`` the bias is added here."""
    bias, last = bias_of(p)
    if bias is not None and not has_bias:
        product = r.emit(p.node, "Add", product, bias, name=f"{p.node.name}/Add")
    r.replace(last.outputs[0], product)
    for old in (last, p.node) if last is not p.node else (p.node,):
        r.graph.remove(old, safe=True)


def bias_of(p: Product) -> tuple[ir.Value | None, ir.Node]:
    """The stored bias of a product, and the node that adds it."""
    if p.node.op_type == "Gemm":
        return (p.node.inputs[2] if len(p.node.inputs) > 2 else None), p.node
    return bias_behind(p.node)


# ------------------------------------------------------------------------------------------------ activations
def emulate(r: Realizer, node: ir.Node) -> ir.Value:
    """A DynamicFakeQuantize in float arithmetic; returns the new value, which stands in the old one's place.

    Raises:
        EngineError: it works in blocks and the number of features is not fixed.
    """
    x, name = cast("ir.Value", node.inputs[0]), str(node.name)
    block, qmax = node.attributes["block"].as_int(), node.attributes["qmax"].as_int()
    features = x.shape[-1] if x.shape is not None and len(x.shape) else None
    value, lead = x, [0] * (len(x.shape) - 1 if x.shape is not None else 0)
    blocked = block > 0 and not (isinstance(features, int) and features <= block)
    if blocked:
        if not isinstance(features, int):
            fix = "fix that size when capturing (dynamic_shapes), or quantize whole tokens"
            raise EngineError(
                61, "blocks of a dimension of free size", where=name, why=f"it has shape {x.shape}", fix=fix
            )
        count = math.ceil(features / block)
        value = _padded(r, node, value, len(lead), count * block - features)
        value = r.emit(node, "Reshape", value, r.shape_constant([*lead, count, block]), name=f"{name}/Blocks")
    value = r.emit(node, "Mul", *_on_integers(r, node, value, qmax), name=f"{name}/Mul")
    if blocked:
        value = r.emit(node, "Reshape", value, r.shape_constant([*lead, -1]), name=f"{name}/Tokens")
        ends = (r.shape_constant([n]) for n in (0, cast(int, features), -1))
        value = r.emit(node, "Slice", value, *ends, name=f"{name}/Slice")
    r.replace(node.outputs[0], value)
    r.graph.remove(node, safe=True)
    return value


def _padded(r: Realizer, node: ir.Node, value: ir.Value, leading: int, count: int) -> ir.Value:
    if not count:
        return value
    pads = r.shape_constant([0] * (2 * leading + 1) + [count])
    return r.emit(node, "Pad", value, pads, name=f"{node.name}/Pad")


def _on_integers(r: Realizer, node: ir.Node, value: ir.Value, qmax: int) -> tuple[ir.Value, ir.Value]:
    """Rounded integers (as floats) and scale of every vector along the last dimension."""
    scaled, scale = scaled_by_largest(r, node, value, qmax)
    return r.emit(node, "Round", scaled, name=f"{node.name}/Round"), scale


def scaled_by_largest(r: Realizer, node: ir.Node, value: ir.Value, qmax: int) -> tuple[ir.Value, ir.Value]:
    """``value / scale`` and ``scale = max|value| / qmax`` of every vector along the last dimension."""
    name = str(node.name)

    def number(x: float) -> Any:
        return r.constant(torch.tensor(x))

    largest = r.emit(node, "Abs", value, name=f"{name}/Abs")
    largest = r.emit(node, "ReduceMax", largest, r.shape_constant([-1]), name=f"{name}/ReduceMax", keepdims=1)
    scale = r.emit(node, "Div", largest, number(float(qmax)), name=f"{name}/scale")
    scale = r.emit(node, "Max", scale, number(_TINY), name=f"{name}/Max")
    return r.emit(node, "Div", value, scale, name=f"{name}/Div"), scale
