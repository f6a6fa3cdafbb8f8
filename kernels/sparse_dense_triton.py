"""Packed 2:4 weights written out as a dense matrix: what runs where the sparse tensor cores do not."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxcompress.kernels.epilogue_triton import CompileCase
from fxcompress.kernels.int8_triton import device_guard
from fxcompress.kernels.sparse_common import F16, I8, Kind, Packed
from fxcompress.kernels.sparse_layout import TILE, depth

__all__ = ["decompress", "dense_cases", "dense_kernel"]


@triton.jit
def _sixteen_bits(value, DTYPE: tl.constexpr):
    """The bits of float32 ``value`` rounded to DTYPE, in the low half of an int64."""
    if DTYPE.is_bf16():  # by hand: the interpreter has no bfloat16
        bits = value.to(tl.int32, bitcast=True).to(tl.int64)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF
    else:
        return value.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF


@triton.jit
def _spread(first, second, nibble, BITS: tl.constexpr):
    """A group of four: ``first`` and ``second`` (int64, BITS wide) at the places that the nibble tells."""
    return (first << (nibble & 3) * BITS) | (second << (nibble >> 2) * BITS)


@triton.jit
def dense_kernel(
    values, meta, scales, dense, N, VECTORS, METAS, GROUPS, GROUP: tl.constexpr, KIND: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write packed weights as a dense matrix. Programs: (tiles of 16 rows, blocks of words).

    Args:
        values: 32-bit words [tiles, VECTORS, 32, 4].
        meta: int32 [tiles, METAS, 32].
        scales: Floats [GROUPS, N], or None.
        dense: 64-bit words of the result: [16 tiles, K'].
        N: Output features.
        VECTORS: 16-byte pieces of values in K.
        METAS: Words of metadata in K.
        GROUPS: Groups of scales.
        GROUP: Steps of 32 along K that share a scale.
        KIND: ``f16``, ``i8``, ``w4``.
        DTYPE: Of the result, with ``w4``.
        BLOCK: Words of a program.
    """
    tile = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = word < VECTORS * 128
    bits = tl.load(values + tile * VECTORS * 128 + word, mask=inside, other=0).to(tl.int64)
    vector, lane, register = word // 128, word // 4 % 32, word % 4
    g, t = lane // 4, lane % 4
    meta += tile * METAS * 32 + g * 4
    if KIND == "i8":
        h, q = register % 2, register // 2
        nibbles = tl.load(meta + vector * 32 + 2 * q + h, mask=inside, other=0) >> (8 * t)
        low = _spread(bits & 255, (bits >> 8) & 255, nibbles & 15, 8)
        high = _spread((bits >> 16) & 255, (bits >> 24) & 255, (nibbles >> 4) & 15, 8)
        row = tile * 16 + g + 8 * h
        tl.store(dense + row * (VECTORS * 8) + vector * 8 + 4 * q + t, low | (high << 32), mask=inside)
    elif KIND == "f16":
        h, q = register % 2, register // 2
        nibbles = tl.load(meta + vector // 2 * 32 + vector % 2 * 2 + q, mask=inside, other=0) >> (16 * h + 4 * t)
        group = _spread(bits & 0xFFFF, (bits >> 16) & 0xFFFF, nibbles & 15, 16)
        row = tile * 16 + g + 8 * h
        tl.store(dense + row * (VECTORS * 8) + vector * 8 + 4 * q + t, group, mask=inside)
    else:
        step = vector * 4 + register
        scale_row = tl.minimum(step // GROUP, GROUPS - 1) * N
        for part in tl.static_range(4):
            h, q = part % 2, part // 2
            nibbles = tl.load(meta + step // 2 * 32 + step % 2 * 2 + q, mask=inside, other=0) >> (16 * h + 4 * t)
            row = tile * 16 + g + 8 * h
            scale = tl.load(scales + scale_row + row, mask=inside & (row < N), other=0.0).to(tl.float32)
            first = ((bits >> (8 * q + 4 * h)) & 15).to(tl.float32) - 8.0
            second = ((bits >> (8 * q + 4 * h + 16)) & 15).to(tl.float32) - 8.0
            group = _spread(_sixteen_bits(first * scale, DTYPE), _sixteen_bits(second * scale, DTYPE), nibbles & 15, 16)
            tl.store(dense + row * (VECTORS * 32) + step * 8 + 4 * q + t, group, mask=inside)


_KINDS = {"sp24": "f16", "sp24_w8a8": "i8", "sp24_w4": "w4"}
_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def decompress(weight: Packed, dtype: torch.dtype | None = None) -> Tensor:
    """A dense copy of a packed weight.

    Args:
        weight: In any of the three layouts.
        dtype: Of the result, for 4-bit weights: float16 or bfloat16. They are rounded after the scaling.

    Returns:
        [N, depth of the values]: K filled with zeros.
    """
    values, meta = weight.values.contiguous(), weight.meta.contiguous()
    tiles, vectors = values.shape[:2]
    dense = torch.empty(tiles * TILE, depth(values), dtype=dtype or values.dtype, device=values.device)
    block = min(1024, triton.next_power_of_2(vectors * 128))
    with device_guard(values):
        dense_kernel[tiles, triton.cdiv(vectors * 128, block)](
            values.view(torch.int32), meta, weight.scales, dense.view(torch.int64), weight.n, vectors, meta.shape[1],
            weight.groups, GROUP=weight.group or vectors * 4, KIND=_KINDS[weight.kind.family],
            DTYPE=_TYPES.get(dense.dtype, tl.float16), BLOCK=block, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return dense[: weight.n]


def dense_cases(kind: Kind) -> list[CompileCase]:
    """What `decompress` compiles for ``kind``."""
    types = {
        "values": "*i32",
        "meta": "*i32",
        "dense": "*i64",
        "N": "i32",
        "VECTORS": "i32",
        "METAS": "i32",
        "GROUPS": "i32",
    }
    wanted = [(tl.float16, "*fp16")] if kind in (F16, I8) else [(tl.float16, "*fp16"), (tl.bfloat16, "*bf16")]
    made = []
    for dtype, scales in wanted:
        constants = {"GROUP": 4, "KIND": _KINDS[kind.family], "DTYPE": dtype, "BLOCK": 1024}
        signature = dict(types)
        if kind in (F16, I8):
            constants["scales"] = None
        else:
            signature["scales"] = scales
        name = f"{kind.family} dense copy {scales[1:] if 'scales' in signature else ''}".strip()
        made.append(
            CompileCase(
                name, kind.family, dense_kernel, signature, constants, unaligned=("N", "VECTORS", "METAS", "GROUPS"),
                asynchronous=False,
            )
        )  # fmt: skip
    return made
