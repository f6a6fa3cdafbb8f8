"""``fxcompress build``: engines for other devices, beside those of a saved folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress.cli import main
from fxcompress.engines.tensorrt import TensorRtEngine

Run = Callable[..., tuple[int, str, str]]
pytestmark = pytest.mark.tensorrt
QUICK = ("--optimization-level", "0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).eval(), torch.randn(4, 32)
    options = {"optimization_level": 0, "compute_capability": "8.0", "profile": {"batch": (1, 4, 8)}}
    engine = fxc.compile(model, (x,), target="tensorrt", calibration=[x], engine_options=options)
    return engine.save(tmp_path_factory.mktemp("build") / "out", extra={"notes.txt": "kept"})


def test_engines_are_added(folder: Path, run: Run) -> None:
    """The other files, the profiles and the report stay; a second build of a device replaces the first."""
    code, out, err = run("build", str(folder), "--compute-capability", "8.9,8.0", "--json", *QUICK)
    assert code == 0, err
    facts = json.loads(out)
    rows = {row["capability"]: row for row in facts["engines"]}
    assert set(rows) == {"8.0", "8.9"} and facts["failed"] == []
    assert all(row["layers"]["layers"] == {"0": "int8", "2": "int8"} for row in rows.values())
    assert all(row["profiles"] == [{"batch": [1, 4, 8]}] for row in rows.values())
    assert "compute capability 8.9, TensorRT-RTX 1." in rows["8.9"]["for"]
    engine = fxc.load(folder)
    assert isinstance(engine, TensorRtEngine) and engine.report.precision == "int8"
    assert sorted(p.capability for p in engine.plans) == ["8.0", "8.9"]
    assert (folder / "notes.txt").read_text() == "kept"


def test_what_fails_is_said_and_the_rest_is_kept(folder: Path, run: Run) -> None:
    """TensorRT-RTX does not know 9.0: the other device is built, the exit code says that one is not."""
    code, out, err = run("build", str(folder), "--compute-capability", "12.0,9.0", "--profile", "batch=1:2:4", *QUICK)
    assert code == 2
    assert "engine_sm120.plan" in out and "2 quantized layers: 2 int8" in out
    assert "has no compute capability 9.0" in err and "tensorrt-cu13" in err
    saved = json.loads((folder / "manifest.json").read_text())["details"]["plans"]
    assert next(p for p in saved if p["capability"] == "12.0")["profiles"] == [{"batch": [1, 2, 4]}]


def test_when_all_fail_nothing_changes(folder: Path, run: Run) -> None:
    before = (folder / "manifest.json").read_bytes()
    code, _, err = run("build", str(folder), "--compute-capability", "9.0", *QUICK)
    assert code == 2 and "has no compute capability 9.0" in err
    assert run("build", str(folder), "--compute-capability", "8.0", "--workspace", "16B", *QUICK)[0] == 3
    assert (folder / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (("--target", "openvino"), "nothing is built for the target 'openvino'"),
        (("--profile", "batch=8"), "not understood"),
        (("--profile", "length=1:2:3"), "no free size"),
        (("--workspace", "much"), "no amount of memory"),
        (("--library", "cudnn"), "not known"),
    ],
)
def test_wrong_options(folder: Path, run: Run, options: tuple[str, ...], what: str) -> None:
    code, _, err = run("build", str(folder), *options)
    assert code == 2 and what in err


def test_folders_of_other_engines(tmp_path: Path, run: Run) -> None:
    model, x = nn.Linear(4, 4).eval(), torch.randn(2, 4)
    saved = fxc.compile(model, (x,), target="torch", measure=False).save(tmp_path / "out")
    code, _, err = run("build", str(saved))
    assert code == 2 and "holds an engine of the target 'torch'" in err and "--target tensorrt" in err
    assert main(["build", str(tmp_path / "none")]) == 5
