"""Torch-Pruning, the peer of the pruning benchmarks: prunes a copy and tells which output channels went.

It is given what its documentation asks for: the layers whose outputs are the model's own are ignored, attention layers
are named with their number of heads, and the attributes that its examples set by hand afterwards are set.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

__all__ = ["Outcome", "Settings", "attention_layers", "output_layers", "prune", "size", "version"]

_PROJECTIONS = (
    ("qkv",),
    ("q", "k", "v"),
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
)
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "heads")


@dataclass(frozen=True)
class Settings:
    """How the peer is called.

    Attributes:
        ratio: Share of the channels to remove, the same in every layer (its default).
        heads: Remove whole heads instead of making every head narrower.
        ignored: Paths of the layers that keep their outputs.
        num_heads: Path of a layer that makes queries, keys or values -> heads.
    """

    ratio: float = 0.5
    heads: bool = False
    ignored: Sequence[str] = ()
    num_heads: Mapping[str, int] = field(default_factory=dict)


@dataclass
class Outcome:
    """A pruned copy.

    Attributes:
        model: The smaller network.
        removed: Layer or parameter -> output channels of the dense network that went.
        kept: Parameter without a layer -> dimension -> kept indices.
        seconds: Of building its dependency graph and pruning, by the wall clock.
        cpu_s: The same in processor time.
    """

    model: nn.Module
    removed: dict[str, list[int]]
    kept: dict[str, dict[int, list[int]]]
    seconds: float
    cpu_s: float


def version() -> str:
    """Of the installed Torch-Pruning."""
    return importlib.metadata.version("torch-pruning")


def size(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def prune(model: nn.Module, example: Any, settings: Settings) -> Outcome:
    """Prunes a copy of the model with the L2 norm of its groups.

    Raises:
        Exception: whatever Torch-Pruning raises.
    """
    tp: Any = importlib.import_module("torch_pruning")
    dense, model = model, copy.deepcopy(model)
    modules = dict(model.named_modules())
    begin, cpu = time.perf_counter(), time.process_time()
    pruner = tp.pruner.MagnitudePruner(
        model,
        example,
        importance=tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=settings.ratio,
        ignored_layers=[modules[name] for name in settings.ignored],
        num_heads={modules[name]: heads for name, heads in settings.num_heads.items()},
        prune_num_heads=settings.heads,
        prune_head_dims=not settings.heads,
        head_pruning_ratio=settings.ratio if settings.heads else 0.0,
    )
    ledger = _Ledger(dense, model, pruner.DG)
    for group in pruner.step(interactive=True):
        ledger.note(group)
        group.prune()
    _set_attributes(modules, settings, pruner)
    seconds, cpu_s = time.perf_counter() - begin, time.process_time() - cpu
    return Outcome(model, ledger.removed(), ledger.parameters(), seconds, cpu_s)


class _Ledger:
    """Which output channels of the dense network are still there, group after group."""

    def __init__(self, dense: nn.Module, model: nn.Module, graph: Any) -> None:
        self.dense, self.model, self.graph = dense, model, graph
        self.left: dict[str, list[int]] = {}
        self.dims: dict[str, int] = {}
        self.lengths: dict[str, int] = {}
        self.names = {id(m): n for n, m in model.named_modules()}

    def note(self, group: Any) -> None:
        parameters = {id(p): n for n, p in self.model.named_parameters()}
        gone: dict[str, set[int]] = {}
        for dep, indices in group:
            if not self.graph.is_out_channel_pruning_fn(dep.handler):
                continue
            target = dep.target.module
            if isinstance(target, nn.Parameter):
                name = parameters[id(target)]
                self.dims[name] = int(dep.target.pruning_dim)
                length = self.dense.get_parameter(name).shape[self.dims[name]]
            elif id(target) in self.names:
                name = self.names[id(target)]
                length = int(self.graph.get_out_channels(target) or 0)
            else:
                continue  # an operator without channels of its own
            self.lengths.setdefault(name, length)
            self.left.setdefault(name, list(range(length)))
            gone.setdefault(name, set()).update(int(getattr(i, "idx", i)) for i in indices)
        for name, places in gone.items():
            self.left[name] = [c for place, c in enumerate(self.left[name]) if place not in places]

    def removed(self) -> dict[str, list[int]]:
        found = {name: sorted(set(range(self.lengths[name])) - set(left)) for name, left in self.left.items()}
        return {name: gone for name, gone in found.items() if gone and self.has_parameters(name)}

    def has_parameters(self, name: str) -> bool:
        """Whether masking means anything there: a parameter, or a module that holds parameters or statistics."""
        module = self.dense if name in self.dims else self.dense.get_submodule(name)
        return any(True for _ in module.parameters()) or any(True for _ in module.buffers())

    def parameters(self) -> dict[str, dict[int, list[int]]]:
        return {name: {dim: self.left[name]} for name, dim in self.dims.items()}


def _set_attributes(modules: Mapping[str, nn.Module], settings: Settings, pruner: Any) -> None:
    """What the peer's examples do by hand: the attributes that attention computes its shapes from."""
    for name in settings.num_heads:
        layer = cast(nn.Linear, modules[name])
        owner: Any = modules[name.rpartition(".")[0]]
        heads = int(pruner.num_heads[layer])
        packed = 3 if name.endswith("qkv") else 1
        width = layer.out_features // packed
        if not name.endswith(("k", "v", "k_proj", "v_proj", "key", "value")) or packed == 3:
            values = {"head_dim": width // heads, "size": width // heads, "attention_head_size": width // heads}
            values |= {"attn_dim": width, "all_head_size": width, "dim": width} | dict.fromkeys(_HEADS, heads)
            for key, value in values.items():
                if isinstance(getattr(owner, key, None), int):
                    setattr(owner, key, value)


def attention_layers(model: nn.Module) -> dict[str, int]:
    """Query, key and value projections with their heads, found by the names that timm and transformers use."""
    found: dict[str, int] = {}
    for path, module in model.named_modules():
        heads = next((getattr(module, n) for n in _HEADS if isinstance(getattr(module, n, None), int)), None)
        for names in _PROJECTIONS:
            if heads and all(isinstance(getattr(module, n, None), nn.Linear) for n in names):
                found |= {f"{path}.{n}" if path else n: heads for n in names}
    return found


def output_layers(model: nn.Module, example: Any) -> list[str]:
    """Layers whose output tensors, or views of them, are outputs of the model; peers need to be told."""
    made: dict[int, str] = {}
    keep: list[torch.Tensor] = []

    def hook(name: str) -> Any:
        def note(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                made[output.untyped_storage().data_ptr()] = name
                keep.append(output)

        return note

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    handles = [m.register_forward_hook(hook(n)) for n, m in model.named_modules() if isinstance(m, kinds)]
    with torch.no_grad():
        outputs = model(**example) if isinstance(example, dict) else model(*example)
    for handle in handles:
        handle.remove()
    leaves = torch.utils._pytree.tree_leaves(outputs)
    tensors = [t for t in leaves if isinstance(t, torch.Tensor)]
    return sorted({made[k] for t in tensors if (k := t.untyped_storage().data_ptr()) in made})
