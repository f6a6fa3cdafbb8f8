"""Builds TensorRT engines from an ONNX file: parser, profiles, builder, serialized plan and its layer list.

One code path for ``tensorrt`` and ``tensorrt_rtx``. The latter needs no GPU to build.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fxcompress.engines.signature import IOSignature
from fxcompress.engines.tensorrt_layers import EngineLayer, LayerReport, parse_layers, report_layers
from fxcompress.engines.tensorrt_library import Library, Log, device_capability, library, system
from fxcompress.engines.tensorrt_profile import Profiles, from_json, shape_bounds
from fxcompress.errors import EngineError, UsageError

__all__ = ["BuildOptions", "Plan", "build_plan", "check_parser", "chosen_capabilities", "memory_size"]

#: What TensorRT-RTX builds for when it is not told: one engine for all devices from Ampere on.
PORTABLE = "8.0+"
_PORTABLE_DEVICES = ("8.0", "8.6", "8.9", "12.0", "12.1")
_UNITS = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


@dataclass(frozen=True)
class BuildOptions:
    """How to build.

    Attributes:
        capabilities: Compute capabilities, one plan each; None for the device at hand, without one a portable plan.
        profiles: Of `tensorrt_profile`.
        workspace: Largest scratch memory of a layer, bytes; None for the library's limit.
        strip_weights: Leave the weights out of the plan; they are taken from ``model.onnx`` when it is loaded.
        optimization_level: 0 to 5: how long the builder searches; None for its default.
        library: Import name; None for the first one that is installed and fits.
    """

    capabilities: tuple[str, ...] | None = None
    profiles: Profiles = field(default_factory=list)
    workspace: int | None = None
    strip_weights: bool = False
    optimization_level: int | None = None
    library: str | None = None


@dataclass(frozen=True)
class Plan:
    """A serialized engine and what it is for.

    Attributes:
        file: Name of its file.
        library: Import name of the library that built it.
        version: That library's version; no other runs it.
        capability: Compute capability it is for; ``8.0+`` for a portable one.
        system: Operating system and processor.
        profiles: Shapes it was built for.
        stripped: Its weights are in ``model.onnx`` alone.
        report: How it runs the quantized layers.
    """

    file: str
    library: str
    version: str
    capability: str
    system: str
    profiles: Profiles
    stripped: bool
    report: LayerReport

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        d = {k: getattr(self, k) for k in ("file", "library", "version", "capability", "system", "stripped")}
        return d | {"profiles": self.profiles, "report": self.report.to_dict()}

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Plan:
        """Inverse of ``to_dict``."""
        names = {k: str(d[k]) for k in ("file", "library", "version", "capability", "system")}
        return cls(
            **names,
            profiles=from_json(d["profiles"]),
            stripped=bool(d["stripped"]),
            report=LayerReport.from_dict(d["report"]),
        )

    @property
    def made_for(self) -> str:
        """Devices and versions in words."""
        name = "TensorRT-RTX" if self.library == "tensorrt_rtx" else "TensorRT"
        portable = self.capability == PORTABLE
        device = "compute capability 8.0 and later" if portable else f"compute capability {self.capability}"
        return f"{device}, {name} {self.version}, {self.system}"

    def refusal(self, capability: str | None, libraries: Mapping[str, str], here: str) -> str:
        """Why it does not run on a machine; empty when it does.

        Args:
            capability: Of the machine's device; None without one.
            libraries: Installed libraries and their versions.
            here: Operating system and processor of the machine.
        """
        problems = []
        if capability is None:
            problems.append("there is no CUDA device")
        elif not _fits(self.capability, capability):
            problems.append(f"the device has compute capability {capability}")
        if self.library not in libraries:
            problems.append(f"{self.library} is not installed")
        elif libraries[self.library] != self.version:
            problems.append(f"{self.library} is version {libraries[self.library]} here")
        if self.system != here:
            problems.append(f"this is {here}")
        return f"the engine {self.file} is for {self.made_for}; {', '.join(problems)}" if problems else ""


def _fits(wanted: str, got: str) -> bool:
    return got in _PORTABLE_DEVICES if wanted == PORTABLE else wanted == got


def memory_size(text: str | int | None) -> int | None:
    """Bytes of ``"2GiB"``, ``"512 MB"`` or a number.

    Raises:
        UsageError: another form, or no memory at all.
    """
    if text is None:
        return None
    plain = str(text).strip().lower()
    number = plain.rstrip("bkmgi ")
    unit = plain[len(number) :].strip()
    try:
        size = int(float(number) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise UsageError(
            607, f"workspace={text!r}: no amount of memory", fix="write 2GiB, 512MiB, or a number of bytes"
        )
    return size


def chosen_capabilities(given: str | Sequence[str] | None, made: Library) -> tuple[str, ...]:
    """The compute capabilities to build for, checked.

    Args:
        given: ``"8.0,8.9"`` or a list; None for the device at hand, without one a portable engine.
        made: The library.

    Raises:
        UsageError: the library does not build for one of them.
    """
    listed = given.split(",") if isinstance(given, str) else list(given or [])
    found = tuple(dict.fromkeys(str(c).strip() for c in listed))
    here = device_capability()
    if not found and made.builds_anywhere and here is None:
        return (PORTABLE,)
    if not found:
        found = (here,) if here is not None else ("",)
    for wanted in found:
        if wanted == PORTABLE and made.builds_anywhere:
            continue
        made.check_capability(wanted)
    return found


# ------------------------------------------------------------------------------------------------ parsing
@dataclass
class _Parsed:
    """A network with what keeps it alive."""

    made: Library
    log: Log
    builder: Any
    network: Any
    parser: Any


def _parse(made: Library, model: Path) -> _Parsed:
    trt, log = made.module, Log(made)
    builder = trt.Builder(log.logger)
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # the only way from TensorRT 11 on
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, log.logger)
    parser.parse_from_file(str(model))
    return _Parsed(made, log, builder, network, parser)


def check_parser(parsed: Any) -> list[tuple[str, str, str]]:
    """What the parser refuses: name of the ONNX node, its operator, and the reason."""
    found = []
    for index in range(parsed.num_errors):
        error = parsed.get_error(index)
        found.append((str(error.node_name()), str(error.node_operator()), str(error.desc())))
    return found


def _refused(found: Sequence[tuple[str, str, str]], where: Mapping[str, str]) -> EngineError:
    """One error for all nodes that the parser refuses, with the places in the user's model."""
    operators = list(dict.fromkeys(operator for _, operator, _ in found if operator))
    places = [f"{operator} at {where.get(name, name)}" for name, operator, _ in found]
    reasons = dict.fromkeys(reason.split("\n")[0][:200] for _, _, reason in found)
    return EngineError(
        606,
        f"TensorRT does not support {', '.join(operators) or 'this model'}",
        where="; ".join(dict.fromkeys(places)),
        why="; ".join(reasons),
        fix="replace the operation, or use target='onnxruntime'",
    )


# ------------------------------------------------------------------------------------------------ building
def build_plan(
    model: Path,
    signature: IOSignature,
    capability: str,
    options: BuildOptions,
    *,
    products: Mapping[str, Mapping[str, str]],
    adds: Mapping[str, str],
    where: Mapping[str, str] | None = None,
) -> tuple[Plan, list[EngineLayer]]:
    """Build the engine of one compute capability beside its ONNX file.

    Args:
        model: The ONNX file with explicit quantization.
        signature: Inputs and outputs.
        capability: What `chosen_capabilities` gave.
        options: How to build.
        products: Of `tensorrt_onnx.ExplicitModel`.
        adds: Of `tensorrt_onnx.ExplicitModel`.
        where: Name of an ONNX node -> module path and line in the user's model, for errors.

    Raises:
        EngineError: the parser does not know an operator, or the builder fails.
        MissingRuntimeError: the library is missing or broken.
    """
    made = library(options.library)
    parsed = _parse(made, model)
    problems = check_parser(parsed.parser)
    if problems:
        raise _refused(problems, where or {})
    config = _configured(parsed, signature, capability, options)
    serialized = parsed.builder.build_serialized_network(parsed.network, config)
    if serialized is None:
        raise _failed(parsed.log, options)
    layers = parse_layers(parsed.log.messages)
    report = report_layers(layers, products, adds)
    name = f"engine_sm{capability.replace('.', '')}.plan" if capability != PORTABLE else "engine.plan"
    (model.parent / name).write_bytes(memoryview(serialized))
    stripped = options.strip_weights
    plan = Plan(name, made.name, made.version, capability, system(), options.profiles, stripped, report)
    return plan, layers


def _configured(parsed: _Parsed, signature: IOSignature, capability: str, options: BuildOptions) -> Any:
    trt = parsed.made.module
    config = parsed.builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if parsed.made.builds_anywhere and capability != PORTABLE:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}"), 0)
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.strip_weights:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
    for profile in options.profiles:
        made = parsed.builder.create_optimization_profile()
        for name, shapes in shape_bounds(signature, profile).items():
            made.set_shape(name, *shapes)
        config.add_optimization_profile(made)
    return config


def _failed(log: Log, options: BuildOptions) -> EngineError:
    text = log.errors()
    if "workspace" in text.lower() and options.workspace is not None:
        fix = "give a larger workspace, or none: the library then takes what it needs"
        what = f"a workspace of {options.workspace} bytes is too small for this model"
        return EngineError(607, what, why=text[-400:], fix=fix)
    if options.strip_weights and device_capability() is None:
        why = "this version compiles the code that puts weights back at build time, and that needs a CUDA driver"
        fix = "build with strip_weights=False, or on a machine with a GPU"
        return EngineError(608, "an engine without its weights cannot be built here", why=why, fix=fix)
    return log.fail("cannot build this model")
