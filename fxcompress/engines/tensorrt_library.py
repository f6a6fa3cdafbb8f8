"""TensorRT or TensorRT for RTX: which one is installed, what it is called, and which devices it builds for."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import sys
from dataclasses import dataclass
from typing import Any

import torch

from fxcompress.errors import EngineError, MissingRuntimeError, UsageError

__all__ = ["LIBRARIES", "PIP_LINES", "Library", "Log", "device_capability", "installed_libraries", "library", "system"]

#: Import names; the first that is installed and can build for the device is taken.
LIBRARIES = ("tensorrt", "tensorrt_rtx")
PIP_LINES = {
    "tensorrt": "pip install tensorrt-cu13, with NVIDIA's package index as --extra-index-url "
    "(its libraries are not on PyPI; where that index is out of reach, take tensorrt-rtx)",
    "tensorrt_rtx": 'pip install "fxcompress[tensorrt]"',
}


def installed_libraries() -> list[str]:
    """Import names of the libraries that are installed; nothing is imported."""
    return [name for name in LIBRARIES if importlib.util.find_spec(name) is not None]


def device_capability() -> str | None:
    """Compute capability of the CUDA device, e.g. ``"8.0"``; None without one."""
    return ".".join(map(str, torch.cuda.get_device_capability())) if torch.cuda.is_available() else None


def system() -> str:
    """Operating system and processor that an engine is for, e.g. ``linux x86_64``."""
    return f"{sys.platform} {platform.machine()}"


@dataclass(frozen=True)
class Library:
    """One of the two libraries; their Python interfaces are the same, but for the devices.

    Attributes:
        name: Import name.
        module: The imported module.
    """

    name: str
    module: Any

    @property
    def version(self) -> str:
        """E.g. ``1.7.1.116``; engines of one version are refused by every other."""
        return str(self.module.__version__)

    @property
    def title(self) -> str:
        """Name and version."""
        return f"{'TensorRT-RTX' if self.name == 'tensorrt_rtx' else 'TensorRT'} {self.version}"

    @property
    def builds_anywhere(self) -> bool:
        """True when it builds for a device that the machine does not have."""
        return hasattr(self.module, "ComputeCapability")

    def capabilities(self) -> list[str]:
        """Compute capabilities it can build for; those of the device at hand when it needs one."""
        if not self.builds_anywhere:
            here = device_capability()
            return [] if here is None else [here]
        names = [n.removeprefix("SM") for n in self.module.ComputeCapability.__members__ if n.startswith("SM")]
        return [f"{n[:-1]}.{n[-1]}" for n in names]

    def check_capability(self, wanted: str) -> None:
        """Raise UsageError unless it can build for a compute capability."""
        known = self.capabilities()
        if wanted in known:
            return
        if not self.builds_anywhere:
            here = device_capability()
            why = "there is none" if here is None else f"that one has {here}"
            fix = f"build on a machine whose device has {wanted}, or install tensorrt-rtx: {PIP_LINES['tensorrt_rtx']}"
            raise UsageError(600, f"{self.title} builds for the CUDA device of the machine alone", why=why, fix=fix)
        raise UsageError(
            601,
            f"{self.title} has no compute capability {wanted}",
            why=f"it has {', '.join(known)}",
            fix=f"for other devices install tensorrt on a machine that has one: {PIP_LINES['tensorrt']}",
        )


def library(name: str | None = None) -> Library:
    """Import one of the libraries.

    Args:
        name: ``tensorrt`` or ``tensorrt_rtx``; None for the first that is installed and can build here.

    Raises:
        UsageError: another name.
        MissingRuntimeError: it is not installed, or its shared libraries cannot be loaded.
    """
    if name is not None and name not in LIBRARIES:
        raise UsageError(602, f"library={name!r}: not known", fix=f"use {' or '.join(map(repr, LIBRARIES))}")
    found = installed_libraries()
    if name is None and len(found) > 1 and device_capability() is None:
        found = [n for n in found if n != "tensorrt"]  # which needs a device to build
    wanted = name or (found[0] if found else "tensorrt_rtx")
    if wanted not in found:
        raise MissingRuntimeError(600, f"{wanted} is not installed", fix=PIP_LINES[wanted])
    try:
        module = importlib.import_module(wanted)
        module.Builder  # noqa: B018  a stub without its libraries imports, too
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        what = f"{wanted} is installed, but cannot be loaded"
        raise MissingRuntimeError(601, what, why=str(error)[:400], fix=_again(PIP_LINES[wanted])) from error
    return Library(wanted, module)


def _again(line: str) -> str:
    return line.replace("pip install", "pip install --force-reinstall", 1)


class Log:
    """What the library said while it worked.

    Attributes:
        messages: Severity (``ERROR``, ``VERBOSE`` ...) and text, in order.
        logger: To give to the library.
    """

    def __init__(self, made: Library) -> None:
        self.messages: list[tuple[str, str]] = []
        collected = self.messages
        base: Any = made.module.ILogger

        class Collect(base):  # type: ignore[misc]  # a class of the library at hand
            def __init__(self) -> None:
                base.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                collected.append((str(severity).rpartition(".")[2], message))

        self.logger: Any = Collect()

    def errors(self) -> str:
        """The errors, shortened."""
        return "; ".join(m.split("\n")[0][:400] for s, m in self.messages if s in ("ERROR", "INTERNAL_ERROR"))[:1200]

    def fail(self, what: str) -> EngineError:
        """An error that says what the library complained about."""
        return EngineError(602, f"TensorRT {what}", why=self.errors() or "it gives no reason")
