"""Layers that train with their BatchNorm folded and their bias rounded, and BatchNorm that can be frozen.

A layer with a norm reads the norm's tensors as keyword arguments, so that they stay under the user's names and the graph
says what is read. With ``f = gamma / sigma`` of the running statistics and ``Q`` the weight's fake-quantizer, it computes

* in eval mode, and once frozen: ``layer(x, Q(W f)) + beta + (b - mean) f``, to the last bit what the folded layer computes;
* in training mode: ``u = layer(x, Q(W f) / f) + b``, then ``gamma (u - mean_B) / sigma_B + beta`` with the statistics of
  the batch, which also move the running ones.

The latter is ``layer(x, Q(W f)) sigma / sigma_B + beta + gamma (b - mean_B) / sigma_B``: folded weights, whose scale follows
the slowly moving statistics, corrected to those of the batch (Krishnamoorthi, "Quantizing deep convolutional networks for
efficient inference", 2018, section 3.2.2; Jacob et al. 2018, section 3.2). There the statistics come from a second
convolution with float weights; here they are those of the quantized one, which is what runs in the end: it costs one
convolution instead of two, and takes the mean error of weight rounding out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.folding import fold_bias, fold_weight, norm_affine, per_output
from fxcompress.ir import clone_tree
from fxcompress.layers import FUSED_LAYERS, Fused, make_fused
from fxcompress.qat.quantizers import TrainedQuantizer
from fxcompress.quant.spec import QuantSpec

__all__ = [
    "BiasGrid", "HeldNorm", "NormSettings", "TrainedFused", "hold_norm", "make_plain", "make_trained", "release_norm",
]  # fmt: skip

#: Where ``f`` is nearer to 0, this is multiplied and divided by instead.
_SMALLEST_FACTOR = 2.0**-20


@dataclass(frozen=True)
class NormSettings:
    """A norm that was folded: its path, ``eps`` and ``momentum`` (None: the plain average of all batches)."""

    path: str
    eps: float
    momentum: float | None


@dataclass(frozen=True)
class BiasGrid:
    """Where an engine stores biases as int32: their step is the scale of the input times that of the weight.

    With 8 bits that is fine enough to be left out of the simulation; with fewer it is not. Weights of few bits leave bits
    of their container unused: written as multiples of ``spare``, they make the step that much smaller.

    Attributes:
        source: Quantizer of the layer's input. It is no submodule here: it has its own place in the graph.
        spare: A power of two.
        wide: Grid of the container.
    """

    source: TrainedQuantizer
    spare: int
    wide: QuantSpec


class TrainedFused(Fused):
    """Mixin of the fused layers that do more than round their weight while training.

    Attributes:
        norm: The norm that is folded, or None.
        frozen: The norm uses its running statistics in training mode too.
        bias_grid: Set when the bias is rounded as the engine rounds it.
    """

    bias: Tensor | None
    norm: NormSettings | None
    frozen: bool
    bias_grid: BiasGrid | None

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        *,
        gamma: Tensor | None = None,
        beta: Tensor | None = None,
        mean: Tensor | None = None,
        var: Tensor | None = None,
        count: Tensor | None = None,
    ) -> Tensor:
        """Float ``x`` and optional ``residual`` -> ``activation(norm(layer(x)) [+ residual])``.

        Args:
            x: Input of the layer.
            residual: In the shape of its output.
            gamma: The norm's weight [channels], or None.
            beta: The norm's bias [channels], or None.
            mean: Its running mean [channels]; moved in training mode. None without a norm.
            var: Its running variance [channels]; moved in training mode.
            count: Its number of batches, int64 []; moved in training mode.
        """
        if self.training and not self.frozen and self.norm is not None:
            y = self._with_batch_statistics(x, self.norm, (gamma, beta, mean, var, count))
        else:
            weight, bias, factor = self.folded(gamma, beta, mean, var)
            y = self.compute(x, self._quantized(weight, factor), self._rounded(bias, weight, factor))
        return self.epilogue(y, residual)

    def folded(
        self, gamma: Tensor | None, beta: Tensor | None, mean: Tensor | None, var: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Weight and bias with the norm's running statistics folded in, in the weight's dtype, and `factor`."""
        if self.norm is None or mean is None or var is None:
            return self.weight, self.bias, None
        scale, shift = norm_affine(gamma, beta, mean, var, self.norm.eps)
        dtype = self.weight.dtype
        bias = fold_bias(self.bias, scale, shift).to(dtype)
        return fold_weight(self, self.weight, scale).to(dtype), bias, self.factor(scale)

    def factor(self, scale: Tensor) -> Tensor | None:
        """What multiplies a learned scale when the weight is multiplied by ``scale``; None for one per tensor.

        A transposed convolution with groups has scales that several groups share: they are learned for the folded
        weight.
        """
        quantizer = self.weight_fake_quantize
        if not isinstance(quantizer, TrainedQuantizer) or quantizer.scale.shape != scale.shape:
            return None
        return _away_from_zero(scale.detach()).abs()

    def describe(self) -> str:
        """One line for program dumps."""
        text = super().describe().removeprefix("Trained").removeprefix("Fused")
        if self.norm is not None:
            text += f" + norm:{self.norm.path}{' frozen' if self.frozen else ''}"
        return text if self.bias_grid is None else f"{text} + bias in 1/{self.bias_grid.spare} steps"

    def get_extra_state(self) -> Tensor:
        """Whether it is frozen, so that a checkpoint keeps it."""
        return torch.tensor([self.frozen], dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Inverse of ``get_extra_state``."""
        self.frozen = bool(state.item())

    def _with_batch_statistics(self, x: Tensor, norm: NormSettings, tensors: tuple[Tensor | None, ...]) -> Tensor:
        gamma, beta, mean, var, count = tensors
        assert mean is not None and var is not None
        with torch.no_grad():
            scale = _away_from_zero(norm_affine(gamma, None, mean, var, norm.eps)[0])
            by_channel = per_output(self, scale)
        weight = self.weight
        if self.weight_fake_quantize is not None:
            folded = (weight * by_channel).to(weight.dtype)
            weight = (self._quantized(folded, self.factor(scale)) / by_channel).to(weight.dtype)
        y = self.compute(x, weight, self.bias)
        if count is not None:
            count.add_(1)
        momentum = norm.momentum
        if momentum is None:
            momentum = 0.0 if count is None else 1.0 / float(count)
        return F.batch_norm(y, mean, var, gamma, beta, True, momentum, norm.eps)

    def _rounded(self, bias: Tensor | None, weight: Tensor, factor: Tensor | None) -> Tensor | None:
        """The bias as the engine stores it; its gradient passes straight through."""
        grid, quantizer = self.bias_grid, self.weight_fake_quantize
        if bias is None or grid is None or not isinstance(quantizer, TrainedQuantizer):
            return bias
        if not (grid.source.ready and grid.source.quantizing and quantizer.quantizing):
            return bias
        with torch.no_grad():
            scales = grid.source.grid()[0].double() * quantizer.grid(weight, factor)[0].double()
            step = (scales / grid.spare).expand_as(bias)
            nearest = ((bias.double() / step).round() * step).to(bias.dtype)
        return nearest + (bias - bias.detach())

    def _quantized(self, weight: Tensor, factor: Tensor | None) -> Tensor:
        quantizer = self.weight_fake_quantize
        if quantizer is None:
            return weight
        return cast(Tensor, quantizer(weight, factor) if isinstance(quantizer, TrainedQuantizer) else quantizer(weight))


def _away_from_zero(scale: Tensor) -> Tensor:
    tiny = torch.full_like(scale, _SMALLEST_FACTOR)
    return torch.where(scale.abs() < tiny, torch.copysign(tiny, scale), scale)


def _trained_kind(kind: type[Fused]) -> type[TrainedFused]:
    names = {"__module__": __name__, "__doc__": f"{kind.__doc__}, while it trains."}
    made = type(f"Trained{kind.__name__}", (TrainedFused, kind), names)
    globals()[made.__name__] = made  # where pickle looks for it
    return cast(type[TrainedFused], made)


_TRAINED = {kind: _trained_kind(kind) for kind in FUSED_LAYERS}
_PLAIN = {made: kind for kind, made in _TRAINED.items()}


def make_trained(layer: nn.Module, norm: NormSettings | None = None) -> TrainedFused:
    """The form of a layer that folds ``norm``, sharing its parameters and its quantizer."""
    new: Any = make_fused(layer)
    if not isinstance(new, TrainedFused):
        new.__class__ = _TRAINED[type(new)]
        new.norm, new.frozen, new.bias_grid = norm, False, None
    return cast(TrainedFused, new)


def make_plain(layer: TrainedFused, tensors: dict[str, Tensor | None]) -> Fused:
    """The plain fused layer that computes what ``layer`` computes in eval mode.

    Args:
        layer: Left untouched.
        tensors: The keyword arguments of its call.
    """
    with torch.no_grad():
        weight, bias, factor = layer.folded(*(tensors.get(k) for k in ("gamma", "beta", "mean", "var")))
        bias = layer._rounded(bias, weight, factor)
    new: Any = clone_tree(layer)
    new.__class__ = _PLAIN[type(layer)]
    quantizer = layer.weight_fake_quantize
    if isinstance(quantizer, TrainedQuantizer):
        plain = quantizer.to_plain(weight, factor)
        if layer.bias_grid is not None and layer.bias_grid.spare > 1:
            weight = plain(weight.detach())
            plain.spec, plain.scale = layer.bias_grid.wide, plain.scale / layer.bias_grid.spare
        new.weight_fake_quantize = plain
    for name in ("norm", "frozen", "bias_grid"):
        del new.__dict__[name]
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not layer._parameters[name]:
            new._parameters[name] = None if tensor is None else nn.Parameter(tensor.detach())
    return cast(Fused, new)


class HeldNorm:
    """Mixin of norms that no layer could fold: ``frozen`` makes them use their running statistics in training mode."""

    frozen: bool

    def forward(self, x: Tensor) -> Tensor:
        """The norm."""
        norm = cast(nn.BatchNorm2d, self)
        if not self.frozen:
            return cast(Tensor, super().forward(x))  # type: ignore[misc]
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)

    def get_extra_state(self) -> Tensor:
        """Whether it is frozen."""
        return torch.tensor([self.frozen], dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Inverse of ``get_extra_state``."""
        self.frozen = bool(state.item())


class HeldBatchNorm1d(HeldNorm, nn.BatchNorm1d):
    """BatchNorm1d that can be frozen."""


class HeldBatchNorm2d(HeldNorm, nn.BatchNorm2d):
    """BatchNorm2d that can be frozen."""


class HeldBatchNorm3d(HeldNorm, nn.BatchNorm3d):
    """BatchNorm3d that can be frozen."""


_HELD: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: HeldBatchNorm1d,
    nn.BatchNorm2d: HeldBatchNorm2d,
    nn.BatchNorm3d: HeldBatchNorm3d,
}
_RELEASED = {held: plain for plain, held in _HELD.items()}


def hold_norm(module: nn.Module) -> nn.Module | None:
    """The form of a norm with running statistics that can be frozen; None for any other module."""
    if type(module) not in _HELD or module.running_mean is None:
        return None
    new: Any = clone_tree(module)
    new.__class__ = _HELD[type(module)]
    new.frozen = False
    return cast(nn.Module, new)


def release_norm(module: nn.Module) -> nn.Module:
    """Inverse of `hold_norm`."""
    new: Any = clone_tree(module)
    new.__class__ = _RELEASED[type(module)]
    del new.__dict__["frozen"]
    return cast(nn.Module, new)
