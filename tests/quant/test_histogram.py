import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxcompress.quant.histogram import Histogram, Reservoir, memory_order


def counted(histogram: Histogram, data: np.ndarray) -> np.ndarray:
    """The counts that one look at all the data gives, by comparing each value with the edges (no arithmetic)."""
    edges = (np.arange(histogram.bins + 1) + histogram.start) * histogram.width
    nonzero = data[data != 0].astype(np.float64)
    assert ((nonzero >= edges[0]) & (nonzero < edges[-1])).all()
    return np.bincount(np.searchsorted(edges, nonzero, side="right") - 1, minlength=histogram.bins)


def fill(batches: list[np.ndarray], bins: int = 512) -> Histogram:
    histogram = Histogram(bins)
    for batch in batches:
        histogram.add(torch.from_numpy(batch))
    return histogram


floats = st.floats(-(2.0**127), 2.0**127, width=32, allow_subnormal=True) | st.floats(-4, 4, width=32) | st.just(0.0)
batches = st.lists(
    st.lists(floats, min_size=1, max_size=20).map(lambda v: np.array(v, np.float32)), min_size=1, max_size=6
)


@settings(max_examples=150, deadline=None)
@given(batches)
def test_counts_are_exact_whatever_the_scales_and_the_order(batches):
    data = np.concatenate(batches)
    for order in (batches, batches[::-1], [data]):
        histogram = fill(order)
        assert histogram.zeros == (data == 0).sum()
        if data.any():
            np.testing.assert_array_equal(histogram.counts.numpy(), counted(histogram, data))
            assert (histogram.low, histogram.high) == (min(data.min(), 0), max(data.max(), 0))


def test_many_small_batches_equal_one_large():
    data = np.random.default_rng(0).standard_t(2, 60_000).astype(np.float32)
    small, large = fill(np.array_split(data, 1000)), fill([data])
    assert torch.equal(small.counts, large.counts)
    assert (small.start, small.exponent) == (large.start, large.exponent)


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1.0, 1e38])
def test_half_of_the_bins_lie_in_the_range_of_the_data(scale):
    data = (np.random.default_rng(0).random(1000) * scale).astype(np.float32)
    histogram = fill([data], 2048)
    used = (histogram.high - histogram.low) / histogram.width
    assert 1022 <= used <= 2048


def test_the_density_holds_all_the_weight_and_ends_at_the_extremes():
    data = np.random.default_rng(0).normal(size=5000).clip(-1.3, 2.1).astype(np.float32)
    edges, density = fill([data]).density()
    assert float((density * edges.diff()).sum()) == pytest.approx(5000)
    assert bool((edges.diff() > 0).all())
    assert float(edges[0]) == pytest.approx(-1.3, abs=1e-4) and float(edges[-1]) == pytest.approx(2.1, abs=1e-4)


def test_a_reservoir_keeps_everything_until_it_is_full():
    reservoir = Reservoir(100)
    data = torch.arange(100.0)
    for part in data.split(7):
        reservoir.add(part, part.numel())
    assert torch.equal(reservoir.values(), data)


@pytest.mark.parametrize("sizes", [[50_000] * 4, [1000] * 200, [100] * 10 + [100_000, 10_000]])
def test_a_reservoir_is_uniform_over_the_stream(sizes):
    reservoir, size = Reservoir(4096), 4096
    for number, count in enumerate(sizes):
        reservoir.add(torch.full((min(count, 30_000),), float(number)), count)
    kept = reservoir.values()
    assert kept.numel() == size
    position = np.repeat(np.arange(len(sizes)), sizes)
    spread = position.std() / size**0.5
    assert abs(float(kept.mean()) - position.mean()) < 5 * spread
    found = np.bincount(kept.long().numpy(), minlength=len(sizes))
    expected = size * np.array(sizes) / sum(sizes)
    assert (np.abs(found - expected) < 6 * expected**0.5 + 2).all()


def test_memory_order_of_a_dense_tensor_is_a_view():
    x = torch.randn(2, 3, 5, 7)
    for layout in (
        x,
        x.contiguous(memory_format=torch.channels_last),
        x.permute(3, 0, 2, 1),
        x[:, 1],
        x.expand(4, 2, 3, 5, 7),
    ):
        assert torch.equal(memory_order(layout).sort().values, layout.flatten().sort().values)
    assert memory_order(x.permute(3, 0, 2, 1)).data_ptr() == x.data_ptr()
