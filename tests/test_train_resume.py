"""fine_tune stopped and resumed: the same weights to the last bit, or an error."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader

from fxcompress.capture import capture
from fxcompress.errors import ArtifactError
from fxcompress.ir import Program
from fxcompress.train import History
from tests.helpers.training import batches, data, net, quiet, same


class Stop(Exception):
    """Power cut."""


def noisy_loader(own: bool) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3) if own else None
    return DataLoader(data(), batch_size=5, shuffle=True, generator=generator)


def noisy_loss(output: Tensor, batch: Any) -> Tensor:
    """Draws from all three global generators, so that each has to be restored."""
    weight = 1 + 0.1 * (torch.rand(()) + float(np.random.rand()) + random.random())
    return F.cross_entropy(output, batch[1]) * weight


def whole(folder: Path | None, program: bool, own: bool, stop: int | None, make: Callable[[Any], Any]) -> Any:
    """Trains for four epochs; ``stop``: the power goes after that many scores."""
    model: Any = net().eval()
    model = capture(model, (torch.randn(2, 1, 4, 4),)) if program else model
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)
    count = 0

    def evaluate(_: Any) -> float:
        nonlocal count
        count += 1
        if stop is not None and count > stop:
            raise Stop
        return float(torch.rand(()))

    try:
        return quiet(
            model,
            noisy_loader(own),
            epochs=4,
            loss=noisy_loss,
            optimizer=make,
            scheduler="one_cycle",
            evaluate=evaluate,
            checkpoint=folder,
        )
    except Stop:
        return None


@pytest.mark.parametrize("program", [False, True], ids=["module", "program"])
@pytest.mark.parametrize("own", [False, True], ids=["global", "own_generator"])
def test_resumed_run_is_bit_exact(tmp_path: Path, program: bool, own: bool) -> None:
    make = lambda p: Adam(p, 0.01, betas=(0.8, 0.99))  # noqa: E731
    expected = whole(None, program, own, None, make)
    folder = tmp_path / "run"
    assert whole(folder, program, own, 2, make) is None
    torch.rand(17), np.random.rand(3), random.random()  # what the new process did before
    resumed = whole(folder, program, own, None, make)
    assert resumed.resumed == 2 and expected.resumed == 0
    strip = lambda h: [(r.loss, r.score, r.lr) for r in h.epochs]  # noqa: E731
    assert strip(resumed) == strip(expected)
    modules = [h.model.gm if isinstance(h.model, Program) else h.model for h in (resumed, expected)]
    assert same(*modules)
    assert resumed.best == expected.best


def test_momentum_is_resumed(tmp_path: Path) -> None:
    make = lambda p: SGD(p, 0.05, momentum=0.9, nesterov=True)  # noqa: E731
    expected = whole(None, False, False, None, make)
    whole(tmp_path / "run", False, False, 3, make)
    assert same(whole(tmp_path / "run", False, False, None, make).model, expected.model)


def test_best_weights_survive_a_stop(tmp_path: Path) -> None:
    def run(model: nn.Module, epochs: int, score: float) -> History:
        options: dict[str, Any] = {"checkpoint": tmp_path / "run", "evaluate": lambda m: score, "restore_best": True}
        return quiet(model, batches(), epochs=epochs, **options)

    first, second = net(), net(seed=9)
    run(first, 1, 0.9)
    history = run(second, 3, 0.1)
    assert history.best == 0 and history.resumed == 1 and len(history.epochs) == 3
    assert same(first, second)


def test_checkpoint_holds_no_pickle_and_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    quiet(net(), batches(), epochs=1, checkpoint=folder)
    assert {p.name for p in folder.iterdir()} == {
        "manifest.json",
        "model.safetensors",
        "state.json",
        "state.safetensors",
    }
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert quiet(net(), batches(), epochs=1, checkpoint=folder).resumed == 1


def test_resume_false_starts_over(tmp_path: Path) -> None:
    expected, model = net(), net()
    torch.manual_seed(1)
    quiet(expected, batches(), epochs=1)
    quiet(net(seed=4), batches(), epochs=1, checkpoint=tmp_path / "run")
    torch.manual_seed(1)
    history = quiet(model, batches(), epochs=1, checkpoint=tmp_path / "run", resume=False)
    assert history.resumed == 0 and same(expected, model)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"optimizer": lambda p: SGD(p, 0.1)}, "trained with AdamW, not SGD"),
        ({"epochs": 3}, "planned for 2 epochs, not 3"),
        ({"scheduler": None}, "scheduler"),
        ({"callbacks": [type("Idle", (), {"step": lambda self, o: None})()]}, "0 callbacks, not 1"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(16, 3))}, "FXC-ARTIFACT-304"),
    ],
)
def test_checkpoint_of_another_run(tmp_path: Path, change: dict[str, Any], error: str) -> None:
    options: dict[str, Any] = {"epochs": 2, "scheduler": "cosine", "checkpoint": tmp_path / "run"}
    quiet(net(), batches(), **options)
    model = change.pop("model", net())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ArtifactError, match=error):
        quiet(model, batches(), **(options | change))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_damaged_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    quiet(net(), batches(), epochs=1, checkpoint=folder)
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match=r"model\.safetensors"):
        quiet(net(), batches(), epochs=2, checkpoint=folder)


def test_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match="FXC-ARTIFACT-002"):
        quiet(net(), batches(), epochs=1, checkpoint=tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
