"""SmoothQuant: the published factors, exactness, and what it does to 8-bit errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import CalibrationError, PassError, UsageError
from fxcompress.testing import check_pass


class Block(nn.Module):
    """A norm whose outputs have outlier channels, as in large language models."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(32)
        self.q, self.k = nn.Linear(32, 48), nn.Linear(32, 48)
        self.last = nn.Linear(48, 8)
        with torch.no_grad():
            self.norm.weight[[3, 20]] = 60.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.last(self.q(y) * self.k(y).tanh())


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 10, 32, generator=generator) for _ in range(4)]


def published(x: Tensor, weight: Tensor) -> Tensor:
    """``max|X_j|^0.7 / max|W_j|^0.3``, channel by channel, in float64."""
    x, weight = x.detach().double().flatten(0, -2), weight.detach().double()
    peaks = [(float(x[:, j].abs().max()), float(weight[:, j].abs().max())) for j in range(x.shape[1])]
    return torch.tensor([given**0.7 / own**0.3 for given, own in peaks], dtype=torch.float64)


def test_factors_are_the_published_ones() -> None:
    model, data = Block().eval(), batches()
    context = fxc.Context(calibration=data)
    result = check_pass(fxc.SmoothQuant(alpha=0.7, samples=16), model, (data[0],), context=context)
    x = model.norm(torch.cat(data))
    last = published(model.q(x) * model.k(x).tanh(), model.last.weight)  # its channels are made by the rows of q
    q_weight = model.q.weight.detach().double() / last[:, None]
    wanted = published(x, torch.cat([q_weight, model.k.weight.detach().double()]))
    norm: Any = result.program.gm.get_submodule("norm")
    q: Any = result.program.gm.get_submodule("q")
    torch.testing.assert_close(norm.weight.double(), model.norm.weight.double() / wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(q.weight.double(), q_weight * wanted, rtol=1e-4, atol=1e-6)
    assert [c.partition(" through")[0] for c in result.changes] == ["smoothed q, k", "smoothed last"]
    assert "alpha 0.7" in result.changes[0] and result.error is not None and result.error < 1e-5


@pytest.mark.parametrize("after", [fxc.QuantizeDynamic(), fxc.QuantizeStatic(samples=16)])
def test_eight_bits_err_less_behind_it(after: Any) -> None:
    model, data = Block().eval(), batches()
    program, fresh = fxc.capture(model, (data[0],)), torch.randn(8, 10, 32)
    token = isinstance(after, fxc.QuantizeDynamic)
    errors = {}
    for name, passes in (
        ("plain", [after]),
        ("smooth", [fxc.SmoothQuant(samples=16), after]),
        ("auto", [fxc.SmoothQuant(alpha="auto", activations="token" if token else "tensor", samples=16), after]),
    ):
        found = fxc.Pipeline(passes).run(program, fxc.Context(calibration=data))
        out = found.program(fresh) if hasattr(found, "program") else found[0](fresh)
        errors[name] = float((out - model(fresh)).detach().square().mean())
    assert errors["smooth"] < 0.5 * errors["plain"] and errors["auto"] < 0.5 * errors["plain"]


@pytest.mark.onnxruntime
def test_gptq_between_it_and_dynamic_activations() -> None:
    """Three passes, one 8-bit program: weights err less than to the nearest, and the engine computes what is simulated."""
    model, data = Block().eval(), batches()
    smooth, dynamic = fxc.SmoothQuant(alpha="auto", activations="token", samples=16), fxc.QuantizeDynamic()
    program, errors = fxc.capture(model, (data[0],)), {}
    for method in ("rtn", "gptq"):
        rows = fxc.QuantizeWeights(bits=8, method=method, samples=16)  # type: ignore[arg-type]
        found = fxc.Pipeline([smooth, rows]).run(program, fxc.Context(calibration=data)).program
        errors[method] = sum(float((found(x) - model(x)).detach().square().sum()) for x in data)
    assert errors["gptq"] < errors["rtn"]
    passes = [smooth, fxc.QuantizeWeights(bits=8, method="gptq", samples=16), dynamic]
    engine = fxc.compile(model, (data[0],), passes=passes, calibration=data, target="onnxruntime", measure=False)
    assert engine.report.precision == "int8" and engine.report.parity["error"] < 1e-3


def test_auto_is_not_worse_than_any_fixed_alpha_on_its_own_measure() -> None:
    from fxcompress.quant.migration import Migration
    from fxcompress.quant.smoothing import ALPHAS, SampledRows, _error, best_alpha, smoothing_factors

    model, data = Block().eval(), batches()
    sample, weights = SampledRows(len(data)), [model.q.weight.detach(), model.k.weight.detach()]
    for x in data:
        sample.update(model.norm(x))
    migration = Migration(None, [], torch.arange(32), 32)  # type: ignore[arg-type]
    for granularity in ("tensor", "token"):
        alpha, _ = best_alpha(sample, weights, migration, granularity)  # type: ignore[arg-type]
        assert sample.peak is not None
        errors = {}
        for a in ALPHAS:
            s = smoothing_factors(sample.peak, torch.cat(weights), a, migration)
            smooth, wanted = [w * s for w in weights], [sample.rows @ w.t() for w in weights]
            errors[a] = _error(sample.rows / s, sample.peak / s, smooth, wanted, granularity)  # type: ignore[arg-type]
        assert alpha is not None and errors[alpha] == min(errors.values())


def test_a_few_huge_rows_are_not_all_that_counts() -> None:
    """As the first tokens of decoders: they alone would ask for another alpha."""
    from fxcompress.quant.migration import Migration
    from fxcompress.quant.smoothing import SampledRows, best_alpha

    torch.manual_seed(0)
    weight, migration = torch.randn(16, 64), Migration(None, [], torch.arange(64), 64)  # type: ignore[arg-type]
    rows = torch.randn(256, 64) * torch.linspace(0.1, 8.0, 64)
    huge = rows[252:].clone()
    huge[:, 3] = 3000.0

    def eight_bits(x: torch.Tensor) -> torch.Tensor:
        steps = x.abs().amax(1, keepdim=True) / 127
        return (x / steps).round() * steps

    def error(x: torch.Tensor) -> float:
        sample = SampledRows(1)
        sample.update(x)
        _, s = best_alpha(sample, [weight], migration, "token")
        return float((eight_bits(rows / s) @ eight_bits(weight * s).t() - rows @ weight.t()).square().sum())

    assert error(torch.cat([huge, rows[:252]])) < 2 * error(rows)


@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_a_large_reader_counts_as_much_as_a_small_one(granularity: Any) -> None:
    """As queries beside values: an 8-bit product errs as its size, so the measure does not change with the size."""
    from fxcompress.quant.smoothing import _error

    torch.manual_seed(0)
    rows, values, queries = torch.randn(64, 32) * torch.linspace(0.1, 8.0, 32), torch.randn(16, 32), torch.randn(8, 32)

    def error(*weights: torch.Tensor) -> float:
        return _error(rows, rows.abs().amax(0), weights, [rows @ w.t() for w in weights], granularity)

    both = (error(values) + error(queries)) / 2
    assert error(values, queries) == pytest.approx(both) and error(values, 1024.0 * queries) == pytest.approx(both)


def test_refusals_options_and_data() -> None:
    model, data = Block().eval(), batches()
    program = fxc.capture(model, (data[0],))
    result = fxc.SmoothQuant(ignore="last", samples=100)(program, fxc.Context(calibration=data))
    assert len(result.changes) == 1 and "calibrated on 16 samples, 100 asked for" in result.notes
    lone = fxc.capture(nn.Linear(4, 4), (torch.randn(2, 4),))
    refused = fxc.SmoothQuant()(lone, fxc.Context(calibration=[torch.randn(2, 4)]))
    assert not refused.changes and "input of the model" in refused.refusals[0].reason
    with pytest.raises(PassError, match="needs calibration data"):
        fxc.SmoothQuant()(program, fxc.Context())
    quantized = fxc.QuantizeDynamic()(program, fxc.Context()).program
    with pytest.raises(PassError, match="before quantization"):
        fxc.SmoothQuant()(quantized, fxc.Context(calibration=data))
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    with pytest.raises(CalibrationError, match="NaN or infinity") as caught:
        fxc.SmoothQuant(samples=16)(fxc.capture(model, (data[0],)), fxc.Context(calibration=data))
    assert caught.value.where == "q, k"
    for options in ({"alpha": 1.5}, {"alpha": "best"}, {"activations": "row"}, {"samples": 0}):
        with pytest.raises(UsageError):
            fxc.SmoothQuant(**options)  # type: ignore[arg-type]
