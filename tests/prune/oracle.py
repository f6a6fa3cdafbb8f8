"""Masked-dense oracle: the user's own module with the removed channels zeroed, in float64.

It knows nothing of how the pruning was planned or done. Input is what was removed: layer or parameter -> output
channels. Each of these has its parameters zeroed for these channels (weight rows, bias, a norm's scale, shift and
running mean, the gate rows of a recurrent layer, the columns of an embedding), and the whole dense network runs.

A norm whose statistics span the pruned channels (LayerNorm, RMSNorm, a GroupNorm that loses part of a group) computes
something else when channels go; when such a norm is itself among the removed, its statistics run over the kept channels.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["Kept", "Plan", "masked_model", "masked_output", "relative_error"]

Kept = Mapping[str, Mapping[int, Sequence[int]]]
"""Tensor name -> dimension -> kept indices."""

_NORMS: tuple[type[nn.Module], ...] = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


class Plan(Protocol):
    """What the oracle reads of a plan."""

    @property
    def removed(self) -> Mapping[str, Sequence[int]]:
        """Layer path or parameter name -> output channels that go."""

    @property
    def edits(self) -> Kept:
        """Tensor name -> dimension -> kept indices."""


def masked_output(
    model: nn.Module,
    plan: Plan,
    example: tuple[Any, ...],
    root: nn.Module | None = None,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """Flat outputs of the dense network with the plan's channels zeroed.

    Args:
        model: The user's network; not changed.
        plan: What goes.
        example: Positional inputs.
        root: The module whose names the plan uses, with the very tensors of ``model`` (``program.gm`` of a captured
            program); by default ``model`` itself.
        dtype: Arithmetic.
    """
    dense = masked_model(model, plan.removed, plan.edits, root, dtype)
    inputs = [x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in example]
    with torch.no_grad():
        return list(pytree.tree_leaves(dense(*inputs)))


def masked_model(
    model: nn.Module,
    removed: Mapping[str, Sequence[int]],
    kept: Kept,
    root: nn.Module | None = None,
    dtype: torch.dtype = torch.float64,
) -> nn.Module:
    """A copy of the network in eval mode with these output channels zeroed."""
    return _Masker(model, root or model, kept, dtype).run(removed)


def relative_error(expected: Iterable[Any], got: Iterable[Any]) -> float:
    """Largest difference over the largest expected value, over all tensors; infinite when shapes or finiteness differ."""
    worst = 0.0
    for a, b in zip(pytree.tree_leaves(list(expected)), pytree.tree_leaves(list(got)), strict=True):
        if a.shape != b.shape or not bool(torch.isfinite(a).all()) or not bool(torch.isfinite(b).all()):
            return float("inf")
        a, b = a.detach().double(), b.detach().double()
        if a.numel():
            worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp(min=1e-12)))
    return worst


class _Masker:
    def __init__(self, model: nn.Module, root: nn.Module, kept: Kept, dtype: torch.dtype) -> None:
        self.root, self.kept = root, kept
        self.model = copy.deepcopy(model).to(dtype).eval()
        mine = {n: id(t) for n, t in _tensors(model)}
        twins = dict(_tensors(self.model))
        self.twin = {key: twins[name] for name, key in mine.items()}

    def run(self, removed: Mapping[str, Sequence[int]]) -> nn.Module:
        with torch.no_grad():
            for name, indices in removed.items():
                if indices:
                    self.mask(name, sorted(indices))
        return self.model

    def mask(self, name: str, indices: list[int]) -> None:
        try:
            layer = self.root.get_submodule(name)
        except AttributeError:
            self.mask_parameter(name, indices)
            return
        if isinstance(layer, nn.RNNBase):
            self.mask_recurrent(name, layer, indices)
        elif isinstance(layer, nn.MultiheadAttention):
            self.mask_attention(layer, indices)
        elif isinstance(layer, nn.modules.conv._ConvTransposeNd):
            self.mask_transposed(layer, indices)
        elif isinstance(layer, nn.Embedding):
            self.zero(layer.weight, 1, indices)
        elif type(layer).__name__ in ("TransposedLinear", "Conv1D"):
            self.zero(layer.weight, 1, indices)
            self.zero(layer.bias, 0, indices)
        elif isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.Bilinear, nn.PReLU, *_NORMS)):
            self.mask_rows(name, layer, indices)
        elif not _is_norm(layer):
            raise TypeError(f"no rule to mask {name}: {type(layer).__name__}")
        if _is_norm(layer):
            self.keep_statistics(name, layer, indices)

    def zero(self, tensor: Any, dim: int, indices: list[int]) -> None:
        """Zero indices of one dimension in the copy's twin of a tensor."""
        if tensor is None:
            return
        twin = self.twin[id(tensor)]
        twin.index_fill_(dim, torch.tensor(indices), 0)

    def mask_rows(self, name: str, layer: nn.Module, indices: list[int]) -> None:
        for part in ("weight", "bias", "running_mean"):
            self.zero(getattr(layer, part, None), 0, indices)

    def mask_transposed(self, layer: nn.modules.conv._ConvTransposeNd, indices: list[int]) -> None:
        """The weight is [in, out / groups, ...]: output channel c of group g is column c - g * out / groups of g's rows."""
        per_in, per_out = layer.in_channels // layer.groups, layer.out_channels // layer.groups
        weight = self.twin[id(layer.weight)]
        for index in indices:
            group, column = divmod(index, per_out)
            weight[group * per_in : (group + 1) * per_in, column] = 0
        self.zero(layer.bias, 0, indices)

    def mask_attention(self, layer: nn.MultiheadAttention, indices: list[int]) -> None:
        """Channels of a whole attention layer: those of queries, keys, values and output."""
        rows = [part * layer.embed_dim + i for part in range(3) for i in indices]
        self.zero(layer.in_proj_weight, 0, rows)
        self.zero(layer.in_proj_bias, 0, rows)
        self.zero(layer.out_proj.weight, 0, indices)
        self.zero(layer.out_proj.bias, 0, indices)

    def mask_recurrent(self, name: str, layer: nn.RNNBase, indices: list[int]) -> None:
        """All gate rows of hidden units. Indices are those of the last layer's output, backward direction second.

        Other layers may lose other units; which ones, the kept rows of their weights say.
        """
        size, gates = layer.hidden_size, {"LSTM": 4, "GRU": 3}.get(layer.mode, 1)
        for level in range(layer.num_layers):
            for direction in range(2 if layer.bidirectional else 1):
                suffix = f"_l{level}" + "_reverse" * direction
                units = [i - direction * size for i in indices if direction == i // size]
                rows = self.kept.get(f"{name}.weight_ih{suffix}", {}).get(0)
                if rows is not None:
                    gone = sorted(set(range(gates * size)) - set(rows))
                    if level == layer.num_layers - 1 and {r % size for r in gone} != set(units):
                        raise ValueError(f"{name}: removed outputs {units} are not the removed rows {gone}")
                else:
                    gone = [gate * size + unit for gate in range(gates) for unit in units]
                for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                    self.zero(getattr(layer, part + suffix, None), 0, gone)

    def mask_parameter(self, name: str, indices: list[int]) -> None:
        """A tensor used without a layer: zeroed along the dimensions that lose exactly these indices."""
        tensor = operator.attrgetter(name)(self.root)
        edits = self.kept.get(name, {})
        dims = [d for d, keep in edits.items() if sorted(set(range(tensor.shape[d])) - set(keep)) == indices]
        if not dims:
            raise ValueError(
                f"{name}: no dimension loses {indices}; edits of {list(edits)}, shape {list(tensor.shape)}"
            )
        for dim in dims:
            self.zero(tensor, dim, indices)
        owner = name.rpartition(".")[0]
        module = self.model.get_submodule(owner) if owner else self.model
        if _is_norm(module):
            self.keep_statistics(owner, module, indices)

    def keep_statistics(self, path: str, layer: nn.Module, indices: list[int]) -> None:
        """Let a norm over the channels take its statistics from the kept ones."""
        module = self.model.get_submodule(path)
        if isinstance(layer, nn.modules.batchnorm._NormBase):
            return
        size = _norm_size(layer)
        keep = [i for i in range(size) if i not in set(indices)]
        small = copy.deepcopy(module)
        if isinstance(small, nn.GroupNorm):
            left = [sum(i // (size // small.num_groups) == g for i in keep) for g in range(small.num_groups)]
            if all(n in (0, size // small.num_groups) for n in left):
                return
            small.num_groups, small.num_channels = sum(n > 0 for n in left), len(keep)
        index = torch.tensor(keep)
        for name, parameter in list(small.named_parameters(recurse=False)):
            setattr(small, name, nn.Parameter(parameter.detach()[index]))
        if hasattr(small, "normalized_shape"):
            setattr(small, "normalized_shape", (len(keep),))  # noqa: B010 - a tuple is no module attribute for mypy
        first = isinstance(small, nn.GroupNorm) or type(module).__name__.endswith("Norm2d")
        module.forward = _Narrow(small, index, 1 if first else -1)


class _Narrow:
    """A norm on the kept channels; zeros elsewhere."""

    def __init__(self, norm: nn.Module, index: Tensor, dim: int) -> None:
        self.norm, self.index, self.dim = norm, index, dim

    def __call__(self, x: Tensor) -> Tensor:
        y = self.norm(x.index_select(self.dim, self.index))
        return torch.zeros_like(x).index_copy(self.dim, self.index, y)


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, _NORMS) or "Norm" in type(module).__name__


def _norm_size(module: nn.Module) -> int:
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    shape = getattr(module, "normalized_shape", None)
    return int(shape[-1]) if shape else int(next(iter(module.parameters())).shape[0])


def _tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)
