"""Channel factors that move from one place of a program to another without changing what it computes.

The input channels of linear layers are divided by one factor each, where they are made, and the layers' weights take
the factors up (Xiao et al., "SmoothQuant", 2023, equation 3; Lin et al., "AWQ", 2024, equation 2). They can be divided
where a norm, a vector multiplied to them, or a linear layer makes them. On the way there may be what treats factors
as it should: movements of data, positively homogeneous functions, products with something else, sums, the values of
attention. Where data is repeated on the way (grouped-query attention), channels share a factor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg

from fxcompress.ir import Program
from fxcompress.layers import Fused
from fxcompress.layerwise.store import WeightStore
from fxcompress.quant.placement import layer_kind, weight_axis
from fxcompress.rewrite import Analysis

__all__ = ["Migration", "find_migration"]

_aten = torch.ops.aten
#: Data movements: every result element is one element of the first argument.
_MOVES = {
    _aten.view, _aten.reshape, _aten.permute, _aten.transpose, _aten.unsqueeze, _aten.squeeze, _aten.expand,
    _aten.flatten, _aten.unflatten, _aten.slice, _aten.clone, _aten.contiguous, _aten.repeat_interleave, _aten.alias,
    _aten.detach, _aten.swapaxes, _aten.movedim, _aten.t,
}  # fmt: skip
#: f(s * x) = s * f(x) for s > 0.
_HOMOGENEOUS = {_aten.relu, _aten.leaky_relu, _aten.neg, _aten.dropout, _aten.to}
_SUMS = {_aten.add, _aten.sub}
_NORMS = (nn.LayerNorm, nn.RMSNorm)
_FUNCTIONAL_NORMS = {_aten.layer_norm, _aten.rms_norm}
_KEEPING = (nn.Dropout, nn.Identity)
#: Elements of a value whose movement is followed.
_LARGEST = 1 << 27


@dataclass
class Migration:
    """What changes when the channels of ``value`` are divided.

    Attributes:
        value: Its last dimension holds the channels.
        consumers: The linear layers that read it.
        groups: int64 [channels]: the factor of each channel, by number.
        count: Number of factors.
        made: Where the channels are made: module, name of its tensor, axis of the tensor, factor numbers along it.
        between: Values on the way, ``value`` included, with factor numbers that broadcast to them.
        producers: Names of the layers or parameters that make the channels.
    """

    value: Node
    consumers: list[Node]
    groups: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    count: int = 0
    made: list[tuple[nn.Module, str, int, Tensor]] = field(default_factory=list)
    between: dict[Node, Tensor] = field(default_factory=dict)
    producers: list[str] = field(default_factory=list)

    def pooled(self, channels: Tensor, reduce: str = "mean") -> Tensor:
        """Statistics [channels] of the channels as ones of the factors [count]: their ``mean`` or ``amax``."""
        start = torch.zeros(self.count, dtype=channels.dtype)
        return start.scatter_reduce(0, self.groups, channels, reduce, include_self=False)

    def apply(self, program: Program, store: WeightStore, factors: Tensor) -> dict[nn.Module, Tensor]:
        """Divide the channels by ``factors`` [count] where they are made, multiply the readers' weights by them.

        Returns:
            Linear layers that make the channels -> what the rows of their weights were divided by.
        """
        rows = {}
        for module, name, axis, numbers in self.made:
            tensor = cast(Tensor, getattr(module, name)).detach()
            divisor = factors.to(tensor)[numbers]
            store.put(module, name, tensor / divisor.reshape([-1 if i == axis else 1 for i in range(tensor.dim())]))
            if name == "weight" and tensor.dim() == 2:
                rows[module] = divisor
        for node in self.consumers:
            module = program.module(node)
            weight = cast(Tensor, module.weight).detach()
            factor = factors.to(weight)[self.groups]
            store.put(module, "weight", weight * (factor if weight_axis(module) == 0 else factor[:, None]))
        return rows

    def divisors(self, factors: Tensor) -> dict[Node, Tensor]:
        """What the values on the way are divided by."""
        return {node: factors[numbers] for node, numbers in self.between.items()}


def find_migration(analysis: Analysis, value: Node) -> Migration | str:
    """How the channels of ``value`` (its last dimension) can be divided, or why they cannot."""
    readers = list(value.users)
    for node in readers:
        reason = _no_consumer(analysis, node, value)
        if reason:
            return reason
    tracer = _Tracer(analysis, Migration(value, readers))
    return tracer.run()


def _no_consumer(analysis: Analysis, node: Node, value: Node) -> str:
    if node.op != "call_module" or layer_kind(analysis.program, node) != "linear":
        return f"{node.target if node.op == 'call_module' else node.name} reads it too"
    if sum(a is value for a in _operands(node)) != 1 or node.args[0] is not value:
        return f"{node.target} reads it twice"
    return _unusable(analysis, node)


def _unusable(analysis: Analysis, node: Node) -> str:
    """Why the tensors of a layer cannot be changed."""
    layer = analysis.program.module(node)
    if analysis.calls(node) > 1:
        return f"{node.target} is called more than once"
    other = analysis.shared_with(node)
    if other:
        return f"{node.target} shares a tensor with {other}"
    if isinstance(layer, Fused) and layer.weight_fake_quantize is not None:
        return f"{node.target} is quantized already"
    return ""


def _operands(node: Node) -> list[Node]:
    found: list[Node] = []
    map_arg((node.args, node.kwargs), found.append)
    return found


class _Tracer:
    """Walks backwards from the value; what it cannot pass is a reason."""

    def __init__(self, analysis: Analysis, migration: Migration) -> None:
        self.analysis, self.program, self.migration = analysis, analysis.program, migration
        shape = migration.value.meta["val"].shape
        self.parent = list(range(int(shape[-1])))

    def run(self) -> Migration | str:
        migration, dims = self.migration, self.migration.value.meta["val"].dim()
        start = torch.arange(len(self.parent)).reshape([1] * (dims - 1) + [-1])
        reason = self.trace(migration.value, start) or self._open_end()
        if reason:
            return reason
        roots = torch.tensor([self._root(i) for i in range(len(self.parent))])
        _, numbers = torch.unique(roots, return_inverse=True)
        migration.count = int(numbers.max()) + 1
        migration.groups = numbers
        migration.made = [(m, name, axis, numbers[labels]) for m, name, axis, labels in migration.made]
        migration.between = {node: numbers[labels] for node, labels in migration.between.items()}
        return migration

    def _open_end(self) -> str:
        """Why the factors do not stay on the way: something else reads a divided value, or a product is divided twice."""
        divided = self.migration.between
        for node in divided:
            outside = [u for u in node.users if u not in divided and u not in self.migration.consumers]
            if outside:
                return f"{outside[0].name} reads {node.name} too"
            inputs = [n for n in _operands(node) if n in divided]
            if len(inputs) > 1 and _packet(node) not in _SUMS:
                return f"{node.name} would be divided twice"
        return ""

    # ------------------------------------------------------------------------------------------------ one node
    def trace(self, node: Node, labels: Tensor) -> str:
        """Divide ``node``, whose elements have the factors ``labels`` (broadcast); a reason when that cannot be."""
        known = self.migration.between.get(node)
        if known is not None:
            self._unite(*(t.flatten() for t in torch.broadcast_tensors(known, labels)))
            return ""
        self.migration.between[node] = labels
        if node.op == "call_module":
            return self._module(node, labels)
        if node.op == "call_function":
            return self._function(node, labels)
        return "it is an input of the model" if node.op == "placeholder" else f"{node.target} is read as it is"

    def _module(self, node: Node, labels: Tensor) -> str:
        module: Any = self.program.module(node)
        if isinstance(module, _KEEPING):
            return self.trace(cast(Node, node.args[0]), labels)
        linear = layer_kind(self.program, node) == "linear"
        norm = isinstance(module, _NORMS) and len(module.normalized_shape) == 1 and module.weight is not None
        if not linear and not norm:
            return f"{node.target} ({type(module).__name__}) does not pass factors on"
        if labels.numel() != labels.shape[-1]:
            return f"{node.target} counts channels on another axis"
        if isinstance(module, Fused) and (len(node.args) > 1 or not _passes(module)):
            return f"{node.target} is fused with what does not pass factors on"
        reason = _unusable(self.analysis, node)
        if reason:
            return reason
        self.migration.producers.append(str(node.target))
        self.migration.made.append((module, "weight", weight_axis(module) if linear else 0, labels.flatten()))
        if getattr(module, "bias", None) is not None:
            self.migration.made.append((module, "bias", 0, labels.flatten()))
        return ""

    def _function(self, node: Node, labels: Tensor) -> str:
        packet = _packet(node)
        if packet in _MOVES:
            return self._move(node, labels)
        if packet in _HOMOGENEOUS:
            return self.trace(cast(Node, node.args[0]), labels)
        if packet in _SUMS:
            return self._sum(node, labels)
        if packet is _aten.mul:
            return self._product(node, labels)
        if packet is _aten.div and isinstance(node.args[0], Node):
            return self.trace(node.args[0], labels)
        if packet is _aten.scaled_dot_product_attention:
            return self._attention(node, labels)
        if packet in _FUNCTIONAL_NORMS:
            return self._functional_norm(node, labels)
        if packet in (_aten.matmul, _aten.bmm):
            return self._weighted_mean(node, cast(Node, node.args[1]), labels)
        return f"{node.name} ({node.target}) does not pass factors on"

    def _functional_norm(self, node: Node, labels: Tensor) -> str:
        """A norm without a layer: its weight takes the factors, and its bias."""
        vectors = node.args[2:4] if _packet(node) is _aten.layer_norm else node.args[2:3]
        given = [v for v in vectors if isinstance(v, Node)]
        if not given or given[0] is not node.args[2] or len(cast(Any, node.args[1])) != 1:
            return f"{node.name} has no weight, or normalizes several dimensions"
        if labels.numel() != labels.shape[-1]:
            return f"{node.name} counts channels on another axis"
        if any(vector.op != "get_attr" for vector in given):
            return f"the weight of {node.name} is computed"
        return next((reason for vector in given if (reason := self._parameter(vector, labels))), "")

    def _sum(self, node: Node, labels: Tensor) -> str:
        if len(node.args) != 2 or not all(isinstance(a, Node) for a in node.args):
            return f"{node.name} adds a number"
        return next((reason for a in node.args if (reason := self._operand(node, cast(Node, a), labels))), "")

    def _product(self, node: Node, labels: Tensor) -> str:
        """One of the two operands takes the factors: a vector of parameters before all else."""
        operands = sorted((a for a in node.args if isinstance(a, Node)), key=lambda a: a.op != "get_attr")
        reasons = []
        for operand in operands:
            saved = self._snapshot()
            reason = self._operand(node, operand, labels)
            if not reason:
                return ""
            self._restore(saved)
            reasons.append(reason)
        return "; ".join(reasons) or f"{node.name} multiplies by a number"

    def _operand(self, node: Node, operand: Node, labels: Tensor) -> str:
        value = operand.meta.get("val")
        if not isinstance(value, Tensor):
            return f"{operand.name} is no tensor"
        extra = labels.dim() - value.dim()
        if any(size != 1 for size in labels.shape[: max(extra, 0)]):
            return f"{operand.name} is the same for all channels"
        own = labels[(0,) * extra] if extra > 0 else labels
        if operand.op == "get_attr":
            return self._parameter(operand, own)
        broadcast = [d for d in range(value.dim()) if own.shape[d] != 1 and value.shape[d] != own.shape[d]]
        return f"{operand.name} is the same for all channels" if broadcast else self.trace(operand, own)

    def _parameter(self, node: Node, labels: Tensor) -> str:
        """A vector over the channels that is read without a layer, such as the weight of a spelled-out norm."""
        path, _, name = str(node.target).rpartition(".")
        holder, value = self.program.gm.get_submodule(path), self.program.tensor(node)
        readers = [n for n in self.program.graph.nodes if n.op == "get_attr" and self.program.tensor(n) is value]
        vector = value.dim() >= 1 and value.numel() == value.shape[-1] == labels.numel()
        if len(readers) > 1 or len(node.users) > 1 or not vector or getattr(holder, name, None) is not value:
            return f"{node.target} is no vector over the channels, or is shared"
        self.migration.producers.append(str(node.target))
        self.migration.made.append((holder, name, value.dim() - 1, labels.flatten()))
        return ""

    def _attention(self, node: Node, labels: Tensor) -> str:
        """The values of attention; its weights sum over tokens only."""
        value = cast(Node, node.args[2])
        query, heads = cast(Node, node.args[0]).meta["val"], value.meta["val"].shape
        if labels.shape[-2] != 1:
            return f"{node.name} mixes tokens that have factors of their own"
        if query.shape[1] != heads[1]:  # grouped-query attention in the operator itself
            small = (1, _hint(heads[1]), 1, _hint(heads[3]))
            repeated = torch.arange(small[1] * small[3]).reshape(small).repeat_interleave(query.shape[1] // small[1], 1)
            labels = self._behind(repeated, small, labels)
        return self._weighted_mean(node, value, labels)

    def _weighted_mean(self, node: Node, value: Node, labels: Tensor) -> str:
        """Sums over the next-to-last dimension of ``value``."""
        if labels.shape[-2] != 1 or value.meta["val"].dim() != labels.dim():
            return f"{node.name} mixes what has factors of its own"
        if sum(a is value for a in _operands(node)) != 1:
            return f"{node.name} reads {value.name} twice"
        return self.trace(value, labels)

    # ------------------------------------------------------------------------------------------------ movements
    def _move(self, node: Node, labels: Tensor) -> str:
        """Carry labels in front of a movement by moving the numbers of the elements."""
        source, function = cast(Node, node.args[0]), cast(Any, node.target)
        shape = tuple(_hint(size) for size in source.meta["val"].shape)
        total = math.prod(shape)
        if total > _LARGEST:
            return f"{source.name} is too large to be followed"
        args, kwargs = map_arg((node.args[1:], node.kwargs), lambda n: _hint(n.meta["val"]))
        moved = function(torch.arange(total).reshape(shape), *args, **kwargs)
        before = self._behind(moved, shape, labels)
        return f"{node.name} reads {source.name} in part" if bool((before < 0).any()) else self.trace(source, before)

    def _behind(self, moved: Tensor, shape: tuple[int, ...], labels: Tensor) -> Tensor:
        """Labels of a tensor of ``shape`` whose elements went to ``moved``; -1 for those that went nowhere."""
        wanted, places = labels.expand(moved.shape).reshape(-1), moved.reshape(-1)
        before = torch.full((math.prod(shape),), -1)
        before[places] = wanted
        self._unite(before[places], wanted)
        return self._collapsed(before.reshape(shape))

    def _collapsed(self, labels: Tensor) -> Tensor:
        """Size 1 along every dimension on which the factors do not differ."""
        roots = torch.tensor([*(self._root(i) for i in range(len(self.parent))), -1])  # -1 stays -1
        labels = roots[labels]
        for dim in range(labels.dim()):
            first = labels.narrow(dim, 0, 1)
            if bool((labels == first).all()):
                labels = first
        return labels.contiguous()

    def _unite(self, first: Tensor, second: Tensor) -> None:
        pairs = torch.stack([first, second], 1)[first != second]
        for a, b in torch.unique(pairs, dim=0).tolist() if len(pairs) else []:
            self.parent[self._root(a)] = self._root(b)

    def _root(self, label: int) -> int:
        while self.parent[label] != label:
            label = self.parent[label]
        return label

    def _snapshot(self) -> tuple[Any, ...]:
        m = self.migration
        return list(self.parent), dict(m.between), list(m.made), list(m.producers)

    def _restore(self, saved: tuple[Any, ...]) -> None:
        self.parent, self.migration.between, self.migration.made, self.migration.producers = saved


def _packet(node: Node) -> Any:
    return getattr(node.target, "overloadpacket", None)


def _passes(layer: Fused) -> bool:
    return layer.activation is None or layer.activation.name in ("relu", "leaky_relu")


def _hint(value: Any) -> Any:
    return value if isinstance(value, int) else int(value.node.hint)
