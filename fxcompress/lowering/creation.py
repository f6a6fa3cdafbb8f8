"""New tensors as ONNX: constants of a value, ranges, triangles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from fxcompress.lowering.builder import Builder, Unsupported, dtype_of, lowers

_aten = torch.ops.aten


@lowers(
    _aten.full.default, _aten.full_like.default, _aten.zeros.default, _aten.ones.default, _aten.zeros_like.default,
    _aten.ones_like.default, _aten.new_zeros.default, _aten.new_ones.default, _aten.new_full.default, _aten.empty.memory_format,
    _aten.empty_like.default, _aten.new_empty.default, _aten.zero.default, _aten.fill.Scalar, _aten.fill.Tensor,
)  # fmt: skip
def _full(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    name = str(node.target).split(".")[1]
    dtype, shape = dtype_of(node), node.meta["val"].shape
    fill = a.get("fill_value", a.get("value", 1 if "ones" in name else 0))
    if isinstance(fill, Node):
        return b.op("Expand", b.value(fill, dtype), _full_shape(b, a, shape))
    if all(isinstance(s, int) for s in shape) and math.prod(shape) <= 1024:
        return b.constant(torch.full(list(shape), fill, dtype=dtype))
    return b.op("Expand", b.scalar(fill, dtype), _full_shape(b, a, shape))


def _full_shape(b: Builder, a: dict[str, Any], shape: Sequence[Any]) -> Any:
    if all(isinstance(s, int) for s in shape):
        return b.ints([int(s) for s in shape])
    return b.sizes(a["size"]) if "size" in a else b.op("Shape", b.value(a["self"]))


@lowers(_aten.scalar_tensor.default)
def _scalar_tensor(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    value = b.value(a["s"], dtype_of(node))
    return b.op("Squeeze", value) if isinstance(a["s"], Node) else value


@lowers(_aten.arange.default, _aten.arange.start, _aten.arange.start_step)
def _arange(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    dtype = dtype_of(node)
    bounds = (a.get("start", 0), a["end"], a.get("step", 1))
    if not any(isinstance(v, Node) for v in bounds):
        return b.constant(torch.arange(*bounds, dtype=dtype))
    scalars = [b.op("Squeeze", b.value(v, dtype)) if isinstance(v, Node) else b.scalar(v, dtype) for v in bounds]
    return b.op("Range", *scalars)


@lowers(_aten.linspace.default)
def _linspace(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    return b.constant(torch.linspace(*(b.static(a[k]) for k in ("start", "end", "steps")), dtype=dtype_of(node)))


@lowers(_aten.eye.default, _aten.eye.m)
def _eye(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    rows = b.static(a["n"])
    return b.constant(torch.eye(rows, b.static(a.get("m", rows)), dtype=dtype_of(node)))


@lowers(_aten.one_hot.default)
def _one_hot(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    classes = b.static(a["num_classes"])
    if classes < 0:
        raise Unsupported("one_hot with a number of classes that the data decides")
    x = b.op("Unsqueeze", b.value(a["self"]), b.ints([-1]))
    return b.cast(b.op("Equal", x, b.constant(torch.arange(classes))), torch.bool, torch.int64)


@lowers(_aten.tril.default, _aten.triu.default)
def _triangle(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    diagonal = b.scalar(b.static(a["diagonal"]), torch.int64)
    x, dtype = b.value(a["self"]), dtype_of(node)
    as_number = b.cast(x, dtype, torch.int64) if dtype == torch.bool else x
    y = b.op("Trilu", as_number, diagonal, upper=int("triu" in str(node.target)))
    return b.cast(y, torch.int64, dtype) if dtype == torch.bool else y
