"""The module tree of a program: the user's own tensors under the user's names, before layers are attached to it."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch.fx import GraphModule

__all__ = ["KeyNames", "ParameterTree"]


@dataclass
class KeyNames:
    """Keeps the user's ``state_dict`` keys where a layer had to be given a path of its own.

    ``F.conv2d(x, self.w)`` becomes a layer ``w`` that owns ``w.weight``; its key stays ``w``. A pair of hooks on the
    program's root sees to it.

    Attributes:
        names: Path in the program -> the user's key.
    """

    names: dict[str, str] = field(default_factory=dict)

    def install(self, root: nn.Module) -> None:
        """Rename keys whenever ``root`` saves or loads its state."""
        root.register_state_dict_post_hook(_AfterSave(self.names))
        root.register_load_state_dict_pre_hook(_BeforeLoad(self.names))

    @staticmethod
    def of(root: nn.Module) -> KeyNames:
        """A copy of what is installed on ``root``; empty when nothing is."""
        hooks = [h.names for h in root._state_dict_hooks.values() if isinstance(h, _AfterSave)]
        return KeyNames({path: key for names in hooks for path, key in names.items()})


@dataclass(eq=False)
class _AfterSave:
    names: dict[str, str]

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        """Give back the user's keys."""
        for path, key in self.names.items():
            if prefix + path in state:
                state[prefix + key] = state.pop(prefix + path)


@dataclass(eq=False)
class _BeforeLoad:
    names: dict[str, str]

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Take the user's keys."""
        for path, key in self.names.items():
            if prefix + key in state:
                state[prefix + path] = state.pop(prefix + key)


class ParameterTree:
    """Plain containers that mirror the user's modules and hold their very tensors.

    A module used under two names is one container, so a layer put there serves both names.

    Attributes:
        root: The mirrored root module.
        keys: Renamed ``state_dict`` keys.
    """

    def __init__(self, gm: GraphModule, original: nn.Module | None) -> None:
        source = original if original is not None else gm
        self.keys = KeyNames.of(source)
        self._places: dict[int, list[tuple[nn.Module, str]]] = {}
        self.root = self._mirror(source, {})
        known = {_memory(p): name for name, p in self.root.named_parameters() if _memory(p)}
        for node in gm.graph.nodes:
            if node.op == "get_attr" and not self.holds(str(node.target)):
                value = operator.attrgetter(str(node.target))(gm)
                place = _memory(value)
                if place in known:
                    node.target = known[place]  # scripted modules hand out their parameters as constants
                else:
                    self._lift(str(node.target), value)

    def _mirror(self, module: nn.Module, memo: dict[int, nn.Module]) -> nn.Module:
        if id(module) in memo:
            return memo[id(module)]
        new = memo[id(module)] = nn.Module()
        new._parameters = dict(module._parameters)
        new._buffers = dict(module._buffers)
        new._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
        new.training = module.training
        for name, child in module._modules.items():
            if child is not None:
                self.put(new, name, self._mirror(child, memo))
        return new

    def put(self, parent: nn.Module, name: str, child: nn.Module) -> None:
        """Make ``child`` the submodule ``name`` of ``parent``."""
        parent._modules[name] = child
        self._places.setdefault(id(child), []).append((parent, name))

    def replace(self, old: nn.Module, new: nn.Module) -> None:
        """Put ``new`` wherever ``old`` is."""
        for parent, name in self._places.pop(id(old), []):
            self.put(parent, name, new)
        for name, child in old._modules.items():
            if child is not None:
                self._places[id(child)] = [(new if p is old else p, n) for p, n in self._places[id(child)]]
                new._modules.setdefault(name, child)

    def find(self, path: str) -> nn.Module | None:
        """The module at ``path``; None when there is none."""
        module: nn.Module = self.root
        for part in path.split(".") if path else []:
            child = module._modules.get(part)
            if child is None:
                return None
            module = child
        return module

    def make(self, path: str) -> nn.Module:
        """The container at ``path``, made when missing."""
        module: nn.Module = self.root
        for part in path.split(".") if path else []:
            if module._modules.get(part) is None:
                self.put(module, part, nn.Module())
            module = cast(nn.Module, module._modules[part])
        return module

    def holds(self, name: str) -> bool:
        """True when a parameter or buffer has that name."""
        path, _, leaf = name.rpartition(".")
        module = self.find(path)
        return module is not None and (leaf in module._parameters or leaf in module._buffers)

    def _lift(self, name: str, value: Any) -> None:
        path, _, leaf = name.rpartition(".")
        holder = self.make(path)
        if isinstance(value, nn.Parameter):
            holder._parameters[leaf] = value
        elif isinstance(value, torch.Tensor):
            holder._buffers[leaf] = value
            holder._non_persistent_buffers_set.add(leaf)
        else:
            setattr(holder, leaf, value)

    def prune(self) -> None:
        """Drop containers that hold nothing: the user's parameter-free modules, whose work is in the graph."""
        _prune(self.root, set())


def _memory(value: Any) -> tuple[Any, ...] | None:
    """Equal for tensors that are the same memory seen in the same way; None where that cannot be told."""
    if type(value) not in (torch.Tensor, nn.Parameter) or value.layout != torch.strided or not value.data_ptr():
        return None
    return value.device, value.data_ptr(), value.dtype, value.shape, value.stride()


def _prune(module: nn.Module, seen: set[int]) -> None:
    if id(module) in seen:
        return
    seen.add(id(module))
    for name, child in list(module._modules.items()):
        if child is not None:
            _prune(child, seen)
            if type(child) is nn.Module and not (child._parameters or child._buffers or child._modules):
                del module._modules[name]
