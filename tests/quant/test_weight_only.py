"""QuantizeWeights and QuantizeDynamic: grids per group and per token, against formulas written out here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import PassError, UsageError
from fxcompress.layers import Fused
from fxcompress.ops import fake_quantize
from fxcompress.quant.fake_quantize import DynamicFakeQuantize, FakeQuantize
from fxcompress.quant.spec import QuantSpec


def network(features: int = 256) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(features, 64), nn.GELU(), nn.Linear(64, 8)).eval()


def weights_of(program: fxc.Program) -> dict[str, Tensor]:
    """Layer -> its weight on the grid."""
    found = {}
    for name, module in program.gm.named_modules():
        if isinstance(module, Fused) and module.weight_fake_quantize is not None:
            found[name] = module.weight_fake_quantize(module.weight).detach()
    return found


def rounded(weight: Tensor, group: int, low: int, high: int, symmetric: bool) -> Tensor:
    """Min-max rounding of every group, in float64, as the formula says."""
    result = torch.empty_like(weight, dtype=torch.float64)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], group):
            part = weight[row, start : start + group].double()
            least, most = min(float(part.min()), 0.0), max(float(part.max()), 0.0)
            if symmetric:
                scale, zero = max(-least / -low, most / high), 0
            else:
                scale = (most - least) / (high - low)
                zero = round(low - least / scale)
            q = torch.clamp(torch.round(part / scale) + zero, low, high)
            result[row, start : start + group] = (q - zero) * scale
    return result


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 64])
def test_groups_are_rounded_as_the_formula_says(bits: int, symmetric: bool, group: int) -> None:
    model = network()
    pass_ = fxc.QuantizeWeights(bits=bits, group_size=group, symmetric=symmetric, calibrator="minmax")
    result = fxc.check_pass(pass_, model, (torch.randn(3, 256),))
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if symmetric else (0, (1 << bits) - 1)
    found = weights_of(result.program)
    assert set(found) == {"0", "2"}
    for name, weight in found.items():
        original = model.get_submodule(name).weight
        assert isinstance(original, Tensor)
        expected = rounded(original.detach(), group, low, high, symmetric)
        assert torch.allclose(weight.double(), expected, atol=1e-6), name


def test_mse_never_errs_more_than_minmax() -> None:
    model, x = network(), (torch.randn(3, 256),)
    errors = {}
    for calibrator in ("minmax", "mse"):
        pass_ = fxc.QuantizeWeights(bits=3, group_size=64, calibrator=calibrator)
        found = weights_of(fxc.check_pass(pass_, model, x).program)
        errors[calibrator] = sum(
            float((w - model.get_submodule(n).weight).detach().square().sum()) for n, w in found.items()
        )
    assert errors["mse"] < errors["minmax"]


def test_smaller_groups_err_less() -> None:
    model, x = network(), (torch.randn(3, 256),)
    errors = [fxc.check_pass(fxc.QuantizeWeights(bits=4, group_size=g, fit="adjust"), model, x).error for g in (-1, 16)]
    assert errors[0] is not None and errors[1] is not None and errors[1] < errors[0]


def test_a_group_size_that_does_not_divide() -> None:
    program = fxc.capture(network(200), (torch.randn(2, 200),))
    with pytest.raises(PassError, match="200 % 128 = 72") as caught:
        fxc.QuantizeWeights()(program, fxc.Context())
    assert caught.value.where == "0"
    left = fxc.QuantizeWeights(fit="ignore", group_size=64)(program, fxc.Context())
    assert list(weights_of(left.program)) == ["2"] and "0 stays float: 200 input features" in left.notes[0]
    fitted = fxc.QuantizeWeights(fit="adjust", group_size=64)(program, fxc.Context())
    assert "quantized 0 to 4 bits, groups of 200" in fitted.changes  # 200 = 8 * 25: no multiple of 16 divides it


def test_transposed_and_functional_weights() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.w = nn.Parameter(torch.randn(64, 32))  # used as x @ w, like GPT-2's Conv1D
            self.b = nn.Parameter(torch.randn(32))
            self.v = nn.Parameter(torch.randn(16, 32))

        def forward(self, x: Tensor) -> Tensor:
            y = torch.addmm(self.b, x.reshape(-1, 64), self.w).reshape(x.shape[0], 32)
            return nn.functional.linear(y.relu(), self.v)

    model, x = Functional().eval(), torch.randn(4, 64)
    result = fxc.check_pass(fxc.QuantizeWeights(bits=4, group_size=32, calibrator="minmax"), model, (x,))
    w = rounded(model.w.detach().t(), 32, -8, 7, True).t()
    v = rounded(model.v.detach(), 32, -8, 7, True)
    expected = ((x.double() @ w + model.b.double()).relu() @ v.t()).detach()
    got = result.program(x)
    assert torch.allclose(got.double(), expected, rtol=1e-4, atol=1e-4)


def test_options_out_of_range() -> None:
    for options in ({"bits": 1}, {"bits": 9}, {"group_size": 0}, {"group_size": 8}, {"fit": "guess"}):
        with pytest.raises(UsageError):
            fxc.QuantizeWeights(**options)  # type: ignore[arg-type]
    for options in ({"weight_bits": 3}, {"calibrator": "entropy"}):
        with pytest.raises(UsageError):
            fxc.QuantizeDynamic(**options)  # type: ignore[arg-type]
    with pytest.raises(PassError, match="no linear layer"):
        fxc.QuantizeWeights()(fxc.capture(nn.ReLU(), (torch.randn(2, 3),)), fxc.Context())


def test_names_that_are_left_out_are_noted() -> None:
    program = fxc.capture(network(), (torch.randn(2, 256),))
    result = fxc.QuantizeWeights(group_size=64, ignore="0")(program, fxc.Context())
    assert result.notes == ["0 stays float: ignored"] and result.changes == ["quantized 2 to 4 bits, groups of 64"]
    result = fxc.QuantizeWeights(group_size=64, include=("0",))(program, fxc.Context())
    assert result.notes == ["2 stays float: not included"]


def test_a_non_finite_weight_is_refused() -> None:
    model = network()
    with torch.no_grad():
        model.get_submodule("0").weight[0, 0] = torch.nan  # type: ignore[index]
    program = fxc.capture(model, (torch.randn(2, 256),))
    for pass_ in (fxc.QuantizeWeights(), fxc.QuantizeDynamic()):
        with pytest.raises(PassError, match="NaN or infinity"):
            pass_(program, fxc.Context())


# ------------------------------------------------------------------------------------------------ dynamic
@pytest.mark.parametrize("bits", [4, 8])
def test_every_token_has_its_own_scale(bits: int) -> None:
    model, x = network(), torch.randn(2, 5, 256) * torch.logspace(-3, 3, 5)[:, None]
    result = fxc.check_pass(fxc.QuantizeDynamic(weight_bits=bits, calibrator="minmax"), model, (x,))
    half = (1 << bits - 1) - 1

    def token(v: Tensor) -> Tensor:
        scale = v.abs().amax(-1, keepdim=True) / 127
        return torch.round(v / scale) * scale

    def product(v: Tensor, layer: Any) -> Tensor:
        w = layer.weight.detach().double()
        scale = w.abs().amax(1, keepdim=True) / half
        return token(v) @ (torch.round(w / scale) * scale).t() + layer.bias.detach().double()

    y = product(x.double(), model.get_submodule("0"))
    expected = product(nn.functional.gelu(y), model.get_submodule("2"))
    error = float((result.program(x).double() - expected).norm() / expected.norm())
    assert error < 2e-3  # a few values round the other way in float32


def test_values_read_twice_are_quantized_once() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(32, 16), nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) * self.k(x) + x[..., :16]

    result = fxc.check_pass(fxc.QuantizeDynamic(), Two().eval(), (torch.randn(2, 32),))
    assert sum(isinstance(m, DynamicFakeQuantize) for m in result.program.gm.modules()) == 1


def test_a_token_of_zeros_stays_zero() -> None:
    grid = DynamicFakeQuantize(QuantSpec(8, signed=True, symmetric=True, qmin=-127))
    x = torch.randn(3, 8)
    x[1] = 0
    y = grid(x)
    assert bool((y[1] == 0).all()) and not bool(y.isnan().any())
    assert torch.allclose(y[0], x[0], atol=float(x[0].abs().max()) / 254 + 1e-6)


# ------------------------------------------------------------------------------------------------ 16-bit floats
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_in_float32(dtype: torch.dtype) -> None:
    """300 / 0.05 = 6000 steps: a bfloat16 quotient would only know multiples of 32."""
    x = (torch.randn(1000) * 100).to(dtype)
    scale, zero = torch.tensor(0.05), torch.tensor(3, dtype=torch.int32)
    got = fake_quantize(x, scale, zero, -1, -32768, 32767)
    q = torch.clamp(torch.round(x.float() / scale) + zero, -32768, 32767)
    assert got.dtype == dtype and torch.equal(got, ((q - zero) * scale).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_model_keeps_its_dtype_and_its_scales(dtype: torch.dtype) -> None:
    model, x = network().to(dtype), torch.randn(3, 256).to(dtype)
    for pass_ in (fxc.QuantizeWeights(group_size=64), fxc.QuantizeDynamic()):
        result = fxc.check_pass(pass_, model, (x,))
        assert result.program(x).dtype == dtype
        for module in result.program.gm.modules():
            if isinstance(module, FakeQuantize):
                assert torch.equal(module.scale, module.scale.to(dtype).float())
