"""OpenVINO: quantized tensors as its own FakeQuantize, weights as int8 constants; an ``.xml`` and a ``.bin`` file."""

from __future__ import annotations

import importlib.util
import queue
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fxcompress.engines.base import (
    Engine,
    Runner,
    Scratch,
    Shapes,
    check_threads,
    full_range_weights,
    register,
    require,
)
from fxcompress.engines.onnxruntime import as_numpy, half_outputs, narrowed, renamed, write_onnx
from fxcompress.engines.openvino_packed import PackedProducts
from fxcompress.engines.quantized import Grid, Realizer
from fxcompress.engines.signature import IOSignature
from fxcompress.environment import has_vnni
from fxcompress.errors import EngineError
from fxcompress.ir import Program
from fxcompress.lowering import DOMAIN, HALF, PortableModel, lower, widened
from fxcompress.quant.scheme import QuantScheme
from fxcompress.quant.spec import QuantSpec

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["OpenVinoEngine", "OpenVinoTarget"]

MODEL = "model.xml"
WEIGHTS = "model.bin"
_DOMAIN = "org.openvinotoolkit"


class OpenVinoEngine(Engine):
    """A model compiled by OpenVINO for the CPU."""

    name: ClassVar[str] = "openvino"

    def _load(self, shapes: Shapes | None) -> Runner:
        model = read_model(self.folder / MODEL)
        if shapes is not None:
            self._fix_shapes(model, shapes)
        return _Requests(self._compile(model), self._order(model), narrow=half_outputs(self.signature))

    def _compile(self, model: Any) -> Any:
        return compile_model(model, self.threads, self.details.get("dynamic_block", 0))

    def worker_job(self, inputs: Sequence[Tensor]) -> dict[str, Any]:
        """The compiled model with the sizes of ``inputs``."""
        del inputs
        names = [s.name for s in self.signature.tensor_inputs()]
        options = compile_options(self.threads, self.details.get("dynamic_block", 0))
        return {"runtime": "openvino", "model": str(self.folder / MODEL), "names": names, "options": options}

    def _load_tapped(self, names: tuple[str, ...]) -> Runner:
        model = read_model(self.folder / MODEL)
        outputs = {op.get_friendly_name(): op for op in model.get_ordered_ops()}
        count = len(model.outputs)
        values = [self.details["taps"][n] for n in names]
        distinct = list(dict.fromkeys(values))
        for value in distinct:
            model.add_outputs([outputs[value].output(0)])
        runner = _Requests(self._compile(model), self._order(model), reused=False)
        return lambda inputs: _pick(runner(inputs), [count + distinct.index(v) for v in values])

    def _fix_shapes(self, model: Any, shapes: Shapes) -> None:
        names = [s.name for s in self.signature.tensor_inputs()]
        model.reshape({name: list(shape) for name, shape in zip(names, shapes, strict=True)})

    def _order(self, model: Any) -> list[int]:
        """Position of each of the signature's inputs among the model's parameters."""
        places = {name: i for i, port in enumerate(model.inputs) for name in port.names}
        return [places[s.name] for s in self.signature.tensor_inputs()]


def _pick(values: list[Tensor], indices: list[int]) -> list[Tensor]:
    return [values[i] for i in indices]


class _Requests:
    """Runs a compiled model on torch tensors; each thread takes an infer request of its own from a pool.

    Args:
        compiled: The model.
        order: Place of each input among the model's.
        reused: False: a request for each call, whose memory the results keep.
        narrow: Results to give back in other dtypes, by place.
    """

    def __init__(
        self,
        compiled: Any,
        order: list[int],
        *,
        reused: bool = True,
        narrow: dict[int, torch.dtype] | None = None,
    ) -> None:
        import openvino as ov

        self.compiled = compiled
        self._tensor = ov.Tensor
        self._order = order
        self._reused = reused
        self._narrow = narrow or {}
        self._outputs = range(len(compiled.outputs))
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        try:
            request = self._idle.get_nowait()
        except queue.Empty:
            request = _Request(self.compiled.create_infer_request(), [None] * len(inputs))
        try:
            # OpenVINO reads the arrays' memory and does not keep them alive: a copy made here must outlive the call.
            arrays = [as_numpy(x) for x in inputs]
            self._set(request, arrays, inputs)
            request.infer.infer()
            found = [request.infer.get_output_tensor(i).data for i in self._outputs]
            # The request's memory is written again by its next call.
            return narrowed([torch.from_numpy(x.copy() if self._reused else x) for x in found], self._narrow)
        except RuntimeError as error:
            raise EngineError(20, "OpenVINO failed", why=str(error)[:800]) from error
        finally:
            if self._reused:
                self._idle.put(request)

    def _set(self, request: _Request, arrays: list[Any], inputs: list[Tensor]) -> None:
        """Point the request at the arrays. It is left pointing at memory that comes again with the same shape."""
        for number, (array, x) in enumerate(zip(arrays, inputs, strict=True)):
            is_view = x.is_contiguous() and x.dtype not in HALF  # else the array is a copy
            seen = (x.data_ptr(), x.shape) if is_view else None
            if seen is None or request.seen[number] != seen:
                request.infer.set_input_tensor(self._order[number], self._tensor(array, shared_memory=True))
                request.seen[number] = seen


@dataclass
class _Request:
    """An infer request, and address and shape of the memory each of its inputs points at."""

    infer: Any
    seen: list[Any]


def read_model(path: Path) -> Any:
    """The model of an ``.xml`` file. Raises EngineError when OpenVINO cannot read it."""
    import openvino as ov

    try:
        return _core().read_model(str(path))
    except RuntimeError as error:
        raise EngineError(21, "OpenVINO cannot read the model", where=path.name, why=str(error)[:800]) from error
    finally:
        del ov


def compile_model(model: Any, threads: int, dynamic_block: int = 0) -> Any:
    """The model compiled for one synchronous call at a time, in float32 where it is not quantized."""
    try:
        return _core().compile_model(model, "CPU", compile_options(threads, dynamic_block))
    except RuntimeError as error:
        raise EngineError(22, "OpenVINO cannot compile the model", why=str(error)[:800]) from error


def compile_options(threads: int, dynamic_block: int = 0) -> dict[str, Any]:
    """One stream on ``threads`` threads; float32 also where the processor has faster 16-bit floats.

    Args:
        threads: Threads of one call.
        dynamic_block: Inputs of products with compressed weights are quantized in blocks of so many features; 0: they are
            not, which is not the plug-in's default.
    """
    return {
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": dynamic_block,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "NUM_STREAMS": 1,
    }


def _core() -> Any:
    import openvino as ov

    return ov.Core()


def fake_quantize(r: Realizer, node: ir.Node, grid: Grid) -> ir.Value:
    """OpenVINO's FakeQuantize: ``qmax - qmin + 1`` levels between two real limits."""
    x = node.inputs[0]
    assert x is not None
    if _would_not_round(node):
        x = _unchanged(r, node, x)
    low, high = grid.limits()
    if grid.axis >= 0:
        rank = len(x.shape) if x.shape is not None else grid.axis + 1
        shape = [-1 if i == grid.axis else 1 for i in range(rank)]
        low, high = low.reshape(shape), high.reshape(shape)
    ends = (r.constant(low), r.constant(high))
    levels = grid.qmax - grid.qmin + 1
    return r.emit(node, "FakeQuantize", x, *ends, *ends, name=str(node.name), domain=_DOMAIN, levels=levels)


def _would_not_round(node: ir.Node) -> bool:
    """True where the plug-in would only clip.

    When one kernel computes a convolution, a FakeQuantize, an add and the FakeQuantize behind it, the plug-in leaves out
    the rounding of the first one, if it comes right behind the convolution.
    """
    maker = node.inputs[0].producer() if node.inputs[0] is not None else None
    while maker is not None and maker.op_type in ("Relu", "Clip") and maker.inputs[0] is not None:
        maker = maker.inputs[0].producer()
    behind_convolution = maker is not None and maker.op_type == "Conv"
    return behind_convolution and any(use.node.op_type == "Add" for use in node.outputs[0].uses())


def _unchanged(r: Realizer, node: ir.Node, x: ir.Value) -> ir.Value:
    """``x`` behind an operator that changes nothing, that OpenVINO does not remove, and that joins the same kernel."""
    same = r.emit(node, "LeakyRelu", x, name=f"{node.name}/unchanged", alpha=1.0)
    same.shape, same.type = x.shape, x.type
    return same


def sink_quantizers(portable: PortableModel) -> PortableModel:
    """A copy with fake-quantizers behind the Transpose and Reshape nodes that alone read them.

    OpenVINO runs attention, the transposition of its result included, as one kernel; a fake-quantizer inside splits it
    (measured on MiniLM: 8 % of the latency).
    """
    new = portable.clone()
    quantizers = [n for n in new.model.graph if n.domain == DOMAIN and n.op_type == "FakeQuantize"]
    for node in [n for n in quantizers if n.attributes["axis"].as_int() < 0]:
        while (mover := _sole_mover(node)) is not None:
            _swap(new, node, mover)
    return new


def _sole_mover(node: ir.Node) -> ir.Node | None:
    """The Transpose or Reshape that is the only reader of a quantized activation."""
    source, result = node.inputs[0], node.outputs[0]
    if source is None or source.const_value is not None or result.is_graph_output() or len(result.uses()) != 1:
        return None
    use = next(iter(result.uses()))
    return use.node if use.node.op_type in ("Transpose", "Reshape") and use.idx == 0 else None


def _swap(portable: PortableModel, node: ir.Node, mover: ir.Node) -> None:
    """``mover(quantize(x))`` becomes ``quantize(mover(x))``; the value in between changes shape and is no tap any more."""
    source, old, moved = node.inputs[0], node.outputs[0], mover.outputs[0]
    mover.replace_input_with(0, source)
    moved.replace_all_uses_with(old)
    node.replace_input_with(0, moved)
    portable.taps = {tap: v for tap, v in portable.taps.items() if v not in (old.name, moved.name)}
    old.shape = moved.shape
    portable.model.graph.remove(node)
    portable.model.graph.insert_after(mover, node)


class OpenVinoTarget:
    """Target ``openvino``: the CPU plug-in."""

    name = "openvino"
    portable = True
    automatic = True

    def unmeasured(self) -> str | None:
        """Latencies mean what they say."""
        return None

    def available(self) -> str | None:
        """None, or the pip line."""
        found = all(importlib.util.find_spec(m) for m in ("openvino", "onnx", "onnx_ir"))
        return None if found else 'pip install "fxcompress[openvino]"'

    def require(self) -> None:
        """Raise MissingRuntimeError when the runtime is not installed."""
        require(self)

    def scheme(self, flags: frozenset[str] | None = None) -> QuantScheme:
        """uint8 activations and int8 weights per channel; 7-bit weights where 16-bit sums saturate."""
        exact = has_vnni(flags)
        low, high = (-127, 127) if exact else (-64, 63)
        return QuantScheme(
            weight=QuantSpec(8, signed=True, symmetric=True, axis=0, qmin=low, qmax=high),
            joins=("add", "cat", "avg_pool"),
            fused_residual=False,  # it does fuse, but only an add of two quantized values with fixed shapes
            dynamic_block=64,
            dynamic_block_packed=64,
            dynamic_uniform=True,
            reason="" if exact else "no VNNI: 7-bit weights keep 16-bit sums of OpenVINO's kernels from saturating",
        )

    def build(self, model: Program | PortableModel, *, threads: int | None = None) -> Engine:
        """Build an engine; see ``Target.build``."""
        require(self)
        portable = widened(model if isinstance(model, PortableModel) else lower(model))
        threads = check_threads(threads)
        packed = PackedProducts()
        ready = Realizer(sink_quantizers(portable), fake_quantize, packed=packed).run()
        scratch = Scratch()
        try:
            taps = write_openvino(ready, scratch.path)
            signature = renamed(IOSignature.of(portable.program), ready.outputs)
            details = {
                "files": [MODEL, WEIGHTS],
                "taps": taps,
                "full_range_weights": full_range_weights(portable.program),
                "dynamic_block": packed.block,
            }
            options: dict[str, Any] = {"threads": threads, "details": details, "notes": ready.notes}
            engine = OpenVinoEngine(scratch.path, signature, program=portable.program, **options)
        except BaseException:
            scratch.remove()
            raise
        scratch.give_to(engine)
        return engine


def write_openvino(ready: PortableModel, folder: Path) -> dict[str, str]:
    """Convert through an ONNX file in the same folder; returns tap name -> name of OpenVINO's operation."""
    import openvino as ov

    ready.model.opset_imports[_DOMAIN] = 1
    files = write_onnx(ready, folder, external_from=1 << 20)  # what is read from a file of its own is not copied
    model = read_model(folder / files[0])
    ov.save_model(model, str(folder / MODEL), compress_to_fp16=False)
    names = {op.get_friendly_name() for op in model.get_ordered_ops()}
    by_tensor = {
        n: op.get_friendly_name() for op in model.get_ordered_ops() for o in op.outputs() for n in o.get_names()
    }
    del model
    for name in files:
        (folder / name).unlink()
    found = {tap: value if value in names else by_tensor.get(value) for tap, value in ready.taps.items()}
    return {tap: name for tap, name in found.items() if name is not None}


register(OpenVinoTarget(), OpenVinoEngine)
