"""Learned rounding of whole blocks: their layers together, from the error of the block's output.

Li et al., "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction", 2021. A block here lies between
two places of the program where one value is all that later nodes read, as between residual blocks; neighbours of one
numbered module (``layers.3.conv``, ``layers.3.norm``) are one block. It is run with its activation functions and quantizers,
and rounding starts from what was found for the layers alone. A block that does not come out better keeps that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg

from fxcompress.ir import Program
from fxcompress.layerwise.walk import Walk
from fxcompress.quant.adaround import RowsOnGrid, rectified_sigmoid, regularizer, unrectified
from fxcompress.quant.fake_quantize import QUANTIZERS
from fxcompress.quant.reconstruction import LayerReconstruction, Rounding

__all__ = ["Block", "BlockReconstruction", "find_blocks", "run_block"]

#: Weight of the regularizer (its mean over all weights) beside the error over the error at the start.
_STRENGTH = 20.0


@dataclass
class Block:
    """A part of a program with one value in and one out.

    Attributes:
        entry: What it reads.
        body: Its nodes in order.
        exit: What later nodes read.
        layers: Nodes to round.
        before: Sizes and constants made before it that it reads.
    """

    entry: Node
    body: list[Node]
    exit: Node
    layers: list[Node]
    before: list[Node] = field(default_factory=list)


def find_blocks(program: Program, layers: Sequence[Node]) -> list[Block]:
    """Blocks of ``program`` that hold any of ``layers``, in order."""
    order = list(program.graph.nodes)
    fixed = _fixed(order)
    places = _narrow_places(order, fixed)
    wanted = set(layers)
    blocks: list[Block] = []
    for (begin, entry), (end, leaving) in pairwise(places):
        body = order[begin:end]
        inside = [n for n in body if n in wanted]
        if blocks and blocks[-1].exit is entry and (not inside or _same_module(blocks[-1].layers, inside)):
            last = blocks[-1]
            last.body, last.exit, last.layers = last.body + body, leaving, last.layers + inside
        elif inside:
            blocks.append(Block(entry, body, leaving, inside))
    for block in blocks:
        own = {block.entry, *block.body}
        read = [n for node in block.body for n in node.all_input_nodes if n not in own and n.op != "get_attr"]
        block.before = list(dict.fromkeys(read))
    return blocks


def _fixed(order: Sequence[Node]) -> set[Node]:
    """Nodes that depend on no value of an input: constants, parameters, sizes."""
    fixed: set[Node] = set()
    for node in order:
        reads = node.all_input_nodes
        size = node.target is torch.ops.aten.sym_size.int
        if node.op == "get_attr" or size or (reads and node.op != "output" and all(n in fixed for n in reads)):
            fixed.add(node)
    return fixed


def _narrow_places(order: Sequence[Node], fixed: set[Node]) -> list[tuple[int, Node]]:
    """Positions in front of which one value alone is made that nodes from there on read, with that value."""
    position = {node: i for i, node in enumerate(order)}
    last = {n: max((position[u] for u in n.users), default=-1) for n in order if n not in fixed}
    live: set[Node] = set()
    found = []
    for index, node in enumerate(order):
        live = {n for n in live if last[n] >= index}
        if len(live) == 1:
            value = next(iter(live))
            if isinstance(value.meta.get("val"), Tensor) and value.meta["val"].is_floating_point():
                found.append((index, value))
        if node not in fixed:
            live.add(node)
    return found


def _same_module(left: Sequence[Node], right: Sequence[Node]) -> bool:
    """Both belong to one numbered module, e.g. ``layers.3``."""
    names = {_numbered(str(node.target)) for node in (*left, *right)}
    return len(names) == 1 and "" not in names


def _numbered(path: str) -> str:
    """The path up to its first number; empty when the number is its end or there is none."""
    parts = path.split(".")
    at = next((i for i, part in enumerate(parts[:-1]) if part.isdigit()), None)
    return "" if at is None else ".".join(parts[: at + 1])


@dataclass
class BlockReconstruction(LayerReconstruction):
    """As its base, with the layers of a block learned together once they were learned alone."""

    def _run(
        self, twin: Program, names: dict[str, Node], exact: Walk, rounded: Walk, advance: Callable[[], None]
    ) -> int:
        better = 0
        blocks = {node: block for block in find_blocks(self.program, self.nodes) for node in block.layers}
        order = list(twin.graph.nodes)
        after = {node: order[i + 1] for i, node in enumerate(order[:-1])}
        for node in self.nodes:
            block = blocks.get(node)
            if block is None:  # between values that cross: alone
                moments = self.observe_float(twin, names[node.name], exact)
                value = cast(Node, node.args[0])
                rounded.visit(node, [value], lambda i, v, m=moments: m.see_quantized(i, v[0]))  # type: ignore[misc]
                self.round(node, twin.module(names[node.name]), moments)
            elif node is block.layers[0]:
                inputs: list[list[Any]] = []
                rounded.visit(
                    block.body[0],
                    [block.entry, *block.before],
                    lambda _, v, kept=inputs: kept.append(list(v)),  # type: ignore[misc]
                )
                for layer in block.layers:
                    moments = self.observe_float(twin, names[layer.name], exact)
                    for number, values in enumerate(inputs):
                        moments.see_quantized(number, run_block(self.program, block, values, {}, layer))
                    self.round(layer, twin.module(names[layer.name]), moments)
                targets: list[Tensor] = []
                leaving = names[_unquantized(self.program, block.exit).name]
                exact.visit(after[leaving], [leaving], lambda _, v, kept=targets: kept.append(v[0]))  # type: ignore[misc]
                floats = {n: twin.module(names[n.name]) for n in block.layers}
                better += _Learner(self.program, floats, block, inputs, targets, self.options).run()
            advance()
        return better


def run_block(
    program: Program, block: Block, inputs: Sequence[Any], weights: dict[Node, Tensor], until: Node | None = None
) -> Tensor:
    """A block's output for one call, or what the node ``until`` reads.

    Args:
        program: Of the block.
        block: What to run.
        inputs: Values of its entry and of ``before``.
        weights: Of layers that do not compute with their own.
        until: A layer of the block.
    """
    values: dict[Node, Any] = dict(zip([block.entry, *block.before], inputs, strict=True))

    def value(node: Node) -> Any:
        return program.tensor(node) if node.op == "get_attr" else values[node]

    for node in block.body:
        if node is until:
            return cast(Tensor, value(cast(Node, node.args[0])))
        if node.op == "get_attr":
            continue
        args, kwargs = map_arg((node.args, node.kwargs), value)
        if node in weights:
            layer = cast(Any, program.module(node))
            residual = args[1] if len(args) > 1 else None
            values[node] = layer.epilogue(layer.compute(args[0], weights[node], layer.bias), residual)
        else:
            function: Any = program.module(node) if node.op == "call_module" else node.target
            values[node] = function(*args, **kwargs)
    return cast(Tensor, values[block.exit])


def _unquantized(program: Program, node: Node) -> Node:
    """What the quantizer ``node`` quantizes; another node itself."""
    while node.op == "call_module" and isinstance(program.module(node), QUANTIZERS):
        node = cast(Node, node.args[0])
    return node


class _Learner:
    def __init__(
        self,
        program: Program,
        exact: dict[Node, Any],
        block: Block,
        inputs: list[list[Any]],
        targets: list[Tensor],
        options: Rounding,
    ) -> None:
        self.program, self.block, self.inputs, self.targets = program, block, inputs, targets
        assert options.blocks is not None
        self.how = options.blocks
        self.generator = torch.Generator().manual_seed(options.seed)
        self.layers: dict[Node, Any] = {n: program.module(n) for n in block.layers}
        self.grids = {n: RowsOnGrid.of(exact[n].weight, layer.weight_fake_quantize) for n, layer in self.layers.items()}

    def run(self) -> bool:
        """Learn; True when the block came out better."""
        start = {}
        for node, layer in self.layers.items():
            grid = self.grids[node]
            start[node] = ((layer.weight.detach().float() / grid.scale).round() - grid.low).clamp(0.0, 1.0)
        before = self._error(start)
        if not before > 0:
            return False
        found = self._learn(start, before)
        if not self._error(found) < before:
            return False
        for node, weight in self._weights(found).items():
            layer = self.layers[node]
            layer._parameters["weight"] = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
        return True

    def _weights(self, up: dict[Node, Tensor]) -> dict[Node, Tensor]:
        return {n: self.grids[n].values(h).to(self.layers[n].weight.dtype) for n, h in up.items()}

    def _learn(self, start: dict[Node, Tensor], unit: float) -> dict[Node, Tensor]:
        halfway = {n: 0.5 * (self.grids[n].fraction.clamp(0.0, 1.0) + up) for n, up in start.items()}
        v = {n: unrectified(h.clamp(0.01, 0.99)).requires_grad_(True) for n, h in halfway.items()}
        adam = torch.optim.Adam(list(v.values()), self.how.learning_rate)
        size = sum(t.numel() for t in v.values())
        for step in range(self.how.iterations):
            number = int(torch.randint(len(self.inputs), (), generator=self.generator))
            adam.zero_grad()
            with torch.enable_grad():
                soft = {n: rectified_sigmoid(t) for n, t in v.items()}
                output = run_block(self.program, self.block, self.inputs[number], self._weights(soft))
                loss = (output - self.targets[number]).square().mean() / unit
                beta = self.how.beta_at(step)
                if beta is not None:
                    loss = loss + _STRENGTH / size * sum(regularizer(h, beta) for h in soft.values())
                torch.autograd.backward(loss, inputs=list(v.values()))
            adam.step()
        return {n: (rectified_sigmoid(t.detach()) >= 0.5).float() for n, t in v.items()}

    def _error(self, up: dict[Node, Tensor]) -> float:
        """Mean squared error of the block's output over all calls."""
        weights = self._weights(up)
        total, count = 0.0, 0
        for inputs, target in zip(self.inputs, self.targets, strict=True):
            output = run_block(self.program, self.block, inputs, weights)
            total += float((output - target).double().square().sum())
            count += target.numel()
        return total / max(1, count)
