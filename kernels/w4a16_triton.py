"""Triton kernels of ``w4a16_linear``."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxcompress.kernels.configs import Config, Device, Problem, device_of, lookup
from fxcompress.kernels.epilogue_triton import INTERPRETED, CompileCase
from fxcompress.kernels.gemm_launch_triton import (
    Epilogue,
    common_constants,
    dense,
    describe,
    multiply,
    packing,
    parts_case,
    parts_of_k,
    readable,
    rows_and_end,
    type_name,
)
from fxcompress.kernels.gemm_triton import (
    finish_or_part,
    four_beside,
    narrowed,
    nibbles_to,
    over_depth,
    over_rows,
    product,
    row_words,
    rows_of,
    tile_of,
    times,
    two_beside,
)
from fxcompress.kernels.w4a16 import check, check_device

__all__ = ["choose", "compile_cases", "dequantize", "dequantize_w4_kernel", "launch", "run", "w4a16_kernel"]


@triton.jit
def _of_plane(words, rows, block, PLANE: tl.constexpr, N, K, GROUP: tl.constexpr, DTYPE: tl.constexpr, PACK: tl.constexpr,
              SWAP: tl.constexpr, TAIL: tl.constexpr):  # fmt: skip
    """Scales or zero points of a plane of a block for the rows of the tile, shaped to broadcast."""
    if GROUP == 0:
        values = tl.load(words)
    else:
        if GROUP % 128 == 0:
            group = block // (GROUP // 128)
        else:
            group = (block * 128 + PLANE * 32) // GROUP
        if TAIL:
            group = tl.minimum(group, K // GROUP - 1)
        values = tl.load(words + group * (N // PACK))
    return over_rows(rows_of(values, rows, DTYPE, PACK), SWAP)


@triton.jit
def _of_block(words, rows, block, N, K, GROUP: tl.constexpr, DTYPE: tl.constexpr, PACK: tl.constexpr,
              SWAP: tl.constexpr, TAIL: tl.constexpr):  # fmt: skip
    """Scales or zero points of the four planes of a block."""
    a = _of_plane(words, rows, block, 0, N, K, GROUP, DTYPE, PACK, SWAP, TAIL)
    if GROUP % 128 == 0:
        return a, a, a, a
    c = _of_plane(words, rows, block, 2, N, K, GROUP, DTYPE, PACK, SWAP, TAIL)
    if GROUP % 64 == 0:
        return a, a, c, c
    b = _of_plane(words, rows, block, 1, N, K, GROUP, DTYPE, PACK, SWAP, TAIL)
    d = _of_plane(words, rows, block, 3, N, K, GROUP, DTYPE, PACK, SWAP, TAIL)
    return a, b, c, d


@triton.jit
def _words(packed, places, block, blocks, GUARD: tl.constexpr):
    """The words of a block; GUARD: zeros beyond the last."""
    if GUARD:
        return tl.load(packed + places, mask=places * 0 + block < blocks, other=0, eviction_policy="evict_first")
    else:
        return tl.load(packed + places, eviction_policy="evict_first")


@triton.jit
def _operand(w, PART: tl.constexpr, DEPTH: tl.constexpr, SWAP: tl.constexpr):
    """Planes beside each other: columns PART * DEPTH and following of a block."""
    if DEPTH == 128:
        return four_beside(w[0], w[1], w[2], w[3], SWAP)
    elif DEPTH == 64:
        return two_beside(w[2 * PART], w[2 * PART + 1], SWAP)
    else:
        return w[PART]


@triton.jit
def _scaled(w, scale, USE_ASM: tl.constexpr):
    return (
        times(w[0], scale[0], USE_ASM),
        times(w[1], scale[1], USE_ASM),
        times(w[2], scale[2], USE_ASM),
        times(w[3], scale[3], USE_ASM),
    )


@triton.jit(do_not_specialize=["M"])
def w4a16_kernel(
    x, packed, scales, zeros, bias, residual, y, M, N, K,
    GROUP: tl.constexpr, SCALE: tl.constexpr, SCALE_PACK: tl.constexpr, ZERO_PACK: tl.constexpr, DEPTH: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
    STAGES: tl.constexpr, SWAP: tl.constexpr, TAIL: tl.constexpr, ATOMIC: tl.constexpr, USE_ASM: tl.constexpr,
):  # fmt: skip
    """One tile of the output, or with ``SPLIT_K`` > 1 the part of one from a range of K, unfinished, in float32.

    Args:
        x: 16-bit floats [M, K].
        packed: int16 [ceil(K / 128), N, 32], layout ``planes4``.
        scales: Floats [groups, N].
        zeros: uint8 [groups, N] or None.
        bias: Floats [N] or None.
        residual: Floats [M, N] or None.
        y: [M, N]; float32 [SPLIT_K, M, N] when split, float32 [M, N] to add to when ATOMIC.
        M: Rows.
        N: Output features.
        K: Input features.
        GROUP: Weights that share a scale; 0: the whole row.
        SCALE: Where it is multiplied: ``row`` (at the end), ``acc`` (each group's sum), ``weights``.
        SCALE_PACK: Scales loaded in one word.
        ZERO_PACK: Zero points loaded in one word.
        DEPTH: Columns of a product: 128, 64 or 32; divides GROUP where SCALE is ``acc``.
        ACTIVATION: See `activate`.
        BLOCK_M: Rows of a tile.
        BLOCK_N: Columns of a tile.
        BLOCK_K: 128 or a multiple.
        SPLIT_K: Parts of K.
        STAGES: Depth of the pipeline.
        SWAP: Multiply ``W x^T``.
        TAIL: BLOCK_K does not divide K.
        ATOMIC: Parts are added in any order.
        USE_ASM: False in the interpreter.
    """
    FLOAT: tl.constexpr = tl.float32 if (not USE_ASM and x.dtype.element_ty == tl.bfloat16) else x.dtype.element_ty
    tl.static_assert(BLOCK_K % 128 == 0, "a step takes whole blocks")
    BLOCKS: tl.constexpr = BLOCK_K // 128
    pid_m, pid_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), 8)
    m0, rn = pid_m.to(tl.int64) * BLOCK_M, pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(rn, N - 1)
    m, n = over_depth(tl.arange(0, BLOCK_M), SWAP), over_rows(rn, SWAP)
    places = over_rows(rows * 32, SWAP) + over_depth(tl.arange(0, 32), SWAP)
    kx = over_rows(tl.arange(0, DEPTH), SWAP)
    acc = tl.zeros((BLOCK_N if SWAP else BLOCK_M, BLOCK_M if SWAP else BLOCK_N), tl.float32)
    scale_words = row_words(scales, rows, SCALE_PACK)
    if zeros is None:
        row_zero = (tl.full([1, 1], 8, tl.int16),) * 4
    else:
        zero_words = row_words(zeros, rows, ZERO_PACK)
        row_zero = _of_block(zero_words, rows, 0, N, K, 0, tl.int16, ZERO_PACK, SWAP, TAIL)

    blocks = tl.cdiv(K, 128)
    steps = tl.cdiv(blocks, BLOCKS)
    share = tl.cdiv(steps, SPLIT_K)
    first = tl.program_id(1) * share
    packed += (first * BLOCKS).to(tl.int64) * (N * 32)
    x += m0 * K + first * BLOCK_K
    for step in tl.range(first, tl.minimum(first + share, steps), num_stages=STAGES):
        for b in tl.static_range(BLOCKS):
            block = step * BLOCKS + b
            words = _words(packed, places, block, blocks, TAIL and b > 0)
            if zeros is not None and GROUP > 0:
                zero = _of_block(zero_words, rows, block, N, K, GROUP, tl.int16, ZERO_PACK, SWAP, TAIL)
            else:
                zero = row_zero
            w = nibbles_to(words, zero[0], zero[1], zero[2], zero[3], FLOAT, USE_ASM)
            if GROUP > 0:
                scale = _of_block(
                    scale_words, rows, block, N, K, GROUP, scales.dtype.element_ty, SCALE_PACK, SWAP, TAIL
                )
                w = _scaled(w, scale, USE_ASM) if SCALE == "weights" else w
            for part in tl.static_range(128 // DEPTH):
                mask = (m0 + m < M) & (block * 128 + part * DEPTH + kx < K) if TAIL else m0 + m < M
                tile = tl.load(x + m * K + part * DEPTH + kx, mask=mask, other=0.0).to(FLOAT)
                weights = _operand(w, part, DEPTH, SWAP)
                if SCALE == "acc":
                    acc += product(weights, tile, tl.zeros_like(acc), SWAP) * scale[part * DEPTH // 32].to(tl.float32)
                else:
                    acc = product(weights, tile, acc, SWAP)
            packed += N * 32
            x += 128
    end_scales = scales if SCALE == "row" else None
    finish_or_part(acc, end_scales, bias, residual, y, m0, m, n, M, N, SPLIT_K, ATOMIC, ACTIVATION)


@triton.jit
def dequantize_w4_kernel(
    packed, scales, zeros, w, N, K,
    GROUP: tl.constexpr, SCALE_PACK: tl.constexpr, ZERO_PACK: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr,
    USE_ASM: tl.constexpr,
):  # fmt: skip
    """Write 16-bit ``w`` [N, K], a block of 128 columns a program; the other arguments are as in `w4a16_kernel`."""
    FLOAT: tl.constexpr = tl.float32 if (not USE_ASM and w.dtype.element_ty == tl.bfloat16) else w.dtype.element_ty
    block = tl.program_id(0)
    rn = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, lane = tl.minimum(rn, N - 1), tl.arange(0, 32)[None, :]
    words = tl.load(packed + block.to(tl.int64) * (N * 32) + rows[:, None] * 32 + lane)
    scale = _of_block(
        row_words(scales, rows, SCALE_PACK), rows, block, N, K, GROUP, scales.dtype.element_ty, SCALE_PACK, True, TAIL
    )
    if zeros is None:
        zero = (tl.full([1, 1], 8, tl.int16),) * 4
    else:
        zero = _of_block(row_words(zeros, rows, ZERO_PACK), rows, block, N, K, GROUP, tl.int16, ZERO_PACK, True, TAIL)
    planes = nibbles_to(words, zero[0], zero[1], zero[2], zero[3], FLOAT, USE_ASM)
    for plane in tl.static_range(4):
        k = block * 128 + plane * 32 + lane
        mask = (rn[:, None] < N) & (k < K)
        tl.store(
            w + rn[:, None].to(tl.int64) * K + k,
            narrowed(times(planes[plane], scale[plane], USE_ASM), w.dtype.element_ty),
            mask=mask,
        )


def choose(problem: Problem, device: Device) -> Config:
    """The tuned configuration, else the heuristic's."""
    return lookup(problem, device) or _heuristic(problem, device)


def _heuristic(problem: Problem, device: Device) -> Config:
    if problem.m > 512:  # the library's own product is then the better part of the time
        return Config(route="dequantize")
    config = next((c for c in _tiles(device.sm) if c.block_m >= problem.m), _tiles(device.sm)[-1])
    tiles = triton.cdiv(problem.m, config.block_m) * triton.cdiv(problem.n, config.block_n)
    return replace(config, split_k=parts_of_k(tiles, problem.k, device))


def _tiles(sm: int) -> list[Config]:
    """Tiles by rows of activations; those for 64 rows and more are the largest that do not spill.

    From sm_100 on, a swapped product of few rows would pass through tensor memory and registers again at every step.
    """
    if sm >= 100:
        small = [Config(16, 128, 256, num_warps=4, num_stages=3)]
    else:
        deep, stages = (256, 3) if sm == 90 else (128, 4)
        small = [Config(m, 128, deep, num_warps=4, num_stages=stages, swap_ab=True) for m in (8, 16)]
    return [
        *small,
        Config(32, 128, 128, num_warps=4, num_stages=4, swap_ab=True),
        Config(64, 128, 128, num_warps=4, num_stages=4, swap_ab=True),
        Config(128 if sm == 90 else 64, 256, 128, num_warps=8, num_stages=3, swap_ab=True),
    ]


def _fitting(config: Config, group: int, zeros: bool) -> Config:
    """The largest tile leaves no registers for zero points or several scales a block: half of it."""
    large = config.block_m * config.block_n > 128 * 128
    return replace(config, block_m=64) if large and (zeros or group % 128) else config


def _constants(config: Config, k: int, group: int, packs: tuple[int, int], deterministic: bool) -> dict[str, Any]:
    own = {"GROUP": group, "SCALE_PACK": packs[0], "ZERO_PACK": packs[1]}
    # Of several products in a step Triton gives every warp weights of its own; of one it lets two warps dequantize the same.
    return own | common_constants(config, k, group, 64 if config.block_m >= 64 else 128, deterministic)


def dequantize(packed: Tensor, scales: Tensor, zeros: Tensor | None, k: int, group: int, dtype: torch.dtype) -> Tensor:
    """``(q - zero) * scale`` as 16-bit floats [N, K]; arguments as in `launch`, ``group`` 0 for the whole row."""
    n = packed.shape[1]
    w = torch.empty((n, k), dtype=dtype, device=packed.device)
    packs = packing(scales, n), 1 if zeros is None else packing(zeros, n)
    grid = (packed.shape[0], triton.cdiv(n, 128))
    dequantize_w4_kernel[grid](
        packed, scales, zeros, w, n, k, group, *packs, 128, k % 128 != 0, not INTERPRETED, num_warps=4
    )
    return w


def launch(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    activation: str = "",
    residual: Tensor | None = None,
    deterministic: bool = True,
    config: Config | None = None,
) -> Tensor:
    """``w4a16_linear`` on the device of ``x``, see there; with ``config`` instead of the chosen configuration."""
    check(x, packed, scales, zeros, bias, group_size, activation, residual)
    n, k = packed.shape[1], x.shape[-1]
    check_device("packed", packed, x.device)
    check_device("zeros", zeros, x.device)
    flat, end = rows_and_end(x, n, scales, bias, residual, activation)
    shape = (*x.shape[:-1], n)
    if 0 in shape:
        return x.new_empty(shape)
    config = config or choose(Problem("w4a16", flat.shape[0], n, k, x.dtype, group_size), device_of(x))
    return run(config, flat, packed, scales, zeros, end, group_size, deterministic).reshape(shape)


def run(
    config: Config, x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, end: Epilogue, group_size: int,
    deterministic: bool,
) -> Tensor:  # fmt: skip
    """The product [M, N] with a given configuration."""
    n, k = packed.shape[1], x.shape[1]
    packed, scales = packed.contiguous(), readable(scales)
    zeros = None if zeros is None else zeros.contiguous()
    group = 0 if scales.shape[0] == 1 else group_size
    with torch.cuda.device_of(x):
        if config.route == "dequantize":
            return dense(x, dequantize(packed, scales, zeros, k, group, x.dtype), end)
        packs = packing(scales, n), 1 if zeros is None else packing(zeros, n)
        config = _fitting(config, group, zeros is not None)
        constants = _constants(config, k, group, packs, deterministic)
        end = end._replace(scales=scales if group == 0 else None)
        return multiply(w4a16_kernel, (x, packed, scales, zeros), n, end, config, constants)


def _case(sm: int, config: Config, dtype: torch.dtype, group: int, zeros: bool, budget: float) -> CompileCase:
    name = type_name(dtype)
    end = "*fp32" if config.split_k > 1 else f"*{name}"
    pointers = {"x": f"*{name}", "packed": "*i16", "scales": f"*{name}", "zeros": "*u8", "bias": f"*{name}", "y": end}
    absent = {"residual", *(() if zeros else ("zeros",)), *(("bias",) if config.split_k > 1 else ())}
    return CompileCase(
        name=f"w4a16 {name} g{group or 'row'}{' zeros' if zeros else ''} {describe(config)}",
        family="w4a16",
        kernel=w4a16_kernel,
        signature={**{p: t for p, t in pointers.items() if p not in absent}, "M": "i32", "N": "i32", "K": "i32"},
        constants=_constants(config, 4096, group, (2, 4), True)
        | dict.fromkeys(absent)
        | {"ACTIVATION": "", "USE_ASM": True},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        weights=config.block_n * config.block_k,
        mma=("HMMA", "HGMMA", "UTCHMMA"),
        budget=budget if sm < 100 else None,
        unaligned=("M",),
    )


def compile_cases(sm: int) -> list[CompileCase]:
    """Every tile; the small ones also with the other groups, zero points and split."""
    half, brain = torch.float16, torch.bfloat16
    tiles = _tiles(sm)
    small, last = next(t for t in tiles if t.block_m == 16), tiles[-1]
    cases = [_case(sm, t, half, 128, False, 2.6 if t.block_m < 32 else 3.8) for t in tiles]
    cases += [_case(sm, t, brain, 128, False, 2.6 if t.block_m < 32 else 4.1) for t in tiles]
    cases += [_case(sm, small, half, g, z, 2.6) for g, z in ((128, True), (0, False), (0, True), (64, False))]
    cases += [_case(sm, small, half, g, True, 4.0) for g in (64, 32, 96)]
    cases += [_case(sm, small, brain, 128, True, 2.8), _case(sm, tiles[0], brain, 128, True, 2.6)]
    cases += [_case(sm, tiles[0], half, 32, False, 3.1)]
    cases += [_case(sm, _fitting(last, g, False), d, g, False, 4.7) for d, g in ((half, 32), (half, 0), (brain, 64))]
    cases += [_case(sm, _fitting(last, g, True), d, g, True, 5.5) for d, g in ((half, 128), (brain, 32))]
    cases += [_case(sm, replace(small, split_k=4), half, 128, False, 2.6)]
    if sm == 80:
        cases += [_case(sm, Config(16, 128, 128, num_warps=4, num_stages=4), half, 128, False, 2.6)]
    return list({c.name: c for c in [*cases, parts_case("w4a16", half, 4)]}.values())
