"""Ranges of activations from calibration data, in one pass and in memory that does not grow.

An `Observer` sees batches with `Observer.update` and gives, for any integer grid, the range to quantize with by
`Observer.range`; `quant_params` turns that into a scale and a zero point. All work on any device happens in one
reduction and one small transfer per batch: large tensors are represented by at most 65,536 of their elements (and
their exact extremes), taken at a stride that is a prime and no divisor of the number of elements, so that every
channel of every memory layout is met equally often.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxcompress.errors import CalibrationError, UsageError
from fxcompress.quant.histogram import Histogram, Reservoir, memory_order
from fxcompress.quant.spec import QuantSpec, quant_params
from fxcompress.quant.thresholds import entropy_range, mse_range, percentile_range
from fxcompress.quant.weights import weight_range

__all__ = [
    "EntropyObserver",
    "HistogramObserver",
    "MinMaxObserver",
    "MovingAverageObserver",
    "MseObserver",
    "Observer",
    "PercentileObserver",
    "QuantSpec",
    "make_observer",
    "quant_params",
    "weight_range",
]

_SAMPLE = 1 << 16


@dataclass(frozen=True)
class _Batch:
    """What is kept of one batch: exact extremes and size, and a sample of its values (float32, CPU)."""

    low: float
    high: float
    count: int
    values: Tensor

    @property
    def weight(self) -> float:
        """Elements per sampled value, the two extremes of an incomplete sample aside."""
        return (self.count - 2) / self.values.numel() if self.sampled else 1.0

    @property
    def sampled(self) -> bool:
        """Whether ``values`` is a part of the batch and not all of it."""
        return self.values.numel() < self.count


class Observer(ABC):
    """Range of a tensor over a stream of batches.

    Attributes:
        low: Smallest finite value seen, exact; infinity before the first.
        high: Largest finite value seen, exact; minus infinity before the first.
        count: Number of finite values seen.
        nonfinite: Number of values ignored: NaN, infinity and what float32 cannot hold.
        batchwise: The range depends on how the data was cut into batches.
    """

    batchwise: ClassVar[bool] = False

    _sample_size = _SAMPLE

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf
        self.count = self.nonfinite = self._batches = 0

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Sees one batch.

        Args:
            x: Any float dtype, shape, device and memory order. Nothing of it is kept alive. Empty tensors and values
                that are not finite are ignored.

        Raises:
            CalibrationError: If ``x`` is not a tensor of a float dtype.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            what = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise CalibrationError(
                43, f"an observer was given {what}", why="only float tensors are quantized", fix="observe floats only"
            )
        flat = memory_order(x.detach())
        batch = self._summary(flat)
        if batch is not None and not (math.isfinite(batch.low) and math.isfinite(batch.high)):
            flat = flat[torch.isfinite(flat.to(torch.float32))]
            self.nonfinite += batch.count - flat.numel()
            batch = self._summary(flat)
        if batch is None:
            return
        self.low, self.high = min(self.low, batch.low), max(self.high, batch.high)
        self.count += batch.count
        self._accumulate(batch)
        self._batches += 1

    def range(self, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """The range to quantize with.

        Args:
            spec: The integer grid, per tensor.

        Returns:
            Lower and upper end, float32 scalars on the CPU. For symmetric grids this is a magnitude cut to the range of
            the data, so data without negative values keeps a lower end that is not negative.

        Raises:
            CalibrationError: If no finite value was seen.
            UsageError: If the grid is per channel.
        """
        if spec.axis is not None:
            raise UsageError(46, f"observers are per tensor, the grid has axis {spec.axis}", fix="use axis=None")
        if not self.count:
            why = (
                f"{self.nonfinite} values were NaN or infinite, none was finite" if self.nonfinite else "no batch came"
            )
            raise CalibrationError(44, "there is no range: the observer saw no data", why=why, fix="give more batches")
        low, high = self._range(spec)
        return torch.tensor(low, dtype=torch.float32), torch.tensor(high, dtype=torch.float32)

    @abstractmethod
    def _accumulate(self, batch: _Batch) -> None:
        """Adds one batch to the statistics."""

    @abstractmethod
    def _range(self, spec: QuantSpec) -> tuple[float, float]:
        """The range for a per-tensor grid; at least one finite value was seen."""

    def _summary(self, flat: Tensor) -> _Batch | None:
        """One reduction and one transfer; None for an empty tensor."""
        if not flat.numel():
            return None
        if flat.element_size() == 1:  # no reductions of 8-bit floats
            flat = flat.to(torch.float32)
        ends = torch.stack(torch.aminmax(flat)).to(torch.float32)
        stride = _stride(flat.numel(), self._sample_size) if self._sample_size else flat.numel()
        values = flat[self._batches % stride :: stride].to(torch.float32)
        packed = torch.cat((ends, values)).cpu()
        return _Batch(float(packed[0]), float(packed[1]), flat.numel(), packed[2:])


@lru_cache(maxsize=4096)
def _stride(numel: int, limit: int) -> int:
    """The least prime that leaves at most ``limit`` of ``numel`` elements and divides no dimension; 1 if all fit."""
    stride = -(-numel // limit)
    if stride == 1:
        return 1
    while numel % stride == 0 or any(stride % divisor == 0 for divisor in range(2, math.isqrt(stride) + 1)):
        stride += 1
    return stride


class MinMaxObserver(Observer):
    """The extremes: no clipping, the coarsest steps."""

    _sample_size = 0

    def _accumulate(self, batch: _Batch) -> None:
        """The base class keeps the extremes."""

    def _range(self, spec: QuantSpec) -> tuple[float, float]:
        return self.low, self.high


class MovingAverageObserver(Observer):
    """Exponential average of each batch's extremes, so that one wild batch counts for little.

    The first batch sets the average; each later one moves it by ``momentum`` of the difference. It depends on the
    order and the size of the batches.

    Args:
        momentum: Share of a new batch, above 0, at most 1.
    """

    _sample_size = 0
    batchwise = True

    def __init__(self, momentum: float = 0.1) -> None:
        super().__init__()
        if not 0 < momentum <= 1:
            raise UsageError(47, f"momentum {momentum} is not above 0 and at most 1", fix="use 0.1")
        self.momentum = momentum
        self._average = (0.0, 0.0)

    def _accumulate(self, batch: _Batch) -> None:
        share = self.momentum if self._batches else 1.0
        low, high = self._average
        self._average = low + share * (batch.low - low), high + share * (batch.high - high)

    def _range(self, spec: QuantSpec) -> tuple[float, float]:
        return self._average


class PercentileObserver(Observer):
    """Average over the batches of each batch's percentiles.

    Each batch gives its ``100 - percentile`` and its ``percentile`` quantile (and that of its absolute values, for
    symmetric grids), linearly interpolated and exact up to 65,536 elements; the average weighs batches by their size.
    This is the range an average batch needs: unlike `HistogramObserver`, whose tail is one share of all the data, an
    outlier batch cannot use up the whole tail. It depends on how the data is cut into batches.

    Args:
        percentile: Above 50, at most 100 (the average of the extremes).
    """

    def __init__(self, percentile: float = 99.99) -> None:
        super().__init__()
        self.percentile = _checked_percentile(percentile)
        self._sums = np.zeros(3)

    def _accumulate(self, batch: _Batch) -> None:
        self._sums += np.array(_end_quantiles(batch.values.numpy(), self.percentile / 100.0)) * batch.count

    def _range(self, spec: QuantSpec) -> tuple[float, float]:
        below, above, magnitude = (float(mean) for mean in self._sums / self.count)
        if spec.symmetric:
            low, high = max(-magnitude, self.low), min(magnitude, self.high)
        else:
            low, high = -below, above
        # So sparse that only zeros are left: every other value would be lost.
        return (low, high) if low < 0 or high > 0 else (self.low, self.high)


def _end_quantiles(values: NDArray[np.float32], share: float) -> tuple[float, float, float]:
    """The ``share`` quantiles of ``-values``, ``values`` and ``abs(values)``, without sorting them all."""
    rank = (values.size - 1) * share
    below = max(min(math.floor(rank), values.size - 2), 0)
    tail = values.size - below
    ordered = np.partition(values, (tail - 1, below)).astype(np.float64)
    lower, upper = -ordered[:tail], ordered[below:]
    # The largest magnitudes are among the largest and the smallest values (which overlap when there are few).
    outer = np.abs(values) if 2 * tail > values.size else np.concatenate((np.abs(lower), np.abs(upper)))
    low, high, magnitude = (_interpolated(part, tail, rank - below) for part in (lower, upper, outer))
    return low, high, magnitude


def _interpolated(values: NDArray[np.floating], tail: int, fraction: float) -> float:
    """Between the two smallest of the ``tail`` largest values."""
    if tail == 1:
        return float(values[0])
    left, right = np.sort(values)[-tail:][:2]
    return float(left + fraction * (right - left))


class _HistogramBased(Observer):
    """Keeps a histogram.

    Args:
        bins: Number of bins; between half and all of them lie inside the range of the data.
    """

    def __init__(self, bins: int = 2048) -> None:
        super().__init__()
        if not 512 <= bins <= 1 << 16:
            raise UsageError(48, f"a histogram of {bins} bins is too small or too large", fix="use 512 to 65536 bins")
        self.histogram = Histogram(bins)

    def _accumulate(self, batch: _Batch) -> None:
        self.histogram.add(batch.values, batch.weight, batch.low, batch.high)
        if batch.sampled:
            self.histogram.add(torch.tensor((batch.low, batch.high)))

    def _range(self, spec: QuantSpec) -> tuple[float, float]:
        return (self.low, self.high) if self.histogram.empty else self._cut(spec)

    @abstractmethod
    def _cut(self, spec: QuantSpec) -> tuple[float, float]:
        """The range, from a histogram that holds more than zeros."""


class HistogramObserver(_HistogramBased):
    """A share of all the data is left outside, at each end that the data has.

    Args:
        percentile: Share kept below the upper end, and above the lower one, in per cent; of absolute values on
            symmetric grids. Above 50, at most 100.
        bins: Number of bins.
    """

    def __init__(self, percentile: float = 99.99, bins: int = 2048) -> None:
        super().__init__(bins)
        self.percentile = _checked_percentile(percentile)

    def _cut(self, spec: QuantSpec) -> tuple[float, float]:
        return percentile_range(self.histogram, self.percentile, spec)


class EntropyObserver(_HistogramBased):
    """Least Kullback-Leibler divergence between the data and its quantized self, see `entropy_range`."""

    def _cut(self, spec: QuantSpec) -> tuple[float, float]:
        return entropy_range(self.histogram, spec)


class MseObserver(_HistogramBased):
    """Least mean squared quantization error, never more than that of the whole range, see `mse_range`."""

    def __init__(self, bins: int = 2048) -> None:
        super().__init__(bins)
        self._reservoir = Reservoir()

    def _accumulate(self, batch: _Batch) -> None:
        super()._accumulate(batch)
        self._reservoir.add(batch.values, batch.count)

    def _cut(self, spec: QuantSpec) -> tuple[float, float]:
        return mse_range(self.histogram, spec, self._reservoir.values())


def _checked_percentile(percentile: float) -> float:
    if not 50 < percentile <= 100:
        raise UsageError(49, f"percentile {percentile} is not above 50 and at most 100", fix="use 99.99")
    return percentile


_OBSERVERS: dict[str, type[Observer]] = {
    "minmax": MinMaxObserver,
    "moving_average": MovingAverageObserver,
    "histogram": HistogramObserver,
    "percentile": PercentileObserver,
    "entropy": EntropyObserver,
    "mse": MseObserver,
}


def make_observer(calibrator: str, **options: float) -> Observer:
    """A new observer.

    Args:
        calibrator: ``minmax``, ``moving_average``, ``histogram``, ``percentile``, ``entropy`` or ``mse``.
        **options: Its options: ``momentum`` (moving_average), ``percentile`` (histogram, percentile), ``bins``
            (histogram, entropy, mse).

    Returns:
        An observer that has seen nothing.

    Raises:
        UsageError: If the name or an option is unknown, or an option's value is out of range.
    """
    kind = _OBSERVERS.get(calibrator)
    if kind is None:
        raise UsageError(38, f"unknown calibrator {calibrator!r}", fix=f"use one of {', '.join(_OBSERVERS)}")
    known = inspect.signature(kind).parameters
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise UsageError(
            39,
            f"calibrator {calibrator!r} has no option {', '.join(unknown)}",
            fix=f"its options: {', '.join(known) or 'none'}",
        )
    return kind(**options)
