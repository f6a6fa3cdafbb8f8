"""Pipeline: passes in the user's order, each checked, timed and printed; finds the first bad one."""

from __future__ import annotations

import dataclasses
import difflib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from fxcompress.errors import FxcError, PassError, UsageError
from fxcompress.ir import Program
from fxcompress.passbase import Context, Pass, Refusal, Result, output_error
from fxcompress.quant.fake_quantize import QUANTIZERS

__all__ = ["Pipeline", "StepRecord", "as_pipeline", "precision_of"]

_log = logging.getLogger("fxcompress")


@dataclass
class StepRecord:
    """One pass of a pipeline run, as it goes into the report."""

    name: str
    config: dict[str, Any]
    modified: bool
    exact: bool
    error: float | None
    seconds: float
    changes: list[str]
    refusals: list[str]
    notes: list[str]
    metrics: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, step: Pass, result: Result) -> StepRecord:
        """Record of ``step`` having given ``result``."""
        refusals = [str(r) for r in result.refusals]
        timing = (result.modified, step.exact, result.error, result.seconds)
        return cls(step.name, step.to_dict(), *timing, result.changes, refusals, result.notes, result.metrics)

    def __str__(self) -> str:
        what = f"{len(self.changes)} changes" if self.modified else "no change"
        error = "" if self.error is None else f", error {self.error:.1e}"
        refused = f", {len(self.refusals)} refused" if self.refusals else ""
        return f"{self.name}: {what}{refused}{error}, {self.seconds:.2f} s"


@dataclass(frozen=True)
class Pipeline(Pass):
    """Runs passes one after the other; it is a pass itself, so pipelines nest.

    Attributes:
        passes: In the order they run.
        dump: Folder for ``00_capture.txt``, ``01_<Pass>.txt`` and ``01_<Pass>.diff``; None writes nothing.
        observer: Called with each StepRecord as soon as its pass is done.
        first: Passes that ran before this pipeline, for the numbers in dump file names.

    Raises:
        UsageError: something among ``passes`` is not a pass.
    """

    exact: ClassVar[bool] = False
    passes: tuple[Pass, ...] = ()
    dump: str | None = field(default=None, compare=False)
    observer: Callable[[StepRecord], None] | None = field(default=None, compare=False)
    first: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "passes", tuple(self.passes))
        for step in self.passes:
            if not isinstance(step, Pass):
                is_class = isinstance(step, type) and issubclass(step, Pass)
                fix = f"write {step.__name__}() for an instance" if is_class else "give instances of Pass"
                raise UsageError(22, f"{step!r} is not a pass", where="passes", fix=fix)

    @property
    def writes_input(self) -> bool:
        """True when one of the passes does."""
        return any(p.writes_input for p in self.passes)

    def to_dict(self) -> dict[str, Any]:
        """Recipe entry with the entries of the passes; where to dump and what to call is no part of a recipe."""
        return {"name": self.name, "passes": [p.to_dict() for p in self.passes]}

    def __call__(self, program: Program, context: Context | None = None, outputs: list[Any] | None = None) -> Result:
        """Run all passes, each under its own contract; the error is that of the last program against the first.

        Args:
            program: Left untouched.
            context: Data and target.
            outputs: Outputs of ``program`` on its example when already known.

        Raises:
            FxcError: of the pass that failed, with a note that names it and the passes before it.
        """
        context = context or Context()
        start = time.perf_counter()
        if context.verify and outputs is None:
            outputs = program.run_example()
        result = self._run(program, context, outputs)
        if outputs is not None and result.outputs is not None:
            result.error = output_error(outputs, result.outputs)
        result.seconds = time.perf_counter() - start
        return result

    def run(self, program: Program, context: Context) -> Result:
        """Run all passes."""
        return self._run(program, context, None)

    def _run(self, program: Program, context: Context, outputs: list[Any] | None) -> Result:
        records: list[StepRecord] = []
        refusals: list[Refusal] = []
        if self.first == 0:
            self._dump(0, "capture", program, None)
        floats = _FloatProgram(context)
        for number, step in enumerate(self.passes, 1):
            try:
                result = step(program, floats.before(step, program), outputs)
            except FxcError as error:
                done = ", ".join(r.name for r in records) or "none"
                error.add_note(f"  in pass {number} of {len(self.passes)}, {step.name}; passes before it: {done}")
                raise
            records.append(StepRecord.of(step, result))
            refusals += result.refusals
            self._observe(records[-1])
            self._dump(self.first + number, step.name, result.program, program)
            floats.behind(step, program, result.reference)
            program, outputs = result.program, result.outputs
        return Result(
            program if records else program.clone(),
            changes=[c for r in records for c in r.changes],
            refusals=refusals,
            notes=[n for r in records for n in r.notes],
            metrics={"steps": records},
            modified=any(r.modified for r in records),
            outputs=outputs,
            reference=floats.context.reference,
        )

    def bisect(self, program: Program, good: Callable[[Program], bool], context: Context | None = None) -> Pass | None:
        """The first pass whose result is not ``good``; None when the final program is good.

        Assumes that once bad, the result stays bad: about ``log2(len(passes))`` programs are tested besides the first
        and the last. In nested pipelines the innermost pass is found.

        Args:
            program: What the passes start from.
            good: The test.
            context: Data and target. Outputs are not compared on the way.

        Raises:
            PassError: the input program itself is not good.
        """
        if not good(program):
            raise PassError(20, "bisect: the program is bad before any pass runs", fix="check the predicate")
        return self._bisect(program, good, dataclasses.replace(context or Context(), verify=False))

    def _bisect(self, program: Program, good: Callable[[Program], bool], context: Context) -> Pass | None:
        stages, contexts, floats = [program], [], _FloatProgram(context)
        for step in self.passes:
            contexts.append(floats.before(step, stages[-1]))
            result = step(stages[-1], contexts[-1])
            floats.behind(step, stages[-1], result.reference)
            stages.append(result.program)
        if good(stages[-1]):
            return None
        low, high = 0, len(stages) - 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if good(stages[middle]) else (low, middle)
        step = self.passes[low]
        return step._bisect(stages[low], good, contexts[low]) if isinstance(step, Pipeline) else step

    def _observe(self, record: StepRecord) -> None:
        _log.info("%s", record)
        if self.observer is not None:
            self.observer(record)

    def _dump(self, number: int, name: str, program: Program, before: Program | None) -> None:
        if self.dump is None:
            return
        text = program.text()
        path = Path(self.dump) / f"{number:02d}_{name}.txt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            if before is not None:
                path.with_suffix(".diff").write_text(_diff(before.text(), text), encoding="utf-8")
        except OSError as error:
            raise UsageError(23, "the program cannot be dumped", where=str(path), why=str(error)) from error


class _FloatProgram:
    """What the passes of a pipeline find as ``Context.reference``.

    Args:
        context: Of the pipeline; a reference that it names is the one, as long as no pass writes over its tensors.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self.given = context.reference is not None

    def before(self, step: Pass, program: Program) -> Context:
        """The context of ``step``, which takes ``program``; a pipeline finds those of its float programs itself."""
        if self.given or any(isinstance(m, QUANTIZERS) for m in program.gm.modules()):
            return self.context
        self.context = dataclasses.replace(self.context, reference=program)
        return dataclasses.replace(self.context, reference=None) if isinstance(step, Pipeline) else self.context

    def behind(self, step: Pass, program: Program, inner: Program | None) -> None:
        """``step`` is done with ``program``; ``inner`` is the last float program inside of it."""
        if inner is not None and not self.given:
            self.context = dataclasses.replace(self.context, reference=inner)
        reference = self.context.reference
        if step.writes_input and reference is not None and _storages(reference) & _storages(program):
            self.context = dataclasses.replace(self.context, reference=None)


def _storages(program: Program) -> set[int]:
    return {p.untyped_storage().data_ptr() for p in program.gm.parameters()}


def _diff(before: str, after: str) -> str:
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), "before", "after", lineterm="", n=1)
    return "".join(f"{line}\n" for line in lines)


def as_pipeline(passes: Sequence[Pass] | Pass, **options: Any) -> Pipeline:
    """A pipeline over ``passes`` (a single pass is allowed); options as those of `Pipeline`."""
    steps = (passes,) if isinstance(passes, Pass) else tuple(passes)
    return Pipeline(passes=steps, **options)


def precision_of(passes: Sequence[Pass]) -> str:
    """What reports call a program behind these passes: ``int8``, ``int4 weights + int8``; "" when none quantizes."""
    names = list(dict.fromkeys(p.precision for p in passes if p.precision))
    return " + ".join(n for n in names if n.removesuffix(" weights") == n or n.removesuffix(" weights") not in names)
