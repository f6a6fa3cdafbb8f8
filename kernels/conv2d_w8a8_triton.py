"""The Triton kernels of ``conv2d_w8a8``: a product of gathered patches, and a direct one for groups."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxcompress.kernels import w8a8_triton
from fxcompress.kernels.configs import ASSUMED, Config, Device, Problem, device_of, lookup
from fxcompress.kernels.conv2d_w8a8 import check
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

__all__ = ["choose", "compile_cases", "conv_kernel", "grouped_kernel", "launch"]

_FULL = "bf16 zero bias residual gelu"
_GEOMETRY = ("M", "H", "W", "OH", "OW", "STRIDE_H", "STRIDE_W", "PAD_H", "PAD_W", "DIL_H", "DIL_W")
#: Fewer channels than this are gathered into rows of all taps first: a tap alone would fill little of a tile.
_FEW_CHANNELS = 16


@triton.jit(do_not_specialize=_GEOMETRY)
def conv_kernel(
    x, w, padded, out, parts, x_scale, w_scale, x_zero, w_sum, bias, residual,
    M, N, C, H, W, OH, OW, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DIL_H, DIL_W,
    KH: tl.constexpr, KW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, EVEN_K: tl.constexpr, PER_ROW: tl.constexpr, RAW: tl.constexpr, ACTIVATION: tl.constexpr,
    PIECES: tl.constexpr,
):  # fmt: skip
    """M = images * OH * OW pixels by N filters; a step of the loop is BLOCK_K channels of one tap.

    ``padded`` is a pixel of C times the zero point, read where a tap lies outside the image; None: zeros.
    """
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), 8)
    rm, rn = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rk = tl.arange(0, BLOCK_K)
    top = tl.where(rm < M, rm // OW % OH * STRIDE_H - PAD_H, -(2**30))  # rows beyond the last are outside the image
    left = rm % OW * STRIDE_W - PAD_W
    corner = ((rm // (OW * OH)).to(tl.int64) * H + top) * W + left
    xp = x + corner[:, None] * C + rk[None, :]
    wp = w + tl.minimum(rn, N - 1).to(tl.int64)[:, None] * (KH * KW) * C + rk[None, :]
    blocks = tl.cdiv(C, BLOCK_K)
    part = tl.program_id(1)
    steps = tl.cdiv(KH * KW * blocks, tl.num_programs(1))
    first = part * steps
    tap, c = first // blocks, first % blocks * BLOCK_K
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for _ in range(first, tl.minimum(first + steps, KH * KW * blocks)):
        down, right = tap // KW * DIL_H, tap % KW * DIL_W
        # As unsigned numbers, coordinates above or left of the image are beyond its other side.
        row, column = (top + down).to(tl.uint32), (left + right).to(tl.uint32)
        inside = ((row < H.to(tl.uint32)) & (column < W.to(tl.uint32)))[:, None]
        pixels = xp + ((down.to(tl.int64) * W + right) * C + c)
        filters = wp + (tap * C + c)
        if padded is not None:
            pixels = tl.where(inside, pixels, padded + (c + rk)[None, :])
        if EVEN_K:
            if padded is not None:
                a = tl.load(pixels)
            else:
                a = tl.load(pixels, mask=inside, other=0)
            b = tl.load(filters)
        else:
            channels = (rk < C - c)[None, :]
            if padded is not None:
                a = tl.load(pixels, mask=channels, other=0)
            else:
                a = tl.load(pixels, mask=inside & channels, other=0)
            b = tl.load(filters, mask=channels, other=0)
        acc = tl.dot(a, tl.trans(b), acc, out_dtype=tl.int32)
        c += BLOCK_K
        tap = tl.where(c < C, tap, tap + 1)
        c = tl.where(c < C, c, 0)
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


@triton.jit(do_not_specialize=_GEOMETRY)
def grouped_kernel(
    x, w, out, x_scale, w_scale, x_zero, bias, residual,
    M, N, C, DEPTH, FILTERS, H, W, OH, OW, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DIL_H, DIL_W,
    KH: tl.constexpr, KW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PER_ROW: tl.constexpr, RAW: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Every group has DEPTH input channels and FILTERS filters; each thread adds up its own results."""
    rm = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rn = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    top = rm // OW % OH * STRIDE_H - PAD_H
    left = rm % OW * STRIDE_W - PAD_W
    corner = ((rm // (OW * OH)).to(tl.int64) * H + top) * W + left
    xp = x + corner[:, None] * C + (rn // FILTERS * DEPTH)[None, :]
    wp = w + rn.to(tl.int64) * (KH * KW) * DEPTH
    zero = 0
    if x_zero is not None:
        zero = tl.load(x_zero)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for tap in range(KH * KW):
        down, right = tap // KW * DIL_H, tap % KW * DIL_W
        row, column = top + down, left + right
        inside = ((rm < M) & (row >= 0) & (row < H) & (column >= 0) & (column < W))[:, None] & (rn < N)[None, :]
        for c in range(DEPTH):
            a = tl.load(xp + ((down.to(tl.int64) * W + right) * C + c), mask=inside, other=0).to(tl.int32)
            b = tl.load(wp + (tap * DEPTH + c), mask=rn < N, other=0).to(tl.int32)
            acc += tl.where(inside, a - zero, 0) * b[None, :]
    store_scaled(
        acc, tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N, M, N, out, x_scale, w_scale, None, None, bias,
        residual, PER_ROW, RAW, ACTIVATION, 1,
    )  # fmt: skip


@dataclass(frozen=True)
class _Call:
    """A convolution on [N, H, W, C] images."""

    images: Tensor
    weight: Tensor
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int
    out: Tensor  # [N, OH, OW, O]
    epilogue: Epilogue

    def sizes(self) -> tuple[int, ...]:
        """What the kernels call H, W, OH, OW, STRIDE_H ... DIL_W."""
        return (*self.images.shape[1:3], *self.out.shape[1:3], *self.stride, *self.padding, *self.dilation)

    @property
    def rows(self) -> int:
        """Pixels of the output."""
        return self.out.numel() // self.out.shape[-1]

    def padded_pixel(self, count: int) -> Tensor | None:
        """``count`` times the zero point."""
        zero = self.epilogue.x_zero
        return None if zero is None else zero.to(torch.int8).expand(count).contiguous()

    def patches(self) -> Tensor:
        """The images as int8 [rows, KH * KW * C]: every pixel of the output has what its filters see."""
        (n, h, w, c), (_, oh, ow, _), (kh, kw) = self.images.shape, self.out.shape, self.weight.shape[1:3]
        (top, left), (step_h, step_w), (down, right) = self.padding, self.stride, self.dilation
        pixel = self.padded_pixel(c)
        frame = self.images.new_zeros((n, h + 2 * top, w + 2 * left, c))
        if pixel is not None:
            frame += pixel
        frame[:, top : top + h, left : left + w] = self.images
        s0, s1, s2, s3 = frame.stride()
        seen = frame.as_strided((n, oh, ow, kh, kw, c), (s0, s1 * step_h, s2 * step_w, s1 * down, s2 * right, s3))
        return seen.reshape(self.rows, kh * kw * c)


def choose(problem: Problem, device: Device) -> Config:
    """The table's configuration, else a guess. ``problem``: M pixels, N filters, K = taps * channels; its group: channels."""
    found = lookup(problem, device)
    if found is not None:
        return found
    costs = {(64, 64): 1.0, (128, 64): 1.6, (128, 128): 2.8}
    block_m, block_n = best_tile(problem.m, problem.n, costs, device)
    c = problem.group_size
    block_k = 32 if c == 32 else 128 if c % 128 == 0 and device.sm >= 90 else 64
    taps = problem.k // c
    tiles = -(-problem.m // block_m) * -(-problem.n // block_n)
    parts = parts_for(tiles, taps * -(-c // block_k), device) if block_m <= 64 else 1
    tile = Config(block_m, block_n, block_k, parts, 8 if block_m * block_n > 8192 else 4, 4)
    return fitting(tile, (block_m + block_n) * block_k, device)


def launch(
    x: Tensor, weight: Tensor, x_scale: Tensor, w_scale: Tensor, x_zero: Tensor | None, bias: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int, out_dtype: torch.dtype,
    activation: str = "", residual: Tensor | None = None, w_sum: Tensor | None = None, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """See `fxcompress.kernels.conv2d_w8a8`; ``config`` is for tests and measurements."""
    shape = check(
        x, weight, x_scale, w_scale, x_zero, bias, stride, padding, dilation, groups, out_dtype, activation, residual,
        w_sum,
    )  # fmt: skip
    n, o, oh, ow = shape
    out = torch.empty((n, oh, ow, o), dtype=out_dtype, device=x.device)
    result = out.permute(0, 3, 1, 2)
    if out.numel() == 0:
        return torch.empty(shape, dtype=out_dtype, device=x.device, memory_format=torch.channels_last)
    if x_zero is not None and w_sum is None and groups == 1:
        w_sum = weight.sum((1, 2, 3), dtype=torch.int32)
    last = None if residual is None else residual.permute(0, 2, 3, 1)
    raw = out_dtype == torch.int32
    epilogue = Epilogue(x_scale, w_scale, bias, last, activation, False, raw, x_zero, w_sum)
    images = x.permute(0, 2, 3, 1).contiguous()
    call = _Call(images, weight.contiguous(), stride, padding, dilation, groups, out, epilogue)
    with device_guard(x):
        _run(call, config)
    return result


def _run(call: _Call, config: Config | None) -> None:
    pointwise = call.weight.shape[1:3] == (1, 1) and set(call.stride) == {1} and set(call.padding) == {0}
    if call.groups > 1:
        _grouped(call)
    elif pointwise or call.weight.shape[3] < _FEW_CHANNELS:
        rows = call.images.view(call.rows, -1) if pointwise else call.patches()
        w8a8_triton.product(rows, call.weight.flatten(1), call.epilogue, call.out, config)
    else:
        _dense(call, config)


def _dense(call: _Call, config: Config | None) -> None:
    (n, kh, kw, c), m, device = call.weight.shape, call.rows, device_of(call.images)
    chosen = config or choose(Problem("conv2d_w8a8", m, n, kh * kw * c, torch.int8, c), device)
    flat = call.out.view(m, n)
    parts = parts_like(flat, chosen.split_k)
    tiles = triton.cdiv(m, chosen.block_m) * triton.cdiv(n, chosen.block_n)
    conv_kernel[tiles, chosen.split_k](
        call.images, call.weight, call.padded_pixel(c), call.out, parts, *call.epilogue.tensors(), m, n, c, *call.sizes(),
        KH=kh, KW=kw, **_constants(chosen, device, c % chosen.block_k == 0),
        **call.epilogue.constants(), num_warps=chosen.num_warps, num_stages=chosen.num_stages, enable_fp_fusion=False,
    )  # fmt: skip
    if chosen.split_k > 1:
        call.epilogue.add(parts, flat)


def _grouped(call: _Call) -> None:
    n, kh, kw, depth = call.weight.shape
    m, c = call.rows, call.images.shape[3]
    x_scale, w_scale, x_zero, _, bias, residual = call.epilogue.tensors()
    block_n = max(16, min(64, triton.next_power_of_2(n)))
    block_m = 2048 // block_n
    grouped_kernel[triton.cdiv(m, block_m), triton.cdiv(n, block_n)](
        call.images, call.weight, call.out, x_scale, w_scale, x_zero, bias, residual,
        m, n, c, depth, n // call.groups, *call.sizes(),
        KH=kh, KW=kw, BLOCK_M=block_m, BLOCK_N=block_n, **call.epilogue.constants(), enable_fp_fusion=False,
    )  # fmt: skip


def _constants(c: Config, device: Device, even: bool) -> dict[str, Any]:
    sizes = {"BLOCK_M": c.block_m, "BLOCK_N": c.block_n, "BLOCK_K": c.block_k}
    return sizes | {"SPLIT": c.split_k > 1, "EVEN_K": even, "PIECES": pieces(c, device)}


def _case(c: Config, device: Device, epilogue: str, even: bool) -> CompileCase:
    signature, constants = EPILOGUES[epilogue]
    words = (epilogue, "" if even else "channel tail", "split" if c.split_k > 1 else "")
    kinds = {"x": "*i8", "w": "*i8", "parts": "*i32", "N": "i32", "C": "i32"} | dict.fromkeys(_GEOMETRY, "i32")
    padded = signature.get("x_zero") is not None
    return CompileCase(
        " ".join(filter(None, (f"conv2d_w8a8 {c.block_m}x{c.block_n}x{c.block_k}", *words))),
        "conv2d_w8a8",
        conv_kernel,
        signature | kinds | ({"padded": "*i8"} if padded else {}),
        constants | {"KH": 3, "KW": 3} | _constants(c, device, even) | ({} if padded else {"padded": None}),
        c.num_warps,
        c.num_stages,
        weights=c.block_n * c.block_k,
        mma=("IMMA", "IGMMA", "UTCIMMA"),
        unaligned=_GEOMETRY,
    )


def _grouped_case() -> CompileCase:
    constants = {
        "x_zero": None, "bias": None, "residual": None, "KH": 3, "KW": 3, "BLOCK_M": 32, "BLOCK_N": 64,
        "PER_ROW": 0, "RAW": False, "ACTIVATION": "relu",
    }  # fmt: skip
    pointers = {"x": "*i8", "w": "*i8", "out": "*fp16", "x_scale": "*fp32", "w_scale": "*fp32"}
    numbers = dict.fromkeys((*_GEOMETRY, "N", "C", "DEPTH", "FILTERS"), "i32")
    return CompileCase(
        "conv2d_w8a8 grouped", "conv2d_w8a8", grouped_kernel, pointers | numbers, constants,
        unaligned=(*_GEOMETRY, "DEPTH", "FILTERS"), asynchronous=False,
    )  # fmt: skip


def compile_cases(sm: int) -> list[CompileCase]:
    """Every tile for ``sm``: plain, with a tail of channels, with the whole epilogue, split; then groups and the sum."""
    device, cases = ASSUMED[sm], []
    sizes = [(m, n, k) for m in (49, 3136, 100352) for n in (64, 512) for k in (32, 64, 512)]
    for c in distinct(choose(Problem("conv2d_w8a8", m, n, 9 * k, torch.int8, k), device) for m, n, k in sizes):
        variants = [("fp16", True), (_FULL, True)] if c.split_k == 1 else [("fp16", True)]
        if c.block_k > 32:  # what `choose` gives for 32 channels only
            variants.append(("fp16", False))
        cases += [_case(c, device, epilogue, even) for epilogue, even in variants]
    return [*cases, _grouped_case(), reduce_case("conv2d_w8a8")]
