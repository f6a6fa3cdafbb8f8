"""Padding as ONNX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from fxcompress.lowering.builder import Builder, Unsupported, dtype_of, lowers, rank_of

_aten = torch.ops.aten
_END = torch.iinfo(torch.int64).max


@lowers(_aten.constant_pad_nd.default, _aten.pad.default)
def _pad(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    modes = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}
    fill = None
    if a.get("mode") == "circular":
        return _circular_pad(b, a["self"], a["pad"])
    if a.get("mode", "constant") == "constant":
        fill = b.scalar(b.static(a["value"] or 0), dtype_of(node))
    return pad(b, a["self"], a["pad"], modes[a.get("mode", "constant")], fill)


def _circular_pad(b: Builder, x: Node, amounts: Sequence[Any]) -> Any:
    """The other end in front of and behind each dimension: OpenVINO has no Pad that wraps."""
    y = b.value(x)
    for place in range(len(amounts) // 2):
        begin, end = b.static(amounts[2 * place : 2 * place + 2])
        axis, parts = rank_of(x) - 1 - place, [y]
        if min(begin, end) < 0:
            raise Unsupported("circular padding that crops")
        if begin:
            parts.insert(0, b.op("Slice", y, b.ints([-begin]), b.ints([_END]), b.ints([axis])))
        if end:
            parts.append(b.op("Slice", y, b.ints([0]), b.ints([end]), b.ints([axis])))
        y = b.op("Concat", *parts, axis=axis) if len(parts) > 1 else y
    return y


@lowers(*(getattr(_aten, f"{kind}_pad{d}d").default for kind in ("reflection", "replication") for d in (1, 2, 3)))
def _edge_pad(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    return pad(b, a["self"], a["padding"], "reflect" if "reflection" in str(node.target) else "edge", None)


def pad(b: Builder, x: Node, amounts: Sequence[Any], mode: str, fill: Any) -> Any:
    """Pad the last dimensions; ``amounts`` is torch's order: last dimension first, begin and end of each."""
    rank, dims = rank_of(x), len(amounts) // 2
    axes = [rank - 1 - i for i in range(dims)]
    pads = b.sizes([*amounts[0::2], *amounts[1::2]])
    return b.op("Pad", b.value(x), pads, fill, b.ints(axes), mode=mode)
