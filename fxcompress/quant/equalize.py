"""Cross-layer equalization: weight ranges of neighbouring layers are made equal, channel by channel, outputs unchanged.

Between two layers with a positively homogeneous function, ``f(s x) = s f(x)``, channel ``i`` of the first layer can be
divided by ``s_i > 0`` where the second multiplies by it (Nagel et al., "Data-Free Quantization Through Weight Equalization
and Bias Correction", 2019, section 4.1). With ``r1_i`` the range of the weights that make the channel and ``r2_i`` that
of the weights that read it, ``s_i = sqrt(r1_i r2_i) / r2_i`` (eq. 11) gives both the range ``sqrt(r1_i r2_i)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxcompress.ir import Program
from fxcompress.layers import Fused, TransposedLinear
from fxcompress.quant.placement import layer_kind
from fxcompress.rewrite import Analysis

__all__ = ["Boundary", "Equalizer", "canonical", "find_boundary", "restored"]

_aten = torch.ops.aten
_HOMOGENEOUS = frozenset({"relu", "leaky_relu"})
#: f(s x) = s f(x) for s > 0, value by value.
_ELEMENTWISE = {_aten.relu, _aten.leaky_relu, _aten.dropout, _aten.clone, _aten.contiguous, _aten.alias, _aten.detach}
#: The same, channel by channel; the channels stay where they are, counted from the end.
_SPATIAL = {
    _aten.max_pool1d, _aten.max_pool2d, _aten.max_pool3d, _aten.avg_pool1d, _aten.avg_pool2d, _aten.avg_pool3d,
    _aten.adaptive_avg_pool1d, _aten.adaptive_avg_pool2d, _aten.adaptive_avg_pool3d, _aten.adaptive_max_pool2d,
    _aten.upsample_nearest1d, _aten.upsample_nearest2d, _aten.upsample_bilinear2d,
}  # fmt: skip
_FLATTENING = {_aten.flatten, _aten.view, _aten.reshape}
_LAYERS = (nn.Dropout, nn.Identity, nn.ReLU, nn.LeakyReLU)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LINEAR = (nn.Linear, TransposedLinear)
_ROUNDS = 200
_STILL = 1e-7


@dataclass
class Boundary:
    """Channels that can be scaled: one layer makes them, others read them.

    Attributes:
        producer: The layer that makes them.
        consumers: The layers that read them, each with the number of neighbouring input features per channel (more than
            1 behind a flatten).
    """

    producer: Node
    consumers: list[tuple[Node, int]]

    def __str__(self) -> str:
        return f"{self.producer.target} -> {', '.join(str(n.target) for n, _ in self.consumers)}"


def canonical(layer: nn.Module) -> Tensor:
    """The weight as [groups, outputs per group, inputs per group, taps], float64, whatever the layer."""
    weight = cast(Tensor, layer.weight).detach().double()
    if isinstance(layer, _LINEAR):
        rows = weight.t() if isinstance(layer, TransposedLinear) else weight
        return rows[None, :, :, None]
    groups = cast(int, layer.groups)
    grouped = weight.flatten(2).unflatten(0, (groups, -1))
    return cast(Tensor, grouped.transpose(1, 2) if isinstance(layer, _TRANSPOSED) else grouped)


def restored(layer: nn.Module, weight: Tensor) -> Tensor:
    """Inverse of `canonical`: ``weight`` in the layer's own shape and dtype."""
    own = cast(Tensor, layer.weight)
    if isinstance(layer, _LINEAR):
        rows = weight[0, :, :, 0]
        return (rows.t() if isinstance(layer, TransposedLinear) else rows).to(own.dtype).contiguous()
    grouped = weight.transpose(1, 2) if isinstance(layer, _TRANSPOSED) else weight
    return grouped.reshape(own.shape).to(own.dtype)


# ------------------------------------------------------------------------------------------------ where
def find_boundary(analysis: Analysis, node: Node) -> Boundary | str:
    """The readers of the channels that ``node`` makes, or why they cannot be scaled.

    Args:
        analysis: Of the program.
        node: A layer with a weight.
    """
    reason = _unusable(analysis, node) or _odd_epilogue(analysis.program, node)
    if reason:
        return reason
    channels = int(canonical(analysis.program.module(node)).shape[:2].numel())
    return _Forward(analysis, node, channels).run()


def _unusable(analysis: Analysis, node: Node) -> str:
    """Why a layer's tensors cannot be changed."""
    layer = analysis.program.module(node)
    if analysis.calls(node) > 1:
        return f"{node.target} is called more than once"
    other = analysis.shared_with(node)
    if other:
        return f"{node.target} shares a tensor with {other}"
    if isinstance(layer, Fused) and layer.weight_fake_quantize is not None:
        return f"{node.target} is quantized already"
    return ""


def _odd_epilogue(program: Program, node: Node) -> str:
    layer = program.module(node)
    if not isinstance(layer, Fused):
        return ""
    if len(node.args) > 1:
        return "a residual is added to its output"
    activation = layer.activation
    return "" if activation is None or activation.name in _HOMOGENEOUS else f"{activation} does not scale"


class _Forward:
    """Follows the channels of a layer to their readers."""

    def __init__(self, analysis: Analysis, node: Node, channels: int) -> None:
        self.analysis, self.program, self.channels = analysis, analysis.program, channels
        self.boundary = Boundary(node, [])
        linear = isinstance(self.program.module(node), _LINEAR)
        self.start = (node, -1 if linear else 1 - _dims(self.program.module(node)), 1)

    def run(self) -> Boundary | str:
        waiting = [self.start]
        while waiting:
            value, dim, repeat = waiting.pop(0)
            if not value.users:
                return f"nothing reads {value.name}"
            for user in value.users:
                found = self._pass(user, value, dim, repeat)
                if isinstance(found, str):
                    return found
                waiting += found
        return self.boundary

    def _pass(self, user: Node, value: Node, dim: int, repeat: int) -> str | list[tuple[Node, int, int]]:
        """Where the channels are behind ``user``; empty when it is a layer that takes them up."""
        if user.op == "output":
            return "they are an output of the model"
        if user.op == "call_module":
            return self._module(user, value, dim, repeat)
        packet = getattr(user.target, "overloadpacket", None)
        if packet is _aten.sym_size:
            return []
        alone = len(user.all_input_nodes) == 1 or packet in _FLATTENING  # these may read sizes too
        if not user.args or user.args[0] is not value or not alone:
            return f"{user.name} reads them together with something else"
        if packet in _ELEMENTWISE:
            return [(user, dim, repeat)]
        if packet in _SPATIAL and repeat == 1 and dim < -1:
            return [(user, dim, repeat)]
        if packet is _aten.mean and repeat == 1:
            return self._mean(user, dim)
        return self._flattened(user, value, dim, repeat) if packet in _FLATTENING else f"{user.name} does not scale"

    def _module(self, user: Node, value: Node, dim: int, repeat: int) -> str | list[tuple[Node, int, int]]:
        layer = self.program.module(user)
        if isinstance(layer, _LAYERS):
            return [(user, dim, repeat)]
        if layer_kind(self.program, user) is None:
            fold = "; run FoldBatchNorm before" if isinstance(layer, nn.modules.batchnorm._BatchNorm) else ""
            return f"{user.target} ({type(layer).__name__}) reads them{fold}"
        if user.args[0] is not value or value in user.args[1:]:
            return f"{user.target} adds them to its output"
        at = -1 if isinstance(layer, _LINEAR) else 1 - _dims(layer)
        if at != dim or (repeat > 1 and not isinstance(layer, _LINEAR)):
            return f"{user.target} reads them along another dimension"
        reason = _unusable(self.analysis, user)
        if reason:
            return reason
        self.boundary.consumers.append((user, repeat))
        return []

    def _mean(self, user: Node, dim: int) -> str | list[tuple[Node, int, int]]:
        dims = user.args[1] if len(user.args) > 1 else None
        rank = cast(Node, user.args[0]).meta["val"].dim()
        if not isinstance(dims, (list, tuple)) or not dims:
            return f"{user.name} averages over the channels"
        taken = {d - rank if d >= 0 else d for d in cast(Sequence[int], dims)}
        if dim in taken:
            return f"{user.name} averages over the channels"
        kept = len(user.args) > 2 and bool(user.args[2])
        return [(user, dim if kept else dim + sum(d > dim for d in taken), 1)]

    def _flattened(self, user: Node, value: Node, dim: int, repeat: int) -> str | list[tuple[Node, int, int]]:
        """[batch, channels, *positions] as [batch, channels * positions]: each channel becomes neighbouring features."""
        before, after = value.meta["val"], user.meta["val"]
        if str(before.shape) == str(after.shape):
            return [(user, dim, repeat)]
        plain = before.dim() + dim == 1 and after.dim() == 2 and str(before.shape[0]) == str(after.shape[0])
        size = after.shape[-1]
        if not plain or not isinstance(size, int) or size % self.channels:
            return f"{user.name} moves them"
        return [(user, -1, size // self.channels)]


def _dims(layer: nn.Module) -> int:
    """Dimensions of a convolution's weight."""
    return cast(Tensor, layer.weight).dim()


# ------------------------------------------------------------------------------------------------ by how much
class Equalizer:
    """Scales of many boundaries that share layers, found together.

    Args:
        program: Its layers are changed by `apply`.
        boundaries: Every layer makes the channels of at most one.
    """

    def __init__(self, program: Program, boundaries: Sequence[Boundary]) -> None:
        self.program, self.boundaries = program, list(boundaries)
        nodes = [b.producer for b in boundaries] + [n for b in boundaries for n, _ in b.consumers]
        self.layers: dict[str, Any] = {str(n.target): program.module(n) for n in nodes}
        # What rounds on the way does not matter: ranges are followed on the absolute weights, largest tap only.
        self._peaks = {path: canonical(layer).abs().amax(3) for path, layer in self.layers.items()}
        self.scales = [torch.ones_like(self._peaks[str(b.producer.target)][:, :, 0]).flatten() for b in boundaries]

    def run(self) -> None:
        """Equalize boundary after boundary until nothing changes; scales of the first round are eq. 11 itself."""
        for _ in range(_ROUNDS):
            changes = [self._step(i) for i in range(len(self.boundaries))]
            if max(changes, default=0.0) < _STILL:
                return

    def ranges(self, index: int) -> tuple[Tensor, Tensor]:
        """``r1`` and ``r2`` [channels] of a boundary with the scales found so far (half the paper's, which are both)."""
        boundary = self.boundaries[index]
        r1 = self._peaks[str(boundary.producer.target)].amax(2).flatten()
        read = []
        for node, repeat in boundary.consumers:
            inputs = self._peaks[str(node.target)].amax(1).flatten()
            read.append(inputs.unflatten(0, (-1, repeat)).amax(1))
        return r1, torch.stack(read).amax(0)

    def _step(self, index: int) -> float:
        r1, r2 = self.ranges(index)
        s = torch.where((r1 > 0) & (r2 > 0), torch.sqrt(r1 * r2) / r2, 1.0)
        s = torch.where(s.isfinite() & (s > 0), s, 1.0)
        boundary = self.boundaries[index]
        path = str(boundary.producer.target)
        self._peaks[path] = _scaled_outputs(self._peaks[path], 1 / s)
        for node, repeat in boundary.consumers:
            path = str(node.target)
            self._peaks[path] = _scaled_inputs(self._peaks[path], s.repeat_interleave(repeat))
        self.scales[index] *= s
        return float((s - 1).abs().max())

    def apply(self) -> None:
        """Put the scaled weights and biases, as new parameters."""
        weights = {path: canonical(layer) for path, layer in self.layers.items()}
        for boundary, s in zip(self.boundaries, self.scales, strict=True):
            path = str(boundary.producer.target)
            weights[path] = _scaled_outputs(weights[path], 1 / s)
            self._divide_bias(self.layers[path], s)
            for node, repeat in boundary.consumers:
                path = str(node.target)
                weights[path] = _scaled_inputs(weights[path], s.repeat_interleave(repeat))
        for path, layer in self.layers.items():
            layer._parameters["weight"] = _like(layer.weight, restored(layer, weights[path]))

    @staticmethod
    def _divide_bias(layer: Any, s: Tensor) -> None:
        if layer.bias is not None:
            layer._parameters["bias"] = _like(layer.bias, layer.bias.detach().double() / s.to(layer.bias.device))


def _like(old: Tensor, new: Tensor) -> nn.Parameter:
    return nn.Parameter(new.to(old.dtype), requires_grad=old.requires_grad)


def _scaled_outputs(weight: Tensor, factors: Tensor) -> Tensor:
    """A canonical weight (with or without taps) with its output channels times ``factors``."""
    shaped = factors.to(weight.device).reshape(weight.shape[:2])
    return weight * shaped.reshape(*shaped.shape, *[1] * (weight.dim() - 2))


def _scaled_inputs(weight: Tensor, factors: Tensor) -> Tensor:
    shaped = factors.to(weight.device).reshape(weight.shape[0], 1, weight.shape[2])
    return weight * shaped.reshape(*shaped.shape, *[1] * (weight.dim() - 3))
