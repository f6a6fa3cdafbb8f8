"""Fine-tuning for who has no training loop: a progress bar, a scheduler, callbacks, checkpoints to resume from."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils import _pytree as pytree

from fxcompress import checkpoint as checkpoints
from fxcompress.data import all_finite, as_call
from fxcompress.errors import ArtifactError, CalibrationError, PassError, UsageError
from fxcompress.ir import Program
from fxcompress.prune.statistics import Loss
from fxcompress.train_arguments import (
    ByEpoch,
    Callback,
    MakeOptimizer,
    MakeScheduler,
    Model,
    Stateful,
    check_arguments,
    check_callbacks,
    checked_loss,
    make_loss,
    make_optimizer,
    make_scheduler,
)
from fxcompress.train_parallel import Processes
from fxcompress.train_progress import reporting

__all__ = ["Callback", "EpochRecord", "History", "fine_tune"]


@dataclass(frozen=True)
class EpochRecord:
    """One epoch.

    Attributes:
        epoch: Its number, from 0.
        loss: Mean over the samples.
        score: What ``evaluate`` gave, or None.
        lr: Learning rate of the first parameter group at its end.
        samples: Samples seen.
        seconds: Wall time, ``evaluate`` included.
    """

    epoch: int
    loss: float
    score: float | None
    lr: float
    samples: int
    seconds: float


@dataclass
class History:
    """What a training run did.

    Attributes:
        model: What was trained. Callbacks that prune make a new program: use this one.
        epochs: One record per epoch, those before a resume included.
        best: Epoch with the highest score since the last change of the model's structure, or None.
        resumed: Epochs that were read from the checkpoint instead of being run.
        notes: What else the user should know.
    """

    model: Any
    epochs: list[EpochRecord] = field(default_factory=list)
    best: int | None = None
    resumed: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def losses(self) -> list[float]:
        """Mean loss of each epoch."""
        return [record.loss for record in self.epochs]

    @property
    def scores(self) -> list[float | None]:
        """Score of each epoch."""
        return [record.score for record in self.epochs]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the model, JSON-ready."""
        epochs = [dataclasses.asdict(record) for record in self.epochs]
        return {"epochs": epochs, "best": self.best, "resumed": self.resumed, "notes": list(self.notes)}


def fine_tune(
    model: Model,
    train: Iterable[Any],
    *,
    epochs: int,
    loss: Loss | None = None,
    optimizer: Optimizer | MakeOptimizer | None = None,
    lr: float | None = None,
    scheduler: LRScheduler | MakeScheduler | str | None = None,
    scheduler_interval: str = "step",
    evaluate: Callable[[Any], float] | None = None,
    restore_best: bool = False,
    checkpoint: str | Path | None = None,
    resume: bool = True,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
) -> History:
    """Train a program or a module in place.

    A run with ``checkpoint`` that was stopped goes on behind its last whole epoch, and gives the very same weights as a
    run that was not: weights, optimizer, scheduler, callbacks, and the random generators of torch, NumPy, Python and of
    the loader and its samplers are saved. What cannot be: random state that a loader hides elsewhere (workers that draw
    from NumPy, an iterable with a position of its own), and operators that are not deterministic (some CUDA kernels).

    In several processes (``torchrun``, after ``torch.distributed.init_process_group``) gradients are averaged with
    ``DistributedDataParallel``; each process reads its own share of the data (a ``DistributedSampler``), the first one
    writes checkpoints and shows progress, and running statistics and scores are the first one's.

    Args:
        model: What to train; all of it is put in training mode, and back when it is done.
        train: Batches, read once an epoch: ``(inputs, label)``, or dicts by input name. They are moved to the model's
            device.
        epochs: Epochs in total, those before a resume included.
        loss: ``loss(output, batch)`` gives a scalar; the batch is as the loader yielded it. By default the output's
            own ``loss`` where it has one, else the cross-entropy with the integer label behind the inputs.
        optimizer: An optimizer of the model's parameters, or a function that makes one of a list of them; by default
            AdamW with ``lr``.
        lr: Learning rate of the default optimizer, 1e-3 if not given.
        scheduler: ``"cosine"`` (to 0), ``"one_cycle"``, a scheduler of the optimizer, or a function that makes one.
        scheduler_interval: ``"step"`` or ``"epoch"``: when the scheduler steps. ReduceLROnPlateau always steps by
            epoch, on the score, or on the loss without ``evaluate``.
        evaluate: Scores the model in eval mode after each epoch; higher is better.
        restore_best: End with the weights of the best epoch instead of the last. Epochs before the last pruning of a
            callback do not count.
        checkpoint: Folder to save to after each epoch.
        resume: Go on from the checkpoint if there is one; otherwise it is replaced.
        callbacks: Called behind every optimizer step, for example a ``PruningCallback``; those with a ``begin_epoch``,
            like `QATCallback`, before each epoch too.
        progress: Show progress on stderr: a bar on a terminal, a line per epoch elsewhere.

    Returns:
        The history; ``history.model`` is the trained model.

    Raises:
        UsageError: arguments that do not go together.
        CalibrationError: the loader is empty.
        PassError: the loss, or a weight, is NaN or infinite; the checkpoint of the epoch before stays.
        ArtifactError: the checkpoint cannot be written or read, or is of another model or optimizer.
    """
    check_arguments(model, train, epochs, scheduler, scheduler_interval)
    check_callbacks(model, train, epochs, callbacks)
    processes = Processes.current()
    processes.check(callbacks)
    if restore_best and evaluate is None:
        raise UsageError(306, "restore_best needs evaluate", fix="pass evaluate=function_of_a_model")
    chosen = make_optimizer(model.gm if isinstance(model, Program) else model, optimizer, lr)
    run = _Run(
        model=model,
        train=train,
        total=epochs,
        loss=make_loss(model, loss),
        callbacks=tuple(callbacks),
        folder=None if checkpoint is None else Path(checkpoint),
        optimizer=chosen,
        scheduler=make_scheduler(chosen, scheduler, train, epochs),
        fixed_length=isinstance(scheduler, str),
        by_epoch=scheduler_interval == "epoch",
        evaluate=evaluate,
        processes=processes,
    )
    modes = {name: module.training for name, module in run.module.named_modules()}
    try:
        if resume and run.folder is not None and checkpoints.exists(run.folder):
            run.resume(run.folder)
        run.begin()
        with reporting(progress and processes.first, run) as report:
            for epoch in range(len(run.history.epochs), epochs):
                report(run.epoch(epoch))
        return run.finish(restore_best)
    finally:
        for name, module in run.module.named_modules():
            module.training = modes.get(name, module.training)


# ------------------------------------------------------------------------------------------------ the loop
@dataclass
class _Run:
    """One call of `fine_tune`."""

    model: Model
    train: Any
    total: int
    loss: Loss
    callbacks: tuple[Callback, ...]
    folder: Path | None
    optimizer: Optimizer
    scheduler: LRScheduler | None
    fixed_length: bool
    by_epoch: bool
    evaluate: Callable[[Any], float] | None
    processes: Processes = field(default_factory=Processes)
    history: History = field(init=False)
    best: dict[str, Tensor] | None = None
    advance: Callable[[float], None] | None = None
    forward: Callable[..., Any] = field(init=False)

    def __post_init__(self) -> None:
        self.history = History(self.model)
        self.by_epoch = self.by_epoch or isinstance(self.scheduler, ReduceLROnPlateau)

    @property
    def module(self) -> nn.Module:
        return self.model.gm if isinstance(self.model, Program) else self.model

    @property
    def settled(self) -> bool:
        """True when no callback will change the model any more."""
        return all(getattr(callback, "finished", True) for callback in self.callbacks)

    def begin(self) -> None:
        """Ready to train: called when the weights are those to begin with."""
        self.forward = self.processes.parallel(self.model)

    def epoch(self, number: int) -> EpochRecord:
        """One pass over the data, the score, the checkpoint."""
        begin, total, samples = time.perf_counter(), 0.0, 0
        sampler: Any = getattr(self.train, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(number)
        self.module.train()
        for callback in self.callbacks:
            if isinstance(callback, ByEpoch):
                callback.begin_epoch(number)
        for index, batch in enumerate(self.train):
            size, value = self._step(batch, f"epoch {number}, batch {index}")
            total, samples = total + value * size, samples + size
            if self.advance is not None:
                self.advance(value)
        if not samples:
            raise CalibrationError(300, "the training loader is empty", fix="pass at least one batch")
        self._check_weights(number)
        self.processes.share_buffers(self.module)
        total, everyone = self.processes.total(total, samples)
        samples = int(everyone)
        rate = float(self.optimizer.param_groups[0]["lr"])
        score = self._score(number)
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(total / samples if score is None else score)
        elif self.scheduler is not None and self.by_epoch:
            self.scheduler.step()
        record = EpochRecord(number, total / samples, score, rate, samples, time.perf_counter() - begin)
        self.history.epochs.append(record)
        self._keep_best(record)
        self._save()
        return record

    def _step(self, batch: Any, where: str) -> tuple[int, float]:
        """One optimizer step: samples of the batch and its loss."""
        device = next(self.module.parameters()).device
        batch = pytree.tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, batch)
        args, kwargs = as_call(batch, self.model.signature.names if isinstance(self.model, Program) else None)
        value = self.loss(self.forward(*args, **kwargs), batch)
        number = checked_loss(value, where, float(self.optimizer.param_groups[0]["lr"]))
        self.optimizer.zero_grad()
        value.backward()
        self.optimizer.step()
        if self.scheduler is not None and not self.by_epoch:
            self.scheduler.step()
        for callback in self.callbacks:
            self._adopt(callback.step(self.optimizer))
        tensors = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor) and v.dim()]
        return int(tensors[0].shape[0]) if tensors else 1, number

    def _adopt(self, returned: Any) -> None:
        if isinstance(returned, Program) and returned is not self.model:
            self.model = self.history.model = returned
            self.module.train()
            self.forward = self.processes.parallel(returned)

    def _score(self, number: int) -> float | None:
        if self.evaluate is None:
            return None
        self.module.eval()
        with torch.no_grad():
            score = self.processes.first_value(float(self.evaluate(self.model)))
        if score is not None and math.isnan(score):
            raise PassError(302, "evaluate gave NaN", where=f"epoch {number}", fix="check the function and its data")
        return score

    def _check_weights(self, epoch: int) -> None:
        bad = [n for n, p in self.module.named_parameters() if p.is_floating_point() and not all_finite(p)]
        if bad:
            where = f"{bad[0]} at the end of epoch {epoch}"
            raise PassError(301, "training made a weight NaN or infinite", where=where, fix="lower the learning rate")

    def _keep_best(self, record: EpochRecord) -> None:
        if record.score is None or not self.settled:
            return
        best = None if self.history.best is None else self.history.epochs[self.history.best].score
        if best is None or record.score > best:
            self.history.best = record.epoch
            self.best = {name: value.detach().clone() for name, value in _tensors(self.module).items()}

    def _save(self) -> None:
        if self.folder is None:
            return
        state = {
            "history": self.history.to_dict(),
            "total": self.total,
            "optimizer_class": type(self.optimizer).__name__,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "callbacks": [c.state_dict() if hasattr(c, "state_dict") else None for c in self.callbacks],
            "random": self.processes.random_states(checkpoints.random_state(self.train)),
        }
        if self.processes.first:
            checkpoints.write(self.folder, state, _tensors(self.module), self.best)
        self.processes.wait()

    def resume(self, folder: Path) -> None:
        """Go on where the checkpoint stands."""
        state, weights, best = checkpoints.read(folder)
        self._check_fits(state, folder)
        for callback, saved in zip(self.callbacks, state["callbacks"], strict=True):
            if saved is not None and isinstance(callback, Stateful):
                self._adopt(callback.load_state_dict(saved, self.optimizer))
        _load_weights(self.module, weights, folder)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        history = state["history"]
        self.history.epochs = [EpochRecord(**record) for record in history["epochs"]]
        self.history.best, self.history.notes = history["best"], history["notes"]
        self.history.resumed = len(self.history.epochs)
        self.best = best
        checkpoints.restore_random_state(self.processes.own_random_state(state["random"]), self.train)

    def _check_fits(self, state: Mapping[str, Any], folder: Path) -> None:
        found = type(self.optimizer).__name__
        problems = []
        if state["optimizer_class"] != found:
            problems.append(f"it was trained with {state['optimizer_class']}, not {found}")
        if (state["scheduler"] is None) != (self.scheduler is None):
            problems.append("one has a scheduler, the other has none")
        if self.fixed_length and state["total"] != self.total:
            problems.append(f"its learning rate was planned for {state['total']} epochs, not {self.total}")
        if len(state["callbacks"]) != len(self.callbacks):
            problems.append(f"it has {len(state['callbacks'])} callbacks, not {len(self.callbacks)}")
        if problems:
            fix = "give the same arguments, another folder, or resume=False"
            why = "; ".join(problems)
            raise ArtifactError(303, "the checkpoint is of another run", where=str(folder), why=why, fix=fix)

    def finish(self, restore_best: bool) -> History:
        """The history, after the best weights were put back where that is asked for."""
        if not self.settled:
            self.history.notes.append("training ended before the schedule of a callback did")
        if restore_best and self.best is not None:
            self.module.load_state_dict(self.best)
        elif restore_best:
            self.history.notes.append("no epoch came after the last pruning: these are the last weights, not the best")
        return self.history


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}


def _load_weights(module: nn.Module, weights: Mapping[str, Tensor], folder: Path) -> None:
    own = _tensors(module)
    problems = [f"{name} is missing" for name in own if name not in weights]
    problems += [f"{name} is unknown" for name in weights if name not in own]
    shared = [name for name in own if name in weights and weights[name].shape != own[name].shape]
    problems += [f"{name} is {list(weights[name].shape)}, not {list(own[name].shape)}" for name in shared]
    if problems:
        why = "; ".join(problems[:4]) + ("; …" if len(problems) > 4 else "")
        fix = "resume with the same model, another folder, or resume=False"
        raise ArtifactError(304, "the checkpoint is of another model", where=str(folder), why=why, fix=fix)
    module.load_state_dict(dict(weights), strict=False)
