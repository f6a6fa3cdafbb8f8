"""plan_pruning(): what may go, what goes, and the plan that does and proves it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxcompress.analysis import count_macs, count_parameters
from fxcompress.errors import PruneError
from fxcompress.ir import Program, evaluating
from fxcompress.prune import request
from fxcompress.prune.certificate import Certificate, check
from fxcompress.prune.dependencies import Bools, Dependencies, analyze
from fxcompress.prune.groups import Group, find_groups
from fxcompress.prune.importance import Importance, ImportanceFunction, importance, reduce_scores
from fxcompress.prune.labels import FREE
from fxcompress.prune.selection import Selector, search
from fxcompress.prune.surgery import cut_program

__all__ = ["PruningPlan", "plan_pruning"]


@dataclass
class PruningPlan:
    """What goes from a program.

    Attributes:
        groups: All groups of channels, pruned or not, in execution order.
        removed: Layer (or the name of a parameter used without one) -> indices of its output channels that go.
        edits: Tensor name -> {dimension: indices that stay}.
        parameters: Number of parameters before and after.
        macs: Multiply-accumulates for the example before and after.
        notes: What stays although it looks prunable, and why.
        options: The arguments the plan was made with.
    """

    groups: list[Group]
    removed: dict[str, tuple[int, ...]]
    edits: dict[str, dict[int, list[int]]]
    parameters: tuple[int, int]
    macs: tuple[int, int]
    notes: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    _found: Dependencies | None = field(default=None, repr=False)
    _units: Bools | None = field(default=None, repr=False)

    def apply(self, program: Program) -> Program:
        """A smaller program; ``program`` is not changed. Names of the state dict stay; a layer without bias may get one.

        Raises:
            PruneError: ``program`` is not the one the plan was made for.
        """
        found, units = self._on(program)
        pruned, notes = cut_program(found, units)
        pruned.history = [*program.history, self.to_dict()]
        self.notes += [n for n in notes if n not in self.notes]
        return pruned

    def certify(self, program: Program, pruned: Program | None = None, *, per_group: bool = False) -> Certificate:
        """Prove that ``pruned`` equals ``program`` with exactly the removed channels zeroed.

        Run it before any fine-tuning. Tolerances: 1e-4 of the largest output in float32, 1e-9 in float64.

        Args:
            program: The dense program.
            pruned: The smaller one; None makes it.
            per_group: Also certify each group by itself.

        Raises:
            CertificateError: they differ; the group is named.
        """
        found, units = self._on(program)
        by_group = {g.name: _only(units, g) for g in self.groups if _only(units, g).any()}
        return check(found, units, self.apply(program) if pruned is None else pruned, by_group, per_group)

    def _on(self, program: Program) -> tuple[Dependencies, Bools]:
        """Dependencies of ``program``, and the units to remove from it."""
        if self._found is not None and self._units is not None and self._found.program is program:
            return self._found, self._units
        found = analyze(
            program, width=bool(self.options.get("width")), allow_outputs=bool(self.options.get("allow_outputs"))
        )
        self._found, self._units = found, _units_of(found, self.edits)
        return found, self._units

    def to_dict(self) -> dict[str, Any]:
        """JSON types: enough to apply the plan to the same model again."""
        edits = {name: {str(d): kept for d, kept in dims.items()} for name, dims in self.edits.items()}
        return {
            "edits": edits,
            "removed": {name: list(indices) for name, indices in self.removed.items()},
            "parameters": list(self.parameters),
            "macs": list(self.macs),
            "notes": list(self.notes),
            "options": dict(self.options),
        }

    @staticmethod
    def from_dict(entry: Mapping[str, Any]) -> PruningPlan:
        """The plan of `to_dict`; its groups are found again when it is applied."""
        return PruningPlan(
            groups=[],
            removed={name: tuple(indices) for name, indices in entry["removed"].items()},
            edits={name: {int(d): list(kept) for d, kept in dims.items()} for name, dims in entry["edits"].items()},
            parameters=(int(entry["parameters"][0]), int(entry["parameters"][1])),
            macs=(int(entry["macs"][0]), int(entry["macs"][1])),
            notes=list(entry.get("notes", [])),
            options=dict(entry.get("options", {})),
        )

    def __str__(self) -> str:
        head = (
            f"parameters {self.parameters[0]:,} -> {self.parameters[1]:,}"
            f" ({self.parameters[1] / max(self.parameters[0], 1):.1%}),"
            f" MACs {self.macs[0]:,} -> {self.macs[1]:,} ({self.macs[1] / max(self.macs[0], 1):.1%})"
        )
        rows: list[tuple[str, ...]] = [("group", "kind", "channels", "importance", "parameters", "MACs", "layers")]
        rows += [_row(g) for g in self.groups]
        widths = [max(len(r[i]) for r in rows) for i in range(6)]
        lines = ["  ".join([*(c.ljust(w) for c, w in zip(r[:6], widths, strict=True)), r[6]]).rstrip() for r in rows]
        return "\n".join([head, *lines, *(f"note: {n}" for n in self.notes)])


def _row(group: Group) -> tuple[str, ...]:
    if group.alternative:
        channels = f"{group.size} (with {group.alternative})"
    else:
        channels = f"{group.size * group.width} -> {(group.size - group.removed) * group.width}"
    score = "-" if np.isnan(group.importance) else f"{group.importance:.3g}"
    more = f" +{len(group.layers) - 4}" if len(group.layers) > 4 else ""
    layers = ", ".join(group.layers[:4]) + more
    return group.name, group.kind, channels, score, f"{group.parameters:,}", f"{group.macs:,}", layers


def _only(units: Bools, group: Group) -> Bools:
    own = np.zeros_like(units)
    own[group.units] = units[group.units]
    return own


def plan_pruning(
    program: Program,
    ratio: float | None = None,
    *,
    importance: str | Importance | ImportanceFunction = "l2",
    scope: str = "global",
    reduction: str = "sum",
    normalize: str | None = None,
    round_to: int | str = 1,
    ignore: Sequence[str] = (),
    include: Sequence[str] = (),
    ratios: Mapping[str, float] | None = None,
    macs: float | None = None,
    parameters: float | None = None,
    latency: float | None = None,
    target: str | None = None,
    min_channels: int = 1,
    max_ratio: float = 0.95,
    attention: str = "heads",
    width: bool = False,
    allow_outputs: bool = False,
    example_inputs: Sequence[Any] | None = None,
    train: Iterable[Any] | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    seed: int = 0,
) -> PruningPlan:
    """Find the channels that depend on each other, rank them, and choose which go.

    Give one of ``ratio``, ``macs``, ``parameters``, ``latency``; ``ratios`` may stand alone.

    Args:
        program: A captured program; not changed.
        ratio: Share of all ranked channels to remove, 0 <= ratio < 1.
        importance: ``l1``, ``l2``, ``bn_scale``, ``taylor``, ``taylor_abs``, ``taylor_squared``, ``hessian``, ``hrank``,
            ``fpgm``, ``lamp``, ``activation``, ``random``, an `Importance`, or a function ``(slot, tensor) -> scores``.
        scope: ``"global"`` ranks the channels of all layers against each other, ``"local"`` those of each group.
        reduction: How the scores of all that goes with one channel become one: ``sum``, ``mean``, ``max``, ``norm``.
        normalize: What scores are divided by for the global ranking: ``mean`` of their group, ``macs`` or ``parameters``
            (the root of what one channel costs), or ``none``. By default the budget's own cost, ``mean`` without one.
        round_to: Channels that are left are a multiple of this; a layer with fewer is left alone. ``"target"``: what the
            kernels of the processor handle at once (16 with AVX-512, 8 with AVX2).
        ignore: Layers (globs) that keep all of their output channels.
        include: When given, only layers (globs) that may lose output channels.
        ratios: Layer or group (glob) -> share to remove, instead of the ranking's.
        macs: Share of the multiply-accumulates to keep, 0 < macs <= 1.
        parameters: Share of the parameters to keep, 0 < parameters <= 1.
        latency: Share of the latency on ``target`` to keep, 0 < latency <= 1; measured.
        target: Engine for ``latency``; by default the first that is installed.
        min_channels: Least number of channels (heads) that a group keeps.
        max_ratio: Largest share of a group that may go.
        attention: ``"heads"`` or ``"head_dim"``: whole heads go, or the width of all heads.
        width: Prune dimensions that a LayerNorm or RMSNorm runs over, too. The certificate then compares with a dense
            model whose statistics run over the kept channels.
        allow_outputs: The model's outputs may lose channels.
        example_inputs: When given, positional inputs that the program is run on once, to see that they fit.
        train: Batches for data-driven importance.
        loss: ``loss(output, batch) -> scalar`` for ``taylor`` and ``hessian``.
        seed: For ``random``.

    Raises:
        PruneError: a wrong ratio or name, nothing to prune, or a budget out of reach.
        UsageError: ``example_inputs`` do not fit the program.
    """
    options = request.checked(locals())
    if example_inputs is not None:
        with torch.no_grad(), evaluating(program.gm):
            program(*example_inputs)
    found = analyze(program, width=width, allow_outputs=allow_outputs)
    groups = find_groups(found, attention)
    per_group = request.ratios_by_group(found, groups, ratios or {}, program)
    allowed = request.allowed(found, groups, options["ignore"], options["include"], program)
    scores = _score(found, groups, importance, reduction, train, loss, seed)
    scored = request.scored(allowed, scores)
    rounded = request.roundable(scored, options["round_to"])
    selector = Selector(
        found, rounded, scores, scope, options["round_to"], min_channels, max_ratio, per_group, options["normalize"]
    )
    removed = _choose(selector, found, program, ratio, macs, parameters, latency, target)
    notes = request.notes(found, groups, allowed, rounded, options) + request.unscored(allowed, scored)
    return _plan(found, groups, removed, scores, options, notes)


def _choose(
    selector: Selector,
    found: Dependencies,
    program: Program,
    ratio: float | None,
    macs: float | None,
    parameters: float | None,
    latency: float | None,
    target: str | None,
) -> Bools:
    if macs is not None:
        return search(selector, found.macs, macs * count_macs(program), "macs")
    if parameters is not None:
        return search(selector, found.parameters, parameters * count_parameters(program), "parameters")
    if latency is not None:
        from fxcompress.prune.staircase import Staircase

        staircase = Staircase(found, target)
        return search(selector, staircase, latency * staircase.dense, "latency", steps=6)
    return selector.remove(ratio or 0.0)


def _score(
    found: Dependencies,
    groups: list[Group],
    spec: str | Importance | ImportanceFunction,
    reduction: str,
    train: Iterable[Any] | None,
    loss: Callable[[Any, Any], Tensor] | None,
    seed: int,
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Importance of every unit; 0 where no slot says anything."""
    criterion = importance(spec, seed=seed)
    wanted = {d for g in groups for d in g.dimensions}
    uses = [u for u in found.slots if u.dimension in wanted]
    criterion.prepare(found.program, [u.slot for u in uses], train, loss)
    named = {
        **dict(found.program.gm.named_parameters(remove_duplicate=False)),
        **dict(found.program.gm.named_buffers(remove_duplicate=False)),
    }
    pairs = []
    for use in uses:
        scores = criterion.score(use.slot, named[use.slot.tensor])
        if scores is not None:
            pairs += [(scores, torch.from_numpy(row)) for row in found.dimensions[use.dimension]]
    result: np.ndarray[Any, np.dtype[np.float64]] = reduce_scores(pairs, found.n_units, reduction).numpy()
    return result


def _plan(
    found: Dependencies,
    groups: list[Group],
    removed: Bools,
    scores: np.ndarray[Any, np.dtype[np.float64]],
    options: dict[str, Any],
    notes: list[str],
) -> PruningPlan:
    for group in groups:
        group.removed = int(removed[group.units].sum())
        group.importance = (
            float(np.nanmean(scores[group.units])) if not np.isnan(scores[group.units]).all() else math.nan
        )
    kept = [found.kept(i, removed) for i in range(len(found.dimensions))]
    counts = np.asarray([int(k.sum()) for k in kept], dtype=np.int64)
    edits: dict[str, dict[int, list[int]]] = {}
    for use in found.slots:
        if not kept[use.dimension].all():
            edits.setdefault(use.slot.tensor, {})[use.slot.dim] = np.flatnonzero(kept[use.dimension]).tolist()
    plan = PruningPlan(
        groups,
        _removed(found, kept),
        edits,
        (count_parameters(found.program), found.parameters(removed, counts)),
        (count_macs(found.program), round(found.macs(removed, counts))),
        notes,
        options,
    )
    plan._found, plan._units = found, removed
    return plan


def _removed(found: Dependencies, kept: list[Bools]) -> dict[str, tuple[int, ...]]:
    """Output channels that go, by layer; of parameters used without a layer, by their name."""
    gone: dict[str, tuple[int, ...]] = {}
    for node in found.program.graph.nodes:
        dim = found.flow.outputs.get(node.name)
        if node.op != "call_module" or dim is None:
            continue
        numbers = found.values[node.name]
        number = (numbers[0] if isinstance(numbers, list) else numbers)[dim]
        if number >= 0 and not kept[number].all():
            gone[str(node.target)] = tuple(np.flatnonzero(~kept[number]).tolist())
    for use in found.slots:
        alone = use.slot.layer == use.slot.tensor and use.slot.role == "out"
        if alone and not kept[use.dimension].all() and use.slot.tensor not in gone:
            gone[use.slot.tensor] = tuple(np.flatnonzero(~kept[use.dimension]).tolist())
    return gone


def _units_of(found: Dependencies, edits: Mapping[str, Mapping[int, Sequence[int]]]) -> Bools:
    """The units that ``edits`` remove from another capture of the same model.

    Raises:
        PruneError: the edits do not fit this program.
    """
    stays = np.zeros(found.n_units, dtype=np.bool_)
    goes = np.zeros(found.n_units, dtype=np.bool_)
    for use in found.slots:
        kept = edits.get(use.slot.tensor, {}).get(use.slot.dim)
        index = np.ones(use.slot.size, dtype=np.bool_)
        if kept is not None:
            index[:] = False
            index[[k for k in kept if k < use.slot.size]] = True
        for row in found.dimensions[use.dimension]:
            stays[row[index & (row != FREE)]] = True
            goes[row[~index & (row != FREE)]] = True
    removed: Bools = goes & ~stays
    uses = {(u.slot.tensor, u.slot.dim): u.dimension for u in found.slots}
    for name, dims in edits.items():
        for dim, kept in dims.items():
            number = uses.get((name, dim))
            if number is None or np.flatnonzero(found.kept(number, removed)).tolist() != list(kept):
                raise PruneError(2, "the plan does not fit this program", where=f"dimension {dim} of {name}")
    return removed
