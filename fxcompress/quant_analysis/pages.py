"""A quantization report for people: text, bars as SVG, and one HTML page that needs no other file and runs no script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fxcompress.quant_analysis.result import Bins, LayerRow, QuantReport, TensorRow

__all__ = ["html", "svg", "table"]

_BARS = 30
_NAME, _BAR, _LINE = 320, 420, 18
_WIDTH, _HEIGHT = 150, 36
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_STYLE = (
    "body{font:14px/1.4 system-ui,sans-serif;margin:2em;color:#222}table{border-collapse:collapse}"
    "th,td{padding:3px 10px;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap;vertical-align:top}"
    "th{position:sticky;top:0;background:#fff}.l{text-align:left}.w{white-space:normal;min-width:16em;text-align:left}"
    "td small{color:#777}.act{background:#fff4e0}svg.h{background:#fafafa}"
)
_LEGEND = (
    "Decibels are signal to rounding noise, higher is better: 20 is an error of 10 %, 40 of 1 %. "
    "<b>own</b>: the layer's result with its own rounding on float inputs. <b>so far</b>: its result with all rounding up "
    "to here. <b>alone</b>: error of the program's output when nothing else is rounded. Histograms: grey is float, blue "
    "is rounded."
)


# ------------------------------------------------------------------------------------------------ text
def table(report: QuantReport, count: int) -> str:
    """Head, one line per row, and the notes."""
    rows = report.worst(count)
    names = [_short(r.name, 48) for r in rows]
    width = max([len("layer"), *map(len, names)])
    head = (
        f"{'layer':{width}}  {'kind':8}{'bits':>7}{'weight dB':>11}{'input dB':>10}{'own dB':>8}{'so far dB':>11}"
        f"{'alone':>9}{'share':>7}  advice"
    )
    lines = [_summary(report), head]
    for name, row in zip(names, rows, strict=True):
        lines.append(
            f"{name:{width}}  {_short(row.kind, 8):8}{_bits(row):>7}{_db(_sqnr(row.weight)):>11}{_db(_sqnr(row.data)):>10}"
            f"{_db(row.output_db):>8}{_db(row.accumulated_db):>11}{_percent(row.alone):>9}{row.share:>7.0%}  {row.advice}"
        )
    left = len(report.rows) - len(rows)
    rest = [f"and {left} rows more, which cost less"] if left > 0 else []
    return "\n".join([*lines, *rest, *report.notes])


def _summary(report: QuantReport) -> str:
    against = "" if report.reference_error is None else f" ({report.reference_error:.2%} against the reference)"
    alone = f", {report.alone_samples} for the errors alone" if report.alone_samples else ""
    return (
        f"output error {report.error:.2%}{against} of {', '.join(report.outputs)}; "
        f"{len(report.rows)} rows, {report.samples} samples{alone}"
    )


def _bits(row: LayerRow) -> str:
    weight = "float" if row.weight is None or row.weight.bits is None else f"{row.weight.bits}"
    data = "float" if row.data is None or row.data.bits is None else f"{row.data.bits}"
    return data if row.kind == "value" else f"W{weight}A{data}".replace("float", "f")


def _sqnr(tensor: TensorRow | None) -> float | None:
    return None if tensor is None else tensor.sqnr_db


def _db(value: float | None) -> str:
    if value is None:
        return "-"
    return "exact" if value == math.inf else f"{value:.1f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _short(name: str, limit: int) -> str:
    return name if len(name) <= limit else f"…{name[1 - limit :]}"


# ------------------------------------------------------------------------------------------------ SVG
def svg(report: QuantReport) -> str:
    """Bars of the most costly rows."""
    rows = report.worst(_BARS)
    largest = max([r.cost for r in rows if math.isfinite(r.cost)] + [1e-12])
    what = "alone at the output" if report.alone_samples else "in the layer's own result"
    height = (len(rows) + 2) * _LINE
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_NAME + _BAR + 80}" height="{height}" role="img" '
        f'font-family="system-ui,sans-serif" font-size="12">',
        f"<title>Error that quantizing each layer causes {what}</title>",
        f'<text x="4" y="{_LINE - 5}">relative L2 error {what}, the most costly first</text>',
    ]
    for number, row in enumerate(rows, 1):
        y = number * _LINE
        length = _BAR * min(row.cost, largest) / largest
        name = escape(_short(row.name, 50))
        lines.append(
            f'<text x="{_NAME - 6}" y="{y + 13}" text-anchor="end">{name}</text>'
            f'<rect x="{_NAME}" y="{y + 3}" width="{length:.1f}" height="{_LINE - 6}" fill="{_colour(row)}"/>'
            f'<text x="{_NAME + length + 4:.1f}" y="{y + 13}">{row.cost:.2%}</text>'
        )
    return "\n".join([*lines, "</svg>", ""])


def _colour(row: LayerRow) -> str:
    return "#1f6fb4" if row.advice == "keep" else "#d9822b"


def _histogram(bins: Bins) -> str:
    """The two histograms, each drawn to its own largest bin on a root scale, which shows the tails."""
    grey = _path(bins.exact, close=True)
    blue = _path(bins.rounded, close=False) if bins.rounded else ""
    line = f'<path d="{blue}" fill="none" stroke="#1f6fb4"/>' if blue else ""
    return (
        f'<svg class="h" width="{_WIDTH}" height="{_HEIGHT}" role="img" aria-label="histogram">'
        f'<path d="{grey}" fill="#bbb"/>{line}</svg>'
    )


def _path(shares: Sequence[float], close: bool) -> str:
    top = max([*shares, 1e-300])
    step = _WIDTH / max(len(shares), 1)
    points = []
    for i, share in enumerate(shares):
        y = (1 - math.sqrt(share / top)) * _HEIGHT
        points.append(f"{i * step:.1f},{y:.1f} {(i + 1) * step:.1f},{y:.1f}")
    inner = " ".join(points)
    return f"M0,{_HEIGHT} L{inner} {_WIDTH},{_HEIGHT}{' Z' if close else ''}"


# ------------------------------------------------------------------------------------------------ HTML
def html(report: QuantReport) -> str:
    """The page."""
    rows = "\n".join(_row(r) for r in report.rows)
    notes = "".join(f"<li>{escape(n)}</li>" for n in report.notes)
    heads = ("kind", "bits", "weight", "input", "own dB", "so far dB", "alone", "share")
    head = "".join(f"<th>{h}</th>" for h in heads)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>Quantization report</title><style>{_STYLE}</style></head><body>\n<h1>Quantization report</h1>\n"
        f"<p>{escape(_summary(report))}</p>\n<ul>{notes}</ul>\n{svg(report)}<p>{_LEGEND}</p>\n<table>\n"
        f'<tr><th class="l">layer</th>{head}<th class="l">advice</th></tr>\n{rows}\n</table>\n</body></html>\n'
    )


def _row(row: LayerRow) -> str:
    cells = [
        f'<td class="l">{escape(row.name)}</td>',
        f"<td>{escape(row.kind)}</td>",
        f"<td>{escape(_bits(row))}</td>",
        f"<td>{_tensor(row.weight)}</td>",
        f"<td>{_tensor(row.data)}</td>",
        f"<td>{_db(row.output_db)}<br><small>{_parts(row)}</small></td>",
        f"<td>{_db(row.accumulated_db)}</td>",
        f"<td>{_percent(row.alone)}</td>",
        f"<td>{row.share:.0%}</td>",
        f'<td class="w">{escape(row.advice)}</td>',
    ]
    kind = "" if row.advice == "keep" else ' class="act"'
    return f"<tr{kind}>{''.join(cells)}</tr>"


def _parts(row: LayerRow) -> str:
    if row.by_input_db is None:
        return ""
    return f"weight {_db(row.by_weight_db)}, input {_db(row.by_input_db)}"


def _tensor(tensor: TensorRow | None) -> str:
    if tensor is None:
        return "-"
    facts = [f"{tensor.low:.3g} to {tensor.high:.3g}", escape(tensor.grid) or "float"]
    if tensor.sqnr_db is not None:
        facts.insert(0, f"{_db(tensor.sqnr_db)} dB")
    if tensor.beyond:
        facts.append(f"{tensor.beyond:.2%} beyond the grid")
    if tensor.outliers:
        facts.append("outlier channels " + ", ".join(f"{c} ({r:.0f} times)" for c, r in tensor.outliers[:4]))
    return f"{_histogram(tensor.bins)}<br><small>{'<br>'.join(facts)}</small>"
