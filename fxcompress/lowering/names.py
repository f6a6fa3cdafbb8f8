"""Names of an engine's inputs, outputs and free sizes, read off a Program's signature."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxcompress.ir import Program

__all__ = ["input_names", "output_names", "size_names"]


def input_names(program: Program) -> list[str]:
    """One name per flattened input: the argument's own, followed by its keys when it is a container."""
    spec = program.signature.in_spec
    leaves, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(list(range(spec.num_leaves)), spec))
    names = program.signature.names
    found = []
    for path, _ in leaves:
        key: Any = path[1]
        first = names[key.idx] if isinstance(key, pytree.SequenceKey) else str(key.key)
        found.append(_join([first, *map(_key, path[2:])]))
    return _distinct(found)


def output_names(program: Program) -> list[str]:
    """One name per flattened output: ``output``, ``output_0``, or the keys of the model's own structure."""
    spec = program.signature.out_spec
    leaves, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(list(range(spec.num_leaves)), spec))
    found = []
    for path, _ in leaves:
        keys = [_key(k) for k in path]
        if not keys or isinstance(path[0], pytree.SequenceKey):
            keys = ["output", *keys]
        found.append(_join(keys))
    return _distinct(found)


def size_names(program: Program) -> dict[str, str]:
    """Readable names of the symbolic sizes: ``batch`` for a leading dimension, else ``<input>_dim<i>``."""
    names: dict[str, str] = {}
    for name, node in zip(input_names(program), program.placeholders(), strict=True):
        val = node.meta.get("val")
        for i, size in enumerate(val.shape if isinstance(val, Tensor) else ()):
            if isinstance(size, torch.SymInt):
                wanted = "batch" if i == 0 and "batch" not in names.values() else f"{name}_dim{i}"
                names.setdefault(str(size), wanted)
    return names


def _key(key: Any) -> str:
    if isinstance(key, pytree.SequenceKey):
        return str(key.idx)
    return str(key.name if isinstance(key, pytree.GetAttrKey) else key.key)


def _join(keys: list[str]) -> str:
    return re.sub(r"[^\w.]", "_", "_".join(keys))


def _distinct(names: list[str]) -> list[str]:
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if seen[name] == 1 else f"{name}__{seen[name]}")
    return result
