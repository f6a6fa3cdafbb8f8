"""Ranges of least squared error while training: against an exhaustive search, and in what they are for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.qat.ranges import fitted_range, least_error_range
from fxcompress.quant.spec import QuantSpec, solve


def error(rows: Tensor, low: Tensor, high: Tensor, spec: QuantSpec) -> Tensor:
    scale, zero = solve(low, high, spec)
    q = torch.clamp(torch.round(rows.double() / scale[:, None]) + zero[:, None], spec.qmin, spec.qmax)
    return ((q - zero[:, None]) * scale[:, None] - rows.double()).square().sum(1)


def exhaustive(rows: Tensor, spec: QuantSpec) -> Tensor:
    """Least error of every row over 40 x 40 ranges (40 magnitudes where the grid is symmetric)."""
    low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    shares = torch.linspace(1, 0.05, 40)
    pairs = [(a, a) for a in shares] if spec.symmetric else [(a, b) for a in shares for b in shares]
    return torch.stack([error(rows, a * low, b * high, spec) for a, b in pairs]).amin(0)


SHAPES: dict[str, Any] = {
    "normal": lambda: torch.randn(4, 800),
    "Laplace": lambda: torch.distributions.Laplace(0.0, 1.0).sample((4, 800)),
    "uniform": lambda: torch.rand(4, 800) - 0.5,
    "relu": lambda: torch.randn(4, 800).relu(),
    "shifted": lambda: torch.randn(4, 800) + 1.5,
    "outlier": lambda: torch.cat([torch.randn(4, 800), torch.full((4, 1), 30.0)], 1),
}


def case(bits: int, name: str, symmetric: bool) -> tuple[Tensor, QuantSpec]:
    """Rows and their grid."""
    torch.manual_seed(0)
    return SHAPES[name](), QuantSpec(bits, signed=symmetric, symmetric=symmetric, axis=0)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_nearly_the_least_error(bits: int, name: str, symmetric: bool) -> None:
    rows, spec = case(bits, name, symmetric)
    low, high = least_error_range(rows, spec)
    got = error(rows, low, high, spec)
    assert bool((got <= error(rows, rows.amin(1), rows.amax(1), spec) * (1 + 1e-5)).all())
    assert float((got / exhaustive(rows, spec)).mean()) < 1.15
    one = least_error_range(rows, QuantSpec(bits, signed=symmetric, symmetric=symmetric))
    assert one[0].shape == one[1].shape == ()


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_range_is_followed(bits: int, name: str, symmetric: bool) -> None:
    """Values that shrink to a half in 100 steps: the range that goes with them is as good as one that is searched anew."""
    rows, spec = case(bits, name, symmetric)
    low, high = least_error_range(rows, spec)
    for _ in range(100):
        rows = rows * 0.5**0.01
        low, high = fitted_range(rows, spec, low, high)
    fresh = error(rows, *least_error_range(rows, spec), spec)
    assert float((error(rows, low, high, spec) / fresh).mean()) < 1.15


def test_a_range_that_is_far_too_wide_is_searched_anew() -> None:
    spec = QuantSpec(2, signed=True, symmetric=True)
    x = torch.randn(4, 800)
    ends = fitted_range(x, spec, torch.tensor(-1e4), torch.tensor(1e4))
    assert ends == least_error_range(x, spec) and float(ends[1]) < 5
    dead = torch.cat([x, torch.zeros(1, 800)])
    by_row = QuantSpec(2, signed=True, symmetric=True, axis=0)
    low, high = fitted_range(dead, by_row, *least_error_range(dead, by_row))
    assert bool(torch.isfinite(low).all() and torch.isfinite(high).all())


@pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
def test_constant_values(value: float) -> None:
    spec = QuantSpec(2, signed=True, symmetric=True, axis=0)
    low, high = least_error_range(torch.full((3, 5), value), spec)
    assert float(error(torch.full((3, 5), value), low, high, spec).max()) < 1e-10


def test_two_bits_leave_not_nearly_all_weights_zero() -> None:
    """With a grid over the extremes only what is beyond half of the largest weight would count."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 4))
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.weight)  # type: ignore[arg-type]
    x = torch.randn(64, 256)
    program = fxc.prepare_qat(fxc.capture(model, (x,)), weight_bits=2, activation_bits=2)
    program.gm.train()
    program(x)
    program.gm.eval()
    shares = [
        float((layer.weight_fake_quantize(layer.weight) != 0).float().mean())  # type: ignore[operator, union-attr]
        for _, layer in program.convert().layers()
        if getattr(layer, "weight_fake_quantize", None) is not None
    ]
    assert len(shares) == 2 and min(shares) > 0.3
