"""LSQ and LSQ+: gradients against the papers' formulas written out, initialisation, positivity, few bits."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import PassError
from fxcompress.qat.quantizers import LearnedQuantizer, lsq_scale
from fxcompress.qat.rounding import round_learned, round_straight_through
from fxcompress.quant.spec import QuantSpec

BITS = range(2, 9)


def signed(bits: int, axis: int | None = None) -> QuantSpec:
    return QuantSpec(bits, signed=True, symmetric=True, axis=axis)


def asymmetric(bits: int, signed_: bool = False) -> QuantSpec:
    return QuantSpec(bits, signed=signed_, symmetric=False)


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------ the papers, in loops
def esser(v: float, s: float, qn: int, qp: int) -> tuple[float, float, float]:
    """Esser et al. 2020: value (eq. 1, 2), gradient to ``v`` (eq. 5) and to ``s`` (eq. 3); ``qn`` is -Q_N."""
    if v / s <= qn:
        return qn * s, 0.0, qn
    if v / s >= qp:
        return qp * s, 0.0, qp
    return round(v / s) * s, 1.0, round(v / s) - v / s  # Python rounds half to even


def bhalgat(x: float, s: float, beta: float, n: int, p: int) -> tuple[float, float, float, float]:
    """Bhalgat et al. 2020, eq. 3 to 6: value, gradients to ``x``, ``s`` and ``beta``."""
    t = (x - beta) / s
    if t < n:
        return n * s + beta, 0.0, n, 1.0
    if t > p:
        return p * s + beta, 0.0, p, 1.0
    return round(t) * s + beta, 1.0, round(t) - t, 0.0


# ------------------------------------------------------------------------------------------------ gradients
@pytest.mark.parametrize("bits", BITS)
def test_gradients_are_those_of_lsq(bits: int) -> None:
    spec = signed(bits)
    quantizer = LearnedQuantizer(spec, torch.tensor(0.31))
    x = values(7, 9).requires_grad_()
    upstream = values(7, 9, seed=1)
    y = quantizer(x)
    y.backward(upstream)
    rows = [esser(v, quantizer.scale.item(), spec.qmin, spec.qmax) for v in x.detach().double().flatten().tolist()]
    want_y, want_x, want_s = (torch.tensor(c, dtype=torch.float64).reshape(7, 9) for c in zip(*rows, strict=True))
    share = 1 / math.sqrt(63 * spec.qmax)
    torch.testing.assert_close(y.double(), want_y, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(x.grad, (want_x * upstream).float())
    assert quantizer.scale.grad is not None
    torch.testing.assert_close(quantizer.scale.grad.double(), (want_s * upstream).sum() * share, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("spec", [lambda b: signed(b), asymmetric, lambda b: asymmetric(b, True)])
def test_the_scale_of_an_activation_counts_the_features_of_a_sample(
    bits: int, spec: Callable[[int], QuantSpec]
) -> None:
    """Esser et al. 2020, section 2.2: ``1 / sqrt(N_F Q_P)``; a batch twice as long has the mean of the gradients."""
    grid = spec(bits)
    largest = 2 ** (bits - 1) - 1 if grid.symmetric else 2**bits - 1
    quantizer = LearnedQuantizer(grid, batched=True)
    x = values(6, 4, 5, seed=bits)
    quantizer(x)
    scale, zero_point = (t.detach() for t in quantizer.grid())
    quantizer(x).sum().backward()
    got = [p.grad for p in quantizer.parameters() if p.grad is not None]
    want = [torch.tensor(0.3, dtype=torch.float64, requires_grad=True) for _ in got]
    with torch.no_grad():
        want[0].copy_(scale)
    offset = want[1] if len(want) > 1 else None
    limits = (grid.qmin, grid.qmax)
    round_learned(x.double(), want[0], offset, zero_point, -1, limits, 1 / math.sqrt(20 * largest)).sum().backward()
    torch.testing.assert_close([g.double() for g in got], [w.grad for w in want], atol=1e-4, rtol=1e-3)
    first = [g.clone() for g in got]
    quantizer.zero_grad()
    (quantizer(torch.cat((x, x))).sum() / 2).backward()
    torch.testing.assert_close([p.grad for p in quantizer.parameters()], first, atol=1e-5, rtol=1e-4)


def test_every_channel_has_its_own_gradient() -> None:
    spec = signed(3, axis=1)
    scale = torch.tensor([0.2, 0.5, 1.1])
    quantizer = LearnedQuantizer(spec, scale)
    x, upstream = values(4, 3, 5), values(4, 3, 5, seed=1)
    quantizer(x).backward(upstream)
    for channel in range(3):
        alone = LearnedQuantizer(signed(3), scale[channel])
        alone(x[:, channel]).backward(upstream[:, channel])
        assert quantizer.scale.grad is not None
        torch.testing.assert_close(quantizer.scale.grad[channel], alone.scale.grad)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("is_signed", [False, True])
def test_gradients_are_those_of_lsq_plus(bits: int, is_signed: bool) -> None:
    """With an offset on the grid, where LSQ+ and an integer zero point are the same function."""
    spec = asymmetric(bits, is_signed)
    s, z = 0.25, spec.qmin + 1
    beta = -z * s
    scale, offset = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (s, beta))
    x = (2 * values(300)).double().requires_grad_()
    upstream = values(300, seed=1).double()
    y = round_learned(x, scale, offset, torch.tensor(z), -1, (spec.qmin, spec.qmax), 0.5)
    y.backward(upstream)
    columns = zip(*(bhalgat(v, s, beta, spec.qmin, spec.qmax) for v in x.tolist()), strict=True)
    want = [torch.tensor(c, dtype=torch.float64) for c in columns]
    torch.testing.assert_close(y.detach(), want[0])
    torch.testing.assert_close(x.grad, want[1] * upstream)
    torch.testing.assert_close(scale.grad, (want[2] * upstream).sum() * 0.5)
    torch.testing.assert_close(offset.grad, (want[3] * upstream).sum() * 0.5)


def test_gradients_against_autograd_of_the_rounding_estimator() -> None:
    """Autograd through ``clamp(round(x / s)) s`` with a straight-through round, written with plain operators."""
    x, scale = values(50).double().requires_grad_(), torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def through(v: Tensor) -> Tensor:
        return v + (v.round() - v).detach()

    (through((x / scale).clamp(-4, 3)) * scale).square().sum().backward()
    want = x.grad, scale.grad
    x.grad = scale.grad = None
    round_learned(x, scale, None, torch.tensor(0), -1, (-4, 3), 1.0).square().sum().backward()
    torch.testing.assert_close((x.grad, scale.grad), want)


@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_gradients_of_clipped_values_against_finite_differences(side: float) -> None:
    """Outside the range the function is smooth: ``qmin s`` and ``qmax s``."""
    x = side * (values(20).abs() + 5).double()
    zero, step = torch.tensor(0), 1e-6

    def total(scale: Tensor) -> Tensor:
        return round_learned(x, scale, None, zero, -1, (-8, 7), 1.0).sum()

    scale = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    total(scale).backward()
    difference = (total(scale.detach() + step) - total(scale.detach() - step)) / (2 * step)
    torch.testing.assert_close(scale.grad, difference, atol=1e-6, rtol=1e-6)


def test_straight_through_is_one_inside_and_zero_outside() -> None:
    x = torch.tensor([-0.3, -0.1, 0.0, 0.99, 1.5, 1.51], requires_grad=True)
    y = round_straight_through(x, torch.tensor(0.1), torch.tensor(0), -1, 0, 15)
    y.sum().backward()
    assert y.tolist() == pytest.approx([0, 0, 0, 1.0, 1.5, 1.5])
    assert x.grad is not None
    assert x.grad.tolist() == [0, 0, 1, 1, 1, 0]


@pytest.mark.parametrize("make", [round_straight_through, round_learned])
@pytest.mark.parametrize("axis", [-1, 0])
def test_forward_is_the_operator_to_the_last_bit(make: Callable[..., Tensor], axis: int) -> None:
    x = 3 * values(6, 1000)
    scale = values(6, seed=1).abs() * 0.05 + 0.01 if axis == 0 else torch.tensor(0.0371)
    zero = torch.arange(6, dtype=torch.int32) * 3 if axis == 0 else torch.tensor(9, dtype=torch.int32)
    want = torch.ops.fxcompress.fake_quantize(x, scale, zero, axis, 0, 100)
    if make is round_learned:
        got = round_learned(x, scale, None, zero, axis, (0, 100), 1.0)
    else:
        got = round_straight_through(x, scale, zero, axis, 0, 100)
    assert torch.equal(got, want)


# ------------------------------------------------------------------------------------------------ the first grid
@pytest.mark.parametrize("bits", BITS)
def test_first_scale_is_that_of_the_paper(bits: int) -> None:
    w = values(4, 3, 2).double().numpy()
    want = 2 * np.abs(w).mean((1, 2)) / np.sqrt(2 ** (bits - 1) - 1)
    np.testing.assert_allclose(lsq_scale(torch.from_numpy(w), signed(bits, axis=0)).numpy(), want, rtol=1e-6)


def test_channels_of_zeros_begin_with_a_usable_scale() -> None:
    w = torch.stack((torch.zeros(5), torch.ones(5)))
    scale = lsq_scale(w, signed(4, axis=0))
    assert scale[0] == scale[1] / 2
    assert lsq_scale(torch.zeros(3), signed(4)) == 1


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_first_batch_sets_scale_and_offset_of_least_error(bits: int) -> None:
    """LSQ+ initialises asymmetric activations by least squared error: no better grid in a fine search."""
    quantizer = LearnedQuantizer(asymmetric(bits))
    x = torch.nn.functional.silu(2 * values(4000))
    with torch.no_grad():
        error = float((quantizer(x) - x).square().mean())
    steps = 2**bits - 1
    best = min(
        float((torch.ops.fxcompress.fake_quantize(x, s, torch.tensor(z), -1, 0, steps) - x).square().mean())
        for top in np.linspace(0.2, 1.0, 41)
        for s in [torch.tensor((float(x.max()) * top + 0.28) / steps)]
        for z in {round(0.28 / float(s)), int(0.28 / float(s)), 0}
    )
    assert error < 1.1 * best
    assert quantizer.ready


def test_a_first_batch_for_a_symmetric_grid_uses_lsqs_formula() -> None:
    quantizer = LearnedQuantizer(QuantSpec(4, signed=True, symmetric=True))
    x = values(100)
    quantizer(x)
    assert quantizer.scale.item() == pytest.approx(float(2 * x.abs().mean() / math.sqrt(7)))


def test_without_a_grid_eval_mode_is_an_error() -> None:
    quantizer = LearnedQuantizer(asymmetric(4)).eval()
    with pytest.raises(PassError, match="FXC-PASS-090"):
        quantizer(values(3))
    quantizer.train()(torch.full((3,), math.nan).nan_to_num(posinf=1.0))
    assert quantizer.ready


# ------------------------------------------------------------------------------------------------ what never breaks
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("asym", [False, True])
def test_so_many_bits_so_many_values(bits: int, asym: bool) -> None:
    quantizer = LearnedQuantizer(asymmetric(bits) if asym else signed(bits), torch.tensor(0.01))
    y = quantizer(5 * values(3000))
    assert 2 <= len(y.unique()) <= 2**bits


@pytest.mark.parametrize("rate", [0.1, 100.0, 1e6])
def test_the_scale_stays_positive_under_any_rate(rate: float) -> None:
    quantizer = LearnedQuantizer(asymmetric(4), torch.tensor(0.05))
    optimizer = torch.optim.SGD(quantizer.parameters(), rate)
    for seed in range(20):
        optimizer.zero_grad()
        quantizer(values(64, seed=seed)).square().mean().backward()
        optimizer.step()
        scale, zero_point = quantizer.grid()
        assert float(scale.detach()) > 0
        assert 0 <= int(zero_point) <= 15
        assert bool(torch.isfinite(quantizer(values(9))).all())


def test_a_scale_below_zero_still_learns() -> None:
    """Gradients point the right way on both sides of zero, and at it."""
    x = values(400)
    for start in (-0.5, 0.0, 0.5):
        quantizer = LearnedQuantizer(signed(4), torch.tensor(start))
        optimizer = torch.optim.Adam(quantizer.parameters(), 0.02)
        for _ in range(60):
            optimizer.zero_grad()
            (quantizer(x) - x).square().mean().backward()
            optimizer.step()
        with torch.no_grad():
            assert float((quantizer(x) - x).square().mean()) < 0.03, start


def test_data_without_negative_values_keeps_its_zero() -> None:
    quantizer = LearnedQuantizer(asymmetric(2))
    optimizer = torch.optim.SGD(quantizer.parameters(), 1.0)
    for seed in range(5):
        optimizer.zero_grad()
        (-quantizer(values(50, seed=seed).abs()).sum()).backward()
        assert quantizer.offset is not None and quantizer.offset.grad is not None
        optimizer.step()
    assert quantizer.offset is not None and quantizer.offset.item() == 0
    assert int(quantizer.grid()[1]) == 0


def test_the_offset_learns_where_there_are_negative_values() -> None:
    x = values(2000)
    quantizer = LearnedQuantizer(asymmetric(4))
    quantizer(x)
    assert quantizer.offset is not None
    with torch.no_grad():
        quantizer.offset.zero_()  # every negative value is cut
    optimizer = torch.optim.Adam([quantizer.offset], 0.05)
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        loss = (quantizer(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert quantizer.offset.item() < -1.0


def test_a_tied_scale_only_grows_at_the_first_batch() -> None:
    a, b = LearnedQuantizer(asymmetric(8)), LearnedQuantizer(asymmetric(8))
    b.scale = a.scale
    a(values(1000))
    small = float(a.scale.detach())
    b(10 * values(1000))
    assert float(a.scale.detach()) > 5 * small
    low = (0 - b.grid()[1]) * b.grid()[0]
    assert float(low.detach()) < -20


def test_half_precision_activations_round_in_float32() -> None:
    quantizer = LearnedQuantizer(asymmetric(8), torch.tensor(0.0173))
    x = values(100).half().requires_grad_()
    y = quantizer(x)
    want = torch.ops.fxcompress.fake_quantize(x.detach().float(), *quantizer.grid(), -1, 0, 255).half()
    assert torch.equal(y, want)
    y.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float16
    assert isinstance(quantizer.scale, nn.Parameter) and quantizer.scale.grad is not None


def test_parameter_groups_leave_scales_without_decay() -> None:
    x = values(4, 1, 8, 8)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3)).eval()
    program = fxc.prepare_qat(fxc.capture(model, (x,)), learn_scale=True, calibration=[x])
    rest, scales = program.parameter_groups(0.1, weight_decay=0.01, scale_lr=0.02)
    assert (rest["weight_decay"], scales["weight_decay"], scales["lr"]) == (0.01, 0.0, 0.02)
    assert len(rest["params"]) + len(scales["params"]) == len(list(program.gm.parameters()))
    assert scales["params"] and len({id(p) for p in scales["params"]}) == len(scales["params"])
    assert len(fxc.prepare_qat(fxc.capture(model, (x,))).parameter_groups(0.1)) == 1
