"""The rewriter: what rules are told, that it ends, that it stays linear."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from fxcompress.capture import capture
from fxcompress.errors import PassError
from fxcompress.ir import Program, Signature
from fxcompress.passbase import Context
from fxcompress.passes import FoldBatchNorm, FuseActivations
from fxcompress.rewrite import Analysis, Match, Rule, apply_rules, drop_layer, put_layer, single_user

aten = torch.ops.aten


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.c.weight = self.b.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(self.b(self.a(self.a(x))))
        return y + y  # type: ignore[no-any-return]


def nodes(program: Program) -> dict[str, Node]:
    return {n.name: n for n in program.graph.nodes}


def test_analysis() -> None:
    program = capture(Model(), (torch.randn(2, 3),))
    found, by_name = Analysis(program), nodes(program)
    assert found.calls(by_name["a"]) == found.calls(by_name["a_1"]) == 2
    assert found.calls(by_name["b"]) == 1
    assert found.shared_with(by_name["a"]) is None
    assert found.shared_with(by_name["b"]) == "c" and found.shared_with(by_name["c"]) == "b"
    put_layer(program, "a", nn.Linear(3, 3))
    assert found.calls(by_name["a"]) == 2, "a layer put at an old path keeps the count"


def test_single_user_counts_reads() -> None:
    """``y + y`` is one user that reads twice."""
    by_name = nodes(capture(Model(), (torch.randn(2, 3),)))
    assert single_user(by_name["a"]) and single_user(by_name["add"])
    assert not single_user(by_name["c"])


def test_put_and_drop_layer() -> None:
    program = capture(nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3))), (torch.randn(2, 3),))
    drop_layer(program, "1.0")
    assert set(program.gm.state_dict()) == {"0.weight", "0.bias"}
    layer = nn.Linear(3, 3)
    layer.add_module("slope", nn.PReLU())
    put_layer(program, "0", layer)
    drop_layer(program, "0")
    assert set(program.gm.state_dict()) == {"0.slope.weight"}


def rule(before: object, after: object) -> Rule:
    def match(program: Program, node: Node) -> Match | None:
        return Match(node, {"node": node}) if node.target is before else None

    def replace(program: Program, found: Match) -> str:
        found["node"].target = after
        return found["node"].name

    return Rule(f"{before} to {after}", match, lambda analysis, found: None, replace)


def test_rules_that_undo_each_other_are_an_error() -> None:
    program = capture(nn.ReLU(), (torch.randn(2, 3),))
    rules = (rule(aten.relu.default, aten.tanh.default), rule(aten.tanh.default, aten.relu.default))
    with pytest.raises(PassError, match="do not come to rest"):
        apply_rules(program, rules)


def test_first_rule_wins_and_refusals_are_those_of_the_last_round() -> None:
    program = capture(nn.Sequential(nn.ReLU(), nn.Tanh()), (torch.randn(2, 3),))
    no = Rule("never", rule(aten.relu.default, None).match, lambda analysis, found: "because", lambda p, m: "")
    rules = (no, rule(aten.relu.default, aten.sigmoid.default), rule(aten.tanh.default, aten.relu.default))
    changes, refusals = apply_rules(program, rules)
    assert [n.target for n in program.graph.nodes if n.op == "call_function"] == [aten.sigmoid.default] * 2
    assert len(changes) == 3 and refusals == []


def chain(blocks: int) -> Program:
    """Conv-norm-ReLU ``blocks`` times in a row, built without export."""
    torch.manual_seed(0)
    small = capture(nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU()).eval(), (torch.rand(2, 2, 3, 3),))
    program = small.clone()
    *_, conv, norm, relu, output = program.graph.nodes
    last = relu
    with program.graph.inserting_before(output):
        for index in range(1, blocks):
            for node, layer in ((conv, nn.Conv2d(2, 2, 1)), (norm, nn.BatchNorm2d(2).eval()), (relu, None)):
                copy = program.graph.node_copy(node, lambda _: last)  # noqa: B023  used at once
                if layer is not None:
                    copy.target = f"block{index}_{node.name}"
                    program.gm.add_module(copy.target, layer)
                last = copy
    output.args = ((last,),)
    program.recompile()
    program.gm.eval()
    program.verify()
    return program


def seconds(blocks: int) -> float:
    program = chain(blocks)
    start = time.process_time()
    folded = FoldBatchNorm()(program, Context(verify=False))
    fused = FuseActivations()(folded.program, Context(verify=False))
    spent = time.process_time() - start
    assert len(folded.changes) == len(fused.changes) == blocks
    assert sum(n.op == "call_module" for n in fused.program.graph.nodes) == blocks
    return spent


def test_rewriting_is_linear() -> None:
    """1,000 blocks (3,000 nodes) cost no more than seven times what 200 cost; quadratic would be 25 times."""
    seconds(20)
    ratios = (seconds(1000) / seconds(200) for _ in range(4))  # measured side by side: other work comes and goes
    assert any(ratio < 7 for ratio in ratios)


def test_signature_is_shared() -> None:
    program = capture(nn.ReLU(), (torch.randn(2, 3),))
    assert isinstance(program.signature, Signature) and FoldBatchNorm()(program).program.signature is program.signature
