"""Programs in double precision, and how far apart two orders of summation may lead."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from fxcompress.ir import Program, evaluating

__all__ = ["as_double", "like", "replace_tensors", "summation_error"]

_LOW = (torch.float32, torch.float16, torch.bfloat16)


def replace_tensors(program: Program, new: dict[int, Tensor]) -> None:
    """Put new parameters and buffers in place of old ones (by identity) wherever they are registered."""
    for module in program.gm.modules():
        held: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for slots in held:
            for name, tensor in list(slots.items()):
                if tensor is not None and id(tensor) in new:
                    if isinstance(module, nn.RNNBase):
                        setattr(module, name, new[id(tensor)])  # keeps its flat list of weights in step
                    else:
                        slots[name] = new[id(tensor)]


def like(old: Tensor, data: Tensor) -> Tensor:
    """``data`` as a parameter when ``old`` is one."""
    return nn.Parameter(data, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else data


def as_double(program: Program) -> Program:
    """The program in double precision: its tensors, and dtypes that its graph names."""
    clone = program.clone()
    named = [*clone.gm.named_parameters(), *clone.gm.named_buffers()]
    new = {id(t): like(t, t.detach().double()) for _, t in named if t.is_floating_point()}
    replace_tensors(clone, new)
    for node in clone.graph.nodes:
        node.args, node.kwargs = map_aggregate(
            (node.args, node.kwargs), lambda v: torch.float64 if isinstance(v, torch.dtype) and v in _LOW else v
        )
    for module in clone.gm.modules():
        if isinstance(module, nn.RNNBase):
            module._flat_weights = [getattr(module, n) for n in module._flat_weights_names]
    clone.recompile()
    return clone


def summation_error(program: Program, calls: Iterable[tuple[tuple[Any, ...], dict[str, Any]]]) -> float:
    """Relative L2 difference, of the worst output, between the program in float32 and itself in double precision.

    In a quantized program sums that differ in the last bit land on other sides of rounding ties, and the network may
    amplify those steps. An engine, which sums in an order of its own, cannot be closer to the simulation than this.

    Args:
        program: The program.
        calls: Inputs: positional and by keyword.
    """
    double = as_double(program)
    parts: list[list[float]] = []
    for args, kwargs in calls:
        with torch.no_grad(), evaluating(program.gm), evaluating(double.gm):
            own = _tensors(program(*args, **kwargs))
            wide = _tensors(double.gm(*_doubled(args), **_doubled(kwargs)))
        parts = parts or [[0.0, 0.0] for _ in own]
        for part, a, b in zip(parts, own, wide, strict=True):
            difference, exact = a.double() - b, b.double()
            part[0] += float(difference[difference.isfinite()].square().sum())
            part[1] += float(exact[exact.isfinite()].square().sum())
    return max((math.sqrt(p[0] / p[1]) for p in parts if p[1] > 0), default=0.0)


def _tensors(outputs: Any) -> list[Tensor]:
    return [v for v in pytree.tree_leaves(outputs) if isinstance(v, Tensor) and v.is_floating_point()]


def _doubled(values: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda v: v.double() if v.is_floating_point() else v, values)
