"""How long capture, fusion and verification take, and how that grows with the number of graph nodes.

    python -m benchmarks.capture_cost [--quick]

ResNet-50 and Swin-T by the wall clock; then chains of convolution, BatchNorm and ReLU up to about 5,000 nodes. The
exponent is that of the straight line through (log nodes, log seconds): 1 means linear. The plot goes beside the JSON
file.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.harness import Json
from benchmarks.models import MODELS

NODES: Final = (150, 300, 600, 1200, 2500, 5000)
Build = Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]
"""Gives a network and an example of its inputs."""

BARS: Final = {"resnet50": 5.0, "swin_t": 12.0}
"""Seconds that capture, fusion and verification may take."""


def chain(nodes: int) -> nn.Module:
    """Convolution, BatchNorm and ReLU in a row, ``nodes`` graph nodes in all; each
    convolution is nearly the identity, so that rounding errors do not grow through 1,667 layers.
    """
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(max(1, nodes // 3)):
        conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        nn.init.dirac_(conv.weight)
        conv.weight.data += 1e-3 * torch.randn_like(conv.weight)
        layers += [conv, nn.BatchNorm2d(4), nn.ReLU()]
    return nn.Sequential(*layers).eval()


def once(network: nn.Module, example: tuple[Tensor, ...]) -> dict[str, float]:
    """Seconds of capture (outputs compared with the network's) and of fusion (outputs compared after each pass)."""
    import fxcompress as fxc

    passes: Any = fxc.Pipeline((fxc.FoldBatchNorm(), fxc.FuseActivations()))
    begin, cpu = time.perf_counter(), time.process_time()
    program = fxc.capture(network, example)
    captured = time.perf_counter()
    program.verify()
    result = passes(program)
    result.program.verify()
    end = time.perf_counter()
    return {
        "capture_s": captured - begin,
        "fuse_and_verify_s": end - captured,
        "total_s": end - begin,
        "total_cpu_s": time.process_time() - cpu,
        "nodes": float(len(program.gm.graph.nodes)),
        "nodes_after": float(len(result.program.gm.graph.nodes)),
    }


def fastest(build: Build, repeats: int) -> dict[str, float]:
    """The fastest of ``repeats`` runs, each on a newly built network."""
    runs = [once(*build()) for _ in range(repeats)]
    return min(runs, key=lambda run: run["total_s"])


def exponent(rows: list[dict[str, float]], key: str) -> float:
    """Slope of log ``key`` over log nodes."""
    nodes, seconds = (np.log([row[name] for row in rows]) for name in ("nodes", key))
    return float(np.polyfit(nodes, seconds, 1)[0])


def plot(rows: list[dict[str, float]], slope: float, path: Path) -> None:
    """Seconds over nodes, capture and total, as SVG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    nodes = [row["nodes"] for row in rows]
    for key, label in (("total_s", "capture + fuse + verify"), ("capture_s", "capture")):
        axes.plot(nodes, [row[key] for row in rows], marker="o", label=label)
    axes.set_xlabel("graph nodes")
    axes.set_ylabel("seconds")
    axes.set_title(f"seconds ∝ nodes^{slope:.2f}")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _builder(name: str) -> Build:
    return lambda: (MODELS[name].build(), MODELS[name].example())


def _chain_builder(nodes: int) -> Build:
    return lambda: (chain(nodes), (torch.rand(2, 4, 8, 8),))


def run(options: argparse.Namespace) -> dict[str, Json]:
    """Measures the networks, then the chains."""
    repeats = 1 if options.quick else options.repeats
    torch.set_num_threads(options.threads)
    results: dict[str, Json] = {}
    for name, bar in BARS.items():
        row = fastest(_builder(name), repeats)
        results[name] = {**row, "bar_s": bar, "met": row["total_s"] <= bar}
        print(name, results[name], flush=True)
    rows = []
    for nodes in NODES[:3] if options.quick else NODES:
        rows.append(fastest(_chain_builder(nodes), repeats))
        print({key: round(value, 3) for key, value in rows[-1].items()}, flush=True)
    slopes = {key: exponent(rows, key) for key in ("capture_s", "fuse_and_verify_s", "total_s")}
    harness.RESULTS.mkdir(exist_ok=True)
    plot(rows, slopes["total_s"], harness.RESULTS / "capture_cost.svg")
    results["growth"] = {"rows": rows, "exponents": slopes}
    return results


def main() -> None:
    """Command line."""
    options = harness.arguments("Seconds of capture, fusion and verification.", repeats=3)
    if options.peers_only:
        raise SystemExit("this benchmark has no peers")
    results = run(options)
    print(harness.write("capture_cost", results, {"repeats": options.repeats}, options))


if __name__ == "__main__":
    main()
