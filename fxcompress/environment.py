"""What is installed here: versions, processor, GPU, and the pip line for what is missing."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import platform
from functools import lru_cache
from pathlib import Path
from typing import Any

__all__ = ["EXTRAS", "cpu_flags", "describe", "has_vnni", "installed", "missing", "physical_cores", "pip_line"]

#: Packages each extra needs, by import name.
EXTRAS: dict[str, tuple[str, ...]] = {
    "onnxruntime": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "tensorrt": ("onnx", "onnxscript", "onnxruntime", "tensorrt_rtx"),
}
_REPORTED = (
    "torch",
    "numpy",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "timm",
    "torchvision",
    "transformers",
)
_FLAGS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx_vnni",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "i8mm",
    "sve",
)


def installed(package: str) -> bool:
    """True when ``package`` can be imported; it is not imported."""
    return importlib.util.find_spec(package) is not None


def pip_line(extra: str) -> str:
    """The command that installs an extra."""
    return f'pip install "fxcompress[{extra}]"'


def missing(extra: str) -> list[str]:
    """Packages of an extra (a key of ``EXTRAS``) that are not installed."""
    return [p for p in EXTRAS[extra] if not installed(p)]


@lru_cache(maxsize=1)
def _cpu_info() -> dict[str, str]:
    """First processor of ``/proc/cpuinfo``; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    return parse_cpu_info(path.read_text()) if path.exists() else {}


def parse_cpu_info(text: str) -> dict[str, str]:
    """Fields of the first processor in the text of ``/proc/cpuinfo``."""
    pairs = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def cpu_flags() -> frozenset[str]:
    """Instruction sets that matter for INT8 (names as in Linux's cpuinfo) of the processor engines are made for.

    That is this one, unless ``FXCOMPRESS_CPU_FLAGS`` names those of another, separated by spaces or commas.
    """
    other = os.environ.get("FXCOMPRESS_CPU_FLAGS")
    if other is not None:
        return frozenset(other.replace(",", " ").split())
    info = _cpu_info()
    return frozenset((info.get("flags") or info.get("Features") or "").split()) & frozenset(_FLAGS)


def channel_multiple() -> int:
    """Channels that float32 kernels of the processor (`cpu_flags`) handle at once: 16 with AVX-512, 8 with AVX2, else 4.

    Blocked layouts pad up to a multiple of it, so channels in between cost as much as the next multiple.
    """
    flags = cpu_flags()
    return 16 if "avx512f" in flags else 8 if "avx2" in flags else 4


def has_vnni(flags: frozenset[str] | None = None) -> bool:
    """True when 8-bit products are summed in 32 bits by the processor (VNNI, AMX, ARM dot product).

    Without it, x86 kernels use ``vpmaddubsw``, which adds pairs of u8 x s8 products in 16 bits and saturates for
    full-range weights.

    Args:
        flags: Of the processor; by default `cpu_flags`.
    """
    known = cpu_flags() if flags is None else flags
    return bool(known & {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"})


def physical_cores() -> int:
    """Processors this process may use, hyper-threads counted once where the system tells."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    info = _cpu_info()
    siblings, cores = int(info.get("siblings", 1)), int(info.get("cpu cores", 1))
    return max(1, usable * cores // siblings) if siblings > cores > 0 else usable


def peak_memory() -> int:
    """Largest resident memory of this process so far, bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) * (1 if platform.system() == "Darwin" else 1024)


def trim_memory() -> None:
    """Give the memory that was freed back to the system: glibc keeps it, and the peak of a process grows by it."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def package_version(package: str) -> str | None:
    """Version of an installed distribution; None when it is not installed (fxcompress run from a checkout, too)."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> list[str]:
    import torch

    return (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )


def describe() -> dict[str, Any]:
    """Versions, processor and GPU as plain JSON-ready data.

    ``packages`` maps a package to its version or None; ``missing`` maps each engine that cannot run here to the pip
    line that installs it; ``memory`` is the machine's, in bytes.
    """
    return {
        "fxcompress": package_version("fxcompress"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _cpu_info().get("model name") or platform.processor() or platform.machine(),
        "cpu_flags": sorted(cpu_flags()),
        "cores": physical_cores(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": _gpus(),
        "packages": {name: package_version(name) for name in _REPORTED},
        "missing": {extra: pip_line(extra) for extra in EXTRAS if missing(extra)},
    }
