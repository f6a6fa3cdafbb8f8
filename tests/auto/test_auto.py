"""passes="auto": it finds the mix that holds the accuracy, is never slower, and tells everything it tried."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress import selection
from fxcompress.auto.recipes import families, with_layers_raised
from fxcompress.auto.sensitivity import layer_errors
from fxcompress.bench import Latency, LatencyComparison
from fxcompress.errors import GateError, UsageError
from fxcompress.report import Report
from tests.helpers.digits import Attention, Convolutions, accuracy, held_out, trained, training

Clock = Callable[[str], float]


def batches(count: int = 12) -> list[Tensor]:
    return [b[0] for b in training(16)][:count]


class Outlier(nn.Module):
    """A trained network behind a layer that no 8-bit activation survives.

    ``mix`` makes three huge channels out of nothing and takes them away again, exactly in float: with one scale per tensor
    everything else becomes zero.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.back = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 1, 1)
        self.rest = trained(Convolutions)
        with torch.no_grad():
            self.mix.weight.copy_(torch.tensor([1.0, 3e3, -3e3, 3e3]).reshape(4, 1, 1, 1))
            self.mix.bias.zero_()  # type: ignore[union-attr]
            self.back.weight.copy_(torch.tensor([1.0, 1e-4, 1e-4, 0.0]).reshape(1, 4, 1, 1))
            self.back.bias.zero_()  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(x)
        return self.rest(self.back(y + 0.0))  # type: ignore[no-any-return]


@cache
def outlier() -> nn.Module:
    return Outlier().eval()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Clock], None]:
    """Puts a function of an engine's label in place of the measurement of its latency."""

    def install(of: Clock) -> None:
        def compare(engines: Any, args: Any, kwargs: Any) -> LatencyComparison:
            rounds = {label: [of(label)] * 5 for label in engines}
            return LatencyComparison({k: Latency.of(v, 1, 1) for k, v in rounds.items()}, rounds)

        monkeypatch.setattr(selection, "compare_latency", compare)
        monkeypatch.setattr(type(fxc.target("torch")), "unmeasured", lambda self: None)

    return install


def by_layers(label: str) -> float:
    """Float 2 ms; INT8 1 ms and a little more for each layer that is not quantized."""
    if "float32" in label:
        return 2.0
    return 1.0 + 0.1 * sum(int(count) for count in re.findall(r"(\d+) sensitive", label))


def search(model: nn.Module, **options: Any) -> Any:
    chosen: dict[str, Any] = {
        "passes": "auto",
        "evaluate": accuracy,
        "max_drop": 0.005,
        "target": "torch",
        "calibration": batches(),
        "threads": 1,
    }
    return fxc.compile(model, (held_out()[0][:2],), **(chosen | options))


# ------------------------------------------------------------------------------------------------ what it finds
def test_the_cheapest_recipe_that_holds_is_taken(clock: Callable[[Clock], None]) -> None:
    clock(by_layers)
    report = search(trained(Convolutions)).report
    assert report.precision == "int8" and report.accuracy["passed"]
    chosen = [t for t in report.trials if t["verdict"] == "chosen"]
    assert [t["name"] for t in chosen] == ["static INT8"]
    assert chosen[0]["accuracy"] == pytest.approx(report.accuracy["after"])
    assert report.latency["after"].p50_ms == 1.0 and report.speedup is not None


def test_a_planted_layer_is_found_and_left_out(clock: Callable[[Clock], None]) -> None:
    """All-INT8 fails with every repair; the mix keeps what makes and reads the outliers in float."""
    clock(by_layers)
    model = outlier()
    report = search(model).report
    assert report.accuracy["passed"] and report.precision == "int8 (partly)"
    uniform = [t for t in report.trials if t["accuracy"] is not None and not t["left"]]
    assert uniform and all("accuracy falls" in t["verdict"] for t in uniform)
    chosen = next(t for t in report.trials if t["verdict"] == "chosen")
    assert "back" in chosen["left"] and len(chosen["left"]) <= 3, "most layers stay in INT8"
    assert {n for n, _ in report.left} >= set(chosen["left"])


def test_never_slower_than_float(clock: Callable[[Clock], None]) -> None:
    clock(lambda label: 1.0 if "float32" in label else 1.1)
    report = search(trained(Convolutions)).report
    assert report.precision == "float32" and report.accuracy["after"] == pytest.approx(report.accuracy["before"])
    dropped = [t for t in report.trials if t["size"] and t["name"] != "float32"]
    assert dropped and all("not faster than float32" in t["verdict"] for t in dropped)


def test_never_below_max_drop(clock: Callable[[Clock], None]) -> None:
    """Nothing but float gives the very same score here, so float is what comes out."""
    clock(by_layers)
    model = trained(Convolutions)

    def exact(engine: Any) -> float:
        with torch.no_grad():
            same = torch.allclose(engine(held_out()[0]), model(held_out()[0]), rtol=1e-4, atol=1e-4)
        return float(same)

    report = search(model, evaluate=exact, max_drop=0.0, passes=fxc.AutoSearch(trials=8)).report
    assert report.precision == "float32" and report.accuracy["passed"]
    assert any("stopped after 8 evaluations" in d for d in report.decisions)


def test_without_measuring_the_order_of_the_recipes_decides() -> None:
    report = search(trained(Convolutions), measure=False).report
    assert report.precision == "int8" and report.latency == {}
    assert all(t["latency_ms"] is None for t in report.trials)


def test_transformers_have_more_recipes(clock: Callable[[Clock], None]) -> None:
    clock(lambda label: 2.0 if "float32" in label else 0.5 if "INT4 weights #" in label else 1.0)
    report = search(trained(Attention), max_drop=0.02).report
    names = {t["name"] for t in report.trials}
    assert {"static INT8", "dynamic INT8", "INT4 weights", "INT8 weights"} <= names
    assert all(t["verdict"] for t in report.trials)
    assert next(t for t in report.trials if t["verdict"] == "chosen")["name"].startswith("INT4 weights")


def test_the_smallest_is_taken(clock: Callable[[Clock], None]) -> None:
    clock(by_layers)
    report = search(trained(Attention), passes=fxc.AutoSearch(objective="size"), max_drop=0.05).report
    sizes = [t["size"] for t in report.trials if t["accuracy"] is not None]
    assert next(t for t in report.trials if t["verdict"] == "chosen")["size"] == min(sizes)


def test_budgets_that_nothing_keeps(clock: Callable[[Clock], None]) -> None:
    clock(by_layers)
    for budget in (fxc.AutoSearch(max_latency_ms=0.5, trials=3), fxc.AutoSearch(max_size=10, trials=3)):
        with pytest.raises(GateError, match="no mix of precisions keeps the budget") as caught:
            search(trained(Convolutions), passes=budget)
        assert any("static INT8 on torch" in note for note in caught.value.__notes__)


def test_a_latency_that_cannot_be_measured() -> None:
    with pytest.raises(UsageError, match=r"max_latency_ms=0\.5 cannot be kept without measuring") as caught:
        search(trained(Convolutions), passes=fxc.AutoSearch(max_latency_ms=0.5), measure=False)
    assert "measure=False" in str(caught.value)


def test_report_of_the_trials(clock: Callable[[Clock], None], tmp_path: Any) -> None:
    clock(by_layers)
    engine = search(trained(Convolutions))
    again = Report.from_dict(json.loads(json.dumps(engine.report.to_dict())))
    assert again.trials == engine.report.trials
    table = engine.report.trials_table()
    assert "chosen" in table and "FP16, BF16" in table and len(table.splitlines()) == 1 + len(again.trials)
    assert fxc.Report("Net", "torch").trials_table() == ""


def test_wrong_use() -> None:
    model = trained(Convolutions)
    with pytest.raises(UsageError, match="needs evaluate and max_drop"):
        fxc.compile(model, (held_out()[0][:2],), passes="auto", target="torch")
    with pytest.raises(UsageError, match="passes='fast': not known"):
        search(model, passes="fast")
    with pytest.raises(UsageError, match="objective='speed'"):
        fxc.AutoSearch(objective="speed")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="nothing can be tried"):
        fxc.AutoSearch(trials=0)


# ------------------------------------------------------------------------------------------------ its parts
def test_layers_are_ranked_by_the_error_they_cause_alone() -> None:
    """Against a program in which that layer alone is quantized by the pass itself."""
    model, data = trained(Attention), batches()
    plain = fxc.Pipeline((fxc.FuseActivations(),))(fxc.capture(model, (data[0],))).program
    context = fxc.Context(calibration=data)
    quantized = fxc.QuantizeStatic(bias_correction=False)(plain, context).program
    found = layer_errors(quantized, [((data[0],), {})])
    names = ["embed", "qkv", "out", "up", "down", "head"]
    assert sorted(n for n, _ in found) == sorted(names)
    assert [e for _, e in found] == sorted((e for _, e in found), reverse=True)
    for name, error in found:
        alone = tuple(n for n in names if n != name)
        only = fxc.QuantizeStatic(bias_correction=False, ignore=alone)(plain, context).program
        with torch.no_grad():
            exact, got = plain(data[0]).double(), only(data[0]).double()
        want = float((got - exact).square().sum() / exact.square().sum())
        assert error == pytest.approx(want, rel=1e-3), name


def test_raising_layers() -> None:
    four, dynamic = fxc.QuantizeWeights(bits=4), fxc.QuantizeDynamic()
    raised = with_layers_raised((four, dynamic), ["a[0]", "b"])
    assert [type(p).__name__ for p in raised] == ["QuantizeWeights", "QuantizeWeights", "QuantizeDynamic"]
    first, second = raised[:2]
    assert isinstance(first, fxc.QuantizeWeights) and isinstance(second, fxc.QuantizeWeights)
    assert first.ignore == ("a[[]0]", "b") == second.include and second.bits == 8
    static = with_layers_raised((fxc.EqualizeLayers(), fxc.QuantizeStatic()), ["b"])[1]
    assert isinstance(static, fxc.QuantizeStatic) and static.ignore == ("b",)
    assert with_layers_raised((four,), []) == (four,)


def test_families_fit_the_program() -> None:
    plain = fxc.capture(trained(Convolutions), (held_out()[0][:2],))
    target = fxc.target("onnxruntime")
    found, left = families(plain, target, True, fxc.AutoSearch())
    assert [f.name for f in found] == ["static INT8"] and len(left) == 2
    found, left = families(plain, target, False, fxc.AutoSearch(objective="size"))
    assert [f.name for f in found] == ["FP16", "BF16"] and "calibration data" in left[0][1]
    text = fxc.capture(trained(Attention), (held_out()[0][:2],))
    assert {"dynamic INT8", "INT4 weights"} <= {f.name for f in families(text, target, True, fxc.AutoSearch())[0]}
