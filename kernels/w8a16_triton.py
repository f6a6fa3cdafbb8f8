"""Triton kernels of ``w8a16_linear``."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxcompress.kernels.configs import Config, Device, Problem, device_of, lookup
from fxcompress.kernels.epilogue_triton import CompileCase
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
    bytes_beside,
    bytes_order,
    bytes_to,
    finish_or_part,
    narrowed,
    over_depth,
    over_rows,
    product,
    row_words,
    rows_of,
    tile_of,
    times,
)
from fxcompress.kernels.w4a16 import check_device
from fxcompress.kernels.w8a16 import check

__all__ = ["choose", "compile_cases", "dequantize", "dequantize_w8_kernel", "launch", "run", "w8a16_kernel"]


@triton.jit(do_not_specialize=["M"])
def w8a16_kernel(
    x, weight, scales, bias, residual, y, M, N, K,
    GROUP: tl.constexpr, SCALE: tl.constexpr, SCALE_PACK: tl.constexpr, DEPTH: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, STAGES: tl.constexpr,
    SWAP: tl.constexpr, TAIL: tl.constexpr, ATOMIC: tl.constexpr, USE_ASM: tl.constexpr,
):  # fmt: skip
    """One tile of the output, or with ``SPLIT_K`` > 1 the part of one from a range of K, unfinished, in float32.

    Args:
        x: 16-bit floats [M, K].
        weight: int8 [N, K].
        scales: Floats [groups, N].
        bias: Floats [N] or None.
        residual: Floats [M, N] or None.
        y: [M, N]; float32 [SPLIT_K, M, N] when split, float32 [M, N] to add to when ATOMIC.
        M: Rows.
        N: Output features.
        K: Input features.
        GROUP: Weights that share a scale; 0: the whole row.
        SCALE: Where it is multiplied: ``row`` (at the end), ``acc`` (each group's sum), ``weights``.
        SCALE_PACK: Scales loaded in one word.
        DEPTH: Columns loaded at once; divides BLOCK_K, and GROUP unless that is 0.
        ACTIVATION: See `activate`.
        BLOCK_M: Rows of a tile.
        BLOCK_N: Columns of a tile.
        BLOCK_K: Depth of a step.
        SPLIT_K: Parts of K.
        STAGES: Depth of the pipeline.
        SWAP: Multiply ``W x^T``.
        TAIL: BLOCK_K does not divide K.
        ATOMIC: Parts are added in any order.
        USE_ASM: False in the interpreter.
    """
    FLOAT: tl.constexpr = tl.float32 if (not USE_ASM and x.dtype.element_ty == tl.bfloat16) else x.dtype.element_ty
    pid_m, pid_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), 8)
    m0, rn = pid_m.to(tl.int64) * BLOCK_M, pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(rn, N - 1)
    m, n = over_depth(tl.arange(0, BLOCK_M), SWAP), over_rows(rn, SWAP)
    kw, kx = over_depth(tl.arange(0, DEPTH // 4), SWAP), over_rows(bytes_order(DEPTH), SWAP)
    places = over_rows((rows - pid_n * BLOCK_N) * (K // 4), SWAP) + kw
    acc = tl.zeros((BLOCK_N if SWAP else BLOCK_M, BLOCK_M if SWAP else BLOCK_N), tl.float32)
    scale_words = row_words(scales, rows, SCALE_PACK)

    steps = tl.cdiv(K, BLOCK_K)
    share = tl.cdiv(steps, SPLIT_K)
    first = tl.program_id(1) * share
    words = (weight + pid_n.to(tl.int64) * BLOCK_N * K).to(tl.pointer_type(tl.int32)) + first * (BLOCK_K // 4)
    x += m0 * K + first * BLOCK_K
    for step in tl.range(first, tl.minimum(first + share, steps), num_stages=STAGES):
        for part in tl.static_range(BLOCK_K // DEPTH):
            k = step * BLOCK_K + part * DEPTH
            at, place = words + places + part * (DEPTH // 4), x + m * K + part * DEPTH + kx
            if TAIL:
                q = tl.load(at, mask=(k // 4 + kw < K // 4) & (places >= 0), other=0, eviction_policy="evict_first")
                tile = tl.load(place, mask=(m0 + m < M) & (k + kx < K), other=0.0).to(FLOAT)
            else:
                q = tl.load(at, eviction_policy="evict_first")
                tile = tl.load(place, mask=m0 + m < M, other=0.0).to(FLOAT)
            b0, b1, b2, b3 = bytes_to(q, FLOAT, USE_ASM)
            w = bytes_beside(b0, b1, b2, b3, SWAP)
            if SCALE == "row":
                acc = product(w, tile, acc, SWAP)
            else:
                group = tl.minimum(k // GROUP, K // GROUP - 1) if TAIL else k // GROUP
                scale = tl.load(scale_words + group * (N // SCALE_PACK))
                scale = over_rows(rows_of(scale, rows, scales.dtype.element_ty, SCALE_PACK), SWAP)
                if SCALE == "acc":
                    acc += product(w, tile, tl.zeros_like(acc), SWAP) * scale.to(tl.float32)
                else:
                    acc = product(times(w, scale, USE_ASM), tile, acc, SWAP)
        words += BLOCK_K // 4
        x += BLOCK_K
    end_scales = scales if SCALE == "row" else None
    finish_or_part(acc, end_scales, bias, residual, y, m0, m, n, M, N, SPLIT_K, ATOMIC, ACTIVATION)


@triton.jit
def dequantize_w8_kernel(
    weight, scales, w, N, K, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Write 16-bit ``w`` [N, K]; the other arguments are as in `w8a16_kernel`."""
    rn = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    rk = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    mask = (rn < N) & (rk < K)
    at = rn.to(tl.int64) * K + rk
    group = rk // GROUP if GROUP > 0 else rk * 0
    scale = tl.load(scales + group.to(tl.int64) * N + rn, mask=mask, other=0.0).to(tl.float32)
    tl.store(
        w + at, narrowed(tl.load(weight + at, mask=mask, other=0).to(tl.float32) * scale, w.dtype.element_ty), mask=mask
    )


def choose(problem: Problem, device: Device) -> Config:
    """The tuned configuration, else the heuristic's."""
    return lookup(problem, device) or _heuristic(problem, device)


#: By rows of activations, up to 32.
_SMALL: Final = (
    Config(8, 128, 128, num_warps=4, num_stages=4, swap_ab=True),
    Config(16, 128, 128, num_warps=4, num_stages=4, swap_ab=True),
    Config(32, 128, 128, num_warps=4, num_stages=4, swap_ab=True),
)


def _tiles(sm: int) -> tuple[Config, ...]:
    """Tiles by rows of activations; the last is the largest that does not spill, from sm_100 on that of fewest instructions."""
    if sm >= 100:
        return (*_SMALL, Config(64, 128, 128, num_warps=4, num_stages=3, swap_ab=True))
    return (*_SMALL, Config(64, 256, 128, num_warps=8, num_stages=3, swap_ab=True))


def _heuristic(problem: Problem, device: Device) -> Config:
    if problem.m > 512:  # the library's own product is then the better part of the time
        return Config(route="dequantize")
    every = _tiles(device.sm)
    config = next((c for c in every if c.block_m >= problem.m), every[-1])
    tiles = triton.cdiv(problem.m, config.block_m) * triton.cdiv(problem.n, config.block_n)
    return replace(config, split_k=parts_of_k(tiles, problem.k, device))


def _fitting(config: Config, sm: int, group: int) -> Config:
    """Half of a wide tile where `_constants` would have to cut it into 32 columns for sm_100."""
    narrow = sm >= 100 and config.block_n > 128 and 0 < (group & -group) < 64
    return replace(config, block_n=128, num_warps=4) if narrow else config


def _constants(config: Config, sm: int, k: int, group: int, pack: int, deterministic: bool) -> dict[str, Any]:
    """Large tiles unpack few columns at a time; 32 of 256 features Triton 3.6 to 3.8 compile to a trap for sm_100."""
    if sm >= 100:
        depth = config.block_k if config.block_n <= 128 else 64
    else:
        depth = config.block_k if config.block_m < 64 else 32
    depth = min(depth, group & -group or config.block_k)
    return {"GROUP": group, "SCALE_PACK": pack} | common_constants(config, k, group, depth, deterministic)


def dequantize(weight: Tensor, scales: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """``weight * scale`` as 16-bit floats [N, K]; ``group`` 0 for the whole row."""
    n, k = weight.shape
    w = torch.empty((n, k), dtype=dtype, device=weight.device)
    block_n, block_k = 16, 256
    grid = (triton.cdiv(n, block_n), triton.cdiv(k, block_k))
    dequantize_w8_kernel[grid](weight, scales, w, n, k, group, block_n, block_k, num_warps=4)
    return w


def launch(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    group_size: int = -1,
    activation: str = "",
    residual: Tensor | None = None,
    deterministic: bool = True,
    config: Config | None = None,
) -> Tensor:
    """``w8a16_linear`` on the device of ``x``, see there; with ``config`` instead of the chosen configuration."""
    check(x, weight, scales, bias, group_size, activation, residual)
    check_device("weight", weight, x.device)
    n, k = weight.shape
    flat, end = rows_and_end(x, n, scales, bias, residual, activation)
    shape = (*x.shape[:-1], n)
    if 0 in shape:
        return x.new_empty(shape)
    config = config or choose(Problem("w8a16", flat.shape[0], n, k, x.dtype, group_size), device_of(x))
    return run(config, flat, weight, scales, end, group_size, deterministic).reshape(shape)


def run(
    config: Config, x: Tensor, weight: Tensor, scales: Tensor, end: Epilogue, group_size: int, deterministic: bool
) -> Tensor:
    """The product [M, N] with a given configuration; weights that 32-bit words cannot hold go to the library."""
    n, k = weight.shape
    weight, scales = weight.contiguous(), readable(scales)
    group = 0 if scales.shape[0] == 1 else group_size
    with torch.cuda.device_of(x):
        if config.route == "dequantize" or k % 4 or weight.data_ptr() % 4:
            return dense(x, dequantize(weight, scales, group, x.dtype), end)
        sm = device_of(x).sm
        config = _fitting(config, sm, group)
        constants = _constants(config, sm, k, group, packing(scales, n), deterministic)
        end = end._replace(scales=scales if group == 0 else None)
        return multiply(w8a16_kernel, (x, weight, scales), n, end, config, constants)


def _case(sm: int, config: Config, dtype: torch.dtype, group: int, budget: float) -> CompileCase:
    name = type_name(dtype)
    end = "*fp32" if config.split_k > 1 else f"*{name}"
    pointers = {"x": f"*{name}", "weight": "*i8", "scales": f"*{name}", "bias": f"*{name}", "y": end}
    absent = {"residual", *(("bias",) if config.split_k > 1 else ())}
    return CompileCase(
        name=f"w8a16 {name} g{group or 'row'} {describe(config)}",
        family="w8a16",
        kernel=w8a16_kernel,
        signature={**{p: t for p, t in pointers.items() if p not in absent}, "M": "i32", "N": "i32", "K": "i32"},
        constants=_constants(config, sm, 4096, group, 2, True)
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
    """Every tile with a scale a row; the small ones also with groups and split."""
    half, brain = torch.float16, torch.bfloat16
    tiles = _tiles(sm)
    small, last = tiles[1], tiles[-1]
    cases = [_case(sm, t, half, 0, 2.6 if t.block_m < 32 else 3.8) for t in tiles]
    cases += [_case(sm, t, brain, 0, 3.4 if t.block_m < 32 else 4.6) for t in tiles]
    cases += [_case(sm, small, half, g, b) for g, b in ((128, 2.6), (64, 3.3), (32, 3.7), (96, 3.7))]
    cases += [_case(sm, small, brain, 128, 3.4), _case(sm, last, half, 128, 4.5), _case(sm, last, brain, 32, 5.5)]
    cases += [_case(sm, replace(small, split_k=4), half, 0, 2.7)]
    if sm == 80:
        cases += [_case(sm, Config(16, 128, 128, num_warps=4, num_stages=4), half, 0, 2.6)]
    return [*cases, parts_case("w8a16", half, 4)]
