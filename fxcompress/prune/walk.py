"""The walk: one pass over the graph that says what every dimension of every value carries."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxcompress.ir import Program
from fxcompress.prune.flow import Flow, Value
from fxcompress.prune.transfer import contract, layers, movement, norms, reductions, views
from fxcompress.prune.transfer.pointwise import is_pointwise, pointwise
from fxcompress.prune.transfer.registry import LAYERS, OPERATORS

__all__ = ["walk"]

#: Modules that register transfers when they are imported.
_FAMILIES = (contract, layers, movement, norms, reductions, views)


def walk(program: Program, *, width: bool = False, allow_outputs: bool = False) -> Flow:
    """Follow all channels of ``program``.

    Args:
        program: Not changed.
        width: Dimensions that a norm's statistics run over may go.
        allow_outputs: The model's outputs may shrink.
    """
    flow = Flow(program, width=width)
    for node in program.graph.nodes:
        if node.op == "output":
            break
        value = _visit(flow, node)
        flow.values[node] = value if _fits(flow, node, value) else flow.give_up(node, "its sizes cannot be followed")
    for result in program.outputs():
        if isinstance(result, Node) and not allow_outputs:
            flow.pin_value(flow.values.get(result), "output", "it is an output of the model")
    return flow


def _visit(flow: Flow, node: Node) -> Any:
    if node.op == "placeholder":
        return flow.plain(node.meta.get("val"))
    if node.op == "get_attr":
        return _attribute(flow, node)
    if node.op == "call_module":
        module = flow.program.module(node)
        found = next((LAYERS[cls] for cls in type(module).__mro__ if cls in LAYERS), None)
        return (
            found(flow, node)
            if found
            else flow.give_up(node, f"channels through a {type(module).__name__} are not followed")
        )
    return _call(flow, node)


def _attribute(flow: Flow, node: Node) -> Any:
    tensor, name = flow.program.tensor(node), str(node.target)
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        return flow.plain(node.meta.get("val"))
    return flow.tensor(name, tensor, name, node.name, range(tensor.dim()))


def _call(flow: Flow, node: Node) -> Any:
    if node.target is operator.getitem:
        source = flow.values.get(node.args[0]) if isinstance(node.args[0], Node) else None
        if isinstance(source, list) and isinstance(node.args[1], int):
            return source[node.args[1]]
        return flow.plain(node.meta.get("val"))
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    found = OPERATORS.get(node.target.overloadpacket)
    if found is None and is_pointwise(node.target):
        found = pointwise
    return found(flow, node) if found else flow.give_up(node, f"channels through {node.target} are not followed")


def _fits(flow: Flow, node: Node, value: Any) -> bool:
    """True when what was found has the sizes that were recorded."""
    val = node.meta.get("val")
    if isinstance(val, (list, tuple)):
        return isinstance(value, list) and len(value) == len(val)
    if not isinstance(val, Tensor) or not isinstance(value, Value):
        return not isinstance(val, Tensor) or node.op == "get_attr"
    lengths = [len(c.atoms) == n for n, columns in zip(value.sizes, value.dims, strict=True) for c in columns]
    return value.sizes == flow.sizes(val) and all(lengths)
