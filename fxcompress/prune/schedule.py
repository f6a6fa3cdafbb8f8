"""Pruning schedules: which share of the dense network is gone at which training step.

A schedule only answers questions, it prunes nothing: `Schedule.sparsity` is a function of the step alone, so that a
run that stops and goes on, or two processes, agree without talking.
"""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from numbers import Real
from typing import Any, ClassVar

from fxcompress.errors import PruneError

__all__ = [
    "AGPSchedule",
    "CubicSchedule",
    "ExponentialSchedule",
    "IterativeSchedule",
    "LinearSchedule",
    "OneShotSchedule",
    "Schedule",
    "make_schedule",
    "schedule_from_state",
]


_FIELDS = ("final", "initial", "start", "end", "every")


class Schedule(ABC):
    """Share of the dense network that is removed at each training step.

    Attributes:
        final: Share removed at the end, ``[0, 1)``.
        initial: Share removed at ``start``, ``[0, final]``.
        start: First step that may prune; 0 is the first step of training.
        end: Step from which ``final`` holds.
        every: Steps between two prunings.
    """

    name: ClassVar[str]

    def __init__(self, final: float, *, initial: float = 0.0, start: int = 0, end: int = 0, every: int = 1) -> None:
        self._set({"final": final, "initial": initial, "start": start, "end": end, "every": every})

    def _set(self, values: Mapping[str, Any]) -> None:
        """Check and take over; nothing changes when a value is wrong."""
        final, initial = _share("final", values["final"]), _share("initial", values["initial"])
        start, end = _count("start", values["start"], 0), _count("end", values["end"], 0)
        every = _count("every", values["every"], 1)
        if initial > final:
            what = f"the schedule starts at {initial:g} and ends at {final:g}"
            raise PruneError(301, what, why="removed channels do not come back", fix="give initial <= final")
        self._check_steps(start, end, every)
        self.final, self.initial, self.start, self.end, self.every = final, initial, start, end, every

    def _check_steps(self, start: int, end: int, every: int) -> None:
        if end <= start:
            what = f"the {self.name} schedule ends at step {end} but starts at step {start}"
            raise PruneError(302, what, fix="give end > start, or use OneShotSchedule")
        if every > end - start:
            what = f"the {self.name} schedule prunes every {every} steps but is only {end - start} steps long"
            raise PruneError(303, what, fix="give every <= end - start")

    @abstractmethod
    def _ramp(self, progress: float) -> float:
        """Share removed at ``progress`` of the way from start to end, strictly between 0 and 1."""

    def sparsity(self, step: int) -> float:
        """Share removed at ``step``: 0 before ``start``, ``final`` from ``end`` on.

        Raises:
            PruneError: ``step`` is no integer, or negative.
        """
        step = _count("step", step, 0)
        if step < self.start:
            return 0.0
        if step >= self.end:
            return self.final
        return self.initial if step == self.start else self._ramp((step - self.start) / (self.end - self.start))

    def should_prune(self, step: int) -> bool:
        """True at the steps at which more than before has to go: every ``every`` steps from ``start``, and at ``end``."""
        step = _count("step", step, 0)
        if not self.start <= step <= self.end or ((step - self.start) % self.every and step != self.end):
            return False
        return self.sparsity(step) > self._before(step)

    def _before(self, step: int) -> float:
        """Share removed by the prunings before ``step``."""
        if step == self.start:
            return 0.0
        return self.sparsity(self.start + (step - self.start - 1) // self.every * self.every)

    def pruning_steps(self) -> list[int]:
        """All steps for which `should_prune` is true, in order."""
        steps = [*range(self.start, self.end, self.every), self.end]
        return [step for step in steps if self.should_prune(step)]

    def finished(self, step: int) -> bool:
        """True when no step after ``step`` prunes."""
        return _count("step", step, 0) >= self.end

    def state_dict(self) -> dict[str, Any]:
        """Everything the schedule is made of, JSON-ready."""
        values = {key: getattr(self, key) for key in _FIELDS}
        return {"name": self.name, **values}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become the schedule that ``state`` describes.

        Raises:
            PruneError: the state is of another kind of schedule, incomplete or wrong.
        """
        if state.get("name") != self.name:
            what = f"the state is of schedule {state.get('name')!r}, not {self.name!r}"
            raise PruneError(304, what, fix="make the same schedule as before, or use schedule_from_state(state)")
        missing = [key for key in _FIELDS if key not in state]
        if missing:
            raise PruneError(305, f"the state of a schedule lacks {', '.join(missing)}")
        self._set(state)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and self.state_dict() == other.state_dict()

    def __hash__(self) -> int:
        return hash(tuple(sorted(self.state_dict().items())))

    def __repr__(self) -> str:
        values = ", ".join(f"{key}={value!r}" for key, value in self.state_dict().items() if key != "name")
        return f"{type(self).__name__}({values})"


class OneShotSchedule(Schedule):
    """Everything at one step.

    Args:
        final: Share to remove, ``[0, 1)``.
        start: The step.
    """

    name = "one_shot"

    def __init__(self, final: float, *, start: int = 0) -> None:
        super().__init__(final, initial=final, start=start, end=start)

    def _check_steps(self, start: int, end: int, every: int) -> None:
        if start != end:
            raise PruneError(306, f"a one-shot schedule starts at step {start} but ends at step {end}")

    def _ramp(self, progress: float) -> float:
        return self.final


class IterativeSchedule(Schedule):
    """Equal parts of the dense network in rounds, with training between them (Han et al. 2015).

    Round ``k`` of ``rounds``, at step ``start + (k - 1) * every``, goes to ``initial + (final - initial) * k / rounds``;
    the share stays until the next round.

    Args:
        final: Share removed after the last round, ``[0, 1)``.
        rounds: Number of prunings.
        every: Training steps between two rounds.
        initial: Share counted as removed before the first round.
        start: Step of the first round.
    """

    name = "iterative"

    def __init__(self, final: float, *, rounds: int, every: int, initial: float = 0.0, start: int = 0) -> None:
        rounds, every, start = _count("rounds", rounds, 1), _count("every", every, 1), _count("start", start, 0)
        super().__init__(final, initial=initial, start=start, end=start + (rounds - 1) * every, every=every)

    @property
    def rounds(self) -> int:
        """Number of prunings."""
        return (self.end - self.start) // self.every + 1

    def _check_steps(self, start: int, end: int, every: int) -> None:
        if end < start or (end - start) % every:
            what = f"{end - start} steps from first to last round cannot be cut into rounds of {every} steps"
            raise PruneError(307, what, fix="give rounds and every")

    def sparsity(self, step: int) -> float:
        """Share removed at ``step``: 0 before the first round, and the same between two rounds."""
        step = _count("step", step, 0)
        if step < self.start or step >= self.end:
            return 0.0 if step < self.start else self.final
        return self._ramp(((step - self.start) // self.every + 1) / self.rounds)

    def _ramp(self, progress: float) -> float:
        return self.initial + (self.final - self.initial) * progress


class LinearSchedule(Schedule):
    """The share grows by the same amount each step: ``s_i + (s_f - s_i) p`` with ``p = (t - t0) / (tn - t0)``.

    Args:
        final: Share ``s_f`` removed at the end, ``[0, 1)``.
        end: Step ``tn``.
        initial: Share ``s_i`` removed at ``start``.
        start: Step ``t0``.
        every: Steps between two prunings.
    """

    name = "linear"

    def __init__(self, final: float, *, end: int, initial: float = 0.0, start: int = 0, every: int = 1) -> None:
        super().__init__(final, initial=initial, start=start, end=end, every=every)

    def _ramp(self, progress: float) -> float:
        return self.initial + (self.final - self.initial) * progress


class ExponentialSchedule(LinearSchedule):
    """What is left shrinks by the same factor each step: ``1 - s = (1 - s_i)^(1 - p) (1 - s_f)^p``.

    Arguments as `LinearSchedule`.
    """

    name = "exponential"

    def _ramp(self, progress: float) -> float:
        left = (1.0 - progress) * math.log1p(-self.initial) + progress * math.log1p(-self.final)
        return -math.expm1(left)


class CubicSchedule(LinearSchedule):
    """Fast first, slow at the end: automated gradual pruning (Zhu & Gupta 2017, equation 1).

    ``s_t = s_f + (s_i - s_f) (1 - (t - t0) / (tn - t0))^3``. Arguments as `LinearSchedule`; ``every`` is the paper's
    pruning frequency Δt.
    """

    name = "cubic"

    def _ramp(self, progress: float) -> float:
        return self.final + (self.initial - self.final) * (1.0 - progress) ** 3


#: The name under which the cubic schedule was published.
AGPSchedule = CubicSchedule

_ALL: tuple[type[Schedule], ...] = (
    OneShotSchedule,
    IterativeSchedule,
    LinearSchedule,
    ExponentialSchedule,
    CubicSchedule,
)
_KINDS = {kind.name: kind for kind in _ALL} | {"agp": CubicSchedule}


def make_schedule(name: str, final: float, **options: Any) -> Schedule:
    """A schedule by name.

    Args:
        name: ``one_shot``, ``iterative``, ``linear``, ``exponential``, ``cubic`` or ``agp`` (the same as ``cubic``).
        final: Share removed at the end, ``[0, 1)``.
        **options: Further arguments of that schedule's class.

    Raises:
        PruneError: an unknown name, or a wrong or missing option.
    """
    try:
        return _kind(name)(final, **options)
    except TypeError as error:
        raise PruneError(308, f"the {name} schedule cannot be made", why=str(error), fix="see its class") from error


def schedule_from_state(state: Mapping[str, Any]) -> Schedule:
    """The schedule whose ``state_dict`` this is.

    Raises:
        PruneError: the state is incomplete or wrong.
    """
    kind = _kind(state.get("name"))
    schedule = kind.__new__(kind)
    schedule.load_state_dict(state)
    return schedule


def _kind(name: Any) -> type[Schedule]:
    if not isinstance(name, str) or name not in _KINDS:
        near = difflib.get_close_matches(str(name), _KINDS, n=1)
        fix = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(sorted(_KINDS))}"
        raise PruneError(309, f"unknown schedule {name!r}", fix=fix)
    return _KINDS[name]


def _share(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0.0 <= float(value) < 1.0:
        why = "it is the share of the network that goes: something must stay"
        raise PruneError(310, f"{name} must be at least 0 and less than 1, not {value!r}", why=why)
    return float(value)


def _count(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise PruneError(311, f"{name} must be an integer of at least {least}, not {value!r}")
    return value
