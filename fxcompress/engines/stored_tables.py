"""Quantized weights that no product reads: embedding tables, and the matrices of LSTM and GRU layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

from fxcompress.engines.packed import container_bits, stored
from fxcompress.errors import EngineError
from fxcompress.lowering import DOMAIN
from fxcompress.lowering.recurrent import DYNAMIC

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor

    from fxcompress.engines.quantized import Grid, Realizer

__all__ = ["integer_lstms", "write_tables"]

_RECURRENT = ("LSTM", "GRU")


def write_tables(r: Realizer) -> None:
    """Look rows up as integers; unpack recurrent weights when the engine is loaded.

    Raises:
        EngineError: an LSTM quantizes activations at run time, which this engine has no operator for.
    """
    for node in list(r.graph):
        if node.op_type == "LSTM" and DYNAMIC in node.metadata_props:
            why, fix = "the program was made for ONNX Runtime", "compile it for this target, or leave the layer out"
            raise EngineError(
                63, "an LSTM with activations quantized at run time", where=str(node.name), why=why, fix=fix
            )
    unpacked = []
    for node in [n for n in r.graph if n.domain == DOMAIN and n.op_type == "FakeQuantize"]:
        readers = [u.node for u in node.outputs[0].uses()]
        source = cast("ir.Value", node.inputs[0])
        if source.const_value is None or source.producer() is not None or not readers:
            continue
        grid = r.grid(node)
        if all(n.op_type == "Gather" and _axis(n) == 0 for n in readers) and grid.axis == 0 and not grid.group:
            _rows(r, node, source, grid, readers)
        elif all(n.op_type == "Reshape" and _feeds_recurrent(n) for n in readers):
            _at_load(r, node, source, grid)
            unpacked.append(str(node.name).rpartition(".")[0])
    if unpacked:
        names = ", ".join(dict.fromkeys(unpacked))
        r.notes.append(f"{names}: unpacked to float32 when the engine is loaded: small on disk, no faster than float32")


def _axis(node: ir.Node) -> int:
    return node.attributes["axis"].as_int() if "axis" in node.attributes else 0


def _feeds_recurrent(node: ir.Node) -> bool:
    users = [u.node for u in node.outputs[0].uses()]
    return bool(users) and all(u.op_type in _RECURRENT for u in users)


def _integers(node: ir.Node, source: ir.Value, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Integers, scales [rows, 1] and zero points [rows, 1] of a matrix with one grid per row."""
    from fxcompress.engines.quantized import as_torch

    values = grid.quantize(as_torch(source))
    container_bits(grid, str(node.name))
    return values, grid.scale.reshape(-1, 1).float(), grid.zero_point.reshape(-1, 1)


def _rows(r: Realizer, node: ir.Node, source: ir.Value, grid: Grid, readers: list[ir.Node]) -> None:
    """Gather integers and scales, multiply what was found: [..., features]."""
    values, scale, zero = _integers(node, source, grid)
    name = str(source.name)
    signed = grid.qmin < 0
    table, scales = (
        stored(r, f"{name}_quantized", values, signed, 8),
        r.initializer(f"{name}_scale", scale.contiguous()),
    )
    zeros = stored(r, f"{name}_zero_point", zero, signed, 8) if bool(zero.any()) else None
    for reader in readers:
        ids, at = cast("ir.Value", reader.inputs[1]), str(reader.name)
        found = [
            None if part is None else r.emit(reader, "Gather", part, ids, name=f"{at}/{kind}", axis=0)
            for part, kind in ((table, "integers"), (scales, "scale"), (zeros, "zero_point"))
        ]
        value = r.emit(reader, "Cast", found[0], name=f"{at}/Cast", to=1)
        if found[2] is not None:
            shift = r.emit(reader, "Cast", found[2], name=f"{at}/Cast_zero", to=1)
            value = r.emit(reader, "Sub", value, shift, name=f"{at}/Sub")
        r.replace(reader.outputs[0], r.emit(reader, "Mul", value, found[1], name=f"{at}/Mul"))
        r.graph.remove(reader, safe=True)
    r.graph.remove(node, safe=True)


def _at_load(r: Realizer, node: ir.Node, source: ir.Value, grid: Grid) -> None:
    """Integers, two casts (which keeps OpenVINO from reading a compressed weight), zero points and scales."""
    values, scale, zero = _integers(node, source, grid)
    name, signed, bits = str(source.name), grid.qmin < 0, max(container_bits(grid, str(source.name)), 4)
    value = stored(r, f"{name}_quantized", values, signed, bits)
    for kind, to in (("Cast_int32", 6), ("Cast", 1)):
        value = r.emit(node, "Cast", value, name=f"{name}/{kind}", to=to)
    if bool(zero.any()):
        value = r.emit(node, "Sub", value, r.constant(zero.float()), name=f"{name}/Sub")
    value = r.emit(node, "Mul", value, r.initializer(f"{name}_scale", scale.contiguous()), name=f"{name}/Mul")
    r.replace(node.outputs[0], value)
    r.graph.remove(node, safe=True)


# ------------------------------------------------------------------------------------------------ ONNX Runtime
def integer_lstms(r: Realizer) -> None:
    """LSTMs that quantize at run time as ONNX Runtime's ``DynamicQuantizeLSTM``."""
    for node in list(r.graph):
        if node.op_type == "LSTM" and DYNAMIC in node.metadata_props:
            _integer_lstm(r, node)


def _integer_lstm(r: Realizer, node: ir.Node) -> None:
    x, *_, bias = node.inputs[:4]
    directions = 2 if node.attributes["direction"].as_string() == "bidirectional" else 1
    weights, grids = [], []
    for value in node.inputs[1:3]:
        reshape = cast("ir.Node", cast("ir.Value", value).producer())
        quantizer = cast("ir.Node", cast("ir.Value", reshape.inputs[0]).producer())
        source, grid = cast("ir.Value", quantizer.inputs[0]), r.grid(quantizer)
        values, scale, _ = _integers(quantizer, source, grid)
        columns = values.unflatten(0, (directions, -1)).transpose(1, 2).contiguous()
        weights.append(stored(r, f"{source.name}_quantized", columns, True, 8))
        flat = scale.reshape(directions, -1).contiguous()
        grids += [r.initializer(f"{source.name}_scale", flat), r.constant(torch.zeros(flat.shape, dtype=torch.int8))]
    states = (*node.inputs[5:7], None, None)[:2]
    inputs = (x, *weights, bias, None, *states, None, *grids)
    attributes = {k: node.attributes[k].value for k in ("hidden_size", "direction")}
    new = r.ir.node(
        "DynamicQuantizeLSTM",
        inputs,
        attributes=attributes,
        domain="com.microsoft",
        num_outputs=len(node.outputs),
        name=f"{node.name}/DynamicQuantizeLSTM",
    )
    r.graph.insert_before(node, new)
    for old, made in zip(node.outputs, new.outputs, strict=True):
        r.replace(old, made)
    r.graph.remove(node, safe=True)
