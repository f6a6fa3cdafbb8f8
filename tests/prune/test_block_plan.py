"""Plans of blocks: importance against naive formulas, amounts, budgets, bad input, saving."""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.analysis import count_macs, count_parameters
from fxcompress.errors import CalibrationError, PruneError
from fxcompress.ir import Program


class Residual(nn.Module):
    def __init__(self, width: int, hidden: int, scale: float) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.branch(x)

    def branch(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))  # type: ignore[no-any-return]


class Net(nn.Module):
    """Four blocks of different cost and weight: the third matters least, then the first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        scales = ((16, 0.2), (4, 1.5), (32, 0.05), (8, 0.7))
        self.blocks = nn.Sequential(*(Residual(8, hidden, scale) for hidden, scale in scales))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))  # type: ignore[no-any-return]


NAMES = [f"blocks.{i}" for i in range(4)]


@functools.cache
def setting() -> tuple[Net, Program, list[Tensor]]:
    torch.manual_seed(0)
    net = Net().eval()
    return net, fxc.capture(net, (torch.randn(2, 5, 6),)), [torch.randn(n, 5, 6) for n in (4, 3)]


def program() -> Program:
    return setting()[1]


def data() -> list[Tensor]:
    return setting()[2]


def labelled() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(x[:, 0], torch.randint(0, 3, (len(x),), generator=generator)) for x in data()]


@functools.cache
def flat_program() -> Program:
    return fxc.capture(setting()[0], (torch.randn(2, 6),))


def plan(**options: Any) -> fxc.BlockPlan:
    return fxc.plan_block_removal(program(), **{"data": data(), **options})


def seen_by_hooks(net: Net, batches: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Input and output of every block, from hooks on the user's model."""
    rows: list[list[tuple[Tensor, Tensor]]] = [[] for _ in net.blocks]
    hooks = [
        block.register_forward_hook(lambda m, x, y, kept=kept: kept.append((x[0], y)))
        for block, kept in zip(net.blocks, rows, strict=True)
    ]
    with torch.no_grad():
        for x in batches:
            net(x)
    for hook in hooks:
        hook.remove()
    return [(torch.cat([a for a, _ in kept]), torch.cat([b for _, b in kept])) for kept in rows]


# ------------------------------------------------------------------------------------------------ importance
def test_cosine_is_block_influence() -> None:
    """One token at a time, from the definition."""
    scores = plan(count=1, importance="cosine").scores
    for name, (x, y) in zip(NAMES, seen_by_hooks(setting()[0], data()), strict=True):
        similar = [
            sum(a * b for a, b in zip(p, q, strict=True)) / math.hypot(*p) / math.hypot(*q)
            for p, q in zip(x.reshape(-1, 8).tolist(), y.reshape(-1, 8).tolist(), strict=True)
        ]
        assert scores[name] == pytest.approx(1 - sum(similar) / len(similar), abs=1e-6)
        assert len(similar) == 35


def test_magnitude_is_relative_norm_of_the_branch() -> None:
    scores = plan(count=1, importance="magnitude").scores
    for name, (x, y) in zip(NAMES, seen_by_hooks(setting()[0], data()), strict=True):
        branch = (y.double() - x.double()).flatten().tolist()
        assert scores[name] == pytest.approx(math.hypot(*branch) / math.hypot(*x.double().flatten().tolist()), rel=1e-5)


def without(index: int) -> Net:
    net = copy.deepcopy(setting()[0])
    net.blocks[index] = nn.Identity()
    return net


def test_loss_is_the_rise_when_bypassed() -> None:
    """By default the cross-entropy with the label behind the input."""

    def mean_loss(net: Any) -> float:
        with torch.no_grad():
            return sum(F.cross_entropy(net(x), y).item() for x, y in labelled()) / 2

    scores = fxc.plan_block_removal(flat_program(), count=1, importance="loss", data=labelled()).scores
    for index, name in enumerate(NAMES):
        assert scores[name] == pytest.approx(mean_loss(without(index)) - mean_loss(setting()[0]), abs=1e-6)

    def other(output: Tensor, batch: Any) -> Tensor:
        return (output - batch[1][:, None]).abs().mean()

    own = fxc.plan_block_removal(flat_program(), count=1, importance="loss", data=iter(labelled()), loss=other).scores
    with torch.no_grad():
        rise = [sum(other(net(x), (x, y)).item() for x, y in labelled()) / 2 for net in (without(1), setting()[0])]
    assert own[NAMES[1]] == pytest.approx(rise[0] - rise[1], abs=1e-6)


def test_evaluate_is_better_when_higher() -> None:
    x = data()[0]

    def likeness(model: Any) -> float:
        with torch.no_grad():
            return -float((model(x) - setting()[0](x)).abs().mean())

    found = fxc.plan_block_removal(program(), count=1, importance="loss", evaluate=likeness)
    for index, name in enumerate(NAMES):
        assert found.scores[name] == pytest.approx(-likeness(without(index)), rel=1e-4)
    assert found.removed == ("blocks.2",)


def test_a_function_of_ones_own() -> None:
    def cost(given: Program, block: fxc.Block) -> float:
        assert given is program()
        return float(block.macs)

    found = fxc.plan_block_removal(program(), count=2, importance=cost)
    assert found.removed == ("blocks.1", "blocks.3") and found.importance == "cost"


def test_samples_limit_what_is_read() -> None:
    read = []

    class Loader:
        def __iter__(self) -> Iterator[Tensor]:
            for x in data():
                read.append(len(x))
                yield x

    fxc.plan_block_removal(program(), count=1, data=Loader(), samples=4)
    assert read == [4]


# ------------------------------------------------------------------------------------------------ amounts
def test_lowest_scores_go_first() -> None:
    order = sorted(NAMES, key=lambda n: plan(count=1).scores[n])
    for count in (1, 2, 3):
        assert set(plan(count=count).removed) == set(order[:count])
    assert [len(plan(ratio=r).removed) for r in (0, 0.2, 0.25, 0.5, 0.99)] == [0, 0, 1, 2, 3]
    assert list(plan(count=3).removed) == sorted(plan(count=3).removed)


def test_names_paths_and_globs() -> None:
    def removed(*names: str) -> tuple[str, ...]:
        return fxc.plan_block_removal(program(), names=names).removed

    assert removed("blocks.2", "blocks.0") == ("blocks.0", "blocks.2")
    assert removed("blocks.[02]") == ("blocks.0", "blocks.2")
    assert fxc.plan_block_removal(program(), names="blocks.3").removed == ("blocks.3",)
    with pytest.raises(PruneError, match="FXC-PRUNE-407"):
        removed("blocks")


@pytest.mark.parametrize("share", [0.95, 0.7, 0.5])
def test_budget_of_macs(share: float) -> None:
    found = plan(macs=share, importance="magnitude")
    pruned = found.apply(program())
    assert found.macs == (count_macs(program()), count_macs(pruned))
    assert found.parameters == (count_parameters(program()), count_parameters(pruned))
    assert found.macs[1] <= share * found.macs[0]
    least = max(found.removed, key=found.scores.__getitem__)
    fewer = fxc.plan_block_removal(program(), names=[n for n in found.removed if n != least] or [least])
    assert fewer.macs[1] > share * found.macs[0] or fewer.removed == found.removed, "one block less would not do"


def test_removed_blocks_compute_what_the_model_without_them_does() -> None:
    found = plan(count=1)
    pruned = found.apply(program())
    x = torch.randn(3, 5, 6)
    index = NAMES.index(found.removed[0])
    torch.testing.assert_close(pruned(x), without(index)(x), rtol=0, atol=0)
    certificate = found.certify(program())
    assert certificate.blocks == found.removed and certificate.error == 0
    assert not {n for n in pruned.gm.state_dict() if n.startswith(found.removed[0])}
    assert pruned.history == [found.to_dict()] and program().history == []


# ------------------------------------------------------------------------------------------------ saving, printing
def test_a_plan_is_json() -> None:
    found = plan(count=2)
    again = fxc.BlockPlan.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again == found
    other = fxc.capture(setting()[0], (torch.randn(2, 5, 6),))
    assert again.apply(other).text() == found.apply(program()).text()


def test_the_table() -> None:
    text = str(plan(count=2))
    lines = text.splitlines()
    assert len(lines) == 6 and "cosine" in lines[0] and "blocks.1" in lines[2]
    assert lines[3].endswith("removed") and lines[-1].startswith("2 of 4 blocks removed | parameters 1,135 -> ")


@pytest.mark.parametrize("entry", [{}, {"kind": "other"}, {"kind": "remove_blocks", "blocks": [{"x": 1}]}, None])
def test_not_a_plan(entry: Any) -> None:
    with pytest.raises(PruneError, match="FXC-PRUNE-415"):
        fxc.BlockPlan.from_dict(entry)


def test_a_plan_for_another_program() -> None:
    found = plan(names="blocks.2")
    with pytest.raises(PruneError, match=r"FXC-PRUNE-414(.|\n)*blocks\.2"):
        found.apply(found.apply(program()))


# ------------------------------------------------------------------------------------------------ bad input
BAD: dict[str, tuple[int, dict[str, Any], str]] = {
    "nothing": (401, {}, "count"),
    "two_amounts": (401, {"count": 1, "ratio": 0.5}, "count and ratio"),
    "count_0": (402, {"count": 0}, "0"),
    "count_true": (402, {"count": True}, "True"),
    "ratio_1": (403, {"ratio": 1.0}, "less than 1"),
    "ratio_negative": (403, {"ratio": -0.1}, "-0.1"),
    "ratio_nan": (403, {"ratio": math.nan}, "nan"),
    "macs_0": (404, {"macs": 0}, "share"),
    "unknown": (405, {"names": "blocks.7"}, "did you mean blocks."),
    "unknown_glob": (405, {"names": ["blocks.0", "layer*"]}, "layer"),
    "not_a_name": (405, {"names": [3]}, "3"),
    "all_named": (407, {"names": "blocks.*"}, "keep at least one"),
    "all_counted": (407, {"count": 4}, "of 4"),
    "too_many": (408, {"count": 5}, "4 can be bypassed"),
    "budget": (409, {"macs": 0.05}, "is the closest"),
    "importance": (410, {"count": 1, "importance": "l2"}, "'cosine'"),
    "no_data": (411, {"count": 1, "data": None}, "pass data"),
    "no_data_magnitude": (411, {"macs": 0.5, "importance": "magnitude", "data": None}, "pass data"),
    "no_loss": (412, {"count": 1, "importance": "loss", "data": None}, "evaluate"),
    "not_finite": (413, {"count": 1, "importance": lambda p, b: math.nan}, "blocks.0"),
    "not_a_number": (416, {"count": 1, "importance": lambda p, b: None}, "NoneType"),
    "evaluate": (416, {"count": 1, "importance": "loss", "evaluate": lambda m: torch.zeros(2)}, "[2]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    number, options, text = BAD[case]
    with pytest.raises(PruneError) as caught:
        plan(**options)
    assert caught.value.id == f"FXC-PRUNE-{number}" and text in str(caught.value)


def test_data_that_does_not_fit() -> None:
    with pytest.raises(CalibrationError, match="FXC-DATA-003"):
        plan(count=1, data=[torch.randn(2, 5, 7)])
    with pytest.raises(CalibrationError, match="empty"):
        plan(count=1, data=[])


def test_no_block_says_why() -> None:
    plain = fxc.capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), (torch.randn(2, 4),))
    with pytest.raises(PruneError, match=r"FXC-PRUNE-400(.|\n)*prune channels"):
        fxc.plan_block_removal(plain, count=1)


def test_fused_residuals_are_pointed_out() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x + self.a(x))

    fused = fxc.FuseActivations()(fxc.capture(Plain().eval(), (torch.randn(2, 3, 4, 4),))).program
    with pytest.raises(PruneError, match=r"FXC-PRUNE-400(.|\n)*before FuseActivations"):
        fxc.plan_block_removal(fused, count=1)
