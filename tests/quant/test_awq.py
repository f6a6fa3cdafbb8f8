"""AWQ: the published search done with the inputs themselves, folding behind rounded layers, and what it brings."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.layers import Fused
from fxcompress.quant.awq import search_factors
from fxcompress.quant.grids import row_grid
from fxcompress.quant.hqq import hqq_grid
from fxcompress.quant.migration import Migration
from fxcompress.quant.spec import QuantSpec
from fxcompress.testing import check_pass
from tests.helpers.correlated import correlated


def rounded(weight: Tensor, size: int) -> Tensor:
    """4 bits, symmetric, extremes; float64, group by group."""
    result = torch.empty_like(weight)
    for start in range(0, weight.shape[1], size):
        part = weight[:, start : start + size]
        low, high = part.amin(1, keepdim=True).clamp(max=0), part.amax(1, keepdim=True).clamp(min=0)
        scale = torch.maximum(low / -8, high / 7)
        result[:, start : start + size] = torch.clamp(torch.round(part / scale), -8, 7) * scale
    return result


def test_the_factors_are_the_best_of_the_published_family() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(24, 64).double(), correlated(300, 64).double()
    x[:, [5, 40]] *= 30
    spec = QuantSpec(4, signed=True, symmetric=True, axis=0, group_size=32)
    alone = Migration(None, [], torch.arange(64), 64)  # type: ignore[arg-type]
    factors = search_factors(weight.float(), x.T @ x, x.abs().mean(0), spec, alone).double()

    def error(s: Tensor) -> float:
        return float(((x / s) @ rounded(weight * s, 32).T - x @ weight.T).square().sum())

    size = x.abs().mean(0)
    groups = weight.abs().unflatten(1, (2, 32))
    share = (groups / groups.amax(-1, keepdim=True)).flatten(1).mean(0)
    errors = []
    for step in range(20):
        alpha = step / 20
        for s in (size**alpha, size**alpha / share ** (1 - alpha)):
            errors.append(error(s / (s.max() * s.min()).sqrt()))
    assert error(factors) <= min(errors) * 1.01 < 0.7 * error(torch.ones(64).double())


def test_shared_factors_are_shared() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(24, 32), correlated(300, 32)
    spec = QuantSpec(4, signed=True, symmetric=True, axis=0, group_size=32)
    shared = Migration(None, [], torch.arange(32) % 8, 8)  # type: ignore[arg-type]
    assert search_factors(weight, x.T @ x, x.abs().mean(0), spec, shared).shape == (8,)


class Block(nn.Module):
    """An attention block and a gated MLP with outlier channels behind the norms."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(40, 32)
        self.norm1, self.norm2 = nn.RMSNorm(32), nn.LayerNorm(32)
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16)
        self.o, self.gate, self.up, self.down = (
            nn.Linear(32, 32),
            nn.Linear(32, 64),
            nn.Linear(32, 64),
            nn.Linear(64, 32),
        )
        with torch.no_grad():
            self.norm1.weight[[3, 17]] = 30.0
            self.norm2.weight[[4, 21]] = 30.0

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        batch, count, _ = x.shape
        y = self.norm1(x)
        q = self.q(y).view(batch, count, 4, 8).transpose(1, 2)
        k, v = (m(y).view(batch, count, 2, 8).transpose(1, 2).repeat_interleave(2, 1) for m in (self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y = self.norm2(x)
        result: Tensor = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return result


def tokens(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 40, (4, 12), generator=generator) for _ in range(8)]


def run(method: str, **options: Any) -> fxc.Result:
    model, data = Block().eval(), tokens()
    pass_ = fxc.QuantizeWeights(bits=4, group_size=32, samples=32, method=method, **options)  # type: ignore[arg-type]
    return check_pass(pass_, model, (data[0],), context=fxc.Context(calibration=data))


@pytest.mark.parametrize("sequential", [True, False])
def test_layers_that_were_rounded_first_stay_on_their_grids(sequential: bool) -> None:
    """v and up are rounded before the inputs of o and down are scaled through their rows."""
    result = run("awq", sequential=sequential)
    fused = {n: m for n, m in result.program.gm.named_modules() if isinstance(m, Fused)}
    assert set(fused) == {"q", "k", "v", "o", "gate", "up", "down"}
    for name, module in fused.items():
        assert module.weight_fake_quantize is not None
        on_grid = module.weight_fake_quantize(module.weight)
        torch.testing.assert_close(on_grid, module.weight, rtol=1e-4, atol=1e-5, msg=name)
    plain = Block()
    assert not torch.equal(result.program.gm.get_submodule("norm1").weight, plain.norm1.weight)  # type: ignore[arg-type]


def test_the_order_of_merit_on_a_model() -> None:
    model, fresh, errors = Block().eval(), tokens(9), {}
    for name, method, options in (
        ("rtn", "rtn", {"calibrator": "minmax"}), ("awq", "awq", {}), ("gptq", "gptq", {}), ("both", "awq+gptq", {}),
    ):  # fmt: skip
        program = run(method, **options).program
        with torch.no_grad():
            errors[name] = sum(float((program(t) - model(t)).square().sum()) for t in fresh)
    assert errors["awq"] < 0.7 * errors["rtn"] and errors["gptq"] < 0.7 * errors["rtn"]
    assert errors["both"] < 1.1 * min(errors["awq"], errors["gptq"])


def test_channels_that_cannot_be_scaled_are_noted() -> None:
    model, x = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 8)).eval(), correlated(64, 32)
    pass_ = fxc.QuantizeWeights(bits=4, group_size=32, method="awq", samples=64)
    result = pass_(fxc.capture(model, (x,)), fxc.Context(calibration=[x]))
    assert [n.partition(": ")[0] for n in result.notes if "channels not scaled" in n] == ["0", "2"]


def naive_hqq(
    values: list[float], scale: float, zero: float, low: int, high: int, symmetric: bool
) -> tuple[float, float]:
    """One group; the paper's two steps (e: shrinkage, grid: mean and least squares) for 20 rounds, the best one."""

    def error(scale: float, zero: float) -> float:
        return sum(abs((min(max(round(v / scale) + zero, low), high) - zero) * scale - v) ** 0.7 for v in values)

    best, beta = (error(scale, zero), scale, zero), 10.0
    for _ in range(20):
        steps = [min(max(round(v / scale) + zero, low), high) for v in values]
        target = []
        for v, q in zip(values, steps, strict=True):
            e = v / scale - (q - zero)
            shrunk = max(abs(e) - max(abs(e), 1e-6) ** -0.3 / beta, 0.0)
            target.append(v - math.copysign(shrunk, e) * scale)
        if not symmetric:
            zero = min(
                max(round(sum(q - t / scale for q, t in zip(steps, target, strict=True)) / len(values)), low), high
            )
        ints = [q - zero for q in steps]
        if any(ints):
            fitted = sum(i * t for i, t in zip(ints, target, strict=True)) / sum(i * i for i in ints)
            scale = fitted if fitted > 0 else scale
        best = min(best, (error(scale, zero), scale, zero))
        beta *= 1.01
    return best[1], best[2]


@pytest.mark.parametrize("symmetric", [True, False])
def test_hqq_is_the_published_iteration(symmetric: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 64) * torch.rand(6, 64).pow(2)
    spec = QuantSpec(3, signed=symmetric, symmetric=symmetric, axis=0, group_size=32)
    start, got = row_grid(weight, spec, "mse"), hqq_grid(weight, spec)
    for row in range(6):
        for g in range(2):
            values = weight[row, 32 * g : 32 * g + 32].double().tolist()
            first = float(start.scale[row, g]), float(start.zero_point[row, g])
            scale, zero = naive_hqq(values, *first, spec.qmin, spec.qmax, symmetric)
            assert float(got.scale[row, g]) == pytest.approx(scale, rel=1e-4)
            assert float(got.zero_point[row, g]) == zero


@pytest.mark.parametrize("symmetric", [True, False])
def test_hqq_lowers_its_own_error(symmetric: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 128) * torch.rand(16, 128).pow(2)
    spec = QuantSpec(3, signed=symmetric, symmetric=symmetric, axis=0, group_size=64)
    costs = [
        float((grid.round(weight) - weight).abs().pow(0.7).sum())
        for grid in (row_grid(weight, spec, "mse"), hqq_grid(weight, spec))
    ]
    assert costs[1] < 0.995 * costs[0]
    grid = hqq_grid(weight, spec)
    assert torch.equal(grid.zero_point, grid.zero_point.round()) and bool((grid.scale > 0).all())
    assert bool(((grid.zero_point >= spec.qmin) & (grid.zero_point <= spec.qmax)).all())
