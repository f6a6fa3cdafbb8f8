"""Reductions, softmax, pooling, resampling, and tensors made from nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor
from torch.fx import Node

from fxcompress.prune.flow import Flow, Value, is_zero
from fxcompress.prune.labels import Columns
from fxcompress.prune.transfer.pointwise import pointwise
from fxcompress.prune.transfer.registry import arguments, operator

__all__ = ["spatial"]

#: What a slice of zeros stays zero under.
_KEEP_ZERO = (
    "sum",
    "mean",
    "amax",
    "amin",
    "max",
    "min",
    "linalg_vector_norm",
    "norm",
    "var",
    "std",
    "prod",
    "logsumexp",
)


@operator(*_KEEP_ZERO, "any", "all")
def _reduce(flow: Flow, node: Node) -> Any:
    value, args, val = flow.of(node.args[0]), arguments(node), node.meta.get("val")
    if "other" in args:
        return pointwise(flow, node)
    if value is None or not isinstance(val, Tensor):
        return flow.give_up(node, "it yields more than one tensor")
    name = node.target.overloadpacket.__name__  # type: ignore[union-attr]
    given = args.get("dim")
    wanted = (
        list(range(len(value.sizes))) if given in (None, []) else [given] if isinstance(given, int) else list(given)
    )
    reduced = {value.dim(d) for d in wanted}
    for d in reduced:
        _reduce_dim(flow, node, name, flow.columns(value, d))
    keeps_zero = name in _KEEP_ZERO and name != "logsumexp"
    keeps = name in ("mean", "amax", "amin")
    dims: list[Columns] = []
    for d in range(len(value.sizes)):
        if d in reduced:
            dims += [()] if args.get("keepdim") else []
            continue
        columns = flow.columns(value, d)
        known = [c.fill if keeps else np.where((c.fill == 0) & keeps_zero, 0.0, np.nan) for c in columns]
        dims.append(tuple(c.filled(f) for c, f in zip(columns, known, strict=True)))
    return Value(flow.sizes(val), tuple(dims))


def _reduce_dim(flow: Flow, node: Node, name: str, columns: Columns) -> None:
    if not columns:
        return
    if name in ("sum", "linalg_vector_norm", "norm"):
        flow.need_zero(columns, node, "removed channels would leave something in the sum")
    elif name == "mean" and not _is_mean_square(node):
        flow.need_zero(columns, node, "removed channels would leave something in the mean")  # it is scaled when they go
    elif name == "mean" and flow.width and all(is_zero(c) for c in columns):
        flow.statistics[node.name] = columns
    else:
        flow.pin(columns, node, f"its {name} runs over the channels")


def _is_mean_square(node: Node) -> bool:
    """A mean of squares: the statistics of an RMSNorm."""
    source = node.args[0]
    name = getattr(getattr(getattr(source, "target", None), "overloadpacket", None), "__name__", "")
    return name in ("pow", "square") or (name == "mul" and len(set(source.args)) == 1)  # type: ignore[union-attr]


@operator("softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "softmin")
def _softmax(flow: Flow, node: Node) -> Any:
    value, d = flow.of(node.args[0]), arguments(node)["dim"]
    assert value is not None
    flow.pin_value(value, node, "it runs over the channels", [d])
    dims = tuple(tuple(c.filled(np.nan) for c in flow.labels.resolve(columns)) for columns in value.dims)
    return Value(value.sizes, dims)


@operator("glu")
def _glu(flow: Flow, node: Node) -> Any:
    value, sizes = flow.of(node.args[0]), flow.sizes(node.meta["val"])
    assert value is not None
    d = value.dim(arguments(node)["dim"])
    half = sizes[d]
    columns = flow.columns(value, d)
    first, second = (tuple(c.take(np.arange(s, s + half)) for c in columns) for s in (0, half))

    def gated(fills: list[Any]) -> Any:
        return np.where(fills[0] == 0, 0.0, np.nan)

    return Value(sizes, (*value.dims[:d], flow.join([first, second], node, gated), *value.dims[d + 1 :]))


# ------------------------------------------------------------------------------------------------ positions
_POOLS = [f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max", "lp") for n in (1, 2, 3)]
_RESAMPLERS = [
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact2d"),
    *(
        "upsample_bilinear2d",
        "upsample_linear1d",
        "upsample_trilinear3d",
        "upsample_bicubic2d",
        "_upsample_bilinear2d_aa",
    ),
    "_upsample_bicubic2d_aa",
]


def spatial(flow: Flow, node: Node, value: Value, first: int, sizes: tuple[int, ...]) -> Value:
    """The dimensions from ``first`` on are positions: they stay, and do not carry channels."""
    flow.pin_value(value, node, "windows run over it", list(range(first, len(value.sizes))))
    return Value(sizes, value.dims[:first] + ((),) * (len(sizes) - first))


@operator(*_POOLS, *_RESAMPLERS)
def _pool(flow: Flow, node: Node) -> Any:
    value, val, args = flow.of(node.args[0]), node.meta.get("val"), arguments(node)
    if value is None or not isinstance(val, Tensor):
        return flow.give_up(node, "it yields more than one tensor")
    name = str(node.target)
    positions = int(name.split("d.")[0][-1])
    result = spatial(flow, node, value, len(value.sizes) - positions, flow.sizes(val))
    padding = args.get("padding") or 0
    padded = bool(np.any(np.asarray(padding))) or bool(args.get("ceil_mode"))
    exact = "max_pool" in name or "nearest" in name or ("avg_pool" in name and not padded)
    dims = tuple(
        tuple(c if exact else c.filled(np.where(c.fill == 0, 0.0, np.nan)) for c in flow.labels.resolve(columns))
        for columns in result.dims
    )
    return Value(result.sizes, dims)


@operator("max_pool2d_with_indices", "max_pool1d_with_indices", "max_pool3d_with_indices")
def _pool_with_indices(flow: Flow, node: Node) -> Any:
    value, vals = flow.of(node.args[0]), node.meta["val"]
    assert value is not None
    first = len(value.sizes) - int(str(node.target).split("d_with")[0][-1])
    return [spatial(flow, node, value, first, flow.sizes(v)) for v in vals]


# ------------------------------------------------------------------------------------------------ creation
@operator("zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "empty", "new_empty")
def _create(flow: Flow, node: Node) -> Any:
    name = node.target.overloadpacket.__name__  # type: ignore[union-attr]
    args, val = arguments(node), node.meta["val"]
    given = args.get("fill_value")
    content = 0.0 if "zeros" in name else 1.0 if "ones" in name else given
    fill = float(content) if isinstance(content, (int, float)) else np.nan
    dims = tuple((flow.labels.column(s, fill),) if isinstance(s, int) and s > 1 else () for s in val.shape)
    return Value(flow.sizes(val), dims)


@operator("zeros_like", "ones_like", "full_like", "empty_like")
def _create_like(flow: Flow, node: Node) -> Any:
    value = flow.of(node.args[0])
    assert value is not None
    name, given = str(node.target), arguments(node).get("fill_value")
    content = 0.0 if "zeros" in name else 1.0 if "ones" in name else given
    fill = float(content) if isinstance(content, (int, float)) else np.nan
    return Value(value.sizes, tuple(tuple(c.filled(fill) for c in flow.labels.resolve(d)) for d in value.dims))


@operator("arange", "linspace", "eye", "scalar_tensor", "rand", "randn", "one_hot", "tril_indices")
def _positions(flow: Flow, node: Node) -> Any:
    for source in node.all_input_nodes:
        flow.pin_value(flow.values.get(source), node, "it is an index")
    return flow.plain(node.meta.get("val"))


@operator("sym_size", "sym_numel", "_assert_scalar", "_assert_tensor_metadata", "sym_constrain_range_for_size")
def _symbol(flow: Flow, node: Node) -> Any:
    return None


@operator("triu", "tril")
def _triangle(flow: Flow, node: Node) -> Any:
    value = flow.of(node.args[0])
    assert value is not None
    flow.pin_value(value, node, "a triangle is cut from it", [-1, -2])
    return Value(value.sizes, (*value.dims[:-2], (), ()))


@operator("argmax", "argmin", "topk", "sort", "argsort")
def _order(flow: Flow, node: Node) -> Any:
    return flow.give_up(node, "it compares channels with each other")
