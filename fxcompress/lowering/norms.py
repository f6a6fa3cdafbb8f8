"""Normalization layers and their functional twins as ONNX."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.fx import Node

from fxcompress.lowering.builder import Builder, Unsupported, dtype_of, lowers, lowers_module, rank_of

_aten = torch.ops.aten
_SCALE_SHIFT = (("weight", 1.0), ("bias", 0.0))


@lowers_module(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def _batch_norm(b: Builder, node: Node, layer: Any) -> Any:
    path, features = str(node.target), layer.num_features
    if layer.running_mean is None or layer.running_var is None:
        raise Unsupported("a BatchNorm without running statistics")
    dtype = layer.running_mean.dtype
    scale = layer.weight if layer.weight is not None else torch.ones(features, dtype=dtype)
    shift = layer.bias if layer.bias is not None else torch.zeros(features, dtype=dtype)
    tensors = {"weight": scale, "bias": shift, "running_mean": layer.running_mean, "running_var": layer.running_var}
    values = [b.parameter(f"{path}.{name}", tensor) for name, tensor in tensors.items()]
    return b.op("BatchNormalization", b.value(node.args[0]), *values, epsilon=float(layer.eps))


@lowers(_aten.batch_norm.default)
def _batch_norm_function(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    x, channels, dtype = a["input"], a["input"].meta["val"].shape[1], dtype_of(node)
    weight, bias = (
        b.constant(torch.full((channels,), f, dtype=dtype)) if a[k] is None else b.value(a[k]) for k, f in _SCALE_SHIFT
    )
    if not a["training"] and a["running_mean"] is not None:
        return b.op(
            "BatchNormalization",
            b.value(x),
            weight,
            bias,
            *map(b.value, (a["running_mean"], a["running_var"])),
            epsilon=a["eps"],
        )
    # Statistics of the batch itself, as weight standardisation uses them.
    axes = b.ints([d for d in range(rank_of(x)) if d != 1])
    column = b.ints([channels, *[1] * (rank_of(x) - 2)])
    centred = b.op("Sub", b.value(x), b.op("ReduceMean", b.value(x), axes))
    variance = b.op("ReduceMean", b.op("Mul", centred, centred), axes)
    normed = b.op("Div", centred, b.op("Sqrt", b.op("Add", variance, b.scalar(a["eps"], dtype))))
    return b.op("Add", b.op("Mul", normed, b.op("Reshape", weight, column)), b.op("Reshape", bias, column))


@lowers(_aten._weight_norm.default)
def _weight_norm(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    axes = b.ints([d for d in range(rank_of(a["v"])) if d != a["dim"]])
    v = b.value(a["v"])
    return b.op("Mul", v, b.op("Div", b.value(a["g"]), b.op("ReduceL2", v, axes)))


@lowers_module(nn.LayerNorm)
def _layer_norm_layer(b: Builder, node: Node, layer: nn.LayerNorm) -> Any:
    weight = b.parameter(f"{node.target}.weight", layer.weight)
    bias = None if layer.bias is None else b.parameter(f"{node.target}.bias", layer.bias)
    inputs = (weight,) if bias is None else (weight, bias)
    axis = -len(layer.normalized_shape)
    return b.op("LayerNormalization", b.value(node.args[0]), *inputs, axis=axis, epsilon=float(layer.eps))


@lowers(_aten.layer_norm.default)
def _layer_norm_function(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    shape = b.static(a["normalized_shape"])
    weight = b.constant(torch.ones(shape, dtype=dtype_of(node))) if a["weight"] is None else b.value(a["weight"])
    inputs = (weight,) if a["bias"] is None else (weight, b.value(a["bias"]))
    return b.op("LayerNormalization", b.value(a["input"]), *inputs, axis=-len(shape), epsilon=float(a["eps"]))


@lowers_module(nn.GroupNorm)
def _group_norm_layer(b: Builder, node: Node, layer: nn.GroupNorm) -> Any:
    weight, bias = (b.parameter(f"{node.target}.{n}", getattr(layer, n)) for n in ("weight", "bias"))
    return _emit_group_norm(b, cast(Node, node.args[0]), layer.num_groups, weight, bias, layer.eps)


@lowers(_aten.group_norm.default)
def _group_norm_function(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    weight, bias = (None if a[n] is None else b.value(a[n]) for n in ("weight", "bias"))
    return _emit_group_norm(b, a["input"], a["num_groups"], weight, bias, a["eps"])


def _emit_group_norm(b: Builder, x: Node, groups: int, weight: Any, bias: Any, eps: float) -> Any:
    """Instance norm over the groups, then scale and shift per channel: the form both engines run natively."""
    val = x.meta["val"]
    dtype, channels = val.dtype, val.shape[1]
    ones, zeros = torch.ones(groups, dtype=dtype), torch.zeros(groups, dtype=dtype)
    flat = b.op("Reshape", b.value(x), b.ints([0, groups, -1]))
    normed = b.op("InstanceNormalization", flat, b.constant(ones), b.constant(zeros), epsilon=float(eps))
    y = b.op("Reshape", normed, b.op("Shape", b.value(x)))
    column = b.ints([channels, *[1] * (val.dim() - 2)])
    y = y if weight is None else b.op("Mul", y, b.op("Reshape", weight, column))
    return y if bias is None else b.op("Add", y, b.op("Reshape", bias, column))


@lowers_module(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def _instance_norm_layer(b: Builder, node: Node, layer: Any) -> Any:
    if layer.track_running_stats or rank_of(cast(Node, node.args[0])) < 3:
        raise Unsupported("an instance norm with running statistics, or of one sample")
    tensors = [getattr(layer, k) for k, _ in _SCALE_SHIFT]
    weight, bias = (
        b.constant(torch.full((layer.num_features,), f, dtype=dtype_of(node)))
        if tensor is None
        else b.parameter(f"{node.target}.{k}", tensor)
        for tensor, (k, f) in zip(tensors, _SCALE_SHIFT, strict=True)
    )
    return b.op("InstanceNormalization", b.value(node.args[0]), weight, bias, epsilon=float(layer.eps))


@lowers(_aten.instance_norm.default)
def _instance_norm(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    channels, dtype = a["input"].meta["val"].shape[1], dtype_of(node)
    if not a["use_input_stats"] or not isinstance(channels, int):
        raise Unsupported("an instance norm with running statistics, or of a dynamic number of channels")
    weight, bias = (
        b.constant(torch.full((channels,), f, dtype=dtype)) if a[k] is None else b.value(a[k]) for k, f in _SCALE_SHIFT
    )
    return b.op("InstanceNormalization", b.value(a["input"]), weight, bias, epsilon=float(a["eps"]))


@lowers(_aten.rms_norm.default)
def _rms_norm(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimensions."""
    x, dtype = b.value(a["input"]), dtype_of(node)
    axes = b.ints(range(-len(a["normalized_shape"]), 0))
    eps = torch.finfo(dtype).eps if a["eps"] is None else b.static(a["eps"])
    energy = b.op("ReduceMean", b.op("Mul", x, x), axes, keepdims=1)
    y = b.op("Div", x, b.op("Sqrt", b.op("Add", energy, b.scalar(eps, dtype))))
    return y if a["weight"] is None else b.op("Mul", y, b.value(a["weight"]))
