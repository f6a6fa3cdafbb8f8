"""A picture per kernel family: how many times faster than cuBLAS in 16 bits, by rows of activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["plot"]


def plot(rows: Sequence[Mapping[str, Any]], result: Path) -> list[Path]:
    """Write ``<result>_<family>.svg`` for every family that was timed; nothing without Matplotlib.

    Args:
        rows: Of the result file.
        result: Its path.
    """
    if find_spec("matplotlib") is None:
        return []
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    made = []
    for family in dict.fromkeys(r["family"] for r in rows):
        lines = _lines([r for r in rows if r["family"] == family])
        if not lines:
            continue
        figure, axes = pyplot.subplots(figsize=(7, 4))
        for label, points in lines.items():
            axes.plot(
                *zip(*sorted(points), strict=True),
                marker="o",
                linestyle="-" if label.startswith("ours") else ":",
                label=label,
            )
        axes.axhline(1.0, color="gray", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("rows of activations")
        axes.set_ylabel("times faster than cuBLAS, 16 bits")
        axes.set_title(family)
        axes.legend(fontsize=7)
        path = result.with_name(f"{result.stem}_{family}.svg")
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
        pyplot.close(figure)
        made.append(path)
    return made


def _lines(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Label -> (M, speed-up) of ours and of the peers, by shape and dtype."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        base = row.get("peers", {}).get("cuBLAS", {}).get("us")
        if not base:
            continue
        times = {"ours": row["us"], **{n: p["us"] for n, p in row["peers"].items() if n != "cuBLAS"}}
        for name, us in times.items():
            if us:
                label = f"{name} {row['k']}x{row['n']} {row['dtype']}"
                found.setdefault(label, []).append((row["m"], base / us))
    return found
