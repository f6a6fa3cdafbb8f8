"""Random arguments for the matrix products of this folder, from a `Problem`; and the `Problem` of given arguments.

What is measured must not be zeros: a GPU multiplies those faster. Weights are uniform on their grid, activations normal.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from fxcompress.kernels.configs import Problem
from fxcompress.kernels.layouts import K_BLOCK
from fxcompress.ops import kernel_op

__all__ = ["WORKLOADS", "Workload", "problem_of", "workload"]

Arguments = dict[str, Any]
_CHUNK: Final = 2048


@dataclass(frozen=True)
class Workload:
    """A family of products ``[M, K] x [N, K]^T``.

    Attributes:
        family: As in `Problem`.
        op: Its operator.
        make: Arguments by name on a device; ``x`` is the first.
        depth: K must be a multiple of this.
        grouped: Its weights have a scale for each group.
        bits: Bits of memory a weight takes, scales left out.
        integer: Activations are int8.
        sparse: Half of the weights are zero, and not multiplied.
    """

    family: str
    op: str
    make: Callable[[Problem, str], Arguments]
    depth: int
    grouped: bool
    bits: float
    integer: bool = False
    sparse: bool = False

    def problem(self, m: int, n: int, k: int, dtype: torch.dtype, group_size: int) -> Problem | None:
        """The problem with these sizes; None when the family cannot compute it.

        Args:
            m: Rows of activations.
            n: Output features.
            k: Input features.
            dtype: Of the activations, for families that do not take int8.
            group_size: Of the scales, for families that have groups.
        """
        group = group_size if self.grouped else 0
        depth = math.lcm(self.depth, group) if group > 0 else self.depth
        if k % depth or n % 8:
            return None
        return Problem(self.family, m, n, k, torch.int8 if self.integer else dtype, group)

    def arguments(self, problem: Problem, device: str) -> Arguments:
        """Random arguments of the operator; what it may do without is None."""
        made = self.make(problem, device)
        parameters = inspect.signature(kernel_op(self.op).reference).parameters.values()
        return {p.name: made.get(p.name) for p in parameters if p.name in made or p.default is p.empty}

    def bytes(self, problem: Problem) -> float:
        """Bytes that must be read and written: weights, scales, activations and output, each once."""
        p, out = problem, 2.0
        weights = p.n * p.k * self.bits / 8
        groups = p.k // p.group_size if p.group_size > 0 else 1
        scales = p.n * groups * (4.0 if self.integer else 2.0)
        return weights + scales + p.m * p.k * (1.0 if self.integer else 2.0) + p.m * p.n * out

    def operations(self, problem: Problem) -> float:
        """Floating-point or integer operations of the dense product: a multiplication and an addition each."""
        return 2.0 * problem.m * problem.n * problem.k


def _rows(p: Problem, device: str) -> Tensor:
    return torch.randn(p.m, p.k, device=device).to(p.dtype)


def _integers(p: Problem, device: str) -> Arguments:
    return {
        "x": torch.randint(-127, 128, (p.m, p.k), dtype=torch.int8, device=device),
        "x_scale": torch.rand(p.m, 1, device=device) * 0.01 + 0.005,
        "w_scale": torch.rand(p.n, device=device) * 0.002 + 0.001,
        "out_dtype": torch.float16,
    }


def _scales(p: Problem, device: str) -> Tensor:
    groups = p.k // p.group_size if p.group_size > 0 else 1
    return (torch.rand(groups, p.n, device=device) * 0.01 + 0.005).to(p.dtype)


def _noise(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    return torch.randint(low, high + 1, shape, dtype=dtype, device=device)


def _blocks(p: Problem) -> int:
    return -(-p.k // K_BLOCK)


def _w4a16(p: Problem, device: str) -> Arguments:
    packed = _noise((_blocks(p), p.n, 32), torch.int16, device)
    return {"x": _rows(p, device), "packed": packed, "scales": _scales(p, device), "group_size": p.group_size}


def _w8a16(p: Problem, device: str) -> Arguments:
    weight = _noise((p.n, p.k), torch.int8, device)
    return {"x": _rows(p, device), "weight": weight, "scales": _scales(p, device), "group_size": p.group_size}


def _w8a8(p: Problem, device: str) -> Arguments:
    return {**_integers(p, device), "weight": _noise((p.n, p.k), torch.int8, device)}


def _w4a8(p: Problem, device: str) -> Arguments:
    return {**_integers(p, device), "packed": _noise((_blocks(p), p.n, 64), torch.uint8, device)}


def _sparse(p: Problem, device: str, name: str, levels: int, scale: float | None = None) -> Arguments:
    """Random integers up to ``levels``, two of four neighbours zero, packed by that function of `sparse_layout`.

    Args:
        p: What to compute.
        device: Where.
        name: The function.
        levels: Largest integer.
        scale: What the integers are multiplied with, in the dtype of the activations; None for int8.
    """
    pack = getattr(importlib.import_module("fxcompress.kernels.sparse_layout"), name)
    parts = []
    for start in range(0, p.n, _CHUNK):  # packing needs many times the memory of its result
        rows = min(_CHUNK, p.n - start)
        dense = torch.randint(-levels, levels + 1, (rows, p.k), dtype=torch.int8, device=device)
        order = torch.rand(rows, p.k // 4, 4, device=device).argsort(-1)
        dense *= (order < 2).reshape(rows, p.k)
        parts.append(pack(dense if scale is None else dense.to(p.dtype) * scale))
    return {"values": torch.cat([v for v, _ in parts]), "meta": torch.cat([m for _, m in parts])}


def _sp24(p: Problem, device: str) -> Arguments:
    return {"x": _rows(p, device), **_sparse(p, device, "pack_sp24", 127, 1 / 64), "n": p.n}


def _sp24_w8a8(p: Problem, device: str) -> Arguments:
    return {**_integers(p, device), **_sparse(p, device, "pack_sp24_i8", 127)}


def _sp24_w4(p: Problem, device: str) -> Arguments:
    packed = _sparse(p, device, "pack_sp24_w4", 7)
    return {"x": _rows(p, device), **packed, "scales": _scales(p, device), "group_size": p.group_size}


#: Family -> what it computes. Two bits a stored weight say where it stands: one for each weight of a 2:4 sparse matrix.
WORKLOADS: Final[Mapping[str, Workload]] = {
    w.family: w
    for w in (
        Workload("w4a16", "w4a16_linear", _w4a16, 32, True, 4),
        Workload("w8a16", "w8a16_linear", _w8a16, 32, True, 8),
        Workload("w8a8", "w8a8_linear", _w8a8, 16, False, 8, integer=True),
        Workload("w4a8", "w4a8_linear", _w4a8, 32, False, 4, integer=True),
        Workload("sp24", "sp24_linear", _sp24, 64, False, 9, sparse=True),
        Workload("sp24_w8a8", "sp24_w8a8_linear", _sp24_w8a8, 128, False, 5, integer=True, sparse=True),
        Workload("sp24_w4", "sp24_w4_linear", _sp24_w4, 128, True, 3, sparse=True),
    )
}
_BY_OP: Final = {w.op: w for w in WORKLOADS.values()}


def workload(family: str) -> Workload:
    """The workload of a family."""
    return WORKLOADS[family]


def problem_of(op: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Problem | None:
    """The problem that a call of an operator solves; None for operators that are no matrix products.

    Args:
        op: Name of the operator, ``w4a16_linear``.
        args: Its arguments by position.
        kwargs: Its arguments by name.
    """
    work = _BY_OP.get(op)
    if work is None:
        return None
    given = inspect.signature(kernel_op(op).reference).bind(*args, **kwargs).arguments
    x = given["x"]
    k = int(x.shape[-1])
    out = kernel_op(op).fake(*args, **kwargs)
    return Problem(work.family, x.numel() // max(k, 1), int(out.shape[-1]), k, x.dtype, given.get("group_size", 0))
