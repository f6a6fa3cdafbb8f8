"""Clean-up passes: identities, common subexpressions, dead code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxcompress.ir import Program
from fxcompress.passbase import Context, Pass, Result

__all__ = ["EliminateCommonSubexpressions", "EliminateDeadCode", "RemoveIdentity"]

_aten = torch.ops.aten
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
#: Random, or with a state that a call in training mode changes: two calls are not one.
_STATEFUL = (*_DROPOUTS, nn.modules.batchnorm._NormBase, nn.RNNBase)
_DROPOUT_FUNCTIONS = {_aten.dropout.default, _aten.feature_dropout.default, _aten.alpha_dropout.default}
#: Copies that may also lay the values out anew, which a view behind relies on.
_COPIES = {
    _aten.contiguous.default, _aten.clone.default, _aten._to_copy.default, _aten.to.dtype_layout,
    _aten.lift_fresh_copy.default,
}  # fmt: skip
#: Give their first input when neither shape nor dtype nor device changes.
_NO_OPS = _COPIES | {
    _aten.view.default, _aten.reshape.default, _aten.expand.default, _aten.flatten.using_ints, _aten.squeeze.dim,
    _aten.slice.Tensor, _aten.to.dtype, _aten.to.device, _aten.detach.default, _aten.alias.default,
}  # fmt: skip
_NEUTRAL = {
    _aten.add.Tensor: 0, _aten.sub.Tensor: 0, _aten.mul.Tensor: 1, _aten.div.Tensor: 1, _aten.pow.Tensor_Scalar: 1
}  # fmt: skip


@dataclass(frozen=True)
class RemoveIdentity(Pass):
    """Remove dropout and what does nothing in eval mode.

    That is: identities, copies, casts to the same dtype, views and slices of the same shape, ``x + 0``, ``x * 1``,
    concats of one tensor.
    Meant for deployment: dropout is gone afterwards.
    """

    exact: ClassVar[bool] = True

    def run(self, program: Program, context: Context) -> Result:
        """Bypass every such node."""
        changes = []
        for node in list(program.graph.nodes):
            if is_identity(program, node):
                node.replace_all_uses_with(node.all_input_nodes[0])
                program.graph.erase_node(node)
                changes.append(f"removed {node.name}")
        return Result(program, changes)


def is_dropout(program: Program, node: Node) -> bool:
    """True for a dropout layer: the identity in eval mode only."""
    return node.op == "call_module" and isinstance(program.module(node), _DROPOUTS)


def is_identity(program: Program, node: Node) -> bool:
    """True for what gives its first input in eval mode."""
    if node.target is _aten.cat.default:
        return isinstance(node.args[0], (list, tuple)) and len(node.args[0]) == 1
    if not node.args or not isinstance(node.args[0], Node):
        return False
    if node.op == "call_module":
        return isinstance(program.module(node), (*_DROPOUTS, nn.Identity))
    if node.target in _DROPOUT_FUNCTIONS:
        return node.args[2:] == (False,)
    if node.target in _COPIES and any(user.target is _aten.view.default for user in node.users):
        return False
    return (node.target in _NO_OPS or _is_neutral(node)) and _same(node)


def _is_neutral(node: Node) -> bool:
    if node.target not in _NEUTRAL or len(node.args) != 2 or node.kwargs:
        return False
    operand = node.args[1]
    plain = isinstance(operand, (int, float)) and not isinstance(operand, bool)
    return plain and bool(operand == _NEUTRAL[cast(Any, node.target)])


def _same(node: Node) -> bool:
    """True when input and output agree in shape, dtype, device and, where known, memory layout."""
    a, b = cast(Node, node.args[0]).meta.get("val"), node.meta.get("val")
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return False
    if (a.dtype, a.device, a.layout) != (b.dtype, b.device, b.layout):
        return False
    # As text: comparing symbolic sizes would put guards on them.
    return str(a.shape) == str(b.shape) and str(a.stride()) == str(b.stride())


@dataclass(frozen=True)
class EliminateCommonSubexpressions(Pass):
    """Compute equal expressions once (same function, same inputs; nothing random, nothing with state)."""

    exact: ClassVar[bool] = True

    def run(self, program: Program, context: Context) -> Result:
        """One walk in execution order; a repeated node is replaced by its first occurrence."""
        seen: dict[Any, Node] = {}
        changes = []
        for node in list(program.graph.nodes):
            key = _expression(program, node)
            first = node if key is None else seen.setdefault(key, node)
            if first is not node:
                node.replace_all_uses_with(first)
                program.graph.erase_node(node)
                changes.append(f"{node.name} = {first.name}")
        return Result(program, changes)


def _expression(program: Program, node: Node) -> Any:
    """A key that equal expressions share; None for what must not be merged."""
    if node.op not in ("call_function", "get_attr", "call_module"):
        return None
    if node.op == "call_module" and any(isinstance(m, _STATEFUL) for m in program.module(node).modules()):
        return None
    if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags:
        return None
    key = (node.op, node.target, _hashable(node.args), _hashable(node.kwargs))
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _hashable(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *(_hashable(v) for v in value))
    if isinstance(value, dict):
        return tuple((k, _hashable(v)) for k, v in value.items())
    if isinstance(value, slice):
        return ("slice", _hashable(value.start), _hashable(value.stop), _hashable(value.step))
    if isinstance(value, float):
        return (float, repr(value))  # 0.0 and -0.0 are equal and not the same
    return value if isinstance(value, Node) else (type(value), value)


@dataclass(frozen=True)
class EliminateDeadCode(Pass):
    """Remove what no output needs, and the tensors and submodules that the graph no longer uses."""

    exact: ClassVar[bool] = True

    def run(self, program: Program, context: Context) -> Result:
        """Dead nodes first, then unused tensors and modules."""
        before = {n.name for n in program.graph.nodes}
        program.recompile()
        changes = [f"removed {n}" for n in sorted(before - {n.name for n in program.graph.nodes})]
        return Result(program, changes + _Sweep(program).run())


class _Sweep:
    """Deletes from the module tree what neither ``call_module`` nor ``get_attr`` reaches."""

    def __init__(self, program: Program) -> None:
        self.root = program.gm
        self.called = {str(n.target) for n in program.graph.nodes if n.op == "call_module"}
        read = {str(n.target) for n in program.graph.nodes if n.op == "get_attr"}
        self.holders = {"", *(prefix for target in self.called | read for prefix in _prefixes(target))}
        # By object: a module that sits at two paths keeps what is read under either.
        self.leaves = {(id(self.root.get_submodule(t.rpartition(".")[0])), t.rpartition(".")[2]) for t in read}
        self.kept = {id(m) for path in self.called for m in self.root.get_submodule(path).modules()}
        self.dropped: list[str] = []

    def run(self) -> list[str]:
        self._sweep(self.root, "")
        return [f"dropped {name}" for name in self.dropped]

    def _sweep(self, module: nn.Module, prefix: str) -> None:
        if id(module) not in self.kept:
            for store in (module._parameters, module._buffers):
                for name in [n for n, t in store.items() if t is not None and (id(module), n) not in self.leaves]:
                    del store[name]
                    self.dropped.append(prefix + name)
        for name, child in list(module._modules.items()):
            path = prefix + name
            if child is None or path in self.called:
                continue
            if path in self.holders:
                self._sweep(child, f"{path}.")
            else:
                del module._modules[name]
                self.dropped.append(path)


def _prefixes(target: str) -> list[str]:
    parts = target.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]
