"""Cast: 16-bit arithmetic with float32 edges, overflow kept out, on every engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import PassError, UsageError
from fxcompress.half import Range
from tests.helpers.products import Attention, Products
from tests.helpers.quick import RUNTIMES, cnn, images

ENGINES = [*(pytest.param(name, marks=getattr(pytest.mark, name)) for name in RUNTIMES), "torch"]
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Large(nn.Module):
    """Values beyond float16's range in the middle."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x) * 1e6) / 1e6)  # type: ignore[no-any-return]


def dtypes(program: fxc.Program) -> dict[str, torch.dtype]:
    """Dtype of the weight of every layer."""
    return {str(n.target): m.weight.dtype for n, m in program.layers() if hasattr(m, "weight")}


@pytest.mark.parametrize("dtype", HALF)
def test_everything_computes_in_16_bits(dtype: str) -> None:
    x = torch.randn(3, 5, 192, generator=torch.Generator().manual_seed(0))
    model = Products().eval()
    result = fxc.check_pass(fxc.Cast(dtype), model, (x,))  # type: ignore[arg-type]
    assert all(p.dtype == HALF[dtype] for p in result.program.gm.parameters())
    expected = Products().eval().to(HALF[dtype])(x.to(HALF[dtype]))
    got = result.program(x)
    assert got.dtype == torch.float32 and torch.equal(got, expected.float()), "the model's own .half() gives the same"
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_what_overflows_stays_in_float32() -> None:
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    result = fxc.check_pass(fxc.Cast("fp16"), Large().eval(), (x,))
    assert dtypes(result.program) == {"a": torch.float16, "b": torch.float32, "c": torch.float16}
    assert any(n.startswith("b stays float32: its values reach") for n in result.notes)
    with torch.no_grad():
        error = (result.program(x) - Large().eval()(x)).norm() / Large().eval()(x).norm()
        assert float(error) < 5e-3 and not bool(Large().half()(x.half()).isfinite().all())
    wide = fxc.Cast("bf16")(fxc.capture(Large().eval(), (x,)), fxc.Context())
    assert set(dtypes(wide.program).values()) == {torch.bfloat16}


def test_calibration_shows_the_range() -> None:
    """The example is small, the data is not."""
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    program = fxc.capture(nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 4)).eval(), (x,))
    (alone,) = fxc.Cast("fp16")(program, fxc.Context()).notes
    assert "on the example alone" in alone
    notes = fxc.Cast("fp16")(program, fxc.Context(calibration=[x, x * 1e5])).notes
    assert {n.split()[0] for n in notes if "stays" in n} == {"0", "1"}
    assert [n for n in notes if "stays" not in n] == ["calibrated on 16 samples, 64 asked for"]
    enough = fxc.Cast("fp16", samples=8)(program, fxc.Context(calibration=[x, x * 1e5]))
    assert not enough.notes  # the second batch was not asked for
    torn = x.clone()
    torn[0, 0] = torch.nan
    notes = fxc.Cast("fp16", samples=1200)(program, fxc.Context(calibration=[torn] + [x] * 150)).notes
    assert notes == ["1 calibration batches held NaN or infinity and were skipped"]
    assert not fxc.Cast("bf16")(program, fxc.Context()).notes
    assert fxc.Cast("bf16", keep="frist")(program, fxc.Context()).notes == ["keep='frist' matches no layer"]
    with pytest.raises(UsageError, match="nothing to look at"):
        fxc.Cast("fp16", samples=0)


def test_weights_that_float16_loses() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4)).eval()
    with torch.no_grad():
        model[0].weight.mul_(1e-9)
    result = fxc.check_pass(fxc.Cast("fp16"), model, (torch.randn(4, 16),))
    assert dtypes(result.program)["0"] == torch.float32 and any("are below" in n for n in result.notes)


def test_layers_asked_for_stay() -> None:
    x = torch.randn(3, 5, 192)
    result = fxc.check_pass(fxc.Cast("bf16", keep="a"), Products().eval(), (x,))
    assert dtypes(result.program)["a"] == torch.float32 and dtypes(result.program)["b"] == torch.bfloat16
    assert "a stays float32: asked to be kept" in result.notes


def test_tied_weights_stay_tied() -> None:
    ids = torch.randint(0, 50, (2, 7))
    program = fxc.check_pass(fxc.Cast("bf16"), Attention().eval(), (ids,)).program
    assert program.gm.get_submodule("embed").weight is program.gm.get_submodule("head").weight
    kept = fxc.Cast("bf16", keep="head")(fxc.capture(Attention().eval(), (ids,)), fxc.Context()).program
    assert dtypes(kept)["head"] == torch.float32 and dtypes(kept)["embed"] == torch.bfloat16


@pytest.mark.parametrize("runtime", ENGINES)
@pytest.mark.parametrize("dtype", HALF)
def test_on_every_engine(runtime: str, dtype: Any) -> None:
    ids = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    for model, x in ((cnn(), images(2)), (Attention(), ids), (Large(), torch.randn(3, 16))):
        engine = fxc.compile(model, (x,), passes=[fxc.Cast(dtype)], target=runtime, measure=False, threads=1)
        with torch.no_grad():
            got, expected = engine(x), model(x)
        assert got.dtype == torch.float32 and engine.report.precision == dtype
        assert float((got - expected).norm() / expected.norm()) < (5e-3 if dtype == "fp16" else 4e-2)


@pytest.mark.parametrize("runtime", ENGINES)
@pytest.mark.parametrize("dtype", HALF)
def test_models_that_are_half_already(runtime: str, dtype: str) -> None:
    model, x = Products(192, 96).eval(), torch.randn(3, 5, 192)
    narrow = Products(192, 96).eval().to(HALF[dtype])
    engine = fxc.compile(narrow, (x.to(HALF[dtype]),), passes=[], target=runtime, measure=runtime == "torch", threads=1)
    got = engine(x.to(HALF[dtype]))
    assert got.dtype == HALF[dtype]
    with torch.no_grad():
        assert float((got.float() - model(x)).norm() / model(x).norm()) < (5e-3 if dtype == "fp16" else 4e-2)
    weights = sum(p.numel() * 2 for p in narrow.parameters())
    assert engine.file_size() < weights + 30_000


def test_bad_options() -> None:
    with pytest.raises(UsageError, match="use 'fp16' or 'bf16'"):
        fxc.Cast("int8")  # type: ignore[arg-type]
    with pytest.raises(PassError, match="nothing can be cast"):
        fxc.Cast("fp16")(fxc.capture(nn.Linear(4, 4).half(), (torch.randn(2, 4).half(),)), fxc.Context())


def test_ranges() -> None:
    found = Range()
    found.add(torch.tensor([0.0, float("inf"), 3e4]))
    assert found.problem == ""
    found.add(torch.tensor([4e4]))
    assert "4e+04" in found.problem
    small = Range()
    small.add(torch.tensor([0.0, 0.0, 1e-9, 1e-8, 1.0]))
    assert "below" in small.problem
