"""The kernel benchmark and the model beside it, on a machine without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from benchmarks import kernel_measure, kernel_model, kernel_peers, kernels
from benchmarks.kernel_measure import Bench, Ceilings
from benchmarks.kernel_plots import plot
from fxcompress.kernels.configs import ASSUMED, Config, Problem
from fxcompress.kernels.workloads import WORKLOADS, workload

ROOT = Path(__file__).resolve().parents[2]
H200, A100 = kernel_model.CHIPS[1], kernel_model.CHIPS[0]


@pytest.mark.triton
@pytest.mark.slow
def test_dry_run_writes_a_row_for_every_family(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks.kernels", "--device", "cpu", "--dry-run", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(out.read_text())
    rows, results = content["results"]["rows"], content["results"]
    assert {r["family"] for r in rows} == set(WORKLOADS) and {r["m"] for r in rows} == {1, 17}
    assert all(r["status"] == "ok" and r["error"] < 1e-3 and r["us"] == 10.0 for r in rows)
    assert all(r["peers"]["cuBLAS"]["us"] == 10.0 and r["speedup"] == 1.0 for r in rows)
    peers = {name: p for r in rows for name, p in r["peers"].items()}
    assert "status" in peers["tinygemm"] and "gemlite" not in peers
    assert set(results["samples"].values()) == {"ok"} and len(results["samples"]) >= 8
    assert results["ceilings"]["copy"] > 0 and results["left_for_want_of_time"] == 0
    assert content["environment"]["packages"]["triton"] and content["settings"]["dry_run"]


def test_a_kernel_that_is_wrong_or_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    class Op:
        tolerance: ClassVar = {torch.float16: 5e-4}

        def reference(self, x: torch.Tensor, **rest: Any) -> torch.Tensor:
            return x.half()

        fake = reference

        def launch(self, x: torch.Tensor, **rest: Any) -> torch.Tensor:
            return x.half() * 1.25

    problem = Problem("w8a8", 3, 64, 128, torch.int8)
    monkeypatch.setattr(kernel_measure, "kernel_op", lambda name: Op())
    monkeypatch.setattr(kernel_measure, "heuristic", lambda problem, device: Config())
    bench = Bench("cpu", ASSUMED[80], kernels._DryClock(), 0)
    roof = Ceilings(1e12, 1e14, 1e14, 2e14)
    row = kernel_measure.measure(problem, bench, roof)
    assert row["error"] == pytest.approx(0.25, rel=1e-2) and "relative error 2.5e-01" in row["status"]
    monkeypatch.setattr(Op, "launch", lambda self, **arguments: 1 // 0)
    row = kernel_measure.measure(problem, bench, roof)
    assert row["us"] is None and row["status"].startswith("ZeroDivisionError") and "WRONG" not in kernels._line(row)


def test_rows_are_kept_when_the_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.0, *range(1, 100)])
    monkeypatch.setattr("benchmarks.kernels.time", SimpleNamespace(monotonic=lambda: next(seconds)))
    monkeypatch.setattr(kernel_measure, "check_samples", lambda place: {})
    monkeypatch.setattr(kernel_measure, "ceilings", lambda bench, size: Ceilings(1e12, 1e14, 1e14, 2e14))
    saved: list[int] = []

    def measure(problem: Problem, bench: Bench, roof: Ceilings) -> dict[str, Any]:
        saved.append(len(json.loads(path.read_text())["results"]["rows"]))
        facts = {"family": problem.family, "m": problem.m, "n": problem.n, "k": problem.k, "dtype": "float16"}
        return {**facts, "us": 5.0, "share": 0.5, "status": "ok"}

    monkeypatch.setattr(kernel_measure, "measure", measure)
    path = tmp_path / "rows.json"
    plan = kernels.Plan(((64, 256),), (1, 2, 3, 4), seconds=2.5, size=8)
    report = kernels.Report(path, {"results": {}})
    kernels.run(plan, Bench("cpu", ASSUMED[80], kernels._DryClock(), 0), ["w8a8"], report)
    content = json.loads(path.read_text())["results"]
    assert saved == [0, 1] and len(content["rows"]) == 2 and content["left_for_want_of_time"] == 2
    assert content["rows"][0]["speedup"] == 2.0, "the dense product takes 10 us, says the clock"


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(SystemExit, match="no CUDA device"):
        kernels.main(["--device", "cuda", "--quick"])


def test_peers_that_cannot_run_say_why() -> None:
    problem = Problem("w4a16", 3, 64, 128, torch.float16, 128)
    bench = Bench("cpu", ASSUMED[80], kernels._DryClock(), 0)
    found = kernel_measure.peer_times(problem, kernel_peers.peers_of("w4a16", slow=True), bench)
    assert found["cuBLAS"]["us"] == 10.0 and found["tinygemm"]["status"] == "needs a CUDA device"
    assert "not installed" in found["gemlite"]["status"] and found["torchao int4"]["us"] is None
    calls = kernel_peers.DENSE.calls(problem, "cpu", cache=64 * 128 * 2)
    assert len(calls) == 4 and calls[0]().shape == (3, 64), "three times the cache, and one more"


def test_plots_and_what_they_are_made_of(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    peers = {"cuBLAS": {"us": 20.0}, "tinygemm": {"us": None}, "gemlite": {"us": 40.0}}
    rows = [
        {"family": "w4a16", "m": m, "n": 64, "k": 256, "dtype": "float16", "us": 10.0, "peers": peers} for m in (1, 16)
    ]
    made = plot(rows, tmp_path / "kernels_x.json")
    assert [p.name for p in made] == ["kernels_x_w4a16.svg"] and made[0].read_text().count("cuBLAS")
    assert plot([{**rows[0], "peers": {}}], tmp_path / "none.json") == []


# ------------------------------------------------------------------------------------------------ roofline and model
def test_floor_of_a_product() -> None:
    roof = Ceilings(copy=4.3e12, float16=790e12, bfloat16=790e12, int8=1580e12)
    work = workload("w4a16")
    thin, thick = (Problem("w4a16", m, 28672, 8192, torch.float16, 128) for m in (1, 4096))
    assert roof.floor_us(work, thin) == pytest.approx(28.2, rel=5e-3), "121 MB at 4.3 TB/s"
    assert roof.floor_us(work, thick) == pytest.approx(2435.6, rel=5e-3), "1924 GFLOP at 790 TFLOP/s"
    assert roof.floor_us(workload("w8a8"), Problem("w8a8", 4096, 28672, 8192, torch.int8)) == pytest.approx(
        1217.8, 5e-3
    )


def test_model_is_bounded_by_what_is_slowest() -> None:
    work, tile = workload("w4a16"), Config(16, 128, 128)
    one = Problem("w4a16", 1, 28672, 8192, torch.float16, 128)
    cheap, dear = (kernel_model.ours(H200, work, one, tile, count) for count in (2.2, 7.0))
    assert cheap.limit == "memory" and cheap.us == pytest.approx(2 + 121.2e6 / (0.8 * 4.3e12) * 1e6, rel=1e-2)
    assert dear.limit == "instructions" and dear.us == pytest.approx(2 + 7 * 28672 * 8192 / 33.45e12 * 1e6, rel=1e-2)
    many = Problem("w4a16", 4096, 28672, 8192, torch.float16, 128)
    assert kernel_model.ours(H200, work, many, Config(128, 128, 128), 2.2).limit == "tensor cores"
    split = kernel_model.ours(H200, work, one, Config(16, 128, 128, split_k=4), 2.2)
    assert split.us > cheap.us + 1.9, "a second kernel, and the parts"
    route = kernel_model.ours(H200, work, many, Config(route="dequantize"), None)
    assert route.us > kernel_model.cublas_us(H200, 4096, 28672, 8192)
    assert kernel_model.cublas_us(A100, 1, 28672, 8192) == pytest.approx(469.8e6 / (0.89 * 2.04e12) * 1e6, rel=1e-2)


def test_instructions_of_a_configuration_come_from_the_row_that_fits() -> None:
    def row(m: int, n: int, count: float | None, warps: int = 4) -> dict[str, Any]:
        constants = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": 128, "SWAP": False, "SPLIT_K": 1}
        return {"family": "w4a16", "warps": warps, "constants": constants, "per_weight": count}

    rows = [row(16, 128, 2.2), row(16, 128, 2.4), row(64, 128, 3.0), row(64, 128, None), row(64, 256, 3.5, 8)]
    problem = Problem("w4a16", 1, 64, 128, torch.float16, 128)
    assert kernel_model.per_weight(rows, problem, Config(16, 128, 128)) == 2.4
    assert kernel_model.per_weight(rows, problem, Config(64, 256, 128, num_warps=8)) == 3.5
    assert kernel_model.per_weight(rows, Problem("w8a8", 1, 64, 128, torch.int8), Config()) is None
