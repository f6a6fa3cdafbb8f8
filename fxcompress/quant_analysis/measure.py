"""The measurements behind a quantization report: float and rounded program side by side, one call at a time.

For every call the float values and the rounded values advance node by node. At a quantized layer its result is also
computed with its own rounding alone, and the float program is run on from there to the outputs: that is the error this
layer causes alone. In memory are the values alive at one node (three times, for the three runs) and sums of fixed size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxcompress.data import Call
from fxcompress.errors import CalibrationError
from fxcompress.ir import Program, evaluating, source_line
from fxcompress.quant_analysis.subjects import Runner, Subject, Values
from fxcompress.quant_analysis.tally import Channels, Energy, ValueTally

__all__ = ["Measured", "Totals", "measure"]


@dataclass
class Measured:
    """Sums of one subject.

    Attributes:
        subject: What was measured.
        data: Its first input, or the value itself.
        output: Its result, everything of it rounded, on float inputs.
        by_weight: The same with the weight rounded only; nothing where no input is rounded.
        by_input: The same with the inputs rounded only.
        accumulated: Its result in the rounded program against that in the float program.
        alone: Error of each output of the program when nothing else is rounded.
        calls: How often it was run.
    """

    subject: Subject
    data: ValueTally
    output: Energy = field(default_factory=Energy)
    by_weight: Energy = field(default_factory=Energy)
    by_input: Energy = field(default_factory=Energy)
    accumulated: Energy = field(default_factory=Energy)
    alone: list[Energy] = field(default_factory=list)
    calls: int = 0


@dataclass
class Totals:
    """Errors of the outputs with everything rounded: against the float run, and against a reference."""

    outputs: list[Energy] = field(default_factory=list)
    reference: list[Energy] = field(default_factory=list)


def measure(
    runner: Runner,
    subjects: Sequence[Subject],
    calls: Iterable[Call],
    *,
    alone: int,
    outputs: Sequence[int],
    reference: Program | None,
    advance: Callable[[], None],
) -> tuple[list[Measured], Totals]:
    """Run everything.

    Args:
        runner: Of the quantized program.
        subjects: Its subjects.
        calls: Checked calls.
        alone: Samples for which the float program is run on behind every subject.
        outputs: Which flat outputs are compared.
        reference: The float program the quantized one was made from; its outputs are compared too.
        advance: Called after every subject of every call.

    Raises:
        CalibrationError: the model fails on a call.
    """
    found = [Measured(s, ValueTally(Channels(_channel_axis(s)))) for s in subjects]
    walk = _Walk(runner, found, [cast(Node, runner.program.outputs()[i]) for i in outputs], advance)
    totals, seen = Totals(), 0
    with torch.no_grad(), evaluating(runner.program.gm):
        for number, call in enumerate(calls):
            leaves = runner.program.signature.flatten(*call)
            try:
                exact, rounded = walk.run(leaves, forks=seen < alone)
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                why, where = f"{type(error).__name__}: {error}", source_line(walk.at) or f"%{walk.at.name}"
                raise CalibrationError(310, f"the model fails on batch {number}", where=where, why=why) from error
            _add(totals.outputs, rounded, exact)
            if reference is not None:
                _add(totals.reference, rounded, _outputs(reference, call, outputs))
            seen += max((v.shape[0] for v in leaves if isinstance(v, Tensor) and v.dim()), default=1)
    return found, totals


def _outputs(program: Program, call: Call, which: Sequence[int]) -> list[Tensor]:
    from torch.utils import _pytree as pytree

    with evaluating(program.gm):
        leaves = pytree.tree_leaves(program(*call[0], **call[1]))
    return [cast(Tensor, leaves[i]) for i in which]


def _add(sums: list[Energy], got: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    if not sums:
        sums.extend(Energy() for _ in got)
    for energy, a, b in zip(sums, got, exact, strict=True):
        energy.add(a, b)


class _Walk:
    """One call after the other through the float and the rounded program."""

    def __init__(self, runner: Runner, found: list[Measured], ends: list[Node], advance: Callable[[], None]) -> None:
        self.runner, self.ends, self.advance = runner, ends, advance
        self.of = {node: m for m in found for node in m.subject.nodes}
        self.at = runner.order[0]

    def run(self, leaves: list[Any], forks: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs of the float and of the rounded program; ``forks``: measure what every subject causes alone."""
        exact = self._float_outputs(leaves) if forks else None
        floats: Values = {}
        rounds: Values = {}
        for node in self.runner.order:
            if node.op == "output":
                break
            self.at = node
            measured = self.of.get(node)
            floats[node] = self.runner.floated(node, floats, leaves)
            rounds[node] = self.runner.rounded(node, rounds, leaves)
            if measured is not None:
                self._local(measured, node, floats, exact)
                _compare(measured.accumulated, rounds[node], floats[node])
                if measured.subject.nodes[-1] is node:
                    self.advance()
            self.runner.forget(node, floats)
            self.runner.forget(node, rounds)
        return [floats[n] for n in self.ends], [rounds[n] for n in self.ends]

    def _float_outputs(self, leaves: list[Any]) -> list[Tensor]:
        values: Values = {}
        for node in self.runner.order:
            if node.op != "output":
                values[node] = self.runner.floated(node, values, leaves)
                self.runner.forget(node, values)
        return [values[n] for n in self.ends]

    def _local(self, measured: Measured, node: Node, floats: Values, exact: list[Tensor] | None) -> None:
        """Measure a call of a subject whose inputs and float result are there."""
        subject, runner = measured.subject, self.runner
        source = cast(Node, node.args[0])
        if isinstance(floats[source], Tensor) and floats[source].is_floating_point():
            measured.data.add(floats[source], _data_quantizer(runner.program, subject, node, source))
        plain, whole = floats[node], runner.alone(subject, node, floats)
        _compare(measured.output, whole, plain)
        if not subject.is_value and set(subject.inputs[node]) - subject.weights:
            _compare(measured.by_weight, runner.alone(subject, node, floats, inputs=False), plain)
            _compare(measured.by_input, runner.alone(subject, node, floats, weight=False), plain)
        measured.calls += 1
        if exact is not None and subject.nodes[0] is node:
            ends = runner.rest(subject, node, whole, floats)
            _add(measured.alone, [ends[n] for n in self.ends], exact)


def _compare(energy: Energy, got: Any, exact: Any) -> None:
    """Add a result: its tensor, or the first one of several."""
    while isinstance(got, (tuple, list)) and got:
        got, exact = got[0], exact[0]
    if isinstance(got, Tensor) and got.is_floating_point():
        energy.add(got, exact)


def _data_quantizer(program: Program, subject: Subject, node: Node, source: Node) -> nn.Module | None:
    return program.module(node) if subject.is_value else subject.inputs[node].get(source)


def _channel_axis(subject: Subject) -> int:
    """Where the channels of what it reads lie."""
    if "conv" in subject.kind:
        return 1
    value = cast(Node, subject.nodes[0].args[0]).meta.get("val")
    return 1 if subject.is_value and isinstance(value, Tensor) and value.dim() == 4 else -1
