"""check_kernel catches each broken promise: operators that break them on purpose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fxcompress import KernelOp, check_kernel
from fxcompress.ops import register

SAMPLES = [(torch.randn(3, 8), torch.randn(8)), (torch.randn(0, 8), torch.randn(8))]


def scaled(x: Tensor, scale: Tensor) -> Tensor:
    return x * scale


def shape_of(x: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(x)


def op(name: str, run: Callable[..., Any] = scaled, fake: Callable[..., Any] = shape_of, **options: Any) -> KernelOp:
    """A registered operator that runs ``run``; its reference is ``x * scale``."""
    made = KernelOp(name, run, fake, "nowhere:launch", **options)
    register(made)
    return KernelOp(name, scaled, fake, "nowhere:launch", samples=lambda device: SAMPLES, **options)


def test_a_good_operator_passes() -> None:
    assert check_kernel(op("test_good")) == 2


def wrong_value(x: Tensor, scale: Tensor) -> Tensor:
    return x * scale * 1.001


def unwritten(x: Tensor, scale: Tensor) -> Tensor:
    out = torch.empty_like(x)
    out[1:] = (x * scale)[1:]
    return out


def wrong_dtype(x: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.float64)


@pytest.mark.parametrize(
    ("run", "fake", "message"),
    [
        (wrong_value, shape_of, "relative error"),
        (unwritten, shape_of, "two runs differ|relative error"),
        (scaled, wrong_dtype, "fake|dtype"),
    ],
    ids=["value", "unwritten memory", "fake"],
)
def test_broken_promises_are_caught(
    run: Callable[..., Any], fake: Callable[..., Any], message: str, request: pytest.FixtureRequest
) -> None:
    name = f"test_broken_{request.node.callspec.id.replace(' ', '_')}"
    with pytest.raises((AssertionError, RuntimeError, torch.testing._internal.optests.OpCheckError), match=message):
        check_kernel(op(name, run, fake))


def test_integers_must_be_equal_bit_for_bit() -> None:
    def off_by_one(x: Tensor, scale: Tensor) -> Tensor:
        return (x * scale).round().to(torch.int32) + 1

    def rounded(x: Tensor, scale: Tensor) -> Tensor:
        return (x * scale).round().to(torch.int32)

    def fake(x: Tensor, scale: Tensor) -> Tensor:
        return torch.empty_like(x, dtype=torch.int32)

    register(KernelOp("test_off_by_one", off_by_one, fake, "nowhere:launch"))
    with pytest.raises(AssertionError, match="integers differ"):
        check_kernel(KernelOp("test_off_by_one", rounded, fake, "nowhere:launch"), SAMPLES)


def test_without_samples_nothing_is_proven() -> None:
    with pytest.raises(AssertionError, match="no sample"):
        check_kernel(op("test_no_samples"), samples=[])


def test_autocast_casts_what_is_named_and_nothing_else() -> None:
    seen: list[torch.dtype] = []

    def spy(x: Tensor, scale: Tensor) -> Tensor:
        seen.extend((x.dtype, scale.dtype))
        return x * scale.to(x.dtype)

    made = KernelOp("test_autocast", spy, shape_of, "nowhere:launch", autocast=("x",))
    register(made)
    with torch.autocast("cpu", torch.bfloat16):
        y = made.overload(torch.randn(2, 8), torch.randn(8))
    assert seen == [torch.bfloat16, torch.float32] and y.dtype == torch.bfloat16


def test_dtypes_that_the_kernel_does_not_take_run_the_reference() -> None:
    made = KernelOp("test_dtypes", scaled, shape_of, "fxcompress.errors:nowhere", dtypes=(torch.float16,))
    x, scale = torch.randn(2, 8), torch.randn(8)
    assert torch.equal(made.launch(x, scale), x * scale)
    with pytest.raises(AttributeError, match="nowhere"):
        made.launch(x.half(), scale)
