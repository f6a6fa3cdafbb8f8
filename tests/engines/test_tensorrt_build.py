"""Building TensorRT engines without a GPU: devices, profiles, workspace, what is refused, and with which sentence."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import types
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.artifact import load
from fxcompress.capture import capture
from fxcompress.engines import target
from fxcompress.engines import tensorrt as module
from fxcompress.engines.tensorrt import TensorRtEngine, choose_plan
from fxcompress.engines.tensorrt_builder import PORTABLE, Plan, _parse, check_parser, chosen_capabilities, memory_size
from fxcompress.engines.tensorrt_layers import LayerReport
from fxcompress.engines.tensorrt_library import Library, library, system
from fxcompress.engines.tensorrt_profile import complete_profiles, parse_profile, profile_of
from fxcompress.errors import EngineError, MissingRuntimeError, UsageError
from fxcompress.passbase import Pass

pytestmark = pytest.mark.tensorrt

NO_DEVICE = pytest.mark.skipif(torch.cuda.is_available(), reason="what happens without a CUDA device")
FAST: dict[str, Any] = {"threads": 1, "optimization_level": 0}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(x)).mean((2, 3)))  # type: ignore[no-any-return]


@cache
def program() -> Any:
    torch.manual_seed(0)
    return capture(Net().eval(), (torch.randn(2, 3, 16, 16),))


def build(**options: Any) -> TensorRtEngine:
    return cast(TensorRtEngine, target("tensorrt").build(program(), **{**FAST, **options}))


# ------------------------------------------------------------------------------------------------ files of others
@pytest.mark.parametrize(
    ("passes", "scheme", "read"),
    [
        ((fxc.QuantizeWeights(bits=4, group_size=16),), None, True),
        ((fxc.QuantizeWeights(bits=3, group_size=16),), None, True),
        ((fxc.QuantizeDynamic(),), None, True),
        ((fxc.QuantizeStatic(),), "tensorrt", True),
        ((fxc.QuantizeStatic(),), None, False),
        ((fxc.QuantizeWeights(bits=4, group_size=16, symmetric=False),), None, False),
    ],
)
def test_what_the_parser_reads_of_an_exported_file(
    passes: tuple[Pass, ...], scheme: str | None, read: bool, tmp_path: Path
) -> None:
    """``export_onnx`` writes any grid; TensorRT takes symmetric ones."""
    wanted = fxc.target(scheme).scheme() if scheme else fxc.QuantScheme()
    context = fxc.Context(calibration=[torch.randn(2, 3, 16, 16)], scheme=wanted)
    file = fxc.export_onnx(fxc.Pipeline(passes=passes)(program(), context).program, tmp_path / "model.onnx")
    assert bool(check_parser(_parse(library(), file).parser)) != read


# ------------------------------------------------------------------------------------------------ devices
def test_one_engine_for_each_device() -> None:
    engine = build(compute_capability="8.0, 12.0")
    assert [p.capability for p in engine.plans] == ["8.0", "12.0"]
    assert {f.name for f in engine.files()} == {"model.onnx", "engine_sm80.plan", "engine_sm120.plan"}
    contents = [f.read_bytes() for f in engine.files()[1:]]
    assert contents[0] != contents[1] and all(len(c) > 10_000 for c in contents)
    assert set(engine.layers()) == {"8.0", "12.0"}
    for plan in engine.plans:
        assert plan.version == library("tensorrt_rtx").version and plan.system == system()


@NO_DEVICE
def test_without_a_device_the_engine_is_portable() -> None:
    plan = build().plans[0]
    assert plan.capability == PORTABLE and plan.file == "engine.plan"
    assert "compute capability 8.0 and later, TensorRT-RTX 1." in plan.made_for


def test_a_device_that_the_library_does_not_know() -> None:
    with pytest.raises(UsageError, match=r"TensorRT-RTX 1\..* has no compute capability 9\.0") as caught:
        build(compute_capability="8.0,9.0")
    assert (
        "8.0" in caught.value.why
        and "tensorrt-cu13" in caught.value.fix
        and "NVIDIA's package index" in caught.value.fix
    )


@pytest.mark.parametrize(("here", "wanted", "ok"), [("9.0", "9.0", True), ("8.0", "9.0", False), (None, "9.0", False)])
def test_the_full_library_builds_for_its_own_device(
    here: str | None, wanted: str, ok: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxcompress.engines.tensorrt_library.device_capability", lambda: here)
    monkeypatch.setattr("fxcompress.engines.tensorrt_builder.device_capability", lambda: here)
    full = Library("tensorrt", types.SimpleNamespace(__version__="11.4.0"))
    if ok:
        assert chosen_capabilities(wanted, full) == chosen_capabilities(None, full) == (wanted,)
        return
    with pytest.raises(
        UsageError, match=r"TensorRT 11\.4\.0 builds for the CUDA device of the machine alone"
    ) as caught:
        chosen_capabilities(wanted, full)
    assert ("there is none" if here is None else here) in caught.value.why


# ------------------------------------------------------------------------------------------------ who may run it
def plan(**changes: Any) -> Plan:
    report = LayerReport({}, {}, 0, [], 1)
    made = Plan("e.plan", "tensorrt_rtx", "1.7.1.116", "8.0", "linux x86_64", [], False, report)
    return dataclasses.replace(made, **changes)


HERE = ("8.0", {"tensorrt_rtx": "1.7.1.116"}, "linux x86_64")


def test_the_fitting_engine_is_chosen() -> None:
    exact, portable, other = plan(), plan(capability=PORTABLE), plan(capability="8.9")
    assert choose_plan([other, portable, exact], *HERE) is exact
    assert choose_plan([other, portable], *HERE) is portable
    assert choose_plan([portable], "12.0", *HERE[1:]) is portable


@pytest.mark.parametrize(
    ("changes", "here", "why"),
    [
        ({}, ("9.0", *HERE[1:]), "is for compute capability 8.0.*the device has compute capability 9.0"),
        ({"capability": PORTABLE}, ("9.0", *HERE[1:]), "8.0 and later.*the device has compute capability 9.0"),
        (
            {},
            ("8.0", {"tensorrt_rtx": "1.8.0"}, HERE[2]),
            r"TensorRT-RTX 1\.7\.1\.116.*tensorrt_rtx is version 1\.8\.0 here",
        ),
        ({}, ("8.0", {"tensorrt": "11.4"}, HERE[2]), "tensorrt_rtx is not installed"),
        ({}, (*HERE[:2], "win32 AMD64"), "linux x86_64.*this is win32 AMD64"),
    ],
)
def test_a_wrong_engine_is_refused(changes: dict[str, Any], here: tuple[Any, ...], why: str) -> None:
    """With what it is for, and what is here instead."""
    with pytest.raises(EngineError, match="no engine in this folder runs here") as caught:
        choose_plan([plan(**changes)], *here)
    assert __import__("re").search(why, caught.value.why), caught.value.why
    assert f"--compute-capability {here[0]}" in caught.value.fix


def test_a_folder_is_refused_on_another_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A saved engine says for which versions and devices it is; on a machine with another device it does not load."""
    saved = build(compute_capability="8.0").save(tmp_path / "out")
    facts = json.loads((saved / "manifest.json").read_text())["details"]["plans"][0]
    assert (facts["capability"], facts["library"]) == ("8.0", "tensorrt_rtx") and facts["version"].startswith("1.7")
    monkeypatch.setattr(module, "device_capability", lambda: "9.0")
    with pytest.raises(
        EngineError, match=r"the engine engine_sm80.plan is for compute capability 8\.0, TensorRT-RTX 1\.7"
    ):
        load(saved)
    (saved / "engine_sm80.plan").write_bytes(b"other")
    with pytest.raises(fxc.errors.ArtifactError, match="changed"):
        load(saved)


# ------------------------------------------------------------------------------------------------ shapes
def test_profiles_are_in_the_engine() -> None:
    engine = build(profile=[{"batch": (1, 2, 4)}, {"batch": (8, 16, 32)}])
    assert engine.plans[0].profiles == [{"batch": (1, 2, 4)}, {"batch": (8, 16, 32)}]
    assert not any("no profile" in note for note in engine.notes)
    assert any("no profile given for 'batch'" in note for note in build().notes), "the default is said aloud"
    shapes = [profile_of(engine.signature, engine.plans[0].profiles, [(n, 3, 16, 16)]) for n in (1, 4, 8, 32)]
    assert shapes == [0, 0, 1, 1]
    with pytest.raises(UsageError, match="not built for batch=5") as caught:
        profile_of(engine.signature, engine.plans[0].profiles, [(5, 3, 16, 16)])
    assert caught.value.why == "it takes batch 1 to 4; or batch 8 to 32"


def test_a_free_size_needs_a_profile() -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)  # type: ignore[no-any-return]

    auto = torch.export.Dim.AUTO
    free = capture(Sequence().eval(), (torch.randn(2, 5, 16),), dynamic_shapes=({0: auto, 1: auto},))
    with pytest.raises(EngineError, match="the size 'x_dim1' is free and has no profile") as caught:
        target("tensorrt").build(free, **FAST)
    assert "--profile x_dim1=1:5:20" in caught.value.fix
    engine = cast(TensorRtEngine, target("tensorrt").build(free, profile={"x_dim1": (1, 5, 20)}, **FAST))
    assert engine.plans[0].profiles == [{"x_dim1": (1, 5, 20), "batch": (1, 2, 16)}]


@pytest.mark.parametrize(
    ("profile", "what"),
    [
        ({"length": (1, 2, 3)}, "'length', which is no free size"),
        ({"batch": (4, 2, 8)}, "does not fit"),
        ({"batch": (0, 2, 8)}, "does not fit"),
        ({"batch": (1, 2)}, "does not fit"),
        ({"batch": 4}, "does not fit"),
    ],
)
def test_odd_profiles(profile: Any, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        complete_profiles(build_signature(), profile)


@cache
def build_signature() -> Any:
    from fxcompress.engines.signature import IOSignature

    return IOSignature.of(program())


def test_profiles_of_the_command_line() -> None:
    assert parse_profile(["batch=1:8:32", "n=1:2:3"]) == {"batch": (1, 8, 32), "n": (1, 2, 3)}
    assert parse_profile([]) is None
    for text in ("batch", "batch=1:2", "batch=a:b:c", "=1:2:3"):
        with pytest.raises(UsageError, match="not understood"):
            parse_profile([text])


# ------------------------------------------------------------------------------------------------ memory, weights
def test_a_workspace_that_is_too_small() -> None:
    assert build(workspace="1GiB").plans[0].capability
    with pytest.raises(EngineError, match="a workspace of 16 bytes is too small") as caught:
        build(workspace=16)
    assert "larger" in caught.value.fix


@pytest.mark.parametrize(
    ("text", "size"), [("2GiB", 2 << 30), ("512 MB", 512_000_000), (77, 77), ("1.5kib", 1536), (None, None)]
)
def test_memory_size(text: str | int | None, size: int | None) -> None:
    assert memory_size(text) == size


@pytest.mark.parametrize("text", ["lots", "0", "-1", "2 parsecs", ""])
def test_no_memory_size(text: str) -> None:
    with pytest.raises(UsageError, match="no amount of memory"):
        memory_size(text)


def test_weights_can_be_left_out() -> None:
    """The library compiles the code that puts them back when it builds, which needs a driver; it says so without one."""
    whole = build(compute_capability="8.0")
    if torch.cuda.is_available():
        stripped = build(compute_capability="8.0", strip_weights=True)
        assert stripped.plans[0].stripped and stripped.file_size() < whole.file_size()
        return
    with pytest.raises(EngineError, match="without its weights cannot be built here") as caught:
        build(compute_capability="8.0", strip_weights=True)
    assert "CUDA driver" in caught.value.why and "strip_weights=False" in caught.value.fix


# ------------------------------------------------------------------------------------------------ what is refused
class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.bitwise_not(self.layer(x).to(torch.int32)).float()


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.odd = nn.Linear(4, 4), Odd()

    def forward(self, x: Tensor) -> Tensor:
        return self.odd(self.first(x))  # type: ignore[no-any-return]


def test_an_unsupported_operator_is_named_before_the_builder_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the module's path and the user's line."""
    from fxcompress.engines import tensorrt_builder

    monkeypatch.setattr(tensorrt_builder, "_configured", lambda *_: pytest.fail("the builder was started"))
    with pytest.raises(EngineError, match="TensorRT does not support BitwiseNot") as caught:
        target("tensorrt").build(capture(Around().eval(), (torch.randn(2, 4),)), **FAST)
    assert "BitwiseNot at odd (" in caught.value.where
    assert f"{Path(__file__).name}:" in caught.value.where and "onnxruntime" in caught.value.fix


def test_float64_is_refused() -> None:
    model, x = nn.Linear(4, 4).double().eval(), torch.randn(2, 4, dtype=torch.float64)
    with pytest.raises(EngineError, match="no float64") as caught:
        target("tensorrt").build(capture(model, (x,)), **FAST)
    assert ".float()" in caught.value.fix


def test_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n.startswith("tensorrt") else real(n, *a))
    with pytest.raises(MissingRuntimeError, match="is not installed") as caught:
        target("tensorrt").require()
    assert caught.value.fix == 'pip install "fxcompress[tensorrt]"'
    with pytest.raises(MissingRuntimeError, match="tensorrt is not installed") as caught:
        library("tensorrt")
    assert "not on PyPI" in caught.value.fix and "tensorrt-rtx" in caught.value.fix


def test_a_broken_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("libtensorrt_rtx.so.1: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(MissingRuntimeError, match="is installed, but cannot be loaded") as caught:
        library("tensorrt_rtx")
    assert "libtensorrt_rtx.so.1" in caught.value.why
    assert caught.value.fix == 'pip install --force-reinstall "fxcompress[tensorrt]"'


def test_a_stub_without_its_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta-package of the full TensorRT imports even where its libraries could not be installed."""
    monkeypatch.setattr(importlib, "import_module", lambda name: types.ModuleType(name))
    with pytest.raises(MissingRuntimeError, match="cannot be loaded"):
        library("tensorrt_rtx")


def test_an_unknown_library() -> None:
    with pytest.raises(UsageError, match="library='cudnn'"):
        library("cudnn")
