"""PruneChannels: dependency-aware structured pruning with a certificate, as a pass."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from fxcompress.errors import PruneError
from fxcompress.ir import Program
from fxcompress.passbase import Context, Pass, Result
from fxcompress.prune.importance import importance
from fxcompress.prune.plan import plan_pruning
from fxcompress.prune.request import checked

__all__ = ["PruneChannels"]


@dataclass(frozen=True)
class PruneChannels(Pass):
    """Remove channels, neurons and attention heads that matter least; the model becomes smaller and stays dense.

    The result is certified: it equals the dense program with exactly those channels zeroed, within 1e-4 (float32) and
    1e-9 (float64), before any fine-tuning. The options are those of ``fxcompress.plan_pruning``. A program that has
    been pruned with the same options already is left as it is.

    Attributes:
        ratio: Share of all channels to remove.
        macs: Share of the multiply-accumulates to keep.
        parameters: Share of the parameters to keep.
        latency: Share of the latency to keep, measured on ``target``.
        target: Engine for ``latency``.
        importance: Criterion by name.
        scope: ``"global"`` or ``"local"`` ranking.
        reduction: ``sum``, ``mean``, ``max`` or ``norm``.
        normalize: ``mean``, ``macs``, ``parameters`` or ``none``; None for the cost that the budget limits.
        round_to: Channels left are a multiple of this; ``"target"`` for the width of the kernels of the processor.
        ignore: Layers (globs) that keep their output channels.
        include: Layers (globs) that may lose output channels; empty for all.
        ratios: Pairs of a layer or group (glob) and the share to remove there.
        min_channels: Least number of channels a group keeps.
        max_ratio: Largest share of a group that may go.
        attention: ``"heads"`` or ``"head_dim"``.
        width: Prune dimensions that norms run over, too.
        seed: For ``random``.
        certify: Prove the result; an error names the group that differs.
    """

    exact: ClassVar[bool] = False

    ratio: float | None = None
    macs: float | None = None
    parameters: float | None = None
    latency: float | None = None
    target: str | None = None
    importance: str = "l2"
    scope: str = "global"
    reduction: str = "sum"
    normalize: str | None = None
    round_to: int | str = 1
    ignore: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    ratios: tuple[tuple[str, float], ...] = ()
    min_channels: int = 1
    max_ratio: float = 0.95
    attention: str = "heads"
    width: bool = False
    seed: int = 0
    certify: bool = True

    def requires(self, program: Program, context: Context) -> None:
        """Data-driven importance needs batches, or gradients that are already there."""
        if importance(self.importance).needs_data and context.train is None:
            if self.importance.startswith(("taylor", "hessian")) and any(
                p.grad is not None for p in program.gm.parameters()
            ):
                return
            what = f"importance {self.importance!r} needs training data"
            raise PruneError(11, what, fix="give compile(..., train=loader) or Context(train=...)")

    def run(self, program: Program, context: Context) -> Result:
        """Plan, cut, certify."""
        options: dict[str, Any] = {f: getattr(self, f) for f in self._options()}
        request = checked({**options, "ratios": dict(self.ratios), "allow_outputs": False})
        if any(entry.get("options") == request for entry in program.history):
            return Result(program, notes=["nothing to prune: this very request was met before"])
        plan = plan_pruning(program, train=context.train, loss=context.loss, ratios=dict(self.ratios), **options)
        pruned = plan.apply(program)
        changes = [
            f"{g.name}: {g.size * g.width} -> {(g.size - g.removed) * g.width} {g.kind}s"
            for g in plan.groups
            if g.removed
        ]
        metrics: dict[str, Any] = {"parameters": plan.parameters, "macs": plan.macs}
        if self.certify:
            metrics["certificate"] = plan.certify(program, pruned).to_dict()
        return Result(pruned, changes=changes, notes=plan.notes, metrics=metrics)

    def _options(self) -> list[str]:
        skipped = ("certify", "ratios")
        return [f.name for f in fields(self) if f.name not in skipped]
