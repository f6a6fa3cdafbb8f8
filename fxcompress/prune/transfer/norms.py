"""Normalization layers, as modules and as functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn
from torch.fx import Node

from fxcompress.prune.flow import Flow, Value, is_zero
from fxcompress.prune.labels import Columns
from fxcompress.prune.transfer.layers import parameter
from fxcompress.prune.transfer.reductions import spatial
from fxcompress.prune.transfer.registry import arguments, layer, operator

__all__: list[str] = []


def _own(flow: Flow, node: Node, names: Sequence[str], dims: Sequence[int] = (0,)) -> list[Value]:
    found = [parameter(flow, node, name, dims) for name in names]
    return [v for v in found if v is not None]


def _given(flow: Flow, args: dict[str, Any], names: Sequence[str]) -> list[Value]:
    found = [flow.of(args.get(name)) for name in names]
    return [v for v in found if v is not None]


# ------------------------------------------------------------------------------------------------ per channel
@layer(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def _batch_norm(flow: Flow, node: Node) -> Any:
    affine = _own(flow, node, ("weight", "bias"))
    return _per_channel(flow, node, affine, _own(flow, node, ("running_mean", "running_var")))


@operator("batch_norm", "instance_norm")
def _functional_batch_norm(flow: Flow, node: Node) -> Any:
    args = arguments(node)
    return _per_channel(
        flow, node, _given(flow, args, ("weight", "bias")), _given(flow, args, ("running_mean", "running_var"))
    )


def _per_channel(flow: Flow, node: Node, affine: list[Value], statistics: list[Value]) -> Any:
    x = flow.of(node.args[0])
    if x is None or len(x.sizes) < 2:
        return flow.give_up(node, "a norm of another form")
    own = flow.tie_all([x.dims[1], *(v.dims[0] for v in (*affine, *statistics))], node)
    if affine:
        fills = [np.zeros(len(c.atoms)) for c in own]
    else:  # it is masked through its running mean: a zero stays zero
        for value in statistics[:1]:
            flow.zero_buffer(value)
        keeps = all(is_zero(c) for c in flow.columns(x, 1))
        fills = [np.zeros(len(c.atoms)) if keeps else np.full(len(c.atoms), np.nan) for c in own]
    dims = [tuple(c.filled(np.nan) for c in flow.labels.resolve(d)) for d in spatial(flow, node, x, 2, x.sizes).dims]
    dims[1] = tuple(c.filled(f) for c, f in zip(own, fills, strict=True))
    flow.outputs.setdefault(node.name, 1)
    return Value(x.sizes, tuple(dims))


# ------------------------------------------------------------------------------------------------ over channels
@layer(nn.LayerNorm, nn.RMSNorm)
def _layer_norm(flow: Flow, node: Node) -> Any:
    module: Any = flow.program.module(node)
    dims = tuple(range(len(module.normalized_shape)))
    return _over_last(
        flow, node, _own(flow, node, ("weight", "bias"), dims), len(dims), getattr(module, "bias", None) is not None
    )


@operator("layer_norm", "rms_norm")
def _functional_layer_norm(flow: Flow, node: Node) -> Any:
    args = arguments(node)
    affine = _given(flow, args, ("weight", "bias"))
    return _over_last(flow, node, affine, len(args["normalized_shape"]), args.get("bias") is not None)


def _over_last(flow: Flow, node: Node, affine: list[Value], n: int, has_bias: bool) -> Any:
    x = flow.of(node.args[0])
    if x is None:
        return flow.give_up(node, "a norm of another form")
    first = len(x.sizes) - n
    dims: list[Columns] = [
        tuple(c.filled(np.where((c.fill == 0) & (not has_bias), 0.0, np.nan)) for c in flow.columns(x, d))
        for d in range(first)
    ]
    wide = flow.width and n == 1 and bool(affine)
    for d in range(first, len(x.sizes)):
        own = flow.tie_all([x.dims[d], *(v.dims[d - first] for v in affine)], node)
        if wide:
            own = tuple(c.filled(0.0) for c in flow.labels.resolve(own))
            flow.statistics[node.name] = own
        else:
            flow.pin(own, node, "its statistics run over the channels (width=True prunes them)")
        dims.append(flow.labels.resolve(own))
    flow.outputs.setdefault(node.name, len(x.sizes) - 1)
    return Value(x.sizes, tuple(dims))


@layer(nn.GroupNorm)
def _group_norm(flow: Flow, node: Node) -> Any:
    module: Any = flow.program.module(node)
    return _grouped(flow, node, _own(flow, node, ("weight", "bias")), module.num_groups)


@operator("group_norm")
def _functional_group_norm(flow: Flow, node: Node) -> Any:
    args = arguments(node)
    return _grouped(flow, node, _given(flow, args, ("weight", "bias")), args["num_groups"])


def _grouped(flow: Flow, node: Node, affine: list[Value], groups: int) -> Any:
    """Whole groups may go; a part of a group would change the group's statistics."""
    x = flow.of(node.args[0])
    if x is None or len(x.sizes) < 2:
        return flow.give_up(node, "a norm of another form")
    n = x.sizes[1]
    outer, inner = flow.labels.split(x.dims[1], [groups, n // groups], f"{node}: the only group of a norm")
    flow.tag(outer, "group")
    if n // groups > 1:
        flow.pin(inner, node, "its statistics run over the channels of a group")
    own = flow.tie_all([x.dims[1], *(v.dims[0] for v in affine)], node)
    keeps = bool(affine) or all(is_zero(c) for c in flow.columns(x, 1))
    dims = [tuple(c.filled(np.nan) for c in flow.labels.resolve(d)) for d in spatial(flow, node, x, 2, x.sizes).dims]
    dims[1] = tuple(c.filled(0.0 if keeps else np.nan) for c in flow.labels.resolve(own))
    flow.outputs.setdefault(node.name, 1)
    return Value(x.sizes, tuple(dims))
