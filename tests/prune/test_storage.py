"""Saved pruned programs: every bit comes back, with the model or without it, and no other model is accepted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import fxcompress as fxc
from fxcompress.artifact import MANIFEST
from fxcompress.errors import ArtifactError, CaptureError, UsageError
from fxcompress.prune import storage
from tests.prune.stored import FILES, Cnn, answers, dense, images, make, prune, train, tuned


def check_same(loaded: fxc.Program, saved: fxc.Program, kind: str) -> None:
    """Names, order, bits, kinds, ties, graph, history, and outputs at other sizes."""
    ours, theirs = loaded.gm.state_dict(), saved.gm.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[n], theirs[n]) and ours[n].dtype == theirs[n].dtype for n in ours)
    for kind_of in ("named_parameters", "named_buffers"):
        a, b = ([(n, t) for n, t in getattr(p.gm, kind_of)()] for p in (loaded, saved))
        assert [(n, t.requires_grad) for n, t in a] == [(n, t.requires_grad) for n, t in b]
        assert all(torch.equal(x, y) for (_, x), (_, y) in zip(a, b, strict=True))
    assert loaded.text() == saved.text()
    assert loaded.history == json.loads(json.dumps(saved.history)) and loaded.history
    assert [list(d) for d in loaded.dynamic_dims().values()] == [list(d) for d in saved.dynamic_dims().values()]
    for got, expected in zip(answers(loaded, kind), answers(saved, kind), strict=True):
        assert torch.equal(got, expected)


# ------------------------------------------------------------------------------------------------ round trips
@pytest.mark.parametrize("plans", [1, 2])
@pytest.mark.parametrize("given", ["model", "program", "nothing"])
@pytest.mark.parametrize("kind", ["cnn", "tokens"])
def test_every_bit_comes_back(kind: str, given: str, plans: int, tmp_path: Path) -> None:
    saved = tuned(kind, plans)
    sizes = [sum(p.numel() for p in program.gm.parameters()) for program in (dense(kind), saved)]
    assert len(saved.history) == plans and sizes[1] < 0.9 * sizes[0]
    folder = fxc.save_pruned(saved, tmp_path / "new" / "out")
    other = make(kind, seed=7)
    source = {"model": other, "program": dense(kind, other), "nothing": None}[given]
    before = {n: t.clone() for n, t in other.state_dict().items()}
    loaded = fxc.load_pruned(source, folder)
    check_same(loaded, saved, kind)
    train(loaded, kind)
    assert not torch.equal(answers(loaded, kind)[0], answers(saved, kind)[0]), "it trains"
    assert all(torch.equal(t, before[n]) for n, t in other.state_dict().items()), "the model given is left as it is"
    check_same(fxc.load_pruned(None, folder), saved, kind)


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    saved = tuned("tokens")
    assert saved.gm.embed.weight is saved.gm.head.weight
    folder = fxc.save_pruned(saved, tmp_path / "out")
    assert sum(n in ("embed.weight", "head.weight") for n in load_file(folder / "weights.safetensors")) == 1
    for source in (None, make("tokens")):
        loaded = fxc.load_pruned(source, folder)
        assert loaded.gm.embed.weight is loaded.gm.head.weight
    untied = make("tokens")
    untied.head.weight = nn.Parameter(untied.embed.weight.detach().clone())
    with pytest.raises(ArtifactError, match=r"had [\d,]+ parameters, this one has"):
        fxc.load_pruned(untied, folder)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.LSTM(4, 6, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.mix(x)[0][:, -1])  # type: ignore[no-any-return]


def test_recurrent_layers_run_on_the_loaded_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 4)
    saved = prune(fxc.capture(Recurrent().eval(), (x[:2],)), 0.4)
    with torch.no_grad():
        for parameter in saved.gm.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    folder = fxc.save_pruned(saved, tmp_path / "out")
    for source in (None, Recurrent()):
        loaded = fxc.load_pruned(source, folder)
        assert torch.equal(loaded(x), saved(x)) and loaded.text() == saved.text()
        loaded.gm.train()
        loaded(x).sum().backward()
        assert all(p.grad is not None for p in loaded.gm.parameters())


def test_weights_file_has_the_users_keys(tmp_path: Path) -> None:
    saved = tuned("cnn")
    stored = load_file(fxc.save_pruned(saved, tmp_path / "out") / "weights.safetensors")
    assert set(saved.gm.state_dict()) | {"scale"} == set(stored) and {"w", "unused.weight"} < set(stored)


def test_a_loaded_program_can_be_pruned_saved_and_built(tmp_path: Path) -> None:
    loaded = fxc.load_pruned(None, fxc.save_pruned(tuned("cnn"), tmp_path / "out"))
    again = prune(loaded, 0.25)
    assert len(again.history) == 2 and len(loaded.history) == 1
    check_same(fxc.load_pruned(make("cnn"), fxc.save_pruned(again, tmp_path / "out")), again, "cnn")
    engine = fxc.target("torch").build(loaded)
    torch.testing.assert_close(engine(images(3, 9)), answers(loaded, "cnn")[0])
    recaptured = fxc.capture(loaded.gm, (images(2),))
    torch.testing.assert_close(recaptured(images(3, 9)), answers(loaded, "cnn")[0])


def test_training_mode_and_notes_come_back(tmp_path: Path) -> None:
    saved = tuned("cnn").clone()
    saved.gm.train()
    saved.gm.norm.eval()
    saved.notes.append("a note")
    loaded = fxc.load_pruned(None, fxc.save_pruned(saved, tmp_path / "out"))
    assert (
        loaded.gm.training and loaded.gm.stem.training and not loaded.gm.norm.training and loaded.notes[-1] == "a note"
    )
    assert saved.gm.training, "saving leaves the mode as it is"


READER = """
import json, pickle, sys, torch
def refuse(*args, **options):
    raise RuntimeError("something is unpickled")
pickle.load = pickle.loads = torch.load = refuse
import fxcompress as fxc
program = fxc.load_pruned(None, sys.argv[1])
ids = torch.tensor(json.loads(sys.argv[2]))
found = program(ids, mask=torch.ones(ids.shape))
found.logits.sum().backward()
assert program.gm.up.weight.grad is not None and program.gm.embed.weight is program.gm.head.weight
print(json.dumps([type(found).__name__, found.logits.tolist()]))
"""


def test_load_in_a_process_without_the_model(tmp_path: Path) -> None:
    saved = tuned("tokens")
    folder = fxc.save_pruned(saved, tmp_path / "out")
    ids = [[3, 1, 4, 1, 5, 9]]
    root = Path(storage.__file__).resolve().parents[2]
    command = [sys.executable, "-c", READER, str(folder), json.dumps(ids)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(root)}
    )
    assert done.returncode == 0, done.stderr
    kind, logits = json.loads(done.stdout)
    expected = saved(torch.tensor(ids), mask=torch.ones(1, 6)).logits
    torch.testing.assert_close(torch.tensor(logits), expected, rtol=1e-5, atol=1e-6)
    assert kind == "Output"


def test_nothing_is_pickled_and_every_file_is_listed(tmp_path: Path) -> None:
    folder = fxc.save_pruned(tuned("cnn"), tmp_path / "out")
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert set(files) == {MANIFEST, *FILES}
    assert set(json.loads(files[MANIFEST])["files"]) == set(FILES)
    for name, content in files.items():
        assert not content.startswith((b"\x80", b"PK")) and b"torch._utils" not in content, name
    kept = json.loads(files["pruning.json"])["plans"]
    assert kept, "the kept indices are plain JSON"


def test_a_folder_is_replaced_in_one_step(tmp_path: Path) -> None:
    once, twice = tuned("cnn"), tuned("cnn", 2)
    folder = fxc.save_pruned(once, tmp_path / "out")
    fxc.save_pruned(twice, folder)
    check_same(fxc.load_pruned(None, folder), twice, "cnn")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ArtifactError, match="holds other files"):
        fxc.save_pruned(once, tmp_path / "mine")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "out"]


# ------------------------------------------------------------------------------------------------ other models
@pytest.mark.parametrize(
    ("other", "named"),
    [
        (lambda: Cnn(width=10), r"stem|norm"),
        (lambda: Cnn(hidden=16), r"inner"),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), r"stem|norm|inner"),
        (lambda: Cnn(act=F.gelu), "do not|differ"),
        (lambda: Cnn().double(), "float32|double|Float|Double"),
    ],
    ids=["wider", "wider inside", "another class", "another activation", "another dtype"],
)
def test_another_model_is_refused(other: Callable[[], nn.Module], named: str, tmp_path: Path) -> None:
    folder = fxc.save_pruned(tuned("cnn"), tmp_path / "out")
    torch.manual_seed(3)
    model = other().eval()
    with pytest.raises((ArtifactError, CaptureError), match=named) as caught:
        fxc.load_pruned(model, folder)
    if "double" not in str(caught.value).lower():
        assert isinstance(caught.value, ArtifactError)


def test_another_program_is_refused(tmp_path: Path) -> None:
    saved = tuned("cnn")
    folder = fxc.save_pruned(saved, tmp_path / "out")
    with pytest.raises(ArtifactError, match="is not the model that was pruned"):
        fxc.load_pruned(saved, folder)
    with pytest.raises(ArtifactError, match="is not the model that was pruned"):
        fxc.load_pruned(dense("tokens"), folder)


@pytest.mark.parametrize("given", [3, "model", Cnn])
def test_what_is_no_model(given: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="takes a model"):
        fxc.load_pruned(given, tmp_path)


def test_without_the_check_another_activation_is_taken(tmp_path: Path) -> None:
    """Shapes cannot tell: the saved outputs can."""
    folder = fxc.save_pruned(tuned("cnn"), tmp_path / "out")
    model = Cnn(act=F.gelu).eval()
    with pytest.raises(ArtifactError, match="does not compute what the saved one did"):
        fxc.load_pruned(model, folder)
    assert fxc.load_pruned(model, folder, verify=False).history


# ------------------------------------------------------------------------------------------------ without a graph
class OwnConv(nn.Conv2d):
    """A layer that has no file form."""


def test_a_layer_without_a_file_form_needs_the_model(tmp_path: Path) -> None:
    saved = tuned("cnn").clone()
    saved.gm.inner.__class__ = OwnConv
    folder = fxc.save_pruned(saved, tmp_path / "out")
    assert not (folder / "program.json").exists()
    with pytest.raises(ArtifactError, match=r"holds no graph(.|\n)*OwnConv(.|\n)*original model"):
        fxc.load_pruned(None, folder)
    loaded = fxc.load_pruned(make("cnn"), folder)
    assert torch.equal(answers(loaded, "cnn")[0], answers(saved, "cnn")[0])


def test_a_graph_that_does_not_come_back_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = tuned("cnn")
    lines = storage._lines
    monkeypatch.setattr(storage, "_lines", lambda p: lines(p)[:-1] if p is saved else lines(p))
    with pytest.raises(ArtifactError, match="does not come back as it was"):
        fxc.save_pruned(saved, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
