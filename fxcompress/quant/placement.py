"""Where fake-quantizers go: which layers a scheme quantizes, which values must be integers, which share a scale.

The walk goes backwards once. A value is *demanded* when an integer operator reads it: a quantized layer, a join (add,
concat ...) whose own result is demanded, or a data movement (reshape, max-pool ...) all of whose readers want integers.
Quantizers are put where a demanded value is made by something that is not such a movement, so one quantizer serves
every reader, and nothing that only float operators read is rounded.
"""

from __future__ import annotations

import fnmatch
import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxcompress.ir import Program
from fxcompress.layers import WEIGHTED_LAYERS, Fused, TransposedLinear, cannot_fuse
from fxcompress.quant.scheme import QuantScheme

__all__ = ["Placement", "is_move", "layer_kind", "layer_name", "place", "weight_axis"]

_aten = torch.ops.aten
#: Move data without arithmetic (max is monotonic): quantizing before or after is the same.
_MOVES = {
    _aten.view, _aten.reshape, _aten.permute, _aten.transpose, _aten.flatten, _aten.squeeze, _aten.unsqueeze,
    _aten.slice, _aten.select, _aten.expand, _aten.clone, _aten.contiguous, _aten.unflatten, _aten.t,
    _aten.max_pool1d, _aten.max_pool2d, _aten.max_pool3d, _aten.adaptive_max_pool2d, _aten.pixel_shuffle,
    _aten.pixel_unshuffle, _aten.channel_shuffle, _aten.roll, _aten.flip, _aten.upsample_nearest1d,
    _aten.upsample_nearest2d, _aten.upsample_nearest3d, _aten.split, _aten.chunk, _aten.split_with_sizes,
    _aten.unbind, _aten.repeat, _aten.alias, _aten.narrow, _aten.detach, _aten.swapaxes, _aten.movedim,
    _aten.index_select, _aten.reflection_pad1d, _aten.reflection_pad2d, _aten.reflection_pad3d,
    _aten.replication_pad1d, _aten.replication_pad2d, _aten.replication_pad3d,
}  # fmt: skip
_JOINS = {
    "add": {_aten.add},
    "mul": {_aten.mul},
    "cat": {_aten.cat, _aten.concat},
    "sigmoid": {_aten.sigmoid},
    "silu": {_aten.silu},
    "avg_pool": {_aten.adaptive_avg_pool2d, _aten.avg_pool2d, _aten.adaptive_avg_pool1d, _aten.mean},
}
_CLIPS = {"relu": _aten.relu, "relu6": _aten.relu6, "hardtanh": _aten.hardtanh}
_FUNCTIONAL = {
    "linear": {_aten.linear.default},
    "conv": {op for p in (_aten.conv1d, _aten.conv2d, _aten.conv3d) for op in (p.default, p.padding)},
}
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass
class Placement:
    """Result of `place`.

    Attributes:
        layers: Quantized layers in execution order (``call_module``, or a functional call with a parameter weight).
        values: Values to fake-quantize, in execution order, with the users that read the quantized one.
        groups: Sets of values on one grid (what meets in a concat); every value is in exactly one.
        same_scale: Sets of groups, each named by its first value, that share their scale and keep zero points of their
            own (what meets in an add).
        left: Layers left alone: name and reason.
    """

    layers: list[Node] = field(default_factory=list)
    values: dict[Node, list[Node]] = field(default_factory=dict)
    groups: list[list[Node]] = field(default_factory=list)
    same_scale: list[list[Node]] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)


def layer_kind(program: Program, node: Node) -> str | None:
    """``conv``, ``conv_transpose``, ``linear``, or None for a node that is no weighted layer."""
    if node.op == "call_module":
        module = program.module(node)
        if type(module) not in WEIGHTED_LAYERS and not isinstance(module, Fused):
            return None
        if isinstance(module, _CONVS):
            return "conv"
        return "conv_transpose" if isinstance(module, _TRANSPOSED) else "linear"
    return next((kind for kind, targets in _FUNCTIONAL.items() if node.target in targets), None)


def layer_name(node: Node) -> str:
    """Path of a layer, or of the weight of a functional one; its node's name when the weight is computed."""
    if node.op == "call_module":
        return str(node.target)
    weight = cast(Node, node.args[1])
    if weight.op == "call_module":  # its fake-quantizer
        weight = cast(Node, weight.args[0])
    return str(weight.target) if weight.op == "get_attr" else node.name


def weight_axis(module: nn.Module) -> int:
    """Output-channel axis of a layer's weight."""
    return 1 if isinstance(module, (*_TRANSPOSED, TransposedLinear)) else 0


def place(program: Program, scheme: QuantScheme, ignore: Iterable[str] = ()) -> Placement:
    """Decide what to quantize in ``program``.

    Args:
        program: Fused as far as the target fuses.
        scheme: The target's wishes.
        ignore: Globs over layer names (``features.0*``) to leave in floating point.
    """
    return _Placer(program, scheme, tuple(ignore)).run()


class _Placer:
    def __init__(self, program: Program, scheme: QuantScheme, ignore: tuple[str, ...]) -> None:
        self.program, self.scheme, self.ignore = program, scheme, ignore
        self.result = Placement()
        self.quantized: dict[Node, str] = {}  # layer -> kind
        self.joins: dict[Node, str] = {}
        self.demanded: set[Node] = set()
        self.ends: set[Node] = set()  # results of joins
        self.through: set[Node] = set()  # data movements between integers
        self.grids, self.scales = _Sets(), _Sets()

    def run(self) -> Placement:
        nodes = list(self.program.graph.nodes)
        for node in nodes:
            self._choose_layer(node)
        for node in reversed(nodes):
            self._demand(node)
        for node in nodes:
            self._place_value(node)
        self._share(nodes)
        self.result.groups = self.grids.of(self.result.values)
        leaders = [group[0] for group in self.result.groups]
        self.result.same_scale = [found for found in self.scales.of(leaders) if len(found) > 1]
        return self.result

    def _choose_layer(self, node: Node) -> None:
        kind = layer_kind(self.program, node)
        if kind is None:
            return
        name, reason = layer_name(node), self._left_because(node, kind)
        if reason:
            self.result.left.append((name, reason))
        else:
            self.quantized[node] = kind
            self.result.layers.append(node)

    def _left_because(self, node: Node, kind: str) -> str:
        if any(fnmatch.fnmatchcase(layer_name(node), glob) for glob in self.ignore):
            return "asked to be ignored"
        if kind not in self.scheme.layers:
            return f"the engine has no 8-bit {kind}"
        if not _is_float(node.args[0]):
            return "its input is not float32"
        if node.op == "call_function" and cast(Node, node.args[1]).op != "get_attr":
            return "its weight is computed in the graph"
        return (cannot_fuse(self.program.module(node)) or "") if node.op == "call_module" else ""

    def _demand(self, node: Node) -> None:
        """Called in reverse order: the users of ``node`` are decided already."""
        reads = [self._reads_integers(user, node) for user in node.users]
        if not any(reads) or not _is_float(node):
            return
        self.demanded.add(node)
        if is_move(node):
            if all(reads):
                self.through.add(node)
            return
        maker = self._clipped(node)
        join = self._join_of(maker)
        if join is not None and self._joins_integers(maker, join):
            self.joins[maker] = join
            self.ends.add(node)

    def _clipped(self, node: Node) -> Node:
        """The add whose kernel also does the clipping that ``node`` is; else ``node`` itself."""
        packet = getattr(node.target, "overloadpacket", None)
        if not any(packet is _CLIPS[name] for name in self.scheme.joined_activations):
            return node
        source = cast(Node, node.args[0])
        return source if len(source.users) == 1 and self._join_of(source) == "add" else node

    def _reads_integers(self, user: Node, value: Node) -> bool:
        if user in self.quantized:
            return value is user.args[0] or (user.op == "call_module" and value in user.args)
        return (user in self.joins and value is not self._float_operand(user)) or user in self.through

    def _float_operand(self, join: Node) -> Node | None:
        """The operand of an add that only the add reads, made by a quantized convolution whose kernel adds as well."""
        if not self.scheme.float_add_operand or self.joins[join] != "add":
            return None
        return next((i for i in join.all_input_nodes if self.quantized.get(i) == "conv" and len(i.users) == 1), None)

    def _join_of(self, node: Node) -> str | None:
        packet = getattr(node.target, "overloadpacket", None)
        return next((j for j in self.scheme.joins if packet in _JOINS[j]), None) if node.op == "call_function" else None

    def _joins_integers(self, node: Node, join: str) -> bool:
        """Adds and products only join integers when a convolution feeds them.

        Elsewhere (transformers, ConvNeXt) the residual stream stays in float.
        """
        inputs = node.all_input_nodes
        if not all(_is_float(i) for i in inputs):
            return False
        if join not in ("add", "mul"):
            return True
        plain = len(node.args) == 2 and all(isinstance(a, Node) for a in node.args) and not node.kwargs
        return plain and any(self.quantized.get(i) == "conv" for i in inputs)

    def _passes_integers(self, node: Node) -> bool:
        """The result already lies on its input's grid: no quantizer of its own."""
        if node in self.through:
            # An item of a tuple that something else than a movement made (an LSTM) is made here.
            return node.target is not operator.getitem or node.args[0] in self.through
        return self.joins.get(node) == "cat" and not self.scheme.requantize_cat

    def _place_value(self, node: Node) -> None:
        forced = self.quantized.get(node) in self.scheme.quantized_outputs
        if (node not in self.demanded and not forced) or self._passes_integers(node):
            return
        everyone = forced or node in self.ends
        users = [u for u in node.users if everyone or self._reads_integers(u, node)]
        if users and _is_float(node) and isinstance(node.meta["val"], Tensor):
            self.result.values[node] = users

    def _share(self, nodes: list[Node]) -> None:
        """One scale for all values that meet in an add, one grid for all that meet in a concat."""
        sources: dict[Node, list[Node]] = {}  # node -> the quantized values whose grid it is on
        for node in nodes:
            behind = [s for i in node.all_input_nodes for s in sources.get(i, [])]
            if node in self.result.values:
                sources[node] = [node]
            elif self._passes_integers(node):
                sources[node] = behind[:1]
            join = self.joins.get(node)
            if join == "cat":
                behind += [node] * self.scheme.requantize_cat
                self.grids.unite(behind)
            if join == "cat" or (join == "add" and not self.scheme.float_add_operand):
                self.scales.unite(behind)


class _Sets:
    """Disjoint sets of nodes (union-find)."""

    def __init__(self) -> None:
        self._parent: dict[Node, Node] = {}

    def _find(self, node: Node) -> Node:
        while self._parent.get(node, node) is not node:
            node = self._parent[node]
        return node

    def unite(self, nodes: list[Node]) -> None:
        for other in nodes[1:]:
            self._parent[self._find(other)] = self._find(nodes[0])

    def of(self, nodes: Iterable[Node]) -> list[list[Node]]:
        """``nodes`` by set, in the order given."""
        found: dict[Node, list[Node]] = {}
        for node in nodes:
            found.setdefault(self._find(node), []).append(node)
        return list(found.values())


def is_move(node: Node) -> bool:
    """True for an operator that only moves values: quantizing before or behind it is the same."""
    if node.op != "call_function":
        return False
    packet = getattr(node.target, "overloadpacket", None)
    if packet in (_aten.pad, _aten.constant_pad_nd):
        return _pads_with_zeros(node)
    return packet in _MOVES or node.target is operator.getitem


def _pads_with_zeros(node: Node) -> bool:
    """Zero is on every grid; a copy of border values is anyway."""
    value = node.args[-1]  # (x, pad, value) or (x, pad, mode, value), from the third on optional
    if node.target is _aten.pad.default and len(node.args) > 2:
        return node.args[2] != "constant" or len(node.args) < 4 or not value
    return len(node.args) < 3 or not value


def _is_float(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, Node) else None
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    return isinstance(value, Tensor) and value.dtype == torch.float32
