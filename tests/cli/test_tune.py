"""``fxcompress tune``: what it refuses, and what it writes with a made-up clock."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import fxcompress.cli.tune as command
from fxcompress.kernels import configs
from fxcompress.kernels.configs import ASSUMED, Config, Problem

Run = Callable[..., tuple[int, str, str]]
WIDE = Config(32, 64, 128)


class FakeClock:
    """One warp count is fastest."""

    def eager(self, calls: Sequence[Callable[[], Any]], seconds: float) -> float:
        raise AssertionError("a graph was captured")

    def graph(self, calls: Sequence[Callable[[], Any]], seconds: float) -> float | None:
        found = [configs.lookup(p, ASSUMED[80]) for p in problems()]
        (config,) = [c for c in found if c is not None]
        return 10.0 + abs(config.num_warps - 2)


def problems() -> list[Problem]:
    return [Problem("w8a8", m, 64, 128, torch.int8) for m in (1, 16)]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An A100 that is not there; returns where its table will lie."""

    class Bench:
        def __init__(self) -> None:
            self.device, self.clock, self.place, self.cache = ASSUMED[80], FakeClock(), "cpu", 0

    monkeypatch.setattr(command, "Bench", Bench)
    monkeypatch.setenv("FXCOMPRESS_CONFIGS", str(tmp_path))
    configs.forget_tables()
    return tmp_path / "configs_nvidia-a100.json"


@pytest.mark.triton
def test_tune_writes_the_table(run: Run, bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = [WIDE, Config(32, 64, 128, num_warps=2)]
    monkeypatch.setattr("fxcompress.tuning.candidates", lambda problem, device: few)
    monkeypatch.setattr("fxcompress.tuning.neighbours", lambda config: [])
    options = ("--shapes", "64x128", "--families", "w8a8", "--rows", "1,16")
    code, out, err = run("tune", *options, "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert facts["gpu"] == "NVIDIA A100" and facts["table"] == str(bench) and facts["left"] == 0
    assert [(row["key"], row["config"]["num_warps"]) for row in facts["tuned"]] == [(p.key(), 2) for p in problems()]
    assert configs.read_table(bench)["w8a8"] == {p.key(): few[1] for p in problems()}
    assert "w8a8 1,64,128,int8,0: 10.0 us, the heuristic's takes 12.0" in err
    code, out, err = run("tune", *options, "--quiet")
    assert code == 0 and err == "" and "32x64x128 split 1 warps 2 stages 4" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(run: Run, tmp_path: Path) -> None:
    code, out, err = run("tune", "--shapes", "llama-3-8b", "--json")
    facts = json.loads(out)
    assert code == 2 and facts["error"]["id"] == "FXC-USAGE-460" and "no CUDA device" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "FXC-USAGE-465 tune takes either OUT or --shapes"),
        (("folder", "--shapes", "llama-3-8b"), "FXC-USAGE-465"),
        (("--shapes", "llama-9"), "FXC-USAGE-461 no set of shapes is called 'llama-9'"),
        (("--shapes", "64x128", "--families", "w3a16"), "FXC-USAGE-462"),
        (("folder",), "FXC-USAGE-463 folder is no folder saved by fxcompress"),
        (("--shapes", "64x128", "--dtype", "float32"), "FXC-USAGE-466"),
        (("--shapes", "64x128", "--rows", "1,x"), "FXC-USAGE-467"),
        (("--shapes", "64x128", "--gpu-time", "0"), "Invalid value"),
    ],
)
def test_wrong_use(run: Run, bench: Path, options: tuple[str, ...], message: str) -> None:
    code, _, err = run("tune", *options)
    assert code == 2 and message in err


@pytest.mark.parametrize("triton", [True, False])
def test_what_a_gpu_needs(monkeypatch: pytest.MonkeyPatch, run: Run, triton: bool) -> None:
    """With a device but no Triton the pip line is named."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: not triton)
    monkeypatch.setattr("fxcompress.environment.installed", lambda package: triton)
    code, _, err = run("tune", "--shapes", "64x128")
    assert code == 2 and ("FXC-USAGE-460" if triton else "FXC-RUNTIME-460 Triton is not installed") in err
