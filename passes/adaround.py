"""AdaRound: learned rounding of the weights of a quantized program, layer by layer or block by block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import nn
from torch.fx import Node

from fxcompress.data import CalibrationData, grouped, joined
from fxcompress.errors import PassError, UsageError
from fxcompress.ir import Program
from fxcompress.layers import Fused
from fxcompress.passbase import Context, Pass, Result
from fxcompress.quant.adaround import Annealing, RowsOnGrid
from fxcompress.quant.block_reconstruction import BlockReconstruction
from fxcompress.quant.calibration import samples_together
from fxcompress.quant.fake_quantize import FakeQuantize
from fxcompress.quant.layer_weights import as_globs, asked_for
from fxcompress.quant.reconstruction import LayerReconstruction, Rounding, float_twin
from fxcompress.rewrite import Analysis

__all__ = ["AdaRound"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class AdaRound(Pass):
    """Decide for every weight whether it is rounded up or down, so that the layers' outputs change least.

    Run it behind `QuantizeStatic` or `QuantizeWeights`, which choose the grids; it keeps them. Layer by layer it works on
    second moments of inputs and is fast; ``block`` goes on with whole blocks, whose activation functions and quantizers
    are then part of what is learned. The rounding found is never worse than rounding to the nearest, measured on the
    calibration data (Nagel et al. 2020; Li et al., "BRECQ", 2021).

    Attributes:
        samples: Calibration samples to use at most (whole batches).
        iterations: Steps for each layer.
        block: Afterwards learn the layers of each residual block together, from the error of the block's output.
        block_iterations: Steps for each block, of one calibration batch (up to 8 samples) each.
        damping: Noise added to the inputs that a layer is learned from, as a share of their mean square; more is added
            where there are few inputs for the layer's size.
        bias_correction: Let biases take up the mean error of the output.
        include: Globs over layer names: only these.
        ignore: Globs over layer names whose weights stay rounded to the nearest.
        seed: Of the rows and batches that are sampled.
        progress: Show a progress bar with the time left on stderr.

    Raises:
        UsageError: an option is out of range.
    """

    exact: ClassVar[bool] = False
    samples: int = 128
    iterations: int = 300
    block: bool = False
    block_iterations: int = 500
    damping: float = 0.01
    bias_correction: bool = True
    include: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    seed: int = 0
    progress: bool = False

    def __post_init__(self) -> None:
        for name in ("include", "ignore"):
            object.__setattr__(self, name, as_globs(getattr(self, name)))
        if self.samples < 1 or self.iterations < 1 or self.block_iterations < 1:
            what = f"samples={self.samples}, iterations={self.iterations}, block_iterations={self.block_iterations}"
            raise UsageError(540, f"{what}: nothing to learn with", fix="give 1 or more")
        if not 0 <= self.damping <= 1:
            raise UsageError(541, f"damping={self.damping}: not between 0 and 1", fix="use 0.01")

    def requires(self, program: Program, context: Context) -> None:
        """Needs calibration data, and weights with grids."""
        if context.calibration is None:
            raise PassError(341, f"{self.name} needs calibration data", fix="pass calibration=loader")
        if not any(_grid(m) for _, m in program.layers()):
            why = "it learns how to round weights to grids that are there"
            fix = "put QuantizeStatic() or QuantizeWeights() in front"
            raise PassError(342, f"{self.name} finds no quantized layer", why=why, fix=fix)

    def run(self, program: Program, context: Context) -> Result:
        """Layer by layer, then block by block when asked for."""
        nodes, notes = self._nodes(program)
        result = Result(program, notes=notes)
        if not nodes:
            return result
        given = cast(Any, context.calibration)
        data = given if isinstance(given, CalibrationData) else CalibrationData(given)
        together = samples_together(program)
        calls = [joined(g) for g in grouped(data.calls(program, self.samples), lambda call: call, together)]
        blocks = Annealing(self.block_iterations) if self.block else None
        options = Rounding(
            Annealing(self.iterations), self.damping, self.bias_correction, self.seed, self.progress, blocks
        )
        kind = BlockReconstruction if self.block else LayerReconstruction
        job = kind(program, nodes, calls, options)
        better = job.run(float_twin(program))
        result.notes += job.notes
        if self.block:
            result.metrics["blocks"] = better
        result.changes = [f"rounded {node.target} anew" for node in nodes]
        result.notes += data.notes(self.samples)
        result.metrics["rounded"] = len(nodes)
        return result

    def _nodes(self, program: Program) -> tuple[list[Node], list[str]]:
        """Layers to round, and a line for each one that keeps its rounding."""
        analysis = Analysis(program)
        nodes, notes = [], []
        for node, module in program.layers():
            if not _grid(module) or not asked_for([str(node.target)], self.include, self.ignore):
                continue
            reason = _unusable(analysis, node, module)
            if reason:
                notes.append(f"{node.target} keeps its rounding: {reason}")
            elif _on_grid(cast(Fused, module)):
                notes.append(f"{node.target} keeps its rounding: its weights lie on the grid already")
            else:
                nodes.append(node)
        return nodes, notes


def _grid(module: nn.Module) -> bool:
    return isinstance(module, Fused) and isinstance(module.weight_fake_quantize, FakeQuantize)


def _unusable(analysis: Analysis, node: Node, module: nn.Module) -> str:
    if isinstance(module, _TRANSPOSED):
        return "a transposed convolution"
    if analysis.calls(node) > 1:
        return "it is called more than once"
    other = analysis.shared_with(node)
    return f"it shares a tensor with {other}" if other else ""


def _on_grid(layer: Fused) -> bool:
    """True when every weight lies on its grid already, so that there is nothing to decide."""
    grid = RowsOnGrid.of(layer.weight, cast(FakeQuantize, layer.weight_fake_quantize))
    off = (grid.fraction - grid.fraction.round()).abs()
    return bool((off < 1e-3).all())
