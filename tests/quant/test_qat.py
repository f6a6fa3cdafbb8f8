"""prepare_qat: placement, norms that fold while training, switches, copies, training and resuming, bad input."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fxcompress as fxc
from fxcompress.errors import CalibrationError, FxcError
from fxcompress.ir import Program
from fxcompress.passbase import Context
from fxcompress.pipeline import Pipeline
from fxcompress.qat.layers import TrainedFused
from fxcompress.qat.quantizers import ActivationQuantizer, LearnedQuantizer
from fxcompress.quant.scheme import QuantScheme
from tests.helpers.digits import Attention, Convolutions, digits, trained, training

TARGETS = ("onnxruntime", "openvino", "triton", "torch")


def images(count: int = 8) -> Tensor:
    return digits()[0][:count]


@cache
def captured(kind: Any = Convolutions) -> Program:
    """Left alone by everything: `prepare_qat` copies."""
    return fxc.capture(trained(kind), (images(4),))


def prepared(kind: Any = Convolutions, **options: Any) -> fxc.QATProgram:
    scheme = options.pop("scheme", None)
    return fxc.prepare_qat(captured(kind), scheme, calibration=training()[:2], **options)


def outputs(program: Program, x: Tensor | None = None) -> Tensor:
    program.gm.eval()
    with torch.no_grad():
        return torch.as_tensor(program(images(64) if x is None else x))


def train(program: fxc.QATProgram, steps: int = 2, lr: float = 0.01) -> list[float]:
    program.gm.train()
    optimizer = torch.optim.SGD(program.gm.parameters(), lr, momentum=0.9)
    losses = []
    for x, labels in training()[:steps]:
        optimizer.zero_grad()
        loss = F.cross_entropy(program(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# ------------------------------------------------------------------------------------------------ QuantizeStatic
@pytest.mark.parametrize("kind", [Convolutions, Attention])
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_trained_equals_static_quantization(kind: Any, target: str) -> None:
    """The same quantizers in the same places, the same outputs to the last bit, dropout and all."""
    scheme, data = fxc.target(target).scheme(), training()[:2]
    program = captured(kind)
    static = fxc.QuantizeStatic(weight_calibrator="minmax", bias_correction=False)
    passes = (*fxc.default_passes(quantize=False), static)
    want = Pipeline(passes=passes)(program, Context(calibration=data, scheme=scheme)).program
    got = fxc.prepare_qat(program, scheme, calibration=data)
    names = {n.name for n, _ in want.layers()}
    assert {n.name for n, _ in got.layers()} - names <= {"drop", "dropout"}
    assert names <= {n.name for n, _ in got.layers()}
    assert torch.equal(outputs(got), outputs(want))
    assert torch.equal(outputs(got.convert()), outputs(want))
    assert {n.name for n, _ in got.convert().layers()} == names


def test_what_meets_in_an_add_keeps_one_scale_while_training() -> None:
    for learn in (False, True):
        program = prepared(scheme=QuantScheme(fused_residual=False), learn_scale=learn)
        train(program, 4)
        plain = program.convert()
        add = next(n for n in plain.graph.nodes if n.op == "call_function" and "add" in str(n.target))
        scales = {float(plain.module(n).scale) for n in add.all_input_nodes}  # type: ignore[arg-type]
        assert len(add.all_input_nodes) == 2 and len(scales) == 1


# ------------------------------------------------------------------------------------------------ switches
def test_switches() -> None:
    program = prepared()
    program.disable_fake_quantize()
    with torch.no_grad():
        difference = (outputs(program) - outputs(captured())).abs().max()
    assert float(difference) < 1e-4
    program.enable_fake_quantize()
    observed = [m for n, m in program.quantizers() if isinstance(m, ActivationQuantizer) and not n.endswith(".x")]
    program.disable_observers()
    before = [float(m.high) for m in observed]
    train(program)
    assert [float(m.high) for m in observed] == before
    program.enable_observers()
    train(program)
    assert all(float(m.high) != h for m, h in zip(observed, before, strict=True))
    highs = [float(m.high) for m in observed]
    outputs(program)
    assert [float(m.high) for m in observed] == highs, "eval mode observes nothing"


def test_ranges_are_the_moving_average_of_each_batch() -> None:
    x = images(8)
    program = fxc.prepare_qat(captured())
    quantizer = program.gm.get_submodule("fake_quantize.x")
    assert isinstance(quantizer, ActivationQuantizer)
    program.gm.train()
    program(x)
    assert (float(quantizer.low), float(quantizer.high)) == (float(x.min()), float(x.max()))
    program(3 * x)
    assert float(quantizer.high) == pytest.approx(float(x.max()) * 1.02)
    program(torch.full_like(x, torch.inf))
    assert float(quantizer.high) == pytest.approx(float(x.max()) * 1.02)


@pytest.mark.parametrize("weight_bits", [2, 4, 8])
def test_bits_and_layers_kept_at_8(weight_bits: int) -> None:
    program = prepared(weight_bits=weight_bits, activation_bits=3, keep_8bit=("stem", "head"), ignore=["point"])
    bits = {n: m.weight_fake_quantize.spec.bits for n, m in _weighted(program)}
    assert bits == {"stem": 8, "deep": weight_bits, "head": 8}
    assert {n: q.spec.bits for n, q in program.quantizers() if n.startswith("fake_quantize.")}["fake_quantize.x"] == 8
    plain = program.convert()
    for name, layer in _weighted(plain):
        spec = layer.weight_fake_quantize.spec
        quantized = layer.weight_fake_quantize(layer.weight.detach())
        assert all(len(row.unique()) <= spec.steps + 1 for row in quantized.flatten(1)), name
    assert any("point stays float" in note for note in program.notes)


def _weighted(program: Program) -> list[tuple[str, Any]]:
    layers = [(str(n.target), m) for n, m in program.layers()]
    return [(n, m) for n, m in layers if getattr(m, "weight_fake_quantize", None) is not None]


def test_biases_are_rounded_where_the_engine_rounds_them() -> None:
    program = prepared(scheme=QuantScheme(integer_bias=True), weight_bits=4, activation_bits=4)
    x = images(64)
    plain = program.convert()
    assert torch.equal(outputs(program, x), outputs(plain, x))
    layer = next(m for n, m in _weighted(plain) if n == "stem")
    step = plain.gm.get_submodule("fake_quantize.x").scale * layer.weight_fake_quantize.scale
    steps = layer.bias.double() / step.double()
    torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
    eighths = layer.weight.detach() / (8 * layer.weight_fake_quantize.scale.reshape(-1, 1, 1, 1))
    torch.testing.assert_close(eighths, eighths.round(), atol=1e-4, rtol=0)
    assert float(eighths.max()) <= 7.001 and float(eighths.min()) >= -8.001
    wide = prepared(scheme=QuantScheme(integer_bias=True))
    assert not any(isinstance(m, TrainedFused) and m.bias_grid for m in wide.gm.modules()), "8 bits are fine enough"


# ------------------------------------------------------------------------------------------------ copies, names
@pytest.mark.parametrize("learn", [False, True])
def test_names_copies_and_the_users_model(learn: bool) -> None:
    source = captured()
    state = {k: v.clone() for k, v in source.gm.state_dict().items()}
    program = fxc.prepare_qat(source, learn_scale=learn, calibration=training()[:2], weight_bits=4)
    extra = set(program.gm.state_dict()) - set(state)
    assert set(state) <= set(program.gm.state_dict())
    assert all("fake_quantize" in k or k.endswith("_extra_state") for k in extra)
    clone, twin = program.clone(), copy.deepcopy(program)
    assert isinstance(clone, fxc.QATProgram) and isinstance(twin, fxc.QATProgram)
    assert clone.text() == program.text() and list(twin.gm.state_dict()) == list(program.gm.state_dict())
    want = outputs(program)
    torch.manual_seed(1)
    train(program, 3)
    assert all(torch.equal(v, source.gm.state_dict()[k]) for k, v in state.items()), "the float program is untouched"
    assert torch.equal(outputs(twin), want), "a deep copy stands alone"
    assert torch.equal(outputs(clone), outputs(program)), "a clone shares tensors"
    torch.manual_seed(1)
    train(twin, 3)
    assert torch.equal(outputs(twin), outputs(program)), "and trains alone"
    assert torch.equal(outputs(program.convert()), outputs(program))


def test_a_state_dict_moves_scales_ranges_and_switches() -> None:
    for learn in (False, True):
        first = prepared(learn_scale=learn)
        train(first, 3)
        first.freeze_bn()
        second = fxc.prepare_qat(captured(), learn_scale=learn)
        second.gm.load_state_dict(first.gm.state_dict())
        assert torch.equal(outputs(first), outputs(second))
        assert all(m.frozen for m in second.gm.modules() if isinstance(m, TrainedFused))


# ------------------------------------------------------------------------------------------------ training
class PowerCut(list[Any]):
    """Batches that end with an error in the middle of the second epoch."""

    left = 9

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            self.left -= 1
            if self.left < 0:
                raise InterruptedError
            yield batch


@pytest.mark.parametrize("learn", [False, True])
def test_training_learns_and_resumes_to_the_last_bit(learn: bool, tmp_path: Path) -> None:
    def run(folder: Path, data: list[Any]) -> tuple[fxc.QATProgram, fxc.History]:
        program = prepared(learn_scale=learn, weight_bits=3, activation_bits=3)
        torch.manual_seed(3)
        callback = fxc.QATCallback(program, freeze_bn=2, freeze_ranges=1)
        history = fxc.fine_tune(
            program, data, epochs=3, lr=3e-3, checkpoint=folder, callbacks=[callback], progress=False
        )
        return program, history

    whole, history = run(tmp_path / "whole", training()[:6])
    assert history.losses[-1] < history.losses[0]
    with pytest.raises(InterruptedError):
        run(tmp_path / "parts", PowerCut(training()[:6]))
    parts, resumed = run(tmp_path / "parts", training()[:6])
    assert resumed.resumed == 1
    first, second = whole.gm.state_dict(), parts.gm.state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert all(m.frozen for m in parts.gm.modules() if isinstance(m, TrainedFused))
    assert not any(m.observing for _, m in parts.quantizers())


def test_learned_scales_change() -> None:
    program = prepared(learn_scale=True, weight_bits=4, activation_bits=4)
    before = [p.detach().clone() for p in program.scale_parameters()]
    train(program, 4)
    after = program.scale_parameters()
    moved = sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert moved > 0.7 * len(before)
    assert all(isinstance(m, LearnedQuantizer) for _, m in program.quantizers())


# ------------------------------------------------------------------------------------------------ bad input
def test_bad_input() -> None:
    program = captured()
    cases: list[tuple[str, Any]] = [
        ("USAGE-510", lambda: fxc.prepare_qat(trained(Convolutions))),  # type: ignore[arg-type]
        ("USAGE-511", lambda: fxc.prepare_qat(program, weight_bits=1)),
        ("USAGE-511", lambda: fxc.prepare_qat(program, activation_bits=9)),
        ("USAGE-511", lambda: fxc.prepare_qat(program, weight_bits=4.0)),  # type: ignore[arg-type]
        ("USAGE-517", lambda: fxc.prepare_qat(program, samples=0)),
        ("PASS-031", lambda: fxc.prepare_qat(prepared())),
        ("PASS-032", lambda: fxc.prepare_qat(program, ignore="*")),
        ("PASS-090", lambda: fxc.prepare_qat(program).convert()),
        ("PASS-090", lambda: outputs(fxc.prepare_qat(program, learn_scale=True))),
        ("USAGE-513", lambda: fxc.QATCallback(program)),  # type: ignore[arg-type]
        ("USAGE-514", lambda: fxc.QATCallback(prepared(), freeze_bn=-1)),
    ]
    for number, call in cases:
        with pytest.raises(FxcError, match=f"FXC-{number}"):
            call()
    with pytest.raises(CalibrationError):
        fxc.prepare_qat(program, calibration=[])
    off = prepared()
    off.disable_fake_quantize()
    with pytest.raises(FxcError, match="FXC-PASS-091"):
        off.convert()
    assert "ignore='nothing*' matches no layer" in prepared(ignore="nothing*").notes
