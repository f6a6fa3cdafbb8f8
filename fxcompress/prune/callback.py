"""Pruning while a network trains: one line in any training loop.

    pruner = PruningCallback(program, CubicSchedule(0.5, end=2000, every=100), importance="taylor", train=loader)
    for batch, labels in loader:
        loss = cross_entropy(program(batch), labels)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        program = pruner.step(optimizer)

A program that loses channels becomes another program with other parameters. The callback hands it over and puts the new
parameters, with the kept rows of the optimizer's state, where the old ones were.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer

from fxcompress.analysis import count_macs, count_parameters
from fxcompress.errors import PruneError
from fxcompress.ir import Program
from fxcompress.prune import request
from fxcompress.prune.dependencies import analyze
from fxcompress.prune.groups import find_groups
from fxcompress.prune.optimizer import move_optimizer
from fxcompress.prune.plan import PruningPlan, plan_pruning
from fxcompress.prune.schedule import Schedule
from fxcompress.sparse.api import sparsify
from fxcompress.sparse.masks import SparsityMasks

__all__ = ["Masks", "PruningCallback", "SparsityCallback"]

_AMOUNTS = ("channels", "macs", "parameters")
_SCHEDULED = ("ratio", "ratios", "macs", "parameters", "latency")
_EPSILON = 1e-9


class Masks(Protocol):
    """Masks on weights, as `SparsityCallback` drives them."""

    def set_sparsity(self, sparsity: float) -> Any:
        """Make new masks that hide this share of the weights."""

    def apply(self) -> Any:
        """Put zeros where the masks say."""


class _Scheduled:
    """Counts the steps of the training loop.

    Attributes:
        schedule: When to prune how much.
        steps: Calls of ``step`` so far; the first call is step 0 of the schedule.
        history: One entry for each pruning, JSON-ready.
    """

    def __init__(self, schedule: Schedule) -> None:
        if not isinstance(schedule, Schedule):
            what = f"{type(schedule).__name__} is no pruning schedule"
            raise PruneError(320, what, fix='make one with make_schedule("cubic", 0.5, end=1000)')
        self.schedule = schedule
        self.steps = 0
        self.history: list[dict[str, Any]] = []

    @property
    def finished(self) -> bool:
        """True when the schedule asks for no further pruning."""
        return self.steps > 0 and self.schedule.finished(self.steps - 1)

    def _due(self) -> float | None:
        """Counts a step; the share that has to be gone at it, or None when nothing is to be done."""
        step, self.steps = self.steps, self.steps + 1
        return self.schedule.sparsity(step) if self.schedule.should_prune(step) else None

    def state_dict(self) -> dict[str, Any]:
        """Where the callback stands, JSON-ready."""
        return {"schedule": self.schedule.state_dict(), "steps": self.steps, "history": self.history}

    def _restore(self, state: Mapping[str, Any]) -> None:
        try:
            schedule, steps, history = state["schedule"], int(state["steps"]), [dict(h) for h in state["history"]]
        except (KeyError, TypeError, ValueError) as error:
            why = f"{type(error).__name__}: {error}"
            raise PruneError(321, "this is not the state of a pruning callback", why=why) from error
        self.schedule.load_state_dict(schedule)
        self.steps, self.history = steps, history


class _OwnMasks:
    """Masks that `sparsify` makes anew of the present weights; what is zero is taken first, so it stays zero."""

    def __init__(self, model: Program | nn.Module, options: Mapping[str, Any]) -> None:
        _check_options(sparsify, options, ("sparsity", "pattern"))
        self._module = model.gm if isinstance(model, Program) else model  # in place: optimizers hold its parameters
        self._options = dict(options)
        self._masks: SparsityMasks | None = None

    def set_sparsity(self, sparsity: float) -> None:
        self._masks = sparsify(self._module, sparsity, **self._options)

    def apply(self) -> None:
        if self._masks is not None:
            self._masks.apply()

    def state_dict(self) -> dict[str, Any]:
        return {} if self._masks is None else self._masks.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._masks = SparsityMasks.from_state_dict(self._module, state) if state else None


class SparsityCallback(_Scheduled):
    """Sets single weights to zero by a schedule and keeps them so; call it behind every optimizer step.

    Args:
        model: The program or module in training; its weights are changed in place. Or masks of your own: an object with
            ``set_sparsity(share)``, called when the schedule says so, and ``apply()``, called at every step.
        schedule: Share of the weights to set to zero at which step.
        **options: Further arguments of ``sparsify``: ``method``, ``scope``, ``include``, ``ignore``, ``calibration``, …

    Attributes:
        masks: The masks.

    Raises:
        PruneError: an option ``sparsify`` does not have or the schedule decides.
    """

    def __init__(self, model: Program | nn.Module | Masks, schedule: Schedule, **options: Any) -> None:
        super().__init__(schedule)
        if not isinstance(model, Program | nn.Module) and options:
            raise PruneError(328, f"masks of your own take no {next(iter(options))}=", fix="give it to the masks")
        self.masks: Masks = _OwnMasks(model, options) if isinstance(model, Program | nn.Module) else model

    def step(self, *optimizers: Optimizer) -> None:
        """One step of the training loop; ``optimizers`` are not needed and stay as they are."""
        share = self._due()
        if share is not None:
            self.masks.set_sparsity(share)
            self.history.append({"step": self.steps - 1, "target": share})
        self.masks.apply()

    def state_dict(self) -> dict[str, Any]:
        """Where the callback stands, with the state of the masks (tensors) where they have one."""
        own = getattr(self.masks, "state_dict", None)
        return super().state_dict() | ({"masks": own()} if own is not None else {})

    def load_state_dict(self, state: Mapping[str, Any], *optimizers: Optimizer) -> None:
        """Go on where ``state`` stood; load the weights too.

        Raises:
            PruneError: the state is not one of this callback, schedule and model.
        """
        self._restore(state)
        own = getattr(self.masks, "load_state_dict", None)
        if own is not None and "masks" in state:
            own(state["masks"])
        elif self.history:
            self.masks.set_sparsity(float(self.history[-1]["target"]))


class PruningCallback(_Scheduled):
    """Removes channels of a program while it trains; call it behind every optimizer step.

    Each pruning is planned on the program as it stands, with its present weights, and certified. What earlier prunings
    left over or took too much (whole channels go, ``round_to`` may coarsen) is made up by the next.

    Args:
        program: The dense program.
        schedule: Share to remove at which step.
        amount: What the share counts: ``"channels"`` (as ``ratio`` does), ``"macs"`` or ``"parameters"`` of the dense
            program.
        certify: Compare each smaller program with the larger one, channels masked, before training goes on.
        **options: Further arguments of ``plan_pruning``: ``importance``, ``ignore``, ``round_to``, ``train``, …

    Attributes:
        program: The program as it stands.
        plans: The plans applied so far.

    Raises:
        PruneError: a wrong amount, or an option ``plan_pruning`` does not have or the schedule decides.
    """

    def __init__(
        self,
        program: Program,
        schedule: Schedule,
        *,
        amount: str = "channels",
        certify: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(schedule)
        if amount not in _AMOUNTS:
            what = f"a schedule cannot count {amount!r}"
            raise PruneError(322, what, fix=f"use one of {', '.join(map(repr, _AMOUNTS))}")
        _check_options(plan_pruning, options, _SCHEDULED)
        self.program = program
        self.amount = amount
        self.plans: list[PruningPlan] = []
        self._certify = certify
        self._options = options
        self._gone = 0
        self._dense = _ranked_units(program, options) if amount == "channels" else self._size()

    def step(self, *optimizers: Optimizer) -> Program:
        """One step of the training loop.

        Args:
            *optimizers: Those that train the program; they go on with the smaller parameters. Gradients of removed
                parameters are lost, so call this behind the optimizer's step.

        Returns:
            The program to train from now on: a new one when channels went, else the same.

        Raises:
            PruneError: nothing can be planned, or an optimizer's state does not fit.
            CertificateError: the smaller program computes something else.
        """
        share = self._due()
        if share is not None:
            self._prune(share, optimizers)
        return self.program

    def _prune(self, share: float, optimizers: Sequence[Optimizer]) -> None:
        entry = {"step": self.steps - 1, "target": share}
        budget = self._budget(share)
        if budget is not None:
            plan = plan_pruning(self.program, **budget, **self._options)
            self._apply(plan, optimizers, certify=self._certify)
            self._gone += sum(group.removed for group in plan.groups)
        self.history.append(entry | {"reached": self.reached(), "parameters": count_parameters(self.program)})

    def _apply(self, plan: PruningPlan, optimizers: Sequence[Optimizer], *, certify: bool) -> None:
        pruned = plan.apply(self.program)
        if certify:
            plan.certify(self.program, pruned)
        for optimizer in optimizers:
            move_optimizer(optimizer, self.program.gm, pruned.gm, plan.edits)
        self.program = pruned
        self.plans.append(plan)

    def _budget(self, share: float) -> dict[str, Any] | None:
        """What to ask of ``plan_pruning`` for the present program; None when enough is gone already."""
        if self.amount == "channels":
            left = 1.0 - self.reached()
            ratio = 1.0 - (1.0 - share) / left
            return {"ratio": ratio} if ratio > _EPSILON else None
        keep = (1.0 - share) * self._dense / self._size()
        return {self.amount: keep} if keep < 1.0 - _EPSILON else None

    def _size(self) -> int:
        return {"macs": count_macs, "parameters": count_parameters}.get(self.amount, lambda _: 0)(self.program)

    def reached(self) -> float:
        """Share of the dense program that is gone, in what the schedule counts."""
        if self.amount != "channels":
            return 1.0 - self._size() / self._dense
        return self._gone / self._dense

    def state_dict(self) -> dict[str, Any]:
        """Where the callback stands, JSON-ready: the plans say what the program looks like, the weights are not in it."""
        plans = [plan.to_dict() for plan in self.plans]
        return super().state_dict() | {"amount": self.amount, "gone": self._gone, "plans": plans}

    def load_state_dict(self, state: Mapping[str, Any], *optimizers: Optimizer) -> Program:
        """Prune the dense program as it was pruned before and go on from there.

        Args:
            state: What ``state_dict`` gave.
            *optimizers: Those that train the program.

        Returns:
            The program with the shapes it had; load its weights, then the optimizers' state.

        Raises:
            PruneError: this callback has pruned already, or the state is not one of this callback and schedule.
        """
        if self.plans:
            what = "a callback that has pruned cannot take over a state"
            raise PruneError(323, what, fix="make a new one with the dense program")
        if state.get("amount") != self.amount:
            what = f"the state counts {state.get('amount')!r}, this callback {self.amount!r}"
            raise PruneError(324, what, fix=f"give amount={state.get('amount')!r}")
        self._restore(state)
        for saved in state.get("plans", ()):
            self._apply(PruningPlan.from_dict(saved), optimizers, certify=False)
        self._gone = int(state.get("gone", 0))
        return self.program


def _ranked_units(program: Program, options: Mapping[str, Any]) -> int:
    """Units that ``plan_pruning`` ranks with these options: what its ``ratio`` is a share of."""
    defaults = {n: p.default for n, p in inspect.signature(plan_pruning).parameters.items()} | dict(options)
    found = analyze(program, width=defaults["width"], allow_outputs=defaults["allow_outputs"])
    groups = find_groups(found, defaults["attention"])
    free = request.allowed(found, groups, defaults["ignore"], defaults["include"], program)
    return sum(group.size for group in request.roundable(free, int(request.multiple(defaults["round_to"]))))


def _check_options(function: Callable[..., Any], options: Mapping[str, Any], scheduled: Sequence[str]) -> None:
    taken = [name for name in scheduled if name in options]
    if taken:
        what = f"the schedule decides how much goes, so {taken[0]}= cannot be given"
        raise PruneError(325, what, fix="give the share as the schedule's final one")
    known = list(inspect.signature(function).parameters)[1:]
    unknown = [name for name in options if name not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        fix = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
        raise PruneError(326, f"{function.__name__} has no option {unknown[0]}", fix=fix)
