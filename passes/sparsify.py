"""Sparsify: unstructured or N:M zeros in the weights, by magnitude, Wanda or SparseGPT."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from fxcompress.data import CalibrationData
from fxcompress.errors import PassError
from fxcompress.ir import Program
from fxcompress.layerwise.store import WeightStore
from fxcompress.passbase import Context, Pass, Result
from fxcompress.sparse.api import Outcome, make_sparse
from fxcompress.sparse.masks import SparsityMasks
from fxcompress.sparse.settings import Settings

__all__ = ["Sparsify"]


@dataclass(frozen=True)
class Sparsify(Pass):
    """Set weights to zero; see `fxcompress.sparsify` for every option.

    Attributes:
        sparsity: Share of the weights; not needed with ``pattern``.
        pattern: N of every M kept, ``"2:4"`` or ``(2, 4)``.
        method: ``l1``, ``l2``, ``random``, ``wanda`` or ``sparsegpt``; the last two need calibration data.
        scope: Share of every layer, or of all weights together.
        include: Globs over layer names: only these.
        ignore: Globs over layer names: not these.
        permute: Reorder input channels where that is exact and keeps more magnitude under the pattern.
        samples: Calibration samples to use at most.
        sequential: Each layer sees the inputs that the sparse layers before it give.
        block: Prune blocks of that many neighbours along the input channels.
        seed: Of ``random`` and of the search for permutations.

    Raises:
        PruneError: an option is wrong or excludes another.
    """

    exact: ClassVar[bool] = False
    sparsity: float | None = None
    pattern: str | tuple[int, int] | None = None
    method: Literal["l1", "l2", "random", "wanda", "sparsegpt"] = "l1"
    scope: Literal["layer", "global"] = "layer"
    include: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    permute: bool = False
    samples: int = 128
    sequential: bool = True
    block: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        settings = self.settings
        object.__setattr__(self, "pattern", None if settings.pattern is None else str(settings.pattern))
        object.__setattr__(self, "include", settings.include)
        object.__setattr__(self, "ignore", settings.ignore)

    @property
    def settings(self) -> Settings:
        """The options, checked."""
        return Settings(**{f.name: getattr(self, f.name) for f in fields(self)})

    def requires(self, program: Program, context: Context) -> None:
        """Calibrated methods need calibration data."""
        if self.settings.calibrated and context.calibration is None:
            raise PassError(50, f"{self.name} with {self.method} needs calibration data", fix="pass calibration=loader")

    def run(self, program: Program, context: Context) -> Result:
        """Put sparse weights; those of the input program stay as they are."""
        store = WeightStore(program.gm, replace=True)
        given = context.calibration
        data = CalibrationData(given) if given is not None and not isinstance(given, CalibrationData) else given
        return self._result(program, make_sparse(program, self.settings, data, store), data)

    def _result(self, program: Program, outcome: Outcome, data: CalibrationData | None) -> Result:
        found = SparsityMasks(program, outcome.kept).sparsity()
        how = self.pattern or self.method
        changes = [f"{how} zeros in {name}: {share:.1%}" for name, share in found.layers.items()]
        notes = list(outcome.notes)
        if self.settings.calibrated and data is not None and self.sequential:
            notes += data.notes(self.samples)
        metrics = {"layers": len(found.zeros), "sparsity": found.total, "zeros": sum(found.zeros.values())}
        return Result(program, outcome.permuted + changes, notes=notes, metrics=metrics)
