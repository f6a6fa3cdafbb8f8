"""The kernels on this machine's GPU: what the chip can do, whether they are right, how fast they are beside the peers.

    python -m benchmarks.kernels --device cuda --quick        ten minutes; --full: every shape, and peers that tune themselves
    python -m benchmarks.kernels --device cpu --dry-run       tiny shapes in Triton's interpreter, no times: does it run

Runs from a bare checkout with torch and Triton. The result file is written after every row, so what was measured before
an interruption stays. Weights rotate through three times the cache, data is random, figures are medians; ``us`` is a
replayed CUDA graph, ``eager_us`` has the cost of launching in it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks.harness import RESULTS, environment, table

if TYPE_CHECKING:
    from benchmarks.kernel_measure import Bench, Ceilings
    from fxcompress.kernels.configs import Problem

__all__ = ["FULL", "QUICK", "Plan", "main"]

#: Packages whose versions matter to the figures, beside those of every benchmark.
_PACKAGES: Final = ("triton", "torchao", "gemlite", "nvidia-cublas", "nvidia-cusparselt-cu13", "nvidia-cusparselt-cu12")


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        shapes: (N, K), the most important first.
        rows: M.
        dtypes: Of the activations.
        seconds: After which nothing new is begun.
        size: Side of the square matrices of the ceilings.
        slow: Peers that tune themselves take part, after everything else.
    """

    shapes: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    dtypes: tuple[str, ...] = ("float16",)
    seconds: float = 540.0
    size: int = 8192
    slow: bool = False


QUICK: Final = Plan(((28672, 8192), (14336, 4096)), (1, 16, 64, 256, 1024))
FULL: Final = Plan(
    ((28672, 8192), (14336, 4096), (4096, 14336), (11008, 4096), (4096, 11008), (4096, 4096), (8192, 28672)),
    (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096),
    ("float16", "bfloat16"),
    seconds=4 * 3600.0,
    slow=True,
)
DRY: Final = Plan(((64, 256),), (1, 17), seconds=3600.0, size=64)


@dataclass
class Report:
    """The result file, written again whenever something is added."""

    path: Path
    content: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def save(self) -> None:
        """Replaces the file in one step."""
        content = {**self.content, "results": {**self.content["results"], "rows": self.rows}}
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(part, self.path)


class _DryClock:
    """Calls everything once and says a made-up time: for dry runs."""

    def eager(self, calls: Sequence[Any], seconds: float) -> float:
        """Each call once."""
        for call in calls:
            call()
        return 10.0

    def graph(self, calls: Sequence[Any], seconds: float) -> float | None:
        """Nothing is captured."""
        return 10.0


def _bench(options: argparse.Namespace) -> Bench:
    import torch

    from benchmarks.kernel_measure import Bench
    from fxcompress.gpu_clock import CudaClock
    from fxcompress.kernels.configs import ASSUMED, device_of

    if options.dry_run:
        return Bench("cpu", ASSUMED[80], _DryClock(), 0)
    if options.device != "cuda" or not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here; --device cpu --dry-run shows that everything runs")
    seconds = 0.05 if options.quick else 0.2
    cache = int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)
    return Bench("cuda", device_of(torch.empty(0, device="cuda")), CudaClock(), cache, seconds)


def _problems(plan: Plan, families: Sequence[str]) -> Iterator[Problem]:
    """Every family at the first shape, then at the next: a run that is cut short has something of each."""
    import torch

    from fxcompress.tuning_shapes import check_families, problems_of_shapes

    for shape in plan.shapes:
        found = [
            problems_of_shapes([shape], check_families(families), dtype=getattr(torch, dtype), rows=plan.rows)
            for dtype in plan.dtypes
        ]
        yield from dict.fromkeys(problem for some in found for problem in some)


def run(plan: Plan, bench: Bench, families: Sequence[str], report: Report) -> None:
    """Ceilings, samples, rows; then the peers that take long. ``report`` is saved after each of them."""
    from benchmarks.kernel_measure import ceilings, check_samples, measure, peer_times
    from benchmarks.kernel_peers import peers_of

    end = time.monotonic() + plan.seconds
    results = report.content["results"]
    roof = ceilings(bench, plan.size)
    results["ceilings"] = roof.to_dict()
    report.save()
    results["samples"] = check_samples(bench.place)
    report.save()
    dense: dict[tuple[Any, ...], Any] = {}
    left = 0
    for problem in _problems(plan, families):
        if time.monotonic() > end - 0.1 * plan.seconds:  # the last tenth is for what is no product
            left += 1
            continue
        row = measure(problem, bench, roof)
        shape = (problem.m, problem.n, problem.k, problem.dtype)
        first, *others = peers_of(problem.family, slow=False)
        if shape not in dense:
            dense |= {shape: peer_times(problem, [first], bench)}
        row["peers"] = dense[shape] | peer_times(problem, others, bench)
        base = row["peers"][first.name]["us"]
        row["speedup"] = base / row["us"] if base and row["us"] else None
        report.rows.append(row)
        report.save()
        print(_line(row), flush=True)
    results["left_for_want_of_time"] = left
    if not families:
        _others(bench, roof, report, end)
    if plan.slow:
        _slow_peers(plan, bench, report, end)
    report.save()


def _others(bench: Bench, roof: Ceilings, report: Report, end: float) -> None:
    from benchmarks.kernel_others import measure_other, others

    found: list[dict[str, Any]] = []
    report.content["results"]["others"] = found
    for other in others(bench.place, tiny=bench.place == "cpu"):
        if time.monotonic() < end:
            found.append(measure_other(other, bench, roof))
            report.save()
            us = found[-1]["us"]
            print(f"{other.op} {other.case}: {found[-1]['status'] if us is None else f'{us:.1f} us'}", flush=True)


def _slow_peers(plan: Plan, bench: Bench, report: Report, end: float) -> None:
    import torch

    from benchmarks.kernel_measure import peer_times
    from benchmarks.kernel_peers import peers_of
    from fxcompress.kernels.configs import Problem

    for row in report.rows:
        slow = [peer for peer in peers_of(row["family"], slow=True) if peer.slow]
        if slow and time.monotonic() < end:
            m, n, k, dtype = row["m"], row["n"], row["k"], getattr(torch, row["dtype"])
            problem = Problem(row["family"], m, n, k, dtype, row["group_size"])
            row["peers"] |= peer_times(problem, slow, bench)
            report.save()


def _line(row: dict[str, Any]) -> str:
    name = f"{row['family']:10} M={row['m']:<5} {row['k']}x{row['n']} {row['dtype']}"
    if row["us"] is None:
        return f"{name} {row['status']}"
    others = ", ".join(f"{peer} {found['us']:.1f}" for peer, found in row["peers"].items() if found["us"])
    speed = f", x{row['speedup']:.2f}" if row["speedup"] else ""
    status = "" if row["status"] == "ok" else f" WRONG: {row['status']}"
    return f"{name} {row['us']:.1f} us ({row['share']:.0%} of the roofline{speed}); {others}{status}"


def _facts(bench: Bench) -> dict[str, Any]:
    """What the figures depend on, beside what every benchmark writes down."""
    import torch

    found: dict[str, Any] = dict(environment(torch.get_num_threads()))
    versions: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["packages"] = {**found["packages"], **versions}
    found["gpu"] = {"name": bench.device.name, "sm": bench.device.sm, "sm_count": bench.device.sm_count}
    found["gpu"] |= {"cache": bench.cache, "cuda": torch.version.cuda}
    if bench.place == "cuda":
        found["gpu"]["memory"] = torch.cuda.get_device_properties(0).total_memory
    return found


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="two shapes, five numbers of rows, ten minutes (default)")
    size.add_argument("--full", action="store_true", help="every shape, dtype and number of rows, and all peers")
    size.add_argument("--dry-run", action="store_true", help="tiny shapes on the processor; times are made up")
    parser.add_argument("--families", default="", help="w4a16,w8a8,...; default: all")
    parser.add_argument("--seconds", type=float, help="after which nothing new is begun; quick: 540")
    parser.add_argument("--out", type=Path, help="result file; default: benchmarks/results/kernels_<gpu>.json")
    options = parser.parse_args(arguments)
    options.quick = not (options.full or options.dry_run)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures; the exit code is 1 when a kernel is wrong or does not run."""
    options = _parsed(arguments)
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which is later
    bench = _bench(options)
    plan = DRY if options.dry_run else FULL if options.full else QUICK
    if options.seconds is not None:
        plan = Plan(**{**vars(plan), "seconds": options.seconds})
    gpu = bench.device.name.lower().replace(" ", "-")
    suffix = "_dry" if options.dry_run else "_quick" if options.quick else ""
    path = options.out or RESULTS / f"kernels_{gpu}{suffix}.json"
    settings = {"plan": vars(plan), "dry_run": options.dry_run, "quick": options.quick}
    content = {"claim": "kernels", "environment": _facts(bench), "settings": settings, "results": {}}
    report = Report(path, content)
    run(plan, bench, [f for f in options.families.split(",") if f], report)
    print(_summary(report))
    if not options.dry_run:
        from benchmarks.kernel_plots import plot

        plot(report.rows, path)
    wrong = [r for r in (*report.rows, *report.content["results"].get("others", ())) if r["status"] != "ok"]
    wrong_samples = {n: s for n, s in report.content["results"]["samples"].items() if s != "ok"}
    for name, status in wrong_samples.items():
        print(f"{name}: {status}", file=sys.stderr)
    return int(bool(wrong or wrong_samples))


def _summary(report: Report) -> str:
    heads = ["family", "M", "K x N", "us", "% of roofline", "x over cuBLAS", "error", "status"]
    lines = [
        [
            r["family"],
            r["m"],
            f"{r['k']} x {r['n']}",
            "" if r["us"] is None else f"{r['us']:.1f}",
            f"{r['share']:.0%}" if r.get("share") else "",
            f"{r['speedup']:.2f}" if r.get("speedup") else "",
            f"{r['error']:.1e}" if "error" in r else "",
            r["status"],
        ]
        for r in report.rows
    ]
    return f"{table(heads, lines)}\n{report.path}"


if __name__ == "__main__":
    sys.exit(main())
