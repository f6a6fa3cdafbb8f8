"""Passes for the tests of the contract: good ones, and one for every way to break it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import nn
from torch.fx import Node

from fxcompress.errors import PassError
from fxcompress.ir import Program
from fxcompress.passbase import Context, Pass, Result

aten = torch.ops.aten


def nodes(program: Program, target: Any) -> list[Node]:
    """Calls of ``target`` in execution order."""
    return [n for n in program.graph.nodes if n.op == "call_function" and n.target is target]


@dataclass(frozen=True)
class SiluToSigmoidMul(Pass):
    """A user's own exact pass: ``silu(x)`` becomes ``x * sigmoid(x)``."""

    exact: ClassVar[bool] = True
    limit: int = 1000

    def run(self, program: Program, context: Context) -> Result:
        result = Result(program)
        for node in nodes(program, aten.silu.default)[: self.limit]:
            with program.graph.inserting_before(node):
                gate = program.graph.call_function(aten.sigmoid.default, node.args)
                product = program.graph.call_function(aten.mul.Tensor, (node.args[0], gate))
            gate.meta, product.meta = dict(node.meta), dict(node.meta)
            node.replace_all_uses_with(product)
            program.graph.erase_node(node)
            result.changes.append(f"split {node.name}")
        return result


@dataclass(frozen=True)
class RoundWeights(Pass):
    """A user's own lossy pass: weights on a grid of ``step``; refuses to run twice."""

    exact: ClassVar[bool] = False
    step: float = 0.05

    def requires(self, program: Program, context: Context) -> None:
        if all(bool((p == self._rounded(p)).all()) for p in program.gm.parameters()):
            raise PassError(50, "the weights are rounded already")

    def _rounded(self, weight: torch.Tensor) -> torch.Tensor:
        return torch.round(weight / self.step) * self.step

    def run(self, program: Program, context: Context) -> Result:
        for _, layer in program.layers():
            for name, p in list(layer._parameters.items()):
                if p is not None:
                    layer._parameters[name] = nn.Parameter(self._rounded(p.detach()))
        return Result(program, ["rounded"])


@dataclass(frozen=True)
class Idle(Pass):
    """Changes nothing, and claims that it did."""

    def run(self, program: Program, context: Context) -> Result:
        return Result(program, ["nothing at all"], modified=True)


@dataclass(frozen=True)
class BreakOutputs(Pass):
    """Claims to be exact and adds ``amount`` to the input of every ReLU."""

    exact: ClassVar[bool] = True
    amount: float = 0.5

    def run(self, program: Program, context: Context) -> Result:
        changes = []
        for node in nodes(program, aten.relu.default):
            with program.graph.inserting_before(node):
                new = program.graph.call_function(aten.add.Tensor, (node.args[0], self.amount))
            new.meta = dict(node.meta)
            node.args = (new,)
            changes.append(f"shifted {node.name}")
        return Result(program, changes)


@dataclass(frozen=True)
class Raise(Pass):
    """Rewrites half of the graph, then fails."""

    def run(self, program: Program, context: Context) -> Result:
        for node in nodes(program, aten.relu.default)[:1]:
            node.target = aten.neg.default
        raise KeyError("a bug in the pass")


@dataclass(frozen=True)
class WriteInPlace(Pass):
    """Writes into a tensor that the input program shares; with ``data`` behind autograd's back."""

    data: bool = False

    def run(self, program: Program, context: Context) -> Result:
        parameter = next(program.gm.parameters())
        with torch.no_grad():
            (parameter.data if self.data else parameter).mul_(2)
        return Result(program)


@dataclass(frozen=True)
class DropMetadata(Pass):
    """Inserts a node without a shape."""

    def run(self, program: Program, context: Context) -> Result:
        for node in nodes(program, aten.relu.default):
            with program.graph.inserting_before(node):
                node.args = (program.graph.call_function(aten.clone.default, node.args),)
        return Result(program)


@dataclass(frozen=True)
class LieAboutShapes(Pass):
    """Swaps two dimensions and back, with metadata that tells nothing of it."""

    def run(self, program: Program, context: Context) -> Result:
        for node in nodes(program, aten.relu.default):
            if cast(Node, node.args[0]).target is aten.transpose.int:
                continue
            with program.graph.inserting_before(node):
                there = program.graph.call_function(aten.transpose.int, (node.args[0], -1, -2))
            with program.graph.inserting_after(node):
                back = program.graph.call_function(aten.transpose.int, (node, -1, -2))
            there.meta, back.meta = dict(node.meta), dict(node.meta)
            node.replace_all_uses_with(back)
            back.args = (node, -1, -2)
            node.args = (there,)
        return Result(program)


@dataclass(frozen=True)
class NeverIdle(Pass):
    """Exact, but changes something each time it runs."""

    def run(self, program: Program, context: Context) -> Result:
        for node in nodes(program, aten.relu.default)[-1:]:
            with program.graph.inserting_before(node):
                new = program.graph.call_function(aten.relu.default, node.args)
            new.meta = dict(node.meta)
            node.args = (new,)
        return Result(program, ["one more relu"])


@dataclass(frozen=True)
class FixBatch(Pass):
    """Burns the batch of the example into the graph: right on the example, wrong on any other batch."""

    def run(self, program: Program, context: Context) -> Result:
        for node in nodes(program, aten.relu.default)[-1:]:
            if any(user.target is aten.view.default for user in node.users):
                continue
            shape = program.run_example()[0].shape
            with program.graph.inserting_after(node):
                new = program.graph.call_function(aten.view.default, (node, list(shape)))
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            new.args = (node, list(shape))
        return Result(program)


@dataclass(frozen=True)
class Forgetful(Pass):
    """Its recipe entry does not hold its options."""

    amount: int = 1

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name}

    def run(self, program: Program, context: Context) -> Result:
        return Result(program)


@dataclass(frozen=True)
class Twice(Pass):
    """Holds another pass, as a user's combinator does."""

    inner: Pass = Idle()

    def run(self, program: Program, context: Context) -> Result:
        return self.inner(self.inner(program, context).program, context)
