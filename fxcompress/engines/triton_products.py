"""Products of a program as the kernels see them: activations times a weight, with their grids and what follows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxcompress.ir import Program
from fxcompress.layers import Activation, Fused, TransposedLinear
from fxcompress.quant.fake_quantize import DynamicFakeQuantize, FakeQuantize
from fxcompress.quant.placement import is_move, layer_kind, layer_name

__all__ = ["Integers", "Product", "find_products", "kernel_activation"]

Quantizer = FakeQuantize | DynamicFakeQuantize


@dataclass(frozen=True)
class Integers:
    """A weight as integers.

    Attributes:
        values: int16 [N, K] (or a convolution's weight), inside ``[low, high]``.
        scales: float32 [N, G].
        zeros: int32 [N, G]; None when they are all zero.
        low: Smallest integer of the grid.
        high: Largest integer of the grid.
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor | None
    low: int
    high: int


@dataclass
class Product:
    """One layer that multiplies by a weight.

    Attributes:
        node: Its node.
        name: Path of the layer, or of the weight of a functional call.
        kind: ``linear`` or ``conv``.
        layer: The layer; None for a functional call.
        x: Node of the activations, behind their quantizer when they have one.
        moves: Data movement (reshape, padding ...) between the quantizer and the layer, in execution order.
        weight: Float weight, [N, K] or that of a convolution.
        weight_quantizer: Its grid, or None.
        input_quantizer: The grid of ``x``, or None.
        bias: [N], or None.
        activation: What follows, or None.
        residual: Node that is added before the activation, or None.
    """

    node: Node
    name: str
    kind: str
    layer: nn.Module | None
    x: Node
    weight: Tensor
    weight_quantizer: FakeQuantize | None
    input_quantizer: Quantizer | None
    bias: Tensor | None
    activation: Activation | None
    residual: Node | None
    moves: tuple[Node, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """Of the result."""
        return cast(torch.dtype, self.node.meta["val"].dtype)

    @property
    def group_size(self) -> int:
        """Input features per scale; -1: all."""
        spec = None if self.weight_quantizer is None else self.weight_quantizer.spec
        return -1 if spec is None or spec.group_size is None else spec.group_size

    def integers(self) -> Integers:
        """The quantized weight, rounded as the simulation rounds it."""
        quantizer = cast(FakeQuantize, self.weight_quantizer)
        spec, weight = quantizer.spec, self.weight.detach().float()
        rows = weight.reshape(-1, spec.group_size) if spec.group_size else weight.reshape(weight.shape[0], -1)
        scale, zero = (t.flatten().expand(rows.shape[0]) for t in (quantizer.scale, quantizer.zero_point))
        q = torch.div(rows, scale[:, None]).round_().add_(zero[:, None]).clamp_(spec.qmin, spec.qmax)
        n = weight.shape[0]
        zeros = zero.reshape(n, -1) if bool(zero.any()) or not spec.signed else None
        return Integers(q.to(torch.int16).reshape(weight.shape), scale.reshape(n, -1), zeros, spec.qmin, spec.qmax)


def find_products(program: Program) -> Iterator[Product]:
    """Every linear layer and convolution of ``program``, in execution order; earlier ones may be replaced meanwhile."""
    for node in list(program.graph.nodes):
        product = _product(program, node) if layer_kind(program, node) in ("linear", "conv") else None
        if product is not None:
            yield product


def _product(program: Program, node: Node) -> Product | None:
    kind = cast(str, layer_kind(program, node))
    x = cast(Node, node.args[0])
    source, moves = _behind_moves(x)
    input_quantizer = program.module(source) if source.op == "call_module" else None
    if not isinstance(input_quantizer, FakeQuantize if moves else (FakeQuantize, DynamicFakeQuantize)):
        input_quantizer, moves = None, ()
    if node.op == "call_function":
        return _functional(program, node, x, input_quantizer, moves) if kind == "linear" else None
    layer = program.module(node)
    weight, quantizer = cast(Tensor, layer.weight), getattr(layer, "weight_fake_quantize", None)
    if isinstance(layer, TransposedLinear):
        weight = weight.t()  # the scales are per output feature either way
    residual = node.args[1] if len(node.args) > 1 else node.kwargs.get("residual")
    return Product(
        node,
        str(node.target),
        kind,
        layer,
        x,
        weight,
        quantizer,
        input_quantizer,
        cast("Tensor | None", layer.bias),
        layer.activation if isinstance(layer, Fused) else None,
        cast("Node | None", residual),
        moves,
    )


def _behind_moves(node: Node) -> tuple[Node, tuple[Node, ...]]:
    """What makes the values that only data movement brings to ``node``, and that movement."""
    moves: list[Node] = []
    while is_move(node):
        moves.append(node)
        node = cast(Node, node.args[0])
    return node, tuple(reversed(moves))


def _functional(
    program: Program, node: Node, x: Node, input_quantizer: Quantizer | None, moves: tuple[Node, ...]
) -> Product | None:
    """``aten.linear(x, weight, bias)`` with parameters."""
    source, quantizer = cast(Node, node.args[1]), None
    if source.op == "call_module" and isinstance(program.module(source), FakeQuantize):
        quantizer = cast(FakeQuantize, program.module(source))
        source = cast(Node, source.args[0])
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    if source.op != "get_attr" or (isinstance(bias, Node) and bias.op != "get_attr"):
        return None
    values = program.tensor(bias) if isinstance(bias, Node) else None
    name = layer_name(node)
    weight = program.tensor(source)
    return Product(node, name, "linear", None, x, weight, quantizer, input_quantizer, values, None, None, moves)


def kernel_activation(activation: Activation | None) -> str | None:
    """Name of an activation in the kernels; None when they do not have it."""
    if activation is None:
        return ""
    if activation.name == "gelu":
        kind = {"approximate": "none", **dict(activation.kwargs)}["approximate"]
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(str(kind))
    if activation.name == "hardtanh":
        return "relu6" if tuple(activation.args) == (0.0, 6.0) and not activation.kwargs else None
    return activation.name if activation.name in ("relu", "relu6", "silu", "sigmoid", "hardswish") else None
