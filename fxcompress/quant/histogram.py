"""Streaming statistics of fixed size: a histogram that grows by merging bins, and a uniform sample of raw values."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["Histogram", "Reservoir", "memory_order"]


def memory_order(x: Tensor) -> Tensor:
    """All elements as one dimension in memory order, without a copy where the memory has no gaps."""
    strides = x.stride()
    return x.permute(sorted(range(x.dim()), key=lambda dim: -strides[dim])).reshape(-1)


class Histogram:
    """Weighted counts of a stream of real numbers in a fixed number of equal bins.

    Bin ``i`` covers ``[(start + i) * w, (start + i + 1) * w)`` where the width ``w = 2 ** exponent`` and ``start`` are
    the smallest that let the bins cover both zero and everything seen so far. All widths are powers of two and all
    edges multiples of the width, so growing merges whole bins: the counts are at any time exactly those that one pass
    over all the data with the final bins would give, whatever the order and size of the batches. Between half and all
    of the bins lie inside the range of the data. Zero is always an edge; exact zeros, which every grid represents
    without error, are counted apart in ``zeros``.

    Args:
        bins: Number of bins.

    Attributes:
        counts: Weight per bin, float64 ``[bins]`` on the CPU.
        zeros: Weight of the values equal to zero.
        low: Smallest value seen or 0, whichever is less.
        high: Largest value seen or 0, whichever is more.
    """

    def __init__(self, bins: int = 2048) -> None:
        self.bins = bins
        self.counts = torch.zeros(bins, dtype=torch.float64)
        self.zeros = 0.0
        self.low = self.high = 0.0
        self.exponent = 0
        self.start = 0

    @property
    def width(self) -> float:
        """Width of a bin."""
        return math.ldexp(1.0, self.exponent)

    @property
    def empty(self) -> bool:
        """Whether nothing but zeros was seen."""
        return self.low == self.high == 0.0

    def add(self, values: Tensor, weight: float = 1.0, low: float | None = None, high: float | None = None) -> None:
        """Counts finite values.

        Args:
            values: Float32 ``[n]``, on the CPU, finite, ``n > 0``.
            weight: What each value counts for.
            low: A known lower bound of ``values``, to be covered too; default their minimum.
            high: A known upper bound of ``values``; default their maximum.
        """
        if low is None or high is None:
            low, high = float(values.min()), float(values.max())
        self._cover(min(low, self.low), max(high, self.high))
        if self.empty:
            self.zeros += weight * values.numel()
            return
        # Exact: scaling by a power of two in float64 cannot round, overflow or lose a denormal float32. NumPy, because
        # starting threads costs more than it saves here.
        scaled = values.numpy().astype(np.float64)
        zeros = scaled.size - int(np.count_nonzero(scaled))
        scaled *= math.ldexp(1.0, -self.exponent)
        index = np.floor(scaled, out=scaled).astype(np.int64)
        index -= self.start
        found = torch.from_numpy(np.bincount(index, minlength=self.bins)).to(torch.float64)
        found[-self.start] -= zeros
        self.zeros += weight * zeros
        self.counts.add_(found, alpha=weight)

    def _cover(self, low: float, high: float) -> None:
        """Grows the bins until they cover ``[low, high]``, merging the counts."""
        fresh = self.empty
        self.low, self.high = low, high
        if self.empty:
            return
        exponent = math.frexp(high - low)[1] - self.bins.bit_length() - 1
        while _index(high, exponent) - _index(low, exponent) >= self.bins:
            exponent += 1
        start = _index(low, exponent)
        if not fresh and (exponent, start) != (self.exponent, self.start):
            self._merge(exponent, start)
        self.exponent, self.start = exponent, start

    def _merge(self, exponent: int, start: int) -> None:
        """Moves the counts to bins ``2 ** (exponent - self.exponent)`` times as wide that begin at ``start``."""
        used = self.counts.nonzero().flatten()
        # A shift rounds towards minus infinity; 62 places are enough to send any bin to 0 or -1.
        index = ((used + self.start) >> min(exponent - self.exponent, 62)) - start
        self.counts = torch.zeros_like(self.counts).index_add_(0, index, self.counts[used])

    def density(self) -> tuple[Tensor, Tensor]:
        """Edges and height of the piecewise constant density of the values other than zero.

        The outermost bins end at the exact extremes, but keep a thousandth of their width: data that saturates at its
        maximum (ReLU6) is then a spike there and not spread over a bin.

        Returns:
            Edges, float64 ``[n + 1]``, increasing, and weight per unit of length, float64 ``[n]``.
        """
        first, last = 0, _index(self.high, self.exponent) - self.start
        counts = self.counts[first : last + 1]
        edges = torch.arange(self.start, self.start + last + 2, dtype=torch.float64) * self.width
        thin = self.width / 1024.0
        edges[-1] = min(max(self.high, float(edges[-2]) + thin), float(edges[-1]))
        edges[0] = max(min(self.low, float(edges[1]) - thin), float(edges[0]))
        return edges, counts / edges.diff()

    def above(self) -> Tensor:
        """Counts of the positive values, bins outwards from zero, float64 ``[n]``."""
        return self.counts[-self.start :]

    def below(self) -> Tensor:
        """Counts of the negative values, bins outwards from zero, float64 ``[n]``."""
        return self.counts[: -self.start].flip(0)

    def folded(self) -> Tensor:
        """Counts of the absolute values other than zero, bins outwards from zero, float64 ``[n]``."""
        above, below = self.above(), self.below()
        folded = torch.zeros(max(above.numel(), below.numel()), dtype=torch.float64)
        folded[: above.numel()] += above
        folded[: below.numel()] += below
        return folded


def _index(value: float, exponent: int) -> int:
    """Which bin of width ``2 ** exponent`` holds ``value``."""
    return math.floor(math.ldexp(value, -exponent))


class Reservoir:
    """A random sample, of bounded size, of a stream of unknown length, each value as likely as any other.

    While no more than ``size`` values have come it holds all of them. Then each batch gets its share of the places
    (the merging of samples by size; Vitter's algorithm R, 1985, is the case of batches of one). The pseudo-random
    choices depend only on the number and order of the values, so equal runs keep equal samples.

    Args:
        size: Most values kept.
    """

    def __init__(self, size: int = 1 << 15) -> None:
        self._values = np.empty(size, dtype=np.float32)
        self._kept = self._seen = 0
        self._random = np.random.default_rng(0)

    def add(self, values: Tensor, count: int) -> None:
        """Offers float32 ``[n]`` values on the CPU that stand for a batch of ``count >= n``."""
        offered, size = values.numpy(), self._values.size
        self._seen += count
        wanted = size if self._seen <= size else int(size * (count / self._seen) + self._random.random())
        chosen = offered
        if wanted < offered.size:
            chosen = offered[self._random.choice(offered.size, wanted, replace=False, shuffle=False)]
        room = min(size - self._kept, chosen.size)
        self._values[self._kept : self._kept + room] = chosen[:room]
        replaced = self._random.choice(self._kept, chosen.size - room, replace=False, shuffle=False)
        self._values[replaced] = chosen[room:]
        self._kept += room

    def values(self) -> Tensor:
        """The sample, float32 ``[n]``."""
        return torch.from_numpy(self._values[: self._kept])
