"""How the 2:4 operators run on the sparse tensor cores: tiles, arguments of the one kernel, its launch, split K."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from fxcompress.kernels.configs import ASSUMED, Config, Device, Problem, lookup
from fxcompress.kernels.epilogue_triton import CompileCase
from fxcompress.kernels.gemm_triton import add_parts_kernel
from fxcompress.kernels.int8_triton import Epilogue, device_guard
from fxcompress.kernels.sparse_common import I8, Kind, Packed
from fxcompress.kernels.sparse_layout import TILE

__all__ = ["MOST_ROWS", "Finish", "add_parts", "candidates", "cases", "choose", "constants", "multiply", "plan"]

#: Rows above which a dense product (or cuSPARSELt) is taken: ``mma.sp`` is an older path than Hopper's ``wgmma``.
MOST_ROWS = 512
_NAMES = {torch.float16: "f16", torch.bfloat16: "bf16", torch.int8: "s8"}
_POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32"}


@dataclass(frozen=True)
class Finish:
    """What comes after the sums: ``activation(sums x_scale + bias + residual)``; 4-bit and 8-bit weights' scales are theirs.

    Attributes:
        bias: [N] or None.
        residual: [M, N], contiguous, or None.
        activation: Name.
        x_scale: float32 [M, 1] or [1], of 8-bit activations.
        w_scale: One for each output feature.
    """

    bias: Tensor | None = None
    residual: Tensor | None = None
    activation: str = ""
    x_scale: Tensor | None = None
    w_scale: Tensor | None = None


def choose(problem: Problem, device: Device, kind: Kind) -> Config:
    """The table's configuration, else a guess.

    ``block_k`` is what all warps take of K in one step of the loop, ``num_stages`` the ring of activations. Few rows: narrow
    tiles, whose warps share K, so that enough programs stream weights; many rows: wide tiles, to reuse weights.
    """
    found = lookup(problem, device)
    if found is not None:
        return found
    if problem.m > MOST_ROWS:
        return Config(route="cusparselt")
    most = 8 if kind.steps == 4 else 16  # dequantized weights and two sets of sums need registers
    tiles_m = min(most, max(1, 1 << (-(-problem.m // 8) - 1).bit_length()))  # of 8 rows
    wide = 8 if tiles_m >= 8 else 2 * tiles_m
    tiles_n = 2
    while 2 * tiles_n <= wide and _programs(problem, tiles_m, 2 * tiles_n) >= device.sm_count * 3 // 4:
        tiles_n *= 2
    if tiles_m >= 8:
        tiles_n = max(tiles_n, 4)
    shape = Config(8 * tiles_m, TILE * tiles_n, 0, num_warps=8, num_stages=2 if tiles_m <= 4 else 3)
    along_n, along_m = _warps(shape, kind)
    units = max(1, (4 if tiles_m <= 2 else 2) // max(kind.steps, 2 if kind is I8 else 1))
    if tiles_m == 1 and kind.steps == 4:
        units = 2
    shape = replace(shape, block_k=kind.unit * units * (8 // (along_n * along_m)))
    return replace(shape, split_k=_split(problem, shape, tiles_m, tiles_n, device))


def candidates(problem: Problem, device: Device, kind: Kind) -> list[Config]:
    """Configurations worth measuring: narrower and wider, shallower and deeper than the guess; the other routes."""
    tile = choose(replace(problem, m=min(problem.m, MOST_ROWS)), device, kind)
    if tile.route != "kernel":  # a table's
        return [Config(route="dense"), Config(route="cusparselt")]
    found = [
        replace(
            tile,
            block_n=n,
            block_k=tile.block_k * deeper // 4 * tile.block_n // n,
            num_stages=s,
            split_k=tile.split_k * p,
        )
        for n in (32, 64, 128)
        for deeper in (2, 4, 8)
        for s in (2, 3)
        for p in (1, 2)
    ]
    return [*(c for c in found if c.block_k >= kind.unit), Config(route="dense"), Config(route="cusparselt")]


def _programs(problem: Problem, tiles_m: int, tiles_n: int) -> int:
    return -(-problem.n // (TILE * tiles_n)) * max(1, -(-problem.m // (8 * tiles_m)))


def _split(problem: Problem, shape: Config, tiles_m: int, tiles_n: int, device: Device) -> int:
    """Parts of K that fill the device, each with two steps of the loop at least."""
    room = device.sm_count // _programs(problem, tiles_m, tiles_n)
    return max(1, min(room, -(-problem.k // shape.block_k) // 2, 8))


def _warps(config: Config, kind: Kind) -> tuple[int, int]:
    """Warps along the output features and along the rows; the others share K."""
    tiles_m, tiles_n = config.block_m // 8, config.block_n // TILE
    own = 4 if tiles_m > 4 and kind.steps < 4 else 2
    along_n = max(1, min(tiles_n // own, config.num_warps))
    return along_n, max(1, min(tiles_m // 4, config.num_warps // along_n))


def constants(config: Config, kind: Kind, units: int, group: int) -> dict[str, Any]:
    """Constants of the kernel, TRIPS among them, for weights of ``units`` pieces with ``group`` steps to a scale."""
    along_n, along_m = _warps(config, kind)
    along_k = config.num_warps // (along_n * along_m)
    own = max(1, config.block_k // (kind.unit * along_k))
    steps = -(-units // (along_k * own))
    trips = -(-steps // config.split_k)
    parts = -(-steps // trips)
    return {
        "TRIPS": trips, "VECTORS": kind.vectors, "METAS": kind.metas, "STEPS": kind.steps,
        "MT": config.block_n // TILE, "NT": config.block_m // 8, "KW": along_k, "WM": along_n, "WN": along_m, "U": own,
        "STAGES": config.num_stages, "EVEN": units == parts * trips * along_k * own, "GROUP": group,
        "RUN": math.gcd(group, 4) if group else 4, "SPLIT": parts > 1, "num_warps": config.num_warps,
    }  # fmt: skip


def plan(
    rows: Tensor, weight: Packed, out: Tensor, after: Finish, config: Config
) -> tuple[tuple[int, int, int], dict[str, Any], Tensor]:
    """Programs and arguments of the kernel, and the parts [parts, M, N] it writes (``out`` itself where there is one).

    Args:
        rows: Contiguous [M, K'].
        weight: What they are multiplied by.
        out: [M, N].
        after: What comes after the sums.
        config: Of route ``kernel``.
    """
    m, n, kind = rows.shape[0], weight.n, weight.kind
    given = constants(config, kind, weight.units, weight.group)
    parts = -(-weight.units // (given["TRIPS"] * given["KW"] * given["U"]))
    sums = torch.int32 if kind is I8 else torch.float32
    target = out if parts == 1 else torch.empty((parts, m, n), dtype=sums, device=rows.device)
    split = given["SPLIT"]
    arguments: dict[str, Any] = {
        "values": weight.values.contiguous().view(torch.int32), "meta": weight.meta.contiguous(),
        "x": rows.view(torch.int32), "scales": weight.scales if weight.group else None,
        "x_scale": None if split else after.x_scale, "w_scale": None if split else after.w_scale,
        "bias": None if split else after.bias, "residual": None if split else after.residual, "out": target,
        "M": m, "N": n, "UNITS": weight.units, "GROUPS": weight.groups, "KIND": _NAMES[rows.dtype],
        "RAW": split or out.dtype == torch.int32,
        "PER_ROW": int(after.x_scale is not None and after.x_scale.dim() > 1),
        "ACTIVATION": "" if split else after.activation,
    }  # fmt: skip
    grid = triton.cdiv(m, config.block_m), triton.cdiv(n, config.block_n), parts
    return grid, given | arguments, target


def multiply(rows: Tensor, weight: Packed, out: Tensor, after: Finish, config: Config) -> None:
    """``rows`` [M, K'] times the packed weight, finished into ``out`` [M, N], on the sparse tensor cores."""
    from fxcompress.kernels.sparse_gluon import mma_sp_kernel

    grid, arguments, parts = plan(rows, weight, out, after, config)
    with device_guard(rows):
        mma_sp_kernel[grid](**arguments, enable_fp_fusion=weight.kind is not I8)
        if parts is not out:
            add_parts(parts, out, after)


def add_parts(parts: Tensor, out: Tensor, after: Finish) -> None:
    """Add the parts in their order and finish."""
    count, m, n = parts.shape
    if parts.dtype == torch.int32:
        x_scale, w_scale = after.x_scale, after.w_scale
        raw = x_scale is None or w_scale is None
        unread = parts.view(-1)[:1].view(torch.float32)
        Epilogue(
            unread if x_scale is None else x_scale, unread if w_scale is None else w_scale, after.bias, after.residual,
            after.activation, x_scale is not None and x_scale.dim() > 1, raw,
        ).add(parts, out)  # fmt: skip
        return
    block_m, block_n = 4, 128
    add_parts_kernel[triton.cdiv(m, block_m), triton.cdiv(n, block_n)](
        parts, after.w_scale, after.bias, after.residual, out, m, n, SPLIT_K=count, ACTIVATION=after.activation,
        BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


#: Instructions per weight of the loop: at one row (streaming the weights at the speed of memory leaves room for 8, 4 and
#: 3), and more for every row of a tile.
_BUDGET = {"sp24": (1.6, 0.045), "sp24_w8a8": (1.4, 0.03), "sp24_w4": (2.4, 0.05)}


def cases(kind: Kind, sm: int, dtypes: Sequence[torch.dtype], groups: Sequence[int] = (0,)) -> list[CompileCase]:
    """Every tile `choose` gives on ``sm`` for ``kind``; of the smallest all groups and dtypes too."""
    device, dtype = ASSUMED[sm], dtypes[0]
    sizes = [(m, n) for m in (1, 16, 32, 64, 512) for n in (512, 4096, 28672)]
    found = [choose(Problem(kind.family, m, n, 8192, dtype), device, kind) for m, n in sizes]
    shapes = list(dict.fromkeys(replace(c, split_k=1) for c in found))
    usual, first, last = groups[len(groups) // 2], shapes[0], shapes[-1]
    made = [_case(shape, kind, dtype, usual, "") for shape in shapes]
    made += [_case(first, kind, dtype, group, "") for group in groups if group != usual]
    made += [_case(first, kind, other, usual, "") for other in dtypes[1:]]
    return [*made, _case(first, kind, dtype, usual, "split"), _case(last, kind, dtype, groups[-1], "tail")]


def _case(shape: Config, kind: Kind, dtype: torch.dtype, group: int, ending: str) -> CompileCase:
    """One tile; ``ending``: ``split`` K, or a ``tail`` of K with everything that can come after the sums."""
    from fxcompress.kernels.sparse_gluon import mma_sp_kernel

    given = constants(shape, kind, 1 << 20, group) | {"EVEN": ending != "tail", "SPLIT": ending == "split"}
    del given["TRIPS"]
    split, full = ending == "split", ending == "tail"
    output = (torch.int32 if kind is I8 else torch.float32) if split else torch.float16 if kind is I8 else dtype
    words = {"values": "*i32", "meta": "*i32", "x": "*i32", "out": _POINTERS[output]}
    numbers = dict.fromkeys(("M", "N", "UNITS", "TRIPS", "GROUPS"), "i32")
    present = {
        "scales": _POINTERS[dtype] if group else None,
        "x_scale": "*fp32" if kind is I8 and not split else None,
        "w_scale": "*fp32" if kind is I8 and not split else None,
        "bias": _POINTERS[output] if full else None,
        "residual": _POINTERS[output] if full else None,
    }
    fixed = {"KIND": _NAMES[dtype], "RAW": split, "PER_ROW": 1, "ACTIVATION": "gelu" if full else ""}
    name = f"{kind.family} {_NAMES[dtype]} {shape.block_m}x{shape.block_n}x{shape.block_k}"
    fixed_part, a_row = _BUDGET[kind.family]
    return CompileCase(
        f"{name}{f' g{32 * group}' if group else ''}{ending and ' ' + ending}", kind.family, mma_sp_kernel,
        words | numbers | {k: v for k, v in present.items() if v}, {k: v for k, v in present.items() if not v} | given | fixed,
        shape.num_warps, shape.num_stages, weights=shape.block_n * shape.block_k,
        mma=("IMMA.SP",) if kind is I8 else ("HMMA.SP",), budget=fixed_part + shape.block_m * a_row if ending != "tail" else None,
        unaligned=tuple(numbers), gluon=True,
    )  # fmt: skip
