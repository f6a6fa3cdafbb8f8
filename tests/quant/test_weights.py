import numpy as np
import pytest
import torch

from fxcompress.errors import CalibrationError, UsageError
from fxcompress.quant import weights
from fxcompress.quant.spec import QuantSpec, quant_params
from fxcompress.quant.weights import weight_range

SPECS = [
    QuantSpec(8, True, True, axis=0),
    QuantSpec(8, True, True, axis=0, qmin=-64, qmax=63),
    QuantSpec(8, False, False, axis=0),
    QuantSpec(4, True, True, axis=0),
    QuantSpec(2, True, False, axis=0),
]


def errors(w: torch.Tensor, low: torch.Tensor, high: torch.Tensor, spec: QuantSpec) -> np.ndarray:
    """Sum of squared errors per row, textbook formula in float64."""
    scale, zero = (v.double().numpy()[:, None] for v in quant_params(low, high, spec))
    rows = w.double().numpy().reshape(len(w), -1)
    q = np.clip(np.round(rows / scale) + zero, spec.qmin, spec.qmax)
    return (((q - zero) * scale - rows) ** 2).sum(1)


def brute_force(w: torch.Tensor, spec: QuantSpec) -> np.ndarray:
    low, high = w.flatten(1).amin(1), w.flatten(1).amax(1)
    return np.min([errors(w, low * f, high * f, spec) for f in np.linspace(1, 0.2, 101, dtype=np.float32)], axis=0)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("shape", [(33, 1, 3, 3), (12, 21, 3, 3), (16, 256), (3, 1), (2, 70_000)], ids=str)
def test_mse_is_the_best_of_all_factors(shape, spec):
    torch.manual_seed(0)
    w = torch.distributions.StudentT(5.0).sample(shape) * torch.logspace(-3, 3, shape[0]).reshape(
        -1, *[1] * (len(shape) - 1)
    )
    low, high = weight_range(w, spec, "mse")
    found, best = errors(w, low, high, spec), brute_force(w, spec)
    # Long channels are searched in two steps: a neighbouring local minimum may be taken.
    allowed = 1.0001 if w[0].numel() <= 256 else 1.02
    assert (found <= allowed * best + 1e-30).all()
    assert (found <= errors(w, *weight_range(w, spec, "minmax"), spec) * 1.0001).all()


def test_chunks_and_early_stops_change_nothing(monkeypatch):
    torch.manual_seed(0)
    w = torch.randn(40, 37, 5)
    expected = {spec: weight_range(w, spec, "mse") for spec in SPECS}
    monkeypatch.setattr(weights, "_CHUNK", 64)
    for spec, ends in expected.items():
        for found, end in zip(weight_range(w, spec, "mse"), ends, strict=True):
            torch.testing.assert_close(found, end, rtol=0, atol=0)


@pytest.mark.parametrize(("size", "rare", "chunk"), [(200, 2, 1 << 17), (600, 2, 1 << 17), (2000, 10, 64)])
def test_a_hump_before_the_best_factor_is_crossed(size, rare, chunk, monkeypatch):
    # 3.2 steps at factor 1, an integer number at 0.8, and half steps on the way.
    monkeypatch.setattr(weights, "_CHUNK", chunk)
    w = torch.full((1, size), 3.2 / 7)
    w[0, :rare] = 1.0
    low, high = weight_range(w, SPECS[3], "mse")
    assert float(high) == pytest.approx(0.8, abs=0.01)
    assert errors(w, low, high, SPECS[3]) <= brute_force(w, SPECS[3]) * 1.0001


@pytest.mark.parametrize("axis", [0, 1, -1, None])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_minmax_per_axis_and_dtype(axis, dtype):
    w = torch.randn(4, 6, 3).to(dtype)
    low, high = weight_range(w, QuantSpec(8, True, True, axis=axis), "minmax")
    rows = w.double().numpy().reshape(1, -1) if axis is None else np.moveaxis(w.double().numpy(), axis, 0)
    rows = rows.reshape(len(rows), -1)
    shape = () if axis is None else (w.shape[axis],)
    assert low.shape == high.shape == shape and low.dtype == torch.float32
    np.testing.assert_array_equal(low.numpy().reshape(-1), rows.min(1).astype(np.float32))
    np.testing.assert_array_equal(high.numpy().reshape(-1), rows.max(1).astype(np.float32))


@pytest.mark.parametrize("axis", [0, 1, None])
def test_memory_order_does_not_matter(axis):
    torch.manual_seed(0)
    w = torch.randn(8, 6, 7, 7)
    spec = QuantSpec(8, True, True, axis=axis)
    expected = weight_range(w, spec, "mse")
    for layout in (
        w.contiguous(memory_format=torch.channels_last),
        w.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    ):
        for found, end in zip(weight_range(layout, spec, "mse"), expected, strict=True):
            torch.testing.assert_close(found, end)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_zero_constant_and_extreme_channels(spec):
    w = torch.randn(6, 300)
    w[0], w[1], w[2], w[3], w[4] = 0.0, 0.5, -2.0, w[3] * 1e37, w[4] * 1e-42
    low, high = weight_range(w, spec, "mse")
    assert bool((torch.isfinite(low) & torch.isfinite(high) & (low <= high)).all())
    assert low[0] == high[0] == 0
    found, plain = errors(w, low, high, spec), errors(w, *weight_range(w, spec, "minmax"), spec)
    assert (found <= plain * 1.0001).all()


def test_an_axis_of_single_values():
    low, high = weight_range(torch.tensor([1.0, -2.0]), SPECS[0], "mse")
    assert errors(torch.tensor([1.0, -2.0]), low, high, SPECS[0]).max() < 1e-12


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e300])
@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_broken_weights_are_refused_with_the_channel(bad, method):
    w = torch.zeros(5, 4, dtype=torch.float64)
    w[3, 1] = bad
    with pytest.raises(CalibrationError, match="channels 3"):
        weight_range(w, SPECS[0], method)


def test_wrong_arguments_are_refused():
    with pytest.raises(UsageError, match="unknown weight range method 'best'"):
        weight_range(torch.ones(2, 2), SPECS[0], "best")
    with pytest.raises(UsageError, match="no axis 2"):
        weight_range(torch.ones(2, 2), QuantSpec(8, True, True, axis=2), "mse")
    with pytest.raises(CalibrationError, match="FXC-DATA-041"):
        weight_range(torch.ones(0, 2), SPECS[0], "mse")
    with pytest.raises(CalibrationError, match="int64"):
        weight_range(torch.ones(2, 2).long(), SPECS[0], "mse")
