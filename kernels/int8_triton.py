"""What the int8 kernels share: the scaled epilogue, the sum of the parts of a split product, how they are launched.

All of them multiply tiles as they lie in memory, [rows, K] by [rows, K], with ``tl.trans`` of one operand. That matters
on sm_80: the prefetch pass of Triton 3.8 and 3.9 carries int8 operands that need no transposing from one step to the
next, where LLVM takes them apart byte by byte, three times the instructions; behind a ``tl.trans`` it leaves them alone.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxcompress.kernels.configs import Config, Device
from fxcompress.kernels.epilogue_triton import CompileCase, activate

__all__ = [
    "EPILOGUES",
    "Epilogue",
    "best_tile",
    "device_guard",
    "distinct",
    "fitting",
    "parts_for",
    "parts_like",
    "pieces",
    "reduce_case",
    "store_scaled",
    "sum_parts",
]


@triton.jit
def store_scaled(
    acc, m0, n0, M, N, out, x_scale, w_scale, x_zero, w_sum, bias, residual,
    PER_ROW: tl.constexpr, RAW: tl.constexpr, ACTIVATION: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Store ``activation((acc - x_zero w_sum) x_scale w_scale + bias + residual)``; the integers alone when ``RAW``.

    Args:
        acc: int32 [m, n].
        m0: First row of ``acc`` in the output [M, N].
        n0: Its first column there.
        M: Rows of the output.
        N: Columns of the output.
        out: The output, contiguous.
        x_scale: float32, one for each row or one.
        w_scale: float32 [N].
        x_zero: int32, as ``x_scale``, or None.
        w_sum: int32 [N], with ``x_zero``.
        bias: [N] or None.
        residual: [M, N] or None.
        PER_ROW: 1 for a scale for each row, 0 for one.
        RAW: Neither scales nor anything after them.
        ACTIVATION: See `activate`.
        PIECES: Turns in which the tile is worked on, for want of registers: a power of 2 cuts the rows, its negative the
            columns.
    """
    BM: tl.constexpr = acc.shape[0]
    BN: tl.constexpr = acc.shape[1]
    if PIECES > 1:
        upper, lower = acc.reshape(2, BM // 2, BN).permute(1, 2, 0).split()
        store_scaled(
            upper, m0, n0, M, N, out, x_scale, w_scale, x_zero, w_sum, bias, residual,
            PER_ROW, RAW, ACTIVATION, PIECES // 2,
        )  # fmt: skip
        store_scaled(
            lower, m0 + BM // 2, n0, M, N, out, x_scale, w_scale, x_zero, w_sum, bias, residual,
            PER_ROW, RAW, ACTIVATION, PIECES // 2,
        )  # fmt: skip
    elif PIECES < -1:
        left, right = acc.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
        store_scaled(
            left, m0, n0, M, N, out, x_scale, w_scale, x_zero, w_sum, bias, residual,
            PER_ROW, RAW, ACTIVATION, -(-PIECES // 2),
        )  # fmt: skip
        store_scaled(
            right, m0, n0 + BN // 2, M, N, out, x_scale, w_scale, x_zero, w_sum, bias, residual,
            PER_ROW, RAW, ACTIVATION, -(-PIECES // 2),
        )  # fmt: skip
    else:
        rm, rn = m0 + tl.arange(0, BM), n0 + tl.arange(0, BN)
        rows, columns = rm < M, rn < N
        mask = rows[:, None] & columns[None, :]
        place = rm.to(tl.int64)[:, None] * N + rn[None, :]
        if x_zero is not None:
            zero = tl.load(x_zero + rm * PER_ROW, mask=rows, other=0)
            acc -= zero[:, None] * tl.load(w_sum + rn, mask=columns, other=0)[None, :]
        if RAW:
            tl.store(out + place, acc, mask=mask)
        else:
            y = acc.to(tl.float32) * tl.load(x_scale + rm * PER_ROW, mask=rows, other=0.0)[:, None]
            y *= tl.load(w_scale + rn, mask=columns, other=0.0)[None, :]
            if bias is not None:
                y += tl.load(bias + rn, mask=columns, other=0.0).to(tl.float32)[None, :]
            if residual is not None:
                y += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
            tl.store(out + place, activate(y, ACTIVATION).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "PARTS"])
def sum_parts(
    parts, out, x_scale, w_scale, x_zero, w_sum, bias, residual, M, N, PARTS,
    SHIFT: tl.constexpr, PER_ROW: tl.constexpr, RAW: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add the int32 ``parts`` [PARTS, M, N] of a split product, divide by ``2 ** SHIFT``, then `store_scaled`."""
    rm = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rn = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rm < M)[:, None] & (rn < N)[None, :]
    place = parts + rm.to(tl.int64)[:, None] * N + rn[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for _ in range(PARTS):
        acc += tl.load(place, mask=mask, other=0)
        place += M.to(tl.int64) * N
    store_scaled(
        acc >> SHIFT, tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N, M, N, out, x_scale, w_scale, x_zero, w_sum,
        bias, residual, PER_ROW, RAW, ACTIVATION, 1,
    )  # fmt: skip


@dataclass(frozen=True)
class Epilogue:
    """What a kernel does with its int32 sums [M, N]; see `store_scaled`."""

    x_scale: Tensor
    w_scale: Tensor
    bias: Tensor | None
    residual: Tensor | None
    activation: str
    per_row: bool
    raw: bool
    x_zero: Tensor | None = None
    w_sum: Tensor | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """In the order of the arguments of the kernels."""
        kept = (self.x_scale, self.w_scale, self.x_zero, self.w_sum, self.bias, self.residual)
        return tuple(None if value is None else value.contiguous() for value in kept)

    def constants(self) -> dict[str, Any]:
        """The constants of `store_scaled`."""
        return {"PER_ROW": int(self.per_row), "RAW": self.raw, "ACTIVATION": self.activation}

    def add(self, parts: Tensor, out: Tensor, shift: int = 0) -> None:
        """Finish the ``parts`` [PARTS, M, N] of a split product into ``out`` [M, N]."""
        count, m, n = parts.shape
        block_m, block_n = (1, 512) if m < 16 else (4, 256)
        sum_parts[triton.cdiv(m, block_m), triton.cdiv(n, block_n)](
            parts, out, *self.tensors(), m, n, count, SHIFT=shift, BLOCK_M=block_m, BLOCK_N=block_n, **self.constants(),
            enable_fp_fusion=False,
        )  # fmt: skip


def parts_like(out: Tensor, parts: int) -> Tensor:
    """Room for the parts of a split product; nothing of it is read before it is written. ``out`` where there is one part."""
    return out if parts == 1 else torch.empty((parts, *out.shape), dtype=torch.int32, device=out.device)


def pieces(config: Config, device: Device) -> int:
    """How `store_scaled` cuts a tile: at most 32 results of a thread at a time.

    By rows, of which a thread has several; by columns on Blackwell, where it has a whole row.
    """
    turns = config.block_m * config.block_n // (32 * config.num_warps) // 32
    if turns <= 1:
        return 1
    return -min(turns, config.block_n // 16) if 100 <= device.sm < 120 else min(turns, config.block_m // 16)


def fitting(config: Config, stage: int, device: Device) -> Config:
    """``config`` with as many stages, of ``stage`` bytes each, as the device has shared memory for; at least two."""
    return replace(config, num_stages=max(2, min(config.num_stages, device.shared_memory // stage)))


def device_guard(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """The device of ``x`` is the current one inside: that is where Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def parts_for(tiles: int, steps: int, device: Device, least: int = 4, most: int = 16) -> int:
    """Parts to cut K into, so that ``tiles`` output tiles of ``steps`` steps fill the device.

    Args:
        tiles: Output tiles.
        steps: Steps of the loop over K of a tile.
        device: The GPU.
        least: Steps that a part keeps.
        most: Parts.
    """
    parts = 1
    while 2 * parts <= most and tiles * parts < device.sm_count and steps >= 2 * parts * least:
        parts *= 2
    return parts


def best_tile(m: int, n: int, tiles: Mapping[tuple[int, int], float], device: Device) -> tuple[int, int]:
    """The output tile that takes least time: waves over the device times the tile's own cost.

    Args:
        m: Rows of the output.
        n: Columns of the output.
        tiles: (rows, columns) -> time of a tile that a multiprocessor works on alone, any unit.
        device: The GPU.
    """

    def time(tile: tuple[int, int]) -> tuple[float, int]:
        count = -(-m // tile[0]) * -(-n // tile[1])
        return -(-count // device.sm_count) * tiles[tile], -tile[0] * tile[1]

    return min(tiles, key=time)


def distinct(found: Iterable[Config]) -> list[Config]:
    """Each configuration once, not split and, where any is, in 2 parts: more make no other code."""
    return list(dict.fromkeys(replace(c, split_k=parts) for c in found for parts in (1, min(c.split_k, 2))))


_PLAIN = {"x_zero": None, "w_sum": None, "bias": None, "residual": None}
#: Name -> (types of the epilogue's arguments, its constants): the plain one, the exact integers, and everything at once.
EPILOGUES: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "fp16": (
        {"out": "*fp16", "x_scale": "*fp32", "w_scale": "*fp32"},
        _PLAIN | {"PER_ROW": 1, "RAW": False, "ACTIVATION": ""},
    ),
    "int32": (
        {"out": "*i32", "x_scale": "*fp32", "w_scale": "*fp32"},
        _PLAIN | {"PER_ROW": 1, "RAW": True, "ACTIVATION": ""},
    ),
    "bf16 zero bias residual gelu": (
        {
            "out": "*bf16", "x_scale": "*fp32", "w_scale": "*fp32", "x_zero": "*i32", "w_sum": "*i32", "bias": "*bf16",
            "residual": "*bf16",
        },
        {"PER_ROW": 1, "RAW": False, "ACTIVATION": "gelu"},
    ),
}  # fmt: skip


def reduce_case(family: str, epilogue: str = "fp16", shift: int = 0) -> CompileCase:
    """`sum_parts` as ``family`` uses it."""
    signature, constants = EPILOGUES[epilogue]
    return CompileCase(
        f"{family} sum of parts {epilogue}",
        family,
        sum_parts,
        signature | {"parts": "*i32", "M": "i32", "N": "i32", "PARTS": "i32"},
        constants | {"SHIFT": shift, "BLOCK_M": 1, "BLOCK_N": 512},
        unaligned=("M", "PARTS"),
        asynchronous=False,
    )
