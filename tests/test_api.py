"""compile() as a user meets it: targets, data, gates, the report, and what it leaves untouched."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress import selection
from fxcompress.bench import Latency, LatencyComparison
from fxcompress.engines import Engine, registered_targets
from fxcompress.errors import (
    CalibrationError,
    CaptureError,
    FxcError,
    GateError,
    MissingRuntimeError,
    PassError,
    UsageError,
)
from fxcompress.ir import Program
from fxcompress.passbase import Context, Pass, Result
from fxcompress.passes import FoldBatchNorm, FuseActivations, QuantizeStatic
from fxcompress.report import Report
from tests.helpers.quick import Answer, Cnn, cnn, images, token_net, tokens

RUNTIMES = [pytest.param(name, marks=getattr(pytest.mark, name)) for name in ("onnxruntime", "openvino")]
INT8 = (FoldBatchNorm(), FuseActivations(), QuantizeStatic())
DATA = [images(4, seed) for seed in (1, 2)]


def quick(model: nn.Module | None = None, **options: Any) -> Engine:
    """compile without timing, as the simulation, with explicit passes; ``options`` change that."""
    chosen: dict[str, Any] = {"passes": INT8, "target": "torch", "calibration": DATA, "measure": False, "threads": 1}
    return fxc.compile(model or cnn(), **(chosen | options))


def copy_of(model: nn.Module) -> Callable[[], None]:
    """Remembers a model; the result checks that it is as it was."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modes, hooks = [m.training for m in model.modules()], [len(m._forward_hooks) for m in model.modules()]
    names = [n for n, _ in model.named_modules()]

    def check() -> None:
        now = model.state_dict()
        assert list(now) == list(state) and all(torch.equal(now[k], v) for k, v in state.items())
        assert [m.training for m in model.modules()] == modes and [n for n, _ in model.named_modules()] == names
        assert [len(m._forward_hooks) for m in model.modules()] == hooks

    return check


# ------------------------------------------------------------------------------------------------ targets and passes
@pytest.mark.parametrize("target", ["torch", *RUNTIMES])
def test_every_target(target: str) -> None:
    x = images(3, seed=9)
    engine = quick(target=target)
    with torch.no_grad():
        expected = cnn()(x)
    error = float((engine(x) - expected).norm() / expected.norm())
    assert engine.name == target and 1e-4 < error < 0.2
    assert engine.report.precision == "int8" and engine.report.parity["error"] <= engine.report.parity["tolerance"]


@pytest.mark.parametrize("target", ["torch", *RUNTIMES])
def test_without_data_only_exact_passes_run(target: str) -> None:
    engine = quick(target=target, passes=None, calibration=None, example_inputs=(images(2),))
    x = images(3, seed=9)
    with torch.no_grad():
        torch.testing.assert_close(engine(x), cnn()(x), rtol=1e-4, atol=1e-5)
    assert engine.report.precision == "float32" and "QuantizeStatic" not in [s.name for s in engine.report.steps]


def test_default_passes_quantize_when_there_is_data() -> None:
    names = [type(p).__name__ for p in fxc.compile.__globals__["default_passes"](quantize=True)]
    assert names[-1] == "QuantizeStatic" and {"FoldBatchNorm", "FuseActivations"} < set(names)
    engine = quick(passes=None)
    assert [s.name for s in engine.report.steps] == names


@pytest.mark.parametrize("example", [images(2), (images(2),), [images(2)], {"x": images(2)}])
def test_forms_of_example_inputs(example: Any) -> None:
    engine = quick(passes=(FoldBatchNorm(),), calibration=None, example_inputs=example)
    assert engine(images(5)).shape == (5, 10)


def test_keyword_model() -> None:
    engine = quick(token_net(), calibration=[tokens(4, 1), tokens(4, 2)])
    found = engine(**tokens(3))
    assert type(found) is Answer and found.logits.shape == (3, 3)


def test_nothing_to_run_on() -> None:
    with pytest.raises(UsageError, match="needs example_inputs or calibration data"):
        quick(passes=(), calibration=None)
    with pytest.raises(UsageError, match="max_drop needs evaluate"):
        quick(max_drop=0.1)
    with pytest.raises(UsageError, match="did you mean 'openvino'"):
        quick(target="openvion")


@pytest.mark.parametrize("target", RUNTIMES)
def test_missing_runtime(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told before any work is done, with the pip line; without a target, with every pip line."""
    line = f'pip install "fxcompress[{target}]"'
    for made in registered_targets().values():
        if made.name != "torch":
            monkeypatch.setattr(type(made), "available", lambda self: f'pip install "fxcompress[{self.name}]"')
    monkeypatch.setattr("fxcompress.api.capture", lambda *a, **k: pytest.fail("it began to work"))
    for name in (target, None):
        with pytest.raises(MissingRuntimeError) as caught:
            quick(target=name)
        assert line in caught.value.fix


# ------------------------------------------------------------------------------------------------ data
def generator() -> Iterator[Tensor]:
    yield from DATA


FORMS: dict[str, Callable[[], Any]] = {
    "tensors": lambda: DATA,
    "input and label": lambda: [(x, torch.zeros(4)) for x in DATA],
    "lists": lambda: [[x] for x in DATA],
    "list and label": lambda: [[x, torch.zeros(4)] for x in DATA],
    "dicts": lambda: [{"x": x, "labels": torch.zeros(4)} for x in DATA],
    "generator": generator,
    "loader": lambda: torch.utils.data.DataLoader(torch.cat(DATA), batch_size=4),  # type: ignore[arg-type]
}


@pytest.fixture(scope="module")
def expected() -> Tensor:
    return quick()(images(3))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("with_example", [True, False])
def test_forms_of_calibration_data(form: str, with_example: bool, expected: Tensor) -> None:
    """The same data in another form gives the same engine."""
    options = {"example_inputs": (images(4, 1),)} if with_example else {}
    assert torch.equal(quick(calibration=FORMS[form](), **options)(images(3)), expected)


class Two(nn.Module):
    """Two inputs: a pair from the loader has no label."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.fc(x + y)  # type: ignore[no-any-return]


@pytest.mark.parametrize("label", [(), (torch.zeros(3),)])
def test_two_inputs_from_the_data(label: tuple[Tensor, ...]) -> None:
    model = Two().eval()
    batch = (torch.randn(3, 4), torch.randn(3, 4), *label)
    engine = quick(model, calibration=[batch])
    with torch.no_grad():
        expected = model(*batch[:2])
    assert float((engine(*batch[:2]) - expected).norm() / expected.norm()) < 0.1


class Failing:
    """Raises at batch 3."""

    def __iter__(self) -> Iterator[Tensor]:
        yield from [images(2)] * 3
        raise OSError("cannot read image 17.png")


BROKEN: dict[str, tuple[Callable[[], Any], type[FxcError], str]] = {
    "empty": (lambda: [], CalibrationError, "loader is empty"),
    "empty generator": (lambda: iter(()), CalibrationError, "loader is empty"),
    "raises": (Failing, CalibrationError, r"failed at batch 3(.|\n)*cannot read image 17"),
    "shape": (lambda: [images(2), images(2)[..., :9]], CalibrationError, "batch 1 does not fit"),
    "dtype": (lambda: [images(2), images(2).double()], CalibrationError, "batch 1 does not fit"),
    "nan": (lambda: [images(2), images(2) * float("nan")], CalibrationError, "hold NaN or infinity"),
    "a tensor": (lambda: images(2), UsageError, "iterable of batches, not Tensor"),
}


@pytest.mark.parametrize("with_example", [True, False])
@pytest.mark.parametrize("kind", BROKEN)
def test_broken_data(kind: str, with_example: bool) -> None:
    make, error, message = BROKEN[kind]
    model = Cnn().train()
    untouched = copy_of(model)
    with pytest.raises(error, match=message):
        quick(model, calibration=make(), **({"example_inputs": (images(2),)} if with_example else {}))
    untouched()


# ------------------------------------------------------------------------------------------------ the model
class Late(Pass):
    """Fails when all the work is done."""

    exact = False

    def run(self, program: Program, context: Context) -> Result:
        raise ValueError("late")


def test_model_is_left_alone() -> None:
    model = Cnn().train()
    model.blocks[0].norm.eval()
    untouched = copy_of(model)
    quick(model, evaluate=lambda m: 1.0)
    untouched()
    with pytest.raises(PassError, match="pass Late failed"):
        quick(model, passes=(*INT8, Late()))
    untouched()
    with pytest.raises(ZeroDivisionError):
        quick(model, evaluate=lambda m: 1 / 0)
    untouched()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float) -> None:
    model = Cnn()
    with torch.no_grad():
        model.blocks[1].conv.weight[0, 0] = value  # type: ignore[index, union-attr]
    with pytest.raises(CaptureError, match=r"NaN or infinite weights(.|\n)*blocks\.1\.conv\.weight"):
        quick(model)


@pytest.mark.parametrize("target", ["torch", *RUNTIMES])
def test_zero_channel_and_zero_layer(target: str) -> None:
    torch.manual_seed(1)
    model = Cnn().eval()
    with torch.no_grad():
        model.stem.weight[2] = 0
        model.stem.bias[2] = 0  # type: ignore[index]
        model.blocks[1].conv.weight.zero_()  # type: ignore[union-attr, operator]
        expected = model(images(3))
    got = quick(model, target=target)(images(3))
    assert got.isfinite().all() and float((got - expected).norm() / expected.norm()) < 0.2


# ------------------------------------------------------------------------------------------------ gates
def score(model: Any) -> float:
    """1 for the model, 0.9 for an engine."""
    return 1.0 if isinstance(model, nn.Module) else 0.9


def test_accuracy_gate() -> None:
    assert quick(evaluate=score, max_drop=0.11).report.accuracy == {
        "before": 1.0, "after": 0.9, "max_drop": 0.11, "passed": True,
    }  # fmt: skip
    assert quick(evaluate=score).report.accuracy["passed"]
    with pytest.raises(GateError, match=r"fell from 1.0000 to 0.9000(.|\n)*max_drop is 0.05") as caught:
        quick(evaluate=score, max_drop=0.05)
    engine = caught.value.engine
    assert isinstance(engine, Engine) and engine(images(2)).shape == (2, 10)
    assert engine.report.accuracy["passed"] is False and "MISSED" in str(engine.report)


def test_model_is_scored_in_eval_mode() -> None:
    model = Cnn().train()
    modes: list[bool] = []
    quick(model, evaluate=lambda m: float(modes.append(getattr(m, "training", False)) is None))
    assert modes == [False, False] and model.training


def test_strict() -> None:
    ignoring = (*INT8[:2], QuantizeStatic(ignore=("head",)))
    assert ("head", "asked to be ignored") in quick(passes=ignoring).report.left
    with pytest.raises(PassError, match=r"strict(.|\n)*head: asked to be ignored"):
        quick(passes=ignoring, strict=True)


def timings(monkeypatch: pytest.MonkeyPatch, times: Mapping[str, float]) -> list[str]:
    """Puts latencies in milliseconds in place of measured ones, by words of the label; returns what was asked for."""
    asked: list[str] = []

    def compare(engines: Mapping[str, Engine], args: Any = (), kwargs: Any = None, **options: Any) -> LatencyComparison:
        found = LatencyComparison()
        for label in engines:
            asked.append(label)
            ms = next(v for k, v in times.items() if k in label)
            found.latency[label], found.medians[label] = Latency.of([ms] * 9, 1, 4), [ms] * 5
        return found

    monkeypatch.setattr(selection, "compare_latency", compare)
    return asked


def default(target: str | None = "onnxruntime", **options: Any) -> Engine:
    return quick(target=target, measure=True, **({"passes": None} | options))


@pytest.mark.onnxruntime
def test_int8_that_is_faster_is_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    timings(monkeypatch, {"float32": 2.0, "int8": 1.0})
    engine = default()
    assert engine.report.precision == "int8" and engine.report.speedup == (2.0, 2.0, 2.0)
    assert "2.00x faster" in str(engine.report)


@pytest.mark.onnxruntime
@pytest.mark.parametrize("ms", [3.0, 2.0, 1.98])
def test_int8_that_is_not_faster_is_given_up(monkeypatch: pytest.MonkeyPatch, ms: float) -> None:
    """Slower, equal, and faster by no more than noise."""
    timings(monkeypatch, {"float32": 2.0, "int8": ms})
    engine = default()
    with torch.no_grad():
        torch.testing.assert_close(engine(images(3)), cnn()(images(3)), rtol=1e-4, atol=1e-5)
    report = engine.report
    assert report.precision == "float32" and report.speedup is None
    assert report.latency["before"] == report.latency["after"] and report.latency["after"].p50_ms == 2.0
    assert "INT8 everywhere is not faster" in report.decisions[0] and "stays in float32" in report.decisions[-1]
    assert f"round by round {ms / 2:.2f} times [" in report.decisions[0], "medians alone can mislead"
    assert "stays in float32" in str(report)


@pytest.mark.onnxruntime
def test_explicit_passes_are_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user asked for INT8: it stays, and the report says what it costs."""
    timings(monkeypatch, {"float32": 2.0, "int8": 3.0})
    engine = default(passes=INT8)
    assert engine.report.precision == "int8" and "1.50x SLOWER" in str(engine.report)


@pytest.mark.onnxruntime
def test_the_speed_gate_can_be_asked_for_and_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    timings(monkeypatch, {"float32": 2.0, "int8": 3.0})
    engine = default(passes=INT8, speed_gate=True)
    assert engine.report.precision == "float32" and engine.report.decisions
    assert default(speed_gate=False).report.precision == "int8"


@pytest.mark.onnxruntime
@pytest.mark.openvino
@pytest.mark.parametrize(
    ("times", "winner"),
    [
        ({"openvino float32": 4.0, "openvino int8": 1.0, "float32": 2.0, "int8": 1.5}, ("openvino", "int8")),
        ({"openvino float32": 1.0, "int8": 1.5, "float32": 2.0}, ("openvino", "float32")),
        ({"onnxruntime float32": 1.0, "int8": 1.5, "float32": 2.0}, ("onnxruntime", "float32")),
    ],
)
def test_without_a_target_the_fastest_engine_wins(
    monkeypatch: pytest.MonkeyPatch, times: dict[str, float], winner: tuple[str, str]
) -> None:
    asked = timings(monkeypatch, times)
    engine = default(None)
    assert (engine.name, engine.report.precision) == winner
    assert {"onnxruntime float32", "onnxruntime int8", "openvino float32", "openvino int8"} <= set(asked)


# ------------------------------------------------------------------------------------------------ the report
@pytest.mark.onnxruntime
def test_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    timings(monkeypatch, {"float32": 2.0, "int8": 1.0})
    engine = default(passes=(*INT8[:2], QuantizeStatic(ignore=("head",))), evaluate=score, max_drop=0.2)
    report = engine.report
    text = str(report)
    assert len(text.splitlines()) <= 12 and all(len(line) < 160 for line in text.splitlines())
    for word in ("accuracy", "size", "latency p50", "MACs", "parameters", "parity", "quantized"):
        assert word in text, word
    plain = report.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["size"][1] == engine.file_size() and plain["size"][0] > plain["size"][1] > 0
    assert plain["parameters"][0] == sum(p.numel() for p in cnn().parameters()) and plain["macs"][0] > 0
    after = plain["latency"]["after"]
    assert {"p50_ms", "p95_ms", "iqr_ms", "threads", "batch", "runs"} <= set(after) and after["batch"] == 4
    assert plain["memory"] > 1e6 and plain["parity"]["error"] <= plain["parity"]["tolerance"]
    assert ["head", "asked to be ignored"] in plain["left"]
    steps = {s["name"]: s for s in plain["steps"]}
    assert steps["FoldBatchNorm"]["changes"] and "refusals" in steps["FuseActivations"]
    assert plain["environment"] and plain["seconds"]["capture"] > 0
    assert str(Report.from_dict(plain)) == text and Report.from_dict(plain).to_dict() == plain
    loaded = fxc.load(engine.save(tmp_path / "out"), threads=1)
    assert str(loaded.report) == text and loaded.report.to_dict() == plain


def test_dump(tmp_path: Path) -> None:
    quick(dump=str(tmp_path / "graphs"))
    names = sorted(p.name for p in (tmp_path / "graphs" / "torch").iterdir())
    assert names[0].startswith("00") and any("QuantizeStatic" in n for n in names)


def test_observer() -> None:
    seen: list[str] = []
    quick(observer=lambda record: seen.append(record.name))
    assert seen == ["FoldBatchNorm", "FuseActivations", "QuantizeStatic"]
