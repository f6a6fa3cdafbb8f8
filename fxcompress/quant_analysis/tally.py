"""Sums that a quantization report is made of; their size does not depend on the data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fxcompress.quant.fake_quantize import FakeQuantize, grouped
from fxcompress.quant.observers import HistogramObserver

__all__ = ["Channels", "Energy", "ValueTally", "grid_ends"]

_BINS = 512


@dataclass
class Energy:
    """Squared error and squared signal, summed in float64.

    Attributes:
        noise: ``sum (a - b)^2``.
        signal: ``sum b^2``.
    """

    noise: float = 0.0
    signal: float = 0.0

    def add(self, got: Tensor, exact: Tensor) -> None:
        """Add one pair of tensors of one shape; what is not finite on both sides alike does not count."""
        difference = got.detach().float() - exact.detach().float()
        if not math.isfinite(noise := float(difference.square().sum(dtype=torch.float64))):
            same = (got == exact) | (got.isnan() & exact.isnan())
            noise = float(difference.masked_fill(same, 0.0).square().sum(dtype=torch.float64))
            noise = noise if math.isfinite(noise) else math.inf
            exact = exact.detach().nan_to_num(0.0, 0.0, 0.0)
        self.noise += noise
        self.signal += float(exact.detach().float().square().sum(dtype=torch.float64))

    @property
    def relative(self) -> float:
        """Relative L2 error."""
        if self.signal > 0:
            return math.sqrt(self.noise / self.signal)
        return 0.0 if self.noise == 0 else math.inf

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise in decibels, ``10 log10(signal / noise)``."""
        relative = self.relative
        return math.inf if relative == 0 else -20 * math.log10(relative)


@dataclass
class Channels:
    """Largest magnitude of every channel.

    Attributes:
        axis: The channels' dimension, counted from the end when negative.
        peaks: Float32 [channels]; None before the first tensor.
    """

    axis: int
    peaks: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Add one tensor; NaN and infinity do not count."""
        if x.dim() == 0 or x.numel() == 0:
            return
        own = x.detach().float().abs().nan_to_num(0.0, 0.0, 0.0).movedim(self.axis, 0).flatten(1)
        own = own.amax(1) if own.shape[1] else own.new_zeros(own.shape[0])
        known = self.peaks
        if known is not None and known.shape != own.shape:
            return  # a dimension of free size is no dimension of channels
        self.peaks = own if known is None else torch.maximum(known, own)


@dataclass
class ValueTally:
    """One tensor, unrounded and rounded.

    Attributes:
        channels: Largest magnitudes.
        exact: Range and histogram of the unrounded values.
        rounded: The same of the rounded ones; empty without a quantizer.
        energy: Of rounding.
        clipped: Of rounding, the values beyond the grid's ends alone.
        beyond: Number of values beyond the grid's ends.
        count: Number of values that were rounded.
    """

    channels: Channels
    exact: HistogramObserver = field(default_factory=lambda: HistogramObserver(bins=_BINS))
    rounded: HistogramObserver = field(default_factory=lambda: HistogramObserver(bins=_BINS))
    energy: Energy = field(default_factory=Energy)
    clipped: float = 0.0
    beyond: int = 0
    count: int = 0

    def add(self, x: Tensor, quantizer: nn.Module | None) -> None:
        """Add one tensor, rounded by ``quantizer``."""
        self.exact.update(x)
        self.channels.add(x)
        if quantizer is not None:
            self.add_rounded(x, quantizer(x), quantizer)

    def add_rounded(self, x: Tensor, y: Tensor, quantizer: nn.Module) -> None:
        """Add ``y``, what ``quantizer`` (and perhaps more) made of ``x``."""
        self.rounded.update(y)
        self.energy.add(y, x)
        self.count += x.numel()
        ends = grid_ends(quantizer, x)
        if ends is not None:
            low, high, half = ends
            outside = ((x - high) > half) | ((low - x) > half)
            self.beyond += int(outside.sum())
            self.clipped += float((y - x).float().square().mul_(outside).nan_to_num(0.0).sum(dtype=torch.float64))


def grid_ends(quantizer: nn.Module, like: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Lowest and highest value of the grid, and half a step, to broadcast to ``like``; None for a dynamic grid."""
    if not isinstance(quantizer, FakeQuantize):
        return None
    spec, scale, zero = quantizer.spec, quantizer.scale.float(), quantizer.zero_point.float()
    parts = (spec.qmin - zero) * scale, (spec.qmax - zero) * scale, scale / 2
    if spec.axis is None:
        return parts
    if spec.group_size is not None:
        rows = grouped(like, spec).shape[0]
        low, high, half = (p.reshape(rows, 1).expand(-1, spec.group_size) for p in parts)
        shape = like.movedim(spec.axis, 0).shape
        low, high, half = (p.reshape(shape).movedim(0, spec.axis) for p in (low, high, half))
        return low, high, half
    shape = torch.Size(-1 if i == spec.axis % like.dim() else 1 for i in range(like.dim()))
    low, high, half = (p.reshape(shape) for p in parts)
    return low, high, half
