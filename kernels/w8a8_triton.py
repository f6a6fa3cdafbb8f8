"""The Triton kernel of ``w8a8_linear``."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxcompress.kernels.configs import ASSUMED, Config, Device, Problem, device_of, lookup
from fxcompress.kernels.epilogue_triton import CompileCase
from fxcompress.kernels.gemm_triton import tile_of
from fxcompress.kernels.int8_triton import (
    EPILOGUES,
    Epilogue,
    best_tile,
    device_guard,
    distinct,
    fitting,
    parts_for,
    parts_like,
    pieces,
    reduce_case,
    store_scaled,
)
from fxcompress.kernels.w8a8 import check

__all__ = ["choose", "compile_cases", "launch", "linear_kernel", "product"]

#: Instructions per weight of the main loop, plus what the products themselves take where they are most of it.
_BUDGET = 1.4
_FULL = "bf16 zero bias residual gelu"


@triton.jit(do_not_specialize=["M"])
def linear_kernel(
    x, w, out, parts, x_scale, w_scale, x_zero, w_sum, bias, residual, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, SWAP: tl.constexpr,
    EVEN_K: tl.constexpr, PER_ROW: tl.constexpr, RAW: tl.constexpr, ACTIVATION: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """int8 [M, K] by int8 [N, K]: finished into ``out`` [M, N]; ``SPLIT``: int32 into ``parts`` [programs in 1, M, N]."""
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), 8)
    rm, rn = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    depth = tl.cdiv(tl.cdiv(K, BLOCK_K), tl.num_programs(1)) * BLOCK_K
    first = part * depth
    rk = tl.arange(0, BLOCK_K)
    xp = x + rm.to(tl.int64)[:, None] * K + (first + rk)[None, :]
    wp = w + tl.minimum(rn, N - 1).to(tl.int64)[:, None] * K + (first + rk)[None, :]
    rows = (rm < M)[:, None]
    if SWAP:
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for k in range(first, tl.minimum(first + depth, K), BLOCK_K):
        if EVEN_K:
            a = tl.load(xp, mask=rows, other=0)
            b = tl.load(wp, eviction_policy="evict_first")
        else:
            inside = (k + rk < K)[None, :]
            a = tl.load(xp, mask=rows & inside, other=0)
            b = tl.load(wp, mask=inside, other=0, eviction_policy="evict_first")
        if SWAP:
            acc = tl.dot(b, tl.trans(a), acc, out_dtype=tl.int32)
        else:
            acc = tl.dot(a, tl.trans(b), acc, out_dtype=tl.int32)
        xp += BLOCK_K
        wp += BLOCK_K
    if SWAP:
        acc = tl.trans(acc)
    if SPLIT:
        store_scaled(
            acc, tile_m * BLOCK_M, tile_n * BLOCK_N, M, N, parts + part * M.to(tl.int64) * N,
            None, None, None, None, None, None, 0, True, "", PIECES,
        )  # fmt: skip
    else:
        store_scaled(
            acc, tile_m * BLOCK_M, tile_n * BLOCK_N, M, N, out, x_scale, w_scale, x_zero, w_sum, bias, residual,
            PER_ROW, RAW, ACTIVATION, PIECES,
        )  # fmt: skip


def choose(problem: Problem, device: Device) -> Config:
    """The table's configuration, else a guess: weights streamed at few rows, large tiles at many."""
    found = lookup(problem, device)
    if found is not None:
        return found
    m, n, hopper = problem.m, problem.n, device.sm >= 90
    if m <= 64:
        block_m = 16 if m <= 16 else 32 if m <= 32 else 64
        tile = Config(block_m, 64, 256 if m <= 32 else 128, 1, 4, 4, swap_ab=hopper)
        return _split(tile, problem, device)
    costs = {(64, 128): 1.2, (128, 128): 2.0, (128, 256): 3.4}
    block_m, block_n = best_tile(m, n, costs, device)
    return _split(Config(block_m, block_n, 128, 1, 8 if block_m > 64 else 4, 4 if hopper else 3), problem, device)


def _split(tile: Config, problem: Problem, device: Device) -> Config:
    tiles = -(-problem.m // tile.block_m) * -(-problem.n // tile.block_n)
    parts = parts_for(tiles, -(-problem.k // tile.block_k), device) if tile.block_m <= 64 else 1
    return fitting(replace(tile, split_k=parts), (tile.block_m + tile.block_n) * tile.block_k, device)


def launch(
    x: Tensor, weight: Tensor, x_scale: Tensor, w_scale: Tensor, x_zero: Tensor | None, w_sum: Tensor | None,
    bias: Tensor | None, out_dtype: torch.dtype, activation: str = "", residual: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:  # fmt: skip
    """See `fxcompress.kernels.w8a8`; ``config`` is for tests and measurements."""
    check(x, weight, x_scale, w_scale, x_zero, w_sum, bias, out_dtype, activation, residual)
    if x_zero is not None and w_sum is None:
        w_sum = weight.sum(1, dtype=torch.int32)
    out = x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype)
    raw, per_row = out_dtype == torch.int32, x_scale.dim() > 1
    epilogue = Epilogue(x_scale, w_scale, bias, residual, activation, per_row, raw, x_zero, w_sum)
    if out.numel():
        with device_guard(x):
            product(x.reshape(-1, x.shape[-1]).contiguous(), weight.contiguous(), epilogue, out, config)
    return out


def product(x: Tensor, weight: Tensor, epilogue: Epilogue, out: Tensor, config: Config | None = None) -> None:
    """``x`` int8 [M, K] by ``weight`` int8 [N, K], both contiguous, finished by ``epilogue`` into ``out``, M * N values."""
    (m, k), n, device = x.shape, weight.shape[0], device_of(x)
    c = config or choose(Problem("w8a8", m, n, k, torch.int8), device)
    flat = out.view(m, n)
    parts = parts_like(flat, c.split_k)
    linear_kernel[triton.cdiv(m, c.block_m) * triton.cdiv(n, c.block_n), c.split_k](
        x, weight, out, parts, *epilogue.tensors(), m, n, k,
        **_constants(c, device, k % c.block_k == 0), **epilogue.constants(),
        num_warps=c.num_warps, num_stages=c.num_stages, enable_fp_fusion=False,
    )  # fmt: skip
    if c.split_k > 1:
        epilogue.add(parts, flat)


def _constants(c: Config, device: Device, even: bool) -> dict[str, Any]:
    sizes = {"BLOCK_M": c.block_m, "BLOCK_N": c.block_n, "BLOCK_K": c.block_k}
    return sizes | {"SPLIT": c.split_k > 1, "SWAP": c.swap_ab, "EVEN_K": even, "PIECES": pieces(c, device)}


def _case(c: Config, device: Device, epilogue: str, even: bool) -> CompileCase:
    signature, constants = EPILOGUES[epilogue]
    words = (epilogue, "swapped" if c.swap_ab else "", "" if even else "K tail", "split" if c.split_k > 1 else "")
    kinds: dict[str, Any] = {"x": "*i8", "w": "*i8", "parts": "*i32", "M": "i32", "N": "i32", "K": "i32"}
    return CompileCase(
        " ".join(filter(None, (f"w8a8 {c.block_m}x{c.block_n}x{c.block_k}", *words))),
        "w8a8",
        linear_kernel,
        signature | kinds,
        constants | _constants(c, device, even),
        c.num_warps,
        c.num_stages,
        weights=c.block_n * c.block_k,
        mma=("IMMA", "IGMMA", "UTCIMMA"),
        budget=_BUDGET + c.block_m / 128 if even else None,
        unaligned=("M",),
    )


def compile_cases(sm: int) -> list[CompileCase]:
    """Every tile for ``sm``: plain, with a K tail, with the whole epilogue, split; then the sum of the parts."""
    device, cases = ASSUMED[sm], []
    sizes = [(m, n) for m in (1, 17, 33, 65, 200, 700, 4096) for n in (512, 4096, 8192, 28672)]
    for c in distinct(choose(Problem("w8a8", m, n, 8192, torch.int8), device) for m, n in sizes):
        variants = (("fp16", True), ("fp16", False), (_FULL, True)) if c.split_k == 1 else (("fp16", True),)
        cases += [_case(c, device, epilogue, even) for epilogue, even in variants]
    return [*cases, reduce_case("w8a8"), reduce_case("w8a8", _FULL)]
