"""Sensitivity: what is measured, what is read from the cache, what is recommended, and how it is shown."""

from __future__ import annotations

import fnmatch
import json
import logging
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxcompress as fxc
from fxcompress.errors import ArtifactError, PruneError, UsageError
from fxcompress.prune import sensitivity, sensitivity_cache
from fxcompress.prune.plan import plan_pruning
from fxcompress.prune.sensitivity import Sensitivity, analyze_sensitivity

RATIOS = (0.25, 0.5, 0.75)


# ------------------------------------------------------------------------------------------------ a planner to count with
@dataclass
class FakeGroup:
    name: str
    layers: tuple[str, ...]
    size: int
    removed: int = 0
    alternative: str = ""


@dataclass
class FakePlan:
    """Removes what was asked for, and writes it into the notes of the program, where `score` reads it."""

    groups: list[FakeGroup]

    def apply(self, program: fxc.Program) -> fxc.Program:
        pruned = program.clone()
        pruned.notes += [f"{g.name}={g.removed}" for g in self.groups if g.removed]
        return pruned


def fake_planner(program: fxc.Program, ratio: float, *, ratios: Any = None, **options: Any) -> FakePlan:
    assert ratio == 0
    groups = [
        FakeGroup("a", ("conv1", "bn1"), 8),
        FakeGroup("b[0]", ("conv2",), 4),
        FakeGroup("c", ("qkv",), 4, 0, "a"),
    ]
    for pattern, share in ratios.items():
        hit = [g for g in groups if fnmatch.fnmatchcase(g.name, pattern)]
        assert len(hit) == 1
        hit[0].removed = round(hit[0].size * share) if hit[0].layers[0] not in options.get("ignore", ()) else 0
    return FakePlan(groups)


COST = {"a": 0.01, "b[0]": 0.1}  # of one unit


@dataclass
class Score:
    """0.9 less the cost of every unit that went; keeps what it was asked."""

    asked: list[list[str]] = field(default_factory=list)
    offset: float = 0.9

    def __call__(self, model: Callable[..., Any]) -> float:
        assert isinstance(model, fxc.Program) and not model.gm.training and not torch.is_grad_enabled()
        self.asked.append(list(model.notes))
        lost = [note.split("=") for note in model.notes]
        return self.offset - sum(COST[name] * int(units) for name, units in lost)


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> fxc.Program:
    monkeypatch.setattr(sensitivity, "plan_pruning", fake_planner)
    torch.manual_seed(0)
    return fxc.capture(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), (torch.randn(2, 4),))


def analyze(program: fxc.Program, evaluate: Any = None, ratios: Any = RATIOS, **options: Any) -> Sensitivity:
    return analyze_sensitivity(program, evaluate or Score(), ratios, progress=False, **options)


# ------------------------------------------------------------------------------------------------ measuring
def test_every_group_at_every_ratio(program: fxc.Program) -> None:
    score = Score()
    program.gm.train()
    found = analyze(program, score)
    assert program.gm.training, "evaluate runs in eval mode, and the mode comes back"
    assert found.baseline == 0.9 and found.ratios == RATIOS and found.importance == "l2"
    assert [(c.name, c.layers, c.size) for c in found.groups] == [("a", ("conv1", "bn1"), 8), ("b[0]", ("conv2",), 4)]
    assert [p.metric for p in found["a"].points] == pytest.approx([0.9 - 0.02, 0.9 - 0.04, 0.9 - 0.06])
    assert [p.metric for p in found["b[0]"].points] == pytest.approx([0.8, 0.7, 0.6])
    assert score.asked[0] == [] and score.asked[1:4] == [["a=2"], ["a=4"], ["a=6"]] and len(score.asked) == 7


def test_ratios_that_remove_the_same_are_measured_once(program: fxc.Program) -> None:
    score = Score()
    found = analyze(program, score, (0.05, 0.24, 0.25, 0.26), groups="conv2")
    assert [p.removed for p in found.groups[0].points] == [0, 1, 1, 1]
    assert [p.ratio for p in found.groups[0].points] == [0.05, 0.24, 0.25, 0.26]
    assert score.asked == [[], ["b[0]=1"]], "nothing removed is the program itself"
    assert found.groups[0].points[0].metric == found.baseline


@pytest.mark.parametrize(
    ("groups", "names"), [("a", ["a"]), ("conv2", ["b[0]"]), (["b[[]*", "bn?"], ["a", "b[0]"]), ("b[0]", ["b[0]"])]
)
def test_groups_by_glob_of_their_names_or_layers(program: fxc.Program, groups: Any, names: list[str]) -> None:
    assert [c.name for c in analyze(program, groups=groups).groups] == names


def test_unknown_group_offers_the_nearest(program: fxc.Program) -> None:
    with pytest.raises(UsageError, match=r"'b\[1\]'(.|\n)*nearest: b\[0\]"):
        analyze(program, groups="b[1]")
    with pytest.raises(UsageError, match="no group"):
        analyze(program)["c"]


@pytest.mark.parametrize("ratios", [(), (0.0, 0.5), (0.5, 1.0), (-0.1,), (math.nan,)])
def test_wrong_ratios(program: fxc.Program, ratios: Any) -> None:
    with pytest.raises(UsageError, match="ratio"):
        analyze(program, ratios=ratios)


def test_ratio_of_the_planner_is_refused(program: fxc.Program) -> None:
    with pytest.raises(UsageError, match="sets ratio itself"):
        analyze(program, ratio=0.5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_metric_that_is_not_finite_names_group_and_ratio(program: fxc.Program, value: float) -> None:
    def evaluate(model: fxc.Program) -> float:
        return value if model.notes == ["a=4"] else 0.5

    with pytest.raises(PruneError, match=r"not finite(.|\n)*group a at ratio 0.5"):
        analyze(program, evaluate)
    with pytest.raises(PruneError, match=r"not finite(.|\n)*the program as it is"):
        analyze(program, lambda model: value)


def test_what_evaluate_raises_says_where(program: fxc.Program) -> None:
    def evaluate(model: fxc.Program) -> float:
        if model.notes == ["a=6"]:
            raise RuntimeError("no data")
        return 0.5

    with pytest.raises(RuntimeError, match="no data") as caught:
        analyze(program, evaluate)
    assert caught.value.__notes__ == ["while evaluating group a at ratio 0.75"]


def test_the_cost_is_said_before_the_first_pruned_model(
    program: fxc.Program, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("fxcompress")
    seen_at: list[int] = []

    def evaluate(model: fxc.Program) -> float:
        seen_at.append(len(said))
        return 0.5

    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        analyze_sensitivity(program, evaluate, RATIOS)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert seen_at == [0, 1, 1, 1, 1, 1, 1]
    cost = re.compile(r"2 groups x 3 ratios, 0 cached, at most 6 evaluations of about [\d.e-]+ s: [\d.]+ s")
    assert cost.search(said[0]) and cost.search(capsys.readouterr().err)


# ------------------------------------------------------------------------------------------------ cache
def cache_file(folder: Path) -> Path:
    (found,) = folder.iterdir()
    return found


def test_resume_behind_what_was_measured(program: fxc.Program, tmp_path: Path) -> None:
    whole = analyze(program)
    stop = Score()

    def evaluate(model: fxc.Program) -> float:
        if len(stop.asked) == 4:
            raise KeyboardInterrupt
        return stop(model)

    with pytest.raises(KeyboardInterrupt):
        analyze(program, evaluate, cache=tmp_path)
    assert len(json.loads(cache_file(tmp_path).read_text())["points"]) == 3
    score = Score()
    assert analyze(program, score, cache=tmp_path) == whole
    assert score.asked == [[], ["b[0]=1"], ["b[0]=2"], ["b[0]=3"]]
    score = Score()
    assert analyze(program, score, cache=tmp_path) == whole and score.asked == [[]]


def test_further_ratios_use_the_same_file(program: fxc.Program, tmp_path: Path) -> None:
    analyze(program, cache=tmp_path)
    score = Score()
    found = analyze(program, score, (0.5, 0.73, 0.9), cache=tmp_path)
    assert score.asked == [[], ["a=7"], ["b[0]=4"]], "0.73 removes as many units as 0.75, which is known"
    assert [p.removed for c in found.groups for p in c.points] == [4, 6, 7, 2, 3, 4]


def test_each_measurement_is_one_replacement(
    program: fxc.Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced: list[int] = []
    replace = sensitivity_cache.os.replace

    def counted(source: str, target: Path) -> None:
        replace(source, target)
        replaced.append(len(json.loads(target.read_text())["points"]))

    monkeypatch.setattr(sensitivity_cache.os, "replace", counted)
    analyze(program, cache=tmp_path)
    assert replaced == [1, 2, 3, 4, 5, 6] and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("change", ["weights", "options", "importance", "graph"])
def test_another_model_or_option_never_reads_the_cache(program: fxc.Program, tmp_path: Path, change: str) -> None:
    analyze(program, cache=tmp_path)
    options: dict[str, Any] = {}
    if change == "weights":
        with torch.no_grad():
            next(program.gm.parameters())[0, 0] += 1e-6
    elif change == "graph":
        net = nn.Sequential(*(program.gm.get_submodule("0"), nn.GELU(), program.gm.get_submodule("2")))
        program = fxc.capture(net, program.example[0])
    else:
        options = {"round_to": 8} if change == "options" else {"importance": "l1"}
    score = Score()
    analyze(program, score, cache=tmp_path, **options)
    assert len(score.asked) == 7 and len(list(tmp_path.iterdir())) == 2


def test_options_without_a_text_have_a_stable_key(program: fxc.Program) -> None:
    def key(**options: Any) -> str:
        return sensitivity_cache.fingerprint(program, "l2", options)

    loader, other = object(), object()
    assert key(train=loader) == key(train=other), "no addresses"
    assert key(x=torch.ones(2)) == key(x=torch.ones(2)) != key(x=torch.zeros(2))
    assert key(x=torch.ones(2)) != key(x=torch.ones(2, 1)) and key(loss=F.mse_loss) != key(loss=F.l1_loss)


def test_cache_of_another_evaluate_is_refused(program: fxc.Program, tmp_path: Path) -> None:
    analyze(program, cache=tmp_path)
    with pytest.raises(UsageError, match=r"another evaluate(.|\n)*0.9(.|\n)*0.8"):
        analyze(program, Score(offset=0.8), cache=tmp_path)
    analyze(program, Score(offset=0.9 + 1e-7), cache=tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "fxcompress sensitivity cache", "schema": 9}'])
def test_damaged_cache(program: fxc.Program, tmp_path: Path, content: str) -> None:
    analyze(program, cache=tmp_path)
    cache_file(tmp_path).write_text(content)
    with pytest.raises(ArtifactError, match="cache of measurements is damaged"):
        analyze(program, cache=tmp_path)


def test_a_cached_number_that_is_not_finite(program: fxc.Program, tmp_path: Path) -> None:
    analyze(program, cache=tmp_path)
    path = cache_file(tmp_path)
    content = json.loads(path.read_text())
    content["points"][0][1]["metric"] = math.nan
    path.write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match="not finite"):
        analyze(program, cache=tmp_path)


def test_cache_that_cannot_be_made(program: fxc.Program, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot be saved"):
        analyze(program, cache=tmp_path / "file")


# ------------------------------------------------------------------------------------------------ the planner itself
class Digits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.inner, self.outer = nn.Conv2d(12, 16, 3, padding=1), nn.Conv2d(16, 12, 3, padding=1)
        self.head = nn.Linear(12, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.max_pool2d(F.relu(x + self.outer(F.relu(self.inner(x)))), 2)
        return self.head(x.amax((2, 3)))  # type: ignore[no-any-return]


Data = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def digits() -> tuple[fxc.Program, Callable[[Any], float], Data]:
    """A small network trained on scikit-learn's digits, its accuracy on the last third, and the rest."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1, torch.tensor(labels)
    net = Digits()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(6):
        for index in torch.randperm(1200).split(100):
            optimizer.zero_grad()
            F.cross_entropy(net(x[index]), y[index]).backward()
            optimizer.step()
    program = fxc.capture(net.eval(), (x[:2],))

    def top1(model: Any) -> float:
        return float((model(x[1200:]).argmax(1) == y[1200:]).float().mean())

    return program, top1, (x[:1200], y[:1200])


def test_curves_are_those_of_a_plan_per_point(digits: Any, tmp_path: Path) -> None:
    program, top1, _ = digits
    before = {n: t.clone() for n, t in program.gm.state_dict().items()}
    found = analyze_sensitivity(program, top1, (0.25, 0.5, 0.9), cache=tmp_path, progress=False)
    assert found.baseline > 0.85 and {c.name for c in found.groups} == {"stem", "inner"} and not found.whole
    for curve in found.groups:
        for point in curve.points:
            plan = plan_pruning(program, ratio=0, ratios={curve.name: point.ratio})
            pruned = plan.apply(program)
            assert top1(pruned) == point.metric and len(plan.removed[curve.name]) == point.removed > 0
            assert sum(p.numel() for p in pruned.gm.parameters()) == point.parameters < found.parameters
            assert plan.macs[1] == point.macs < found.macs == plan.macs[0]
    assert min(p.metric for c in found.groups for p in c.points) < found.baseline - 0.1
    assert all(torch.equal(t, before[n]) for n, t in program.gm.state_dict().items()), "the program is left as it is"
    assert analyze_sensitivity(program, top1, (0.25, 0.5, 0.9), cache=tmp_path, progress=False) == found


def test_recommended_ratios_are_what_the_planner_takes(digits: Any) -> None:
    program, top1, _ = digits
    found = analyze_sensitivity(program, top1, progress=False)
    for name, ratio in found.recommend(0.05).items():
        plan = plan_pruning(program, ratio=0, ratios={name: ratio})
        group = next(g for g in plan.groups if g.name == name)
        assert group.removed == round(ratio * group.size)
        assert found.baseline - top1(plan.apply(program)) <= 0.05 + 0.03, "measured between the points of the curve"
    joint = found.recommend(0.1, joint=True)
    assert found.predicted_drop(joint) <= 0.1 and any(joint.values())
    assert plan_pruning(program, ratio=0, ratios=joint).apply(program).history


def test_statistics_are_collected_once(digits: Any) -> None:
    program, top1, (x, y) = digits
    reads: list[int] = []

    class Loader:
        def __iter__(self) -> Any:
            reads.append(1)
            return iter([(x[:64], y[:64]), (x[64:128], y[64:128])])

    options: dict[str, Any] = {"train": Loader(), "loss": lambda out, batch: F.cross_entropy(out, batch[1])}
    found = analyze_sensitivity(program, top1, (0.25, 0.5), importance="taylor", progress=False, **options)
    assert len(reads) == 1 and found.importance == "taylor"
    plan = plan_pruning(program, ratio=0, ratios={"inner": 0.5}, importance="taylor", **options)
    assert top1(plan.apply(program)) == found["inner"].points[1].metric


def test_groups_that_must_stay_are_said(digits: Any) -> None:
    program, top1, _ = digits
    found = analyze_sensitivity(program, top1, (0.5,), ignore=["inner"], progress=False)
    assert [c.name for c in found.groups] == ["stem"] and found.whole == ("inner",)
    assert "nothing can go: inner" in str(found)
