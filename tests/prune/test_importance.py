"""Importance criteria of the weights, and what all criteria share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import PruneError
from fxcompress.ir import Program
from fxcompress.prune.importance import Importance, criteria, importance, reduce_scores
from fxcompress.prune.slots import Slot
from tests.prune.scored import (
    BATCHES,
    BUFFERS,
    SLOTS,
    WEIGHTS,
    close,
    prepared,
    restored,
    rows,
    scores,
    tensor,
)


@pytest.fixture
def program() -> Iterator[Program]:
    yield from restored()


# ------------------------------------------------------------------------------------------------ of the weights
NAIVE: dict[str, Callable[[list[Tensor]], list[Any]]] = {
    "l1": lambda r: [v.abs().sum() for v in r],
    "l2": lambda r: [v.square().sum().sqrt() for v in r],
    "fpgm": lambda r: [sum((v - w).norm() for w in r) for v in r],
    "lamp": lambda r: [v.dot(v) / sum(w.dot(w) for w in r if w.dot(w) >= v.dot(v)) for v in r],
}


@pytest.mark.parametrize("name", ["l1", "l2"])
@pytest.mark.parametrize("slot", SLOTS, ids=lambda s: f"{s.tensor}.{s.dim}")
def test_norms(program: Program, name: str, slot: Slot) -> None:
    close(scores(prepared(name, program), program, slot), NAIVE[name](rows(tensor(program, slot), slot.dim)))


@pytest.mark.parametrize("slot", WEIGHTS, ids=lambda s: f"{s.tensor}.{s.dim}")
@pytest.mark.parametrize("name", ["fpgm", "lamp"])
def test_relative_to_other_channels(program: Program, name: str, slot: Slot) -> None:
    criterion = prepared(name, program)
    if name == "fpgm" and slot.role == "in":
        assert criterion.score(slot, tensor(program, slot)) is None
    else:
        close(scores(criterion, program, slot), NAIVE[name](rows(tensor(program, slot), slot.dim)))


@pytest.mark.parametrize("name", ["fpgm", "lamp"])
def test_vectors_say_nothing_about_other_channels(program: Program, name: str) -> None:
    criterion = prepared(name, program)
    assert criterion.score(SLOTS[2], tensor(program, SLOTS[2])) is None


def test_lamp_gives_ties_the_same_score_and_zeros_zero() -> None:
    program = fxc.capture(nn.Sequential(nn.Linear(1, 4, bias=False)), (torch.randn(2, 1),))
    slot = Slot("0.weight", 0, "out", "0", "0", 4)
    program.gm.get_parameter("0.weight").data = torch.tensor([[2.0], [0.0], [1.0], [-2.0]])
    criterion = prepared("lamp", program, slots=[slot])
    close(scores(criterion, program, slot), [0.5, 0, 1 / 9, 0.5])


def test_bn_scale_reads_norms_only(program: Program) -> None:
    criterion = prepared("bn_scale", program)
    said = {s.tensor: criterion.score(s, tensor(program, s)) for s in SLOTS}
    assert {n for n, v in said.items() if v is not None} == {"bn.weight", "norm.weight"}
    close(scores(criterion, program, SLOTS[3]), [abs(v) for v in tensor(program, SLOTS[3]).tolist()])


def test_bn_scale_without_norms(program: Program) -> None:
    with pytest.raises(PruneError, match=r"FXC-PRUNE-046 bn_scale needs norms"):
        prepared("bn_scale", program, slots=SLOTS[:3])


def test_random_depends_on_seed_and_slot_alone(program: Program) -> None:
    def draw(seed: int, slot: Slot) -> Tensor:
        criterion = importance("random", seed=seed)
        criterion.prepare(program, SLOTS, None, None)
        return scores(criterion, program, slot)

    state = torch.get_rng_state()
    first = draw(3, SLOTS[0])
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, draw(3, SLOTS[0])) and first.unique().numel() == 8
    assert not torch.equal(first, draw(4, SLOTS[0]))
    assert not torch.equal(first, draw(3, SLOTS[2]))
    assert not torch.equal(first, draw(3, replace(SLOTS[0], dim=1)))


def test_low_precision_and_overflow() -> None:
    program = fxc.capture(nn.Sequential(nn.Linear(3, 2, bias=False)), (torch.randn(2, 3),))
    slot = Slot("0.weight", 0, "out", "0", "0", 2)
    for dtype, large in ((torch.bfloat16, 3.0e38), (torch.float16, 6.0e4), (torch.float32, 3.0e38)):
        values = torch.tensor([[large, large, large], [1.0, 2.0, -2.0]]).to(dtype)
        found = prepared("l2", program, slots=[slot]).score(slot, values)
        assert found is not None
        close(found, NAIVE["l2"](rows(values, 0)))


@pytest.mark.parametrize("name", ["l1", "l2"])
def test_scoring_is_vectorised(name: str) -> None:
    """300 layers of 256 channels, both sides of each, are scored in well under a second (20 million weights)."""
    net = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(300)))
    program: Any = SimpleNamespace(gm=net)  # capturing it takes longer than all the rest
    slots = [Slot(f"{i}.weight", d, ("out", "in")[d], str(i), "", 256) for i in range(300) for d in (0, 1)]
    tensors = dict(net.named_parameters())
    criterion = prepared(name, program, slots=slots)
    start = time.process_time()
    for slot in slots:
        criterion.score(slot, tensors[slot.tensor])
    assert time.process_time() - start < 1.0


# ------------------------------------------------------------------------------------------------ what all share
@pytest.mark.parametrize("name", criteria())
def test_buffers_and_integers_say_nothing(program: Program, name: str) -> None:
    criterion = prepared(name, program, BATCHES)
    assert all(criterion.score(slot, tensor(program, slot)) is None for slot in BUFFERS)
    assert any(criterion.score(slot, tensor(program, slot)) is not None for slot in SLOTS)


@pytest.mark.parametrize("name", criteria())
@pytest.mark.parametrize("training", [False, True])
def test_the_program_is_left_untouched(program: Program, name: str, training: bool) -> None:
    gm = program.gm
    gm.train(training)
    gm.get_submodule("bn").eval()
    gm.get_parameter("conv.weight").requires_grad_(False)
    gm.get_parameter("fc.bias").grad = torch.ones(4)
    before = {n: t.clone() for n, t in gm.state_dict().items()}
    modes = [m.training for m in gm.modules()]
    wants = [p.requires_grad for p in gm.parameters()]
    text = program.text()
    with torch.no_grad():
        criterion = prepared(name, program, BATCHES)
    for slot in SLOTS:
        criterion.score(slot, tensor(program, slot))
    assert all(torch.equal(before[n], t) for n, t in gm.state_dict().items())
    assert modes == [m.training for m in gm.modules()] and wants == [p.requires_grad for p in gm.parameters()]
    assert [n for n, p in gm.named_parameters() if p.grad is not None] == ["fc.bias"]
    assert torch.equal(gm.get_parameter("fc.bias").grad, torch.ones(4)) and program.text() == text


@pytest.mark.parametrize("name", ["l1", "l2", "lamp", "fpgm", "bn_scale"])
def test_weights_that_are_not_finite(program: Program, name: str) -> None:
    slot = SLOTS[3] if name == "bn_scale" else SLOTS[0]
    program.gm.get_parameter(slot.tensor).data.flatten()[1] = torch.inf
    with pytest.raises(PruneError, match=rf"FXC-PRUNE-045[\s\S]*{slot.tensor}"):
        prepared(name, program).score(slot, tensor(program, slot))


def test_unknown_names_offer_the_nearest() -> None:
    with pytest.raises(PruneError, match=r"FXC-PRUNE-041[\s\S]*'taylor'"):
        importance("tailor")
    with pytest.raises(PruneError, match=r"FXC-PRUNE-041[\s\S]*known: l1, l2, bn_scale"):
        importance("xyz")
    with pytest.raises(PruneError, match=r"FXC-PRUNE-043[\s\S]*'mean'"):
        reduce_scores([], 2, "meen")


@pytest.mark.parametrize("spec", [3, None, Importance, nn.Linear])
def test_specs_that_are_no_importance(spec: Any) -> None:
    with pytest.raises(PruneError, match="FXC-PRUNE-042"):
        importance(spec)


# ------------------------------------------------------------------------------------------------ users' own
def test_a_function(program: Program) -> None:
    def mine(slot: Slot, values: Tensor) -> Tensor | None:
        return torch.arange(slot.size) if slot.role == "out" else None

    criterion = prepared(mine, program)
    close(scores(criterion, program, SLOTS[0]), list(range(8)))
    assert criterion.score(SLOTS[1], tensor(program, SLOTS[1])) is None and not criterion.needs_data


def test_a_class(program: Program) -> None:
    class Mine(Importance):
        name = "mine"
        value: Any = None

        def score(self, slot: Slot, tensor: Tensor) -> Tensor | None:
            return self.value

    mine = Mine()
    assert importance(mine) is mine
    mine.prepare(program, SLOTS)
    for value in (torch.zeros(7), torch.zeros(8, 1), [0.0] * 8, torch.zeros(8, dtype=torch.complex64)):
        mine.value = value
        with pytest.raises(PruneError, match=r"FXC-PRUNE-044[\s\S]*conv\.weight"):
            mine.score(SLOTS[0], torch.zeros(8, 3))
    mine.value = torch.full((8,), torch.nan)
    with pytest.raises(PruneError, match=r"FXC-PRUNE-045[\s\S]*dimension 0 of conv\.weight"):
        mine.score(SLOTS[0], torch.zeros(8, 3))
    mine.value = torch.ones(8, requires_grad=True)
    found = mine.score(SLOTS[0], torch.zeros(8, 3))
    assert found is not None and found.dtype == torch.float64 and not found.requires_grad


# ------------------------------------------------------------------------------------------------ reductions
@pytest.mark.parametrize("reduction", ["mean", "max", "sum", "norm"])
def test_reductions(reduction: str) -> None:
    torch.manual_seed(0)
    per_slot = [(torch.randn(n), torch.randint(-1, 5, (n,))) for n in (4, 9, 6)]
    per_slot.append((torch.tensor([100.0]), torch.tensor([-1])))
    held: list[list[float]] = [[] for _ in range(6)]
    for found, units in per_slot:
        for value, unit in zip(found.double().tolist(), units.tolist(), strict=True):
            if unit >= 0:
                held[unit].append(value)
    naive: dict[str, Callable[[list[float]], float]] = {
        "mean": lambda v: sum(v) / len(v),
        "max": max,
        "sum": sum,
        "norm": lambda v: sum(x * x for x in v) ** 0.5,
    }
    assert all(held[:5]) and not held[5]
    found = reduce_scores(per_slot, 6, reduction)
    close(found[:5], [naive[reduction](v) for v in held[:5]], rtol=1e-12)
    assert found.dtype == torch.float64 and bool(found[5].isnan())


def test_reduction_of_nothing() -> None:
    assert bool(reduce_scores([], 3, "mean").isnan().all())
    assert reduce_scores([], 0, "max").shape == (0,)
