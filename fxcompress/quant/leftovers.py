"""What a quantizing pass leaves alone without being asked to: said in its notes, so that nobody takes it for quantized."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterable

from torch import nn
from torch.fx import Node

from fxcompress.ir import Program
from fxcompress.layers import Fused
from fxcompress.quant.fake_quantize import QUANTIZERS
from fxcompress.quant.placement import is_move, layer_kind

__all__ = ["left_float", "unused_globs"]

#: Names of operators that multiply by a weight: not ``lgamma`` or ``upsample_linear1d``.
_PRODUCT = re.compile(
    r"(.*_)?(b|add|baddb)?mm(_.*)?|.*matmul|einsum|_?conv.*|.*linear|(lstm|gru|rnn)(_.*)?|embedding_bag"
)
#: Pick rows: the experts that a token was sent to.
_PICKS = ("index", "index_select", "gather")
#: Read by index, or element by element.
_NO_PRODUCTS = (nn.Embedding, nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.PReLU, *QUANTIZERS)


def left_float(program: Program, what: str, taken: Collection[str], kinds: Collection[str] = ("linear",)) -> list[str]:
    """A line ``<name> stays float: <reason>`` for each weight of a product that a pass cannot take.

    Experts of a mixture in one tensor, convolutions where only linear layers are rounded, recurrent layers of odd kinds.

    Args:
        program: The program.
        what: What the pass quantizes, for the reason: ``QuantizeWeights rounds linear layers``.
        taken: Names of layers that are quantized or have a line already.
        kinds: Kinds of layers (`placement.layer_kind`) that the pass accounts for itself.
    """
    found: dict[str, str] = {}
    for node in program.graph.nodes:
        if node.op == "call_module":
            name, reader = str(node.target), _layer(program, node, kinds)
        elif node.op == "get_attr" and isinstance(p := program.tensor(node), nn.Parameter) and p.dim() > 1:
            name, reader = str(node.target), _product(program, node, kinds)
        else:
            continue
        if reader and name not in taken:
            found.setdefault(name, f"{name} stays float: a weight of {reader}; {what}")
    return list(found.values())


def _layer(program: Program, node: Node, kinds: Collection[str]) -> str:
    """The type of a layer with a weight of its own; empty when it is none, is quantized or is accounted for."""
    module = program.module(node)
    if isinstance(module, _NO_PRODUCTS) or layer_kind(program, node) in kinds:
        return ""
    if isinstance(module, Fused):
        return "" if module.weight_fake_quantize is not None else type(module).__name__.removeprefix("Fused")
    weights = [p for p in module.parameters(recurse=False) if p.dim() > 1]
    return type(module).__name__ if weights else ""


def _product(program: Program, weight: Node, kinds: Collection[str]) -> str:
    """The operator that multiplies by a parameter, through views of it; empty when there is none."""
    queue, met = list(weight.users), set(weight.users)
    while queue:
        user = queue.pop()
        name = getattr(getattr(user.target, "overloadpacket", user.target), "__name__", "")
        if is_move(user) or name in _PICKS:
            queue += [u for u in user.users if u not in met]
            met |= set(user.users)
        elif user.op == "call_function" and _PRODUCT.fullmatch(name) and layer_kind(program, user) not in kinds:
            return name
    return ""


def unused_globs(option: str, globs: Iterable[str], names: Collection[str]) -> list[str]:
    """A line for each glob that matches no layer: it is mistyped, or of another model."""
    return [f"{option}={g!r} matches no layer" for g in globs if not any(fnmatch.fnmatchcase(n, g) for n in names)]
