"""Which units go: ranking, rounding, and the search for a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fxcompress.errors import PruneError
from fxcompress.prune.dependencies import Bools, Dependencies
from fxcompress.prune.groups import Group
from fxcompress.prune.labels import FREE

__all__ = ["Selector", "search"]


@dataclass
class Selector:
    """Chooses the units to remove from groups that have scores.

    Attributes:
        found: Dependencies.
        groups: Groups that may be pruned.
        scores: float64 [units].
        scope: ``"global"`` ranks all units against each other, ``"local"`` within each group.
        round_to: Channels of a layer stay a multiple of this.
        min_channels: Least number of units a group keeps.
        max_ratio: Largest share of a group that may go.
        ratios: Share to remove of some groups, whatever the ranking says.
        normalize: What scores are divided by before groups are ranked against each other: ``"mean"`` of the group,
            ``"macs"`` or ``"parameters"``: the root of what one unit costs, or ``"none"``.
    """

    found: Dependencies
    groups: list[Group]
    scores: NDArray[np.float64]
    scope: str = "global"
    round_to: int = 1
    min_channels: int = 1
    max_ratio: float = 0.95
    ratios: Mapping[str, float] = field(default_factory=dict)
    normalize: str = "mean"

    def __post_init__(self) -> None:
        free = [g for g in self.groups if g.name not in self.ratios]
        ranked = [np.zeros(0)] + [self._normalized(g) for g in free]
        self._ranking = np.sort(np.concatenate(ranked))
        self._total = sum(g.size for g in free)

    def _normalized(self, group: Group) -> NDArray[np.float64]:
        """Scores that are comparable between layers: by their group's mean, or by what a unit costs.

        What a channel contributes grows more slowly than its cost, hence the root.
        """
        own = self.scores[group.units]
        if self.normalize == "none":
            return own
        cost = {"macs": group.macs, "parameters": group.parameters}.get(self.normalize)
        scale = float(np.abs(own).mean()) if cost is None else math.sqrt(max(cost, 1) / group.size)
        return own / scale if scale > 0 else own

    def remove(self, ratio: float) -> Bools:
        """Units to remove so that about ``ratio`` of all units that are ranked go."""
        removed = np.zeros(self.found.n_units, dtype=np.bool_)
        threshold = self._threshold(ratio)
        for group in self.groups:
            count = (
                self.ratios[group.name] * group.size
                if group.name in self.ratios
                else self._count(group, ratio, threshold)
            )
            order = np.argsort(self.scores[group.units], kind="stable")
            removed[group.units[order[: self._rounded(group, count)]]] = True
        self._repair(removed)
        return removed

    def _threshold(self, ratio: float) -> float:
        goal = min(round(ratio * self._total), self._total)
        return float(self._ranking[goal - 1]) if goal > 0 else -math.inf

    def _count(self, group: Group, ratio: float, threshold: float) -> float:
        if self.scope == "local":
            return ratio * group.size
        return float((self._normalized(group) <= threshold).sum()) if ratio > 0 else 0.0

    def _rounded(self, group: Group, count: float) -> int:
        """Number of units to remove: whole ones, what is left a multiple of ``round_to`` channels, and enough of it."""
        step = self.round_to // math.gcd(self.round_to, group.width)
        most = min(group.size - max(self.min_channels, 1), math.floor(self.max_ratio * group.size + 1e-9))
        count = min(max(count, 0.0), max(most, 0))
        left = group.size - count
        if count == 0 or group.size < step:
            return 0
        kept = max(math.floor(left / step + 0.5), 1) * step if step > 1 else math.ceil(left - 0.5)
        while kept < group.size - most:
            kept += step
        return max(group.size - kept, 0)

    def _repair(self, removed: Bools) -> None:
        """No dimension may become empty: the best unit of one that would stays."""
        for rows in self.found.dimensions:
            gone = (removed[np.where(rows == FREE, 0, rows)] & (rows != FREE)).any(axis=0)
            if gone.all():
                units = np.unique(rows[:, int(np.argmax([self._best(column) for column in rows.T]))])
                removed[units[units != FREE]] = False

    def _best(self, units: NDArray[np.int64]) -> float:
        known = self.scores[units[units != FREE]]
        return float(np.nanmin(known)) if len(known) and not np.isnan(known).all() else -math.inf


def search(selector: Selector, cost: Callable[[Bools], float], budget: float, name: str, steps: int = 24) -> Bools:
    """The least pruning whose cost is within the budget.

    Args:
        selector: Chooses units for a ratio.
        cost: What a set of removed units leaves, to be compared with ``budget``.
        budget: Largest allowed cost.
        name: Of the budget, for errors.
        steps: Halvings of the ratio.

    Raises:
        PruneError: the budget is out of reach; the closest is named.
    """
    nothing = selector.remove(0.0)
    if cost(nothing) <= budget:
        return nothing
    low, high = 0.0, 1.0
    best = selector.remove(high)
    least = cost(best)
    if least > budget:
        dense = cost(np.zeros_like(best))
        share = math.ceil(1000 * least / max(dense, 1e-12)) / 1000  # rounded up, so that it can be met
        raise PruneError(
            1,
            f"the {name} budget cannot be met: {budget:.4g} of {dense:.4g}",
            why=f"pruning everything that may go leaves {least:.4g} ({least / max(dense, 1e-12):.1%})",
            fix=f"ask for {name}={share:.3f} or more, ignore less, or lower round_to and min_channels",
        )
    for _ in range(steps):
        middle = (low + high) / 2
        removed = selector.remove(middle)
        if cost(removed) <= budget:
            high, best = middle, removed
        else:
            low = middle
    return best
