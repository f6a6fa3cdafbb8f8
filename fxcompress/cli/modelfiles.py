"""What ``fxcompress benchmark`` is given: saved folders and ``.onnx`` or ``.xml`` files, as engines."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxcompress.engines.base import Engine, Scratch, require, target
from fxcompress.engines.onnxruntime import OnnxRuntimeEngine, open_session
from fxcompress.engines.openvino import OpenVinoEngine, read_model
from fxcompress.engines.signature import IOSignature, TensorSpec
from fxcompress.engines.structure import Leaf, describe
from fxcompress.errors import UsageError
from fxcompress.modelspec import parse_shape

__all__ = ["backends_of", "inputs_of", "open_engine"]

_ONNX_TYPES = {
    "tensor(float)": "float32", "tensor(double)": "float64", "tensor(float16)": "float16", "tensor(int64)": "int64",
    "tensor(int32)": "int32", "tensor(int8)": "int8", "tensor(uint8)": "uint8", "tensor(bool)": "bool",
}  # fmt: skip
_OPENVINO_TYPES = {
    "f32": "float32", "f64": "float64", "f16": "float16", "i64": "int64", "i32": "int32", "i8": "int8", "u8": "uint8",
    "boolean": "bool",
}  # fmt: skip


def backends_of(path: Path) -> tuple[str, ...]:
    """The runtimes that can run what lies at ``path``, its own first.

    Raises:
        UsageError: it is neither a saved folder nor a model file.
    """
    if path.is_dir() and (path / "manifest.json").is_file():
        own = str(json.loads((path / "manifest.json").read_text()).get("engine", ""))
        return (own, "openvino") if own == "onnxruntime" else (own,)
    if path.suffix == ".onnx" and path.is_file():
        return ("onnxruntime", "openvino")
    if path.suffix == ".xml" and path.is_file():
        return ("openvino",)
    what = f"{path} is no saved folder and no .onnx or .xml file" if path.exists() else f"there is no {path}"
    raise UsageError(90, what, fix="give folders written by fxcompress, .onnx or .xml files")


def open_engine(path: Path, backend: str, threads: int | None, shapes: Sequence[str], batch: int) -> Engine:
    """The engine of one row.

    Args:
        path: A saved folder or a model file.
        backend: One of `backends_of`.
        threads: Of the runtime; None for its default.
        shapes: Input shapes for free sizes of model files.
        batch: Size of a free leading dimension of model files.

    Raises:
        ArtifactError: the folder is damaged.
        EngineError: the runtime refuses the model or is not installed.
    """
    if path.is_dir() and backends_of(path)[0] == backend:
        from fxcompress.artifact import load

        return load(path, threads=threads)
    require(target(backend))
    file = path / "model.onnx" if path.is_dir() else path
    scratch = Scratch()
    try:
        make = _ONNX_FILE if backend == "onnxruntime" else _OPENVINO_FILE
        engine = make(file, scratch.path, threads, shapes, batch)
    except BaseException:
        scratch.remove()
        raise
    scratch.give_to(engine)
    return engine


def inputs_of(engine: Engine, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Random inputs in the shape of the engine's example, its free leading size set to ``batch``."""
    generator = torch.Generator().manual_seed(0)
    first = engine.signature.tensor_inputs()[:1]
    free = first[0].shape[0] if first and first[0].shape else None
    leaves = [_random(s, free, batch, generator) if isinstance(s, TensorSpec) else s for s in engine.signature.inputs]
    args, kwargs = engine.signature.in_tree.build(leaves)
    return tuple(args), dict(kwargs)


def _random(spec: TensorSpec, free: int | str | None, batch: int, generator: torch.Generator) -> Tensor:
    named = isinstance(free, str)
    shape = [batch if named and want == free else got for want, got in zip(spec.shape, spec.example, strict=True)]
    dtype = spec.torch_dtype
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 2, shape, generator=generator).to(dtype)


def _onnx_file(file: Path, folder: Path, threads: int | None, shapes: Sequence[str], batch: int) -> Engine:
    """ONNX Runtime on a copy of the file, with the weight files that lie beside it."""
    for source in [file, *_external(file)]:
        shutil.copyfile(source, folder / ("model.onnx" if source == file else source.name))
    session = open_session(str(folder / "model.onnx"), threads or 1, {})
    inputs = [(v.name, _ONNX_TYPES.get(v.type, v.type), v.shape) for v in session.get_inputs()]
    outputs = [(v.name, _ONNX_TYPES.get(v.type, v.type), v.shape) for v in session.get_outputs()]
    signature = _signature(inputs, outputs, shapes, batch)
    return OnnxRuntimeEngine(folder, signature, threads=threads, details=_details(folder))


def _openvino_file(file: Path, folder: Path, threads: int | None, shapes: Sequence[str], batch: int) -> Engine:
    """OpenVINO on an ``.xml`` or ``.onnx`` file, written again as ``model.xml``."""
    import openvino as ov

    model = read_model(file)
    for port in (*model.inputs, *model.outputs):
        if not port.names:
            port.tensor.set_names({port.node.get_friendly_name()})
    ov.save_model(model, str(folder / "model.xml"), compress_to_fp16=False)
    inputs, outputs = ([_openvino_port(p) for p in ports] for ports in (model.inputs, model.outputs))
    signature = _signature(inputs, outputs, shapes, batch)
    return OpenVinoEngine(folder, signature, threads=threads, details=_details(folder))


Maker = Callable[[Path, Path, int | None, Sequence[str], int], Engine]
_ONNX_FILE: Maker = _onnx_file
_OPENVINO_FILE: Maker = _openvino_file


def _external(file: Path) -> list[Path]:
    """Weight files that an ONNX file names."""
    import onnx
    from onnx.external_data_helper import uses_external_data

    tensors = onnx.load(str(file), load_external_data=False).graph.initializer
    names = {e.value for t in tensors if uses_external_data(t) for e in t.external_data if e.key == "location"}
    return [file.parent / Path(name).name for name in sorted(names)]


def _openvino_port(port: Any) -> tuple[str, str, list[Any]]:
    shape = [d.get_length() if d.is_static else None for d in port.partial_shape]
    kind = port.element_type.get_type_name()
    return sorted(port.names)[0], _OPENVINO_TYPES.get(kind, kind), shape


def _details(folder: Path) -> dict[str, Any]:
    return {"files": sorted(p.name for p in folder.iterdir()), "taps": {}}


def _signature(
    inputs: Sequence[tuple[str, str, Sequence[Any]]],
    outputs: Sequence[tuple[str, str, Sequence[Any]]],
    shapes: Sequence[str],
    batch: int,
) -> IOSignature:
    """A signature with one positional argument per input and a tuple of outputs."""
    specs = []
    for place, (name, dtype, shape) in enumerate(inputs):
        spec = TensorSpec(name, dtype, tuple(_named(name, i, size) for i, size in enumerate(shape)))
        wanted = _given(spec, shapes[place]) if place < len(shapes) else _example(spec, batch)
        specs.append(dataclasses.replace(spec, example=wanted))
    results = tuple(TensorSpec(n, t, tuple(_named(n, i, size) for i, size in enumerate(s))) for n, t, s in outputs)
    in_tree = describe((tuple(Leaf(i) for i in range(len(specs))), {}))
    out_tree = describe(tuple(Leaf(i) for i in range(len(results))))
    names = tuple(s.name for s in specs)
    return IOSignature(names, len(names), tuple(specs), in_tree, results, out_tree)


def _named(name: str, axis: int, size: Any) -> int | str:
    """A size, or a name for a free one."""
    if isinstance(size, int) and size >= 0:
        return size
    return size if isinstance(size, str) and size else ("batch" if axis == 0 else f"{name}_dim{axis}")


def _given(spec: TensorSpec, text: str) -> tuple[int, ...]:
    """A shape from ``--input-shape``, if the input can take it."""
    shape = tuple(parse_shape(text).shape)
    fits = len(shape) == len(spec.shape) and all(
        isinstance(want, str) or want == got for want, got in zip(spec.shape, shape, strict=True)
    )
    if not fits:
        raise UsageError(93, f"--input-shape {text} does not fit input {spec.name}", why=f"it takes {spec}")
    return shape


def _example(spec: TensorSpec, batch: int) -> tuple[int, ...]:
    """The shape to time: free leading sizes are the batch, others have to be given."""
    free = [s for s in spec.shape[1:] if isinstance(s, str)]
    if free:
        raise UsageError(91, f"input {spec.name} has free sizes: {spec}", fix="give --input-shape, once per input")
    return tuple(batch if isinstance(s, str) else s for s in spec.shape)
