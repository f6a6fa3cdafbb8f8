"""What fxcompress says about the machine."""

import json
import os
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fxcompress import environment
from fxcompress.environment import (
    EXTRAS,
    cpu_flags,
    describe,
    has_vnni,
    installed,
    missing,
    peak_memory,
    physical_cores,
    pip_line,
)

Fake = Callable[[str], None]
ROOT = Path(__file__).resolve().parent.parent

INTEL = """processor\t: 0
model name\t: Some Xeon
siblings\t: 8
cpu cores\t: 4
flags\t\t: fpu sse avx2 fma avx512f avx512_vnni

processor\t: 1
model name\t: another
flags\t\t: amx_int8
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd crc32 asimddp i8mm\nCPU part\t: 0xd40\n"


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Fake:
    def fake(text: str) -> None:
        monkeypatch.setattr(environment, "_cpu_info", lambda: environment.parse_cpu_info(text))

    return fake


def test_flags_of_an_intel_processor(cpu: Fake) -> None:
    cpu(INTEL)
    assert cpu_flags() == {"avx2", "fma", "avx512f", "avx512_vnni"}, "only the first processor, only what matters"
    assert has_vnni()
    assert describe()["processor"] == "Some Xeon"


def test_flags_of_an_arm_processor(cpu: Fake) -> None:
    cpu(ARM)
    assert cpu_flags() == {"asimd", "asimddp", "i8mm"}
    assert has_vnni()


@pytest.mark.parametrize("text", ["", INTEL.replace("avx512_vnni", "avx512_vnni_not"), "nonsense"])
def test_no_vnni(cpu: Fake, text: str) -> None:
    cpu(text)
    assert not has_vnni()


def test_flags_of_another_processor(cpu: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu(INTEL)
    monkeypatch.setenv("FXCOMPRESS_CPU_FLAGS", "avx2, fma")
    assert cpu_flags() == {"avx2", "fma"} and not has_vnni()
    monkeypatch.setenv("FXCOMPRESS_CPU_FLAGS", "")
    assert cpu_flags() == frozenset() and not has_vnni()
    assert has_vnni(frozenset({"amx_int8"}))


def test_physical_cores(cpu: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    cpu(INTEL)
    assert physical_cores() == 3, "two threads a core"
    cpu(ARM)
    assert physical_cores() == 6, "the system does not tell"
    cpu(INTEL)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert physical_cores() == 1


def test_describe_is_json_and_true() -> None:
    facts = json.loads(json.dumps(describe()))
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["gpu"] == [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    assert facts["memory"] > 1 << 28
    assert set(facts["missing"]) == {extra for extra in EXTRAS if missing(extra)}


def test_a_missing_runtime_gets_its_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "installed", lambda package: package not in ("openvino", "onnxscript"))
    assert missing("openvino") == ["onnxscript", "openvino"]
    assert describe()["missing"]["openvino"] == 'pip install "fxcompress[openvino]"'
    assert describe()["missing"]["onnxruntime"] == pip_line("onnxruntime")


def test_installed_does_not_import() -> None:
    assert installed("json") and not installed("no_such_package_at_all")


DISTRIBUTIONS = {"tensorrt_rtx": "tensorrt-rtx-cu13"}


def test_extras_are_those_of_the_package() -> None:
    """The pip line must name an extra that exists and brings what the engine imports."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, packages in EXTRAS.items():
        named = {line.split(">")[0].split("<")[0].split("=")[0].split("[")[0] for line in extras[extra]}
        assert {DISTRIBUTIONS.get(p, p) for p in packages} <= named


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the peak in /proc")
def test_peak_memory_is_the_systems_in_bytes() -> None:
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    assert abs(peak_memory() - 1024 * kilobytes) < 16 << 20
