"""Seconds of planning and applying 50 % pruning, beside Torch-Pruning; growth with the number of graph nodes.

    python -m benchmarks.pruning_cost [--quick] [--peers-only] [--only networks|growth]

Each run is a process of its own that has imported everything before the clock starts; the median of three counts. For
fxcompress the clock runs from the captured program to the pruned one, and capture is given beside it; for Torch-Pruning
from the model to the pruned model, its tracing included. The peer runs once and is stopped after 60 s.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import harness, pruning_peer
from benchmarks.child import Row, call
from benchmarks.harness import Json
from benchmarks.pruning_zoo import ZOO

NETWORKS: Final = {
    "densenet121": "torchvision/densenet121",
    "resnest14d": "timm/resnest14d",
    "swin_t": "torchvision/swin_t",
    "maxvit_t": "torchvision/maxvit_t",
}
NODES: Final = (160, 320, 640, 1250, 2500, 5000)
RATIO: Final = 0.5
LIMIT: Final = 200.0
PEER_LIMIT: Final = 60.0
BAR_S: Final = 2.0
BAR_SHARE: Final = 0.2


class Chain(nn.Module):
    """Blocks of convolution, BatchNorm, ReLU and an addition every second block; four nodes or three a block."""

    def __init__(self, nodes: int) -> None:
        super().__init__()
        blocks = max(2, round((nodes - 4) / 3.5))
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(blocks))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(blocks))
        self.head = nn.Linear(8, 5)
        with torch.no_grad():
            for weight in self.convs.parameters():
                weight.normal_(std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Float ``[n, 3, height, width]`` -> ``[n, 5]``."""
        x = self.stem(x)
        kept = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = torch.relu(norm(conv(x)))
            if i % 2:
                x = kept = x + kept
        return torch.as_tensor(self.head(x.mean((2, 3))))


def _network(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    if name.startswith("chain_"):
        torch.manual_seed(0)
        return Chain(int(name.removeprefix("chain_"))).eval(), (torch.rand(2, 3, 8, 8),)
    entry = ZOO[NETWORKS[name]]
    return entry.build(), entry.inputs(1)[0]


def ours(name: str) -> Row:
    """Seconds of capture, plan and apply."""
    import fxcompress as fxc
    from fxcompress.prune.plan import plan_pruning

    model, example = _network(name)
    begin = time.perf_counter()
    program = fxc.capture(model, example)
    captured, cpu = time.perf_counter(), time.process_time()
    plan = plan_pruning(program, ratio=RATIO)
    planned = time.perf_counter()
    pruned = plan.apply(program)
    end = time.perf_counter()
    return {
        "status": "pruned",
        "seconds": end - captured,
        "cpu_s": time.process_time() - cpu,
        "capture_s": captured - begin,
        "plan_s": planned - captured,
        "apply_s": end - planned,
        "nodes": len(program.graph.nodes),
        "parameters": [pruning_peer.size(program.gm), pruning_peer.size(pruned.gm)],
    }


def theirs(name: str) -> Row:
    """Seconds from the model to the pruned model, and whether it runs."""
    model, example = _network(name)
    hints = pruning_peer.attention_layers(model)
    ignored = pruning_peer.output_layers(model, example)
    outcome = pruning_peer.prune(model, example, pruning_peer.Settings(RATIO, False, ignored, hints))
    row: dict[str, Json] = {
        "seconds": outcome.seconds,
        "cpu_s": outcome.cpu_s,
        "parameters": [pruning_peer.size(model), pruning_peer.size(outcome.model)],
    }
    try:
        with torch.no_grad():
            outcome.model(*example)
    except Exception as error:  # noqa: BLE001 - the time is told all the same
        return {**row, "status": "does not run", "error": f"{type(error).__name__}: {error}"[:300]}
    return {**row, "status": "pruned"}


def median(function: Any, name: str, repeats: int, threads: int) -> Row:
    """The row of the run with the median time; the first that gives no time ends it."""
    rows: list[Row] = []
    for _ in range(repeats):
        rows.append(call(function, name, seconds=LIMIT if function is ours else PEER_LIMIT, threads=threads))
        if "parameters" not in rows[-1]:
            return rows[-1]
    rows.sort(key=_seconds)
    return {**rows[len(rows) // 2], "runs_s": [round(_seconds(row), 3) for row in rows]}


def _seconds(row: Mapping[str, Any]) -> float:
    return float(row["seconds"])


def verdict(mine: Mapping[str, Any], peer: Mapping[str, Any]) -> Row:
    """The two bars: at most 2 s, and at most a fifth of the peer's time where it finishes."""
    if "parameters" not in mine:
        return {"within_2_s": False, "share_of_peer": None, "met": False}
    fast = _seconds(mine) <= BAR_S
    share = _seconds(mine) / _seconds(peer) if "parameters" in peer else None
    return {"within_2_s": fast, "share_of_peer": share, "met": fast and (share is None or share <= BAR_SHARE)}


def exponent(rows: list[Row]) -> float:
    """Slope of log seconds over log nodes; 1 is linear."""
    nodes = np.log([float(str(row["nodes"])) for row in rows])
    return float(np.polyfit(nodes, np.log([_seconds(row) for row in rows]), 1)[0])


def run(options: argparse.Namespace) -> dict[str, Json]:
    """The four networks, then the chains."""
    repeats = 1 if options.quick else options.repeats
    results: dict[str, Json] = {}
    for name in NETWORKS if options.only in ("", "networks") else ():
        row: dict[str, Json] = {"torch_pruning": median(theirs, name, 1, options.threads)}
        if not options.peers_only:
            row["fxcompress"] = median(ours, name, repeats, options.threads)
            row |= verdict(row["fxcompress"], row["torch_pruning"])  # type: ignore[arg-type]
        results[name] = row
        print(name, row, flush=True)
    if options.only == "networks":
        return results
    growth: dict[str, Json] = {}
    for tool, function in (("torch_pruning", theirs), ("fxcompress", ours)):
        if tool == "torch_pruning" or not options.peers_only:
            growth[tool] = chains(function, options, repeats if tool == "fxcompress" else 1)
    return {**results, "growth": growth}


def chains(function: Any, options: argparse.Namespace, repeats: int) -> Row:
    """Seconds over nodes; the peer's rows carry the size that was asked for."""
    rows: list[Row] = []
    for nodes in NODES[:3] if options.quick else NODES:
        row = median(function, f"chain_{nodes}", repeats, options.threads)
        rows.append({"nodes": nodes, **row})
        print(function.__name__, rows[-1], flush=True)
        if "parameters" not in row:
            break
    timed = [row for row in rows if "parameters" in row]
    last = statistics.fmean(_seconds(row) / float(str(row["nodes"])) for row in timed[-1:]) if timed else None
    slope = exponent(timed) if len(timed) > 1 else None
    return {"rows": rows, "exponent": slope, "seconds_per_node_at_the_end": last}


def main() -> None:
    """Command line."""
    options = harness.arguments("Seconds of planning and applying.", repeats=3, only="")
    results = run(options)
    settings: dict[str, Json] = {
        "ratio": RATIO,
        "repeats": options.repeats,
        "limit_s": LIMIT,
        "peer_limit_s": PEER_LIMIT,
        "torch_pruning": pruning_peer.version(),
        "peer": "MagnitudePruner, L2, local ranking; output layers ignored; num_heads given",
    }
    print(harness.write("pruning_cost", results, settings, options))


if __name__ == "__main__":
    main()
