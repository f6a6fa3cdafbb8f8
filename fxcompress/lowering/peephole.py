"""Small rewrites of the ONNX graph that every engine is better off with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxcompress.lowering.builder import DOMAIN

if TYPE_CHECKING:
    import onnx_ir as ir

    from fxcompress.lowering.portable import PortableModel

__all__ = ["fold_padding"]


def fold_padding(portable: PortableModel) -> None:
    """Zero padding in front of convolutions becomes their own padding: engines do not look through a Pad.

    A fake-quantizer between the two stays: zero lies on every grid.
    """
    for node in list(portable.model.graph):
        if node.op_type == "Pad" and node.domain == "":
            pads = _spatial_zeros(node)
            convs = _convs_behind(node)
            if pads is not None and convs:
                _fold(portable, node, convs, pads)


def _spatial_zeros(node: ir.Node) -> list[int] | None:
    """Begin and end paddings of the spatial dimensions, when the node pads those alone, with zeros, by constants."""
    rank = len(node.inputs[0].shape) if node.inputs[0] is not None and node.inputs[0].shape is not None else 0
    mode = node.attributes.get("mode")
    amounts, fill, axes = (_constant(node, i) for i in (1, 2, 3))
    if rank < 3 or amounts is None or (mode is not None and mode.as_string() != "constant"):
        return None
    if fill not in (None, [0.0]) or (len(node.inputs) > 2 and node.inputs[2] is not None and fill is None):
        return None
    dims = [int(a) % rank for a in axes] if axes is not None else list(range(rank))
    begins, ends = [0] * rank, [0] * rank
    for place, dim in enumerate(dims):
        begins[dim], ends[dim] = int(amounts[place]), int(amounts[place + len(dims)])
    if min(begins + ends) < 0 or any(begins[:2]) or any(ends[:2]):
        return None
    return begins[2:] + ends[2:]


def _constant(node: ir.Node, index: int) -> list[float] | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None or value.const_value is None:
        return None
    return [float(v) for v in value.const_value.numpy().reshape(-1)]


def _convs_behind(node: ir.Node) -> list[ir.Node]:
    """The convolutions that read the padded value, directly or through a fake-quantizer; empty if anything else does."""
    found: list[ir.Node] = []
    if node.outputs[0].is_graph_output():
        return []
    for use in node.outputs[0].uses():
        if use.node.op_type == "Conv" and use.idx == 0:
            found.append(use.node)
        elif use.node.domain == DOMAIN and not use.node.outputs[0].is_graph_output():
            inner = use.node.outputs[0].uses()
            if not inner or not all(u.node.op_type == "Conv" and u.idx == 0 for u in inner):
                return []
            found += [u.node for u in inner]
        else:
            return []
    return found


def _fold(portable: PortableModel, node: ir.Node, convs: list[ir.Node], pads: list[int]) -> None:
    import onnx_ir as ir

    source = node.inputs[0]
    assert source is not None
    for conv in convs:
        old = conv.attributes["pads"].as_ints() if "pads" in conv.attributes else [0] * len(pads)
        conv.attributes["pads"] = ir.AttrInt64s("pads", [a + b for a, b in zip(old, pads, strict=True)])
    # Points behind the padding now have another shape than in the program.
    gone = {node.outputs[0].name, *(u.node.outputs[0].name for u in node.outputs[0].uses() if u.node.domain == DOMAIN)}
    for use in list(node.outputs[0].uses()):
        if use.node.domain == DOMAIN:
            use.node.outputs[0].shape = source.shape
    node.outputs[0].replace_all_uses_with(source)
    portable.model.graph.remove(node, safe=True)
    portable.taps = {tap: value for tap, value in portable.taps.items() if value not in gone}
