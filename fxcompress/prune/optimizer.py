"""Optimizers that go on with the parameters of a pruned module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxcompress.errors import PruneError

__all__ = ["move_optimizer"]


def move_optimizer(
    optimizer: Optimizer, old: nn.Module, new: nn.Module, edits: Mapping[str, Mapping[int, Sequence[int]]]
) -> None:
    """Let an optimizer go on with the parameters of a pruned module, in place.

    Parameters are matched by name. State of a parameter's shape (momentum, second moments), or of its shape with some
    dimensions of size 1 (factored moments), is cut at the kept indices; single numbers stay. A parameter that pruning
    added (a bias that takes up a constant) joins the group of its layer. Schedulers that hold the optimizer go on.

    Args:
        optimizer: Trains ``old``, and maybe other things, which stay.
        old: Module before pruning.
        new: Module after pruning.
        edits: Tensor name -> dimension -> kept indices.

    Raises:
        PruneError: a state tensor has another shape than its parameter, so that nobody knows what to cut. The
            optimizer is unchanged.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in old.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    fresh = dict(new.named_parameters(remove_duplicate=False))
    groups, state = [], dict(optimizer.state)
    for group in optimizer.param_groups:
        kept: list[Any] = []
        for parameter in group["params"]:
            aliases = names.get(id(parameter))
            if aliases is None:
                kept.append(parameter)
                continue
            values = state.pop(parameter, None)
            left = [alias for alias in aliases if alias in fresh]
            if not left:
                continue
            kept.append(fresh[left[0]])
            if values is not None:
                cut = next((edits[alias] for alias in aliases if alias in edits), {})
                moved = {key: _cut(key, value, parameter, cut, left[0]) for key, value in values.items()}
                state[fresh[left[0]]] = moved
        groups.append(kept)
    _add_new(optimizer, groups, fresh, {alias for aliases in names.values() for alias in aliases})
    for group, kept in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = kept
    optimizer.state.clear()
    optimizer.state.update(state)


def _add_new(optimizer: Optimizer, groups: list[list[Any]], fresh: Mapping[str, nn.Parameter], known: set[str]) -> None:
    """Parameters the old module did not have join the group that holds another parameter of their layer."""
    owner = {id(parameter): name.rpartition(".")[0] for name, parameter in fresh.items()}
    for name, parameter in fresh.items():
        if name in known:
            continue
        layer = name.rpartition(".")[0]
        group = next((g for g in groups if any(owner.get(id(p)) == layer for p in g)), None)
        if group is not None and all(p is not parameter for p in group):
            group.append(parameter)


def _cut(key: Any, value: Any, parameter: Tensor, cut: Mapping[int, Sequence[int]], name: str) -> Any:
    """The kept part of one entry of an optimizer's state."""
    if not isinstance(value, Tensor) or value.numel() == 1 or not cut:
        return value
    if value.dim() != parameter.dim():
        raise _unknown_state(key, value, parameter, name)
    for dim, indices in cut.items():
        if value.shape[dim] == parameter.shape[dim]:
            value = value.index_select(dim, torch.as_tensor(indices, dtype=torch.int64, device=value.device))
        elif value.shape[dim] != 1:
            raise _unknown_state(key, value, parameter, name)
    return value


def _unknown_state(key: Any, value: Tensor, parameter: Tensor, name: str) -> PruneError:
    what = f"the optimizer keeps {key!r} of shape {list(value.shape)} for {name} of shape {list(parameter.shape)}"
    why = "pruning cannot tell which of its entries belong to the channels that go"
    return PruneError(327, what, why=why, fix="make a new optimizer after pruning, or use SGD, Adam or AdamW")
