"""TensorRT: explicit quantization as ONNX, built by TensorRT or TensorRT for RTX, run on NVIDIA GPUs."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from fxcompress.engines.base import Engine, Runner, Scratch, Shapes, check_threads, register, require
from fxcompress.engines.onnxruntime import renamed, write_onnx
from fxcompress.engines.signature import IOSignature
from fxcompress.engines.tensorrt_builder import (
    BuildOptions,
    Plan,
    build_plan,
    chosen_capabilities,
    memory_size,
)
from fxcompress.engines.tensorrt_layers import EngineLayer
from fxcompress.engines.tensorrt_library import PIP_LINES, device_capability, installed_libraries, library, system
from fxcompress.engines.tensorrt_onnx import ExplicitModel, explicit_quantization
from fxcompress.engines.tensorrt_profile import complete_profiles
from fxcompress.engines.tensorrt_run import Executable, Reference, library_versions, open_plan
from fxcompress.errors import EngineError
from fxcompress.ir import Program, node_path, source_line
from fxcompress.lowering import PortableModel, lower
from fxcompress.lowering.builder import tap_names
from fxcompress.quant.scheme import QuantScheme
from fxcompress.quant.spec import QuantSpec

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["TensorRtEngine", "TensorRtTarget", "build_plans"]

MODEL = "model.onnx"
_NO_DEVICE = (
    "no CUDA device: calls run the ONNX file that the engine was built from, on the processor in ONNX Runtime, "
    "not the engine itself"
)


class TensorRtEngine(Engine):
    """Serialized TensorRT engines, one per compute capability, and the ONNX file they were built from.

    On a machine with a CUDA device the plan that fits it runs; inputs are moved there, outputs stay there. Without one
    the ONNX file runs on the processor, and ``notes`` says so.

    Attributes:
        plans: The engines and what they are for.
        plan: The one that runs here; None without a CUDA device.
    """

    name: ClassVar[str] = "tensorrt"

    def __init__(self, folder: Path, signature: IOSignature, **options: Any) -> None:
        self.plans = [Plan.from_dict(d) for d in (options.get("details") or {}).get("plans", [])]
        self.plan = self._fitting()
        self._shared: Runner | None = None
        super().__init__(folder, signature, **options)
        self.notes = [note for note in self.notes if note != _NO_DEVICE]
        if self.plan is None:
            self.notes.append(_NO_DEVICE)

    def _fitting(self) -> Plan | None:
        """The plan for this machine's device; None without a device."""
        here = device_capability()
        return None if here is None else choose_plan(self.plans, here, library_versions(), system())

    def _load(self, shapes: Shapes | None) -> Runner:
        del shapes  # one executable takes all shapes of its profiles
        if self._shared is None:
            if self.plan is not None:
                self._shared = open_plan(self.folder, self.plan, self.signature, MODEL)
            else:
                self._shared = Reference(self.folder / MODEL, self.signature, None, self.threads)
        return self._shared

    def _load_tapped(self, names: tuple[str, ...]) -> Runner:
        """Inner points are those of the ONNX file: an engine with more outputs would be another engine."""
        values = [self.details["taps"][n] for n in names]
        return Reference(self.folder / MODEL, self.signature, values, self.threads)

    def release(self, *, taps_only: bool = False) -> None:
        """Drop the executables; see ``Engine.release``."""
        super().release(taps_only=taps_only)
        if not taps_only:
            self._shared = None

    def synchronize(self) -> None:
        """Wait for the device."""
        if isinstance(self._shared, Executable):
            torch.cuda.synchronize()

    def layers(self) -> dict[str, list[str]]:
        """The layer list of every plan, one line a layer: kind, types in and out, the ONNX nodes it runs."""
        found: dict[str, list[str]] = self.details["layers"]
        return found


def choose_plan(plans: Sequence[Plan], capability: str, libraries: Mapping[str, str], here: str) -> Plan:
    """The plan that runs on a device.

    Args:
        plans: What there is.
        capability: Compute capability of the device.
        libraries: Installed libraries and their versions.
        here: Operating system and processor.

    Raises:
        EngineError: none does; says what each is for.
    """
    refusals = [plan.refusal(capability, libraries, here) for plan in plans]
    fitting = [plan for plan, refusal in zip(plans, refusals, strict=True) if not refusal]
    if not fitting:
        raise EngineError(
            609,
            "no engine in this folder runs here",
            why=". ".join(refusals) or "it holds none",
            fix=f"fxcompress build OUT --target tensorrt --compute-capability {capability}",
        )
    return max(fitting, key=lambda p: p.capability == capability)


class TensorRtTarget:
    """Target ``tensorrt``: NVIDIA GPUs, through TensorRT or TensorRT for RTX."""

    name = "tensorrt"
    portable = True
    automatic = False

    def unmeasured(self) -> str | None:
        """Without a CUDA device ONNX Runtime stands in, whose latency tells nothing."""
        return None if torch.cuda.is_available() else f"{_NO_DEVICE}; speed was not measured"

    def available(self) -> str | None:
        """None, or the pip line."""
        onnx = all(importlib.util.find_spec(m) for m in ("onnx", "onnx_ir"))
        return None if onnx and installed_libraries() else PIP_LINES["tensorrt_rtx"]

    def require(self) -> None:
        """Raise MissingRuntimeError when no library is installed."""
        require(self)

    def scheme(self, flags: frozenset[str] | None = None) -> QuantScheme:
        """int8 around zero: activations with one scale, weights with one per output channel.

        A residual add runs in the kernel behind the convolution: only its other operand is quantized.
        """
        del flags
        return QuantScheme(
            activation=QuantSpec(8, signed=True, symmetric=True),
            layers=("conv", "linear"),  # the builder runs transposed convolutions in floating point
            joins=("add", "cat", "avg_pool"),
            requantize_cat=True,  # a kernel reads integers only from a quantizer right in front of it
            float_add_operand=True,
            reason="TensorRT's integer kernels want int8 with zero point 0",
        )

    def build(
        self,
        model: Program | PortableModel,
        *,
        threads: int | None = None,
        compute_capability: str | Sequence[str] | None = None,
        profile: Mapping[str, Sequence[int]] | Sequence[Mapping[str, Sequence[int]]] | None = None,
        workspace: str | int | None = None,
        strip_weights: bool = False,
        optimization_level: int | None = None,
        library_name: str | None = None,
    ) -> Engine:
        """Build an engine; see ``Target.build``.

        Args:
            model: The program.
            threads: Threads of ONNX Runtime where there is no GPU.
            compute_capability: ``"8.0"``, ``"8.0,8.9"`` or a list, one plan each. Default: that of the device at hand;
                without one a portable plan for all devices from 8.0 on (TensorRT-RTX only).
            profile: Free size -> smallest, usual and largest value; several profiles as a list. The batch has a default.
            workspace: Largest scratch memory of a layer: bytes, or ``"2GiB"``.
            strip_weights: Leave the weights out of the plans.
            optimization_level: 0 (builds fastest) to 5.
            library_name: ``tensorrt`` or ``tensorrt_rtx``; by default the one that fits.

        Raises:
            UsageError: an option does not fit, or the library does not build for a compute capability.
            EngineError: an operator TensorRT does not have, with its place in the model; a free size without a profile;
                a workspace too small.
            MissingRuntimeError: the library is missing or broken.
        """
        require(self)
        made = library(library_name)
        portable = model if isinstance(model, PortableModel) else lower(model)
        signature = IOSignature.of(portable.program)
        profiles, notes = complete_profiles(signature, profile)
        options = BuildOptions(
            capabilities=chosen_capabilities(compute_capability, made),
            profiles=profiles,
            workspace=memory_size(workspace),
            strip_weights=strip_weights,
            optimization_level=optimization_level,
            library=made.name,
        )
        explicit = explicit_quantization(portable)
        scratch = Scratch()
        try:
            engine = _build(explicit, signature, options, scratch.path, check_threads(threads), notes)
        except BaseException:
            scratch.remove()
            raise
        scratch.give_to(engine)
        return engine


def _build(
    explicit: ExplicitModel, signature: IOSignature, options: BuildOptions, folder: Path, threads: int, notes: list[str]
) -> TensorRtEngine:
    ready = explicit.portable
    files = write_onnx(ready, folder)
    signature = renamed(signature, ready.outputs)
    details: dict[str, Any] = {"files": files, "taps": ready.taps, "products": explicit.products, "adds": explicit.adds}
    more = build_plans(folder, signature, details, options, where=_places(ready))
    return TensorRtEngine(
        folder, signature, threads=threads, details=details, notes=ready.notes + notes + more, program=ready.program
    )


def build_plans(
    folder: Path,
    signature: IOSignature,
    details: dict[str, Any],
    options: BuildOptions,
    *,
    where: Mapping[str, str] | None = None,
) -> list[str]:
    """Build the plans of some compute capabilities beside the ONNX file in ``folder``.

    Args:
        folder: Holds ``model.onnx``.
        signature: Inputs and outputs.
        details: Of the engine; plans, their files and layer lists are added, those of the same capability replaced.
        options: How to build.
        where: Name of an ONNX node -> place in the user's model.

    Returns:
        Notes: what does not run on integers.
    """
    notes = []
    made = library(options.library)
    for capability in options.capabilities or chosen_capabilities(None, made):
        asked = {"products": details["products"], "adds": details["adds"], "where": where}
        plan, layers = build_plan(folder / MODEL, signature, capability, options, **asked)
        kept = [p for p in details.get("plans", []) if p["file"] != plan.file]
        details["plans"] = [*kept, plan.to_dict()]
        details["files"] = [*(f for f in details["files"] if f != plan.file), plan.file]
        details.setdefault("layers", {})[plan.capability] = [str(la) for la in layers]
        notes += _complaints(plan, layers)
    return notes


def _complaints(plan: Plan, layers: list[EngineLayer]) -> list[str]:
    del layers
    floats = plan.report.floats()
    if not floats:
        return []
    more = f" and {len(floats) - 5} more" if len(floats) > 5 else ""
    return [f"the engine for {plan.capability} runs in floating point: {', '.join(floats[:5])}{more}"]


def _places(ready: PortableModel) -> dict[str, str]:
    """Name of each ONNX node -> module path and line of the user's that it comes from."""
    program = ready.program
    nodes = {tap: node for node, tap in tap_names(program).items()}
    texts: dict[str, str] = {}
    for tap, value in ready.taps.items():
        if tap in nodes:
            line = source_line(nodes[tap])
            path = (
                str(nodes[tap].target) if nodes[tap].op == "call_module" else node_path(nodes[tap]) or nodes[tap].name
            )
            texts[value] = f"{path} ({line})" if line else path
    found: dict[str, str] = {}
    for node in reversed(list(ready.model.graph)):  # what has no place of its own belongs to its first reader's
        found[str(node.name)] = _place(node, texts, found)
    return {name: place for name, place in found.items() if place}


def _place(node: ir.Node, texts: Mapping[str, str], found: Mapping[str, str]) -> str:
    own = next((texts[str(v.name)] for v in node.outputs if str(v.name) in texts), "")
    readers = [found.get(str(u.node.name), "") for v in node.outputs for u in v.uses()]
    return own or next((place for place in readers if place), "")


register(TensorRtTarget(), TensorRtEngine)
