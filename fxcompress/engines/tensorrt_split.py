"""Quantized products whose result is cut into pieces: one product for each piece.

The builder pulls the cutting of a product's result (query, key and value from one linear layer) in front of the product and
cuts the weight; it does so before it looks for quantized products, and then finds none. Several products on the same input
it joins into one integer kernel again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from fxcompress.engines.quantized import Realizer, as_torch

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["PART", "split_products"]

#: In the names of the nodes that a product became.
PART = "/part"


@dataclass
class _Product:
    """A quantized product and its bias.

    Attributes:
        node: MatMul or Gemm.
        weight: Its dequantized weight.
        axis: Dimension of the weight that holds the outputs.
        bias: Added behind the product, or None.
    """

    node: ir.Node
    weight: ir.Value
    axis: int
    bias: Tensor | None


@dataclass
class _Piece:
    """A piece of a product's result.

    Attributes:
        value: What holds it, to be replaced.
        outputs: The outputs of the product that it is made of.
        entry: Which entry of ``shape`` says how many pieces' worth of outputs there are.
        size: That entry for the piece alone.
        shape: Shape that the result is given before it is cut, or None.
        perm: How it is transposed before it is cut, or None.
        squeezed: Dimension of size 1 that is dropped at last, or None.
    """

    value: ir.Value
    outputs: slice
    entry: int
    size: int
    shape: ir.Value | None
    perm: list[int] | None = None
    squeezed: int | None = None


def split_products(r: Realizer) -> None:
    """Rewrite every quantized product whose result is cut along its outputs."""
    done: set[int] = set()
    for node in list(r.graph):
        if node.op_type not in ("Split", "Gather") or node.inputs[0] is None or id(node.inputs[0]) in done:
            continue
        found = _split(r, node) if node.op_type == "Split" else _gathered(r, node.inputs[0])
        if found is not None:
            done.add(id(node.inputs[0]))
            for number, piece in enumerate(found[1]):
                _rewrite(r, node, found[0], piece, number)


# ------------------------------------------------------------------------------------------------ finding
def _product(r: Realizer, maker: ir.Node | None) -> _Product | None:
    """The quantized product, with or without a bias, that ends in ``maker``."""
    bias = None
    if maker is not None and maker.op_type == "Add":
        held = [
            v for v in maker.inputs if v is not None and v.const_value is not None and len(v.const_value.shape) == 1
        ]
        rest = [v for v in maker.inputs if v not in held]
        bias, maker = (as_torch(held[0]), _alone(rest[0])) if len(held) == len(rest) == 1 else (None, None)
    if maker is None or maker.op_type not in ("MatMul", "Gemm") or not _fits(r, maker):
        return None
    axis = 0 if maker.op_type == "Gemm" and _number(maker, "transB", 0) else 1
    if maker.op_type == "Gemm" and len(maker.inputs) > 2 and maker.inputs[2] is not None:
        bias = as_torch(maker.inputs[2])
    return _Product(maker, cast("ir.Value", maker.inputs[1]), axis, bias)


def _alone(value: ir.Value | None) -> ir.Node | None:
    """What makes a value that has no other reader."""
    if value is None or len(value.uses()) != 1 or value.is_graph_output():
        return None
    return value.producer()


def _fits(r: Realizer, product: ir.Node) -> bool:
    weight, bias = product.inputs[1], product.inputs[2] if len(product.inputs) > 2 else None
    stored = bias is None or bias.const_value is not None
    return weight is not None and r.is_weight(weight) and stored and not _number(product, "transA", 0)


def _number(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


def _split(r: Realizer, node: ir.Node) -> tuple[_Product, list[_Piece]] | None:
    """A Split of the last dimension, with or without a Reshape in front."""
    source, shape, maker = node.inputs[0], None, _alone(node.inputs[0])
    if maker is not None and maker.op_type == "Reshape":
        shape, maker = maker.inputs[1], _alone(maker.inputs[0])
    product = _product(r, maker)
    rank = len(source.shape) if source is not None and source.shape is not None else 0
    if product is None or not rank or _number(node, "axis", 0) not in (-1, rank - 1):
        return None
    total = r.weight_shape(product.weight)[product.axis]
    given = node.inputs[1] if len(node.inputs) > 1 else None
    count = len(node.outputs)
    sizes = [total // count] * count if given is None else [int(s) for s in as_torch(given)]
    if sum(sizes) != total or (shape is not None and (_entries(shape) or [None])[-1] != total):
        return None
    starts = [sum(sizes[:i]) for i in range(count)]
    pieces = zip(node.outputs, starts, sizes, strict=True)
    return product, [_Piece(v, slice(at, at + size), rank - 1, size, shape) for v, at, size in pieces]


def _gathered(r: Realizer, value: ir.Value) -> tuple[_Product, list[_Piece]] | None:
    """Single indices of a dimension that a Reshape cut out of the outputs, directly or behind a Transpose."""
    axis = _common_axis(value)
    maker = value.producer()
    if axis is None or maker is None or value.is_graph_output():
        return None
    perm = None
    if maker.op_type == "Transpose":
        perm, maker = list(maker.attributes["perm"].as_ints()), _alone(maker.inputs[0])
    if maker is None or maker.op_type != "Reshape":
        return None
    product, shape = _product(r, _alone(maker.inputs[0])), cast("ir.Value", maker.inputs[1])
    entries = _entries(shape)
    if product is None or entries is None or not -len(entries) <= axis < len(entries):
        return None
    axis %= len(entries)
    entry = axis if perm is None else perm[axis]
    inner = entries[entry:]
    total = r.weight_shape(product.weight)[product.axis]
    if None in inner or math.prod(cast("list[int]", inner)) != total or min(cast("list[int]", inner)) < 1:
        return None
    width = total // cast(int, inner[0])
    places = [(use.node.outputs[0], int(as_torch(use.node.inputs[1])) % cast(int, inner[0])) for use in value.uses()]
    return product, [_Piece(v, slice(i * width, (i + 1) * width), entry, 1, shape, perm, axis) for v, i in places]


def _common_axis(value: ir.Value) -> int | None:
    """The axis along which every reader of a value takes one constant index; None when a reader does something else."""
    axes = set()
    for use in value.uses():
        index = use.node.inputs[1] if use.node.op_type == "Gather" else None
        if index is None or index.const_value is None or len(index.const_value.shape) != 0:
            return None
        axes.add(_number(use.node, "axis", 0))
    return axes.pop() if len(axes) == 1 else None


def _entries(shape: ir.Value) -> list[int | None] | None:
    """Entries of a shape, None where one is computed; None when that cannot be told."""
    if shape.const_value is not None:
        return [int(n) for n in as_torch(shape)]
    maker = shape.producer()
    if maker is None or maker.op_type != "Concat":
        return None
    return [entry for part in maker.inputs for entry in _entry(part)]


def _entry(part: ir.Value | None) -> Iterator[int | None]:
    if part is None or part.const_value is None:
        yield None  # the lowering computes sizes one by one
    else:
        yield from (int(n) for n in as_torch(part).reshape(-1))


# ------------------------------------------------------------------------------------------------ rewriting
def _rewrite(r: Realizer, at: ir.Node, product: _Product, piece: _Piece, number: int) -> None:
    kind = product.node.op_type
    layer = str(product.node.name).removesuffix(f"/{kind}")
    name = f"{layer}{PART}{number}"
    weight = _weight(r, at, product, piece.outputs, number)
    extra: dict[str, Any] = {"transB": 1} if product.axis == 0 else {}
    value = r.emit(at, kind, product.node.inputs[0], weight, name=f"{name}/{kind}", **extra)
    if product.bias is not None:
        bias = r.initializer(f"{layer}.bias_{number}", product.bias[piece.outputs].contiguous())
        value = r.emit(at, "Add", value, bias, name=f"{name}/Add")
    if piece.shape is not None:
        value = r.emit(at, "Reshape", value, _shape(r, at, piece, name), name=f"{name}/Reshape")
    if piece.perm is not None:
        value = r.emit(at, "Transpose", value, name=f"{name}/Transpose", perm=piece.perm)
    if piece.squeezed is not None:
        value = r.emit(at, "Squeeze", value, r.shape_constant([piece.squeezed]), name=f"{name}/Squeeze")
    r.replace(piece.value, value)


def _weight(r: Realizer, at: ir.Node, product: _Product, outputs: slice, number: int) -> ir.Value:
    """The dequantized weight of some outputs."""
    held = r.weights[id(product.weight)]
    integers = as_torch(held.stored)[outputs] if product.axis == 0 else as_torch(held.stored)[:, outputs]
    scale = held.grid.scale if held.grid.axis < 0 else held.grid.scale[outputs].contiguous()
    stored = r.initializer(f"{held.stored.name}_{number}", integers.contiguous())
    zero = r.constant(torch.zeros(scale.shape, dtype=torch.int8))
    extra: dict[str, Any] = {"axis": held.grid.axis} if held.grid.axis >= 0 else {}
    name = f"{stored.name}/DequantizeLinear"
    value = r.emit(at, "DequantizeLinear", stored, r.constant(scale), zero, name=name, **extra)
    old, new = product.weight.producer(), value.producer()
    assert old is not None and new is not None
    if "output_dtype" in old.attributes:
        new.attributes["output_dtype"] = old.attributes["output_dtype"]
    value.type = product.weight.type
    r.weights[id(value)] = replace(held, stored=stored, grid=replace(held.grid, scale=scale))
    return value


def _shape(r: Realizer, at: ir.Node, piece: _Piece, name: str) -> ir.Value:
    """The shape that the whole result was given, with the entry of the piece."""
    shape = cast("ir.Value", piece.shape)
    entries = cast("list[int | None]", _entries(shape))
    if None not in entries:
        entries[piece.entry] = piece.size
        return r.shape_constant(cast("list[int]", entries))
    maker = shape.producer()
    assert maker is not None
    parts = [v for part in maker.inputs for v in _single(r, part)]
    parts[piece.entry] = r.shape_constant([piece.size])
    return r.emit(at, "Concat", *parts, name=f"{name}/Concat", axis=0)


def _single(r: Realizer, part: ir.Value | None) -> list[ir.Value]:
    if part is None or part.const_value is None:
        return [cast("ir.Value", part)]
    return [r.shape_constant([int(n)]) for n in as_torch(part).reshape(-1)]
