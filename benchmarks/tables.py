"""Writes the tables of ``docs/benchmarks.md`` and ``docs/kernels.md`` from the result files: no figure is typed by hand.

    python -m benchmarks.tables

The text of the pages is their own; only what stands between ``<!-- table NAME -->`` and ``<!-- end -->`` is replaced.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks import kernel_tables, pruning_tables, quant_tables
from benchmarks.harness import RESULTS, table

PAGE: Final = Path(__file__).parent.parent / "docs" / "benchmarks.md"
OURS: Final = "fxcompress"
PEERS: Final = ("NNCF", "ORT")
_BLOCK: Final = re.compile(r"<!-- table ([a-z0-9_ ]+) -->\n.*?<!-- end -->", re.DOTALL)

Rows = Mapping[str, Any]


def files(claim: str) -> list[dict[str, Any]]:
    """Content of ``results/<claim>.json`` and of the files of its parts (``--only``)."""
    paths = [RESULTS / f"{claim}.json", *sorted(RESULTS.glob(f"{claim}_*.json"))]
    found = [json.loads(p.read_text(encoding="utf-8")) for p in paths if p.exists() and not p.stem.endswith("_quick")]
    if not found:
        raise FileNotFoundError(f"{claim}: run python -m benchmarks.{claim.split('_')[0]}")
    return found


def results(claim: str) -> dict[str, Any]:
    """What was measured for a claim, all its parts together."""
    return {name: row for content in files(claim) for name, row in content["results"].items()}


def environment(claim: str) -> str:
    """One line: when, on what and with which versions a claim was measured."""
    every = [content["environment"] for content in files(claim)]
    facts, days = every[0], sorted({e["date"] for e in every})
    date = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    flags = [name for name, there in facts["flags"].items() if there]
    packages = [f"{name} {version}" for name, version in facts["packages"].items() if version and name != OURS]
    return (
        f"`{claim}`: {date}, {facts['processor']} ({', '.join(flags)}), {facts['cores']} cores, "
        f"{facts['threads']} threads, Python {facts['python']}, {', '.join(packages)}.\n"
    )


def _peer_rows(rows: Rows, score: str, second: str) -> list[str]:
    """Each peer's default recipe (its first) and its most accurate one."""
    names = [n for n in rows if score in rows[n] and "AVX2" not in n and "run by" not in n]
    chosen: list[str] = []
    for peer in PEERS:
        group = [n for n in names if n.startswith(peer)]
        best = max(group, key=lambda n: (rows[n][score], rows[n][second]), default="")
        chosen += [n for n in dict.fromkeys([*group[:1], best]) if n]
    return chosen


def _accuracy(claim: str, score: str, columns: Mapping[str, str], baseline: str, digits: int) -> str:
    rows = results(claim)
    second = list(columns)[1]
    names = [n for n in rows if n.startswith(("FP32", OURS)) and "AVX2" not in n] + _peer_rows(rows, score, second)
    names += [f"{n} (AVX2)" for n in names if f"{n} (AVX2)" in rows]
    names += [n for n in rows if n.startswith(OURS) and n.endswith("(AVX2)") and n not in names]
    ground = rows[baseline][score]
    lines = []
    for name in sorted(names, key=lambda n: ("AVX2" in n, not n.startswith("FP32"), not n.startswith(OURS))):
        cells = [f"{rows[name][key]:.{digits}f}" for key in columns]
        lines.append([name, *cells, f"{rows[name][score] - ground:+.{digits}f}"])
    return table(["engine", *columns.values(), "against FP32"], lines) + "\n"


def accuracy_images(claim: str) -> str:
    """Top-1 and agreement of each engine."""
    columns = {"top1": "top-1", "agreement": "agreement", "top1_held_out": "top-1, held out", "sqnr_db": "SQNR dB"}
    return _accuracy(claim, "top1", columns, "FP32 torch", 4)


def accuracy_text(claim: str) -> str:
    """Spearman correlation of each engine."""
    columns = {
        "spearman": "Spearman",
        "mean_cosine_to_fp32": "cosine to FP32",
        "spearman_held_out": "Spearman, held out",
        "sqnr_db": "SQNR dB",
    }
    return _accuracy(claim, "spearman", columns, "FP32 torch", 4)


def _ratio(comparison: Rows, first: str, second: str) -> str:
    found = comparison.get(f"{first} / {second}")
    if found is None:
        return ""
    low, high = found["interval"]
    return f"{found['median']:.3f} [{low:.3f}, {high:.3f}]"


def latency(claim: str) -> str:
    """Engines of each network, fastest first, with the ratio of ours to the fastest INT8 peer and FP32 engine."""
    parts = []
    for network, found in results(claim).items():
        comparison = found["comparison"]
        peer, fp32 = comparison["fastest_peer_int8"], comparison["fastest_fp32"]
        engines = sorted(found["engines"].items(), key=lambda item: float(item[1]["p50_ms"]))
        lines = [
            [n, e["p50_ms"], e["p95_ms"], e["iqr_ms"], _ratio(comparison, n, peer), _ratio(comparison, n, fp32)]
            for n, e in engines
        ]
        heads = [network, "p50 ms", "p95 ms", "IQR ms", "to fastest INT8 peer", "to fastest FP32"]
        parts.append(table(heads, lines))
    return "\n\n".join(parts) + "\n"


def never_slower(claim: str) -> str:
    """What compile's default returned for each network, beside the best FP32 engine and the best INT8 peer."""
    lines = []
    for network, found in results(claim).items():
        comparison, engines = found["comparison"], found["engines"]
        peer, fp32 = comparison["fastest_peer_int8"], comparison["fastest_fp32"]
        mine = next(n for n in engines if n.startswith(OURS) and "bare" not in n)
        chosen = engines[mine]["settings"].get("chosen", "")
        lines.append(
            [
                network,
                chosen,
                engines[mine]["p50_ms"],
                f"{fp32}: {engines[fp32]['p50_ms']:.4g}",
                _ratio(comparison, mine, fp32),
                _ratio(comparison, f"{mine}, bare file", fp32),
                f"{peer}: {engines[peer]['p50_ms']:.4g}",
            ]
        )
    heads = [
        "network",
        "compile chose",
        "p50 ms",
        "best FP32, ms",
        "ratio",
        "ratio of the bare file",
        "best INT8 peer, ms",
    ]
    return table(heads, lines) + "\n"


def compile_cost(claim: str) -> str:
    """Wall time, processor time and memory of both sides."""
    found = results(claim)
    ratios = found["fxcompress / NNCF"]
    lines = []
    for key, title in (("wall_s", "wall time, s"), ("cpu_s", "processor time, s"), ("peak_rss_mb", "peak memory, MB")):
        cells = [_median([run[key] for run in found["runs"][side]]) for side in ("fxcompress", "NNCF", "neither")]
        low, high = ratios[key]["interval"]
        lines.append([title, *cells, f"{ratios[key]['median']:.3f} [{low:.3f}, {high:.3f}]"])
    return table(["ResNet-50", "fxcompress", "NNCF", "imports and network alone", "fxcompress / NNCF"], lines) + "\n"


def _median(values: Sequence[float]) -> float:
    return float(sorted(values)[len(values) // 2])


def capture_cost(claim: str) -> str:
    """Seconds of the two networks and of the chains."""
    found = results(claim)
    heads = ["network", "nodes", "capture s", "fuse and verify s", "total s", "bar s"]
    keys = ("nodes", "capture_s", "fuse_and_verify_s", "total_s")
    networks = {n: r for n, r in found.items() if n != "growth"}
    lines = [[n, *(_number(r[k]) for k in keys), r["bar_s"]] for n, r in networks.items()]
    lines += [["chain", *(_number(r[k]) for k in keys), ""] for r in found["growth"]["rows"]]
    slope = found["growth"]["exponents"]["total_s"]
    return table(heads, lines) + f"\n\nseconds ∝ nodes^{slope:.2f} over the chains.\n"


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value


def tensorrt_build(claim: str) -> str:
    """What runs on integers in each network's engine, and how far its file is from the simulation."""
    lines = []
    for network, precisions in results(claim).items():
        for precision, row in precisions.items():
            if "error" in row:
                lines.append([network, precision, row["error"], *[""] * 7])
                continue
            kinds, adds = list(row["layers"].values()), list(row["adds"].values())
            integers = ", ".join(f"{kinds.count(k)} {k}" for k in dict.fromkeys(kinds)) or "-"
            joined = f"{len(adds) - adds.count('float')} of {len(adds)}" if adds else "-"
            cells = [
                integers,
                joined,
                row["reformats"],
                len(row["stray"]),
                row["count"],
                row["plan_mb"],
                row["build_s"],
            ]
            lines.append([network, precision, *cells, row["parity"]["error"]])
    heads = [
        "network",
        "precision",
        "quantized layers",
        "residual adds in INT8",
        "reformats",
        "between quantized layers",
    ]
    return table([*heads, "kernels", "engine MB", "build s", "parity"], lines) + "\n"


TABLES: Final[Mapping[str, Callable[[str], str]]] = {
    "accuracy_efficientnet_lite0": accuracy_images,
    "accuracy_minilm": accuracy_text,
    "latency": latency,
    "never_slower": never_slower,
    "compile_cost": compile_cost,
    "capture_cost": capture_cost,
    "tensorrt_build": tensorrt_build,
    **dict.fromkeys(pruning_tables.TABLES, lambda claim: pruning_tables.TABLES[claim](results(claim))),
    **dict.fromkeys(quant_tables.TABLES, lambda claim: quant_tables.TABLES[claim](results(claim))),
}


def filled(page: str) -> str:
    """The page with every table made anew from its file.

    Raises:
        KeyError: The page asks for a table that does not exist.
        FileNotFoundError: The benchmark has not run.
    """

    def block(match: re.Match[str]) -> str:
        name = match.group(1)
        if name in kernel_tables.TABLES:
            return f"<!-- table {name} -->\n{kernel_tables.TABLES[name]()}<!-- end -->"
        return f"<!-- table {name} -->\n{TABLES[name](name)}\n{environment(name)}<!-- end -->"

    return _BLOCK.sub(block, page)


def main() -> None:
    """Rewrites the pages."""
    for page in (PAGE, kernel_tables.PAGE):
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
        print(page)


if __name__ == "__main__":
    main()
