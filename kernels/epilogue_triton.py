"""The last step of every matrix product, for Triton kernels, and what kernels need to know about how they run."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import triton
import triton.language as tl

__all__ = ["INTERPRETED", "CompileCase", "activate"]

#: Kernels run in Triton's interpreter, on tensors in main memory (``TRITON_INTERPRET=1``): no inline assembly, no bfloat16.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """The activation of that name (see ``fxcompress.kernels.epilogue.ACTIVATIONS``) of float32 ``y``."""
    if ACTIVATION == "relu":
        y = tl.maximum(y, 0.0)
    elif ACTIVATION == "relu6":
        y = tl.minimum(tl.maximum(y, 0.0), 6.0)
    elif ACTIVATION == "silu":
        y = y * tl.sigmoid(y)
    elif ACTIVATION == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    elif ACTIVATION == "sigmoid":
        y = tl.sigmoid(y)
    elif ACTIVATION == "hardswish":
        y = y * tl.minimum(tl.maximum(y + 3.0, 0.0), 6.0) / 6.0
    else:
        tl.static_assert(ACTIVATION == "", "no such activation")
    return y


@dataclass(frozen=True)
class CompileCase:
    """A kernel with everything needed to compile it for a named GPU without having one.

    Every ``*_triton.py`` lists its own in ``compile_cases(sm)``: all configurations its heuristic can choose there.

    Attributes:
        name: ``w4a16 fp16 g128 16x128x128 swap``.
        family: ``w4a16`` ...
        kernel: The ``@triton.jit`` or ``@gluon.jit`` function.
        signature: Type of every argument that is no constant: ``*fp16``, ``*i16``, ``i32`` ...
        constants: The ``tl.constexpr`` arguments.
        num_warps: Warps of a program.
        num_stages: Depth of the pipeline.
        weights: Weights a program multiplies in one step of its main loop; 0 where that is no measure.
        mma: What the instruction of the products starts with, one of these: ``("HMMA",)``, ``("IMMA", "IGMMA")``.
        budget: Instructions per weight the main loop may take; None: no limit.
        unaligned: Arguments that need not be multiples of 16 (pointers: of 16 bytes).
        gluon: It is a Gluon kernel.
        asynchronous: The main loop copies 16 bytes at a time asynchronously (cp.async or TMA).
    """

    name: str
    family: str
    kernel: Callable[..., Any]
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 4
    weights: int = 0
    mma: tuple[str, ...] = ()
    budget: float | None = None
    unaligned: tuple[str, ...] = ()
    gluon: bool = False
    asynchronous: bool = True
