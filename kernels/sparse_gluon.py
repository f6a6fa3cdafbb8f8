"""The 2:4 products on the sparse tensor cores (``mma.sp``), in Gluon: Triton has no sparse ``tl.dot``.

One kernel for all three layouts of `fxcompress.kernels.sparse_layout`. The weights are the instruction's first operand:
they are loaded from memory straight into the registers it reads, 16 bytes a lane, one step ahead. Activations, its second
operand, go through shared memory (cp.async, a ring of stages) and come out with ldmatrix. Warps divide the output tile,
and K among themselves (KW), whose sums are added through shared memory in a fixed order.

A tensor here is five-dimensional, [KW, MT, NT, 32 lanes, 4 registers]: warps along K, tiles of 16 output features, tiles
of 8 rows of activations, then what one lane holds for one instruction.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,assignment"
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from fxcompress.kernels import epilogue_triton

__all__ = ["mma_sp_kernel"]

# Renamed in Triton 3.8.
copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
activate = gluon.jit(epilogue_triton.activate.fn)

_MMA: gl.constexpr = gl.constexpr("mma.sp::ordered_metadata.sync.aligned.")
_OPERANDS: gl.constexpr = gl.constexpr(" {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9,$10,$11}, {$12,$13,$14,$15}, $16, ")
_FLOAT: gl.constexpr = gl.constexpr("=f,=f,=f,=f,r,r,r,r,r,r,r,r,f,f,f,f,r,r,r,r")
_INTEGER: gl.constexpr = gl.constexpr("=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r")

_HALF_WORD = """
lop3.b32 ${0}, ${4}, 0x000f000f, 0x64006400, 0xea;
lop3.b32 ${1}, ${4}, 0x00f000f0, 0x64006400, 0xea;
shr.u32 h, ${4}, 8;
lop3.b32 ${2}, h, 0x000f000f, 0x64006400, 0xea;
lop3.b32 ${3}, h, 0x00f000f0, 0x64006400, 0xea;
sub.f16x2 ${0}, ${0}, o;
fma.rn.f16x2 ${1}, ${1}, s, p;
sub.f16x2 ${2}, ${2}, o;
fma.rn.f16x2 ${3}, ${3}, s, p;
"""
_BRAIN_WORD = """
lop3.b32 ${0}, ${4}, 0x000f000f, 0x43004300, 0xea;
shr.u32 h, ${4}, 4;
lop3.b32 ${1}, h, 0x000f000f, 0x43004300, 0xea;
shr.u32 h, ${4}, 8;
lop3.b32 ${2}, h, 0x000f000f, 0x43004300, 0xea;
shr.u32 h, ${4}, 12;
lop3.b32 ${3}, h, 0x000f000f, 0x43004300, 0xea;
fma.rn.bf16x2 ${0}, ${0}, s, o;
fma.rn.bf16x2 ${1}, ${1}, s, o;
fma.rn.bf16x2 ${2}, ${2}, s, o;
fma.rn.bf16x2 ${3}, ${3}, s, o;
"""


def _four_words(head: str, word: str) -> str:
    """Assembly for words $16 to $19: word i becomes the four registers from $4i."""
    body = "".join(word.format(4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3, 16 + i) for i in range(4))
    return "{\n" + head + body + "}"


# 1024 + n - 1032 and (1024 + 16 n) / 16 - 72; 128 + n - 136. All exact.
_HALF: gl.constexpr = gl.constexpr(
    _four_words(
        ".reg .b32 h, o, s, p;\nmov.b32 o, 0x64086408;\nmov.b32 s, 0x2c002c00;\nmov.b32 p, 0xd480d480;", _HALF_WORD
    )
)
_BRAIN: gl.constexpr = gl.constexpr(
    _four_words(".reg .b32 h, o, s;\nmov.b32 o, 0xc308c308;\nmov.b32 s, 0x3f803f80;", _BRAIN_WORD)
)
_SIXTEEN: gl.constexpr = gl.constexpr("=&r," * 16 + "r,r,r,r")


@gluon.constexpr_function
def _basis(size):
    """1, 2, 4 ... below ``size``, a power of two."""
    return [1 << i for i in range(size.bit_length() - 1)]


@gluon.constexpr_function
def fragment_layout(KW, WM, WN, NT):
    """Where ldmatrix puts 32-bit words of activations [KW * 8 NT rows, 16]: word ``4 i + t`` of row g at lane 4 g + t."""
    rows, own = 8 * NT, NT // WN
    registers = [[0, 4], [0, 8]] + [[8 * b, 0] for b in _basis(own)]
    lanes = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    warps = [[8 * own * b, 0] for b in _basis(WN)] + [[0, 0] for _ in _basis(WM)] + [[rows * b, 0] for b in _basis(KW)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [KW * rows, 16])


@gluon.jit
def axis(SIZE: gl.constexpr, DIM: gl.constexpr, L: gl.constexpr):
    """0, 1 ... along dimension DIM of a five-dimensional tensor with layout L."""
    if DIM == 0:
        A: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, gl.SliceLayout(4, L))))
        return gl.arange(0, SIZE, layout=A)[:, None, None, None, None]
    elif DIM == 1:
        B: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, gl.SliceLayout(4, L))))
        return gl.arange(0, SIZE, layout=B)[None, :, None, None, None]
    elif DIM == 3:
        C: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(4, L))))
        return gl.arange(0, SIZE, layout=C)[None, None, None, :, None]
    else:
        D: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, L))))
        return gl.arange(0, SIZE, layout=D)[None, None, None, None, :]


@gluon.jit
def multiply(a, b, c, meta, KIND: gl.constexpr, SELECTOR: gl.constexpr):
    """``c + a b``, one instruction a tile by a whole warp; SELECTOR: the lanes of a quad that hold the metadata."""
    if KIND == "s8":
        return gl.inline_asm_elementwise(
            _MMA + "m16n8k64.row.col.s32.s8.s8.s32" + _OPERANDS + "0x0;",
            _INTEGER, [a, b, c, meta], dtype=gl.int32, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        return gl.inline_asm_elementwise(
            _MMA + "m16n8k32.row.col.f32." + KIND + "." + KIND + ".f32" + _OPERANDS + SELECTOR + ";",
            _FLOAT, [a, b, c, meta], dtype=gl.float32, is_pure=True, pack=4,
        )  # fmt: skip


@gluon.jit
def steps_of(words, KIND: gl.constexpr):
    """The first operands of the four steps whose 4-bit weights the four registers of ``words`` hold."""
    if KIND == "f16":
        return gl.inline_asm_elementwise(
            _HALF, _SIXTEEN, [words], dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=4
        )
    else:
        return gl.inline_asm_elementwise(
            _BRAIN, _SIXTEEN, [words], dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=4
        )


@gluon.jit
def weight_words(pointer, inside, FILL: gl.constexpr, EVEN: gl.constexpr):
    """Load words read once; FILL where K has ended."""
    if EVEN:
        return gl.load(pointer, mask=inside, eviction_policy="evict_first")
    else:
        return gl.load(pointer, mask=inside, other=FILL, eviction_policy="evict_first")


@gluon.jit
def fetch(vp, mp, sp, below, unit, end, N, GROUPS, U: gl.constexpr, VECTORS: gl.constexpr, METAS: gl.constexpr, RUN: gl.constexpr,
          GROUP: gl.constexpr, EVEN: gl.constexpr):  # fmt: skip
    """Values, metadata and scales (rows g, and 8 ``below``) of the U units of K from ``unit`` on."""
    a = ()
    e = ()
    s = ()
    for j in gl.static_range(U):
        inside = unit + j < end
        for i in gl.static_range(VECTORS):
            a += (weight_words(vp + (j * VECTORS + i) * 128, inside, 0, EVEN),)
        for i in gl.static_range(METAS):
            e += (weight_words(mp + (j * METAS + i) * 32, inside, 0x44444444, EVEN),)
        if GROUP > 0:
            for i in gl.static_range(4 // RUN):
                group = sp + gl.minimum(((unit + j) * 4 + i * RUN) // GROUP, GROUPS - 1) * N
                s += (gl.load(group, mask=inside, other=0), gl.load(group + below, mask=inside, other=0))
    return a, e, s


@gluon.jit
def stage(ring, slot, xp, x_unit, end, U: gl.constexpr, STEPS: gl.constexpr):
    """Copy what one step of the loop needs of the activations, asynchronously; zeros where K has ended."""
    for j in gl.static_range(U * STEPS):
        copy_async(ring.index(slot + j), xp + j * 16, mask=x_unit + j // STEPS < end)
    async_copy.commit_group()


@gluon.jit
def fragment(ring, slot, KW: gl.constexpr, NT: gl.constexpr, FRAGMENT: gl.constexpr, L: gl.constexpr):
    """The second operands of a step, out of shared memory: word ``4 i + t`` of row g is register i of lane 4 g + t."""
    b = ring.index(slot).load(FRAGMENT).reshape([KW, NT, 8, 4, 4]).permute([0, 1, 2, 4, 3])
    return gl.convert_layout(b.reshape([KW, 1, NT, 32, 4]), L, assert_trivial=True)


@gluon.jit
def scaled_steps(acc, w, e, s, ring, slot, register, KIND: gl.constexpr, KW: gl.constexpr, MT: gl.constexpr,
                 NT: gl.constexpr, RUN: gl.constexpr, FRAGMENT: gl.constexpr, L: gl.constexpr):  # fmt: skip
    """The four steps of a unit of 4-bit weights, RUN of which share the scales of their rows."""
    for run in gl.static_range(4 // RUN):
        part = gl.zeros([KW, MT, NT, 32, 4], gl.float32, layout=L)
        for i in gl.static_range(run * RUN, run * RUN + RUN):
            b = fragment(ring, slot + i, KW, NT, FRAGMENT, L)
            part = multiply(w[i], b, part, e[i // 2], KIND, "0x1" if i % 2 else "0x0")
        acc += part * gl.where(register < 2, s[2 * run].to(gl.float32), s[2 * run + 1].to(gl.float32))
    return acc


@gluon.jit
def steps(acc, w, e, ring, slot, KIND: gl.constexpr, KW: gl.constexpr, NT: gl.constexpr, STEPS: gl.constexpr,
          FRAGMENT: gl.constexpr, L: gl.constexpr):  # fmt: skip
    """The steps of a unit; two steps share a word of metadata."""
    for i in gl.static_range(STEPS):
        b = fragment(ring, slot + i, KW, NT, FRAGMENT, L)
        acc = multiply(w[i], b, acc, e[i // 2], KIND, "0x1" if i % 2 else "0x0")
    return acc


@gluon.jit
def finish(y, x_scale, w_scale, bias, residual, out, m, n, M, N, RAW: gl.constexpr, PER_ROW: gl.constexpr,
           ACTIVATION: gl.constexpr):  # fmt: skip
    """Store ``activation(y x_scale w_scale + bias + residual)`` at rows ``m`` and columns ``n``; ``y`` itself when RAW."""
    mask = (m < M) & (n < N)
    place = m.to(gl.int64) * N + n
    if not RAW:
        y = y.to(gl.float32)
        if x_scale is not None:
            y = y * gl.load(x_scale + m * PER_ROW, mask=m < M, other=0.0)
        if w_scale is not None:
            y = y * gl.load(w_scale + n, mask=n < N, other=0.0).to(gl.float32)
        if bias is not None:
            y = y + gl.load(bias + n, mask=n < N, other=0.0).to(gl.float32)
        if residual is not None:
            y = y + gl.load(residual + place, mask=mask, other=0.0).to(gl.float32)
        y = activate(y, ACTIVATION)
    gl.store(out + place, y.to(out.dtype.element_ty), mask=mask)


@gluon.jit(do_not_specialize=["M", "TRIPS"])
def mma_sp_kernel(
    values, meta, x, scales, x_scale, w_scale, bias, residual, out, M, N, UNITS, TRIPS, GROUPS,
    KIND: gl.constexpr, VECTORS: gl.constexpr, METAS: gl.constexpr, STEPS: gl.constexpr, MT: gl.constexpr,
    NT: gl.constexpr, KW: gl.constexpr, WM: gl.constexpr, WN: gl.constexpr, U: gl.constexpr, STAGES: gl.constexpr,
    EVEN: gl.constexpr, GROUP: gl.constexpr, RUN: gl.constexpr, SPLIT: gl.constexpr, RAW: gl.constexpr,
    PER_ROW: gl.constexpr, ACTIVATION: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Rows of activations times the packed weights, finished into ``out`` [M, N].

    Programs: (tiles of M, tiles of N, parts of K), those that share weights side by side.

    Args:
        values: 32-bit words of packed values, [tiles, UNITS, VECTORS, 32, 4].
        meta: int32 [tiles, UNITS, METAS, 32].
        x: 32-bit words of the activations, [M, UNITS * STEPS * 16], 16-byte aligned.
        scales: Floats [groups, N] when GROUP, else None.
        x_scale: float32, one for each row (PER_ROW 1) or one (0), or None.
        w_scale: Floats [N] or None.
        bias: Floats [N] or None.
        residual: Floats [M, N] or None.
        out: [M, N]; with SPLIT the raw sums, [parts, M, N].
        M: Rows.
        N: Output features.
        UNITS: Pieces of K: 64 (f16, s8) or 128 (4-bit) wide.
        TRIPS: Steps of the loop in a part of K; each takes KW * U units.
        GROUPS: Groups of scales.
        KIND: What is multiplied: ``f16``, ``bf16``, ``s8``.
        VECTORS: 16-byte loads of values in a unit.
        METAS: Words of metadata in a unit.
        STEPS: Instructions in a unit.
        MT: Tiles of 16 output features of a program.
        NT: Tiles of 8 rows of a program.
        KW: Warps along K.
        WM: Warps along the output features.
        WN: Warps along the rows.
        U: Units that a warp takes in a step of the loop.
        STAGES: Ring of activations.
        EVEN: KW * U divides UNITS.
        GROUP: Instructions (32 of K) that share a scale; 0: no scales in the loop.
        RUN: Of these, how many within a unit.
        SPLIT: K is cut into parts.
        RAW: Store sums as they are.
        PER_ROW: See ``x_scale``.
        ACTIVATION: See ``fxcompress.kernels.epilogue_triton.activate``.
        num_warps: KW * WM * WN.
    """
    L: gl.constexpr = gl.BlockedLayout(
        [1, MT // WM, NT // WN, 1, 4], [1, 1, 1, 32, 1], [KW, WM, WN, 1, 1], [4, 3, 2, 1, 0]
    )
    FRAGMENT: gl.constexpr = fragment_layout(KW, WM, WN, NT)
    CHUNKS: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [num_warps, 1], [1, 0])
    BM: gl.constexpr = 8 * NT
    DTYPE: gl.constexpr = gl.int32 if KIND == "s8" else gl.float32
    SPAN: gl.constexpr = KW * U
    LEAD: gl.constexpr = (STAGES - 1) * SPAN
    pm = gl.program_id(0)
    pn = gl.program_id(1)
    first = gl.program_id(2) * (TRIPS * SPAN)
    end = gl.minimum(first + TRIPS * SPAN, UNITS)
    kw = axis(KW, 0, L)
    lane = axis(32, 3, L)
    register = axis(4, 4, L)
    # tiles and rows that do not exist are read as the last that does; they are not stored
    tile = gl.minimum(pn * MT + axis(MT, 1, L), (N + 15) // 16 - 1)
    unit = first + kw * U
    vp = values + (tile.to(gl.int64) * UNITS + unit) * (VECTORS * 128) + (lane * 4 + register)
    mp = meta + (tile.to(gl.int64) * UNITS + unit) * (METAS * 32) + lane
    sp = values
    below = 0
    if GROUP > 0:
        feature = tile * 16 + lane // 4
        sp = scales + gl.minimum(feature, N - 1)
        below = gl.minimum(feature + 8, N - 1) - gl.minimum(feature, N - 1)
    chunk = gl.arange(0, KW * BM, layout=gl.SliceLayout(1, CHUNKS))[:, None]
    word = gl.arange(0, 16, layout=gl.SliceLayout(0, CHUNKS))[None, :]
    row = gl.minimum(pm * BM + chunk % BM, M - 1)
    x_unit = first + chunk // BM * U + word * 0
    xp = x + (row.to(gl.int64) * UNITS + x_unit) * (STEPS * 16) + word
    ring = gl.allocate_shared_memory(
        gl.int32, [STAGES * U * STEPS, KW * BM, 16], gl.SwizzledSharedLayout(4, 2, 4, order=[1, 0])
    )
    for ahead in gl.static_range(STAGES - 1):
        stage(ring, ahead * U * STEPS, xp + ahead * SPAN * STEPS * 16, x_unit + ahead * SPAN, end, U, STEPS)
    acc = gl.zeros([KW, MT, NT, 32, 4], DTYPE, layout=L)
    a, e, s = fetch(vp, mp, sp, below, unit, end, N, GROUPS, U, VECTORS, METAS, RUN, GROUP, EVEN)
    for trip in range(TRIPS):
        vp += SPAN * VECTORS * 128
        mp += SPAN * METAS * 32
        unit += SPAN
        next_a, next_e, next_s = fetch(vp, mp, sp, below, unit, end, N, GROUPS, U, VECTORS, METAS, RUN, GROUP, EVEN)
        async_copy.wait_group(STAGES - 2)
        slot = trip % STAGES * (U * STEPS)
        free = (trip + STAGES - 1) % STAGES * (U * STEPS)
        stage(ring, free, xp + LEAD * STEPS * 16, x_unit + LEAD, end, U, STEPS)
        for j in gl.static_range(U):
            w = a[j * VECTORS : (j + 1) * VECTORS] if VECTORS == STEPS else steps_of(a[j], KIND)
            m = e[j * METAS : (j + 1) * METAS]
            if GROUP > 0:
                scale = s[j * (8 // RUN) : (j + 1) * (8 // RUN)]
                acc = scaled_steps(acc, w, m, scale, ring, slot + j * 4, register, KIND, KW, MT, NT, RUN, FRAGMENT, L)
            else:
                acc = steps(acc, w, m, ring, slot + j * STEPS, KIND, KW, NT, STEPS, FRAGMENT, L)
        a = next_a
        e = next_e
        s = next_s
        xp += SPAN * STEPS * 16
        x_unit += SPAN
    y = gl.sum(acc, axis=0)
    # register 2 h + c of lane 4 g + t: output feature 8 h + g, row 2 t + c
    y = y.reshape([MT, NT, 8, 4, 2, 2]).permute([1, 3, 5, 0, 4, 2]).reshape([BM, 16 * MT])
    WIDE: gl.constexpr = 8 if MT == 1 else 16
    OUT: gl.constexpr = gl.BlockedLayout([1, 2], [32 // WIDE, WIDE], [num_warps, 1], [1, 0])
    y = gl.convert_layout(y, OUT)
    m = pm * BM + gl.arange(0, BM, layout=gl.SliceLayout(1, OUT))[:, None]
    n = pn * (16 * MT) + gl.arange(0, 16 * MT, layout=gl.SliceLayout(0, OUT))[None, :]
    if SPLIT:
        out += gl.program_id(2).to(gl.int64) * M * N
    finish(y, x_scale, w_scale, bias, residual, out, m, n, M, N, RAW, PER_ROW, ACTIVATION)
