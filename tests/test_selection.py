"""The speed gate's choices, and the arithmetic behind them."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from fxcompress import selection
from fxcompress.bench import Latency, LatencyComparison, Ratio, compare_latency
from fxcompress.errors import UsageError
from fxcompress.selection import Candidate, choose
from tests.helpers.quick import built, images

TARGETS = {name: SimpleNamespace(name=name, scheme=lambda: None, portable=True) for name in ("a", "b")}


def candidate(target: str, precision: str, variant: str = "") -> Candidate:
    engine: Any = SimpleNamespace()
    made: Any = [TARGETS[target], precision, None, None, []]
    return Candidate(*made, variant=variant, is_baseline=precision == "float32" and not variant, _engine=engine)


def rounds(monkeypatch: pytest.MonkeyPatch, **medians: list[float]) -> None:
    """Puts medians of rounds, by ``target_precision``, in place of measurements; no variant is tried."""

    def compare(engines: Any, args: Any, kwargs: Any) -> LatencyComparison:
        given = {label: medians[label.replace(" ", "_")] for label in engines}
        return LatencyComparison({k: Latency.of(v, 1, 1) for k, v in given.items()}, given)

    monkeypatch.setattr(selection, "compare_latency", compare)
    monkeypatch.setattr(selection, "variants", lambda program: [])


PAIR = [candidate("a", "float32"), candidate("a", "int8")]


def decide(candidates: list[Candidate], **options: Any) -> selection.Choice:
    return choose(candidates, (), {}, **({"measure": True, "gate": True, "threads": 1} | options))


@pytest.mark.parametrize(
    ("quick", "kept"),
    [
        ([1.0, 1.1, 0.9, 1.0, 1.0], True),
        ([1.9, 1.9, 1.9, 1.9, 1.9], True),
        ([1.96] * 5, False),
        ([1.0, 1.0, 1.0, 1.0, 2.4], False),
        ([2.5] * 5, False),
    ],
    ids=["clearly faster", "faster by five percent", "faster by two percent", "slower in one round", "slower"],
)
def test_int8_is_kept_only_when_it_is_surely_faster(
    monkeypatch: pytest.MonkeyPatch, quick: list[float], kept: bool
) -> None:
    rounds(monkeypatch, a_float32=[2.0] * 5, a_int8=quick)
    found = decide(PAIR)
    assert (found.chosen is PAIR[1]) == kept and found.baseline is PAIR[0]
    assert (found.speedup is not None) == kept and bool(found.decisions) != kept


def test_never_slower_than_the_best_float_engine_of_any_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """INT8 beats float32 in its own runtime, yet the other runtime's float32 is faster."""
    every = [*PAIR, candidate("b", "float32"), candidate("b", "int8")]
    rounds(monkeypatch, a_float32=[4.0] * 5, a_int8=[2.0] * 5, b_float32=[1.0] * 5, b_int8=[3.0] * 5)
    found = decide(every)
    assert found.chosen is every[2] and found.baseline is every[2]
    assert "b float32" in found.decisions[0]


def test_without_measuring_the_last_candidate_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "compare_latency", lambda *a: pytest.fail("it was timed"))
    found = decide(PAIR, measure=False)
    assert found.chosen is PAIR[1] and found.baseline is PAIR[0] and found.latency == {}


def test_a_given_choice_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds(monkeypatch, a_float32=[1.0] * 5, a_int8=[2.0] * 5)
    found = decide(PAIR, gate=False)
    assert found.chosen is PAIR[1] and found.speedup == (0.5, 0.5, 0.5)


def test_without_the_gate_the_fastest_compressed_engine_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    several = [candidate(target, precision) for target in ("a", "b") for precision in ("float32", "int8")]
    rounds(monkeypatch, a_float32=[1.0] * 5, a_int8=[2.0] * 5, b_float32=[1.0] * 5, b_int8=[3.0] * 5)
    assert decide(several, gate=False).chosen is several[1]


def test_nothing_was_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds(monkeypatch, a_float32=[1.0] * 5)
    found = decide(PAIR[:1])
    assert found.chosen is PAIR[0] and "no pass quantizes" in found.decisions[0]


def test_ratio() -> None:
    found = LatencyComparison(medians={"a": [1.0, 2.0, 3.0], "b": [2.0, 2.0, 2.0]})
    assert found.ratio("a", "b") == Ratio(1.0, 0.5, 1.5) and found.ratio("a", "b").faster is None
    assert Ratio(0.5, 0.4, 0.9).faster is True and Ratio(2.0, 1.1, 3.0).faster is False
    forth, back = found.ratio("a", "b"), found.ratio("b", "a")
    assert math.isclose(forth.low, 1 / back.high) and math.isclose(forth.high, 1 / back.low)
    eight = LatencyComparison(medians={"a": [9.0, 1, 1, 1, 1, 1, 1, 0.1], "b": [1.0] * 8})
    assert eight.ratio("a", "b") == Ratio(1.0, 1.0, 1.0), "one outlier on each side is cut from eight rounds"


def test_latency() -> None:
    found = Latency.of([4.0, 1.0, 2.0, 3.0], 2, 8, 12.5)
    assert (found.p50_ms, found.min_ms, found.mean_ms, found.iqr_ms) == (2.5, 1.0, 2.5, 1.5)
    assert (found.runs, found.threads, found.batch, found.peak_rss_mb) == (4, 2, 8, 12.5)
    assert Latency(**found.to_dict()) == found


@pytest.mark.onnxruntime
@pytest.mark.openvino
def test_engines_are_timed_in_processes_of_their_own() -> None:
    engines = {name: built(name, "float32") for name in ("onnxruntime", "openvino")}
    found = compare_latency(engines, (images(3),), budget_s=0.1, rounds=3)
    assert set(found.latency) == set(engines)
    for name, latency in found.latency.items():
        assert latency.batch == 3 and latency.threads == 1 and latency.runs >= 3 and len(found.medians[name]) == 3
        assert latency.peak_rss_mb is not None and 10 < latency.peak_rss_mb < 2000
    assert json_ready(found.to_dict())


def json_ready(value: Any) -> bool:
    import json

    return bool(json.loads(json.dumps(value, allow_nan=False)) == value)


def test_nothing_to_time() -> None:
    with pytest.raises(UsageError, match="nothing to compare"):
        compare_latency({})
    with pytest.raises(UsageError, match="0 runs"):
        built("torch", "float32").benchmark(images(2), runs=0)
