"""QuantizeWeights: weights of linear layers to 2 to 8 bits with one scale per group, activations untouched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch.fx import Node

from fxcompress.errors import PassError, UsageError
from fxcompress.ir import Program
from fxcompress.passbase import Context, Pass, Result
from fxcompress.quant.fake_quantize import FakeQuantize
from fxcompress.quant.layer_weights import as_globs, check_weight, layer_weight, linear_layers, quantize_weight
from fxcompress.quant.placement import layer_name, weight_axis
from fxcompress.quant.spec import QuantSpec

__all__ = ["QuantizeWeights"]


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Round the weights of linear layers to a grid with one scale for every ``group_size`` input features.

    Attributes:
        bits: 2 to 8.
        group_size: Input features that share a scale; -1: one scale per output feature. Default: 128 below 8 bits, -1
            for 8 bits.
        symmetric: Zero point in the middle of the grid; else one zero point per group.
        calibrator: Range of a group: its extremes (``minmax``), or what makes the squared error least (``mse``).
        fit: What to do with a layer whose input features are no multiple of ``group_size``: ``error``, ``ignore`` (it
            stays float) or ``adjust`` (the largest smaller group size that divides and is a multiple of 16).
        include: Globs over layer names: only these.
        ignore: Globs over layer names to leave in floating point, e.g. ``("lm_head",)``.

    Raises:
        UsageError: an option is out of range.
    """

    exact: ClassVar[bool] = False
    bits: int = 4
    group_size: int | None = None
    symmetric: bool = True
    calibrator: Literal["minmax", "mse"] = "mse"
    fit: Literal["error", "ignore", "adjust"] = "error"
    include: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("include", "ignore"):
            object.__setattr__(self, name, as_globs(getattr(self, name)))
        if not 2 <= self.bits <= 8:
            raise UsageError(470, f"bits={self.bits}: weights are rounded to 2 to 8 bits", fix="use 2 to 8, e.g. 4")
        if self.group_size is None:
            object.__setattr__(self, "group_size", 128 if self.bits < 8 else -1)
        if self.group_size != -1 and (self.group_size or 0) < 16:
            raise UsageError(
                471, f"group_size={self.group_size}: too small", fix="use 16 or more, or -1 for whole rows"
            )
        if self.calibrator not in ("minmax", "mse") or self.fit not in ("error", "ignore", "adjust"):
            what = f"calibrator={self.calibrator!r}, fit={self.fit!r}: not known"
            raise UsageError(472, what, fix="calibrator: minmax or mse; fit: error, ignore or adjust")

    @property
    def precision(self) -> str:
        """What reports call the result."""
        return f"int{self.bits} weights"

    def run(self, program: Program, context: Context) -> Result:
        """Attach a grid to every linear layer that is asked for."""
        del context
        layers, notes = linear_layers(program, self.include, self.ignore)
        changes = []
        for node in layers:
            check_weight(program, node)
            name, features = layer_name(node), _features(program, node)
            size = self._group_size(features, name)
            if size is None:
                notes.append(f"{name} stays float: {features} input features are no multiple of {self.group_size}")
                continue
            quantize_weight(program, node, self._spec(size, features), self.calibrator)
            changes.append(f"quantized {name} to {self.bits} bits, groups of {features if size == -1 else size}")
        if not changes and not any(isinstance(m, FakeQuantize) for m in program.gm.modules()):
            raise PassError(34, "there is no linear layer to quantize", why="; ".join(notes) or "the model has none")
        names = list(dict.fromkeys(changes))
        return Result(program, names, notes=notes, metrics={"layers": len(names)})

    def _group_size(self, features: int, name: str) -> int | None:
        """The layer's group size; None: it is left alone."""
        size = self.group_size or -1
        if size == -1 or features % size == 0:
            return size
        if self.fit == "adjust":
            return next((s for s in range(size - size % 16, 0, -16) if features % s == 0), -1)
        if self.fit == "ignore":
            return None
        raise PassError(
            35,
            f"{features} input features cannot be cut into groups of {size}",
            where=name,
            why=f"{features} % {size} = {features % size}",
            fix="use fit='adjust' or fit='ignore', or a group size that divides them",
        )

    def _spec(self, size: int, features: int) -> QuantSpec:
        group = None if size in (-1, features) else size
        return QuantSpec(self.bits, signed=self.symmetric, symmetric=self.symmetric, axis=0, group_size=group)


def _features(program: Program, node: Node) -> int:
    axis = weight_axis(program.module(node)) if node.op == "call_module" else 0
    return int(layer_weight(program, node).shape[1 - axis])
