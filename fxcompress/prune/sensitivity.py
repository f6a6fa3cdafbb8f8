"""Sensitivity: what a metric loses when one group of channels at a time is pruned (Li et al. 2017, "Pruning Filters for
Efficient ConvNets", section 3.2)."""

from __future__ import annotations

import dataclasses
import fnmatch
import glob
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxcompress.analysis import count_macs, count_parameters
from fxcompress.errors import PruneError, UsageError
from fxcompress.ir import Program, evaluating
from fxcompress.progress import progress_bar
from fxcompress.prune.criterion import Importance
from fxcompress.prune.importance import importance as importance_of
from fxcompress.prune.plan import PruningPlan, plan_pruning
from fxcompress.prune.sensitivity_cache import Cache, fingerprint
from fxcompress.prune.sensitivity_result import Curve, Point, Sensitivity, no_group
from fxcompress.prune.slots import Slot
from fxcompress.prune.statistics import Loss

__all__ = ["Curve", "Point", "Sensitivity", "analyze_sensitivity"]

_log = logging.getLogger("fxcompress")


# ------------------------------------------------------------------------------------------------ measuring
def analyze_sensitivity(
    program: Program,
    evaluate: Callable[[Program], float],
    ratios: Iterable[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    *,
    groups: str | Sequence[str] | None = None,
    cache: str | Path | None = None,
    importance: Any = "l2",
    progress: bool = True,
    **options: Any,
) -> Sensitivity:
    """Measure what each group of channels is worth: prune it alone, at each ratio, and evaluate.

    The cost, number of evaluations times the time of one, is said (to the log, and with ``progress`` to stderr) after
    the first evaluation, which is that of the program as it is.

    Args:
        program: Left untouched.
        evaluate: Scores a callable model, higher is better; it runs in eval mode without gradients.
        ratios: Fractions of a group's units to remove, in (0, 1).
        groups: Glob, or several, of group or layer names; by default all groups.
        cache: Folder for the measurements. Each is written as soon as it is there, and a later call for the same
            program, weights and options goes on behind it. What cannot be read off the options (the data behind
            ``evaluate`` or ``train``) is not part of the key: use another folder where it changes.
        importance: As in `plan_pruning`.
        progress: Show a progress bar on stderr.
        **options: Of `plan_pruning`, for example ``round_to``, ``ignore``, ``train``.

    Raises:
        UsageError: a ratio outside (0, 1); no group of that name; a cache of another ``evaluate``.
        PruneError: a metric that is not finite (group and ratio are named); or as `plan_pruning`.
        ArtifactError: a cache file that cannot be read or written.
    """
    wanted = _checked_ratios(ratios)
    taken = sorted({"ratio", "ratios"} & set(options))
    if taken:
        raise UsageError(182, f"analyze_sensitivity sets {', '.join(taken)} itself", fix="pass ratios=(0.1, ...)")
    plan = _Planner(program, importance, options)
    chosen = _chosen([g for g in plan.groups if not g.alternative], groups)
    store = Cache(cache, fingerprint(program, importance, options)) if cache is not None else None
    start = time.perf_counter()
    baseline = _measure(evaluate, program, "the program as it is")
    seconds = time.perf_counter() - start
    if store is not None:
        store.check_baseline(baseline)
    run = _Run(plan, evaluate, store, Point(0.0, 0, baseline, count_parameters(program), count_macs(program)))
    left = sum(not run.known(g.name, r) for g in chosen for r in wanted)
    header = (
        f"sensitivity: {len(chosen)} groups x {len(wanted)} ratios, {len(chosen) * len(wanted) - left} cached, "
        f"at most {left} evaluations of about {seconds:.3g} s: {_duration(left * seconds)}"
    )
    _log.info(header)
    curves: list[Curve] = []
    with progress_bar("measured", len(chosen) * len(wanted), progress, header) as bar:
        for group in chosen:
            points = []
            for ratio in wanted:
                points.append(run.point(group.name, ratio))
                bar()
            curves.append(Curve(group.name, tuple(group.layers), int(group.size), tuple(points)))
    dense, name = run.dense, importance if isinstance(importance, str) else type(importance).__name__
    whole = tuple(c.name for c in curves if not any(p.removed for p in c.points))
    cut = tuple(c for c in curves if c.name not in whole)
    return Sensitivity(baseline, dense.parameters, dense.macs, wanted, cut, name, whole)


class _Once(Importance):
    """A criterion that collects its statistics once, for all plans of one program."""

    def __init__(self, criterion: Importance) -> None:
        self._criterion = criterion
        self._is_ready = False
        self._scores: dict[Slot, Tensor | None] = {}

    def prepare(
        self, program: Program, slots: Sequence[Slot], data: Iterable[Any] | None = None, loss: Loss | None = None
    ) -> None:
        if not self._is_ready:
            self._criterion.prepare(program, slots, data, loss)
            self._is_ready = True

    def score(self, slot: Slot, tensor: Tensor) -> Tensor | None:
        if slot not in self._scores:
            self._scores[slot] = self._criterion.score(slot, tensor)
        return self._scores[slot]


class _Planner:
    """Plans of one program, with everything whole but one group."""

    def __init__(self, program: Program, spec: Any, options: dict[str, Any]) -> None:
        self.program, self.options = program, options
        self.importance = _Once(importance_of(spec, seed=options.get("seed", 0)))
        self.groups = self._plan({}).groups

    def _plan(self, ratios: Mapping[str, float]) -> PruningPlan:
        chosen = {glob.escape(name): ratio for name, ratio in ratios.items()}
        return plan_pruning(self.program, ratio=0, ratios=chosen, importance=self.importance, **self.options)

    def alone(self, name: str, ratio: float) -> tuple[PruningPlan, int]:
        """The plan that prunes one group, and how many units go."""
        plan = self._plan({name: ratio})
        others = [g.name for g in plan.groups if g.removed and g.name != name]
        if others:  # a name also stands for the layers below it
            plan = self._plan({name: ratio} | dict.fromkeys(others, 0.0))
        return plan, next(int(g.removed) for g in plan.groups if g.name == name)


@dataclass
class _Run:
    """The measurements: cached, equal to one that was made, or made now."""

    plan: _Planner
    evaluate: Callable[[Program], float]
    store: Cache | None
    dense: Point

    def __post_init__(self) -> None:
        known = [(group, Point(**values)) for group, values in (self.store.points() if self.store else ())]
        self._made = {(group, point.removed): point for group, point in known}

    def known(self, group: str, ratio: float) -> bool:
        """The cache holds it."""
        return self.store is not None and self.store.get(group, ratio) is not None

    def point(self, group: str, ratio: float) -> Point:
        """The measurement of ``group`` at ``ratio``."""
        found = self.store.get(group, ratio) if self.store is not None else None
        point = Point(**found) if found is not None else self._new(group, ratio)
        self._made[group, point.removed] = point
        if self.store is not None and found is None:
            self.store.add(group, dataclasses.asdict(point))
        return point

    def _new(self, group: str, ratio: float) -> Point:
        plan, removed = self.plan.alone(group, ratio)
        same = self.dense if not removed else self._made.get((group, removed))
        if same is not None:
            return dataclasses.replace(same, ratio=ratio)
        pruned = plan.apply(self.plan.program)
        metric = _measure(self.evaluate, pruned, f"group {group} at ratio {ratio:g}")
        return Point(ratio, removed, metric, count_parameters(pruned), count_macs(pruned))


def _measure(evaluate: Callable[[Program], float], program: Program, where: str) -> float:
    with torch.no_grad(), evaluating(program.gm):
        try:
            metric = float(evaluate(program))
        except Exception as error:
            error.add_note(f"while evaluating {where}")
            raise
    if not math.isfinite(metric):
        why = f"it gave {metric}"
        raise PruneError(170, "evaluate gave a metric that is not finite", where=where, why=why, fix="mend evaluate")
    return metric


def _checked_ratios(ratios: Iterable[float]) -> tuple[float, ...]:
    found = tuple(sorted({float(r) for r in ratios}))
    wrong = [r for r in found if not 0 < r < 1]
    if wrong or not found:
        what = f"a ratio must lie between 0 and 1, not be {wrong[0]:g}" if wrong else "there are no ratios"
        raise UsageError(183, what, fix="ratios=(0.1, 0.3, 0.5, 0.7, 0.9)")
    return found


def _chosen(known: Sequence[Any], patterns: str | Sequence[str] | None) -> list[Any]:
    if patterns is None:
        wanted = ["*"]
    else:
        wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in wanted:
        if not any(_matches(g, pattern) for g in known):
            raise no_group(pattern, [g.name for g in known])
    return [g for g in known if any(_matches(g, p) for p in wanted)]


def _matches(group: Any, pattern: str) -> bool:
    return any(name == pattern or fnmatch.fnmatchcase(name, pattern) for name in (group.name, *group.layers))


def _duration(seconds: float) -> str:
    """Seconds for people."""
    for size, unit in ((3600.0, "h"), (60.0, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
