"""Latency budgets without any timing: an engine whose latency is its multiply-accumulates, and the file of steps."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import fxcompress as fxc
from fxcompress.analysis import count_macs
from fxcompress.errors import PruneError
from fxcompress.ir import Program
from fxcompress.prune import staircase
from fxcompress.prune.dependencies import Dependencies, analyze
from fxcompress.prune.plan import PruningPlan
from fxcompress.prune.staircase import Staircase, cache_file
from tests.prune.planned import program


@dataclass
class Fake:
    """A target whose engines are programs; latency is a staircase over multiply-accumulates."""

    name: str = "fake"
    step: float = 0.01
    portable: bool = False
    timed: list[float] = field(default_factory=list)

    def require(self) -> None:
        """It is installed."""

    def build(self, lowered: Program) -> Program:
        return lowered

    def compare(self, engines: dict[str, Program], args: Any, kwargs: Any) -> Any:
        assert set(engines) == {"dense", "pruned"} and len(args) == 1 and not kwargs
        share = count_macs(engines["pruned"]) / count_macs(engines["dense"])
        self.timed.append(float(np.ceil(share / self.step) * self.step))
        return SimpleNamespace(ratio=self._ratio)

    def _ratio(self, first: str, second: str) -> Any:
        assert (first, second) == ("pruned", "dense")
        return SimpleNamespace(median=self.timed[-1])


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fake:
    found = Fake()
    monkeypatch.setenv("FXCOMPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(staircase, "find_target", lambda name: found)
    monkeypatch.setattr(staircase, "available_targets", lambda: [found])
    monkeypatch.setattr(staircase, "compare_latency", found.compare)
    return found


def plan(**options: Any) -> PruningPlan:
    return fxc.plan_pruning(program("cnn"), target="fake", **options)


def stored() -> dict[str, dict[str, float]]:
    known: dict[str, dict[str, float]] = json.loads(cache_file().read_text())
    return known


@pytest.mark.parametrize("budget", [0.4, 0.7])
def test_the_budget_is_met(fake: Fake, budget: float) -> None:
    found = plan(latency=budget)
    assert min(fake.timed) <= budget
    assert budget - 0.1 <= found.macs[1] / found.macs[0] <= budget
    assert found.options["latency"] == budget and found.options["target"] == "fake"
    assert len(fake.timed) <= 8, "the search measures the ends and six steps between them"


def test_a_step_is_measured_once(fake: Fake) -> None:
    first = plan(latency=0.5)
    count = len(fake.timed)
    assert count and len(next(iter(stored().values()))) >= count
    second = plan(latency=0.5)
    assert len(fake.timed) == count and second.removed == first.removed
    plan(latency=0.6)
    known = len(fake.timed)
    cache_file().unlink()
    plan(latency=0.6)
    assert len(fake.timed) > known, "without the file it is measured anew"


def test_what_the_file_says_is_used(fake: Fake) -> None:
    plan(latency=0.5)
    cache_file().write_text(json.dumps({key: dict.fromkeys(steps, 0.1) for key, steps in stored().items()}))
    timed = len(fake.timed)
    found = analyze(program("cnn"))
    steps = Staircase(found, "fake")
    gone = np.ones(found.n_units, dtype=np.bool_)
    known = stored()[steps._key]
    assert set(known.values()) == {0.1} and len(fake.timed) == timed
    assert steps(~gone) == 0.1, "even for nothing removed, when the file has it"


def test_only_counts_matter(fake: Fake) -> None:
    found = analyze(program("chain"))
    steps = Staircase(found, "fake")
    first, last, all_of = (np.zeros(found.n_units, dtype=np.bool_) for _ in range(3))
    first[:2], last[-2:], all_of[:] = True, True, False
    other = np.zeros_like(first)
    other[1:3] = True  # two other channels of the same layer
    assert steps(all_of) == 1.0 and steps.measured == 0
    assert steps(first) == steps(other) and steps.measured == 1
    steps(last)
    assert steps.measured == 2 == len(fake.timed)


def keys(found: Dependencies, target: Fake) -> str:
    del target
    return Staircase(found, "fake")._key


def test_programs_targets_and_machines_have_their_own_steps(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    first = keys(analyze(program("cnn")), fake)
    assert first == keys(analyze(program("cnn")), fake)
    seen = {first, keys(analyze(program("chain")), fake)}
    fake.name = "another"
    seen.add(keys(analyze(program("cnn")), fake))
    fake.name = "fake"
    monkeypatch.setattr(staircase, "describe", lambda: {"cpu": "another"})
    seen.add(keys(analyze(program("cnn")), fake))
    assert len(seen) == 4


def test_a_budget_out_of_reach(fake: Fake) -> None:
    fake.step = 0.6  # the lowest step
    with pytest.raises(PruneError, match=r"the latency budget cannot be met(.|\n)*latency=0.600 or more"):
        plan(latency=0.2)


def test_without_a_target_the_first_installed_one_measures(fake: Fake) -> None:
    assert fxc.plan_pruning(program("cnn"), latency=0.7).macs[1] < program_macs()
    assert fake.timed


def program_macs() -> int:
    return count_macs(program("cnn"))


def test_where_the_file_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FXCOMPRESS_CACHE", str(tmp_path))
    assert cache_file() == tmp_path / "latency.json"
    monkeypatch.delenv("FXCOMPRESS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_file() == tmp_path / "xdg" / "fxcompress" / "latency.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_file() == Path.home() / ".cache" / "fxcompress" / "latency.json"


def test_a_broken_file_is_measured_over(fake: Fake) -> None:
    cache_file().parent.mkdir(parents=True)
    cache_file().write_text('{"half a')
    plan(latency=0.7)
    assert fake.timed and stored()
    assert [f.name for f in cache_file().parent.iterdir()] == ["latency.json"], "no temporary file is left"
