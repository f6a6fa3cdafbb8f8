"""RemoveBlocks: whole residual blocks go, each removal certified by a bypass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fxcompress.analysis import count_macs
from fxcompress.data import CalibrationData
from fxcompress.errors import PruneError
from fxcompress.ir import Program
from fxcompress.passbase import Context, Pass, Refusal, Result
from fxcompress.prune.block_importance import BLOCK_IMPORTANCE
from fxcompress.prune.block_plan import KIND, BlockPlan, check_amount, fits, plan_block_removal
from fxcompress.prune.blocks import find_blocks

__all__ = ["RemoveBlocks"]


@dataclass(frozen=True)
class RemoveBlocks(Pass):
    """Remove the residual blocks that matter least; see `fxcompress.plan_block_removal`.

    Give one of ``count``, ``ratio``, ``names`` and ``macs``. Amounts are totals: blocks that an earlier run removed
    count. The certificate is always checked.

    Attributes:
        count: How many blocks to remove.
        ratio: Share of the blocks that can be bypassed, rounded down to whole blocks.
        names: Blocks by name, module path or glob.
        macs: Share of the MACs to keep at most.
        importance: ``cosine``, ``magnitude`` or ``loss``, all from the calibration data.
        samples: Calibration samples to use at most.
        evaluate: For ``loss``, instead of the cross-entropy on labelled calibration data: scores any callable model,
            higher is better. A function is not part of a recipe.

    Raises:
        PruneError: an option is wrong, missing or excludes another.
    """

    exact: ClassVar[bool] = False
    count: int | None = None
    ratio: float | None = None
    names: tuple[str, ...] = ()
    macs: float | None = None
    importance: str = "cosine"
    samples: int = 256
    evaluate: Callable[[Any], float] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        names = (self.names,) if isinstance(self.names, str) else tuple(self.names)
        object.__setattr__(self, "names", names)
        check_amount(self.count, self.ratio, names or None, self.macs)
        if self.importance not in BLOCK_IMPORTANCE:
            fix = f"use {', '.join(map(repr, BLOCK_IMPORTANCE))}; a function goes to plan_block_removal"
            raise PruneError(417, f"{self.name} does not know the importance {self.importance!r}", fix=fix)
        if isinstance(self.samples, bool) or not isinstance(self.samples, int) or self.samples < 1:
            raise PruneError(418, f"samples must be an integer of at least 1, not {self.samples!r}")

    def to_dict(self) -> dict[str, Any]:
        """Recipe entry, without the function."""
        return {k: v for k, v in super().to_dict().items() if k != "evaluate"}

    def requires(self, program: Program, context: Context) -> None:
        """Needs calibration data, unless blocks are named or ``evaluate`` scores them."""
        measured = self.importance == "loss" and self.evaluate is not None
        if not self.names and not measured and context.calibration is None:
            why = f"importance {self.importance!r} is measured on data"
            raise PruneError(419, f"{self.name} needs calibration data", why=why, fix="pass calibration=loader")

    def run(self, program: Program, context: Context) -> Result:
        """Plan, remove, certify."""
        amount = self._still(program)
        if not amount:
            return Result(program, notes=["no block to remove: the amount is met already"])
        given = context.calibration
        data = given if given is None or isinstance(given, CalibrationData) else CalibrationData(given)
        plan = plan_block_removal(
            program,
            **amount,
            importance=self.importance,
            data=data,
            evaluate=self.evaluate,
            samples=self.samples,
        )
        pruned = plan.apply(program)
        certificate = plan.certify(program, pruned)
        skipped = 0 if data is None or self.names else data.skipped
        return Result(
            pruned,
            changes=[f"removed block {name}" for name in plan.removed],
            refusals=[Refusal("remove block", b.name, b.reason) for b in plan.blocks if b.reason],
            notes=[f"{skipped} calibration batches held NaN or infinity and were skipped"] if skipped else [],
            metrics={
                "blocks": len(plan.blocks),
                "removed": len(plan.removed),
                "parameters": list(plan.parameters),
                "macs": list(plan.macs),
                "certified": {"error": certificate.error, "tolerance": certificate.tolerance},
            },
        )

    def _still(self, program: Program) -> dict[str, Any]:
        """What is left to do, as an option of `plan_block_removal`; empty for nothing."""
        plans = [BlockPlan.from_dict(entry) for entry in program.history if entry.get("kind") == KIND]
        done = [name for plan in plans for name in plan.removed]
        if self.names:
            names = self._unmet(program, done)
            return {"names": names} if names else {}
        if self.macs is not None:
            dense = plans[0].macs[0] if plans else count_macs(program)
            share = self.macs * dense / max(count_macs(program), 1)
            return {"macs": share} if share < 1 else {}
        wanted = self.count or 0
        if self.ratio is not None:
            wanted = int(self.ratio * (len(done) + sum(not b.reason for b in find_blocks(program))) + 1e-9)
        return {"count": wanted - len(done)} if wanted > len(done) else {}

    def _unmet(self, program: Program, done: list[str]) -> list[str]:
        """Names that an earlier run has not seen to."""
        known = [b.name for b in find_blocks(program)] if done else []
        met = [n for n in self.names if n in done or (_any(done, n) and not _any(known, n))]
        return [n for n in self.names if n not in met]


def _any(blocks: list[str], name: str) -> bool:
    return any(fits(block, name) for block in blocks)
