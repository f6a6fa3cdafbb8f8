"""QuantizeStatic: the simulation against quantization written out in NumPy, bias correction, calibrators, data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fxcompress.capture import capture
from fxcompress.ir import Program
from fxcompress.layers import Fused, TransposedLinear
from fxcompress.passbase import Context
from fxcompress.passes import FuseActivations, QuantizeStatic
from fxcompress.pipeline import Pipeline
from fxcompress.quant.bias import InputMeans, correct_bias
from fxcompress.quant.fake_quantize import FakeQuantize
from fxcompress.quant.scheme import QuantScheme
from fxcompress.quant.spec import QuantSpec
from fxcompress.testing import check_pass
from tests.helpers.small_net import Net, fused, images, net, quantize

Array = NDArray[np.float64]


# ------------------------------------------------------------------------------------------------ the naive network
def fake_quantize(x: Array, low: Any, high: Any, qmin: int, qmax: int, symmetric: bool) -> Array:
    """The affine grid, written down from its definition, in float64."""
    if symmetric:
        scale, zero = np.maximum(np.abs(low), np.abs(high)) / qmax, 0.0
    else:
        low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
        scale = (high - low) / (qmax - qmin)
        zero = np.round(qmin - low / scale)
    return (np.clip(np.round(x / scale) + zero, qmin, qmax) - zero) * scale


def conv2d(x: Array, weight: Array, bias: Array, padding: int, groups: int = 1) -> Array:
    """Convolution with stride 1, by its definition."""
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    size = weight.shape[-1]
    height, width = x.shape[2] - size + 1, x.shape[3] - size + 1
    out = np.zeros((len(x), len(weight), height, width))
    inner, outer = weight.shape[1], len(weight) // groups
    for o in range(len(weight)):
        channels = x[:, o // outer * inner : (o // outer + 1) * inner]
        for i, j in np.ndindex(size, size):
            out[:, o] += np.einsum("nchw,c->nhw", channels[:, :, i : i + height, j : j + width], weight[o, :, i, j])
    return out + bias[:, None, None]


class Naive:
    """`Net` in NumPy: ``ranges`` None observes the extremes of the five activations, else quantizes with them."""

    def __init__(self, model: Net) -> None:
        self.state = {k: v.detach().numpy().astype(np.float64) for k, v in model.state_dict().items()}
        self.ranges: list[tuple[float, float]] = []
        self.observing = True

    def weight(self, name: str) -> Array:
        w = self.state[f"{name}.weight"]
        if self.observing:
            return w
        axes = tuple(range(1, w.ndim))
        return fake_quantize(w, w.min(axes, keepdims=True), w.max(axes, keepdims=True), -127, 127, True)

    def activation(self, x: Array, index: int) -> Array:
        if self.observing:
            self.ranges.append((x.min(), x.max()))
            return x
        return fake_quantize(x, *self.ranges[index], 0, 255, False)

    def conv(self, x: Array, name: str, padding: int, groups: int = 1) -> Array:
        return conv2d(x, self.weight(name), self.state[f"{name}.bias"], padding, groups)

    def __call__(self, x: Array) -> Array:
        x = self.activation(x, 0)
        x = self.activation(np.maximum(self.conv(x, "stem", 1), 0), 1)
        y = self.activation(np.clip(self.conv(x, "depthwise", 1, 4), 0, 6), 2)
        x = self.activation(np.maximum(self.conv(y, "point", 0) + x, 0), 3)
        x = x.reshape(len(x), 4, 2, 4, 2, 4).max((3, 5)).reshape(len(x), -1)
        return x @ self.weight("head").T + self.state["head.bias"]


def test_simulation_equals_naive_quantization() -> None:
    """Weights per channel, activations per tensor, ranges over all batches: the same numbers as the naive network."""
    model, data, test = net(), images(12), images(4, seed=7)
    naive = Naive(model)
    naive(data.numpy().astype(np.float64))
    naive.observing = False
    options = {"calibrator": "minmax", "weight_calibrator": "minmax", "bias_correction": False}
    result = quantize(model, data.split(4), **options)
    with torch.no_grad():
        got = result.program(test).numpy().astype(np.float64)
        plain = model(test).numpy().astype(np.float64)
    expected = naive(test.numpy().astype(np.float64))
    difference = np.abs(got - expected)
    # float32 may round a value the other way where it lies on the border between two integers: rare, one step
    assert np.median(difference) < 1e-5 and difference.max() < 0.05 * np.abs(expected - plain).max() + 1e-3
    assert np.abs(expected - plain).max() > 0.02, "quantization changed nothing: the test would prove nothing"


def test_grids() -> None:
    """The scale of each activation follows from the extremes, that of each weight from its channel."""
    model, data = net(), images(12)
    naive = Naive(model)
    naive(data.numpy().astype(np.float64))
    program = quantize(model, data.split(4), calibrator="minmax", weight_calibrator="minmax").program
    activations = [m for _, m in program.layers() if isinstance(m, FakeQuantize)]
    for quantizer, (low, high) in zip(activations, naive.ranges, strict=True):
        scale = (max(high, 0) - min(low, 0)) / 255
        assert quantizer.scale.item() == pytest.approx(scale, rel=1e-5)
        assert quantizer.zero_point.item() == round(-min(low, 0) / scale)
        assert quantizer.spec == QuantScheme().activation
    for name in ("stem", "depthwise", "point", "head"):
        layer = program.gm.get_submodule(name)
        assert isinstance(layer, Fused) and isinstance(layer.weight_fake_quantize, FakeQuantize)
        largest = np.abs(naive.state[f"{name}.weight"]).reshape(len(naive.state[f"{name}.weight"]), -1).max(1)
        np.testing.assert_allclose(layer.weight_fake_quantize.scale.numpy(), largest / 127, rtol=1e-6)


@pytest.mark.parametrize(("qmin", "qmax", "axis"), [(-64, 63, 0), (-127, 127, None), (-128, 127, 0)])
def test_weight_grids_of_a_scheme(qmin: int, qmax: int, axis: int | None) -> None:
    """7-bit weights for engines that saturate, and one scale per tensor."""
    spec = QuantSpec(8, signed=True, symmetric=True, axis=axis, qmin=qmin, qmax=qmax)
    program = quantize(fused(), [images(4)], scheme=QuantScheme(weight=spec)).program
    for name in ("stem", "head"):
        layer: Any = program.gm.get_submodule(name)
        quantizer = layer.weight_fake_quantize
        assert quantizer.scale.shape == (() if axis is None else (len(layer.weight),))
        shape = (-1, *[1] * (layer.weight.dim() - 1)) if axis == 0 else ()
        integers = quantizer(layer.weight) / quantizer.scale.reshape(shape)
        assert integers.min() >= qmin - 1e-3 and integers.max() <= qmax + 1e-3
        torch.testing.assert_close(integers, integers.round(), atol=1e-3, rtol=0)


def test_transposed_convolution_is_quantized_per_output_channel() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 5, 2), nn.ReLU())
    program = quantize(model, [images(4)]).program
    layer: Any = program.gm.get_submodule("0")
    assert layer.weight_fake_quantize.spec.axis == 1 and layer.weight_fake_quantize.scale.shape == (5,)


def test_contract() -> None:
    program = Pipeline(passes=(FuseActivations(),))(capture(net(), (images(2),))).program
    result = check_pass(QuantizeStatic(), program, context=Context(calibration=[images(4)]))
    assert result.changes == [f"quantized {n}" for n in ("stem", "depthwise", "point", "head")]
    assert result.metrics == {"layers": 4, "values": 4, "grids": 4, "samples": 4}
    assert result.error is not None and 1e-4 < result.error < 0.1


def test_quantized_program_is_trainable() -> None:
    """Gradients pass the rounding straight through, so a quantized program can be fine-tuned."""
    program = quantize(fused(), [images(8)]).program
    program.gm.train()
    optimizer = torch.optim.SGD(program.gm.parameters(), lr=1e-3)
    target = torch.randn(8, 5, generator=torch.Generator().manual_seed(3))
    losses = []
    for _ in range(8):
        loss = F.mse_loss(program(images(8)), target)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]


# ------------------------------------------------------------------------------------------------ bias correction
def mean_error(model: nn.Module, program: Program, x: Tensor) -> float:
    """Largest mean output error of a channel, relative to the spread of the outputs."""
    with torch.no_grad():
        expected, got = model(x).double(), program(x).double()
    channels = (got - expected).transpose(0, 1).flatten(1).mean(1)
    return (channels.abs().max() / expected.std()).item()


def coarse(layer: nn.Module) -> nn.Module:
    """Weights and data that make rounding biased: all positive."""
    torch.manual_seed(0)
    nn.init.uniform_(layer.weight, 0.0, 1.0)
    return layer.eval()


COARSE = QuantScheme(weight=QuantSpec(4, signed=True, symmetric=True, axis=0))
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (256, 6)),
    "linear_no_bias": (lambda: nn.Linear(6, 4, bias=False), (256, 6)),
    "linear_3d": (lambda: nn.Linear(6, 4), (64, 5, 6)),
    "conv1x1": (lambda: nn.Conv2d(6, 4, 1), (64, 6, 4, 4)),
    "conv_unpadded": (lambda: nn.Conv2d(6, 4, 3, groups=2), (64, 6, 8, 8)),
    "depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6), (64, 6, 8, 8)),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, dilation=2), (64, 6, 16)),
    "conv_transpose": (lambda: nn.ConvTranspose2d(6, 4, 2, 2), (64, 6, 4, 4)),
    "conv_transpose_groups": (lambda: nn.ConvTranspose2d(6, 4, 1, groups=2), (64, 6, 4, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_bias_correction_removes_the_mean_error(name: str) -> None:
    make, shape = LAYERS[name]
    x = torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.5
    model = nn.Sequential(coarse(make()))
    errors = {}
    for corrected in (False, True):
        result = quantize(model, [x], x[:2], scheme=COARSE, bias_correction=corrected, calibrator="minmax")
        errors[corrected] = mean_error(model, result.program, x)
    # what is left is the rounding of the input; a kernel that is not 1 x 1 also sees the border less often
    limit = 0.25 if name in ("conv_unpadded", "conv1d", "depthwise") else 0.05
    assert errors[True] < limit * errors[False]
    assert errors[False] > 0.01


def test_bias_correction_is_the_exact_formula() -> None:
    """``b + (W - W_q) E[x]``, with the mean over all batches, even ones of different size."""
    model = nn.Sequential(coarse(nn.Linear(6, 4)))
    x = torch.rand(30, 6, dtype=torch.float32, generator=torch.Generator().manual_seed(1))
    program = quantize(model, x.split([4, 16, 10]), x[:2], scheme=COARSE).program
    layer: Any = program.gm.get_submodule("0")
    weight = layer.weight.detach()
    error = weight.double() - layer.weight_fake_quantize(weight).double()
    expected = model[0].bias.detach().double() + error @ x.double().mean(0)
    torch.testing.assert_close(layer.bias.detach().double(), expected, rtol=1e-6, atol=1e-7)


def test_bias_correction_of_a_transposed_linear_layer() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.rand(6, 4)), nn.Parameter(torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x, self.weight)

    x = torch.rand(256, 6) + 0.5
    program = capture(Model(), (x[:2],))
    assert any(isinstance(m, TransposedLinear) for m in program.gm.modules())
    context = Context(calibration=[x], scheme=COARSE)
    errors = [
        mean_error(program.gm, QuantizeStatic(bias_correction=c)(program, context).program, x) for c in (False, True)
    ]
    assert errors[1] < 0.1 * errors[0]


def test_sides_of_an_add_have_one_scale_and_their_own_zero_points() -> None:
    """ReLU on one side, signed values on the other: the ReLU's zero stays the smallest integer."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.branch, self.last = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.stem(x))
            return self.last(torch.relu(x + self.branch(x)))

    scheme = QuantScheme(fused_residual=False)
    data = [torch.randn(4, 4, 8, 8) * 3]
    program = capture(Residual().eval(), (data[0],))
    program = FuseActivations()(program, Context(scheme=scheme)).program
    program = QuantizeStatic()(program, Context(calibration=data, scheme=scheme)).program
    stem, branch = (program.gm.get_submodule(f"fake_quantize.{name}") for name in ("stem", "branch"))
    assert torch.equal(stem.scale, branch.scale) and stem.zero_point == 0 < branch.zero_point
    low, high = (branch.spec.qmin - branch.zero_point) * branch.scale, (branch.spec.qmax - stem.zero_point) * stem.scale
    assert -low > 0 and high > 0 and min(-low, high) > 0.01 * max(-low, high)


@pytest.mark.parametrize(("fused", "noted"), [(None, False), (QuantScheme(), True)])
def test_layers_fused_further_than_the_engine_goes_are_noted(fused: QuantScheme | None, noted: bool) -> None:
    narrow = QuantScheme(fused_residual=False, fused_activations=("relu",))
    program = capture(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 4, 3), nn.ReLU()), (torch.randn(2, 3, 8, 8),)
    )
    program = FuseActivations()(program, Context(scheme=fused or narrow)).program
    notes = QuantizeStatic()(program, Context(calibration=[torch.randn(8, 3, 8, 8)], scheme=narrow)).notes
    assert any(n.startswith("0: fused with more") for n in notes) == noted


@pytest.mark.parametrize("low", [-1.0, 0.0, -0.2])
def test_a_wider_scale_keeps_what_the_grid_covered(low: float) -> None:
    quantizer = FakeQuantize(QuantSpec(8, signed=False, symmetric=False))
    quantizer.set_range(torch.tensor(low), torch.tensor(2.0))
    values = torch.linspace(low, 2.0, 1001)
    quantizer.widen(quantizer.scale * 1.7)
    error = (quantizer(values) - values).abs().max()
    assert error <= quantizer.scale and quantizer(torch.zeros(1)) == 0


def test_input_means_leave_no_hook_and_skip_what_is_not_finite() -> None:
    program = capture(nn.Sequential(nn.Linear(3, 2)), (torch.zeros(2, 3),))
    node = next(n for n in program.graph.nodes if n.op == "call_module")
    with InputMeans(program, [node]) as means:
        program(torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]))
        program(torch.tensor([[float("inf"), 0.0, 0.0], [0.0, 0.0, 0.0]]))
        program(torch.tensor([[5.0, 2.0, 2.0]]))
    program(torch.full((9, 3), 100.0))
    mean = means.mean("0")
    assert mean is not None and mean.tolist() == [3.0, 2.0, 2.0] and mean.dtype == torch.float64
    assert means.mean("nowhere") is None
    correct_bias(program, [node], means)  # a layer without a weight quantizer is left alone
    assert not isinstance(program.gm.get_submodule("0"), Fused)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_input_means_of_large_inputs(layout: torch.memory_format) -> None:
    """Rows are left out, other ones each batch, and all samples count."""
    program = capture(nn.Sequential(nn.Conv2d(3, 2, 1)), (torch.zeros(2, 3, 256, 256),))
    node = next(n for n in program.graph.nodes if n.op == "call_module")
    random = torch.Generator().manual_seed(1)
    rows, columns = torch.linspace(-1, 1, 256)[:, None], torch.linspace(0, 3, 256)
    batches = [torch.randn(2, 3, 256, 256, generator=random) + rows + columns for _ in range(6)]
    with InputMeans(program, [node]) as means, torch.no_grad():
        for batch in batches:
            program(batch.contiguous(memory_format=layout))
    exact = torch.cat(batches).double().mean((0, 2, 3))
    assert means.counts["0"] < 12 * 256 * 256
    torch.testing.assert_close(means.mean("0"), exact, atol=0.02, rtol=0)


# ------------------------------------------------------------------------------------------------ calibrators
@pytest.mark.parametrize("weight_calibrator", ["minmax", "mse"])
@pytest.mark.parametrize("calibrator", ["minmax", "moving_average", "histogram", "percentile", "entropy", "mse"])
def test_every_calibrator(calibrator: str, weight_calibrator: str) -> None:
    """Each gives a close network; one that clips is not the extremes."""
    model, data = net(), images(48)
    result = quantize(model, data.split(8), calibrator=calibrator, weight_calibrator=weight_calibrator)
    with torch.no_grad():
        expected, got = model(images(16, 5)), result.program(images(16, 5))
    error = ((expected - got).square().mean() / expected.var()).item()
    assert error < 0.02
    widest = quantize(model, data.split(8), calibrator="minmax").program
    scales = [m.scale.item() for _, m in result.program.layers() if isinstance(m, FakeQuantize)]
    extremes = [m.scale.item() for _, m in widest.layers() if isinstance(m, FakeQuantize)]
    assert all(a <= b * (1 + 1e-6) for a, b in zip(scales, extremes, strict=True))
    assert (scales == extremes) == (calibrator == "minmax")
