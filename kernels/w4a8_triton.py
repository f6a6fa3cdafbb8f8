"""The Triton kernel of ``w4a8_linear``."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxcompress.kernels.configs import ASSUMED, Config, Device, Problem, device_of, lookup
from fxcompress.kernels.epilogue_triton import INTERPRETED, CompileCase
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
from fxcompress.kernels.w4a8 import check

__all__ = ["choose", "compile_cases", "launch", "linear_kernel"]

#: Instructions per weight of the main loop up to 64 rows; with more, the products themselves are most of it.
_BUDGET = 1.7
#: The kernel's sums are of 16 times the weights.
_SHIFT = 4
_FULL = "bf16 zero bias residual gelu"


@triton.jit
def _halves(q, USE_ASM: tl.constexpr):
    """16 times the low and 16 times the high nibbles of bytes, both in two's complement: 3 instructions for 8 weights."""
    if USE_ASM:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; shl.b32 t, $2, 4; and.b32 $0, t, 0xf0f0f0f0; and.b32 $1, $2, 0xf0f0f0f0; }",
            "=&r,=&r,r",
            [q],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        return (q << 4).to(tl.int8, bitcast=True), (q & 240).to(tl.int8, bitcast=True)


@triton.jit
def _product(a, b, acc, SWAP: tl.constexpr):
    if SWAP:
        return tl.dot(b, tl.trans(a), acc, out_dtype=tl.int32)
    else:
        return tl.dot(a, tl.trans(b), acc, out_dtype=tl.int32)


@triton.jit(do_not_specialize=["M"])
def linear_kernel(
    x, packed, out, parts, x_scale, w_scale, x_zero, w_sum, bias, residual, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, SWAP: tl.constexpr,
    EVEN_K: tl.constexpr, PER_ROW: tl.constexpr, RAW: tl.constexpr, ACTIVATION: tl.constexpr, PIECES: tl.constexpr,
    USE_ASM: tl.constexpr,
):  # fmt: skip
    """int8 [M, K] by ``planes4x8``: finished into ``out`` [M, N]; ``SPLIT``: int32 into ``parts`` [programs in 1, M, N]."""
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), 8)
    rm, rn = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    depth = tl.cdiv(tl.cdiv(K, BLOCK_K), tl.num_programs(1)) * BLOCK_K
    first = part * depth
    half = tl.arange(0, BLOCK_K // 2)  # byte of a row's blocks; its low nibble is weight `low`, its high one `low` + 64
    block, byte = half // 64, half % 64
    low = block * 128 + byte
    step = N.to(tl.int64) * 64  # bytes from one block of 128 weights to the next
    xp = x + rm.to(tl.int64)[:, None] * K + (first + low)[None, :]
    wp = (
        packed
        + (first // 128 + block)[None, :] * step
        + tl.minimum(rn, N - 1).to(tl.int64)[:, None] * 64
        + byte[None, :]
    )
    rows = (rm < M)[:, None]
    if SWAP:
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for k in range(first, tl.minimum(first + depth, K), BLOCK_K):
        if EVEN_K:
            q = tl.load(wp, eviction_policy="evict_first")
            a0 = tl.load(xp, mask=rows, other=0)
            a1 = tl.load(xp + 64, mask=rows, other=0)
        else:
            q = tl.load(wp, mask=(k + block * 128 < K)[None, :], other=0, eviction_policy="evict_first")
            a0 = tl.load(xp, mask=rows & (k + low < K)[None, :], other=0)
            a1 = tl.load(xp + 64, mask=rows & (k + low + 64 < K)[None, :], other=0)
        b0, b1 = _halves(q, USE_ASM)
        acc = _product(a0, b0, acc, SWAP)
        acc = _product(a1, b1, acc, SWAP)
        xp += BLOCK_K
        wp += BLOCK_K // 128 * step
    if SWAP:
        acc = tl.trans(acc)
    if SPLIT:
        store_scaled(
            acc, tile_m * BLOCK_M, tile_n * BLOCK_N, M, N, parts + part * M.to(tl.int64) * N,
            None, None, None, None, None, None, 0, True, "", PIECES,
        )  # fmt: skip
    else:
        store_scaled(
            acc >> 4, tile_m * BLOCK_M, tile_n * BLOCK_N, M, N, out, x_scale, w_scale, x_zero, w_sum, bias, residual,
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
        tile = Config(block_m, 128, 128, 1, 4, 4, swap_ab=hopper)
    else:
        costs = {(64, 128): 1.2, (128, 128): 2.0, (128, 256): 3.5}
        block_m, block_n = best_tile(m, n, costs, device)
        # wgmma takes the unpacked weights from registers, as its left operand; mma takes them as either, and the left one
        # is better only where the warps of the other order would unpack the same weights twice.
        swap = _can_swap(block_n, device) and (hopper or (block_m, block_n) == (128, 128))
        warps, stages = (8, 4 if hopper else 3) if block_m > 64 else (4, 4)
        tile = Config(block_m, block_n, 128, 1, warps, stages, swap_ab=swap)
    tiles = -(-m // tile.block_m) * -(-n // tile.block_n)
    parts = parts_for(tiles, -(-problem.k // tile.block_k), device) if tile.block_m <= 64 else 1
    return fitting(replace(tile, split_k=parts), (tile.block_m + tile.block_n) * tile.block_k, device)


def _can_swap(block_n: int, device: Device) -> bool:
    """False where Triton 3.8 compiles the swapped product to a trap: 256 features, sm_100."""
    return device.sm < 100 or block_n <= 128


def launch(
    x: Tensor, packed: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype,
    activation: str = "", residual: Tensor | None = None, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """See `fxcompress.kernels.w4a8`; ``config`` is for tests and measurements."""
    check(x, packed, x_scale, w_scale, bias, out_dtype, activation, residual)
    k, n = x.shape[-1], w_scale.shape[0]
    m = x.numel() // k
    out = x.new_empty((*x.shape[:-1], n), dtype=out_dtype)
    if out.numel() == 0:
        return out
    device = device_of(x)
    c = config or choose(Problem("w4a8", m, n, k, torch.int8), device)
    epilogue = Epilogue(x_scale, w_scale, bias, residual, activation, x_scale.dim() > 1, out_dtype == torch.int32)
    parts = parts_like(out.view(m, n), c.split_k)
    tiles = triton.cdiv(m, c.block_m) * triton.cdiv(n, c.block_n)
    with device_guard(x):
        linear_kernel[tiles, c.split_k](
            x.reshape(m, k).contiguous(), packed.contiguous(), out, parts, *epilogue.tensors(), m, n, k,
            **_constants(c, device, k % c.block_k == 0), USE_ASM=not INTERPRETED, **epilogue.constants(),
            num_warps=c.num_warps, num_stages=c.num_stages, enable_fp_fusion=False,
        )  # fmt: skip
        if c.split_k > 1:
            epilogue.add(parts, out.view(m, n), _SHIFT)
    return out


def _constants(c: Config, device: Device, even: bool) -> dict[str, Any]:
    sizes = {"BLOCK_M": c.block_m, "BLOCK_N": c.block_n, "BLOCK_K": c.block_k}
    swap = c.swap_ab and _can_swap(c.block_n, device)
    return sizes | {"SPLIT": c.split_k > 1, "SWAP": swap, "EVEN_K": even, "PIECES": pieces(c, device)}


def _case(c: Config, device: Device, epilogue: str, even: bool) -> CompileCase:
    signature, constants = EPILOGUES[epilogue]
    words = (epilogue, "swapped" if c.swap_ab else "", "" if even else "K tail", "split" if c.split_k > 1 else "")
    kinds = {"x": "*i8", "packed": "*u8", "parts": "*i32", "M": "i32", "N": "i32", "K": "i32"}
    return CompileCase(
        " ".join(filter(None, (f"w4a8 {c.block_m}x{c.block_n}x{c.block_k}", *words))),
        "w4a8",
        linear_kernel,
        signature | kinds,
        constants | _constants(c, device, even) | {"USE_ASM": True},
        c.num_warps,
        c.num_stages,
        weights=c.block_n * c.block_k,
        mma=("IMMA", "IGMMA", "UTCIMMA"),
        budget=(_BUDGET if c.block_m <= 64 else 3.0) if even else None,
        unaligned=("M",),
    )


def compile_cases(sm: int) -> list[CompileCase]:
    """Every tile for ``sm``: plain, with a K tail, with the whole epilogue, split; then the sum of the parts."""
    device, cases = ASSUMED[sm], []
    sizes = [(m, n) for m in (1, 17, 33, 65, 200, 700, 4096) for n in (512, 4096, 8192, 28672)]
    for c in distinct(choose(Problem("w4a8", m, n, 8192, torch.int8), device) for m, n in sizes):
        variants = (("fp16", True), ("fp16", False), (_FULL, True)) if c.split_k == 1 else (("fp16", True),)
        cases += [_case(c, device, epilogue, even) for epilogue, even in variants]
    return [*cases, reduce_case("w4a8", shift=_SHIFT)]
