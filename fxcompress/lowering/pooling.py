"""Pools and resizing as ONNX."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from fxcompress.lowering.builder import Builder, Unsupported, dtype_of, lowers, rank_of
from fxcompress.lowering.layers import repeat

_aten = torch.ops.aten


# ------------------------------------------------------------------------------------------------ pools
@lowers(*(getattr(_aten, f"max_pool{d}d").default for d in (1, 2, 3)))
def _max_pool(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    dims = int(str(node.target).split("max_pool")[1][0])
    window = _window(node, a, dims, repeat(a["dilation"], dims))
    return b.op("MaxPool", b.value(a["self"]), **window, dilations=repeat(a["dilation"], dims))


@lowers(*(getattr(_aten, f"avg_pool{d}d").default for d in (1, 2, 3)))
def _avg_pool(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    dims = int(str(node.target).split("avg_pool")[1][0])
    x, divisor, padding = b.value(a["self"]), a.get("divisor_override"), repeat(a["padding"], dims)
    window = _window(node, a, dims, [1] * dims)
    if divisor is not None:  # the sum of a window over a number: zeros beyond the edge count as much as any
        y = b.op("AveragePool", x, **window, count_include_pad=1)
        return b.op("Mul", y, b.scalar(math.prod(window["kernel_shape"]) / divisor, dtype_of(node)))
    if a["ceil_mode"] and a["count_include_pad"] and any(padding):
        # torch counts the given padding, but not what the last window reaches beyond it.
        axes = b.ints(range(rank_of(node) - dims, rank_of(node)))
        x = b.op("Pad", x, b.ints(padding * 2), b.scalar(0, dtype_of(node)), axes)
        ends = [max(0, end - p) for end, p in zip(window["pads"][dims:], padding, strict=True)]
        return b.op("AveragePool", x, **window | {"pads": [0] * dims + ends}, count_include_pad=0)
    counted = a["count_include_pad"] and not a["ceil_mode"]
    return b.op("AveragePool", x, **window, count_include_pad=int(counted))


def _window(node: Node, a: dict[str, Any], dims: int, dilation: Sequence[int]) -> dict[str, Any]:
    """Kernel, strides and pads; a rounded-up size as more padding at the end, since engines round up differently."""
    kernel = repeat(a["kernel_size"], dims)
    stride = repeat(a["stride"], dims) if a["stride"] else kernel
    padding = repeat(a["padding"], dims)
    ends = list(padding)
    if a["ceil_mode"]:
        before, after = (n.meta["val"].shape[-dims:] for n in (a["self"], node))
        if not all(isinstance(s, int) for s in (*before, *after)):
            raise Unsupported("a pool that rounds a dynamic size up")
        spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
        ends = [
            max(0, (o - 1) * s + w - i - p) for o, s, w, i, p in zip(after, stride, spans, before, padding, strict=True)
        ]
    return {"kernel_shape": kernel, "strides": stride, "pads": [*padding, *ends]}


@lowers(
    *(getattr(_aten, f"adaptive_avg_pool{d}d").default for d in (1, 2, 3)),
    *(getattr(_aten, f"adaptive_max_pool{d}d").default for d in (1, 2, 3))
)  # fmt: skip
def _adaptive_pool(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    kind = "Max" if "max" in str(node.target) else "Average"
    x, shape = b.value(a["self"]), a["self"].meta["val"].shape
    dims = int(str(node.target).split("_pool")[1][0])
    want = repeat(a["output_size"], dims)
    have = list(shape[-dims:])
    if all(w == 1 for w in want):
        y: Any = (
            b.op(f"Global{kind}Pool", x)
            if len(shape) == dims + 2
            else b.op(f"Reduce{kind[:3]}", x, b.ints(range(-dims, 0)))
        )
    elif want == have:
        y = x
    elif all(isinstance(h, int) and h % w == 0 for h, w in zip(have, want, strict=True)):
        size = [h // w for h, w in zip(have, want, strict=True)]
        y = b.op(f"{kind}Pool", x, kernel_shape=size, strides=size)
    else:
        raise Unsupported("an adaptive pool whose windows differ in size")
    return (y, None) if kind == "Max" else y


# ------------------------------------------------------------------------------------------------ resizing
_RESIZE = {
    "nearest": "nearest", "nearest_exact": "nearest", "linear": "linear", "bilinear": "linear", "trilinear": "linear",
    "bicubic": "cubic",
}  # fmt: skip


@lowers(
    *(getattr(_aten, f"upsample_{k}d").vec for k in ("nearest1", "nearest2", "nearest3", "trilinear3")),
    *(getattr(_aten, f"_upsample_nearest_exact{d}d").vec for d in (1, 2, 3)),
    *(getattr(_aten, f"upsample_{k}2d").vec for k in ("bilinear", "bicubic")),
    _aten.upsample_linear1d.vec,
)
def _upsample(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    kind = str(node.target).split("upsample_")[1].split(".")[0][:-2]
    mode = _RESIZE[kind]
    # torch takes the middle of a pixel for its place, except in its first kind of nearest.
    coordinates = "align_corners" if a.get("align_corners") else "asymmetric" if kind == "nearest" else "half_pixel"
    extra: dict[str, Any] = {"cubic_coeff_a": -0.75} if mode == "cubic" else {}
    if mode == "nearest":
        extra = {"nearest_mode": "floor" if kind == "nearest" else "round_prefer_ceil"}
    sizes, factors = a["output_size"], a["scale_factors"]
    attributes: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": coordinates, **extra}
    axes: dict[str, Any] = {"axes": list(range(2, rank_of(node)))}
    if sizes is not None:
        return b.op("Resize", b.value(a["input"]), None, None, b.sizes(list(sizes)), **attributes, **axes)
    scales = b.constant(torch.tensor([float(f) for f in factors], dtype=torch.float32))
    return b.op("Resize", b.value(a["input"]), None, scales, **attributes, **axes)


@lowers(_aten.pixel_shuffle.default)
def _pixel_shuffle(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    return b.op("DepthToSpace", b.value(a["self"]), blocksize=a["upscale_factor"], mode="CRD")


@lowers(_aten.pixel_unshuffle.default)
def _pixel_unshuffle(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    (channels, height, width), r = a["self"].meta["val"].shape[-3:], a["downscale_factor"]
    if rank_of(node) != 4 or not all(isinstance(s, int) for s in (channels, height, width)):
        raise Unsupported("pixel_unshuffle of one image, or of a dynamic size")
    blocks = b.op("Reshape", b.value(a["self"]), b.ints([0, channels, height // r, r, width // r, r]))
    moved = b.op("Transpose", blocks, perm=[0, 1, 3, 5, 2, 4])
    return b.op("Reshape", moved, b.ints([0, channels * r * r, height // r, width // r]))
