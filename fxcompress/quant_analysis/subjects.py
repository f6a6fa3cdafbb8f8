"""What a quantization report has rows for: quantized layers, and values that are rounded without a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn
from torch.fx import Interpreter, Node
from torch.fx.node import map_arg

from fxcompress.ir import Program, clone_tree
from fxcompress.quant.fake_quantize import QUANTIZERS
from fxcompress.quant.placement import is_move, layer_kind, layer_name
from fxcompress.quant.sequence_layers import QuantizedLSTM

__all__ = ["Runner", "Subject", "Values", "find_subjects"]

#: Values of nodes.
Values = dict[Node, Any]


@dataclass
class Subject:
    """A layer with everything that rounds for it, or one rounded value.

    Attributes:
        name: Path of the layer, or the value.
        kind: ``conv``, ``conv_transpose``, ``linear``, another layer's class in small letters, or ``value``: a value
            that something else than a layer reads rounded (an add, a concat, an output).
        nodes: Every call of the layer; the quantizer itself for a value.
        inputs: Quantizers of what a call reads: argument -> module. A functional layer's weight is among them.
        weights: The arguments of ``inputs`` that are weights.
    """

    name: str
    kind: str
    nodes: list[Node] = field(default_factory=list)
    inputs: dict[Node, dict[Node, nn.Module]] = field(default_factory=dict)
    weights: set[Node] = field(default_factory=set)

    @property
    def is_value(self) -> bool:
        """True for a value without a layer."""
        return self.kind == "value"


def find_subjects(program: Program) -> list[Subject]:
    """Rows of a report, in execution order."""
    found: dict[str, Subject] = {}
    for node in program.graph.nodes:
        kind = _kind(program, node)
        if kind is None:
            continue
        inputs = {a: q for a in node.all_input_nodes if (q := quantizer_behind(program, a)) is not None}
        if not inputs and not any(_holds_quantizer(program, node)):
            continue
        name = layer_name(node)
        subject = found.setdefault(name, Subject(name, kind))
        subject.nodes.append(node)
        subject.inputs[node] = inputs
        subject.weights |= {a for a in inputs if _origin(a).op == "get_attr"}
    layers = {node for subject in found.values() for node in subject.nodes}
    for node, module in program.layers():
        if isinstance(module, QUANTIZERS) and _origin(node).op != "get_attr" and not _read_by(node, layers):
            name = layer_name(cast(Node, node.args[0])) if _is_layer(program, node) else cast(Node, node.args[0]).name
            found[f"value {node.name}"] = Subject(name, "value", [node], {node: {}})
    place = {node: i for i, node in enumerate(program.graph.nodes)}
    return sorted(found.values(), key=lambda s: place[s.nodes[0]])


def quantizer_behind(program: Program, node: Node) -> nn.Module | None:
    """The quantizer whose result ``node`` is, moved at most; None when there is none."""
    while is_move(node):
        node = node.all_input_nodes[0]
    module = program.module(node) if node.op == "call_module" else None
    return module if isinstance(module, QUANTIZERS) else None


def _origin(node: Node) -> Node:
    """What the quantizer behind ``node`` rounds."""
    while is_move(node):
        node = node.all_input_nodes[0]
    return cast(Node, node.args[0]) if node.op == "call_module" else node


def _kind(program: Program, node: Node) -> str | None:
    kind = layer_kind(program, node)
    if kind is None and node.op == "call_module" and any(_holds_quantizer(program, node)):
        return type(program.module(node)).__name__.removeprefix("Quantized").lower()
    return kind


def _holds_quantizer(program: Program, node: Node) -> Iterator[bool]:
    """True for every quantizer inside the layer that ``node`` calls; none when it calls a quantizer itself."""
    module = program.module(node) if node.op == "call_module" else None
    if module is not None and not isinstance(module, QUANTIZERS):
        yield from (True for m in module.modules() if isinstance(m, QUANTIZERS))


def _is_layer(program: Program, quantizer: Node) -> bool:
    source = cast(Node, quantizer.args[0])
    return source.op == "call_module" and not isinstance(program.module(source), QUANTIZERS)


def _read_by(node: Node, layers: set[Node]) -> bool:
    """True when layers alone read the value of ``node``, moved at most."""
    return all(user in layers or (is_move(user) and _read_by(user, layers)) for user in node.users)


class Runner:
    """Runs the nodes of a quantized program, with any part of its rounding left out.

    A float run is the program without any rounding: quantizers pass values on, layers use their float weights.

    Args:
        program: Not changed.
        floats: Other float weights: path of a layer -> its weight.
    """

    def __init__(self, program: Program, floats: Mapping[str, Tensor]) -> None:
        self.program = program
        self.order: list[Node] = list(program.graph.nodes)
        self.position = {node: i for i, node in enumerate(self.order)}
        self._dead = Interpreter(program.gm).user_to_last_uses
        self._inputs = {node: i for i, node in enumerate(program.placeholders())}
        self._plain = {str(n.target): _without_rounding(m, floats.get(str(n.target))) for n, m in program.layers()}

    def floated(self, node: Node, values: Values, leaves: list[Any]) -> Any:
        """Result of ``node`` without rounding."""
        if node.op == "placeholder":
            return leaves[self._inputs[node]]
        if node.op == "get_attr":
            return self.program.tensor(node)
        return self._called(node, lambda n: values[n], plain=True)

    def rounded(self, node: Node, values: Values, leaves: list[Any]) -> Any:
        """Result of ``node`` as the program computes it."""
        if node.op in ("placeholder", "get_attr"):
            return self.floated(node, values, leaves)
        return self._called(node, lambda n: values[n], plain=False)

    def alone(self, subject: Subject, node: Node, values: Values, *, weight: bool = True, inputs: bool = True) -> Any:
        """Result of a call of ``subject`` on unrounded ``values``, its own rounding on.

        Args:
            subject: The subject.
            node: One of its nodes.
            values: Of a float run.
            weight: Round its weight.
            inputs: Round its inputs.
        """
        quantizers = subject.inputs[node]

        def read(argument: Node) -> Any:
            on = weight if argument in subject.weights else inputs
            value = values[argument]
            return quantizers[argument](value) if on and argument in quantizers else value

        return self._called(node, read, plain=not weight)

    def rest(self, subject: Subject, node: Node, result: Any, values: Values) -> Values:
        """Float run behind ``node``, whose result is given; other calls of ``subject`` are rounded as well.

        Returns:
            The values that are alive at the end: the outputs.
        """
        values = {**values, node: result}
        others = set(subject.nodes)
        for other in self.order[self.position[node] + 1 :]:
            if other.op in ("output", "placeholder"):
                continue
            if other in others:
                values[other] = self.alone(subject, other, values)
            else:
                values[other] = self.floated(other, values, [])
            self.forget(other, values)
        return values

    def forget(self, node: Node, values: Values) -> None:
        """Drop what nobody reads behind ``node``."""
        for gone in self._dead.get(node, ()):
            values.pop(gone, None)

    def _called(self, node: Node, read: Callable[[Node], Any], *, plain: bool) -> Any:
        args, kwargs = map_arg((node.args, node.kwargs), read)
        if node.op == "call_module":
            module = self._plain[str(node.target)] if plain else self.program.module(node)
            return module(*args, **kwargs)
        return cast(Callable[..., Any], node.target)(*args, **kwargs)


class _Pass(nn.Module):
    """In the place of a quantizer: returns what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def _without_rounding(module: nn.Module, weight: Tensor | None) -> nn.Module:
    """``module`` with quantizers that pass values on, and another weight when one is given."""
    if isinstance(module, QUANTIZERS):
        return _Pass()
    if weight is None and not any(isinstance(m, QUANTIZERS) for m in module.modules()):
        return module
    new = clone_tree(module)
    for part in list(new.modules()):
        for name, child in part._modules.items():
            if isinstance(child, QUANTIZERS):
                part._modules[name] = _Pass()
        if isinstance(part, QuantizedLSTM):
            part.dynamic = False
    if weight is not None:
        new._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    return new
