"""One row of the kernel benchmark: correctness first, then the time of ours and of every peer; and the chip's ceilings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

import torch

from benchmarks.kernel_peers import Call, Peer, Unavailable
from fxcompress.gpu_clock import Clock
from fxcompress.kernels.candidates import heuristic
from fxcompress.kernels.configs import Device, Problem
from fxcompress.kernels.workloads import Workload, workload
from fxcompress.ops import KernelOp, kernel_op, kernel_ops
from fxcompress.tuning import exact_reference, relative_error, rotated

__all__ = [
    "Bench",
    "Ceilings",
    "Row",
    "ceilings",
    "check_samples",
    "difference",
    "last_line",
    "measure",
    "peer_times",
    "times",
]

Row = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """Where is measured.

    Attributes:
        place: ``cuda``, or ``cpu`` for a dry run.
        device: What kernels see of the GPU.
        clock: What measures.
        cache: Bytes of the second-level cache; 0: weights are not rotated.
        seconds: Measuring time of one column of a row.
    """

    place: str
    device: Device
    clock: Clock
    cache: int
    seconds: float = 0.1


@dataclass(frozen=True)
class Ceilings:
    """What this chip does at most, measured.

    Attributes:
        copy: Bytes per second read and written by a device-to-device copy.
        float16: Operations per second of a large float16 product.
        bfloat16: The same in bfloat16.
        int8: Operations per second of ``torch._int_mm``; twice float16 where that is more (its kernels are not the chip's best).
    """

    copy: float
    float16: float
    bfloat16: float
    int8: float

    def to_dict(self) -> dict[str, float]:
        """Plain JSON."""
        return asdict(self)

    def floor_us(self, work: Workload, problem: Problem) -> float:
        """Microseconds that the bytes or the operations of a problem take at least."""
        rate = self.int8 if work.integer else self.bfloat16 if problem.dtype == torch.bfloat16 else self.float16
        rate *= 2.0 if work.sparse else 1.0
        return max(work.bytes(problem) / self.copy, work.operations(problem) / rate) * 1e6


def ceilings(bench: Bench, size: int) -> Ceilings:
    """Copy bandwidth and dense products of ``size`` x ``size`` matrices of random numbers."""
    place = bench.place
    copy = _copy_rate(bench, 4 * size * size)
    rates = {}
    for dtype in (torch.float16, torch.bfloat16):
        a, b = (torch.randn(size, size, device=place).to(dtype) for _ in range(2))
        rates[dtype] = 2 * size**3 / (bench.clock.eager([partial(torch.matmul, a, b)], bench.seconds * 3) * 1e-6)
    c, d = (torch.randint(-127, 128, (size, size), dtype=torch.int8, device=place) for _ in range(2))
    int8 = 2 * size**3 / (bench.clock.eager([lambda: torch._int_mm(c, d.t())], bench.seconds * 3) * 1e-6)
    half = rates[torch.float16]
    return Ceilings(copy, half, rates[torch.bfloat16], max(int8, 2 * half))


def _copy_rate(bench: Bench, count: int) -> float:
    """Bytes per second, read and written, of copying ``count`` 32-bit words."""
    source = torch.randint(0, 100, (count,), dtype=torch.int32, device=bench.place)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (bench.clock.eager([lambda: target.copy_(source)], bench.seconds * 3) * 1e-6)


# ------------------------------------------------------------------------------------------------ correctness
def check_samples(place: str) -> dict[str, str]:
    """Every kernel on its own small samples against its reference: name -> ``ok``, or what is wrong."""
    return {name: _checked(op, place) for name, op in kernel_ops().items()}


def _checked(op: KernelOp, place: str) -> str:
    count = 0
    for arguments in op.samples(place):
        ours, theirs = _cloned(arguments), _cloned(arguments)
        try:
            found = op.launch(*ours)
            if found is None:  # it writes into its arguments
                op.reference(*theirs)
                found, wanted = _tensors(ours), _tensors(theirs)
            else:
                wanted = exact_reference(op, *theirs)
            trouble = difference(op, found, wanted)
        except Exception as error:  # noqa: BLE001 - whatever a kernel raises is its result
            trouble = f"{type(error).__name__}: {last_line(error)}"
        if trouble:
            return f"sample {count}: {trouble}"
        count += 1
    return "ok" if count else "no samples"


def _cloned(arguments: Sequence[Any]) -> list[Any]:
    """Copies of the tensors, with the strides they have."""
    return [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]


def _tensors(arguments: Sequence[Any]) -> list[torch.Tensor]:
    return [a for a in arguments if isinstance(a, torch.Tensor)]


def difference(op: KernelOp, found: Any, wanted: Any) -> str:
    """What is wrong with a result; nothing when it is within the operator's tolerance."""
    pairs = list(zip(found, wanted, strict=True)) if isinstance(found, (tuple, list)) else [(found, wanted)]
    for a, b in pairs:
        error, allowed = relative_error(a, b), op.tolerance.get(a.dtype, 0.0)
        if error > allowed:
            return f"relative error {error:.1e}, {allowed:.1e} is allowed"
    return ""


def last_line(error: BaseException) -> str:
    """The last line of an error's text, cut short."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or ["no message"])[-1][:200]


# ------------------------------------------------------------------------------------------------ a row
_EMPTY: Final[Row] = {"us": None, "eager_us": None}


def measure(problem: Problem, bench: Bench, roof: Ceilings) -> Row:
    """Error and times of our kernel for a problem; ``status`` says what went wrong, if anything did."""
    work = workload(problem.family)
    op = kernel_op(work.op)
    floor = roof.floor_us(work, problem)
    row: Row = {**_facts(problem), "floor_us": floor, "status": "ok"}
    try:
        sets = rotated(work, problem, bench.place, bench.cache)
        row["config"] = heuristic(problem, bench.device).to_dict()
        wanted = exact_reference(op, **sets[0])
        found = op.launch(**sets[0])
        row["error"] = relative_error(found, wanted)
        row["status"] = difference(op, found, wanted) or "ok"
        del wanted, found
        row |= times([partial(op.launch, **a) for a in sets], bench)
    except Exception as error:  # noqa: BLE001 - whatever a kernel raises is its result; the other rows go on
        return row | _EMPTY | {"status": f"{type(error).__name__}: {last_line(error)}"}
    row["share"] = floor / row["us"]
    return row


def _facts(p: Problem) -> Row:
    dtype = str(p.dtype).removeprefix("torch.")
    return {"family": p.family, "m": p.m, "n": p.n, "k": p.k, "dtype": dtype, "group_size": p.group_size}


def times(calls: Sequence[Call], bench: Bench) -> Row:
    """Median microseconds from a graph (``us``; eager where a graph cannot be captured) and from the host."""
    eager = bench.clock.eager(calls, bench.seconds)
    graph = bench.clock.graph(calls, bench.seconds)
    return {"us": eager if graph is None else graph, "eager_us": eager, "graph": graph is not None}


def peer_times(problem: Problem, peers: Sequence[Peer], bench: Bench) -> dict[str, Row]:
    """Times of the peers for a problem, or why there are none."""
    found: dict[str, Row] = {}
    for peer in peers:
        try:
            calls = peer.calls(problem, bench.place, bench.cache)
            calls[0]()
            found[peer.name] = times(calls, bench)
        except Unavailable as reason:
            found[peer.name] = _EMPTY | {"status": str(reason)}
        except Exception as error:  # noqa: BLE001 - whatever stops a peer is its result
            found[peer.name] = _EMPTY | {"status": f"{type(error).__name__}: {last_line(error)}"}
    return found
