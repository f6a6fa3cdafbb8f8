"""Example inputs for capture: which sizes are dynamic, and the same example at other sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ShapesCollection
from torch.fx import Node
from torch.utils import _pytree as pytree

from fxcompress.sizes import fixed_size, free_sizes

__all__ = ["Plan", "batch_plans", "copied", "other_sizes", "resized"]

#: Export takes sizes 0 and 1 as fixed, and a size that equals another number by chance may get fixed too.
_TRACED_BATCH = 3


@dataclass(frozen=True)
class Plan:
    """What to hand to ``torch.export``: an example and its dynamic shapes.

    Attributes:
        label: For notes and errors.
        args: Positional inputs.
        kwargs: Keyword inputs.
        shapes: Dynamic shapes, as ``torch.export.export`` takes them; None for fixed sizes.
        frees_batch: The plan is pointless when the batch size comes out fixed.
        is_refinement: Worth a try only when the plan before it failed for its sizes.
    """

    label: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shapes: Any = None
    frees_batch: bool = False
    is_refinement: bool = False


def copied(tree: Any) -> Any:
    """The same structure with clones of its tensors, so that in-place code cannot change the example."""
    return pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, tree)


def batch_plans(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Plan]:
    """Plans with a free batch: first one size for all inputs, then one per input (for models that tie some of them).

    A tensor is batched when its dimension 0 has the size of the first tensor's. Empty when no tensor has a batch.
    """
    tensors = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor) and v.dim() > 0]
    if not tensors or tensors[0].shape[0] == 0:
        return []
    batch = tensors[0].shape[0]

    def is_batched(v: Any) -> bool:
        return isinstance(v, Tensor) and v.dim() > 0 and v.shape[0] == batch

    # clones: export takes shapes by tensor, and one tensor may be given twice
    repeats = _TRACED_BATCH if batch == 1 else 1
    grown = pytree.tree_map(lambda v: torch.cat([v] * repeats) if is_batched(v) else v, (args, kwargs))
    plans = []
    for dim, label in ((Dim("batch"), "a free batch size"), (Dim.AUTO, "a free batch size per input")):
        shapes = ShapesCollection()
        for given, tensor in zip(pytree.tree_leaves((args, kwargs)), pytree.tree_leaves(grown), strict=True):
            if is_batched(given):
                shapes[tensor] = {0: dim}
        grown_args, grown_kwargs = grown
        plans.append(Plan(label, grown_args, grown_kwargs, shapes, frees_batch=True, is_refinement=dim is Dim.AUTO))
    return plans


def other_sizes(placeholders: list[Node], leaves: list[Any]) -> dict[str, int]:
    """Another allowed size for each free one of the captured graph: 1 for a batch (2 when it is 1), else one less or more."""
    chosen: dict[str, int] = {}
    for size in free_sizes(placeholders, leaves):
        if size.is_batch:
            candidates = [1, 2, size.value + 1]
        else:
            candidates = [size.value - 1, size.value + 1]
        fitting = [c for c in candidates if c != size.value and size.allows(c)]
        if fitting:
            chosen[size.name] = fitting[0]
    return chosen


def resized(placeholders: list[Node], leaves: list[Any], sizes: dict[str, int]) -> list[Any]:
    """The example at other sizes: rows are repeated or left out, and repeated rows run backwards to differ."""
    return [
        _resize(n.meta.get("val"), v, sizes) if isinstance(v, Tensor) else v
        for n, v in zip(placeholders, leaves, strict=True)
    ]


def _resize(val: Any, value: Tensor, sizes: dict[str, int]) -> Tensor:
    for dim, size in enumerate(val.shape):
        if fixed_size(size) is None:
            expr = size.node.expr
            wanted = int(expr.subs({s: sizes[str(s)] for s in expr.free_symbols if str(s) in sizes}))
            value = _cut_or_repeat(value, dim, wanted)
    return value


def _cut_or_repeat(value: Tensor, dim: int, wanted: int) -> Tensor:
    have = value.shape[dim]
    if wanted <= have:
        return value.narrow(dim, 0, wanted)
    rows = value.index_select(dim, torch.arange(have, wanted, device=value.device) % have)
    others = [d for d in range(value.dim()) if d != dim]
    return torch.cat([value, rows.flip(others) if others else rows], dim)
