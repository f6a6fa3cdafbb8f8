"""Programs in 16-bit floating point: which nodes can compute in it, and the casts around them."""

from __future__ import annotations

import fnmatch
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node
from torch.fx.node import map_aggregate, map_arg

from fxcompress.ir import Program, evaluating, node_path
from fxcompress.quant.fake_quantize import QUANTIZERS
from fxcompress.vocabulary import tokens_checked

__all__ = ["Range", "Ranges", "names_of", "observe", "to_half", "wide_nodes"]

#: Half of float16's largest number: unseen data reaches further than what was observed.
LIMIT = torch.finfo(torch.float16).max / 2
#: Half of float16's smallest number; what is smaller becomes zero.
TINY = 2.0**-25
_to = torch.ops.aten.to.dtype


@dataclass
class Range:
    """What was seen of a value: its largest finite magnitude, and how many of its values that are not zero are tiny."""

    largest: float = 0.0
    tiny: int = 0
    count: int = 0

    def add(self, x: Tensor) -> None:
        """Take the values of ``x`` into account."""
        size = x.detach().abs()
        size = size[size.isfinite() & (size > 0)]
        if size.numel():
            self.largest = max(self.largest, float(size.max()))
            self.tiny += int((size < TINY).sum())
            self.count += size.numel()

    @property
    def problem(self) -> str:
        """Why float16 cannot hold the value; empty when it can."""
        if self.largest > LIMIT:
            return f"its values reach {self.largest:.3g}"
        return f"most of its values are below {TINY:.0e}" if 2 * self.tiny > self.count else ""


@dataclass
class Ranges:
    """What was seen of a program's float values.

    Attributes:
        values: Of the value (or values) a node makes.
        weights: Of the parameters and buffers a layer holds.
    """

    values: dict[Node, Range] = field(default_factory=dict)
    weights: dict[Node, Range] = field(default_factory=dict)

    def problem(self, node: Node) -> str:
        """Why a node cannot compute in float16: what it holds, makes or reads; empty when it can."""
        seen = [self.weights.get(node), *(self.values.get(n) for n in (node, *node.all_input_nodes))]
        return next((r.problem for r in seen if r is not None and r.problem), "")


class _Observer(Interpreter):
    def __init__(self, program: Program) -> None:
        super().__init__(program.gm)
        self.extra_traceback = False  # an error of a model names its line already
        self.ranges: dict[Node, Range] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor) and value.is_floating_point():
                self.ranges.setdefault(n, Range()).add(value)
        return result


def observe(program: Program, calls: Iterable[tuple[tuple[Any, ...], dict[str, Any]]]) -> Ranges:
    """Ranges of all float values of a program, weights included, over some calls."""
    observer = _Observer(program)
    with torch.no_grad(), evaluating(program.gm):
        for number, (args, kwargs) in enumerate(calls):
            with tokens_checked(program, number):
                observer.run(*program.signature.flatten(args, kwargs), enable_io_processing=False)
    found = Ranges(observer.ranges)
    for node, module in program.layers():
        for tensor in _own_tensors(module):
            found.weights.setdefault(node, Range()).add(tensor)
    return found


def wide_nodes(program: Program, keep: Sequence[str], ranges: Ranges | None) -> dict[Node, str]:
    """Nodes that stay in float32, with the reason.

    A node does when it is asked for, when it makes or reads a value that float16 cannot hold (``ranges``), uses such a
    number, or makes new float32 values (their dtype is written in the call).
    """
    found: dict[Node, str] = {}
    for node in program.graph.nodes:
        if node.op in ("call_module", "call_function") and _floats(node):
            reason = _reason(node, keep, ranges)
            if reason:
                found[node] = reason
    return found


def names_of(node: Node) -> tuple[str, str]:
    """What a node is called by: the layer or the value, and the user's module that it is in."""
    return (str(node.target) if node.op == "call_module" else node.name, node_path(node))


def _reason(node: Node, keep: Sequence[str], ranges: Ranges | None) -> str:
    if any(fnmatch.fnmatchcase(name, glob) for name in names_of(node) for glob in keep):
        return "asked to be kept"
    if ranges is not None:
        if problem := ranges.problem(node):
            return problem
        if any(0 < abs(x) < TINY or LIMIT < abs(x) < float("inf") for x in _numbers(node)):
            return "it uses a number that float16 does not have"
    if node.op == "call_function" and node.target is not operator.getitem:
        makes = not any(_floats(i) for i in node.all_input_nodes)
        if makes or torch.float32 in (*node.args, *node.kwargs.values()):
            return "made in float32"
    return ""


def _numbers(node: Node) -> list[float]:
    found: list[float] = []
    map_aggregate((node.args, node.kwargs), lambda v: found.append(v) if isinstance(v, float) else None)
    return found


def _floats(node: Node) -> bool:
    """True when the node's value is a float32 tensor, or a list that holds one."""
    val = node.meta.get("val")
    values = val if isinstance(val, (list, tuple)) else (val,)
    return any(isinstance(v, Tensor) and v.dtype == torch.float32 for v in values)


def _own_tensors(module: nn.Module) -> list[Tensor]:
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return [] if isinstance(module, QUANTIZERS) else [t for t in own if t.dtype == torch.float32]


# ------------------------------------------------------------------------------------------------ rewriting
def to_half(program: Program, dtype: torch.dtype, wide: dict[Node, str]) -> list[str]:
    """Let every float32 node that is not in ``wide`` compute in ``dtype``; inputs and outputs stay as they are.

    Args:
        program: Changed in place: casts are inserted, parameters of 16-bit layers replaced.
        dtype: float16 or bfloat16.
        wide: Nodes that stay.

    Returns:
        Names of the nodes that compute in ``dtype``.
    """
    return _Rewriter(program, dtype, wide).run()


class _Rewriter:
    def __init__(self, program: Program, dtype: torch.dtype, wide: dict[Node, str]) -> None:
        self.program, self.dtype = program, dtype
        self.wide = set(wide)
        self.casts: dict[tuple[Node, torch.dtype], Node] = {}
        self.replaced: dict[int, Tensor] = {}

    def run(self) -> list[str]:
        nodes = list(self.program.graph.nodes)
        kept = {id(self.program.module(n)) for n in nodes if n.op == "call_module" and n in self.wide}
        for node in nodes:  # a layer that is called twice has one dtype
            if node.op == "call_module" and id(self.program.module(node)) in kept:
                self.wide.add(node)
        narrow = [n for n in nodes if n.op in ("call_module", "call_function") and self._narrows(n)]
        for node in narrow:
            if node.op == "call_module":
                self._narrow_layer(self.program.module(node))
            node.meta["val"] = _retyped(node.meta["val"], self.dtype)
        halves = set(narrow)
        for node in nodes:
            if node.op == "get_attr" and _floats(node) and self._narrow_constant(node, halves, kept):
                halves.add(node)
                node.meta["val"] = _retyped(node.meta["val"], self.dtype)
        for node in nodes:
            self._cast_inputs(node, halves)
        return [str(n.target) if n.op == "call_module" else n.name for n in narrow]

    def _narrows(self, node: Node) -> bool:
        if node.target is operator.getitem:
            source = cast(Node, node.args[0])
            return source not in self.wide and _floats(source) and _floats(node)
        return node not in self.wide and _floats(node)

    def _narrow_layer(self, module: nn.Module) -> None:
        if isinstance(module, QUANTIZERS):
            return
        for holder in (module._parameters, module._buffers):
            for name, tensor in list(holder.items()):
                if tensor is not None and tensor.dtype == torch.float32:
                    setattr(module, name, self._narrowed(tensor))

    def _narrow_constant(self, node: Node, halves: set[Node], kept: set[int]) -> bool:
        """Make what a ``get_attr`` node reads 16-bit, when only 16-bit nodes read it; True when it is."""
        tensor = self.program.tensor(node)
        if tensor.dtype == self.dtype:
            return True  # a 16-bit layer has it as well
        owner, _, name = str(node.target).rpartition(".")
        module = self.program.gm.get_submodule(owner)
        if id(module) in kept or not all(user in halves for user in node.users):
            return False
        setattr(module, name, self._narrowed(tensor))
        return True

    def _narrowed(self, tensor: Tensor) -> Tensor:
        """The 16-bit copy of a parameter or buffer; tied ones stay tied."""
        if id(tensor) not in self.replaced:
            copy = tensor.detach().to(self.dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            self.replaced[id(tensor)] = nn.Parameter(copy, tensor.requires_grad) if is_parameter else copy
        return self.replaced[id(tensor)]

    def _cast_inputs(self, node: Node, halves: set[Node]) -> None:
        """Casts in front of a node whose inputs have the other dtype; float32 in front of the output."""
        if node.op in ("placeholder", "get_attr") or node.target is operator.getitem:
            return
        wanted = self.dtype if node in halves else torch.float32
        read = partial(self._as, dtype=wanted, halves=halves)
        node.args = cast("tuple[Any, ...]", map_arg(node.args, read))
        node.kwargs = cast("dict[str, Any]", map_arg(node.kwargs, read))

    def _as(self, value: Node, dtype: torch.dtype, halves: set[Node]) -> Node:
        val = value.meta.get("val")
        have = self.dtype if value in halves else torch.float32
        if not isinstance(val, Tensor) or val.dtype not in (self.dtype, torch.float32) or have == dtype:
            return value
        if value not in halves and val.dtype != torch.float32:
            return value  # a 16-bit value of the user's own
        if (value, dtype) not in self.casts:
            anchor = self.program.placeholders()[-1] if value.op == "placeholder" else value
            with self.program.graph.inserting_after(anchor):
                name = f"{value.name}_{str(dtype).removeprefix('torch.')}"
                made = self.program.graph.create_node("call_function", _to, (value, dtype), {}, name=name)
            made.meta = dict(value.meta)
            made.meta["val"] = _retyped(val, dtype)
            self.casts[value, dtype] = made
        return self.casts[value, dtype]


def _retyped(val: Any, dtype: torch.dtype) -> Any:
    """A fake value, or several, with float32 replaced."""
    if isinstance(val, (list, tuple)):
        return type(val)(_retyped(v, dtype) for v in val)
    return val.to(dtype) if isinstance(val, Tensor) and val.is_floating_point() else val
