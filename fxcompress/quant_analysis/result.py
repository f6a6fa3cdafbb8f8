"""The rows of a quantization report, and the report with its forms."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxcompress.errors import UsageError
from fxcompress.prune.sensitivity_report import write
from fxcompress.quant_analysis import pages

__all__ = ["Bins", "LayerRow", "QuantReport", "TensorRow"]

_FORMAT, _SCHEMA = "fxcompress quantization report", 1


@dataclass(frozen=True)
class Bins:
    """A histogram of equal bins.

    Attributes:
        low: Left end of the first bin.
        high: Right end of the last bin.
        exact: Share of the unrounded values in each bin.
        rounded: Share of the rounded values in each bin; empty where nothing is rounded.
    """

    low: float
    high: float
    exact: tuple[float, ...]
    rounded: tuple[float, ...] = ()


@dataclass(frozen=True)
class TensorRow:
    """A weight, or what a layer reads.

    Attributes:
        grid: The integers, as ``int8[-127, 127] per axis 0``; empty: not rounded.
        bits: Of the grid; None: not rounded.
        low: Smallest unrounded value.
        high: Largest unrounded value.
        sqnr_db: Signal to rounding noise, ``10 log10(sum x^2 / sum (Q(x) - x)^2)``; None: not rounded.
        beyond: Share of the values beyond the ends of the grid.
        clipped: Share of the squared rounding error that they cause.
        spread: Largest magnitude of the largest channel over that of the median channel.
        outliers: Channels whose largest magnitude is 8 times the median channel's or more, largest first, with that
            ratio; at most eight.
        bins: Histogram.
    """

    grid: str
    bits: int | None
    low: float
    high: float
    sqnr_db: float | None
    beyond: float
    clipped: float
    spread: float
    outliers: tuple[tuple[int, float], ...]
    bins: Bins


@dataclass(frozen=True)
class LayerRow:
    """What quantization does to one layer, or to one value that is rounded without a layer.

    Decibels are signal to noise, higher is better; infinite: exact; None: there is nothing of this kind.

    Attributes:
        name: Path of the layer, or name of the value.
        kind: ``conv``, ``linear`` ... or ``value``.
        weight: Its weight.
        data: What it reads (the value itself for ``value``).
        output_db: Its result with its own rounding, on unrounded inputs.
        by_weight_db: The same, only the weight rounded.
        by_input_db: The same, only the inputs rounded.
        accumulated_db: Its result in the quantized program against the float one: all rounding up to here.
        alone: Relative L2 error of the program's output (the worst one) when nothing else is rounded; None: not
            measured.
        share: Its part of the squared errors of all rows, each alone; 0 where not measured.
        advice: What to do, from these numbers.
    """

    name: str
    kind: str
    weight: TensorRow | None
    data: TensorRow | None
    output_db: float
    by_weight_db: float | None
    by_input_db: float | None
    accumulated_db: float
    alone: float | None
    share: float
    advice: str

    @property
    def cost(self) -> float:
        """What rows are ranked by: the error alone, or that of the layer's own result."""
        return self.alone if self.alone is not None else 10 ** (-self.output_db / 20)


@dataclass(frozen=True)
class QuantReport:
    """What quantization does to a program.

    Attributes:
        rows: One per layer, in execution order.
        error: Relative L2 error of the output (the worst one), everything rounded, against the program without
            rounding.
        reference_error: The same against the reference; None without one.
        outputs: Names of the outputs that were compared.
        samples: Samples that were run.
        alone_samples: Samples that `LayerRow.alone` was measured with.
        notes: What else to know.
    """

    rows: tuple[LayerRow, ...]
    error: float
    reference_error: float | None
    outputs: tuple[str, ...]
    samples: int
    alone_samples: int
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> LayerRow:
        """The row of a layer. Raises UsageError, nearest names offered, when there is none."""
        found = next((r for r in self.rows if r.name == name), None)
        if found is None:
            near = ", ".join(difflib.get_close_matches(name, [r.name for r in self.rows], 3, 0.0))
            raise UsageError(560, f"the report has no layer {name!r}", why=f"nearest: {near}", fix="see report.rows")
        return found

    def worst(self, count: int = 10) -> list[LayerRow]:
        """The rows that cost most, the most costly first."""
        return sorted(self.rows, key=lambda r: -r.cost)[:count]

    def table(self, count: int | None = None) -> str:
        """Text: one line per row, the most costly first.

        Args:
            count: This many rows; None: all.
        """
        return pages.table(self, len(self.rows) if count is None else count)

    def __str__(self) -> str:
        return self.table(20)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON types; an infinite number of decibels is the text ``inf``."""
        head = {"format": _FORMAT, "schema": _SCHEMA}
        plain: dict[str, Any] = _plain(head | dataclasses.asdict(self))
        return plain

    def to_json(self, path: str | Path) -> Path:
        """Write `to_dict`.

        Raises:
            ArtifactError: the file cannot be written.
        """
        return write(Path(path), json.dumps(self.to_dict(), indent=1, allow_nan=False))

    def to_svg(self, path: str | Path) -> Path:
        """Draw what the most costly layers cause alone, as bars.

        Raises:
            ArtifactError: the file cannot be written.
        """
        return write(Path(path), pages.svg(self))

    def to_html(self, path: str | Path) -> Path:
        """Write one page that needs no other file and runs no script: the chart, and all rows with histograms.

        Raises:
            ArtifactError: the file cannot be written.
        """
        return write(Path(path), pages.html(self))


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
