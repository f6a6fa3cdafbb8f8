"""Parameters and multiply-accumulates of a program, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxcompress.ir import Program
from fxcompress.layers import TransposedLinear
from fxcompress.sizes import free_sizes

__all__ = ["LayerRow", "Shapes", "count_macs", "count_parameters", "layer_table", "node_macs"]

_aten = torch.ops.aten
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_RECURRENT = (nn.LSTM, nn.GRU)


@dataclass(frozen=True)
class LayerRow:
    """One layer or product of a program.

    Attributes:
        name: Module path, or node name for a function.
        kind: Layer class or operator.
        shape: Output shape (of the first output) for the example inputs.
        parameters: Number of parameters it reads; a tensor that several rows read counts in the first one.
        macs: Multiply-accumulates for the example inputs.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    macs: int


class Shapes:
    """Shapes of a program's values for its example inputs, free sizes put in.

    Capture may have traced other sizes than the example's (a batch of 1 is traced with another one).
    """

    def __init__(self, program: Program) -> None:
        leaves = program.signature.flatten(*program.example)
        self._values = {s.name: s.value for s in free_sizes(program.placeholders(), leaves)}
        self._known: dict[Any, int] = {}

    def __call__(self, node: Any) -> tuple[int, ...]:
        """Shape of the (first) tensor that ``node`` yields; ``()`` for anything else."""
        value = node.meta.get("val") if isinstance(node, Node) else None
        while isinstance(value, (list, tuple)) and value:
            value = value[0]
        return tuple(self.size(s) for s in value.shape) if isinstance(value, Tensor) else ()

    def size(self, size: Any) -> int:
        """A size as a number; one that depends on data is as large as when it was traced, or 1."""
        if isinstance(size, int):
            return size
        expression = size.node.expr
        if expression not in self._known:
            named = {s: self._values[str(s)] for s in expression.free_symbols if str(s) in self._values}
            found = expression.subs(named)
            traced = size.node.hint if size.node.has_hint() else 1
            self._known[expression] = int(found) if found.is_number else int(traced)
        return self._known[expression]


def layer_table(program: Program) -> list[LayerRow]:
    """Layers with parameters and products of activations, in execution order.

    The MACs of all rows add up to `count_macs`, their parameters to the parameters the graph reads.
    """
    rows = []
    seen: set[int] = set()
    shapes = Shapes(program)
    for node in program.graph.nodes:
        if node.op not in ("call_module", "call_function"):
            continue
        macs = node_macs(program, node, shapes)
        read = _parameters(program, node)
        fresh = {id(p): p.numel() for p in read if id(p) not in seen}
        seen |= set(fresh)
        if macs or read:
            rows.append(LayerRow(_name(node), _kind(program, node), shapes(node), sum(fresh.values()), macs))
    return rows


def count_parameters(program: Program) -> int:
    """Number of parameters; tied ones count once."""
    return sum(p.numel() for p in program.gm.parameters())


def count_macs(program: Program) -> int:
    """Multiply-accumulates of convolutions, linear layers, matrix products, attention, LSTM and GRU for the example.

    Elementwise work (norms, activations, biases, softmax) is not counted. A convolution counts its padded positions,
    and attention with a mask counts the masked positions, as the kernels compute them.
    """
    shapes = Shapes(program)
    return sum(node_macs(program, node, shapes) for node in program.graph.nodes)


def node_macs(program: Program, node: Node, shapes: Shapes | None = None) -> int:
    """Multiply-accumulates of one node; 0 for everything elementwise.

    Args:
        program: The program.
        node: One of its nodes.
        shapes: The program's, when many nodes are counted.
    """
    shape = Shapes(program) if shapes is None else shapes
    if node.op == "call_module":
        return _module_macs(node, program.module(node), shape)
    if node.op != "call_function":
        return 0
    count = _FUNCTIONS.get(getattr(node.target, "overloadpacket", None))
    return count(node, shape) if count is not None else 0


def _module_macs(node: Node, module: nn.Module, shape: Shapes) -> int:
    if isinstance(module, _CONVS):
        return math.prod(shape(node)) * math.prod(module.weight.shape[1:])
    if isinstance(module, _TRANSPOSED):
        return math.prod(shape(node.args[0])) * math.prod(module.weight.shape[1:])
    if isinstance(module, (nn.Linear, TransposedLinear)):
        return math.prod(shape(node)) * module.in_features
    if isinstance(module, _RECURRENT):
        matrices = sum(p.numel() for n, p in module.named_parameters() if n.startswith("weight"))
        return math.prod(shape(node.args[0])[:-1]) * matrices
    return 0


def _parameters(program: Program, node: Node) -> list[Tensor]:
    """Parameters that ``node`` reads: its module's, and those it takes straight from a ``get_attr``."""
    own: list[Tensor] = list(program.module(node).parameters()) if node.op == "call_module" else []
    read = [program.tensor(n) for n in node.all_input_nodes if n.op == "get_attr"]
    return own + [t for t in read if isinstance(t, nn.Parameter)]


def _name(node: Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def _kind(program: Program, node: Node) -> str:
    if node.op == "call_module":
        return type(program.module(node)).__name__
    schema = getattr(node.target, "_schema", None)
    return str(schema.name).rpartition("::")[2] if schema is not None else getattr(node.target, "__name__", "function")


def _argument(node: Node, index: int) -> Any:
    """Argument ``index`` of the operator's schema, given by position or by name; its default otherwise."""
    if index < len(node.args):
        return node.args[index]
    schema = cast(Any, node.target)._schema.arguments[index]
    return node.kwargs.get(schema.name, schema.default_value)


Count = Callable[[Node, Shapes], int]


def _product(operand: int) -> Count:
    """MACs of a matrix product whose inner dimension is the last one of argument ``operand``."""
    return lambda node, shape: math.prod(shape(node)) * shape(_argument(node, operand))[-1]


def _conv_macs(node: Node, shape: Shapes) -> int:
    return math.prod(shape(node)) * math.prod(shape(_argument(node, 1))[1:])


def _conv_transpose_macs(node: Node, shape: Shapes) -> int:
    return math.prod(shape(_argument(node, 0))) * math.prod(shape(_argument(node, 1))[1:])


def _convolution_macs(node: Node, shape: Shapes) -> int:
    """``aten.convolution``, where argument 6 says whether it is transposed."""
    return _conv_transpose_macs(node, shape) if _argument(node, 6) else _conv_macs(node, shape)


def _attention_macs(node: Node, shape: Shapes) -> int:
    query, key, value = (shape(_argument(node, i)) for i in range(3))
    scores = math.prod(query[:-1]) * key[-2]
    return scores * query[-1] + scores * value[-1]


def _recurrent_macs(node: Node, shape: Shapes) -> int:
    """A functional LSTM/GRU/RNN: argument 2 lists the weights (matrices) and biases (vectors)."""
    weights = [shape(p) for p in _argument(node, 2)]
    return math.prod(shape(_argument(node, 0))[:-1]) * sum(math.prod(s) for s in weights if len(s) == 2)


def _cell_macs(node: Node, shape: Shapes) -> int:
    """One step of a recurrent cell: arguments 2 and 3 are the matrices."""
    return math.prod(shape(_argument(node, 0))[:-1]) * sum(math.prod(shape(_argument(node, i))) for i in (2, 3))


def _einsum_macs(node: Node, shape: Shapes) -> int:
    """Contracted from left to right, as torch does; a step that sums nothing over two operands is elementwise."""
    inputs, result = str(_argument(node, 0)).replace(" ", "").split("->")
    operands = [shape(n) for n in _argument(node, 1)]
    terms = [_labels(t, len(s)) for t, s in zip(inputs.split(","), operands, strict=True)]
    sizes: dict[str, int] = {}
    for term, lengths in zip(terms, operands, strict=True):
        for label, size in zip(term, lengths, strict=True):
            sizes[label] = max(size, sizes.get(label, 1))
    final = set(_labels(result, len(shape(node))))
    total, left = 0, set(terms[0])
    for i, term in enumerate(terms[1:], 1):
        used = left | set(term)
        left = used & (final | {label for later in terms[i + 1 :] for label in later})
        total += math.prod(sizes[label] for label in used) if left != used else 0
    return total


def _labels(term: str, dims: int) -> list[str]:
    """Labels of an einsum term, the dimensions of ``...`` counted from the right."""
    before, dots, after = term.partition("...")
    hidden = dims - len(before) - len(after) if dots else 0
    return [*before, *(f"...{hidden - i}" for i in range(hidden)), *after]


_FUNCTIONS: dict[Any, Count] = {
    **dict.fromkeys((_aten.matmul, _aten.mm, _aten.bmm, _aten.mv, _aten.dot, _aten.linear), _product(0)),
    **dict.fromkeys((_aten.addmm, _aten.baddbmm, _aten.addmv), _product(1)),
    **dict.fromkeys((_aten.conv1d, _aten.conv2d, _aten.conv3d), _conv_macs),
    **dict.fromkeys((_aten.conv_transpose1d, _aten.conv_transpose2d, _aten.conv_transpose3d), _conv_transpose_macs),
    **dict.fromkeys((_aten.lstm_cell, _aten.gru_cell, _aten.rnn_tanh_cell, _aten.rnn_relu_cell), _cell_macs),
    **dict.fromkeys((_aten.lstm, _aten.gru, _aten.rnn_tanh, _aten.rnn_relu), _recurrent_macs),
    **dict.fromkeys(
        (_aten.scaled_dot_product_attention, _aten._scaled_dot_product_flash_attention_for_cpu), _attention_macs
    ),
    _aten.convolution: _convolution_macs,
    _aten.einsum: _einsum_macs,
}
