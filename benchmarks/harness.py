"""What every benchmark shares: the environment, the result file, engines run and timed fairly.

Fair timing on a machine that is never quite idle: each engine runs in a process of its own, alone, in many short rounds
A B C, B C A, …, while the others stand still; a round gives each engine one median; engines are compared by the ratio
of their medians within a round, and "faster" or "slower" is said only when the interval of those ratios excludes 1.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import comb
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Json = None | bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"]

RESULTS: Final = Path(__file__).parent / "results"
PACKAGES: Final = (
    "fxcompress",
    "torch",
    "onnxruntime",
    "openvino",
    "tensorrt-rtx-cu13",
    "nncf",
    "onnx",
    "transformers",
    "torchvision",
    "timm",
    "torch-pruning",
    "numpy",
)
CPU_FLAGS: Final = ("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


def environment(threads: int) -> dict[str, Json]:
    """Date, processor with the flags that matter, threads, load and the versions of the packages measured."""
    info = _cpu_info()
    flags = str(info.get("flags", "")).split()
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": info.get("model name", platform.processor()),
        "flags": {flag: flag in flags for flag in CPU_FLAGS},
        "cores": os.cpu_count(),
        "threads": threads,
        "load_average": list(os.getloadavg()),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _cpu_info() -> dict[str, str]:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        lines = file.read().split("\n\n")[0].splitlines()
        return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return {}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def write(claim: str, results: Json, settings: Mapping[str, Json], options: argparse.Namespace) -> Path:
    """Writes ``benchmarks/results/<claim>.json`` and gives its path; a quick run goes to a file of its own.

    Args:
        claim: What was measured.
        results: The numbers.
        settings: How they were measured.
        options: The command line's, of :func:`arguments`.
    """
    RESULTS.mkdir(exist_ok=True)
    only = f"_{options.only}" if getattr(options, "only", "") and options.only not in claim else ""
    path = RESULTS / f"{claim}{only}{'_quick' if options.quick else ''}.json"
    asked = {"quick": options.quick, "peers_only": options.peers_only, **settings}
    content = {"claim": claim, "environment": environment(options.threads), "settings": asked, "results": results}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def known(claim: str, settings: Mapping[str, Json], options: argparse.Namespace) -> dict[str, Any]:
    """Rows that an interrupted run with the same settings left, for ``--resume``; those with an error are left out.

    Args:
        claim: What is measured; all rows in one file.
        settings: How they are measured.
        options: The command line's, with ``resume``.
    """
    path = RESULTS / f"{claim}{'_quick' if options.quick else ''}.json"
    if not options.resume or not path.exists():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    if any(content["settings"].get(name) != value for name, value in settings.items()):
        return {}
    return {name: row for name, row in content["results"].items() if "error" not in row}


@dataclass(frozen=True)
class Contestant:
    """An engine in the race.

    Attributes:
        name: Its name in the tables.
        runtime: ``onnxruntime``, ``openvino``, ``torch`` or ``fxcompress`` (see :mod:`benchmarks.worker`).
        path: File, folder or model name that the runtime loads.
        settings: How it was made, for the record.
        variables: Environment variables of its process.
    """

    name: str
    runtime: str
    path: str
    settings: Mapping[str, Json] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)


def _start(contestant: Contestant, act: str, inputs: Path, threads: int, *extra: str) -> subprocess.Popen[str]:
    """:mod:`benchmarks.worker` on the contestant, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.worker", act, "--runtime", contestant.runtime]
    command += ["--path", contestant.path, "--inputs", str(inputs), "--threads", str(threads), *extra]
    variables = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    root, pipe = Path(__file__).resolve().parent.parent, subprocess.PIPE
    environment = {**variables, **contestant.variables}
    return subprocess.Popen(command, env=environment, cwd=root, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


class _Racer:
    """An engine in a process of its own, which stands still (SIGSTOP, its spinning threads too) while others run.

    Raises:
        RuntimeError: The process failed; the message has the last line it wrote.
    """

    def __init__(self, contestant: Contestant, inputs: Path, threads: int) -> None:
        self.name = contestant.name
        self._process = _start(contestant, "time", inputs, threads)
        self._answer()

    def times(self, **how: float) -> list[float]:
        """Milliseconds of some runs."""
        self._process.send_signal(signal.SIGCONT)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(how) + "\n")
        self._process.stdin.flush()
        return [float(t) for t in json.loads(self._answer())]

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name}: {last_line(self._process.communicate()[1])}")
        self._process.send_signal(signal.SIGSTOP)
        return line

    def end(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()


def last_line(text: str) -> str:
    """The last line that says something: of a traceback, the error without anyone's paths."""
    return ([line.strip() for line in text.splitlines() if line.strip()] or ["no message"])[-1][-400:]


@contextlib.contextmanager
def _packed(arrays: Mapping[str, npt.NDArray[np.generic]]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fxc-bench-") as folder:
        path = Path(folder) / "inputs.npz"
        with path.open("wb") as file:
            np.savez(file, allow_pickle=False, **dict(arrays))
        yield path


def predict(
    contestant: Contestant, arrays: Mapping[str, npt.NDArray[np.generic]], threads: int, *, trim: bool = False
) -> npt.NDArray[np.float32]:
    """The engine's first output for samples ``[n, ...]``, run one by one in its own process."""
    with _packed(arrays) as inputs:
        outputs = inputs.with_name("outputs.npy")
        made = _start(contestant, "predict", inputs, threads, "--outputs", str(outputs), *(["--trim"] if trim else []))
        _, errors = made.communicate()
        if made.returncode != 0:
            raise RuntimeError(f"{contestant.name}: {last_line(errors)}")
        rows: npt.NDArray[np.float32] = np.load(outputs)
    return rows


@dataclass(frozen=True)
class Ratio:
    """Paired comparison of two engines: time of the first over time of the second.

    Attributes:
        median: Median over the rounds.
        low: Lower end of the interval of that median.
        high: Upper end.
        coverage: The interval's confidence; it is made of order statistics, so it assumes no distribution.
    """

    median: float
    low: float
    high: float
    coverage: float

    @property
    def verdict(self) -> str:
        """``faster`` or ``slower`` when the interval excludes 1, else ``no difference shown``."""
        if self.coverage < 0.9:
            return "no difference shown"
        return "faster" if self.high < 1.0 else "slower" if self.low > 1.0 else "no difference shown"


def paired_ratio(first: Sequence[float], second: Sequence[float]) -> Ratio:
    """Compares medians of the same rounds.

    The interval is that of the sign test: ``[x_(k), x_(n+1-k)]`` with the largest ``k`` whose coverage
    ``1 - 2 P(Bin(n, 1/2) < k)`` is at least 95 % (or ``k = 1`` when even that is less).

    Args:
        first: Milliseconds per round of the engine in question.
        second: The other engine's, same rounds.
    """
    ratios = sorted(a / b for a, b in zip(first, second, strict=True))
    n = len(ratios)

    def coverage(k: int) -> float:
        return 1.0 - 2.0 * sum(comb(n, i) for i in range(k)) / 2.0**n

    k = max([1, *(k for k in range(1, (n + 1) // 2 + 1) if coverage(k) >= 0.95)])
    return Ratio(statistics.median(ratios), ratios[k - 1], ratios[n - k], max(0.0, coverage(k)))


@dataclass
class Race:
    """Milliseconds of all runs, by engine and round."""

    contestants: list[Contestant]
    rounds: dict[str, list[list[float]]]

    def medians(self, name: str) -> list[float]:
        """The median of each round in milliseconds."""
        return [statistics.median(times) for times in self.rounds[name]]

    def ratio(self, first: str, second: str) -> Ratio:
        """Time of ``first`` over time of ``second``, paired by round."""
        return paired_ratio(self.medians(first), self.medians(second))

    def fastest(self, names: Sequence[str]) -> str:
        """The name with the smallest median of medians."""
        return min(names, key=lambda name: statistics.median(self.medians(name)))

    def summary(self) -> dict[str, Json]:
        """Per engine: p50, p95 and interquartile range of all runs, medians of the rounds, how it was made."""
        return {c.name: self._row(c) for c in self.contestants}

    def _row(self, contestant: Contestant) -> Json:
        times = np.array([t for one in self.rounds[contestant.name] for t in one])
        quarter, half, three, most = (float(np.percentile(times, q)) for q in (25, 50, 75, 95))
        return {
            "runtime": contestant.runtime,
            "p50_ms": round(half, 4),
            "p95_ms": round(most, 4),
            "iqr_ms": round(three - quarter, 4),
            "best_ms": round(float(times.min()), 4),
            "runs": len(times),
            "round_medians_ms": [round(m, 4) for m in self.medians(contestant.name)],
            "settings": contestant.settings,
        }


@dataclass(frozen=True)
class Timing:
    """How long a race is: rounds, and per round and engine the runs, seconds and warm-up seconds at least."""

    rounds: int = 30
    runs: int = 6
    seconds: float = 0.15
    warmup: float = 0.03
    threads: int = 1

    def record(self) -> dict[str, Json]:
        """For the result file."""
        return asdict(self)


def race(contestants: Sequence[Contestant], arrays: Mapping[str, npt.NDArray[np.generic]], timing: Timing) -> Race:
    """Times engines in rounds of rotated order, each in a process of its own, the others standing still.

    Rounds are short and many: the machine's own speed changes within seconds, and must be the same for all.

    Args:
        contestants: The engines; their names differ.
        arrays: The inputs of one run, by name.
        timing: Length of the race.
    """
    entries = list(contestants)
    if len({c.name for c in entries}) != len(entries):
        raise ValueError("two contestants have one name")
    rounds: dict[str, list[list[float]]] = {c.name: [] for c in entries}
    with _packed(arrays) as inputs, contextlib.ExitStack() as stack:
        racers = []
        for contestant in entries:
            racers.append(_Racer(contestant, inputs, timing.threads))
            stack.callback(racers[-1].end)
        for turn in range(timing.rounds):
            start = turn % len(entries)
            for racer in racers[start:] + racers[:start]:
                found = racer.times(runs=timing.runs, seconds=timing.seconds, warmup=timing.warmup)
                rounds[racer.name].append(found)
    return Race(entries, rounds)


def arguments(description: str, **defaults: object) -> argparse.Namespace:
    """The options every benchmark has: ``--quick``, ``--peers-only``, ``--threads``, ``--rounds``, ``--seconds``.

    Args:
        description: First line of the help text.
        **defaults: Further options with their default values.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="few samples and rounds: does it run, not what it says")
    parser.add_argument("--peers-only", action="store_true", help="leave fxcompress out")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=0.15, help="at least, of each engine in each round")
    for name, value in defaults.items():
        if value is False:
            parser.add_argument(f"--{name.replace('_', '-')}", action="store_true")
            continue
        kind = str if value is None else type(value)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=value)
    return parser.parse_args()


def timing_of(options: argparse.Namespace) -> Timing:
    """The race that ``--quick``, ``--rounds`` and ``--threads`` ask for."""
    if options.quick:
        return Timing(rounds=3, threads=options.threads)
    return Timing(rounds=options.rounds, seconds=options.seconds, threads=options.threads)


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; floats with four significant digits."""

    def cell(value: object) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [headers, ["---"] * len(headers), *([cell(v) for v in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
