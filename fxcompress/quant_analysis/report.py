"""`quant_report`: measures what quantization does to every layer of a program."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence, Sized
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from fxcompress.data import CalibrationData
from fxcompress.errors import UsageError
from fxcompress.ir import Program, evaluating
from fxcompress.progress import progress_bar
from fxcompress.quant.fake_quantize import QUANTIZERS, FakeQuantize
from fxcompress.quant.histogram import Histogram
from fxcompress.quant.layer_weights import layer_weight
from fxcompress.quant.placement import layer_kind, weight_axis
from fxcompress.quant_analysis.advice import OUTLIER, advise
from fxcompress.quant_analysis.measure import Measured, measure
from fxcompress.quant_analysis.result import Bins, LayerRow, QuantReport, TensorRow
from fxcompress.quant_analysis.subjects import Runner, Subject, find_subjects
from fxcompress.quant_analysis.tally import Channels, Energy, ValueTally

__all__ = ["quant_report"]

_BINS = 48
#: Quantizers of a layer's weights are its submodules ``<name of the weight>_fake_quantize``.
_SUFFIX = "_fake_quantize"
#: Outputs of generative models that are no results.
_CACHES = ("past_key_value", "cache")
#: The reference's weights are those of the program before rounding when the outputs agree so far.
_SAME = 1e-3


def quant_report(
    program: Program,
    data: Iterable[Any],
    *,
    samples: int = 32,
    alone: int = 8,
    reference: Program | None = None,
    progress: bool = False,
) -> QuantReport:
    """Measure, for every layer, ranges, rounding noise, outlier channels and the error it alone causes at the output.

    Time: two runs of the program per batch, and for the first ``alone`` samples half a run per quantized layer. Memory:
    the values alive at one node of one batch, three times, and 20 kB per layer.

    Args:
        program: Quantized by any pass, or a `QATProgram`; left untouched.
        data: Batches as for calibration; not those it was calibrated with, if the numbers are to mean much.
        samples: Samples to run at most (whole batches).
        alone: Samples for the error each layer alone causes; 0: it is not measured.
        reference: The float program the quantized one was made from. Needed to compare weights where rounding replaced
            them (GPTQ, AdaRound); its outputs are compared in any case.
        progress: Show a progress bar on stderr.

    Returns:
        The report. Outputs that are named as caches are left out of the comparison.

    Raises:
        UsageError: ``program`` is no program, or is not quantized or not calibrated; no samples; no float output.
        CalibrationError: as from calibration.
    """
    program = _quantized(program)
    _check_counts(samples, alone)
    subjects = find_subjects(program)
    chosen = _compared_outputs(program)
    source = data if isinstance(data, CalibrationData) else CalibrationData(data)
    floats, notes = _float_weights(program, subjects, reference, source)
    runner = Runner(program, floats)
    batches = len(data) if isinstance(data, Sized) else 0
    with progress_bar(
        "measured", len(subjects) * batches, progress, f"quantization report: {len(subjects)} rows"
    ) as bar:
        found, totals = measure(
            runner,
            subjects,
            source.calls(program, samples),
            alone=alone,
            outputs=list(chosen),
            reference=reference,
            advance=bar,
        )
    rows = _rows(program, found, floats)
    notes += _notes(rows)
    if source.seen < samples:
        notes.append(f"measured on {source.seen} samples, {samples} asked for")
    if source.skipped:
        notes.append(f"{source.skipped} batches held NaN or infinity and were skipped")
    return QuantReport(
        rows=rows,
        error=_worst(totals.outputs),
        reference_error=_worst(totals.reference) if reference is not None else None,
        outputs=tuple(chosen.values()),
        samples=source.seen,
        alone_samples=min(alone, source.seen),
        notes=tuple(notes),
    )


# ------------------------------------------------------------------------------------------------ checks
def _quantized(program: Any) -> Program:
    if not isinstance(program, Program):
        what = f"quant_report takes a program, not {type(program).__name__}"
        raise UsageError(
            561, what, fix="quantize first: fxc.QuantizeStatic()(fxc.capture(model, (x,)), context).program"
        )
    convert = getattr(program, "convert", None)
    plain: Program = program if convert is None else convert()  # of a QATProgram
    quantizers = [m for m in plain.gm.modules() if isinstance(m, QUANTIZERS)]
    if not quantizers:
        fix = "run QuantizeStatic, QuantizeDynamic or QuantizeWeights before"
        raise UsageError(562, "the program is not quantized: there is nothing to report", fix=fix)
    if any(isinstance(m, FakeQuantize) and m.observer is not None for m in quantizers):
        raise UsageError(563, "the program still observes ranges", fix="finish calibration (freeze) before the report")
    return plain


def _check_counts(samples: int, alone: int) -> None:
    if samples < 1 or alone < 0:
        raise UsageError(
            564, f"samples={samples}, alone={alone}", fix="give 1 or more samples, and 0 or more for alone"
        )


def _compared_outputs(program: Program) -> dict[int, str]:
    """Index and name of every float output that is no cache."""
    outputs = program.outputs()
    named = pytree.tree_flatten_with_path(program.signature.unflatten(list(range(len(outputs)))))[0]
    names = {int(index): "output" + pytree.keystr(path) for path, index in named}
    floats = {i: names.get(i, f"output {i}") for i, v in enumerate(outputs) if _is_float(v)}
    found = {i: name for i, name in floats.items() if not any(word in name.lower() for word in _CACHES)} or floats
    if not found:
        raise UsageError(565, "the program has no output of a float dtype", fix="return the logits or features as well")
    return found


def _is_float(value: Any) -> bool:
    fake = value.meta.get("val") if isinstance(value, Node) else None
    return isinstance(fake, Tensor) and fake.is_floating_point()


# ------------------------------------------------------------------------------------------------ float weights
def _float_weights(
    program: Program, subjects: Sequence[Subject], reference: Program | None, data: CalibrationData
) -> tuple[dict[str, Tensor], list[str]]:
    """Float weights of the reference by layer, if the program with them is the reference."""
    if reference is None:
        return {}, []
    found = {}
    modules = dict(reference.gm.named_modules())
    for subject in subjects:
        theirs = getattr(modules.get(subject.name), "weight", None)
        node = subject.nodes[0]
        weighted = node.op == "call_module" and layer_kind(program, node) is not None
        if weighted and isinstance(theirs, Tensor) and theirs.shape == layer_weight(program, node).shape:
            found[subject.name] = theirs.detach()
    call = next(iter(CalibrationData([data.first()]).calls(program)))
    runner, energy = Runner(program, found), Energy()
    with torch.no_grad(), evaluating(program.gm), evaluating(reference.gm):
        ours, theirs = _plain_outputs(runner, call), pytree.tree_leaves(reference(*call[0], **call[1]))
    for a, b in zip(ours, theirs, strict=False):
        if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and b.is_floating_point():
            energy.add(a, b)
    if energy.signal > 0 and energy.relative <= _SAME:
        return found, []
    note = (
        "the weights of the reference are not those that were rounded (BatchNorm folding, SmoothQuant, AWQ, a rotation or "
        "bias correction lies between): only the outputs are compared with it"
    )
    return {}, [note]


def _plain_outputs(runner: Runner, call: Any) -> list[Any]:
    leaves, values = runner.program.signature.flatten(*call), dict[Node, Any]()
    for node in runner.order:
        if node.op != "output":
            values[node] = runner.floated(node, values, leaves)
            runner.forget(node, values)
    return [values[v] if isinstance(v, Node) else v for v in runner.program.outputs()]


# ------------------------------------------------------------------------------------------------ rows
def _rows(program: Program, found: Sequence[Measured], floats: dict[str, Tensor]) -> tuple[LayerRow, ...]:
    every = sum(max((e.relative for e in m.alone), default=0.0) ** 2 for m in found)
    rows = [_row(program, m, floats.get(m.subject.name), every) for m in found]
    return tuple(dataclasses.replace(r, advice=advise(r, 1 / len(rows))) for r in rows)


def _row(program: Program, m: Measured, weight: Tensor | None, every: float) -> LayerRow:
    alone = _worst(m.alone) if m.alone else None
    node, subject = m.subject.nodes[0], m.subject
    own = _weight_row(program, subject, weight)
    rounded_input = m.by_input.signal > 0 or m.by_input.noise > 0
    source = cast(Node, node.args[0])
    quantizer = program.module(node) if subject.is_value else subject.inputs[node].get(source)
    by_weight = m.by_weight.sqnr_db if rounded_input else m.output.sqnr_db
    return LayerRow(
        name=subject.name,
        kind=subject.kind,
        weight=own,
        data=_tensor_row(m.data, quantizer) if m.data.exact.count else None,
        output_db=m.output.sqnr_db,
        by_weight_db=None if own is None or own.bits is None else by_weight,
        by_input_db=m.by_input.sqnr_db if rounded_input else None,
        accumulated_db=m.accumulated.sqnr_db,
        alone=alone,
        share=0.0 if not alone or not every else _share(alone, every),
        advice="",
    )


def _share(alone: float, every: float) -> float:
    return 1.0 if math.isinf(alone) else alone**2 / every


def _weights(program: Program, subject: Subject) -> list[tuple[Tensor, nn.Module]]:
    """Weights of a subject as they stand in front of their quantizers."""
    node = subject.nodes[0]
    if subject.is_value:
        return []
    if node.op == "call_function":
        found = [(cast(Node, a.args[0]), subject.inputs[node][a]) for a in subject.weights if a in subject.inputs[node]]
        return [(program.tensor(source).detach(), quantizer) for source, quantizer in found]
    layer = program.module(node)
    named = {n.removesuffix(_SUFFIX): m for n, m in layer._modules.items() if n.endswith(_SUFFIX)}
    return [(cast(Tensor, getattr(layer, n)).detach(), m) for n, m in named.items() if isinstance(m, QUANTIZERS)]


def _weight_row(program: Program, subject: Subject, exact: Tensor | None) -> TensorRow | None:
    """Of a subject's weights together; ``exact``: the float one when the program's is rounded already."""
    weights, node = _weights(program, subject), subject.nodes[0]
    if subject.is_value:
        return None
    if not weights:
        return _float_weight_row(program, node) if layer_kind(program, node) is not None else None
    tally = ValueTally(Channels(weight_axis(program.module(node)) if node.op == "call_module" else 0))
    for weight, quantizer in weights:
        plain = weight if exact is None else exact
        tally.add(plain, None)
        tally.add_rounded(plain, quantizer(weight), quantizer)
    return _tensor_row(tally, weights[0][1])


def _float_weight_row(program: Program, node: Node) -> TensorRow:
    tally = ValueTally(Channels(weight_axis(program.module(node)) if node.op == "call_module" else 0))
    tally.add(layer_weight(program, node), None)
    return _tensor_row(tally, None)


def _tensor_row(tally: ValueTally, quantizer: nn.Module | None) -> TensorRow:
    peaks = tally.channels.peaks
    outliers, spread = _outliers(peaks) if peaks is not None else ((), 1.0)
    noise = tally.energy.noise
    return TensorRow(
        grid="" if quantizer is None else str(quantizer.extra_repr()),
        bits=None if quantizer is None else int(cast(FakeQuantize, quantizer).spec.bits),
        low=tally.exact.low,
        high=tally.exact.high,
        sqnr_db=None if quantizer is None else tally.energy.sqnr_db,
        beyond=tally.beyond / tally.count if tally.count else 0.0,
        clipped=tally.clipped / noise if noise > 0 and math.isfinite(noise) else 0.0,
        spread=spread,
        outliers=outliers,
        bins=_bins(tally),
    )


def _outliers(peaks: Tensor) -> tuple[tuple[tuple[int, float], ...], float]:
    """Channels far above the median one that is not zero, and the ratio of the largest."""
    used = peaks[peaks > 0]
    if used.numel() < 2:
        return (), 1.0
    ratios = peaks / used.median()
    largest = ratios.topk(min(8, ratios.numel()))
    found = [(int(i), float(r)) for r, i in zip(largest.values, largest.indices, strict=True) if r >= OUTLIER]
    return tuple(found), float(ratios.max())


def _bins(tally: ValueTally) -> Bins:
    low, high = tally.exact.low, tally.exact.high
    if tally.rounded.count:
        low, high = min(low, tally.rounded.low), max(high, tally.rounded.high)
    if not low < high:
        high = low + 1.0
    counts = [_shares(o.histogram, low, high) for o in (tally.exact, tally.rounded) if o.count]
    return Bins(low, high, *counts)


def _shares(histogram: Histogram, low: float, high: float) -> tuple[float, ...]:
    """Shares of the values in equal bins from ``low`` to ``high``; a fine bin goes where its middle lies."""
    middles = (histogram.start + torch.arange(histogram.bins, dtype=torch.float64) + 0.5) * histogram.width
    index = ((middles - low) / (high - low) * _BINS).floor().clamp(0, _BINS - 1).to(torch.int64)
    counts = torch.zeros(_BINS, dtype=torch.float64).index_add_(0, index, histogram.counts)
    counts[int(min(max(-low / (high - low) * _BINS, 0), _BINS - 1))] += histogram.zeros
    return tuple(float(c) for c in counts / counts.sum().clamp(min=1e-300))


def _worst(energies: Sequence[Energy]) -> float:
    return max((e.relative for e in energies), default=0.0)


def _notes(rows: Sequence[LayerRow]) -> list[str]:
    replaced = [r.name for r in rows if r.weight is not None and r.weight.sqnr_db == math.inf and r.weight.spread > 0]
    if not replaced:
        return []
    more = f" and {len(replaced) - 3} more" if len(replaced) > 3 else ""
    return [
        f"{', '.join(replaced[:3])}{more}: the program holds rounded weights only; pass reference= to compare them with "
        "the float ones"
    ]
