"""From fake-quantized and sparse layers of a program to the kernels: packed weights and ``torch.ops.fxcompress`` calls."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxcompress.engines.triton_products import Integers, Product, find_products, kernel_activation
from fxcompress.errors import UsageError
from fxcompress.ir import Program
from fxcompress.kernels import layouts, sparse_layout
from fxcompress.layers import ACTIVATIONS
from fxcompress.ops import kernel_ops
from fxcompress.quant.fake_quantize import DynamicFakeQuantize, FakeQuantize

__all__ = ["LAYOUTS", "Lowered", "lower_to_kernels"]

#: Memory layouts that saved engines may hold, by name.
LAYOUTS: dict[str, layouts.Layout] = {
    layout.name: layout
    for layout in (
        layouts.PLANES4,
        layouts.PLANES4X8,
        sparse_layout.SP24_F16,
        sparse_layout.SP24_I8,
        sparse_layout.SP24_W4,
    )
}
_HALF = (torch.float16, torch.bfloat16)


@dataclass
class Lowered:
    """What `lower_to_kernels` did.

    Attributes:
        kernels: Layer -> operator.
        layouts: Memory layouts that are in use.
        notes: Layers that stay as they are, and why.
    """

    kernels: dict[str, str] = field(default_factory=dict)
    layouts: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)


def lower_to_kernels(program: Program) -> Lowered:
    """Replace layers of ``program``, in place, by operators of ``torch.ops.fxcompress``.

    Which operator is decided by what the program simulates: the grid of the weight, that of the activations, and
    whether the weight is 2:4 sparse. A layer that no kernel can run keeps its float arithmetic and is noted.
    """
    kernel_ops()  # registers the operators
    emitter = _Emitter(program)
    result = Lowered()
    for product in find_products(program):
        quantized = product.weight_quantizer is not None
        family, reason = _family(product)
        if family is None:
            if quantized or product.input_quantizer is not None:
                result.notes.append(f"{product.name} runs in PyTorch: {reason}")
            continue
        try:
            emitter.emit(product, family)
        except UsageError as error:
            result.notes.append(f"{product.name} runs in PyTorch: {error.what}")
            continue
        result.kernels[product.name] = family.op
        result.layouts |= set(family.layouts)
    program.graph.eliminate_dead_code()
    program.recompile()
    return result


# ------------------------------------------------------------------------------------------------ families
@dataclass(frozen=True)
class _Family:
    """One operator: which arguments it takes for a product."""

    op: str
    arguments: Callable[[_Emitter, Product], dict[str, Any]]
    layouts: tuple[str, ...] = ()


def _family(product: Product) -> tuple[_Family | None, str]:
    """The kernel of a product; None and the reason when there is none."""
    if product.kind == "conv":
        return _conv_family(product)
    sparse = product.weight.shape[1] % 4 == 0 and _is_sparse(product)
    if product.weight_quantizer is None:
        if product.input_quantizer is not None:
            return None, "only its activations are quantized"
        if sparse and product.dtype in _HALF:
            return _SP24, ""
        return None, "its weight is neither quantized nor 2:4 sparse in 16 bits"
    grid = product.weight_quantizer.spec
    if product.input_quantizer is None:
        return _weight_only(product, sparse)
    if not grid.symmetric or grid.group_size is not None:
        return None, "integer products need symmetric weights with one scale per output feature"
    activation = product.input_quantizer.spec
    if activation.bits != 8 or not activation.signed or activation.axis is not None:
        return None, "integer products need signed 8-bit activations with one scale per tensor or token"
    if grid.bits <= 4 and isinstance(product.input_quantizer, DynamicFakeQuantize):
        return _W4A8, ""
    centred = isinstance(product.input_quantizer, DynamicFakeQuantize)
    return (_SP24_W8A8, "") if sparse and centred else (_W8A8, "")


def _weight_only(product: Product, sparse: bool) -> tuple[_Family | None, str]:
    grid = cast(FakeQuantize, product.weight_quantizer).spec
    if grid.bits <= 4:
        return (_SP24_W4, "") if sparse and grid.symmetric and product.dtype in _HALF else (_W4A16, "")
    if grid.bits <= 8 and grid.symmetric:
        return _W8A16, ""
    return None, f"no kernel has asymmetric weights of {grid.bits} bits"


def _conv_family(product: Product) -> tuple[_Family | None, str]:
    layer = product.layer
    if product.weight_quantizer is None or not isinstance(product.input_quantizer, FakeQuantize):
        return None, "no kernel has convolutions with these grids"
    if not isinstance(layer, nn.Conv2d) or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return None, "only 2-D convolutions with zero padding given in numbers have a kernel"
    grid, activation = product.weight_quantizer.spec, product.input_quantizer.spec
    fits = grid.bits <= 8 and grid.symmetric and activation.bits == 8 and activation.signed and activation.axis is None
    return (_CONV, "") if fits else (None, "the kernel needs signed 8-bit grids, one scale for the activations")


def _is_sparse(product: Product) -> bool:
    """At most two of four neighbours along the input features are not zero."""
    groups = product.weight.detach().reshape(product.weight.shape[0], -1, 4)
    return bool((groups != 0).sum(-1).le(2).all())


# ------------------------------------------------------------------------------------------------ arguments
def _w4a16(e: _Emitter, p: Product) -> dict[str, Any]:
    w = p.integers()
    layouts.check_groups(p.weight.shape[1], p.group_size)
    shift = 0 if w.low >= 0 else 8
    zeros = None if w.zeros is None else e.constant(p, "zeros", (w.zeros + shift).t().contiguous().to(torch.uint8))
    return {
        "x": p.x,
        "packed": e.constant(p, "packed", layouts.pack_int4(w.values + shift)),
        "scales": e.constant(p, "scales", _kept(w, p).t().contiguous()),
        "zeros": zeros,
        "bias": e.bias(p),
        "group_size": p.group_size,
    }


def _w8a16(e: _Emitter, p: Product) -> dict[str, Any]:
    w = p.integers()
    layouts.check_groups(p.weight.shape[1], p.group_size)
    return {
        "x": p.x,
        "weight": e.constant(p, "weight", w.values.to(torch.int8)),
        "scales": e.constant(p, "scales", _kept(w, p).t().contiguous()),
        "bias": e.bias(p),
        "group_size": p.group_size,
    }


def _w_sum(e: _Emitter, p: Product, weight: Tensor, zero: Node | None) -> Node | None:
    """What the zero point of the activations is multiplied with: int32 [O], the sums of the filters."""
    return None if zero is None else e.constant(p, "w_sum", weight.flatten(1).sum(1, dtype=torch.int32))


def _w8a8(e: _Emitter, p: Product) -> dict[str, Any]:
    weight = p.integers().values.to(torch.int8)
    x, scale, zero = e.integers_of(p)
    return {
        "x": x,
        "weight": e.constant(p, "weight", weight),
        "x_scale": scale,
        "w_scale": e.constant(p, "w_scale", p.integers().scales[:, 0]),
        "x_zero": zero,
        "w_sum": _w_sum(e, p, weight, zero),
        "bias": e.bias(p),
        "out_dtype": p.dtype,
    }


def _w4a8(e: _Emitter, p: Product) -> dict[str, Any]:
    w = p.integers()
    x, scale, _ = e.integers_of(p)
    return {
        "x": x,
        "packed": e.constant(p, "packed", layouts.pack_int4x8(w.values)),
        "x_scale": scale,
        "w_scale": e.constant(p, "w_scale", w.scales[:, 0]),
        "bias": e.bias(p),
        "out_dtype": p.dtype,
    }


def _conv(e: _Emitter, p: Product) -> dict[str, Any]:
    layer, w = cast(nn.Conv2d, p.layer), p.integers()
    filters = w.values.to(torch.int8).permute(0, 2, 3, 1).contiguous()
    x, scale, zero = e.integers_of(p)
    return {
        "x": x,
        "weight": e.constant(p, "weight", filters),
        "x_scale": scale,
        "w_scale": e.constant(p, "w_scale", w.scales[:, 0]),
        "x_zero": zero,
        "bias": e.bias(p),
        "stride": list(layer.stride),
        "padding": list(cast("tuple[int, ...]", layer.padding)),
        "dilation": list(layer.dilation),
        "groups": layer.groups,
        "out_dtype": p.dtype,
        "w_sum": _w_sum(e, p, filters, zero),
    }


def _sp24(e: _Emitter, p: Product) -> dict[str, Any]:
    values, meta = sparse_layout.pack_sp24(p.weight.detach())
    return {
        "x": p.x,
        "values": e.constant(p, "values", values),
        "meta": e.constant(p, "meta", meta),
        "n": p.weight.shape[0],
        "bias": e.bias(p),
    }


def _sp24_w8a8(e: _Emitter, p: Product) -> dict[str, Any]:
    w = p.integers()
    values, meta = sparse_layout.pack_sp24_i8(w.values.to(torch.int8))
    x, scale, _ = e.integers_of(p)
    return {
        "x": x,
        "values": e.constant(p, "values", values),
        "meta": e.constant(p, "meta", meta),
        "x_scale": scale,
        "w_scale": e.constant(p, "w_scale", w.scales[:, 0]),
        "bias": e.bias(p),
        "out_dtype": p.dtype,
    }


def _sp24_w4(e: _Emitter, p: Product) -> dict[str, Any]:
    w = p.integers()
    layouts.check_groups(p.weight.shape[1], p.group_size)
    values, meta = sparse_layout.pack_sp24_w4(w.values.to(torch.int8))
    return {
        "x": p.x,
        "values": e.constant(p, "values", values),
        "meta": e.constant(p, "meta", meta),
        "scales": e.constant(p, "scales", _kept(w, p).t().contiguous()),
        "bias": e.bias(p),
        "group_size": p.group_size,
    }


def _kept(w: Integers, p: Product) -> Tensor:
    """Scales in the dtype of the activations, where that holds them exactly as the simulation uses them."""
    typed = w.scales.to(p.dtype)
    return typed if torch.equal(typed.float(), w.scales) else w.scales


_W4A16 = _Family("w4a16_linear", _w4a16, ("planes4",))
_W8A16 = _Family("w8a16_linear", _w8a16)
_W8A8 = _Family("w8a8_linear", _w8a8)
_W4A8 = _Family("w4a8_linear", _w4a8, ("planes4x8",))
_CONV = _Family("conv2d_w8a8", _conv)
_SP24 = _Family("sp24_linear", _sp24, ("sp24_f16",))
_SP24_W8A8 = _Family("sp24_w8a8_linear", _sp24_w8a8, ("sp24_i8",))
_SP24_W4 = _Family("sp24_w4_linear", _sp24_w4, ("sp24_w4",))


# ------------------------------------------------------------------------------------------------ the graph
class _Emitter:
    """Writes operator calls and their constants into a program's graph."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.holder = nn.Module()
        self.name = "packed"
        while hasattr(program.gm, self.name):
            self.name += "_"
        program.gm.add_module(self.name, self.holder)
        self.anchor: Node | None = None
        self._quantized: dict[Node, tuple[Node, Node, Node | None]] = {}

    def emit(self, product: Product, family: _Family) -> None:
        """Put the operator in the place of the product's node, with what of the epilogue it can do."""
        self.anchor, node = product.node, product.node
        arguments = family.arguments(self, product)
        activation = kernel_activation(product.activation)
        arguments |= {"activation": activation or "", "residual": product.residual}
        call = self.call(getattr(torch.ops.fxcompress, family.op).default, **arguments)
        call.meta = dict(node.meta)
        if activation is None:
            after = cast(Any, product.activation)
            call = self.call(ACTIVATIONS[after.name], call, *after.args, **dict(after.kwargs))
            call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        self.program.graph.erase_node(node)
        call.name = node.name

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A call in front of the product that is being replaced."""
        assert self.anchor is not None
        with self.program.graph.inserting_before(self.anchor):
            return self.program.graph.call_function(target, args, kwargs)

    def constant(self, product: Product, what: str, value: Tensor) -> Node:
        """A constant of the product, by the layer's name."""
        leaf = f"{product.name.replace('.', '_')}_{what}"
        while hasattr(self.holder, leaf):
            leaf += "_"
        self.holder.register_buffer(leaf, value.detach())
        assert self.anchor is not None
        with self.program.graph.inserting_before(self.anchor):
            node = self.program.graph.get_attr(f"{self.name}.{leaf}")
        node.meta["val"] = value.detach()
        return node

    def bias(self, product: Product) -> Node | None:
        """The bias as a constant."""
        return None if product.bias is None else self.constant(product, "bias", product.bias)

    def integers_of(self, product: Product) -> tuple[Node, Node, Node | None]:
        """The product's activations as int8, their scale, and their zero point unless it is zero."""
        source = product.x
        if source not in self._quantized:
            before, self.anchor = self.anchor, source
            self._quantized[source] = self._quantize(product, source)
            self.anchor = before
        return self._quantized[source]

    def _moved(self, product: Product) -> Node:
        """The product's activations before their quantizer, moved as the simulation moves them behind it."""
        first = product.moves[0].args[0] if product.moves else product.x
        value = cast(Node, cast(Node, first).args[0])
        for move in product.moves:
            moved = self.call(move.target, value, *move.args[1:], **move.kwargs)
            moved.meta = dict(move.meta)
            value = moved
        return value

    def _quantize(self, product: Product, source: Node) -> tuple[Node, Node, Node | None]:
        quantizer, value = product.input_quantizer, self._moved(product)
        fake = cast(Tensor, value.meta["val"])
        if isinstance(quantizer, DynamicFakeQuantize):
            pair = self.call(torch.ops.fxcompress.quantize_per_token.default, value)
            x, scale = (self.call(operator.getitem, pair, i) for i in (0, 1))
            x.meta["val"], scale.meta["val"] = fake.to(torch.int8), fake[..., :1].float()
            pair.meta["val"] = (x.meta["val"], scale.meta["val"])
            return x, scale, None
        grid = cast(FakeQuantize, quantizer)
        scale = self.constant(product, "x_scale", grid.scale.reshape(1).float())
        shifted = bool(grid.zero_point.any())
        zero = self.constant(product, "x_zero", grid.zero_point.reshape(1).to(torch.int32)) if shifted else None
        spec = grid.spec
        target = torch.ops.fxcompress.quantize_per_tensor.default
        x = self.call(target, value, scale, zero=zero, qmin=spec.qmin, qmax=spec.qmax)
        x.meta["val"] = fake.to(torch.int8)
        return x, scale, zero
