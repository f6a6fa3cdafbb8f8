"""fake_quantize: registration, values against the definition in NumPy, straight-through gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fxcompress.ops  # noqa: F401  registers the operator

fake_quantize = torch.ops.fxcompress.fake_quantize.default

GRIDS = [(-128, 127), (-127, 127), (0, 255), (-64, 63), (-8, 7)]


def arguments(
    shape: tuple[int, ...], axis: int = -1, qmin: int = -128, qmax: int = 127, seed: int = 0
) -> tuple[Any, ...]:
    """Random ``x``, scale and zero point; about a tenth of the values lie outside the grid."""
    random = torch.Generator().manual_seed(seed)
    sizes = () if axis < 0 else (shape[axis],)
    scale = torch.rand(sizes, generator=random) * 0.02 + 0.01
    zero = torch.randint(qmin // 2, qmax // 2 + 1, sizes, generator=random, dtype=torch.int32)
    return torch.randn(shape, generator=random), scale, zero, axis, qmin, qmax


def naive(x: Tensor, scale: Tensor, zero: Tensor, axis: int, qmin: int, qmax: int) -> tuple[Any, Any]:
    """Values in float64 and where the gradient passes, from the definition."""
    shape = [-1 if i == axis else 1 for i in range(x.dim())] if axis >= 0 else []
    s, z = (t.double().reshape(shape).numpy() for t in (scale, zero))
    # the quotient is rounded to float32, as the operator works in the dtype of x
    quotient = (x.detach().numpy() / s.astype(np.float32)).astype(np.float64)
    integer = np.round(quotient) + z
    return (np.clip(integer, qmin, qmax) - z) * s, (integer >= qmin) & (integer <= qmax)


@pytest.mark.parametrize(("qmin", "qmax"), GRIDS)
@pytest.mark.parametrize(("shape", "axis"), [((2, 3, 5, 4), -1), ((2, 3, 5, 4), 1), ((6, 3), 0), ((4, 7), 1), ((), -1)])
def test_values_and_gradient(shape: tuple[int, ...], axis: int, qmin: int, qmax: int) -> None:
    x, *rest = arguments(shape, axis, qmin, qmax)
    x.requires_grad_()
    got = fake_quantize(x, *rest)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    (got * weight).sum().backward()
    values, inside = naive(x, *rest)
    np.testing.assert_allclose(got.detach().double().numpy(), values, rtol=2e-7, atol=1e-9)
    assert x.grad is not None
    np.testing.assert_array_equal(x.grad.numpy(), weight.numpy() * inside)


def test_gradient_stops_outside_the_grid() -> None:
    x = torch.tensor([-10.0, -1.3, 0.0, 0.4, 10.0], requires_grad=True)
    fake_quantize(x, torch.tensor(0.1), torch.tensor(0, dtype=torch.int32), -1, -8, 7).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0.0, 0.0, 1.0, 1.0, 0.0]


def test_rounds_half_to_even() -> None:
    """As ONNX QuantizeLinear: 0.5 -> 0, 1.5 -> 2, 2.5 -> 2."""
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    got = fake_quantize(x, torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), -1, -128, 127)
    assert got.tolist() == [-2.0, -2.0, -0.0, 0.0, 2.0, 2.0]


def test_rounds_before_adding_the_zero_point() -> None:
    """ONNX and OpenVINO do; with an odd zero point the other order rounds halves the other way."""
    x = torch.tensor([0.5, 1.5])
    got = fake_quantize(x, torch.tensor(1.0), torch.tensor(3, dtype=torch.int32), -1, 0, 255)
    assert got.tolist() == [0.0, 2.0]


def test_values_on_the_grid_stay() -> None:
    x, scale, zero, axis, qmin, qmax = arguments((4, 5), 0)
    once = fake_quantize(x, scale, zero, axis, qmin, qmax)
    assert torch.equal(fake_quantize(once, scale, zero, axis, qmin, qmax), once)


def test_zero_is_exact_and_nan_stays() -> None:
    x = torch.tensor([0.0, float("nan"), float("inf"), -float("inf")])
    got = fake_quantize(x, torch.tensor(0.3), torch.tensor(7, dtype=torch.int32), -1, 0, 255)
    assert got[0] == 0 and got[1].isnan()
    torch.testing.assert_close(got[2:], torch.tensor([248 * 0.3, -7 * 0.3]))


def test_input_is_not_written_to() -> None:
    x, *rest = arguments((3, 4))
    copy = x.clone()
    fake_quantize(x, *rest)
    assert torch.equal(x, copy)


LAYOUTS = {
    "plain": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every second": lambda x: x[..., ::2],
    "transposed": lambda x: x.transpose(1, 3),
    "expanded": lambda x: x[:, :1].expand(-1, 6, -1, -1),
    "empty": lambda x: x[:0],
}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axis", [-1, 1])
def test_opcheck(layout: str, axis: int, requires_grad: bool) -> None:
    """Schema, fake implementation, autograd registration and AOT dispatch, on every memory layout."""
    x = LAYOUTS[layout](torch.randn(2, 6, 6, 6)).requires_grad_(requires_grad)
    _, *rest = arguments(tuple(x.shape), axis)
    torch.library.opcheck(fake_quantize, (x, *rest))


def test_layout_does_not_matter() -> None:
    x, *rest = arguments((2, 6, 6, 6), 1)
    for name in ("channels last", "plain"):
        assert torch.equal(fake_quantize(LAYOUTS[name](x), *rest), fake_quantize(x, *rest))
