"""A Program's graph as files: ``program.json`` for nodes and layers, ``weights.safetensors`` for tensors.

Reading runs no code from the files: operators come from ``torch.ops.aten`` and ``torch.ops.fxcompress`` or a fixed list
of Python functions, layers from a fixed list of classes, and their attributes are plain values.
"""

from __future__ import annotations

import json
import math
import operator
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from fxcompress import layers as own_layers
from fxcompress.errors import ArtifactError, EngineError
from fxcompress.ir import Program, source_line
from fxcompress.layers import Activation, TransposedLinear
from fxcompress.lowering.builder import tap_names
from fxcompress.quant.fake_quantize import DynamicFakeQuantize, FakeQuantize
from fxcompress.quant.sequence_layers import QuantizedEmbedding, QuantizedGRU, QuantizedLSTM
from fxcompress.quant.spec import QuantSpec

__all__ = ["GRAPH", "WEIGHTS", "describe_graph", "distinct", "make_graph", "make_module", "read_graph", "write_graph"]

GRAPH = "program.json"
WEIGHTS = "weights.safetensors"

_PYTHON: dict[str, Callable[..., Any]] = {
    **{
        f"operator.{n}": getattr(operator, n)
        for n in ["add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow", "getitem"]
    },
    **{f"operator.{n}": getattr(operator, n) for n in ["eq", "ne", "lt", "le", "gt", "ge", "and_", "or_"]},
    **{f"torch.{n}": getattr(torch, n) for n in ["sym_int", "sym_float", "sym_max", "sym_min", "sym_ite", "sym_not"]},
    **{f"math.{n}": getattr(math, n) for n in ["trunc", "floor", "ceil"]},
}
_PYTHON_NAMES = {function: name for name, function in _PYTHON.items()}
_NAMESPACES = ("aten", "fxcompress")
_REFUSED_OPERATORS = ("from_file",)  # the one ATen operator that opens files
_TORCH_LAYERS: tuple[type[nn.Module], ...] = (
    *(
        getattr(nn, f"{kind}{d}d")
        for kind in ("Conv", "ConvTranspose", "BatchNorm", "InstanceNorm", "Dropout")
        for d in (1, 2, 3)
    ),
    *(
        nn.Linear,
        nn.LayerNorm,
        nn.GroupNorm,
        nn.Embedding,
        nn.LSTM,
        nn.GRU,
        nn.Dropout,
        nn.AlphaDropout,
        nn.FeatureAlphaDropout,
    ),
    *(TransposedLinear, FakeQuantize, DynamicFakeQuantize, QuantizedEmbedding, QuantizedGRU, QuantizedLSTM),
)
_LAYERS: dict[str, type[nn.Module]] = {
    **{kind.__name__: kind for kind in _TORCH_LAYERS},
    **{
        name: kind
        for name, kind in vars(own_layers).items()
        if isinstance(kind, type) and issubclass(kind, own_layers.Fused)
    },
}
#: Attributes of torch's own bookkeeping and of training.
_SKIPPED = ("observer", "_flat_weight_refs", "_flat_weights")


# ------------------------------------------------------------------------------------------------ writing
def write_graph(program: Program, folder: Path) -> dict[str, str]:
    """Write both files; returns tap name -> node name.

    Raises:
        EngineError: a layer or an argument has no file form.
    """
    from safetensors.torch import save_file

    content, tensors = describe_graph(program)
    first, aliases = distinct(tensors)
    save_file({n: t.detach().clone(memory_format=torch.contiguous_format) for n, t in first.items()}, folder / WEIGHTS)
    (folder / GRAPH).write_text(json.dumps(content | {"aliases": aliases}, allow_nan=False), encoding="utf-8")
    return {tap: node.name for node, tap in tap_names(program).items() if _yields_tensor(node)}


def describe_graph(program: Program) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Nodes, outputs and layers as plain JSON, and the tensors they use by name (not copied).

    Raises:
        EngineError: a layer or an argument has no file form.
    """
    tensors: dict[str, Tensor] = {}
    modules: dict[str, Any] = {}
    nodes = [_node_json(program, node, tensors, modules) for node in program.graph.nodes if node.op != "output"]
    outputs = [_arg_json(o) for o in program.outputs()]
    return {"nodes": nodes, "outputs": outputs, "modules": modules}, tensors


def _yields_tensor(node: Node) -> bool:
    return node.op in ("call_module", "call_function") and isinstance(node.meta.get("val"), Tensor)


def _node_json(program: Program, node: Node, tensors: dict[str, Tensor], modules: dict[str, Any]) -> dict[str, Any]:
    if node.op == "call_module":
        _module_json(program.module(node), str(node.target), tensors, modules)
    elif node.op == "get_attr":
        tensors[str(node.target)] = program.tensor(node)
    try:
        args, kwargs = [_arg_json(a) for a in node.args], {k: _arg_json(v) for k, v in node.kwargs.items()}
        return {"name": node.name, "op": node.op, "target": _target_name(node), "args": args, "kwargs": kwargs}
    except _NoFileForm as error:
        where = f"%{node.name} {source_line(node)}".strip()
        raise EngineError(30, "the program cannot be written to a file", where=where, why=str(error)) from None


def _target_name(node: Node) -> str:
    target = node.target
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload) and target.namespace in _NAMESPACES:
        return str(target)
    if target in _PYTHON_NAMES:
        return _PYTHON_NAMES[target]
    raise _NoFileForm(f"{target} belongs to no known library")


class _NoFileForm(Exception):
    """A value that has no place in the file."""


def _module_json(module: nn.Module, path: str, tensors: dict[str, Tensor], modules: dict[str, Any]) -> None:
    if path in modules:
        return
    kind = type(module).__name__
    if _LAYERS.get(kind) is not type(module):
        raise EngineError(
            31, f"a layer of type {kind} cannot be written to a file", where=path, fix="use PyTorch's own layers"
        )
    plain = {k: v for k, v in vars(module).items() if not k.startswith("_") or k in _private(module)}
    modules[path] = {
        "kind": kind,
        "attributes": {k: _arg_json(v) for k, v in plain.items() if k not in _SKIPPED and not isinstance(v, nn.Module)},
        "empty": [n for n, t in (*module._parameters.items(), *module._buffers.items()) if t is None],
    }
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        tensors[f"{path}.{name}"] = tensor
    for name, child in module._modules.items():
        if child is not None and name.endswith("_fake_quantize"):
            _module_json(child, f"{path}.{name}", tensors, modules)


def _private(module: nn.Module) -> tuple[str, ...]:
    names = ("_reversed_padding_repeated_twice", "_flat_weights_names", "_all_weights")
    return tuple(n for n in names if n in vars(module))


def distinct(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor once under its first name, and further name -> first name."""
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(id(tensor), name)
    aliases = {name: first[id(tensor)] for name, tensor in tensors.items() if first[id(tensor)] != name}
    return {name: tensor for name, tensor in tensors.items() if name not in aliases}, aliases


def _arg_json(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, list):
        return [_arg_json(v) for v in value]
    for kind, tag, encode in _TAGGED:
        if isinstance(value, kind):
            return {tag: encode(value)}
    raise _NoFileForm(f"a value of type {type(value).__name__}")


def _spec_fields(spec: QuantSpec) -> dict[str, Any]:
    return {k: getattr(spec, k) for k in ("bits", "signed", "symmetric", "axis", "qmin", "qmax", "group_size")}


_TAGGED: tuple[tuple[Any, str, Callable[[Any], Any]], ...] = (
    (Node, "node", lambda v: v.name),
    (tuple, "tuple", lambda v: [_arg_json(x) for x in v]),
    (dict, "dict", lambda v: [[_arg_json(k), _arg_json(x)] for k, x in v.items()]),
    (torch.dtype, "dtype", lambda v: str(v).removeprefix("torch.")),
    (torch.device, "device", str),
    (torch.layout, "layout", lambda v: str(v).removeprefix("torch.")),
    (torch.memory_format, "memory_format", lambda v: str(v).removeprefix("torch.")),
    (slice, "slice", lambda v: [_arg_json(x) for x in (v.start, v.stop, v.step)]),
    (QuantSpec, "spec", _spec_fields),
    (Activation, "activation", lambda v: _arg_json((v.name, v.args, v.kwargs))),
)


# ------------------------------------------------------------------------------------------------ reading
def read_graph(folder: Path, device: torch.device | None = None) -> GraphModule:
    """The graph of `write_graph`: flat inputs as arguments, flat outputs as a tuple, eval mode.

    Args:
        folder: Where the files lie.
        device: Put tensors there, and new ones that the graph makes on another kind of device; None: main memory.

    Raises:
        ArtifactError: a file is damaged, or names an operator or layer that is not on the lists.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        content = json.loads((folder / GRAPH).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS, device=str(device or "cpu"))
        if device is not None:
            content = _moved(content, str(device))
        tensors |= {name: tensors[first] for name, first in content["aliases"].items()}
        root = _tree(content, tensors)
        return GraphModule(root, make_graph(content, root), class_name="Program").eval()
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(27, "the program's files cannot be read", why=f"{type(error).__name__}: {error}") from error


def _moved(value: Any, device: str) -> Any:
    """The file's content with every device replaced."""
    if isinstance(value, list):
        return [_moved(v, device) for v in value]
    if isinstance(value, dict):
        return {k: device if k == "device" and isinstance(v, str) else _moved(v, device) for k, v in value.items()}
    return value


def _tree(content: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    root = nn.Module()
    for path, entry in content["modules"].items():
        _put(root, path, make_module(path, entry, tensors))
    for node in content["nodes"]:
        if node["op"] == "get_attr":
            owner, _, leaf = node["target"].rpartition(".")
            _container(root, owner).register_buffer(leaf, tensors[node["target"]])
    return root


def make_module(path: str, entry: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    """The layer that ``entry`` of the file describes; the ``tensors`` below ``path`` become its buffers."""
    if entry["kind"] not in _LAYERS:
        raise ArtifactError(22, f"the file names an unknown layer {entry['kind']!r}", where=path)
    module = object.__new__(_LAYERS[entry["kind"]])
    nn.Module.__init__(module)
    for name, value in entry["attributes"].items():
        module.__dict__[name] = _arg(value, {})
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        if owner == path:
            module.register_buffer(leaf, tensor)
    for name in entry["empty"]:
        module.register_buffer(name, None)
    if isinstance(module, FakeQuantize):
        module.observer = None
    if isinstance(module, nn.RNNBase):
        module._flat_weights = [getattr(module, n) for n in module._flat_weights_names]
        module._flat_weight_refs = [weakref.ref(cast(Any, w)) for w in module._flat_weights]
    return module


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, leaf = path.rpartition(".")
    holder = _container(root, owner)
    existing = holder._modules.get(leaf)
    if existing is not None:
        module._modules.update(existing._modules)
    holder.__dict__.pop(leaf, None)
    holder._modules[leaf] = module


def _container(root: nn.Module, path: str) -> nn.Module:
    for part in path.split(".") if path else []:
        if part not in root._modules:
            root.__dict__.pop(part, None)
            root._modules[part] = nn.Module()
        child = root._modules[part]
        assert child is not None
        root = child
    return root


def make_graph(content: dict[str, Any], root: nn.Module) -> Graph:
    """The graph over ``root`` that the file describes: flat inputs, flat outputs.

    Raises:
        ArtifactError: it names an operation that is not on the lists.
    """
    graph = Graph(root)  # type: ignore[arg-type]
    values: dict[str, Node] = {}
    for entry in content["nodes"]:
        target = _target(entry["op"], entry["target"])
        args = tuple(_arg(a, values) for a in entry["args"])
        kwargs = {k: _arg(v, values) for k, v in entry["kwargs"].items()}
        values[entry["name"]] = graph.create_node(entry["op"], target, args, kwargs, name=entry["name"])
    graph.output(tuple(_arg(o, values) for o in content["outputs"]))
    graph.lint()
    return graph


def _target(op: str, name: str) -> Any:
    if op in ("placeholder", "call_module", "get_attr"):
        return name
    if op == "call_function" and name in _PYTHON:
        return _PYTHON[name]
    namespace, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    if op != "call_function" or namespace not in _NAMESPACES or packet in _REFUSED_OPERATORS:
        raise ArtifactError(23, f"the file names an operation that is not allowed: {op} {name!r}")
    found = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    if not isinstance(found, torch._ops.OpOverload) or found._schema.is_mutable:
        raise ArtifactError(23, f"the file names an operation that is not allowed: {op} {name!r}")
    return found


def _arg(value: Any, values: dict[str, Node]) -> Any:
    if isinstance(value, list):
        return [_arg(v, values) for v in value]
    if not isinstance(value, dict):
        return value
    ((tag, inner),) = value.items()
    return _DECODE[tag](inner, values)


def _torch_constant(kind: type) -> Callable[[Any, Any], Any]:
    def decode(name: str, _: Any) -> Any:
        found = getattr(torch, name)
        if not isinstance(found, kind):
            raise ArtifactError(24, f"the file names {name!r} as a {kind.__name__}")
        return found

    return decode


def _decode_activation(inner: Any, values: dict[str, Node]) -> Activation:
    name, args, kwargs = _arg(inner, values)
    if name not in own_layers.ACTIVATIONS:
        raise ArtifactError(25, f"the file names an unknown activation {name!r}")
    return Activation(name, args, kwargs)


_DECODE: dict[str, Callable[[Any, dict[str, Node]], Any]] = {
    "node": lambda v, values: values[v],
    "tuple": lambda v, values: tuple(_arg(x, values) for x in v),
    "dict": lambda v, values: {_arg(k, values): _arg(x, values) for k, x in v},
    "float": lambda v, values: float(v),
    "dtype": _torch_constant(torch.dtype),
    "layout": _torch_constant(torch.layout),
    "memory_format": _torch_constant(torch.memory_format),
    "device": lambda v, values: torch.device(v),
    "slice": lambda v, values: slice(*(_arg(x, values) for x in v)),
    "spec": lambda v, values: QuantSpec(**v),
    "activation": _decode_activation,
}
