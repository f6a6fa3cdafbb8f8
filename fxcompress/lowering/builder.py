"""Builder: collects ONNX nodes for the nodes of a Program, and the table of who lowers what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxcompress.ir import Program, node_path, source_line

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["DOMAIN", "OPSET", "Builder", "Unsupported", "dtype_of", "lowers", "lowers_module", "rank_of", "tap_names"]

#: Domain of the operators that only exist between lowering and an engine (``FakeQuantize``).
DOMAIN = "fxcompress"
#: ONNX operator set that is written.
OPSET = 21

Emitter = Callable[["Builder", Node, dict[str, Any]], Any]
ModuleEmitter = Callable[["Builder", Node, Any], Any]
_FUNCTIONS: dict[Any, Emitter] = {}
_MODULES: dict[type[nn.Module], ModuleEmitter] = {}


class Unsupported(Exception):
    """This table cannot express a node; another way of lowering may."""


def lowers(*targets: Any) -> Callable[[Emitter], Emitter]:
    """Register the emitter of ATen overloads (or Python functions on symbolic sizes)."""

    def register(emitter: Emitter) -> Emitter:
        _FUNCTIONS.update(dict.fromkeys(targets, emitter))
        return emitter

    return register


def lowers_module(*kinds: type[nn.Module]) -> Callable[[ModuleEmitter], ModuleEmitter]:
    """Register the emitter of layers; a subclass inherits it."""

    def register(emitter: ModuleEmitter) -> ModuleEmitter:
        _MODULES.update(dict.fromkeys(kinds, emitter))
        return emitter

    return register


def dtype_of(value: Any) -> torch.dtype:
    """Dtype of a node, or the one torch gives a Python number."""
    value = value.meta["val"] if isinstance(value, Node) else value
    if isinstance(value, Tensor):
        return value.dtype
    if isinstance(value, (bool, torch.SymBool)):
        return torch.bool
    return torch.int64 if isinstance(value, (int, torch.SymInt)) else torch.float32


def rank_of(node: Node) -> int:
    """Number of dimensions of a node's value."""
    return int(node.meta["val"].dim())


def tap_names(program: Program) -> dict[Node, str]:
    """Name of every node's value: the module path where one node alone calls that module, else the node's own name."""
    calls: dict[str, int] = {}
    for node in program.graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    taken: set[str] = set()
    names = {}
    for node in program.graph.nodes:
        alone = node.op == "call_module" and calls[str(node.target)] == 1
        name = str(node.target) if alone and str(node.target) not in taken else node.name
        while name in taken:
            name = f"{name}_"
        taken.add(name)
        names[node] = name
    return names


class Builder:
    """Grows one ``onnx_ir.Graph`` while a Program is walked.

    Attributes:
        graph: The graph built so far.
        values: ONNX value (or a tuple of them, or a Python constant) of each node that has been lowered. Symbolic
            sizes are int64 (or float) values of shape [1].
        taps: Tap name -> value name, in execution order.
    """

    def __init__(self, program: Program) -> None:
        import onnx_ir as ir

        self.ir = ir
        self.program = program
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET, DOMAIN: 1}, name="model")
        self.values: dict[Node, Any] = {}
        self.taps: dict[str, str] = {}
        self.symbols: dict[str, str] = {}
        self.memo: dict[Any, Any] = {}
        self._names = tap_names(program)
        self._tensors: dict[int, ir.Value] = {}
        self._keep_alive: list[Any] = []
        self._used: set[str] = set()
        self._recorded: set[int] = set()
        self._scope = ""

    # ---------------------------------------------------------------------------------------------- walking
    def lower_node(self, node: Node) -> None:
        """Emit one ``call_module``, ``call_function`` or ``get_attr`` node."""
        self._scope = self._names[node] if node.op == "call_module" else node_path(node)
        if node.op == "get_attr":
            self.values[node] = self.parameter(str(node.target), self.program.tensor(node))
            return
        try:
            result = self._emit(node)
        except Unsupported as error:
            raise Unsupported(f"{describe(node)}: {error}") from None
        self._record(node, result)

    def _emit(self, node: Node) -> Any:
        if node.op == "call_module":
            module = self.program.module(node)
            emitter = next((_MODULES[k] for k in type(module).__mro__ if k in _MODULES), None)
            if emitter is None:
                raise Unsupported(f"no ONNX form for a layer of type {type(module).__name__}")
            return emitter(self, node, module)
        function = _FUNCTIONS.get(node.target)
        if function is None:
            raise Unsupported("no ONNX form in the table")
        return function(self, node, arguments(node))

    def _record(self, node: Node, result: Any) -> None:
        self.values[node] = result
        val = node.meta.get("val")
        if not isinstance(result, self.ir.Value) or not isinstance(val, Tensor):
            return
        if result.producer() is None or id(result) in self._recorded:
            return  # an input, an initializer, or another node's value
        self._recorded.add(id(result))
        result.name = self._unique(self._names[node])
        self.describe_value(result, val)
        self.taps[self._names[node]] = result.name

    def describe_value(self, value: ir.Value, val: Tensor) -> None:
        """Write dtype and shape of a fake tensor onto an ONNX value."""
        value.type = self.ir.TensorType(self.dtype(val.dtype))
        value.shape = self.ir.Shape([self.dim(s) for s in val.shape])

    def dim(self, size: Any) -> int | str:
        """A size as ONNX writes it: an integer, or the name of a symbol."""
        if isinstance(size, int):
            return size
        text = str(size)
        return self.symbols.get(text, text)

    # ---------------------------------------------------------------------------------------------- operands
    def value(self, arg: Any, dtype: torch.dtype | None = None) -> ir.Value:
        """ONNX value of a node or a number, cast to ``dtype``."""
        if not isinstance(arg, Node):
            if isinstance(arg, (bool, int, float)):
                return self.scalar(arg, dtype or dtype_of(arg))
            raise Unsupported(f"an argument of type {type(arg).__name__}")
        found = self.values[arg]
        if not isinstance(found, self.ir.Value):
            if isinstance(found, (bool, int, float)):
                return self.scalar(found, dtype or dtype_of(found))
            raise Unsupported("an argument that is a list of tensors")
        return found if dtype is None else self.cast(found, dtype_of(arg), dtype)

    def cast(self, value: ir.Value, source: torch.dtype, to: torch.dtype) -> ir.Value:
        """``value`` as ``to``; nothing is emitted when it already is."""
        return value if source == to else self.op("Cast", value, to=int(self.dtype(to)))

    def dtype(self, dtype: torch.dtype) -> ir.DataType:
        """ONNX type of a torch dtype."""
        if dtype.is_complex:
            raise Unsupported("complex numbers")
        return self.ir.tensor_adapters.from_torch_dtype(dtype)

    def scalar(self, number: float | int | bool, dtype: torch.dtype) -> ir.Value:
        """A constant of shape []."""
        return self.constant(torch.tensor(number, dtype=dtype))

    def ints(self, numbers: Sequence[int]) -> ir.Value:
        """An int64 constant of shape [n]."""
        return self.constant(torch.tensor(list(numbers), dtype=torch.int64))

    def constant(self, tensor: Tensor) -> ir.Value:
        """A small constant; equal ones are stored once."""
        plain = tensor.float() if tensor.dtype == torch.bfloat16 else tensor  # numpy has no bfloat16
        key = (tensor.dtype, tuple(tensor.shape), plain.numpy().tobytes())
        if key not in self.memo:
            self.memo[key] = self._initializer(f"constant_{len(self.memo)}", tensor)
        return cast("ir.Value", self.memo[key])

    def parameter(self, name: str, tensor: Tensor) -> ir.Value:
        """A parameter or buffer under the user's name; tied ones are stored once, under the name met first."""
        if id(tensor) not in self._tensors:
            self._tensors[id(tensor)] = self._initializer(name, tensor)
        return self._tensors[id(tensor)]

    def _initializer(self, name: str, tensor: Tensor) -> ir.Value:
        name = self._unique(name)
        plain = tensor.detach()
        held = self.ir.tensor_adapters.TorchTensor(plain, name=name)
        shape, kind = self.ir.Shape(list(plain.shape)), self.ir.TensorType(self.dtype(plain.dtype))
        value = self.ir.Value(name=name, shape=shape, type=kind, const_value=held)
        self.graph.initializers[name] = value
        self._keep_alive.append(tensor)
        return value

    def sizes(self, sizes: Sequence[Any]) -> ir.Value:
        """A shape: a constant when every size is a number, else a concatenation of computed sizes. int64 [n]."""
        if all(isinstance(s, int) for s in sizes):
            return self.ints(sizes)
        parts = [self.ints([s]) if isinstance(s, int) else self.value(s) for s in sizes]
        return parts[0] if len(parts) == 1 else self.op("Concat", *parts, axis=0)

    def static(self, arg: Any) -> Any:
        """``arg`` when it is a Python constant; raises Unsupported when it is computed."""
        if isinstance(arg, Node):
            raise Unsupported("an argument that is computed at run time")
        if isinstance(arg, (list, tuple)):
            return [self.static(a) for a in arg]
        return arg

    # ---------------------------------------------------------------------------------------------- emission
    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """Emit a node with one output."""
        return self.multi(kind, 1, *inputs, domain=domain, **attributes)[0]

    def multi(
        self, kind: str, outputs: int, *inputs: ir.Value | None, domain: str = "", **attributes: Any
    ) -> tuple[ir.Value, ...]:
        """Emit a node with several outputs; attributes that are None are left out."""
        given = {k: v for k, v in attributes.items() if v is not None}
        name = self._unique(f"{self._scope}/{kind}" if self._scope else kind)
        node = self.ir.node(kind, inputs, attributes=given, domain=domain, num_outputs=outputs, name=name)
        for index, value in enumerate(node.outputs):
            value.name = self._unique(f"{name}_output" if outputs == 1 else f"{name}_output_{index}")
        self.graph.append(node)
        return tuple(node.outputs)

    def _unique(self, name: str) -> str:
        candidate, count = name, 0
        while candidate in self._used:
            count += 1
            candidate = f"{name}_{count}"
        self._used.add(candidate)
        return candidate


def arguments(node: Node) -> dict[str, Any]:
    """Arguments by schema name, defaults filled in; for Python functions by position (``"0"``, ``"1"``)."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {str(i): a for i, a in enumerate(node.args)}
    values = {}
    for i, argument in enumerate(node.target._schema.arguments):
        given = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
        values[argument.name] = given
    return values


def describe(node: Node) -> str:
    """A node for an error: what it is, its name, and the user's line."""
    line = source_line(node)
    return f"{node.target} at %{node.name}" + (f" ({line})" if line else "")
