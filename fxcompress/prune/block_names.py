"""Readable names of residual blocks: the module path that the layers of a branch have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set

from torch import Tensor
from torch.fx import Node

from fxcompress.ir import Program

__all__ = ["Learned", "name_blocks"]


class Learned:
    """The layers and parameters of a program, by the nodes that read them.

    Args:
        program: The program.
        nodes: Its nodes that hold parameters, in execution order.
        constant: Those whose value does not depend on an input: parameters without a layer, embedded positions.
    """

    def __init__(self, program: Program, nodes: Sequence[Node], constant: Set[Node]) -> None:
        self.tensors = {node: _tensors(program, node) for node in nodes}
        self.weighted = {
            str(node.target)
            for node, found in self.tensors.items()
            if any(t.dim() > 1 for t in found) and not (node in constant and node.op == "call_module")
        }
        self.below = Counter(prefix for path in self.weighted for prefix in _prefixes(path))
        self._readers: Counter[int] = Counter(id(t) for found in self.tensors.values() for t in found)

    def paths(self, nodes: Sequence[Node]) -> list[str]:
        """Paths of the layers, and names of the parameters without one, among ``nodes``."""
        return list(dict.fromkeys(str(n.target) for n in nodes if n in self.tensors))

    def own_parameters(self, nodes: Sequence[Node]) -> int:
        """Number of parameters that only ``nodes`` read."""
        tensors = {id(t): t for n in nodes for t in self.tensors.get(n, ())}
        inside = Counter(id(t) for n in nodes for t in self.tensors.get(n, ()))
        return sum(t.numel() for key, t in tensors.items() if inside[key] == self._readers[key])


def name_blocks(learned: Learned, blocks: Sequence[Sequence[str]]) -> list[str]:
    """One name per block, given the paths of its layers; the second block of one name becomes ``name#2``."""
    counts: Counter[str] = Counter()
    names = []
    for paths in blocks:
        name = _name(learned, paths)
        counts[name] += 1
        names.append(name if counts[name] == 1 else f"{name}#{counts[name]}")
    return names


def _name(learned: Learned, paths: Sequence[str]) -> str:
    """The common path of the layers with a matrix, when it leads to no other one; else with the children's names."""
    weighted = [p for p in paths if p in learned.weighted] or list(paths)
    if len(weighted) == 1:
        return weighted[0]
    parts = [p.split(".") for p in weighted]
    depth = next(i for i in range(len(parts[0]) + 1) if len({tuple(p[: i + 1]) for p in parts}) > 1)
    prefix = ".".join(parts[0][:depth])
    if prefix and learned.below[prefix] == len(learned.weighted.intersection(weighted)):
        return prefix
    children = list(dict.fromkeys(p[depth] if len(p) > depth else "" for p in parts))
    joined = "+".join(children) if len(children) <= 3 else f"{children[0]}..{children[-1]}"
    return f"{prefix}.{joined}" if prefix else joined


def _tensors(program: Program, node: Node) -> list[Tensor]:
    if node.op == "get_attr":
        return [program.tensor(node)]
    return list(program.module(node).parameters())


def _prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]
