"""The machine code of a Triton kernel for a named GPU, without having one: compile, disassemble, count, judge.

The measure is instructions per weight: the instructions of the main loop times the lanes of a program (32 a warp), over
the weights that one step of the loop multiplies. A loop that takes more than the chip can issue while it reads those
weights from memory cannot reach memory speed, however good the rest is.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from fxcompress.kernels.epilogue_triton import CompileCase

__all__ = [
    "SHARED_LIMIT",
    "Instruction",
    "Report",
    "compile_case",
    "inspect",
    "loops",
    "main_loop",
    "parse",
    "problems",
]

#: Bytes of shared memory one program may use, by compute capability.
SHARED_LIMIT: Final = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
_LANES: Final = 32
_LABEL: Final = re.compile(r"^\s*(\.L_\w+):")
_CODE: Final = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")
_BRANCH: Final = re.compile(r"`\((\.L_\w+)\)")
_USAGE: Final = re.compile(r"REG:(\d+).*?STACK:(\d+).*?LOCAL:(\d+)")


@dataclass(frozen=True)
class Instruction:
    """One instruction of a disassembly.

    Attributes:
        name: With its suffixes: ``HMMA.16816.F32``.
        target: Where in the list it branches to; None when it does not branch to a label.
    """

    name: str
    target: int | None = None

    @property
    def base(self) -> str:
        """Without suffixes: ``HMMA``."""
        return self.name.partition(".")[0]

    @property
    def multiplies(self) -> bool:
        """It runs on the tensor cores."""
        return "MMA" in self.base


def parse(sass: str) -> list[Instruction]:
    """The instructions of what ``nvdisasm -c`` or ``cuobjdump -sass`` printed, branches resolved."""
    labels: dict[str, int] = {}
    found: list[tuple[str, str | None]] = []
    for line in sass.splitlines():
        label = _LABEL.match(line)
        code = _CODE.match(line)
        if label:
            labels[label[1]] = len(found)
        elif code:
            to = _BRANCH.search(code[2]) if code[1].startswith("BRA") else None
            found.append((code[1], to[1] if to else None))
    return [Instruction(name, labels.get(to) if to else None) for name, to in found]


def loops(code: Sequence[Instruction]) -> list[tuple[int, int]]:
    """First and last index of every loop (a branch back), those that start at one place merged.

    Waiting for a barrier is moved behind the end of the code, with a branch back into the middle of a loop: what
    begins inside a loop and ends outside is none.
    """
    ends: dict[int, int] = {}
    for place, instruction in enumerate(code):
        if instruction.target is not None and instruction.target <= place:
            ends[instruction.target] = max(place, ends.get(instruction.target, 0))
    every = sorted(ends.items())
    return [(a, b) for a, b in every if not any(c < a <= d < b for c, d in every)]


def main_loop(code: Sequence[Instruction]) -> list[Instruction]:
    """The innermost loop with tensor core instructions; of several the one with most of them.

    Without tensor core instructions the longest innermost loop; without any loop everything.
    """
    every = loops(code)
    inner = [(a, b) for a, b in every if not any((a, b) != (c, d) and a <= c and d <= b for c, d in every)]
    working = [(a, b) for a, b in every if any(i.multiplies for i in code[a : b + 1])]
    innermost = [(a, b) for a, b in working if not any((a, b) != (c, d) and a <= c and d <= b for c, d in working)]
    if innermost:
        a, b = max(innermost, key=lambda s: sum(i.multiplies for i in code[s[0] : s[1] + 1]))
        return list(code[a : b + 1])
    if any(i.multiplies for i in code) or not inner:
        return list(code)
    a, b = max(inner, key=lambda s: s[1] - s[0])
    return list(code[a : b + 1])


@dataclass(frozen=True)
class Report:
    """What was found in the code of one case.

    Attributes:
        sm: Compute capability times ten.
        instructions: In the main loop.
        per_weight: Instructions per weight of the main loop; None where the case counts no weights.
        mma: Tensor core instructions of the main loop: full name -> how many.
        loops: The code has a loop at all.
        conversions: Conversions from integer to float (I2F) in the main loop.
        histogram: Instructions of the main loop by name without suffixes.
        registers: Of a thread.
        stack: Bytes of a thread's stack frame: arrays and spilled registers. The compiler may reserve some it never touches.
        spills: Loads and stores of local memory in the whole code.
        shared: Bytes of shared memory of a program.
        copies: Asynchronous 16-byte copies (LDGSTS.128) and bulk copies (UTMALDG) in the main loop.
        narrow_copies: Asynchronous copies of 4 or 8 bytes there.
    """

    sm: int
    instructions: int
    per_weight: float | None
    mma: dict[str, int]
    loops: bool
    conversions: int
    histogram: dict[str, int] = field(default_factory=dict)
    registers: int = 0
    stack: int = 0
    spills: int = 0
    shared: int = 0
    copies: int = 0
    narrow_copies: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Report:
        """Inverse of `to_dict`; further entries are left out."""
        return cls(**{field.name: values[field.name] for field in fields(cls)})


def inspect(
    sass: str, sm: int, *, lanes: int, weights: int = 0, registers: int = 0, stack: int = 0, shared: int = 0
) -> Report:
    """Count what a disassembly holds.

    Args:
        sass: What ``nvdisasm -c`` printed.
        sm: Compute capability times ten.
        lanes: Threads of a program.
        weights: Weights that one step of the main loop multiplies; 0: not counted.
        registers: Of a thread.
        stack: Bytes of a thread's stack frame.
        shared: Bytes of shared memory of a program.
    """
    code = parse(sass)
    body = main_loop(code)
    copies = [i.name for i in body if i.base == "LDGSTS"]
    wide = sum(name.endswith(".128") or ".128." in name for name in copies)
    return Report(
        sm=sm,
        instructions=len(body),
        per_weight=round(len(body) * lanes / weights, 3) if weights else None,
        mma=dict(Counter(i.name for i in body if i.multiplies)),
        loops=bool(loops(code)),
        conversions=sum(i.base in ("I2F", "I2FP") for i in body),
        histogram=dict(Counter(i.base for i in body).most_common()),
        registers=registers,
        stack=stack,
        spills=sum(i.base in ("LDL", "STL") for i in code),
        shared=shared,
        copies=wide + sum(i.base.startswith(("UTMALDG", "UBLKCP")) for i in body),
        narrow_copies=len(copies) - wide,
    )


# ------------------------------------------------------------------------------------------------ compiling
def compile_case(case: CompileCase, sm: int) -> Report:
    """Compile a case for a GPU of that compute capability and read its code.

    Raises:
        Exception: Whatever Triton raises when it cannot compile it.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", sm, _LANES)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    made = triton.compile(_source(case), target=target, options=options)
    sass, registers, stack = _disassemble(made.asm["cubin"])
    warps = int(made.metadata.num_warps)
    return inspect(
        sass,
        sm,
        lanes=_LANES * warps,
        weights=case.weights,
        registers=registers,
        stack=stack,
        shared=int(made.metadata.shared),
    )


def _source(case: CompileCase) -> Any:
    """What Triton compiles: types, constants, and which arguments are multiples of 16."""
    names: list[str] = case.kernel.arg_names  # type: ignore[attr-defined]
    values = dict(case.constants)
    if "num_warps" in names:  # Gluon hands it to kernels that ask for it
        values.setdefault("num_warps", case.num_warps)
    unknown = {*case.signature, *values} - set(names)
    missing = set(names) - {*case.signature, *values}
    if unknown or missing:
        raise ValueError(f"{case.name}: unknown arguments {sorted(unknown)}, missing arguments {sorted(missing)}")
    signature = {n: "constexpr" if n in values else case.signature[n] for n in names}
    constants = {(names.index(n),): value for n, value in values.items()}
    free = {*case.unaligned, *_unspecialized(case.kernel)}
    aligned = [n for n, kind in signature.items() if kind[0] in "*i" and kind != "i1" and n not in free]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    if case.gluon:
        from triton.experimental.gluon._runtime import GluonASTSource as Source
    else:
        from triton.compiler import ASTSource as Source
    return Source(case.kernel, signature, constants, attributes)


def _unspecialized(kernel: Any) -> list[str]:
    """Arguments of which the launcher never learns that they are multiples of 16."""
    flags = ("do_not_specialize", "do_not_specialize_on_alignment")
    return [p.name for p in getattr(kernel, "params", ()) if any(getattr(p, flag, False) for flag in flags)]


def _disassemble(cubin: bytes) -> tuple[str, int, int]:
    """Code, registers and bytes of stack of a cubin, with the tools that come with Triton."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory(prefix="fxc-sass-") as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        sass = _tool([str(tools / "nvdisasm"), "-c", str(file)])
        usage = _USAGE.search(_tool([str(tools / "cuobjdump"), "-res-usage", str(file)]))
    if usage is None:
        raise ValueError("cuobjdump says nothing of registers and stack")
    return sass, int(usage[1]), int(usage[2]) + int(usage[3])


def _tool(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# ------------------------------------------------------------------------------------------------ judging
def _kind(mnemonic: str) -> str:
    """``H`` for float products, ``I`` for integer ones, whatever unit of whatever chip computes them."""
    return mnemonic.removeprefix("UTC").removeprefix("O")[:1]


def _mma_problem(case: CompileCase, report: Report) -> str | None:
    if not case.mma:
        return None
    if not report.mma:
        return f"no tensor core instruction in the loop, {' or '.join(case.mma)} expected"
    if report.sm >= 100:
        fits = {_kind(name) for name in report.mma} <= {_kind(name) for name in case.mma}
    else:
        fits = all(name.startswith(case.mma) for name in report.mma)
    return None if fits else f"the loop multiplies with {', '.join(report.mma)}, not {' or '.join(case.mma)}"


def problems(case: CompileCase, report: Report) -> list[str]:
    """What is wrong with the code of a case, in words; empty when nothing is.

    Args:
        case: What was compiled.
        report: What was found.
    """
    limit, weighty = SHARED_LIMIT.get(report.sm, SHARED_LIMIT[86]), report.per_weight or 0.0
    budget = case.budget if case.budget is not None else weighty
    checks = {
        "the products stand in no loop": bool(case.mma) and not report.loops,
        f"{report.spills} loads and stores of local memory, {report.stack} bytes of it": report.spills > 0,
        f"{report.shared} bytes of shared memory, the limit is {limit}": report.shared > limit,
        f"{report.conversions} I2F in the loop": case.weights > 0 and report.conversions > 0,
        "no asynchronous 16-byte copy in the loop": case.asynchronous and not report.copies,
        f"{weighty:.2f} instructions per weight, the budget is {budget:g}": weighty > budget,
    }
    wrong = _mma_problem(case, report)
    return [*([wrong] if wrong else []), *(text for text, applies in checks.items() if applies)]
