"""Residual blocks of a program: where they are, what they hold, and why some cannot be bypassed.

A residual block is an add ``y = s + f(x)`` of two equal shapes whose skip ``s`` is ``x`` itself, or ``x`` moved around
or summed with other residual branches (parallel attention and MLP), while every path from the inputs to ``f`` runs
through ``x``. Then ``y`` can be replaced by ``s``. In the graph of the values that carry data, "every path runs
through ``x``" says that ``x`` dominates the branch, and the nearest such value is the immediate dominator of ``y``
(Cooper, Harvey and Kennedy, "A Simple, Fast Dominance Algorithm", 2001; one walk, for the graph has no loops).

Constants, sizes and what is made of integer or boolean inputs without a learned layer (attention masks, positions)
carry no data in this sense: a branch may read them.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxcompress.analysis import Shapes, node_macs
from fxcompress.ir import Program
from fxcompress.prune.block_names import Learned, name_blocks

__all__ = ["Block", "find_blocks"]

_aten = torch.ops.aten
#: Give the values of their first input in another order or shape, in eval mode.
_MOVES = {
    _aten.view, _aten.reshape, _aten._unsafe_view, _aten.flatten, _aten.unflatten, _aten.squeeze, _aten.unsqueeze,
    _aten.permute, _aten.transpose, _aten.t, _aten.contiguous, _aten.clone, _aten.alias, _aten.dropout,
    _aten.feature_dropout, _aten.roll,
}  # fmt: skip
#: Read the shape of their first input, not its values.
_SHAPE_ONLY = {
    _aten.sym_size, _aten.sym_numel, _aten.sym_stride, _aten.zeros_like, _aten.ones_like, _aten.full_like,
    _aten.empty_like, _aten.new_zeros, _aten.new_ones, _aten.new_full, _aten.new_empty,
}  # fmt: skip
#: Read the shape or dtype of their second input only.
_LIKE_SECOND = {_aten.expand_as, _aten.view_as, _aten.reshape_as, _aten.type_as}
_CONSTANT, _MASK, _DATA = 0, 1, 2


@dataclass(frozen=True)
class Block:
    """One residual block.

    Attributes:
        name: Common module path of the branch's layers, as ``layer1.1`` or ``blocks.3.mlp``.
        nodes: Graph nodes that go with the branch, in execution order.
        layers: Paths of the branch's layers with parameters (for a parameter without a layer, its own name).
        parameters: Number of parameters that nothing but this block reads.
        macs: Multiply-accumulates of the branch for the example inputs.
        skip: Graph node that takes the place of ``output``.
        output: The add.
        reason: Why the block cannot be bypassed; empty when it can.
    """

    name: str
    nodes: tuple[str, ...]
    layers: tuple[str, ...]
    parameters: int
    macs: int
    skip: str
    output: str
    reason: str = ""


@dataclass
class _Found:
    """A block as nodes. ``nodes`` are those that go, or, where it cannot be bypassed, those that make it up."""

    output: Node
    skip: Node
    nodes: list[Node]
    reason: str = ""
    inner: bool = False  # listed only where it is no part of another block


def find_blocks(program: Program) -> list[Block]:
    """All residual blocks with learned layers, in execution order; an inner one comes before the one around it.

    Blocks that cannot be bypassed are listed with the reason: the skip is a projection, the branch also reads another
    value, or one of its values is used elsewhere. Sums without a learned layer (``x + x``, the polynomial of a GELU)
    and sums of unrelated values (embeddings) are no blocks.

    Args:
        program: Any captured program. Residual adds that ``FuseActivations`` took into a layer are not seen.
    """
    finder = _Finder(program)
    found = finder.run()
    learned = Learned(program, finder.learned, {n for n in finder.learned if finder.kind[n] == _CONSTANT})
    shapes = Shapes(program)
    layers = [learned.paths(f.nodes) for f in found]
    names = name_blocks(learned, layers)
    return [
        Block(
            name=name,
            nodes=tuple(n.name for n in f.nodes),
            layers=tuple(paths),
            parameters=learned.own_parameters(f.nodes),
            macs=sum(node_macs(program, n, shapes) for n in f.nodes),
            skip=f.skip.name,
            output=f.output.name,
            reason=f.reason,
        )
        for f, paths, name in zip(found, layers, names, strict=True)
    ]


class _Finder:
    """Classes of values and their dominators (one walk), then every add in turn."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.order: dict[Node, int] = {}
        self.kind: dict[Node, int] = {}
        self.dominator: dict[Node, Node | None] = {}
        self.depth: dict[Node, int] = {}
        self.skips: dict[Node, Node] = {}  # add of a block that can be bypassed -> its skip
        self.learned: list[Node] = []  # nodes that hold parameters, in execution order
        self.taught: set[Node] = set()  # those, and functions of parameters or of constants made from parameters
        for number, node in enumerate(program.graph.nodes):
            self.order[node] = number
            self._classify(node)

    def _classify(self, node: Node) -> None:
        if self._holds_parameters(node):
            self.learned.append(node)
        kind = self.kind[node] = self._kind(node)
        made = any(n in self.taught and self.kind[n] == _CONSTANT for n in _read(node))
        if made or self.learned[-1:] == [node]:
            self.taught.add(node)
        if kind == _DATA:
            above: Node | None = None
            for number, source in enumerate(self._data(node)):
                above = source if number == 0 else self._common(above, source)
            self.dominator[node] = above
            self.depth[node] = 1 if above is None else self.depth[above] + 1

    def _holds_parameters(self, node: Node) -> bool:
        if node.op == "call_module":
            return next(self.program.module(node).parameters(), None) is not None
        return node.op == "get_attr" and isinstance(self.program.tensor(node), nn.Parameter)

    def _kind(self, node: Node) -> int:
        if node.op == "placeholder":
            value = node.meta.get("val")
            if not isinstance(value, Tensor):
                return _CONSTANT
            return _DATA if value.is_floating_point() or value.is_complex() else _MASK
        read = _read(node)
        kind = max((self.kind[n] for n in read), default=_CONSTANT)
        if kind == _MASK and (node.op == "call_module" or any(map(self._holds_parameters, read))):
            return _DATA  # an embedding: what is learned begins here
        return kind

    def _data(self, node: Node) -> list[Node]:
        """Inputs that carry data."""
        return [n for n in _read(node) if self.kind[n] == _DATA]

    def _common(self, a: Node | None, b: Node | None) -> Node | None:
        """Nearest common dominator; None when only the inputs as a whole dominate both."""
        while a is not b:
            if a is None or b is None:
                return None
            if self.depth[a] < self.depth[b]:
                a, b = b, a
            a = self.dominator[a]
        return a

    def _with_constants(self, nodes: list[Node]) -> list[Node]:
        """``nodes`` and the constants they read that are made of parameters, in execution order."""
        found, open_ = set(nodes), list(nodes)
        while open_:
            for source in open_.pop().all_input_nodes:
                if source in self.taught and self.kind[source] == _CONSTANT and source not in found:
                    found.add(source)
                    open_.append(source)
        return sorted(found, key=self.order.__getitem__)

    def run(self) -> list[_Found]:
        """All blocks; sums inside another block that are no blocks themselves are left out."""
        found = [f for node in self.program.graph.nodes if self._is_sum(node) for f in self._at(node)]
        outside: dict[Node, int] = {}
        for number, f in enumerate(found):
            outside |= dict.fromkeys(f.nodes, number)
        return [f for n, f in enumerate(found) if not f.inner or outside.get(f.output, n) == n]

    def _is_sum(self, node: Node) -> bool:
        """An add of two float values of one shape."""
        if node.target is not _aten.add.Tensor or len(node.args) != 2 or node.kwargs.get("alpha", 1) != 1:
            return False
        if not all(isinstance(a, Node) and self.kind[a] == _DATA for a in node.args):
            return False
        value = node.meta["val"]
        shapes = [cast(Node, a).meta["val"].shape for a in node.args]
        return bool(value.is_floating_point()) and all(_same_shape(s, value.shape) for s in shapes)

    def _at(self, node: Node) -> list[_Found]:
        """The block that ends in this sum, if it is one."""
        operands = cast(tuple[Node, Node], node.args)
        for skip, branch in (operands, operands[::-1]):
            found = self._bypass(node, skip, branch)
            if found is not None:
                return [found]
        for skip, branch in (operands, operands[::-1]):
            found = self._second_source(node, skip, branch)
            if found is not None:
                return [found]
        found = self._projection(node, *operands)
        return [] if found is None else [found]

    def _bypass(self, node: Node, skip: Node, branch: Node) -> _Found | None:
        """The block whose branch reads nothing but the value that the skip comes from."""
        start = self.dominator[node]
        kept = self._chain(skip, start)
        if start is None or branch in kept or not kept or skip.meta["val"].dtype != node.meta["val"].dtype:
            return None
        region = self._region(branch, kept)
        gone = self._gone(node, branch, set(kept))
        if self.taught.isdisjoint(region):
            return None
        escaped = [n for n in region if n not in gone]
        if escaped:
            user = next(u for u in escaped[-1].users if u not in gone and u is not node)
            where = "the output of the program" if user.op == "output" else f"%{user.name}"
            return _Found(
                node, skip, self._with_constants(region), f"its value %{escaped[-1].name} is also read by {where}"
            )
        self.skips[node] = skip
        return _Found(node, skip, sorted(gone, key=self.order.__getitem__))

    def _chain(self, skip: Node, start: Node | None) -> list[Node]:
        """From ``skip`` back to ``start`` over moves and other blocks' adds; empty when it does not lead there."""
        chain = [skip]
        while chain[-1] is not start:
            node = chain[-1]
            if start is None or self.order[node] < self.order[start]:
                return []
            if node in self.skips:
                chain.append(self.skips[node])
            elif self._moves(node):
                chain.append(self._data(node)[0])
            else:
                return []
        return chain

    def _moves(self, node: Node) -> bool:
        if node.op == "call_module":
            return isinstance(self.program.module(node), (nn.modules.dropout._DropoutNd, nn.Identity))
        scaled = _packet(node) in (_aten.mul, _aten.div) and not isinstance(node.args[1], Node)
        return (scaled or _packet(node) in _MOVES) and len(self._data(node)) == 1

    def _region(self, last: Node, stops: list[Node]) -> list[Node]:
        """Nodes that carry data from ``stops`` to ``last``, in execution order."""
        seen, open_ = {last, *stops}, [last]
        region = []
        while open_:
            node = open_.pop()
            region.append(node)
            for source in self._data(node):
                if source not in seen:
                    seen.add(source)
                    open_.append(source)
        return sorted(region, key=self.order.__getitem__)

    def _gone(self, output: Node, branch: Node, kept: set[Node]) -> set[Node]:
        """What nobody reads any more once ``output`` does not read ``branch``."""
        gone: set[Node] = set()
        open_ = [(-self.order[branch], branch)]
        seen = {branch} | kept
        while open_:
            node = heapq.heappop(open_)[1]  # the last one first: its users are settled
            if node.op == "placeholder" or any(u is not output and u not in gone for u in node.users):
                continue
            gone.add(node)
            for source in node.all_input_nodes:
                if source not in seen:
                    seen.add(source)
                    heapq.heappush(open_, (-self.order[source], source))
        return gone

    def _second_source(self, node: Node, skip: Node, branch: Node) -> _Found | None:
        """A branch that depends on the skip and on another value too."""
        seen: set[Node] = set()
        open_ = [branch]
        while open_:
            source = open_.pop()
            if source not in seen:
                seen.add(source)
                open_ += self._data(source) if self.order[source] > self.order[skip] else []
        foreign = [n for n in seen - {skip} if self.order[n] < self.order[skip] or not self._data(n)]
        region = sorted((n for n in seen if self.order[n] > self.order[skip]), key=self.order.__getitem__)
        if skip not in seen or not foreign or self.taught.isdisjoint(region):
            return None
        other = min(foreign, key=self.order.__getitem__)
        return _Found(
            node,
            skip,
            self._with_constants(region),
            f"its branch also reads %{other.name}, which does not come from its skip",
        )

    def _projection(self, node: Node, a: Node, b: Node) -> _Found | None:
        """A sum of two results of one value, one of them by a plain chain of layers: a downsampling skip."""
        start = self.dominator[node]
        if start is None or start in (a, b):
            return None
        sides = [self._region(x, [start]) for x in (a, b)]
        skip, short = min(((a, sides[0]), (b, sides[1])), key=lambda side: len(side[1]))
        plain = all(len(self._data(n)) == 1 for n in short)
        if not plain or self.taught.isdisjoint(sides[0] + sides[1]):
            return None
        work = next((n for n in short if n in self.taught), short[0])
        what = str(work.target) if work.op == "call_module" else f"%{work.name}"
        nodes = self._with_constants([*sides[0], *sides[1]])
        return _Found(node, skip, nodes, f"its skip is not the block's input but a result of {what}", inner=True)


def _packet(node: Node) -> Any:
    return getattr(node.target, "overloadpacket", None)


def _read(node: Node) -> list[Node]:
    """Inputs whose values matter."""
    packet = _packet(node)
    if packet in _SHAPE_ONLY:
        return []
    return node.all_input_nodes[:1] if packet in _LIKE_SECOND else node.all_input_nodes


def _same_shape(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(map(_same_size, a, b))


def _same_size(a: Any, b: Any) -> bool:
    """Equal sizes, without putting a guard on symbolic ones: by text, or by the size that was traced."""
    if isinstance(a, int) or isinstance(b, int):
        return type(a) is type(b) and bool(a == b)
    if str(a) == str(b):
        return True
    return bool(a.node.has_hint() and b.node.has_hint() and a.node.hint == b.node.hint)
