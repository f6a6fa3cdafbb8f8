"""Which ATen call is which layer: builders that read a plain layer's options off the call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.fx import Node

from fxcompress.layers import TransposedLinear

__all__ = ["RULES", "Call", "Rule", "dropout_layer"]

_aten = torch.ops.aten


@dataclass
class Call:
    """One ATen call: ``args`` by schema name, and the user's module that owns its parameters."""

    node: Node
    args: dict[str, Any]
    original: nn.Module | None

    def ndim(self) -> int:
        """Number of dimensions of the input."""
        return int(self.args["input"].meta["val"].dim())

    def weight_shape(self) -> torch.Size:
        """Shape of the weight."""
        return cast(torch.Size, self.args["weight"].meta["val"].shape)


@dataclass(frozen=True)
class Rule:
    """How one ATen overload becomes a layer.

    Attributes:
        build: The layer without its tensors, or None when no layer does exactly this.
        inputs: Schema names of the layer's inputs.
        params: (schema name, name in the layer) of its parameters and buffers.
        rename: (schema name, name used here) where the schema's own is unusual.
        named_freely: The weight may have any name in the user's module (``F.conv2d(x, self.w)``).
    """

    build: Callable[[Call], nn.Module | None]
    inputs: tuple[str, ...] = ("input",)
    params: tuple[tuple[str, str], ...] = (("weight", "weight"), ("bias", "bias"))
    rename: tuple[tuple[str, str], ...] = ()
    named_freely: bool = True


def _skeleton(kind: Any, *args: Any, **kwargs: Any) -> nn.Module:
    """The layer without allocating its parameters."""
    return cast(nn.Module, kind(*args, device="meta", **kwargs))


def _repeat(value: Any, dims: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return values * dims if len(values) == 1 else values


def _conv(dims: int) -> Callable[[Call], nn.Module]:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]

    def build(call: Call) -> nn.Module:
        a, shape = call.args, call.weight_shape()
        groups = a["groups"]
        padding = a["padding"] if isinstance(a["padding"], str) else _repeat(a["padding"], dims)
        geometry = (_repeat(a["stride"], dims), padding, _repeat(a["dilation"], dims))
        bias = a["bias"] is not None
        return _skeleton(kind, shape[1] * groups, shape[0], tuple(shape[2:]), *geometry, groups, bias=bias)

    return build


def _conv_transpose(dims: int) -> Callable[[Call], nn.Module]:
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]

    def build(call: Call) -> nn.Module:
        a, shape = call.args, call.weight_shape()
        geometry = [_repeat(a[k], dims) for k in ("stride", "padding", "output_padding")]
        tail = {"bias": a["bias"] is not None, "dilation": _repeat(a["dilation"], dims)}
        return _skeleton(kind, shape[0], shape[1] * a["groups"], tuple(shape[2:]), *geometry, a["groups"], **tail)

    return build


def _linear(call: Call) -> nn.Module | None:
    shape = call.weight_shape()
    if len(shape) != 2:
        return None
    return _skeleton(nn.Linear, shape[1], shape[0], bias=call.args["bias"] is not None)


def _batch_norm(call: Call) -> nn.Module | None:
    a = call.args
    if a["training"] or a["running_mean"] is None or (a["weight"] is None) != (a["bias"] is None):
        return None
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}.get(call.ndim())
    return None if kind is None else _running_norm(kind, call, a["momentum"])


def _running_norm(kind: Any, call: Call, momentum: float) -> nn.Module:
    """A norm with running statistics; the step count, which no operator reads, comes from the user's module."""
    momentum = getattr(call.original, "momentum", momentum)
    features = call.args["running_mean"].meta["val"].shape[0]
    affine = call.args["weight"] is not None
    layer = _skeleton(kind, features, eps=call.args["eps"], momentum=momentum, affine=affine, track_running_stats=True)
    layer._buffers["num_batches_tracked"] = getattr(call.original, "num_batches_tracked", None)
    return layer


def _instance_norm(call: Call) -> nn.Module | None:
    a = call.args
    kind = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}.get(call.ndim())
    if kind is None or (a["weight"] is None) != (a["bias"] is None):
        return None
    if a["running_mean"] is not None:
        return None if a["use_input_stats"] else _running_norm(kind, call, a["momentum"])
    if a["weight"] is None:
        return None
    return _skeleton(kind, call.weight_shape()[0], eps=a["eps"], momentum=a["momentum"], affine=True)


def _layer_norm(call: Call) -> nn.Module | None:
    a = call.args
    if a["weight"] is None:
        return None
    return _skeleton(nn.LayerNorm, list(a["normalized_shape"]), eps=a["eps"], bias=a["bias"] is not None)


def _group_norm(call: Call) -> nn.Module | None:
    a = call.args
    if a["weight"] is None or a["bias"] is None:
        return None
    return _skeleton(nn.GroupNorm, a["num_groups"], call.weight_shape()[0], eps=a["eps"])


def _embedding(call: Call) -> nn.Module:
    rows, width = call.weight_shape()
    a = call.args
    padding = a["padding_idx"] if a["padding_idx"] >= 0 else None
    flags = {"scale_grad_by_freq": a["scale_grad_by_freq"], "sparse": a["sparse"]}
    return _skeleton(nn.Embedding, rows, width, padding_idx=padding, **flags)


def _addmm(call: Call) -> nn.Module | None:
    rows, columns = call.weight_shape()
    bias = call.args["bias"].meta["val"]
    if call.args["beta"] != 1 or call.args["alpha"] != 1 or tuple(bias.shape) != (columns,):
        return None
    return _transposed_linear(rows, columns, bias=True)


def _matmul(call: Call) -> nn.Module | None:
    shape = call.weight_shape()
    return _transposed_linear(shape[0], shape[1], bias=False) if len(shape) == 2 and call.ndim() >= 2 else None


def _transposed_linear(rows: int, columns: int, bias: bool) -> nn.Module:
    offset = nn.Parameter(torch.empty(columns, device="meta")) if bias else None
    return TransposedLinear(nn.Parameter(torch.empty(rows, columns, device="meta")), offset)


def _recurrent(kind: Any) -> Callable[[Call], nn.Module | None]:
    def build(call: Call) -> nn.Module | None:
        a = call.args
        owner = call.original
        if not isinstance(owner, kind) or getattr(owner, "proj_size", False) or a["train"]:
            return None
        options = {name: a[name] for name in ("num_layers", "bidirectional", "batch_first")}
        layer: Any = owner
        return _skeleton(
            kind, layer.input_size, layer.hidden_size, bias=a["has_biases"], dropout=a["dropout"], **options
        )

    return build


_WEIGHT_BIAS = (("weight", "weight"), ("bias", "bias"))
_STATISTICS = (("running_mean", "running_mean"), ("running_var", "running_var"))
_CONVS = ((_aten.conv1d, 1), (_aten.conv2d, 2), (_aten.conv3d, 3))

#: Overload -> rule.
RULES: dict[Any, Rule] = {
    **{op: Rule(_conv(d)) for packet, d in _CONVS for op in (packet.default, packet.padding)},
    _aten.conv_transpose1d.default: Rule(_conv_transpose(1)),
    _aten.conv_transpose2d.input: Rule(_conv_transpose(2)),
    _aten.conv_transpose3d.input: Rule(_conv_transpose(3)),
    _aten.linear.default: Rule(_linear),
    _aten.batch_norm.default: Rule(_batch_norm, params=_WEIGHT_BIAS + _STATISTICS, named_freely=False),
    _aten.instance_norm.default: Rule(_instance_norm, params=_WEIGHT_BIAS + _STATISTICS, named_freely=False),
    _aten.layer_norm.default: Rule(_layer_norm, named_freely=False),
    _aten.group_norm.default: Rule(_group_norm, named_freely=False),
    _aten.embedding.default: Rule(_embedding, inputs=("indices",), params=(("weight", "weight"),)),
    _aten.addmm.default: Rule(_addmm, rename=(("self", "bias"), ("mat1", "input"), ("mat2", "weight"))),
    _aten.mm.default: Rule(_matmul, params=(("weight", "weight"),), rename=(("self", "input"), ("mat2", "weight"))),
    _aten.matmul.default: Rule(
        _matmul, params=(("weight", "weight"),), rename=(("self", "input"), ("other", "weight"))
    ),
    _aten.lstm.input: Rule(_recurrent(nn.LSTM), inputs=("input", "hx"), params=()),
    _aten.gru.input: Rule(_recurrent(nn.GRU), inputs=("input", "hx"), params=()),
}

_DROPOUTS: dict[Any, Any] = {
    _aten.dropout.default: nn.Dropout,
    _aten.alpha_dropout.default: nn.AlphaDropout,
    _aten.feature_alpha_dropout.default: nn.FeatureAlphaDropout,
    _aten.feature_dropout.default: None,
}
_CHANNEL_DROPOUTS: dict[int, Any] = {3: nn.Dropout1d, 4: nn.Dropout2d, 5: nn.Dropout3d}


def dropout_layer(node: Node) -> nn.Module | None:
    """The dropout layer that an ATen dropout recorded in eval mode comes from; None for anything else.

    Dropout that is on in eval mode (``F.dropout(x)`` without ``training=self.training``) stays an operator.
    """
    if node.target not in _DROPOUTS or len(node.args) != 3 or node.args[2]:
        return None
    kind = _DROPOUTS[node.target] or _CHANNEL_DROPOUTS.get(cast(Node, node.args[0]).meta["val"].dim())
    return None if kind is None else cast(nn.Module, kind(p=node.args[1]))
