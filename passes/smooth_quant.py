"""SmoothQuant: moves the range of activations into weights, so that both can be quantized to 8 bits; outputs stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.fx import Node

from fxcompress.data import CalibrationData
from fxcompress.environment import trim_memory
from fxcompress.errors import PassError, UsageError
from fxcompress.ir import Program, evaluating
from fxcompress.layerwise.statistics import not_finite_note
from fxcompress.layerwise.store import WeightStore
from fxcompress.layerwise.walk import Walk
from fxcompress.passbase import Context, Pass, Refusal, Result
from fxcompress.quant.fake_quantize import QUANTIZERS
from fxcompress.quant.layer_weights import as_globs, asked_for, layer_weight
from fxcompress.quant.migration import Migration, find_migration
from fxcompress.quant.placement import layer_kind, layer_name, weight_axis
from fxcompress.quant.smoothing import Granularity, SampledRows, best_alpha, smoothing_factors
from fxcompress.rewrite import Analysis

__all__ = ["SmoothQuant"]

#: Factors that differ less from 1 are those of a program that is smooth already.
_SAME = 1e-3


@dataclass(frozen=True)
class SmoothQuant(Pass):
    """Divide the input channels of linear layers by factors, folded into the norm or layer in front; multiply weights.

    Run it before `QuantizeStatic` or `QuantizeDynamic`. Where the graph does not allow it exactly, channels stay as they
    are, with the reason.

    Attributes:
        alpha: Share of the range that moves: 0 none, 1 all of it. ``auto``: for each value what makes the error of the
            8-bit product least, or nothing.
        activations: What ``auto`` measures with: one scale per ``tensor`` (`QuantizeStatic`) or per ``token``
            (`QuantizeDynamic`).
        samples: Calibration samples to use at most (whole batches).
        include: Globs over names of linear layers: only the inputs of these.
        ignore: Globs over names of linear layers whose inputs stay.

    Raises:
        UsageError: an option is out of range.
    """

    alpha: float | Literal["auto"] = 0.5
    activations: Granularity = "tensor"
    samples: int = 128
    include: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("include", "ignore"):
            object.__setattr__(self, name, as_globs(getattr(self, name)))
        number = isinstance(self.alpha, (int, float)) and not isinstance(self.alpha, bool)
        if not (self.alpha == "auto" or (number and 0 <= float(self.alpha) <= 1)):
            raise UsageError(485, f"alpha={self.alpha!r}: neither 0 to 1 nor 'auto'", fix="use 0.5 or 'auto'")
        if self.activations not in ("tensor", "token"):
            raise UsageError(486, f"activations={self.activations!r}: not known", fix="use 'tensor' or 'token'")
        if self.samples < 1:
            raise UsageError(487, f"samples={self.samples}: nothing to measure with", fix="ask for 1 or more")

    def requires(self, program: Program, context: Context) -> None:
        """Needs calibration data and a program that is not quantized yet."""
        if context.calibration is None:
            raise PassError(62, f"{self.name} needs calibration data", fix="pass calibration=loader")
        if any(isinstance(m, QUANTIZERS) for m in program.gm.modules()):
            raise PassError(63, f"{self.name} comes before quantization", fix="put it in front of the quantizing pass")

    def run(self, program: Program, context: Context) -> Result:
        """Observe, search and fold, value by value."""
        given = cast(Any, context.calibration)
        data = given if isinstance(given, CalibrationData) else CalibrationData(given)
        values, notes = self._values(program)
        result = Result(program, notes=notes)
        seen: dict[Node, SampledRows] = {}
        with torch.no_grad(), evaluating(program.gm):
            walk = Walk(program, data.calls(program, self.samples))
            for value, readers in values.items():
                sample = seen[value] = SampledRows(len(walk))
                walk.visit(readers[0], [value], lambda _, found, sample=sample: sample.update(found[0]))  # type: ignore[misc]
                trim_memory()
                result.notes += not_finite_note(sample.skipped, sample.seen, _names(readers))
            # Backwards: a factor of a later layer's input changes rows, and so the peaks, of an earlier layer's weight.
            for value in reversed(values):
                self._smooth(program, value, values[value], seen.pop(value), result)
        result.notes += data.notes(self.samples)
        result.metrics = {"values": len(values), "smoothed": len(result.changes)}
        for lines in (result.changes, result.refusals):
            lines.reverse()
        return result

    def _values(self, program: Program) -> tuple[dict[Node, list[Node]], list[str]]:
        """What linear layers read, with those layers."""
        found: dict[Node, list[Node]] = {}
        for node in program.graph.nodes:
            if layer_kind(program, node) == "linear" and isinstance(node.args[0], Node):
                name = layer_name(node)
                if asked_for([name], self.include, self.ignore):
                    found.setdefault(node.args[0], []).append(node)
        return found, [] if found else ["there is no linear layer"]

    def _smooth(self, program: Program, value: Node, readers: list[Node], sample: SampledRows, result: Result) -> None:
        names = _names(readers)
        migration = find_migration(Analysis(program), value)
        if isinstance(migration, str) or sample.peak is None:
            reason = migration if isinstance(migration, str) else "calibration never reached it"
            result.refusals.append(Refusal("smooth", names, reason))
            return
        alpha, factors = self._factors(sample, [_rows(program, n) for n in migration.consumers], migration)
        if alpha is None or float((factors - 1).abs().max()) < _SAME:
            result.notes.append(f"{names}: nothing to smooth")
            return
        migration.apply(program, WeightStore(program.gm, replace=True), factors)
        result.changes.append(f"smoothed {names} through {', '.join(migration.producers)}: alpha {alpha:g}")

    def _factors(self, sample: SampledRows, weights: list[Tensor], migration: Migration) -> tuple[float | None, Tensor]:
        if self.alpha == "auto":
            return best_alpha(sample, weights, migration, self.activations)
        assert sample.peak is not None
        return float(self.alpha), smoothing_factors(sample.peak, torch.cat(weights), float(self.alpha), migration)


def _names(nodes: list[Node]) -> str:
    return ", ".join(layer_name(n) for n in nodes)


def _rows(program: Program, node: Node) -> Tensor:
    weight = layer_weight(program, node).float()
    return weight if weight_axis(program.module(node)) == 0 else weight.t()
