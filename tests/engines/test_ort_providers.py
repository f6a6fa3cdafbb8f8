"""ONNX Runtime's GPU providers: asked for, checked, and the fall-back to the processor said aloud."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import fxcompress as fxc
from fxcompress.artifact import load
from fxcompress.engines import target
from fxcompress.engines.base import scheme_for
from fxcompress.engines.ort_providers import CPU, checked_providers, fallback_notes, on_tensorrt
from fxcompress.errors import UsageError
from tests.helpers.quick import cnn, images, plain

pytestmark = pytest.mark.onnxruntime

CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"


def absent(provider: str) -> bool:
    import onnxruntime as ort

    return provider not in ort.get_available_providers()


def test_names() -> None:
    assert checked_providers(["tensorrt", "cuda", "cpu", CUDA]) == [TENSORRT, CUDA, CPU]
    assert checked_providers(None) == checked_providers([]) == checked_providers(["cpu"]) == []
    assert on_tensorrt(checked_providers(["tensorrt_rtx"])) and not on_tensorrt([CUDA, TENSORRT])


@pytest.mark.parametrize(("given", "what"), [(["rocm"], "unknown execution provider 'rocm'"), ("cuda", "is no list")])
def test_odd_names(given: Any, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        target("onnxruntime").build(plain(), providers=given)


def test_notes_say_what_runs_instead() -> None:
    assert fallback_notes([TENSORRT, CUDA], [TENSORRT, CUDA, CPU]) == []
    note = fallback_notes([TENSORRT, CUDA], [CUDA, CPU])[0]
    assert note.startswith(f"{TENSORRT} is not used, {CUDA}, {CPU} runs instead: ")


@pytest.mark.skipif(not absent(CUDA), reason="this build has the provider")
def test_falling_back_is_said_aloud(tmp_path: Path) -> None:
    """In a warning, in the notes, and again when the saved engine is loaded."""
    with pytest.warns(UserWarning, match=r"CUDAExecutionProvider is not used.*pip install onnxruntime-gpu"):
        engine = target("onnxruntime").build(plain(), providers=["cuda"], threads=1)
    assert sum("CUDAExecutionProvider" in note for note in engine.notes) == 1
    x = images(2)
    with torch.no_grad():
        torch.testing.assert_close(engine(x), cnn()(x), rtol=1e-4, atol=1e-5)
    saved = engine.save(tmp_path / "out")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = load(saved, threads=1)
    assert again.details["providers"] == [CUDA]
    assert caught or any("CUDAExecutionProvider" in note for note in again.notes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        target("onnxruntime").build(plain(), providers=["cpu"], threads=1)


def test_tensorrt_providers_get_explicit_quantization() -> None:
    """The scheme and the file are those of the target tensorrt: int8 around zero."""
    import onnx

    own = target("onnxruntime")
    assert scheme_for(own, {"providers": ["tensorrt", "cuda"]}) == target("tensorrt").scheme()
    assert scheme_for(own, {"providers": ["cuda"]}) == scheme_for(own, {"other": 1}) == own.scheme()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"providers": ["tensorrt", "cuda"]}
        engine = fxc.compile(
            cnn(), (images(2),), target="onnxruntime", calibration=[images(8, 1)], engine_options=options, measure=False
        )
    assert engine.report.precision == "int8" and engine.report.parity["error"] < 1e-2
    model = onnx.load(str(engine.files()[0]))
    kinds = {i.name: i.data_type for i in model.graph.initializer}
    quantizers = [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
    assert quantizers and all(kinds[n.input[2]] == onnx.TensorProto.INT8 for n in quantizers)
