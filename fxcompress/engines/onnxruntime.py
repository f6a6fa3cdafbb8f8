"""ONNX Runtime: quantized tensors as QuantizeLinear/DequantizeLinear pairs, fused into integer kernels at load."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
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
from fxcompress.engines.ort_linear import gemm_form
from fxcompress.engines.ort_packed import packed_products
from fxcompress.engines.ort_providers import CPU, checked_providers, fallback_notes, on_tensorrt, usable_providers
from fxcompress.engines.ort_views import tidy
from fxcompress.engines.quantized import Grid, Realizer
from fxcompress.engines.signature import IOSignature
from fxcompress.environment import has_vnni
from fxcompress.errors import EngineError
from fxcompress.ir import Program
from fxcompress.lowering import HALF, PortableModel, lower, widened
from fxcompress.quant.scheme import QuantScheme
from fxcompress.quant.spec import QuantSpec

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["OnnxRuntimeEngine", "OnnxRuntimeTarget"]

MODEL = "model.onnx"
WEIGHTS = "model.onnx.data"
#: A protobuf file cannot hold 2 GB; above this many bytes the weights go into a file of their own.
EXTERNAL_FROM = 1_500_000_000


class OnnxRuntimeEngine(Engine):
    """A model in an ONNX Runtime session on the CPU."""

    name: ClassVar[str] = "onnxruntime"

    def _load(self, shapes: Shapes | None) -> Runner:
        sizes = {} if shapes is None else free_sizes(self.signature, shapes)
        providers = self.details.get("providers", [])
        session = open_session(str(self.folder / MODEL), self.threads, sizes, providers=usable_providers(providers)[0])
        for note in fallback_notes(providers, session.get_providers()):
            if note not in self.notes:
                self.notes.append(note)
                warnings.warn(note, UserWarning, stacklevel=2)
        return _Session(session, self.signature, [s.name for s in self.signature.tensor_outputs()], narrow=True)

    def worker_job(self, inputs: Sequence[Tensor]) -> dict[str, Any]:
        """The session with the sizes of ``inputs``."""
        if self.details.get("providers"):
            return super().worker_job(inputs)
        names = [s.name for s in self.signature.tensor_inputs()]
        sizes = free_sizes(self.signature, tuple(x.shape for x in inputs))
        return {"runtime": "onnxruntime", "model": str(self.folder / MODEL), "names": names, "sizes": sizes}

    def _load_tapped(self, names: tuple[str, ...]) -> Runner:
        import onnx

        model = onnx.load(str(self.folder / MODEL), load_external_data=False)
        known = {o.name for o in model.graph.output}
        values = [self.details["taps"][n] for n in names]
        model.graph.output.extend(onnx.ValueInfoProto(name=v) for v in dict.fromkeys(values) if v not in known)
        if (self.folder / WEIGHTS).exists():
            onnx.load_external_data_for_model(model, str(self.folder))
        session = open_session(model.SerializeToString(), self.threads, {})
        return _Session(session, self.signature, values)


class _Session:
    """Runs a session on torch tensors; ONNX Runtime sessions may be run from several threads at once.

    Args:
        session: The session.
        signature: Inputs and outputs of the engine.
        outputs: Names of the values to give back.
        narrow: They are the engine's outputs: give them back in the signature's 16-bit dtypes.
    """

    def __init__(self, session: Any, signature: IOSignature, outputs: list[str], *, narrow: bool = False) -> None:
        self._run = session.run
        self._inputs = [s.name for s in signature.tensor_inputs()]
        self._outputs = outputs
        self._narrow = half_outputs(signature) if narrow else {}
        self.session = session

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        feed = {name: as_numpy(x) for name, x in zip(self._inputs, inputs, strict=True)}
        try:
            results = self._run(self._outputs, feed)
        except Exception as error:  # the runtime's errors have no common base class of their own
            raise EngineError(10, "ONNX Runtime failed", why=str(error)[:800]) from error
        return narrowed(
            [torch.from_numpy(r) if isinstance(r, np.ndarray) else torch.tensor(r) for r in results], self._narrow
        )


def half_outputs(signature: IOSignature) -> dict[int, torch.dtype]:
    """Outputs that the engine gives in 16 bits and its file in float32."""
    return {i: s.torch_dtype for i, s in enumerate(signature.tensor_outputs()) if s.torch_dtype in HALF}


def narrowed(values: list[Tensor], dtypes: dict[int, torch.dtype]) -> list[Tensor]:
    """``values`` with those at some places in other dtypes."""
    return [v.to(dtypes[i]) if i in dtypes else v for i, v in enumerate(values)] if dtypes else values


def as_numpy(x: Tensor) -> Any:
    """A contiguous view (or copy) of a CPU tensor; 16-bit floats as float32, which is what the files read."""
    x = x.detach() if x.requires_grad else x
    x = x.float() if x.dtype in HALF else x
    return x.numpy() if x.is_contiguous() else x.contiguous().numpy()


def free_sizes(signature: IOSignature, shapes: Shapes) -> dict[str, int]:
    """Value of each free size that these input shapes fix."""
    pairs = zip(signature.tensor_inputs(), shapes, strict=True)
    return {n: size for spec, shape in pairs for n, size in zip(spec.shape, shape, strict=True) if isinstance(n, str)}


def open_session(
    model: str | bytes,
    threads: int,
    sizes: dict[str, int],
    optimized: str | None = None,
    providers: Sequence[str] = (),
) -> Any:
    """A session, on the CPU unless ``providers`` says otherwise.

    Args:
        model: File name or serialized model.
        threads: Threads of one call.
        sizes: Free sizes to fix.
        optimized: Where to write the graph ONNX Runtime really executes.
        providers: Execution providers in front of the CPU's, installed ones.

    Raises:
        EngineError: ONNX Runtime refuses the model.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = optimized
    for name, size in sizes.items():
        options.add_free_dimension_override_by_name(name, size)
    try:
        return ort.InferenceSession(model, options, providers=[*providers, CPU])
    except Exception as error:  # as above
        raise EngineError(11, "ONNX Runtime refuses the model", why=str(error)[:800]) from error


def quantize_dequantize(r: Realizer, node: ir.Node, grid: Grid) -> ir.Value:
    """QuantizeLinear and DequantizeLinear; a grid narrower than its container needs a Clip in front."""
    x = node.inputs[0]
    assert x is not None
    name = str(node.name)
    if not grid.fills_container:
        if grid.axis >= 0:
            raise EngineError(
                5, "a per-channel activation on a narrowed grid", where=name, fix="use the container's full range"
            )
        low, high = grid.limits()
        x = r.emit(node, "Clip", x, r.constant(low), r.constant(high), name=f"{name}/Clip")
    extra: dict[str, Any] = {"axis": grid.axis} if grid.axis >= 0 else {}
    scale, zero = r.constant(grid.scale), r.constant(grid.zero_point.to(grid.container))
    q = r.emit(node, "QuantizeLinear", x, scale, zero, name=f"{name}/QuantizeLinear", **extra)
    q.name = f"{name}/quantized"
    return r.emit(node, "DequantizeLinear", q, scale, zero, name=f"{name}/DequantizeLinear", **extra)


def write_onnx(portable: PortableModel, folder: Path, external_from: int = EXTERNAL_FROM) -> list[str]:
    """Write the model, its weights apart above ``external_from`` bytes; returns the file names, the model first."""
    import onnx_ir as ir

    size = sum(
        int(v.const_value.nbytes) for v in portable.model.graph.initializers.values() if v.const_value is not None
    )
    if size < external_from:
        ir.save(portable.model, folder / MODEL)
        return [MODEL]
    ir.save(portable.model, folder / MODEL, external_data=WEIGHTS)
    return [MODEL, WEIGHTS]


class OnnxRuntimeTarget:
    """Target ``onnxruntime``: the CPU execution provider, or others that ``build`` is given."""

    name = "onnxruntime"
    portable = True
    automatic = True

    def unmeasured(self) -> str | None:
        """Latencies mean what they say."""
        return None

    def available(self) -> str | None:
        """None, or the pip line."""
        found = all(importlib.util.find_spec(m) for m in ("onnxruntime", "onnx", "onnx_ir"))
        return None if found else 'pip install "fxcompress[onnxruntime]"'

    def require(self) -> None:
        """Raise MissingRuntimeError when the runtime is not installed."""
        require(self)

    def scheme(self, flags: frozenset[str] | None = None, *, providers: Sequence[str] | None = None) -> QuantScheme:
        """uint8 activations and int8 weights per channel; 7-bit weights where 16-bit sums saturate.

        Args:
            flags: Of the processor.
            providers: Of ``build``: with a TensorRT provider the scheme is that of the target ``tensorrt``.
        """
        if on_tensorrt(checked_providers(providers)):
            from fxcompress.engines.base import target

            return target("tensorrt").scheme(flags)
        exact = has_vnni(flags)
        low, high = (-127, 127) if exact else (-64, 63)
        return QuantScheme(
            weight=QuantSpec(8, signed=True, symmetric=True, axis=0, qmin=low, qmax=high),
            joins=("add", "cat", "avg_pool"),
            quantized_outputs=("conv",),
            fused_activations=("relu", "relu6", "hardtanh"),  # what a clipping QuantizeLinear can stand for
            fused_residual=False,
            integer_bias=True,
            requantize_cat=True,
            dynamic_block_packed=128,
            dynamic_lstm=True,
            reason="" if exact else "no VNNI: 7-bit weights keep 16-bit sums of ONNX Runtime's kernels from saturating",
        )

    def build(
        self,
        model: Program | PortableModel,
        *,
        threads: int | None = None,
        providers: Sequence[str] | None = None,
    ) -> Engine:
        """Build an engine; see ``Target.build``.

        Args:
            model: The program.
            threads: Threads of one call.
            providers: Execution providers in order of preference: ``tensorrt``, ``tensorrt_rtx``, ``cuda``, ``cpu``, or
                ONNX Runtime's names. Those that are missing are skipped with a note and a warning.
        """
        require(self)
        portable = model if isinstance(model, PortableModel) else lower(model)
        threads = check_threads(threads)
        wanted = checked_providers(providers)
        if on_tensorrt(wanted):
            from fxcompress.engines.tensorrt_onnx import explicit_quantization

            ready = explicit_quantization(widened(portable)).portable
        else:
            forms: dict[str, Any] = {"linear_form": gemm_form, "packed": packed_products, "tidy": tidy}
            ready = Realizer(widened(portable), quantize_dequantize, integer_bias=True, **forms).run()
        scratch = Scratch()
        try:
            files = write_onnx(ready, scratch.path)
            details = {"files": files, "taps": ready.taps, "full_range_weights": full_range_weights(portable.program)}
            details |= {"providers": wanted} if wanted else {}
            signature = IOSignature.of(portable.program)
            signature = renamed(signature, ready.outputs)
            engine = OnnxRuntimeEngine(
                scratch.path, signature, threads=threads, details=details, notes=ready.notes, program=portable.program
            )
        except BaseException:
            scratch.remove()
            raise
        scratch.give_to(engine)
        return engine


def renamed(signature: IOSignature, outputs: Sequence[Any]) -> IOSignature:
    """The signature with the output names the file really has, and constants where the model yields constants."""
    from dataclasses import replace

    new = [replace(s, name=o) if isinstance(o, str) else o[0] for s, o in zip(signature.outputs, outputs, strict=True)]
    return replace(signature, outputs=tuple(new))


register(OnnxRuntimeTarget(), OnnxRuntimeEngine)
