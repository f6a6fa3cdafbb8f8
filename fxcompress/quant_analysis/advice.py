"""What to do about a layer, from what was measured."""

from __future__ import annotations

from dataclasses import dataclass

from fxcompress.quant_analysis.result import LayerRow, TensorRow

__all__ = ["FINE_DB", "OUTLIER", "advise"]

#: A relative error of the output of 1 %: nothing to mend.
FINE_DB = 40.0
#: Where the error alone was not measured: a relative error of the layer's own result of 10 %.
_LOCAL_DB = 20.0
#: A channel whose largest magnitude is so many times the median channel's is an outlier.
OUTLIER = 8.0
#: A row is costly from this many times its fair share of all squared errors on.
_SHARES = 2.0
#: Channels of a weight whose ranges are this far apart gain from a scale each.
_SPREAD = 4.0


@dataclass(frozen=True)
class _Part:
    """The weight or the input of a row, the one that causes more of its error."""

    row: TensorRow | None
    text: str


def advise(row: LayerRow, fair: float) -> str:
    """One line.

    Args:
        row: Its numbers; the advice in it is not read.
        fair: Its fair share of all squared errors, ``1 / rows``.
    """
    if row.weight is not None and row.weight.bits is None and (row.data is None or row.data.bits is None):
        return "not quantized"
    reason = _costs(row, fair)
    if not reason:
        return "keep"
    if row.kind == "value":
        return f"{reason}: {_value(row)}"
    part = _larger(row)
    return f"{reason}, {part.text}: " + (_weight(row) if part.row is row.weight else _input(row))


def _costs(row: LayerRow, fair: float) -> str:
    """Why something must be done; empty: nothing."""
    if row.alone is None:
        return f"{row.output_db:.0f} dB in its own result" if row.output_db < _LOCAL_DB else ""
    if row.alone < 10 ** (-FINE_DB / 20) or row.share < min(0.5, _SHARES * fair):
        return ""
    return f"{row.share:.0%} of all squared errors"


def _larger(row: LayerRow) -> _Part:
    """Which of the two causes more."""
    if row.by_input_db is None or row.by_weight_db is None:
        alone = row.weight if row.data is None or row.data.bits is None else row.data
        return _Part(alone, "by its weight" if alone is row.weight else "by its input")
    weight, inputs = (10 ** (-db / 10) for db in (row.by_weight_db, row.by_input_db))
    share = max(weight, inputs) / ((weight + inputs) or 1.0)
    if weight >= inputs:
        return _Part(row.weight, f"{share:.0%} by its weight")
    return _Part(row.data, f"{share:.0%} by its input")


def _weight(row: LayerRow) -> str:
    weight = row.weight
    if weight is None or weight.bits is None:
        return "keep it in float"
    if "per" not in weight.grid and "groups" not in weight.grid and weight.spread >= _SPREAD:
        return f"per-channel weights: the largest channel is {weight.spread:.0f} times the median one"
    if weight.bits >= 8:
        return "keep it in float"
    if weight.clipped > 0.5:
        return f"a wider range: {weight.beyond:.2%} of the weights are clipped (calibrator='minmax')"
    better = "smaller groups, or gptq or awq" if row.kind == "linear" else "AdaRound"
    return f"{better} where it was rounded to the nearest, or raise it to 8 bits"


def _input(row: LayerRow) -> str:
    data = row.data
    if data is None:
        return "keep it in float"
    if data.clipped > 0.5:
        return f"calibrate on more data: {data.beyond:.2%} of the values lie beyond the grid"
    if data.outliers:
        channel, ratio = data.outliers[0]
        what = f"channel {channel} is {ratio:.0f} times the median one"
        method = "SmoothQuant" if row.kind == "linear" else "EqualizeLayers"
        return f"{method} ({what}), or keep it in float where nothing in front can take the scales"
    return "keep it in float"


def _value(row: LayerRow) -> str:
    data = row.data
    if data is not None and data.clipped > 0.5:
        return f"calibrate on more data: {data.beyond:.2%} of the values lie beyond the grid"
    return "keep the layers that read it in float"
