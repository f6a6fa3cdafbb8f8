"""Bad input gets a clear error, names what is wrong, and loses nothing."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.capture import capture
from fxcompress.errors import CalibrationError, PassError, UsageError
from fxcompress.ir import Program
from fxcompress.layers import Fused
from fxcompress.passbase import Context, Pass, Result, fingerprint
from fxcompress.passes import FoldBatchNorm, FuseActivations, QuantizeStatic
from fxcompress.pipeline import Pipeline
from fxcompress.quant.fake_quantize import FakeQuantize


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(x)).mean((2, 3)))  # type: ignore[no-any-return]


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@cache
def program() -> Program:
    return FuseActivations()(capture(net(), (images(2),))).program


def quantize(data: Any, p: Program | None = None, **options: Any) -> Result:
    """Quantize, and see that the input program is as it was, whatever happens."""
    p = p or program()
    before = fingerprint(p), [t.clone() for t in p.gm.state_dict().values()], [m.training for m in p.gm.modules()]
    hooks = [len(m._forward_pre_hooks) for m in p.gm.modules()]
    try:
        return QuantizeStatic(**options)(p, Context(calibration=data))
    finally:
        assert fingerprint(p) == before[0] and [m.training for m in p.gm.modules()] == before[2]
        assert [len(m._forward_pre_hooks) for m in p.gm.modules()] == hooks
        now = list(p.gm.state_dict().values())
        assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(before[1], now, strict=True))


# ------------------------------------------------------------------------------------------------ loaders
def test_no_data() -> None:
    with pytest.raises(PassError, match="needs calibration data") as caught:
        quantize(None)
    assert "calibration=" in caught.value.fix


@pytest.mark.parametrize("data", [[], iter([]), torch.utils.data.DataLoader([])], ids=["list", "iterator", "loader"])
def test_empty_loader(data: Any) -> None:
    with pytest.raises(CalibrationError, match="loader is empty"):
        quantize(data)


class Failing:
    """A loader that raises at one batch, or on being started."""

    def __init__(self, at: int) -> None:
        self.at = at

    def __iter__(self) -> Iterator[Tensor]:
        if self.at < 0:
            raise OSError("no such file: images.zip")
        return self._batches()

    def _batches(self) -> Iterator[Tensor]:
        for index in range(10):
            if index == self.at:
                raise OSError("cannot read image 17.png")
            yield images(2)


@pytest.mark.parametrize("one_shot", [False, True])
def test_loader_that_raises(one_shot: bool) -> None:
    loader = Failing(3)
    with pytest.raises(CalibrationError, match=r"failed at batch 3(.|\n)*OSError: cannot read image 17.png") as caught:
        quantize(iter(loader) if one_shot else loader)
    assert isinstance(caught.value.__cause__, OSError)


def test_loader_that_cannot_be_started() -> None:
    with pytest.raises(CalibrationError, match=r"failed at batch 0(.|\n)*no such file"):
        quantize(Failing(-1))


def test_loader_that_raises_behind_the_last_needed_batch() -> None:
    assert quantize(Failing(3), samples=6).metrics["samples"] == 6


@pytest.mark.parametrize(
    ("batch", "why"),
    [
        (torch.zeros(2, 3, 6, 7), r"shape \[2, 3, 6, 7\], expected \['any', 3, 6, 6\]"),
        (torch.zeros(3, 6, 6), "shape"),
        (torch.zeros(2, 3, 6, 6, dtype=torch.float64), "dtype torch.float64, expected torch.float32"),
        (torch.zeros(2, 3, 6, 6, dtype=torch.uint8), "dtype torch.uint8"),
        ("image.png", "str instead of a tensor"),
        ((), "missing x"),
        ({"image": torch.zeros(2, 3, 6, 6)}, "missing x"),
        ([[torch.zeros(2, 3, 6, 6)]], "structure|instead of a tensor"),
    ],
)
def test_batch_that_does_not_fit(batch: Any, why: str) -> None:
    with pytest.raises(CalibrationError, match=rf"batch 1 does not fit the model(.|\n)*({why})"):
        quantize([images(2), batch])


def test_loader_that_is_a_batch() -> None:
    with pytest.raises(UsageError, match="must be an iterable of batches, not Tensor"):
        quantize(images(2))


# ------------------------------------------------------------------------------------------------ NaN
def with_nan(value: float = float("nan")) -> Tensor:
    x = images(2)
    x[0, 0, 0, 0] = value
    return x


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rare_nan_batches_are_skipped_and_counted(value: float) -> None:
    data = [images(2)] * 120
    clean = quantize(data, samples=1000)
    dirty = quantize([*data[:60], with_nan(value), *data[60:]], samples=1000)
    assert "1 calibration batches held NaN or infinity and were skipped" in dirty.notes
    assert dirty.metrics["samples"] == clean.metrics["samples"] == 240
    for a, b in zip(clean.program.run_example(), dirty.program.run_example(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("samples", [300, 10_000])
def test_many_nan_batches_are_an_error(samples: int) -> None:
    with pytest.raises(CalibrationError, match="calibration batches hold NaN or infinity") as caught:
        quantize([images(2)] * 50 + [with_nan()] * 2, samples=samples)
    assert "2 of 52" in str(caught.value)


def test_endless_nan_does_not_hang() -> None:
    def endless() -> Iterator[Tensor]:
        while True:
            yield with_nan()

    with pytest.raises(CalibrationError, match="hold NaN"):
        quantize(endless(), samples=300)


def test_nan_made_inside_the_model() -> None:
    """The inputs are fine, the square root of a negative number is not: the value is named."""

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.sqrt(x))  # type: ignore[no-any-return]

    p = capture(Root(), (torch.rand(4, 3),))
    partly = quantize([torch.tensor([[-1.0, 1.0, 4.0]] * 2)], p)
    assert any("values were NaN or infinity and were ignored" in n and "sqrt" in n for n in partly.notes)
    with pytest.raises(CalibrationError, match=r"no finite value(.|\n)*sqrt"):
        quantize([torch.full((2, 3), -1.0)], p)


@pytest.mark.parametrize("layer", ["conv", "head"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(layer: str, value: float) -> None:
    model = net()
    with torch.no_grad():
        model.get_submodule(layer).weight.flatten()[5] = value
    p = capture(model, (images(2),), verify=False)
    with pytest.raises(PassError, match=rf"weight holds NaN or infinity(.|\n)*{layer}"):
        quantize([images(2)], p)


# ------------------------------------------------------------------------------------------------ degenerate weights
def quantizer_of(result: Result, name: str) -> FakeQuantize:
    layer = result.program.gm.get_submodule(name)
    assert isinstance(layer, Fused) and isinstance(layer.weight_fake_quantize, FakeQuantize)
    return layer.weight_fake_quantize


def quantized_with(**weights: Any) -> tuple[Net, Result]:
    model = net()
    for name, change in weights.items():
        with torch.no_grad():
            change(model.get_submodule(name).weight)
    p = capture(model, (images(2),))
    return model, quantize([images()], p)


def finite(result: Result) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in (*result.program.gm.buffers(), *result.program.run_example()))


def test_zero_range_channel() -> None:
    """A pruned channel: its weights stay exactly zero, its scale is a valid number."""
    model, result = quantized_with(conv=lambda w: w[1].zero_())
    quantizer = quantizer_of(result, "conv")
    assert (quantizer.scale > 0).all() and finite(result)
    assert (quantizer(model.conv.weight)[1] == 0).all()


def test_constant_channel() -> None:
    _, result = quantized_with(conv=lambda w: w[2].fill_(0.37))
    layer: Any = result.program.gm.get_submodule("conv")
    torch.testing.assert_close(quantizer_of(result, "conv")(layer.weight)[2], layer.weight[2], rtol=1e-6, atol=0)


def test_all_zero_layer() -> None:
    """Nothing comes out of it, in the simulation neither; the user is told that a value was always zero."""
    model, result = quantized_with(conv=lambda w: w.zero_())
    with torch.no_grad():
        model.conv.bias.fill_(-1.0)  # ReLU(-1) = 0
    assert finite(result)
    dead = capture(model, (images(2),))
    dead_result = quantize([images()], FuseActivations()(dead).program)
    assert finite(dead_result)
    assert any("was always zero during calibration" in n for n in dead_result.notes)
    torch.testing.assert_close(dead_result.program(images()), model(images()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1e-38, 1e-45, 1e30])
def test_tiny_and_huge_weights(size: float) -> None:
    _, result = quantized_with(head=lambda w: w.mul_(size))
    quantizer = quantizer_of(result, "head")
    assert (quantizer.scale > 0).all() and torch.isfinite(quantizer.scale).all() and finite(result)


# ------------------------------------------------------------------------------------------------ models
def test_training_mode_is_restored() -> None:
    """Of the user's model by capture, of the program by every pass."""

    class Noisy(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.dropout(x, 0.9, self.training))

    model = Noisy().train()
    model.head.eval()
    modes = [m.training for m in model.modules()]
    p = capture(model, (images(2),))
    assert [m.training for m in model.modules()] == modes
    p.gm.train()
    result = quantize([images()] * 3, p)
    assert p.gm.training and result.program.gm.training
    quiet = capture(Noisy().eval(), (images(2),))
    quiet.gm.load_state_dict(p.gm.state_dict())
    expected = quantize([images()] * 3, quiet).program.run_example()
    for a, b in zip(expected, result.program.run_example(), strict=True):
        torch.testing.assert_close(a, b)  # calibrated without dropout


def test_model_without_layers_to_quantize() -> None:
    p = capture(nn.Sequential(nn.ReLU(), nn.LayerNorm(6)), (images(2),))
    with pytest.raises(PassError, match=r"no layer to quantize(.|\n)*no convolution"):
        quantize([images(2)], p)
    with pytest.raises(PassError, match=r"no layer to quantize(.|\n)*conv: asked to be ignored"):
        quantize([images(2)], ignore=("*",))


def test_model_that_is_quantized_already() -> None:
    done = quantize([images()]).program
    with pytest.raises(PassError, match="quantized already"):
        quantize([images()], done)


def test_ignore_that_matches_nothing_is_told() -> None:
    result = quantize([images()], ignore=("haed",))
    assert "ignore='haed' matches no layer" in result.notes
    assert "conv stays float: asked to be ignored" in quantize([images()], ignore="conv").notes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibrator": "mean"}, "unknown calibrator 'mean'"),
        ({"weight_calibrator": "entropy"}, "unknown weight calibrator"),
        ({"samples": 0}, "samples=0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        QuantizeStatic(**options)


def test_model_that_fails_on_a_batch() -> None:
    """Fits the signature, but the model cannot compute it: the batch is named."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.fc = nn.Parameter(torch.randn(5, 4)), nn.Linear(4, 2)

        def forward(self, ids: Tensor) -> Tensor:
            return self.fc(self.table[ids])  # type: ignore[no-any-return]

    p = capture(Table(), (torch.tensor([[1, 2]] * 2),))
    with pytest.raises(CalibrationError, match=r"fails on calibration batch 1(.|\n)*IndexError"):
        quantize([torch.tensor([[1, 2]]), torch.tensor([[1, 7]])], p)


class AfterCalibration(Pass):
    """Fails after all the work of the passes before it."""

    def run(self, program: Program, context: Context) -> Result:
        raise ValueError("late")


def test_nothing_is_lost_when_a_late_pass_raises() -> None:
    model = net().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    p = capture(model, (images(2),))
    state = fingerprint(p)
    pipeline = Pipeline(passes=(FoldBatchNorm(), FuseActivations(), QuantizeStatic(), AfterCalibration()))
    with pytest.raises(PassError, match="pass AfterCalibration failed"):
        pipeline(p, Context(calibration=[images()]))
    assert fingerprint(p) == state and model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert quantize([images()], p).modified, "the program is still good for another try"


class Clashing(nn.Module):
    """A functional convolution whose module also holds a PReLU called ``activation``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.activation = nn.Parameter(torch.randn(4, 3, 1, 1)), nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(F.conv2d(self.activation(x), self.weight))


def test_child_with_the_name_of_a_fused_layers_attribute() -> None:
    """Such a layer stays as it is, and the reason is told."""
    p = capture(nn.Sequential(Clashing(), nn.Conv2d(4, 2, 1)), (images(2),))
    fused = FuseActivations()(p)
    assert not fused.modified
    assert ["'activation' has the name of an attribute" in r.reason for r in fused.refusals] == [True]
    result = quantize([images()], p)
    assert result.changes == ["quantized 1"]
    assert any(n.startswith("0 stays float: its submodule 'activation'") for n in result.notes)
