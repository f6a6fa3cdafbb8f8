"""Elementwise operators: they tie the dimensions of their operands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from fxcompress.layers import Activation
from fxcompress.prune.flow import Flow, Value
from fxcompress.prune.labels import Columns, Floats
from fxcompress.prune.transfer.registry import LAYERS, layer, operator

__all__ = ["aligned", "elementwise", "is_pointwise", "pointwise", "unchanged"]

#: Elementwise operators that PyTorch does not mark as such, and some that only ever copy.
_UNMARKED = (
    "where",
    "masked_fill",
    "clamp",
    "type_as",
    "softplus",
    "hardswish",
    "hardsigmoid",
    "addcmul",
    "addcdiv",
    "lerp",
)
_COPIES = (
    *("contiguous", "clone", "to", "_to_copy", "alias", "detach", "dropout", "feature_dropout", "alpha_dropout"),
    *("lift_fresh_copy", "type_as", "float", "double", "half", "bfloat16", "native_dropout", "feature_alpha_dropout"),
)
#: Zero whatever one of these factors is.
_PRODUCTS = {"mul": (0, 1), "div": (0,), "multiply": (0, 1), "divide": (0,), "true_divide": (0,), "masked_fill": ()}


def is_pointwise(target: Any) -> bool:
    """True for operators that work element by element."""
    packet = getattr(target, "overloadpacket", None)
    return torch.Tag.pointwise in getattr(target, "tags", ()) or getattr(packet, "__name__", "") in _UNMARKED


def aligned(flow: Flow, operands: Sequence[Value], dim: int, rank: int, size: int) -> list[Columns | None]:
    """Dimension ``dim`` of a result of ``rank`` dimensions in each operand; None where the operand is broadcast."""
    found: list[Columns | None] = []
    for value in operands:
        own = dim - (rank - len(value.sizes))
        has = own >= 0 and (value.sizes[own] == size)
        found.append(flow.labels.resolve(value.dims[own]) if has else None)
    return found


def elementwise(flow: Flow, node: Node, operands: Sequence[Value], sizes: tuple[int, ...], fill: Any) -> Value:
    """The value behind an operator that combines ``operands`` under broadcasting."""
    rank = len(sizes)
    dims: list[Columns] = []
    for d, size in enumerate(sizes):
        columns = aligned(flow, operands, d, rank, size) if size > 1 else [None]
        dims.append(flow.join(columns, node, fill) if any(columns) else ())
    return Value(sizes, tuple(dims))


def pointwise(flow: Flow, node: Node) -> Any:
    """Any elementwise operator; what a removed index holds behind it is computed by the operator itself."""
    val = node.meta.get("val")
    if not isinstance(val, Tensor):
        return flow.give_up(node, "it yields more than one tensor")
    nodes = [a for a in pytree.tree_leaves((node.args, node.kwargs)) if flow.of(a) is not None]
    operands = [v for v in (flow.of(a) for a in nodes) if v is not None]
    return elementwise(flow, node, operands, flow.sizes(val), lambda fills: _evaluate(node, nodes, fills))


def _evaluate(node: Node, nodes: list[Any], fills: list[Floats | None]) -> Floats:
    """The operator on the operands' fills; NaN where it cannot be told."""
    n = len(next(f for f in fills if f is not None))
    arrays = [np.full(n, np.nan) if f is None else f for f in fills]
    name = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
    zero = np.zeros(n, dtype=np.bool_)
    for position in _PRODUCTS.get(name, ()):
        if position < len(node.args) and node.args[position] in nodes:
            zero |= arrays[nodes.index(node.args[position])] == 0
    if name == "addcmul":
        factors = [arrays[nodes.index(a)] for a in node.args[1:3] if a in nodes]
        return np.where(np.any([f == 0 for f in factors], axis=0), arrays[0], np.nan)
    if name in ("where", "masked_fill") or all(np.isnan(a).all() for a in arrays):
        return _chosen(node, nodes, arrays) if name in ("where", "masked_fill") else np.where(zero, 0.0, np.nan)
    return np.where(zero, 0.0, _apply(node, dict(zip(nodes, arrays, strict=True)), n))


def _chosen(node: Node, nodes: list[Any], arrays: list[Floats]) -> Floats:
    """``where`` and ``masked_fill``: known only where both choices hold the same."""
    name = node.target.overloadpacket.__name__  # type: ignore[union-attr]
    pair = [node.args[1], node.args[2]] if name == "where" else [node.args[0], node.args[2]]
    a, b = (arrays[nodes.index(p)] if p in nodes else np.full(len(arrays[0]), _number(p)) for p in pair)
    return np.where(a == b, a, np.nan)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else np.nan


def _apply(node: Node, known: dict[Any, Floats], n: int) -> Floats:
    def put(value: Any) -> Any:
        if not isinstance(value, Node):
            return value
        found = known.get(value)
        return torch.full((n,), torch.nan, dtype=torch.float64) if found is None else torch.tensor(found)

    args, kwargs = torch.fx.node.map_aggregate((node.args, node.kwargs), put)
    try:
        with np.errstate(all="ignore"):
            result = node.target(*args, **kwargs)  # type: ignore[operator]
    except (RuntimeError, TypeError, NotImplementedError, ValueError):
        return np.full(n, np.nan)  # for example a bitwise operator: no constant is known behind it
    if not isinstance(result, Tensor) or result.shape != (n,):
        return np.full(n, np.nan)
    found = result.double().numpy()
    return np.where(np.isfinite(found), found, np.nan)


@operator(*_COPIES)
def unchanged(flow: Flow, node: Node) -> Any:
    """Copies, conversions and dropout in eval mode."""
    source = flow.of(node.args[0])
    if source is None or not isinstance(node.meta.get("val"), Tensor):
        return flow.give_up(node, "it copies something that is no tensor")
    return source


@operator("prelu", "_prelu_kernel")
def _prelu(flow: Flow, node: Node) -> Any:
    x, slope = flow.of(node.args[0]), flow.of(node.args[1])
    assert x is not None and slope is not None
    if len(slope.sizes) == 1 and slope.sizes[0] > 1 and len(x.sizes) > 1:
        slope = Value((1, slope.sizes[0]) + (1,) * (len(x.sizes) - 2), ((), slope.dims[0]) + ((),) * (len(x.sizes) - 2))
    return elementwise(flow, node, [x, slope], x.sizes, lambda fills: _zero_stays(fills))


def _zero_stays(fills: list[Floats | None]) -> Floats:
    """Zero where the first operand is zero, unknown elsewhere."""
    first = fills[0] if fills[0] is not None else np.full(len(next(f for f in fills if f is not None)), np.nan)
    return np.where(first == 0, 0.0, np.nan)


def activated(flow: Flow, value: Value, activation: Activation | None) -> Value:
    """The value behind the activation of a fused layer."""
    if activation is None:
        return value

    def apply(columns: Columns) -> Columns:
        return tuple(c.filled(activation(torch.tensor(c.fill)).numpy()) for c in flow.labels.resolve(columns))

    return Value(value.sizes, tuple(apply(d) for d in value.dims))


@layer(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.Identity)
def _dropout(flow: Flow, node: Node) -> Any:
    return flow.of(node.args[0])


def knows_layer(module: nn.Module) -> bool:
    """True when some class of the module has a transfer."""
    return any(cls in LAYERS for cls in type(module).__mro__)
