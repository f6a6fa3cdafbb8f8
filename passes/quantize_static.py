"""QuantizeStatic: post-training static quantization to 8 bits, placed by the target's scheme.

One pass over the calibration data observes the range of every value to be quantized and the mean of every quantized
layer's input; then ranges become grids, weights get per-channel grids, and biases take back the mean error that
rounding the weights causes (Nagel et al., "Data-Free Quantization", 2019, section 4.2).
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

from fxcompress.data import CalibrationData
from fxcompress.errors import PassError, UsageError
from fxcompress.ir import Program
from fxcompress.layers import Fused
from fxcompress.passbase import Context, Pass, Result
from fxcompress.quant.bias import InputMeans, correct_bias
from fxcompress.quant.calibration import calibrate, freeze, insert_observers
from fxcompress.quant.fake_quantize import QUANTIZERS
from fxcompress.quant.layer_weights import as_globs, asked_for, check_weight, quantize_weight
from fxcompress.quant.leftovers import left_float, unused_globs
from fxcompress.quant.observers import make_observer
from fxcompress.quant.placement import Placement, layer_name, place
from fxcompress.quant.scheme import QuantScheme
from fxcompress.quant.spec import QuantSpec

__all__ = ["QuantizeStatic"]

_KINDS = ("linear", "conv", "conv_transpose")


@dataclass(frozen=True)
class QuantizeStatic(Pass):
    """Quantize weights and activations to 8 bits with ranges from calibration data.

    Attributes:
        calibrator: Range of activations: ``minmax``, ``moving_average``, ``histogram``, ``percentile``, ``entropy``
            (KL divergence) or ``mse``.
        weight_calibrator: Range of weights: ``minmax`` or ``mse``.
        bias_correction: Put the mean output error of weight rounding into the biases.
        samples: Calibration samples to use at most (whole batches).
        ignore: Globs over layer names to leave in floating point, e.g. ``("classifier*",)``.
        weight_bits: 2 to 8; below 8 `AdaRound` behind this pass wins much of the accuracy back.
        eight_bits: Globs over layer names whose weights have 8 bits whatever ``weight_bits`` says.

    Raises:
        UsageError: an unknown calibrator, no sample asked for, or a wrong number of bits.
    """

    exact: ClassVar[bool] = False
    calibrator: str = "mse"
    weight_calibrator: Literal["minmax", "mse"] = "mse"
    bias_correction: bool = True
    samples: int = 300
    ignore: tuple[str, ...] = ()
    weight_bits: int = 8
    eight_bits: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("ignore", "eight_bits"):
            object.__setattr__(self, name, as_globs(getattr(self, name)))
        if not 2 <= self.weight_bits <= 8:
            raise UsageError(542, f"weight_bits={self.weight_bits}: not 2 to 8", fix="use 2 to 8, e.g. 4")
        make_observer(self.calibrator)
        if self.weight_calibrator not in ("minmax", "mse"):
            what = f"unknown weight calibrator {self.weight_calibrator!r}"
            raise UsageError(44, what, fix="use 'minmax' or 'mse'")
        if self.samples < 1:
            raise UsageError(25, f"samples={self.samples}: nothing to calibrate with", fix="ask for 1 or more")

    @property
    def precision(self) -> str:
        """What reports call the result."""
        return "int8" if self.weight_bits == 8 else f"w{self.weight_bits}a8"

    def requires(self, program: Program, context: Context) -> None:
        """Needs calibration data and a program that is not quantized yet."""
        if context.calibration is None:
            raise PassError(30, f"{self.name} needs calibration data", fix="pass calibration=loader")
        if any(isinstance(m, QUANTIZERS) for m in program.gm.modules()):
            raise PassError(31, "the program is quantized already", fix="capture the float model again")

    def run(self, program: Program, context: Context) -> Result:
        """Place quantizers, observe, freeze, quantize weights, correct biases."""
        scheme = context.scheme or QuantScheme()
        placement = place(program, scheme, self.ignore)
        if not placement.layers:
            why = "; ".join(f"{n}: {r}" for n, r in placement.left) or "no convolution and no linear layer"
            raise PassError(32, "there is no layer to quantize", why=why)
        for node in placement.layers:
            check_weight(program, node)
        data = cast(Any, context.calibration)
        calls = data if isinstance(data, CalibrationData) else CalibrationData(data)
        quantizers = insert_observers(program, placement, scheme, self.calibrator)
        means = InputMeans(program, placement.layers if self.bias_correction else [])
        with means:
            calibrate(program, calls, self.samples)
        notes = freeze(quantizers, placement.same_scale)
        for node in placement.layers:
            quantize_weight(program, node, self._weight_grid(scheme, layer_name(node)), self.weight_calibrator)
        correct_bias(program, placement.layers, means)
        notes += _fused_too_far(program, placement, scheme)
        return self._result(program, placement, notes, calls)

    def _weight_grid(self, scheme: QuantScheme, name: str) -> QuantSpec:
        """The target's grid, or one of fewer bits."""
        if self.weight_bits == 8 or any(fnmatch.fnmatchcase(name, glob) for glob in self.eight_bits):
            return scheme.weight
        return QuantSpec(self.weight_bits, signed=True, symmetric=True, axis=scheme.weight.axis)

    def _result(self, program: Program, placement: Placement, notes: list[str], calls: CalibrationData) -> Result:
        notes += [f"{name} stays float: {reason}" for name, reason in placement.left]
        if calls.skipped:
            notes.append(f"{calls.skipped} calibration batches held NaN or infinity and were skipped")
        if calls.seen < self.samples:
            notes.append(f"calibrated on {calls.seen} samples, {self.samples} asked for")
        names = [layer_name(n) for n in placement.layers]
        everything = names + [name for name, _ in placement.left]
        notes += unused_globs(program, everything, ignore=self.ignore, eight_bits=self.eight_bits)
        what = f"{self.name} takes convolutions and linear layers"
        notes += left_float(program, what, lambda n: n not in everything and asked_for([n], (), self.ignore), _KINDS)
        counts = {"layers": len(names), "values": len(placement.values), "grids": len(placement.groups)}
        changes = [f"quantized {name}" for name in dict.fromkeys(names)]
        return Result(program, changes, notes=notes, metrics={**counts, "samples": calls.seen})


def _fused_too_far(program: Program, placement: Placement, scheme: QuantScheme) -> list[str]:
    """A note when fused layers do more than one integer kernel of the engine does."""
    names = []
    for node in placement.layers:
        layer = program.module(node) if node.op == "call_module" else None
        activation = layer.activation if isinstance(layer, Fused) else None
        odd = activation is not None and activation.name not in scheme.fused_activations
        if odd or (isinstance(layer, Fused) and len(node.args) > 1 and not scheme.fused_residual):
            names.append(layer_name(node))
    if not names:
        return []
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [
        f"{', '.join(names[:3])}{more}: fused with more than the engine runs in one integer kernel, so partly float; "
        "run FuseActivations with the target's scheme"
    ]
