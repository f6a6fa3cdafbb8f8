"""Latency: of one engine in this process, and of several against each other, each in a process of its own.

Runtimes' thread pools spin while they wait, so two of them in one process distort each other. The comparison keeps one
process per engine, runs them in rounds A B, B A, ..., and compares the medians within each round: what disturbs the
machine disturbs both.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor

from fxcompress.engines import Engine
from fxcompress.errors import EngineError, UsageError

__all__ = ["Latency", "LatencyComparison", "Ratio", "compare_latency", "measure"]

#: Every engine is timed at least this long, however small the budget.
_LEAST_SECONDS = 0.8
_WARM_UP_SECONDS = 0.25


@dataclass(frozen=True)
class Latency:
    """Wall time of single calls, in milliseconds.

    Attributes:
        p50_ms: Median.
        p95_ms: 95th percentile.
        min_ms: Fastest.
        iqr_ms: Interquartile range: the spread.
        mean_ms: Mean.
        runs: Timed calls.
        threads: Threads of the runtime.
        batch: Size of dimension 0 of the first input.
        peak_rss_mb: Peak resident memory of the timing process; None when it was not a process of its own.
    """

    p50_ms: float
    p95_ms: float
    min_ms: float
    iqr_ms: float
    mean_ms: float
    runs: int
    threads: int
    batch: int
    peak_rss_mb: float | None = None

    @classmethod
    def of(cls, times_ms: Sequence[float], threads: int, batch: int, peak_rss_mb: float | None = None) -> Latency:
        """Statistics of a list of times."""
        p25, p50, p75, p95 = (float(v) for v in np.percentile(times_ms, (25, 50, 75, 95)))
        mean = statistics.fmean(times_ms)
        return cls(p50, p95, min(times_ms), p75 - p25, mean, len(times_ms), threads, batch, peak_rss_mb)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Ratio:
    """Time of one engine over that of another, from paired rounds.

    Attributes:
        median: Median over the rounds; below 1 the first is faster.
        low: Lower end of the interval (over 90 % confidence from 5 rounds on: order statistics of the median).
        high: Upper end.
    """

    median: float
    low: float
    high: float

    @property
    def faster(self) -> bool | None:
        """True or False when the interval excludes 1, else None: not known."""
        return True if self.high < 1.0 else False if self.low > 1.0 else None


@dataclass
class LatencyComparison:
    """Engines timed side by side.

    Attributes:
        latency: By engine name, over all rounds.
        medians: By engine name, the median of each round in milliseconds.
    """

    latency: dict[str, Latency] = field(default_factory=dict)
    medians: dict[str, list[float]] = field(default_factory=dict)

    def ratio(self, first: str, second: str) -> Ratio:
        """Time of ``first`` over time of ``second``."""
        ratios = sorted(a / b for a, b in zip(self.medians[first], self.medians[second], strict=True))
        cut = _outer(len(ratios))
        return Ratio(statistics.median(ratios), ratios[cut], ratios[-1 - cut])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"latency": {k: v.to_dict() for k, v in self.latency.items()}, "medians": self.medians}


def _outer(count: int) -> int:
    """How many ratios may be cut at each end so that the rest still covers the median with 90 % confidence."""
    total, cut, chance = 2.0**count, 0, 1.0
    below = chance
    while cut < count // 2:
        chance = chance * (count - cut) / (cut + 1)
        if 2 * (below + chance) / total > 0.1:
            break
        below += chance
        cut += 1
    return cut


def measure(engine: Engine, inputs: list[Tensor], *, seconds: float = 1.0, runs: int = 20) -> Latency:
    """Time calls of an engine in this process.

    Args:
        engine: The engine.
        inputs: Flat inputs (``engine.signature.bind``).
        seconds: Least measuring time.
        runs: Least number of timed calls.
    """
    if runs < 1:
        raise UsageError(76, f"{runs} runs cannot be timed", fix="give at least 1")
    end, count = time.perf_counter() + _WARM_UP_SECONDS, 0
    while count < 4 or time.perf_counter() < end:  # the fourth call of a new shape may still compile
        engine.run(inputs)
        engine.synchronize()
        count += 1
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < runs or time.perf_counter() < end:
        begin = time.perf_counter()
        engine.run(inputs)
        engine.synchronize()
        times.append((time.perf_counter() - begin) * 1e3)
    return Latency.of(times, engine.threads, batch_of(inputs))


def batch_of(inputs: Sequence[Tensor]) -> int:
    """Size of dimension 0 of the first input; 1 without one."""
    return int(inputs[0].shape[0]) if inputs and inputs[0].dim() else 1


def compare_latency(
    engines: Mapping[str, Engine],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    budget_s: float = 4.0,
    rounds: int = 5,
) -> LatencyComparison:
    """Time engines against each other on the same inputs, each alone in a process of its own.

    Args:
        engines: By name.
        args: Positional inputs.
        kwargs: Keyword inputs.
        budget_s: Measuring time, shared by the engines; start-up of the processes comes on top.
        rounds: In how many slices each engine is timed; 5 are the least for a confidence of 90 %.

    Raises:
        EngineError: a process failed.
    """
    if rounds < 1 or not engines:
        raise UsageError(77, "nothing to compare", fix="give at least one engine and one round")
    slice_s = max(budget_s / len(engines), _LEAST_SECONDS) / rounds
    found = LatencyComparison(medians={name: [] for name in engines})
    times: dict[str, list[float]] = {name: [] for name in engines}
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory(prefix="fxcompress-bench-") as folder:
        bound = {n: e.signature.bind(tuple(args), dict(kwargs or {})) for n, e in engines.items()}
        workers = {
            n: stack.enter_context(_worker(n, e, bound[n], Path(folder), i)) for i, (n, e) in enumerate(engines.items())
        }
        for worker in workers.values():
            worker.ask({"seconds": _WARM_UP_SECONDS, "runs": 3})
        for number in range(rounds):
            names = list(engines) if number % 2 == 0 else list(engines)[::-1]
            for name in names:
                slice_times = workers[name].ask({"seconds": slice_s, "runs": 1})["times_ms"]
                times[name] += slice_times
                found.medians[name].append(statistics.median(slice_times))
        for name, engine in engines.items():
            peak = workers[name].ask({"seconds": 0.0, "runs": 0})["peak_rss_mb"]
            found.latency[name] = Latency.of(times[name], engine.threads, batch_of(bound[name]), peak)
    return found


class _Worker:
    """One engine in a process that runs it when asked; it sleeps on its input in between."""

    def __init__(self, name: str, process: subprocess.Popen[str], errors: IO[str]) -> None:
        self.name, self.process, self.errors = name, process, errors

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request and wait for the answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.errors.seek(0)
            raise EngineError(40, f"timing {self.name} failed", why=self.errors.read().strip()[-800:])
        return cast(dict[str, Any], json.loads(line))


def _array(x: Tensor, *, widen: bool) -> Any:
    """A tensor as numpy has it: 16-bit floats as float32, which engine files read, or bfloat16 by its bits."""
    plain = x.detach().cpu().contiguous()
    if widen and plain.dtype in (torch.float16, torch.bfloat16):
        return plain.float().numpy()
    return plain.view(torch.int16).numpy() if plain.dtype == torch.bfloat16 else plain.numpy()


@contextlib.contextmanager
def _worker(name: str, engine: Engine, inputs: list[Tensor], folder: Path, number: int) -> Iterator[_Worker]:
    arrays, job = folder / f"{number}.npz", engine.worker_job(inputs)
    dtypes = [str(x.dtype).removeprefix("torch.") for x in inputs]
    np.savez(arrays, *(_array(x, widen=job["runtime"] != "folder") for x in inputs))
    line = json.dumps({**job, "inputs": str(arrays), "dtypes": dtypes, "threads": engine.threads})
    # Run as a file, not as a module: importing the package, and torch with it, would take seconds.
    script = Path(__file__).with_name("bench_worker.py")
    variables = {**os.environ, "OMP_NUM_THREADS": str(engine.threads)}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-P", str(script), line],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=variables,
        )
        try:
            yield _Worker(name, process, errors)
        finally:
            process.kill()
            process.communicate()
