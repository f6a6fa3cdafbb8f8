import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxcompress.errors import UsageError
from fxcompress.quant.spec import QuantSpec, quant_params

SPECS = [
    QuantSpec(8, True, True),
    QuantSpec(8, True, True, qmin=-127),
    QuantSpec(8, True, True, qmin=-64, qmax=63),
    QuantSpec(8, True, False),
    QuantSpec(8, False, True),
    QuantSpec(8, False, False),
    QuantSpec(8, False, False, qmax=127),
    QuantSpec(4, True, False),
    QuantSpec(2, True, True),
    QuantSpec(16, False, False),
]
TINY = torch.finfo(torch.float32).tiny
magnitudes = st.floats(0, 2.0**126, allow_subnormal=True, width=32)


def as_real(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """The textbook formula in float64."""
    scale, zero_point = scale.double(), zero_point.double()
    q = torch.clamp(torch.round(x.double() / scale) + zero_point, spec.qmin, spec.qmax)
    return (q - zero_point) * scale


@pytest.mark.parametrize(("bits", "signed", "ends"), [(8, True, (-128, 127)), (8, False, (0, 255)), (4, True, (-8, 7))])
def test_default_integers_are_the_containers(bits, signed, ends):
    spec = QuantSpec(bits, signed, False)
    assert (spec.qmin, spec.qmax, spec.steps) == (*ends, ends[1] - ends[0])


@pytest.mark.parametrize(
    "arguments",
    [
        {"bits": 1, "signed": True},
        {"bits": 17, "signed": True},
        {"bits": 8, "signed": True, "qmin": -129},
        {"bits": 8, "signed": True, "qmax": 128},
        {"bits": 8, "signed": False, "qmin": -1},
        {"bits": 8, "signed": True, "qmin": 5},
        {"bits": 8, "signed": True, "qmin": 0},
        {"bits": 8, "signed": True, "qmin": -5, "qmax": 0},
    ],
)
def test_impossible_grids_are_refused(arguments):
    with pytest.raises(UsageError, match="FXC-USAGE-04"):
        QuantSpec(symmetric=True, **arguments)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@settings(max_examples=80, deadline=None)
@given(below=magnitudes, above=magnitudes, flip=st.booleans())
def test_zero_is_exact_and_the_error_is_half_a_step(spec, below, above, flip):
    # Both ends on the same side of zero when flipped: the range must be widened.
    ends = sorted((below, above) if flip else (-below, above))
    low, high = torch.tensor(ends)
    scale, zero_point = quant_params(low, high, spec)
    assert scale.dtype == torch.float32 and zero_point.dtype == torch.int32
    assert TINY < float(scale) < math.inf
    assert spec.qmin <= int(zero_point) <= spec.qmax
    x = torch.linspace(0, 1, 1001, dtype=torch.float64)
    x = torch.cat((torch.zeros(1), min(ends[0], 0.0) + x * (max(ends[1], 0.0) - min(ends[0], 0.0))))
    found = as_real(x, scale, zero_point, spec)
    assert float(found[0]) == 0.0
    assert float((found - x).abs().max() / scale) <= 0.5 + 1e-9


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_zero_range_gives_scale_one_and_a_valid_zero_point(spec):
    scale, zero_point = quant_params(torch.zeros(3), torch.zeros(3), spec)
    assert scale.tolist() == [1.0] * 3
    assert all(spec.qmin <= zero <= spec.qmax for zero in zero_point.tolist())
    assert as_real(torch.zeros(3), scale, zero_point, spec).tolist() == [0.0] * 3


def test_known_values():
    low, high = torch.tensor([-1.0, 0.5, -3.0, -0.5]), torch.tensor([1.0, 2.0, -1.0, 1.0])
    scale, zero_point = quant_params(low, high, QuantSpec(8, True, True))
    torch.testing.assert_close(scale, torch.tensor([1 / 127, 2 / 127, 3 / 128, 1 / 127]))
    assert zero_point.tolist() == [0, 0, 0, 0]
    scale, zero_point = quant_params(low, high, QuantSpec(8, False, False))
    torch.testing.assert_close(scale, torch.tensor([2 / 255, 2 / 255, 3 / 255, 1.5 / 255]))
    assert zero_point.tolist() in ([128, 0, 255, 85], [127, 0, 255, 85])  # 127.5 is a tie
    scale, zero_point = quant_params(low, high, QuantSpec(8, False, True))
    assert zero_point.tolist() == [128, 0, 128, 128]
    torch.testing.assert_close(scale, torch.tensor([1 / 127, 2 / 255, 3 / 128, 1 / 127]))
    scale, _ = quant_params(low, high, QuantSpec(8, True, True, qmin=-64, qmax=63))
    torch.testing.assert_close(scale, torch.tensor([1 / 63, 2 / 63, 3 / 64, 1 / 63]))


def test_the_scale_never_gets_denormal():
    scale, _ = quant_params(torch.tensor(0.0), torch.tensor(1e-44), QuantSpec(8, False, False))
    assert TINY * 255 < float(scale) < 1e-35


@pytest.mark.parametrize("spec", SPECS[:6], ids=str)
def test_the_largest_floats_do_not_overflow(spec):
    most = torch.tensor(torch.finfo(torch.float32).max)
    scale, zero_point = quant_params(-most, most, spec)
    x = torch.stack((-most, most))
    q = torch.clamp(torch.round(x / scale) + zero_point, spec.qmin, spec.qmax)
    assert bool(torch.isfinite((q - zero_point) * scale).all())


@pytest.mark.parametrize(("low", "high"), [(math.nan, 1.0), (0.0, math.inf), (1.0, 0.5)])
def test_broken_ranges_are_refused(low, high):
    with pytest.raises(UsageError, match="FXC-USAGE-043"):
        quant_params(torch.tensor(low), torch.tensor(high), SPECS[0])


def test_ends_of_different_shape_are_refused():
    with pytest.raises(UsageError, match="FXC-USAGE-042"):
        quant_params(torch.zeros(2), torch.ones(3), SPECS[0])
