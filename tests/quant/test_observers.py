"""Observers against naive formulas on the raw data."""

import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxcompress.errors import CalibrationError, UsageError
from fxcompress.quant.observers import Observer, QuantSpec, make_observer, quant_params

NAMES = ["minmax", "moving_average", "histogram", "percentile", "entropy", "mse"]
INT8, UINT8 = QuantSpec(8, True, True), QuantSpec(8, False, False)
SPECS = [INT8, UINT8, QuantSpec(8, True, False), QuantSpec(8, False, True), QuantSpec(4, True, True)]
TINY = torch.finfo(torch.float32).tiny


def watch(name: str, batches: list[torch.Tensor], **options: float) -> Observer:
    observer = make_observer(name, **options)
    for batch in batches:
        observer.update(batch)
    return observer


def ends(observer: Observer, spec: QuantSpec) -> tuple[float, float]:
    low, high = observer.range(spec)
    assert low.dtype == high.dtype == torch.float32 and low.shape == high.shape == ()
    return float(low), float(high)


def true_mse(data: torch.Tensor, low: float, high: float, spec: QuantSpec) -> float:
    scale, zero = (float(v) for v in quant_params(torch.tensor(low), torch.tensor(high), spec))
    x = data.double().numpy()
    return float((((np.clip(np.round(x / scale) + zero, spec.qmin, spec.qmax) - zero) * scale - x) ** 2).mean())


def error(name: str, data: torch.Tensor, spec: QuantSpec) -> float:
    return true_mse(data, *ends(watch(name, [data]), spec), spec)


def test_minmax_is_exact_over_all_batches():
    torch.manual_seed(0)
    batches = [torch.randn(200_000) * k for k in (1, 3, 2)]
    data = torch.cat(batches).numpy()
    for name in NAMES:
        observer = watch(name, batches)
        assert (observer.low, observer.high, observer.count) == (data.min(), data.max(), data.size)
    assert ends(watch("minmax", batches), INT8) == (data.min(), data.max())


@pytest.mark.parametrize("momentum", [0.1, 0.5, 1.0])
def test_moving_average_formula(momentum):
    batches = [torch.tensor([-1.0, 2.0]), torch.tensor([-3.0, 10.0]), torch.tensor([0.5, 1.0])]
    low, high = -1.0, 2.0
    for batch in batches[1:]:
        low = (1 - momentum) * low + momentum * float(batch.min())
        high = (1 - momentum) * high + momentum * float(batch.max())
    assert ends(watch("moving_average", batches, momentum=momentum), UINT8) == pytest.approx((low, high))


@pytest.mark.parametrize("percentile", [60.0, 99.0, 99.99, 100.0])
@pytest.mark.parametrize("sizes", [[1], [2], [3, 50], [1000, 1000, 37]])
def test_percentile_is_the_weighted_mean_of_batch_quantiles(percentile, sizes):
    torch.manual_seed(0)
    batches = [torch.randn(size) for size in sizes]
    share = percentile / 100

    def mean(of) -> float:
        return sum(np.quantile(of(b.double().numpy()), share) * b.numel() for b in batches) / sum(sizes)

    observer = watch("percentile", batches, percentile=percentile)
    low, high = -mean(lambda x: -x), mean(lambda x: x)
    if low < 0 or high > 0:
        assert ends(observer, UINT8) == pytest.approx((low, high), rel=1e-6)
    magnitude = mean(np.abs)
    expected = max(-magnitude, observer.low), min(magnitude, observer.high)
    assert ends(observer, INT8) == pytest.approx(expected, rel=1e-6)


def test_one_wild_batch_moves_percentile_less_than_histogram():
    torch.manual_seed(0)
    batches = [torch.randn(1000) for _ in range(99)] + [torch.randn(1000) * 100]
    assert ends(watch("percentile", batches, percentile=99.9), INT8)[1] < 8
    assert ends(watch("histogram", batches, percentile=99.9), INT8)[1] > 100


@pytest.mark.parametrize("name", ["minmax", "histogram", "entropy", "mse"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_many_small_batches_give_the_range_of_one_large(name, spec):
    torch.manual_seed(0)
    data = torch.distributions.StudentT(4.0).sample((30_000,)) * 3 + 0.5
    whole, parts = watch(name, [data]), watch(name, list(data.split(131)))
    assert ends(whole, spec) == ends(parts, spec)


@pytest.mark.parametrize("name", NAMES)
def test_the_state_does_not_grow(name):
    torch.manual_seed(0)
    observer = watch(name, [torch.randn(70_000) for _ in range(3)])
    before = len(pickle.dumps(observer))
    for step in range(1000):
        observer.update(torch.randn(1000) * (1 + step % 7))
    assert len(pickle.dumps(observer)) <= before + 100
    assert before < 200_000


@pytest.mark.parametrize("name", NAMES)
def test_equal_runs_give_equal_ranges_and_copies_go_on_alone(name):
    torch.manual_seed(0)
    batches = [torch.randn(100_000) for _ in range(3)]
    first, second = watch(name, batches), watch(name, batches)
    assert [ends(first, s) for s in SPECS] == [ends(second, s) for s in SPECS]
    copied = pickle.loads(pickle.dumps(copy.deepcopy(first)))
    copied.update(batches[0] * 10)
    assert [ends(first, s) for s in SPECS] == [ends(second, s) for s in SPECS]
    assert copied.high == 10 * batches[0].max()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.5, 1e-45, 1e-38, 1e38, -1e38])
def test_constants(name, spec, value):
    observer = watch(name, [torch.full((5, 7), value)] * 3)
    low, high = ends(observer, spec)
    assert low <= high
    assert max(abs(low), abs(high)) == pytest.approx(abs(value), rel=2e-3)
    scale, zero = quant_params(torch.tensor(low), torch.tensor(high), spec)
    assert TINY < float(scale) < math.inf and spec.qmin <= int(zero) <= spec.qmax
    assert true_mse(torch.tensor([value]), low, high, spec) ** 0.5 <= float(scale) / 2 + 2e-3 * abs(value)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scales", list(itertools.permutations([0.0, 1e-40, 1.0, 1e30])), ids=str)
def test_batches_of_very_different_scales(name, scales):
    torch.manual_seed(0)
    batches = [torch.randn(500) * scale for scale in scales]
    observer = watch(name, batches)
    for spec in SPECS:
        low, high = ends(observer, spec)
        assert observer.low <= low <= 0 <= high <= observer.high
        # The large batch is what matters, first, in between or last (the moving average may forget nine tenths, twice).
        assert high > 1e27


@pytest.mark.parametrize("name", NAMES)
def test_values_that_are_not_finite_are_counted_and_ignored(name):
    torch.manual_seed(0)
    clean = torch.randn(1000)
    dirty = torch.cat((clean, torch.tensor([math.nan, math.inf, -math.inf])))
    observer, expected = watch(name, [dirty[torch.randperm(1003)], dirty]), watch(name, [clean, clean])
    assert observer.nonfinite == 6 and observer.count == 2000
    assert ends(observer, INT8) == pytest.approx(ends(expected, INT8))
    observer.update(torch.full((9,), math.nan))
    observer.update(torch.tensor([1e300], dtype=torch.float64))
    assert observer.nonfinite == 16
    assert ends(observer, INT8) == pytest.approx(ends(expected, INT8))


@pytest.mark.parametrize("name", NAMES)
def test_no_data_is_an_error_and_empty_tensors_are_ignored(name):
    observer = watch(name, [torch.empty(0), torch.empty(3, 0, 2)])
    with pytest.raises(CalibrationError, match="no batch came"):
        observer.range(INT8)
    observer.update(torch.tensor([math.nan]))
    with pytest.raises(CalibrationError, match="1 values were NaN or infinite"):
        observer.range(INT8)
    observer.update(torch.tensor(2.0))  # no dimensions
    assert ends(observer, UINT8)[1] == pytest.approx(2.0, rel=2e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_float_types_equal_their_float32_copy(name, dtype):
    torch.manual_seed(0)
    batches = [torch.randn(4, 300).to(dtype) for _ in range(2)]
    assert ends(watch(name, batches), INT8) == ends(watch(name, [b.float() for b in batches]), INT8)


@pytest.mark.parametrize("name", NAMES)
def test_layouts_gradients_and_inputs(name):
    torch.manual_seed(0)
    x = torch.randn(2, 16, 12, 12)
    expected = ends(watch(name, [x]), UINT8)
    wide = torch.randn(2, 16, 12, 24)
    wide[..., ::2] = x
    for layout in (
        x.to(memory_format=torch.channels_last),
        x.transpose(1, 3),
        wide[..., ::2],
        x.clone().requires_grad_(),
    ):
        before = layout.detach().clone()
        assert ends(watch(name, [layout]), UINT8) == pytest.approx(expected)
        assert torch.equal(layout, before)


@pytest.mark.parametrize(
    "bad", [torch.arange(3), torch.zeros(2, dtype=torch.complex64), torch.tensor([True]), [1.0], None]
)
def test_other_types_are_refused(bad):
    with pytest.raises(CalibrationError, match="FXC-DATA-043"):
        make_observer("minmax").update(bad)


@pytest.mark.parametrize("shape", [(1, 128, 64, 64), (4, 64, 56, 56), (2, 197, 768), (1, 3, 512, 512)])
@pytest.mark.parametrize("dim", [1, -1])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_sample_of_a_large_tensor_meets_all_channels_alike(shape, dim, channels_last):
    x = torch.zeros(shape)
    channel = shape[dim] // 2
    x.select(dim, channel).fill_(1.0)
    if channels_last and x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    observer = watch("histogram", [x] * 8)
    histogram = observer.histogram
    assert float(histogram.counts.sum()) / 8 == pytest.approx(x.numel() / shape[dim], rel=0.05)
    assert float(histogram.counts.sum()) + histogram.zeros == pytest.approx(8 * x.numel(), rel=1e-6)


def test_a_single_outlier_of_a_large_tensor_counts():
    torch.manual_seed(0)
    x = torch.randn(500_000)
    x[123_457] = 1e4
    assert error("mse", x, INT8) <= error("minmax", x, INT8)
    assert ends(watch("mse", [x]), INT8)[1] > 1000


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.floats(-1e4, 1e4, width=16) | st.sampled_from([0.0, 1.0, 2.0, -1.0]), min_size=1, max_size=40),
    st.sampled_from(SPECS),
)
def test_mse_never_exceeds_minmax(values, spec):
    data = torch.tensor(values)
    assert error("mse", data, spec) <= error("minmax", data, spec) * (1 + 1e-9) + 1e-30


def test_mse_keeps_the_grid_of_pixels():
    pixels = torch.randint(0, 256, (10_000,)).clamp(max=180) / 180.0 * 255
    pixels[0] = 255.0
    assert error("mse", pixels.round(), UINT8) == 0.0


@pytest.mark.parametrize("kind", ["student", "relu", "laplace"])
@pytest.mark.parametrize("spec", [INT8, UINT8], ids=str)
def test_clipping_beats_minmax_on_heavy_tails(kind, spec):
    torch.manual_seed(1)
    data = torch.distributions.StudentT(3.5).sample((50_000,))
    data = {"student": data, "relu": data.relu(), "laplace": torch.distributions.Laplace(0.0, 1.0).sample((50_000,))}[
        kind
    ]
    minmax = error("minmax", data, spec)
    assert error("mse", data, spec) < (0.9 if spec is INT8 else 1.0) * minmax
    assert error("mse", data, spec) <= 1.001 * min(error(name, data, spec) for name in NAMES)


@pytest.mark.parametrize("name", ["histogram", "percentile", "entropy"])
def test_all_clipping_observers_beat_minmax_when_few_values_are_far_off(name):
    torch.manual_seed(1)
    data = torch.randn(400_000)
    data[:2] = torch.tensor([-9.0, 9.5])
    assert error(name, data, INT8) < 0.7 * error("minmax", data, INT8)


def test_unknown_names_and_options_are_refused_with_the_known_ones():
    with pytest.raises(UsageError, match="minmax, moving_average, histogram, percentile, entropy, mse"):
        make_observer("max")
    with pytest.raises(UsageError, match="its options: percentile, bins"):
        make_observer("histogram", momentum=0.1)
    for name, option in [("histogram", {"percentile": 40}), ("percentile", {"percentile": 101}), ("mse", {"bins": 10})]:
        with pytest.raises(UsageError, match="FXC-USAGE-04"):
            make_observer(name, **option)
    with pytest.raises(UsageError, match="momentum"):
        make_observer("moving_average", momentum=0.0)
    with pytest.raises(UsageError, match="per tensor"):
        watch("minmax", [torch.ones(3)]).range(QuantSpec(8, True, True, axis=0))


@pytest.mark.cuda
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_gives_the_range_of_the_cpu(name):
    torch.manual_seed(0)
    batches = [torch.randn(3, 300, 100) * k for k in (1, 5)]
    assert ends(watch(name, [b.cuda() for b in batches]), INT8) == ends(watch(name, batches), INT8)
