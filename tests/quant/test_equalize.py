"""Cross-layer equalization: the published scales, exactness, what it refuses, what it does to 8-bit weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import PassError
from fxcompress.quant.equalize import Equalizer, canonical, find_boundary, restored
from fxcompress.quant.scheme import QuantScheme
from fxcompress.quant.spec import QuantSpec
from fxcompress.rewrite import Analysis
from fxcompress.testing import check_pass


class Chain(nn.Module):
    """Every kind of layer that is equalized: depthwise, grouped and transposed convolutions, flatten, linear."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 12, 1, groups=4, bias=False)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2, groups=2)
        self.last = nn.Conv2d(6, 4, 3)
        self.head, self.out = nn.Linear(4 * 9, 10), nn.Linear(10, 3)
        with torch.no_grad():
            for p in self.parameters():
                p.mul_(torch.exp(torch.randn(p.shape[0]) * 1.5).reshape(-1, *[1] * (p.dim() - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.depthwise(F.relu(self.first(x))))
        x = self.last(F.leaky_relu(self.up(self.grouped(x))))
        x = F.max_pool2d(F.relu(x), 2)
        return self.out(F.relu(self.head(x.flatten(1))))  # type: ignore[no-any-return]


def image(count: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=dtype)


def test_outputs_stay_to_the_last_digits() -> None:
    model = Chain().double().eval()
    x = image(5)
    result = check_pass(fxc.EqualizeLayers(), model, (image(),))
    assert result.metrics == {"boundaries": 6, "equalized": 6}
    with torch.no_grad():
        before, after = model(x), result.program(x)
    assert float((before - after).abs().max() / before.abs().max()) < 1e-12
    fused = fxc.FuseActivations()(fxc.capture(model, (image(),))).program
    again = check_pass(fxc.EqualizeLayers(), fused)
    assert again.metrics["equalized"] == 6, "behind fusion it finds the same"
    with torch.no_grad():
        assert float((again.program(x) - before).abs().max() / before.abs().max()) < 1e-12


def test_one_step_is_equation_11() -> None:
    """s_i = sqrt(r1_i r2_i) / r2_i with ranges written down naively; both ranges become sqrt(r1_i r2_i)."""
    torch.manual_seed(3)
    model: Any = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3)).double().eval()
    program = fxc.capture(model, (torch.randn(2, 3, 8, 8, dtype=torch.float64),))
    result = check_pass(fxc.EqualizeLayers(), program)
    first, second = (m.weight.detach() for m in (model[0], model[2]))
    got: Any = [result.program.gm.get_submodule(p) for p in ("0", "2")]
    for i in range(5):
        r1 = 2 * max(abs(float(v)) for v in first[i].flatten())
        r2 = 2 * max(abs(float(v)) for v in second[:, i].flatten())
        s = (r1 * r2) ** 0.5 / r2
        torch.testing.assert_close(got[0].weight[i], first[i] / s, rtol=1e-12, atol=0)
        torch.testing.assert_close(got[0].bias[i], model[0].bias[i] / s, rtol=1e-12, atol=0)
        torch.testing.assert_close(got[1].weight[:, i], second[:, i] * s, rtol=1e-12, atol=0)
        ranges = [2 * float(w.detach().abs().max()) for w in (got[0].weight[i], got[1].weight[:, i])]
        assert ranges == pytest.approx([(r1 * r2) ** 0.5] * 2, rel=1e-12)


def test_all_boundaries_are_equal_at_the_end() -> None:
    """Neighbouring boundaries share a layer; they are repeated until none changes."""
    program = fxc.EqualizeLayers()(fxc.capture(Chain().double().eval(), (image(),))).program
    analysis = Analysis(program)
    found = [find_boundary(analysis, n) for n, m in program.layers() if n.name != "out"]
    boundaries = [b for b in found if not isinstance(b, str)]
    assert len(boundaries) == 6
    state = Equalizer(program, boundaries)
    for index in range(6):
        r1, r2 = state.ranges(index)
        torch.testing.assert_close(r1, r2, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 8, 3, groups=2),
        nn.ConvTranspose2d(6, 8, 3, groups=2),
        nn.Linear(6, 8),
        nn.Conv1d(6, 6, 3, groups=6),
    ],
    ids=lambda m: type(m).__name__,
)
def test_canonical_weights(layer: Any) -> None:
    """Scaling the canonical weight per output channel scales the output channels, whatever the layer's layout."""
    layer = layer.double()
    layer._parameters["bias"] = None
    x = torch.randn(2, 6, *[5] * (layer.weight.dim() - 2), dtype=torch.float64)
    factors = torch.rand(len(layer(x)[0]), dtype=torch.float64) + 0.5
    weight = canonical(layer)
    torch.testing.assert_close(restored(layer, weight), layer.weight.detach())
    want = layer(x) * factors.reshape(1, -1, *[1] * (x.dim() - 2))
    scaled = weight * factors.reshape(weight.shape[:2])[:, :, None, None]
    layer._parameters["weight"] = nn.Parameter(restored(layer, scaled))
    torch.testing.assert_close(layer(x), want)


def test_channels_without_weights_and_several_readers() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.left, self.right = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 3)
            with torch.no_grad():
                self.first.weight[2] = 0
                self.left.weight[:, 4] = self.right.weight[:, 4] = 0
                self.right.weight *= 100

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.first(x).relu()
            return self.left(y), self.right(y)

    torch.manual_seed(0)
    result = check_pass(fxc.EqualizeLayers(), Fork().double(), (torch.randn(3, 4, dtype=torch.float64),))
    assert result.metrics["equalized"] == 1 and "first -> left, right" in result.changes[0]
    assert result.error is not None and result.error < 1e-12


class Refused(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b, self.norm = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        if self.kind == "relu6":
            return self.b(F.relu6(y)).sum(1)
        if self.kind == "norm":
            return self.b(self.norm(y)).sum(1)
        if self.kind == "residual":
            return self.b(y + x).sum(1)
        if self.kind == "output":
            return self.b(y).sum(1), y
        return self.b(self.a(F.relu(y))).sum(1)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("relu6", "relu6 does not scale"),
        ("norm", "run FoldBatchNorm before"),
        ("residual", "reads them together with something else"),
        ("output", "they are an output of the model"),
        ("twice", "a is called more than once"),
    ],
)
def test_refusals_have_reasons(kind: str, reason: str) -> None:
    result = check_pass(fxc.EqualizeLayers(), Refused(kind), (torch.randn(2, 3, 4, 4),))
    assert not result.modified and any(reason in str(r) for r in result.refusals)


def test_needs_a_float_program() -> None:
    program = fxc.capture(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), (torch.randn(2, 32),))
    quantized = fxc.QuantizeWeights(bits=8)(program).program
    with pytest.raises(PassError, match="comes before quantization"):
        fxc.EqualizeLayers()(quantized)


def test_weights_with_one_scale_per_tensor_err_less() -> None:
    """The paper's setting: channels of very different size and one scale for the whole weight."""
    model = Chain().eval()
    x = image(32, torch.float32)
    scheme = QuantScheme(weight=QuantSpec(8, signed=True, symmetric=True))
    program, context = fxc.capture(model, (x[:2],)), fxc.Context(calibration=[x], scheme=scheme)
    errors = []
    for passes in ((), (fxc.EqualizeLayers(),)):
        quantized = fxc.Pipeline((*passes, fxc.FuseActivations(), fxc.QuantizeStatic()))(program, context).program
        with torch.no_grad():
            errors.append(float((quantized(x) - model(x)).norm() / model(x).norm()))
    assert errors[1] < 0.5 * errors[0], errors
