"""What an importance criterion is, and what the built-in ones share."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxcompress.errors import PruneError
from fxcompress.ir import Program
from fxcompress.prune.slots import Slot
from fxcompress.prune.statistics import Loss, parameter_names

__all__ = ["Criterion", "Importance", "per_channel", "wide"]


class Importance(ABC):
    """A criterion. Subclasses implement `score`, and `prepare` when they need data.

    What `score` returns is checked and handed on as float64 on the CPU, in subclasses of users too.

    Attributes:
        name: What users call it.
        needs_data: `prepare` wants batches.
    """

    name: ClassVar[str] = "user"
    needs_data: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "score" in cls.__dict__:
            type.__setattr__(cls, "score", _checked(cls.__dict__["score"]))

    def prepare(
        self, program: Program, slots: Sequence[Slot], data: Iterable[Any] | None = None, loss: Loss | None = None
    ) -> None:
        """Collect once what `score` needs; the program is left untouched.

        Args:
            program: The program to prune.
            slots: All slots that will be scored.
            data: Iterable of batches (see ``fxcompress.data``), or None.
            loss: ``loss(output, batch) -> scalar``, or None.
        """
        del program, slots, data, loss

    @abstractmethod
    def score(self, slot: Slot, tensor: Tensor) -> Tensor | None:
        """Scores of one slot: the lower, the less the channel matters.

        Args:
            slot: Which dimension of which tensor.
            tensor: Its values.

        Returns:
            Float64 [slot.size], or None when this slot says nothing about its channels.

        Raises:
            PruneError: the scores are not finite or not of that shape.
        """


def _checked(score: Callable[[Any, Slot, Tensor], Any]) -> Callable[[Any, Slot, Tensor], Tensor | None]:
    """``score`` with its result checked."""

    @functools.wraps(score)
    def checked(self: Any, slot: Slot, tensor: Tensor) -> Tensor | None:
        found = score(self, slot, tensor)
        if found is None:
            return None
        where = f"dimension {slot.dim} of {slot.tensor}"
        if not isinstance(found, Tensor) or found.shape != (slot.size,) or found.is_complex():
            got = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            why = f"expected a real tensor of shape [{slot.size}], got {got}"
            fix = "return one score per index of the slot, or None"
            raise PruneError(44, "an importance has the wrong form", where=where, why=why, fix=fix)
        found = found.detach().to("cpu", torch.float64)
        if not bool(found.isfinite().all()):
            fix = "check the weights, and the data and loss where they are used"
            raise PruneError(45, "an importance is NaN or infinite", where=where, fix=fix)
        return found

    return checked


class Criterion(Importance):
    """A criterion that speaks about floating-point parameters only: buffers and integers follow the rest."""

    def __init__(self) -> None:
        self._parameters: frozenset[str] | None = None

    def prepare(
        self, program: Program, slots: Sequence[Slot], data: Iterable[Any] | None = None, loss: Loss | None = None
    ) -> None:
        self._parameters = None  # stays so when collecting fails
        self._collect(program, slots, data, loss)
        self._parameters = frozenset(parameter_names(program))

    def _collect(self, program: Program, slots: Sequence[Slot], data: Iterable[Any] | None, loss: Loss | None) -> None:
        """Collect what `values` needs."""

    def score(self, slot: Slot, tensor: Tensor) -> Tensor | None:
        if self._parameters is None:
            raise PruneError(
                53, "the importance was not prepared", fix="call prepare(program, slots, data, loss) first"
            )
        if slot.tensor not in self._parameters or not tensor.is_floating_point():
            return None
        return self.values(slot, tensor.detach())

    @abstractmethod
    def values(self, slot: Slot, tensor: Tensor) -> Tensor | None:
        """Scores of a floating-point parameter."""


def per_channel(tensor: Tensor, dim: int, value: Callable[[Tensor], Tensor]) -> Tensor:
    """Sum of ``value(tensor)`` over all dimensions but one, float64 [size].

    Float32 is summed in float32 (PyTorch adds pairwise: an error of 2e-7), which is four times as fast as float64; what
    overflows is summed again in float64.
    """
    exact = wide(tensor)
    summed = _sum(value(exact), dim)
    if exact.dtype is torch.float32 and not bool(summed.isfinite().all()):
        summed = _sum(value(exact.double()), dim)
    return summed


def _sum(values: Tensor, dim: int) -> Tensor:
    shape = values.shape
    parts = values.reshape(shape[:dim].numel(), shape[dim], shape[dim + 1 :].numel())
    rows = parts.sum(0) if parts.shape[0] > 1 else parts[0]
    return rows.sum(1).double()


def wide(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor.float() if tensor.element_size() < 4 else tensor
