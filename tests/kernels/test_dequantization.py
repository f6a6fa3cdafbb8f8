"""The inline assembly that dequantizes, which no interpreter of Triton runs: emulated, for every nibble, byte and zero point."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fxcompress
from fxcompress.kernels import layouts

Registers = dict[str, Tensor]
_WORD = 0xFFFFFFFF


def _assembly() -> dict[str, list[str]]:
    """Function -> the assembly in it, in the order written; read from the source, so that Triton is not needed."""
    path = inspect.getsourcefile(layouts)
    assert path is not None and fxcompress.__file__
    with open(path.replace("layouts.py", "gemm_triton.py"), encoding="utf-8") as file:
        tree = ast.parse(file.read())
    found: dict[str, list[str]] = {}
    for function in (n for n in tree.body if isinstance(n, ast.FunctionDef)):
        for call in (c for c in ast.walk(function) if isinstance(c, ast.Call)):
            if isinstance(call.func, ast.Attribute) and call.func.attr == "inline_asm_elementwise":
                text = ast.literal_eval(call.args[0])
                found.setdefault(function.name, []).append(text)
    return found


def pair(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Registers (int64) -> float64 [count, 2], the lower half first."""
    halves = torch.stack((words & 0xFFFF, words >> 16), -1)
    return ((halves ^ 0x8000) - 0x8000).to(torch.int16).view(dtype).double()


def _registers(values: Tensor, dtype: torch.dtype) -> Tensor:
    bits = values.to(dtype).view(torch.int16).long() & 0xFFFF
    return bits[..., 0] | bits[..., 1] << 16


def _prmt(a: Tensor, b: Tensor, selector: int) -> Tensor:
    pool = [v >> 8 * i & 255 for v in (a, b) for i in range(4)]
    out = torch.zeros_like(a)
    for i in range(4):
        out |= pool[selector >> 4 * i & 15] << 8 * i
    return out


def _halves(dtype: torch.dtype, compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *given: _registers(compute(*(pair(g, dtype) for g in given)), dtype)


def _lop3(a: Tensor, b: Tensor, c: Tensor, table: Tensor) -> Tensor:
    assert table.unique().tolist() == [0xEA]
    return a & b | c


_INSTRUCTIONS: dict[str, Callable[..., Tensor]] = {
    "mov.b32": lambda a: a,
    "or.b32": lambda a, b: a | b,
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: (a << b) & _WORD,
    "shr.u32": lambda a, b: a >> b,
    "lop3.b32": _lop3,
    "prmt.b32": lambda a, b, s: _prmt(a, b, int(s[0])),
    "sub.f16x2": _halves(torch.float16, lambda a, b: a - b),
    "fma.rn.f16x2": _halves(torch.float16, lambda a, b, c: a * b + c),
    "fma.rn.bf16x2": _halves(torch.bfloat16, lambda a, b, c: a * b + c),
}


def emulate(text: str, registers: Registers) -> Registers:
    """Run straight-line assembly; halves that ``mov`` unpacks are left in registers of their own."""
    like = next(iter(registers.values()))
    for line in text.strip()[1:-1].split(";"):
        name, _, rest = line.strip().partition(" ")
        if not name or name == ".reg":
            continue
        target, *operands = re.findall(r"\{[^}]*\}|[^,\s]+", rest)
        values = [
            registers[o] if o in registers else torch.full_like(like, int(o, 0)) for o in operands
        ]  # a register that was never written is no number: int() raises
        result = _INSTRUCTIONS[name](*values)
        if target.startswith("{"):
            low, high = re.findall(r"\$\d", target)
            registers |= {low: result & 0xFFFF, high: result >> 16}
        else:
            registers[target] = result
    return registers


@pytest.mark.parametrize(("index", "dtype"), [(0, torch.float16), (1, torch.bfloat16)])
def test_nibbles(index: int, dtype: torch.dtype) -> None:
    low = torch.arange(1 << 16)
    high = low.flip(0) * 7 & 0xFFFF
    for zero in range(16):
        points = [(zero + 3 * plane) % 16 for plane in range(4)]
        inputs = {f"${5 + j}": torch.full_like(low, z | z << 16) for j, z in enumerate(points)}
        done = emulate(_assembly()["_nibbles_asm"][index], {"$4": low | high << 16, **inputs})
        for plane, z in enumerate(points):
            wanted = torch.stack((low >> 4 * plane & 15, high >> 4 * plane & 15), -1) - z
            assert torch.equal(pair(done[f"${plane}"], dtype), wanted.double())


@pytest.mark.parametrize(("index", "dtype"), [(0, torch.float16), (1, torch.bfloat16)])
def test_bytes(index: int, dtype: torch.dtype) -> None:
    first = torch.arange(256)
    each = [first, first.flip(0), first * 7 & 255, first * 11 + 5 & 255]
    done = emulate(_assembly()["bytes_to"][index], {"$4": each[0] | each[1] << 8 | each[2] << 16 | each[3] << 24})
    for number, byte in enumerate(each):
        assert torch.equal(pair(done[f"${number}"], dtype)[:, 0], ((byte ^ 128) - 128).double())


def test_products_of_bfloat16_are_rounded_once() -> None:
    integers = torch.arange(-128, 128).double()
    scales = torch.rand(256, generator=torch.Generator().manual_seed(0)).bfloat16().double()
    w, s = torch.stack((integers, integers.flip(0)), -1), torch.stack((scales, scales), -1)
    given = {"$1": _registers(w, torch.bfloat16), "$2": _registers(s, torch.bfloat16)}
    (text,) = _assembly()["times"]
    assert torch.equal(pair(emulate(text, given)["$0"], torch.bfloat16), (w * s).bfloat16().double())
