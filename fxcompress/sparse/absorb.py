"""Reorder a layer's input channels without changing what the model computes.

The layers that make the input reorder their output channels the same way. Between them and the layer there may be
whatever treats all channels alike: element-wise functions, pooling, dropout, norms and depthwise convolutions (their
per-channel tensors move along), products and sums of such values (a gated MLP). Anything else is a refusal with its
reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxcompress.ir import Program
from fxcompress.layers import Fused, TransposedLinear
from fxcompress.layerwise.store import WeightStore
from fxcompress.rewrite import Analysis
from fxcompress.sizes import fixed_size
from fxcompress.sparse.layers import is_weighted

__all__ = ["Chain", "find_chain", "node_of", "permute_inputs"]

_aten = torch.ops.aten
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_LAST_NORMS = (nn.LayerNorm, nn.RMSNorm)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.Identity)
#: Functions of single values; all arguments behind the first are constants.
_ELEMENTWISE = {
    _aten.relu, _aten.relu6, _aten.hardtanh, _aten.leaky_relu, _aten.elu, _aten.selu, _aten.silu, _aten.mish,
    _aten.hardswish, _aten.hardsigmoid, _aten.gelu, _aten.sigmoid, _aten.tanh, _aten.softplus, _aten.exp, _aten.abs,
    _aten.square, _aten.sqrt, _aten.rsqrt, _aten.neg, _aten.pow, _aten.clamp, _aten.clamp_min, _aten.to, _aten.clone,
    _aten.contiguous, _aten.detach, _aten.alias,
}  # fmt: skip
_VIEWS = {_aten.view, _aten.reshape}
_BINARY = {_aten.add, _aten.sub, _aten.mul, _aten.div}
#: Keep dimension 1 as it is.
_POOLS = {
    _aten.max_pool1d, _aten.max_pool2d, _aten.max_pool3d, _aten.avg_pool1d, _aten.avg_pool2d, _aten.avg_pool3d,
    _aten.adaptive_avg_pool1d, _aten.adaptive_avg_pool2d, _aten.adaptive_avg_pool3d, _aten.adaptive_max_pool2d,
    _aten.upsample_nearest2d, _aten.upsample_bilinear2d,
}  # fmt: skip


@dataclass
class Chain:
    """Everything that moves when the input channels of ``consumer`` are reordered.

    Attributes:
        consumer: The layer.
        moved: Tensors that move along: the module that holds it, its name there, the axis of the channels.
        producers: Names of the layers that make the input.
    """

    consumer: Node
    moved: list[tuple[nn.Module, str, int]] = field(default_factory=list)
    producers: list[str] = field(default_factory=list)


def find_chain(analysis: Analysis, consumer: Node) -> Chain | str:
    """What has to move with the input channels of ``consumer``, or why they cannot be reordered."""
    layer: Any = analysis.program.module(consumer)
    reason = _unusable(analysis, consumer)
    if reason:
        return reason
    source = cast(Node, consumer.args[0])
    dim = _channel_dim(layer, source.meta["val"].dim())
    tracer = _Tracer(analysis, consumer, int(source.meta["val"].shape[dim]))
    reason = tracer.trace(source, dim) or tracer.outside_user()
    if reason:
        return reason
    tracer.chain.moved.append((layer, "weight", _input_axis(layer)))
    return tracer.chain


def permute_inputs(chain: Chain, permutation: Tensor, store: WeightStore) -> None:
    """Take the input channels in another order, everywhere along the chain: new channel i is old ``permutation[i]``."""
    for module, name, axis in chain.moved:
        tensor = cast(Tensor, getattr(module, name)).detach()
        store.put(module, name, tensor.index_select(axis, permutation.to(tensor.device)))


def _unusable(analysis: Analysis, node: Node) -> str:
    """Why the channels of a layer cannot be moved."""
    layer: Any = analysis.program.module(node)
    if analysis.calls(node) > 1:
        return f"{node.target} is called more than once"
    other = analysis.shared_with(node)
    if other:
        return f"{node.target} shares a tensor with {other}"
    if getattr(layer, "groups", 1) != 1:
        return f"{node.target} has groups"
    if isinstance(layer, Fused) and (len(node.args) > 1 or layer.weight_fake_quantize is not None):
        return f"{node.target} is fused with a residual or quantized"
    return ""


def _channel_dim(layer: Any, dims: int) -> int:
    if isinstance(layer, (nn.Linear, TransposedLinear)):
        return dims - 1
    return dims - int(layer.weight.dim()) + 1  # 0 without a batch


def _input_axis(layer: nn.Module) -> int:
    return 0 if isinstance(layer, (TransposedLinear, *_TRANSPOSED)) else 1


def _norm_fits(node: Node, module: Any, dim: int) -> bool:
    if isinstance(module, _BATCH_NORMS):
        return dim == 1
    last = dim == node.meta["val"].dim() - 1
    return isinstance(module, _LAST_NORMS) and len(module.normalized_shape) == 1 and last


def _keeps_last(node: Node, dim: int) -> bool:
    """True for a view that only regroups the dimensions before the last one, which holds the channels."""
    new, old = node.meta["val"], cast(Node, node.args[0]).meta["val"]
    return dim == new.dim() - 1 and old.dim() > 0 and fixed_size(new.shape[-1]) == fixed_size(old.shape[-1]) is not None


class _Tracer:
    def __init__(self, analysis: Analysis, consumer: Node, size: int) -> None:
        self.analysis, self.program, self.size = analysis, analysis.program, size
        self.chain = Chain(consumer)
        self.seen: set[Node] = set()

    def outside_user(self) -> str:
        """Why the chain is not closed: something else reads a value that is to be reordered."""
        for node in self.seen:
            others = [u for u in node.users if u not in self.seen and u is not self.chain.consumer]
            if others:
                return f"{others[0].name} reads {node.name} too"
        return ""

    def trace(self, node: Node, dim: int) -> str:
        """Collect what makes ``node``, whose channels are dimension ``dim``; a reason when it cannot be reordered."""
        if node in self.seen:
            return ""
        self.seen.add(node)
        if node.op == "call_module":
            return self._module(node, dim)
        if node.op == "call_function":
            return self._function(node, dim)
        return "it is an input of the model" if node.op == "placeholder" else self._parameter(node)

    def _module(self, node: Node, dim: int) -> str:
        module: Any = self.program.module(node)
        if isinstance(module, _DROPOUTS):
            return self.trace(cast(Node, node.args[0]), dim)
        if is_weighted(module):
            return self._layer(node, module, dim)
        if not _norm_fits(node, module, dim):
            return f"{node.target} ({type(module).__name__}) mixes or regroups channels"
        if self.analysis.calls(node) > 1 or self.analysis.shared_with(node):
            return f"{node.target} is shared"
        self._take(module, ("weight", "bias", "running_mean", "running_var"))
        return self.trace(cast(Node, node.args[0]), dim)

    def _layer(self, node: Node, module: Any, dim: int) -> str:
        if _channel_dim(module, node.meta["val"].dim()) != dim:
            return f"{node.target} counts channels on another axis"
        if getattr(module, "groups", 1) == module.weight.shape[0] == self.size and self.size > 1:
            return self._depthwise(node, module, dim)
        reason = _unusable(self.analysis, node)
        if reason:
            return reason
        self.chain.producers.append(str(node.target))
        self.chain.moved.append((module, "weight", 1 - _input_axis(module)))
        self._take(module, ("bias",))
        return ""

    def _depthwise(self, node: Node, module: Any, dim: int) -> str:
        odd = isinstance(module, Fused) and (len(node.args) > 1 or module.weight_fake_quantize is not None)
        one_each = module.in_channels == module.out_channels
        if odd or not one_each or self.analysis.calls(node) > 1 or self.analysis.shared_with(node):
            return f"{node.target} is shared, fused with a residual, or has more outputs than inputs"
        self._take(module, ("weight", "bias"))
        return self.trace(cast(Node, node.args[0]), dim)

    def _take(self, module: nn.Module, names: tuple[str, ...]) -> None:
        self.chain.moved += [(module, name, 0) for name in names if getattr(module, name, None) is not None]

    def _function(self, node: Node, dim: int) -> str:
        packet = getattr(node.target, "overloadpacket", None)
        nodes = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, Node)]
        first = nodes == list(node.args[:1])
        if first and (packet in _ELEMENTWISE or (packet in _POOLS and dim == 1 and node.meta["val"].dim() > 2)):
            return self.trace(nodes[0], dim)
        if packet in _BINARY:
            return next((reason for n in nodes if (reason := self._operand(node, n, dim))), "")
        if packet in _VIEWS and _keeps_last(node, dim):
            source = cast(Node, node.args[0])
            return self.trace(source, source.meta["val"].dim() - 1)
        return f"{node.name} ({node.target}) may mix or regroup channels"

    def _operand(self, node: Node, operand: Node, dim: int) -> str:
        """An operand of a sum or product: alike for all channels, or traced."""
        value = operand.meta.get("val")
        if not isinstance(value, Tensor):
            return ""
        axis = dim - (node.meta["val"].dim() - value.dim())
        if axis < 0 or value.shape[axis] == 1:
            return ""
        return self.trace(operand, axis)

    def _parameter(self, node: Node) -> str:
        """A per-channel parameter that is read without a layer, such as a scale."""
        path, _, name = str(node.target).rpartition(".")
        holder = self.program.gm.get_submodule(path)
        value = self.program.tensor(node)
        readers = [n for n in self.program.graph.nodes if n.op == "get_attr" and self.program.tensor(n) is value]
        sizes = [axis for axis, size in enumerate(value.shape) if size != 1]
        if len(readers) > 1 or len(sizes) != 1 or getattr(holder, name, None) is not value:
            return f"{node.target} is no vector over the channels, or is shared"
        if name not in holder._parameters and name not in holder._buffers:
            return f"{node.target} is a constant"
        self.chain.moved.append((holder, name, sizes[0]))
        return ""


def node_of(program: Program, weight: Tensor) -> Node | None:
    """The node of the layer that holds ``weight``, or None."""
    for node, module in program.layers():
        if module._parameters.get("weight") is weight and is_weighted(module):
            return node
    return None
