"""A whole Program as plain JSON and named tensors: graph, layers, signature, free sizes; read back without pickle.

Shapes and dtypes of the values in the graph are not written: they are computed again from the inputs when the program
is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StrictMinMaxConstraint
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from fxcompress.diagnose import register_dataclasses
from fxcompress.engines.program_file import describe_graph, distinct, make_graph, make_module
from fxcompress.engines.signature import IOSignature, TensorSpec
from fxcompress.engines.structure import Output
from fxcompress.errors import ArtifactError, UsageError
from fxcompress.ir import Program, Signature, build_gm, node_path
from fxcompress.sizes import fixed_size
from fxcompress.tree import KeyNames

__all__ = ["Entry", "SavedCall", "describe_form", "describe_state", "restore", "state_entries"]

#: How a tensor is held; a ``temporary`` is a buffer that is not in the state dict.
PARAMETER, BUFFER, TEMPORARY = "parameter", "buffer", "temporary"


# ------------------------------------------------------------------------------------------------ tensors
@dataclass(frozen=True)
class Entry:
    """One tensor of a program's module.

    Attributes:
        name: Its path in the program.
        kind: ``parameter``, ``buffer`` or ``temporary``.
        dtype: Name of the torch dtype; ``""`` where the layer has none (a convolution without bias).
        shape: Its sizes.
        trains: ``requires_grad``.
        stored: Name of the tensor in the file; tied tensors share it.
    """

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    trains: bool
    stored: str

    def __str__(self) -> str:
        return f"{self.kind} {self.dtype}{list(self.shape)}" if self.dtype else "none"

    def to_json(self) -> list[Any]:
        """Plain JSON."""
        return [self.name, self.kind, self.dtype, list(self.shape), self.trains, self.stored]

    @classmethod
    def from_json(cls, values: list[Any]) -> Entry:
        """Inverse of `to_json`."""
        name, kind, dtype, shape, trains, stored = values
        return cls(str(name), str(kind), str(dtype), tuple(int(s) for s in shape), bool(trains), str(stored))


def state_entries(gm: nn.Module) -> Iterator[tuple[str, str, Tensor | None]]:
    """Path, kind and value of every tensor slot of a module, in the order of its ``state_dict``."""
    for path, module in gm.named_modules():
        prefix = f"{path}." if path else ""
        for name, parameter in module._parameters.items():
            yield prefix + name, PARAMETER, parameter
        for name, buffer in module._buffers.items():
            yield prefix + name, TEMPORARY if name in module._non_persistent_buffers_set else BUFFER, buffer


def describe_state(program: Program) -> tuple[list[Entry], dict[str, Tensor]]:
    """The tensors of a program: what they are, and each distinct one under the user's ``state_dict`` key."""
    slots = list(state_entries(program.gm))
    keys = KeyNames.of(program.gm).names
    named = {keys.get(name, name): tensor for name, _, tensor in slots if tensor is not None}
    stored, aliases = distinct(named)
    entries = []
    for name, kind, tensor in slots:
        key = keys.get(name, name)
        if tensor is None:
            entries.append(Entry(name, kind, "", (), False, ""))
            continue
        dtype = str(tensor.dtype).removeprefix("torch.")
        entries.append(Entry(name, kind, dtype, tuple(tensor.shape), tensor.requires_grad, aliases.get(key, key)))
    return entries, stored


def loaded_tensors(entries: list[Entry], stored: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """Path -> parameter or buffer; what was one object when it was saved is one again.

    Raises:
        ArtifactError: the tensor file lacks one of them, or holds another shape or dtype.
    """
    made: dict[str, Tensor] = {}
    found: dict[str, Tensor | None] = {}
    for entry in entries:
        if not entry.dtype:
            found[entry.name] = None
            continue
        if entry.stored not in made:
            made[entry.stored] = _loaded(entry, stored)
        found[entry.name] = made[entry.stored]
    return found


def _loaded(entry: Entry, stored: dict[str, Tensor]) -> Tensor:
    tensor = stored.get(entry.stored)
    if tensor is None or tuple(tensor.shape) != entry.shape or str(tensor.dtype) != f"torch.{entry.dtype}":
        got = "nothing" if tensor is None else f"{tensor.dtype}{list(tensor.shape)}"
        raise ArtifactError(40, "the tensor file does not fit its description", where=entry.name, why=f"it holds {got}")
    own = tensor.clone()  # what the file's reader returns may be a view of the file
    return nn.Parameter(own, requires_grad=entry.trains) if entry.kind == PARAMETER else own


def put_tensors(gm: nn.Module, found: dict[str, Tensor | None]) -> None:
    """Make ``found`` the tensors of ``gm``; those it held are left as they are."""
    for path, module in gm.named_modules():
        prefix = f"{path}." if path else ""
        for table in (module._parameters, module._buffers):
            for name in table:
                table[name] = cast(Any, found[prefix + name])
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()


# ------------------------------------------------------------------------------------------------ call
@dataclass(frozen=True)
class SavedCall:
    """How a program is called, as plain values.

    Attributes:
        signature: Names, structure and constants of the inputs and outputs.
        sizes: Per tensor input, a number or ``[symbol, factor, offset]`` per dimension.
        symbols: Free size -> ``[traced value, smallest, largest or None]``.
    """

    signature: IOSignature
    sizes: list[list[Any]]
    symbols: dict[str, list[int | None]]

    @classmethod
    def of(cls, program: Program) -> SavedCall:
        """The call of a program.

        Raises:
            UsageError: an input or output has a type that JSON cannot describe, or a size of another form.
        """
        symbols: dict[str, list[int | None]] = {}
        vals = [n.meta.get("val") for n in program.placeholders()]
        sizes = [[_size_json(s, symbols) for s in v.shape] for v in vals if isinstance(v, Tensor)]
        found = cls(IOSignature.of(program), sizes, symbols)
        if (found.tree_spec("in"), found.tree_spec("out")) != (program.signature.in_spec, program.signature.out_spec):
            raise UsageError(170, "the structure of the inputs or outputs cannot be saved", fix="use tuples and dicts")
        return found

    def tree_spec(self, side: str) -> pytree.TreeSpec:
        """The tree of the inputs (``"in"``) or outputs (``"out"``)."""
        leaves, tree = {
            "in": (self.signature.inputs, self.signature.in_tree),
            "out": (self.signature.outputs, self.signature.out_tree),
        }[side]
        value = tree.build(list(range(len(leaves))))
        _register(value)
        return pytree.tree_structure(value)

    def program_signature(self) -> Signature:
        """The signature of the restored program."""
        s = self.signature
        return Signature(s.names, s.n_positional, self.tree_spec("in"), self.tree_spec("out"))

    def example(self, tensors: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``(args, kwargs)`` around the tensors of the example."""
        rest = iter(tensors)
        leaves = [next(rest) if isinstance(s, TensorSpec) else s for s in self.signature.inputs]
        args, kwargs = self.signature.in_tree.build(leaves)
        return tuple(args), dict(kwargs)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"signature": self.signature.to_dict(), "sizes": self.sizes, "symbols": self.symbols}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> SavedCall:
        """Inverse of `to_json`."""
        return cls(IOSignature.from_dict(values["signature"]), list(values["sizes"]), dict(values["symbols"]))

    def free_dimensions(self) -> set[int]:
        """The dimensions that are free in any input."""
        return {dim for sizes in self.sizes for dim, size in enumerate(sizes) if not isinstance(size, int)}

    def dynamic_shapes(self) -> list[dict[int, Any]]:
        """What ``torch.export`` calls dynamic shapes, per tensor input."""
        dims = {n: torch.export.Dim(n, min=low, max=high) for n, (_, low, high) in self.symbols.items()}
        return [
            {dim: size[1] * dims[size[0]] + size[2] for dim, size in enumerate(sizes) if not isinstance(size, int)}
            for sizes in self.sizes
        ]


def _size_json(size: Any, symbols: dict[str, list[int | None]]) -> Any:
    """``size`` as a number or ``[symbol, factor, offset]``; its symbol is noted."""
    fixed = fixed_size(size)
    if fixed is not None:
        return fixed
    expr, env = size.node.expr, size.node.shape_env
    symbol, *others = expr.free_symbols
    factor = expr.coeff(symbol)
    offset = expr - factor * symbol
    if others or not (factor.is_Integer and offset.is_Integer and factor != 0):
        raise UsageError(171, f"an input size of the form {expr} cannot be saved", fix="capture with plain free sizes")
    bounds = env.var_to_range[symbol]
    upper = int(bounds.upper) if bounds.upper.is_Integer else None
    traced = (int(size.node.hint) - int(offset)) // int(factor)
    symbols.setdefault(str(symbol), [traced, int(bounds.lower), upper])
    return [str(symbol), int(factor), int(offset)]


def _register(value: Any) -> None:
    """Make dataclasses, and what stands for records of unknown type, known to torch's trees."""
    if Output not in pytree.SUPPORTED_NODES:
        pytree.register_pytree_node(Output, _flatten_output, _unflatten_output)
    register_dataclasses(value)


def _flatten_output(value: Output) -> tuple[list[Any], list[str]]:
    return [value[k] for k in value], list(value)


def _unflatten_output(values: Any, keys: Any) -> Output:
    return Output(dict(zip(keys, values, strict=True)))


# ------------------------------------------------------------------------------------------------ graph
def describe_form(program: Program) -> dict[str, Any]:
    """Graph, layers and module tree as plain JSON.

    Raises:
        EngineError: a layer or an argument has no file form.
    """
    graph, used = describe_graph(program)
    held = {name for name, _, _ in state_entries(program.gm)}
    first: dict[int, str] = {}
    tree = []
    for path, module in program.gm.named_modules(remove_duplicate=False):
        tree.append([path, first.setdefault(id(module), path)])
    return {
        "graph": graph,
        "tree": tree[1:],
        "loose": sorted(set(used) - held - _shared(tree, used)),
        "paths": {n.name: p for n in program.graph.nodes if (p := node_path(n))},
        "keys": KeyNames.of(program.gm).names,
        "training": program.gm.training,
    }


def _shared(tree: list[list[str]], used: dict[str, Tensor]) -> set[str]:
    """Names of tensors under a second path of their module."""
    again = {path for path, first in tree if path != first}
    return {name for name in used if name.rpartition(".")[0] in again}


def restore(
    call: SavedCall, form: dict[str, Any], found: dict[str, Tensor | None], example: list[Tensor], kinds: dict[str, str]
) -> Program:
    """The program that was described.

    Args:
        call: Of `SavedCall.of`.
        form: Of `describe_form`.
        found: Path -> tensor, of `loaded_tensors`.
        example: The tensors of the example, in the order of the inputs.
        kinds: Path -> kind of tensor.

    Raises:
        ArtifactError: the form is damaged, or names an operator or layer that is not on the lists.
    """
    if form["loose"]:
        raise ArtifactError(41, "the graph uses tensors that no module holds", where=str(form["loose"][0]))
    root = _tree(form, found)
    _set_kinds(root, found, kinds)
    graph = make_graph(form["graph"], root)
    signature = call.program_signature()
    names = [n.name for n in graph.nodes if n.op == "placeholder"]
    graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(list(signature.names), signature.in_spec, signature.out_spec)))
    gm = build_gm(root, graph)
    if len(names) != len(call.signature.inputs):
        raise ArtifactError(42, "the graph and its signature have another number of inputs")
    if form["keys"]:
        KeyNames(dict(form["keys"])).install(gm)
    gm.training = bool(form["training"])
    program = Program(gm, signature, call.example(example))
    _Shapes(gm, call).run_all()
    for node in gm.graph.nodes:
        path = form["paths"].get(node.name)
        if path:
            node.meta["nn_module_stack"] = {"": (str(path), "")}
    program.verify()
    return program


def _tree(form: dict[str, Any], found: dict[str, Tensor | None]) -> nn.Module:
    """The modules under their paths, in the saved order, their tensors as buffers."""
    root = nn.Module()
    made: dict[str, nn.Module] = {"": root}
    tensors = {name: tensor for name, tensor in found.items() if tensor is not None}
    entries = form["graph"]["modules"]
    layers = {first: entries[path] for path, first in form["tree"] if path in entries}
    for path, first in form["tree"]:
        if path == first:
            made[path] = make_module(path, layers[path], tensors) if path in layers else nn.Module()
        owner, _, leaf = path.rpartition(".")
        made[owner].__dict__.pop(leaf, None)
        made[owner]._modules[leaf] = made[path] = made[first]
    return root


def _set_kinds(root: nn.Module, found: dict[str, Tensor | None], kinds: dict[str, str]) -> None:
    """Turn the buffers of the tree into parameters, buffers and temporary buffers, in the saved order."""
    modules = dict(root.named_modules())
    for module in modules.values():
        module._buffers.clear()
    for name, tensor in found.items():
        owner, _, leaf = name.rpartition(".")
        module = modules[owner]
        module.__dict__.pop(leaf, None)
        if kinds[name] == PARAMETER:
            module._parameters[leaf] = cast("nn.Parameter | None", tensor)
        else:
            module.register_buffer(leaf, tensor, persistent=kinds[name] == BUFFER)
    for module in modules.values():
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()


class _Shapes(Interpreter):
    """Computes ``meta["val"]`` of every node with fake tensors."""

    def __init__(self, gm: GraphModule, call: SavedCall) -> None:
        super().__init__(gm)
        self.call = call
        self.shape_env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.shape_env, allow_non_fake_inputs=True)

    def run_all(self) -> None:
        """Fill in the whole graph; operators made of others take their symbolic form, as in an export."""
        with torch.no_grad(), enable_python_dispatcher():
            self.run(*self._inputs(), enable_io_processing=False)

    def _inputs(self) -> list[Any]:
        symbols = {name: self._symbol(name, values) for name, values in self.call.symbols.items()}
        sizes = iter(self.call.sizes)
        return [self._input(s, next(sizes), symbols) if isinstance(s, TensorSpec) else s for s in self._specs()]

    def _specs(self) -> tuple[Any, ...]:
        return self.call.signature.inputs

    def _symbol(self, name: str, values: list[int | None]) -> Any:
        traced, low, high = values
        source = ConstantSource(name)
        bounds = StrictMinMaxConstraint(vr=ValueRanges(low, int_oo if high is None else high), warn_only=False)
        expr = self.shape_env.create_symbol(cast(int, traced), source, DimDynamic.DYNAMIC, bounds)
        return self.shape_env.create_symintnode(expr, hint=traced, source=source)

    def _input(self, spec: TensorSpec, sizes: list[Any], symbols: dict[str, Any]) -> Tensor:
        shape = [s if isinstance(s, int) else symbols[s[0]] * s[1] + s[2] for s in sizes]
        with self.mode:
            return torch.empty(shape, dtype=spec.torch_dtype)

    def run_node(self, n: Node) -> Any:
        with self.mode:
            result = super().run_node(n)
            if n.op == "get_attr" and isinstance(result, Tensor):
                result = self.mode.from_tensor(result, static_shapes=True)
        if n.op != "output":
            n.meta["val"] = result
        return result
