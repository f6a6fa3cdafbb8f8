"""The second way of lowering: torch's own ONNX exporter, for programs with an operator the table does not have.

It traces the program again and decomposes it, which takes seconds where the table takes milliseconds.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen

from fxcompress.errors import EngineError
from fxcompress.ir import Program, evaluating
from fxcompress.lowering.builder import DOMAIN, OPSET
from fxcompress.lowering.export_quantizers import exportable, translations
from fxcompress.lowering.names import input_names, output_names, size_names
from fxcompress.lowering.peephole import fold_padding

if TYPE_CHECKING:
    import onnx_ir as ir

    from fxcompress.lowering.portable import PortableModel

__all__ = ["export"]


def export(program: Program, reason: str) -> PortableModel:
    """Lower with ``torch.onnx.export``.

    Args:
        program: The program.
        reason: Why the table could not do it, for the notes and the error.

    Raises:
        EngineError: the exporter fails as well.
        MissingRuntimeError: onnxscript is not installed.
    """
    from fxcompress.lowering.portable import PortableModel, prune

    with evaluating(program.gm), torch.no_grad(), _quiet():
        exported = _flat_export(program, reason)
        model = _translate(exported, reason)
    _rename_inputs(program, model)
    portable = PortableModel(model, program, outputs=_rename_outputs(program, model))
    _rename_nodes(portable)
    portable.notes.append(f"lowered with torch's ONNX exporter: {reason}")
    fold_padding(portable)
    prune(portable)
    return portable


def _flat_export(program: Program, reason: str) -> Any:
    """The program once more through ``torch.export``, with its flat inputs as arguments."""
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(program.graph, {}))
    graph.set_codegen(CodeGen())
    flat = GraphModule(exportable(program.gm), graph)
    leaves = program.signature.flatten(*program.example)
    inputs, shapes = [], []
    for node, value in zip(program.placeholders(), leaves, strict=True):
        dims = _free_dims(node)
        inputs.append(_grown(value, dims))
        shapes.append(dict.fromkeys(dims, torch.export.Dim.AUTO) if isinstance(value, Tensor) else None)
    try:
        return torch.export.export(flat, tuple(inputs), dynamic_shapes=tuple(shapes), strict=False)
    except (RuntimeError, TypeError, ValueError) as error:
        raise _failed(error, reason) from error


def _free_dims(node: Node) -> list[int]:
    val = node.meta.get("val")
    return [i for i, s in enumerate(val.shape) if isinstance(s, torch.SymInt)] if isinstance(val, Tensor) else []


def _grown(value: Any, dims: list[int]) -> Any:
    """Sizes of 1 in free dimensions become 2: export would fix them."""
    for dim in dims:
        value = torch.cat([value, value], dim) if value.shape[dim] == 1 else value
    return value


def _translate(exported: Any, reason: str) -> ir.Model:
    table = translations()
    try:
        made = torch.onnx.export(
            exported, dynamo=True, opset_version=OPSET, custom_translation_table=table, verbose=False
        )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError, TypeError) as error:
        raise _failed(error, reason) from error
    assert made is not None
    model = made.model
    model.opset_imports[DOMAIN] = 1
    return model


def _failed(error: Exception, reason: str) -> EngineError:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return EngineError(
        1,
        "the program cannot be written as ONNX",
        where=reason,
        why=f"{type(error).__name__}: {lines[0][:300] if lines else ''}",
        fix="use target='torch', or replace the operation by one that ONNX has",
    )


def _rename_inputs(program: Program, model: ir.Model) -> None:
    sizes = size_names(program)
    tensors = [
        (n, p)
        for n, p in zip(input_names(program), program.placeholders(), strict=True)
        if isinstance(p.meta.get("val"), Tensor)
    ]
    import onnx_ir as ir

    for value, (name, node) in zip(model.graph.inputs, tensors, strict=True):
        value.name = name
        value.shape = ir.Shape([s if isinstance(s, int) else sizes.get(str(s), str(s)) for s in node.meta["val"].shape])


def _rename_outputs(program: Program, model: ir.Model) -> list[Any]:
    """Output values get the signature's names; outputs that are no tensors are constants."""
    results: list[Any] = []
    values = list(model.graph.outputs)
    model.graph.outputs.clear()
    import onnx_ir as ir

    for name, source in zip(output_names(program), program.outputs(), strict=True):
        if not isinstance(source, Node):
            results.append((source,))
            continue
        inner = values.pop(0)
        node = ir.node("Identity", [inner], name=name)
        out = node.outputs[0]
        out.name, out.type, out.shape = name, inner.type, inner.shape
        inner.name = f"{inner.name}_value" if inner.name == name else inner.name
        model.graph.append(node)
        model.graph.outputs.append(out)
        results.append(name)
    return results


def _rename_nodes(portable: PortableModel) -> None:
    """Module paths in front of node names; FakeQuantize nodes, and the taps on them, take the path alone."""
    used: dict[str, int] = {}
    for node in portable.model.graph:
        path = _path(node)
        name = path if node.domain == DOMAIN else f"{path}/{node.op_type}" if path else node.op_type
        used[name] = used.get(name, 0) + 1
        node.name = name if used[name] == 1 else f"{name}_{used[name] - 1}"
        node.metadata_props.clear()
        source = node.inputs[0] if node.domain == DOMAIN else None
        if source is not None and source.const_value is None:
            node.outputs[0].name = portable.taps[node.name] = node.name


def _path(node: ir.Node) -> str:
    """Path of the module that ran the node; a fake-quantizer's is that of its scale."""
    if node.domain == DOMAIN and len(node.inputs) > 1 and node.inputs[1] is not None:
        return str(node.inputs[1].name).removesuffix(".scale")
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
    parts = [p.strip().strip("'\"") for p in scopes.strip("[]").split(",")]
    return next((p for p in reversed(parts[:-1]) if p), "")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter talks on several channels; what matters is raised."""
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "torch.fx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
