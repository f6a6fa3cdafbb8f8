"""What a sensitivity analysis found: a curve per group, and the ratios that keep the metric within a target."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from fxcompress.errors import ArtifactError, UsageError
from fxcompress.prune import sensitivity_report as reports

__all__ = ["Curve", "Point", "Sensitivity", "no_group"]

_FORMAT, _SCHEMA = "fxcompress sensitivity", 1


@dataclass(frozen=True)
class Point:
    """One measurement: a group pruned by one ratio, everything else left whole.

    Attributes:
        ratio: Fraction of the group's units that was asked for.
        removed: Units that went.
        metric: What ``evaluate`` gave.
        parameters: Parameters of the whole pruned program.
        macs: Its multiply-accumulates for the example.
    """

    ratio: float
    removed: int
    metric: float
    parameters: int
    macs: int


@dataclass(frozen=True)
class Curve:
    """The measurements of one group.

    Attributes:
        name: The group, as in `PruningPlan.groups`.
        layers: The layers it ties.
        size: Its units (channels, or heads).
        points: By rising ratio.
    """

    name: str
    layers: tuple[str, ...]
    size: int
    points: tuple[Point, ...]

    def drops(self, baseline: float) -> list[tuple[float, float]]:
        """``(fraction of the units that went, baseline - metric)``, from ``(0, 0)`` on, each fraction once."""
        found = {0: 0.0} | {p.removed: baseline - p.metric for p in self.points if p.removed}
        return [(removed / self.size, found[removed]) for removed in sorted(found)]

    def largest(self, baseline: float, max_drop: float) -> float:
        """The ratio, a whole number of units, up to which the interpolated drop never exceeds ``max_drop``."""
        path = self.drops(baseline)
        reached = path[-1][0]
        for (x0, y0), (x1, y1) in pairwise(path):
            if y1 > max_drop:
                reached = x0 + (x1 - x0) * (max_drop - y0) / (y1 - y0)
                break
        return math.floor(reached * self.size + 1e-9) / self.size

    def drop_at(self, baseline: float, ratio: float) -> float:
        """The interpolated drop at ``ratio``; beyond the last measurement, that one's."""
        path = self.drops(baseline)
        for (x0, y0), (x1, y1) in pairwise(path):
            if ratio <= x1:
                return y0 + (y1 - y0) * (ratio - x0) / (x1 - x0)
        return path[-1][1]


@dataclass(frozen=True)
class Sensitivity:
    """The metric of a program with one group pruned at a time.

    Attributes:
        baseline: The metric of the program as it is.
        parameters: Its parameters.
        macs: Its multiply-accumulates for the example.
        ratios: What was measured.
        groups: One curve per group, in the order of the graph.
        importance: What chose the channels.
        whole: Groups that lost nothing at any ratio: they are ignored, or too small for ``round_to``.
    """

    baseline: float
    parameters: int
    macs: int
    ratios: tuple[float, ...]
    groups: tuple[Curve, ...]
    importance: str
    whole: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Curve:
        """The curve of a group. Raises UsageError, nearest names offered, when there is none."""
        found = next((c for c in self.groups if c.name == name), None)
        if found is None:
            raise no_group(name, [c.name for c in self.groups])
        return found

    def recommend(self, max_drop: float, *, joint: bool = False, by: str = "parameters") -> dict[str, float]:
        """A ratio per group for a target, ready for ``plan_pruning(..., ratio=0, ratios=...)``.

        Args:
            max_drop: Largest allowed ``baseline - metric``, in the metric's own unit.
            joint: False: each group alone may lose ``max_drop``. True: all of them together; drops are taken to add up
                (an assumption: measure the result), and units go where they save most per drop.
            by: What ``joint`` saves: ``"parameters"`` or ``"macs"``.

        Returns:
            Group -> ratio, 0 for a group that must stay whole. Alone: the largest ratio up to which the interpolated
            drop stays within the target. Joint: one of the measured ratios.

        Raises:
            UsageError: ``max_drop`` is negative or not finite, or ``by`` is unknown.
        """
        if not (math.isfinite(max_drop) and max_drop >= 0):
            raise UsageError(180, f"max_drop must be a finite number from 0 on, not {max_drop!r}")
        if by not in ("parameters", "macs"):
            raise UsageError(181, f"recommend cannot save {by!r}", fix='by="parameters" or by="macs"')
        if joint:
            return self._jointly(max_drop, by)
        return {c.name: c.largest(self.baseline, max_drop) for c in self.groups}

    def predicted_drop(self, ratios: Mapping[str, float]) -> float:
        """The drop of several groups at once if drops add up, each interpolated; groups left out stay whole."""
        return sum(self[name].drop_at(self.baseline, ratio) for name, ratio in ratios.items())

    def _jointly(self, max_drop: float, by: str) -> dict[str, float]:
        """Greedy over the steps of all curves by what they save per drop, as long as one still fits."""
        paths = {c.name: self._path(c, by) for c in self.groups}
        at = dict.fromkeys(paths, 0)
        left = max_drop
        while True:
            steps = [
                (saved - path[at[name]][2], max(0.0, drop - path[at[name]][1]), name, i)
                for name, path in paths.items()
                for i, (_, drop, saved) in enumerate(path)
                if i > at[name]
            ]
            fitting = [s for s in steps if s[1] <= left * (1 + 1e-12) and s[0] > 0]
            if not fitting:
                return {name: paths[name][i][0] for name, i in at.items()}
            _, drop, name, i = max(fitting, key=lambda s: (s[0] / s[1] if s[1] else math.inf, s[0]))
            at[name], left = i, left - drop

    def _path(self, curve: Curve, by: str) -> list[tuple[float, float, int]]:
        """``(ratio, largest drop so far, saved)`` by rising number of removed units, from nothing on."""
        whole = getattr(self, by)
        path, worst = [(0.0, 0.0, 0)], 0.0
        for point in sorted(curve.points, key=lambda p: p.removed):
            if point.removed:
                worst = max(worst, self.baseline - point.metric)
                path.append((point.removed / curve.size, worst, whole - getattr(point, by)))
        return path

    # -------------------------------------------------------------------------------------------- reports
    def table(self) -> str:
        """One line per group: its units, and the metric at each ratio."""
        return reports.table(self)

    __str__ = table

    def plot(self, path: str | Path) -> Path:
        """Draw the curves into an ``.svg`` or ``.png`` file.

        Raises:
            MissingRuntimeError: Matplotlib is not installed.
            UsageError: another kind of file.
        """
        return reports.plot(self, Path(path))

    def to_html(self, path: str | Path) -> Path:
        """Write a page that needs no other file: the table, and the curve of each group."""
        return reports.write(Path(path), reports.html(self))

    def to_csv(self, path: str | Path) -> Path:
        """Write one row per measurement."""
        return reports.write(Path(path), reports.csv_text(self))

    def to_json(self, path: str | Path) -> Path:
        """Write everything; `from_json` reads it."""
        content = {"format": _FORMAT, "schema": _SCHEMA} | dataclasses.asdict(self)
        return reports.write(Path(path), json.dumps(content, indent=1, allow_nan=False))

    @classmethod
    def from_json(cls, path: str | Path) -> Sensitivity:
        """Read what `to_json` wrote.

        Raises:
            ArtifactError: there is no such file, or it holds something else.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content.pop("format") != _FORMAT or content.pop("schema") > _SCHEMA:
                raise ValueError("another format, or a newer version")
            curves = [
                Curve(c["name"], tuple(c["layers"]), int(c["size"]), tuple(Point(**p) for p in c["points"]))
                for c in content.pop("groups")
            ]
            tuples = {"ratios": tuple(content["ratios"]), "whole": tuple(content["whole"])}
            return cls(**content | tuples | {"groups": tuple(curves)})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            why = f"{type(error).__name__}: {error}"
            raise ArtifactError(60, "the sensitivity file cannot be read", where=str(path), why=why) from error


def no_group(name: str, known: list[str]) -> UsageError:
    """The error for a group that does not exist; the nearest names are offered."""
    near = difflib.get_close_matches(name, known, 3, 0.0)
    why = f"nearest: {', '.join(near)}" if near else "the program has no group of channels that can go"
    return UsageError(184, f"no group of channels is called {name!r}", why=why, fix="see plan.groups")
