"""GPTQ against a plain float64 implementation of optimal brain quantization, and what it does with bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import ArtifactError, CalibrationError, PassError, UsageError
from fxcompress.layers import Fused
from fxcompress.layerwise.statistics import InputStatistics, not_finite_note
from fxcompress.quant.gptq import factorize, gptq
from fxcompress.quant.grids import row_grid
from fxcompress.quant.spec import QuantSpec
from tests.helpers.correlated import correlated


def grid_of(group: Tensor, bits: int, symmetric: bool) -> tuple[float, float, int, int]:
    """Scale, zero point and ends of the integers that cover a group, as the formula says."""
    least, most = min(float(group.min()), 0.0), max(float(group.max()), 0.0)
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if symmetric else (0, (1 << bits) - 1)
    if symmetric:
        return float(torch.tensor(max(-least / -low, most / high)).float()), 0.0, low, high
    scale = (most - least) / (high - low)
    return scale, float(round(low - least / scale)), low, high


def naive_gptq(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    size: int,
    symmetric: bool,
    act_order: bool,
    static: bool,
    damping: float,
) -> Tensor:
    """Row by row; the inverse Hessian of the columns still open is computed anew for every column."""
    count = weight.shape[1]
    hessian = hessian.double()
    order = hessian.diagonal().argsort(descending=True).tolist() if act_order else list(range(count))
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(count, dtype=torch.float64)
    result = torch.empty_like(weight, dtype=torch.float64)
    inverses = [torch.linalg.inv(damped[order[k:]][:, order[k:]]) for k in range(count)]
    for row in range(len(weight)):
        w = weight[row].double().clone()
        grids = {g: grid_of(weight[row, g * size : (g + 1) * size], bits, symmetric) for g in range(count // size)}
        for k, column in enumerate(order):
            group = column // size
            if not static and column % size == 0:
                grids[group] = grid_of(w[column : column + size], bits, symmetric)
            scale, zero, low, high = grids[group]
            new = (min(max(round(float(w[column]) / scale) + zero, low), high) - zero) * scale
            w[order[k:]] -= (w[column] - new) / inverses[k][0, 0] * inverses[k][0]
            result[row, column] = new
    return result


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("act_order", "static"), [(True, True), (False, True), (False, False)])
def test_gptq_is_optimal_brain_quantization(symmetric: bool, act_order: bool, static: bool) -> None:
    torch.manual_seed(1)
    weight, x = torch.randn(4, 160).double(), correlated(400, 160).double()  # 160 columns: more than one block
    hessian = x.T @ x
    spec = QuantSpec(3, signed=symmetric, symmetric=symmetric, axis=0, group_size=32)
    expected = naive_gptq(weight, hessian, 3, 32, symmetric, act_order, static, 0.01)
    grid = row_grid(weight, spec, "minmax")
    got, used = gptq(weight, factorize(hessian, 0.01, act_order), grid, None if static else "minmax")
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(used.round(got), got)  # the grid that comes back is the one it lies on


def loss(new: Tensor, weight: Tensor, x: Tensor) -> float:
    return float(((new - weight) @ x.T).square().mean())


def test_the_order_of_merit() -> None:
    """Error of the output on inputs that were not calibrated on."""
    torch.manual_seed(0)
    weight, x, fresh = torch.randn(64, 128), correlated(1024, 128, 1), correlated(1024, 128, 2)
    spec, hessian = QuantSpec(3, signed=True, symmetric=True, axis=0, group_size=32), x.T @ x
    grids: dict[str, Any] = {m: row_grid(weight, spec, m, hessian) for m in ("minmax", "mse", "output")}  # type: ignore[arg-type]
    plain = {name: loss(grid.round(weight), weight, fresh) for name, grid in grids.items()}
    solved = {
        name: loss(gptq(weight, factorize(hessian, 0.01, True), g)[0], weight, fresh) for name, g in grids.items()
    }
    in_order = loss(gptq(weight, factorize(hessian, 0.01, False), grids["output"])[0], weight, fresh)
    assert plain["output"] < plain["minmax"] and solved["output"] < 0.6 * plain["output"]
    assert solved["output"] < in_order


def test_output_ranges_are_the_best_of_all_factors() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(3, 64), correlated(500, 64)
    spec = QuantSpec(4, signed=False, symmetric=False, axis=0, group_size=16)
    got = row_grid(weight, spec, "output", x.T @ x).round(weight)
    for row in range(3):
        for start in range(0, 64, 16):
            part, inputs = weight[row, start : start + 16], x[:, start : start + 16]
            errors = []
            for i in range(31):
                scale, zero, low, high = grid_of(part * (1 - 0.02 * i), 4, False)
                new = (torch.clamp(torch.round(part / scale) + zero, low, high) - zero) * scale
                errors.append(float((inputs @ (new - part)).square().sum()))
            chosen = float((inputs @ (got[row, start : start + 16] - part)).square().sum())
            assert chosen <= min(errors) * (1 + 1e-3)


def test_a_singular_hessian_is_damped_more() -> None:
    x = torch.randn(3, 16).double()  # rank 3
    moments = x.T @ x
    moments[0, 0] -= 1e-3 * float(moments.diagonal().mean())  # rounding can make it indefinite
    curvature = factorize(moments, 1e-5, True)
    assert curvature.damping > 1e-5 and bool(torch.isfinite(curvature.factor).all())
    with pytest.raises(PassError) as caught:
        factorize(torch.full((4, 4), torch.nan), 0.01, True)
    assert caught.value.id == "FXC-PASS-060"


def test_inputs_that_are_always_zero_are_just_rounded() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(4, 32), correlated(100, 32)
    x[:, [3, 20]] = 0
    grid = row_grid(weight, QuantSpec(4, signed=True, symmetric=True, axis=0, group_size=16), "minmax")
    got, _ = gptq(weight, factorize(x.T @ x, 0.01, True), grid)
    assert torch.equal(got[:, [3, 20]], grid.round(weight)[:, [3, 20]])


def test_the_factor_may_take_the_place_of_the_moments() -> None:
    x = correlated(600, 300)  # more columns than are worked on at once
    moments = (x.T @ x).float()
    want = factorize(moments.clone(), 0.01, True).factor
    found = factorize(moments, 0.01, True, out=moments)
    assert found.factor.data_ptr() == moments.data_ptr() and torch.equal(moments, want.float())


# ------------------------------------------------------------------------------------------------ the pass
class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 64)
        self.first, self.second = nn.Linear(64, 96), nn.Linear(96, 64)
        self.head = nn.Linear(64, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(x + self.second(self.first(x).relu()))


def tokens(batches: int = 8, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 50, (4, 10), generator=generator) for _ in range(batches)]


def rounded_weights(program: fxc.Program) -> dict[str, Tensor]:
    return {n: m.weight.detach() for n, m in program.gm.named_modules() if isinstance(m, Fused)}


def quantize(model: nn.Module, data: Any, **options: Any) -> fxc.Result:
    program = fxc.capture(model, (tokens(1)[0],))
    settings = {"bits": 3, "group_size": 32, "method": "gptq", "samples": 32, **options}
    return fxc.QuantizeWeights(**settings)(program, fxc.Context(calibration=data))


def test_layers_are_solved_one_after_the_other() -> None:
    """The pass is the naive solver on the inputs that the rounded first layer gives."""
    model, data = Net().eval(), tokens()
    result = quantize(model, data, calibrator="minmax")
    got = rounded_weights(result.program)
    assert set(got) == {"first", "second"}
    with torch.no_grad():
        x = model.embed(torch.cat(data)).reshape(-1, 64).double()
        for name in ("first", "second"):
            layer = model.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            expected = naive_gptq(layer.weight.float(), x.T @ x, 3, 32, True, True, True, 0.01)
            share = float((got[name].double() - expected).abs().gt(1e-4).double().mean())
            assert share < 0.01, name  # ties may go the other way in float32
            x = (x @ got[name].double().t() + layer.bias.double()).relu()


def test_the_contract_holds_and_calibration_helps() -> None:
    model, data, fresh = Net().eval(), tokens(), tokens(seed=5)
    errors = {}
    for method in ("rtn", "gptq"):
        settings: Any = {"bits": 3, "group_size": 32, "method": method, "samples": 32}
        context = fxc.Context(calibration=data)
        result = fxc.check_pass(fxc.QuantizeWeights(**settings), model, (data[0],), context=context)
        with torch.no_grad():
            errors[method] = sum(float((result.program(t) - model(t)).square().sum()) for t in fresh)
    assert errors["gptq"] < 0.6 * errors["rtn"]


def test_weights_lie_on_their_grids() -> None:
    result = quantize(Net().eval(), tokens(), symmetric=False, bits=4)
    for module in result.program.gm.modules():
        if isinstance(module, Fused):
            assert module.weight_fake_quantize is not None
            torch.testing.assert_close(module.weight_fake_quantize(module.weight), module.weight, rtol=1e-5, atol=1e-6)


def test_a_tied_head_stays_float_unless_named() -> None:
    model, data = Net().eval(), tokens()
    before = model.embed.weight.detach().clone()
    result = quantize(model, data)
    assert any("head stays float: it shares its weight with embed" in note for note in result.notes)
    named = quantize(model, data, include=("head",))
    got = rounded_weights(named.program)
    assert list(got) == ["head"] and not torch.equal(got["head"], before)
    assert torch.equal(named.program.gm.get_submodule("embed").weight, before)  # type: ignore[arg-type]
    assert torch.equal(model.embed.weight, before) and any("a rounded weight of its own" in n for n in named.notes)


def test_sequential_or_not() -> None:
    model, data = Net().eval(), tokens()
    one, other = (rounded_weights(quantize(model, data, sequential=s).program) for s in (True, False))
    assert torch.equal(one["first"], other["first"]) and not torch.equal(one["second"], other["second"])


def test_a_weight_that_is_used_twice_is_rounded_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.mix = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.mix(self.mix(x).tanh())

    model, x = Twice().eval(), correlated(64, 32)
    for method in ("gptq", "awq+gptq"):
        pass_ = fxc.QuantizeWeights(bits=4, group_size=32, method=method, calibrator="minmax")  # type: ignore[arg-type]
        result = fxc.check_pass(pass_, model, (x,), context=fxc.Context(calibration=[x]))
        assert result.metrics["layers"] == 1
        with torch.no_grad():
            inputs = torch.cat([x, model.mix(x).tanh()]).double()
            expected = naive_gptq(model.mix.weight, inputs.T @ inputs, 4, 32, True, True, True, 0.01)
        got = rounded_weights(result.program)["mix"].double()
        assert float((got - expected).abs().gt(1e-4).double().mean()) < 0.01


def test_experts_that_are_never_reached_are_listed() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            gate = torch.stack([x[:, 0] > 0, x[:, 0] <= 0, x[:, 0] > 1e9], -1).to(x.dtype)
            return sum(expert(x * gate[:, i : i + 1]) for i, expert in enumerate(self.experts))  # type: ignore[return-value]

    x = torch.randn(40, 32)
    program = fxc.capture(Experts().eval(), (x,))
    result = fxc.QuantizeWeights(bits=4, group_size=32, method="gptq")(program, fxc.Context(calibration=[x]))
    assert [n for n in result.notes if "never reached" in n] == [
        "experts.2: calibration never reached it; rounded to nearest"
    ]
    assert len(rounded_weights(result.program)) == 3


def test_bad_data() -> None:
    model = Net().eval()
    with pytest.raises(CalibrationError, match="token 50"):
        quantize(model, [torch.full((1, 10), 50)])
    with pytest.raises(PassError, match="needs calibration data"):
        quantize(model, None)
    assert "calibrated on 4 samples, 32 asked for" in quantize(model, tokens(1)).notes
    with torch.no_grad():
        model.first.bias[0] = torch.inf
    with pytest.raises(CalibrationError, match="NaN or infinity") as caught:
        quantize(model, tokens())
    assert caught.value.where == "second" and "8 of 8" in str(caught.value)


def test_one_bad_input_among_many_is_left_out_and_noted() -> None:
    x = correlated(200, 4)
    statistics = InputStatistics(nn.Identity(), moments=True)
    for number, row in enumerate(x):
        statistics.update(row[None] / (0.0 if number == 7 else 1.0))
    kept = torch.cat([x[:7], x[8:]]).double()
    assert statistics.total is not None
    torch.testing.assert_close(statistics.total[0], kept.T @ kept, rtol=1e-4, atol=1e-4)
    assert not_finite_note(statistics.skipped, statistics.seen, "a, b") == [
        "a, b: 1 of 200 inputs held NaN or infinity: left out"
    ]
    with pytest.raises(CalibrationError, match="3 of 200") as caught:
        not_finite_note(3, 200, "a, b")
    assert (caught.value.id, caught.value.where) == ("FXC-DATA-209", "a, b")


def test_what_is_rounded_already_stays() -> None:
    model, data = Net().eval(), tokens()
    once = quantize(model, data, include=("first",)).program
    again = fxc.QuantizeWeights(bits=4, group_size=32, method="gptq")(once, fxc.Context(calibration=data))
    assert "first is rounded already and stays as it is" in again.notes and again.metrics["layers"] == 1
    before, after = rounded_weights(once), rounded_weights(again.program)
    assert set(after) == {"first", "second"} and torch.equal(before["first"], after["first"])
    third = fxc.QuantizeWeights(bits=2, group_size=32)(again.program, fxc.Context())
    assert third.metrics["layers"] == 0 and not third.changes


@pytest.mark.parametrize("method", ["gptq", "awq+gptq"])
def test_weights_in_place(method: str) -> None:
    """The same result, in the tensors of the input; the embedding that the head shares stays."""
    model, data = Net().eval(), tokens()
    embedding = model.embed.weight.detach().clone()
    wanted = rounded_weights(quantize(model, data, method=method, include=("first", "second", "head")).program)
    places = {name: module.weight.data_ptr() for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    result = quantize(model, data, method=method, include=("first", "second", "head"), in_place=True)
    for name, weight in rounded_weights(result.program).items():
        torch.testing.assert_close(weight, wanted[name])
        assert (weight.data_ptr() == places[name]) == (name != "head")
    assert torch.equal(model.embed.weight, embedding)
    assert torch.equal(model.first.weight, rounded_weights(result.program)["first"])


def test_options() -> None:
    for options in (
        {"method": "best"}, {"calibrator": "output"}, {"damping": 0.0}, {"samples": 0}, {"skip_tokens": -1},
        {"method": "gptq", "static_groups": False},
    ):  # fmt: skip
        with pytest.raises(UsageError):
            fxc.QuantizeWeights(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["gptq", "awq+gptq"])
def test_an_interrupted_run_goes_on(method: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fxcompress.quant.layer_rounding as module

    model, data, options = Net().eval(), tokens(), {"method": method, "checkpoint": str(tmp_path / "run")}
    whole = rounded_weights(quantize(model, data, method=method).program)
    real = module.gptq
    seen: list[int] = []
    failing_at = 96

    def failing(rows: Tensor, *args: Any) -> Any:
        seen.append(rows.shape[1])
        if rows.shape[1] == failing_at:
            raise RuntimeError("stopped")
        return real(rows, *args)

    monkeypatch.setattr(module, "gptq", failing)
    with pytest.raises(PassError, match="stopped"):
        quantize(model, data, **options)
    seen.clear()
    failing_at = 0
    resumed = rounded_weights(quantize(model, data, **options).program)
    assert seen == [96]  # the first layer was read
    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight)
    seen.clear()
    quantize(model, data, **{**options, "damping": 0.02})
    assert seen == [64, 96]  # other options: another run
    monkeypatch.setattr(module, "gptq", real)
    for file in (tmp_path / "run").iterdir():
        file.write_bytes(b"damaged")
    with pytest.raises(ArtifactError):
        quantize(model, data, **options)
