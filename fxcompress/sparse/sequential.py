"""Calibrated pruning: layer by layer in execution order, each seeing the inputs that the sparse layers before it make.

All calibration batches walk through the graph side by side, node by node. When they reach a layer, its inputs are at
hand; it is made sparse and the walk goes on with what the sparse layer gives. The whole calibration thus costs one
forward pass, whatever the number of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils.hooks import RemovableHandle

from fxcompress.data import CalibrationData, Call, as_call
from fxcompress.errors import CalibrationError
from fxcompress.ir import Program, evaluating, forward_names, source_line
from fxcompress.sparse.layers import SparseLayer, is_weighted
from fxcompress.sparse.statistics import InputStatistics

__all__ = ["Solve", "observe_all", "walk"]

#: Makes a layer sparse, given what is known of its inputs.
Solve = Callable[[SparseLayer, InputStatistics], None]


def walk(
    program: Program, layers: Sequence[SparseLayer], calls: Iterable[Call], moments: bool, solve: Solve
) -> list[str]:
    """Run ``calls`` through ``program`` side by side and make each layer sparse when it is reached.

    A layer that is called several times is made sparse at its last call, from the inputs of all of them. Layers that
    read the same value share its statistics. The walk ends behind the last layer.

    Args:
        program: Holds the parameters of ``layers`` (perhaps in other modules).
        layers: To be made sparse.
        calls: Calibration calls; the values between two nodes are held in memory for all of them.
        moments: See `InputStatistics`.
        solve: Called once per layer; it puts the new weights.

    Returns:
        Names of the layers that the graph never calls.
    """
    nodes = _layer_nodes(program, layers)
    if not nodes:
        return [layer.name for layer in layers]
    with torch.no_grad(), evaluating(program.gm):
        _Walk(program, nodes, calls, moments, solve).run()
    reached = {layer.name for layer in nodes.values()}
    return [layer.name for layer in layers if layer.name not in reached]


def _layer_nodes(program: Program, layers: Sequence[SparseLayer]) -> dict[Node, SparseLayer]:
    """The nodes that run a layer's weight."""
    by_weight = {id(layer.weight): layer for layer in layers}
    found = {}
    for node, module in program.layers():
        layer = by_weight.get(id(module._parameters.get("weight")))
        if layer is not None and is_weighted(module):  # not the embedding that shares the weight
            found[node] = layer
    return found


class _Walk:
    def __init__(
        self, program: Program, nodes: dict[Node, SparseLayer], calls: Iterable[Call], moments: bool, solve: Solve
    ) -> None:
        self.program, self.nodes, self.moments, self.solve = program, nodes, moments, solve
        self.leaves = [iter(program.signature.flatten(*call)) for call in calls]
        self.values: list[dict[Node, Any]] = [{} for _ in self.leaves]
        self.last_call = {layer.name: node for node, layer in nodes.items()}  # later nodes overwrite
        self.statistics: dict[str, InputStatistics] = {}
        self.shared: tuple[Any, InputStatistics] | None = None

    def run(self) -> None:
        order = list(self.program.graph.nodes)
        last = max(order.index(node) for node in self.nodes)
        dead = _last_uses(order)
        for node in order[: last + 1]:
            if node in self.nodes:
                self._reach(node, self.nodes[node])
            if node is order[last]:
                return
            for number, values in enumerate(self.values):
                values[node] = self._checked_value(node, number)
                for gone in dead.get(node, ()):
                    del values[gone]

    def _checked_value(self, node: Node, number: int) -> Any:
        try:
            return self._value(node, self.values[number], self.leaves[number])
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            what = f"the model fails on calibration batch {number} at %{node.name}"
            raise CalibrationError(
                207, what, where=source_line(node), why=f"{type(error).__name__}: {error}"
            ) from error

    def _value(self, node: Node, values: dict[Node, Any], leaves: Any) -> Any:
        if node.op == "placeholder":
            return next(leaves)
        if node.op == "get_attr":
            return self.program.tensor(node)
        args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
        function: Any = self.program.module(node) if node.op == "call_module" else node.target
        return function(*args, **kwargs)

    def _reach(self, node: Node, layer: SparseLayer) -> None:
        source = node.args[0]
        assert isinstance(source, Node)
        once = sum(other is layer for other in self.nodes.values()) == 1
        linear = layer.weight.dim() == 2
        statistics = self._statistics(layer, (source, layer.weight.device) if once and linear else None)
        if statistics.rows == 0 or not once:
            for values in self.values:
                statistics.update(values[source])
        if self.last_call[layer.name] is node:
            self.solve(layer, statistics)
            self.statistics.pop(layer.name, None)

    def _statistics(self, layer: SparseLayer, key: Any) -> InputStatistics:
        """Those of the layer; the last ones again when this layer reads the same value."""
        if key is not None and self.shared is not None and self.shared[0] == key:
            return self.shared[1]
        statistics = self.statistics.setdefault(layer.name, InputStatistics(layer.module, self.moments))
        self.shared = None if key is None else (key, statistics)
        return statistics


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


def observe_all(
    model: Program | nn.Module, layers: Sequence[SparseLayer], data: CalibrationData, samples: int, moments: bool
) -> dict[str, InputStatistics]:
    """Statistics of all layers' inputs from forward passes of the dense model. Layers never called are missing.

    Raises:
        CalibrationError: the data is empty or broken, or the model fails on a batch.
    """
    root = model.gm if isinstance(model, Program) else model
    found: dict[str, InputStatistics] = {}
    with ExitStack() as stack:
        for layer in layers:
            for _, owner in layer.owners:
                stack.callback(_listen(owner, layer, found, moments).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(root))
        for number, (args, kwargs) in enumerate(_calls(model, data, samples)):
            try:
                model(*args, **kwargs)
            except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
                what = f"the model fails on calibration batch {number} while the inputs of layers are observed"
                raise CalibrationError(205, what, why=f"{type(error).__name__}: {error}") from error
    return found


def _listen(owner: nn.Module, layer: SparseLayer, found: dict[str, InputStatistics], moments: bool) -> RemovableHandle:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        found.setdefault(layer.name, InputStatistics(layer.module, moments)).update(x)

    return owner.register_forward_pre_hook(hook, with_kwargs=True)


def _calls(model: Program | nn.Module, data: CalibrationData, samples: int) -> Iterable[Call]:
    if isinstance(model, Program):
        yield from data.calls(model, samples)
        return
    names = tuple(forward_names(model)) or None
    seen = 0
    for batch in data:
        args, kwargs = as_call(batch, names)
        yield args, kwargs
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim()]
        seen += len(tensors[0]) if tensors else 1
        if seen >= samples:
            return
    if not seen:
        raise CalibrationError(206, "there is no calibration batch", fix="pass at least one batch")
