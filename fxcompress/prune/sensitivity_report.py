"""A sensitivity analysis for people: text, CSV, curves with Matplotlib, and one HTML page that needs no other file."""

from __future__ import annotations

import csv
import io
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxcompress.environment import pip_line
from fxcompress.errors import ArtifactError, MissingRuntimeError, UsageError
from fxcompress.prune.sensitivity_cache import replace_file

if TYPE_CHECKING:
    from fxcompress.prune.sensitivity_result import Curve, Sensitivity

__all__ = ["csv_text", "html", "plot", "table", "write"]

#: Curves that get a colour and a name; the others, which lose less, are grey.
_NAMED = 10
_WIDTH, _HEIGHT, _EDGE = 180, 48, 4
_STYLE = (
    "body{font:14px/1.4 system-ui,sans-serif;margin:2em;color:#222}table{border-collapse:collapse}"
    "th,td{padding:3px 10px;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}"
    "th:first-child,td:first-child{text-align:left}td small{color:#777}"
    "svg{vertical-align:middle;background:#fafafa}polyline{fill:none;stroke:#1f6fb4;stroke-width:1.5}"
    "circle{fill:#1f6fb4}line{stroke:#bbb;stroke-dasharray:3 3}"
)


def write(path: Path, text: str) -> Path:
    """Write ``text`` in one step; missing parent folders are made.

    Raises:
        ArtifactError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text)
    except OSError as error:
        why = error.strerror or str(error)
        raise ArtifactError(63, "the report cannot be written", where=str(path), why=why) from error
    return path


def table(s: Sensitivity) -> str:
    """One line per group: units, and the metric at each ratio."""
    width = max([len("group"), *(len(c.name) for c in s.groups)])
    head = f"{'group':{width}}  {'units':>6}" + "".join(f"{f'{r:.0%}':>9}" for r in s.ratios)
    lines = [f"metric {s.baseline:.4f} as it is; one group pruned at a time by {s.importance}", head]
    for curve in s.groups:
        lines.append(f"{curve.name:{width}}  {curve.size:>6}" + "".join(f"{p.metric:>9.4f}" for p in curve.points))
    return "\n".join([*lines, *([f"nothing can go: {', '.join(s.whole)}"] if s.whole else [])])


def csv_text(s: Sensitivity) -> str:
    """One row per measurement."""
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(["group", "layers", "units", "ratio", "removed", "metric", "drop", "parameters", "macs"])
    for c in s.groups:
        for p in c.points:
            facts = [p.ratio, p.removed, p.metric, s.baseline - p.metric, p.parameters, p.macs]
            rows.writerow([c.name, " ".join(c.layers), c.size, *facts])
    return out.getvalue()


# ------------------------------------------------------------------------------------------------ Matplotlib
def plot(s: Sensitivity, path: Path) -> Path:
    """Draw all curves into one ``.svg`` or ``.png``."""
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("svg", "png"):
        raise UsageError(186, f"curves cannot be drawn into {path.name!r}", fix="give a name ending in .svg or .png")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingRuntimeError(170, "Matplotlib is not installed", fix=pip_line("plot")) from error
    with matplotlib.rc_context({"svg.hashsalt": "fxcompress", "svg.fonttype": "none", "text.parse_math": False}):
        figure = Figure(figsize=(9, 5), layout="constrained")
        axes = figure.add_subplot(
            xlabel="fraction of the group's units removed", ylabel="metric", title="one group pruned at a time"
        )
        _draw(axes, s)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
        except OSError as error:
            why = error.strerror or str(error)
            raise ArtifactError(64, "the curves cannot be written", where=str(path), why=why) from error
    return path


def _draw(axes: Any, s: Sensitivity) -> None:
    axes.axhline(s.baseline, color="black", linewidth=0.8, linestyle=":", label="as it is")
    by_loss = sorted(s.groups, key=lambda c: -max(s.baseline - p.metric for p in c.points))
    for rank, curve in enumerate(by_loss):
        x, y = zip(*((r, s.baseline - d) for r, d in curve.drops(s.baseline)), strict=True)
        if rank < _NAMED:
            axes.plot(x, y, marker=".", label=_short(curve.name))
        else:
            axes.plot(x, y, color="0.8", linewidth=0.8, zorder=1)
    if len(by_loss) > _NAMED:
        axes.plot([], [], color="0.8", label=f"{len(by_loss) - _NAMED} more, which lose less")
    axes.set_xlim(0, 1)
    axes.legend(fontsize="small", loc="lower left")


def _short(name: str, limit: int = 40) -> str:
    """A name that Matplotlib shows: those that begin with an underscore are left out of a legend."""
    name = f" {name}" if name.startswith("_") else name
    return name if len(name) <= limit else f"{name[: limit - 1]}…"


# ------------------------------------------------------------------------------------------------ HTML
def html(s: Sensitivity) -> str:
    """A page with the table and a small curve per group."""
    low = min([s.baseline, *(p.metric for c in s.groups for p in c.points)])
    high = max([s.baseline, *(p.metric for c in s.groups for p in c.points)])
    head = "".join(f"<th>{r:.0%}</th>" for r in s.ratios)
    rows = "\n".join(_row(s, c, low, high) for c in s.groups)
    facts = (
        f"The metric is {s.baseline:.4f} as it is ({s.parameters:,} parameters, {s.macs:,} MACs). One group at a time is "
        f"pruned by {escape(s.importance)}; every curve is drawn from {low:.4f} to {high:.4f}."
    )
    rest = f"<p>Nothing can go: {escape(', '.join(s.whole))}.</p>\n" if s.whole else ""
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Sensitivity</title><style>{_STYLE}</style>'
        f"</head><body>\n<h1>Sensitivity</h1>\n<p>{facts}</p>\n<table>\n"
        f"<tr><th>group</th><th>units</th><th>curve</th>{head}</tr>\n{rows}\n</table>\n{rest}</body></html>\n"
    )


def _row(s: Sensitivity, curve: Curve, low: float, high: float) -> str:
    cells = "".join(
        f"<td>{p.metric:.4f}<br><small>{(p.parameters - s.parameters) / max(s.parameters, 1):+.1%} params</small></td>"
        for p in curve.points
    )
    layers = escape(", ".join(curve.layers))
    svg = _svg(s, curve, low, high)
    return f'<tr><td title="{layers}">{escape(curve.name)}</td><td>{curve.size}</td><td>{svg}</td>{cells}</tr>'


def _svg(s: Sensitivity, curve: Curve, low: float, high: float) -> str:
    def place(ratio: float, metric: float) -> tuple[str, str]:
        x = _EDGE + ratio * (_WIDTH - 2 * _EDGE)
        y = _EDGE + (high - metric) / ((high - low) or 1.0) * (_HEIGHT - 2 * _EDGE)
        return f"{x:.1f}", f"{y:.1f}"

    points = [place(ratio, s.baseline - drop) for ratio, drop in curve.drops(s.baseline)]
    line = " ".join(f"{x},{y}" for x, y in points)
    dots = "".join(f'<circle cx="{x}" cy="{y}" r="2"/>' for x, y in points)
    level = place(0.0, s.baseline)[1]
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img" aria-label="metric over ratio">'
        f'<line x1="0" x2="{_WIDTH}" y1="{level}" y2="{level}"/><polyline points="{line}"/>{dots}</svg>'
    )
