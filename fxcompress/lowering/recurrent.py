"""LSTM and GRU layers as ONNX."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxcompress.lowering.builder import DOMAIN, Builder, Unsupported, lowers_module
from fxcompress.quant.fake_quantize import FakeQuantize

#: Metadata of an LSTM node whose activations are quantized at run time.
DYNAMIC = "fxcompress.dynamic"
# torch's gate order -> ONNX's: LSTM i f g o -> i o f g; GRU r z n -> z r n
_GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2)}


@lowers_module(nn.LSTM, nn.GRU)
def _recurrent(b: Builder, node: Node, layer: nn.LSTM | nn.GRU) -> Any:
    kind = "LSTM" if isinstance(layer, nn.LSTM) else "GRU"
    x = b.value(node.args[0])
    if node.args[0].meta["val"].dim() != 3:  # type: ignore[union-attr]
        raise Unsupported("an unbatched sequence")
    x = b.op("Transpose", x, perm=[1, 0, 2]) if layer.batch_first else x
    states = _initial(b, node, kind)
    last: list[tuple[Any, ...]] = []
    for number in range(layer.num_layers):
        x, ends = _one_layer(b, node, layer, kind, x, states, number)
        last.append(ends)
    y = b.op("Transpose", x, perm=[1, 0, 2]) if layer.batch_first else x
    ends = tuple(b.op("Concat", *parts, axis=0) if len(parts) > 1 else parts[0] for parts in zip(*last, strict=True))
    return (y, ends) if kind == "LSTM" else (y, ends[0])


def _initial(b: Builder, node: Node, kind: str) -> list[Any]:
    if len(node.args) < 2 or node.args[1] is None:
        return []
    given = node.args[1]
    return [b.value(s) for s in (given if isinstance(given, (list, tuple)) else [given])]


def _one_layer(
    b: Builder, node: Node, layer: nn.LSTM | nn.GRU, kind: str, x: Any, states: list[Any], number: int
) -> tuple[Any, tuple[Any, ...]]:
    directions = 2 if layer.bidirectional else 1
    w, r, bias = (_stacked(b, node, layer, kind, number, part) for part in ("weight_ih", "weight_hh", "bias"))
    begin, end = number * directions, (number + 1) * directions
    parts = [b.op("Slice", s, b.ints([begin]), b.ints([end]), b.ints([0])) for s in states]
    extra = {"linear_before_reset": 1} if kind == "GRU" else {}
    direction = "bidirectional" if layer.bidirectional else "forward"
    options: dict[str, Any] = {"hidden_size": layer.hidden_size, "direction": direction, **extra}
    outputs = b.multi(kind, 3 if kind == "LSTM" else 2, x, w, r, bias, None, *parts, **options)
    if getattr(layer, "dynamic", False):
        outputs[0].producer().metadata_props[DYNAMIC] = "1"  # type: ignore[union-attr]
    # [length, directions, batch, hidden] -> [length, batch, directions * hidden]
    y = b.op("Reshape", b.op("Transpose", outputs[0], perm=[0, 2, 1, 3]), b.ints([0, 0, -1]))
    return y, outputs[1:]


def _stacked(b: Builder, node: Node, layer: nn.Module, kind: str, number: int, part: str) -> Any:
    """One matrix of both directions with the gates in ONNX's order; None for absent biases."""
    suffixes = [f"_l{number}", f"_l{number}_reverse"][: 2 if layer.bidirectional else 1]
    tensors = []
    grids = [layer._modules.get(f"{part}{suffix}_fake_quantize") for suffix in suffixes]
    for suffix in suffixes:
        if part == "bias":
            pair = [getattr(layer, f"bias_{side}{suffix}", None) for side in ("ih", "hh")]
            if pair[0] is None or pair[1] is None:
                return None
            tensors.append(torch.cat([_reordered(t, kind) for t in pair if t is not None]))
        else:
            tensors.append(_reordered(getattr(layer, part + suffix), kind))
    name = f"{node.target}.{part}_l{number}_onnx"
    found = [g for g in grids if isinstance(g, FakeQuantize)]
    return _on_grids(b, name, tensors, found, kind) if found else b.parameter(name, torch.stack(tensors))


def _on_grids(b: Builder, name: str, matrices: list[Tensor], grids: list[FakeQuantize], kind: str) -> Any:
    """Matrices of all directions, one row below the other, through their grids; then [directions, rows, features]."""
    spec = grids[0].spec
    weight = b.parameter(name, torch.cat(matrices))
    scale, zero = (
        torch.cat([_reordered(t.expand(len(matrices[0])), kind) for t in parts])
        for parts in ([g.scale for g in grids], [g.zero_point for g in grids])
    )
    ends = (b.parameter(f"{name}.scale", scale), b.parameter(f"{name}.zero_point", zero))
    value = b.op("FakeQuantize", weight, *ends, domain=DOMAIN, axis=0, qmin=spec.qmin, qmax=spec.qmax)
    value.producer().name = f"{name}_fake_quantize"  # type: ignore[union-attr]
    return b.op("Reshape", value, b.ints([len(matrices), *matrices[0].shape]))


def _reordered(tensor: Tensor, kind: str) -> Tensor:
    gates = _GATES[kind]
    parts = tensor.detach().chunk(len(gates))
    return torch.cat([parts[i] for i in gates])
