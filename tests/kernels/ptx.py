"""The few PTX instructions of the kernels' inline assembly, in NumPy: what no interpreter of Triton runs."""

import re

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]


def _halves(words: Words) -> NDArray[np.float64]:
    return words.view(np.uint8).reshape(-1, 4).view(np.float16).astype(np.float64)


def _words(halves: NDArray[np.float64]) -> Words:
    return np.ascontiguousarray(halves.astype(np.float16)).view(np.uint32).reshape(-1)


def _lop3(a: Words, b: Words, c: Words, table: int) -> Words:
    out = np.zeros_like(a)
    for row in range(8):
        if table >> row & 1:
            x, y, z = (v if row >> bit & 1 else ~v for v, bit in ((a, 2), (b, 1), (c, 0)))
            out |= x & y & z
    return out


def _prmt(a: Words, b: Words, selector: int) -> Words:
    pool = [(v >> np.uint32(8 * i)) & np.uint32(0xFF) for v in (a, b) for i in range(4)]
    out = np.zeros_like(a)
    for i in range(4):
        nibble = selector >> 4 * i & 15
        assert nibble < 8, "the sign mode of prmt"
        out |= pool[nibble] << np.uint32(8 * i)
    return out


def run(assembly: str, inputs: list[Words], outputs: int) -> list[Words]:
    """Run straight-line assembly on every lane; ``$0`` ... are ``outputs`` outputs, then the inputs.

    Args:
        assembly: As in ``tl.inline_asm_elementwise``.
        inputs: One array of 32-bit registers per operand.
        outputs: How many output operands come first.
    """
    registers = {f"${outputs + i}": x for i, x in enumerate(inputs)}

    def value(operand: str) -> Words:
        if operand in registers:
            return registers[operand]
        return np.full_like(inputs[0], int(operand, 0))

    for line in re.findall(r"([a-z][\w.]*\s[^;{}]*);", assembly.replace("{", "")):
        name, _, rest = line.strip().partition(" ")
        if name == ".reg" or name.startswith("reg"):
            continue
        to, *operands = (o.strip() for o in rest.split(","))
        if name.startswith("lop3"):
            a, b, c = map(value, operands[:3])
            registers[to] = _lop3(a, b, c, int(operands[3], 0))
        elif name.startswith("prmt"):
            registers[to] = _prmt(value(operands[0]), value(operands[1]), int(operands[2], 0))
        else:
            registers[to] = _simple(name, [value(o) for o in operands])
    return [registers[f"${i}"] for i in range(outputs)]


def _simple(name: str, x: list[Words]) -> Words:
    if name == "mov.b32":
        return x[0]
    if name in ("and.b32", "or.b32", "xor.b32"):
        return {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[name[:-4]](x[0], x[1])
    if name in ("shr.u32", "shr.b32"):
        return x[0] >> x[1]
    if name in ("sub.f16x2", "sub.rn.f16x2"):
        return _words(_halves(x[0]) - _halves(x[1]))
    if name == "fma.rn.f16x2":  # the exact sum, rounded once
        return _words(_halves(x[0]) * _halves(x[1]) + _halves(x[2]))
    raise NotImplementedError(name)
