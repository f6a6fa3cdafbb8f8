"""Builds, times and scores engines for the search, and keeps the record of all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fxcompress.auto.recipes import with_layers_raised
from fxcompress.auto.trial import Made, Plan, Trial
from fxcompress.engines import Target
from fxcompress.errors import FxcError
from fxcompress.ir import Program
from fxcompress.passbase import Pass
from fxcompress.pipeline import StepRecord
from fxcompress.quant.partial import keep_layers
from fxcompress.selection import Candidate, Timed

__all__ = ["Plain", "Workshop"]

#: Runs passes: ``(passes, program, target, number of passes before) -> (program, records)``.
RunPasses = Callable[[Sequence[Pass], Program, Target, int], tuple[Program, list[StepRecord]]]


@dataclass
class Plain:
    """The float program of a target, and its engine."""

    target: Target
    program: Program
    records: list[StepRecord]
    candidate: Candidate


@dataclass
class Workshop:
    """Makes engines.

    Attributes:
        run_passes: See `RunPasses`.
        evaluate: The user's score of an engine.
        threads: Threads of engines.
        engine_options: Options of the target's ``build``.
        timed: Latencies; None: nothing is measured.
        trials: Everything tried, in order.
    """

    run_passes: RunPasses
    evaluate: Callable[[Any], float]
    threads: int | None
    engine_options: Mapping[str, Any]
    timed: Timed | None
    trials: list[Trial] = field(default_factory=list)
    evaluations: int = 0
    _made: dict[tuple[str, tuple[Pass, ...]], Made] = field(default_factory=dict)

    def trial(self, plan: Plan, plain: Plain) -> Trial:
        """Build the engine of a plan. Where that fails, the trial has no candidate and says why."""
        names = [name for name, _ in plan.left]
        trial = Trial(plan.name, plain.target.name, left=names)
        self.trials.append(trial)
        try:
            made = self._mixed(plan, plain, names)
            precision = "int8 (partly)" if plan.left and plan.family.static else plan.family.name
            trial.candidate = Candidate(
                plain.target,
                "int8" if precision == "static INT8" else precision,
                made.program,
                made.reference,
                plain.records + made.records,
                left=list(plan.left) if plan.family.static else [],
                variant=f"{plan.name} #{len(self.trials)}",
                options=self.engine_options,
            ).build(self.threads)
            trial.size = trial.candidate.engine.file_size()
        except FxcError as error:
            trial.candidate, trial.verdict = None, f"cannot be made: {error.what}"
        return trial

    def made(self, passes: tuple[Pass, ...], plain: Plain) -> Made:
        """The result of ``passes``; made once."""
        key = (plain.target.name, passes)
        if key not in self._made:
            first = next((i for i, p in enumerate(passes) if p.precision), len(passes))
            done = len(plain.records)
            reference, before = self.run_passes(passes[:first], plain.program, plain.target, done)
            program, after = self.run_passes(passes[first:], reference, plain.target, done + first)
            self._made[key] = Made(reference, program, before + after)
        return self._made[key]

    def _mixed(self, plan: Plan, plain: Plain, names: Sequence[str]) -> Made:
        if names and plan.family.static:
            full = self.made(plan.recipe.passes, plain)
            program = keep_layers(full.reference, full.program, plain.target.scheme(), _escaped(names))
            if program is not None:
                return Made(full.reference, program, full.records)
        return self.made(with_layers_raised(plan.recipe.passes, names), plain)

    def time(self, trials: Sequence[Trial], floats: Sequence[Candidate]) -> None:
        """Measure engines next to the float ones."""
        found = [t for t in trials if t.candidate is not None]
        if self.timed is None or not found:
            return
        self.timed.add([*floats, *(t.candidate for t in found if t.candidate is not None)])
        for trial in found:
            assert trial.candidate is not None
            trial.latency_ms = self.timed.latency[trial.candidate.label].p50_ms

    def score(self, trial: Trial) -> float:
        """Evaluate an engine."""
        assert trial.candidate is not None
        self.evaluations += 1
        trial.accuracy = float(self.evaluate(trial.candidate.engine))
        return trial.accuracy


def _escaped(names: Sequence[str]) -> tuple[str, ...]:
    import glob

    return tuple(glob.escape(name) for name in names)
