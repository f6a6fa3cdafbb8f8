"""From a captured program to the mix that is handed over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from fxcompress.auto.options import AutoSearch
from fxcompress.auto.search import Search
from fxcompress.auto.workshop import Plain, RunPasses, Workshop
from fxcompress.data import CalibrationData
from fxcompress.engines import Target
from fxcompress.errors import UsageError
from fxcompress.ir import Program
from fxcompress.passbase import Context, Pass
from fxcompress.selection import Candidate, Choice, Timed

__all__ = ["Question", "answer"]


@dataclass
class Question:
    """What is searched for.

    Attributes:
        captured: The user's program.
        targets: Runtimes to choose from.
        exact: Passes that run first and keep the outputs.
        needs: Calibration data.
        run_passes: Runs passes for a target.
        evaluate: Scores a callable model; higher is better.
        before: Its value for the user's model.
        max_drop: Largest allowed drop of it.
        options: Objective and budgets.
        parity: Raises ParityError when an engine is not what its program computes.
        threads: Threads of engines.
        engine_options: Options of the target's ``build``.
        measure: Time engines; else the first recipe that holds is taken.
    """

    captured: Program
    targets: Sequence[Target]
    exact: Sequence[Pass]
    needs: Context
    run_passes: RunPasses
    evaluate: Callable[[Any], float]
    before: float
    max_drop: float
    options: AutoSearch
    parity: Callable[[Candidate], Any]
    threads: int | None
    engine_options: Mapping[str, Any]
    measure: bool


def answer(question: Question) -> tuple[Choice, float, list[dict[str, Any]]]:
    """The choice with its measurements, the accuracy of its engine, and everything that was tried.

    Raises:
        GateError: nothing keeps a budget.
        UsageError: a latency is asked for and nothing may or can be measured.
    """
    q = question
    reasons = ([] if q.measure else ["measure=False"]) + [r for t in q.targets if (r := t.unmeasured()) is not None]
    if reasons and q.options.max_latency_ms is not None:
        what = f"max_latency_ms={q.options.max_latency_ms:g} cannot be kept without measuring"
        raise UsageError(550, what, why="; ".join(reasons), fix="leave it out, or measure on the target")
    plains = [_plain(q, target) for target in q.targets]
    floats = [p.candidate for p in plains]
    timed = None
    if not reasons:
        args, kwargs = q.captured.example
        timed = Timed(args, kwargs, q.threads)
    shop = Workshop(q.run_passes, q.evaluate, q.threads, q.engine_options, timed)
    data = cast(CalibrationData | None, q.needs.calibration)
    search = Search(shop, plains, data, q.options, q.before, q.max_drop, q.parity)
    if timed is not None:
        timed.add(floats)
    found = search.run()
    trials = [trial.to_dict() for trial in shop.trials]
    if timed is None:
        baseline = next(c for c in floats if c.target is found.chosen.target)
        return Choice(found.chosen, baseline, decisions=found.decisions), found.accuracy, trials
    return timed.choice(found.chosen, [*floats, found.chosen], found.decisions), found.accuracy, trials


def _plain(question: Question, target: Target) -> Plain:
    program, records = question.run_passes(question.exact, question.captured, target, 0)
    candidate = Candidate(
        target, "float32", program, program, records, is_baseline=True, options=question.engine_options
    ).build(question.threads)
    candidate.engine.release()
    return Plain(target, program, records, candidate)
