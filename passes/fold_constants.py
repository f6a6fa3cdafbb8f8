"""FoldConstants: what depends on constants only is computed once, at compile time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from fxcompress.ir import Program
from fxcompress.passbase import Context, Pass, Result

__all__ = ["FoldConstants"]

_RANDOM = torch.Tag.nondeterministic_seeded


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Compute once what depends on constants only (masks, position tables, ``arange``).

    Parameters and persistent buffers are left alone: the program stays trainable, and a state dict loaded later counts.

    Attributes:
        max_bytes: A result larger than this many bytes, and larger than its inputs, is left in the graph.
    """

    exact: ClassVar[bool] = True
    max_bytes: int = 16 << 20

    def run(self, program: Program, context: Context) -> Result:
        """Evaluate constant nodes; those read by the rest of the graph become non-persistent buffers."""
        values: dict[Node, Any] = {}
        kept = {name for name, _ in program.gm.named_parameters(remove_duplicate=False)}
        kept |= set(program.gm.state_dict(keep_vars=True))
        for node in program.graph.nodes:
            if node.op == "get_attr" and str(node.target) not in kept:
                values[node] = program.tensor(node)
            elif _is_constant_call(node, values):
                self._evaluate(node, values)
        return Result(program, [_freeze(program, n, v) for n, v in values.items() if _worth_freezing(n, v, values)])

    def _evaluate(self, node: Node, values: dict[Node, Any]) -> None:
        inputs = sum(_bytes(values[i]) for i in node.all_input_nodes)
        if _bytes(node.meta.get("val")) <= max(self.max_bytes, inputs):
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: values[n])
            with torch.no_grad():
                values[node] = cast(Any, node.target)(*args, **kwargs)


def _bytes(value: Any) -> int:
    """Size of a tensor (fake ones too) or of a list of tensors."""
    if isinstance(value, Tensor):
        return math.prod(value.shape) * value.element_size()
    return sum(_bytes(v) for v in value) if isinstance(value, (list, tuple)) else 0


def _is_constant_call(node: Node, values: dict[Node, Any]) -> bool:
    if node.op != "call_function" or any(i not in values for i in node.all_input_nodes):
        return False
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and (_RANDOM in target.tags or "empty" in target._schema.name):
        return False
    return _is_static(node.meta.get("val")) and not _holds_symbol((node.args, node.kwargs))


def _is_static(value: Any) -> bool:
    if isinstance(value, Tensor):
        return all(isinstance(s, int) for s in value.shape)
    if isinstance(value, (list, tuple)):
        return all(_is_static(v) for v in value)
    return isinstance(value, (int, float, bool))


def _holds_symbol(value: Any) -> bool:
    found: list[Any] = []
    torch.fx.node.map_aggregate(value, lambda v: found.append(v) if isinstance(v, torch.SymInt) else None)
    return bool(found)


def _worth_freezing(node: Node, value: Any, values: dict[Node, Any]) -> bool:
    return node.op == "call_function" and isinstance(value, Tensor) and any(u not in values for u in node.users)


def _freeze(program: Program, node: Node, value: Tensor) -> str:
    name = f"_constant_{node.name}".replace("__", "_")
    while hasattr(program.gm, name):
        name += "_"
    program.gm.register_buffer(name, value.detach().clone(memory_format=torch.contiguous_format), persistent=False)
    with program.graph.inserting_before(node):
        new = program.graph.get_attr(name)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    return f"computed {node.name}"
