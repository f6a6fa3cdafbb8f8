"""How much each residual block matters, measured on data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxcompress.data import CalibrationData
from fxcompress.errors import PruneError
from fxcompress.ir import Program, evaluating
from fxcompress.prune.block_removal import remove_blocks
from fxcompress.prune.blocks import Block
from fxcompress.prune.statistics import Loss, default_loss

__all__ = ["BLOCK_IMPORTANCE", "BlockScore", "Evaluate", "score_blocks"]

#: ``evaluate(model) -> float``, higher is better, for any callable model.
Evaluate = Callable[[Any], float]
#: A user's own importance: ``score(program, block) -> float``, higher is kept.
BlockScore = Callable[[Program, Block], float]
#: Importance by name.
BLOCK_IMPORTANCE = ("cosine", "magnitude", "loss")


def score_blocks(
    program: Program,
    blocks: Sequence[Block],
    importance: str | BlockScore,
    data: Iterable[Any] | None = None,
    *,
    loss: Loss | None = None,
    evaluate: Evaluate | None = None,
    samples: int | None = 256,
) -> dict[str, float]:
    """Importance of each block by name; higher is kept.

    * ``cosine``: one minus the mean cosine similarity of the block's input and output (Men et al. 2024, "ShortGPT:
      Layers in Large Language Models are More Redundant Than You Expect", equation 1). Values of two or three
      dimensions are compared position by position along the last one, images sample by sample.
    * ``magnitude``: ``||f(x)|| / ||x||`` of the branch's result and the skip, over all the data.
    * ``loss``: rise of the mean loss, or drop of ``evaluate``, when the block alone is bypassed.

    Args:
        program: Left untouched.
        blocks: Blocks of this program that can be bypassed.
        importance: One of the above, or a function of the program and a block.
        data: Iterable of batches (see ``fxcompress.data``).
        loss: For ``loss``: ``loss(output, batch)``; None for the cross-entropy with the label behind the inputs.
        evaluate: For ``loss``, instead of data and a loss: scores any callable model, higher is better.
        samples: No further batch is read once this many samples were seen; None for all.

    Raises:
        PruneError: unknown importance, data missing, or a score that is not finite.
        CalibrationError: batches that do not fit the program.
    """
    if callable(importance):
        scores = {b.name: _number(importance(program, b), "the importance of a block") for b in blocks}
    elif importance not in BLOCK_IMPORTANCE:
        fix = f"use {', '.join(map(repr, BLOCK_IMPORTANCE))}, or a function (program, block) -> float"
        raise PruneError(410, f"unknown importance of blocks {importance!r}", fix=fix)
    elif importance == "loss":
        scores = _losses(program, blocks, _measure(program, data, loss, evaluate, samples))
    else:
        scores = _observed(program, blocks, importance, data, samples)
    for name, score in scores.items():
        if not math.isfinite(score):
            fix = "check the weights and the data"
            raise PruneError(413, "the importance of a block is not finite", where=name, why=f"it is {score}", fix=fix)
    return scores


def _number(value: Any, what: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        got = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise PruneError(416, f"{what} must be a number, not {got}", fix="return one float") from error


# ------------------------------------------------------------------------------------------------ by bypassing
def _measure(
    program: Program, data: Iterable[Any] | None, loss: Loss | None, evaluate: Evaluate | None, samples: int | None
) -> Callable[[Program], float]:
    """What to compare programs by: lower is better."""
    if evaluate is not None:
        chosen = evaluate
        return lambda p: -_number(chosen(p), "what evaluate returns")
    if data is None:
        fix = "pass data=loader (and loss=), or evaluate=function_of_a_model"
        raise PruneError(412, "importance 'loss' needs something to measure", fix=fix)
    source = data if isinstance(data, CalibrationData) else CalibrationData(data)
    return lambda p: _mean_loss(p, source, loss or default_loss(program), samples)


def _losses(program: Program, blocks: Sequence[Block], measure: Callable[[Program], float]) -> dict[str, float]:
    with torch.no_grad(), evaluating(program.gm):
        dense = measure(program)
        return {b.name: measure(remove_blocks(program, [b])) - dense for b in blocks}


class _Recall:
    """Passes batches on and remembers the last one, for the labels."""

    def __init__(self, source: Iterable[Any]) -> None:
        self.source = source
        self.last: Any = None

    def __iter__(self) -> Iterator[Any]:
        for batch in self.source:
            self.last = batch
            yield batch


def _mean_loss(program: Program, data: CalibrationData, loss: Loss, samples: int | None) -> float:
    recall = _Recall(data)
    found = [
        _number(loss(program(*args, **kwargs), recall.last), "the loss")
        for args, kwargs in CalibrationData(recall).calls(program, samples)
    ]
    return sum(found) / max(len(found), 1)


# ------------------------------------------------------------------------------------------------ by observing
class _Probe(nn.Module):
    """Reads skip, branch and sum of one block on every call."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.add = _similarity if kind == "cosine" else _squares
        self.kind = kind
        self.sums = (0.0, 0.0)

    def forward(self, skip: Tensor, branch: Tensor, total: Tensor) -> None:
        """Float tensors of one shape."""
        a, b = self.add(skip.double(), (total if self.kind == "cosine" else branch).double())
        self.sums = (self.sums[0] + a, self.sums[1] + b)

    def score(self) -> float:
        """The importance from all calls."""
        a, b = self.sums
        if self.kind == "cosine":
            return 1 - a / max(b, 1)
        return math.sqrt(a / max(b, 1e-30))


def _similarity(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Sum of the cosine similarities of ``x`` and ``y``, and their number. Two zero vectors are alike."""
    if x.dim() not in (2, 3):
        x, y = (v.reshape(v.shape[0] if v.dim() > 1 else 1, -1) for v in (x, y))
    lengths = x.norm(dim=-1) * y.norm(dim=-1)
    both_zero = (x == 0).all(-1) & (y == 0).all(-1)
    similar = torch.where(both_zero, 1.0, (x * y).sum(-1) / lengths.clamp_min(1e-300))
    return similar.sum().item(), float(similar.numel())


def _squares(x: Tensor, f: Tensor) -> tuple[float, float]:
    return f.square().sum().item(), x.square().sum().item()


def _observed(
    program: Program, blocks: Sequence[Block], kind: str, data: Iterable[Any] | None, samples: int | None
) -> dict[str, float]:
    """Scores by looking at the values of one run over the data."""
    if data is None:
        fix = "pass data=loader, importance='loss' with evaluate=, or the names of the blocks"
        raise PruneError(411, f"importance {kind!r} needs data", fix=fix)
    source = data if isinstance(data, CalibrationData) else CalibrationData(data)
    observed = program.clone()
    probes = _insert_probes(observed, blocks, kind)
    for args, kwargs in source.calls(program, samples):
        with torch.no_grad(), evaluating(observed.gm):
            observed(*args, **kwargs)
    return {name: probe.score() for name, probe in probes.items()}


def _insert_probes(program: Program, blocks: Sequence[Block], kind: str) -> dict[str, _Probe]:
    nodes = {n.name: n for n in program.graph.nodes}
    probes = {}
    for number, block in enumerate(blocks):
        output = nodes[block.output]
        skip, branch = cast(tuple[Node, Node], output.args)
        if skip.name != block.skip:
            skip, branch = branch, skip
        probe = probes[block.name] = _Probe(kind)
        path = f"_block_probe_{number}"
        program.gm.add_module(path, probe)
        with program.graph.inserting_after(output):
            program.graph.call_module(path, (skip, branch, output))
    program.gm.recompile()
    return probes
