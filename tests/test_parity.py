"""Parity: an engine that computes something else is caught, and the layer where it first parts is named."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from fxcompress.artifact import load
from fxcompress.capture import capture
from fxcompress.engines import Engine, target
from fxcompress.errors import ParityError, UsageError
from fxcompress.ir import Program
from fxcompress.parity import Row, _Recorder, check_parity, compare, first_difference
from fxcompress.passbase import Context
from fxcompress.passes import Cast
from fxcompress.quant.fake_quantize import FakeQuantize
from tests.helpers.quick import RUNTIMES, built, cnn, images, plain, quantized

ENGINES = [pytest.param(name, marks=getattr(pytest.mark, name)) for name in RUNTIMES]
X = images(4, seed=11)


def changed(program: Program, layer: str, amount: float = 1.2) -> Program:
    """A copy whose ``layer`` has other weights."""
    state = copy.deepcopy(program.gm.state_dict())
    other = program.clone()
    module = copy.deepcopy(other.gm.get_submodule(layer))
    with torch.no_grad():
        module.weight.mul_(amount)  # type: ignore[operator, union-attr]
    owner, _, name = layer.rpartition(".")
    setattr(other.gm.get_submodule(owner), name, module)
    other.recompile()
    assert all(torch.equal(state[k], v) for k, v in program.gm.state_dict().items())
    return other


# ------------------------------------------------------------------------------------------------ the gate
@pytest.mark.parametrize("runtime", ENGINES)
@pytest.mark.parametrize("layer", ["stem", "blocks.0.conv", "blocks.1.conv", "head"])
def test_float_engine_with_one_other_layer(runtime: str, layer: str) -> None:
    engine = target(runtime).build(changed(plain(), layer), threads=1)
    with pytest.raises(ParityError, match=rf"first difference at {layer.replace('.', '[.]')},"):
        check_parity(engine, plain(), [X])


@pytest.mark.onnxruntime
def test_int8_engine_with_one_other_layer() -> None:
    """The weight of one layer is changed in the file itself."""
    import onnx
    from onnx import numpy_helper

    engine = target("onnxruntime").build(quantized("onnxruntime"), threads=1)
    file = engine.files()[0]
    model = onnx.load(str(file))
    (weight,) = [i for i in model.graph.initializer if i.name == "blocks.1.conv.weight_quantized"]
    array = numpy_helper.to_array(weight).copy()
    array[:4] = -array[:4]
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    onnx.save(model, str(file))
    broken = type(engine)(engine.folder, engine.signature, threads=1, details=engine.details)
    with pytest.raises(ParityError, match=r"first difference at blocks\.1\.conv") as caught:
        check_parity(broken, quantized("onnxruntime"), [X], reference=plain())
    assert "is allowed" in str(caught.value) and "fxc.compare" in caught.value.fix
    found = first_difference(broken, quantized("onnxruntime"), X)
    assert found is not None and "blocks.1.conv" in found.layers and found.error > 0.01
    assert first_difference(built("onnxruntime"), quantized("onnxruntime"), X) is None


@pytest.mark.parametrize("runtime", ENGINES)
def test_engines_as_built_pass(runtime: str) -> None:
    found = check_parity(built(runtime, "float32"), plain(), [X, images(1), (X,), ((X,), {}), {"x": X}])
    assert found.error < 1e-5 and found.tolerance == 1e-3 and found.samples == 5 and found.quantization_error is None
    quick = check_parity(built(runtime), quantized(runtime), [X], reference=plain())
    assert quick.error <= quick.tolerance and set(quick.to_dict()) >= {
        "error",
        "tolerance",
        "samples",
        "layer_by_layer",
    }


def test_tolerance_given() -> None:
    engine = built("torch", "float32")
    nearly = changed(plain(), "head", 1 + 1e-4)
    assert 1e-5 < check_parity(engine, nearly, [X]).error < 1e-3
    with pytest.raises(ParityError, match="at most 1e-05 is allowed"):
        check_parity(engine, nearly, [X], tolerance=1e-5)


def test_no_samples() -> None:
    with pytest.raises(UsageError, match="no sample"):
        check_parity(built("torch", "float32"), plain(), [])


def test_the_worst_sample_counts() -> None:
    """One bad batch among good ones is seen."""
    engine = built("torch", "float32")
    other = changed(plain(), "stem", 1.5)
    good = torch.zeros(4, 3, 16, 16)
    quiet = check_parity(engine, other, [good]).error
    with pytest.raises(ParityError, match="stem"):
        check_parity(engine, other, [good, X, good])
    assert quiet < 1e-3


def shifted(runtime: str, shift: float) -> Engine:
    """An engine whose grid for its input is moved by a share of a step: the size of error that rounding may make."""
    other = quantized(runtime).clone()
    name = next(n for n, m in other.gm.named_modules() if isinstance(m, FakeQuantize) and "weight" not in n)
    module = copy.deepcopy(other.gm.get_submodule(name))
    module.scale.mul_(1 + shift)  # type: ignore[operator, union-attr]
    owner, _, leaf = name.rpartition(".")
    setattr(other.gm.get_submodule(owner), leaf, module)
    other.recompile()
    return target(runtime).build(other, threads=1)


@pytest.mark.parametrize("runtime", ENGINES)
def test_flipped_steps_are_no_failure_and_errors_are(runtime: str) -> None:
    """A scale that is off by a millionth flips a tie here and there; half of it cuts the range."""
    nearly = check_parity(shifted(runtime, 1e-6), quantized(runtime), [X], reference=plain())
    assert nearly.error <= nearly.tolerance
    with pytest.raises(ParityError):
        check_parity(shifted(runtime, -0.5), quantized(runtime), [X], reference=plain())


class Off(_Recorder):
    """The simulation with one value moved."""

    def __init__(self, program: Program, point: str, amount: float) -> None:
        super().__init__(program)
        self.point, self.amount = point, amount

    def seen(self, node: Node, value: Tensor) -> Tensor:
        return super().seen(node, value + self.amount if self.names[node] == self.point else value)


class OneStepOff:
    """An engine that computes what the simulation does, but for a step behind one layer."""

    def __init__(self, program: Program, point: str, step: float) -> None:
        self.program, self.point, self.step = program, point, step

    def tap_names(self) -> list[str]:
        return [name for name in self.taps(None, X) if name.startswith("fake_quantize")]

    def taps(self, names: list[str] | None, *args: Tensor) -> dict[str, Tensor]:
        recorder = Off(self.program, self.point, self.step)
        recorder.run_program(args, {})
        return recorder.found if names is None else {n: recorder.found[n] for n in names}

    def release(self, taps_only: bool = False) -> None:
        """Nothing is held."""


@pytest.mark.parametrize(("steps", "is_tie"), [(8.5, True), (8.5 - 1e-4, True), (8.4, False), (8.6, False)])
def test_an_image_on_a_rounding_tie_may_fall_on_either_side(steps: float, is_tie: bool) -> None:
    """A constant part of an image makes every value of a channel the same: thousands of ties fall the same way."""
    program = quantized("onnxruntime").clone()
    point, step = "fake_quantize.stem", float(cast(Any, program.gm.get_submodule("fake_quantize.stem")).scale)
    layer = cast(Any, copy.deepcopy(program.gm.get_submodule("stem")))
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.fill_(steps * step)
    program.gm.set_submodule("stem", layer)
    program.recompile()
    rounded = OneStepOff(program, point, 0.0).taps(None, X)[point].flatten()[0]
    away = step if rounded < steps * step else -step
    found = first_difference(cast(Engine, OneStepOff(program, point, away)), program, X)
    assert found is None if is_tie else found is not None and found.layers == ("stem",) and found.error > 0.01
    assert first_difference(cast(Engine, OneStepOff(program, point, -away)), program, X) is not None  # never right


@pytest.mark.parametrize("far", [1e4, math.inf, math.nan])
def test_one_input_far_beyond_the_grid_excuses_nothing(far: float) -> None:
    """Ties are near by the grid's own range; an engine that is steps off is named whatever else the layer reads."""
    program, x = quantized("onnxruntime"), X.clone()
    x[0, 0, 0, 0] = far
    point, step = "fake_quantize.x", float(cast(Any, program.gm.get_submodule("fake_quantize.x")).scale)
    found = first_difference(cast(Engine, OneStepOff(program, point, 8 * step)), program, x)
    assert found is not None and found.name == point


@pytest.mark.onnxruntime
def test_a_half_program_with_another_weight() -> None:
    """Engines give float32 where the simulation computes in 16 bits."""
    program = Cast("fp16")(quantized("onnxruntime"), Context(calibration=[X])).program
    engine = target("onnxruntime").build(changed(program, "blocks.1.conv", -1.0), threads=1)
    with pytest.raises(ParityError, match="first difference at blocks"):
        check_parity(engine, program, [X], reference=plain())


# ------------------------------------------------------------------------------------------------ numbers that are none
class Root(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sqrt(x)


@pytest.mark.parametrize("runtime", ENGINES)
def test_nan_in_the_same_places_is_agreement(runtime: str) -> None:
    program = capture(Root(), (torch.rand(2, 4),))
    engine = target(runtime).build(program, threads=1)
    x = torch.tensor([[1.0, -1.0, 4.0, 9.0]])
    assert engine(x).isnan().tolist() == [[False, True, False, False]]
    assert check_parity(engine, program, [x]).error < 1e-6
    other = capture(nn.ReLU(), (torch.rand(2, 4),))
    with pytest.raises(ParityError, match="relative error inf"):
        check_parity(engine, other, [x])


def test_rows() -> None:
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0])
    row = Row.of("y", "output", a, b)
    assert row.max_abs == 4 and row.rel_l2 == pytest.approx(4 / 3) and row.cosine == pytest.approx(9 / 15)
    assert row.sqnr_db == pytest.approx(-20 * math.log10(4 / 3))
    same = Row.of("y", "output", a, a)
    assert (same.max_abs, same.rel_l2, same.sqnr_db, same.cosine) == (0, 0, math.inf, 1)
    nan = torch.tensor([math.nan, math.inf])
    assert Row.of("y", "output", nan, nan).rel_l2 == 0
    for x, y in ((nan, a), (a, nan), (a, a[:1]), (a, torch.zeros(2)), (-nan, nan)):
        assert Row.of("y", "output", x, y).rel_l2 == math.inf
    assert Row.of("y", "output", torch.zeros(2), torch.zeros(2)).rel_l2 == 0
    assert Row.of("y", "output", torch.zeros(0), torch.zeros(0)).max_abs == 0


# ------------------------------------------------------------------------------------------------ any two
def sides(runtime: str, folder: Path) -> dict[str, Any]:
    engine = built(runtime, "float32")
    return {"engine": engine, "loaded": load(engine.save(folder), threads=1), "program": plain(), "model": cnn()}


@pytest.mark.parametrize("runtime", ENGINES)
def test_compare_any_two(runtime: str, tmp_path: Path) -> None:
    made = sides(runtime, tmp_path / "out")
    for first, a in made.items():
        for second, b in made.items():
            found = compare(a, b, X)
            (output,) = found.outputs()
            assert output.name == "output" and output.rel_l2 < 1e-5, (first, second)
            inner = [r.name for r in found.rows if r.kind == "inner"]
            if "model" in (first, second):
                assert not inner
            else:
                assert [n for n in inner if n in ("stem", "blocks.0.conv", "blocks.1.conv", "head")] == [
                    "stem", "blocks.0.conv", "blocks.1.conv", "head",
                ]  # fmt: skip


def test_compare_shows_where_two_part() -> None:
    found = compare(changed(plain(), "blocks.1.conv", 1.5), plain(), X)
    rows = {r.name: r for r in found.rows}
    assert rows["stem"].rel_l2 == rows["blocks.0.conv"].rel_l2 == 0 < rows["blocks.1.conv"].rel_l2
    assert found.worst().rel_l2 == max(r.rel_l2 for r in found.rows)
    lines = str(found).splitlines()
    assert (
        len(lines) == len(found.rows) + 1 and "SQNR dB" in lines[0] and any("blocks.1.conv" in line for line in lines)
    )
    assert len(found.to_dict()["rows"]) == len(found.rows)


def test_compare_needs_equal_numbers_of_outputs() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    with pytest.raises(UsageError, match="different numbers of outputs"):
        compare(cnn(), Two(), X)
