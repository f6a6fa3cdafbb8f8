"""The search: families by measured speed, in each the repairs in order, then a mix of precisions by sensitivity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fxcompress.auto.options import AutoSearch
from fxcompress.auto.recipes import Family, families
from fxcompress.auto.sensitivity import layer_errors
from fxcompress.auto.trial import Plan, Trial
from fxcompress.auto.workshop import Plain, Workshop
from fxcompress.data import CalibrationData, Call
from fxcompress.errors import GateError, ParityError
from fxcompress.quant.partial import variants
from fxcompress.selection import Candidate

__all__ = ["Found", "Search"]

_SLOWER = "slower than one that holds"


@dataclass
class Found:
    """What the search hands over.

    Attributes:
        chosen: Its engine is built.
        accuracy: Of the engine.
        decisions: What was decided and why.
    """

    chosen: Candidate
    accuracy: float
    decisions: list[str]


@dataclass
class _Entry:
    """A family on a target, with its first engine."""

    plain: Plain
    family: Family
    first: Trial
    left: tuple[tuple[str, str], ...] = ()
    mix: str = ""


@dataclass
class Search:
    """One search.

    Attributes:
        shop: Builds and measures.
        plains: Float programs of all targets, engines built.
        data: Calibration data, or None.
        options: What is asked for.
        before: ``evaluate`` of the user's model.
        max_drop: Largest allowed ``before - evaluate(engine)``.
        parity: Raises ParityError when an engine is not what its program computes.
    """

    shop: Workshop
    plains: Sequence[Plain]
    data: CalibrationData | None
    options: AutoSearch
    before: float
    max_drop: float
    parity: Callable[[Candidate], Any]
    decisions: list[str] = field(default_factory=list)
    _held: list[Trial] = field(default_factory=list)
    _ranked: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def run(self) -> Found:
        """Search.

        Raises:
            GateError: nothing keeps the budget of size or latency; notes on the error say what was tried.
        """
        entries = self._entries()
        self.shop.time([e.first for e in entries], self._floats)
        entries = sorted(filter(self._worth, entries), key=lambda e: self._cost(e.first))
        for entry in entries:
            if self._held and self._cost(entry.first) >= min(map(self._cost, self._held)):
                entry.first.verdict = f"{_SLOWER}: not evaluated" if not entry.first.verdict else entry.first.verdict
                continue
            self._defend(entry)
        return self._choose()

    @property
    def _floats(self) -> list[Candidate]:
        return [p.candidate for p in self.plains]

    # ------------------------------------------------------------------------------------------------ speed
    def _entries(self) -> list[_Entry]:
        """The first engine of every family, and of the parts of a static one that usually gain."""
        entries = []
        for plain in self.plains:
            found, left = families(plain.program, plain.target, self.data is not None, self.options)
            self.shop.trials += [Trial(name, plain.target.name, verdict=reason) for name, reason in left]
            for family in found:
                first = self.shop.trial(Plan(family, family.recipes[0]), plain)
                if first.candidate is None:
                    continue
                entries.append(_Entry(plain, family, first))
                entries += self._parts(entries[-1])
        return entries

    def _parts(self, entry: _Entry) -> list[_Entry]:
        assert entry.first.candidate is not None
        if not entry.family.static or self.shop.timed is None:
            return []
        found = []
        for variant in variants(entry.first.candidate.program):
            left = tuple((name, variant.reason) for name in variant.ignore)
            first = self.shop.trial(Plan(entry.family, entry.family.recipes[0], left, variant.name), entry.plain)
            if first.candidate is not None:
                found.append(_Entry(entry.plain, entry.family, first, left, variant.name))
        return found

    def _worth(self, entry: _Entry) -> bool:
        """Faster than the best float engine (when size is what counts: not slower), as measured."""
        return self._fast_enough(entry.first)

    def _fast_enough(self, trial: Trial) -> bool:
        timed = self.shop.timed
        if timed is None or trial.candidate is None:
            return trial.candidate is not None
        best = timed.fastest(self._floats)
        ratio = timed.ratio(trial.candidate, best)
        enough = ratio.low <= 1.0 if self.options.objective == "size" else timed.beats(trial.candidate, best)
        if not enough:
            trial.verdict = f"not faster than float32: {timed.text(trial.candidate, best)}"
            trial.candidate.engine.release()
        return enough

    def _cost(self, trial: Trial) -> float:
        """What is to be least; without measurements the order of the families."""
        if self.options.objective == "size":
            return float(trial.size or 0)
        return trial.latency_ms if trial.latency_ms is not None else float(self.shop.trials.index(trial))

    # ------------------------------------------------------------------------------------------------ accuracy
    def _defend(self, entry: _Entry) -> None:
        """Evaluate a family's recipes until one holds; then a mix."""
        best: tuple[float, Plan] | None = None
        for number, recipe in enumerate(entry.family.recipes):
            if self._spent():
                return
            plan = Plan(entry.family, recipe, entry.left, entry.mix)
            trial = entry.first if number == 0 else self.shop.trial(plan, entry.plain)
            trial.latency_ms = entry.first.latency_ms  # the same kernels
            if trial.candidate is None or not self._differs(trial):
                continue
            accuracy = self.shop.score(trial)
            if self._keeps(trial):
                return
            if best is None or accuracy > best[0]:
                best = accuracy, plan
        if best is not None:
            self._mix(entry, best[1])

    def _differs(self, trial: Trial) -> bool:
        """False when a repair changed nothing, so that the engine is one that was evaluated."""
        assert trial.candidate is not None
        if "equalized" in trial.name and not any(
            r.name == "EqualizeLayers" and r.modified for r in trial.candidate.records
        ):
            trial.verdict = "there is nothing to equalize"
            return False
        return True

    def _spent(self) -> bool:
        return self.shop.evaluations >= self.options.trials

    def _keeps(self, trial: Trial) -> bool:
        """Whether a scored trial keeps all that is asked for; sets its verdict when not."""
        assert trial.accuracy is not None and trial.candidate is not None
        reason = self._broken(trial)
        trial.candidate.engine.release()
        trial.holds = not reason
        trial.verdict = reason
        if trial.holds:
            self._held.append(trial)
        return trial.holds

    def _broken(self, trial: Trial) -> str:
        drop = self.before - (trial.accuracy or 0.0)
        if not drop <= self.max_drop:
            return f"accuracy falls by {drop:.4g}, {self.max_drop:g} is allowed"
        if self.options.max_size is not None and (trial.size or 0) > self.options.max_size:
            return f"{trial.size} bytes, {self.options.max_size} are allowed"
        limit = self.options.max_latency_ms
        if limit is not None and trial.latency_ms is not None and trial.latency_ms > limit:
            return f"{trial.latency_ms:.3g} ms, {limit:g} are allowed"
        return ""

    # ------------------------------------------------------------------------------------------------ mixes
    def _mix(self, entry: _Entry, plan: Plan) -> None:
        """Raise the layers that cost most, as few as hold the accuracy: doubling, then halving the interval."""
        ranked = self._ranking(entry)
        ranked = [name for name in ranked if name not in {n for n, _ in plan.left}]
        if not ranked:
            return
        most, fails, holds = max(1, (3 * len(ranked)) // 4), 0, None
        count = 1
        while holds is None and not self._spent():
            holds = self._raised(entry, plan, ranked, count)
            if holds is None:
                if count == most:
                    return
                fails, count = count, min(2 * count, most)
        while holds is not None and count - fails > 1 and not self._spent():
            middle = (fails + count) // 2
            found = self._raised(entry, plan, ranked, middle)
            if found is None:
                fails = middle
            else:
                holds.verdict, holds.holds = "more layers are raised than it takes", False
                count, holds = middle, found
        if holds is not None:
            self.shop.time([holds, *self._held], self._floats)
            if self._fast_enough(holds) and not self._over_latency(holds):
                self._held.append(holds)
            else:
                holds.holds = False

    def _over_latency(self, trial: Trial) -> bool:
        trial.verdict = self._broken(trial)
        return bool(trial.verdict)

    def _raised(self, entry: _Entry, plan: Plan, ranked: Sequence[str], count: int) -> Trial | None:
        """The trial with ``count`` layers raised when it holds."""
        reason = "quantizing it costs the most accuracy"
        left = plan.left + tuple((name, reason) for name in ranked[:count])
        parts = [plan.mix] if plan.mix else []
        mixed = replace(plan, left=left, mix=", ".join([*parts, f"{count} sensitive layers raised"]))
        trial = self.shop.trial(mixed, entry.plain)
        if trial.candidate is None:
            return None
        self.shop.score(trial)
        held = self._keeps(trial)
        if held:
            self._held.pop()  # its latency is not known yet
        return trial if held else None

    def _ranking(self, entry: _Entry) -> list[str]:
        """Layers of the family's first recipe, the most sensitive first."""
        key = (entry.plain.target.name, entry.family.name)
        if key not in self._ranked:
            made = self.shop.made(entry.family.recipes[0].passes, entry.plain)
            errors = layer_errors(made.program, self._calls(entry.plain))
            self._ranked[key] = [name for name, _ in errors]
        return self._ranked[key]

    def _calls(self, plain: Plain) -> list[Call]:
        if self.data is None:
            return [plain.program.example]
        return list(self.data.calls(plain.program, self.options.sensitivity_samples))

    # ------------------------------------------------------------------------------------------------ the end
    def _choose(self) -> Found:
        """The cheapest that holds and agrees with its simulation; else the best float engine."""
        for trial in sorted(self._held, key=self._cost):
            assert trial.candidate is not None and trial.accuracy is not None
            if not self._confirmed(trial):
                continue
            try:
                self.parity(trial.candidate)
            except ParityError as error:
                trial.holds, trial.verdict = False, f"the engine disagrees with its simulation: {error.what}"
                continue
            trial.verdict = "chosen"
            for other in self._held:
                if other is not trial and other.holds:
                    other.verdict = "larger than the chosen one" if self.options.wants_small else _SLOWER
            self._say(trial)
            return Found(trial.candidate, trial.accuracy, self.decisions)
        return self._float()

    def _confirmed(self, trial: Trial) -> bool:
        """A repair was taken to be as fast as the plain recipe; what is handed over is measured itself."""
        timed = self.shop.timed
        assert trial.candidate is not None
        if timed is not None and trial.candidate.label not in timed.latency:
            self.shop.time([trial], self._floats)
            trial.holds = self._fast_enough(trial) and not self._over_latency(trial)
        return trial.holds

    def _float(self) -> Found:
        timed = self.shop.timed
        best = self._floats[0] if timed is None else timed.fastest(self._floats)
        trial = Trial("float32", best.target.name, size=best.engine.file_size(), candidate=best)
        trial.latency_ms = (
            None if timed is None or best.label not in timed.latency else timed.latency[best.label].p50_ms
        )
        self.shop.trials.append(trial)
        accuracy = self.shop.score(trial)
        reason = self._broken(trial)
        trial.holds = not reason
        trial.verdict = reason or "chosen"
        self._say(trial)
        if reason and self.max_drop >= self.before - accuracy:  # a budget, not the accuracy
            error = GateError(
                3, "no mix of precisions keeps the budget", why=reason, fix="raise the budget or max_drop"
            )
            error.engine = best.engine
            for tried in self.shop.trials:
                error.add_note(f"  {tried.name} on {tried.target}: {tried.verdict}")
            raise error
        return Found(best, accuracy, self.decisions)

    def _say(self, trial: Trial) -> None:
        scored = sum(t.accuracy is not None for t in self.shop.trials)
        speed = "" if trial.latency_ms is None else f", {trial.latency_ms:.2f} ms"
        self.decisions.append(f"auto: {scored} engines evaluated; {trial.name} on {trial.target}{speed} is taken")
        if self._spent():
            self.decisions.append(f"auto: stopped after {self.options.trials} evaluations (trials)")
