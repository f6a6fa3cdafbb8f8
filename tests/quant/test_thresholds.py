"""The three ways to cut a histogram against loops over the raw data or over single bins."""

import itertools

import numpy as np
import pytest
import torch

from fxcompress.quant.histogram import Histogram
from fxcompress.quant.spec import QuantSpec, quant_params
from fxcompress.quant.thresholds import QuantizationError, _Divergence, entropy_range, mse_range, percentile_range

INT8, UINT8 = QuantSpec(8, True, True), QuantSpec(8, False, False)
NARROW, INT4 = QuantSpec(8, True, True, qmin=-64, qmax=63), QuantSpec(4, True, False)
RANDOM = np.random.default_rng(7)
DATA = {
    "normal": RANDOM.normal(size=40_000),
    "relu": RANDOM.normal(size=40_000).clip(min=0),
    "laplace": RANDOM.laplace(size=40_000) + 0.3,
    "heavy": RANDOM.standard_t(3, size=40_000),
    "gelu": (lambda x: x * 0.5 * (1 + np.tanh(0.8 * (x + 0.045 * x**3))))(RANDOM.normal(size=40_000) * 2),
    "negative": -RANDOM.gamma(1.5, size=40_000),
    "relu6": (RANDOM.normal(size=40_000) * 4).clip(0, 6),
}
DATA = {name: values.astype(np.float32) for name, values in DATA.items()}


def histogram_of(data: np.ndarray, bins: int = 2048) -> Histogram:
    histogram = Histogram(bins)
    histogram.add(torch.from_numpy(data))
    return histogram


def true_mse(data: np.ndarray, low: float, high: float, spec: QuantSpec) -> float:
    """Mean squared error on the data itself, textbook formula in float64."""
    scale, zero = (float(v) for v in quant_params(torch.tensor(low), torch.tensor(high), spec))
    q = np.clip(np.round(data.astype(np.float64) / scale) + zero, spec.qmin, spec.qmax)
    return float((((q - zero) * scale - data) ** 2).mean())


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("percentile", [99.0, 99.9, 100.0])
def test_percentile_leaves_that_share_outside(name, percentile):
    data, histogram = DATA[name], histogram_of(DATA[name])
    outside = (100 - percentile) / 100
    low, high = percentile_range(histogram, percentile, UINT8)
    expected = min(np.quantile(data, outside), 0), max(np.quantile(data, 1 - outside), 0)
    assert (low, high) == pytest.approx(expected, abs=2 * histogram.width + 0.01 * float(np.abs(data).max()))
    width = histogram.width  # the cut is exact to a bin
    assert (data > high + width).mean() <= outside and (data < low - width).mean() <= outside
    low, high = percentile_range(histogram, percentile, INT8)
    magnitude = np.quantile(np.abs(data), percentile / 100)
    assert max(-low, high) == pytest.approx(magnitude, abs=2 * histogram.width + 0.01 * float(np.abs(data).max()))
    assert histogram.low <= low <= 0 <= high <= histogram.high


def test_percentile_of_nearly_all_zeros_keeps_the_rest():
    data = np.zeros(100_000, np.float32)
    data[7] = 3.0
    assert percentile_range(histogram_of(data), 99.9, UINT8) == (0.0, 3.0)


def naive_divergence(counts: np.ndarray, first: int, last: int, levels: int) -> float:
    """KL(P || Q), bin by bin, after slide 38 of the GTC 2017 talk."""
    p = counts[first:last].copy()
    p[0] += counts[:first].sum()
    p[-1] += counts[last:].sum()
    q, n = np.zeros_like(p), last - first
    for level in range(levels):
        bins = range(level * n // levels, (level + 1) * n // levels)
        filled = [b for b in bins if p[b] > 0]
        for b in filled:
            q[b] = counts[first + bins[0] : first + bins[-1] + 1].sum() / len(filled)
    p, q = p / p.sum(), q / max(q.sum(), 1e-300)
    if (q[p > 0] == 0).any():
        return np.inf
    return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))


@pytest.mark.parametrize("name", DATA)
def test_divergence_of_windows_equals_the_naive_formula(name):
    counts = histogram_of(DATA[name][:2000], bins=512).counts
    windows = [(int(a), int(a + n)) for a in RANDOM.integers(0, 300, 12) for n in RANDOM.integers(31, 212, 4)]
    first, last = (torch.tensor(ends) for ends in zip(*windows, strict=True))
    found = _Divergence(counts, 31)(first, last)
    occupied = [counts[a:b].sum() > 0 for a, b in windows]
    expected = [
        naive_divergence(counts.numpy(), a, b, 31) if some else np.inf
        for (a, b), some in zip(windows, occupied, strict=True)
    ]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-12)
    assert np.isfinite(expected).any()


@pytest.mark.parametrize(
    ("name", "spec", "levels"),
    [
        ("normal", INT8, 128),
        ("relu", INT8, 128),
        ("heavy", NARROW, 64),
        ("negative", UINT8, 256),
        ("relu", QuantSpec(8, False, True), 256),
        ("normal", QuantSpec(4, True, True), 8),
    ],
)
def test_entropy_finds_the_least_divergence(name, spec, levels):
    histogram = histogram_of(DATA[name], bins=512)
    folded = np.histogram(np.abs(DATA[name][DATA[name] != 0]), np.arange(513) * histogram.width)[0].astype(float)
    used = int(np.flatnonzero(folded)[-1]) + 1
    widths = np.arange(levels, used + 1)
    divergences = np.array([naive_divergence(folded, 0, int(width), levels) for width in widths])
    best = widths[np.flatnonzero(divergences <= divergences.min() + 1e-12)[-1]] * histogram.width
    assert max(map(abs, entropy_range(histogram, spec))) == pytest.approx(min(best, np.abs(DATA[name]).max()), rel=1e-6)


@pytest.mark.parametrize("name", ["normal", "laplace", "heavy", "gelu"])
def test_two_sided_entropy_beats_every_symmetric_cut(name):
    histogram = histogram_of(DATA[name])
    low, high = entropy_range(histogram, UINT8)
    assert histogram.low <= low < 0 < high <= histogram.high
    counts, zero = histogram.counts.numpy(), -histogram.start
    used = np.flatnonzero(counts)

    def divergence(a: float, b: float) -> float:
        first, last = (
            max(round(a / histogram.width) + zero, used[0]),
            min(round(b / histogram.width) + zero, used[-1] + 1),
        )
        return naive_divergence(counts, first, last, 256) if last - first >= 256 else np.inf

    found = divergence(
        np.floor(low / histogram.width) * histogram.width, np.ceil(high / histogram.width) * histogram.width
    )
    for share in (1.0, 0.8, 0.6, 0.4):
        assert found <= divergence(share * histogram.low, share * histogram.high) + 1e-9


@pytest.mark.parametrize("spec", [INT8, UINT8, NARROW, INT4], ids=str)
@pytest.mark.parametrize("bins", [512, 2048])
def test_the_error_is_exact_for_values_uniform_in_their_bins(spec, bins):
    # 64 equally spaced values in every bin; the number of values in a bin differs from bin to bin by repetition.
    width, inside = 2.0 ** (2 - np.log2(bins)), (np.arange(64) + 0.5) / 64
    grid = ((np.arange(-bins // 3, bins // 2)[:, None] + inside) * width).astype(np.float32)
    data = np.repeat(grid, RANDOM.integers(0, 4, len(grid)), axis=0).flatten()
    error = QuantizationError(histogram_of(data, bins), spec)
    ends = list(itertools.product((-1.3, -1.0, -0.5, -0.2), (2.0, 1.7, 1.0, 0.4)))
    low, high = (torch.tensor(end, dtype=torch.float64) for end in zip(*ends, strict=True))
    expected = [true_mse(data, a, b, spec) * data.size for a, b in ends]
    np.testing.assert_allclose(error(low, high).numpy(), expected, rtol=2e-3)


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("spec", [INT8, UINT8, NARROW, INT4, QuantSpec(8, False, True)], ids=str)
def test_mse_is_as_good_as_brute_force_on_the_raw_data(name, spec):
    data = DATA[name][:8000]
    low, high = (min(float(data.min()), 0.0), max(float(data.max()), 0.0))
    found = mse_range(histogram_of(data), spec, torch.from_numpy(data))
    assert low <= found[0] <= 0 <= found[1] <= high
    if spec.symmetric:
        magnitudes = max(-low, high) * np.geomspace(1, 0.05, 150)
        ends = [(max(-m, low), min(m, high)) for m in magnitudes]
    else:
        shares = np.geomspace(1, 0.05, 32)
        ends = list(itertools.product(np.unique(low * shares), np.unique(high * shares)))
    best = min(true_mse(data, a, b, spec) for a, b in ends)
    assert true_mse(data, *found, spec) <= 1.03 * best
    assert true_mse(data, *found, spec) <= true_mse(data, low, high, spec)


def test_mse_lets_both_ends_go_together():
    # With either end kept, the steps stay too wide for the other to matter.
    data = np.append(RANDOM.normal(size=400_000), [-60, 60]).astype(np.float32)
    spec = QuantSpec(3, True, False)
    found = mse_range(histogram_of(data), spec, torch.from_numpy(data[-50_000:]))
    assert true_mse(data, *found, spec) <= 1.05 * true_mse(data, -2.1, 2.1, spec)
