"""Applying a plan: smaller tensors, layer attributes and graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node

from fxcompress.ir import Program
from fxcompress.layers import TransposedLinear
from fxcompress.precise import like, replace_tensors
from fxcompress.prune.dependencies import Bools, Dependencies
from fxcompress.prune.nodes import Surgeon

__all__ = ["cut_program", "cut_rows", "moved_biases"]


def cut_program(found: Dependencies, removed: Bools) -> tuple[Program, list[str]]:
    """A copy of the analyzed program without the units marked in ``removed``; and what was done beyond cutting."""
    program = found.program.clone()
    surgeon = Surgeon(program, found, removed)
    biases, notes = _move_constants(program, found, removed)
    replace_tensors(program, _cut_tensors(surgeon))
    for path, bias in biases.items():
        program.gm.get_submodule(path).bias = bias
    surgeon.run()
    done: set[int] = set()
    for node, module in program.layers():
        if id(module) not in done and _may_change(surgeon, node):
            _update_layer(surgeon, node, module)
            done.add(id(module))
    program.recompile()
    return program, notes


def _cut_tensors(surgeon: Surgeon) -> dict[int, Tensor]:
    named: dict[str, Tensor] = {
        **dict(surgeon.program.gm.named_parameters(remove_duplicate=False)),
        **dict(surgeon.program.gm.named_buffers(remove_duplicate=False)),
    }
    new: dict[int, Tensor] = {}
    for use in surgeon.found.slots:
        kept = surgeon.kept(use.dimension)
        if kept.all():
            continue
        old = named[use.slot.tensor]
        current = new.get(id(old), old)
        index = torch.as_tensor(np.flatnonzero(kept), device=old.device)
        new[id(old)] = like(old, current.detach().index_select(use.slot.dim, index))
    return new


def moved_biases(found: Dependencies, removed: Bools) -> dict[str, Tensor]:
    """Layer -> float64 bias of all its channels, what removed input channels leave behind added."""
    result: dict[str, Tensor] = {}
    for moved, number in found.moved:
        if number < 0:
            continue
        fill = np.where(found.kept(number, removed), 0.0, moved.columns[0].fill)
        if not np.any(fill):
            continue
        layer: Any = found.program.gm.get_submodule(moved.layer)
        weight = layer.weight.detach().double()
        flat = (
            weight.T
            if isinstance(layer, TransposedLinear)
            else weight.flatten(2).sum(2)
            if weight.dim() > 2
            else weight
        )
        delta = flat @ torch.as_tensor(fill, dtype=torch.float64, device=weight.device)
        result[moved.layer] = delta if layer.bias is None else layer.bias.detach().double() + delta
    return result


def cut_rows(found: Dependencies, removed: Bools, layer: str, rows: Tensor) -> Tensor:
    """What is left of one number per output channel of a layer."""
    node = next(n for n in found.program.graph.nodes if n.op == "call_module" and n.target == layer)
    number = found.values[node.name][found.flow.outputs[node.name]]
    kept = np.ones(len(rows), dtype=np.bool_) if number < 0 else found.kept(number, removed)
    return rows[torch.as_tensor(np.flatnonzero(kept), device=rows.device)]


def _move_constants(program: Program, found: Dependencies, removed: Bools) -> tuple[dict[str, Tensor], list[str]]:
    """Changed biases are put in whole, to be cut with the rest; new ones are returned, already cut, with notes."""
    new, notes = {}, []
    for path, bias in moved_biases(found, removed).items():
        layer: Any = program.gm.get_submodule(path)
        if layer.bias is None:
            new[path] = like(layer.weight, cut_rows(found, removed, path, bias).to(layer.weight.dtype))
            notes.append(f"{path}: a new bias holds what removed channels left behind")
        else:
            replace_tensors(program, {id(layer.bias): like(layer.bias, bias.to(layer.bias.dtype))})
            notes.append(f"{path}: what removed channels left behind moved into its bias")
    return new, notes


def _may_change(surgeon: Surgeon, node: Node) -> bool:
    return surgeon.touched(node.name) or any(surgeon.touched(n.name) for n in node.all_input_nodes)


# ------------------------------------------------------------------------------------------------ layers
def _update_layer(surgeon: Surgeon, node: Node, module: nn.Module) -> None:
    for cls, update in _UPDATES:
        if isinstance(module, cls):
            update(surgeon, node, module)


def _conv(surgeon: Surgeon, node: Node, module: Any) -> None:
    source = node.args[0]
    assert isinstance(source, Node)
    module.in_channels = surgeon.size(source.name, 1) or module.in_channels
    module.out_channels = surgeon.size(node.name, 1) or module.out_channels
    whole = module.out_channels if isinstance(module, nn.modules.conv._ConvTransposeNd) else module.in_channels
    module.groups = whole // module.weight.shape[1]


def _linear(surgeon: Surgeon, node: Node, module: Any) -> None:
    del surgeon, node
    shape = module.weight.shape
    module.out_features, module.in_features = shape if isinstance(module, nn.Linear) else reversed(shape)


def _channels(surgeon: Surgeon, node: Node, module: Any) -> None:
    module.num_features = surgeon.size(node.name, 1) or module.num_features


def _group_norm(surgeon: Surgeon, node: Node, module: Any) -> None:
    new = surgeon.size(node.name, 1)
    if new is not None:
        module.num_groups = module.num_groups * new // module.num_channels
        module.num_channels = new


def _layer_norm(surgeon: Surgeon, node: Node, module: Any) -> None:
    rank = len(module.normalized_shape)
    news = [surgeon.size(node.name, d - rank) for d in range(rank)]
    module.normalized_shape = tuple(o if n is None else n for o, n in zip(module.normalized_shape, news, strict=True))


def _embedding(surgeon: Surgeon, node: Node, module: Any) -> None:
    del surgeon, node
    module.num_embeddings, module.embedding_dim = module.weight.shape


def _recurrent(surgeon: Surgeon, node: Node, module: Any) -> None:
    del surgeon, node
    module.hidden_size, module.input_size = module.weight_hh_l0.shape[1], module.weight_ih_l0.shape[1]


_UPDATES: list[tuple[Any, Callable[[Surgeon, Node, Any], None]]] = [
    (nn.modules.conv._ConvNd, _conv),
    ((nn.Linear, TransposedLinear), _linear),
    ((nn.modules.batchnorm._NormBase,), _channels),
    (nn.GroupNorm, _group_norm),
    ((nn.LayerNorm, nn.RMSNorm), _layer_norm),
    (nn.Embedding, _embedding),
    (nn.RNNBase, _recurrent),
]
