"""Tables of the pruning and sparsity claims; `benchmarks.tables` puts them into the page."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any, Final

from benchmarks.harness import table

__all__ = ["TABLES"]

Results = Mapping[str, Any]


def patterns(found: Results) -> str:
    """Outcome counts, and the patterns on which the two tools part."""
    counts = found["counts"]
    kinds = list(dict.fromkeys(k for row in counts.values() for k in row))
    lines = [[name, *(row.get(k, 0) for k in kinds)] for name, row in counts.items()]
    parts = [table(["tool, set of patterns", *kinds], lines)]
    rows = [
        [name, row["fxcompress"]["status"], row["torch_pruning"]["status"]]
        for name, row in found["patterns"].items()
        if row["in_table"]
    ]
    parts.append(table(["pattern", "fxcompress", "Torch-Pruning"], rows))
    return "\n\n".join(parts) + "\n"


def architectures(found: Results) -> str:
    """One row per network."""
    ours = found["fxcompress"]["networks"]
    peers = found.get("torch_pruning", {}).get("networks", {})
    heads = [
        "network",
        "parameters left",
        "certificate, float64",
        "float32",
        "batch 1 and 3",
        "plan + apply s",
        "status",
    ]
    heads += ["Torch-Pruning"] if peers else []
    lines = []
    for name, row in sorted(ours.items()):
        before, after = row.get("parameters", (0, 0))
        proof = row.get("certificate", {})
        batches = row.get("batches", {})
        line = [
            name,
            f"{after / before:.1%}" if before else "",
            f"{proof['float64']:.0e}" if proof else "",
            f"{proof['float32']:.0e}" if proof else "",
            "ok" if batches and set(batches.values()) == {"ok"} else "; ".join(sorted(set(batches.values()))),
            f"{row['plan_s'] + row['apply_s']:.1f}" if "plan_s" in row else "",
            row["status"],
        ]
        lines.append(line + ([peers.get(name, {}).get("status", "")] if peers else []))
    summary = ", ".join(f"{count} {status}" for status, count in found["fxcompress"]["counts"].items())
    return f"{len(ours)} networks: {summary}.\n\n{table(heads, lines)}\n"


def cost(found: Results) -> str:
    """Seconds of planning and applying; growth."""
    lines = []
    for name, row in found.items():
        if name != "growth":
            mine, theirs = row["fxcompress"], row["torch_pruning"]
            lines.append(
                [
                    name,
                    _seconds(mine),
                    _seconds(theirs),
                    f"{row['share_of_peer']:.3f}" if row.get("share_of_peer") else "",
                ]
            )
    parts = [table(["network", "fxcompress s", "Torch-Pruning s", "share"], lines)]
    rows = [[tool, r["nodes"], _seconds(r)] for tool, g in found["growth"].items() for r in g["rows"]]
    parts.append(table(["chain", "nodes", "s"], rows))
    slopes = {tool: g["exponent"] for tool, g in found["growth"].items() if g.get("exponent") is not None}
    text = ", ".join(f"{tool}: seconds ∝ nodes^{slope:.2f}" for tool, slope in slopes.items())
    return "\n\n".join([*parts, text]) + "\n"


def _seconds(row: Results) -> str:
    return f"stopped after {row['seconds']:.0f}" if row.get("status") == "timeout" else f"{row['seconds']:.2f}"


def resnet20(found: Results) -> str:
    """Accuracy of every variant, the most accurate first; latency of the two best."""
    rows = found["variants"]
    seeds = sorted({s for row in rows.values() for s in row["accuracy"]})
    order = sorted(rows, key=lambda n: -float(rows[n]["mean_accuracy"]))
    lines = [
        [
            name,
            *(f"{rows[name]['accuracy'][s]:.2f}" if s in rows[name]["accuracy"] else "" for s in seeds),
            f"{rows[name]['mean_accuracy']:.2f}",
            f"{statistics.mean(rows[name]['macs_ratio'].values()):.3f}",
        ]
        for name in order
    ]
    parts = [table(["variant", *(f"seed {s}" for s in seeds), "mean", "MACs left"], lines)]
    timed = found.get("latency", {}).get("against_dense", {})
    if timed:
        rows_ = [[name, *(_cell(v) for v in row.values())] for name, row in timed.items()]
        parts.append(table(["engine", *next(iter(timed.values()))], rows_))
    return "\n\n".join(parts) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(f'{v:.3f}' for v in value)}]"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def latency(found: Results) -> str:
    """Speed-up of each engine and rounding."""
    heads = ["engine", "MACs left", "dense ms", "pruned ms", "speed-up"]
    lines = [
        [
            name,
            f"{row['macs_ratio']:.3f}",
            f"{row['dense_ms']:.2f}",
            f"{row['pruned_ms']:.2f}",
            f"{row['speedup']:.2f} [{row['low']:.2f}, {row['high']:.2f}]",
        ]
        for name, row in found["rows"].items()
    ]
    return table(heads, lines) + "\n"


def sparsity(found: Results) -> str:
    """Perplexity of each method."""
    lines = [
        [name, f"{row['perplexity']:.2f}", f"{row['sparsity']:.3f}", f"{row['seconds']:.0f}"]
        for name, row in found.items()
    ]
    return table(["SmolLM2-135M", "perplexity", "sparsity", "s"], lines) + "\n"


TABLES: Final[Mapping[str, Callable[[Results], str]]] = {
    "pruning_patterns": patterns,
    "pruning_architectures": architectures,
    "pruning_cost": cost,
    "pruning_resnet20": resnet20,
    "pruning_latency": latency,
    "sparsity_llm": sparsity,
}
