"""EqualizeLayers: cross-layer equalization of weight ranges, exact in floating point, before quantization."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import ClassVar

from fxcompress.errors import PassError
from fxcompress.ir import Program
from fxcompress.passbase import Context, Pass, Refusal, Result
from fxcompress.quant.equalize import Boundary, Equalizer, find_boundary
from fxcompress.quant.fake_quantize import QUANTIZERS
from fxcompress.quant.layer_weights import as_globs, check_weight
from fxcompress.quant.placement import layer_kind, layer_name
from fxcompress.rewrite import Analysis

__all__ = ["EqualizeLayers"]

#: Scales nearer to 1 than this are those of layers that are equalized already.
_SAME = 1e-3


@dataclass(frozen=True)
class EqualizeLayers(Pass):
    """Divide channels between convolutions and linear layers so that the weights before and behind have one range.

    The function in between must scale with its input: none, ReLU, LeakyReLU, pooling, flattening. Channels that clip
    (ReLU6), are added to a residual, or are normalized stay as they are, with the reason. It helps most where weights
    have one scale per tensor, and in networks of depthwise convolutions. Run it behind `FoldBatchNorm` and in front of
    quantization (Nagel et al. 2019, section 4.1).

    Attributes:
        ignore: Globs over layer names whose output channels stay.
    """

    exact: ClassVar[bool] = True
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "ignore", as_globs(self.ignore))

    def requires(self, program: Program, context: Context) -> None:
        """A program that is not quantized yet."""
        del context
        if any(isinstance(m, QUANTIZERS) for m in program.gm.modules()):
            why = "scaled weights need new grids"
            raise PassError(340, f"{self.name} comes before quantization", why=why, fix="put it in front")

    def run(self, program: Program, context: Context) -> Result:
        """Find all boundaries, equalize them together, put the new weights."""
        del context
        boundaries, refusals = self._boundaries(program)
        result = Result(program, refusals=refusals)
        equalizer = Equalizer(program, boundaries)
        before = [_spread(equalizer, i) for i in range(len(boundaries))]
        equalizer.run()
        kept = [float((s - 1).abs().max()) > _SAME for s in equalizer.scales]
        if any(kept):
            equalizer.apply()
        for index, (boundary, changed) in enumerate(zip(boundaries, kept, strict=True)):
            if changed:
                spread = f"ranges spread {before[index]:.3g} times before, {_spread(equalizer, index):.3g} times now"
                result.changes.append(f"equalized {boundary}: {spread}")
        result.metrics = {"boundaries": len(boundaries), "equalized": sum(kept)}
        return result

    def _boundaries(self, program: Program) -> tuple[list[Boundary], list[Refusal]]:
        analysis = Analysis(program)
        found: list[Boundary] = []
        refusals: list[Refusal] = []
        for node in program.graph.nodes:
            if node.op != "call_module" or layer_kind(program, node) is None:
                continue
            if any(fnmatch.fnmatchcase(layer_name(node), glob) for glob in self.ignore):
                continue
            check_weight(program, node)
            boundary = find_boundary(analysis, node)
            if isinstance(boundary, str):
                refusals.append(Refusal("equalize", layer_name(node), boundary))
            else:
                found.append(boundary)
        return found, refusals


def _spread(equalizer: Equalizer, index: int) -> float:
    """Largest over smallest range of the weights that make the channels of a boundary, channels of zeros aside."""
    ranges = equalizer.ranges(index)[0]
    ranges = ranges[ranges > 0]
    return float(ranges.max() / ranges.min()) if len(ranges) else 1.0
