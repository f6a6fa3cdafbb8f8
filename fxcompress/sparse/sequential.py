"""Calibrated pruning: layer by layer in execution order, each seeing the inputs that the sparse layers before it make.

All calibration batches walk through the graph side by side (`fxcompress.layerwise.walk`). When they reach a layer, its
inputs are at hand; it is made sparse and the walk goes on with what the sparse layer gives. The whole calibration thus
costs one or two forward passes, whatever the number of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils.hooks import RemovableHandle

from fxcompress.data import CalibrationData, Call, as_call
from fxcompress.errors import CalibrationError
from fxcompress.ir import Program, evaluating, forward_names
from fxcompress.layerwise.statistics import InputStatistics
from fxcompress.layerwise.walk import Walk
from fxcompress.sparse.layers import SparseLayer, is_weighted

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
    with torch.no_grad(), evaluating(program.gm):
        _Solving(Walk(program, calls), nodes, moments, solve).run()
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


class _Solving:
    def __init__(self, walk: Walk, nodes: dict[Node, SparseLayer], moments: bool, solve: Solve) -> None:
        self.walk, self.nodes, self.moments, self.solve = walk, nodes, moments, solve
        self.last_call = {layer.name: node for node, layer in nodes.items()}  # later nodes overwrite
        self.statistics: dict[str, InputStatistics] = {}
        self.shared: tuple[Any, InputStatistics] | None = None

    def run(self) -> None:
        for node, layer in self.nodes.items():
            statistics = self._observe(node, layer)
            if self.last_call[layer.name] is node:
                self.solve(layer, statistics)
                self.statistics.pop(layer.name, None)

    def _observe(self, node: Node, layer: SparseLayer) -> InputStatistics:
        """Statistics of the layer's inputs; the last ones again when this layer reads the same value."""
        source = node.args[0]
        assert isinstance(source, Node)
        once = sum(other is layer for other in self.nodes.values()) == 1
        key = (source, layer.weight.device) if once and layer.weight.dim() == 2 else None
        if key is not None and self.shared is not None and self.shared[0] == key:
            return self.shared[1]
        statistics = self.statistics.setdefault(layer.name, InputStatistics(layer.module, self.moments))
        self.walk.visit(node, [source], lambda _, values: statistics.update(values[0]))
        self.shared = None if key is None else (key, statistics)
        return statistics


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
