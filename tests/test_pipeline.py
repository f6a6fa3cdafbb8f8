"""Pipeline: order, records, dumps, notes on errors, bisect."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress.capture import capture
from fxcompress.errors import PassError, UsageError
from fxcompress.ir import Program
from fxcompress.passbase import Context, Pass, fingerprint, output_error
from fxcompress.passes import EliminateDeadCode, FoldBatchNorm, FuseActivations, QuantizeStatic, RemoveIdentity
from fxcompress.pipeline import Pipeline, StepRecord, as_pipeline, precision_of
from fxcompress.testing import check_pass
from tests.helpers.example_passes import BreakOutputs, Idle, Raise, RoundWeights, SiluToSigmoidMul


def program() -> Program:
    torch.manual_seed(0)
    block = [nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.SiLU(), nn.Dropout(), nn.Conv2d(2, 2, 1), nn.ReLU()]
    return capture(nn.Sequential(*block).eval(), (torch.randn(2, 2, 6, 6),))


PROGRAM = program()


def test_order_and_records() -> None:
    seen: list[StepRecord] = []
    passes = (RemoveIdentity(), FoldBatchNorm(), FuseActivations(activations=("relu",)), SiluToSigmoidMul())
    result = Pipeline(passes=passes, observer=seen.append)(PROGRAM)
    assert [r.name for r in seen] == [p.name for p in passes]
    assert seen == result.metrics["steps"]
    assert [r.config for r in seen] == [p.to_dict() for p in passes]
    assert all(r.modified and r.exact and r.error is not None and r.error < 1e-5 and r.seconds > 0 for r in seen)
    assert result.modified and result.changes == [c for r in seen for c in r.changes]
    assert str(seen[1]).startswith("FoldBatchNorm: 1 changes, error ")
    assert result.error == output_error(PROGRAM.run_example(), result.program.run_example())


def test_order_is_the_users() -> None:
    """Fused first, nothing is left to fold: the pipeline does not reorder."""
    right = as_pipeline([FoldBatchNorm(), FuseActivations()])(PROGRAM)
    wrong = as_pipeline([FuseActivations(), FoldBatchNorm()])(PROGRAM)
    assert len(right.changes) == 3 and any("silu" in c for c in right.changes)
    assert not any("silu" in c for c in wrong.changes)


def test_nothing_to_do() -> None:
    before = fingerprint(PROGRAM)
    for pipeline in (Pipeline(), Pipeline(passes=(Idle(),)), as_pipeline(Idle())):
        result = pipeline(PROGRAM)
        assert not result.modified and result.error == 0.0 and result.changes in ([], ["nothing at all"])
        assert result.program is not PROGRAM and fingerprint(result.program) == before


def test_pipelines_nest_and_keep_the_contract() -> None:
    inner = Pipeline(passes=(FoldBatchNorm(), FuseActivations()))
    outer = Pipeline(passes=(RemoveIdentity(), inner, EliminateDeadCode()))
    result = check_pass(outer, PROGRAM)
    steps = result.metrics["steps"]
    assert [r.name for r in steps] == ["RemoveIdentity", "Pipeline", "EliminateDeadCode"]
    assert [r.name for r in steps[1].metrics["steps"]] == ["FoldBatchNorm", "FuseActivations"]
    flat = Pipeline(passes=(RemoveIdentity(), *inner.passes, EliminateDeadCode()))(PROGRAM)
    assert flat.program.text() == result.program.text()


def test_refusals_are_kept() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3, padding=1))
    result = as_pipeline([FoldBatchNorm()])(capture(model.eval(), (torch.randn(2, 2, 4, 4),)))
    assert [r.rule for r in result.refusals] == []  # shift zero: folded
    model[0].bias.data.fill_(1.0)
    result = as_pipeline([FoldBatchNorm()])(capture(model.eval(), (torch.randn(2, 2, 4, 4),)))
    assert [r.rule for r in result.refusals] == ["fold norm backwards"]
    assert result.metrics["steps"][0].refusals == [str(r) for r in result.refusals]
    assert "1 refused" in str(result.metrics["steps"][0])


def test_quantization_in_a_pipeline_from_a_generator() -> None:
    """Two passes that calibrate can share one generator."""
    data = (torch.randn(2, 2, 6, 6) for _ in range(3))
    context = Context(calibration=data)
    first = Pipeline(passes=(FoldBatchNorm(), QuantizeStatic()))(PROGRAM, context)
    second = Pipeline(passes=(FoldBatchNorm(), QuantizeStatic()))(PROGRAM, context)
    assert first.error == second.error and first.error is not None and first.error > 0
    assert first.metrics["steps"][1].metrics["samples"] == second.metrics["steps"][1].metrics["samples"] == 6


# ------------------------------------------------------------------------------------------------ dumps
def test_dumps(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "dump"
    result = Pipeline(passes=(FoldBatchNorm(), Idle(), FuseActivations()), dump=str(folder))(PROGRAM)
    assert sorted(p.name for p in folder.iterdir()) == [
        "00_capture.txt",
        "01_FoldBatchNorm.diff",
        "01_FoldBatchNorm.txt",
        "02_Idle.diff",
        "02_Idle.txt",
        "03_FuseActivations.diff",
        "03_FuseActivations.txt",
    ]
    assert (folder / "00_capture.txt").read_text() == PROGRAM.text()
    assert (folder / "03_FuseActivations.txt").read_text() == result.program.text()
    diff = (folder / "01_FoldBatchNorm.diff").read_text()
    assert "-%_1 = 1:BatchNorm2d" in diff and "+++ after" in diff
    assert (folder / "02_Idle.diff").read_text() == ""


def test_dump_numbers_go_on(tmp_path: Path) -> None:
    Pipeline(passes=(Idle(),), dump=str(tmp_path), first=4)(PROGRAM)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["05_Idle.diff", "05_Idle.txt"]


def test_unwritable_dump_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be dumped"):
        Pipeline(passes=(Idle(),), dump=str(tmp_path / "file"))(PROGRAM)


# ------------------------------------------------------------------------------------------------ errors
def test_error_names_pass_and_predecessors() -> None:
    pipeline = Pipeline(passes=(FoldBatchNorm(), Idle(), Pipeline(passes=(RemoveIdentity(), Raise()))))
    before = fingerprint(PROGRAM)
    with pytest.raises(PassError, match="pass Raise failed") as caught:
        pipeline(PROGRAM)
    assert caught.value.__notes__ == [
        "  in pass 2 of 2, Raise; passes before it: RemoveIdentity",
        "  in pass 3 of 3, Pipeline; passes before it: FoldBatchNorm, Idle",
    ]
    assert fingerprint(PROGRAM) == before


def test_error_of_the_data_names_the_pass() -> None:
    with pytest.raises(Exception, match="empty") as caught:
        as_pipeline([Idle(), QuantizeStatic()])(PROGRAM, Context(calibration=[]))
    assert caught.value.__notes__ == ["  in pass 2 of 2, QuantizeStatic; passes before it: Idle"]


@pytest.mark.parametrize(("what", "hint"), [(FoldBatchNorm, r"FoldBatchNorm\(\)"), ("FoldBatchNorm", "instances")])
def test_what_is_no_pass_is_refused(what: object, hint: str) -> None:
    with pytest.raises(UsageError, match=f"is not a pass(.|\n)*{hint}"):
        Pipeline(passes=(what,))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ bisect
class Counting:
    """A predicate that counts how often it is asked: outputs as those of ``reference``."""

    def __init__(self, reference: Program) -> None:
        self.expected, self.asked = reference.run_example(), 0

    def __call__(self, program: Program) -> bool:
        self.asked += 1
        return output_error(self.expected, program.run_example()) < 1e-3


@pytest.mark.parametrize("position", [0, 3, 10, 15])
def test_bisect_finds_the_bad_pass(position: int) -> None:
    passes: list[Pass] = [Idle()] * 16
    passes[position] = bad = BreakOutputs()
    good = Counting(PROGRAM)
    assert Pipeline(passes=tuple(passes)).bisect(PROGRAM, good) is bad
    assert good.asked <= 2 + math.ceil(math.log2(16))


def test_bisect_looks_into_nested_pipelines() -> None:
    inner = Pipeline(passes=(Idle(), SiluToSigmoidMul(), BreakOutputs(), Idle()))
    outer = Pipeline(passes=(FoldBatchNorm(), inner, Idle()))
    assert outer.bisect(PROGRAM, Counting(PROGRAM)) is inner.passes[2]


def test_bisect_of_a_good_pipeline() -> None:
    assert Pipeline(passes=(FoldBatchNorm(), FuseActivations())).bisect(PROGRAM, Counting(PROGRAM)) is None


def test_bisect_of_a_bad_start() -> None:
    with pytest.raises(PassError, match="bad before any pass"):
        Pipeline(passes=(Idle(),)).bisect(PROGRAM, lambda p: False)


def test_bisect_judges_lossy_passes_too() -> None:
    passes = (FoldBatchNorm(), RoundWeights(step=1e-4), RoundWeights(step=0.5), FuseActivations())
    found = Pipeline(passes=passes).bisect(PROGRAM, Counting(PROGRAM), Context())
    assert found is passes[2]


@pytest.mark.parametrize(
    ("passes", "name"),
    [
        ((), ""),
        ((fxc.FoldBatchNorm(), fxc.QuantizeStatic()), "int8"),
        ((fxc.QuantizeWeights(bits=8), fxc.QuantizeDynamic()), "int8"),
        ((fxc.QuantizeWeights(bits=4), fxc.QuantizeDynamic()), "int4 weights + int8"),
        ((fxc.QuantizeWeights(bits=8, include="a"), fxc.QuantizeWeights(bits=4)), "int8 weights + int4 weights"),
        ((fxc.QuantizeStatic(), fxc.Cast("fp16")), "int8 + fp16"),
    ],
    ids=str,
)
def test_what_reports_call_passes(passes: tuple[Pass, ...], name: str) -> None:
    assert precision_of(passes) == name
