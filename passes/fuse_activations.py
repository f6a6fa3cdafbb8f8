"""FuseActivations: a layer, the residual it is added to, and the activation behind become one fused layer.

``activation(layer(x) + residual)`` is what the engines run as one kernel, so quantization treats it as one: no
fake-quantizer is put inside. Which activations and whether the residual belong to the block is the target's choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.fx import Node

from fxcompress.errors import UsageError
from fxcompress.ir import Program
from fxcompress.layers import ACTIVATIONS, WEIGHTED_LAYERS, Activation, Fused, cannot_fuse, make_fused
from fxcompress.passbase import Context, Pass, Result
from fxcompress.quant.scheme import QuantScheme
from fxcompress.rewrite import Analysis, Match, Rule, apply_rules, put_layer, single_user

__all__ = ["FuseActivations"]

_aten = torch.ops.aten
_NAME_OF: dict[Any, str] = {overload: name for name, overload in ACTIVATIONS.items()}


@dataclass(frozen=True)
class FuseActivations(Pass):
    """Fuse Conv/ConvTranspose/Linear + [residual add] + ReLU, ReLU6, LeakyReLU, SiLU, Hardswish, GELU or Sigmoid.

    Attributes:
        residual: Fuse the add of a residual too; None lets the target decide.
        activations: Names to fuse (see ``fxcompress.layers.ACTIVATIONS``); None lets the target decide.

    Raises:
        UsageError: an unknown activation.
    """

    exact: ClassVar[bool] = True
    residual: bool | None = None
    activations: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        unknown = sorted(set(self.activations or ()) - set(ACTIVATIONS))
        if unknown:
            what = f"{', '.join(unknown)} cannot be fused"
            raise UsageError(24, what, where="FuseActivations(activations=...)", fix=f"known: {', '.join(ACTIVATIONS)}")

    def run(self, program: Program, context: Context) -> Result:
        """Fuse adds first, then activations, so that a residual block ends up in one layer."""
        scheme = context.scheme or QuantScheme()
        names = frozenset(self.activations if self.activations is not None else scheme.fused_activations)
        residual = scheme.fused_residual if self.residual is None else self.residual
        rules = (_add_rule(names), _activation_rule(names)) if residual else (_activation_rule(names),)
        changes, refusals = apply_rules(program, rules)
        return Result(program, changes, refusals)


def _fusable(program: Program, node: Any) -> bool:
    if not isinstance(node, Node) or node.op != "call_module" or node.kwargs:
        return False
    layer = program.module(node)
    if isinstance(layer, Fused):
        return layer.activation is None
    return type(layer) in WEIGHTED_LAYERS


def _activation_of(node: Node) -> Activation | None:
    """The activation a node computes, when its constants are numbers."""
    name = _NAME_OF.get(node.target) if node.op == "call_function" else None
    if name is None or len(node.all_input_nodes) != 1 or not node.args or not isinstance(node.args[0], Node):
        return None
    return Activation(name, tuple(node.args[1:]), tuple(node.kwargs.items()))


def _activation_rule(names: frozenset[str]) -> Rule:
    def match(program: Program, node: Node) -> Match | None:
        activation = _activation_of(node)
        if activation is None or activation.name not in names or not _fusable(program, node.args[0]):
            return None
        return Match(node, {"layer": node.args[0], "tail": node, "activation": activation})

    def replace(program: Program, found: Match) -> str:
        return _replace(program, found, found["layer"].args)

    return Rule("fuse activation", match, _check, replace)


def _add_rule(names: frozenset[str]) -> Rule:
    """Only adds that end in a fusable activation are fused: Conv + Add + ReLU."""

    def match(program: Program, node: Node) -> Match | None:
        if not _is_plain_add(node) or not any(_feeds_activation(user, names) for user in node.users):
            return None
        candidates = [
            Match(node, {"layer": layer, "tail": node, "residual": other, "activation": None})
            for layer, other in (node.args, node.args[::-1])
            if _can_take_residual(program, layer, other)
        ]
        free = [m for m in candidates if single_user(m["layer"])]
        return next(iter(free + candidates), None)

    def check(analysis: Analysis, found: Match) -> str | None:
        if not single_user(found["tail"]):
            return f"{found['tail'].name} has more than one user"
        return _check(analysis, found)

    def replace(program: Program, found: Match) -> str:
        return _replace(program, found, (found["layer"].args[0], found["residual"]))

    return Rule("fuse residual", match, check, replace)


def _is_plain_add(node: Node) -> bool:
    return node.op == "call_function" and node.target is _aten.add.Tensor and not node.kwargs and len(node.args) == 2


def _feeds_activation(user: Node, names: frozenset[str]) -> bool:
    activation = _activation_of(user)
    return activation is not None and activation.name in names


def _can_take_residual(program: Program, layer: Any, other: Any) -> bool:
    """A layer without a residual yet, and another operand of its shape."""
    if not (_fusable(program, layer) and len(layer.args) == 1 and isinstance(other, Node)):
        return False
    a, b = layer.meta["val"], other.meta.get("val")
    # As text: comparing symbolic sizes would put guards on them.
    return isinstance(b, Tensor) and str(a.shape) == str(b.shape) and a.dtype == b.dtype


def _check(analysis: Analysis, match: Match) -> str | None:
    layer = match["layer"]
    if not single_user(layer):
        return f"{layer.name} has more than one user"
    if analysis.calls(layer) > 1:
        return "the layer is called more than once"
    return cannot_fuse(analysis.program.module(layer))


def _replace(program: Program, match: Match, args: tuple[Any, ...]) -> str:
    layer, tail = match["layer"], match["tail"]
    path = str(layer.target)
    put_layer(program, path, make_fused(program.module(layer), match["activation"]))
    with program.graph.inserting_before(tail):
        new = program.graph.create_node("call_module", path, tuple(args), {})
    new.meta = {**layer.meta, "val": tail.meta["val"]}
    tail.replace_all_uses_with(new)
    program.graph.erase_node(tail)
    program.graph.erase_node(layer)
    new.name = layer.name
    return f"{path} + {match['activation'] or cast(Node, match['residual']).name}"
