"""16-bit floats in portable models: stored in 16 bits, computed with in float32.

The CPU runtimes have no (bfloat16) or few (float16) kernels for them; ONNX Runtime would put casts around every node. So
weights keep their 16 bits in the file and are cast where they are read, which both runtimes do once, at load. The file's
inputs and outputs are float32; engines convert to and from the program's dtypes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fxcompress.lowering.builder import DOMAIN

if TYPE_CHECKING:
    import onnx_ir as ir

    from fxcompress.lowering.portable import PortableModel

__all__ = ["HALF", "widened"]

#: The 16-bit floating dtypes.
HALF = (torch.float16, torch.bfloat16)
#: Constants of up to so many values, and vectors, are stored in float32.
_SMALL = 1024


def widened(portable: PortableModel) -> PortableModel:
    """The model in float32 with its 16-bit weights behind casts; the very same object when it has no 16-bit values."""
    import onnx_ir as ir

    kinds = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    if not any(v.dtype in kinds for v in _values(portable.model.graph)):
        return portable
    new = portable.clone()
    graph = new.model.graph
    for value in list(graph.initializers.values()):
        if value.dtype in kinds:
            _widen_weight(graph, value)
    for value in _values(graph):
        if value.dtype in kinds and value.const_value is None:
            value.type = ir.TensorType(ir.DataType.FLOAT)
    for node in graph:
        for name in ("to", "dtype"):
            if name in node.attributes and node.attributes[name].as_int() in [int(k) for k in kinds]:
                node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
    return new


def _values(graph: ir.Graph) -> list[ir.Value]:
    made = [v for node in graph for v in node.outputs]
    return [*graph.inputs, *graph.initializers.values(), *made]


def _widen_weight(graph: ir.Graph, value: ir.Value) -> None:
    """A cast behind a matrix, a float32 constant instead of a small tensor; quantizers read the 16-bit weight itself."""
    import onnx_ir as ir

    held = value.const_value
    uses = [u for u in value.uses() if u.node.domain != DOMAIN]
    if held is None or not uses:
        return
    tensor = getattr(held, "raw", None)
    small = len(held.shape) < 2 or held.size <= _SMALL
    if small and isinstance(tensor, torch.Tensor) and len(uses) == len(value.uses()):
        value.const_value = ir.tensor_adapters.TorchTensor(tensor.float(), name=value.name)
        value.type = ir.TensorType(ir.DataType.FLOAT)
        return
    node = ir.node("Cast", [value], attributes={"to": int(ir.DataType.FLOAT)}, name=f"{value.name}/Cast")
    wide = node.outputs[0]
    wide.name, wide.shape, wide.type = f"{value.name}_float32", value.shape, ir.TensorType(ir.DataType.FLOAT)
    for use in uses:
        use.node.replace_input_with(use.idx, wide)
    first = next(iter(graph), None)
    if first is None:
        graph.append(node)
    else:
        graph.insert_before(first, node)
