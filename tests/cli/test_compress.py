"""``fxcompress compress`` and ``benchmark`` for real, on a small CNN."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fxcompress.api
from fxcompress.modelspec import resolve

Run = Callable[..., tuple[int, str, str]]
Replace = Callable[[Callable[..., Any] | BaseException], None]


@pytest.mark.onnxruntime
@pytest.mark.parametrize("target", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.openvino)])
def test_compress_benchmark_inspect(run: Run, model: str, data: str, target: str) -> None:
    """The newcomer's way: compress with data, run the command it names, look at the folder."""
    code, out, err = run("compress", model, "-o", "out", "--target", target, "--data", data, "--no-measure", "--json")
    assert code == 0, err
    facts = json.loads(out)
    report = facts["report"]
    assert report["precision"] == "int8" and report["accuracy"]["before"] == 1.0 and report["accuracy"]["passed"]
    assert "top-1 accuracy is measured on all 64 samples" in err
    images = torch.from_numpy(np.load(data)["x"])
    with torch.no_grad():
        expected = resolve(model).require_module()(images)
    got = fxcompress.api.load("out")(images)
    assert (got.argmax(1) == expected.argmax(1)).float().mean() > 0.95
    code, out, _ = run("inspect", "out")
    assert code == 0 and "manifest.json" in out and f"{target} int8" in out
    code, out, _ = run("benchmark", "out", "--json", "--seconds", "0.2", "--rounds", "1")
    row = json.loads(out)["rows"][0]
    assert code == 0 and row["status"] == "ok" and row["latency"]["p50_ms"] > 0 and row["ratio"]["median"] == 1
    code, _, err = run("compress", "out", "-o", "again")
    assert code == 2 and "saved engine" in err


@pytest.mark.onnxruntime
def test_compress_without_data_is_float32(run: Run, model: str) -> None:
    code, out, err = run("compress", model, "-o", "out", "--target", "onnxruntime", "--no-measure")
    assert code == 0 and "float32" in out and "nothing can be calibrated" in err
    assert "next: fxcompress benchmark" in out


@pytest.mark.onnxruntime
def test_compress_with_random_data_warns(run: Run, model: str) -> None:
    options = ("--target", "onnxruntime", "--no-measure", "--random-data", "--samples", "32", "--dump", "dump")
    code, out, err = run("compress", model, "-o", "out", *options)
    assert code == 0 and "int8" in out and "accuracy of the result means nothing" in err
    assert list(Path("dump").rglob("00_capture.txt"))


@pytest.mark.onnxruntime
def test_gate_is_missed_for_real(run: Run, model: str, data: str) -> None:
    """Calibrated on one image that is nearly black, every other image saturates."""
    pack = dict(np.load(data))
    only = torch.randperm(64, generator=torch.Generator().manual_seed(0))[0].item()
    pack["x"][only] *= 1e-4
    np.savez("data.npz", **pack)
    options = ("--calibrator", "minmax", "--target", "onnxruntime", "--no-measure", "--samples", "1")
    code, out, err = run("compress", model, "-o", "out", "--data", data, *options)
    assert code == 4 and not Path("out").exists()
    assert "accuracy fell" in err and "kept: out.rejected" in err and "MISSED" in out
    assert fxcompress.api.load("out.rejected").report.accuracy["passed"] is False


@pytest.mark.onnxruntime
@pytest.mark.openvino
def test_benchmark_goes_on_after_a_bad_row(run: Run, model: str) -> None:
    options = ("--target", "onnxruntime", "--no-measure", "--quiet")
    assert run("compress", model, "-o", "good", *options)[0] == 0
    assert run("compress", model, "-o", "bad", *options)[0] == 0
    with open("bad/model.onnx", "ab") as file:
        file.write(b"x")
    quick = ("--seconds", "0.2", "--rounds", "1", "--json")
    code, out, _ = run("benchmark", "good", "bad", "nowhere", "good/model.onnx", *quick)
    rows = json.loads(out)["rows"]
    assert code == 0 and [row["latency"] is not None for row in rows] == [True, False, False, True]
    assert "changed" in rows[1]["status"] and "there is no nowhere" in rows[2]["status"]
    assert rows[3]["ratio"]["median"] > 0
    code, out, err = run("benchmark", "bad", *quick)
    assert code == 5 and "FXC-ARTIFACT" in err and len(json.loads(out)["rows"]) == 1
    code, out, _ = run("benchmark", "good", "good/model.onnx", "--input-shape", "1,128:int64", *quick)
    wrong = json.loads(out)["rows"][1]
    assert code == 0 and "--input-shape 1,128:int64 does not fit input x" in wrong["status"]
    both = ("--backend", "onnxruntime,openvino", "--batch", "3")
    code, out, _ = run("benchmark", "good", *both, *quick)
    assert code == 0 and [r["backend"] for r in json.loads(out)["rows"]] == ["onnxruntime", "openvino"]
    assert json.loads(out)["rows"][0]["latency"]["batch"] == 3
    assert run("benchmark", "good", "--backend", "nonsense")[0] == 2


@pytest.mark.onnxruntime
def test_benchmark_table(run: Run, model: str) -> None:
    assert run("compress", model, "-o", "good", "--target", "onnxruntime", "--no-measure", "--quiet")[0] == 0
    code, out, err = run("benchmark", "good", "--seconds", "0.2", "--rounds", "1")
    assert code == 0 and "p50 ms" in out and "good" in out and "ok" in out and "timing" in err
