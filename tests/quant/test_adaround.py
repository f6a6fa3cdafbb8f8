"""AdaRound: the published formulas in float64, never worse than the nearest, better on new data, whole programs."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import PassError, UsageError
from fxcompress.layers import FusedConv2d
from fxcompress.layerwise.statistics import input_rows
from fxcompress.quant.adaround import (
    Annealing,
    RowsOnGrid,
    learn_rounding,
    rectified_sigmoid,
    regularizer,
    unrectified,
)
from fxcompress.quant.layer_weights import make_quantizer
from fxcompress.quant.reconstruction import PairMoments, float_twin, sampled_rows
from fxcompress.quant.scheme import QuantScheme
from fxcompress.quant.spec import QuantSpec
from fxcompress.testing import check_pass
from tests.helpers.correlated import correlated
from tests.helpers.digits import Attention, Convolutions, accuracy, held_out, trained, training

FOUR = QuantScheme(weight=QuantSpec(4, signed=True, symmetric=True, axis=0))


# ------------------------------------------------------------------------------------------------ formulas
def test_rectified_sigmoid_is_equation_23() -> None:
    for v in torch.linspace(-6, 6, 49, dtype=torch.float64).tolist():
        want = min(max(1 / (1 + math.exp(-v)) * (1.1 - -0.1) + -0.1, 0.0), 1.0)
        assert float(rectified_sigmoid(torch.tensor(v, dtype=torch.float64))) == pytest.approx(want, abs=1e-15)
    h = torch.linspace(0, 1, 21, dtype=torch.float64)
    torch.testing.assert_close(rectified_sigmoid(unrectified(h)), h, rtol=0, atol=1e-12)


def test_regularizer_is_equation_24() -> None:
    h = torch.rand(4, 5, dtype=torch.float64)
    for beta in (20.0, 8.0, 2.0):
        want = sum(1 - abs(2 * v - 1) ** beta for v in h.flatten().tolist())
        assert float(regularizer(h, beta)) == pytest.approx(want, rel=1e-12)
    assert float(regularizer(h.round(), 2.0)) == 0


def test_beta_falls_from_the_first_to_the_last_value() -> None:
    how = Annealing(iterations=100)
    found = [how.beta_at(i) for i in range(100)]
    assert found[:20] == [None] * 20 and found[20] == 20.0
    rest = [b for b in found if b is not None]
    assert rest == sorted(rest, reverse=True) and 2.0 < rest[-1] < 2.1


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(4, True, True, 0),
        QuantSpec(8, False, False, 0),
        QuantSpec(3, True, True),
        QuantSpec(4, False, False, 0, group_size=16),
        QuantSpec(4, True, True, 1),
    ],
)
def test_grid_under_a_weight(spec: QuantSpec) -> None:
    """Rounding to the nearest is what the quantizer does; every choice of up and down is left alone by it."""
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    quantizer = make_quantizer(weight, spec, "mse")
    grid = RowsOnGrid.of(weight, quantizer)
    torch.testing.assert_close(grid.values(grid.nearest()), quantizer(weight), rtol=0, atol=1e-6)
    either = grid.values(torch.randint(0, 2, weight.shape, generator=torch.Generator().manual_seed(1)).float())
    torch.testing.assert_close(quantizer(either), either, rtol=1e-6, atol=1e-7)
    # in the middle of the range this is the quantizer's own step (eq. 22)
    inside = (grid.steps(torch.ones(())) > grid.least) & (grid.steps(torch.ones(())) < grid.most)
    assert bool(((either - weight).abs()[inside] <= grid.scale[inside] * 1.0001).all())


def test_moments_are_those_of_the_inputs() -> None:
    """Against sums over unfolded inputs in float64, for a grouped convolution; a layer of few rows takes them all."""
    layer = nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=2)
    pairs = [(torch.randn(2, 4, 7, 7), torch.randn(2, 4, 7, 7)) for _ in range(3)]
    moments = PairMoments(layer, len(pairs), seed=0)
    for number, (x, y) in enumerate(pairs):
        moments.see_float(number, x)
        moments.see_quantized(number, y)
    second, cross = moments.centred(0.0, about_means=True)
    for group in range(2):
        rows = [
            torch.cat([_windows(pair[side][:, 2 * group : 2 * group + 2]) for pair in pairs]).double()
            for side in (0, 1)
        ]
        x, y = (r - r.mean(0) for r in rows)
        torch.testing.assert_close(second[group], y.T @ y / len(y), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(cross[group], x.T @ y / len(y), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=2, dilation=2), (2, 4, 9, 8)),
        (nn.Conv1d(4, 4, 5, padding=2, groups=4, padding_mode="reflect"), (3, 4, 11)),
        (nn.Linear(6, 3), (2, 5, 6)),
    ],
)
def test_sampled_rows_are_rows_of_the_input(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """All of them against the rows that the other calibrated methods use; a sample is a part of these."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    every = torch.cat(list(input_rows(layer, x)), 1)
    torch.testing.assert_close(sampled_rows(layer, x, 1000, torch.Generator()), every)
    some = sampled_rows(layer, x, 5, torch.Generator().manual_seed(1))
    assert some.shape[1] == 5
    assert all(bool((every[0] == row).all(1).any()) for row in some[0])


def _windows(x: Tensor) -> Tensor:
    """Rows [positions, taps * channels], channels fastest."""
    found = F.unfold(x, 3, padding=1, stride=2).unflatten(1, (2, 9))
    return torch.as_tensor(found.permute(0, 3, 2, 1).reshape(-1, 18))


# ------------------------------------------------------------------------------------------------ one layer
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_never_worse_than_the_nearest_and_better_on_new_data(bits: int) -> None:
    weight = torch.randn(24, 48, generator=torch.Generator().manual_seed(2)) / 7
    seen, new = correlated(400, 48, 3).double(), correlated(2000, 48, 4).double()
    quantizer = make_quantizer(weight, QuantSpec(bits, True, True, 0), "mse")
    rows = RowsOnGrid.of(weight, quantizer).mapped(lambda t: t[None].contiguous())
    second = (seen.T @ seen / len(seen))[None]
    up = learn_rounding(rows, second, weight.double()[None] @ second, Annealing(iterations=150))
    assert set(up.flatten().tolist()) <= {0.0, 1.0}
    learned, nearest = rows.values(up)[0].double(), quantizer(weight).double()
    for data, least in ((seen, 0.4), (new, 0.5)):
        errors = [((w - weight.double()) @ data.T).square().mean(1) for w in (learned, nearest)]
        assert float(errors[0].mean()) < least * float(errors[1].mean())
    row_errors = [((w - weight.double()) @ seen.T).square().mean(1) for w in (learned, nearest)]
    assert bool((row_errors[0] <= row_errors[1] * (1 + 1e-9)).all()), "row by row it is never worse"


def test_inputs_that_do_not_correlate_are_rounded_to_the_nearest() -> None:
    """With H = I the nearest is the optimum (paper, section 3)."""
    weight = torch.randn(8, 20, generator=torch.Generator().manual_seed(2))
    quantizer = make_quantizer(weight, QuantSpec(4, True, True, 0), "minmax")
    rows = RowsOnGrid.of(weight, quantizer).mapped(lambda t: t[None].contiguous())
    eye = torch.eye(20, dtype=torch.float64)[None]
    up = learn_rounding(rows, eye, weight.double()[None] @ eye, Annealing(iterations=30))
    torch.testing.assert_close(rows.values(up)[0], quantizer(weight))


@pytest.mark.parametrize("features", [8, 11])
def test_small_problem_against_all_roundings(features: int) -> None:
    """Every choice of up and down: up to 9 weights it is the best one, beyond that far nearer to it than the nearest."""
    weight = torch.randn(12, features, generator=torch.Generator().manual_seed(5))
    x = correlated(100, features, 6).double()
    quantizer = make_quantizer(weight, QuantSpec(3, True, True, 0), "mse")
    rows = RowsOnGrid.of(weight, quantizer).mapped(lambda t: t[None])
    second = (x.T @ x / len(x))[None]
    up = learn_rounding(rows, second, weight.double()[None] @ second, Annealing(iterations=100))[0]
    choices = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * features)
    learned, nearest = [], []
    for row in range(12):
        one = rows.mapped(lambda t, row=row: t[0, row])
        every = torch.cat([up[row : row + 1], rows.nearest()[0, row : row + 1], choices])
        errors = ((one.values(every).double() - weight[row].double()) @ x.T).square().mean(1)
        learned.append(float(errors[0] / errors[2:].min()))
        nearest.append(float(errors[1] / errors[2:].min()))
    assert min(learned) >= 1 - 1e-6
    assert max(learned) <= 1 + 1e-6 if features == 8 else sum(learned) < 0.25 * sum(nearest)


# ------------------------------------------------------------------------------------------------ programs
def program_of(kind: Any) -> tuple[nn.Module, fxc.Program, list[Tensor]]:
    model, data = trained(kind), [b[0] for b in training(16)][:12]
    program = fxc.capture(model, (data[0],))
    return model, fxc.Pipeline((fxc.FoldBatchNorm(), fxc.FuseActivations()))(program).program, data


def error_of(program: Any, model: nn.Module) -> float:
    with torch.no_grad():
        y = model(held_out()[0])
        return float((program(held_out()[0]) - y).norm() / y.norm())


@pytest.mark.parametrize("kind", [Convolutions, Attention])
def test_behind_static_quantization(kind: Any) -> None:
    model, plain, data = program_of(kind)
    context = fxc.Context(calibration=data, scheme=FOUR)
    nearest = fxc.QuantizeStatic()(plain, context).program
    result = check_pass(fxc.AdaRound(iterations=60), nearest, context=context)
    assert error_of(result.program, model) < 0.8 * error_of(nearest, model)
    assert accuracy(result.program) >= accuracy(model) - 0.02
    for node, layer in result.program.layers():
        quantizer = getattr(layer, "weight_fake_quantize", None)
        if quantizer is not None:
            torch.testing.assert_close(quantizer(layer.weight), layer.weight, rtol=1e-6, atol=1e-7)
            assert torch.equal(quantizer.scale, cast(Any, nearest.module(node)).weight_fake_quantize.scale), (
                "the grid stays"
            )


def test_behind_weight_quantization() -> None:
    model, plain, data = program_of(Attention)
    context = fxc.Context(calibration=data)
    nearest = fxc.QuantizeWeights(bits=3, group_size=16, symmetric=False, fit="ignore")(plain, context).program
    result = fxc.AdaRound(iterations=60)(nearest, context)
    assert error_of(result.program, model) < 0.8 * error_of(nearest, model)


def test_fewer_inputs_than_features_are_not_learned_by_heart() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 10))
    plain = fxc.capture(model, (torch.randn(2, 8),))
    context = fxc.Context(calibration=[torch.randn(4, 8) for _ in range(6)])
    nearest = fxc.QuantizeWeights(bits=4, group_size=-1)(plain, context).program
    result = fxc.AdaRound(iterations=20)(nearest, context)
    assert any("24 inputs for 64 features" in note for note in result.notes)
    first, last = (
        [layer for _, layer in p.layers() if hasattr(layer, "weight_fake_quantize")] for p in (nearest, result.program)
    )
    same = [
        torch.allclose(cast(Any, a).weight_fake_quantize(a.weight), b.weight) for a, b in zip(first, last, strict=True)
    ]
    assert same == [False, True], "the second layer alone has more features than inputs"


def test_blocks_learned_together() -> None:
    """A block is only changed where its own output comes out nearer."""
    model, plain, data = program_of(Convolutions)
    context = fxc.Context(calibration=data, scheme=FOUR)
    nearest = fxc.QuantizeStatic()(plain, context).program
    layers = fxc.AdaRound(iterations=60)(nearest, context)
    blocks = fxc.AdaRound(iterations=60, block=True, block_iterations=200)(nearest, context)
    assert blocks.metrics["blocks"] >= 1
    seen = torch.cat(data)
    with torch.no_grad():
        exact = model(seen)
        errors = [float((r.program(seen) - exact).norm()) for r in (layers, blocks)]
    assert errors[1] <= 1.1 * errors[0]


def test_the_twin_is_the_float_program() -> None:
    """Corrected biases are taken back, also after rounding anew."""
    _, plain, data = program_of(Convolutions)
    context = fxc.Context(calibration=data, scheme=FOUR)
    nearest = fxc.QuantizeStatic()(plain, context).program
    with torch.no_grad():
        torch.testing.assert_close(float_twin(nearest)(data[0]), plain(data[0]), rtol=1e-4, atol=1e-4)


def test_same_seed_same_weights() -> None:
    _, plain, data = program_of(Convolutions)
    context = fxc.Context(calibration=data, scheme=FOUR)
    nearest = fxc.QuantizeStatic()(plain, context).program
    step = fxc.AdaRound(iterations=20, block=True, block_iterations=5)
    first, second = (step(nearest, context).program.gm.state_dict() for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_fewer_bits_for_weights_only() -> None:
    """`QuantizeStatic(weight_bits=4)` keeps 8-bit activations, and layers by name."""
    _, plain, data = program_of(Convolutions)
    result = fxc.QuantizeStatic(weight_bits=4, eight_bits=("stem",))(plain, fxc.Context(calibration=data))
    bits = {
        str(n.target): m.weight_fake_quantize.spec.bits  # type: ignore[union-attr]
        for n, m in result.program.layers()
        if isinstance(m, FusedConv2d)
    }
    assert bits == {"stem": 8, "deep": 4, "point": 4}
    assert fxc.QuantizeStatic(weight_bits=4).precision == "w4a8"


def test_wrong_use() -> None:
    _, plain, data = program_of(Convolutions)
    with pytest.raises(PassError, match="finds no quantized layer"):
        fxc.AdaRound()(plain, fxc.Context(calibration=data))
    quantized = fxc.QuantizeStatic()(plain, fxc.Context(calibration=data)).program
    with pytest.raises(PassError, match="needs calibration data"):
        fxc.AdaRound()(quantized)
    with pytest.raises(UsageError, match="nothing to learn with"):
        fxc.AdaRound(iterations=0)
    with pytest.raises(UsageError, match="not between 0 and 1"):
        fxc.AdaRound(damping=2.0)
    with pytest.raises(UsageError, match="not 2 to 8"):
        fxc.QuantizeStatic(weight_bits=1)
