"""Partly quantized programs from a fully quantized one, without calibrating again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from torch.fx import Node

from fxcompress.analysis import node_macs
from fxcompress.ir import Program, clone_tree
from fxcompress.layers import Fused, make_fused
from fxcompress.quant.fake_quantize import FakeQuantize
from fxcompress.quant.insertion import insert_quantizers
from fxcompress.quant.placement import layer_name, place
from fxcompress.quant.scheme import QuantScheme

__all__ = ["Variant", "keep_layers", "variants"]

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Variant:
    """A choice of layers to put back to float32."""

    name: str
    ignore: tuple[str, ...]
    reason: str


def variants(program: Program) -> list[Variant]:
    """Choices worth timing: where INT8 rarely pays are depthwise convolutions and layers with little arithmetic."""
    quantized = [(n, m) for n, m in program.layers() if isinstance(m, Fused) and m.weight_fake_quantize is not None]
    depthwise = tuple(str(n.target) for n, m in quantized if isinstance(m, _CONVS) and m.groups > 1)
    macs = {str(n.target): node_macs(program, n) for n, _ in quantized}
    total = sum(macs.values())
    small = tuple(name for name, count in macs.items() if count < 0.01 * total)
    found = []
    if depthwise:
        found.append(Variant("dense layers", depthwise, "grouped convolutions are not faster in INT8 here"))
    union = tuple(dict.fromkeys(depthwise + small))
    if small and len(union) < len(macs):
        found.append(Variant("the heaviest layers", union, "INT8 does not pay off for this layer here"))
    return found


def keep_layers(plain: Program, quantized: Program, scheme: QuantScheme, ignore: tuple[str, ...]) -> Program | None:
    """``plain`` with all layers but ``ignore`` quantized, with the grids and biases of ``quantized``.

    Args:
        plain: Float32 program ``quantized`` was made from.
        quantized: The fully quantized program.
        scheme: The target's scheme.
        ignore: Layer names to leave in float32.

    Returns:
        The program, or None when no layer is left to quantize or a value has no known grid.
    """
    program = plain.clone()
    placement = place(program, scheme, ignore)
    grids = _grids(quantized)
    if not placement.layers or any(v.name not in grids for v in placement.values):
        return None
    insert_quantizers(program, placement, lambda group: cast(FakeQuantize, clone_tree(grids[group[0].name])))
    for node in placement.layers:
        if node.op == "call_module":
            _adopt(program, quantized, layer_name(node))
        else:
            return None
    program.recompile()
    program.verify()
    return program


def _grids(quantized: Program) -> dict[str, FakeQuantize]:
    """Value name -> its quantizer."""
    found = {}
    for node, module in quantized.layers():
        if isinstance(module, FakeQuantize):
            found[cast(Node, node.args[0]).name] = module
    return found


def _adopt(program: Program, quantized: Program, path: str) -> None:
    """Take the weight (which may be rounded already), its grid and the corrected bias of a layer."""
    source = cast(Any, quantized.gm.get_submodule(path))
    layer = make_fused(program.gm.get_submodule(path))
    layer.weight_fake_quantize = source.weight_fake_quantize
    layer._parameters["weight"] = source.weight
    layer._parameters["bias"] = source.bias
    parent, _, leaf = path.rpartition(".")
    program.gm.get_submodule(parent)._modules[leaf] = layer
