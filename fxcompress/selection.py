"""The speed gate: which of the built engines is handed over, decided by measured latency."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fxcompress.bench import Latency, LatencyComparison, compare_latency
from fxcompress.engines import Engine, Target, build_engine, registered_targets
from fxcompress.errors import MissingRuntimeError
from fxcompress.ir import Program
from fxcompress.pipeline import StepRecord
from fxcompress.quant.partial import keep_layers, variants

__all__ = ["Candidate", "Choice", "Timed", "available_targets", "choose"]

#: INT8 has to be this much faster than the best float32 engine to be kept by default: below, noise decides.
MARGIN = 0.97


@dataclass
class Candidate:
    """One engine that could be handed over.

    Attributes:
        target: Its runtime.
        precision: ``float32``, ``int8`` or ``int8 (partly)``.
        program: What it simulates.
        reference: The float32 program of the same passes.
        records: Passes that led to it.
        left: Layers the speed gate put back to float32.
        variant: What tells it from another of the same precision.
        is_baseline: Nothing lossy was done: what the others have to beat.
        options: Further options of ``target.build``.
    """

    target: Target
    precision: str
    program: Program
    reference: Program
    records: list[StepRecord]
    left: list[tuple[str, str]] = field(default_factory=list)
    variant: str = ""
    is_baseline: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    _engine: Engine | None = None

    @property
    def label(self) -> str:
        """Name in the comparison."""
        return " ".join(x for x in (self.target.name, self.precision, self.variant) if x)

    @property
    def engine(self) -> Engine:
        """The built engine."""
        assert self._engine is not None
        return self._engine

    def build(self, threads: int | None) -> Candidate:
        """Build the engine."""
        self._engine = build_engine(self.target, self.program, threads=threads, **self.options)
        return self


@dataclass
class Choice:
    """What `choose` decided, with its measurements."""

    chosen: Candidate
    baseline: Candidate
    latency: dict[str, Latency] = field(default_factory=dict)
    speedup: tuple[float, float, float] | None = None
    decisions: list[str] = field(default_factory=list)


def available_targets() -> list[Target]:
    """Installed deployment runtimes, for ``target=None``.

    Raises:
        MissingRuntimeError: neither ONNX Runtime nor OpenVINO is installed.
    """
    runtimes = [t for t in registered_targets().values() if t.automatic]
    found = [t for t in runtimes if t.available() is None]
    if not found:
        lines = " or ".join(str(t.available()) for t in runtimes)
        raise MissingRuntimeError(4, "no deployment runtime is installed", fix=lines)
    return found


def choose(
    candidates: list[Candidate], args: Any, kwargs: Any, *, measure: bool, gate: bool, threads: int | None
) -> Choice:
    """Pick the engine to hand over.

    Args:
        candidates: Float32 and compressed engines, one or more runtimes.
        args: Example positional inputs.
        kwargs: Example keyword inputs.
        measure: Time them; without it the last candidate is taken.
        gate: Give up what is not faster than the best float32 engine.
        threads: Threads of engines built on the way.
    """
    if not measure:
        return Choice(candidates[-1], _baseline_of(candidates[-1], candidates))
    times = Timed(args, kwargs, threads)
    times.add(candidates)
    floats = [c for c in candidates if c.is_baseline]
    compressed = [c for c in candidates if not c.is_baseline]
    if not gate:
        return times.choice(times.fastest(compressed or floats), candidates, [])
    best_float = times.fastest(floats)
    if not compressed:
        return times.choice(best_float, candidates, ["float32: no pass quantizes; that needs calibration data"])
    best = times.fastest(compressed)
    decisions: list[str] = []
    if not times.beats(best, best_float):
        quantized = [c for c in compressed if c.precision == "int8" and c.target.portable]
        better = _try_variants(quantized, floats, best_float, times, decisions) if quantized else None
        if not quantized:
            decisions.append(
                f"the compressed model is not faster: {times.text(best, best_float)}; the dense one is kept"
            )
        best = better or best_float
    return times.choice(best, [*candidates, best], decisions)


def _try_variants(
    quantized: list[Candidate], floats: list[Candidate], best_float: Candidate, times: Timed, decisions: list[str]
) -> Candidate | None:
    """Quantize only the layers that usually gain; None when float32 stays fastest."""
    worst = times.fastest(quantized)
    decisions.append(f"INT8 everywhere is not faster: {times.text(worst, best_float)}")
    tried = []
    for full in quantized:
        for variant in variants(full.program):
            program = keep_layers(full.reference, full.program, full.target.scheme(), variant.ignore)
            if program is None:
                continue
            left = [(name, variant.reason) for name in variant.ignore]
            partly = Candidate(
                full.target,
                "int8 (partly)",
                program,
                full.reference,
                full.records,
                left,
                variant.name,
                options=full.options,
            )
            tried.append(partly.build(times.threads))
    if tried:
        times.add([*floats, *tried])
        best = times.fastest(tried)
        if times.beats(best, best_float):
            decisions.append(f"{best.variant} in INT8, the rest in float32: {times.text(best, best_float)}")
            return best
        decisions.append(f"INT8 in parts is not faster either: {times.text(best, best_float)}")
    decisions.append("the model stays in float32: that is the fastest engine here")
    return None


def _baseline_of(candidate: Candidate, candidates: list[Candidate]) -> Candidate:
    """The float32 engine of the same runtime."""
    return next(c for c in candidates if c.target is candidate.target and c.is_baseline)


class Timed:
    """Latencies of candidates; later measurements of the same engine replace earlier ones."""

    def __init__(self, args: Any, kwargs: Any, threads: int | None) -> None:
        self.args, self.kwargs, self.threads = args, kwargs, threads
        self.comparison: LatencyComparison | None = None
        self.latency: dict[str, Latency] = {}
        self.comparisons: list[LatencyComparison] = []

    def add(self, candidates: list[Candidate]) -> None:
        engines: Mapping[str, Engine] = {c.label: c.engine for c in candidates}
        found = compare_latency(engines, self.args, self.kwargs)
        self.comparisons.append(found)
        self.latency |= found.latency

    def fastest(self, candidates: list[Candidate]) -> Candidate:
        return min(candidates, key=lambda c: self.latency[c.label].p50_ms)

    def ratio(self, a: Candidate, b: Candidate) -> Any:
        """Time of ``a`` over time of ``b``, from the last comparison that timed both."""
        for found in reversed(self.comparisons):
            if a.label in found.latency and b.label in found.latency:
                return found.ratio(a.label, b.label)
        raise KeyError(a.label, b.label)

    def beats(self, a: Candidate, b: Candidate) -> bool:
        ratio = self.ratio(a, b)
        return bool(ratio.median < MARGIN and ratio.high < 1.0)

    def text(self, a: Candidate, b: Candidate) -> str:
        times = f"{self.latency[a.label].p50_ms:.2f} ms against {self.latency[b.label].p50_ms:.2f} ms"
        ratio = self.ratio(a, b)
        return f"{times} ({b.label}), round by round {ratio.median:.2f} times [{ratio.low:.2f}, {ratio.high:.2f}]"

    def choice(self, chosen: Candidate, candidates: list[Candidate], decisions: list[str]) -> Choice:
        baseline = _baseline_of(chosen, candidates)
        latency = {"before": self.latency[baseline.label], "after": self.latency[chosen.label]}
        speedup = None
        if chosen is not baseline:
            ratio = self.ratio(baseline, chosen)
            speedup = (ratio.low, ratio.median, ratio.high)
        return Choice(chosen, baseline, latency | self.latency, speedup, decisions)
