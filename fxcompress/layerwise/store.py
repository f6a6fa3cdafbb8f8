"""Puts new tensors into a model and remembers the old ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["WeightStore"]


class WeightStore:
    """New values for parameters and buffers, with the way back.

    Args:
        root: The model.
        replace: Put new tensors (a program shares its own with the model it was captured from, and with its clones).
            Otherwise write into the old ones, so that optimizers made before keep working.
    """

    def __init__(self, root: nn.Module, replace: bool) -> None:
        self.replace = replace
        self._places: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in root.modules():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    self._places.setdefault(id(tensor), []).append((module, name))
        self._old: dict[Any, tuple[nn.Module, str, Tensor]] = {}

    def holds(self, tensor: Tensor) -> bool:
        """True when ``tensor`` is one of the model's own, so that a new value for it reaches the model."""
        return id(tensor) in self._places

    def put(self, module: nn.Module, name: str, value: Tensor) -> bool:
        """Give the tensor ``name`` of ``module``, and all that is tied to it, another value of the same shape.

        Returns:
            False when it has that value already; nothing is done then.
        """
        old: Tensor = getattr(module, name)
        value = value.detach().to(dtype=old.dtype, device=old.device)
        if torch.equal(value, old):
            return False
        if self.replace:
            self._replace(module, name, old, value)
        else:
            place = self._places[id(old)][0]  # the model's own; ``module`` may be a captured program's
            self._old.setdefault(id(old), (*place, old.detach().clone()))
            with torch.no_grad():
                old.copy_(value)
        return True

    def _replace(self, module: nn.Module, name: str, old: Tensor, value: Tensor) -> None:
        parameter = isinstance(old, nn.Parameter)
        new = nn.Parameter(value, requires_grad=old.requires_grad) if parameter else value
        known = self._places.pop(id(old), [])
        # Others may have put tensors past this store, and an id says nothing about a tensor that is gone.
        places = [(owner, key) for owner, key in known if getattr(owner, key) is old] or [(module, name)]
        for owner, key in places:
            self._old.setdefault((id(owner), key), (owner, key, old))
            self._set(owner, key, new)
        self._places[id(new)] = places

    def undo(self) -> None:
        """Put all old tensors back, or write their values back."""
        for module, name, old in self._old.values():
            if self.replace:
                self._set(module, name, old)
            else:
                with torch.no_grad():
                    getattr(module, name).copy_(old)
        self._old.clear()

    def forget(self) -> None:
        """Let the old tensors go."""
        self._old.clear()

    @staticmethod
    def _set(module: nn.Module, name: str, tensor: Tensor) -> None:
        if isinstance(tensor, nn.Parameter):
            module._parameters[name] = tensor
        else:
            module._buffers[name] = tensor
