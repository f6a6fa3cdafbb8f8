"""Nodes that ONNX Runtime would run only to give the same numbers another shape or name."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

    from fxcompress.engines.quantized import Realizer

__all__ = ["tidy"]

_VIEWS = frozenset({"Flatten", "Reshape", "Squeeze", "Unsqueeze"})


def tidy(r: Realizer) -> None:
    """Join what only changes shapes, drop what only changes names."""
    join_views(r)
    name_outputs(r)


def join_views(r: Realizer) -> None:
    """A chain of operators that keep the order of the values becomes one Reshape.

    The new shape must be known but for one size. A decoder that reads one token has such a chain around every head.
    """
    for node in reversed(list(r.graph)):
        if node.graph is None or not _is_view(node):
            continue
        chain = _chain(node)
        shape = _shape(node.outputs[0])
        if shape is not None and (len(chain) > 1 or node.op_type == "Transpose"):
            new = r.emit(node, "Reshape", chain[-1].inputs[0], r.shape_constant(shape), name=f"{node.name}/Reshape")
            r.replace(node.outputs[0], new)
            for old in chain:
                r.graph.remove(old, safe=True)


def _chain(node: ir.Node) -> list[ir.Node]:
    """The node and the views in front of it that nothing else reads."""
    chain = [node]
    while True:
        source = chain[-1].inputs[0]
        producer = None if source is None else source.producer()
        if source is None or producer is None or len(source.uses()) != 1 or source.is_graph_output():
            return chain
        if not _is_view(producer):
            return chain
        chain.append(producer)


def _is_view(node: ir.Node) -> bool:
    if node.domain or not node.inputs:
        return False
    return node.op_type in _VIEWS or (node.op_type == "Transpose" and _moves_ones(node))


def _moves_ones(node: ir.Node) -> bool:
    """A transposition that only moves dimensions of size 1."""
    shape = None if node.inputs[0] is None else node.inputs[0].shape
    if shape is None or "perm" not in node.attributes:
        return False
    moved = [i for i in node.attributes["perm"].as_ints() if shape[i] != 1]
    return moved == sorted(moved)


def _shape(value: ir.Value) -> list[int] | None:
    """The shape with -1 for the size that is not known; None when there are several, or none at all is."""
    if value.shape is None or value.is_graph_output():
        return None
    sizes = [n if isinstance(n, int) else -1 for n in value.shape]
    return sizes if sizes.count(-1) <= 1 and 0 not in sizes else None


def name_outputs(r: Realizer) -> None:
    """A value that is copied only to be an output becomes that output itself."""
    graph, taps = r.graph, r.portable.taps
    for place, output in enumerate(graph.outputs):
        node = output.producer()
        source = node.inputs[0] if node is not None and node.op_type == "Identity" else None
        if node is None or source is None or source.producer() is None or source.is_graph_output() or output.uses():
            continue
        name, old = output.name, source.name
        graph.outputs[place] = source
        graph.remove(node, safe=True)
        output.name, source.name = f"{name}_replaced", name
        source.shape, source.type = output.shape, output.type
        for tap in [t for t, v in taps.items() if v == old]:
            taps[tap] = str(name)
