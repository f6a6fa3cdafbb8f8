"""Cast: arithmetic and parameters to float16 or bfloat16, with what does not fit into float16 left in float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from fxcompress.data import CalibrationData
from fxcompress.errors import PassError, UsageError
from fxcompress.half import Ranges, names_of, observe, to_half, wide_nodes
from fxcompress.ir import Program
from fxcompress.passbase import Context, Pass, Result
from fxcompress.quant.layer_weights import as_globs
from fxcompress.quant.leftovers import unused_globs

__all__ = ["Cast"]

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Cast(Pass):
    """Compute in 16 bits; the program's inputs and outputs keep their dtypes, with casts at the edges.

    For ``fp16`` the values of some samples (calibration data, else the example) and the weights are looked at: what
    makes or reads values beyond half of float16's range, or mostly values that float16 rounds to zero, stays in float32.

    Attributes:
        dtype: ``fp16`` or ``bf16``.
        keep: Globs over layer names (or names of the user's modules) to leave in float32.
        samples: Calibration samples to look at (whole batches); ``fp16`` only. Fewer, or none, are in the notes.

    Raises:
        UsageError: the dtype is not known, or no sample is asked for.
    """

    exact: ClassVar[bool] = False
    dtype: Literal["fp16", "bf16"] = "fp16"
    keep: tuple[str, ...] = ()
    samples: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", as_globs(self.keep))
        if self.dtype not in _DTYPES:
            raise UsageError(501, f"dtype={self.dtype!r}: not known", fix="use 'fp16' or 'bf16'")
        if self.samples < 1:
            raise UsageError(502, f"samples={self.samples}: nothing to look at", fix="ask for 1 or more")

    @property
    def precision(self) -> str:
        """What reports call the result."""
        return self.dtype

    def run(self, program: Program, context: Context) -> Result:
        """Cast what can be cast."""
        ranges, notes = self._ranges(program, context) if self.dtype == "fp16" else (None, [])
        wide = wide_nodes(program, self.keep, ranges)
        names = to_half(program, _DTYPES[self.dtype], wide)
        if not names:
            why = "; ".join(f"{n.name}: {reason}" for n, reason in list(wide.items())[:5]) or "it has no float32 values"
            raise PassError(80, f"nothing can be cast to {self.dtype}", why=why)
        notes += [f"{_name(n)} stays float32: {why}" for n, why in wide.items() if why != "made in float32"]
        notes += unused_globs(program, [name for n in program.graph.nodes for name in names_of(n)], keep=self.keep)
        return Result(program, [f"cast {n} to {self.dtype}" for n in names], notes=notes, metrics={"nodes": len(names)})

    def _ranges(self, program: Program, context: Context) -> tuple[Ranges, list[str]]:
        """What values were seen, and what the user should know about the data."""
        data = context.calibration
        if data is None:
            where = "ranges of values were seen on the example alone: larger ones may overflow in float16"
            return observe(program, [program.example]), [f"{where}; pass calibration=..."]
        known = data if isinstance(data, CalibrationData) else CalibrationData(data)
        return observe(program, known.calls(program, self.samples)), known.notes(self.samples)


def _name(node: torch.fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name
