"""What a pass leaves alone without being asked to, and what it was asked that has no effect: lines for its notes."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Collection, Iterable

from torch import nn
from torch.fx import Node

from fxcompress.ir import Program
from fxcompress.quant.fake_quantize import QUANTIZERS
from fxcompress.quant.placement import is_move, layer_kind

__all__ = ["left_float", "unused_globs"]

#: Names of operators that multiply by a weight: not ``lgamma`` or ``upsample_linear1d``.
_PRODUCT = re.compile(
    r"(.*_)?(b|add|baddb)?mm(_.*)?|(add)?mv|.*matmul|einsum|tensordot|_?conv.*|.*linear|(lstm|gru|rnn)(_.*)?"
)
#: Pick rows (the experts that a token was sent to), or change the dtype.
_VIEWS = ("index", "index_select", "gather", "to", "_to_copy", "type_as")
#: Of weights alone these are a weight again.
_MADE_OF = ("mul", "div", "add", "sub", "neg", "cat", "concat", "stack")
#: Read by index, or element by element.
_NO_PRODUCTS = (
    nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.PReLU, *QUANTIZERS,
)  # fmt: skip


def left_float(
    program: Program, what: str, wanted: Callable[[str], bool], kinds: Collection[str] = ("linear",)
) -> list[str]:
    """A line ``<name> stays float: <reason>`` for each weight of a product that a pass cannot take.

    Experts of a mixture in one tensor, convolutions where only linear layers are rounded, recurrent layers of odd kinds.

    Args:
        program: The program.
        what: What the pass quantizes, for the reason: ``QuantizeWeights rounds linear layers``.
        wanted: False for the names of layers that are quantized, ignored, or have a line already.
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
        if reader and wanted(name):
            found.setdefault(name, f"{name} stays float: a weight of {reader}; {what}")
    return list(found.values())


def _layer(program: Program, node: Node, kinds: Collection[str]) -> str:
    """The type of a layer with a weight of its own; empty when it is none, is quantized or is accounted for."""
    module = program.module(node)
    if isinstance(module, _NO_PRODUCTS) or layer_kind(program, node) in kinds:
        return ""
    if any(isinstance(child, QUANTIZERS) for child in module.modules()):
        return ""
    weights = [p for p in module.parameters(recurse=False) if p.dim() > 1]
    return type(module).__name__.removeprefix("Fused") if weights else ""


def _product(program: Program, weight: Node, kinds: Collection[str]) -> str:
    """The operator that multiplies by a parameter, through views of it; empty when there is none."""
    queue, same = list(weight.users), {weight}  # what is the weight still
    while queue:
        user = queue.pop()
        name = getattr(getattr(user.target, "overloadpacket", user.target), "__name__", "")
        made = name in _MADE_OF and all(i.op == "get_attr" or i in same for i in user.all_input_nodes)
        if is_move(user) or name in _VIEWS or made:
            queue += user.users
            same.add(user)
        elif user.op == "call_function" and _PRODUCT.fullmatch(name) and layer_kind(program, user) not in kinds:
            return name
    return ""


def unused_globs(program: Program, names: Iterable[str], **options: Iterable[str]) -> list[str]:
    """A line for each glob of ``options`` that matches no layer: it is mistyped, or of another model.

    Args:
        program: Names of its modules and parameters are layers' names.
        names: Further ones.
        **options: Globs by the name of the option.
    """
    known = {*names, *(str(n.target) for n in program.graph.nodes if n.op in ("call_module", "get_attr"))}
    given = [(option, glob) for option, globs in options.items() for glob in globs]
    return [f"{k}={g!r} matches no layer" for k, g in given if not any(fnmatch.fnmatchcase(n, g) for n in known)]
