"""triton: the program with its quantized and sparse layers as this library's own GPU kernels, the rest in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxcompress.engines.base import Engine, Runner, Scratch, Shapes, register, require
from fxcompress.engines.program_file import GRAPH, WEIGHTS, read_graph, write_graph
from fxcompress.engines.signature import IOSignature
from fxcompress.engines.torch import TorchEngine
from fxcompress.errors import UsageError
from fxcompress.ir import Program
from fxcompress.lowering import PortableModel
from fxcompress.lowering.builder import tap_names
from fxcompress.quant.scheme import QuantScheme
from fxcompress.quant.spec import QuantSpec

__all__ = ["TritonEngine", "TritonTarget"]

_NO_DEVICE = "no CUDA device: the reference implementations of the kernels run, in main memory and slowly"


class TritonEngine(TorchEngine):
    """A program whose layers are operators of ``torch.ops.fxcompress``.

    It runs on the CUDA device when there is one, whatever machine it was built on; elsewhere the operators' reference
    implementations run, and ``notes`` says so. Inputs are moved to the device, outputs stay there.

    Attributes:
        device: Where it runs.
    """

    name: ClassVar[str] = "triton"

    def __init__(self, *args: Any, **options: Any) -> None:
        from fxcompress.engines.triton_lowering import LAYOUTS

        for saved in options.get("details", {}).get("layouts", []):
            known = LAYOUTS.get(saved.get("name"))
            if known is None:
                raise UsageError(
                    405,
                    f"the packed weights have the unknown layout {saved.get('name')!r}",
                    fix="compile the model again",
                )
            known.check(saved)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._compiled: Callable[..., Any] | None = None
        super().__init__(*args, **options)
        if self.device.type == "cpu" and _NO_DEVICE not in self.notes:
            self.notes.append(_NO_DEVICE)
        if self.device.type == "cuda":
            self.notes = [note for note in self.notes if note != _NO_DEVICE]

    def _read(self) -> GraphModule:
        if self._graph is None:
            from fxcompress.ops import kernel_ops

            kernel_ops()  # registers the operators that the graph names
            self._graph = read_graph(self.folder, self.device)
            if self.device.type == "cuda":
                _prove(self._graph, self.device)
        return self._graph

    def _load(self, shapes: Shapes | None) -> Runner:
        mode = self.details.get("torch_compile")
        if not mode:
            return super()._load(shapes)
        if self._compiled is None:
            options = {} if mode is True else {"mode": mode}
            self._compiled = torch.compile(self._read(), fullgraph=True, dynamic=self._has_free_sizes, **options)
        compiled = cast(GraphModule, self._compiled)
        return lambda inputs: self._tensors(self._forward(compiled, inputs))

    def _arguments(self, inputs: list[Tensor]) -> list[Any]:
        return super()._arguments([x.to(self.device, non_blocking=True) for x in inputs])

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _prove(graph: GraphModule, device: torch.device) -> None:
    """Try the sparse kernels of a graph now: that must not happen while a CUDA graph is captured."""
    from fxcompress.kernels.sparse_common import F16, I8, W4
    from fxcompress.kernels.sparse_proof import proven

    halves = (torch.float16, torch.bfloat16)
    kinds = {"sp24_linear": (F16, halves), "sp24_w8a8_linear": (I8, (torch.int8,)), "sp24_w4_linear": (W4, halves)}
    used = {node.target for node in graph.graph.nodes}
    for name, (kind, dtypes) in kinds.items():
        if getattr(torch.ops.fxcompress, name).default not in used:
            continue
        for dtype in dtypes:
            proven(kind, dtype, device)


class TritonTarget:
    """Target ``triton``."""

    name = "triton"
    portable = False
    automatic = False

    def unmeasured(self) -> str | None:
        """Without a CUDA device the references run, whose latency tells nothing."""
        return None if torch.cuda.is_available() else f"{_NO_DEVICE}; speed was not measured"

    def available(self) -> str | None:
        """None, or the pip line: Triton is needed where a CUDA device is."""
        from importlib.util import find_spec

        missing = torch.cuda.is_available() and find_spec("triton") is None
        return 'pip install "fxcompress[triton]"' if missing else None

    def require(self) -> None:
        """Raise MissingRuntimeError when Triton is missing beside a CUDA device."""
        require(self)

    def scheme(self, flags: frozenset[str] | None = None) -> QuantScheme:
        """Linear layers and 2-D convolutions in signed 8 bits; values between them stay in floating point."""
        del flags
        return QuantScheme(
            activation=QuantSpec(8, signed=True, symmetric=False),
            layers=("conv", "linear"),
            joins=(),
            fused_activations=("relu", "relu6", "silu", "gelu", "sigmoid", "hardswish", "hardtanh"),
            reason="the integer kernels read int8 and write floating point",
        )

    def build(
        self, model: Program | PortableModel, *, threads: int | None = None, torch_compile: bool | str = False
    ) -> Engine:
        """Build an engine; see ``Target.build``.

        Args:
            model: The program.
            threads: Threads of what PyTorch runs on the processor.
            torch_compile: Compile the graph with ``torch.compile``; a text is its ``mode``, e.g. ``reduce-overhead``.
        """
        from fxcompress.engines.triton_fusion import fuse_quantization
        from fxcompress.engines.triton_lowering import LAYOUTS, lower_to_kernels

        self.require()
        program = model if isinstance(model, Program) else model.program
        lowered = program.clone()
        found = lower_to_kernels(lowered)
        fused = fuse_quantization(lowered)
        scratch = Scratch()
        try:
            write_graph(lowered, scratch.path)
            details = {
                "files": [GRAPH, WEIGHTS],
                "taps": _taps(program, lowered),
                "kernels": found.kernels,
                "fused": fused,
                "layouts": [LAYOUTS[name].to_dict() for name in sorted(found.layouts)],
                "torch_compile": torch_compile,
            }
            engine = TritonEngine(
                scratch.path,
                IOSignature.of(program),
                threads=threads,
                details=details,
                notes=found.notes,
                program=program,
            )
        except BaseException:
            scratch.remove()
            raise
        scratch.give_to(engine)
        return engine


def _taps(program: Program, lowered: Program) -> dict[str, str]:
    """Tap name in the simulation -> node of the lowered graph that yields the same value."""
    kept = {n.name for n in lowered.graph.nodes if n.op in ("call_module", "call_function")}
    return {
        tap: node.name
        for node, tap in tap_names(program).items()
        if node.name in kept and isinstance(node.meta.get("val"), Tensor)
    }


register(TritonTarget(), TritonEngine)
