"""Calibrated weight rounding: layer by layer, each seeing the inputs that the rounded layers before it make.

Layers that read one value are rounded together. In memory are the calls' values between two layers
(`fxcompress.layerwise.walk`), the second moments of one value, and the weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxcompress.data import Call
from fxcompress.environment import trim_memory
from fxcompress.ir import Program, evaluating
from fxcompress.layerwise.statistics import InputStatistics, not_finite_note
from fxcompress.layerwise.store import WeightStore
from fxcompress.layerwise.walk import Walk
from fxcompress.progress import progress_bar
from fxcompress.prune.sensitivity_cache import fingerprint
from fxcompress.quant.awq import search_factors
from fxcompress.quant.gptq import Curvature, factorize, gptq
from fxcompress.quant.grids import RowGrid, row_grid
from fxcompress.quant.layer_weights import attach_quantizer, layer_weight, other_readers, put_weight
from fxcompress.quant.migration import Migration, find_migration
from fxcompress.quant.rounding_checkpoint import Checkpoint
from fxcompress.quant.rounding_options import RangeChoice, RoundingOptions
from fxcompress.rewrite import Analysis

__all__ = ["LayerRounding", "RoundedLayer"]


@dataclass
class RoundedLayer:
    """A weight to round.

    Attributes:
        name: Of the first layer that has it.
        nodes: Every node that multiplies by it.
        axis: Its output-channel axis.
        features: Input features.
        group_size: Input features that share a scale; None: all.
        grid: Set when it was rounded.
        rows: The rounded rows [out, in], where they are not put into the program yet.
    """

    name: str
    nodes: list[Node]
    axis: int
    features: int
    group_size: int | None
    grid: RowGrid | None = None
    rows: Tensor | None = None


@dataclass
class _Stop:
    """A value and the layers that read it and are rounded (or, called again later, observed) at it."""

    value: Node
    first: Node
    layers: list[RoundedLayer] = field(default_factory=list)


class LayerRounding:
    """Rounds ``layers`` of ``program`` and gives them their quantizers.

    Args:
        program: Changed in place; its tensors are replaced, and written into only when the options say so.
        layers: What to round.
        calls: Calibration calls.
        options: How.

    Attributes:
        notes: What the user should know.
    """

    def __init__(
        self, program: Program, layers: list[RoundedLayer], calls: list[Call], options: RoundingOptions
    ) -> None:
        self.program, self.layers, self.options = program, layers, options
        self.notes: list[str] = []
        self._stops = _stops(program, layers)
        self._last = {layer.name: stop for stop in self._stops for layer in stop.layers}
        self._repeated = {layer.name for layer in layers if sum(layer in stop.layers for stop in self._stops) > 1}
        key = {"options": options.key(), "layers": [[x.name, x.group_size] for x in layers], "calls": calls}
        self._saved = Checkpoint(
            options.checkpoint, fingerprint(program, "rounding", key) if options.checkpoint else ""
        )
        self._walk = Walk(program, calls)
        self._shared = set(other_readers(program)) if options.in_place else set[int]()
        self._statistics: dict[str, InputStatistics] = {}  # of weights that are called again

    def run(self) -> None:
        """Round everything.

        Raises:
            CalibrationError: the model fails on the data, or a layer's inputs hold NaN or infinity.
            ArtifactError: a checkpoint cannot be written or is damaged.
            PassError: second moments that cannot be factorized.
        """
        header = f"{self.options.method}: {len(self.layers)} layers, {len(self._walk)} calibration batches"
        with (
            torch.no_grad(),
            evaluating(self.program.gm),
            progress_bar("rounded", len(self.layers), self.options.progress, header) as advance,
        ):
            for number, stop in enumerate(self._stops):
                trim_memory()
                for layer in self._round_stop(number, stop):
                    if self.options.sequential:
                        self._put(layer)
                    advance()
            self._finish()

    def _finish(self) -> None:
        for layer in self.layers:
            if layer.rows is not None:
                self._put(layer)
            assert layer.grid is not None
            for node in layer.nodes:
                attach_quantizer(self.program, node, layer.grid.quantizer(layer.axis))

    def _put(self, layer: RoundedLayer) -> None:
        assert layer.rows is not None
        old, new = layer_weight(self.program, layer.nodes[0]), layer.rows if layer.axis == 0 else layer.rows.t()
        if self.options.in_place and old.data_ptr() not in self._shared:
            old.copy_(new)
        else:
            put_weight(self.program, layer.nodes, new.contiguous())
        layer.rows = None

    def _rows(self, layer: RoundedLayer) -> Tensor:
        weight = layer_weight(self.program, layer.nodes[0])
        return (weight if layer.axis == 0 else weight.t()).float()

    # ------------------------------------------------------------------------------------------------ one stop
    def _round_stop(self, number: int, stop: _Stop) -> list[RoundedLayer]:
        """Round the layers whose last call is at ``stop``; returns them."""
        ready = [layer for layer in stop.layers if self._last[layer.name] is stop]
        saved = self._saved.read(number)
        if saved is not None:
            self._restore(stop, ready, *saved)
            return ready
        known = len(self.notes)
        once = [layer for layer in stop.layers if layer.name not in self._repeated]
        statistics = self._new_statistics()
        watching = [statistics] if once else []
        for layer in stop.layers:
            if layer.name in self._repeated:
                watching.append(self._statistics.setdefault(layer.name, self._new_statistics()))

        def see(_: int, values: list[Any]) -> None:
            for one in watching:
                one.update(values[0])

        self._walk.visit(stop.first, [stop.value], see)
        trim_memory()
        factors = self._solve(stop, once, statistics) if once else None
        for layer in ready:
            if layer.name in self._repeated:
                self._solve(None, [layer], self._statistics.pop(layer.name))
        self._saved.write(number, self._tensors(ready, factors), self.notes[known:])
        return ready

    def _new_statistics(self) -> InputStatistics:
        options = self.options
        return InputStatistics(nn.Identity(), moments=True, skip=options.skip_tokens, magnitudes=options.scales)

    def _solve(self, stop: _Stop | None, layers: list[RoundedLayer], statistics: InputStatistics) -> Tensor | None:
        """Round layers with the same inputs; the factors their channels were multiplied by."""
        names = ", ".join(layer.name for layer in layers)
        moments = self._moments(names, statistics)
        if moments is None:
            for layer in layers:
                self._take(layer, self._grid(layer, self._rows(layer), "mse"))
            return None
        factors = None
        if self.options.scales and stop is not None:
            assert statistics.absolute is not None
            factors = self._scale(stop, layers, moments, statistics.absolute[0] / statistics.rows)
            if factors is not None:
                moments.div_(factors[1]).div_(factors[1][:, None])
        options = self.options
        grids = [self._grid(layer, self._rows(layer), options.range_method, moments) for layer in layers]
        trim_memory()
        curvature = self._curvature(names, moments) if options.compensates else None
        del moments
        for layer, grid in zip(layers, grids, strict=True):
            self._round(layer, grid, curvature)
        return None if factors is None else factors[0]

    def _moments(self, names: str, statistics: InputStatistics) -> Tensor | None:
        """``X^T X`` of the layers' inputs; None when they never saw any."""
        self.notes += not_finite_note(statistics.skipped, statistics.seen, names)
        if statistics.unskipped:
            self.notes.append(f"{names}: the inputs are no sequences, so first tokens were not left out")
        total = statistics.total
        if total is None or not bool((total[0].diagonal() > 0).any()):
            self.notes.append(f"{names}: calibration never reached it; rounded to nearest")
            return None
        moments = total[0].float()
        statistics.forget()
        return moments

    def _scale(
        self, stop: _Stop, layers: list[RoundedLayer], moments: Tensor, magnitude: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """AWQ's factors, folded into the program: one each, and one per channel."""
        migration = find_migration(Analysis(self.program), stop.value)
        if isinstance(migration, str):
            self.notes.append(f"{', '.join(layer.name for layer in layers)}: channels not scaled: {migration}")
            return None
        rows = torch.cat([self._rows(layer) for layer in layers])
        factors = search_factors(rows, moments, magnitude, self.options.spec(layers[0].group_size), migration)
        if bool((factors == 1).all()):
            return None
        self._fold(migration, factors)
        return factors, factors[migration.groups].to(moments)

    def _fold(self, migration: Migration, factors: Tensor) -> None:
        """Divide where the channels are made; layers rounded already take it into their scales."""
        # A store of its own: rounded weights are put past it, and it keeps what it replaces.
        store = WeightStore(self.program.gm, replace=not self.options.in_place)
        divided = migration.apply(self.program, store, factors)
        self._walk.divide(migration.divisors(factors))
        for layer in self.layers:
            divisor = divided.get(self.program.module(layer.nodes[0])) if layer.nodes[0].op == "call_module" else None
            if divisor is None or layer.grid is None:
                continue
            column = divisor.reshape(-1, 1)
            layer.grid = RowGrid(layer.grid.spec, layer.grid.scale / column.float(), layer.grid.zero_point)
            if layer.rows is not None:
                layer.rows = layer.rows / column

    def _curvature(self, names: str, moments: Tensor) -> Curvature:
        """Takes the place of ``moments`` in memory."""
        found = factorize(moments, self.options.damping, self.options.act_order, out=moments)
        if found.damping > self.options.damping:
            self.notes.append(f"{names}: second moments are singular: damped by {found.damping:g} of their mean")
        return found

    def _round(self, layer: RoundedLayer, grid: RowGrid, curvature: Curvature | None) -> None:
        if curvature is None:
            self._take(layer, grid)
            return
        regrid = None if self.options.static_groups else self.options.range_method
        new, grid = gptq(self._rows(layer), curvature, grid, regrid)
        self._take(layer, grid, new)

    def _grid(self, layer: RoundedLayer, rows: Tensor, method: RangeChoice, moments: Tensor | None = None) -> RowGrid:
        dtype = layer_weight(self.program, layer.nodes[0]).dtype
        return row_grid(rows, self.options.spec(layer.group_size), method, moments, dtype)

    def _take(self, layer: RoundedLayer, grid: RowGrid, rows: Tensor | None = None) -> None:
        layer.grid = grid
        layer.rows = grid.round(self._rows(layer)) if rows is None else rows

    # ------------------------------------------------------------------------------------------------ checkpoint
    def _tensors(self, layers: list[RoundedLayer], factors: Tensor | None) -> dict[str, Tensor]:
        found = {} if factors is None else {"factors": factors}
        for layer in layers:
            assert layer.rows is not None and layer.grid is not None
            parts = {"weight": layer.rows, "scale": layer.grid.scale, "zero_point": layer.grid.zero_point}
            found |= {f"{layer.name}:{part}": tensor.contiguous() for part, tensor in parts.items()}
        return found

    def _restore(self, stop: _Stop, layers: list[RoundedLayer], saved: dict[str, Tensor], notes: list[str]) -> None:
        if "factors" in saved:
            migration = find_migration(Analysis(self.program), stop.value)
            assert isinstance(migration, Migration)
            self._fold(migration, saved["factors"])
        for layer in layers:
            parts = [saved[f"{layer.name}:{part}"] for part in ("weight", "scale", "zero_point")]
            layer.rows, layer.grid = parts[0], RowGrid(self.options.spec(layer.group_size), *parts[1:])
        self.notes += notes


def _stops(program: Program, layers: list[RoundedLayer]) -> list[_Stop]:
    """The values that layers read, in the order in which they are first read."""
    place = {node: i for i, node in enumerate(program.graph.nodes)}
    stops: dict[Node, _Stop] = {}
    reads = sorted(((node, layer) for layer in layers for node in layer.nodes), key=lambda pair: place[pair[0]])
    for node, layer in reads:
        value = node.args[0]
        assert isinstance(value, Node)
        stop = stops.setdefault(value, _Stop(value, node))
        if layer not in stop.layers:
            stop.layers.append(layer)
    return list(stops.values())
