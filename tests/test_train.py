"""fine_tune against a plain loop, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau, StepLR

from fxcompress.capture import capture
from fxcompress.errors import CalibrationError, FxcError, PassError, UsageError
from fxcompress.train import fine_tune
from tests.helpers.training import batches, net, quiet, same


# ------------------------------------------------------------------------------------------------ the loop
def test_equals_a_plain_loop() -> None:
    expected, model = net(), net()
    optimizer = SGD(expected.parameters(), 0.1, momentum=0.9)
    scheduler = CosineAnnealingLR(optimizer, 6)
    torch.manual_seed(5)
    losses = []
    for _ in range(2):
        expected.train()
        for images, labels in batches():
            loss = F.cross_entropy(expected(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
    torch.manual_seed(5)
    model.eval()
    history = quiet(model, batches(), epochs=2, optimizer=lambda p: SGD(p, 0.1, momentum=0.9), scheduler="cosine")
    assert same(expected, model)
    assert history.losses == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:]) / 3])
    assert [record.samples for record in history.epochs] == [24, 24]
    assert not any(module.training for module in model.modules()), "the mode at entry is not restored"


def test_a_program_trains_like_its_module() -> None:
    """Dropout draws the same numbers: the program's graph has the same layers."""
    model, source = net(), net()
    program = capture(source.eval(), (torch.randn(2, 1, 4, 4),))
    torch.manual_seed(5)
    quiet(model, batches(), epochs=3, lr=0.01)
    torch.manual_seed(5)
    history = quiet(program, batches(), epochs=3, lr=0.01)
    assert history.model is program
    state = program.gm.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)
    assert history.losses[-1] < history.losses[0]


def test_mean_loss_weighs_batches_by_size() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    uneven = [(torch.full((3, 1), 1.0), None), (torch.full((1, 1), 5.0), None)]
    history = quiet(model, uneven, epochs=1, optimizer=lambda p: SGD(p, 0.0), loss=lambda out, batch: out.mean())
    assert history.losses == [pytest.approx((3 * 1.0 + 1 * 5.0) / 4)]


def test_loss_gets_the_batch_as_it_is() -> None:
    model = nn.Linear(4, 2)
    seen: list[Any] = []

    def loss(output: Tensor, batch: Any) -> Tensor:
        seen.append(batch)
        return (output - batch[1]).square().mean()

    batch = (torch.randn(3, 4), torch.randn(3, 2))
    quiet(model, [batch], epochs=1, loss=loss)
    assert torch.equal(seen[0][0], batch[0]) and torch.equal(seen[0][1], batch[1])


def test_the_output_of_a_dict_model_has_its_own_loss() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.fc(x)
            return {"loss": 2 * F.cross_entropy(logits, labels), "logits": logits}

    model = Own()
    x, labels = torch.randn(5, 4), torch.randint(0, 3, (5,))
    with torch.no_grad():
        expected = model(x, labels)["loss"].item()
    assert quiet(model, [{"x": x, "labels": labels}], epochs=1).losses == [pytest.approx(expected)]


def test_scheduler_intervals() -> None:
    """Three steps an epoch: StepLR(1) by step divides by 8, by epoch by 2."""

    def last(interval: str) -> float:
        model = net()
        optimizer = SGD(model.parameters(), 1.0)
        scheduler = StepLR(optimizer, 1, gamma=0.5)
        quiet(model, batches(), epochs=1, optimizer=optimizer, scheduler=scheduler, scheduler_interval=interval)
        return float(optimizer.param_groups[0]["lr"])

    assert last("step") == pytest.approx(1 / 8)
    assert last("epoch") == pytest.approx(1 / 2)


def test_plateau_gets_the_score() -> None:
    model = net()
    optimizer = SGD(model.parameters(), 1.0)
    plateau = ReduceLROnPlateau(optimizer, mode="max", patience=0, factor=0.1)
    scores = iter([0.5, 0.4, 0.6])
    quiet(model, batches(), epochs=3, optimizer=optimizer, scheduler=plateau, evaluate=lambda m: next(scores))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_best_weights_are_restored() -> None:
    model = net()
    kept: list[dict[str, Tensor]] = []
    scores = iter([0.0, 0.9, -0.3])  # a first score of 0 is a score

    def evaluate(given: nn.Module) -> float:
        assert not given.training and not torch.is_grad_enabled()
        kept.append({k: v.clone() for k, v in given.state_dict().items()})
        return next(scores)

    history = quiet(model, batches(), epochs=3, lr=0.05, evaluate=evaluate, restore_best=True)
    assert history.best == 1 and history.scores == [0.0, 0.9, -0.3]
    assert all(torch.equal(value, kept[1][name]) for name, value in model.state_dict().items())
    assert not torch.equal(kept[1]["fc.weight"], kept[2]["fc.weight"])


def test_callbacks_come_behind_each_step() -> None:
    class Count:
        calls: list[int] = []  # noqa: RUF012

        def step(self, optimizer: Any) -> None:
            self.calls.append(int(next(iter(optimizer.state.values()))["step"].item()))

    quiet(net(), batches(), epochs=2, callbacks=[Count()])
    assert Count.calls == [1, 2, 3, 4, 5, 6]


# ------------------------------------------------------------------------------------------------ bad input
def test_loss_that_is_not_finite(tmp_path: Path) -> None:
    bad = batches()
    bad[1][0][0, 0, 0, 0] = float("nan")
    with pytest.raises(PassError, match=r"FXC-PASS-300 the training loss is nan") as caught:
        quiet(net(), bad, epochs=2, checkpoint=tmp_path / "run")
    assert "epoch 0, batch 1" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    """The last step of an epoch can spoil the weights while its own loss is fine."""
    with pytest.raises(PassError, match="FXC-PASS-301"):
        quiet(net(), batches()[:1], epochs=1, optimizer=lambda p: SGD(p, 1e38), checkpoint=tmp_path / "run",
              loss=lambda out, batch: out.square().sum() * 1e30)  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_score_that_is_nan() -> None:
    with pytest.raises(PassError, match="FXC-PASS-302"):
        quiet(net(), batches(), epochs=1, evaluate=lambda m: float("nan"))


def frozen() -> nn.Module:
    return net().requires_grad_(False)


OTHER = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("change", "kind", "error"),
    [
        ({"model": lambda x: x}, UsageError, "USAGE-301"),
        ({"epochs": 0}, UsageError, "USAGE-302"),
        ({"epochs": 1.5}, UsageError, "USAGE-302"),
        ({"train": torch.randn(3, 3)}, UsageError, "USAGE-303"),
        ({"train": 5}, UsageError, "USAGE-303"),
        ({"train": iter(batches())}, UsageError, "USAGE-304"),
        ({"train": []}, CalibrationError, "DATA-300"),
        ({"scheduler_interval": "month"}, UsageError, "USAGE-305"),
        ({"restore_best": True}, UsageError, "USAGE-306"),
        ({"scheduler": "cosinus"}, UsageError, "USAGE-300"),
        ({"lr": 0.1, "optimizer": lambda p: SGD(p, 0.1)}, UsageError, "USAGE-310"),
        ({"model": frozen()}, UsageError, "USAGE-311"),
        ({"optimizer": SGD(OTHER.parameters(), 0.1)}, UsageError, "USAGE-312"),
        ({"train": iter(batches()), "epochs": 1, "scheduler": "cosine"}, UsageError, "USAGE-313"),
        ({"scheduler": StepLR(SGD(OTHER.parameters(), 0.1), 1)}, UsageError, "USAGE-314"),
        ({"train": [(torch.randn(2, 1, 4, 4), torch.randn(2, 3))]}, UsageError, "USAGE-316"),
        ({"loss": lambda out, batch: out}, UsageError, "USAGE-317"),
        ({"loss": lambda out, batch: out.detach().sum()}, UsageError, "USAGE-317"),
    ],
)
def test_bad_input(change: dict[str, Any], kind: type[FxcError], error: str) -> None:
    arguments = {"model": net(), "train": batches(), "epochs": 2} | change
    with pytest.raises(kind, match=error):
        quiet(arguments.pop("model"), arguments.pop("train"), **arguments)


def test_progress_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    fine_tune(net(), batches(), epochs=2, evaluate=lambda m: 0.25)
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert captured.out == "" and len(lines) == 2
    assert lines[0].startswith("epoch 1/2  loss ") and "score 0.2500" in lines[0]


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    fine_tune(net(), batches(), epochs=2)
    assert "epoch 2/2" in capsys.readouterr().err
