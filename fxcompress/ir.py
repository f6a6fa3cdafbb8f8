"""Program: one captured model in the normal form every pass reads and writes.

Normal form of ``program.gm.graph``:

* ``placeholder`` nodes first, one per flattened input; one ``output`` node last;
* ``call_module`` for layers that own parameters (convolutions, linear, norms, embeddings, LSTM/GRU), for dropout, and
  for what passes insert (fused layers, ``FakeQuantize``); the module sits under the user's own path;
* ``get_attr`` for a parameter, buffer or constant that is used without a layer;
* ``call_function`` with a functional ATen overload, or Python arithmetic on symbolic sizes; no in-place operator;
* every node that yields a tensor has ``meta["val"]`` (a fake tensor: shape, dtype, symbolic sizes).
"""

from __future__ import annotations

import copy
import inspect
import math
import operator
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from fxcompress.errors import NormalFormError, UsageError
from fxcompress.sizes import check_inputs, fixed_size

__all__ = ["Program", "Signature", "clone_tree", "node_path", "source_line"]

_SYM_FUNCTIONS: frozenset[Any] = frozenset(
    {
        *(
            getattr(operator, name)
            for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow", "getitem")
        ),
        *(getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_")),
        *(getattr(torch, name) for name in ("sym_int", "sym_float", "sym_max", "sym_min", "sym_ite", "sym_not")),
        math.trunc,
        math.floor,
        math.ceil,
    }
)


def node_path(node: Node) -> str:
    """Dotted path of the user's submodule that ran ``node``; ``""`` for the model itself."""
    stack = node.meta.get("nn_module_stack")
    return next(reversed(stack.values()))[0] if stack else ""


def source_line(node: Node) -> str:
    """``file:line`` in the user's code that made ``node``, or ``""``."""
    found = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    user = [f for f in found if "/torch/nn/modules/" not in f[0]]
    path, line = (user or found or [("", "")])[-1]
    return f"{path}:{line}" if path else ""


@dataclass(frozen=True)
class Signature:
    """How the captured model is called and what it returns.

    Attributes:
        names: Name of each top-level input, positional ones first.
        n_positional: How many of ``names`` were given by position at capture.
        in_spec: Tree of ``(args, kwargs)``.
        out_spec: Tree of the output.
    """

    names: tuple[str, ...]
    n_positional: int
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec

    def arrange(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Sort inputs given by position or by name into the ``(args, kwargs)`` of the captured call.

        Raises:
            UsageError: an input is missing, unknown or given twice.
        """
        if len(args) > len(self.names):
            raise UsageError(
                10, f"the program takes {len(self.names)} inputs, {len(args)} were given", fix=self._usage()
            )
        bound = dict(zip(self.names, args, strict=False))
        twice = sorted(set(bound) & set(kwargs))
        bound |= kwargs
        missing = [n for n in self.names if n not in bound]
        unknown = [n for n in bound if n not in self.names]
        if missing or unknown or twice:
            trouble = [
                f"{t} {', '.join(n)}" for t, n in (("missing", missing), ("unknown", unknown), ("twice", twice)) if n
            ]
            raise UsageError(11, f"inputs do not fit the captured call: {'; '.join(trouble)}", fix=self._usage())
        ordered = [bound[n] for n in self.names]
        cut = self.n_positional
        return tuple(ordered[:cut]), dict(zip(self.names[cut:], ordered[cut:], strict=True))

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Flat inputs, one per placeholder. Raises UsageError when the structure is not the captured one."""
        call = self.arrange(args, kwargs)
        try:
            return list(self.in_spec.flatten_up_to(call))
        except ValueError as error:
            what = "the structure of the inputs is not the captured one"
            raise UsageError(
                12, what, why=str(error), fix="nest tuples, lists and dicts as in the captured example"
            ) from error

    def unflatten(self, leaves: list[Any]) -> Any:
        """The output in the structure the user's model returns."""
        return pytree.tree_unflatten(leaves, self.out_spec)

    def _usage(self) -> str:
        return f"call it as program({', '.join(self.names)})"


@dataclass
class Program:
    """A captured model: callable, printable, trainable, and the thing passes rewrite.

    Attributes:
        gm: The graph in normal form. An ordinary module: ``state_dict`` keys are the user's.
        signature: Structure of inputs and outputs.
        example: ``(args, kwargs)`` the program was captured with; used for verification.
        notes: What capture had to give up (for example a batch size it could not keep dynamic), one line each.
        history: The pruning plans that were applied since capture, oldest first, as plain JSON types.
    """

    gm: GraphModule
    signature: Signature
    example: tuple[tuple[Any, ...], dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self.checked_call(args, kwargs)
        return self.gm(*args, **kwargs)

    def checked_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of ``gm`` for a call. Raises UsageError when it does not fit the captured one."""
        leaves = self.signature.flatten(args, kwargs)
        check_inputs(self.placeholders(), leaves)
        return cast(tuple[tuple[Any, ...], dict[str, Any]], pytree.tree_unflatten(leaves, self.signature.in_spec))

    @property
    def graph(self) -> Graph:
        """The torch.fx graph of ``gm``."""
        return self.gm.graph

    def placeholders(self) -> list[Node]:
        """Input nodes in flattened order."""
        return [n for n in self.graph.nodes if n.op == "placeholder"]

    def outputs(self) -> list[Any]:
        """Flattened output values: nodes, or constants."""
        node = next(iter(reversed(self.graph.nodes)))
        return list(pytree.tree_leaves(node.args[0]))

    def module(self, node: Node) -> nn.Module:
        """The module a ``call_module`` node runs."""
        return self.gm.get_submodule(str(node.target))

    def layers(self) -> Iterator[tuple[Node, nn.Module]]:
        """Every ``call_module`` node with its module, in execution order."""
        for node in self.graph.nodes:
            if node.op == "call_module":
                yield node, self.module(node)

    def tensor(self, node: Node) -> torch.Tensor:
        """The parameter, buffer or constant a ``get_attr`` node reads."""
        return cast(torch.Tensor, operator.attrgetter(str(node.target))(self.gm))

    def clone(self) -> Program:
        """A copy to rewrite: graph and module objects are new, tensors are shared."""
        gm = _clone_gm(self.gm)
        return Program(gm, self.signature, self.example, list(self.notes), list(self.history))

    def run_example(self) -> list[Any]:
        """Flat outputs for the example inputs, in eval mode without gradients; the training mode is restored."""
        with torch.no_grad(), evaluating(self.gm):
            return list(pytree.tree_leaves(self(*self.example[0], **self.example[1])))

    def recompile(self) -> None:
        """Drop dead nodes and regenerate the Python code after graph edits."""
        self.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
        self.graph.lint()
        self.gm.recompile()

    def dynamic_dims(self) -> dict[str, dict[int, str]]:
        """Dynamic dimensions of each input: ``{"x": {0: "s0"}}``."""
        found = {}
        for node in self.placeholders():
            val = node.meta.get("val")
            if isinstance(val, torch.Tensor):
                dims = {i: str(s) for i, s in enumerate(val.shape) if fixed_size(s) is None}
                found[node.name] = dims
        return found

    def verify(self) -> None:
        """Check the normal form. Raises NormalFormError naming the node and the user's line."""
        self.graph.lint()
        for node in self.graph.nodes:
            problem = self._problem(node)
            if problem:
                raise NormalFormError(1, problem, where=f"%{node.name} ({source_line(node) or node.op})")

    def _problem(self, node: Node) -> str:
        if node.op == "call_module":
            return _module_problem(self.gm, node)
        if node.op == "get_attr":
            return "" if _has_attr(self.gm, str(node.target)) else f"get_attr target {node.target!r} does not exist"
        if node.op == "call_function":
            return _function_problem(node)
        return "" if node.op in ("placeholder", "output") else f"{node.op} nodes are not part of the normal form"

    def text(self) -> str:
        """The graph as deterministic text: one node a line with ``dtype[shape]``, no addresses."""
        symbols: dict[str, str] = {}
        return "\n".join(_line(self, node, symbols) for node in self.graph.nodes) + "\n"

    def __str__(self) -> str:
        return self.text()


class evaluating:
    """Context manager: a module in eval mode; the mode of every submodule is restored on exit."""

    def __init__(self, module: nn.Module) -> None:
        self._modes = [(m, m.training) for m in module.modules()]

    def __enter__(self) -> None:
        for module, _ in self._modes:
            module.training = False

    def __exit__(self, *exc: object) -> None:
        for module, mode in self._modes:
            module.training = mode


@contextmanager
def differentiating(module: nn.Module) -> Iterator[None]:
    """Context manager: a module in eval mode, with gradients; modes are restored on exit."""
    recurrent = any(isinstance(m, nn.RNNBase) for m in module.modules())
    # cuDNN differentiates recurrent layers in training mode only.
    cudnn = torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled and not recurrent)
    with torch.inference_mode(False), torch.enable_grad(), evaluating(module), cudnn:
        yield


def clone_tree(module: nn.Module, memo: dict[int, nn.Module] | None = None) -> nn.Module:
    """Copy a module tree: new module objects, the same tensors; a module used at two places stays one."""
    memo = {} if memo is None else memo
    if id(module) in memo:
        return memo[id(module)]
    new = memo[id(module)] = object.__new__(type(module))
    new.__dict__.update(module.__dict__)
    for name in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
        new.__dict__[name] = copy.copy(module.__dict__[name])
    if isinstance(module, nn.RNNBase):  # setting a weight writes into this list
        new.__dict__["_flat_weights"] = list(module.__dict__["_flat_weights"])
    new.__dict__["_modules"] = {n: None if m is None else clone_tree(m, memo) for n, m in module._modules.items()}
    return new


def build_gm(tree: nn.Module, graph: Graph) -> GraphModule:
    """A GraphModule over ``graph`` that owns all of ``tree``, used by the graph or not."""
    gm = GraphModule(tree, graph, class_name="Program")
    for name in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
        gm.__dict__[name] = tree.__dict__[name]
    return gm


def _clone_gm(gm: GraphModule) -> GraphModule:
    graph = Graph()
    values: dict[Node, Node] = {}
    output = graph.graph_copy(gm.graph, values, return_output_node=True)
    assert isinstance(output, tuple)
    graph.output(output[0])
    for new in graph.nodes:
        if new.op == "output":
            new.meta = dict(output[1].meta)
    graph._codegen = copy.copy(gm.graph._codegen)
    tree = nn.Module()
    memo: dict[int, nn.Module] = {}
    tree.__dict__["_parameters"] = dict(gm._parameters)
    tree.__dict__["_buffers"] = dict(gm._buffers)
    tree.__dict__["_non_persistent_buffers_set"] = set(gm._non_persistent_buffers_set)
    tree.__dict__["_modules"] = {n: None if m is None else clone_tree(m, memo) for n, m in gm._modules.items()}
    new_gm = build_gm(tree, graph)
    new_gm.training = gm.training
    new_gm._state_dict_hooks.update(gm._state_dict_hooks)
    new_gm._load_state_dict_pre_hooks.update(gm._load_state_dict_pre_hooks)
    return new_gm


def _has_attr(root: nn.Module, target: str) -> bool:
    try:
        operator.attrgetter(target)(root)
    except AttributeError:
        return False
    return True


def _module_problem(gm: GraphModule, node: Node) -> str:
    try:
        gm.get_submodule(str(node.target))
    except AttributeError:
        return f"call_module target {node.target!r} does not exist"
    return "" if "val" in node.meta else f"layer {node.target} has no shape metadata"


def _function_problem(node: Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        if target._schema.is_mutable:
            return f"in-place operator {target} is not part of the normal form"
        return "" if "val" in node.meta else f"{target} has no shape metadata"
    return "" if target in _SYM_FUNCTIONS else f"function {target} is not an ATen overload"


def _line(program: Program, node: Node, symbols: dict[str, str]) -> str:
    args = [_arg(a, symbols) for a in node.args] + [f"{k}={_arg(v, symbols)}" for k, v in node.kwargs.items()]
    if node.op == "output":
        return f"return {args[0]}"
    kind = _kind(program, node)
    call = f"{kind}({', '.join(args)})" if node.op != "placeholder" else kind
    return f"%{node.name} = {call}  # {_value_text(node.meta.get('val'), symbols)}"


def _kind(program: Program, node: Node) -> str:
    if node.op == "placeholder":
        return "input"
    if node.op == "get_attr":
        return f"get_attr[{node.target}]"
    if node.op == "call_module":
        return f"{node.target}:{_module_text(program.module(node))}"
    return str(node.target) if isinstance(node.target, torch._ops.OpOverload) else getattr(node.target, "__name__", "?")


def _module_text(module: nn.Module) -> str:
    describe: Callable[[], str] = getattr(module, "describe", None) or (
        lambda: f"{type(module).__name__}[{module.extra_repr()}]"
    )
    return describe()


def _arg(value: Any, symbols: dict[str, str]) -> str:
    if isinstance(value, Node):
        return f"%{value.name}"
    if isinstance(value, (list, tuple)):
        inner = ", ".join(_arg(v, symbols) for v in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_arg(v, symbols)}" for k, v in value.items()) + "}"
    return _symbol(value, symbols) if isinstance(value, torch.SymInt) else repr(value)


def _symbol(value: Any, symbols: dict[str, str]) -> str:
    text = str(value)
    for name in re.findall(r"\b[su]\d+\b", text):
        symbols.setdefault(name, f"d{len(symbols)}")
    return re.sub(r"\b[su]\d+\b", lambda m: symbols[m.group(0)], text)


def _value_text(value: Any, symbols: dict[str, str]) -> str:
    if isinstance(value, torch.Tensor):
        sizes = ", ".join(_symbol(s, symbols) for s in value.shape)
        return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(_value_text(v, symbols) for v in value) + ")"
    return _symbol(value, symbols) if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) else repr(value)


def nonfinite_tensors(program: Program) -> list[str]:
    """Names of the parameters, and of the buffers in the state dict, that hold NaN or infinity."""
    state = program.gm.state_dict()
    return [n for n, t in state.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]


def forward_names(module: nn.Module) -> list[str]:
    """Parameter names of ``module.forward`` in order; empty when it cannot be read (``*args``)."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
