"""Residual streams: sums of what embeddings and layers write, read through RMS norms (or directly) by linear layers.

Such a stream may be rotated, because the norm of a rotated vector is that of the vector: whoever writes rotates what it
writes, whoever reads rotates it back, and norms in between do not notice, once their weights are the readers' business.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxcompress.ir import Program
from fxcompress.layers import Fused
from fxcompress.quant.placement import layer_kind
from fxcompress.rewrite import Analysis

__all__ = ["Gain", "Stream", "find_streams"]

_aten = torch.ops.aten
#: Give back what they are given, for evaluation.
_PASSIVE = {_aten.to, _aten.clone, _aten.contiguous, _aten.alias, _aten.detach, _aten.dropout}
_KEEPING = (nn.Dropout, nn.Identity)


@dataclass(frozen=True)
class Gain:
    """The weight of a norm: ``name`` of ``holder``, and the linear layers that read the norm."""

    holder: nn.Module
    name: str
    readers: tuple[Node, ...]


@dataclass
class Stream:
    """A residual stream.

    Attributes:
        size: Its width.
        values: Its nodes.
        embeddings: Nodes that write rows of a table into it.
        writers: Linear layers that write into it.
        readers: Linear layers that read it, directly or behind a norm.
        gains: Weights of the norms.
        problem: Why it cannot be rotated; empty when it can.
    """

    size: int
    values: set[Node] = field(default_factory=set)
    embeddings: list[Node] = field(default_factory=list)
    writers: list[Node] = field(default_factory=list)
    readers: list[Node] = field(default_factory=list)
    gains: list[Gain] = field(default_factory=list)
    problem: str = ""


def find_streams(program: Program) -> list[Stream]:
    """Every stream that an RMS norm reads, with what keeps it from being rotated."""
    analysis, found, seen = Analysis(program), [], set[Node]()
    for node in program.graph.nodes:
        source = _norm_input(program, node)
        if source is not None and source not in seen:
            stream = _Walker(analysis, int(node.meta["val"].shape[-1])).walk(source)
            seen |= stream.values
            found.append(stream)
    return found


def _packet(node: Node) -> Any:
    return getattr(node.target, "overloadpacket", None)


def _norm_input(program: Program, node: Node) -> Node | None:
    """What ``node`` normalizes: an RMS norm, or the product ``x * rsqrt(mean(x^2) + eps)``."""
    if node.op == "call_module":
        return cast(Node, node.args[0]) if isinstance(program.module(node), nn.RMSNorm) else None
    if _packet(node) is _aten.rms_norm and len(cast(Any, node.args[1])) == 1:
        return cast(Node, node.args[0])
    if _packet(node) is not _aten.mul:
        return None
    for x, inverse in (node.args[:2], node.args[1::-1]):
        if isinstance(x, Node) and isinstance(inverse, Node) and _square_root_of(inverse) is x:
            return x
    return None


def _square_root_of(node: Node) -> Node | None:
    """``x`` when ``node`` is ``rsqrt(mean(x^2, -1, keepdim) + eps)``."""
    if _packet(node) is not _aten.rsqrt:
        return None
    total = cast(Node, node.args[0])
    mean = total.args[0] if _packet(total) is _aten.add and not isinstance(total.args[1], Node) else None
    if not isinstance(mean, Node) or mean.target is not _aten.mean.dim or list(cast(Any, mean.args[1])) != [-1]:
        return None
    square = cast(Node, mean.args[0])
    if _packet(square) is _aten.pow and square.args[1] == 2:
        return cast(Node, square.args[0])
    if _packet(square) is _aten.square or (_packet(square) is _aten.mul and square.args[0] is square.args[1]):
        return cast(Node, square.args[0])
    return None


class _Walker:
    def __init__(self, analysis: Analysis, size: int) -> None:
        self.analysis, self.program = analysis, analysis.program
        self.stream = Stream(size)

    def walk(self, start: Node) -> Stream:
        waiting = [start]
        while waiting and not self.stream.problem:
            value = waiting.pop()
            if value in self.stream.values:
                continue
            self.stream.values.add(value)
            waiting += self._made(value)
            for user in value.users:
                waiting += self._read(value, user)
        for kind in (self.stream.embeddings, self.stream.writers, self.stream.readers):
            kind[:] = dict.fromkeys(kind)
        return self.stream

    def _fail(self, reason: str) -> list[Node]:
        self.stream.problem = self.stream.problem or reason
        return []

    # ------------------------------------------------------------------------------------------------ made by
    def _made(self, value: Node) -> list[Node]:
        """Further values of the stream that ``value`` is made of."""
        shape = value.meta["val"].shape
        if shape[-1] != self.stream.size:
            return self._fail(f"{value.name} has {shape[-1]} features, not {self.stream.size}")
        if value.op == "call_module":
            return self._made_by_module(value, self.program.module(value))
        packet = _packet(value)
        if packet in _PASSIVE:
            return [cast(Node, value.args[0])]
        if packet is _aten.add and not value.kwargs and all(isinstance(a, Node) for a in value.args):
            return [cast(Node, a) for a in value.args]
        name = "it is an input of the model" if value.op == "placeholder" else f"{value.name} ({value.target}) makes it"
        return self._fail(name)

    def _made_by_module(self, value: Node, module: nn.Module) -> list[Node]:
        if isinstance(module, _KEEPING):
            return [cast(Node, value.args[0])]
        if isinstance(module, nn.Embedding):
            self.stream.embeddings.append(value)
        elif layer_kind(self.program, value) == "linear":
            self.stream.writers.append(value)
        else:
            return self._fail(f"{value.target} ({type(module).__name__}) writes into it")
        return self._usable(value, module)

    def _usable(self, node: Node, module: nn.Module) -> list[Node]:
        if self.analysis.calls(node) > 1:
            return self._fail(f"{node.target} is called more than once")
        if isinstance(module, Fused) and (module.activation or module.weight_fake_quantize or len(node.args) > 1):
            return self._fail(f"{node.target} is fused or quantized")
        return []

    # ------------------------------------------------------------------------------------------------ read by
    def _read(self, value: Node, user: Node) -> list[Node]:
        """Further values of the stream that ``user`` makes of ``value``."""
        if _norm_input(self.program, user) is value:
            self._norm(user)
            return []
        if user.op == "call_module":
            return self._read_by_module(value, user, self.program.module(user))
        packet = _packet(user)
        if packet in _PASSIVE or packet is _aten.add:
            return [user]
        if _is_square(value, user):
            return []
        return self._fail(f"{user.name} ({user.target}) reads it")

    def _read_by_module(self, value: Node, user: Node, module: nn.Module) -> list[Node]:
        if isinstance(module, _KEEPING):
            return [user]
        if layer_kind(self.program, user) == "linear" and user.args[0] is value:
            self.stream.readers.append(user)
            return self._usable(user, module)
        why = ", which takes the mean out" if isinstance(module, nn.LayerNorm) else ""
        return self._fail(f"{user.target} ({type(module).__name__}) reads it{why}")

    def _norm(self, node: Node) -> None:
        """Readers behind a norm, and the weight it has."""
        outputs = _behind(node)
        place: tuple[nn.Module, str] | None = None
        if node.op == "call_module":
            module: Any = self.program.module(node)
            if len(module.normalized_shape) != 1 or self.analysis.calls(node) > 1:
                self._fail(f"{node.target} is called more than once, or normalizes several dimensions")
                return
            place = (module, "weight") if module.weight is not None else None
        elif _packet(node) is _aten.rms_norm:
            weight = node.args[2] if len(node.args) > 2 else None
            place = self._vector(weight)
            if weight is not None and place is None:
                self._fail(f"the weight of {node.name} is computed or shared")
                return
        elif len(outputs) == 1 and _packet(outputs[0]) is _aten.mul:
            place = next((found for a in outputs[0].args[:2] if (found := self._vector(a))), None)
            outputs = outputs if place is None else _behind(outputs[0])
        readers = [o for o in outputs if layer_kind(self.program, o) == "linear" and o.op == "call_module"]
        others = [o for o in outputs if o not in readers]
        if others:
            self._fail(f"{others[0].name} ({others[0].target}) reads the norm {node.name}")
            return
        for reader in readers:
            self.stream.readers.append(reader)
            self._usable(reader, self.program.module(reader))
        if place is not None:
            self.stream.gains.append(Gain(*place, tuple(readers)))

    def _vector(self, operand: Any) -> tuple[nn.Module, str] | None:
        """Module and name of a parameter over the features that is read here alone."""
        if not isinstance(operand, Node) or operand.op != "get_attr" or len(operand.users) != 1:
            return None
        value: Tensor = self.program.tensor(operand)
        path, _, name = str(operand.target).rpartition(".")
        reads = [n for n in self.program.graph.nodes if n.op == "get_attr" and self.program.tensor(n) is value]
        if len(reads) != 1 or tuple(value.shape) != (self.stream.size,):
            return None
        return self.program.gm.get_submodule(path), name


def _is_square(value: Node, user: Node) -> bool:
    """True for the part of a norm that squares: the norm itself is looked at where it multiplies."""
    roots = [n for n in value.users if _packet(n) is _aten.mul]
    return any(
        isinstance(a, Node) and _square_root_of(a) is value and user in _ancestors(a) for n in roots for a in n.args
    )


def _ancestors(inverse: Node) -> list[Node]:
    """The nodes of ``rsqrt(mean(x^2) + eps)``, from behind, when nothing else reads them."""
    found = [inverse]
    while len(found) < 4:
        found.append(cast(Node, found[-1].args[0]))
    return found if all(len(n.users) == 1 for n in found) else []


def _behind(node: Node) -> list[Node]:
    """The users of ``node``; those that only pass it on, or cut other dimensions than the last, are looked through."""
    found: list[Node] = []
    for user in node.users:
        last = user.meta["val"].dim() - 1 if isinstance(user.meta.get("val"), Tensor) else -1
        cut = _packet(user) is _aten.slice and (user.args[1] if len(user.args) > 1 else 0) not in (-1, last)
        found += _behind(user) if cut or _packet(user) in _PASSIVE else [user]
    return list(dict.fromkeys(found))
