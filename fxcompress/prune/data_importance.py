"""Importance measured on data: of the loss, and of feature maps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fxcompress.errors import PruneError
from fxcompress.ir import Program
from fxcompress.prune.criterion import Criterion, per_channel, wide
from fxcompress.prune.slots import Slot
from fxcompress.prune.statistics import Loss, dense, gradients, map_sources, parameter_names, visit_maps

__all__ = ["Activation", "Hessian", "Rank", "Taylor", "TaylorAbs", "TaylorSquared"]


# ------------------------------------------------------------------------------------------------ of the loss
class _Gradient(Criterion):
    """A criterion of weights and gradients, averaged over batches.

    Attributes:
        samples: Reading stops once this many samples were seen; None for all.
    """

    needs_data = True
    samples: int | None = 500

    def __init__(self) -> None:
        super().__init__()
        self._scores: dict[tuple[str, int], Tensor] = {}

    def _collect(self, program: Program, slots: Sequence[Slot], data: Iterable[Any] | None, loss: Loss | None) -> None:
        known = parameter_names(program)
        dims: dict[str, set[int]] = {}
        for slot in slots:
            if slot.tensor in known:
                dims.setdefault(slot.tensor, set()).add(slot.dim)
        if data is not None:
            batches = gradients(program, dims, data, loss, self.samples)
        else:
            batches = iter([_stored(known, dims)])
            if not any(p.grad is not None for p in known.values()):
                fix = "pass data (and loss), or call backward() on a loss of the program first"
                raise PruneError(47, f"gradients missing for {self.name}", why="no data, and no .grad is set", fix=fix)
        self._scores = {}
        count = 0
        for found in batches:
            count += 1
            for name, gradient in found.items():
                self._add(name, dims[name], known[name].detach(), gradient)
        for score in self._scores.values():
            score /= count

    def _add(self, name: str, dims: set[int], weight: Tensor, gradient: Tensor) -> None:
        values = self._element(weight, dense(gradient.detach()))
        for dim in dims:
            score = self._channel(per_channel(values, dim, lambda v: v))
            self._scores[name, dim] = self._scores.get((name, dim), torch.zeros_like(score)) + score

    @staticmethod
    @abstractmethod
    def _element(weight: Tensor, gradient: Tensor) -> Tensor:
        """Contribution of each weight to its channel."""

    @staticmethod
    def _channel(summed: Tensor) -> Tensor:
        """Score of a channel from the sum over its weights."""
        return summed

    def values(self, slot: Slot, tensor: Tensor) -> Tensor | None:
        return self._scores.get((slot.tensor, slot.dim))


def _stored(parameters: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """The gradients that an earlier ``backward`` left."""
    return {n: g for n in names if (g := parameters[n].grad) is not None}


class Taylor(_Gradient):
    """Change of the loss when the channel is set to zero, to first order: ``|sum w * g|``, mean over the batches.

    Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", summed before the magnitude
    is taken: weights of a channel that pull against each other cancel.
    """

    name = "taylor"

    @staticmethod
    def _element(weight: Tensor, gradient: Tensor) -> Tensor:
        return wide(weight) * wide(gradient)

    @staticmethod
    def _channel(summed: Tensor) -> Tensor:
        return summed.abs()


class TaylorAbs(_Gradient):
    """``sum |w * g|``, mean over the batches: nothing cancels."""

    name = "taylor_abs"

    @staticmethod
    def _element(weight: Tensor, gradient: Tensor) -> Tensor:
        return (wide(weight) * wide(gradient)).abs()


class TaylorSquared(Taylor):
    """``(sum w * g)^2``, mean over the batches (Molchanov et al. 2019, for a gate on the channel)."""

    name = "taylor_squared"

    @staticmethod
    def _channel(summed: Tensor) -> Tensor:
        return summed.square()


class Hessian(_Gradient):
    """Rise of the loss when the channel is set to zero, to second order: ``sum 1/2 H_ii w_i^2``.

    LeCun et al. 1990, "Optimal Brain Damage". The diagonal of the Hessian is the empirical Fisher
    information, the mean of ``g_i^2`` over the batches; with batches of one sample it is exact.
    """

    name = "hessian"

    @staticmethod
    def _element(weight: Tensor, gradient: Tensor) -> Tensor:
        return 0.5 * (wide(weight) * wide(gradient)).square()


# ------------------------------------------------------------------------------------------------ of feature maps
class _Maps(Criterion):
    """A criterion of feature maps, averaged over samples.

    Attributes:
        samples: Reading stops once this many samples were seen; None for all.
    """

    needs_data = True
    samples: int | None = 500

    def __init__(self) -> None:
        super().__init__()
        self._sources: dict[str, tuple[str, int]] = {}
        self._sums: dict[tuple[str, int], Tensor] = {}
        self._counts: dict[tuple[str, int], int] = {}

    def _collect(self, program: Program, slots: Sequence[Slot], data: Iterable[Any] | None, loss: Loss | None) -> None:
        del loss
        if data is None:
            raise PruneError(51, f"{self.name} needs data", fix="pass an iterable of input batches")
        self._sums, self._counts = {}, {}
        self._sources = map_sources(program, (s.node for s in slots if s.role == "out"))
        visit_maps(program, data, self._sources.values(), self._visit, self.samples)
        if not self._sums:
            fix = 'use another importance, for example "l2"'
            raise PruneError(52, f"there are no feature maps that {self.name} can use", fix=fix)

    def _visit(self, source: tuple[str, int], maps: Tensor) -> None:
        """Add the maps [channels, samples, positions ...] of a node."""
        found = self._measure(maps)
        if found is not None:
            self._sums[source] = self._sums.get(source, torch.zeros_like(found)) + found
            self._counts[source] = self._counts.get(source, 0) + maps.shape[1]

    @abstractmethod
    def _measure(self, maps: Tensor) -> Tensor | None:
        """Sum over the samples of the measure, float64 [channels]; None when these maps have none."""

    def values(self, slot: Slot, tensor: Tensor) -> Tensor | None:
        source = self._sources.get(slot.node)
        if slot.role != "out" or source is None or source not in self._sums or self._sums[source].shape != (slot.size,):
            return None
        return self._sums[source] / self._counts[source]


class Rank(_Maps):
    """Average rank of a channel's feature maps (Lin et al. 2020, "HRank").

    A map is the matrix of the last position dimension against the others. Where a sample has one position dimension
    only (sequences), the matrix of samples against positions takes its place; one value a sample has no rank.
    """

    name = "hrank"

    def _measure(self, maps: Tensor) -> Tensor | None:
        if maps.shape[2:].numel() == 1:
            return None
        values = wide(maps)
        if maps.dim() == 3:
            return cast(Tensor, torch.linalg.matrix_rank(values)).double() * maps.shape[1]
        return cast(Tensor, torch.linalg.matrix_rank(values.flatten(2, -2))).sum(1, dtype=torch.float64)


class Activation(_Maps):
    """Mean magnitude of a channel's feature maps (Molchanov et al. 2017, "Pruning Convolutional Neural Networks")."""

    name = "activation"

    def _measure(self, maps: Tensor) -> Tensor | None:
        return maps.abs().flatten(1).mean(1, dtype=torch.float64) * maps.shape[1]
