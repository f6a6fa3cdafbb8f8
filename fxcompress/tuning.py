"""Measuring kernel configurations on this machine's GPU, and the table they are kept in.

Nothing here runs by itself: ``fxcompress tune`` does, and what it finds is looked up by `kernels.configs.lookup`.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxcompress.gpu_clock import Clock
from fxcompress.kernels import configs
from fxcompress.kernels.candidates import candidates, neighbours
from fxcompress.kernels.configs import Config, Device, Problem
from fxcompress.kernels.workloads import Workload, workload
from fxcompress.ops import KernelOp, kernel_op

__all__ = [
    "Tuned",
    "config_text",
    "exact_reference",
    "forced",
    "relative_error",
    "rotated",
    "save_entries",
    "tune",
    "tune_one",
]

#: Weights of one problem in memory, in multiples of the second-level cache, so that none is still in it.
_CACHES: Final = 3
_MEMORY_SHARE: Final = 0.25
_ROUNDS: Final = 2


@dataclass(frozen=True)
class Tuned:
    """What was found for one problem.

    Attributes:
        problem: The problem.
        config: The fastest right configuration.
        us: Microseconds it takes.
        heuristic_us: Microseconds of the configuration the heuristic chooses; None when that one does not run.
        tried: Configurations that were measured.
        refused: Configurations that do not compile, do not fit or compute something else, with the reason.
    """

    problem: Problem
    config: Config
    us: float
    heuristic_us: float | None
    tried: int
    refused: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        p = self.problem
        return {
            "family": p.family,
            "key": p.key(),
            "config": self.config.to_dict(),
            "us": self.us,
            "heuristic_us": self.heuristic_us,
            "tried": self.tried,
            "refused": self.refused,
        }


# ------------------------------------------------------------------------------------------------ one problem
@contextlib.contextmanager
def forced(problem: Problem, config: Config, device: Device) -> Iterator[None]:
    """While inside, kernels run ``problem`` on ``device`` with ``config``: the user's table holds that one entry."""
    before = os.environ.get("FXCOMPRESS_CONFIGS")
    with tempfile.TemporaryDirectory(prefix="fxc-tune-") as folder:
        _write_table(Path(folder), device, {problem.family: {problem.key(): config}})
        os.environ["FXCOMPRESS_CONFIGS"] = folder
        configs.forget_tables()
        try:
            yield
        finally:
            os.environ.pop("FXCOMPRESS_CONFIGS")
            if before is not None:
                os.environ["FXCOMPRESS_CONFIGS"] = before
            configs.forget_tables()


def exact_reference(op: KernelOp, *args: Any, **kwargs: Any) -> Any:
    """The reference; in float64 where the arguments are 16-bit floats, unless it has integer results, which are exact."""
    told = pytree.tree_leaves(op.fake(*args, **kwargs))
    if not all(t.is_floating_point() for t in told):
        return op.reference(*args, **kwargs)
    return op.reference(*map(_widened, args), **{name: _widened(value) for name, value in kwargs.items()})


def _widened(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.double() if half else value


def relative_error(found: Any, wanted: Any) -> float:
    """``|found - wanted| / |wanted|`` of tensors (the largest of several), 0 for equal integers, inf for not finite."""
    if isinstance(found, (tuple, list)):
        return max((relative_error(a, b) for a, b in zip(found, wanted, strict=True)), default=0.0)
    floats = found.dtype.is_floating_point and wanted.dtype.is_floating_point
    if found.shape != wanted.shape or not (floats or found.dtype == wanted.dtype):
        return float("inf")
    if not floats:
        return 0.0 if torch.equal(found, wanted) else float("inf")
    a, b = found.double(), wanted.double()
    error = float((a - b).norm()) / (float(b.norm()) or 1.0)
    return error if error == error else float("inf")


def rotated(work: Workload, problem: Problem, place: str, cache: int) -> list[dict[str, Any]]:
    """Arguments on ``place``, so many times with weights of their own that those of one call have left a cache.

    Args:
        work: Of the problem's family.
        problem: What to compute.
        place: ``cuda`` or ``cpu``.
        cache: Bytes of the second-level cache; 0 for one set of arguments.
    """
    first = work.arguments(problem, place)
    weights = {name: a for name, a in first.items() if isinstance(a, Tensor) and name != "x"}
    size = sum(w.nbytes for w in weights.values())
    count = 1 + -(-_CACHES * cache // size) if cache else 1
    if place == "cuda":
        count = max(1, min(count, int(_MEMORY_SHARE * torch.cuda.mem_get_info()[0] / size)))
    copies = [first | {name: w.clone() for name, w in weights.items()} for _ in range(count - 1)]
    return [first, *copies]


def tune_one(
    problem: Problem, device: Device, clock: Clock, *, place: str = "cuda", cache: int = 0, seconds: float = 0.05
) -> Tuned | None:
    """Measure the candidates of a problem, then the neighbours of the fastest.

    Args:
        problem: What to tune.
        device: Where.
        clock: What measures.
        place: Torch device of the tensors.
        cache: Bytes of the second-level cache.
        seconds: Measuring time of one configuration.

    Returns:
        The fastest right configuration; None when no candidate runs and is right.
    """
    work = workload(problem.family)
    op = kernel_op(work.op)
    sets = rotated(work, problem, place, cache)
    wanted = exact_reference(op, **sets[0])
    times: dict[Config, float] = {}
    refused: dict[Config, str] = {}
    frontier = candidates(problem, device)
    first = frontier[0]
    for _ in range(_ROUNDS):
        for config in frontier:
            with forced(problem, config, device):
                trouble = _trouble(op, sets[0], wanted)
                if trouble is None:
                    times[config] = _microseconds(op, sets, clock, seconds)
                else:
                    refused[config] = trouble
        if not times:
            return None
        best = min(times, key=lambda c: times[c])
        frontier = [c for c in neighbours(best) if c not in times and c not in refused]
    best = min(times, key=lambda c: times[c])
    reasons = {config_text(c): why for c, why in refused.items()}
    return Tuned(problem, best, times[best], times.get(first), len(times), reasons)


def _trouble(op: KernelOp, arguments: dict[str, Any], wanted: Any) -> str | None:
    """Why the configuration in force cannot be used; None when it can."""
    try:
        found = op.launch(**arguments)
        error = relative_error(found, wanted)
    except Exception as failure:  # noqa: BLE001 - a compiler and a driver raise what they like; it is noted, not hidden
        lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
        return f"{type(failure).__name__}: {(lines or ['no message'])[-1][:200]}"
    head = found[0] if isinstance(found, (tuple, list)) else found
    allowed = op.tolerance.get(head.dtype, 0.0)
    return None if error <= allowed else f"relative error {error:.1e}, {allowed:.1e} is allowed"


def _microseconds(op: KernelOp, sets: Sequence[dict[str, Any]], clock: Clock, seconds: float) -> float:
    calls = [lambda arguments=arguments: op.launch(**arguments) for arguments in sets]
    found = clock.graph(calls, seconds)
    return found if found is not None else clock.eager(calls, seconds)


def config_text(config: Config) -> str:
    """A configuration in words."""
    tile = f"{config.block_m}x{config.block_n}x{config.block_k}"
    swap = " swapped" if config.swap_ab else ""
    route = "" if config.route == "kernel" else f" {config.route}"
    return f"{tile} split {config.split_k} warps {config.num_warps} stages {config.num_stages}{swap}{route}"


# ------------------------------------------------------------------------------------------------ many problems
def tune(
    problems: Sequence[Problem],
    device: Device,
    clock: Clock,
    *,
    place: str = "cuda",
    cache: int = 0,
    gpu_time: float | None = None,
    found: Callable[[Problem, Tuned | None], None] = lambda problem, tuned: None,
) -> list[Tuned]:
    """Tune problems one after the other; each result is in the user's table before the next one starts.

    Args:
        problems: What to tune, the most important first.
        device: Where.
        clock: What measures.
        place: Torch device of the tensors.
        cache: Bytes of the second-level cache.
        gpu_time: Seconds after which no further problem is begun; None: until all are done.
        found: Called with each problem and its result.

    Returns:
        The results; problems without a usable candidate, or left for want of time, are not among them.
    """
    begin = time.monotonic()
    results = []
    for problem in problems:
        if gpu_time is not None and time.monotonic() - begin > gpu_time:
            break
        tuned = tune_one(problem, device, clock, place=place, cache=cache)
        if tuned is not None:
            results.append(tuned)
            save_entries(device, [tuned])
        found(problem, tuned)
    return results


def save_entries(device: Device, tuned: Sequence[Tuned], folder: Path | None = None) -> Path:
    """Put results into the user's table of a GPU, beside what it holds already.

    Args:
        device: The GPU.
        tuned: Results; they replace entries of the same problems.
        folder: Where the table lies; `configs.overlay_folder` by default.

    Returns:
        The table's file. It is replaced in one step.

    Raises:
        UsageError: what lies there is no table, or of another schema.
    """
    folder = folder or configs.overlay_folder()
    path = folder / configs.table_name(device.name)
    entries = {family: dict(rows) for family, rows in configs.read_table(path).items()}
    for one in tuned:
        entries.setdefault(one.problem.family, {})[one.problem.key()] = one.config
    _write_table(folder, device, entries)
    configs.forget_tables()
    return path


def _write_table(folder: Path, device: Device, entries: Mapping[str, Mapping[str, Config]]) -> None:
    content = {
        "schema": configs.SCHEMA,
        "gpu": device.name,
        "sm": device.sm,
        "sm_count": device.sm_count,
        "source": "measured",
        "entries": {f: {key: c.to_dict() for key, c in rows.items()} for f, rows in entries.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / configs.table_name(device.name)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=folder)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
