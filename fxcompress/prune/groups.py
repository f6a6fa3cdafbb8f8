"""Groups: units that the same layers make, and which axis of a grid of channels is pruned."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fxcompress.prune.dependencies import Dependencies, SlotUse
from fxcompress.prune.labels import FREE, Ints

__all__ = ["Group", "find_groups"]


@dataclass
class Group:
    """Channels that are ranked against each other: removing one removes it from all the layers.

    Attributes:
        name: Path of the first layer that makes these channels; ``#2``, ... when it makes several kinds.
        kind: ``channel``, ``head``, ``head_dim`` or ``group``.
        layers: Layers and tensors it is written in, makers first, in execution order.
        units: The units, ascending.
        width: Channels of the first layer that one unit stands for (64 for a head of that width).
        parameters: Number of parameters that hold channels of the group.
        macs: Multiply-accumulates that read or make channels of the group, for the example.
        importance: Mean score of its units; NaN before scoring.
        removed: Number of units that go.
        alternative: Name of the group of the other axis of the same grid that is pruned instead; "" for none.
    """

    name: str
    kind: str
    layers: tuple[str, ...]
    units: Ints
    width: int
    parameters: int = 0
    macs: int = 0
    importance: float = math.nan
    removed: int = 0
    alternative: str = ""
    dimensions: tuple[int, ...] = field(default=(), repr=False)

    @property
    def size(self) -> int:
        """Number of units."""
        return len(self.units)


def find_groups(found: Dependencies, attention: str = "heads") -> list[Group]:
    """Groups of all units that some parameter holds, in execution order.

    Args:
        found: The program's dependencies.
        attention: Which axis of attention is pruned: ``"heads"`` or ``"head_dim"``.
    """
    owner, members = _members(found)
    if not members:
        return []
    held = _held(found, owner, len(members))
    order = {n.name: i for i, n in enumerate(found.program.graph.nodes)}
    places: list[list[SlotUse]] = [[] for _ in found.dimensions]
    for use in sorted(found.slots, key=lambda u: (u.slot.role != "out", order[u.slot.node])):
        places[use.dimension].append(use)
    groups = [_describe(found, units, held[:, i], places, order) for i, units in enumerate(members)]
    _account(found, groups, held)
    first = {id(g): i for i, g in enumerate(groups)}
    groups.sort(key=lambda g: (order[places[g.dimensions[0]][0].slot.node], first[id(g)]))
    names: Counter[str] = Counter()
    for group in groups:
        names[group.name] += 1
        if names[group.name] > 1:
            group.name += f"#{names[group.name]}"
    _choose_axes(found, groups, attention)
    return groups


def _members(found: Dependencies) -> tuple[Ints, list[Ints]]:
    """Units by the dimensions that make them (that read them, when nothing makes them): group of each unit, and units."""
    makers = sorted({u.dimension for u in found.slots if u.slot.role == "out"})
    readers = sorted({u.dimension for u in found.slots} - set(makers))
    rng = np.random.default_rng(0)
    made = np.zeros(found.n_units, dtype=np.uint64)
    for number in makers:
        _sign(found, number, rng, made)
    signature = np.zeros(found.n_units, dtype=np.uint64)
    for number in readers:
        _sign(found, number, rng, signature)
    signature = np.where(made != 0, made, signature)
    values, owner = np.unique(signature, return_inverse=True)
    owner = owner.astype(np.int64)
    if len(values) and values[0] == 0:  # units that no parameter holds
        owner -= 1
    order = np.argsort(owner, kind="stable")
    order = order[owner[order] >= 0]
    cuts = np.flatnonzero(np.diff(owner[order])) + 1
    return owner, np.split(order, cuts) if len(order) else []


def _sign(found: Dependencies, number: int, rng: np.random.Generator, signature: NDArray[np.uint64]) -> None:
    for row in found.dimensions[number]:
        mark = rng.integers(1, 1 << 63, dtype=np.uint64)
        units = np.unique(row[row != FREE])
        signature[units] ^= mark


def _held(found: Dependencies, owner: Ints, n_groups: int) -> NDArray[np.float64]:
    """Share of each dimension that each group holds: float64 [dimensions, groups]."""
    result = np.zeros((len(found.dimensions), n_groups))
    for i, rows in enumerate(found.dimensions):
        owners = owner[rows[rows != FREE]]
        result[i] = np.bincount(owners[owners >= 0], minlength=n_groups) / rows.shape[1]
    return result


def _describe(
    found: Dependencies, units: Ints, held: NDArray[np.float64], places: list[list[SlotUse]], order: dict[str, int]
) -> Group:
    dimensions = [int(d) for d in np.flatnonzero(held) if places[d]]
    dimensions.sort(key=lambda d: (places[d][0].slot.role != "out", order[places[d][0].slot.node]))
    uses = sorted((u for d in dimensions for u in places[d]), key=lambda u: (u.slot.role != "out", order[u.slot.node]))
    layers = tuple(dict.fromkeys(u.slot.layer for u in uses))
    first = dimensions[0]
    width = max(round(held[first] * found.dimensions[first].shape[1] / len(units)), 1)
    kinds = Counter(found.tags.get(int(u), "channel") for u in units[:8])
    return Group(layers[0], kinds.most_common(1)[0][0], layers, units, width, dimensions=tuple(dimensions))


def _account(found: Dependencies, groups: list[Group], held: NDArray[np.float64]) -> None:
    """Parameters and multiply-accumulates that hold channels of each group."""
    named = {n: p.numel() for n, p in found.program.gm.named_parameters(remove_duplicate=False)}
    tensors: dict[str, list[int]] = {}
    for use in found.slots:
        if use.slot.tensor in named:
            tensors.setdefault(use.slot.tensor, []).append(use.dimension)
    parameters, macs = np.zeros(len(groups)), np.zeros(len(groups))
    for name, numbers in tensors.items():
        parameters += named[name] * held[numbers].max(axis=0)
    for term in found.costs:
        macs += term.macs * held[list(term.dimensions)].max(axis=0)
    for i, group in enumerate(groups):
        group.parameters, group.macs = round(parameters[i]), round(macs[i])


def _choose_axes(found: Dependencies, groups: list[Group], attention: str) -> None:
    """Of groups that cross in a grid only one is pruned."""
    of_unit = np.full(found.n_units + 1, -1, dtype=np.int64)
    for i, group in enumerate(groups):
        of_unit[group.units] = i
    crossing: dict[int, set[int]] = {}
    for rows in found.dimensions:
        if len(rows) > 1:
            for pair in _pairs(of_unit[rows]):
                crossing.setdefault(pair[0], set()).add(pair[1])
                crossing.setdefault(pair[1], set()).add(pair[0])

    def preference(i: int) -> tuple[bool, int, int]:
        wanted = "head" if attention == "heads" else "head_dim"
        return groups[i].kind != wanted, -groups[i].size, i

    for i in sorted(crossing, key=preference):
        if not groups[i].alternative:
            for j in crossing[i]:
                groups[j].alternative = groups[j].alternative or groups[i].name


def _pairs(owners: Ints) -> set[tuple[int, int]]:
    """Groups that share an index through different columns."""
    found: set[tuple[int, int]] = set()
    for a in range(len(owners)):
        for b in range(a + 1, len(owners)):
            both = (owners[a] >= 0) & (owners[b] >= 0) & (owners[a] != owners[b])
            found |= set(map(tuple, np.unique(np.stack([owners[a][both], owners[b][both]]), axis=1).T.tolist()))
    return found
