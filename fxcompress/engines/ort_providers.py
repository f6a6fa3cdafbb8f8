"""ONNX Runtime's execution providers: their names, which are installed, and what is said when one is not."""

from __future__ import annotations

from collections.abc import Sequence

from fxcompress.errors import UsageError

__all__ = ["CPU", "checked_providers", "fallback_notes", "on_tensorrt", "usable_providers"]

CPU = "CPUExecutionProvider"
_NAMES = {
    "cpu": CPU,
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "tensorrt_rtx": "NvTensorRTRTXExecutionProvider",
}
_PACKAGES = {
    "CUDAExecutionProvider": "onnxruntime-gpu",
    "TensorrtExecutionProvider": "onnxruntime-gpu and TensorRT",
    "NvTensorRTRTXExecutionProvider": "onnxruntime-ep-nv-tensorrt-rtx",
}


def checked_providers(given: Sequence[str] | None) -> list[str]:
    """ONNX Runtime's names of providers; empty when only the processor is meant.

    Raises:
        UsageError: a name that is not known, or a plain text.
    """
    if isinstance(given, str):
        raise UsageError(608, f"providers={given!r} is no list", fix=f"write providers=[{given!r}]")
    names = [_NAMES.get(name, name) for name in given or ()]
    unknown = [name for name in names if name not in _NAMES.values()]
    if unknown:
        raise UsageError(609, f"unknown execution provider {unknown[0]!r}", fix=f"use {', '.join(_NAMES)}")
    found = list(dict.fromkeys(names))
    return [] if found == [CPU] else found


def on_tensorrt(providers: Sequence[str]) -> bool:
    """True when the first provider is one of TensorRT's, which read explicit quantization."""
    return bool(providers) and "tensorrt" in providers[0].lower()


def usable_providers(wanted: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those of ``wanted`` that this build of ONNX Runtime has, and those that it lacks; the CPU's is in neither."""
    if not wanted:
        return [], []
    import onnxruntime as ort

    there = ort.get_available_providers()
    return [p for p in wanted if p in there and p != CPU], [p for p in wanted if p not in there]


def fallback_notes(wanted: Sequence[str], used: Sequence[str]) -> list[str]:
    """One line for every provider that was asked for and does not run.

    Args:
        wanted: What `checked_providers` gave.
        used: Providers of the session.
    """
    lacking = [p for p in wanted if p not in used]
    others = ", ".join(p for p in used if p in wanted or p == CPU)
    return [f"{name} is not used, {others} runs instead: {_reason(name, wanted)}" for name in lacking]


def _reason(name: str, wanted: Sequence[str]) -> str:
    if name in usable_providers(wanted)[1]:
        return f"this build of ONNX Runtime does not have it (pip install {_PACKAGES.get(name, name)})"
    return "ONNX Runtime could not start it (a driver or library is missing)"
