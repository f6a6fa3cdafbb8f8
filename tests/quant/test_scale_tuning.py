"""Tuned scales: formulas in float64, integers that stay, better on new data or untouched, engines that agree."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.layers import Fused
from fxcompress.ops import fake_quantize
from fxcompress.quant.fake_quantize import DynamicFakeQuantize, FakeQuantize
from fxcompress.quant.layer_weights import make_quantizer
from fxcompress.quant.scale_tuning import (
    RoundedWeight,
    TuningOptions,
    _Dequantize,
    _Rescaled,
    _StraightThrough,
    divergence,
    rows_of,
)
from fxcompress.quant.spec import QuantSpec
from tests.helpers.digits import Attention, Convolutions, held_out, trained
from tests.helpers.tuning import WEIGHTS, batches, rounded

SPECS = [
    QuantSpec(4, True, True, 0, group_size=16),
    QuantSpec(2, False, False, 0, group_size=16),
    QuantSpec(4, True, True, 1, group_size=3),
    QuantSpec(8, False, False, 0),
    QuantSpec(3, True, True, 1),
    QuantSpec(8, True, True),
]


def weight_of(seed: int = 0) -> Tensor:
    return torch.randn(6, 32, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------ formulas
def test_divergence_is_the_published_formula() -> None:
    got, want = torch.randn(3, 4, 7), torch.randn(3, 4, 7)
    total = 0.0
    for a, b in zip(got.double().reshape(-1, 7).tolist(), want.double().reshape(-1, 7).tolist(), strict=True):
        q, p = ([math.exp(v) / sum(map(math.exp, row)) for v in row] for row in (a, b))
        total += sum(y * math.log(y / x) for x, y in zip(q, p, strict=True))
    assert float(divergence([got], [want], "kl")) == pytest.approx(total / 12, rel=1e-5)
    mse = float(((got - want).double() ** 2).mean() / (want.double() ** 2).mean())
    assert float(divergence([got], [want], "mse")) == pytest.approx(mse, rel=1e-5)
    both = divergence([got, torch.tensor(3), want, None], [want, torch.tensor(5), want, None], "mse")
    assert float(both) == pytest.approx(mse / 2, rel=1e-5), "other outputs do not count"
    first = divergence([torch.tensor(3), got, want], [torch.tensor(5), want, got], "kl")
    assert float(first) == pytest.approx(total / 12, rel=1e-5), "logits come first, a cache may follow"


def test_gradient_of_the_scale() -> None:
    codes = torch.randint(-7, 8, (5, 9), dtype=torch.int8)
    scale = torch.rand(5, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: cast(Tensor, cast(Any, _Dequantize.apply)(codes, s)), (scale,))


@pytest.mark.parametrize("spec", SPECS)
def test_starts_as_the_quantizer_and_keeps_the_integers(spec: QuantSpec) -> None:
    weight = weight_of()
    quantizer = make_quantizer(weight, spec, "mse")
    stand_in = _Rescaled(weight, quantizer)
    torch.testing.assert_close(stand_in(weight), quantizer(weight), rtol=1e-6, atol=1e-7)
    codes = rows_of(quantizer(weight), spec) / quantizer.scale.reshape(-1, 1)
    torch.testing.assert_close(stand_in.codes.float(), codes, rtol=1e-5, atol=1e-5)
    stand_in.log_factor.data.normal_(0, 0.2)
    model = nn.Module()
    model.layer = nn.Linear(32, 6)
    model.grid = quantizer
    entry = RoundedWeight(["layer"], weight, [("layer", "weight")], ["grid"])
    program = cast(fxc.Program, type("Holder", (), {"gm": model}))
    entry.put(program, stand_in.codes, stand_in.tuned().detach())
    new = cast(Tensor, model.layer.weight).detach()
    torch.testing.assert_close(stand_in(weight).detach(), new)
    torch.testing.assert_close(quantizer(new), new, rtol=1e-6, atol=1e-7)
    again = rows_of(new, spec) / quantizer.scale.reshape(-1, 1)
    assert torch.equal(again.round(), stand_in.codes.float()), "every weight keeps its integer"


def test_gradient_of_a_rounded_weight_is_that_of_the_formula() -> None:
    """``dL/dv = sum dL/dw q s`` for ``w = q s exp(v)``, by finite differences of float64."""
    weight, spec = weight_of(), QuantSpec(3, True, True, 0, group_size=16)
    stand_in = _Rescaled(weight, make_quantizer(weight, spec, "mse"))
    x, target = torch.randn(10, 32), torch.randn(10, 6)
    (gradient,) = torch.autograd.grad((F.linear(x, stand_in(weight)) - target).square().mean(), stand_in.log_factor)
    start = stand_in.scale.double() * stand_in.codes.double()

    def loss(v: Tensor) -> float:
        w = (start * v.exp()).reshape(6, 32)
        return float((x.double() @ w.T - target.double()).square().mean())

    for i in range(12):
        step = torch.zeros(12, 1, dtype=torch.float64)
        step[i] = 1e-5
        slope = (loss(step) - loss(-step)) / 2e-5
        assert float(gradient[i]) == pytest.approx(slope, rel=1e-3, abs=1e-5)


def test_activations_on_a_grid_pass_gradients() -> None:
    quantizer = DynamicFakeQuantize(QuantSpec(8, True, True, qmin=-127))
    x = torch.randn(3, 8, requires_grad=True)
    y = _StraightThrough(quantizer)(x)
    torch.testing.assert_close(y.detach(), quantizer(x.detach()))
    (gradient,) = torch.autograd.grad((y * torch.arange(8.0)).sum(), x)
    torch.testing.assert_close(gradient, torch.arange(8.0).expand(3, 8))


def test_the_straight_through_gradient_of_a_static_grid_is_there() -> None:
    """Static activations need no stand-in: their operator has the gradient."""
    x = torch.linspace(-2, 2, 9, requires_grad=True)
    y = fake_quantize(x, torch.tensor(0.01), torch.tensor(0, dtype=torch.int32), -1, -127, 127)
    (gradient,) = torch.autograd.grad(cast(Tensor, y).sum(), x)
    assert gradient.tolist() == [float(abs(v) <= 1.27) for v in x.tolist()]


def test_the_rate_rises_and_falls() -> None:
    found = [TuningOptions(learning_rate=1.0).rate(step, 50) for step in range(50)]
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert found[5:] == sorted(found[5:], reverse=True) and 0 < found[-1] < 0.01


# ------------------------------------------------------------------------------------------------ programs
def distance(program: Any, kind: Any) -> float:
    """Divergence from the float network on images that nothing was learned from."""
    x = held_out()[0]
    with torch.no_grad():
        return float(divergence([program(x)], [trained(kind)(x)], "kl"))


CASES: dict[str, tuple[Any, tuple[fxc.Pass, ...]]] = {
    "rtn": (Attention, (WEIGHTS,)),
    "gptq": (Attention, (fxc.QuantizeWeights(bits=2, group_size=16, fit="adjust", method="gptq"),)),
    "asymmetric": (Attention, (fxc.QuantizeWeights(bits=2, group_size=16, fit="adjust", symmetric=False),)),
    "dynamic": (Attention, (WEIGHTS, fxc.QuantizeDynamic())),
    "static": (Convolutions, (fxc.QuantizeStatic(weight_bits=2, eight_bits=()),)),
    "adaround": (Convolutions, (fxc.QuantizeStatic(weight_bits=2, eight_bits=()), fxc.AdaRound(iterations=30))),
}


@pytest.mark.parametrize("name", CASES)
def test_nearer_on_new_data(name: str) -> None:
    kind, passes = CASES[name]
    program, context = rounded(kind, *passes)
    result = fxc.TuneScales(epochs=4, learning_rate=1e-2)(program, context)
    assert result.metrics["divergence_after"] < result.metrics["divergence_before"]
    assert distance(result.program, kind) < 0.8 * distance(program, kind)
    before, after = ([m for m in p.gm.modules() if isinstance(m, Fused)] for p in (program, result.program))
    assert len(result.changes) == result.metrics["weights"] == sum(m.weight_fake_quantize is not None for m in before)
    for old, new in zip(before, after, strict=True):
        if old.weight_fake_quantize is not None:
            assert torch.equal(integers(old), integers(new))


def integers(layer: Fused) -> Tensor:
    grid = cast(FakeQuantize, layer.weight_fake_quantize)
    return (rows_of(grid(layer.weight.detach()), grid.spec) / grid.scale.reshape(-1, 1)).round()


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", ["gptq", "dynamic", "static"])
def test_engines_compute_the_tuned_program(runtime: str, name: str) -> None:
    kind, passes = CASES[name]
    if name != "static":  # engines keep 4 bits in groups
        passes = (fxc.QuantizeWeights(bits=4, group_size=16, fit="adjust", method="gptq"), *passes[1:])
    data = batches()
    engine = fxc.compile(
        trained(kind),
        (data[0],),
        passes=[fxc.FoldBatchNorm(), fxc.FuseActivations(), *passes, fxc.TuneScales(epochs=2)],
        target=runtime,
        calibration=data,
        measure=False,
    )
    step = next(s for s in engine.report.steps if s.name == "TuneScales")  # parity was checked, or it had raised
    assert step.modified and step.metrics["divergence_after"] < step.metrics["divergence_before"]


def test_scales_stay_when_they_are_the_best() -> None:
    """A float network whose weights lie on a grid is not changed by that grid, so there is nothing to gain."""
    program, context = rounded(Attention, WEIGHTS)
    for _, module in program.layers():
        if isinstance(module, Fused):
            module.weight_fake_quantize = None
    on_grid = program
    again = fxc.QuantizeWeights(bits=8)(on_grid, context).program
    exact = fxc.Context(calibration=context.calibration, reference=again_float(again))
    result = fxc.TuneScales(epochs=1, learning_rate=0.1)(again, exact)
    assert not result.changes and any("the scales stay" in note for note in result.notes)
    assert result.metrics["divergence_after"] == result.metrics["divergence_before"]
    assert torch.equal(result.program(batches()[0]), again(batches()[0]))


def again_float(program: fxc.Program) -> fxc.Program:
    """A program without quantizers that holds the rounded weights."""
    plain = program.clone()
    for _, module in plain.layers():
        if isinstance(module, Fused) and module.weight_fake_quantize is not None:
            module._parameters["weight"] = nn.Parameter(module.weight_fake_quantize(module.weight).detach())
            module.weight_fake_quantize = None
    return plain


def test_same_seed_same_scales() -> None:
    program, context = rounded(Attention, WEIGHTS)
    step = fxc.TuneScales(epochs=1, learning_rate=1e-2)
    first, second = (step(program, context).program.gm.state_dict() for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not torch.equal(first["up.weight"], program.gm.state_dict()["up.weight"])


def test_layers_by_name() -> None:
    program, context = rounded(Attention, WEIGHTS)
    result = fxc.TuneScales(epochs=1, learning_rate=1e-2, include="*o*", ignore="out")(program, context)
    assert result.changes == ["tuned the scales of down"]
    before, after = program.gm.state_dict(), result.program.gm.state_dict()
    assert {k.partition(".")[0] for k in before if not torch.equal(before[k], after[k])} == {"down"}
    nothing = fxc.TuneScales(include="nowhere")(program, context)
    assert not nothing.changes and any("leave no rounded weight" in note for note in nothing.notes)


class Shared(nn.Module):
    """One layer called twice, two layers with one weight, a head that is the embedding, a functional call."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.twice = nn.Embedding(40, 32), nn.Linear(32, 32)
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        self.second.weight = self.first.weight
        self.free = nn.Parameter(torch.randn(32, 32) / 6)
        self.head = nn.Linear(32, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.twice(self.twice(self.embed(ids)).tanh()).tanh()
        x = F.linear(self.second(self.first(x).tanh()).tanh(), self.free)
        return torch.as_tensor(self.head(x))


def test_shared_weights() -> None:
    torch.manual_seed(0)
    model, ids = Shared().eval(), torch.randint(0, 40, (16, 4, 6))
    plain = fxc.capture(model, (ids[0],))
    context = fxc.Context(calibration=list(ids), reference=plain)
    program = fxc.QuantizeWeights(bits=2, group_size=16, include=("*",))(plain, context).program
    table = model.embed.weight.detach().clone()
    result = fxc.TuneScales(epochs=3, learning_rate=1e-2)(program, context)
    assert result.metrics["weights"] == 4 and len(result.changes) == 4
    assert torch.equal(model.embed.weight, table)
    modules = dict(result.program.gm.named_modules())
    first, second, head, embed = (cast(Any, modules[n]) for n in ("first", "second", "head", "embed"))
    assert first.weight is second.weight and torch.equal(embed.weight, table)
    torch.testing.assert_close(head.weight_fake_quantize(head.weight), head.weight, rtol=1e-6, atol=1e-7)
    assert not torch.equal(head.weight, table)
    assert "tuned the scales of first, second" in result.changes
    ignored = fxc.TuneScales(epochs=1, learning_rate=1e-2, ignore="second")(program, context).changes
    assert not any("first" in change for change in ignored), "its weight is that of an ignored layer"
    assert fxc.TuneScales(epochs=1, learning_rate=1e-2, include="second")(program, context).changes == [
        "tuned the scales of first, second"
    ]


def test_a_weight_that_is_read_in_float_too() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.free = nn.Parameter(torch.randn(16, 16) / 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.free) + x @ self.free

    plain = fxc.capture(Both().eval(), (torch.randn(4, 16),))
    context = fxc.Context(calibration=[torch.randn(4, 16) for _ in range(16)], reference=plain)
    program = fxc.QuantizeWeights(bits=2, group_size=16, include=("*",))(plain, context).program
    result = fxc.TuneScales()(program, context)
    assert not result.changes and any("has a use of its own" in note for note in result.notes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_of_16_bit_weights(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10)).to(dtype).eval()
    data = [torch.randn(16, 32, dtype=dtype) for _ in range(16)]
    plain = fxc.capture(model, (data[0],))
    context = fxc.Context(calibration=data, reference=plain)
    program = fxc.QuantizeWeights(bits=2, group_size=16)(plain, context).program
    result = fxc.TuneScales(epochs=4, learning_rate=2e-2)(program, context)
    assert result.changes
    for module in result.program.gm.modules():
        if isinstance(module, Fused):
            grid = cast(FakeQuantize, module.weight_fake_quantize)
            assert torch.equal(grid.scale, grid.scale.to(dtype).float())
            assert torch.equal(grid(module.weight), module.weight)


def test_few_batches_are_said() -> None:
    program, context = rounded(Attention, WEIGHTS)
    few = fxc.Context(calibration=batches(count=3), reference=context.reference)
    result = fxc.TuneScales(epochs=2, learning_rate=1e-2)(program, few)
    assert any("3 batches are too few to keep one back" in note for note in result.notes)
    assert any("48" in note and "128" in note for note in result.notes), "fewer samples than asked for are recorded"


def test_a_gradient_that_is_not_finite_stops_the_training() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).square().sqrt()  # the slope of the root is infinite at 0

    torch.manual_seed(0)
    data = [torch.randn(2, 16) for _ in range(16)]
    for x in data:
        x[0] = 0
    plain = fxc.capture(Root().eval(), (data[0],))
    context = fxc.Context(calibration=data, reference=plain)
    program = fxc.QuantizeWeights(bits=2, group_size=16)(plain, context).program
    result = fxc.TuneScales(loss="mse")(program, context)
    assert any("not finite" in note for note in result.notes) and not result.changes
