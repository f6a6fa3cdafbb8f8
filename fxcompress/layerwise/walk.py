"""The walk: calibration calls go through a program side by side, from layer to layer.

Between two layers that are visited, every call keeps only the values that are read later. Where even these would take
more memory than is allowed, the walk keeps an earlier, narrower state (in a transformer: the residual stream) and
computes from it what a layer reads, once for the visit and once more behind it. So memory is that of the parameters plus
one narrow state per call plus the values of one call, and what a changed layer gives is what the later layers see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from fxcompress.data import Call
from fxcompress.errors import CalibrationError
from fxcompress.ir import Program, source_line
from fxcompress.layerwise.pool import Pool
from fxcompress.vocabulary import check_tokens

__all__ = ["Walk"]

#: Bytes that all calls together may always keep, however small the model is.
_LEAST = 1 << 26
#: Weighted layers that may lie between what is kept and what is looked at (a transformer's block has about 7).
_REACH = 8


class Walk:
    """Calls on their way through a program. Modules are looked up when they run, so layers can be changed on the way.

    Run it under ``torch.no_grad()`` and `fxcompress.ir.evaluating`.

    Args:
        program: Its graph must not change during the walk; its modules and parameters may.
        calls: Calibration calls.
        budget: Bytes that the calls may keep between two visits, together; it is exceeded where nothing narrower is
            near. Default: a quarter of the parameters' bytes, at least 64 MiB.
    """

    def __init__(self, program: Program, calls: Iterable[Call], budget: int | None = None) -> None:
        self.program = program
        self.order = list(program.graph.nodes)
        self.position = {node: i for i, node in enumerate(self.order)}
        self._leaves = [program.signature.flatten(*call) for call in calls]
        self._kept: list[dict[Node, Any]] = [{} for _ in self._leaves]
        self._pool = Pool()
        self._constants: dict[Any, dict[Node, Any]] = {}
        self._keys = [_sizes(leaves) for leaves in self._leaves]
        self._inputs = {node: i for i, node in enumerate(program.placeholders())}
        self._fixed, self._constant = _fixed_nodes(program, self.order)
        self._dead = _last_uses(self.order)
        self._base = 0  # everything before this position is done
        parameters = sum(p.numel() * p.element_size() for p in program.gm.parameters())
        self._budget = max(_LEAST, parameters // 4) if budget is None else budget
        self._width = self._widths()
        self._layers = list(accumulate((_is_layer(program, node) for node in self.order), initial=0))

    def __len__(self) -> int:
        return len(self._leaves)

    def visit(self, node: Node, values: Sequence[Node], see: Callable[[int, list[Any]], None]) -> None:
        """Run every call up to ``node`` (which is not run yet) and show what it reads.

        Args:
            node: Not before the node of the last visit.
            values: Nodes in front of ``node`` that it, or a later node, reads.
            see: Called with the number of the call and its ``values``.

        Raises:
            CalibrationError: the model fails on a call, or a token is out of the vocabulary.
        """
        stop = self.position[node]
        base = self._narrowest(stop)
        for number in range(len(self)):
            self._advance(number, base)
            here = self._kept[number]
            if base < stop:
                here = dict(here)
                self._run(number, here, base, stop)
            see(number, [self._look(number, here, value) for value in values])
        self._base = base
        for constants in self._constants.values():
            for value in [v for v in constants if self._last_read(v) < base]:
                del constants[value]

    def divide(self, factors: Mapping[Node, Tensor]) -> None:
        """Divide kept values (those that are kept) by factors that broadcast to them; no value may be an input."""
        for values in self._kept:
            for node in factors.keys() & values.keys():
                values[node].div_(factors[node].to(values[node]))

    def _advance(self, number: int, base: int) -> None:
        """Run one call up to ``base`` and keep what is read later."""
        values = self._kept[number]
        before = dict(values)
        self._run(number, values, self._base, base)
        for node, value in list(values.items()):
            if node not in before and isinstance(value, Tensor) and node.op != "placeholder":
                values[node] = self._pool.keep(value)
        for node, value in before.items():
            if node not in values:
                self._pool.release(value)

    def _look(self, number: int, here: Mapping[Node, Any], value: Node) -> Any:
        return here[value] if value in here else self._constants[self._keys[number]][value]

    # ------------------------------------------------------------------------------------------------ running
    def _run(self, number: int, values: dict[Node, Any], begin: int, end: int) -> None:
        constants = self._constants.setdefault(self._keys[number], {})
        for node in self.order[begin:end]:
            if node.op == "get_attr":
                continue  # read where it is used: layers change on the way
            if node in self._constant:
                if node not in constants:
                    constants[node] = self._checked_value(number, node, values, constants)
                continue
            values[node] = self._checked_value(number, node, values, constants)
            for gone in self._dead.get(node, ()):
                values.pop(gone, None)

    def _checked_value(self, number: int, node: Node, values: Mapping[Node, Any], constants: Mapping[Node, Any]) -> Any:
        def value_of(source: Node) -> Any:
            if source.op == "get_attr":
                return self.program.tensor(source)
            return values[source] if source in values else constants[source]

        try:
            return self._value(number, node, value_of)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            what = f"the model fails on calibration batch {number} at %{node.name}"
            raise CalibrationError(
                207, what, where=source_line(node), why=f"{type(error).__name__}: {error}"
            ) from error

    def _value(self, number: int, node: Node, value_of: Callable[[Node], Any]) -> Any:
        if node.op == "placeholder":
            return self._leaves[number][self._inputs[node]]
        args, kwargs = map_arg((node.args, node.kwargs), value_of)
        if node.op != "call_module":
            function: Any = node.target
            return function(*args, **kwargs)
        module = self.program.module(node)
        if isinstance(module, nn.Embedding):
            check_tokens(number, str(node.target), module, cast(Tensor, args[0]))
        return module(*args, **kwargs)

    # ------------------------------------------------------------------------------------------------ what to keep
    def _narrowest(self, stop: int) -> int:
        """The last position near ``stop`` whose values fit the budget; the narrowest one when none does.

        It is never far away, or every layer would cost a run through all layers before it.
        """
        positions = [p for p in range(stop, self._base - 1, -1) if self._layers[stop] - self._layers[p] <= _REACH]
        fitting = next((p for p in positions if self._width[p] <= self._budget), None)
        return min(positions, key=lambda p: self._width[p]) if fitting is None else fitting

    def _last_read(self, node: Node) -> int:
        return max((self.position[user] for user in node.users), default=self.position[node])

    def _widths(self) -> list[int]:
        """Bytes of the values of all calls that are read at or behind each position and made before it."""
        share = sum(_largest(leaves) for leaves in self._leaves) / _largest(pytree.tree_leaves(self.program.example))
        change = [0.0] * (len(self.order) + 1)
        for node in self.order:
            if node not in self._fixed and node.op not in ("placeholder", "output"):
                size = _bytes(node.meta.get("val")) * share
                change[self.position[node] + 1] += size
                change[min(self._last_read(node) + 1, len(self.order))] -= size
        widths, width = [], 0.0
        for step in change:
            width += step
            widths.append(int(width))
        return widths


def _is_layer(program: Program, node: Node) -> bool:
    """True when the node multiplies by a parameter that is no vector."""
    if node.op == "call_module":
        return any(p.dim() > 1 for p in program.module(node).parameters())
    read = [program.tensor(n) for n in node.all_input_nodes if n.op == "get_attr"]
    return any(isinstance(t, nn.Parameter) and t.dim() > 1 for t in read)


def _largest(leaves: Sequence[Any]) -> int:
    """Values of the largest input, at least 1."""
    return max([1, *(leaf.numel() for leaf in leaves if isinstance(leaf, Tensor))])


def _sizes(leaves: Sequence[Any]) -> Any:
    """What constants depend on: the shapes of the inputs, and those that are no tensors."""
    return tuple(tuple(v.shape) if isinstance(v, Tensor) else v for v in leaves)


def _fixed_nodes(program: Program, order: Sequence[Node]) -> tuple[set[Node], set[Node]]:
    """Nodes that read no input's values, and those of them that read no parameter either.

    The latter (positions, masks, rotary tables) are the same for all calls of one shape; parameters change on the way.
    """
    fixed: set[Node] = set()
    constant: set[Node] = set()
    for node in order:
        if node.op == "get_attr":
            fixed.add(node)
            if not isinstance(program.tensor(node), nn.Parameter):
                constant.add(node)
        elif node.target is torch.ops.aten.sym_size.int:
            fixed.add(node)
            constant.add(node)
        elif node.op == "call_function" and all(n in fixed for n in node.all_input_nodes):
            fixed.add(node)
            if all(n in constant for n in node.all_input_nodes):
                constant.add(node)
    return fixed, constant


def _bytes(value: Any) -> int:
    """Size of an example value; dynamic dimensions as in the example."""
    if isinstance(value, (list, tuple)):
        return sum(_bytes(v) for v in value)
    if not isinstance(value, Tensor):
        return 0
    total = value.element_size()
    for size in value.shape:
        total *= size if isinstance(size, int) else int(size.node.hint or 1)
    return total


def _last_uses(order: Sequence[Node]) -> dict[Node, list[Node]]:
    """Node -> the values nobody reads after it, itself included when nobody reads it at all."""
    last = {node: node for node in order}
    for node in order:
        for source in node.all_input_nodes:
            last[source] = node
    found: dict[Node, list[Node]] = {}
    for value, node in last.items():
        found.setdefault(node, []).append(value)
    return found
