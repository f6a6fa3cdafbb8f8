"""Leave the user's model as it was: forward may cache tensors or count calls, and tracers leave fakes behind."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["preserving"]

_CONTAINERS = (dict, list, set, OrderedDict)


class preserving:
    """Context manager: on exit every attribute, container and buffer of the module tree is what it was on entry.

    Parameters are not copied: a forward that overwrites parameters in place keeps its effect.
    """

    def __init__(self, module: nn.Module) -> None:
        named = list(module.named_modules())
        self._modules = [(name, m, dict(m.__dict__)) for name, m in named]
        self._contents = [
            (v, copy.copy(v)) for _, m, old in self._modules for v in old.values() if type(v) in _CONTAINERS
        ]
        self._buffers = [(b, b._version, b.clone()) for b in _writable(module)]

    def __enter__(self) -> preserving:
        return self

    def assigned(self) -> list[str]:
        """Attributes that hold other tensors than on entry, as ``layer1.attention.cache``."""
        return [
            f"{name}.{k}".lstrip(".")
            for name, module, old in self._modules
            for k in _differing(old, module.__dict__)
            if any(isinstance(v, Tensor) for v in pytree.tree_leaves((old.get(k), module.__dict__.get(k))))
        ]

    def __exit__(self, *exc: object) -> None:
        for _, module, old in self._modules:
            if _differing(old, module.__dict__):
                module.__dict__.clear()
                module.__dict__.update(old)
        for container, content in self._contents:
            if not _same_content(container, content):
                _refill(container, content)
        with torch.no_grad():
            for buffer, version, value in self._buffers:
                if buffer._version != version:
                    buffer.copy_(value)


def _writable(module: nn.Module) -> list[Tensor]:
    """Buffers whose version can be told (not those made in inference mode)."""
    return [b for b in module.buffers() if not b.is_inference() and not b.is_meta]


def _differing(old: dict[str, Any], now: dict[str, Any]) -> list[str]:
    missing = object()
    return [k for k in {**old, **now} if now.get(k, missing) is not old.get(k, missing) or k not in now or k not in old]


def _same_content(container: Any, content: Any) -> bool:
    if len(container) != len(content):
        return False
    if isinstance(container, dict):
        return all(k in container and container[k] is v for k, v in content.items())
    if isinstance(container, set):
        return bool(container == content)
    return all(a is b for a, b in zip(container, content, strict=True))


def _refill(container: Any, content: Any) -> None:
    container.clear()
    if isinstance(container, list):
        container.extend(content)
    else:
        cast(Any, container).update(content)
