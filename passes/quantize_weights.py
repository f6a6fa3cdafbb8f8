"""QuantizeWeights: weights of linear layers to 2 to 8 bits with one scale per group, activations untouched."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, Literal, cast

from torch.fx import Node

from fxcompress.data import CalibrationData
from fxcompress.errors import PassError, UsageError
from fxcompress.ir import Program
from fxcompress.passbase import Context, Pass, Result
from fxcompress.quant.fake_quantize import FakeQuantize
from fxcompress.quant.hqq import hqq_grid
from fxcompress.quant.layer_rounding import LayerRounding, RoundedLayer
from fxcompress.quant.layer_weights import (
    as_globs,
    asked_for,
    attach_quantizer,
    check_weight,
    has_quantizer,
    layer_weight,
    linear_layers,
    other_readers,
    quantize_weight,
)  # fmt: skip
from fxcompress.quant.leftovers import left_float, unused_globs
from fxcompress.quant.placement import layer_kind, layer_name, weight_axis
from fxcompress.quant.rounding_options import RangeChoice, RoundingMethod, RoundingOptions

__all__ = ["QuantizeWeights"]


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Round the weights of linear layers to a grid with one scale for every ``group_size`` input features.

    Attributes:
        bits: 2 to 8.
        group_size: Input features that share a scale; -1: all of a row, the default for 8 bits; else it is 128.
        symmetric: Zero point in the middle of the grid; else one zero point per group.
        calibrator: Range of a group: its extremes (``minmax``), what makes the squared error of its weights least
            (``mse``), or that of the layer's output (``output``; calibrated methods only). Default: ``output`` for
            calibrated methods, else ``mse``.
        fit: What to do with a layer whose input features are no multiple of ``group_size``: ``error``, ``ignore`` (it
            stays float) or ``adjust`` (the largest smaller group size that divides and is a multiple of 16; whole rows
            where there is none).
        include: Globs over layer names: only these. A layer that shares its weight with something else (a head with the
            embedding) is rounded only when named here; the other keeps its float weight.
        ignore: Globs over layer names to leave in floating point, e.g. ``("lm_head",)``.
        method: ``rtn``: each weight to the nearest. ``hqq``: as ``rtn``, on a grid fitted with a robust error. ``gptq``:
            column by column, the columns still open take up the error. ``awq``: input channels are scaled first, the
            scales folded into the norm or layer in front where that is exact. ``awq+gptq``: both. The last three need
            calibration data.
        samples: Calibration samples to use at most (whole batches).
        act_order: GPTQ takes the columns with the largest inputs first; the groups stay as they are.
        static_groups: GPTQ fixes all ranges before it begins; False takes each when its group is reached.
        damping: Share of its mean diagonal that GPTQ adds to the Hessian; ten times more whenever that is not enough.
        sequential: Each layer sees the inputs that the rounded layers before it give; False: those of the float model.
        skip_tokens: Leave out that many tokens at the start of each sequence, where decoders have extreme values.
        checkpoint: Folder that keeps every rounded layer; the same call again goes on behind them.
        progress: Show a progress bar with the time left on stderr.
        in_place: Write rounded weights into the tensors of the input and of the model it was captured from, so that
            memory holds the weights once; both are rounded afterwards. Calibrated methods only.

    Raises:
        UsageError: an option is out of range.
    """

    exact: ClassVar[bool] = False
    bits: int = 4
    group_size: int | None = None
    symmetric: bool = True
    calibrator: RangeChoice | None = None
    fit: Literal["error", "ignore", "adjust"] = "error"
    include: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    method: RoundingMethod = "rtn"
    samples: int = 128
    act_order: bool = True
    static_groups: bool = True
    damping: float = 0.01
    sequential: bool = True
    skip_tokens: int = 0
    checkpoint: str | None = None
    progress: bool = False
    in_place: bool = False

    def __post_init__(self) -> None:
        for name in ("include", "ignore"):
            object.__setattr__(self, name, as_globs(getattr(self, name)))
        if not 2 <= self.bits <= 8:
            raise UsageError(470, f"bits={self.bits}: weights are rounded to 2 to 8 bits", fix="use 2 to 8, e.g. 4")
        if self.group_size is None:
            object.__setattr__(self, "group_size", 128 if self.bits < 8 else -1)
        if self.group_size != -1 and (self.group_size or 0) < 16:
            raise UsageError(471, f"group_size={self.group_size}: too small", fix="use 16 or more, or -1 for rows")
        if self.calibrator not in (None, "minmax", "mse", "output") or self.fit not in ("error", "ignore", "adjust"):
            what = f"calibrator={self.calibrator!r}, fit={self.fit!r}: not known"
            raise UsageError(472, what, fix="calibrator: minmax, mse or output; fit: error, ignore or adjust")
        _ = self.options

    @property
    def options(self) -> RoundingOptions:
        """How to round, checked."""
        given = {f.name: getattr(self, f.name) for f in fields(RoundingOptions)}
        return RoundingOptions(**given)

    @property
    def precision(self) -> str:
        """What reports call the result."""
        return f"int{self.bits} weights"

    @property
    def writes_input(self) -> bool:
        """See ``in_place``."""
        return self.in_place

    def requires(self, program: Program, context: Context) -> None:
        """Calibrated methods need calibration data."""
        del program
        if self.options.calibrated and context.calibration is None:
            raise PassError(61, f"{self.name} with {self.method} needs calibration data", fix="pass calibration=loader")

    def run(self, program: Program, context: Context) -> Result:
        """Attach a grid to every linear layer that is asked for."""
        chosen, notes = linear_layers(program, self.include, self.ignore)
        linear = [n for n in program.graph.nodes if layer_kind(program, n) == "linear"]
        done = dict.fromkeys(layer_name(n) for n in linear if has_quantizer(program, n))
        notes += [f"{name} is rounded already and stays as it is" for name in done]
        layers = self._layers(program, chosen, notes)
        what = f"{self.name} rounds linear layers"
        notes += left_float(program, what, lambda name: asked_for([name], self.include, self.ignore))
        notes += unused_globs(program, map(layer_name, linear), include=self.include, ignore=self.ignore)
        if not layers and not any(isinstance(m, FakeQuantize) for m in program.gm.modules()):
            raise PassError(34, "there is no linear layer to quantize", why="; ".join(notes) or "the model has none")
        if layers:
            notes += self._round(program, layers, context)
        changes = [f"quantized {x.name} to {self.bits} bits, groups of {x.group_size or x.features}" for x in layers]
        return Result(program, changes, notes=notes, metrics={"layers": len(layers)})

    def _layers(self, program: Program, chosen: list[Node], notes: list[str]) -> list[RoundedLayer]:
        """What to round: one entry a weight."""
        found: dict[int, RoundedLayer] = {}
        others = other_readers(program)
        for node in chosen:
            name, weight = layer_name(node), layer_weight(program, node)
            key, sharer = weight.data_ptr(), others.get(weight.data_ptr())
            if sharer and not (self.include and asked_for([name], self.include, ())):
                notes.append(f"{name} stays float: it shares its weight with {sharer}; name it in include to round it")
                continue
            if key in found:
                found[key].nodes.append(node)
                continue
            check_weight(program, node)
            axis = weight_axis(program.module(node)) if node.op == "call_module" else 0
            features = int(weight.shape[1 - axis])
            size = self._group_size(features, name)
            if size is None:
                notes.append(f"{name} stays float: {features} input features are no multiple of {self.group_size}")
                continue
            found[key] = RoundedLayer(name, [node], axis, features, None if size in (-1, features) else size)
            if sharer:
                notes.append(f"{name} has a rounded weight of its own now; {sharer} keeps the float one")
        return list(found.values())

    def _round(self, program: Program, layers: list[RoundedLayer], context: Context) -> list[str]:
        options = self.options
        if options.calibrated:
            given = context.calibration
            data = given if isinstance(given, CalibrationData) else CalibrationData(given or ())
            rounding = LayerRounding(program, layers, list(data.calls(program, self.samples)), options)
            rounding.run()
            return rounding.notes + data.notes(self.samples)
        for layer in layers:
            weight, spec = layer_weight(program, layer.nodes[0]), options.spec(layer.group_size)
            for node in layer.nodes:
                if self.method == "rtn":
                    quantize_weight(program, node, spec, cast(Literal["minmax", "mse"], options.range_method))
                else:
                    rows = weight if layer.axis == 0 else weight.t()
                    attach_quantizer(program, node, hqq_grid(rows, spec, weight.dtype).quantizer(layer.axis))
        return []

    def _group_size(self, features: int, name: str) -> int | None:
        """The layer's group size; None: it is left alone."""
        size = self.group_size or -1
        if size == -1 or features % size == 0:
            return size
        if self.fit == "adjust":
            return next((s for s in range(size - size % 16, 0, -16) if features % s == 0), -1)
        if self.fit == "ignore":
            return None
        what = f"{features} input features cannot be cut into groups of {size}"
        fix = "use fit='adjust' or fit='ignore', or a group size that divides them"
        raise PassError(35, what, where=name, why=f"{features} % {size} = {features % size}", fix=fix)
