"""Random 2:4 problems, and their product by the Gluon kernel: emulated line by line, or on the device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fxcompress.kernels import sparse_proof
from fxcompress.kernels.configs import Config
from fxcompress.kernels.sparse_common import F16, HALVES, I8, W4, Kind, Packed, rows_of
from tests.kernels.cases import device

KINDS: dict[str, Kind] = {"sp24": F16, "sp24_w8a8": I8, "sp24_w4": W4}
#: Every layout with every dtype of its activations.
BOTH = [(kind, dtype) for kind in ("sp24", "sp24_w4") for dtype in HALVES] + [("sp24_w8a8", torch.int8)]


@dataclass(frozen=True)
class Sparse:
    """``x`` times ``weight``; ``dense`` is the weight in float64."""

    x: Tensor
    weight: Packed
    dense: Tensor

    @property
    def expected(self) -> Tensor:
        return self.x.double() @ self.dense.T

    @property
    def w_scale(self) -> Tensor | None:
        """Scales of rows, which come after the sums."""
        scales = self.weight.scales
        return scales[0] if scales is not None and not self.weight.group else None

    def to(self, where: str) -> Sparse:
        weight = self.weight
        scales = None if weight.scales is None else weight.scales.to(where)
        moved = replace(weight, values=weight.values.to(where), meta=weight.meta.to(where), scales=scales)
        return Sparse(self.x.to(where), moved, self.dense.to(where))


def problem(
    kind: Kind, m: int, n: int, k: int, group_size: int = 0, dtype: torch.dtype = torch.float16, seed: int = 0
) -> Sparse:
    """In main memory. ``group_size`` 0: scales of rows."""
    dtype = torch.int8 if kind is I8 else dtype
    weight, dense = sparse_proof.random_weight(kind, dtype, n, k, group_size, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed + 7)
    if kind is I8:
        x = torch.randint(-128, 128, (m, k), generator=generator, dtype=torch.int8)
    else:
        x = torch.randn(m, k, generator=generator).to(dtype)
    return Sparse(x, weight, dense.double())


def padded_by_nan(x: Tensor) -> Tensor:
    """A copy of ``x`` with NaN (or -77) before and after it in memory."""
    sentinel = -77 if x.dtype == torch.int8 else float("nan")
    memory = torch.full((x.numel() + 512,), sentinel, dtype=x.dtype, device=x.device)
    inside = memory[256 : 256 + x.numel()].view(x.shape)
    inside.copy_(x)
    return inside


def multiplied(case: Sparse, config: Config, **after: Any) -> Tensor:
    """The product by the kernel on the sparse tensor cores: on a device there, else by the emulator; float32 or int32.

    The result is poisoned before, and what lies around the activations.
    """
    from fxcompress.kernels import sparse_gluon, sparse_triton

    case = case.to(device())
    n, m = case.weight.n, case.x.shape[0]
    integers = case.weight.kind is I8
    out = torch.full((m, n), float("nan"), device=case.x.device)
    out = out.fill_(-99).to(torch.int32) if integers and not after else out
    finish = sparse_triton.Finish(w_scale=after.pop("w_scale", case.w_scale), **after)
    rows = padded_by_nan(rows_of(case.x, case.weight.values))
    if case.x.is_cuda:
        sparse_triton.multiply(rows, case.weight, out, finish, config)
        return out
    from tests.kernels.mma_sp_emulator import run_kernel

    grid, arguments, parts = sparse_triton.plan(rows, case.weight, out, finish, config)
    if parts is not out:
        parts.fill_(-99)
    run_kernel(sparse_gluon, "mma_sp_kernel", grid, arguments)
    if parts is not out:
        sparse_triton.add_parts(parts, out, finish)
    return out
