"""Tables of the kernels; `benchmarks.tables` puts them into ``docs/kernels.md``."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.harness import RESULTS, table
from benchmarks.kernel_model import tile

__all__ = ["PAGE", "TABLES", "measured_files"]

PAGE: Final = Path(__file__).parent.parent / "docs" / "kernels.md"
CHIPS: Final = (80, 90, 100)
NOTHING: Final = "No timing exists yet: nothing here has been run on a GPU.\n"

Rows = Mapping[str, Mapping[str, Any]]


def _content(name: str) -> dict[str, Any]:
    path = RESULTS / f"{name}.json"
    if not path.exists():
        raise FileNotFoundError(f"{name}: run make kernels-lint")
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _lint() -> dict[str, Rows]:
    return dict(_content("kernel_lint")["results"])


def _source(name: str, *facts: str) -> str:
    date = str(_content(name)["environment"]["date"]).split(" ")[0]
    return "\n" + ", ".join([f"`{name}`: {date}", *facts]) + ".\n"


def _span(values: Iterable[float | None], digits: int = 2) -> str:
    found = sorted(v for v in values if v is not None)
    if not found:
        return ""
    low, high = f"{found[0]:.{digits}f}", f"{found[-1]:.{digits}f}"
    return low if low == high else f"{low} to {high}"


def _units(rows: Sequence[Mapping[str, Any]]) -> str:
    """Tensor core instructions without their shapes: ``HMMA``, ``IGMMA``, ``HMMA.SP``."""
    names = {name for row in rows for name in row.get("mma", {})}
    return ", ".join(sorted({n.split(".")[0] + (".SP" if ".SP" in n else "") for n in names}))


# ------------------------------------------------------------------------------------------------ lint
def lint() -> str:
    """Every family on every chip: configurations, instructions per weight, registers, shared memory, problems."""
    version, found = next(iter(_lint().items()))
    lines = []
    for family in dict.fromkeys(row["family"] for row in found.values()):
        for sm in CHIPS:
            rows = [r for r in found.values() if r["family"] == family and r["sm"] == sm]
            if rows:
                lines.append(_lint_line(family, sm, rows))
    heads = ["family", "chip", "configurations", "unit", "instructions per weight", "registers", "shared kB"]
    heads += ["with spills", "with problems"]
    return table(heads, lines) + "\n" + _source("kernel_lint", f"Triton {version}")


def _lint_line(family: str, sm: int, rows: Sequence[Mapping[str, Any]]) -> list[object]:
    return [
        family,
        f"sm_{sm}",
        len(rows),
        _units(rows),
        _span(r.get("per_weight") for r in rows),
        max(r.get("registers", 0) for r in rows),
        f"{max(r.get('shared', 0) for r in rows) / 1000:.0f}",
        sum(bool(r.get("spills", 0)) for r in rows),
        sum(bool(r["problems"]) for r in rows),
    ]


def tiles() -> str:
    """Instructions per weight by tile: a row for each tile, from the least to the most of its variants on each chip."""
    version, found = next(iter(_lint().items()))
    order = list(dict.fromkeys(row["family"] for row in found.values()))
    counted: dict[tuple[Any, ...], dict[int, list[float]]] = {}
    for row in found.values():
        if row.get("per_weight"):
            key = (order.index(row["family"]), *_sizes(row), row["warps"])
            counted.setdefault(key, {}).setdefault(row["sm"], []).append(row["per_weight"])
    lines = [
        [order[family], _tile_text(*sizes), *(_span(counts.get(sm, [])) for sm in CHIPS)]
        for (family, *sizes), counts in sorted(counted.items(), key=lambda item: item[0])
    ]
    heads = ["family", "tile M x N x K", *(f"sm_{sm}" for sm in CHIPS)]
    return table(heads, lines) + "\n" + _source("kernel_lint", f"Triton {version}")


def _sizes(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Operands swapped, M, N and K of a tile; 0 for what the kernel's constants do not tell."""
    c = tile(row["constants"])
    return (bool(c.get("swap_ab")), *(c.get(name, 0) for name in ("block_m", "block_n", "block_k")))


def _tile_text(swapped: bool, m: int, n: int, k: int, warps: int) -> str:
    return " x ".join(str(size) for size in (m, n, k) if size) + (", swapped" if swapped else "") + f", {warps} warps"


def versions() -> str:
    """Triton versions and chips: what goes wrong with the configurations there, and their instructions per weight."""
    every = _lint()
    newest = next(iter(every.values()))
    lines = [
        [version, f"sm_{sm}", *_version_cells({n: r for n, r in rows.items() if r["sm"] == sm}, newest)]
        for version, rows in every.items()
        for sm in CHIPS
    ]
    heads = ["Triton", "chip", "configurations", "over budget", "with spills", "other problems"]
    return (
        table([*heads, "instructions against the first version, median and most"], lines)
        + "\n"
        + _source("kernel_lint")
    )


def _version_cells(rows: Rows, newest: Rows) -> list[object]:
    problems = [p for row in rows.values() for p in row["problems"]]
    budget, spills = sum(" per weight, " in p for p in problems), sum(" of local memory" in p for p in problems)
    shared = [name for name in rows if rows[name].get("per_weight") and newest.get(name, {}).get("per_weight")]
    ratios = sorted(rows[name]["per_weight"] / newest[name]["per_weight"] for name in shared)
    text = f"{statistics.median(ratios):.2f}, {ratios[-1]:.2f}" if ratios else ""
    return [len(rows), budget, spills, len(problems) - budget - spills, text]


# ------------------------------------------------------------------------------------------------ times
def measured_files() -> dict[str, dict[str, Any]]:
    """Measured results by GPU: the full run's, else the quick one's."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(RESULTS.glob("kernels_*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        gpu = content["environment"]["gpu"]["name"]
        if not content["settings"]["dry_run"] and (gpu not in found or not content["settings"]["quick"]):
            found[gpu] = content
    return found


def predicted() -> str:
    """Times faster than cuBLAS by the model, by GPU, family and shape; behind them what was measured."""
    content = _content("kernel_predictions")
    rows = content["results"]["rows"]
    times = {
        (gpu, r["family"], r["n"], r["k"], r["m"]): r.get("speedup")
        for gpu, found in measured_files().items()
        for r in found["results"]["rows"]
        if r["dtype"] in ("float16", "int8") and r["status"] == "ok"
    }
    columns = sorted({r["m"] for r in rows})
    lines: dict[tuple[Any, ...], dict[int, str]] = {}
    for r in rows:
        key = (r["gpu"], r["family"], r["n"], r["k"])
        seen = next(
            (v for (g, *rest), v in times.items() if v and g.startswith(r["gpu"]) and rest == [*key[1:], r["m"]]), None
        )
        cell = f"{r['speedup']:.2f} {_LIMITS[r['limit']]}" + (f" (measured {seen:.2f})" if seen else "")
        lines.setdefault(key, {})[r["m"]] = cell
    body = [[gpu, family, f"{k} x {n}", *(cells[m] for m in columns)] for (gpu, family, n, k), cells in lines.items()]
    heads = ["GPU", "family", "K x N", *(f"M = {m}" for m in columns)]
    return table(heads, body) + "\n" + _source("kernel_predictions", "predicted, not measured")


_LIMITS: Final = {"memory": "m", "instructions": "i", "tensor cores": "t"}


def measured() -> str:
    """What was measured, by GPU."""
    parts = []
    for gpu, content in measured_files().items():
        roof = content["results"]["ceilings"]
        packages = content["environment"]["packages"]
        parts.append(
            f"{gpu}: copy {roof['copy'] / 1e12:.2f} TB/s, float16 {roof['float16'] / 1e12:.0f} TFLOP/s, "
            f"bfloat16 {roof['bfloat16'] / 1e12:.0f} TFLOP/s. {content['environment']['date']}, "
            f"torch {packages['torch']}, Triton {packages['triton']}."
        )
        peers = list(dict.fromkeys(p for r in content["results"]["rows"] for p, t in r["peers"].items() if t["us"]))
        heads = ["family", "M", "K x N", "dtype", "µs", "µs eager", "% of roofline", "x over cuBLAS", *peers]
        parts.append(table(heads, [_measured_line(r, peers) for r in content["results"]["rows"]]))
        others = [_other_line(r) for r in content["results"].get("others", ())]
        heads = ["operator", "case", "µs", "µs eager", "% of roofline", "peer", "peer µs"]
        parts += [table(heads, others)] if others else []
    return "\n\n".join(parts) + "\n" if parts else NOTHING


def _measured_line(r: Mapping[str, Any], peers: Sequence[str]) -> list[object]:
    if r["us"] is None:
        return [r["family"], r["m"], f"{r['k']} x {r['n']}", r["dtype"], r["status"], *[""] * (3 + len(peers))]
    times = [r["peers"].get(p, {}).get("us") for p in peers]
    return [
        *(r["family"], r["m"], f"{r['k']} x {r['n']}", r["dtype"], f"{r['us']:.1f}", f"{r['eager_us']:.1f}"),
        *(f"{r['share']:.0%}", f"{r['speedup']:.2f}" if r["speedup"] else ""),
        *(f"{t:.1f}" if t else "" for t in times),
    ]


def _other_line(r: Mapping[str, Any]) -> list[object]:
    if r["us"] is None:
        return [r["op"], r["case"], r["status"], *[""] * 4]
    (peer, theirs), *_ = r.get("peers", {"": {"us": None}}).items()
    numbers = (f"{r['us']:.1f}", f"{r['eager_us']:.1f}", f"{r['share']:.0%}")
    return [r["op"], r["case"], *numbers, peer, f"{theirs['us']:.1f}" if theirs["us"] else ""]


TABLES: Final[Mapping[str, Callable[[], str]]] = {
    "kernel_lint": lint,
    "kernel_tiles": tiles,
    "kernel_triton_versions": versions,
    "kernels_predicted": predicted,
    "kernels_measured": measured,
}
