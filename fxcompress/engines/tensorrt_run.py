"""Running TensorRT engines on a GPU, and the ONNX file they were built from where there is none."""

from __future__ import annotations

import importlib.metadata
import queue
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxcompress.engines.onnxruntime import as_numpy, half_outputs, narrowed
from fxcompress.engines.signature import IOSignature
from fxcompress.engines.tensorrt_builder import Plan
from fxcompress.engines.tensorrt_library import LIBRARIES, Log, installed_libraries, library
from fxcompress.engines.tensorrt_profile import profile_of
from fxcompress.errors import EngineError, MissingRuntimeError

__all__ = ["Executable", "Reference", "library_versions", "open_plan"]

_DISTRIBUTIONS = {
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt_rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
}
_TYPES = {
    "FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "INT8": torch.int8, "INT32": torch.int32,
    "INT64": torch.int64, "BOOL": torch.bool, "UINT8": torch.uint8,
}  # fmt: skip


def library_versions() -> dict[str, str]:
    """Installed libraries and their versions; nothing is imported."""
    found = {}
    for name in LIBRARIES:
        if name in installed_libraries():
            versions = [v for d in _DISTRIBUTIONS[name] if (v := _version(d)) is not None]
            found[name] = versions[0] if versions else library(name).version
    return found


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


# ------------------------------------------------------------------------------------------------ on a GPU
def open_plan(folder: Path, plan: Plan, signature: IOSignature, model: str) -> Executable:
    """Deserialize an engine, and give it its weights when it was stored without them.

    Args:
        folder: Where its file lies.
        plan: The engine; it must fit the device and the installed library.
        signature: Inputs and outputs.
        model: Name of the ONNX file it was built from.

    Raises:
        EngineError: the library refuses it.
    """
    made = library(plan.library)
    trt, log = made.module, Log(made)
    runtime = trt.Runtime(log.logger)
    engine = runtime.deserialize_cuda_engine((folder / plan.file).read_bytes())
    if engine is None:
        why, fix = (
            log.errors() or f"it is for {plan.made_for}",
            "build it again: fxcompress build OUT --target tensorrt",
        )
        raise EngineError(610, "TensorRT cannot load the engine", where=plan.file, why=why, fix=fix)
    if plan.stripped:
        refitter = trt.Refitter(engine, log.logger)
        filled = trt.OnnxParserRefitter(refitter, log.logger).refit_from_file(str(folder / model))
        if not filled or not refitter.refit_cuda_engine():
            raise EngineError(611, "the weights cannot be put back into the engine", where=plan.file, why=log.errors())
    return Executable(trt, runtime, engine, log, plan, signature)


class Executable:
    """A deserialized engine. Each call takes an execution context of its own from a pool, so threads may share it."""

    def __init__(self, trt: Any, runtime: Any, engine: Any, log: Log, plan: Plan, signature: IOSignature) -> None:
        self._runtime, self._engine, self._log = runtime, engine, log  # the engine needs the other two alive
        self._plan, self._signature = plan, signature
        self._inputs = [s.name for s in signature.tensor_inputs()]
        self._outputs = [s.name for s in signature.tensor_outputs()]
        kinds = {getattr(trt.DataType, name): kind for name, kind in _TYPES.items() if hasattr(trt.DataType, name)}
        self._kinds = {name: kinds[engine.get_tensor_dtype(name)] for name in self._outputs}
        self._idle: dict[int, queue.SimpleQueue[Any]] = {}

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        index = profile_of(self._signature, self._plan.profiles, [x.shape for x in inputs])
        idle = self._idle.setdefault(index, queue.SimpleQueue())
        stream = torch.cuda.current_stream()
        try:
            context = idle.get_nowait()
        except queue.Empty:
            context = self._context(index, stream)
        try:
            return self._run(context, [x.cuda(non_blocking=True).contiguous() for x in inputs], stream)
        finally:
            idle.put(context)

    def _context(self, index: int, stream: torch.cuda.Stream) -> Any:
        context = self._engine.create_execution_context()
        if context is None:
            raise EngineError(612, "TensorRT cannot make an execution context", why=self._log.errors())
        if index:
            context.set_optimization_profile_async(index, stream.cuda_stream)
            stream.synchronize()
        return context

    def _run(self, context: Any, inputs: list[Tensor], stream: torch.cuda.Stream) -> list[Tensor]:
        for name, x in zip(self._inputs, inputs, strict=True):
            context.set_input_shape(name, tuple(x.shape))
            context.set_tensor_address(name, x.data_ptr())
        outputs = [
            self._output(context, name, inputs[0].device if inputs else torch.device("cuda")) for name in self._outputs
        ]
        if not context.execute_async_v3(stream.cuda_stream):
            raise EngineError(613, "TensorRT failed", why=self._log.errors())
        return outputs

    def _output(self, context: Any, name: str, device: torch.device) -> Tensor:
        shape = tuple(context.get_tensor_shape(name))
        if any(size < 0 for size in shape):
            fix = "return a tensor of fixed length from the model"
            raise EngineError(614, f"the shape of {name} depends on the data, not on the inputs' shapes", fix=fix)
        result = torch.empty(shape, dtype=self._kinds[name], device=device)
        address = result.data_ptr() if result.numel() else torch.empty(1, device=device).data_ptr()
        context.set_tensor_address(name, address)
        return result


# ------------------------------------------------------------------------------------------------ without one
class Reference:
    """The ONNX file of an engine in ONNX Runtime on the processor, node by node, 16-bit floats computed in float32.

    It says what the engine is to compute, not how fast.

    Args:
        file: The ONNX file.
        signature: Inputs and outputs of the engine.
        outputs: Names of the values to give back; None for the engine's outputs.
        threads: Of ONNX Runtime.
    """

    def __init__(self, file: Path, signature: IOSignature, outputs: Sequence[str] | None, threads: int) -> None:
        self._inputs = [s.name for s in signature.tensor_inputs()]
        own = [s.name for s in signature.tensor_outputs()]
        self._outputs = own if outputs is None else list(outputs)
        self._narrow = half_outputs(signature) if outputs is None else {}
        self._session = _session(file, [n for n in dict.fromkeys(self._outputs) if n not in own], threads)

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        feed = {name: as_numpy(x.cpu()) for name, x in zip(self._inputs, inputs, strict=True)}
        try:
            results = self._session.run(self._outputs, feed)
        except Exception as error:  # the runtime's errors have no common base class of their own
            raise EngineError(615, "ONNX Runtime failed on the engine's ONNX file", why=str(error)[:800]) from error
        return narrowed([torch.as_tensor(r) for r in results], self._narrow)


def _session(file: Path, more: Sequence[str], threads: int) -> Any:
    try:
        import onnxruntime as ort
    except ImportError as error:
        why = "there is no CUDA device, so the engine's ONNX file would have to run on the processor"
        fix = 'pip install "fxcompress[onnxruntime]"'
        raise MissingRuntimeError(602, "ONNX Runtime is not installed", why=why, fix=fix) from error
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    options.graph_optimization_level = (
        ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    )  # as written, no fused integer kernels
    try:
        return ort.InferenceSession(_widened(file, more), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # as above
        raise EngineError(616, "ONNX Runtime refuses the engine's ONNX file", why=str(error)[:800]) from error


def _widened(file: Path, more: Sequence[str]) -> bytes | str:
    """The model with float32 in place of 16-bit floats and ``more`` values as outputs; the file itself if it is that."""
    import onnx
    import onnx_ir as ir

    model = ir.load(file)
    graph = model.graph
    halves = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    values = [*graph.inputs, *graph.initializers.values(), *(v for n in graph for v in n.outputs)]
    if not more and not any(v.dtype in halves for v in values):
        return str(file)
    for value in values:
        if value.dtype in halves:
            value.type = ir.TensorType(ir.DataType.FLOAT)
            if value.const_value is not None:
                value.const_value = ir.Tensor(value.const_value.numpy().astype("float32"), name=value.name)
    for node in graph:
        for name, attribute in node.attributes.items():
            if name in ("to", "dtype", "output_dtype") and attribute.as_int() in [int(k) for k in halves]:
                node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
    known = {v.name: v for v in values}
    graph.outputs.extend(known[name] for name in more)
    ir.external_data.load_to_model(model)
    return bytes(ir.serde.serialize_model(model).SerializeToString()) if onnx else ""
