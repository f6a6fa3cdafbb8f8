"""Where to cut a histogram: tail mass, Kullback-Leibler divergence, or mean squared quantization error.

Each search takes a `Histogram` that holds more than zeros and returns the two ends of a range that includes 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxcompress.quant.histogram import Histogram
from fxcompress.quant.spec import QuantSpec, solve

__all__ = ["entropy_range", "mse_range", "percentile_range"]


def clip(histogram: Histogram, magnitude: float) -> tuple[float, float]:
    """``[-magnitude, magnitude]`` inside the range of the data."""
    return max(-magnitude, histogram.low), min(magnitude, histogram.high)


def percentile_range(histogram: Histogram, percentile: float, spec: QuantSpec) -> tuple[float, float]:
    """The range that leaves ``100 - percentile`` per cent of all values above it and as many below it.

    On a symmetric grid it is this share of the absolute values that lies outside. Values are taken as uniform inside a
    bin. Data so sparse that only zero would be left keeps its whole range.
    """
    outside = (1.0 - percentile / 100.0) * (float(histogram.counts.sum()) + histogram.zeros)
    low, high, width = histogram.low, histogram.high, histogram.width
    if spec.symmetric:
        low, high = clip(histogram, _tail(histogram.folded(), width, max(-low, high), outside))
    else:
        low, high = -_tail(histogram.below(), width, -low, outside), _tail(histogram.above(), width, high, outside)
    return (low, high) if high > low else (histogram.low, histogram.high)


def _tail(counts: Tensor, width: float, top: float, mass: float) -> float:
    """The distance from zero beyond which ``mass`` lies; 0 when there is not that much."""
    beyond = counts.flip(0).cumsum(0).flip(0)
    enough = (beyond > mass).nonzero()
    if not enough.numel():
        return 0.0
    last = int(enough[-1])
    left, right = last * width, min((last + 1) * width, top)
    inside = float(beyond[last] - counts[last])
    return right - (mass - inside) / float(counts[last]) * (right - left)


def entropy_range(histogram: Histogram, spec: QuantSpec) -> tuple[float, float]:
    """The range whose quantized distribution diverges least from the distribution clipped to it.

    The calibration of TensorRT (S. Migacz, "8-bit Inference with TensorRT", GTC 2017, slides 26 to 39): for each
    window of bins, P is the window's counts with the outliers added to its end bins, Q the same counts without
    outliers, averaged inside each quantization level over the bins that are not empty; the window with the least
    KL(P || Q) wins, the widest of equals. Here levels part the window as evenly as whole bins allow, and exact zeros,
    which are no error on any grid, are left out of both (they would outweigh everything else after a ReLU).

    Symmetric grids and data of one sign search one threshold. Otherwise both ends are searched, together and then in
    turn.
    """
    if spec.symmetric:
        divided = not spec.signed and histogram.low == 0
        levels = spec.steps + 1 if divided else -(-(spec.steps + 1) // 2)
        return clip(histogram, _best_width(histogram.folded(), levels) * histogram.width)
    if histogram.low == 0 or histogram.high == 0:
        return clip(histogram, _best_width(histogram.folded(), spec.steps + 1) * histogram.width)
    first, last = _best_window(histogram.counts, -histogram.start, spec.steps + 1)
    low, high = ((histogram.start + edge) * histogram.width for edge in (first, last))
    return max(low, histogram.low), min(high, histogram.high)


def _best_width(counts: Tensor, levels: int) -> int:
    """How many bins from zero to keep."""
    most = int(counts.nonzero()[-1]) + 1
    widths = torch.arange(most, min(levels, most) - 1, -1)
    return int(widths[_least(_Divergence(counts, levels)(torch.zeros_like(widths), widths))])


def _best_window(counts: Tensor, zero: int, levels: int) -> tuple[int, int]:
    """First bin and end of the window to keep; it holds the edge ``zero``."""
    used = counts.nonzero()
    low, high = min(int(used[0]), zero), max(int(used[-1]) + 1, zero)
    divergence = _Divergence(counts, levels)
    share = torch.linspace(1.0, 0.0, 129, dtype=torch.float64)
    lows, highs = zero - ((zero - low) * share).round().long(), zero + ((high - zero) * share).round().long()
    full_lows, full_highs = torch.unique(lows), torch.unique(highs).flip(0)

    def best(lows: Tensor, highs: Tensor) -> tuple[int, int]:
        wide = highs - lows >= levels
        if not bool(wide.any()):
            return low, high
        lows, highs = lows[wide], highs[wide]
        at = _least(divergence(lows, highs))
        return int(lows[at]), int(highs[at])

    low, high = best(lows, highs)
    for _ in range(2):
        low, high = best(full_lows, torch.full_like(full_lows, high))
        low, high = best(torch.full_like(full_highs, low), full_highs)
    return low, high


def _least(values: Tensor) -> int:
    """Position of the first value that is the least but for rounding."""
    return int((values <= values.min() + 1e-12).nonzero()[0])


class _Divergence:
    """KL(P || Q) of many windows of one histogram at once.

    With n bins a window costs ``levels`` operations and not n, because ``sum p log p`` and the sums per level come from
    running totals, and ``sum p log q`` is constant inside a level.
    """

    def __init__(self, counts: Tensor, levels: int) -> None:
        self.counts, self.levels = counts, levels
        self.mass = _running(counts)
        self.filled = _running((counts > 0).to(counts.dtype))
        self.information = _running(torch.xlogy(counts, counts))

    def __call__(self, first: Tensor, last: Tensor) -> Tensor:
        """Divergence of the windows ``[first, last)``, int64 ``[windows]`` each."""
        total = self.mass[-1]
        ends = torch.stack((first, last - 1))
        outliers = torch.stack((self.mass[first], total - self.mass[last]))
        at_ends = self.counts[ends]
        levels = min(self.levels, int((last - first).min()))
        edges = first[:, None] + torch.arange(levels + 1) * (last - first)[:, None] // levels
        mass, filled = self.mass[edges].diff(dim=1), self.filled[edges].diff(dim=1)
        newly_filled = ((at_ends == 0) & (outliers > 0)).to(mass.dtype)
        reference = mass.clone()
        for row, level in ((0, 0), (1, -1)):
            reference[:, level] += outliers[row]
            filled[:, level] += newly_filled[row]
        spread = torch.xlogy(reference, mass / filled.clamp_(min=1.0)).sum(1)
        clipped = torch.xlogy(at_ends + outliers, at_ends + outliers) - torch.xlogy(at_ends, at_ends)
        information = self.information[last] - self.information[first] + clipped.sum(0)
        kept = self.mass[last] - self.mass[first]
        divergence = (information - spread) / total + torch.log(kept / total)
        return torch.where(kept > 0, divergence, torch.inf)


def _running(values: Tensor) -> Tensor:
    """Running totals with a leading zero."""
    return torch.cat((values.new_zeros(1), values.cumsum(0)))


class QuantizationError:
    """Squared error that grids of one `QuantSpec` make on a histogram, clipping and rounding both exact per bin.

    With ``u = x / scale`` and ``m`` the integer (less the zero point) that x is stored as, the squared error
    ``(u - m) ** 2`` has the integral ``m / 12 + (u - m) ** 3 / 3``, continuous in u, inside and outside the grid. So
    for values uniform inside a bin, the error of the bin is a difference of two of these, however many steps it holds;
    bin centres would be blind to rounding as soon as a step is near a bin.
    """

    def __init__(self, histogram: Histogram, spec: QuantSpec) -> None:
        self.spec = spec
        self.edges, density = histogram.density()
        self.slopes = -torch.diff(density, prepend=density.new_zeros(1), append=density.new_zeros(1))

    def __call__(self, low: Tensor, high: Tensor) -> Tensor:
        """Total weight times squared error of the ranges ``[low, high]``, float64 ``[ranges]``."""
        scale, zero_point = solve(low, high, self.spec)
        position = self.edges / scale[:, None]
        least, most = (self.spec.qmin - zero_point)[:, None], (self.spec.qmax - zero_point)[:, None]
        stored = torch.round(position).clamp_(least, most)
        rest = position.sub_(stored)
        integral = stored.div_(12.0).add_(rest * rest * rest, alpha=1.0 / 3.0)
        return (integral @ self.slopes) * scale**3


# 1 down to 1/256 in steps of 7 per cent and (as good as) 0, then twice a closer look around the best.
_COARSE = torch.cat((torch.logspace(0.0, -8.0, 81, base=2.0, dtype=torch.float64), torch.tensor([2.0**-20])))
_CLOSER = (torch.linspace(1.07, 0.93, 29, dtype=torch.float64), torch.linspace(1.01, 0.99, 17, dtype=torch.float64))


def mse_range(histogram: Histogram, spec: QuantSpec, sample: Tensor) -> tuple[float, float]:
    """The range with the least mean squared error on the histogram.

    Symmetric grids search one magnitude; others shrink both ends together, then each in turn, on ever closer grids of
    candidates. The histogram cannot see values that sit on a grid of their own (pixels, masks), which the whole range
    may represent without error: unless the raw sample, too, gains from clipping, the whole range is returned.
    """
    error = QuantizationError(histogram, spec)
    whole = (histogram.low, histogram.high)
    low, high = _symmetric_search(histogram, error) if spec.symmetric else _two_sided_search(whole, error)
    gains = sample_error(sample, (low, high), spec) < sample_error(sample, whole, spec)
    return (low, high) if gains else whole


def _symmetric_search(histogram: Histogram, error: QuantizationError) -> tuple[float, float]:
    whole = magnitude = max(-histogram.low, histogram.high)
    for factors in (_COARSE, *_CLOSER):
        magnitudes = (factors * magnitude).clamp_(max=whole)
        lows, highs = (-magnitudes).clamp_(min=histogram.low), magnitudes.clamp(max=histogram.high)
        magnitude = float(magnitudes[int(error(lows, highs).argmin())])
    return clip(histogram, magnitude)


def _two_sided_search(whole: tuple[float, float], error: QuantizationError) -> tuple[float, float]:
    ends = [*whole]
    if whole[0] < 0 < whole[1]:
        at = int(error(_COARSE * whole[0], _COARSE * whole[1]).argmin())
        ends = [float(_COARSE[at]) * end for end in whole]
    sides = [side for side in (0, 1) if whole[side] != 0]
    _search_in_turn(ends, sides, [_COARSE * end for end in whole], error)
    for factors in _CLOSER:
        _search_in_turn(ends, sides, [factors * end for end in ends], error)
    return max(ends[0], whole[0]), min(ends[1], whole[1])


def _search_in_turn(
    ends: list[float], sides: Sequence[int], candidates: Sequence[Tensor], error: QuantizationError
) -> None:
    """Replaces each of the ``ends`` in turn by the best of its candidates."""
    for side in sides:
        trial = candidates[side]
        fixed = torch.full_like(trial, ends[1 - side])
        errors = error(trial, fixed) if side == 0 else error(fixed, trial)
        ends[side] = float(trial[int(errors.argmin())])


def sample_error(sample: Tensor, ends: tuple[float, float], spec: QuantSpec) -> float:
    """Sum of squared errors of float32 ``[n]`` values quantized with the range ``ends``."""
    low, high = torch.tensor(ends, dtype=torch.float64)
    scale, zero_point = solve(low, high, spec)
    exact = sample.to(torch.float64) / scale
    stored = torch.round(exact).clamp_(spec.qmin - float(zero_point), spec.qmax - float(zero_point))
    return float((exact - stored).square().sum() * scale**2)
