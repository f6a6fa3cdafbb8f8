"""What the products with 16-bit activations and low-bit weights share: dequantisation, program order, split K, epilogue.

The dequantisation uses that 16-bit floats with a fixed exponent count: ``0x6400 | n`` is 1024 + n in float16 and
``0x4300 | n`` is 128 + n in bfloat16. A nibble or byte is moved into the low bits of such a pattern (lop3, prmt) and the
offset, with the zero point in it, is subtracted; nothing is converted. Kim et al. 2022, "Who says elephants can't run".
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from fxcompress.kernels.epilogue_triton import INTERPRETED, activate

__all__ = [
    "add_parts_kernel",
    "bytes_beside",
    "bytes_order",
    "bytes_to",
    "finish_or_part",
    "finish_tile",
    "four_beside",
    "narrowed",
    "nibbles_to",
    "over_depth",
    "over_rows",
    "product",
    "row_words",
    "rows_of",
    "tile_of",
    "times",
    "two_beside",
]

_INTERPRETED: tl.constexpr = tl.constexpr(INTERPRETED)


@triton.jit
def tile_of(pid, m_tiles, n_tiles, GROUP_M: tl.constexpr):
    """Output tile (m, n) of a program: columns of up to ``GROUP_M`` tiles share their weights in the cache."""
    width = GROUP_M * n_tiles
    first = (pid // width) * GROUP_M
    rows = tl.minimum(m_tiles - first, GROUP_M)
    within = pid % width
    return first + within % rows, within // rows


@triton.jit
def over_rows(values, SWAP: tl.constexpr):
    """One value for every row of the weights (column of the output), shaped to broadcast over a tile."""
    if SWAP:
        return values[:, None]
    else:
        return values[None, :]


@triton.jit
def over_depth(values, SWAP: tl.constexpr):
    """One value for every K of the weights, or for every row of the output, shaped to broadcast over a tile."""
    if SWAP:
        return values[None, :]
    else:
        return values[:, None]


@triton.jit
def product(w, x, acc, SWAP: tl.constexpr):
    """``acc + w x`` with [N, K] weights (swapped), else ``acc + x w`` with [K, N] weights."""
    if SWAP:
        return tl.dot(w, x, acc)
    else:
        return tl.dot(x, w, acc)


@triton.jit
def two_beside(a, b, SWAP: tl.constexpr):
    """Two tiles beside each other along K, the first dimension unless swapped."""
    both = tl.join(a, b)
    if SWAP:
        return both.permute(0, 2, 1).reshape(a.shape[0], 2 * a.shape[1])
    else:
        return both.permute(2, 0, 1).reshape(2 * a.shape[0], a.shape[1])


@triton.jit
def four_beside(a, b, c, d, SWAP: tl.constexpr):
    """Four tiles beside each other along K."""
    four = tl.join(tl.join(a, b), tl.join(c, d))
    if SWAP:
        return four.permute(0, 3, 2, 1).reshape(a.shape[0], 4 * a.shape[1])
    else:
        return four.permute(3, 2, 0, 1).reshape(4 * a.shape[0], a.shape[1])


@triton.jit
def row_words(values, rows, PACK: tl.constexpr):
    """Pointers to what a program needs of per-row ``values``: 32-bit words of PACK of them, which copies asynchronously."""
    if PACK > 1:
        return values.to(tl.pointer_type(tl.int32)) + rows // PACK
    else:
        return values + rows


@triton.jit
def rows_of(words, rows, DTYPE: tl.constexpr, PACK: tl.constexpr):
    """The values for ``rows`` out of what `row_words` pointed to: of type DTYPE, bytes as int16."""
    if PACK == 1:
        return words.to(tl.int16) if words.dtype == tl.uint8 else words
    elif PACK == 2:
        return (words >> (rows % 2 * 16)).to(tl.int16).to(DTYPE, bitcast=True)
    else:
        return ((words >> (rows % 4 * 8)) & 255).to(tl.int16)


@triton.jit
def _nibbles_asm(words, z0, z1, z2, z3, HALF: tl.constexpr):
    if HALF:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 h, s, o0, o1, o2, o3;
            mov.b32 s, 0x2c002c00;
            or.b32 o0, $5, 0x64006400;
            shl.b32 o1, $6, 4;
            or.b32 o1, o1, 0xd400d400;
            or.b32 o2, $7, 0x64006400;
            shl.b32 o3, $8, 4;
            or.b32 o3, o3, 0xd400d400;
            shr.u32 h, $4, 8;
            lop3.b32 $0, $4, 0x000f000f, 0x64006400, 0xea;
            lop3.b32 $1, $4, 0x00f000f0, 0x64006400, 0xea;
            lop3.b32 $2, h, 0x000f000f, 0x64006400, 0xea;
            lop3.b32 $3, h, 0x00f000f0, 0x64006400, 0xea;
            sub.f16x2 $0, $0, o0;
            fma.rn.f16x2 $1, $1, s, o1;
            sub.f16x2 $2, $2, o2;
            fma.rn.f16x2 $3, $3, s, o3;
            }""",
            "=&r,=&r,=&r,=&r,r,r,r,r,r",
            [words, z0, z1, z2, z3],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 h, s, o0, o1, o2, o3;
            mov.b32 s, 0x3f803f80;
            or.b32 o0, $5, 0xc300c300;
            or.b32 o1, $6, 0xc300c300;
            or.b32 o2, $7, 0xc300c300;
            or.b32 o3, $8, 0xc300c300;
            lop3.b32 $0, $4, 0x000f000f, 0x43004300, 0xea;
            shr.u32 h, $4, 4;
            lop3.b32 $1, h, 0x000f000f, 0x43004300, 0xea;
            shr.u32 h, $4, 8;
            lop3.b32 $2, h, 0x000f000f, 0x43004300, 0xea;
            shr.u32 h, $4, 12;
            lop3.b32 $3, h, 0x000f000f, 0x43004300, 0xea;
            fma.rn.bf16x2 $0, $0, s, o0;
            fma.rn.bf16x2 $1, $1, s, o1;
            fma.rn.bf16x2 $2, $2, s, o2;
            fma.rn.bf16x2 $3, $3, s, o3;
            }""",
            "=&r,=&r,=&r,=&r,r,r,r,r,r",
            [words, z0, z1, z2, z3],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )


@triton.jit
def _nibble(words, zero, PLANE: tl.constexpr, DTYPE: tl.constexpr):
    """Without assembly: float16 by the magic number, everything else (the interpreter's bfloat16) in float32."""
    nibble = (words >> (4 * PLANE)) & 15
    if tl.float16 == DTYPE:
        return (nibble | 0x6400).to(tl.float16, bitcast=True) - (zero | 0x6400).to(tl.float16, bitcast=True)
    else:
        return nibble.to(tl.float32) - zero.to(tl.float32)


@triton.jit
def nibbles_to(words, z0, z1, z2, z3, DTYPE: tl.constexpr, USE_ASM: tl.constexpr):
    """The four planes of int16 ``words``, less their zero points (int16, broadcast), as floats of type DTYPE, exactly."""
    if USE_ASM:
        return _nibbles_asm(words, z0, z1, z2, z3, tl.float16 == DTYPE)
    else:
        return (
            _nibble(words, z0, 0, DTYPE),
            _nibble(words, z1, 1, DTYPE),
            _nibble(words, z2, 2, DTYPE),
            _nibble(words, z3, 3, DTYPE),
        )


@triton.jit
def _byte(words, BYTE: tl.constexpr, DTYPE: tl.constexpr):
    """Without assembly, as `_nibble`."""
    byte = ((words >> (8 * BYTE)) & 255) ^ 128
    if tl.float16 == DTYPE:
        return (byte | 0x6400).to(tl.int16).to(tl.float16, bitcast=True) - 1152.0
    else:
        return byte.to(tl.float32) - 128.0


@triton.jit
def bytes_to(words, DTYPE: tl.constexpr, USE_ASM: tl.constexpr):
    """The four signed bytes of int32 ``words`` as floats of type DTYPE, exactly.

    bfloat16 has 7 bits behind the point, so the sign bit goes its own way: 128 + (low bits) - (128 or 256).
    """
    if not USE_ASM:
        return _byte(words, 0, DTYPE), _byte(words, 1, DTYPE), _byte(words, 2, DTYPE), _byte(words, 3, DTYPE)
    elif tl.float16 == DTYPE:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 u, a, b;
            xor.b32 u, $4, 0x80808080;
            prmt.b32 a, u, 0x64646464, 0x5150;
            prmt.b32 b, u, 0x64646464, 0x5352;
            mov.b32 u, 0x64806480;
            sub.f16x2 a, a, u;
            sub.f16x2 b, b, u;
            mov.b32 {$0, $1}, a;
            mov.b32 {$2, $3}, b;
            }""",
            "=h,=h,=h,=h,r",
            [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=1,
        )
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, c, o;
            mov.b32 o, 0xbf80bf80;
            prmt.b32 a, $4, 0x43434343, 0x5150;
            and.b32 c, a, 0xff80ff80;
            and.b32 a, a, 0xff7fff7f;
            fma.rn.bf16x2 a, c, o, a;
            prmt.b32 b, $4, 0x43434343, 0x5352;
            and.b32 c, b, 0xff80ff80;
            and.b32 b, b, 0xff7fff7f;
            fma.rn.bf16x2 b, c, o, b;
            mov.b32 {$0, $1}, a;
            mov.b32 {$2, $3}, b;
            }""",
            "=h,=h,=h,=h,r",
            [words],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=1,
        )


@triton.jit
def bytes_order(SIZE: tl.constexpr):
    """Which of SIZE consecutive K comes at each place of `bytes_beside`."""
    place = tl.arange(0, SIZE)
    k = place // 16 * 16 + place % 8 // 2 * 4 + place // 8 % 2 * 2 + place % 2
    return tl.max_contiguous(tl.multiple_of(k, 2), 2)


@triton.jit
def bytes_beside(a, b, c, d, SWAP: tl.constexpr):
    """The bytes of words beside each other along K, ordered so that a thread's word is a thread's operand of the product.

    Four words are 16 K; a thread of the tensor core's layout holds K 2t, 2t + 1, 2t + 8 and 2t + 9 of 16. Those places
    take the four bytes of word t; the activations are loaded in the same order, see `bytes_order`.
    """
    four = tl.join(tl.join(a, b), tl.join(c, d))
    if SWAP:
        split = four.reshape(a.shape[0], a.shape[1] // 4, 4, 2, 2)
        return split.permute(0, 1, 4, 2, 3).reshape(a.shape[0], 4 * a.shape[1])
    else:
        split = four.reshape(a.shape[0] // 4, 4, a.shape[1], 2, 2)
        return split.permute(0, 4, 1, 3, 2).reshape(4 * a.shape[0], a.shape[1])


@triton.jit
def times(w, scale, USE_ASM: tl.constexpr):
    """``w * scale`` rounded to the type of ``w``; bfloat16 by a fused multiply-add, as sm_80 has no product."""
    if USE_ASM and w.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 z; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, $2, z; }",
            "=r,r,r",
            [w, scale.to(tl.bfloat16)],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    else:
        return w * scale.to(w.dtype)


@triton.jit
def narrowed(y, DTYPE: tl.constexpr):
    """Float32 ``y`` rounded to DTYPE; the interpreter cuts bfloat16 off, so half a step is added there first."""
    if _INTERPRETED and tl.bfloat16 == DTYPE:
        bits = y.to(tl.int32, bitcast=True)
        y = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return y.to(DTYPE)


@triton.jit
def finish_tile(acc, scales, bias, residual, y, offsets, columns, mask, ACTIVATION: tl.constexpr):
    """Store ``activation(acc * scales + bias + residual)`` at ``y + offsets``.

    Args:
        acc: float32, [m, n] or [n, m].
        scales: Per column of the output, or None.
        bias: Per column of the output, or None.
        residual: Laid out as ``y``, or None.
        y: Pointer to the tile's first row.
        offsets: Of the tile's elements in ``y`` and ``residual``.
        columns: Broadcasts to ``acc``: column of the output, within bounds.
        mask: Which elements exist.
        ACTIVATION: See `activate`.
    """
    if scales is not None:
        acc = acc * tl.load(scales + columns).to(tl.float32)
    if bias is not None:
        acc = acc + tl.load(bias + columns).to(tl.float32)
    if residual is not None:
        acc = acc + tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + offsets, narrowed(activate(acc, ACTIVATION), y.dtype.element_ty), mask=mask)


@triton.jit
def finish_or_part(
    acc, scales, bias, residual, y, m0, m, n, M, N,
    SPLIT_K: tl.constexpr, ATOMIC: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Finish a tile, or store or add the part of one where K is split; ``m0 + m`` and ``n`` are its places."""
    offsets = m * N + n
    mask = (m0 + m < M) & (n < N)
    if SPLIT_K == 1:
        if residual is not None:
            residual += m0 * N
        finish_tile(acc, scales, bias, residual, y + m0 * N, offsets, tl.minimum(n, N - 1), mask, ACTIVATION)
    elif ATOMIC:
        tl.atomic_add(y + m0 * N + offsets, acc, mask=mask, sem="relaxed")
    else:
        tl.store(y + (tl.program_id(1) * M.to(tl.int64) + m0) * N + offsets, acc, mask=mask)


@triton.jit(do_not_specialize=["M"])
def add_parts_kernel(
    parts, scales, bias, residual, y, M, N,
    SPLIT_K: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add the ``parts`` [SPLIT_K, M, N] in their order, in float32, and finish; see `finish_tile`."""
    m0 = tl.program_id(0).to(tl.int64) * BLOCK_M
    rm = tl.arange(0, BLOCK_M)[:, None]
    rn = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = (m0 + rm < M) & (rn < N)
    offsets = rm * N + rn
    parts += m0 * N
    acc = tl.load(parts + offsets, mask=mask, other=0.0).to(tl.float32)
    for _ in tl.static_range(1, SPLIT_K):
        parts += M.to(tl.int64) * N
        acc += tl.load(parts + offsets, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        residual += m0 * N
    finish_tile(acc, scales, bias, residual, y + m0 * N, offsets, tl.minimum(rn, N - 1), mask, ACTIVATION)
