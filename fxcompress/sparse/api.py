"""sparsify: zeros in the weights of a model, by magnitude or from calibration data, free or N of every M."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from fxcompress.capture import capture
from fxcompress.data import CalibrationData, all_finite, example_from
from fxcompress.errors import PruneError
from fxcompress.ir import Program
from fxcompress.layerwise.statistics import InputStatistics
from fxcompress.layerwise.store import WeightStore
from fxcompress.rewrite import Analysis
from fxcompress.sparse.absorb import find_chain, node_of, permute_inputs
from fxcompress.sparse.layers import SparseLayer, find_layers, from_rows, reduction_size, to_rows
from fxcompress.sparse.masks import SparsityMasks
from fxcompress.sparse.pattern import Pattern, lowest, lowest_of_all
from fxcompress.sparse.permutation import find_permutation, kept_magnitude
from fxcompress.sparse.sequential import observe_all, walk
from fxcompress.sparse.settings import Settings
from fxcompress.sparse.solvers import block_scores, magnitude, sparsegpt, wanda

__all__ = ["Outcome", "make_sparse", "sparsify"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def sparsify(
    model: Program | nn.Module,
    sparsity: float | None = None,
    *,
    pattern: str | tuple[int, int] | None = None,
    method: Literal["l1", "l2", "random", "wanda", "sparsegpt"] = "l1",
    scope: Literal["layer", "global"] = "layer",
    include: Sequence[str] = (),
    ignore: Sequence[str] = (),
    calibration: Iterable[Any] | None = None,
    permute: bool = False,
    samples: int = 128,
    sequential: bool = True,
    block: int = 1,
    seed: int = 0,
) -> SparsityMasks:
    """Set weights of convolutions and linear layers to zero.

    A module is changed in place: its parameters stay the same objects, so an optimizer that has them goes on working. A
    program gets new parameters: the model it was captured from, and its clones, stay as they are. When anything fails,
    the model is as it was.

    Args:
        model: Module or program. Weights that several layers share are one weight; one that is also an embedding's
            stays dense unless ``include`` names it.
        sparsity: Share of weights to set to zero, 0 to below 1. Not needed with ``pattern``.
        pattern: N of every M kept, ``"2:4"`` or ``(2, 4)``: M neighbours along the input channels (of a convolution: at
            one kernel position). Layers whose input channels (per group) are not a multiple of M stay dense, with a note.
        method: ``l1``, ``l2`` (magnitude), ``random``, ``wanda`` (magnitude times the norm of the input; the share is
            taken of every row) or ``sparsegpt`` (the remaining weights take up the error; the share is taken of every
            128 columns). The last two need ``calibration``. For single weights ``l1`` and ``l2`` are the same ranking;
            they differ with ``block``.
        scope: Take the share of every layer, or of all weights together (``l1``, ``l2`` and ``random`` only).
        include: Globs over layer names: only these.
        ignore: Globs over layer names: not these.
        calibration: Iterable of batches, as `compile` takes it.
        permute: Before an N:M pattern, look for an order of the input channels that keeps more magnitude, and use it
            where the layers before can give their outputs in that order, which changes nothing else.
        samples: Calibration samples to use at most (whole batches).
        sequential: Calibrated methods prune layer by layer, each seeing what the sparse layers before it give, as
            published; this needs the graph, so a module is captured. False observes all inputs of the dense model in one
            go: it works for any module, but keeps the statistics of all layers at once.
        block: Prune blocks of that many neighbours along the input channels (``l1``, ``l2``, ``random``, ``wanda``).
        seed: Of ``random`` and of the search for permutations.

    Returns:
        The masks, already applied.

    Raises:
        PruneError: an option is wrong or excludes another, a glob matches nothing, nothing is left to prune, a weight
            is not finite, or calibration data is missing.
        CalibrationError: the data is empty, broken or does not fit.
        CaptureError: the module must be captured and cannot be.
    """
    globs = cast(Any, {"include": include, "ignore": ignore})
    options = {"permute": permute, "samples": samples, "sequential": sequential, "block": block, "seed": seed}
    settings = Settings(sparsity, pattern, method, scope, **globs, **cast(Any, options))
    store = WeightStore(model.gm if isinstance(model, Program) else model, isinstance(model, Program))
    try:
        outcome = make_sparse(model, settings, calibration, store)
    except BaseException:
        store.undo()
        raise
    return SparsityMasks(model, outcome.kept, store, outcome.permuted + outcome.notes, settings.record())


@dataclass
class Outcome:
    """What `make_sparse` did.

    Attributes:
        kept: Layer name -> bool tensor of the shape of its weight, True where the weight is kept.
        notes: What was left alone and why.
        permuted: One line per layer whose input channels were reordered.
    """

    kept: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    permuted: list[str] = field(default_factory=list)


def make_sparse(
    model: Program | nn.Module, settings: Settings, calibration: Iterable[Any] | None, store: WeightStore
) -> Outcome:
    """The work of `sparsify`: new weights go through ``store``."""
    layers, notes = find_layers(model, settings.include, settings.ignore)
    layers = _fitting(layers, settings, notes)
    return _Work(model, settings, calibration, store, layers, Outcome(notes=notes)).run()


def _fitting(layers: list[SparseLayer], settings: Settings, notes: list[str]) -> list[SparseLayer]:
    """The layers whose shape and kind allow what is asked; a note for each other one."""
    pattern = settings.pattern
    size = pattern.m if isinstance(pattern, Pattern) else settings.block
    fit = []
    for layer in layers:
        inputs = reduction_size(layer.module)
        if inputs % size:
            notes.append(f"{layer.name} left dense: {inputs} input channels are not a multiple of {size}")
        elif settings.calibrated and isinstance(layer.module, _TRANSPOSED):
            notes.append(f"{layer.name} left dense: {settings.method} does not know transposed convolutions; use l1")
        elif not all_finite(layer.weight):
            fix = "train or load the model again, or leave the layer out with ignore=..."
            raise PruneError(203, "a weight to be made sparse holds NaN or infinity", where=layer.name, fix=fix)
        else:
            fit.append(layer)
    if not fit:
        raise PruneError(
            204, "no layer fits what is asked", why="; ".join(notes), fix="ask for another pattern or block"
        )
    return fit


class _Work:
    def __init__(
        self,
        model: Program | nn.Module,
        settings: Settings,
        calibration: Iterable[Any] | None,
        store: WeightStore,
        layers: list[SparseLayer],
        outcome: Outcome,
    ) -> None:
        self.model, self.settings, self.store = model, settings, store
        self.layers, self.outcome = layers, outcome
        self.data: CalibrationData | None = None
        if calibration is not None:
            self.data = calibration if isinstance(calibration, CalibrationData) else CalibrationData(calibration)
        if settings.calibrated and self.data is None:
            raise PruneError(205, f"method {settings.method!r} needs calibration data", fix="pass calibration=loader")
        self._graph: Program | None = model if isinstance(model, Program) else None

    def run(self) -> Outcome:
        if self.settings.permute:
            self._permute()
        if self.settings.calibrated:
            self._calibrated()
        else:
            self._by_magnitude()
        return self.outcome

    def _program(self) -> Program:
        """The program, or the module as one that shares its parameters."""
        if self._graph is None:
            module = cast(nn.Module, self.model)
            if self.data is None:
                fix = "pass fxcompress.capture(model, example_inputs), or calibration data"
                raise PruneError(206, "permute=True needs the graph of the model", fix=fix)
            self._graph = capture(module, *example_from(self.data, module))
        return self._graph

    def _by_magnitude(self) -> None:
        settings, target, block = self.settings, self.settings.target, self.settings.block
        score = magnitude(settings.method, settings.seed, block)

        def scores(layer: SparseLayer) -> Tensor:
            rows = to_rows(layer.module, layer.weight.detach())
            return block_scores(score(rows), rows, block)

        if settings.scope == "global":
            everywhere = lowest_of_all([scores(layer) for layer in self.layers], cast(float, target))
            for layer, pruned in zip(self.layers, everywhere, strict=True):
                self._put(layer, pruned.repeat_interleave(block, -1))
            return
        for layer in self.layers:
            found = scores(layer)
            pruned = target.prune(found) if isinstance(target, Pattern) else lowest(found, target, 3)
            self._put(layer, pruned.repeat_interleave(block, -1))

    def _calibrated(self) -> None:
        assert self.data is not None
        moments = self.settings.method == "sparsegpt"
        if self.settings.sequential:
            program = self._program()
            calls = list(self.data.calls(program, self.settings.samples))
            missed = walk(program, self.layers, calls, moments, self._solve)
        else:
            found = observe_all(self.model, self.layers, self.data, self.settings.samples, moments)
            for layer in self.layers:
                if layer.name in found:
                    self._solve(layer, found.pop(layer.name))
            missed = [layer.name for layer in self.layers if layer.name not in self.outcome.kept]
        self.outcome.notes += [f"{name} left dense: calibration never reached it as a layer" for name in missed]
        if not self.outcome.kept:
            why = "; ".join(self.outcome.notes)
            raise PruneError(207, "calibration reached none of the layers", why=why, fix="use method='l1'")

    def _solve(self, layer: SparseLayer, statistics: InputStatistics) -> None:
        """Wanda's mask, or SparseGPT's mask and weights."""
        rows, target = to_rows(layer.module, layer.weight.detach()), self.settings.target
        if statistics.skipped:
            self.outcome.notes.append(f"{layer.name}: {statistics.skipped} of its inputs held NaN or infinity: ignored")
        if statistics.total is None:
            self.outcome.notes.append(f"{layer.name} left dense: it saw no usable input")
            return
        if self.settings.method == "sparsegpt":
            new, pruned = sparsegpt(rows, statistics.total, target)
            self._put(layer, pruned, new)
            return
        scores = block_scores(wanda(rows, statistics.total), rows, self.settings.block)
        if isinstance(target, Pattern):
            self._put(layer, target.prune(scores))
        else:
            self._put(layer, lowest(scores, target, 1).repeat_interleave(self.settings.block, -1))

    def _put(self, layer: SparseLayer, pruned: Tensor, rows: Tensor | None = None) -> None:
        """Store mask and weights of a layer, both given as rows."""
        kept = from_rows(layer.module, ~pruned)
        weight = layer.weight.detach() if rows is None else from_rows(layer.module, rows)
        self.store.put(layer.module, "weight", torch.where(kept, weight, torch.zeros_like(weight)))
        self.outcome.kept[layer.name] = kept

    def _permute(self) -> None:
        program, pattern = self._program(), cast(Pattern, self.settings.pattern)
        analysis = Analysis(program)
        for layer in self.layers:
            node = node_of(program, layer.weight)
            chain = "it is no layer of the graph" if node is None else find_chain(analysis, node)
            if not isinstance(chain, str) and not all(self.store.holds(getattr(m, n)) for m, n, _ in chain.moved):
                chain = "the graph holds a copy of a tensor, not the model's own"
            if isinstance(chain, str):
                self.outcome.notes.append(f"{layer.name}: channels not permuted: {chain}")
                continue
            magnitudes = to_rows(layer.module, layer.weight.detach().abs())
            magnitudes = magnitudes.reshape(-1, reduction_size(layer.module))
            permutation = find_permutation(magnitudes, pattern, self.settings.seed)
            if permutation is None:
                continue
            permute_inputs(chain, permutation, self.store)
            shares = [kept_magnitude(m, pattern) for m in (magnitudes, magnitudes[:, permutation])]
            through = ", ".join(chain.producers)
            line = f"{layer.name}: input channels permuted, through {through}: kept magnitude"
            self.outcome.permuted.append(f"{line} {shares[0]:.2%} -> {shares[1]:.2%}")
            analysis = Analysis(program)
