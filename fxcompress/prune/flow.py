"""Flow: what is known about every value of a program while its graph is walked for channel dependencies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from fxcompress.ir import Program
from fxcompress.prune.labels import FREE, Column, Columns, Floats, Ints, Labels

__all__ = ["Cost", "Flow", "MovedConstant", "Shuffle", "Value", "is_zero"]

#: Free sizes are walked with these lengths: primes, so that a view of a free size cannot be mistaken for another one.
_LENGTHS = (11, 13, 17, 19, 23, 29, 31, 37)


@dataclass(frozen=True, eq=False)
class Value:
    """One tensor: its sizes (free ones as small primes) and what every dimension carries."""

    sizes: tuple[int, ...]
    dims: tuple[Columns, ...]

    def dim(self, index: int) -> int:
        """A dimension counted from the front."""
        return index % max(len(self.sizes), 1)


@dataclass(frozen=True, eq=False)
class Cost:
    """Multiply-accumulates of one node that shrink with each of these dimensions: ``share`` of the node's total."""

    node: str
    share: float
    dims: tuple[Columns, ...]


@dataclass(frozen=True, eq=False)
class MovedConstant:
    """A layer whose bias takes over what removed input channels held: ``weight[:, gone] @ fill[gone]``."""

    node: str
    layer: str
    columns: Columns


@dataclass(frozen=True, eq=False)
class Shuffle:
    """Channels that a view, a transposition and a view only reorder: result index ``i`` is ``order[i]`` of ``source``."""

    source: Node
    dim: int
    order: Ints


@dataclass
class Flow:
    """State of the walk.

    Attributes:
        program: Walked, not changed.
        width: Dimensions that a norm's statistics run over may go, too.
        labels: The channels' atoms.
        values: What each node yields: a Value, a list of them, or None.
        tensors: Value of each parameter or buffer by its identity, with its first name.
        readers: ``(tensor name, dim)`` that read channels.
        makers: ``(tensor name, dim)`` that make channels, whatever else they do (a tied embedding does both).
        layers: Tensor name -> (layer path, node name) that uses it first.
        outputs: Layer node -> dimension of its (first) output that holds its channels.
        costs: Multiply-accumulates.
        moved: Constants that move into a bias.
        statistics: Nodes whose statistics run over a prunable dimension, with that dimension (``width`` only).
        tags: Kinds of channels by atoms: heads, positions in a head, groups.
        unknown: Nodes that pinned what flows through them, and why.
        shuffles: Nodes that end a reordering of channels.
        calls: How often each layer is called.
    """

    program: Program
    width: bool = False
    labels: Labels = field(default_factory=Labels)
    values: dict[Node, Any] = field(default_factory=dict)
    tensors: dict[int, tuple[str, Value]] = field(default_factory=dict)
    readers: set[tuple[str, int]] = field(default_factory=set)
    makers: set[tuple[str, int]] = field(default_factory=set)
    layers: dict[str, tuple[str, str]] = field(default_factory=dict)
    outputs: dict[str, int] = field(default_factory=dict)
    costs: list[Cost] = field(default_factory=list)
    moved: list[MovedConstant] = field(default_factory=list)
    statistics: dict[str, Columns] = field(default_factory=dict)
    tags: list[tuple[Columns, str]] = field(default_factory=list)
    unknown: dict[str, str] = field(default_factory=dict)
    shuffles: dict[str, Shuffle] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    _lengths: dict[Any, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.calls.update(str(n.target) for n in self.program.graph.nodes if n.op == "call_module")

    # ------------------------------------------------------------------------------------------- values
    def size(self, size: Any) -> int:
        """A recorded size as a number."""
        if not isinstance(size, torch.SymInt):
            return int(size)
        expression = size.node.expr
        if expression not in self._lengths:
            for symbol in sorted(expression.free_symbols, key=str):
                known = sum(1 for e in self._lengths if getattr(e, "is_Symbol", False))
                self._lengths.setdefault(symbol, _LENGTHS[known % len(_LENGTHS)])
            found = expression.subs({s: self._lengths[s] for s in expression.free_symbols})
            self._lengths[expression] = int(found) if found.is_number else 1
        return self._lengths[expression]

    def sizes(self, val: Any) -> tuple[int, ...]:
        """Sizes of a recorded tensor."""
        return tuple(self.size(s) for s in val.shape)

    def plain(self, val: Any) -> Any:
        """Values for what a node records, nothing of which can go."""
        if isinstance(val, Tensor):
            sizes = self.sizes(val)
            return Value(sizes, ((),) * len(sizes))
        if isinstance(val, (list, tuple)):
            return [self.plain(v) for v in val]
        return None

    def of(self, arg: Any) -> Value | None:
        """The Value of an argument; None when it is no tensor."""
        found = self.values.get(arg) if isinstance(arg, Node) else None
        return found if isinstance(found, Value) else None

    def tensor(self, name: str, tensor: Tensor, layer: str, node: str, dims: Sequence[int]) -> Value:
        """Value of a parameter or buffer whose ``dims`` may shrink; the same one at every use."""
        known = self.tensors.get(id(tensor))
        if known is None:
            own = [
                (self.labels.column(n, self._own_fill(tensor, d), (name, d)),) if d in dims and n > 1 else ()
                for d, n in enumerate(tensor.shape)
            ]
            known = self.tensors[id(tensor)] = (name, Value(tuple(tensor.shape), tuple(own)))
            self.layers[name] = (layer, node)
        return known[1]

    def _own_fill(self, tensor: Tensor, dim: int) -> Floats | float:
        """Parameters are zeroed where channels go. A buffer keeps its values: constants, if they differ along ``dim`` only."""
        if isinstance(tensor, torch.nn.Parameter):
            return 0.0
        if not (tensor.is_floating_point() and tensor.device.type != "meta"):
            return np.nan
        rows = tensor.detach().double().movedim(dim, 0).reshape(tensor.shape[dim], -1)
        uniform = (rows == rows[:, :1]).all(dim=1)
        return torch.where(uniform, rows[:, 0], torch.full_like(rows[:, 0], torch.nan)).numpy()

    def columns(self, value: Value, dim: int) -> Columns:
        """What a dimension carries now."""
        return self.labels.resolve(value.dims[value.dim(dim)])

    # ------------------------------------------------------------------------------------------- pin
    def pin(self, columns: Columns, node: Node | str, reason: str) -> None:
        """Nothing of ``columns`` may go."""
        if columns:
            self.labels.pin(columns, f"{node}: {reason}")

    def pin_value(self, value: Any, node: Node | str, reason: str, dims: Sequence[int] | None = None) -> None:
        """Nothing of a value may go, or of some of its dimensions."""
        if isinstance(value, list):
            for item in value:
                self.pin_value(item, node, reason)
        elif isinstance(value, Value):
            for d in range(len(value.sizes)) if dims is None else [value.dim(d) for d in dims]:
                self.pin(value.dims[d], node, reason)

    def give_up(self, node: Node, reason: str) -> Any:
        """Pin everything that flows into ``node``, and say so when anything could have gone."""
        before = len(self.labels.reasons())
        for source in node.all_input_nodes:
            self.pin_value(self.values.get(source), node, reason)
        if len(self.labels.reasons()) > before:
            self.unknown[node.name] = reason
        return self.plain(node.meta.get("val"))

    # ------------------------------------------------------------------------------------------- tie
    def tie(self, a: Columns, b: Columns, node: Node) -> None:
        """Index ``i`` of both goes together."""
        if a or b:
            self.labels.tie(a, b, f"{node}: tied to a dimension that stays")

    def tie_all(self, columns: Sequence[Columns], node: Node) -> Columns:
        """Tie dimensions of equal length; returns what they carry together."""
        for other in columns[1:]:
            self.tie(columns[0], other, node)
        return self.labels.resolve(columns[0]) if columns else ()

    def fills(self, shared: Columns, operand: Columns) -> list[Floats]:
        """Fill of ``operand`` when an index goes through each of the columns it shares with others (after tying)."""
        own = self.labels.resolve(operand)
        if all(is_zero(c) for c in own):
            return [np.zeros(len(c.atoms)) for c in shared]
        result = []
        for column in shared:
            fitting = [c.fill for c in own if np.array_equal(c.atoms, column.atoms)]
            result.append(fitting[0] if fitting else np.full(len(column.atoms), np.nan))
        return result

    def join(
        self, operands: Sequence[Columns | None], node: Node, fill: Callable[[list[Floats | None]], Floats]
    ) -> Columns:
        """What a dimension carries behind an operator that ties its operands' dimensions.

        Args:
            operands: The dimension of each operand; None when the operand does not have it (it is broadcast).
            node: The operator.
            fill: Fill of the result from the operands' (None for one that does not have the dimension).
        """
        present = [c for c in operands if c is not None]
        if not any(present):
            return ()
        shared = self.tie_all(present, node)
        per_operand = [None if c is None else self.fills(shared, c) for c in operands]
        return tuple(
            column.filled(fill([None if f is None else f[j] for f in per_operand])) for j, column in enumerate(shared)
        )

    def need_zero(self, columns: Columns, node: Node, reason: str) -> None:
        """What sums over a dimension only stays the same where removed indices hold zero: pin the others."""
        for column in self.labels.resolve(columns):
            wrong = (column.atoms >= 0) & ~(column.fill == 0)
            self.labels.pin_atoms(np.unique(column.atoms[wrong]), f"{node}: {reason}")

    def mark_in(self, columns: Columns) -> None:
        """These dimensions of parameters read channels instead of making them."""
        self.readers |= {c.source for c in columns if c.source is not None}

    def mark_out(self, columns: Columns) -> None:
        """These dimensions of parameters make channels."""
        self.makers |= {c.source for c in columns if c.source is not None}

    def zero_buffer(self, value: Value) -> None:
        """A buffer that is zeroed where channels go, as parameters are."""
        for name, known in self.tensors.values():
            if known is value:
                self.makers.add((name, 0))

    def tag(self, columns: Columns, kind: str) -> None:
        """Remember what kind of channel these are."""
        if columns:
            self.tags.append((columns, kind))

    def cost(self, node: Node, dims: Sequence[Columns], share: float = 1.0) -> None:
        """The node's multiply-accumulates shrink with each of these dimensions."""
        self.costs.append(Cost(node.name, share, tuple(d for d in dims if d)))


def is_zero(column: Column) -> bool:
    """True when every removed index holds zero."""
    return bool(((column.fill == 0) | (column.atoms == FREE)).all())
