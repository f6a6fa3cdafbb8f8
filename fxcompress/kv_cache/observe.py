"""What is kept of the keys or the values of one layer: largest magnitudes, and a sample of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from fxcompress.errors import CalibrationError
from fxcompress.quant_analysis.tally import Energy

__all__ = ["CacheFormat", "CacheTally", "cache_format"]

#: Tokens kept per layer, for keys and for values.
_SAMPLE: Final = 1024
_FACTORS: Final = tuple(1.0 - 0.02 * i for i in range(41))


@dataclass(frozen=True)
class CacheFormat:
    """How one number is stored.

    Attributes:
        name: ``int8``, ``int4`` or ``fp8`` (E4M3).
        largest: What ONNX Runtime divides the largest magnitude by.
        middle: What compressed-tensors divides it by: half of the range of the integers.
        bits: 8 or 4.
    """

    name: str
    largest: float
    middle: float
    bits: int

    def rounded(self, x: Tensor, scale: Tensor) -> Tensor:
        """``x`` as it comes back from a cache with ``scale``."""
        steps = x / scale
        if self.name == "fp8":
            return steps.clamp(-self.largest, self.largest).to(torch.float8_e4m3fn).to(x.dtype) * scale
        return steps.round().clamp(-self.largest, self.largest - 1) * scale


_FORMATS: Final = {
    8: CacheFormat("int8", 128.0, 127.5, 8),
    4: CacheFormat("int4", 8.0, 7.5, 4),
    "fp8": CacheFormat("fp8", 448.0, 448.0, 8),
}


def cache_format(bits: int | str) -> CacheFormat | None:
    """8, 4 or ``"fp8"``; None for anything else."""
    return _FORMATS.get(bits)


class CacheTally:
    """Sums over the keys, or the values, of one layer.

    Args:
        name: The layer, for errors.
        rotary: They are keys that positions rotate: of each pair of features ``d`` and ``d + features / 2`` the norm
            is kept, which no position changes and which neither feature exceeds at any position. The features that turn
            slowly would otherwise be known at the positions of the calibration data only.

    Attributes:
        peaks: Largest magnitude, float32 [heads, features]; None before the first call.
        tokens: Tokens seen.
    """

    def __init__(self, name: str, rotary: bool) -> None:
        self.name, self.rotary = name, rotary
        self.peaks: Tensor | None = None
        self.tokens = 0
        self._kept: list[Tensor] = []
        self._stride = 1

    def add(self, x: Tensor) -> None:
        """Float ``x`` [batch, heads, tokens, features].

        Raises:
            CalibrationError: it holds NaN or infinity, or other heads or features than before.
        """
        rows = x.detach().float().transpose(1, 2).flatten(0, 1)  # [tokens, heads, features]
        peaks = _pair_norms(rows).amax(0) if self.rotary else rows.abs().amax(0)
        if not bool(torch.isfinite(peaks).all()):
            what = "keys or values of the cache are NaN or infinity"
            raise CalibrationError(311, what, where=self.name, fix="check the model on this data")
        self.peaks = peaks if self.peaks is None else torch.maximum(self.peaks, peaks)
        first = -self.tokens % self._stride
        self._kept.append(rows[first :: self._stride].clone())
        self.tokens += rows.shape[0]
        while sum(len(k) for k in self._kept) > _SAMPLE:  # every second of the tokens kept, evenly over all data
            self._kept = [torch.cat(self._kept)[::2]]
            self._stride *= 2

    def thresholds(self, granularity: str, clip: bool, form: CacheFormat) -> Tensor:
        """Largest magnitude that is stored without clipping.

        Args:
            granularity: ``tensor``, ``head`` or ``channel``.
            clip: Take the magnitude times the factor among 1.00, 0.98 ... 0.20 with the least squared error on the
                sample of tokens.
            form: How numbers are stored.

        Returns:
            Float32 [1, 1], [heads, 1] or [heads, features].
        """
        assert self.peaks is not None
        dims = {"tensor": (0, 1), "head": (1,), "channel": ()}[granularity]
        ends = self.peaks.amax(dims, keepdim=True) if dims else self.peaks.clone()
        ends = ends.clamp(min=1e-6)
        if not clip:
            return ends
        rows = torch.cat(self._kept)
        best, least = ends, torch.full_like(ends, torch.inf)
        for factor in _FACTORS:
            error = (form.rounded(rows, ends * factor / form.largest) - rows).square().sum(0)
            error = error.sum(dims, keepdim=True) if dims else error
            best, least = torch.where(error < least, ends * factor, best), torch.minimum(least, error)
        return best

    def sqnr_db(self, thresholds: Tensor, form: CacheFormat) -> float:
        """Signal to rounding noise of the sample of tokens, decibels."""
        rows, energy = torch.cat(self._kept), Energy()
        energy.add(form.rounded(rows, thresholds / form.largest), rows)
        return energy.sqnr_db


def _pair_norms(rows: Tensor) -> Tensor:
    """Norm of each pair that a rotation by halves mixes, in both places; an odd feature has no pair."""
    half = rows.shape[-1] // 2
    norm = torch.hypot(rows[..., :half], rows[..., half : 2 * half])
    return torch.cat([norm, norm, rows[..., 2 * half :].abs()], dim=-1)
