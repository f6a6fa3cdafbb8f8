"""One thing that was tried: what it was, what it measured, what became of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fxcompress.auto.recipes import Family, Recipe
from fxcompress.ir import Program
from fxcompress.pipeline import StepRecord
from fxcompress.selection import Candidate

__all__ = ["Made", "Plan", "Trial"]


@dataclass(frozen=True)
class Plan:
    """A recipe for one target, with some layers in a higher precision.

    Attributes:
        family: Where it comes from.
        recipe: Its passes.
        left: Layers that are not quantized (or raised to 8 bits, in recipes of INT4 weights): name and reason.
        mix: Why they are, as part of the name; empty without any.
    """

    family: Family
    recipe: Recipe
    left: tuple[tuple[str, str], ...] = ()
    mix: str = ""

    @property
    def name(self) -> str:
        """For reports."""
        return f"{self.recipe.name} ({self.mix})" if self.mix else self.recipe.name


@dataclass
class Made:
    """What the passes of a recipe made of a program: before the first one that quantizes, and at the end."""

    reference: Program
    program: Program
    records: list[StepRecord]


@dataclass
class Trial:
    """What became of a plan.

    Attributes:
        name: Of the plan.
        target: Runtime.
        accuracy: ``evaluate`` of the engine; None when it came to no evaluation.
        latency_ms: Measured median; None when not measured.
        size: Bytes on disk; None when it was not built.
        holds: Accuracy and budgets are kept.
        verdict: ``chosen``, or why it was dropped.
        left: Layers in a higher precision.
    """

    name: str
    target: str
    accuracy: float | None = None
    latency_ms: float | None = None
    size: int | None = None
    holds: bool = False
    verdict: str = ""
    left: list[str] = field(default_factory=list)
    candidate: Candidate | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {k: v for k, v in self.__dict__.items() if k != "candidate"}
