"""check_pass accepts what keeps the contract and names the promise that is broken otherwise."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxcompress.capture import capture
from fxcompress.errors import PassError
from fxcompress.ir import Program
from fxcompress.passbase import Context, Pass
from fxcompress.passes import FuseActivations, QuantizeStatic
from fxcompress.testing import check_pass
from tests.helpers.example_passes import (
    BreakOutputs,
    DropMetadata,
    FixBatch,
    Forgetful,
    Idle,
    LieAboutShapes,
    NeverIdle,
    Raise,
    RoundWeights,
    SiluToSigmoidMul,
    Twice,
    WriteInPlace,
)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.SiLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Dropout())


def program(seed: int = 0) -> Program:
    torch.manual_seed(seed)
    return capture(model().eval(), (torch.randn(2, 2, 6, 8),))


PROGRAM = program()


@pytest.mark.parametrize(
    "pass_", [SiluToSigmoidMul(), RoundWeights(), Idle(), FuseActivations(), Twice(inner=SiluToSigmoidMul())], ids=repr
)
def test_accepts(pass_: Pass) -> None:
    result = check_pass(pass_, PROGRAM)
    assert result.modified != isinstance(pass_, Idle)


def test_accepts_a_module() -> None:
    result = check_pass(SiluToSigmoidMul(), model().train(), (torch.randn(1, 2, 6, 8),))
    assert result.changes and result.program.dynamic_dims()


def test_accepts_keyword_inputs() -> None:
    class Keywords(nn.Module):
        def forward(self, x: torch.Tensor, *, y: torch.Tensor) -> torch.Tensor:
            return nn.functional.silu(x) + y

    result = check_pass(SiluToSigmoidMul(), Keywords(), (torch.randn(2, 3),), {"y": torch.randn(2, 3)})
    assert result.modified


def test_accepts_quantization() -> None:
    result = check_pass(QuantizeStatic(), PROGRAM, context=Context(calibration=[torch.randn(4, 2, 6, 8)]))
    assert result.error is not None and result.error > 0


@pytest.mark.parametrize(
    ("pass_", "promise"),
    [
        (BreakOutputs(), "changed the outputs"),
        (Raise(), "pass Raise failed"),
        (WriteInPlace(), "wrote into its input"),
        (WriteInPlace(data=True), "tensors were written to: 0.weight"),
        (DropMetadata(), "no shape metadata"),
        (LieAboutShapes(), r"metadata is not true: %\w+: metadata tells"),
        (NeverIdle(), "a second run changes the program again: one more relu"),
        (FixBatch(), "on a batch twice as large, the rewritten program fails"),
        (Forgetful(amount=2), "the recipe entry"),
    ],
    ids=lambda v: repr(v) if isinstance(v, Pass) else "",
)
def test_refuses(pass_: Pass, promise: str) -> None:
    with pytest.raises(AssertionError, match=promise):
        check_pass(pass_, program())


def test_refuses_a_program_that_is_broken_before() -> None:
    p = program()
    next(n for n in p.graph.nodes if n.op == "call_function").meta.clear()
    with pytest.raises(AssertionError, match="not in normal form before"):
        check_pass(Idle(), p)


def test_missing_data_is_the_users_error() -> None:
    with pytest.raises(PassError, match="needs calibration data"):
        check_pass(QuantizeStatic(), PROGRAM)
