"""The contract around every pass."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from fxcompress.capture import capture
from fxcompress.data import CalibrationData
from fxcompress.errors import NormalFormError, PassError
from fxcompress.ir import Program
from fxcompress.passbase import (
    Context,
    Pass,
    Refusal,
    Result,
    exact_tolerance,
    fingerprint,
    output_error,
    registered_passes,
)
from fxcompress.passes import FoldBatchNorm, FuseActivations, QuantizeStatic
from fxcompress.pipeline import Pipeline
from tests.helpers.example_passes import (
    BreakOutputs,
    DropMetadata,
    Idle,
    Raise,
    RoundWeights,
    SiluToSigmoidMul,
    Twice,
    WriteInPlace,
)


def program() -> Program:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.SiLU(), nn.Conv2d(4, 2, 1), nn.ReLU())
    return capture(model.eval(), (torch.randn(2, 2, 6, 6),))


PROGRAM = program()


def untouched(p: Program) -> tuple[object, list[torch.Tensor], list[torch.Tensor]]:
    return fingerprint(p), [t.detach().clone() for t in p.gm.state_dict().values()], p.run_example()


def assert_untouched(p: Program, before: tuple[object, list[torch.Tensor], list[torch.Tensor]]) -> None:
    now = untouched(p)
    assert now[0] == before[0]
    for a, b in zip(before[1] + before[2], now[1] + now[2], strict=True):
        assert torch.equal(a, b)


def test_result_of_an_exact_pass() -> None:
    before = untouched(PROGRAM)
    result = SiluToSigmoidMul()(PROGRAM)
    assert result.modified and len(result.changes) == 1
    assert result.error is not None and result.error < 1e-6 and result.seconds > 0
    assert result.outputs is not None and output_error(result.outputs, result.program.run_example()) == 0
    assert_untouched(PROGRAM, before)


def test_result_of_a_lossy_pass() -> None:
    """The error is measured, and is what one can measure oneself."""
    before = untouched(PROGRAM)
    result = RoundWeights()(PROGRAM)
    expected, got = PROGRAM.run_example()[0].double(), result.program.run_example()[0].double()
    assert result.error == pytest.approx(((expected - got).abs().max() / expected.abs().max()).item(), rel=1e-6)
    assert result.error > 1e-3
    assert_untouched(PROGRAM, before)


def test_modified_is_computed() -> None:
    """A pass cannot claim a change, nor hide one."""
    result = Idle()(PROGRAM)
    assert not result.modified and result.error == 0.0
    assert RoundWeights()(PROGRAM).modified, "new tensors are a change, though the text is the same"


def test_without_verification_nothing_is_claimed() -> None:
    result = BreakOutputs()(PROGRAM, Context(verify=False))
    assert result.modified and result.error is None and result.outputs is None
    stale = BreakOutputs()(PROGRAM, Context(verify=False), outputs=PROGRAM.run_example())
    assert stale.outputs is None


def test_exact_pass_that_changes_outputs_is_refused() -> None:
    before = untouched(PROGRAM)
    with pytest.raises(PassError, match="BreakOutputs changed the outputs") as caught:
        BreakOutputs()(PROGRAM)
    assert caught.value.id == "FXC-PASS-002" and "shifted" in caught.value.where
    assert_untouched(PROGRAM, before)


def test_small_differences_pass_and_larger_ones_do_not() -> None:
    scale = PROGRAM.run_example()[0].abs().max().item()
    assert BreakOutputs(amount=1e-6 * scale)(PROGRAM).modified
    with pytest.raises(PassError, match="changed the outputs"):
        BreakOutputs(amount=1e-2 * scale)(PROGRAM)


def test_pass_that_raises_leaves_the_model_alone() -> None:
    before = untouched(PROGRAM)
    with pytest.raises(PassError, match="pass Raise failed") as caught:
        Raise()(PROGRAM)
    assert caught.value.id == "FXC-PASS-001" and "a bug in the pass" in str(caught.value)
    assert isinstance(caught.value.__cause__, KeyError)
    assert_untouched(PROGRAM, before)


def test_writing_into_the_input_is_refused() -> None:
    with pytest.raises(PassError, match="wrote into its input") as caught:
        WriteInPlace()(program())
    assert caught.value.id == "FXC-PASS-003"


def test_broken_normal_form_is_refused() -> None:
    before = untouched(PROGRAM)
    with pytest.raises(NormalFormError, match="no shape metadata"):
        DropMetadata()(PROGRAM)
    assert_untouched(PROGRAM, before)


def test_program_that_does_not_run_is_refused() -> None:
    @dataclass(frozen=True)
    class BreakShapes(Pass):
        def run(self, program: Program, context: Context) -> Result:
            for node in program.graph.nodes:
                if node.target is torch.ops.aten.silu.default:
                    node.target = torch.ops.aten.mm.default
            return Result(program)

    with pytest.raises(PassError, match="does not run any more after pass BreakShapes") as caught:
        BreakShapes()(PROGRAM)
    assert caught.value.id == "FXC-PASS-004"


def test_requires_and_ensures() -> None:
    @dataclass(frozen=True)
    class Demanding(Pass):
        what: str = "requires"

        def requires(self, program: Program, context: Context) -> None:
            if self.what == "requires":
                raise PassError(60, "not this model")

        def run(self, program: Program, context: Context) -> Result:
            return Result(program)

        def ensures(self, before: Program, after: Program) -> None:
            if self.what == "ensures":
                raise PassError(61, "promise broken")
            if self.what == "crash":
                raise ZeroDivisionError

    for what, text in (("requires", "not this model"), ("ensures", "promise broken"), ("crash", "Demanding failed")):
        with pytest.raises(PassError, match=text):
            Demanding(what)(PROGRAM)


def test_training_mode_is_kept() -> None:
    p = program()
    p.gm.train()
    result = SiluToSigmoidMul()(p)
    assert p.gm.training and result.program.gm.training
    assert all(m.training for m in p.gm.modules())


# ------------------------------------------------------------------------------------------------ recipes
RECIPES = [
    FoldBatchNorm(),
    FuseActivations(activations=("relu", "silu"), residual=False),
    QuantizeStatic(calibrator="entropy", samples=7, ignore=("head*", "0")),
    Pipeline(passes=(FoldBatchNorm(), Pipeline(passes=(QuantizeStatic(ignore=("a",)),)))),
    Twice(inner=Twice(inner=RoundWeights(step=0.5))),
]


@pytest.mark.parametrize("pass_", RECIPES, ids=lambda p: p.name)
def test_recipe_round_trip(pass_: Pass) -> None:
    entry = pass_.to_dict()
    assert entry["name"] == type(pass_).__name__
    assert Pass.from_dict(entry) == pass_
    assert Pass.from_dict(json.loads(json.dumps(entry))) == pass_
    assert hash(Pass.from_dict(entry)) == hash(pass_)


def test_recipe_holds_every_option() -> None:
    given = {"calibrator": "entropy", "weight_calibrator": "minmax", "bias_correction": False, "samples": 7}
    given |= {"weight_bits": 4}
    assert QuantizeStatic(**given, ignore=("a", "b"), eight_bits=("c",)).to_dict() == {  # type: ignore[arg-type]
        "name": "QuantizeStatic",
        **given,
        "ignore": ["a", "b"],
        "eight_bits": ["c"],
    }


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "FoldBatchNrom"}, "unknown pass 'FoldBatchNrom'"),
        ({}, "unknown pass ''"),
        ({"name": "FoldBatchNorm", "speed": 1}, "FoldBatchNorm has no option speed"),
        ({"name": "Pipeline", "passes": [{"name": "Nope"}]}, "unknown pass 'Nope'"),
        ({"name": "Needy"}, "Needy cannot be made from its recipe entry"),
    ],
)
def test_bad_recipe_is_an_error(entry: dict[str, object], message: str) -> None:
    @dataclass(frozen=True)
    class Needy(Pass):
        amount: int

        def run(self, program: Program, context: Context) -> Result:
            return Result(program)

    with pytest.raises(PassError, match=message) as caught:
        Pass.from_dict(entry)
    if "unknown" in message:
        assert "FoldBatchNorm" in caught.value.fix


def test_two_passes_of_one_name_are_refused() -> None:
    """Recipes know passes by name: a second FoldBatchNorm would silently be the one they mean."""
    body = {"run": lambda self, program, context: Result(program), "__module__": "somewhere.else"}
    with pytest.raises(PassError, match="there is already a pass FoldBatchNorm"):
        type("FoldBatchNorm", (Pass,), body)
    assert registered_passes()["FoldBatchNorm"] is FoldBatchNorm


def test_a_class_defined_again_replaces_the_old_one() -> None:
    for _ in range(2):  # as a notebook cell that is run twice

        @dataclass(frozen=True)
        class Again(Pass):
            def run(self, program: Program, context: Context) -> Result:
                return Result(program)

        assert registered_passes()["Again"] is Again


# ------------------------------------------------------------------------------------------------ measures
def test_output_error() -> None:
    a = torch.tensor([1.0, -4.0])
    assert output_error([a], [a.clone()]) == 0
    assert output_error([a], [a + torch.tensor([0.0, 1.0])]) == 0.25
    assert output_error([a, a], [a, a * 2]) == 1.0
    nan, inf = torch.tensor([float("nan"), 1.0]), torch.tensor([float("inf"), 2.0])
    assert output_error([nan], [nan.clone()]) == 0 and output_error([inf], [inf.clone()]) == 0
    assert output_error([a], [nan]) == float("inf") and output_error([nan], [a]) == float("inf")
    assert output_error([inf], [-inf]) == float("inf")
    assert output_error([a], [a[:1]]) == float("inf") and output_error([a], []) == float("inf")
    assert output_error([a, 3], [a, 3]) == 0 and output_error([a, 3], [a, 4]) == float("inf")
    assert output_error([torch.zeros(0)], [torch.zeros(0)]) == 0
    whole = torch.tensor([1, 2])
    assert output_error([whole], [whole.clone()]) == 0 and output_error([whole], [whole + 1]) == 0.5
    wave = torch.tensor([1 + 1j])
    assert output_error([wave], [wave.clone()]) == 0 and output_error([wave], [wave.conj()]) == 2.0


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 1e-1)])
def test_tolerance_goes_with_the_dtype(dtype: torch.dtype, tolerance: float) -> None:
    p = capture(nn.Linear(2, 2).to(dtype), (torch.zeros(2, 2, dtype=dtype),))
    assert exact_tolerance(p, p.run_example()) == tolerance


def test_one_shot_data_serves_several_passes() -> None:
    context = Context(calibration=(torch.zeros(1) for _ in range(3)))
    assert isinstance(context.calibration, CalibrationData)
    assert len(list(context.calibration)) == len(list(context.calibration)) == 3


def test_refusal_reads_well() -> None:
    assert str(Refusal("fold norm", "layer1.bn", "two users")) == "fold norm at layer1.bn: two users"
