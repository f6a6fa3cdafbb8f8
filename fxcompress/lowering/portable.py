"""PortableModel: one ONNX graph with FakeQuantize nodes, from which every engine's file is made."""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from fxcompress.errors import EngineError, MissingRuntimeError, UsageError
from fxcompress.ir import Program
from fxcompress.lowering import creation, layers, norms, padding, pooling, recurrent, reductions, shapes
from fxcompress.lowering.builder import DOMAIN, Builder, Unsupported
from fxcompress.lowering.names import input_names, output_names, size_names
from fxcompress.lowering.peephole import fold_padding

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["PortableModel", "lower", "strip"]

_TABLES = (creation, layers, norms, padding, pooling, recurrent, reductions, shapes)
_log = logging.getLogger("fxcompress")


@dataclass
class PortableModel:
    """A program as an ONNX graph that is not yet any engine's.

    Weights are float; what is quantized is said by ``FakeQuantize`` nodes of the domain ``fxcompress`` with inputs
    ``(x, scale, zero_point)`` and attributes ``axis`` (-1: one scale), ``qmin`` and ``qmax``.

    Attributes:
        model: The graph. Its weights are the program's tensors, not copies.
        program: What it was lowered from.
        taps: Name of each tapped point -> name of its ONNX value, in execution order.
        outputs: For each flattened output the name of its ONNX value, or ``(constant,)``.
        notes: What was done differently from the usual, one line each.
    """

    model: ir.Model
    program: Program
    taps: dict[str, str] = field(default_factory=dict)
    outputs: list[Any] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def fake_quantizers(self) -> list[str]:
        """Names of the FakeQuantize nodes in execution order; a weight's is ``<layer>.weight_fake_quantize``."""
        return [str(n.name) for n in self.model.graph if n.domain == DOMAIN]

    def clone(self) -> PortableModel:
        """A copy to rewrite: nodes are new, tensors are shared."""
        return PortableModel(self.model.clone(), self.program, dict(self.taps), list(self.outputs), list(self.notes))


def lower(program: Program) -> PortableModel:
    """Lower a program to ONNX, once for all engines.

    Args:
        program: In normal form; its FakeQuantize modules must be frozen.

    Returns:
        The portable model; node names follow the model's module paths, weights keep the user's names.

    Raises:
        EngineError: an operator has no ONNX form; names the node and the user's line.
        MissingRuntimeError: the ONNX packages are not installed.
    """
    _require_onnx()
    try:
        return _lower_with_table(program)
    except Unsupported as error:
        _log.info("lowering through torch.onnx: %s", error)
        from fxcompress.lowering.exporter import export

        return export(program, reason=str(error))


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnx_ir  # noqa: F401
    except ImportError as error:
        raise MissingRuntimeError(
            1,
            "ONNX is not installed",
            why=str(error),
            fix='pip install "fxcompress[onnxruntime]" or "fxcompress[openvino]"',
        ) from error


def _lower_with_table(program: Program) -> PortableModel:
    b = Builder(program)
    b.symbols = size_names(program)
    for name, node in zip(input_names(program), program.placeholders(), strict=True):
        b.values[node] = _input(b, name, node)
    for node in program.graph.nodes:
        if node.op in ("call_module", "call_function", "get_attr"):
            b.lower_node(node)
    outputs = [_output(b, name, value) for name, value in zip(output_names(program), program.outputs(), strict=True)]
    model = b.ir.Model(b.graph, ir_version=10, producer_name="fxcompress")
    portable = PortableModel(model, program, b.taps, outputs)
    fold_padding(portable)
    prune(portable)
    return portable


def _input(b: Builder, name: str, node: Node) -> Any:
    val = node.meta.get("val")
    if not isinstance(val, Tensor):
        return val  # a constant of the captured call
    value = b.ir.Value(name=b._unique(name))
    b.describe_value(value, val)
    b.graph.inputs.append(value)
    return value


def _output(b: Builder, name: str, source: Any) -> Any:
    """Make ``source`` a graph output of that name; what is no tensor becomes a constant of the signature."""
    if not isinstance(source, Node):
        return (source,)
    value = b.values[source]
    if not isinstance(value, b.ir.Value):
        return (value,)
    val = source.meta["val"]
    if not isinstance(val, Tensor):
        raise Unsupported("a size as an output of the model")
    b._scope = ""
    out = b.op("Identity", value)
    out.name = b._unique(name)
    b.describe_value(out, val)
    b.graph.outputs.append(out)
    return out.name


def prune(portable: PortableModel) -> None:
    """Drop nodes and initializers that nothing reads, and the taps that went with them."""
    graph = portable.model.graph
    results = {id(v) for v in graph.outputs}
    for node in reversed(list(graph)):
        if not any(v.uses() or id(v) in results for v in node.outputs):
            graph.remove(node, safe=True)
    for name in [n for n, v in graph.initializers.items() if not v.uses() and id(v) not in results]:
        del graph.initializers[name]
    alive = {v.name for n in graph for v in n.outputs}
    portable.taps = {tap: value for tap, value in portable.taps.items() if value in alive}


def strip(
    portable: PortableModel, keep: Container[str] = (), state: Mapping[str, Tensor] | None = None
) -> PortableModel:
    """The same model without (some of) its fake-quantizers.

    Args:
        portable: Left untouched.
        keep: Names (see ``fake_quantizers``) of those that stay; by default none does, which gives the FP32 twin.
        state: Tensors to put in place of weights, by the user's parameter name; names without a weight are ignored.

    Raises:
        UsageError: a tensor of ``state`` has another shape or dtype than the weight it replaces.
    """
    new = portable.clone()
    graph = new.model.graph
    values = {v.name: v for n in graph for v in n.outputs}
    for node in list(graph):
        if node.domain == DOMAIN and node.name not in keep:
            source = node.inputs[0]
            assert source is not None
            for tap in [t for t, v in new.taps.items() if values.get(v) is node.outputs[0]]:
                del new.taps[tap]
            node.outputs[0].replace_all_uses_with(source)
            graph.remove(node, safe=True)
    for name, tensor in (state or {}).items():
        if name in graph.initializers:
            _replace_weight(graph.initializers[name], name, tensor)
    prune(new)
    return new


def _replace_weight(value: ir.Value, name: str, tensor: Tensor) -> None:
    import onnx_ir as ir

    held = ir.tensor_adapters.TorchTensor(tensor.detach(), name=name)
    old = value.const_value
    if old is None or list(old.shape) != list(tensor.shape) or old.dtype != held.dtype:
        raise UsageError(
            78, f"the tensor given for {name} does not fit", why=f"{list(tensor.shape)} {tensor.dtype} for {old}"
        )
    value.const_value = held


def check_supported(program: Program) -> None:
    """Raise EngineError when the program holds tensors no engine takes (complex numbers)."""
    for node in program.placeholders():
        val = node.meta.get("val")
        if isinstance(val, Tensor) and val.dtype in (torch.complex64, torch.complex128):
            raise EngineError(3, "complex inputs cannot be given to an engine", where=f"input {node.name}")
