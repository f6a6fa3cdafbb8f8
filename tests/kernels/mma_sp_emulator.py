"""The sparse tensor cores in NumPy, written from the PTX ISA alone, and enough of Gluon to run a kernel line by line on it.

Nothing here knows the packed layouts or the kernel: it turns registers of lanes into matrices by the formulas of the
PTX ISA, sections "Sparse matrix storage" and "Matrix fragments for sparse mma.m16n8k32 with .f16 / .bf16" and
"... mma.m16n8k64 with .u8 / .s8", and multiplies. Addresses are checked, uninitialised shared memory is poison, an
asynchronous copy arrives only when it has been waited for.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch

#: What memory holds before it is written.
POISON = 0x7FC07FC0


class Tensor(np.ndarray):
    """An array with the methods a Gluon tensor has."""

    def to(self, dtype: Any) -> Any:
        return self.astype(dtype)

    def permute(self, order: list[int]) -> Any:
        return self.transpose(order)


def tensor(value: Any) -> Any:
    return np.asarray(value).view(Tensor)


# ------------------------------------------------------------------------------------------------ numbers
def floats(bits: np.ndarray, kind: str) -> np.ndarray:
    """16-bit patterns as float64."""
    if kind == "f16":
        return bits.astype(np.uint16).view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def elements(words: np.ndarray, kind: str) -> np.ndarray:
    """Registers [..., R] as the numbers in them [..., R * 2 or 4], the low bits first."""
    unsigned = words.astype(np.int64) & 0xFFFFFFFF
    width = 8 if kind == "s8" else 16
    parts = [(unsigned >> (width * i)) & ((1 << width) - 1) for i in range(32 // width)]
    stacked = np.stack(parts, -1).reshape(*words.shape[:-1], -1)
    if kind == "s8":
        return stacked.astype(np.uint8).view(np.int8).astype(np.float64)
    return floats(stacked, kind)


# ------------------------------------------------------------------------------------------------ mma.sp
def a_element(lane: int, i: int, kind: str) -> tuple[int, int, int]:
    """Row, first column of the 4-wide chunk and number (0, 1) within it of element i of operand A of a lane."""
    group, thread = lane >> 2, lane % 4
    if kind == "s8":  # m16n8k64: row = groupID for ai where 0 <= i < 4 || 8 <= i < 12
        row = group if 0 <= i < 4 or 8 <= i < 12 else group + 8
        first = thread * 8 + (0 if i < 8 else 32)
        return row, first + 4 * (i % 4 // 2), i % 2
    row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8  # m16n8k32
    return row, thread * 4 + (0 if i < 4 else 16), i % 2


def b_element(lane: int, i: int, kind: str) -> tuple[int, int]:
    """Row (along K) and column of element i of operand B of a lane."""
    group, thread = lane >> 2, lane % 4
    if kind == "s8":  # as mma.m16n8k64.u4 with bytes: 16 rows to a register
        return thread * 4 + i % 4 + 16 * (i // 4), group
    return thread * 2 + i % 2 + 8 * (i // 2), group


def c_element(lane: int, i: int) -> tuple[int, int]:
    """Row and column of element i of operand C of a lane."""
    group, thread = lane >> 2, lane % 4
    return (group if i < 2 else group + 8), thread * 2 + (i & 1)


def metadata_place(row: int, column: int, selector: int, kind: str) -> tuple[int, int]:
    """Lane and lowest bit that hold the two indices of the chunk of A that begins at (row, column)."""
    quad, high = 4 * (row % 8), row >= 8
    if kind == "s8":  # all four threads: (T0: low rows, T1: high rows) for columns 0-31, (T2, T3) for 32-63
        return quad + 2 * (column // 32) + high, column % 32
    # a pair of threads: (T0, T1) with selector 0, (T2, T3) with 1; 16 columns each, high rows in bits 16-31
    return quad + 2 * selector + column // 16, column % 16 + 16 * high


@cache
def places(kind: str, selector: int) -> tuple[dict[int, np.ndarray], np.ndarray, np.ndarray]:
    """What the functions above say of all lanes and elements.

    A: number within a chunk -> columns lane, i, row, column, holder, bit; B: lane, i, row, column; C likewise.
    """
    a = np.array(
        [
            (lane, i, *a_element(lane, i, kind), *metadata_place(*a_element(lane, i, kind)[:2], selector, kind))
            for lane in range(32)
            for i in range(16 if kind == "s8" else 8)
        ]
    )
    b = np.array([(n, i, *b_element(n, i, kind)) for n in range(32) for i in range(16 if kind == "s8" else 8)])
    c = np.array([(lane, i, *c_element(lane, i)) for lane in range(32) for i in range(4)])
    return {number: np.delete(a[a[:, 4] == number], 4, 1).T for number in (0, 1)}, b.T, c.T


def mma_sp(a: Any, b: Any, c: Any, e: Any, kind: str, selector: int) -> Any:
    """One instruction a leading index: registers [..., 32 lanes, 4] and metadata [..., 32, 1] -> [..., 32, 4]."""
    k = 64 if kind == "s8" else 32
    of_a, of_b, (lanes, registers, rows, columns) = places(kind, selector)
    av, bv, meta = elements(a, kind), elements(b, kind), e[..., 0].astype(np.int64) & 0xFFFFFFFF
    dense = np.zeros((*np.broadcast_shapes(a.shape[:-2], e.shape[:-2]), 16, k))
    right = np.zeros((*b.shape[:-2], k, 8))
    for number, (lane, i, row, column, holder, bit) in of_a.items():
        nibble = (meta[..., holder] >> bit) & 15
        assert np.isin(nibble, (0b0100, 0b1000, 0b1001, 0b1100, 0b1101, 0b1110)).all(), "metadata is not ordered"
        for place in range(4):
            dense[..., row, column + place] += np.where((nibble >> (2 * number)) & 3 == place, av[..., lane, i], 0.0)
    right[..., of_b[2], of_b[3]] = bv[..., of_b[0], of_b[1]]
    product = dense @ right
    out = np.array(np.broadcast_to(c, (*product.shape[:-2], 32, 4)))
    out[..., lanes, registers] += product[..., rows, columns].astype(out.dtype)
    return tensor(out)


# ------------------------------------------------------------------------------------------------ other PTX
def run_ptx(asm: str, inputs: dict[str, np.ndarray], outputs: int) -> list[np.ndarray]:
    """Run straight-line PTX on arrays of 32-bit words: the operations that dequantisation needs."""
    registers: dict[str, np.ndarray] = {k: v.astype(np.int64) & 0xFFFFFFFF for k, v in inputs.items()}
    shape = next(iter(inputs.values())).shape

    def read(name: str) -> np.ndarray:
        return np.full(shape, int(name, 0), np.int64) if name[0].isdigit() else registers[name]

    def pairs(kind: str, function: Callable[..., np.ndarray], *names: str) -> np.ndarray:
        halves = []
        for half in range(2):
            result = function(*(floats((read(n) >> (16 * half)) & 0xFFFF, kind) for n in names))
            rounded = torch.from_numpy(result).to(torch.float16 if kind == "f16" else torch.bfloat16)
            halves.append(rounded.view(torch.int16).numpy().astype(np.int64) & 0xFFFF)
        return halves[0] | halves[1] << 16

    simple: dict[str, Callable[..., np.ndarray]] = {
        "mov.b32": read,
        "shr.u32": lambda value, by: read(value) >> int(by),
        "lop3.b32": lambda x, y, z, table: (read(x) & read(y)) | read(z),  # 0xea
        "sub.f16x2": lambda *names: pairs("f16", lambda x, y: x - y, *names),
        "fma.rn.f16x2": lambda *names: pairs("f16", lambda x, y, z: x * y + z, *names),
        "fma.rn.bf16x2": lambda *names: pairs("bf16", lambda x, y, z: x * y + z, *names),
    }
    for line in re.findall(r"[^;{}]+", asm):
        words = line.replace(",", " ").split()
        if words and words[0] != ".reg":
            assert words[0] != "lop3.b32" or words[-1] == "0xea"
            registers[words[1]] = simple[words[0]](*words[2:])
    return [registers[f"${i}"].astype(np.uint32).view(np.int32) for i in range(outputs)]


# ------------------------------------------------------------------------------------------------ Gluon
class Pointer:
    """Into one flat array; what is read and written must lie inside."""

    def __init__(self, base: np.ndarray, offset: Any = 0) -> None:
        self.base, self.offset = base, offset
        self.dtype = SimpleNamespace(element_ty=base.dtype)

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.base, self.offset + other)

    def places(self, mask: Any) -> tuple[Any, Any]:
        offset, inside = np.broadcast_arrays(np.asarray(self.offset, np.int64), True if mask is None else mask)
        used = offset[inside]
        assert used.size == 0 or (used.min() >= 0 and used.max() < self.base.size), "address out of bounds"
        return np.where(inside, offset, 0), inside


class Slot:
    """A tile of shared memory."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def load(self, layout: Any) -> Any:
        return tensor(self.array.copy())


class Memory:
    """Shared memory, and the asynchronous copies on their way to it."""

    def __init__(self) -> None:
        self.groups: list[list[tuple[np.ndarray, np.ndarray]]] = [[]]

    def allocate(self, dtype: Any, shape: list[int], layout: Any) -> Any:
        array = np.full(shape, POISON, np.int64).astype(np.int32)
        return SimpleNamespace(index=lambda i: Slot(array[int(i)]))

    def copy(self, slot: Slot, pointer: Pointer, mask: Any = None) -> None:
        places, inside = pointer.places(mask)
        slot.array[...] = POISON
        self.groups[-1].append((slot.array, np.where(inside, pointer.base[places], 0)))

    def commit(self) -> None:
        self.groups.append([])

    def wait(self, outstanding: int) -> None:
        done, self.groups = self.groups[: -1 - outstanding], self.groups[-1 - outstanding :]
        for group in done:
            for target, data in group:
                target[...] = data


def load(pointer: Pointer, mask: Any = None, other: Any = None, eviction_policy: str = "") -> Any:
    places, inside = pointer.places(mask)
    poison = np.array(POISON, np.int64).astype(pointer.base.dtype) if other is None else other
    return tensor(np.where(inside, pointer.base[places], np.asarray(poison).astype(pointer.base.dtype)))


def store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    places, inside = pointer.places(mask)
    pointer.base[places[inside]] = np.broadcast_to(value, places.shape)[inside]


def assembly(asm: Any, constraints: Any, args: list[Any], dtype: Any, is_pure: bool, pack: int) -> Any:
    text = str(getattr(asm, "value", asm))
    assert pack == 4
    if text.startswith("mma.sp::ordered_metadata.sync.aligned."):
        kind = "s8" if "m16n8k64.row.col.s32.s8.s8.s32" in text else "bf16" if ".f32.bf16.bf16.f32" in text else "f16"
        assert kind == "s8" or "m16n8k32.row.col.f32" in text
        a, b, c, meta = args
        return mma_sp(a, b, c, meta, kind, int(text.rstrip(";").split()[-1], 0))
    (words,) = args  # four words in, four registers for each out
    inputs = {f"${16 + i}": np.asarray(words[..., i]) for i in range(4)}
    found = run_ptx(text, inputs, 16)
    return tuple(tensor(np.stack(found[4 * i : 4 * i + 4], -1)) for i in range(4))


def namespace(memory: Memory, program: list[int], programs: tuple[int, ...]) -> Any:
    """What ``gl`` is for a running kernel."""
    return SimpleNamespace(
        program_id=lambda axis: tensor(np.int64(program[axis])), num_programs=lambda axis: programs[axis],
        arange=lambda start, end, layout: tensor(np.arange(start, end, dtype=np.int64)), load=load, store=store,
        zeros=lambda shape, dtype, layout: tensor(np.zeros(shape, dtype)), minimum=np.minimum, where=np.where,
        sum=lambda x, axis: tensor(x.sum(axis, dtype=x.dtype)), static_range=range, convert_layout=lambda x, *_, **__: x,
        inline_asm_elementwise=assembly, allocate_shared_memory=memory.allocate, int32=np.int32, int64=np.int64,
        float32=np.float32, constexpr=int, BlockedLayout=lambda *_: None, SwizzledSharedLayout=lambda *_, **__: None,
        SliceLayout=lambda *_: None,
    )  # fmt: skip


def array(value: torch.Tensor) -> np.ndarray:
    """Its memory as a flat array; a copy in float32 of bfloat16, which NumPy has not."""
    return value.view(-1).float().numpy() if value.dtype == torch.bfloat16 else value.view(-1).numpy()


def run_kernel(module: ModuleType, name: str, grid: tuple[int, int, int], arguments: dict[str, Any]) -> None:
    """Run a Gluon kernel of ``module`` for every program of ``grid``. Tensors among the arguments are written in place."""
    from fxcompress.kernels.epilogue import ACTIVATIONS

    given = {k: Pointer(array(v)) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    memory, program = Memory(), [0, 0, 0]
    space: dict[str, Any] = dict(vars(module))
    space["gl"] = namespace(memory, program, grid)
    space["copy_async"] = memory.copy
    space["async_copy"] = SimpleNamespace(commit_group=memory.commit, wait_group=memory.wait)
    for key, value in vars(module).items():
        if type(value).__name__ == "GluonJITFunction":
            space[key] = FunctionType(value.fn.__code__, space, key, value.fn.__defaults__)
    space["activate"] = lambda y, act: tensor(ACTIVATIONS[act](torch.from_numpy(np.asarray(y))).numpy())
    for place in np.ndindex(*grid):
        program[:] = place
        memory.groups = [[]]
        space[name](**given)
