"""Layers with weights: convolutions, linear layers, embeddings, recurrent layers; as modules and as functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn
from torch.fx import Node

from fxcompress.layers import Fused, TransposedLinear
from fxcompress.prune.flow import Flow, MovedConstant, Value, is_zero
from fxcompress.prune.labels import Columns
from fxcompress.prune.transfer.contract import sum_of_fills
from fxcompress.prune.transfer.pointwise import activated, elementwise
from fxcompress.prune.transfer.reductions import spatial
from fxcompress.prune.transfer.registry import arguments, layer, operator

__all__ = ["parameter"]


def parameter(flow: Flow, node: Node, name: str, dims: Sequence[int] = (0,)) -> Value | None:
    """Value of a layer's own tensor, or None when it has none of that name."""
    tensor = getattr(flow.program.module(node), name, None)
    if tensor is None:
        return None
    path = str(node.target)
    return flow.tensor(f"{path}.{name}", tensor, path, node.name, dims)


def _read(flow: Flow, node: Node, x: Columns, weight: Columns, moves: bool) -> None:
    """A layer sums over ``x`` with the columns of its weight: what is removed must be zero, or a constant to move."""
    flow.tie(x, weight, node)
    flow.mark_in(weight)
    columns = flow.labels.resolve(x)
    if not columns or all(is_zero(c) for c in columns):
        return
    if moves and len(columns) == 1:
        wrong = (columns[0].atoms >= 0) & np.isnan(columns[0].fill)
        flow.labels.pin_atoms(
            np.unique(columns[0].atoms[wrong]), f"{node}: no constant is left where channels are removed"
        )
        flow.moved.append(MovedConstant(node.name, str(node.target), columns))
    else:
        flow.need_zero(columns, node, "removed channels would leave a constant that no bias can hold exactly")


def _finish(
    flow: Flow, node: Node, sizes: tuple[int, ...], d: int, own: Columns, rest: dict[int, Columns], bias: Value | None
) -> Value:
    """Output of a layer: its own channels at ``d``, zero where removed; what else is carried along."""
    if bias is not None:
        flow.tie(own, bias.dims[0], node)
    flow.mark_out(own)
    own = tuple(c.filled(0.0) for c in flow.labels.resolve(own))
    dims: list[Columns] = [()] * len(sizes)
    for other, columns in rest.items():
        stays = bias is None
        dims[other] = tuple(
            c.filled(np.where((c.fill == 0) & stays, 0.0, np.nan)) for c in flow.labels.resolve(columns)
        )
    dims[d] = own
    flow.outputs.setdefault(node.name, d)
    return Value(sizes, tuple(dims))


# ------------------------------------------------------------------------------------------------ linear
@layer(nn.Linear, TransposedLinear)
def _linear(flow: Flow, node: Node) -> Any:
    module = flow.program.module(node)
    weight, bias = parameter(flow, node, "weight", (0, 1)), parameter(flow, node, "bias")
    transposed = isinstance(module, TransposedLinear)
    return _epilogue(
        flow, node, _apply_linear(flow, node, weight, bias, transposed=transposed, moves=_called_once(flow, node))
    )


@operator("linear")
def _functional_linear(flow: Flow, node: Node) -> Any:
    args = arguments(node)
    return _apply_linear(flow, node, flow.of(args["weight"]), flow.of(args["bias"]), transposed=False, moves=False)


def _apply_linear(
    flow: Flow, node: Node, weight: Value | None, bias: Value | None, *, transposed: bool, moves: bool
) -> Any:
    x = flow.of(node.args[0])
    if x is None or weight is None or len(weight.sizes) != 2:
        return flow.give_up(node, "a linear layer of another form")
    out, into = (1, 0) if transposed else (0, 1)
    _read(flow, node, x.dims[-1], weight.dims[into], moves)
    last = len(x.sizes) - 1
    flow.cost(node, [weight.dims[out], weight.dims[into], *x.dims[:-1]])
    rest = {d: x.dims[d] for d in range(last)}
    return _finish(flow, node, (*x.sizes[:-1], weight.sizes[out]), last, weight.dims[out], rest, bias)


def _called_once(flow: Flow, node: Node) -> bool:
    """A constant may only move into the bias of a layer that is called once."""
    module = flow.program.module(node)
    return flow.calls[str(node.target)] == 1 and not isinstance(module, Fused)


def _epilogue(flow: Flow, node: Node, value: Any) -> Any:
    """Residual and activation of a fused layer."""
    module = flow.program.module(node)
    if not isinstance(module, Fused) or not isinstance(value, Value):
        return value
    residual = flow.of(node.args[1]) if len(node.args) > 1 else flow.of(node.kwargs.get("residual"))
    if residual is not None:
        value = elementwise(flow, node, [value, residual], value.sizes, sum_of_fills)
    return activated(flow, value, module.activation)


# ------------------------------------------------------------------------------------------------ convolution
@layer(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def _conv(flow: Flow, node: Node) -> Any:
    module: Any = flow.program.module(node)
    weight, bias = parameter(flow, node, "weight", (0, 1)), parameter(flow, node, "bias")
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
    unpadded = not transposed and _is_zero_padding(module.padding)
    moves = unpadded and module.groups == 1 and _called_once(flow, node)
    value = _apply_conv(flow, node, weight, bias, groups=module.groups, transposed=transposed, moves=moves)
    return _epilogue(flow, node, value)


def _is_zero_padding(padding: Any) -> bool:
    return padding == "valid" or (not isinstance(padding, str) and not np.any(np.asarray(padding)))


@operator("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _functional_conv(flow: Flow, node: Node) -> Any:
    args = arguments(node)
    weight, bias = flow.of(args["weight"]), flow.of(args["bias"])
    if weight is not None:
        flow.pin_value(weight, node, "kernel positions", list(range(2, len(weight.sizes))))
    transposed = "transpose" in str(node.target)
    return _apply_conv(flow, node, weight, bias, groups=args["groups"], transposed=transposed, moves=False)


def _apply_conv(
    flow: Flow, node: Node, weight: Value | None, bias: Value | None, *, groups: int, transposed: bool, moves: bool
) -> Any:
    x = flow.of(node.args[0])
    if x is None or weight is None or len(x.sizes) != len(weight.sizes):
        return flow.give_up(node, "a convolution without a batch dimension")
    sizes = flow.sizes(node.meta["val"])
    n_in = x.sizes[1]
    # a grouped convolution has a grid of channels: groups, which both sides share, and positions within a group
    reason = f"{node}: the one group of a convolution"
    shared, inside = flow.labels.split(x.dims[1], [groups, n_in // groups], reason) if groups > 1 else ((), x.dims[1])
    flow.tag(shared, "group")
    flat, rows = (weight.dims[0], weight.dims[1]) if transposed else (weight.dims[1], weight.dims[0])
    own = _conv_channels(flow, node, groups, shared, inside, flat, rows, transposed=transposed, moves=moves)
    if set(weight.sizes[2:]) == {1} and sizes[2:] == x.sizes[2:]:  # every position by itself: it may carry channels
        rest = {d: x.dims[d] for d in range(len(sizes)) if d != 1}
    else:
        rest = {0: spatial(flow, node, x, 2, sizes).dims[0]}
    flow.cost(node, [own, inside, *(columns for d, columns in rest.items() if d > 1)])
    return _finish(flow, node, sizes, 1, own, rest, bias)


def _conv_channels(
    flow: Flow,
    node: Node,
    groups: int,
    shared: Columns,
    inside: Columns,
    flat: Columns,
    rows: Columns,
    *,
    transposed: bool,
    moves: bool,
) -> Columns:
    """Tie a convolution's weight to its input; returns the output's channels.

    ``flat`` is the weight's input dimension (all of it when transposed, that of one group otherwise), ``rows`` the other.
    """
    if groups == 1:
        _read(flow, node, inside, flat, moves)
        return rows
    if transposed:
        n_in, n_out = len(flat[0].atoms) if flat else groups, flow.sizes(node.meta["val"])[1]
        flow.need_zero(inside, node, "removed channels would leave a constant")
        flow.tie(flow.labels.merge([shared, inside], [groups, n_in // groups]), flat, node)
        flow.mark_in(flat)
        return flow.labels.merge([shared, rows], [groups, n_out // groups])
    _read(flow, node, inside, flat, moves=False)
    n_out = flow.sizes(node.meta["val"])[1]
    outer, _ = flow.labels.split(rows, [groups, n_out // groups], f"{node}: the one group of a convolution")
    flow.tie(shared, outer, node)
    return rows


# ------------------------------------------------------------------------------------------------ embedding
@layer(nn.Embedding)
def _embedding(flow: Flow, node: Node) -> Any:
    return _apply_embedding(flow, node, parameter(flow, node, "weight", (1,)), flow.of(node.args[0]))


@operator("embedding")
def _functional_embedding(flow: Flow, node: Node) -> Any:
    args = arguments(node)
    return _apply_embedding(flow, node, flow.of(args["weight"]), flow.of(args["indices"]))


def _apply_embedding(flow: Flow, node: Node, weight: Value | None, index: Value | None) -> Any:
    if weight is None or index is None:
        return flow.give_up(node, "an embedding of another form")
    flow.pin_value(weight, node, "rows are looked up", [0])
    flow.pin_value(index, node, "it is an index")
    sizes = flow.sizes(node.meta["val"])
    return _finish(flow, node, sizes, len(sizes) - 1, weight.dims[1], {}, None)


# ------------------------------------------------------------------------------------------------ recurrent
@layer(nn.LSTM, nn.GRU)
def _recurrent(flow: Flow, node: Node) -> Any:
    """All layers and directions of a recurrent layer have one hidden size: unit ``i`` goes from all of them."""
    module: Any = flow.program.module(node)
    x = flow.of(node.args[0])
    gates, both, h = (4 if isinstance(module, nn.LSTM) else 3), 2 if module.bidirectional else 1, module.hidden_size
    if x is None or module.proj_size or h < 2:
        return flow.give_up(node, "a projected recurrent layer")
    hidden: Columns = (flow.labels.column(h),)
    rows = flow.labels.merge([(), hidden], [gates, h])
    wide = flow.labels.merge([(), hidden], [both, h])
    for suffix in [f"_l{i}{r}" for i in range(module.num_layers) for r in ("", "_reverse")[:both]]:
        into = x.dims[-1] if suffix.startswith("_l0") else wide
        _recurrent_cell(flow, node, suffix, rows, hidden, into)
    _initial_states(flow, node, hidden)
    vals = node.meta["val"]
    out = Value(flow.sizes(vals[0]), (*x.dims[: len(x.sizes) - 1], flow.labels.resolve(wide)))
    flow.pin_value(x, node, "a sequence runs over it", list(range(len(x.sizes) - 1)))
    flow.outputs.setdefault(node.name, len(out.sizes) - 1)
    matrices = h * (x.sizes[-1] + h) + (module.num_layers - 1) * h * (both * h + h)
    share = h * x.sizes[-1] / matrices
    flow.cost(node, [hidden, x.dims[-1]], share)
    flow.cost(node, [hidden, hidden], 1 - share)

    def state(val: Any) -> Value:
        sizes = flow.sizes(val)
        return Value(sizes, ((),) * (len(sizes) - 1) + (flow.labels.resolve(hidden),))

    result = Value(out.sizes, ((),) * (len(out.sizes) - 1) + out.dims[-1:])
    last = vals[1]
    return [result, [state(v) for v in last] if isinstance(last, (tuple, list)) else state(last)]


def _recurrent_cell(flow: Flow, node: Node, suffix: str, rows: Columns, hidden: Columns, into: Columns) -> None:
    for name, columns in ((f"weight_ih{suffix}", into), (f"weight_hh{suffix}", hidden)):
        weight = parameter(flow, node, name, (0, 1))
        assert weight is not None
        flow.tie(rows, weight.dims[0], node)
        _read(flow, node, columns, weight.dims[1], moves=False)
    for name in (f"bias_ih{suffix}", f"bias_hh{suffix}"):
        bias = parameter(flow, node, name)
        if bias is not None:
            flow.tie(rows, bias.dims[0], node)


def _initial_states(flow: Flow, node: Node, hidden: Columns) -> None:
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("hx")
    for state in given if isinstance(given, (tuple, list)) else [given]:
        value = flow.of(state)
        if value is not None:
            flow.need_zero(value.dims[-1], node, "the initial state is not zero")
            flow.tie(hidden, value.dims[-1], node)
