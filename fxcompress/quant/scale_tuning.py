"""Scales of rounded weights, trained until the program's outputs are those of the float program; the integers stay.

Chen et al., "EfficientQAT", 2024, section 3.3: of a rounded model only the steps of its grids are trained, end to end. Here
the float program says what the outputs should be (Hinton et al., "Distilling the Knowledge in a Neural Network", 2015), so
no labels are needed, and a step becomes ``s exp(v)`` with ``v = 0`` at the start: it stays positive, and one learning rate
suits large and small ones. Some of the calls are not trained on; of all epochs the one that is best there is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxcompress.data import Call
from fxcompress.errors import PassError
from fxcompress.ir import Program, differentiating, evaluating
from fxcompress.progress import progress_bar
from fxcompress.quant.fake_quantize import DynamicFakeQuantize, FakeQuantize, grouped, ungrouped
from fxcompress.quant.spec import QuantSpec, stored_scale

__all__ = ["Divergence", "RoundedWeight", "ScaleTuning", "TuningOptions", "divergence", "rows_of"]

Divergence = Literal["kl", "mse"]
#: Of so many calls one is not trained on.
_HELD_OUT = 8
_WARM_UP = 0.1


def divergence(got: Sequence[Any], want: Sequence[Any], kind: Divergence) -> Tensor:
    """How far outputs are from those of the float program.

    Args:
        got: Flat outputs; what is no float tensor, or empty, does not count.
        want: Those of the float program, of the same shapes.
        kind: ``kl``: ``KL(softmax(want) || softmax(got))`` in nat over the last dimension, the mean over all others, of
            the first output (logits; a cache may follow); ``mse``: mean squared error over the mean square of ``want``,
            the mean over the outputs.
    """
    pairs = [(a.float(), b.float()) for a, b in zip(got, want, strict=True) if _counts(a)]
    if kind == "kl":
        ours, theirs = (t.reshape(-1, t.shape[-1]).log_softmax(-1) for t in pairs[0])
        if not bool(theirs.isneginf().any()):
            return F.kl_div(ours, theirs, log_target=True, reduction="batchmean")
        each = F.kl_div(ours, theirs, log_target=True, reduction="none")
        return each.masked_fill(theirs.isneginf(), 0.0).sum() / len(ours)  # classes that are masked: 0 log 0 = 0
    errors = [(a - b).square().mean() / b.square().mean().clamp(min=1e-30) for a, b in pairs]
    return torch.stack(errors).mean()


def _counts(output: Any) -> bool:
    return isinstance(output, Tensor) and output.is_floating_point() and output.numel() > 0


def rows_of(weight: Tensor, spec: QuantSpec) -> Tensor:
    """A weight as [scales, values that share one]."""
    if spec.group_size is not None:
        return grouped(weight, spec)
    return weight.reshape(1, -1) if spec.axis is None else weight.movedim(spec.axis, 0).flatten(1)


def _weight_of(rows: Tensor, like: Tensor, spec: QuantSpec) -> Tensor:
    """Inverse of `rows_of`."""
    return rows.reshape(like.shape) if spec.axis is None else ungrouped(rows, like, spec)


@dataclass
class RoundedWeight:
    """A weight on a grid, with everything that reads it.

    Attributes:
        names: Of its layers.
        weight: The tensor.
        holders: Module path and attribute of every place that holds it.
        quantizers: Paths of the quantizers that it goes through, all on the same grid.
    """

    names: list[str]
    weight: Tensor
    holders: list[tuple[str, str]] = field(default_factory=list)
    quantizers: list[str] = field(default_factory=list)

    def put(self, program: Program, codes: Tensor, scale: Tensor) -> None:
        """Give every reader the weight ``codes * scale`` and the grid of this ``scale``, both as `rows_of`."""
        for path in self.quantizers:
            quantizer = cast(FakeQuantize, program.gm.get_submodule(path))
            quantizer.scale = scale.reshape(quantizer.scale.shape).clone()
            spec = quantizer.spec
        weight = _weight_of(codes * scale, self.weight, spec).to(self.weight.dtype).contiguous()
        new = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        for path, name in self.holders:
            holder = program.gm.get_submodule(path)
            if name in holder._buffers:
                holder._buffers[name] = weight
            else:
                holder._parameters[name] = new


@dataclass(frozen=True)
class TuningOptions:
    """How scales are trained.

    Attributes:
        epochs: Times that every call is gone through.
        learning_rate: Of Adam, for ``v``: the relative change of a scale in a step. It rises over the first tenth of the
            steps and falls to 0 as a cosine.
        loss: See `divergence`.
        seed: Of the order of the calls.
        progress: Show a progress bar.
    """

    epochs: int = 2
    learning_rate: float = 3e-4
    loss: Divergence = "kl"
    seed: int = 0
    progress: bool = False

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step, counted from 0."""
        warm = max(1, round(_WARM_UP * steps))
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


class _Dequantize(torch.autograd.Function):
    """``codes * scale``; keeps the integers for the backward pass instead of a float copy of the weight."""

    @staticmethod
    def forward(ctx: Any, codes: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(codes)
        return codes * scale

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[None, Tensor]:
        (codes,) = ctx.saved_tensors
        return None, (grads[0] * codes).sum(1, keepdim=True)


class _Rescaled(nn.Module):
    """In the place of a weight's quantizer while its scale is trained."""

    codes: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, quantizer: FakeQuantize) -> None:
        super().__init__()
        spec = quantizer.spec
        scale, zero = (t.reshape(-1, 1) for t in (quantizer.scale, quantizer.zero_point))
        rows = rows_of(weight.detach().float(), spec)
        codes = ((rows / scale).round_() + zero).clamp_(spec.qmin, spec.qmax) - zero
        self.spec, self.dtype = spec, weight.dtype
        self.register_buffer("codes", codes.to(torch.int8 if spec.bits < 8 else torch.int16))
        self.register_buffer("scale", scale.clone())
        self.log_factor = nn.Parameter(torch.zeros_like(scale))

    def forward(self, weight: Tensor) -> Tensor:
        function: Any = _Dequantize.apply
        rows = cast(Tensor, function(self.codes, self.tuned()))
        return _weight_of(rows, weight, self.spec).to(weight.dtype)

    def tuned(self) -> Tensor:
        """The scale [scales, 1] as it is stored, with the gradient of what it is rounded from."""
        scale = self.scale * self.log_factor.exp()
        return scale + (stored_scale(scale.detach(), self.dtype) - scale.detach())


class _StraightThrough(nn.Module):
    """Activations on a grid of their own, with the gradient of the identity."""

    def __init__(self, quantizer: DynamicFakeQuantize) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, x: Tensor) -> Tensor:
        return x + (cast(Tensor, self.quantizer(x.detach())) - x.detach())


class ScaleTuning:
    """Trains the scales of ``weights`` of ``program``, and puts them where that brought it nearer to ``reference``.

    Args:
        program: Changed in place by `run`; its tensors are replaced, never written into.
        reference: The float program: same inputs, same outputs.
        weights: What to train.
        calls: Calibration calls; one is one step.
        options: How.

    Attributes:
        before: Divergence at the start, of the calls that are not trained on.
        after: The same at the end.
        held_out: How many calls that were; 0: there are too few, both are of the calls trained on.
        notes: What the user should know.
    """

    def __init__(
        self,
        program: Program,
        reference: Program,
        weights: Sequence[RoundedWeight],
        calls: Sequence[Call],
        options: TuningOptions,
    ) -> None:
        self.program, self.reference, self.options = program, reference, options
        self.weights = weights
        self.generator = torch.Generator().manual_seed(options.seed)
        order = torch.randperm(len(calls), generator=self.generator).tolist()
        self.held_out = len(calls) // _HELD_OUT
        shuffled = [_ordinary(calls[i]) for i in order]
        self.judged = shuffled[: self.held_out] or shuffled
        self.trained = shuffled[self.held_out :]
        self.before = self.after = math.nan
        self.notes: list[str] = []
        self.student, self.modules = self._student()
        # Gradients of 16-bit logits are below the smallest number of float16: times a power of two they are not.
        self.multiplier = 2.0**12 if any(w.weight.dtype == torch.float16 for w in weights) else 1.0

    def run(self) -> bool:
        """Train; True when scales were put that are better."""
        steps = self.options.epochs * len(self.trained)
        header = f"scales: {len(self.weights)} weights, {steps} steps"
        with (
            differentiating(self.student.gm),
            evaluating(self.reference.gm),
            progress_bar("tuned", steps, self.options.progress, header) as advance,
        ):
            self.before = self.after = self._judge()
            best = self._train(steps, advance) if math.isfinite(self.before) else None
        if best is None:
            return False
        for weight, module, factors in zip(self.weights, self.modules, best, strict=True):
            module.log_factor.data = factors
            weight.put(self.program, module.codes, module.tuned().detach())
        return True

    def _student(self) -> tuple[Program, list[_Rescaled]]:
        student = self.program.clone()
        for module in list(student.gm.modules()):
            for name, child in module.named_children():
                if isinstance(child, DynamicFakeQuantize):
                    setattr(module, name, _StraightThrough(child))
        found = []
        for weight in self.weights:
            quantizer = cast(FakeQuantize, student.gm.get_submodule(weight.quantizers[0]))
            stand_in = _Rescaled(weight.weight, quantizer)
            for path in weight.quantizers:
                holder, _, name = path.rpartition(".")
                setattr(student.gm.get_submodule(holder), name, stand_in)
            found.append(stand_in)
        return student, found

    def _train(self, steps: int, advance: Callable[[], None]) -> list[Tensor] | None:
        """The factors of the best epoch; None when none is better than the start."""
        factors = [module.log_factor for module in self.modules]
        adam = torch.optim.Adam(factors, self.options.learning_rate, betas=(0.9, 0.95))
        best, step = None, 0
        for _ in range(self.options.epochs):
            for number in torch.randperm(len(self.trained), generator=self.generator).tolist():
                adam.param_groups[0]["lr"] = self.options.rate(step, steps)
                if not self._step(self.trained[number], adam, factors):
                    self.notes.append("training of the scales was stopped: a gradient was not finite")
                    return best
                step += 1
                advance()
            found = self._judge()
            if found < self.after:
                self.after, best = found, [f.detach().clone() for f in factors]
        return best

    def _step(self, call: Call, adam: torch.optim.Adam, factors: list[nn.Parameter]) -> bool:
        """One step of training; False when it cannot be taken."""
        with torch.no_grad():
            want = _outputs(self.reference, call)
        gradients = self._gradients(call, want, factors)
        while any(g is not None and not bool(torch.isfinite(g).all()) for g in gradients):
            if self.multiplier <= 1.0:
                return False
            self.multiplier /= 4.0
            gradients = self._gradients(call, want, factors)
        for factor, gradient in zip(factors, gradients, strict=True):
            factor.grad = None if gradient is None else gradient / self.multiplier
        adam.step()
        return True

    def _gradients(self, call: Call, want: list[Any], factors: list[nn.Parameter]) -> tuple[Tensor | None, ...]:
        """Gradients of the factors times the multiplier; None for a scale that no output depends on."""
        loss = divergence(_outputs(self.student, call), want, self.options.loss)
        found = torch.autograd.grad(loss * self.multiplier, factors, allow_unused=True) if loss.requires_grad else ()
        if all(g is None for g in found):
            fix = "leave the pass out, or return the values in front of argmax, detach and the like"
            raise PassError(346, "no output to train scales by has a gradient", fix=fix)
        return found

    def _judge(self) -> float:
        """Mean divergence of the calls that are not trained on."""
        total = 0.0
        with torch.no_grad():
            for call in self.judged:
                got, want = _outputs(self.student, call), _outputs(self.reference, call)
                total += float(divergence(got, want, self.options.loss))
        return total / len(self.judged)


def _ordinary(call: Call) -> Call:
    """A call without tensors that ``torch.inference_mode`` keeps from backward passes."""
    return cast(Call, pytree.tree_map_only(Tensor, lambda t: t.clone() if t.is_inference() else t, call))


def _outputs(program: Program, call: Call) -> list[Any]:
    return list(pytree.tree_leaves(program(*call[0], **call[1])))
