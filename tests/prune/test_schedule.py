"""Schedules against their formulas, and what they refuse."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxcompress.errors import PruneError
from fxcompress.prune.schedule import (
    AGPSchedule,
    CubicSchedule,
    ExponentialSchedule,
    IterativeSchedule,
    LinearSchedule,
    OneShotSchedule,
    Schedule,
    make_schedule,
    schedule_from_state,
)

RAMPS = (LinearSchedule, ExponentialSchedule, CubicSchedule)
EXAMPLES = [
    OneShotSchedule(0.5, start=7),
    IterativeSchedule(0.6, rounds=4, every=10, initial=0.1, start=5),
    LinearSchedule(0.8, end=100, every=9),
    ExponentialSchedule(0.9, initial=0.3, start=10, end=60, every=10),
    CubicSchedule(0.75, initial=0.25, start=20, end=120, every=7),
]


# ------------------------------------------------------------------------------------------------ formulas
@given(
    final=st.integers(1, 99),
    initial=st.integers(0, 99),
    start=st.integers(0, 50),
    length=st.integers(1, 90),
    data=st.data(),
)
def test_ramps_follow_their_formulas(final: int, initial: int, start: int, length: int, data: Any) -> None:
    s_i, s_f = Fraction(min(initial, final), 100), Fraction(final, 100)
    step = data.draw(st.integers(start, start + length))
    p = Fraction(step - start, length)
    expected = {
        "linear": float(s_i + (s_f - s_i) * p),
        "exponential": 1 - float(1 - s_i) ** float(1 - p) * float(1 - s_f) ** float(p),
        "cubic": float(s_f + (s_i - s_f) * (1 - p) ** 3),
    }
    for kind in RAMPS:
        schedule = kind(float(s_f), initial=float(s_i), start=start, end=start + length)
        assert schedule.sparsity(step) == pytest.approx(expected[kind.name], abs=1e-12)


def test_cubic_by_hand() -> None:
    """Zhu & Gupta's formula at a quarter, half and three quarters of the way from 0 to 0.8."""
    schedule = CubicSchedule(0.8, start=100, end=500, every=100)
    by_hand = {99: 0.0, 100: 0.0, 200: 0.4625, 300: 0.7, 400: 0.7875, 500: 0.8, 9999: 0.8}
    assert {t: round(schedule.sparsity(t), 9) for t in by_hand} == by_hand
    assert schedule.pruning_steps() == [200, 300, 400, 500]
    assert AGPSchedule is CubicSchedule


def test_iterative_by_hand() -> None:
    schedule = IterativeSchedule(0.6, rounds=3, every=10, start=5)
    by_hand = {4: 0.0, 5: 0.2, 14: 0.2, 15: 0.4, 24: 0.4, 25: 0.6, 100: 0.6}
    assert {t: round(schedule.sparsity(t), 12) for t in by_hand} == by_hand
    assert schedule.pruning_steps() == [5, 15, 25] and schedule.rounds == 3
    assert IterativeSchedule(0.5, rounds=1, every=3).pruning_steps() == [0]


def test_one_shot() -> None:
    schedule = OneShotSchedule(0.5, start=3)
    assert [schedule.sparsity(t) for t in (0, 2, 3, 4)] == [0.0, 0.0, 0.5, 0.5]
    assert schedule.pruning_steps() == [3]
    assert [schedule.finished(t) for t in (2, 3)] == [False, True]


# ------------------------------------------------------------------------------------------------ every schedule
@pytest.mark.parametrize("schedule", EXAMPLES, ids=lambda s: s.name)
def test_never_shrinks_and_ends_exactly(schedule: Schedule) -> None:
    shares = [schedule.sparsity(t) for t in range(schedule.end + 20)]
    assert shares == sorted(shares)
    assert shares[schedule.end] == schedule.final and shares[-1] == schedule.final
    assert all(share == 0.0 for share in shares[: schedule.start])


@pytest.mark.parametrize("schedule", EXAMPLES, ids=lambda s: s.name)
def test_should_prune_exactly_where_the_share_has_grown(schedule: Schedule) -> None:
    """Whoever asks at every step and prunes when told so is at the final share at the end, and never idle."""
    gone, steps = 0.0, []
    for t in range(schedule.end + 20):
        if schedule.should_prune(t):
            assert schedule.sparsity(t) > gone
            gone, steps = schedule.sparsity(t), [*steps, t]
    assert gone == schedule.final
    assert steps == schedule.pruning_steps()
    grid = [t for t in steps if t != schedule.end]
    assert all((t - schedule.start) % schedule.every == 0 for t in grid)


def test_a_schedule_to_zero_never_prunes() -> None:
    assert LinearSchedule(0.0, end=10).pruning_steps() == []
    assert OneShotSchedule(0.0).pruning_steps() == []


@pytest.mark.parametrize("schedule", EXAMPLES, ids=lambda s: s.name)
def test_state_round_trip(schedule: Schedule) -> None:
    state = json.loads(json.dumps(schedule.state_dict()))
    twin = schedule_from_state(state)
    assert type(twin) is type(schedule) and twin == schedule and hash(twin) == hash(schedule)
    assert [twin.sparsity(t) for t in range(130)] == [schedule.sparsity(t) for t in range(130)]
    assert twin.pruning_steps() == schedule.pruning_steps()


def test_load_state_dict_takes_over_and_checks() -> None:
    schedule = CubicSchedule(0.5, end=10)
    schedule.load_state_dict(CubicSchedule(0.9, end=40, every=2).state_dict())
    assert schedule == CubicSchedule(0.9, end=40, every=2)
    with pytest.raises(PruneError, match="FXC-PRUNE-304"):
        schedule.load_state_dict(LinearSchedule(0.5, end=10).state_dict())
    with pytest.raises(PruneError, match="lacks end"):
        schedule.load_state_dict({"name": "cubic", "final": 0.5, "initial": 0.0, "start": 0, "every": 1})
    with pytest.raises(PruneError, match="FXC-PRUNE-310"):
        schedule.load_state_dict(schedule.state_dict() | {"final": 1.5})
    assert schedule == CubicSchedule(0.9, end=40, every=2), "a wrong state changed the schedule"


def test_by_name() -> None:
    assert make_schedule("agp", 0.5, end=9) == CubicSchedule(0.5, end=9)
    assert make_schedule("iterative", 0.5, rounds=2, every=4) == IterativeSchedule(0.5, rounds=2, every=4)
    with pytest.raises(PruneError, match=r"did you mean 'exponential'"):
        make_schedule("exponentail", 0.5, end=9)
    with pytest.raises(PruneError, match="FXC-PRUNE-308"):
        make_schedule("linear", 0.5, rounds=3)


# ------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize("final", [1.0, 1.5, -0.1, math.nan, math.inf, "0.5", None, True])
def test_share_out_of_range(final: Any) -> None:
    for make in (
        OneShotSchedule,
        lambda f: LinearSchedule(f, end=5),
        lambda f: IterativeSchedule(f, rounds=2, every=1),
    ):
        with pytest.raises(PruneError, match="FXC-PRUNE-310 final"):
            make(final)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"initial": 0.6, "end": 9}, "FXC-PRUNE-301"),
        ({"start": 9, "end": 9}, "FXC-PRUNE-302"),
        ({"end": 5, "every": 6}, "FXC-PRUNE-303"),
        ({"end": 5, "every": 0}, "FXC-PRUNE-311 every"),
        ({"end": 5, "start": -1}, "FXC-PRUNE-311 start"),
        ({"end": 5.5}, "FXC-PRUNE-311 end"),
    ],
)
def test_steps_that_do_not_fit(arguments: dict[str, Any], error: str) -> None:
    with pytest.raises(PruneError, match=error):
        CubicSchedule(0.5, **arguments)


@pytest.mark.parametrize("step", [-1, 1.5, "3", None, True])
def test_step_that_is_none(step: Any) -> None:
    schedule = CubicSchedule(0.5, end=9)
    for ask in (schedule.sparsity, schedule.should_prune, schedule.finished):
        with pytest.raises(PruneError, match="FXC-PRUNE-311 step"):
            ask(step)


def test_rounds_that_do_not_fit() -> None:
    with pytest.raises(PruneError, match="FXC-PRUNE-311 rounds"):
        IterativeSchedule(0.5, rounds=0, every=1)
    state = IterativeSchedule(0.5, rounds=3, every=4).state_dict()
    with pytest.raises(PruneError, match="FXC-PRUNE-307"):
        schedule_from_state(state | {"end": 7})
    with pytest.raises(PruneError, match="FXC-PRUNE-306"):
        schedule_from_state(OneShotSchedule(0.5).state_dict() | {"end": 7})
