"""What ``passes="auto"`` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fxcompress.errors import UsageError

__all__ = ["AutoSearch"]


@dataclass(frozen=True)
class AutoSearch:
    """Find the mix of precisions that holds ``max_drop`` and is fastest, or smallest, as measured.

    ``compile(..., passes="auto")`` is ``compile(..., passes=AutoSearch())``.

    Attributes:
        objective: What to make least: ``latency`` or ``size`` (bytes on disk).
        max_size: Largest size of the engine's files in bytes; None: any.
        max_latency_ms: Largest median latency for the example in milliseconds; None: any.
        trials: Most engines to evaluate; each is one call of ``evaluate``.
        sensitivity_samples: Calibration samples that rank the layers.

    Raises:
        UsageError: an option is out of range.
    """

    objective: Literal["latency", "size"] = "latency"
    max_size: int | None = None
    max_latency_ms: float | None = None
    trials: int = 40
    sensitivity_samples: int = 16

    def __post_init__(self) -> None:
        if self.objective not in ("latency", "size"):
            raise UsageError(543, f"objective={self.objective!r}: not known", fix="use 'latency' or 'size'")
        if self.trials < 1 or self.sensitivity_samples < 1:
            what = f"trials={self.trials}, sensitivity_samples={self.sensitivity_samples}"
            raise UsageError(544, f"{what}: nothing can be tried", fix="give 1 or more")

    @property
    def wants_small(self) -> bool:
        """Size counts, so that what only saves memory is worth a trial."""
        return self.objective == "size" or self.max_size is not None
