"""What `fine_tune` is given: checked, and made into an optimizer and a scheduler."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR

from fxcompress.errors import PassError, UsageError
from fxcompress.ir import Program
from fxcompress.prune.statistics import Loss, default_loss

__all__ = [
    "ByEpoch",
    "Callback",
    "MakeOptimizer",
    "MakeScheduler",
    "Model",
    "Stateful",
    "check_arguments",
    "check_callbacks",
    "checked_loss",
    "make_loss",
    "make_optimizer",
    "make_scheduler",
]

Model = Program | nn.Module
MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]
MakeScheduler = Callable[[Optimizer], LRScheduler]
_NAMED = ("cosine", "one_cycle")
_RATE = 1e-3


class Callback(Protocol):
    """What `fine_tune` calls behind every optimizer step.

    A callback with ``begin_epoch(number)`` is called before each epoch too, counted from 0, whether or not the run was
    resumed. A callback with ``state_dict()`` and ``load_state_dict(state, optimizer)`` is written into checkpoints; the latter may
    return the program too. One with an attribute ``finished`` says when it stops changing the model, one with
    ``schedule`` (a pruning schedule) when it will.
    """

    def step(self, optimizer: Optimizer) -> Any:
        """Called after each optimizer step; a program that it returns is trained from then on."""


@runtime_checkable
class ByEpoch(Protocol):
    """A callback that is told when an epoch begins."""

    def begin_epoch(self, number: int, /) -> Any: ...


@runtime_checkable
class Stateful(Protocol):
    """A callback that goes into checkpoints."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any], optimizer: Optimizer, /) -> Any: ...


def check_arguments(model: Any, train: Any, epochs: Any, scheduler: Any, interval: str) -> None:
    """Raises UsageError for what cannot be trained, read or understood."""
    if not isinstance(model, Program | nn.Module):
        raise UsageError(301, f"a {type(model).__name__} cannot be trained", fix="pass a Program or an nn.Module")
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise UsageError(302, f"epochs must be a positive integer, not {epochs!r}")
    if isinstance(train, Tensor | Mapping | str) or not hasattr(train, "__iter__"):
        what = f"training data must be an iterable of batches, not {type(train).__name__}"
        raise UsageError(303, what, fix="pass a DataLoader, or [batch] for a single batch")
    if isinstance(train, Iterator) and epochs > 1:
        fix = "pass a DataLoader or a list"
        raise UsageError(304, "the training data can be read only once", why=f"there are {epochs} epochs", fix=fix)
    if interval not in ("step", "epoch"):
        raise UsageError(305, f"unknown scheduler_interval {interval!r}", fix='use "step" or "epoch"')
    if isinstance(scheduler, str) and scheduler not in _NAMED:
        fix = f"use one of {', '.join(map(repr, _NAMED))}, or give a scheduler"
        raise UsageError(300, f"unknown scheduler {scheduler!r}", fix=fix)


def check_callbacks(model: Any, train: Any, epochs: int, callbacks: Sequence[Callback]) -> None:
    """Raises UsageError for callbacks that prune something else, or later than training lasts."""
    pruners = [c for c in callbacks if isinstance(getattr(c, "program", None), Program)]
    if len(pruners) > 1:
        raise UsageError(307, "two callbacks prune one program", fix="give one PruningCallback")
    if pruners and getattr(pruners[0], "program", None) is not model:
        raise UsageError(308, "the callback prunes another program", fix="make it with the program that is trained")
    if pruners and any(hasattr(c, "masks") for c in callbacks):
        why = "masks belong to the parameters as they are, and those change when channels go"
        raise UsageError(315, "channels and single weights cannot go in one run", why=why, fix="do one, then the other")
    steps = len(train) * epochs if hasattr(train, "__len__") else None
    for callback in callbacks:
        last = getattr(getattr(callback, "schedule", None), "end", 0)
        if steps is not None and last >= steps:
            what = f"the schedule ends at step {last}, training after {steps} steps"
            raise UsageError(309, what, fix=f"give a schedule with end < {steps}, or more epochs")


def make_optimizer(module: nn.Module, given: Optimizer | MakeOptimizer | None, lr: float | None) -> Optimizer:
    """The optimizer given or made, AdamW by default. Raises UsageError when it does not train ``module``."""
    if given is not None and lr is not None:
        raise UsageError(310, "lr is given and so is an optimizer", fix="set the rate in the optimizer")
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        raise UsageError(311, "the model has no parameter that can be trained", fix="check requires_grad")
    if given is None:
        return torch.optim.AdamW(parameters, lr=_RATE if lr is None else lr)
    made = given if isinstance(given, Optimizer) else given(parameters)
    own = {id(p) for p in module.parameters()}
    if not any(id(p) in own for group in made.param_groups for p in group["params"]):
        raise UsageError(312, "the optimizer holds no parameter of the model", fix="make it with model.parameters()")
    return made


def make_scheduler(
    optimizer: Optimizer, given: LRScheduler | MakeScheduler | str | None, train: Any, epochs: int
) -> LRScheduler | None:
    """The scheduler given or made. Raises UsageError when it drives another optimizer or its length is not known."""
    if isinstance(given, str):
        if not hasattr(train, "__len__"):
            fix = "give a scheduler, or data with a length"
            raise UsageError(313, f"the {given} scheduler needs to know the number of steps", fix=fix)
        steps = len(train) * epochs
        if given == "cosine":
            return CosineAnnealingLR(optimizer, steps)
        return OneCycleLR(optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=steps)
    made = given(optimizer) if given is not None and not isinstance(given, LRScheduler) else given
    if made is not None and getattr(made, "optimizer", None) is not optimizer:
        raise UsageError(314, "the scheduler drives another optimizer", fix="make it with the optimizer given here")
    return made


def make_loss(model: Model, given: Loss | None) -> Loss:
    """The loss given; by default the output's own loss, or the cross-entropy with the label."""
    if given is not None:
        return given
    cross_entropy = default_loss(model) if isinstance(model, Program) else _module_cross_entropy

    def loss(output: Any, batch: Any) -> Tensor:
        own = output.get("loss") if isinstance(output, Mapping) else None
        return own if isinstance(own, Tensor) else cross_entropy(output, batch)

    return loss


def _module_cross_entropy(output: Any, batch: Any) -> Tensor:
    label = batch[-1] if isinstance(batch, list | tuple) and len(batch) > 1 else None
    if not isinstance(output, Tensor) or not isinstance(label, Tensor) or label.is_floating_point():
        why = "the model must give one tensor and the batches an integer label behind the inputs"
        fix = "pass loss=, a function loss(output, batch) -> scalar"
        raise UsageError(316, "there is no default loss for this model and data", why=why, fix=fix)
    return F.cross_entropy(output, label)


def checked_loss(value: Any, where: str, rate: float) -> float:
    """The loss as a number. Raises UsageError when it is no scalar to differentiate, PassError when it is not finite."""
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        got = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        fix = "return one differentiable number from loss(output, batch)"
        raise UsageError(317, f"the loss must be a differentiable scalar, not {got}", where=where, fix=fix)
    number = value.item()
    if not math.isfinite(number):
        fix = f"lower the learning rate (now {rate:g}), or check the data and the labels"
        raise PassError(300, f"the training loss is {number}", where=where, fix=fix)
    return float(number)
