"""SmoothQuant: how much of the range of activations moves into weights, per layer.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", 2023, equation 4:
``s_j = max|X_j|^a / max|W_j|^(1 - a)``, the maxima over all tokens and over all rows of all layers that read ``X``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fxcompress.data import all_finite
from fxcompress.quant.migration import Migration

__all__ = ["ALPHAS", "Granularity", "SampledRows", "best_alpha", "smoothing_factors"]

Granularity = Literal["tensor", "token"]
#: What ``alpha="auto"`` tries.
ALPHAS = tuple(i / 20 for i in range(21))
_ROWS = 256


class SampledRows:
    """Peaks of the channels of a value over all calls, and about 256 of its rows.

    Args:
        calls: How many calls will be seen.

    Attributes:
        peak: ``max |x_j|`` [channels]; None before the first row.
        seen: Values seen.
        skipped: Values left out because they held NaN or infinity.
    """

    def __init__(self, calls: int) -> None:
        self._each = max(1, _ROWS // max(1, calls))
        self._rows: Tensor | None = None  # one piece: many small ones among the values of the calls tear up the heap
        self._taken = 0
        self.peak: Tensor | None = None
        self.seen = self.skipped = 0

    def update(self, x: Tensor) -> None:
        """Add a value [..., channels]."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        self.seen += 1
        if not all_finite(rows):
            self.skipped += 1
            return
        if not len(rows):
            return
        peak = rows.abs().amax(0)
        self.peak = peak if self.peak is None else torch.maximum(self.peak, peak)
        count = min(self._each, len(rows), _ROWS - self._taken)
        if count > 0:
            if self._rows is None:
                self._rows = rows.new_empty(_ROWS, rows.shape[1])
            chosen = torch.linspace(0, len(rows) - 1, count, device=rows.device).long()
            self._rows[self._taken : self._taken + count] = rows[chosen]
            self._taken += count

    @property
    def rows(self) -> Tensor:
        """The sample [rows, channels], after the first row was seen."""
        assert self._rows is not None
        return self._rows[: self._taken]


def smoothing_factors(peak: Tensor, weight: Tensor, alpha: float, migration: Migration) -> Tensor:
    """``s`` [migration.count] for the peaks of a value [channels] and the weights of its readers [out, channels]."""
    given = migration.pooled(peak.float(), "amax").clamp(min=1e-5)
    weights = migration.pooled(weight.abs().amax(0).float(), "amax").clamp(min=1e-5)
    return (given**alpha / weights ** (1 - alpha)).clamp(min=1e-5)


def best_alpha(
    sample: SampledRows, weights: Sequence[Tensor], migration: Migration, granularity: Granularity
) -> tuple[float | None, Tensor]:
    """The alpha among `ALPHAS` whose 8-bit products err least on the sample, and its factors.

    The error of each row of a product is relative to the row, and all readers count alike: in decoders the first tokens
    are a thousand times as large as the others, and queries and keys are larger than values; they would be all that
    counts. Weights are rounded per row, activations per tensor (range: the peaks) or per token, both symmetric.

    Args:
        sample: What the readers read.
        weights: Of each reader [out, channels].
        migration: Which channels share a factor.
        granularity: Of the scales of activations.

    Returns:
        ``None`` and ones when nothing is better than leaving the channels alone.
    """
    assert sample.peak is not None
    best: tuple[float | None, Tensor] = (None, torch.ones(migration.count))
    rows, together = sample.rows, torch.cat(list(weights))
    wanted = [rows @ weight.t() for weight in weights]
    least = _error(rows, sample.peak, weights, wanted, granularity)
    for alpha in ALPHAS:
        factors = smoothing_factors(sample.peak, together, alpha, migration)
        each = factors[migration.groups]
        error = _error(rows / each, sample.peak / each, [weight * each for weight in weights], wanted, granularity)
        if error < least:
            least, best = error, (alpha, factors)
    return best


def _error(
    rows: Tensor, peak: Tensor, weights: Sequence[Tensor], wanted: Sequence[Tensor], granularity: Granularity
) -> float:
    limit = peak.max() if granularity == "tensor" else rows.abs().amax(1, keepdim=True)
    given = _eight_bits(rows, limit)
    errors = []
    for weight, exact in zip(weights, wanted, strict=True):
        product = given @ _eight_bits(weight, weight.abs().amax(1, keepdim=True)).t()
        errors.append(((product - exact).square().sum(1) / exact.square().sum(1).clamp(min=1e-30)).mean())
    return float(torch.stack(errors).mean())


def _eight_bits(values: Tensor, limit: Tensor) -> Tensor:
    scale = (limit / 127).clamp(min=1e-30)
    return torch.round(values / scale).clamp_(-127, 127).mul_(scale)
