"""The weights that can be sparse, and the one matrix view all methods share.

Every weight is seen as ``[groups, rows, features]``: one row per output channel, one feature per weight that is summed
into it. The reduction axis (input channels) runs fastest, so that M neighbouring features are the M neighbouring
weights an N:M kernel reads: for a convolution, the input channels at one kernel position.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from fxcompress.errors import PruneError
from fxcompress.ir import Program
from fxcompress.layers import TransposedLinear

__all__ = ["SparseLayer", "find_layers", "from_rows", "is_weighted", "reduction_size", "to_rows"]

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class SparseLayer:
    """A weight that is to be sparse.

    Attributes:
        name: Path of the first layer that holds it.
        module: That layer.
        owners: Every layer that holds the very same parameter, with its path; ``module`` is the first.
    """

    name: str
    module: nn.Module
    owners: tuple[tuple[str, nn.Module], ...]

    @property
    def weight(self) -> nn.Parameter:
        """The parameter as it is now."""
        return cast(nn.Parameter, self.module._parameters["weight"])


def is_conv1d_of_gpt(module: nn.Module) -> bool:
    """True for the ``Conv1D`` of the transformers package: a linear layer with weight [in, out]."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.partition(".")[0] == "transformers"


def is_weighted(module: nn.Module) -> bool:
    """True for layers that multiply by a weight: convolutions, transposed ones, linear layers."""
    kinds = (*_CONVS, *_TRANSPOSED, nn.Linear, TransposedLinear)
    return isinstance(module, kinds) or is_conv1d_of_gpt(module)


def _transposed_linear(module: nn.Module) -> bool:
    return isinstance(module, TransposedLinear) or is_conv1d_of_gpt(module)


def to_rows(module: nn.Module, weight: Tensor) -> Tensor:
    """A weight, or anything of its shape, as ``[groups, rows, features]``; see the module docstring.

    Args:
        module: The layer that the shape belongs to.
        weight: Tensor of the shape of ``module.weight``.
    """
    if _transposed_linear(module):
        return weight.t().unsqueeze(0)
    if isinstance(module, nn.Linear):
        return weight.unsqueeze(0)
    groups = cast(int, module.groups)
    flat = weight.flatten(2)
    if isinstance(module, _TRANSPOSED):  # [in, out / groups, taps]
        split = flat.reshape(groups, -1, *flat.shape[1:]).permute(0, 2, 3, 1)
    else:  # [out, in / groups, taps]
        split = flat.reshape(groups, -1, *flat.shape[1:]).permute(0, 1, 3, 2)
    return split.reshape(*split.shape[:2], -1)


def from_rows(module: nn.Module, rows: Tensor) -> Tensor:
    """Inverse of `to_rows`, contiguous."""
    shape = cast(Tensor, module._parameters["weight"]).shape
    if _transposed_linear(module):
        return rows[0].t().contiguous()
    if isinstance(module, nn.Linear):
        return rows[0].contiguous()
    inputs = reduction_size(module)
    split = rows.reshape(*rows.shape[:2], -1, inputs)  # [groups, rows, taps, inputs]
    order = (0, 3, 1, 2) if isinstance(module, _TRANSPOSED) else (0, 1, 3, 2)
    return split.permute(order).reshape(shape).contiguous()


def reduction_size(module: nn.Module) -> int:
    """Input channels that one output channel sums over (per group and kernel position)."""
    weight = cast(Tensor, module._parameters["weight"])
    if isinstance(module, nn.Linear) and not _transposed_linear(module):
        return int(weight.shape[1])
    if isinstance(module, _CONVS):
        return int(weight.shape[1])
    return int(weight.shape[0]) // int(cast(Any, getattr(module, "groups", 1)))


def find_layers(
    model: Program | nn.Module, include: Sequence[str] = (), ignore: Sequence[str] = ()
) -> tuple[list[SparseLayer], list[str]]:
    """The weights to make sparse, in the order of the program (of definition for a plain module).

    Args:
        model: What to look through.
        include: Globs over layer names; only these, all when empty.
        ignore: Globs over layer names to leave dense.

    Returns:
        The layers, and notes on what was left alone. A weight that several layers share is one layer; one that
        something else shares (an embedding) is left alone unless ``include`` names it.

    Raises:
        PruneError: a glob matches no layer, or no layer is left.
    """
    root = model.gm if isinstance(model, Program) else model
    places = list(_candidates(model))
    names = [name for name, _ in places]
    for option, globs in (("include", include), ("ignore", ignore)):
        _check_globs(option, globs, names)
    holders, foreign = _holders(root), _reads(model)
    found: dict[int, SparseLayer] = {}
    notes: list[str] = []
    for name, module in places:
        weight = module._parameters.get("weight")
        if weight is None:
            notes.append(f"{name} left dense: its weight is computed, not a parameter")
            continue
        owners = tuple((n, m) for n, m in holders[id(weight)] if is_weighted(m))
        if id(weight) in found or not _chosen([n for n, _ in owners], include, ignore):
            continue
        others = [n for n, m in holders[id(weight)] if not is_weighted(m)] + foreign.get(id(weight), [])
        if others and not any(fnmatch.fnmatchcase(name, g) for g in include):
            notes.append(f"{name} left dense: it shares its weight with {others[0]}; name it in include to prune both")
            continue
        found[id(weight)] = SparseLayer(name, module, owners)
    if not found:
        why = "; ".join(notes) or ("there is no convolution and no linear layer" if not places else "all are ignored")
        raise PruneError(200, "there is no layer to make sparse", why=why, fix="check include and ignore")
    return list(found.values()), notes


def _candidates(model: Program | nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Weighted layers with their paths, each module once."""
    if not isinstance(model, Program):
        yield from ((name, m) for name, m in model.named_modules() if is_weighted(m))
        return
    seen: set[int] = set()
    for node, module in model.layers():
        if is_weighted(module) and id(module) not in seen:
            seen.add(id(module))
            yield str(node.target), module


def _holders(root: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """Parameter -> the modules that hold it as ``weight``, or under another name (then not a layer's weight)."""
    found: dict[int, list[tuple[str, nn.Module]]] = {}
    for path, module in root.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                plain = name == "weight" and is_weighted(module)
                entry = (path, module) if plain else (f"{path}.{name}".lstrip("."), _NOT_A_LAYER)
                found.setdefault(id(parameter), []).append(entry)
    return found


_NOT_A_LAYER = nn.Module()


def _reads(model: Program | nn.Module) -> dict[int, list[str]]:
    """Parameter -> the ``get_attr`` nodes that read it without a layer."""
    found: dict[int, list[str]] = {}
    if isinstance(model, Program):
        for node in model.graph.nodes:
            if node.op == "get_attr":
                found.setdefault(id(model.tensor(node)), []).append(f"%{node.name}")
    return found


def _chosen(names: Sequence[str], include: Sequence[str], ignore: Sequence[str]) -> bool:
    def hit(globs: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, glob) for name in names for glob in globs)

    return (not include or hit(include)) and not hit(ignore)


def _check_globs(option: str, globs: Sequence[str], names: Sequence[str]) -> None:
    for glob in globs:
        if not fnmatch.filter(names, glob):
            near = difflib.get_close_matches(glob, names, n=3, cutoff=0.3) or list(names[:3])
            fix = f"nearest: {', '.join(near)}" if near else "the model has no convolution and no linear layer"
            raise PruneError(201, f"{option}={glob!r} matches no layer", fix=fix)
