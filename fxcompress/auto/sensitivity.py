"""Which layer costs most: the error of the model's output when that layer alone is quantized."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from fxcompress.data import Call
from fxcompress.ir import Program, evaluating
from fxcompress.layers import Fused
from fxcompress.quant.fake_quantize import QUANTIZERS
from fxcompress.quant.placement import is_move, layer_kind, layer_name
from fxcompress.rewrite import put_layer

__all__ = ["layer_errors"]


class _Switch(nn.Module):
    """A quantizer that can be turned off."""

    def __init__(self, quantizer: nn.Module) -> None:
        super().__init__()
        self.quantizer, self.on = quantizer, False

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.quantizer(x)) if self.on else x


def layer_errors(program: Program, calls: Sequence[Call]) -> list[tuple[str, float]]:
    """Layers by what they cost, the worst first.

    A layer is quantized alone: its weight and the values it reads, everything else stays in floating point.

    Args:
        program: A quantized program whose layers still hold float weights; left untouched.
        calls: Inputs.

    Returns:
        Name and relative squared error of the outputs (in float64, over all calls and float outputs) of every quantized
        layer; infinite where it is not a number.
    """
    program = program.clone()
    own = _switches(program)
    switches = {id(s): s for group in own.values() for s in group}
    with torch.no_grad(), evaluating(program.gm):
        exact = [_outputs(program, call) for call in calls]
        errors = {}
        for name, group in own.items():
            for switch in group:
                switch.on = True
            errors[name] = _error(exact, [_outputs(program, call) for call in calls])
            for switch in switches.values():
                switch.on = False
    return sorted(errors.items(), key=lambda item: (-item[1], item[0]))


def _switches(program: Program) -> dict[str, list[_Switch]]:
    """Layer name -> the switches of its weight and its inputs."""
    at: dict[str, _Switch] = {}
    for node, module in list(program.layers()):
        if isinstance(module, QUANTIZERS):
            path = str(node.target)
            at[path] = _Switch(module)
            put_layer(program, path, at[path])
    found: dict[str, list[_Switch]] = {}
    for node in program.graph.nodes:
        if layer_kind(program, node) is None:
            continue
        group = [at[path] for path in _quantizers_of(node, at)]
        layer: Any = program.module(node) if node.op == "call_module" else None
        if isinstance(layer, Fused) and layer.weight_fake_quantize is not None:
            if not isinstance(layer.weight_fake_quantize, _Switch):
                layer.weight_fake_quantize = _Switch(layer.weight_fake_quantize)
            group.append(layer.weight_fake_quantize)
        if group:
            found.setdefault(layer_name(node), []).extend(group)
    return found


def _quantizers_of(node: Node, at: Mapping[str, _Switch]) -> list[str]:
    """Paths of the quantizers of a layer's data and, of a functional call, weight; not of the residual it adds.

    Between a quantizer and the layer there may be movements of data.
    """
    found: list[str] = []
    waiting = [a for a in (node.args[:2] if node.op == "call_function" else node.args[:1]) if isinstance(a, Node)]
    while waiting:
        value = waiting.pop()
        if value.op == "call_module" and str(value.target) in at:
            found.append(str(value.target))
        elif is_move(value) or getattr(value.target, "overloadpacket", None) is torch.ops.aten.cat:
            waiting += value.all_input_nodes
    return list(dict.fromkeys(found))


def _outputs(program: Program, call: Call) -> list[Tensor]:
    flat = pytree.tree_leaves(program(*call[0], **call[1]))
    return [v.double() for v in flat if isinstance(v, Tensor) and v.is_floating_point()]


def _error(exact: list[list[Tensor]], got: list[list[Tensor]]) -> float:
    part = whole = 0.0
    for before, after in zip(exact, got, strict=True):
        for a, b in zip(before, after, strict=True):
            part += float((a - b).square().sum())
            whole += float(a.square().sum())
    error = part / max(whole, 1e-30)
    return error if math.isfinite(error) else math.inf
