"""The certificate: a pruned program computes what the dense one computes with the same channels masked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from fxcompress.errors import CertificateError
from fxcompress.examples import other_sizes, resized
from fxcompress.ir import Program, evaluating
from fxcompress.passbase import output_error
from fxcompress.precise import as_double, like, replace_tensors
from fxcompress.prune.dependencies import Bools, Dependencies
from fxcompress.prune.surgery import cut_program, cut_rows, moved_biases

__all__ = ["Certificate", "check", "masked_program"]

#: Largest relative output difference, by dtype.
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-9}


@dataclass(frozen=True)
class Certificate:
    """Proof that pruning removed the named channels and nothing else.

    Attributes:
        float32: Largest output difference from the masked dense program, relative to the largest output.
        float64: The same, both programs in double precision.
        batches: Batch sizes (first dimension of the first input) it was checked with.
        groups: Per group its float64 difference, when asked for.
    """

    float32: float
    float64: float
    batches: tuple[int, ...] = ()
    groups: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {
            "float32": self.float32,
            "float64": self.float64,
            "batches": list(self.batches),
            "groups": dict(self.groups),
        }

    def __str__(self) -> str:
        return f"certified: masked dense = pruned within {self.float64:.1e} (float64), {self.float32:.1e} (float32)"


def masked_program(found: Dependencies, removed: Bools) -> Program:
    """The dense program with the channels marked in ``removed`` zeroed where they are made.

    Rows of weights, biases, scales and shifts are set to zero. Statistics that run over a removed dimension (``width``)
    run over the kept channels.
    """
    program = found.program.clone()
    named = {
        **dict(program.gm.named_parameters(remove_duplicate=False)),
        **dict(program.gm.named_buffers(remove_duplicate=False)),
    }
    new: dict[int, Tensor] = {}
    for use in found.slots:
        kept = found.kept(use.dimension, removed)
        if use.slot.role != "out" or kept.all():
            continue
        old = named[use.slot.tensor]
        data = new.get(id(old), old).detach().clone()
        gone = torch.as_tensor(np.flatnonzero(~kept), device=data.device)
        new[id(old)] = like(old, data.index_fill(use.slot.dim, gone, 0.0))
    replace_tensors(program, new)
    for name, number in found.statistics.items():
        kept = found.kept(number, removed)
        if not kept.all():
            _mask_statistics(program, next(n for n in program.graph.nodes if n.name == name), kept)
    program.recompile()
    return program


class _KeptNorm(nn.Module):
    """LayerNorm or RMSNorm over the last dimension, its statistics over the kept channels only, zero elsewhere."""

    kept: Tensor

    def __init__(self, norm: nn.Module, kept: Bools) -> None:
        super().__init__()
        self.norm = norm
        self.register_buffer("kept", torch.as_tensor(np.flatnonzero(kept)))

    def forward(self, x: Tensor) -> Tensor:
        norm: Any = self.norm
        part = x.index_select(-1, self.kept)
        shape = (len(self.kept),)
        weight = None if norm.weight is None else norm.weight[self.kept]
        if isinstance(norm, nn.RMSNorm):
            y = torch.nn.functional.rms_norm(part, shape, weight, norm.eps)
        else:
            bias = None if norm.bias is None else norm.bias[self.kept]
            y = torch.nn.functional.layer_norm(part, shape, weight, bias, norm.eps)
        return torch.zeros_like(x).index_copy(-1, self.kept, y)


def _mask_statistics(program: Program, node: Node, kept: Bools) -> None:
    if node.op == "call_module":
        path = f"{str(node.target).replace('.', '_')}_kept"
        program.gm.add_submodule(path, _KeptNorm(program.module(node), kept))
        node.target = path
        return
    with program.graph.inserting_after(node):  # a mean: its sum over the kept channels, divided by their number
        scaled = program.graph.call_function(torch.ops.aten.mul.Tensor, (node, len(kept) / int(kept.sum())))
    scaled.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)


def _leaves(program: Program) -> list[list[Any]]:
    """Flat inputs to compare on: the example, and the same at another batch size where that is free."""
    leaves = program.signature.flatten(*program.example)
    others = other_sizes(program.placeholders(), leaves)
    return [leaves, resized(program.placeholders(), leaves, others)] if others else [leaves]


def _run(program: Program, leaves: Sequence[Any], dtype: torch.dtype | None) -> list[Any]:
    cast = [v.to(dtype) if dtype is not None and isinstance(v, Tensor) and v.is_floating_point() else v for v in leaves]
    args, kwargs = pytree.tree_unflatten(cast, program.signature.in_spec)
    with torch.no_grad(), evaluating(program.gm):
        return list(pytree.tree_leaves(program.gm(*args, **kwargs)))


def _difference(masked: Program, pruned: Program, dtype: torch.dtype | None) -> float:
    return max(output_error(_run(masked, leaves, dtype), _run(pruned, leaves, dtype)) for leaves in _leaves(masked))


def _unrounded(found: Dependencies, removed: Bools, pruned: Program) -> Program:
    """The pruned program in double precision; biases that took over a constant as they were before rounding."""
    double = as_double(pruned)
    for path, exact in moved_biases(found, removed).items():
        stored = pruned.gm.get_submodule(path).bias
        rows = cut_rows(found, removed, path, exact)
        if isinstance(stored, Tensor) and torch.equal(stored, rows.to(stored.dtype)):
            replace_tensors(double, {id(double.gm.get_submodule(path).bias): nn.Parameter(rows)})
    return double


def check(
    found: Dependencies, removed: Bools, pruned: Program, groups: dict[str, Bools], per_group: bool
) -> Certificate:
    """Compare ``pruned`` with the masked dense program.

    Args:
        found: Dependencies of the dense program.
        removed: Units that went.
        pruned: The smaller program, before any fine-tuning.
        groups: The removed units of each group, for the search for a culprit.
        per_group: Certify every group by itself, too.

    Raises:
        CertificateError: the outputs differ; the first group that differs by itself is named.
    """
    masked = masked_program(found, removed)
    single = _difference(masked, pruned, None)
    double = _difference(as_double(masked), _unrounded(found, removed, pruned), torch.float64)
    limit = TOLERANCES[torch.float32]
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in pruned.gm.parameters()):
        limit = math.inf  # coarser than any useful tolerance: double precision decides
    if not (double <= TOLERANCES[torch.float64] and single <= limit):
        _blame(found, groups, single, double)
    alone = {name: _alone(found, units) for name, units in groups.items()} if per_group else {}
    worst = max(alone, key=lambda n: alone[n], default="")
    if worst and not alone[worst] <= TOLERANCES[torch.float64]:
        raise _error(f"group {worst}", alone[worst], alone[worst])
    sizes = tuple(
        int(leaves[0].shape[0]) for leaves in _leaves(pruned) if isinstance(leaves[0], Tensor) and leaves[0].dim()
    )
    return Certificate(single, double, sizes, alone)


def _alone(found: Dependencies, units: Bools) -> float:
    """Difference when only one group is pruned."""
    pruned = _unrounded(found, units, cut_program(found, units)[0])
    return _difference(as_double(masked_program(found, units)), pruned, torch.float64)


def _blame(found: Dependencies, groups: dict[str, Bools], single: float, double: float) -> None:
    for name, units in groups.items():
        try:
            alone = _alone(found, units)
        except (RuntimeError, ValueError, IndexError) as error:
            raise _error(f"group {name}", single, double, f"{type(error).__name__}: {error}") from error
        if not alone <= TOLERANCES[torch.float64]:
            raise _error(f"group {name}", alone, alone)
    raise _error("no single group: they only differ together, or the program was changed after pruning", single, double)


def _error(where: str, single: float, double: float, why: str = "") -> CertificateError:
    return CertificateError(
        1,
        f"the pruned program differs from the masked dense one by {double:.3g} (float64), {single:.3g} (float32)",
        where=where,
        why=why or f"it must stay within {TOLERANCES[torch.float64]:.0e} and {TOLERANCES[torch.float32]:.0e}",
        fix="leave the group out with ignore=[...] and report the model; the input program is untouched",
    )
