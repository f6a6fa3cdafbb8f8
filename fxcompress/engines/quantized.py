"""From FakeQuantize nodes to what a runtime reads: integer weights, and the engine's own form for activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from fxcompress.engines.packed import emulate
from fxcompress.engines.stored_tables import write_tables
from fxcompress.errors import EngineError
from fxcompress.lowering import DOMAIN, PortableModel
from fxcompress.lowering.portable import prune

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Grid", "Realizer"]

_MOVES = frozenset(
    {"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Gather", "MaxPool", "Identity", "Expand"}
)
#: Biases stay below this many steps, so that adding the product sum cannot leave 32 bits.
_LARGEST_BIAS = 2.0**30


@dataclass(frozen=True)
class Grid:
    """The integer grid of one FakeQuantize node.

    Attributes:
        scale: float32 [] or [channels].
        zero_point: int32, same shape.
        axis: Channel axis, -1 for one scale.
        qmin: Smallest integer.
        qmax: Largest integer.
        group: Values along the other dimension that share a scale, which is then [channels, groups]; 0: all.
    """

    scale: Tensor
    zero_point: Tensor
    axis: int
    qmin: int
    qmax: int
    group: int = 0

    @property
    def container(self) -> torch.dtype:
        """Smallest integer dtype of 8 or 16 bits that holds the grid."""
        kinds = (torch.uint8, torch.uint16) if self.qmin >= 0 else (torch.int8, torch.int16)
        for kind in kinds:
            if torch.iinfo(kind).min <= self.qmin and self.qmax <= torch.iinfo(kind).max:
                return kind
        raise EngineError(4, f"a grid [{self.qmin}, {self.qmax}] has no integer type", fix="use at most 16 bits")

    @property
    def fills_container(self) -> bool:
        """True when the container's own limits are the grid's."""
        info = torch.iinfo(self.container)
        return (info.min, info.max) == (self.qmin, self.qmax)

    def quantize(self, x: Tensor) -> Tensor:
        """Integers of ``x``, as ``fxcompress::fake_quantize`` rounds them."""
        shape = [-1 if i == self.axis else 1 for i in range(x.dim())] if self.axis >= 0 else []
        scale, zero = (t.reshape(shape).to(torch.float32) for t in (self.scale, self.zero_point))
        return torch.div(x.detach().float(), scale).round_().add_(zero).clamp_(self.qmin, self.qmax).to(self.container)

    def limits(self) -> tuple[Tensor, Tensor]:
        """Real values of the smallest and the largest integer, float32."""
        zero = self.zero_point.to(torch.float32)
        return (self.qmin - zero) * self.scale, (self.qmax - zero) * self.scale


@dataclass
class _Weight:
    """A quantized weight: its float original (in the stored order), grid, and integers."""

    original: Tensor
    grid: Grid
    stored: ir.Value


class Realizer:
    """Rewrites a clone of a portable model for one engine.

    Args:
        portable: Left untouched.
        activation: Emits the engine's form of a FakeQuantize on an activation: ``(realizer, node, grid) -> new value``.
        integer_bias: Store biases of quantized layers as int32.
        linear_form: Rewrites quantized matrix products before the biases are stored.
        packed: Rewrites the products of `packed.find_products`.
        tidy: Runs last.
    """

    def __init__(
        self,
        portable: PortableModel,
        activation: Callable[[Realizer, ir.Node, Grid], ir.Value],
        *,
        integer_bias: bool = False,
        linear_form: Callable[[Realizer], None] | None = None,
        packed: Callable[[Realizer], None] | None = None,
        tidy: Callable[[Realizer], None] | None = None,
    ) -> None:
        import onnx_ir as ir

        self.ir = ir
        self.portable = portable.clone()
        self.graph = self.portable.model.graph
        self.activation = activation
        self.integer_bias = integer_bias
        self.linear_form = linear_form
        self.packed = packed
        self.tidy = tidy
        self.memo: dict[Any, Any] = {}
        self.notes: list[str] = []
        self.activation_scales: dict[int, Tensor] = {}
        self.weights: dict[int, _Weight] = {}
        self._constants: dict[Any, ir.Value] = {}
        self._names: dict[str, int] = {str(n.name): 1 for n in self.graph}

    def run(self) -> PortableModel:
        """Rewrite every FakeQuantize node; what was left out is in the notes."""
        if self.packed is not None:
            self.packed(self)
            prune(self.portable)
        write_tables(self)
        for node in [n for n in self.graph if n.op_type == "DynamicFakeQuantize"]:
            emulate(self, node)
        for node in [n for n in self.graph if n.domain == DOMAIN]:
            grid = self.grid(node)
            source = node.inputs[0]
            assert source is not None
            is_weight = source.const_value is not None and source.producer() is None
            new = self._weight(node, source, grid) if is_weight else self.activation(self, node, grid)
            self._take_over(node, new, None if is_weight else grid)
        if self.linear_form is not None:
            self.linear_form(self)
        if self.integer_bias:
            for node in list(self.graph):
                if node.op_type in ("Conv", "ConvTranspose", "Gemm"):
                    self._bias(node)
        self._fold_transposes()
        if self.tidy is not None:
            self.tidy(self)
        prune(self.portable)
        self.portable.model.opset_imports.pop(DOMAIN, None)
        self.portable.notes += self.notes
        return self.portable

    # ---------------------------------------------------------------------------------------------- pieces
    def grid(self, node: ir.Node) -> Grid:
        """The grid of a FakeQuantize node."""
        scale, zero_point = (as_torch(v) for v in node.inputs[1:3])
        axis, qmin, qmax = (node.attributes[k].as_int() for k in ("axis", "qmin", "qmax"))
        group = node.attributes["group_size"].as_int() if "group_size" in node.attributes else 0
        return Grid(scale, zero_point, axis, qmin, qmax, group)

    def static_grid_behind(self, value: ir.Value) -> bool:
        """True when a value was put on a static grid, looking back through operators that only move data."""
        producer = value.producer()
        while producer is not None and producer.op_type in _MOVES:
            producer = cast("ir.Value", producer.inputs[0]).producer()
        return producer is not None and producer.domain == DOMAIN and producer.op_type == "FakeQuantize"

    def _take_over(self, node: ir.Node, new: ir.Value, grid: Grid | None) -> None:
        if grid is not None:
            self.activation_scales[id(new)] = grid.scale
        self.replace(node.outputs[0], new)
        self.graph.remove(node, safe=True)

    def _weight(self, node: ir.Node, source: ir.Value, grid: Grid) -> ir.Value:
        """int8 initializer and DequantizeLinear; a transposition behind it goes into the initializer."""
        if grid.group:
            what = "a weight in groups that is no factor of a matrix product"
            raise EngineError(62, what, where=str(node.name), fix="use target='torch', or one scale per channel")
        weight, axis, users = as_torch(source), grid.axis, list(node.outputs[0].uses())
        integers = grid.quantize(weight)
        transposed = bool(users) and all(u.node.op_type == "Transpose" and integers.dim() == 2 for u in users)
        if transposed:
            integers, axis = integers.t().contiguous(), (1 - axis if axis >= 0 else axis)
            for use in users:
                use.node.outputs[0].replace_all_uses_with(node.outputs[0])
                self.graph.remove(use.node, safe=True)
        stored = self.initializer(f"{source.name}_quantized", integers)
        new = self.dequantize(node, stored, grid.scale, grid.zero_point, grid.container, axis)
        self.weights[id(new)] = _Weight(weight.t() if transposed else weight, replace(grid, axis=axis), stored)
        return new

    def _bias(self, node: ir.Node) -> None:
        """int32 bias with the scale of input times weight, where both are known."""
        x, w, bias = (*node.inputs, None)[:3]
        if bias is None or bias.const_value is None or w is None:
            return
        x_scale, weight = self._scale_of(x), self.weights.get(id(w))
        if x_scale is None or weight is None or x_scale.dim() > 0:
            return
        values = as_torch(bias).double()
        self._make_room(weight, w, values / x_scale.double())
        scale = (x_scale.double() * weight.grid.scale.double()).expand(values.shape)
        integers = (values / scale).round().clamp_(-(2**31) + 1, 2**31 - 1)
        stored = self.initializer(f"{bias.name}_quantized", integers.to(torch.int32))
        zero = torch.zeros(values.shape, dtype=torch.int32)
        new = self.dequantize(node, stored, scale.to(torch.float32), zero, torch.int32, 0)
        new.name = f"{bias.name}_dequantized"
        node.replace_input_with(2, new)

    def _scale_of(self, value: ir.Value | None) -> Tensor | None:
        """Scale of the grid a value lies on, looking back through operators that only move data."""
        while value is not None:
            if id(value) in self.activation_scales:
                return self.activation_scales[id(value)]
            producer = value.producer()
            value = producer.inputs[0] if producer is not None and producer.op_type in _MOVES else None
        return None

    def _make_room(self, weight: _Weight, value: ir.Value, bias: Tensor) -> None:
        """Coarser scales for channels whose bias does not fit 32 bits, finer ones for channels that are all zero.

        A bias needs a coarser scale where the weights are some 1e-7 of it; with the new scale a product sum of k terms
        is at most ``k * 127.5 / 2**30`` of the bias off. The scale of a channel of zeros is free, and decides how well
        its bias is rounded.

        Args:
            weight: Changed in place.
            value: The dequantized weight in the graph.
            bias: Bias over the scale of the input, float64 [channels].
        """
        grid = weight.grid
        integers = as_torch(weight.stored)
        if grid.axis < 0 or grid.scale.numel() != bias.numel() or bool((grid.zero_point != 0).any()):
            return
        empty = (integers == 0).movedim(grid.axis, 0).flatten(1).all(dim=1)
        needed = (bias.abs() / _LARGEST_BIAS).clamp_(min=2.0**-100)
        old = grid.scale.double()
        new = torch.where(empty & (bias != 0), needed, torch.maximum(old, needed)).to(torch.float32)
        if bool((new == grid.scale).all()):
            return
        weight.grid = replace(grid, scale=new)
        changed = weight.grid.quantize(weight.original)
        weight.stored.const_value = self.ir.tensor_adapters.TorchTensor(changed.contiguous(), name=weight.stored.name)
        producer = value.producer()
        assert producer is not None
        producer.replace_input_with(1, self.constant(new))

    def _fold_transposes(self) -> None:
        """Transpose of a weight becomes a transposed weight."""
        for node in list(self.graph):
            source = node.inputs[0] if node.op_type == "Transpose" else None
            if source is None or source.const_value is None or source.producer() is not None:
                continue
            tensor = as_torch(source).permute(*node.attributes["perm"].as_ints())
            stored = self.initializer(f"{source.name}_transposed", tensor.contiguous())
            node.outputs[0].replace_all_uses_with(stored)
            self.graph.remove(node, safe=True)

    # ---------------------------------------------------------------------------------------------- for linear forms
    def is_weight(self, value: ir.Value) -> bool:
        """True for a dequantized weight."""
        return id(value) in self.weights

    def weight_shape(self, value: ir.Value) -> list[int]:
        """Shape of a dequantized weight."""
        return list(as_torch(self.weights[id(value)].stored).shape)

    def on_grid(self, value: ir.Value) -> bool:
        """True when a value is known to lie on a grid with one scale."""
        scale = self._scale_of(value)
        return scale is not None and scale.dim() == 0

    def shape_constant(self, sizes: list[int]) -> ir.Value:
        """A constant shape."""
        return self.constant(torch.tensor(sizes, dtype=torch.int64))

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Put ``new`` in the place, and under the name, of ``old``."""
        name, kind, shape = old.name, old.type, old.shape
        old.replace_all_uses_with(new)
        old.name = f"{name}_replaced"
        new.name, new.type, new.shape = name, kind, shape

    # ---------------------------------------------------------------------------------------------- emission
    def initializer(self, name: str, tensor: Tensor) -> ir.Value:
        """A new weight; the name gets a number when it is taken."""
        name = self.free_name(name)
        return self.add_initializer(self.ir.tensor_adapters.TorchTensor(tensor, name=name))

    def free_name(self, name: str) -> str:
        """``name``, with a number when an initializer has it."""
        base, count = name, 0
        while name in self.graph.initializers:
            count += 1
            name = f"{base}_{count}"
        return name

    def add_initializer(self, held: Any) -> ir.Value:
        """A new weight that holds an ``onnx_ir`` tensor, under its name."""
        kind, shape = self.ir.TensorType(held.dtype), self.ir.Shape(list(held.shape))
        value = self.ir.Value(name=held.name, shape=shape, type=kind, const_value=held)
        self.graph.initializers[held.name] = value
        return value

    def constant(self, tensor: Tensor) -> ir.Value:
        """A small constant, stored once."""
        key = (
            tensor.dtype,
            tuple(tensor.shape),
            bytes(tensor.contiguous().view(torch.uint8).numpy()) if tensor.dim() else tensor.item(),
        )
        if key not in self._constants:
            self._constants[key] = self.initializer("quantization_constant", tensor)
        return self._constants[key]

    def emit(
        self, before: ir.Node, kind: str, *inputs: ir.Value | None, name: str, domain: str = "", **attributes: Any
    ) -> ir.Value:
        """A node with one output, in front of ``before``; the name gets a number when a node has it."""
        name = self._free_node_name(name)
        node = self.ir.node(kind, inputs, attributes=attributes, domain=domain, name=name)
        node.outputs[0].name = f"{name}_output"
        self.graph.insert_before(before, node)
        return node.outputs[0]

    def _free_node_name(self, name: str) -> str:
        count = self._names.get(name, 0)
        self._names[name] = count + 1
        return f"{name}_{count}" if count else name

    def split(self, before: ir.Node, value: ir.Value, sizes: ir.Value, count: int, *, name: str) -> list[ir.Value]:
        """``count`` parts of a value along its last dimension, by a node in front of ``before``."""
        return self.emit_many(before, "Split", value, sizes, count=count, name=name, domain="", axis=-1)

    def emit_many(
        self,
        before: ir.Node,
        kind: str,
        *inputs: ir.Value | None,
        count: int,
        name: str,
        domain: str = "com.microsoft",
        **attributes: Any,
    ) -> list[ir.Value]:
        """A node with ``count`` outputs, in front of ``before``."""
        name = self._free_node_name(name)
        node = self.ir.node(kind, inputs, attributes=attributes, domain=domain, num_outputs=count, name=name)
        for i, part in enumerate(node.outputs):
            part.name = f"{name}_output_{i}"
        self.graph.insert_before(before, node)
        return list(node.outputs)

    def dequantize(
        self, at: ir.Node, stored: ir.Value, scale: Tensor, zero_point: Tensor, kind: torch.dtype, axis: int
    ) -> ir.Value:
        """``(stored - zero_point) * scale``."""
        inputs = (stored, self.constant(scale), self.constant(zero_point.to(kind)))
        extra: dict[str, Any] = {"axis": axis} if axis >= 0 else {}
        return self.emit(at, "DequantizeLinear", *inputs, name=f"{stored.name}/DequantizeLinear", **extra)


def as_torch(value: ir.Value | None) -> Tensor:
    """The tensor an initializer holds."""
    assert value is not None and value.const_value is not None
    raw = getattr(value.const_value, "raw", None)
    return raw if isinstance(raw, Tensor) else torch.from_numpy(value.const_value.numpy())
