"""Weights of layers and their fake-quantizers: found, checked, attached."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Sequence
from typing import Literal, cast

from torch import Tensor, nn
from torch.fx import Node

from fxcompress.data import all_finite
from fxcompress.errors import PassError
from fxcompress.ir import Program, source_line
from fxcompress.layers import Fused, make_fused
from fxcompress.quant.fake_quantize import FakeQuantize, grouped
from fxcompress.quant.insertion import add_quantizer
from fxcompress.quant.observers import weight_range
from fxcompress.quant.placement import layer_kind, layer_name, weight_axis
from fxcompress.quant.spec import QuantSpec, stored_scale
from fxcompress.rewrite import put_layer

__all__ = [
    "as_globs", "asked_for", "attach_quantizer", "check_weight", "finite_weight", "has_quantizer", "layer_weight", "linear_layers",
    "make_quantizer", "quantize_weight", "weight_quantizer",
]  # fmt: skip

Method = Literal["minmax", "mse"]


def layer_weight(program: Program, node: Node) -> Tensor:
    """The weight of a layer, or of a functional call with a parameter."""
    if node.op == "call_module":
        return cast(Tensor, program.module(node).weight).detach()
    return program.tensor(cast(Node, node.args[1])).detach()


def put_weight(program: Program, nodes: Sequence[Node], weight: Tensor) -> None:
    """Give layers another weight; what else holds the old one (an embedding, another program) keeps it.

    Args:
        program: Its modules change, no tensor is written into.
        nodes: Layers, or functional calls with a parameter.
        weight: Of the old shape; taken in the old dtype, as one parameter for all.
    """
    places = []
    for node in nodes:
        path = f"{node.target}.weight" if node.op == "call_module" else str(cast(Node, node.args[1]).target)
        places.append(path.rpartition(".")[::2])
    old = cast(Tensor, getattr(program.gm.get_submodule(places[0][0]), places[0][1]))
    new = nn.Parameter(weight.to(old.dtype), requires_grad=old.requires_grad)
    for path, name in places:
        setattr(program.gm.get_submodule(path), name, new)


def linear_layers(
    program: Program, include: Sequence[str], ignore: Sequence[str], *, rounded: bool = False
) -> tuple[list[Node], list[str]]:
    """Linear layers with a parameter as weight, and a line ``<name> stays float: <reason>`` for each one left out.

    Args:
        program: The program.
        include: Globs over layer names; empty: all.
        ignore: Globs over layer names to leave out.
        rounded: Take layers whose weight has a quantizer already, too.
    """
    chosen, notes = [], []
    for node in program.graph.nodes:
        if layer_kind(program, node) != "linear" or (has_quantizer(program, node) and not rounded):
            continue
        name = layer_name(node)
        if any(fnmatch.fnmatchcase(name, g) for g in ignore):
            notes.append(f"{name} stays float: ignored")
        elif include and not any(fnmatch.fnmatchcase(name, g) for g in include):
            notes.append(f"{name} stays float: not included")
        elif (
            node.op == "call_function"
            and cast(Node, node.args[1]).op != "get_attr"
            and not has_quantizer(program, node)
        ):
            notes.append(f"{name} stays float: its weight is computed")
        else:
            chosen.append(node)
    return chosen, notes


def other_readers(program: Program) -> dict[int, str]:
    """Storage of a weight -> what reads it besides linear layers, e.g. an embedding."""
    found: dict[int, str] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            linear = all(layer_kind(program, user) == "linear" and user.args[1] is node for user in node.users)
            if node.users and not linear:
                found[program.tensor(node).data_ptr()] = str(node.target)
        elif node.op == "call_module" and layer_kind(program, node) != "linear":
            found |= {p.data_ptr(): str(node.target) for p in program.module(node).parameters(recurse=False)}
    return found


def as_globs(given: str | Sequence[str]) -> tuple[str, ...]:
    """One glob or several as a tuple."""
    return (given,) if isinstance(given, str) else tuple(given)


def asked_for(names: Sequence[str], include: Sequence[str], ignore: Sequence[str]) -> bool:
    """Whether layers of these names, which go together, are wanted: a glob includes one (or there is none), none is ignored."""

    def matches(globs: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, glob) for name in names for glob in globs)

    return (not include or matches(include)) and not matches(ignore)


def check_weight(program: Program, node: Node) -> None:
    """Raise PassError when the weight holds NaN or infinity."""
    finite_weight(layer_weight(program, node), f"{layer_name(node)} ({source_line(node) or node.op})")


def finite_weight(weight: Tensor, where: str) -> None:
    """Raise PassError when ``weight`` holds NaN or infinity."""
    if not all_finite(weight.detach()):
        fix = "train or load the model again, or leave the layer out with ignore=..."
        raise PassError(33, "a weight holds NaN or infinity", where=where, fix=fix)


def has_quantizer(program: Program, node: Node) -> bool:
    """True when the layer's weight is fake-quantized already."""
    if node.op != "call_module":
        return cast(Node, node.args[1]).op == "call_module"
    layer = program.module(node)
    return isinstance(layer, Fused) and layer.weight_fake_quantize is not None


def weight_quantizer(program: Program, node: Node) -> FakeQuantize:
    """The fake-quantizer of a layer's weight, which the layer must have."""
    if node.op == "call_module":
        return cast(FakeQuantize, program.module(node).weight_fake_quantize)
    return cast(FakeQuantize, program.module(cast(Node, node.args[1])))


def make_quantizer(weight: Tensor, spec: QuantSpec, method: Method) -> FakeQuantize:
    """A frozen fake-quantizer for ``weight``; with groups its scale is [channels, groups].

    Scales of a 16-bit weight are rounded to that dtype: engines keep them so.
    """
    quantizer = FakeQuantize(spec, device=weight.device)
    if spec.group_size is None:
        quantizer.set_range(*weight_range(weight, spec, method))
    else:
        rows, channels = grouped(weight, spec), weight.shape[cast(int, spec.axis)]
        flat = dataclasses.replace(spec, axis=0, group_size=None)
        quantizer.set_range(*(end.reshape(channels, -1) for end in weight_range(rows, flat, method)))
    quantizer.scale = stored_scale(quantizer.scale, weight.dtype)
    return quantizer


def quantize_weight(program: Program, node: Node, spec: QuantSpec, method: Method) -> None:
    """Give the layer the fake-quantizer of its weight; a layer that is called again has it already.

    Args:
        program: Changed in place.
        node: A layer of `placement.layer_kind`.
        spec: The grid; an ``axis`` is replaced by the layer's own output-channel axis.
        method: How its range is found.
    """
    if has_quantizer(program, node):
        return
    axis = weight_axis(program.module(node)) if node.op == "call_module" else 0
    own = spec if spec.axis is None else dataclasses.replace(spec, axis=axis)
    attach_quantizer(program, node, make_quantizer(layer_weight(program, node), own, method))


def attach_quantizer(program: Program, node: Node, quantizer: FakeQuantize) -> None:
    """Let the layer's weight go through ``quantizer``."""
    if node.op == "call_module":
        fused = make_fused(program.module(node))
        fused.weight_fake_quantize = quantizer
        put_layer(program, str(node.target), fused)
        return
    source = cast(Node, node.args[1])
    with program.graph.inserting_after(source):
        path = add_quantizer(program, f"weight_{source.name}", quantizer)
        new = program.graph.create_node("call_module", path, (source,), {}, name=f"{source.name}_quantized")
    new.meta = dict(source.meta)
    node.replace_input_with(source, new)
