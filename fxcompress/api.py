"""compile(): model in, proven engine out. Capture -> passes -> engine -> gates -> report."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from fxcompress.analysis import count_macs, count_parameters
from fxcompress.artifact import load as load_folder
from fxcompress.auto.options import AutoSearch
from fxcompress.auto.run import Question, answer
from fxcompress.capture import capture
from fxcompress.data import CalibrationData, as_call, example_from
from fxcompress.engines import Engine, Target
from fxcompress.engines import target as find_target
from fxcompress.engines.base import scheme_for
from fxcompress.environment import describe, peak_memory, trim_memory
from fxcompress.errors import CaptureError, GateError, PassError, UsageError
from fxcompress.ir import Program, evaluating, nonfinite_tensors
from fxcompress.parity import check_parity
from fxcompress.passbase import Context, Pass
from fxcompress.passes import (
    EliminateCommonSubexpressions,
    EliminateDeadCode,
    FoldBatchNorm,
    FoldConstants,
    FuseActivations,
    QuantizeStatic,
    RemoveIdentity,
)
from fxcompress.pipeline import Pipeline, StepRecord, precision_of
from fxcompress.report import Report
from fxcompress.selection import Candidate, Choice, available_targets, choose

__all__ = ["compile", "default_passes", "load"]

_log = logging.getLogger("fxcompress")
_PARITY_SAMPLES = 8


def default_passes(*, quantize: bool) -> tuple[Pass, ...]:
    """What compile runs when no passes are given: clean-up, folding, fusion and, with data, static quantization."""
    exact: tuple[Pass, ...] = (
        RemoveIdentity(),
        FoldConstants(),
        EliminateCommonSubexpressions(),
        FoldBatchNorm(),
        FuseActivations(),
        EliminateDeadCode(),
    )
    return (*exact, QuantizeStatic()) if quantize else exact


def compile(
    model: nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any] | torch.Tensor | None = None,
    passes: Sequence[Pass] | Literal["auto"] | AutoSearch | None = None,
    target: str | None = None,
    *,
    calibration: Iterable[Any] | None = None,
    train: Iterable[Any] | None = None,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    evaluate: Callable[[Callable[..., Any]], float] | None = None,
    max_drop: float | None = None,
    dynamic_shapes: Any = None,
    threads: int | None = None,
    engine_options: Mapping[str, Any] | None = None,
    measure: bool = True,
    speed_gate: bool | None = None,
    strict: bool = False,
    dump: str | None = None,
    observer: Callable[[StepRecord], None] | None = None,
) -> Engine:
    """Compress ``model`` and build an engine that is checked and measured before it is handed over.

    The model itself is not changed.

    Args:
        model: Any module ``torch.export`` or ``torch.fx`` can capture.
        example_inputs: Positional inputs as a tuple, one tensor, or a dict of keyword inputs. Optional when
            ``calibration`` can supply a batch.
        passes: What to do, in order. Omitted: fusion, and static INT8 quantization when there is calibration data.
            ``"auto"``, or an ``AutoSearch`` with its budgets: find the mix of precisions that holds ``max_drop`` and is
            fastest as measured; needs ``evaluate`` and ``max_drop``; ``report.trials`` lists what was tried.
        target: ``"onnxruntime"``, ``"openvino"``, ``"tensorrt"``, ``"triton"`` or ``"torch"``. Omitted: the fastest of the
            installed CPU runtimes.
        calibration: Iterable of batches: tensors, tuples (a label behind the inputs is ignored) or dicts.
        train: Iterable of batches with labels, for pruning by gradients.
        loss: ``loss(output, batch) -> scalar`` for ``train``; by default cross-entropy against an integer label.
        evaluate: Scores any callable model; higher is better. Called on ``model`` and on the engine.
        max_drop: Largest allowed ``evaluate(model) - evaluate(engine)``.
        dynamic_shapes: As in ``torch.export.export``; by default the batch is dynamic.
        threads: Threads of the engine; by default the physical cores.
        engine_options: Options of the target's ``build``, e.g. ``{"torch_compile": True}`` for ``triton``. Needs
            ``target``.
        measure: Measure latency before and after (processes of their own, a few seconds).
        speed_gate: Leave layers, or the whole model, in float32 where INT8 is not faster on this machine. By default on
            when ``passes`` are omitted, and off when they are given. Needs ``measure``.
        strict: Turn every fallback (a layer left in float32, a fixed batch) into an error.
        dump: Folder for the program after every pass, as text, with diffs.
        observer: Called after every pass with its record.

    Returns:
        The engine: torch in, torch out, same structure as the model's output; ``engine.report`` tells what happened.

    Raises:
        CaptureError: the model cannot be captured; every obstacle is listed.
        CalibrationError: the data is empty, broken or does not fit.
        PassError: a pass cannot run, or an exact pass changed the outputs.
        ParityError: the engine computes something else than the simulated graph; the first layer is named.
        GateError: ``max_drop`` is exceeded; ``error.engine`` holds the engine.
        MissingRuntimeError: the runtime is not installed; the pip line is given.
    """
    if max_drop is not None and evaluate is None:
        raise UsageError(30, "max_drop needs evaluate", fix="pass evaluate=function_of_a_model")
    if engine_options and target is None:
        raise UsageError(31, "engine_options need a target", fix="pass target=...")
    auto = AutoSearch() if isinstance(passes, str) else passes if isinstance(passes, AutoSearch) else None
    if isinstance(passes, str) and passes != "auto":
        raise UsageError(545, f"passes={passes!r}: not known", fix="give a list of passes, or passes='auto'")
    if auto is not None and (evaluate is None or max_drop is None):
        raise UsageError(546, "the search needs evaluate and max_drop", fix="pass evaluate=top1, max_drop=0.005")
    data = None if calibration is None else CalibrationData(calibration)
    targets = available_targets() if target is None else [find_target(target)]
    for chosen in targets:
        chosen.require()
    needs = Context(calibration=data, train=train, loss=loss)
    steps = None if isinstance(passes, (str, AutoSearch)) else passes
    job = _Job(model, steps, needs, threads, dump, observer, dict(engine_options or {}))
    job.capture(example_inputs, dynamic_shapes)
    if auto is not None and evaluate is not None and max_drop is not None:
        engine = job.search(auto, targets, evaluate, max_drop, measure=measure)
        job.finish(engine, strict)
        return engine
    candidates = [c for t in targets for c in job.candidates(t)]
    gate = passes is None if speed_gate is None else speed_gate
    engine = job.select(candidates, measure=measure or target is None, gate=gate)
    job.check_accuracy(engine, evaluate, max_drop)
    job.finish(engine, strict)
    return engine


def load(folder: str | Path, *, threads: int | None = None) -> Engine:
    """Load a saved engine. Needs neither the model's source nor pickle; every file is checked against its sha256.

    Raises:
        ArtifactError: the folder is incomplete or was changed.
        MissingRuntimeError: its runtime is not installed.
    """
    engine = load_folder(folder, threads=threads)
    if isinstance(engine.report, dict):
        engine.report = Report.from_dict(engine.report)
    return engine


@dataclass
class _Job:
    """One compilation: what was given, and what is known so far."""

    model: nn.Module
    passes: Sequence[Pass] | None
    needs: Context
    threads: int | None
    dump: str | None
    observer: Callable[[StepRecord], None] | None
    options: dict[str, Any] = field(default_factory=dict)
    captured: Program | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    accuracy: dict[str, Any] = field(default_factory=dict)
    decisions: list[str] = field(default_factory=list)
    chosen: Candidate | None = None
    baseline: Candidate | None = None
    latency: dict[str, Any] = field(default_factory=dict)
    speedup: tuple[float, float, float] | None = None
    parity: dict[str, Any] = field(default_factory=dict)
    trials: list[dict[str, Any]] = field(default_factory=list)

    @property
    def data(self) -> CalibrationData | None:
        return cast(CalibrationData | None, self.needs.calibration)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        trim_memory()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def capture(self, example: Any, dynamic_shapes: Any) -> None:
        args, kwargs = _example_call(example) if example is not None else example_from(_raw(self.data), self.model)
        with self.timed("capture"):
            self.captured = capture(self.model, args, kwargs, dynamic_shapes=dynamic_shapes)
            bad = nonfinite_tensors(self.captured)
        if bad:
            more = f" and {len(bad) - 8} more" if len(bad) > 8 else ""
            raise CaptureError(
                10,
                "the model holds NaN or infinite weights",
                where=", ".join(bad[:8]) + more,
                fix="train or load the model again; non-finite weights cannot be compressed",
            )

    def candidates(self, target: Target) -> list[Candidate]:
        """The float32 engine of ``target`` and, when the passes compress, the compressed one behind it."""
        assert self.captured is not None
        scheme = scheme_for(target, self.options)
        steps = self.passes if self.passes is not None else default_passes(quantize=self.data is not None)
        cut = next((i for i, p in enumerate(steps) if not p.exact), len(steps))
        first = next((i for i, p in enumerate(steps) if p.precision), len(steps))
        context = replace(self.needs, scheme=scheme)
        with self.timed("passes"):
            plain, records = self._run(steps[:cut], self.captured, context, target, 0)
        result = [Candidate(target, "float32", plain, plain, records, is_baseline=True, options=self.options)]
        if cut < len(steps):
            precision, variant = (precision_of(steps), "") if first < len(steps) else ("float32", "compressed")
            with self.timed("compression"):
                reference, more = self._run(steps[cut:first], plain, context, target, cut)
                records = records + more
                program, more = self._run(steps[first:], reference, context, target, max(cut, first))
            steps_done = records + more
            result.append(
                Candidate(target, precision, program, reference, steps_done, variant=variant, options=self.options)
            )
        with self.timed("build"):
            for candidate in result:
                candidate.build(self.threads)
                if candidate is not result[-1]:
                    candidate.engine.release()  # it is timed in another process, and rarely handed over
        return result

    def _run(
        self, steps: Sequence[Pass], program: Program, context: Context, target: Target, done: int
    ) -> tuple[Program, list[StepRecord]]:
        folder = None if self.dump is None else f"{self.dump}/{target.name}"
        pipeline = Pipeline(passes=tuple(steps), dump=folder, observer=self.observer, first=done)
        result = pipeline(program, context)
        return result.program, result.metrics["steps"]

    def select(self, candidates: list[Candidate], *, measure: bool, gate: bool) -> Engine:
        """Measure the candidates and keep the one to hand over; parity is checked on it before."""
        assert self.captured is not None
        args, kwargs = self.captured.example
        with self.timed("speed"):
            unmeasured = candidates[-1].target.unmeasured()
            choice = choose(
                candidates,
                args,
                kwargs,
                measure=measure and unmeasured is None,
                gate=gate,
                threads=self.threads,
            )
            if unmeasured is not None and candidates[-1].precision != "float32":
                self.decisions.append(unmeasured)
        self._take(choice)
        with self.timed("parity"):
            self._check_parity(choice.chosen)
        return choice.chosen.engine

    def _take(self, choice: Choice) -> None:
        self.chosen, self.baseline = choice.chosen, choice.baseline
        self.decisions += choice.decisions
        self.latency, self.speedup = choice.latency, choice.speedup

    def _check_parity(self, candidate: Candidate) -> None:
        reference = candidate.reference if candidate.precision != "float32" else None
        found = check_parity(candidate.engine, candidate.program, self._samples(), reference=reference)
        self.parity = found.to_dict()

    def search(
        self,
        options: AutoSearch,
        targets: Sequence[Target],
        evaluate: Callable[[Any], float],
        max_drop: float,
        *,
        measure: bool,
    ) -> Engine:
        """Find the mix of precisions; what is chosen was built, measured, scored and compared with its simulation."""
        assert self.captured is not None
        before = self._score_model(evaluate)
        run = self._run_for
        rules = (evaluate, before, max_drop, options, self._check_parity, self.threads, self.options, measure)
        question = Question(self.captured, targets, default_passes(quantize=False), self.needs, run, *rules)
        with self.timed("search"):
            choice, after, self.trials = answer(question)
        self._take(choice)
        if choice.chosen.is_baseline:
            self._check_parity(choice.chosen)
        self.accuracy = _accuracy(before, after, max_drop)
        return choice.chosen.engine

    def _run_for(
        self, steps: Sequence[Pass], program: Program, target: Target, done: int
    ) -> tuple[Program, list[StepRecord]]:
        return self._run(steps, program, replace(self.needs, scheme=target.scheme()), target, done)

    def _score_model(self, evaluate: Callable[[Any], float]) -> float:
        with self.timed("accuracy"), torch.no_grad(), evaluating(self.model):
            return float(evaluate(self.model))

    def _samples(self) -> list[Any]:
        """A few inputs to compare on: the first calibration samples, else the example."""
        assert self.captured is not None
        if self.data is None:
            return [self.captured.example]
        return list(self.data.calls(self.captured, _PARITY_SAMPLES))

    def check_accuracy(self, engine: Engine, evaluate: Callable[[Any], float] | None, max_drop: float | None) -> None:
        """Score model and engine with the user's function."""
        if evaluate is None:
            return
        before = self._score_model(evaluate)
        with self.timed("accuracy"):
            after = float(evaluate(engine))
        self.accuracy = _accuracy(before, after, max_drop)

    def finish(self, engine: Engine, strict: bool) -> None:
        """Attach the report; raise what the gates or ``strict`` ask for."""
        report = engine.report = self.report(engine)
        fallbacks = [f"{n}: {r}" for n, r in report.left] + report.notes
        if strict and fallbacks:
            raise PassError(
                42, "strict: something fell back", why="; ".join(fallbacks[:10]), fix="drop strict=True to accept it"
            )
        if self.accuracy and not self.accuracy["passed"]:
            error = GateError(
                1,
                f"accuracy fell from {self.accuracy['before']:.4f} to {self.accuracy['after']:.4f}",
                why=f"max_drop is {self.accuracy['max_drop']:g}",
                fix="raise max_drop, give more calibration data, or keep layers in float32 with QuantizeStatic(ignore=...)",
            )
            error.engine = engine
            raise error

    def report(self, engine: Engine) -> Report:
        assert self.captured is not None and self.chosen is not None and self.baseline is not None
        chosen, captured = self.chosen, self.captured
        left = _left(chosen.records)
        notes = (
            captured.notes + [n for r in chosen.records for n in r.notes if " stays float: " not in n] + engine.notes
        )
        return Report(
            model=type(self.model).__name__,
            target=engine.name,
            precision=chosen.precision,
            parameters=(count_parameters(captured), count_parameters(chosen.program)),
            macs=(count_macs(captured), count_macs(chosen.program)),
            size=(self.baseline.engine.file_size(), engine.file_size()),
            latency=self.latency,
            speedup=self.speedup,
            parity=self.parity,
            accuracy=self.accuracy,
            memory=peak_memory(),
            steps=chosen.records,
            left=left + chosen.left,
            decisions=self.decisions,
            trials=self.trials,
            notes=notes,
            seconds={k: round(v, 3) for k, v in self.seconds.items()},
            environment=describe(),
        )


def _example_call(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    return as_call(example)


def _accuracy(before: float, after: float, max_drop: float | None) -> dict[str, Any]:
    passed = max_drop is None or before - after <= max_drop
    return {"before": before, "after": after, "max_drop": max_drop, "passed": passed}


def _raw(data: CalibrationData | None) -> Iterable[Any] | None:
    return None if data is None else data.data


def _left(records: Sequence[StepRecord]) -> list[tuple[str, str]]:
    """Layers that no step quantized, and the first reason given for each."""
    done = {change.split()[1] for r in records for change in r.changes if change.startswith("quantized ")}
    first: dict[str, str] = {}
    for name, found, reason in (note.partition(" stays float: ") for r in records for note in r.notes):
        if found and name not in done:
            first.setdefault(name, reason)
    return list(first.items())
