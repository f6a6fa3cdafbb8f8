"""TuneScales: trains the scales of rounded weights end to end, without labels; the integers stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.fx import Node

from fxcompress.data import CalibrationData
from fxcompress.errors import PassError, UsageError
from fxcompress.ir import Program
from fxcompress.passbase import Context, Pass, Result
from fxcompress.quant.fake_quantize import FakeQuantize
from fxcompress.quant.layer_weights import as_globs, asked_for, has_quantizer, weight_quantizer
from fxcompress.quant.placement import layer_kind, layer_name
from fxcompress.quant.scale_tuning import Divergence, RoundedWeight, ScaleTuning, TuningOptions
from fxcompress.sizes import fixed_size

__all__ = ["TuneScales"]


@dataclass(frozen=True)
class TuneScales(Pass):
    """Train the scales of rounded weights so that the program's outputs are those of the float program.

    Run it behind `QuantizeWeights`, or behind `QuantizeDynamic` or `QuantizeStatic` and `AdaRound`. Every weight keeps its
    integers, so size and speed stay; only their scales move, all together, by back-propagation through the whole program
    (Chen et al., "EfficientQAT", 2024, section 3.3, with the float program as teacher). Of eight calibration batches one is
    not trained on; scales are put only if they bring the outputs nearer to the float program's there.

    The float program is ``Context.reference``, or the last one of the pipeline (or of ``compile``) without quantizers; a
    quantizing pass with ``in_place=True`` in front writes over it. Memory: the float weights, the rounded ones, those of
    the training step, their integers, and the activations of one batch.

    Attributes:
        samples: Calibration samples to use at most (whole batches; a batch is one step).
        epochs: Times that all of them are gone through.
        learning_rate: Relative change of a scale in one step, at most.
        loss: What is made small: ``kl``, the Kullback-Leibler divergence of the softmax over the last dimension of the
            first output, for logits; ``mse``, the squared error over the mean square, over all outputs, for others.
        include: Globs over layer names: only these.
        ignore: Globs over layer names whose scales stay.
        seed: Of the order of the batches, and which are not trained on.
        progress: Show a progress bar with the time left on stderr.

    Raises:
        UsageError: an option is unknown or out of range.
    """

    exact: ClassVar[bool] = False
    samples: int = 128
    epochs: int = 2
    learning_rate: float = 3e-4
    loss: Divergence = "kl"
    include: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    seed: int = 0
    progress: bool = False

    def __post_init__(self) -> None:
        for name in ("include", "ignore"):
            object.__setattr__(self, name, as_globs(getattr(self, name)))
        if self.samples < 1 or self.epochs < 1:
            what = f"samples={self.samples}, epochs={self.epochs}: nothing to train with"
            raise UsageError(547, what, fix="give 1 or more")
        if not 0 < self.learning_rate <= 0.1:
            what = f"learning_rate={self.learning_rate}: not above 0 and at most 0.1"
            raise UsageError(548, what, why="it is the relative change of a scale in a step", fix="use 0.0003")
        if self.loss not in ("kl", "mse"):
            raise UsageError(549, f"loss={self.loss!r}: not known", fix="kl for logits, mse for other outputs")

    def requires(self, program: Program, context: Context) -> None:
        """Needs calibration data, the float program, weights with grids and a float output."""
        if context.calibration is None:
            raise PassError(343, f"{self.name} needs calibration data", fix="pass calibration=loader")
        if not _rounded(program):
            fix = "put QuantizeWeights() or another quantizing pass in front"
            raise PassError(344, f"{self.name} finds no rounded weight", fix=fix)
        reference = context.reference
        if reference is None or _rounded(reference):
            why = "a pass with in_place=True wrote over it, or this pass runs outside of the pipeline that rounded the weights"
            fix = "use in_place=False, in one pipeline with this pass; or pass Context(reference=float_program)"
            raise PassError(345, f"{self.name} needs the float program", why=why, fix=fix)
        values = [n.meta.get("val") for n in program.outputs() if isinstance(n, Node)]
        first = next((v for v in values if isinstance(v, Tensor) and v.is_floating_point()), None)
        if first is None:
            raise PassError(347, f"{self.name} finds no float output to compare", fix="leave the pass out")
        if self.loss == "kl" and (first.dim() == 0 or fixed_size(first.shape[-1]) == 1):
            what = f"{self.name}: an output of shape {list(first.shape)} holds no logits"
            raise PassError(348, what, why="loss='kl' compares classes in the last dimension", fix="use loss='mse'")

    def run(self, program: Program, context: Context) -> Result:
        """Train, and put the scales when they are better."""
        result = Result(program)
        weights = self._weights(program, result.notes)
        if not weights:
            return result
        given = cast(Any, context.calibration)
        data = given if isinstance(given, CalibrationData) else CalibrationData(given)
        calls = list(data.calls(program, self.samples))
        options = TuningOptions(self.epochs, self.learning_rate, self.loss, self.seed, self.progress)
        with torch.inference_mode(False):
            job = ScaleTuning(program, cast(Program, context.reference), weights, calls, options)
            better = job.run()
        result.notes += [*job.notes, *data.notes(self.samples)]
        if not job.held_out:
            result.notes.append(f"{self.name}: {len(calls)} batches are too few to keep one back to judge by")
        if better:
            result.changes = [f"tuned the scales of {', '.join(weight.names)}" for weight in weights]
        else:
            result.notes.append(f"the scales stay: training did not lower the divergence of {job.before:.3g}")
        result.metrics = {"weights": len(weights), "divergence_before": job.before, "divergence_after": job.after}
        return result

    def _weights(self, program: Program, notes: list[str]) -> list[RoundedWeight]:
        """What to train, one entry a tensor; a line for each one that is left alone."""
        kept = []
        for weight in _rounded(program):
            if not asked_for(weight.names, self.include, self.ignore):
                continue
            reason = _problem(program, weight)
            if reason:
                notes.append(f"{', '.join(weight.names)} keeps its scales: {reason}")
            else:
                kept.append(weight)
        if not kept and not notes:
            notes.append(f"the scales stay: include={self.include} and ignore={self.ignore} leave no rounded weight")
        return kept


def _rounded(program: Program) -> list[RoundedWeight]:
    """Every weight behind a quantizer, with all its layers."""
    found: dict[int, RoundedWeight] = {}
    for node in program.graph.nodes:
        if layer_kind(program, node) is None or not has_quantizer(program, node):
            continue
        quantizer = weight_quantizer(program, node)
        source = node if node.op == "call_module" else cast(Node, cast(Node, node.args[1]).args[0])
        if type(quantizer) is not FakeQuantize or (source is not node and source.op != "get_attr"):
            continue
        if source is node:
            weight, holder = cast(Tensor, program.module(node).weight), (str(node.target), "weight")
            path = f"{node.target}.weight_fake_quantize"
        else:
            module, _, name = str(source.target).rpartition(".")
            weight, holder = program.tensor(source), (module, name)
            path = str(cast(Node, node.args[1]).target)
        entry = found.setdefault(weight.data_ptr(), RoundedWeight([], weight))
        for known, new in ((entry.names, layer_name(node)), (entry.holders, holder), (entry.quantizers, path)):
            if new not in known:
                cast("list[Any]", known).append(new)
    return list(found.values())


def _problem(program: Program, weight: RoundedWeight) -> str:
    """Why the scales of a weight cannot be trained; empty when they can.

    A quantizer of a constant may be one of activations, too: those of a concat share one.
    """
    first, *others = (cast(FakeQuantize, program.gm.get_submodule(path)) for path in weight.quantizers)
    if any(q.observer is not None for q in (first, *others)):
        return "its range is still observed"
    for other in others:
        same = other.spec == first.spec and torch.equal(other.scale, first.scale)
        if not (same and torch.equal(other.zero_point, first.zero_point)):
            return "it is shared on different grids"
    weights = {f"{path}.{name}" if path else name for path, name in weight.holders}
    for node in program.graph.nodes:
        if node.op == "get_attr" and str(node.target) in weights:
            readers = [u for u in node.users if str(u.target) not in weight.quantizers]
        elif node.op == "call_module" and str(node.target) in weight.quantizers:
            own = cast(Node, node.args[0]).op == "get_attr" and str(cast(Node, node.args[0]).target) in weights
            readers = (
                [u for u in node.users if layer_kind(program, u) is None or u.args[1] is not node] if own else [node]
            )
        else:
            continue
        if readers:
            return f"{readers[0].name} has a use of its own for it or its grid"
    return ""
