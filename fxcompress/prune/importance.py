"""Importance of channels: which of them a network misses least.

A criterion scores the indices of one slot (one dimension of one tensor); `reduce_scores` joins the scores of all slots
that must lose the same channels.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import LongTensor, Tensor, nn

from fxcompress.errors import PruneError
from fxcompress.ir import Program
from fxcompress.prune.criterion import Criterion, Importance, per_channel
from fxcompress.prune.data_importance import Activation, Hessian, Rank, Taylor, TaylorAbs, TaylorSquared
from fxcompress.prune.slots import Slot
from fxcompress.prune.statistics import Loss, parameter_names

__all__ = ["REDUCTIONS", "Importance", "ImportanceFunction", "criteria", "importance", "reduce_scores"]

#: A user's criterion: scores [slot.size] of the indices of a slot, or None when the slot says nothing.
ImportanceFunction = Callable[[Slot, Tensor], Tensor | None]

#: How the scores of one unit become one.
REDUCTIONS = ("mean", "max", "sum", "norm")

_NORMS: tuple[type[nn.Module], ...] = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm),
    *(nn.LayerNorm, nn.RMSNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)


class _Function(Criterion):
    """A user's function."""

    name = "function"

    def __init__(self, function: ImportanceFunction) -> None:
        super().__init__()
        self.function = function

    def values(self, slot: Slot, tensor: Tensor) -> Tensor | None:
        return self.function(slot, tensor)


class _L1(Criterion):
    """Sum of the magnitudes of all a channel holds (Li et al. 2017, "Pruning Filters for Efficient ConvNets")."""

    name = "l1"

    def values(self, slot: Slot, tensor: Tensor) -> Tensor | None:
        return per_channel(tensor, slot.dim, torch.abs)


class _L2(Criterion):
    """Euclidean norm of all a channel holds."""

    name = "l2"

    def values(self, slot: Slot, tensor: Tensor) -> Tensor | None:
        return per_channel(tensor, slot.dim, torch.square).sqrt()


class _BatchNormScale(Criterion):
    """Magnitude of the scale of the norm behind a channel (Liu et al. 2017, "Network Slimming")."""

    name = "bn_scale"

    def __init__(self) -> None:
        super().__init__()
        self._scales: set[str] = set()

    def _collect(self, program: Program, slots: Sequence[Slot], data: Iterable[Any] | None, loss: Loss | None) -> None:
        known = parameter_names(program)
        layers = dict(program.gm.named_modules(remove_duplicate=False))
        norms = [(s, layers[s.layer]) for s in slots if isinstance(layers.get(s.layer), _NORMS)]
        self._scales = {s.tensor for s, m in norms if s.tensor in known and known[s.tensor] is m.weight}
        if not self._scales:
            why = "no prunable channel is scaled by a BatchNorm, GroupNorm, InstanceNorm, LayerNorm or RMSNorm layer"
            fix = 'use another importance, for example "l2"'
            raise PruneError(46, "bn_scale needs norms with a scale", why=why, fix=fix)

    def values(self, slot: Slot, tensor: Tensor) -> Tensor | None:
        return tensor.abs() if slot.role == "out" and slot.tensor in self._scales else None


class _GeometricMedian(Criterion):
    """Sum of the distances to the other filters of the layer: one near the median can be made of the others.

    He et al. 2019, "Filter Pruning via Geometric Median". Weights of the producing layer only.
    """

    name = "fpgm"

    def values(self, slot: Slot, tensor: Tensor) -> Tensor | None:
        if slot.role != "out" or tensor.dim() < 2:
            return None
        filters = tensor.movedim(slot.dim, 0).flatten(1).double()
        filters = filters - filters.mean(0)  # distances stay, rounding shrinks
        return torch.cdist(filters, filters).fill_diagonal_(0.0).sum(1)


class _Lamp(Criterion):
    """Squared norm of a channel over the sum of those that are not smaller, within its tensor (1 for the largest).

    Lee et al. 2021, "Layer-adaptive Sparsity for the Magnitude-based Pruning", on channels in place of
    single weights. Weights only.
    """

    name = "lamp"

    def values(self, slot: Slot, tensor: Tensor) -> Tensor | None:
        if tensor.dim() < 2:
            return None
        squares = per_channel(tensor, slot.dim, torch.square)
        ordered = squares.sort().values
        remaining = ordered.flip(0).cumsum(0).flip(0)[torch.searchsorted(ordered, squares)]
        return torch.where(squares > 0, squares / remaining, 0.0)


class _Random(Criterion):
    """Uniform in [0, 1), the same for the same seed and slot."""

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed

    def values(self, slot: Slot, tensor: Tensor) -> Tensor | None:
        digest = hashlib.sha256(f"{self.seed}:{slot.tensor}:{slot.dim}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.rand(slot.size, dtype=torch.float64, generator=generator)


# ------------------------------------------------------------------------------------------------ by name, reductions
_CLASSES: tuple[type[Criterion], ...] = (
    *(_L1, _L2, _BatchNormScale, Taylor, TaylorAbs, TaylorSquared, Hessian),
    *(Rank, _GeometricMedian, _Lamp, Activation, _Random),
)
_BY_NAME = {kind.name: kind for kind in _CLASSES}


def criteria() -> list[str]:
    """Names of the criteria."""
    return list(_BY_NAME)


def importance(spec: str | Importance | ImportanceFunction, *, seed: int = 0) -> Importance:
    """The criterion of a name, an `Importance`, or a function ``(slot, tensor) -> scores or None``.

    Args:
        spec: Name (see `criteria`), criterion or function.
        seed: For ``random``.

    Raises:
        PruneError: there is no such criterion.
    """
    if isinstance(spec, Importance):
        return spec
    if isinstance(spec, str):
        if spec not in _BY_NAME:
            raise PruneError(41, f"unknown importance {spec!r}", fix=_nearest(spec, criteria()))
        return _Random(seed) if spec == _Random.name else _BY_NAME[spec]()
    if callable(spec) and not isinstance(spec, type):
        return _Function(spec)
    got = f"class {spec.__name__}" if isinstance(spec, type) else type(spec).__name__
    fix = "give a name, an instance of Importance, or a function (slot, tensor) -> scores"
    raise PruneError(42, f"an importance cannot be made of a {got}", fix=fix)


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else f"known: {', '.join(known)}"


def reduce_scores(per_slot: Sequence[tuple[Tensor, LongTensor | Tensor]], n_units: int, reduction: str) -> Tensor:
    """One score per unit from the scores of every index of every slot that it occurs in.

    Args:
        per_slot: Pairs of scores [size] (real) and the unit of each index [size] (int64; -1: not prunable).
        n_units: Number of units.
        reduction: ``mean``, ``max``, ``sum`` or ``norm`` (Euclidean).

    Returns:
        Float64 [n_units]; NaN for a unit that no slot says anything about.

    Raises:
        PruneError: unknown reduction.
    """
    if reduction not in REDUCTIONS:
        raise PruneError(43, f"unknown reduction {reduction!r}", fix=_nearest(reduction, REDUCTIONS))
    unknown = torch.full((n_units,), torch.nan, dtype=torch.float64)
    if not per_slot:
        return unknown
    scores = torch.cat([s.to("cpu", torch.float64) for s, _ in per_slot])
    units = torch.cat([u.to("cpu") for _, u in per_slot])
    scores, units = scores[units >= 0], units[units >= 0]
    if reduction == "max":
        return unknown.scatter_reduce(0, units, scores, "amax", include_self=False)
    values = scores.square() if reduction == "norm" else scores
    summed = torch.zeros_like(unknown).index_add_(0, units, values)
    counts = torch.bincount(units, minlength=n_units)
    result = {"mean": summed / counts, "sum": summed, "norm": summed.sqrt()}[reduction]
    return torch.where(counts > 0, result, unknown)
