"""torch: the simulated graph itself as an engine. The reference for the others, and what runs where no runtime is."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from fxcompress import ops
from fxcompress.engines.base import Engine, Runner, Scratch, Shapes, register
from fxcompress.engines.program_file import GRAPH, WEIGHTS, read_graph, write_graph
from fxcompress.engines.signature import IOSignature, TensorSpec
from fxcompress.errors import EngineError
from fxcompress.ir import Program
from fxcompress.lowering import PortableModel
from fxcompress.quant.scheme import QuantScheme

__all__ = ["TorchEngine", "TorchTarget"]


class TorchEngine(Engine):
    """The program's graph, run by PyTorch without gradients. torch's thread count belongs to the whole process."""

    name: ClassVar[str] = "torch"

    def __init__(self, *args: Any, **options: Any) -> None:
        assert ops.fake_quantize is not None  # its registration is what a quantized graph needs
        self._graph: GraphModule | None = None
        if options.get("threads") is None:
            options["threads"] = torch.get_num_threads()
        elif options["threads"] > 0:
            torch.set_num_threads(options["threads"])
        super().__init__(*args, **options)
        self._has_free_sizes = True

    def _load(self, shapes: Shapes | None) -> Runner:
        graph = self._read()
        return lambda inputs: self._tensors(self._forward(graph, inputs))

    def _load_tapped(self, names: tuple[str, ...]) -> Runner:
        graph = self._read()
        wanted = [self.details["taps"][n] for n in names]

        def run(inputs: list[Tensor]) -> list[Tensor]:
            recorder = _Recorder(graph, set(wanted))
            with torch.no_grad():
                recorder.run(*self._arguments(inputs))
            return [recorder.found[n] for n in wanted]

        return run

    def _read(self) -> GraphModule:
        if self._graph is None:
            self._graph = read_graph(self.folder)
        return self._graph

    def _forward(self, graph: GraphModule, inputs: list[Tensor]) -> tuple[Any, ...]:
        try:
            with torch.no_grad():
                return cast(tuple[Any, ...], graph(*self._arguments(inputs)))
        except (RuntimeError, IndexError, ValueError) as error:
            raise EngineError(32, "torch failed", why=str(error)[:800]) from error

    def _arguments(self, inputs: list[Tensor]) -> list[Any]:
        """All placeholders: the given tensors, and the constants of the captured call between them."""
        rest = iter(inputs)
        return [next(rest) if isinstance(s, TensorSpec) else s for s in self.signature.inputs]

    def _tensors(self, values: tuple[Any, ...]) -> list[Tensor]:
        return [v for v, s in zip(values, self.signature.outputs, strict=True) if isinstance(s, TensorSpec)]


class _Recorder(Interpreter):
    """Runs a graph and keeps the values of some nodes."""

    def __init__(self, graph: GraphModule, wanted: set[str]) -> None:
        super().__init__(graph)
        self.wanted = wanted
        self.found: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.name in self.wanted:
            self.found[n.name] = result
        return result


class TorchTarget:
    """Target ``torch``."""

    name = "torch"
    portable = False
    automatic = False

    def unmeasured(self) -> str | None:
        """It simulates."""
        return "the torch target simulates INT8 in float32: no speed is gained until it is lowered"

    def available(self) -> str | None:
        """Always installed."""
        return None

    def require(self) -> None:
        """Nothing to ask for."""

    def scheme(self, flags: frozenset[str] | None = None) -> QuantScheme:
        """Full 8-bit ranges: float arithmetic does not saturate."""
        del flags
        return QuantScheme()

    def build(self, model: Program | PortableModel, *, threads: int | None = None) -> Engine:
        """Build an engine; see ``Target.build``."""
        program = model if isinstance(model, Program) else model.program
        scratch = Scratch()
        try:
            taps = write_graph(program, scratch.path)
            details = {"files": [GRAPH, WEIGHTS], "taps": taps}
            engine = TorchEngine(
                scratch.path, IOSignature.of(program), threads=threads, details=details, program=program
            )
        except BaseException:
            scratch.remove()
            raise
        scratch.give_to(engine)
        return engine


register(TorchTarget(), TorchEngine)
