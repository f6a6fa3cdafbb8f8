"""Folders of saved pruned programs that were changed, forged, or are something else: refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fxcompress as fxc
from fxcompress.artifact import MANIFEST, _write
from fxcompress.errors import ArtifactError
from tests.prune.stored import FILES, dense, make, tuned


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fxc.save_pruned(tuned("cnn"), tmp_path_factory.mktemp("good") / "out")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["flipped", "missing"])
def test_changed_files(name: str, how: str, good: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(good, tmp_path / "out")
    flip(folder / name) if how == "flipped" else (folder / name).unlink()
    for source in (None, make("cnn")):
        with pytest.raises(ArtifactError, match=rf"pruned program was changed(.|\n)*{name}"):
            fxc.load_pruned(source, folder)


def test_folders_of_another_kind(good: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="there is no saved pruned program"):
        fxc.load_pruned(None, tmp_path / "nothing")
    engine = fxc.target("torch").build(dense("cnn")).save(tmp_path / "engine")
    with pytest.raises(ArtifactError, match="damaged"):
        fxc.load_pruned(None, engine)
    folder = shutil.copytree(good, tmp_path / "out")
    with pytest.raises(ArtifactError, match="damaged"):
        fxc.load(folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"schema": 2}))
    with pytest.raises(ArtifactError, match="newer version"):
        fxc.load_pruned(None, folder)


def forge(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Change a file and its hash in the manifest: what an attacker or a bug could write."""
    content = json.loads((folder / name).read_text())
    (folder / name).unlink()
    entry = _write(folder / name, json.dumps(change(content)).encode())
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] = entry
    (folder / MANIFEST).write_text(json.dumps(manifest))


FORGERIES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "no plans": ("pruning.json", lambda c: {k: v for k, v in c.items() if k != "plans"}),
    "a list": ("pruning.json", lambda c: []),
    "a tensor of another shape": (
        "pruning.json",
        lambda c: c | {"tensors": [["w", "parameter", "float32", [1], True, "w"]]},
    ),
    "a tensor that is not there": (
        "pruning.json",
        lambda c: c | {"tensors": [["w", "parameter", "float32", [1], True, "v"]]},
    ),
    "no graph": ("program.json", lambda c: c | {"graph": {}}),
    "a layer of another library": (
        "program.json",
        lambda c: json.loads(json.dumps(c).replace('"kind": "Conv2d"', '"kind": "os.system"')),
    ),
    "an operator of another library": (
        "program.json",
        lambda c: json.loads(json.dumps(c).replace('"aten.relu.default"', '"prims.rng.default"')),
    ),
}


@pytest.mark.parametrize("how", FORGERIES)
def test_forged_files(how: str, good: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(good, tmp_path / "out")
    forge(folder, *FORGERIES[how])
    with pytest.raises(ArtifactError):
        fxc.load_pruned(None, folder)
