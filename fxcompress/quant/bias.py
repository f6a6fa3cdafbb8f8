"""Bias correction: the mean error that weight rounding adds to a layer's output is taken out of its bias."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils.hooks import RemovableHandle

from fxcompress.data import all_finite
from fxcompress.ir import Program
from fxcompress.layers import Fused, TransposedLinear

__all__ = ["InputMeans", "correct_bias", "with_shift", "without_shift"]


#: A sample is represented by about this many values of each input: the mean of a channel needs no more.
_ENOUGH = 1 << 14


class InputMeans:
    """Mean of every quantized layer's input per input channel, streamed (float64, one sum per channel).

    It listens while entered as a context manager. Of large inputs every k-th row is taken, another one each batch.
    """

    def __init__(self, program: Program, layers: list[Node]) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.batches: dict[str, int] = {}
        paths = sorted({str(n.target) for n in layers if n.op == "call_module"})
        self._layers = {path: program.gm.get_submodule(path) for path in paths}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> InputMeans:
        self._handles = [layer.register_forward_pre_hook(self._hook(p)) for p, layer in self._layers.items()]
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, path: str) -> Any:
        def update(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            channels = _channel_dim(module, args[0])
            batch = self.batches[path] = self.batches.get(path, 0) + 1
            x = _thinned(args[0].detach(), channels, batch)
            dims = [d for d in range(x.dim()) if d != channels]
            total = (x.sum(dims) if dims else x).double()
            if math.isfinite(float(total.sum())):
                self.sums[path] = self.sums[path] + total if path in self.sums else total
                self.counts[path] = self.counts.get(path, 0) + x.numel() // max(total.numel(), 1)

        return update

    def mean(self, path: str) -> Tensor | None:
        """Mean per input channel (float64), or None when nothing was seen."""
        count = self.counts.get(path, 0)
        return self.sums[path] / count if count else None


def _thinned(x: Tensor, channels: int, batch: int) -> Tensor:
    """Every k-th slice along the longest spatial dimension, so that about `_ENOUGH` values of a sample are left."""
    sizes = [0 if d in (0, channels) else s for d, s in enumerate(x.shape)]
    longest = max(sizes, default=0)
    step = min(x.numel() // (_ENOUGH * max(len(x), 1)), longest) if x.dim() else 0
    if step < 2:
        return x
    return x[(slice(None),) * sizes.index(longest) + (slice(batch % step, None, step),)]


def _channel_dim(layer: nn.Module, x: Tensor) -> int:
    if isinstance(layer, (nn.Linear, TransposedLinear)):
        return x.dim() - 1
    return x.dim() - cast(Tensor, layer.weight).dim() + 1  # 0 without a batch


def correct_bias(program: Program, layers: list[Node], means: InputMeans) -> None:
    """``b += sum_i (W - W_q)_i E[x_i]`` for every layer whose input mean is known (Nagel et al. 2019, eq. 17).

    The mean is taken over positions, so the border of a padded convolution is treated as its inside.
    """
    for path in dict.fromkeys(str(n.target) for n in layers if n.op == "call_module"):
        layer = cast(Any, program.gm.get_submodule(path))
        mean = means.mean(path)
        if mean is None or not isinstance(layer, Fused) or layer.weight_fake_quantize is None:
            continue
        weight = layer.weight.detach()
        error = weight - layer.weight_fake_quantize(weight)  # of two near numbers: as good as exact
        shift = _output_mean(layer, error, mean)
        old = cast(Any, layer).bias
        new = shift if old is None else old.detach().double() + shift
        if all_finite(new):
            bias = nn.Parameter(new.to(weight.dtype), requires_grad=weight.requires_grad)
            layer._parameters["bias"] = with_shift(bias, shift)


def with_shift(bias: nn.Parameter, shift: Tensor) -> nn.Parameter:
    """Remember on a corrected bias what was added to it: rounding the weight anew takes that back."""
    cast(Any, bias).shift = shift
    return bias


def without_shift(bias: Tensor | None) -> Tensor | None:
    """The bias as it was before it was corrected; all of the float layer's bias."""
    shift = getattr(bias, "shift", None)
    if bias is None or shift is None:
        return bias
    return nn.Parameter((bias.detach().double() - shift).to(bias.dtype), requires_grad=bias.requires_grad)


def _output_mean(layer: Any, weight: Tensor, mean: Tensor) -> Tensor:
    """Output (float64) of the layer with ``weight`` for an input that is ``mean`` everywhere."""
    if isinstance(layer, nn.Linear):
        return weight.double() @ mean
    if isinstance(layer, TransposedLinear):
        return mean @ weight.double()
    groups = layer.groups
    taps: Tensor = weight.flatten(2).sum(2, dtype=torch.float64)
    if layer.transposed:  # weight [in, out / groups, ...]; each output pixel sees kernel / stride taps
        grouped = (taps / math.prod(layer.stride)).reshape(groups, -1, taps.shape[1]) * mean.reshape(groups, -1, 1)
        return cast(Tensor, grouped.sum(1).flatten())
    rows = mean.reshape(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1)  # [groups, out / groups, in / groups]
    return (taps * rows.reshape(taps.shape)).sum(1)
