"""From the graph ``torch.export`` hands out to a functional one: regions inlined, guards and in-place writes gone."""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from fxcompress.errors import CaptureError
from fxcompress.ir import source_line
from fxcompress.mutation import MutationError, Mutations, is_mutable, remove_mutation

__all__ = ["functional_graph", "inline_regions", "restore_batch_norm", "strip_guards"]

_aten = torch.ops.aten
_GUARDS = ("_assert", "sym_constrain", "_functional_assert", "_guards_fn", "_check")
_GRAD, _AUTOCAST = "wrap_with_set_grad_enabled", "wrap_with_autocast"
#: Make a tensor from sizes alone; of the tensor that ``new_*`` takes only dtype and device are read.
_FRESH = ("new_zeros", "new_ones", "new_full", "zeros", "ones", "full", "arange", "linspace", "eye", "scalar_tensor")


def functional_graph(exported: ExportedProgram) -> tuple[GraphModule, list[str]]:
    """The exported graph without regions, guards and in-place operators, and what had to be given up for it.

    Raises:
        CaptureError: the outputs depend on a buffer or parameter that forward writes.
    """
    gm = exported.module(check_guards=False)
    notes: list[str] = []
    try:
        mutations = _normalize(gm)
    except MutationError as error:
        notes.append(f"operators were decomposed, dropout is gone: {error}")
        gm = cast(GraphModule, exported.run_decompositions({}).module(check_guards=False))
        restore_batch_norm(gm)
        mutations = _normalize_again(gm)
    return gm, notes + _state_notes(gm, mutations)


def _normalize(gm: GraphModule) -> Mutations:
    inline_regions(gm)
    strip_guards(gm)
    _drop_dead(gm.graph)
    mutations = remove_mutation(gm)
    _fold_written_constants(gm, mutations.written)
    _drop_dead(gm.graph)
    return mutations


def _normalize_again(gm: GraphModule) -> Mutations:
    try:
        return _normalize(gm)
    except MutationError as error:
        raise CaptureError(
            5,
            "the model writes into tensors in a way that has no functional form",
            why=str(error),
            fix="write into a fresh tensor, or use the operator without the trailing underscore",
        ) from error


def _drop_dead(graph: Graph) -> None:
    graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output") or is_mutable(n))


def _state_notes(gm: GraphModule, mutations: Mutations) -> list[str]:
    """Writes into state are dropped with a note, unless an output depends on what was there before."""
    read = {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}
    carried = [f"{line}: {name}" for name, line in mutations.state.items() if name in read]
    if carried:
        raise CaptureError(
            3,
            "the model keeps state: its outputs depend on buffers that forward writes",
            where="\n         ".join(carried),
            why="a program computes its outputs from its inputs alone; every call would give the first call's result",
            fix="return the new state from forward and pass it in again, or update it outside forward",
        )
    return [f"forward writes {name} ({line}); the program does not" for name, line in mutations.state.items()]


# ------------------------------------------------------------------------------------------------ regions
def inline_regions(gm: GraphModule) -> None:
    """Replace ``no_grad`` and ``autocast(enabled=False)`` regions by their bodies, nested ones included.

    Results of a ``no_grad`` region that depend on parameters are detached, so that training sees the same gradients.

    Raises:
        MutationError: a region computes under autocast; its casts must be written out first.
    """
    while True:
        regions = [n for n in gm.graph.nodes if n.op == "call_function" and _name(n) in (_GRAD, _AUTOCAST)]
        if not regions:
            return
        trained = _trained(gm) if any(_stops_gradients(n) for n in regions) else set()
        for node in regions:
            if _name(node) == _AUTOCAST and node.args[2]:
                raise MutationError(f"{source_line(node) or node.name} computes under autocast")
            _inline(gm, node, trained)


def _name(node: Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _stops_gradients(node: Node) -> bool:
    return _name(node) == _GRAD and node.args[0] is False


def _trained(gm: GraphModule) -> set[Node]:
    """Nodes whose value depends on a parameter."""
    found: set[Node] = set()
    for node in gm.graph.nodes:
        is_parameter = node.op == "get_attr" and isinstance(operator.attrgetter(str(node.target))(gm), nn.Parameter)
        if is_parameter or any(i in found for i in node.all_input_nodes):
            found.add(node)
    return found


def _inline(gm: GraphModule, node: Node, trained: set[Node]) -> None:
    index = next(i for i, a in enumerate(node.args) if isinstance(a, Node) and a.op == "get_attr" and _is_body(gm, a))
    body_node = cast(Node, node.args[index])
    body = cast(GraphModule, gm.get_submodule(str(body_node.target)))
    inputs = list(node.args[index + 1 :])
    values: dict[Node, Any] = {}
    with gm.graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                values[inner] = inputs.pop(0)
            elif inner.op == "output":
                outputs = [values[v] if isinstance(v, Node) else v for v in _flat(inner.args[0])]
                stopped = trained if _stops_gradients(node) else set()
                _forward_outputs(gm.graph, node, [_detached(gm.graph, v) if v in stopped else v for v in outputs])
            else:
                new = values[inner] = gm.graph.node_copy(inner, lambda n: values[n])
                _adopt(gm, body, new)
                if any(i in trained for i in new.all_input_nodes):
                    trained.add(new)
    gm.graph.erase_node(node)
    if not body_node.users:
        gm.graph.erase_node(body_node)
        gm.delete_submodule(str(body_node.target))


def _is_body(gm: GraphModule, node: Node) -> bool:
    return isinstance(operator.attrgetter(str(node.target))(gm), GraphModule)


def _detached(graph: Graph, value: Node) -> Node:
    val = value.meta.get("val")
    if not isinstance(val, Tensor) or not (val.is_floating_point() or val.is_complex()):
        return value
    new = graph.call_function(_aten.detach.default, (value,))
    new.meta = dict(value.meta)
    return new


def _adopt(gm: GraphModule, body: GraphModule, node: Node) -> None:
    """A ``get_attr`` inside the body reads the body's own attributes: move them to the root."""
    if node.op != "get_attr":
        return
    value = operator.attrgetter(str(node.target))(body)
    name, count = f"_region_{node.name}", 0
    while hasattr(gm, name):
        count += 1
        name = f"_region_{node.name}_{count}"
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        gm.register_buffer(name, value, persistent=False)
    else:
        setattr(gm, name, value)
    node.target = name


def _flat(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _forward_outputs(graph: Graph, node: Node, outputs: list[Any]) -> None:
    for user in list(node.users):
        if user.target is operator.getitem:
            user.replace_all_uses_with(outputs[cast(int, user.args[1])])
            graph.erase_node(user)
    if node.users:
        node.replace_all_uses_with(outputs[0])


def strip_guards(gm: GraphModule) -> None:
    """Remove run-time assertions; sizes are checked when the program is called."""
    for node in reversed(list(gm.graph.nodes)):
        guard = node.op in ("call_function", "call_module") and any(g in _name(node) for g in _GUARDS)
        if guard and not node.users:
            gm.graph.erase_node(node)


def restore_batch_norm(gm: GraphModule) -> None:
    """Full functionalization splits ``batch_norm`` into a three-output operator: put the plain one back."""
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target is not _aten._native_batch_norm_legit_no_training.default:
            continue
        x, weight, bias, mean, var, momentum, eps = node.args
        with gm.graph.inserting_before(node):
            new = gm.graph.call_function(
                _aten.batch_norm.default, (x, weight, bias, mean, var, False, momentum, eps, True)
            )
        new.meta = {**node.meta, "val": node.meta["val"][0]}
        for user in list(node.users):
            user.replace_all_uses_with(new)
            gm.graph.erase_node(user)
        gm.graph.erase_node(node)


# ------------------------------------------------------------------------------------------------ constants
def _fold_written_constants(gm: GraphModule, written: set[Node]) -> None:
    """Compute once what was built from constants by in-place writes (Swin's attention masks): it becomes a buffer."""
    constant: set[Node] = set()
    touched: set[Node] = set()
    for node in gm.graph.nodes:
        if _is_constant(node, constant):
            constant.add(node)
            if node in written or any(i in touched for i in node.all_input_nodes):
                touched.add(node)
    values: dict[Node, Any] = {}
    for node in [n for n in gm.graph.nodes if n in touched and any(u not in touched for u in n.users)]:
        if isinstance(node.meta.get("val"), Tensor):
            _freeze(gm, node, _evaluate(gm, node, values), touched)


def _is_constant(node: Node, constant: set[Node]) -> bool:
    if node.op == "get_attr":
        return str(node.target).rpartition(".")[2].startswith(("lifted_tensor", "_tensor_constant"))
    if node.op != "call_function" or _has_symbol(node):
        return False
    if node.target is operator.getitem:
        return node.args[0] in constant
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded in node.target.tags:
        return False
    name = node.target._schema.name.split("::")[1]
    inputs = [n for n in node.all_input_nodes if n not in constant]
    if name in _FRESH:
        return not inputs or (name.startswith("new_") and inputs == [node.args[0]])
    return not inputs and bool(node.all_input_nodes)


def _has_symbol(node: Node) -> bool:
    val = node.meta.get("val")
    return isinstance(val, Tensor) and any(isinstance(s, torch.SymInt) for s in val.shape)


def _evaluate(gm: GraphModule, node: Node, values: dict[Node, Any]) -> Any:
    """The value of a constant node; its inputs are computed first, each once."""
    stack = [node]
    while stack:
        top = stack[-1]
        missing = [i for i in top.all_input_nodes if i not in values and not _is_model_of_new(top, i)]
        if missing and top not in values:
            stack += missing
            continue
        if stack.pop() not in values:
            values[top] = _compute(gm, top, values)
    return values[node]


def _is_model_of_new(node: Node, given: Node) -> bool:
    """True for the tensor that ``new_zeros`` takes its dtype and device from."""
    return "::new_" in str(getattr(node.target, "_schema", "")) and node.args[0] is given


def _compute(gm: GraphModule, node: Node, values: dict[Node, Any]) -> Any:
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(gm)

    def value(n: Node) -> Any:
        fake = n.meta["val"]
        return values[n] if n in values else torch.empty((0,), dtype=fake.dtype, device=fake.device)

    args, kwargs = map_arg((node.args, node.kwargs), value)
    return cast(Any, node.target)(*args, **kwargs)


def _freeze(gm: GraphModule, node: Node, value: Tensor, touched: set[Node]) -> None:
    name = f"_constant_{node.name}"
    gm.register_buffer(name, value.clone(), persistent=False)
    with gm.graph.inserting_before(node):
        new = gm.graph.get_attr(name)
    new.meta = dict(node.meta)
    for user in [u for u in node.users if u not in touched]:
        user.replace_input_with(node, new)
