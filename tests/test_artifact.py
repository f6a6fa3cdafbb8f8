"""Saved engines: complete or not there at all, and refused when anything about them was changed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fxcompress as fxc
import fxcompress.artifact as artifact
from fxcompress.artifact import MANIFEST, load, save
from fxcompress.engines import Engine, registered_targets
from fxcompress.errors import ArtifactError, MissingRuntimeError, UsageError
from tests.helpers.quick import Answer, built, cnn, images, tokens

ENGINES = ["torch", *(pytest.param(name, marks=getattr(pytest.mark, name)) for name in ("onnxruntime", "openvino"))]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return built("torch", "float32")


@pytest.fixture
def folder(engine: Engine, tmp_path: Path) -> Path:
    return engine.save(tmp_path / "out")


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


# ------------------------------------------------------------------------------------------------ round trip
@pytest.mark.parametrize("runtime", ENGINES)
@pytest.mark.parametrize("kind", ["cnn", "tokens"])
def test_round_trip(runtime: str, kind: str, tmp_path: Path) -> None:
    made = built(runtime, "int8", kind)
    loaded = load(made.save(tmp_path / "out"), threads=1)
    assert type(loaded) is type(made) and loaded.signature == made.signature and loaded.program is None
    assert loaded.notes == made.notes and loaded.file_size() == made.file_size()
    if kind == "cnn":
        assert torch.equal(loaded(images(3)), made(images(3)))
    else:
        got, expected = loaded(**tokens(3)), made(**tokens(3))
        assert (
            type(got) is Answer
            and torch.equal(got.logits, expected.logits)
            and torch.equal(got.hidden, expected.hidden)
        )


READER = """
import json, pickle, sys, torch
def refuse(*args, **options):
    raise RuntimeError("something is unpickled")
pickle.load = pickle.loads = torch.load = refuse
import fxcompress as fxc
given = {"ids": torch.tensor(json.loads(sys.argv[2])), "mask": torch.ones(1, 6)}
engine = fxc.load(sys.argv[1], threads=1)
found = engine(**given)
assert "tests.helpers.quick" not in sys.modules, "the model's source was imported"
print(json.dumps([type(found).__name__, found.logits.tolist(), found["hidden"].shape, list(found)]))
"""


@pytest.mark.parametrize("runtime", ENGINES)
def test_load_in_a_process_without_the_model(runtime: str, tmp_path: Path) -> None:
    """The dataclass of the output is not known there: its fields are, by attribute and by key."""
    made = built(runtime, "int8", "tokens")
    folder = made.save(tmp_path / "out")
    ids = [[3, 1, 4, 1, 5, 9]]
    root = Path(artifact.__file__).resolve().parent.parent
    command = [sys.executable, "-c", READER, str(folder), json.dumps(ids)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(root)}
    )
    assert done.returncode == 0, done.stderr
    kind, logits, hidden, fields = json.loads(done.stdout)
    expected = made(ids=torch.tensor(ids), mask=torch.ones(1, 6))
    assert kind == "Output" and hidden == [1, 6, 32] and fields == ["logits", "hidden"]
    torch.testing.assert_close(torch.tensor(logits), expected.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("runtime", ENGINES)
def test_nothing_is_pickled(runtime: str, tmp_path: Path) -> None:
    files = contents(built(runtime).save(tmp_path / "out"))
    assert {MANIFEST, "env.json"} < set(files)
    for name, content in files.items():
        assert not content.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")), name
        assert not name.endswith((".pt", ".pth", ".pkl", ".bin.py")) and b"torch._utils" not in content


def test_manifest_lists_every_file(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    files = contents(folder)
    assert set(manifest["files"]) == set(files) - {MANIFEST}
    for name, entry in manifest["files"].items():
        assert entry == {"sha256": hashlib.sha256(files[name]).hexdigest(), "size": len(files[name])}


def test_manifest_is_written_last(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    write = artifact._write

    def recorded(path: Path, content: Any) -> dict[str, Any]:
        assert path.parent != tmp_path / "out", "a file was written under the final name of the folder"
        order.append(path.name)
        return write(path, content)

    monkeypatch.setattr(artifact, "_write", recorded)
    save(engine, tmp_path / "out", extra={"notes.txt": "x"})
    assert order[-1] == MANIFEST and sorted(order) == sorted(contents(tmp_path / "out"))


def test_report_environment_and_extra_files(engine: Engine, tmp_path: Path) -> None:
    folder = save(
        engine, tmp_path / "a" / "b", report={"model": "Cnn"}, environment={"torch": "x"}, extra={"labels.txt": "cat"}
    )
    assert load(folder).report == {"model": "Cnn"}
    assert (
        json.loads((folder / "env.json").read_text()) == {"torch": "x"} and (folder / "labels.txt").read_text() == "cat"
    )


@pytest.mark.parametrize("name", ["", "..", "a/b", MANIFEST, "env.json", "program.json"])
def test_names_of_extra_files(engine: Engine, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="cannot be the name of an extra file"):
        save(engine, tmp_path / "out", extra={name: "x"})
    assert list(tmp_path.iterdir()) == []


def test_a_loaded_engine_can_be_saved_again(folder: Path, tmp_path: Path) -> None:
    again = load(folder).save(tmp_path / "again")
    assert torch.equal(load(again)(images(2)), load(folder)(images(2)))
    in_place = load(folder)
    in_place.save(folder)
    assert torch.equal(load(folder)(images(2)), in_place(images(2)))


# ------------------------------------------------------------------------------------------------ changed folders
def edit(folder: Path, **changes: Any) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | changes))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def relist(folder: Path) -> None:
    """Names a path outside the folder, with a hash that fits."""
    manifest = json.loads((folder / MANIFEST).read_text())
    outside = folder.parent / "outside"
    outside.write_bytes(b"")
    manifest["files"]["../outside"] = {"sha256": hashlib.sha256(b"").hexdigest(), "size": 0}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def link(folder: Path) -> None:
    target = folder.parent / "elsewhere"
    (folder / "env.json").rename(target)
    (folder / "env.json").symlink_to(target)


TAMPERED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "one bit": (lambda f: flip(f / "weights.safetensors"), "weights.safetensors has another content"),
    "graph": (lambda f: flip(f / "program.json"), "program.json has another content"),
    "environment": (lambda f: flip(f / "env.json"), "env.json has another content"),
    "longer": (lambda f: (f / "env.json").write_bytes((f / "env.json").read_bytes() + b" "), "has another size"),
    "missing file": (lambda f: (f / "weights.safetensors").unlink(), "weights.safetensors is missing"),
    "additional file": (lambda f: (f / "extra.py").write_text("x"), "extra.py does not belong here"),
    "additional folder": (lambda f: (f / "more").mkdir(), "more does not belong here"),
    "link": (link, "env.json is not a regular file"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "no manifest.json in it"),
    "cut manifest": (lambda f: (f / MANIFEST).write_text((f / MANIFEST).read_text()[:50]), "manifest is damaged"),
    "list as manifest": (lambda f: (f / MANIFEST).write_text("[]"), "manifest is damaged"),
    "another format": (lambda f: edit(f, format="zip"), "manifest is damaged"),
    "newer version": (lambda f: edit(f, schema=2), "written by a newer version"),
    "unknown engine": (lambda f: edit(f, engine="tensorflow"), "engine this version does not have"),
    "no signature": (lambda f: edit(f, signature={}), "manifest is damaged"),
    "broken signature": (lambda f: edit(f, signature=[1]), "manifest is damaged"),
    "unlisted engine file": (
        lambda f: edit(f, details={"files": ["a.json"], "taps": {}}),
        "engine file it does not list",
    ),
    "path outside": (relist, "path outside the folder"),
}


@pytest.mark.parametrize("kind", TAMPERED)
def test_changed_folder_is_refused(folder: Path, kind: str) -> None:
    change, message = TAMPERED[kind]
    change(folder)
    with pytest.raises(ArtifactError, match=message):
        load(folder)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="there is no saved engine"):
        load(tmp_path / "nowhere")


@pytest.mark.onnxruntime
def test_missing_runtime_gives_the_pip_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = built("onnxruntime").save(tmp_path / "out")
    monkeypatch.setattr(
        type(registered_targets()["onnxruntime"]), "available", lambda self: 'pip install "fxcompress[x]"'
    )
    with pytest.raises(MissingRuntimeError, match=r"not installed(.|\n)*pip install"):
        load(folder)


# ------------------------------------------------------------------------------------------------ where it cannot be written
@pytest.mark.parametrize("present", [False, True])
@pytest.mark.parametrize("failing", ["weights.safetensors", MANIFEST])
def test_a_failing_disk_leaves_nothing_and_destroys_nothing(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, present: bool
) -> None:
    folder = tmp_path / "out"
    before = contents(engine.save(folder)) if present else None
    write = artifact._write

    def full(path: Path, content: Any) -> dict[str, Any]:
        if path.name == failing:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, content)

    monkeypatch.setattr(artifact, "_write", full)
    with pytest.raises(ArtifactError, match=r"cannot be saved(.|\n)*No space left"):
        engine.save(folder)
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if present else [])
    assert not present or contents(folder) == before
    monkeypatch.undo()
    assert torch.equal(load(engine.save(folder))(images(2)), engine(images(2)))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MB; where it cannot be mounted, the test is skipped."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    try:
        done = subprocess.run(mount, capture_output=True)
    except OSError:
        pytest.skip("there is no mount")
    if done.returncode:
        pytest.skip("mounting needs rights")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)  # a loaded engine still maps its weights


@pytest.mark.parametrize("checked", [True, False])
def test_full_disk(engine: Engine, small_disk: Path, monkeypatch: pytest.MonkeyPatch, checked: bool) -> None:
    """Told before anything is written; and when the system gives no or a wrong number, at the write that fails."""
    kept = contents(engine.save(small_disk / "out"))
    if not checked:
        monkeypatch.setattr(artifact, "_check_space", lambda *args: None)
    with pytest.raises(ArtifactError, match=r"not enough space" if checked else "No space left"):
        engine.save(small_disk / "out", extra={"large.bin": bytes(3_000_000)})
    assert [p.name for p in small_disk.iterdir()] == ["out"] and contents(small_disk / "out") == kept
    assert torch.equal(load(small_disk / "out")(images(2)), engine(images(2)))


def test_parent_that_is_a_file(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="cannot be saved"):
        engine.save(tmp_path / "file" / "out")


def test_folder_without_rights(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*args: Any, **options: Any) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / "out"))

    monkeypatch.setattr(artifact.tempfile, "mkdtemp", denied)
    with pytest.raises(ArtifactError, match=r"cannot be saved(.|\n)*Permission denied"):
        engine.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_other_peoples_folders_are_left_alone(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("x")
    (tmp_path / "note").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    for name, message in (("photos", "holds other files"), ("note", "not a folder"), ("link", "not a folder")):
        with pytest.raises(ArtifactError, match=message):
            engine.save(tmp_path / name)
    assert (tmp_path / "photos" / "cat.jpg").read_text() == "x" and len(list(tmp_path.iterdir())) == 3


def test_replacing_a_saved_engine(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one step where the system can swap folders, else by two renames; an empty folder is taken as it is."""
    (tmp_path / "out").mkdir()
    save(engine, tmp_path / "out", extra={"first": "1"})
    save(engine, tmp_path / "out", extra={"second": "2"})
    assert "second" in contents(tmp_path / "out") and "first" not in contents(tmp_path / "out")
    monkeypatch.setattr(artifact, "_exchange", lambda a, b: False)
    save(engine, tmp_path / "out", extra={"third": "3"})
    assert "third" in contents(tmp_path / "out") and "second" not in contents(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert torch.allclose(load(tmp_path / "out")(images(2)), cnn()(images(2)), rtol=1e-4, atol=1e-5)


@pytest.mark.onnxruntime
def test_engine_made_for_another_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full-range weights saturate where sums have 16 bits: loading says so; engines made for there are fine."""
    made = {}
    for name, flags in (("vnni", "avx512_vnni"), ("avx2", "avx2 fma")):
        monkeypatch.setenv("FXCOMPRESS_CPU_FLAGS", flags)
        passes = (fxc.FuseActivations(), fxc.QuantizeStatic())
        options: dict[str, Any] = {"passes": passes, "target": "onnxruntime", "measure": False}
        made[name] = fxc.compile(cnn(), (images(2),), calibration=[images(8)], **options).save(tmp_path / name)
    with pytest.warns(UserWarning, match="saturate"):
        loaded = load(made["vnni"])
    assert any("saturate" in note for note in loaded.notes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not load(made["avx2"]).notes
        monkeypatch.setenv("FXCOMPRESS_CPU_FLAGS", "avx_vnni")
        load(made["vnni"]), load(made["avx2"])
