"""Callbacks in a plain training loop: shapes, optimizer state, resuming."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from fxcompress.analysis import count_macs, count_parameters
from fxcompress.capture import capture
from fxcompress.errors import FxcError, PruneError, UsageError
from fxcompress.ir import Program
from fxcompress.prune.callback import PruningCallback, SparsityCallback
from fxcompress.prune.schedule import CubicSchedule, IterativeSchedule, LinearSchedule, OneShotSchedule
from fxcompress.train import fine_tune
from tests.helpers.optimizers import OPTIMIZERS


class Net(nn.Module):
    """Two convolutions with a norm, a residual and a classifier: 16 + 16 prunable channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.inner = nn.Conv2d(16, 16, 3, padding=1)
        self.outer = nn.Conv2d(16, 16, 1)
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        return torch.as_tensor(self.fc((x + self.outer(F.relu(self.inner(x)))).mean((2, 3))))


def program(seed: int = 0) -> Program:
    torch.manual_seed(seed)
    return capture(Net().eval(), (torch.randn(2, 1, 6, 6),))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(0, 3, (8,), generator=generator)
    return torch.randn(8, 1, 6, 6, generator=generator) + labels.view(-1, 1, 1, 1), labels


def loop(model: Program, pruner: PruningCallback, optimizer: Optimizer, steps: range) -> Program:
    """The plain loop of the documentation."""
    model.gm.train()
    for step in steps:
        images, labels = batch(step)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model = pruner.step(optimizer)
    return model


def shapes(model: Program) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.gm.state_dict().items()}


# ------------------------------------------------------------------------------------------------ structured
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_plain_loop_prunes_as_scheduled_and_goes_on_learning(name: str) -> None:
    model = program()
    dense = count_parameters(model)
    pruner = PruningCallback(model, CubicSchedule(0.5, end=9, every=3), importance="l2", ignore=["fc"])
    optimizer = OPTIMIZERS[name](model.gm.parameters())
    scheduler = CosineAnnealingLR(optimizer, 1000)
    pruned = loop(model, pruner, optimizer, range(12))
    assert [entry["step"] for entry in pruner.history] == [3, 6, 9]
    assert pruner.finished and pruner.program is pruned and pruned is not model
    assert pruned.gm.training, "pruning changed the mode"
    found = [pruned.gm.get_submodule(layer).weight.shape[0] for layer in ("stem", "inner", "outer")]
    assert found[0] == found[2] and found[0] + found[1] == 16, "half of 16 + 16 channels"
    assert count_parameters(pruned) == pruner.history[-1]["parameters"] < 0.6 * dense
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in pruned.gm.parameters()}
    assert {id(p) for p in optimizer.state} == trained
    before = {key: value.clone() for key, value in pruned.gm.named_parameters()}
    scheduler.step()
    assert loop(pruned, pruner, optimizer, range(12, 40)) is pruned
    assert all(not torch.equal(before[key], value) for key, value in pruned.gm.named_parameters())
    assert F.cross_entropy(pruned(batch(99)[0]), batch(99)[1]).item() < 0.9


@pytest.mark.parametrize("amount", ["channels", "macs", "parameters"])
def test_each_pruning_reaches_its_share_of_the_dense_program(amount: str) -> None:
    model = program()
    pruner = PruningCallback(model, IterativeSchedule(0.5, rounds=4, every=2), amount=amount, ignore=["fc"])
    loop(model, pruner, SGD(model.gm.parameters(), 0.01), range(8))
    targets = [entry["target"] for entry in pruner.history]
    reached = [entry["reached"] for entry in pruner.history]
    assert targets == pytest.approx([0.125, 0.25, 0.375, 0.5])
    assert reached == sorted(reached)
    # A channel is one part in 32; in MACs and parameters a budget is kept, and undercut by less than a few channels.
    slack = 1 / 32 if amount == "channels" else 0.15
    assert all(-slack / 2 < r - t < slack for r, t in zip(reached, targets, strict=True))
    measure = {"macs": count_macs, "parameters": count_parameters}.get(amount)
    if measure is not None:
        assert reached[-1] == pytest.approx(1 - measure(pruner.program) / measure(model))


def test_no_rounding_is_lost_over_many_rounds() -> None:
    """32 rounds of half a channel each: every single one rounds down to nothing."""
    model = program()
    pruner = PruningCallback(model, LinearSchedule(0.5, end=32), ignore=["fc"])
    pruned = loop(model, pruner, SGD(model.gm.parameters(), 0.01), range(33))
    assert sum(pruned.gm.get_submodule(layer).weight.shape[0] for layer in ("stem", "inner")) == 16


def test_ignored_layers_do_not_count() -> None:
    """Half of the channels of ``inner``, in two rounds, however many channels the rest has."""
    model = program()
    pruner = PruningCallback(model, IterativeSchedule(0.5, rounds=2, every=1), ignore=["stem", "outer"])
    pruned = loop(model, pruner, SGD(model.gm.parameters(), 0.01), range(2))
    widths = [pruned.gm.get_submodule(layer).weight.shape[0] for layer in ("stem", "inner", "outer")]
    assert widths == [16, 8, 16]
    assert [entry["reached"] for entry in pruner.history] == [0.25, 0.5]
    with pytest.raises(PruneError, match="there is no layer 'stm'"):
        PruningCallback(model, OneShotSchedule(0.5), ignore=["stm"])


def test_rounding_is_made_up_by_the_next_pruning() -> None:
    """``round_to`` keeps every step a multiple of 4: the shares are reached as nearly as that allows."""
    model = program()
    schedule = IterativeSchedule(0.5, rounds=4, every=1)
    pruner = PruningCallback(model, schedule, scope="local", round_to=4, ignore=["fc"])
    widths = []
    for _ in range(4):
        pruned = pruner.step()
        widths.append([pruned.gm.get_submodule(layer).weight.shape[0] for layer in ("stem", "inner")])
    assert all(width % 4 == 0 for pair in widths for width in pair)
    assert widths[-1] == [8, 8]
    assert PruningCallback(model, schedule, round_to="target").reached() == 0.0


def test_one_shot_before_training_is_the_plan_itself() -> None:
    from fxcompress.prune.plan import plan_pruning

    model = program()
    pruner = PruningCallback(model, OneShotSchedule(0.5), importance="l1", ignore=["fc"])
    plan = plan_pruning(model, 0.5, importance="l1", ignore=["fc"])
    assert shapes(pruner.step()) == shapes(plan.apply(model))
    assert pruner.plans[0].removed == plan.removed
    assert pruner.step() is pruner.program and len(pruner.plans) == 1


def test_frozen_parameters_stay_frozen_and_shared_state_stays() -> None:
    model = program()
    model.gm.get_submodule("stem").requires_grad_(False)
    extra = nn.Parameter(torch.ones(2))
    optimizer = SGD([*(p for p in model.gm.parameters() if p.requires_grad), extra], 0.1, momentum=0.9)
    pruner = PruningCallback(model, OneShotSchedule(0.5), ignore=["fc"])
    pruned = loop(model, pruner, optimizer, range(1))
    assert not pruned.gm.get_submodule("stem").weight.requires_grad
    assert pruned.gm.get_submodule("inner").weight.requires_grad
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert id(extra) in held and id(pruned.gm.get_submodule("stem").weight) not in held


def test_resumed_from_json(tmp_path: Any) -> None:
    """Stopped in the middle, rebuilt from the dense program: the same as without a stop."""

    def start() -> tuple[Program, PruningCallback, Optimizer]:
        model = program()
        pruner = PruningCallback(model, CubicSchedule(0.5, end=12, every=4), importance="l2", ignore=["fc"])
        return model, pruner, OPTIMIZERS["adam"](model.gm.parameters())

    model, pruner, optimizer = start()
    expected = loop(model, pruner, optimizer, range(16))

    model, pruner, optimizer = start()
    half = loop(model, pruner, optimizer, range(10))
    text = json.dumps(pruner.state_dict())
    weights, state = half.gm.state_dict(), optimizer.state_dict()

    model, pruner, optimizer = start()
    again = pruner.load_state_dict(json.loads(text), optimizer)
    assert shapes(again) == shapes(half)
    again.gm.load_state_dict(weights)
    optimizer.load_state_dict(state)
    resumed = loop(again, pruner, optimizer, range(10, 16))
    assert shapes(resumed) == shapes(expected)
    for name, value in expected.gm.state_dict().items():
        assert torch.equal(resumed.gm.state_dict()[name], value), name


def test_fine_tune_drives_it_and_resumes_bit_exact(tmp_path: Any) -> None:
    data = [batch(step) for step in range(4)]

    def run(folder: Any, stop: int | None) -> Any:
        model = program()
        pruner = PruningCallback(model, CubicSchedule(0.5, end=9, every=3), ignore=["fc"])
        scores = iter(range(10))

        def evaluate(_: Any) -> float:
            score = next(scores)
            if score == stop:
                raise KeyboardInterrupt
            return -float(score)

        options: dict[str, Any] = {"optimizer": OPTIMIZERS["sgd"], "scheduler": "cosine", "evaluate": evaluate}
        return fine_tune(
            model, data, epochs=4, callbacks=[pruner], checkpoint=folder, restore_best=True, progress=False, **options
        )

    expected = run(None, None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", 2)
    resumed = run(tmp_path / "run", None)
    assert resumed.resumed == 2
    assert shapes(resumed.model) == shapes(expected.model) != shapes(program())
    for name, value in expected.model.gm.state_dict().items():
        assert torch.equal(resumed.model.gm.state_dict()[name], value), name
    assert expected.best == 2, "epochs 0 and 1 scored higher but had channels that are gone"
    assert not expected.model.gm.training


def test_fine_tune_refuses_callbacks_that_do_not_fit() -> None:
    model = program()
    late = PruningCallback(model, OneShotSchedule(0.5, start=4), ignore=["fc"])
    with pytest.raises(UsageError, match="FXC-USAGE-309"):
        fine_tune(model, [batch(0)], epochs=4, callbacks=[late])
    with pytest.raises(UsageError, match="FXC-USAGE-308"):
        fine_tune(program(), [batch(0)], epochs=9, callbacks=[late])
    with pytest.raises(UsageError, match="FXC-USAGE-307"):
        fine_tune(model, [batch(0)], epochs=9, callbacks=[late, late])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"ratio": 0.5}, "the schedule decides"),
        ({"macs": 0.5}, "the schedule decides"),
        ({"amount": "watts"}, "FXC-PRUNE-322"),
        ({"importence": "l2"}, r"did you mean importance\?"),
    ],
)
def test_wrong_options(options: dict[str, Any], error: str) -> None:
    with pytest.raises(PruneError, match=error):
        PruningCallback(program(), OneShotSchedule(0.5), **options)


def test_wrong_states() -> None:
    pruner = PruningCallback(program(), OneShotSchedule(0.5), ignore=["fc"])
    state = pruner.state_dict()
    with pytest.raises(PruneError, match="FXC-PRUNE-304"):
        PruningCallback(program(), LinearSchedule(0.5, end=4)).load_state_dict(state)
    with pytest.raises(PruneError, match="FXC-PRUNE-324"):
        PruningCallback(program(), OneShotSchedule(0.5), amount="macs").load_state_dict(state)
    with pytest.raises(PruneError, match="FXC-PRUNE-321"):
        pruner.load_state_dict({"amount": "channels"})
    pruner.step()
    with pytest.raises(PruneError, match="FXC-PRUNE-323"):
        pruner.load_state_dict(state)
    with pytest.raises(PruneError, match="FXC-PRUNE-320"):
        PruningCallback(program(), 0.5)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ masks
class FakeMasks:
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def set_sparsity(self, sparsity: float) -> None:
        self.calls.append(sparsity)

    def apply(self) -> None:
        self.calls.append("apply")


def test_masks_follow_the_schedule_and_are_applied_at_every_step() -> None:
    masks = FakeMasks()
    callback = SparsityCallback(masks, IterativeSchedule(0.6, rounds=2, every=2, start=1))
    for _ in range(5):
        assert not callback.finished or callback.steps > 3
        callback.step()
    assert masks.calls == ["apply", 0.3, "apply", "apply", 0.6, "apply", "apply"]
    assert callback.finished

    twin = SparsityCallback(FakeMasks(), IterativeSchedule(0.1, rounds=2, every=2))
    twin.load_state_dict(json.loads(json.dumps(callback.state_dict())))
    assert twin.steps == 5 and twin.finished and twin.masks.calls == [0.6]  # type: ignore[attr-defined]
    with pytest.raises(FxcError, match="FXC-PRUNE-304"):
        twin.load_state_dict(SparsityCallback(masks, OneShotSchedule(0.5)).state_dict())


def test_weights_go_to_zero_gradually_and_stay_there() -> None:
    model = program()
    optimizer = OPTIMIZERS["sgd"](model.gm.parameters())
    callback = SparsityCallback(model, CubicSchedule(0.75, end=8, every=2), scope="global", ignore=["fc"])
    names = ("stem", "inner", "outer")
    zero = {name: torch.zeros_like(model.gm.get_submodule(name).weight, dtype=torch.bool) for name in names}
    model.gm.train()
    for step in range(12):
        images, labels = batch(step)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        callback.step(optimizer)
        now = {name: model.gm.get_submodule(name).weight == 0 for name in names}
        assert all(bool((now[name] | ~zero[name]).all()) for name in names), "a weight came back"
        zero = now
        share = sum(int(z.sum()) for z in zero.values()) / sum(z.numel() for z in zero.values())
        assert share == pytest.approx(callback.schedule.sparsity(min(step // 2 * 2, 8)), abs=1e-3)
    assert [entry["step"] for entry in callback.history] == [2, 4, 6, 8]
    assert not (model.gm.get_submodule("fc").weight == 0).any()


def test_fine_tune_resumes_masks_bit_exact(tmp_path: Any) -> None:
    data = [batch(step) for step in range(4)]

    def run(folder: Any, stop: int | None) -> Any:
        model = program()
        callback = SparsityCallback(model, CubicSchedule(0.5, end=5, every=2))
        scores = iter(range(10))

        def evaluate(_: Any) -> float:
            score = next(scores)
            if score == stop:
                raise KeyboardInterrupt
            return float(score)

        options: dict[str, Any] = {"optimizer": OPTIMIZERS["adam"], "evaluate": evaluate, "progress": False}
        return fine_tune(model, data, epochs=4, callbacks=[callback], checkpoint=folder, **options)

    expected = run(None, None)
    for stop in (1, 3):  # in the middle of the schedule, and behind it
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / str(stop), stop)
        resumed = run(tmp_path / str(stop), None)
        assert resumed.resumed == stop
        for name, value in expected.model.gm.state_dict().items():
            assert torch.equal(resumed.model.gm.state_dict()[name], value), name
    share = (expected.model.gm.get_submodule("inner").weight == 0).float().mean()
    assert float(share) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"sparsity": 0.5}, "the schedule decides"),
        ({"pattern": "2:4"}, "the schedule decides"),
        ({"metod": "l1"}, r"did you mean method\?"),
    ],
)
def test_wrong_options_of_masks(options: dict[str, Any], error: str) -> None:
    with pytest.raises(PruneError, match=error):
        SparsityCallback(program(), OneShotSchedule(0.5), **options)
    with pytest.raises(PruneError, match="FXC-PRUNE-328"):
        SparsityCallback(FakeMasks(), OneShotSchedule(0.5), **options)


def test_masks_and_channels_do_not_go_in_one_run() -> None:
    model = program()
    both = [PruningCallback(model, OneShotSchedule(0.5)), SparsityCallback(model, OneShotSchedule(0.5))]
    with pytest.raises(UsageError, match="FXC-USAGE-315"):
        fine_tune(model, [batch(0)], epochs=9, callbacks=both)
