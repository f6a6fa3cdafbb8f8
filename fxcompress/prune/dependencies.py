"""Dependencies: the units of a program that can go, and every dimension they are written in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fxcompress.analysis import Shapes, node_macs
from fxcompress.ir import Program
from fxcompress.prune.flow import Flow, MovedConstant, Value
from fxcompress.prune.labels import FREE, Columns, Ints
from fxcompress.prune.slots import Slot
from fxcompress.prune.walk import walk

__all__ = ["Bools", "CostTerm", "Dependencies", "SlotUse", "analyze"]

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class SlotUse:
    """A slot and the dimension that says which units it holds."""

    slot: Slot
    dimension: int


@dataclass(frozen=True)
class CostTerm:
    """Multiply-accumulates that shrink with each of ``dimensions``."""

    macs: float
    dimensions: tuple[int, ...]


@dataclass
class Dependencies:
    """What the walk found, in units: channels that go together, counted from 0.

    Attributes:
        program: The program that was walked.
        flow: Its walk.
        n_units: Number of units.
        dimensions: Distinct dimensions: int64 [columns, n] of units, ``-1`` for none. An index goes when any of its units does.
        values: Node -> dimensions of what it yields (-1: stays whole), nested as its value.
        slots: Every dimension of a parameter or buffer that can shrink.
        costs: Multiply-accumulates.
        fixed_macs: Multiply-accumulates that nothing here can change.
        tags: Per unit, what kind of channel it is.
        reasons: What stays, and why, one line each.
        moved: Layers whose bias takes over constants, with the dimension that holds them.
        statistics: Norms and means that run over a dimension that may go.
    """

    program: Program
    flow: Flow
    n_units: int = 0
    dimensions: list[Ints] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    slots: list[SlotUse] = field(default_factory=list)
    costs: list[CostTerm] = field(default_factory=list)
    fixed_macs: float = 0.0
    tags: dict[int, str] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    moved: list[tuple[MovedConstant, int]] = field(default_factory=list)
    statistics: dict[str, int] = field(default_factory=dict)
    _known: dict[bytes, int] = field(default_factory=dict)
    _unit_of: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def kept(self, dimension: int, removed: Bools) -> Bools:
        """Which indices of a dimension stay when the units marked in ``removed`` go."""
        rows = self.dimensions[dimension]
        gone = removed[np.where(rows == FREE, 0, rows)] & (rows != FREE)
        result: Bools = ~gone.any(axis=0)
        return result

    def dimension(self, columns: Columns) -> int:
        """Number of a dimension; -1 when nothing of it can go."""
        resolved = self.flow.labels.resolve(columns)
        if not resolved:
            return -1
        rows = np.stack([c.atoms for c in resolved])
        key = rows.tobytes() + bytes(str(rows.shape), "ascii")
        if key not in self._known:
            self._known[key] = len(self.dimensions)
            self.dimensions.append(rows)
        return self._known[key]

    def units_of(self, columns: Columns) -> Ints:
        """Units of a few columns."""
        resolved = self.flow.labels.resolve(columns)
        atoms = np.concatenate([c.atoms for c in resolved]) if resolved else np.zeros(0, dtype=np.int64)
        return np.unique(self._unit_of[atoms[atoms != FREE]])

    def renumber(self) -> None:
        """Atoms to units."""
        every = [d[d != FREE] for d in self.dimensions]
        roots = np.unique(np.concatenate(every)) if every else np.zeros(0, dtype=np.int64)
        self.n_units = len(roots)
        self._unit_of = np.full(self.flow.labels.size + 1, FREE, dtype=np.int64)
        self._unit_of[roots] = np.arange(len(roots))
        self.dimensions = [np.where(d == FREE, FREE, self._unit_of[d]) for d in self.dimensions]

    def macs(self, removed: Bools, counts: Ints | None = None) -> float:
        """Multiply-accumulates of what stays."""
        left = self.counts(removed) if counts is None else counts
        share = left / np.asarray([d.shape[1] for d in self.dimensions] or [1])[: len(left)]
        total = self.fixed_macs
        for term in self.costs:
            total += term.macs * float(np.prod(share[list(term.dimensions)]))
        return total

    def counts(self, removed: Bools) -> Ints:
        """Length of each dimension of what stays."""
        return np.asarray([int(self.kept(i, removed).sum()) for i in range(len(self.dimensions))], dtype=np.int64)

    def parameters(self, removed: Bools, counts: Ints | None = None) -> int:
        """Number of parameters of what stays; tied ones count once."""
        left = self.counts(removed) if counts is None else counts
        named = dict(self.program.gm.named_parameters(remove_duplicate=False))
        sizes = {name: list(p.shape) for name, p in named.items()}
        for use in self.slots:
            if use.slot.tensor in sizes:
                sizes[use.slot.tensor][use.slot.dim] = int(left[use.dimension])
        first = {id(p): name for name, p in reversed(list(named.items()))}
        owners = {id(named[u.slot.tensor]): u.slot.tensor for u in self.slots if u.slot.tensor in named}
        return sum(int(np.prod(sizes[owners.get(key, name)])) for key, name in first.items())


def analyze(program: Program, *, width: bool = False, allow_outputs: bool = False) -> Dependencies:
    """Find what can go from a program.

    Args:
        program: Not changed.
        width: Dimensions that a norm's statistics run over may go.
        allow_outputs: The model's outputs may shrink.
    """
    flow = walk(program, width=width, allow_outputs=allow_outputs)
    found = Dependencies(program, flow)
    found.values = {node.name: _dimensions(found, value) for node, value in flow.values.items()}
    for name, value in flow.tensors.values():
        found.slots += _slots(found, name, value)
    _costs(found)
    found.moved = [(moved, found.dimension(moved.columns)) for moved in flow.moved]
    statistics = {node: found.dimension(columns) for node, columns in flow.statistics.items()}
    found.statistics = {node: number for node, number in statistics.items() if number >= 0}
    found.renumber()
    for columns, kind in flow.tags:
        found.tags.update(dict.fromkeys(found.units_of(columns).tolist(), kind))
    found.reasons = [f"{node}: {why}" for node, why in flow.unknown.items()]
    return found


def _dimensions(found: Dependencies, value: Any) -> Any:
    if isinstance(value, list):
        return [_dimensions(found, v) for v in value]
    return tuple(found.dimension(c) for c in value.dims) if isinstance(value, Value) else ()


def _slots(found: Dependencies, name: str, value: Value) -> list[SlotUse]:
    layer, node = found.flow.layers[name]
    buffer = name not in _parameter_names(found)
    uses = []
    for d, columns in enumerate(value.dims):
        number = found.dimension(columns)
        if number >= 0:
            role = _role(found.flow, (name, d), buffer)
            uses.append(SlotUse(Slot(name, d, role, layer, node, value.sizes[d]), number))
    return uses


def _role(flow: Flow, slot: tuple[str, int], buffer: bool) -> str:
    if slot in flow.makers:
        return "out"
    return "in" if slot in flow.readers else "state" if buffer else "out"


def _parameter_names(found: Dependencies) -> set[str]:
    cached: set[str] | None = found.__dict__.get("_names")
    if cached is None:
        cached = found.__dict__["_names"] = {n for n, _ in found.program.gm.named_parameters(remove_duplicate=False)}
    return cached


def _costs(found: Dependencies) -> None:
    shapes = Shapes(found.program)
    totals = {n.name: float(node_macs(found.program, n, shapes)) for n in found.program.graph.nodes}
    accounted: dict[str, float] = {}
    for cost in found.flow.costs:
        numbers = tuple(n for n in (found.dimension(c) for c in cost.dims) if n >= 0)
        macs = totals.get(cost.node, 0.0) * cost.share
        accounted[cost.node] = accounted.get(cost.node, 0.0) + macs
        if numbers:
            found.costs.append(CostTerm(macs, numbers))
        else:
            found.fixed_macs += macs
    found.fixed_macs += sum(t - accounted.get(n, 0.0) for n, t in totals.items())


def all_dimensions(value: Any) -> Sequence[int]:
    """Every dimension number in a nested entry of ``Dependencies.values``."""
    if isinstance(value, list):
        return [n for v in value for n in all_dimensions(v)]
    return [n for n in value if n >= 0]
