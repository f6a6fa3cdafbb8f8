"""Slots: where a prunable channel is written down, one dimension of one tensor."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Slot"]


@dataclass(frozen=True)
class Slot:
    """One dimension of one parameter or buffer of a program.

    Attributes:
        tensor: Name of the tensor in the program's module.
        dim: Dimension that holds the channels.
        role: ``"out"``: the layer makes these channels (rows of a weight, its bias, a norm's scale and statistics);
            ``"in"``: it reads them (columns of a weight).
        layer: Path of the layer, or the tensor's own name where it is used without a layer.
        node: Name of the graph node that uses it.
        size: Length of the dimension.
    """

    tensor: str
    dim: int
    role: str
    layer: str
    node: str
    size: int
