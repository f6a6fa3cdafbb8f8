"""What every test needs: skips by what the machine lacks, and torchvision on a CPU build of torch."""

import os
from importlib.util import find_spec

import pytest
import torch

import benchmarks.torchvision_cpu  # noqa: F401  lets torchvision, and timm with it, import beside a CPU build of torch

if not torch.cuda.is_available():  # kernels run in Triton's interpreter; read when triton is imported, hence here
    os.environ["TRITON_INTERPRET"] = "1"

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
    torch.set_num_threads(1)

_ONNX = ("onnx", "onnxscript")
# marker -> modules that must be installed, and whether a CUDA device is needed
_NEEDS: dict[str, tuple[tuple[str, ...], bool]] = {
    "onnxruntime": ((*_ONNX, "onnxruntime"), False),
    "openvino": ((*_ONNX, "openvino"), False),
    "tensorrt": ((*_ONNX, "onnxruntime", "tensorrt_rtx"), False),
    "tensorrt_gpu": (_ONNX, True),
    "triton": (("triton",), False),
    "cuda": ((), True),
}


def _missing(marker: str) -> str | None:
    """What this machine lacks for tests with ``marker``; None when it lacks nothing."""
    modules, cuda = _NEEDS[marker]
    absent = [name for name in modules if find_spec(name) is None]
    if cuda and not torch.cuda.is_available():
        absent.append("a CUDA device")
    return f"needs {', '.join(absent)}" if absent else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this machine cannot run."""
    reasons = {marker: _missing(marker) for marker in _NEEDS}
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
