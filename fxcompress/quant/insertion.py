"""Puts the fake-quantizers of a placement into the graph."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.fx import Node

from fxcompress.ir import Program
from fxcompress.quant.fake_quantize import DynamicFakeQuantize, FakeQuantize
from fxcompress.quant.placement import Placement

__all__ = ["add_quantizer", "insert_quantizers", "quantizer_holder"]


def quantizer_holder(program: Program) -> str:
    """Path of the module that holds the program's activation quantizers; made when missing."""
    name = "fake_quantize"
    while hasattr(program.gm, name) and not isinstance(getattr(program.gm, name), _Quantizers):
        name += "_"  # the user's model has something of this name
    if not hasattr(program.gm, name):
        program.gm.add_module(name, _Quantizers())
    return name


class _Quantizers(nn.Module):
    """Container of the quantizers, by the name of the value they quantize."""


def add_quantizer(program: Program, name: str, quantizer: FakeQuantize | DynamicFakeQuantize) -> str:
    """Put ``quantizer`` into the holder; returns its path. A module of this name is replaced."""
    holder = quantizer_holder(program)
    name = f"{name}_" if hasattr(nn.Module, name) or name == "training" else name
    program.gm.get_submodule(holder)._modules[name] = quantizer
    return f"{holder}.{name}"


def insert_quantizers(program: Program, placement: Placement, make: Callable[[list[Node]], FakeQuantize]) -> None:
    """Put a quantizer behind every value of ``placement``; the values of a group share one module.

    Args:
        program: Changed in place.
        placement: Of this very program.
        make: The quantizer of a group of values.
    """
    graph = program.graph
    paths: dict[Node, str] = {}
    for group in placement.groups:
        path = add_quantizer(program, group[0].name, make(group))
        paths |= dict.fromkeys(group, path)
    last_input = next(reversed(program.placeholders()), None)
    for value, users in placement.values.items():
        is_input = value.op == "placeholder" and last_input is not None
        anchor = last_input if is_input else value
        with graph.inserting_after(anchor):
            node = graph.create_node("call_module", paths[value], (value,), {}, name=f"{value.name}_quantized")
        last_input = node if is_input else last_input
        node.meta = dict(value.meta)
        for user in users:
            user.replace_input_with(value, node)
