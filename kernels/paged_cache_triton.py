"""Triton: the elements of a quantized KV cache as float16, and the kernel of ``paged_cache_write``."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxcompress.kernels.epilogue_triton import CompileCase
from fxcompress.kernels.paged_attention import check_write

__all__ = ["bytes_of", "bytes_of_words", "device_guard", "nibbles_of", "nibbles_of_words", "write", "write_cases"]


def device_guard(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launch on the device of ``x``, whichever is current."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@triton.jit
def bytes_of(w, USE_ASM: tl.constexpr):
    """float16 of int8 ``w``."""
    if USE_ASM:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 b, c;
            mov.b32 c, 0x64806480;
            xor.b32 b, $2, 0x80808080;
            prmt.b32 $0, b, 0x64646464, 0x4140;
            prmt.b32 $1, b, 0x64646464, 0x4342;
            sub.f16x2 $0, $0, c;
            sub.f16x2 $1, $1, c;
            }""",
            "=r,=r,r",
            [w],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )
    else:
        return (((w.to(tl.int16) ^ 0x80) & 0xFF) | 0x6400).to(tl.float16, bitcast=True) - 1152.0


@triton.jit
def nibbles_of(w, USE_ASM: tl.constexpr):
    """float16 of the low and of the high nibbles of uint8 ``w``, less 8."""
    if USE_ASM:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, c, d, e;
            mov.b32 c, 0x64086408;
            mov.b32 d, 0x2c002c00;
            mov.b32 e, 0xd480d480;
            and.b32 a, $4, 0x0f0f0f0f;
            and.b32 b, $4, 0xf0f0f0f0;
            prmt.b32 $0, a, 0x64646464, 0x4140;
            prmt.b32 $1, a, 0x64646464, 0x4342;
            prmt.b32 $2, b, 0x64646464, 0x4140;
            prmt.b32 $3, b, 0x64646464, 0x4342;
            sub.f16x2 $0, $0, c;
            sub.f16x2 $1, $1, c;
            fma.rn.f16x2 $2, $2, d, e;
            fma.rn.f16x2 $3, $3, d, e;
            }""",
            "=r,=r,=r,=r,r",
            [w],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    else:
        u = w.to(tl.int16)
        low = ((u & 15) | 0x6400).to(tl.float16, bitcast=True) - 1032.0
        high = ((u >> 4) | 0x6400).to(tl.float16, bitcast=True) - 1032.0
        return low, high


@triton.jit
def bytes_of_words(w, USE_ASM: tl.constexpr):
    """float16 of the first and of the second signed byte of int16 ``w``."""
    if USE_ASM:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 c, h;
            mov.b32 c, 0x64806480;
            shr.u32 h, $2, 8;
            lop3.b32 $0, $2, 0x00ff00ff, c, 0x6a;
            lop3.b32 $1, h, 0x00ff00ff, c, 0x6a;
            sub.f16x2 $0, $0, c;
            sub.f16x2 $1, $1, c;
            }""",
            "=r,=r,r",
            [w],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        first = ((w & 0xFF) ^ 0x6480).to(tl.float16, bitcast=True) - 1152.0
        second = (((w >> 8) & 0xFF) ^ 0x6480).to(tl.float16, bitcast=True) - 1152.0
        return first, second


@triton.jit
def nibbles_of_words(w, USE_ASM: tl.constexpr):
    """float16 of the four nibbles of int16 ``w``, less 8: low and high of the first byte, of the second."""
    if USE_ASM:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 c, d, e, h;
            mov.b32 c, 0x64086408;
            mov.b32 d, 0x2c002c00;
            mov.b32 e, 0xd480d480;
            lop3.b32 $0, $4, 0x000f000f, 0x64006400, 0xea;
            lop3.b32 $1, $4, 0x00f000f0, 0x64006400, 0xea;
            shr.u32 h, $4, 8;
            lop3.b32 $2, h, 0x000f000f, 0x64006400, 0xea;
            lop3.b32 $3, h, 0x00f000f0, 0x64006400, 0xea;
            sub.f16x2 $0, $0, c;
            fma.rn.f16x2 $1, $1, d, e;
            sub.f16x2 $2, $2, c;
            fma.rn.f16x2 $3, $3, d, e;
            }""",
            "=r,=r,=r,=r,r",
            [w],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        a = ((w & 15) | 0x6400).to(tl.float16, bitcast=True) - 1032.0
        b = (((w >> 4) & 15) | 0x6400).to(tl.float16, bitcast=True) - 1032.0
        c = (((w >> 8) & 15) | 0x6400).to(tl.float16, bitcast=True) - 1032.0
        d = (((w >> 12) & 15) | 0x6400).to(tl.float16, bitcast=True) - 1032.0
        return a, b, c, d


@triton.jit
def _rounded(x, LOW: tl.constexpr, HIGH: tl.constexpr):
    """``x`` clamped and rounded half to even, still float32: 1.5 * 2**23 leaves no room for a fraction."""
    return (tl.minimum(tl.maximum(x, LOW), HIGH) + 12582912.0) - 12582912.0


@triton.jit
def _key(k, key_scale, key_zero, mask, LOW: tl.constexpr, HIGH: tl.constexpr, HAS_ZERO: tl.constexpr):
    x = tl.load(k, mask=mask, other=0.0).to(tl.float32)
    x = tl.div_rn(x, tl.load(key_scale, mask=mask, other=1.0).to(tl.float32))
    if HAS_ZERO:
        x += tl.load(key_zero, mask=mask, other=0.0).to(tl.float32)
    return _rounded(x, LOW, HIGH)


@triton.jit
def _nibble_pair(low, high):
    return (low.to(tl.int32) + 8) | ((high.to(tl.int32) + 8) << 4)


@triton.jit
def _write(
    k, v, keys, values, key_scale, key_zero, value_scale, slots, capacity,
    k_token, k_head, v_token, v_head, key_stride, value_stride, scale_stride,
    HEADS: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, BITS: tl.constexpr, HAS_ZERO: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One token, ``BLOCK_H`` heads."""
    WIDTH: tl.constexpr = D * BITS // 8
    HIGH: tl.constexpr = 127 if BITS == 8 else 7
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if (slot < 0) | (slot >= capacity):
        return
    page = slot // PAGE
    place = (slot % PAGE) * HEADS
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    mask = (head < HEADS)[:, None] & (d < WIDTH)[None, :]
    channel = (head * D)[:, None] + d[None, :]
    k += token * k_token + (head * k_head)[:, None] + d[None, :]
    v += token * v_token + (head * v_head)[:, None] + d[None, :]
    into = (place + head)[:, None] * WIDTH + d[None, :]

    key = _key(k, key_scale + channel, key_zero + channel, mask, -HIGH - 1, HIGH, HAS_ZERO)
    value = tl.load(v, mask=mask, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(value), 1)
    if BITS == 4:
        channel += WIDTH
        key1 = _key(k + WIDTH, key_scale + channel, key_zero + channel, mask, -HIGH - 1, HIGH, HAS_ZERO)
        value1 = tl.load(v + WIDTH, mask=mask, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(value1), 1))
    step = tl.div_rn(largest, tl.full(largest.shape, HIGH, tl.float32))
    divisor = tl.broadcast_to(tl.where(step > 0, step, 1.0)[:, None], value.shape)
    value = _rounded(tl.div_rn(value, divisor), -HIGH - 1, HIGH)
    if BITS == 4:
        key = _nibble_pair(key, key1)
        value = _nibble_pair(value, _rounded(tl.div_rn(value1, divisor), -HIGH - 1, HIGH))
    tl.store(keys + page * key_stride + into, key.to(keys.dtype.element_ty), mask=mask)
    tl.store(values + page * value_stride + into, value.to(values.dtype.element_ty), mask=mask)
    tl.store(value_scale + page * scale_stride + place + head, step, mask=head < HEADS)


def _blocks(heads: int, d: int, bits: int) -> tuple[int, int]:
    """Heads of a program, and bytes of a head, each rounded up to a power of two."""
    width = triton.next_power_of_2(d * bits // 8)
    return min(triton.next_power_of_2(heads), max(1, 4096 // width)), width


def write(
    k: Tensor, v: Tensor, keys: Tensor, values: Tensor, key_scale: Tensor, value_scale: Tensor, slots: Tensor,
    bits: int, key_zero: Tensor | None = None,
) -> None:  # fmt: skip
    """``torch.ops.fxcompress.paged_cache_write`` on a CUDA device."""
    check_write(k, v, keys, values, key_scale, value_scale, slots, bits, key_zero)
    tokens, heads, d = k.shape
    if not tokens:
        return
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    key_scale = key_scale.contiguous()
    zero = key_scale if key_zero is None else key_zero.contiguous()
    block_h, block_d = _blocks(heads, d, bits)
    with device_guard(k):
        _write[(tokens, triton.cdiv(heads, block_h))](
            k, v, keys, values, key_scale, zero, value_scale, slots.contiguous(), keys.shape[0] * keys.shape[1],
            k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            keys.stride(0), values.stride(0), value_scale.stride(0),
            heads, d, keys.shape[1], bits, key_zero is not None, block_h, block_d,
            num_warps=4,
        )  # fmt: skip


def write_cases() -> list[CompileCase]:
    """The kernel for 8 heads of 128 elements and 32 of 80."""
    strides = ("k_token", "k_head", "v_token", "v_head", "key_stride", "value_stride", "scale_stride", "capacity")
    found = []
    for bits, heads, d, dtype in ((8, 8, 128, "fp16"), (4, 8, 128, "bf16"), (4, 32, 80, "fp16")):
        stored = "*i8" if bits == 8 else "*u8"
        block_h, block_d = _blocks(heads, d, bits)
        signature = dict.fromkeys(strides, "i32") | {
            "k": f"*{dtype}", "v": f"*{dtype}", "keys": stored, "values": stored, "key_scale": "*fp32",
            "key_zero": "*fp32", "value_scale": "*fp32", "slots": "*i64",
        }  # fmt: skip
        constants = {
            "HEADS": heads, "D": d, "PAGE": 16, "BITS": bits, "HAS_ZERO": bits == 4, "BLOCK_H": block_h,
            "BLOCK_D": block_d,
        }  # fmt: skip
        found.append(
            CompileCase(
                f"paged_cache_write int{bits} {heads}x{d} {dtype}",
                "paged_attention",
                _write,
                signature,
                constants,
                asynchronous=False,
            )
        )
    return found
