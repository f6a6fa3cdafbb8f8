"""Triton kernels of ``paged_attention`` (flash-decoding).

A program holds the query heads of one key head (the M side of its products) and walks over one part of the sequence;
`_combine` adds the parts in a fixed order, weighted by their log-sum-exp (Dao et al. 2023, "Flash-Decoding"). What
makes the cache cheap to read:

- Products are float16 x float16 whatever the dtype of ``q``: the integers are exact, and the other factors are
  normalized to at most 1. ``key_scale`` is multiplied into ``q``, once; ``value_scale`` into the probabilities.
- A zero point of the keys shifts all scores of a head alike, which softmax ignores: it is read with a softcap only.
- Values are loaded as 16-bit words (two or four elements): the tensor core wants two *tokens* side by side, and
  masks on words give just that, one tile per element of the word. The tiles go to separate accumulators.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxcompress.kernels.configs import ASSUMED, Config, Device, Problem, device_of, lookup
from fxcompress.kernels.epilogue_triton import INTERPRETED, CompileCase
from fxcompress.kernels.paged_attention import check_attention
from fxcompress.kernels.paged_cache_triton import (
    bytes_of,
    bytes_of_words,
    device_guard,
    nibbles_of,
    nibbles_of_words,
    write_cases,
)

__all__ = ["attention", "choose", "compile_cases"]

_FEWEST: Final = 256  # tokens in a part, where there are that many
_MOST_PARTS: Final = 128
_BLOCK_M: Final = 16  # query heads of a program; more that share a key head are several programs, which share the L2
_TILE: Final = 16  # parts that one step of the second stage adds
_USE_ASM: Final = not INTERPRETED


@triton.jit
def _span(lengths, sequence, window, capacity, parts, FEWEST: tl.constexpr, BLOCK_N: tl.constexpr):
    """First and past-the-last token attended to, tokens of a part, and whether the sequence outgrew its table."""
    length = tl.load(lengths + sequence)
    outgrown = length > capacity
    length = tl.maximum(tl.minimum(length, capacity), 0)
    first = tl.maximum(length - window, 0)
    size = tl.cdiv(tl.cdiv(length - first, parts), BLOCK_N) * BLOCK_N
    return first, length, tl.maximum(size, FEWEST), outgrown


@triton.jit
def _plane(q, key_scale, key_zero, mask, known, d, HAS_ZERO: tl.constexpr):
    """float32 ``q * key_scale`` at ``d``, its largest magnitude per row, and its product with the zero points."""
    x = tl.load(q + d[None, :], mask=mask, other=0.0).to(tl.float32)
    x = x * tl.load(key_scale + d, mask=known, other=0.0).to(tl.float32)[None, :]
    shift = tl.zeros((x.shape[0],), tl.float32)
    if HAS_ZERO:
        shift = tl.sum(x * tl.load(key_zero + d, mask=known, other=0.0).to(tl.float32)[None, :], 1)
    return x, tl.max(tl.abs(x), 1), shift


@triton.jit
def _query(q, key_scale, key_zero, mask, known, d, WIDTH: tl.constexpr, BITS: tl.constexpr, HAS_ZERO: tl.constexpr):
    """The two planes (for 8 bits twice the same) in float16, at most 1, what they were divided by, and the shift."""
    x0, top, shift = _plane(q, key_scale, key_zero, mask, known, d, HAS_ZERO)
    x1 = x0
    if BITS == 4:
        x1, top1, shift1 = _plane(q, key_scale, key_zero, mask, known, d + WIDTH, HAS_ZERO)
        top = tl.maximum(top, top1)
        shift += shift1
    top = tl.maximum(top, 1e-30)
    return (x0 / top[:, None]).to(tl.float16), (x1 / top[:, None]).to(tl.float16), top, shift


@triton.jit
def _scores(q0, q1, k, top, shift, scale, softcap, BITS: tl.constexpr, SOFTCAP: tl.constexpr, USE_ASM: tl.constexpr):
    """Scores of a tile of keys, times log2(e)."""
    LOG2E: tl.constexpr = 1.4426950408889634
    if BITS == 8:
        s = tl.dot(q0, tl.trans(bytes_of(k, USE_ASM)))
    else:
        k0, k1 = nibbles_of(k, USE_ASM)
        s = tl.dot(q0, tl.trans(k0))
        s = tl.dot(q1, tl.trans(k1), s)
    if SOFTCAP:
        s = (s * top[:, None] - shift[:, None]) * (scale * 2 * LOG2E / softcap)
        return (softcap * LOG2E) * (1.0 - 2.0 / (1.0 + tl.exp2(s)))
    else:
        return s * (top * (scale * LOG2E))[:, None]


@triton.jit
def _add(a0, a1, a2, a3, decay, w, v, largest, BITS: tl.constexpr, USE_ASM: tl.constexpr):
    """Accumulators times ``decay`` plus ``w v largest``, one per element of the words."""
    if BITS == 8:
        v0, v1 = bytes_of_words(v, USE_ASM)
    else:
        v0, v2, v1, v3 = nibbles_of_words(v, USE_ASM)
        a2 = a2 * decay + tl.dot(w, v2) * largest
        a3 = a3 * decay + tl.dot(w, v3) * largest
    return a0 * decay + tl.dot(w, v0) * largest, a1 * decay + tl.dot(w, v1) * largest, a2, a3


@triton.jit
def _store(target, x, total, outgrown, mask):
    """Write ``x / total``: 0 where nothing was summed, NaN for a sequence longer than its table."""
    y = x / tl.where(total > 0, total, 1.0)[:, None]
    y = tl.where(outgrown, float("nan"), y)
    tl.store(target, y.to(target.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["window", "max_pages", "parts"])
def _attend(
    q, keys, values, key_scale, key_zero, value_scale, page_table, lengths, out, sums, scale, softcap, window,
    max_pages, parts, key_stride, value_stride, scale_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, BITS: tl.constexpr,
    SPLIT: tl.constexpr, FEWEST: tl.constexpr, SOFTCAP: tl.constexpr, HAS_ZERO: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, USE_ASM: tl.constexpr,
):  # fmt: skip
    """One part of one sequence for the query heads of one key head."""
    WIDTH: tl.constexpr = D * BITS // 8  # bytes of a head in the cache
    WORDS: tl.constexpr = WIDTH // 2
    sequence = tl.program_id(0) // KV_HEADS
    kv = tl.program_id(0) % KV_HEADS
    part = tl.program_id(1)
    first, length, size, outgrown = _span(lengths, sequence, window, max_pages * PAGE, parts, FEWEST, BLOCK_N)
    begin = first + part * size
    if SPLIT & (begin >= length):
        return
    end = tl.minimum(begin + size, length)

    member = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    ours = member < HEADS // KV_HEADS
    row = sequence.to(tl.int64) * HEADS + kv * (HEADS // KV_HEADS) + member
    d = tl.arange(0, BLOCK_D)
    known = d < WIDTH
    q0, q1, top, shift = _query(
        q + row[:, None] * D, key_scale + kv * D, key_zero + kv * D, ours[:, None] & known[None, :], known, d,
        WIDTH, BITS, HAS_ZERO,
    )  # fmt: skip

    word = tl.arange(0, BLOCK_V)
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    a0 = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    a1, a2, a3 = a0, a0, a0
    page_table += sequence.to(tl.int64) * max_pages
    keys += kv * WIDTH + d[None, :]
    values += kv * WORDS + word[None, :]
    value_scale += kv
    for start in range(begin, end, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        inside = token < end
        page = tl.load(page_table + token // PAGE, mask=inside, other=0).to(tl.int64)
        slot = token % PAGE
        k = tl.load(
            keys + (page * key_stride + slot * (KV_HEADS * WIDTH))[:, None],
            mask=inside[:, None] & known[None, :], other=0, eviction_policy="evict_first",
        )  # fmt: skip
        v = tl.load(
            values + (page * value_stride + slot * (KV_HEADS * WORDS))[:, None],
            mask=inside[:, None] & (word < WORDS)[None, :], other=0, eviction_policy="evict_first",
        )  # fmt: skip
        step = tl.load(value_scale + page * scale_stride + slot * KV_HEADS, mask=inside, other=0.0)
        s = _scores(q0, q1, k, top, shift, scale, softcap, BITS, SOFTCAP, USE_ASM)
        s = tl.where(inside[None, :], s, float("-inf"))
        better = tl.maximum(best, tl.max(s, 1))
        decay = tl.exp2(best - better)
        p = tl.exp2(s - better[:, None])
        total = total * decay + tl.sum(p, 1)
        best = better
        largest = tl.maximum(tl.max(step, 0), 1e-30)
        w = (p * (step / largest)[None, :]).to(tl.float16)
        a0, a1, a2, a3 = _add(a0, a1, a2, a3, decay[:, None], w, v, largest, BITS, USE_ASM)

    if SPLIT:
        row = row * parts + part
        tl.store(sums + row, best + tl.log2(total), mask=ours)
    target = out + row[:, None] * D + 2 * word[None, :]
    mask = ours[:, None] & (word < WORDS)[None, :]
    _store(target, a0, total, outgrown, mask)
    _store(target + 1, a1, total, outgrown, mask)
    if BITS == 4:
        _store(target + WIDTH, a2, total, outgrown, mask)
        _store(target + WIDTH + 1, a3, total, outgrown, mask)


@triton.jit(do_not_specialize=["window", "capacity", "parts"])
def _combine(
    partial, sums, lengths, out, window, capacity, parts,
    HEADS: tl.constexpr, D: tl.constexpr, FEWEST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Add the parts of one query head, first to last."""
    row = tl.program_id(0).to(tl.int64)
    first, length, size, outgrown = _span(lengths, row // HEADS, window, capacity, parts, FEWEST, BLOCK_N)
    used = tl.cdiv(length - first, size)
    d = tl.arange(0, BLOCK_D)
    best = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    y = tl.zeros((1, BLOCK_D), tl.float32)
    for start in range(0, used, TILE):
        part = start + tl.arange(0, TILE)
        inside = part < used
        s = tl.load(sums + row * parts + part, mask=inside, other=float("-inf"))
        x = tl.load(
            partial + (row * parts + part)[:, None] * D + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0
        )
        better = tl.maximum(best, tl.max(s, 0))
        weight = tl.exp2(s - better)
        decay = tl.exp2(best - better)
        total = total * decay + tl.sum(weight, 0)
        y = y * decay[:, None] + tl.sum(x * weight[:, None], 0)[None, :]
        best = better
    _store(out + row * D + d[None, :], y, total, outgrown, (d < D)[None, :])


def choose(problem: Problem, device: Device) -> Config:
    """The configuration of a problem: from the tables, else by formula.

    The parts of a sequence depend on the batch; within one configuration a sequence's result does not.

    Args:
        problem: ``m`` = sequences x key heads, ``n`` = elements of a head, ``k`` = tokens that the page table has room
            for, ``group_size`` = query heads that share a key head.
        device: The GPU.
    """
    known = lookup(problem, device)
    if known is not None:
        return known
    words = problem.n * int(problem.family[-1]) // 16
    narrow = words <= _BLOCK_M  # a product as narrow as it is high would be computed by every warp
    warps = 1 if narrow else 4
    programs = problem.m * -(-problem.group_size // _BLOCK_M)
    wanted = triton.next_power_of_2(-(-4 * device.sm_count * (4 // warps) // programs))
    parts = min(wanted, problem.k // _FEWEST, _MOST_PARTS)
    block_n = 32 if narrow else 64 if problem.n > 128 else 128  # one warp with 64 tokens is at its limit of registers
    # with 5 stages two tiles are on their way while one is worked on, with 3 one; two programs share a multiprocessor
    stages = 5 if device.shared_memory > 200_000 or problem.n <= 128 else 3
    return Config(_BLOCK_M, block_n, split_k=max(parts, 1), num_warps=warps, num_stages=stages)


def _constants(config: Config, heads: int, kv_heads: int, d: int, page: int, bits: int) -> dict[str, int | bool]:
    """The constants that `_attend` has in every case."""
    width = d * bits // 8
    return {
        "HEADS": heads, "KV_HEADS": kv_heads, "D": d, "PAGE": page, "BITS": bits, "SPLIT": config.split_k > 1,
        "FEWEST": _FEWEST, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        "BLOCK_D": max(triton.next_power_of_2(width), 16), "BLOCK_V": max(triton.next_power_of_2(width // 2), 16),
        "USE_ASM": _USE_ASM,
    }  # fmt: skip


def attention(
    q: Tensor, keys: Tensor, values: Tensor, key_scale: Tensor, value_scale: Tensor, page_table: Tensor,
    lengths: Tensor, scale: float, bits: int, key_zero: Tensor | None = None, window: int = 0, softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    """``torch.ops.fxcompress.paged_attention`` on a CUDA device."""
    kinds = (torch.float16, torch.bfloat16)
    check_attention(
        q, keys, values, key_scale, value_scale, page_table, lengths, bits, key_zero, window, softcap, kinds
    )
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    (batch, heads, d), kv_heads = q.shape, key_scale.shape[0]
    page, capacity = keys.shape[1], page_table.shape[1] * keys.shape[1]
    group = heads // kv_heads
    config = choose(Problem(f"paged_attention_int{bits}", batch * kv_heads, d, capacity, q.dtype, group), device_of(q))
    parts = config.split_k
    partial = torch.empty((batch, heads, parts, d) if parts > 1 else 0, dtype=torch.float32, device=q.device)
    sums = torch.empty((batch, heads, parts) if parts > 1 else 0, dtype=torch.float32, device=q.device)
    key_scale, lengths, words = key_scale.contiguous(), lengths.contiguous(), values.view(torch.int16)
    zeros = key_scale if key_zero is None else key_zero.contiguous()
    last = window or 2**31 - 1
    with device_guard(q):
        _attend[(batch * kv_heads, parts, triton.cdiv(group, config.block_m))](
            q.contiguous(), keys, words, key_scale, zeros, value_scale, page_table.contiguous(), lengths,
            partial if parts > 1 else out, sums, scale, softcap, last, page_table.shape[1], parts,
            keys.stride(0), words.stride(0), value_scale.stride(0),
            SOFTCAP=softcap > 0, HAS_ZERO=softcap > 0 and key_zero is not None,
            **_constants(config, heads, kv_heads, d, page, bits),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        if parts > 1:
            _combine[(batch * heads,)](
                partial, sums, lengths, out, last, capacity, parts, heads, d, _FEWEST, config.block_n,
                triton.next_power_of_2(d), _TILE, num_warps=4,
            )  # fmt: skip
    return out


# ------------------------------------------------------------------------------------------------ compiling without a GPU
#: bits, elements of a head, query heads, key heads, dtype, tokens of a page, softcap, instructions per element
_SHAPES: Final = (
    (8, 128, 32, 8, "fp16", 16, False, 4.6),
    (8, 128, 32, 8, "bf16", 16, True, 5.2),
    (8, 64, 32, 32, "fp16", 16, False, 6.0),
    (8, 80, 32, 32, "fp16", 16, False, 7.6),
    (8, 96, 32, 32, "fp16", 32, False, 6.4),
    (8, 256, 16, 1, "bf16", 16, False, 6.0),
    (8, 128, 64, 1, "fp16", 128, False, 4.7),
    (4, 128, 32, 8, "fp16", 16, False, 3.9),
    (4, 128, 32, 8, "bf16", 16, True, 4.6),
    (4, 64, 32, 32, "fp16", 16, False, 5.0),
    (4, 80, 32, 32, "fp16", 16, False, 7.5),
    (4, 96, 32, 32, "fp16", 32, False, 5.5),
    (4, 256, 16, 1, "bf16", 16, False, 4.9),
    (4, 128, 64, 1, "fp16", 128, False, 4.1),
)


def compile_cases(sm: int) -> list[CompileCase]:
    """What `choose` gives for the heads of today's models, with a sequence in several parts and in one."""
    found = [*write_cases(), _combine_case()]
    for bits, d, heads, kv_heads, kind, page, softcap, budget in _SHAPES:
        for batch in (1, 1024) if (d, heads) == (128, 32) else (1,):
            dtype = torch.float16 if kind == "fp16" else torch.bfloat16
            problem = Problem(f"paged_attention_int{bits}", batch * kv_heads, d, 32768, dtype, heads // kv_heads)
            config = choose(problem, ASSUMED[sm])
            constants = _constants(config, heads, kv_heads, d, page, bits) | {"USE_ASM": True}
            found.append(_attend_case(config, constants, kind, softcap, budget))
    return found


def _attend_case(
    config: Config, constants: dict[str, int | bool], kind: str, softcap: bool, budget: float
) -> CompileCase:
    bits, d = constants["BITS"], constants["D"]
    signature = {
        "q": f"*{kind}", "keys": "*i8" if bits == 8 else "*u8", "values": "*i16", "key_scale": "*fp32",
        "key_zero": "*fp32", "value_scale": "*fp32", "page_table": "*i32", "lengths": "*i32",
        "out": "*fp32" if config.split_k > 1 else f"*{kind}", "sums": "*fp32", "scale": "fp32", "softcap": "fp32",
        "window": "i32", "max_pages": "i32", "parts": "i32", "key_stride": "i32", "value_stride": "i32", "scale_stride": "i32",
    }  # fmt: skip
    name = f"paged_attention int{bits} {kind} d{d} {constants['HEADS']}/{constants['KV_HEADS']} heads"
    return CompileCase(
        f"{name}{' softcap' if softcap else ''} {config.block_m}x{config.block_n} parts {config.split_k}",
        "paged_attention",
        _attend,
        signature,
        constants | {"SOFTCAP": softcap, "HAS_ZERO": softcap},
        config.num_warps,
        config.num_stages,
        weights=2 * config.block_n * d,
        mma=("HMMA",),
        budget=budget,
        asynchronous=d * bits % 128 == 0,  # rows of 40 bytes come in pieces of 8
    )


def _combine_case() -> CompileCase:
    signature = {
        "partial": "*fp32", "sums": "*fp32", "lengths": "*i32", "out": "*fp16", "window": "i32", "capacity": "i32",
        "parts": "i32",
    }  # fmt: skip
    constants = {"HEADS": 32, "D": 128, "FEWEST": _FEWEST, "BLOCK_N": 128, "BLOCK_D": 128, "TILE": _TILE}
    return CompileCase(
        "paged_attention sum of parts fp16", "paged_attention", _combine, signature, constants, asynchronous=False
    )
