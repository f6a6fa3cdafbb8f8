"""prepare_qat: a captured program becomes one that trains with quantization simulated."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor
from torch.fx import Node

from fxcompress.data import CalibrationData
from fxcompress.errors import PassError, UsageError
from fxcompress.ir import Program, evaluating
from fxcompress.qat.layers import BiasGrid, TrainedFused, make_trained
from fxcompress.qat.program import QATProgram, input_quantizer
from fxcompress.qat.quantizers import (
    ActivationQuantizer,
    LearnedQuantizer,
    SharedScale,
    TrainedQuantizer,
    WeightQuantizer,
    lsq_scale,
)
from fxcompress.qat.structure import own_tensors, place_in_training, restructure
from fxcompress.quant.calibration import calibrate, freeze
from fxcompress.quant.fake_quantize import QUANTIZERS, FakeQuantize
from fxcompress.quant.insertion import insert_quantizers
from fxcompress.quant.layer_weights import as_globs, attach_quantizer, check_weight, has_quantizer, layer_weight
from fxcompress.quant.leftovers import unused_globs
from fxcompress.quant.observers import Observer, make_observer
from fxcompress.quant.placement import Placement, layer_name, weight_axis
from fxcompress.quant.scheme import QuantScheme
from fxcompress.quant.spec import QuantSpec
from fxcompress.rewrite import put_layer

__all__ = ["prepare_qat"]


def prepare_qat(
    program: Program,
    scheme: QuantScheme | None = None,
    *,
    learn_scale: bool = False,
    weight_bits: int = 8,
    activation_bits: int = 8,
    calibration: Iterable[Any] | None = None,
    samples: int = 300,
    keep_8bit: str | Sequence[str] = (),
    ignore: str | Sequence[str] = (),
) -> QATProgram:
    """Put trainable fake-quantizers where `QuantizeStatic` puts its own, and let layers fold their norms while training.

    Activations keep a moving average of their range (Jacob et al. 2018), weights follow theirs: of the extremes with 8 bits,
    of least squared error with fewer. With ``learn_scale`` all scales, and the offsets of asymmetric activations, are
    parameters: LSQ (Esser et al. 2020) and LSQ+ (Bhalgat et al. 2020). They begin at ``2 mean|v| / sqrt(qmax)``, asymmetric
    activations at the range of least squared error.

    Args:
        program: A captured program, not quantized yet; it is copied, and stays as it is whatever is trained.
        scheme: How the target wants it quantized, ``fxc.target("openvino").scheme()``; None for a general one.
        learn_scale: Learn the scales.
        weight_bits: 2 to 8; 8 takes the scheme's own grid, fewer all integers of ``[-2^(b-1), 2^(b-1) - 1]``.
        activation_bits: 2 to 8; 8 takes the scheme's own grid, fewer all integers of ``b`` bits.
        calibration: Batches (see ``fxcompress.data``) for the first ranges of activations, those of least squared error as
            in `QuantizeStatic`. Without them the first training batch sets the ranges.
        samples: Calibration samples to use at most (whole batches).
        keep_8bit: Globs over layer names whose weight and input stay at 8 bits, usually the first and the last layer.
        ignore: Globs over layer names to leave in floating point.

    Returns:
        The program, in the mode (training or eval) of ``program``; its notes say what stays in floating point.

    Raises:
        UsageError: bits out of range, no sample asked for, or no program.
        PassError: the program is quantized already, or nothing in it can be.
        CalibrationError: the data is empty, broken or does not fit.
    """
    _check(program, weight_bits, activation_bits, samples)
    wish = _Wish(
        scheme or QuantScheme(), learn_scale, weight_bits, activation_bits, as_globs(keep_8bit), as_globs(ignore)
    )
    work = program.clone()
    own_tensors(work)
    training = work.gm.training
    with evaluating(work.gm):
        restructure(work, wish.scheme)
        placement = place_in_training(work, wish.scheme, wish.ignore)
        if not placement.layers:
            why = "; ".join(f"{n}: {r}" for n, r in placement.left) or "no convolution and no linear layer"
            raise PassError(32, "there is no layer to quantize", why=why)
        for node in placement.layers:
            check_weight(work, node)
        notes = _quantize_activations(work, placement, wish, calibration, samples)
        _quantize_weights(work, placement, wish)
        _round_biases(work, placement, wish.scheme)
    work.gm.train(training)
    work.recompile()
    work.verify()
    notes += [f"{name} stays float: {reason}" for name, reason in placement.left]
    names = [layer_name(n) for n in placement.layers] + [name for name, _ in placement.left]
    notes += unused_globs(work, names, ignore=wish.ignore, keep_8bit=wish.keep_8bit)
    made = (work.gm, work.signature, work.example, work.notes + notes, work.history)
    return QATProgram(*made, scheme=wish.scheme)


def _check(program: Any, weight_bits: Any, activation_bits: Any, samples: int) -> None:
    if not isinstance(program, Program):
        fix = "capture it first: fxc.prepare_qat(fxc.capture(model, (x,)))"
        raise UsageError(510, f"a {type(program).__name__} cannot be prepared for training", fix=fix)
    for name, bits in (("weight_bits", weight_bits), ("activation_bits", activation_bits)):
        if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
            raise UsageError(
                511, f"{name} must be an integer from 2 to 8, not {bits!r}", fix="use 8, or 4 with learn_scale"
            )
    if samples < 1:
        raise UsageError(517, f"samples={samples}: nothing to calibrate with", fix="ask for 1 or more")
    if any(isinstance(m, QUANTIZERS) for m in program.gm.modules()):
        raise PassError(31, "the program is quantized already", fix="capture the float model again")


@dataclass(frozen=True)
class _Wish:
    """What the user asks for."""

    scheme: QuantScheme
    learn: bool
    weight_bits: int
    activation_bits: int
    keep_8bit: tuple[str, ...]
    ignore: tuple[str, ...]

    def keeps(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, glob) for glob in self.keep_8bit)

    def weight(self, name: str, axis: int) -> QuantSpec:
        spec = _narrowed(self.scheme.weight, 8 if self.keeps(name) else self.weight_bits)
        return spec if spec.axis is None else dataclasses.replace(spec, axis=axis)

    def activations(self, placement: Placement) -> dict[str, QuantSpec]:
        """Grid of each group by the name of its first value; what meets in an add has the same."""
        read = {v for n in placement.layers if self.keeps(layer_name(n)) for v in _values_behind(n, placement)}
        wide = {group[0] for group in placement.groups if read & set(group)}
        for leaders in placement.same_scale:
            wide |= set(leaders) if wide & set(leaders) else set()
        own, narrow = self.scheme.activation, _narrowed(self.scheme.activation, self.activation_bits)
        return {group[0].name: own if group[0] in wide else narrow for group in placement.groups}


def _narrowed(spec: QuantSpec, bits: int) -> QuantSpec:
    return spec if bits >= spec.bits else QuantSpec(bits, spec.signed, spec.symmetric, spec.axis)


def _values_behind(layer: Node, placement: Placement) -> Iterator[Node]:
    """The quantized values that a layer's input is made of, through data movements."""
    queue = [cast(Node, layer.args[0])]
    while queue:
        node = queue.pop()
        if node in placement.values:
            yield node
        else:
            queue += node.all_input_nodes


# ------------------------------------------------------------------------------------------------ quantizers
def _quantize_activations(
    work: Program, placement: Placement, wish: _Wish, calibration: Iterable[Any] | None, samples: int
) -> list[str]:
    """Insert the quantizers of activations; returns what the user should know."""
    specs = wish.activations(placement)
    makers: dict[str, FakeQuantize] = {}

    def make(group: list[Node]) -> FakeQuantize:
        spec, device = specs[group[0].name], cast(Tensor, group[0].meta["val"]).device
        quantizer = FakeQuantize(spec, _observer(spec, wish.learn), device)
        makers[group[0].name] = quantizer
        return quantizer

    insert_quantizers(work, placement, make)
    work.recompile()
    notes: list[str] = []
    observers = {name: cast(Observer, quantizer.observer) for name, quantizer in makers.items()}
    if calibration is not None:
        data = calibration if isinstance(calibration, CalibrationData) else CalibrationData(calibration)
        calibrate(work, data, samples)
        notes = freeze(makers, placement.same_scale)
        if data.skipped:
            notes.append(f"{data.skipped} calibration batches held NaN or infinity and were skipped")
        if data.seen < samples:
            notes.append(f"calibrated on {data.seen} samples, {samples} asked for")
    trained = {
        name: _trained(quantizer, observers[name], wish.learn, calibration is not None)
        for name, quantizer in makers.items()
    }
    by_id = {id(makers[name]): new for name, new in trained.items()}
    for node, module in list(work.layers()):
        if id(module) in by_id:
            put_layer(work, str(node.target), by_id[id(module)])
    _share_scales(placement, trained)
    return notes


class _MeanMagnitude(Observer):
    """The range of LSQ's first scale, ``2 mean|x| / sqrt(qmax)``."""

    def __init__(self) -> None:
        super().__init__()
        self._sum = 0.0

    def _accumulate(self, batch: Any) -> None:
        self._sum += float(batch.values.double().abs().mean()) * batch.count

    def _range(self, spec: QuantSpec) -> tuple[float, float]:
        high = 2.0 * self._sum / self.count / spec.qmax**0.5 * spec.qmax
        return (-high if self.low < 0 else 0.0), high


def _observer(spec: QuantSpec, learn: bool) -> Observer:
    return _MeanMagnitude() if learn and spec.symmetric else make_observer("mse")


def _trained(frozen: FakeQuantize, observer: Observer, learn: bool, calibrated: bool) -> TrainedQuantizer:
    """The trainable quantizer that begins where calibration ended."""
    device = frozen.scale.device
    if learn:
        learned = LearnedQuantizer(frozen.spec, device=device, batched=True)
        if calibrated:
            learned.begin(frozen.scale, frozen.zero_point, observer.low >= 0)
        return learned
    quantizer = ActivationQuantizer(frozen.spec, device)
    if calibrated:
        quantizer.begin(*observer.range(frozen.spec))
    return quantizer


def _share_scales(placement: Placement, quantizers: dict[str, TrainedQuantizer]) -> None:
    for leaders in placement.same_scale:
        found = [quantizers[leader.name] for leader in leaders]
        if isinstance(found[0], LearnedQuantizer):
            for other in found[1:]:
                other.scale = found[0].scale
            continue
        shared = SharedScale(len(found), found[0].scale.device)
        for place_, quantizer in enumerate(found):
            cast(ActivationQuantizer, quantizer).share(shared, place_)


def _quantize_weights(work: Program, placement: Placement, wish: _Wish) -> None:
    for node in placement.layers:
        if has_quantizer(work, node):
            continue  # the layer is called again
        module = work.module(node) if node.op == "call_module" else None
        spec = wish.weight(layer_name(node), 0 if module is None else weight_axis(module))
        if spec.group_size is not None:
            raise UsageError(
                512, "weights with groups cannot be trained", where="scheme.weight", fix="leave group_size out"
            )
        weight = layer_weight(work, node)
        folded = _folded(work, node, module) if isinstance(module, TrainedFused) else weight
        if not wish.learn:
            attach_quantizer(work, node, WeightQuantizer(spec, folded))
            continue
        channels = None if spec.axis is None else weight.shape[spec.axis]
        by_channel = channels is not None and channels == _norm_channels(work, node)
        attach_quantizer(work, node, LearnedQuantizer(spec, lsq_scale(weight if by_channel else folded, spec)))


def _folded(work: Program, node: Node, layer: TrainedFused) -> Tensor:
    tensors = {k: work.tensor(v) if isinstance(v, Node) else None for k, v in node.kwargs.items()}
    weight = layer.folded(*(tensors.get(k) for k in ("gamma", "beta", "mean", "var")))[0]
    return weight.detach()


def _norm_channels(work: Program, node: Node) -> int | None:
    """Channels of the norm that a layer folds."""
    mean = node.kwargs.get("mean")
    return len(work.tensor(mean)) if isinstance(mean, Node) else None


def _round_biases(work: Program, placement: Placement, scheme: QuantScheme) -> None:
    """Let layers round their bias where the engine does so and it shows: below 8 bits."""
    for node in placement.layers if scheme.integer_bias else ():
        layer = work.module(node) if node.op == "call_module" else None
        quantizer = getattr(layer, "weight_fake_quantize", None)
        source = input_quantizer(work, node)
        if layer is None or source is None or quantizer is None or not quantizer.spec.symmetric:
            continue
        spec = quantizer.spec
        if spec.bits < 8 or source.spec.bits < 8:
            wide = dataclasses.replace(scheme.weight, axis=spec.axis)
            trained = make_trained(layer)
            trained.bias_grid = BiasGrid(source, _spare(spec, wide), wide)
            put_layer(work, str(node.target), trained)


def _spare(spec: QuantSpec, wide: QuantSpec) -> int:
    """The largest power of two by which the integers of ``spec`` can be multiplied inside ``wide``."""
    spare = 1
    while 2 * spare * spec.qmin >= wide.qmin and 2 * spare * spec.qmax <= wide.qmax:
        spare *= 2
    return spare
