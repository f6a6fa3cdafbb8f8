"""How far apart tensors are: one pair, and outputs summed over samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ErrorSums", "Row"]


@dataclass(frozen=True)
class Row:
    """One compared tensor.

    Attributes:
        name: Output, or inner point.
        kind: ``output`` or ``inner``.
        max_abs: Largest absolute difference.
        rel_l2: ``|a - b| / |b|`` in the L2 norm.
        sqnr_db: ``-20 log10(rel_l2)``, signal to noise in decibels.
        cosine: Cosine similarity.
    """

    name: str
    kind: str
    max_abs: float
    rel_l2: float
    sqnr_db: float
    cosine: float

    @classmethod
    def of(cls, name: str, kind: str, a: Tensor, b: Tensor) -> Row:
        """Compare ``a`` with the reference ``b``."""
        if a.shape != b.shape:
            return cls(name, kind, math.inf, math.inf, -math.inf, math.nan)
        x, y = a.detach().double().flatten(), b.detach().double().flatten()
        same = (x == y) | (x.isnan() & y.isnan())
        difference = torch.where(same, torch.zeros_like(x), x - y)
        if not bool(difference.isfinite().all()):
            return cls(name, kind, math.inf, math.inf, -math.inf, math.nan)
        signal = torch.where(y.isfinite(), y, torch.zeros_like(y))
        error = _ratio(float(difference.norm()), float(signal.norm()))
        decibels = math.inf if error == 0 else -20 * math.log10(error)
        cosine = 1.0 if error == 0 else _ratio(float(x @ y), float(x.norm() * y.norm()))
        return cls(name, kind, float(difference.abs().max()) if x.numel() else 0.0, error, decibels, cosine)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else (0.0 if part == 0 else math.inf)


class ErrorSums:
    """Squared differences and norms per output, summed over samples."""

    def __init__(self) -> None:
        self.parts: list[list[float]] = []

    def add(self, got: list[Tensor], simulated: list[Tensor], exact: list[Tensor] | None) -> float:
        """Add one sample; returns its own error."""
        known: list[Tensor | None] = [None] * len(got) if exact is None else list(exact)
        own = [_squares(g, s, e) for g, s, e in zip(got, simulated, known, strict=True)]
        self.parts = self.parts or [[0.0] * 4 for _ in own]
        self.parts = [
            [a + b for a, b in zip(total, new, strict=True)] for total, new in zip(self.parts, own, strict=True)
        ]
        return max((_root(p[0], p[1]) for p in own), default=0.0)

    def error(self) -> float:
        """Engine against simulation."""
        return max((_root(p[0], p[1]) for p in self.parts), default=0.0)

    def noise(self) -> float:
        """Simulation against float32."""
        return max((_root(p[2], p[3]) for p in self.parts), default=0.0)


def _squares(got: Tensor, simulated: Tensor, exact: Tensor | None) -> list[float]:
    """``|g - s|^2, |s|^2, |s - e|^2, |e|^2``."""
    g, s = Row.of("", "", got, simulated), simulated.double()
    scale = _energy(s)
    first = g.rel_l2**2 * scale if scale else (0.0 if g.max_abs == 0 else math.inf)
    if exact is None:
        return [first, scale, 0.0, 0.0]
    e = Row.of("", "", simulated, exact)
    reference = _energy(exact.double())
    return [first, scale, e.rel_l2**2 * reference if reference else 0.0, reference]


def _energy(x: Tensor) -> float:
    return float(torch.where(x.isfinite(), x, torch.zeros_like(x)).square().sum())


def _root(part: float, whole: float) -> float:
    return math.sqrt(part / whole) if whole > 0 else (0.0 if part == 0 else math.inf)
