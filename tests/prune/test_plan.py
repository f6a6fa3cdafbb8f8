"""plan_pruning: what a user asks for is what goes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import fxcompress as fxc
from fxcompress.analysis import count_macs, count_parameters
from fxcompress.errors import PruneError
from fxcompress.ir import Program
from fxcompress.prune.plan import PruningPlan
from fxcompress.prune.slots import Slot
from tests.prune.planned import example, model, program


def plan_of(name: str = "cnn", ratio: float | None = None, **options: Any) -> PruningPlan:
    return fxc.plan_pruning(program(name), ratio, **options)


def gone(plan: PruningPlan) -> dict[str, int]:
    """Layer -> number of output channels that go."""
    return {name: len(indices) for name, indices in plan.removed.items()}


def shapes(p: Program) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in p.gm.state_dict().items()}


def output(p: Program, inputs: tuple[Any, ...]) -> Tensor:
    with torch.no_grad():
        result: Tensor = p(*inputs)
    return result


def ascending(slot: Slot, tensor: Tensor) -> Tensor:
    """The first channels matter least."""
    del tensor
    return torch.arange(1.0, slot.size + 1)


# ------------------------------------------------------------------------------------------------ how much
def test_local_ratio_is_taken_from_every_group() -> None:
    plan = plan_of(ratio=0.5, scope="local")
    ties = ["stem.0", "stem.1", "outer"], ["inner", "depthwise"], ["fc1"]
    for layers, count in zip(ties, (8, 12, 10), strict=True):
        assert len({plan.removed[layer] for layer in layers}) == 1 and len(plan.removed[layers[0]]) == count
    assert "fc2" not in plan.removed
    assert [(g.name, g.size, g.removed) for g in plan.groups] == [("stem.0", 16, 8), ("inner", 24, 12), ("fc1", 20, 10)]


@pytest.mark.parametrize("ratio", [0.1, 0.35, 0.5, 0.8])
def test_global_ratio_is_of_all_channels(ratio: float) -> None:
    plan = plan_of("chain", ratio)
    total = 16 + 24 + 32
    assert abs(sum(gone(plan).values()) - ratio * total) <= 1
    assert len(set(gone(plan).values())) > 1, "a global ranking takes more from some layers than from others"


def test_global_ranking_takes_the_least_important() -> None:
    """Scores chosen by the test, relative to their layer's mean: the reference sorts them by itself."""
    generator = torch.Generator().manual_seed(5)
    table = {f"convs.{i}": torch.rand(n, generator=generator).double() + 0.1 for i, n in enumerate((16, 24, 32))}

    def importance(slot: Slot, tensor: Tensor) -> Tensor | None:
        return table[slot.layer] if slot.role == "out" and slot.layer in table and tensor.dim() == 4 else None

    plan = plan_of("chain", 0.4, importance=importance)
    ranked = sorted((float(s / t.mean()), name, i) for name, t in table.items() for i, s in enumerate(t))
    expected: dict[str, set[int]] = {}
    for _, name, index in ranked[: round(0.4 * len(ranked))]:
        expected.setdefault(name, set()).add(index)
    assert {n: set(r) for n, r in plan.removed.items()} == expected


def test_a_function_as_importance() -> None:
    plan = plan_of(ratio=0.25, scope="local", importance=ascending)
    assert plan.removed["inner"] == tuple(range(6)) and plan.removed["stem.0"] == tuple(range(4))
    assert plan.options["importance"] == "ascending"


def test_a_layer_is_never_emptied() -> None:
    """One layer scores far below the others: it keeps min_channels."""

    def importance(slot: Slot, tensor: Tensor) -> Tensor:
        return torch.linspace(1e-6, 1.0, slot.size) ** (40 if slot.layer == "convs.0" else 1)

    plan = plan_of("chain", 0.9, importance=importance, min_channels=3, max_ratio=0.99)
    assert gone(plan) == {"convs.0": 13, "convs.1": 21, "convs.2": 29}
    assert output(plan.apply(program("chain")), example("chain")).shape == (2, 5)


def test_max_ratio_and_min_channels() -> None:
    assert set(gone(plan_of("chain", 0.9, scope="local", max_ratio=0.5)).values()) == {8, 12, 16}
    assert set(gone(plan_of("chain", 0.9, scope="local", min_channels=10)).values()) == {6, 14, 22}
    assert gone(plan_of("chain", 0.9, scope="local", min_channels=20)) == {"convs.1": 4, "convs.2": 12}


def test_ratios_per_layer() -> None:
    only = plan_of("chain", ratios={"convs.1": 0.25})
    assert gone(only) == {"convs.1": 6}
    both = plan_of("chain", 0.5, scope="local", ratios={"convs.0": 0.0, "convs.2": 0.75})
    assert gone(both) == {"convs.1": 12, "convs.2": 24}
    assert gone(plan_of("chain", ratios={"convs.*": 0.5})) == {"convs.0": 8, "convs.1": 12, "convs.2": 16}
    tied = plan_of(ratios={"outer": 0.5})  # its channels are the stem's
    assert gone(tied) == {"stem.0": 8, "stem.1": 8, "outer": 8}


def test_round_to_leaves_multiples() -> None:
    plan = plan_of("chain", 0.4, round_to=8, scope="local")
    left = {name: shapes(plan.apply(program("chain")))[f"{name}.weight"][0] for name in plan.removed}
    assert left == {"convs.0": 8, "convs.1": 16, "convs.2": 16} or all(n % 8 == 0 for n in left.values())
    assert set(left) == {"convs.0", "convs.1", "convs.2"}


def test_round_to_leaves_smaller_layers_alone_and_says_so() -> None:
    plan = plan_of(ratio=0.5, round_to=20, scope="local", include=["inner", "stem"], min_channels=1)
    assert "stem.0" not in plan.removed
    assert any("round_to=20" in note and "stem.0" in note for note in plan.notes)


# ------------------------------------------------------------------------------------------------ what
@pytest.mark.parametrize("pattern", ["stem", "stem.*", "stem.0", "outer", "out*"])
def test_ignoring_one_layer_keeps_all_that_is_tied_to_it(pattern: str) -> None:
    plan = plan_of(ratio=0.5, ignore=[pattern])
    assert set(plan.removed) == {"inner", "depthwise", "fc1"}
    assert gone(plan_of(ratio=0.5, ignore=pattern)) == gone(plan), "one glob may be given alone"


def test_include() -> None:
    assert set(plan_of(ratio=0.5, include=["fc*"]).removed) == {"fc1"}
    assert set(plan_of(ratio=0.5, include=["inner", "fc1"], ignore=["fc1"]).removed) == {"inner", "depthwise"}


def test_removed_names_every_layer_whose_output_shrinks() -> None:
    """Norms and depthwise layers included: exactly the kept rows of every tensor are left."""
    plan = plan_of(ratio=0.5, scope="local")
    dense, pruned = program("cnn").gm.state_dict(), plan.apply(program("cnn")).gm.state_dict()
    assert set(plan.removed) == {"stem.0", "stem.1", "inner", "depthwise", "outer", "fc1"}
    for layer, indices in plan.removed.items():
        assert list(indices) == sorted(indices)
        size = len(dense[f"{layer}.weight"])
        kept = [i for i in range(size) if i not in indices]
        for part in ("bias", "running_mean", "running_var"):
            if f"{layer}.{part}" in dense:
                assert torch.equal(pruned[f"{layer}.{part}"], dense[f"{layer}.{part}"][kept])
    inner, outer = ([i for i in range(n) if i not in plan.removed[m]] for m, n in (("inner", 24), ("outer", 16)))
    assert torch.equal(pruned["inner.weight"], dense["inner.weight"][inner][:, outer])
    assert torch.equal(pruned["depthwise.weight"], dense["depthwise.weight"][inner])
    assert list(dense) == list(pruned)


def test_edits_are_the_kept_indices() -> None:
    plan = plan_of(ratio=0.5, scope="local")
    dense, pruned = shapes(program("cnn")), shapes(plan.apply(program("cnn")))
    for name, shape in dense.items():
        left = list(shape)
        for dim, kept in plan.edits.get(name, {}).items():
            assert kept == sorted(set(kept)) and max(kept) < shape[dim]
            left[dim] = len(kept)
        assert pruned[name] == tuple(left)


def test_applying_leaves_the_dense_program_and_repeats() -> None:
    dense = fxc.capture(model("cnn"), example("cnn"))
    before = dense.text(), {k: v.clone() for k, v in dense.gm.state_dict().items()}
    plan = fxc.plan_pruning(dense, 0.5)
    first, second = plan.apply(dense), plan.apply(dense)
    assert dense.text() == before[0]
    assert all(torch.equal(v, before[1][k]) for k, v in dense.gm.state_dict().items())
    assert first.text() == second.text() and not dense.history and first.history == [plan.to_dict()]
    pruned, x = first.gm.state_dict(), example("cnn")
    assert all(torch.equal(v, pruned[k]) for k, v in second.gm.state_dict().items())
    own = {p.untyped_storage().data_ptr() for p in dense.gm.parameters()}
    cut = {n for n, dims in plan.edits.items() if dims}
    named = dict(first.gm.named_parameters())
    assert not [n for n in cut if n in named and named[n].untyped_storage().data_ptr() in own]
    assert output(first, x).shape == (2, 5)


# ------------------------------------------------------------------------------------------------ budgets
@pytest.mark.parametrize("budget", [0.25, 0.5, 0.8])
@pytest.mark.parametrize("options", [{}, {"scope": "local"}, {"round_to": 4, "importance": "l1"}], ids=str)
def test_budget_of_macs(budget: float, options: dict[str, Any]) -> None:
    plan = plan_of(macs=budget, **options)
    dense, left = count_macs(program("cnn")), count_macs(plan.apply(program("cnn")))
    assert plan.macs == (dense, left)
    slack = 0.2 if "round_to" in options else 0.06
    assert budget - slack <= left / dense <= budget


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("name", ["cnn", "block"])
def test_budget_of_parameters(budget: float, name: str) -> None:
    plan = plan_of(name, parameters=max(budget, 0.6) if name == "block" else budget)
    wanted = max(budget, 0.6) if name == "block" else budget
    pruned = plan.apply(program(name))
    dense, left = count_parameters(program(name)), count_parameters(pruned)
    assert plan.parameters == (dense, left) == (dense, sum(p.numel() for p in pruned.gm.parameters()))
    assert wanted - 0.12 <= left / dense <= wanted


def test_a_budget_of_everything_removes_nothing() -> None:
    assert plan_of(macs=1.0).removed == {} == plan_of(parameters=1).removed == plan_of(ratio=0).removed


# ------------------------------------------------------------------------------------------------ attention
def test_whole_heads_or_the_width_of_all_heads() -> None:
    heads = plan_of("block", 0.5, scope="local", include=["q", "v", "proj"])
    assert {len(heads.removed[n]) for n in "qkv"} == {8}
    assert {i // 4 for i in heads.removed["q"]} == {i // 4 for i in heads.removed["v"]}
    assert all({i % 4 for i in heads.removed[n]} == {0, 1, 2, 3} for n in "qkv")
    assert heads.removed["q"] == heads.removed["k"] == heads.removed["v"]
    width = plan_of("block", 0.5, scope="local", include=["q", "v", "proj"], attention="head_dim")
    for name in "qkv":
        by_head = [{i % 4 for i in width.removed[name] if i // 4 == head} for head in range(4)]
        assert len(by_head[0]) == 2 and by_head == [by_head[0]] * 4
    assert width.removed["q"] == width.removed["k"]
    for plan in (heads, width):
        assert plan.certify(program("block"), per_group=True).float64 <= 1e-9
    kinds = {g.name: g.kind for g in heads.groups if g.removed}
    assert list(kinds.values()) == ["head"]
    crossed = [g for g in heads.groups if g.alternative]
    assert crossed and all(g.kind == "head_dim" and not g.removed for g in crossed)


def test_the_residual_width_stays_unless_asked() -> None:
    stays = plan_of("block", 0.5, scope="local")
    assert not {"embed", "proj", "down", "norm1", "norm2", "norm3"} & set(stays.removed) and "up" in stays.removed
    wide = plan_of("block", 0.5, scope="local", width=True)
    tied = ["embed", "proj", "down", "norm1", "norm2", "norm3"]
    assert {wide.removed[n] for n in tied} == {wide.removed["embed"]} and len(wide.removed["embed"]) == 8
    assert any(note.startswith("width:") for note in wide.notes)
    assert wide.certify(program("block")).float64 <= 1e-9
    assert wide.parameters[1] < stays.parameters[1] < stays.parameters[0]


def test_outputs_shrink_when_asked() -> None:
    plan = plan_of(ratio=0.4, scope="local", allow_outputs=True)
    assert len(plan.removed["fc2"]) == 2
    pruned = plan.apply(program("cnn"))
    assert output(pruned, example("cnn")).shape == (2, 3)


# ------------------------------------------------------------------------------------------------ as data
@pytest.mark.parametrize(("name", "options"), [("cnn", {}), ("block", {"width": True}), ("cnn", {"ignore": ["fc1"]})])
def test_through_json_onto_a_fresh_capture(name: str, options: dict[str, Any]) -> None:
    plan = plan_of(name, 0.5, **options)
    entry = json.loads(json.dumps(plan.to_dict()))
    again = PruningPlan.from_dict(entry)
    assert (again.removed, again.edits, again.macs, again.parameters) == (
        plan.removed,
        plan.edits,
        plan.macs,
        plan.parameters,
    )
    fresh = fxc.capture(model(name), example(name))
    first, second = plan.apply(program(name)), again.apply(fresh)
    assert first.text() == second.text()
    ours, theirs = first.gm.state_dict(), second.gm.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert torch.equal(output(first, example(name)), output(second, example(name)))
    assert again.certify(fresh, second).float64 <= 1e-9


@pytest.mark.parametrize("other", ["chain", "block"])
def test_a_plan_for_another_model_is_refused(other: str) -> None:
    plan = PruningPlan.from_dict(plan_of(ratio=0.5).to_dict())
    with pytest.raises(PruneError, match=r"FXC-PRUNE-002(.|\n)*does not fit") as caught:
        plan.apply(program(other))
    assert "dimension" in caught.value.where


def test_a_plan_whose_indices_were_changed_is_refused() -> None:
    entry = plan_of(ratio=0.5, scope="local").to_dict()
    kept = entry["edits"]["inner.bias"]["0"]
    entry["edits"]["inner.bias"]["0"] = [i for i in range(24) if i not in kept]
    with pytest.raises(PruneError, match="does not fit"):
        PruningPlan.from_dict(entry).apply(program("cnn"))


def test_printing() -> None:
    text = str(plan_of(ratio=0.5, scope="local"))
    first, header, *rows = text.splitlines()
    parameters, macs = count_parameters(program("cnn")), count_macs(program("cnn"))
    assert f"parameters {parameters:,} -> " in first and f"MACs {macs:,} -> " in first and first.count("%") == 2
    assert header.split() == ["group", "kind", "channels", "importance", "parameters", "MACs", "layers"]
    assert rows[0].startswith("stem.0") and "16 -> 8" in rows[0] and "stem.1" in rows[0] and "outer" in rows[0]
    assert rows[1].startswith("inner") and "24 -> 12" in rows[1]
    noted = str(plan_of("block", 0.5, width=True, scope="local"))
    assert "(with " in noted and "note: width:" in noted and "head_dim" in noted


def test_the_example_is_checked() -> None:
    plan = plan_of(ratio=0.5, example_inputs=example("cnn"))
    assert len(pytree.tree_leaves(plan.to_dict()["edits"])) > 0
    with pytest.raises(fxc.FxcError, match="input"):
        plan_of(ratio=0.5, example_inputs=(torch.zeros(2, 4, 8, 8),))


def test_the_same_request_gives_the_same_plan() -> None:
    a, b = (plan_of(ratio=0.5, importance="random", seed=3).to_dict() for _ in range(2))
    assert a == b
    assert a["removed"] != plan_of(ratio=0.5, importance="random", seed=4).to_dict()["removed"]
