"""Bad pruning requests: each error says what, why and what to do, and nothing is changed."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import CertificateError, FxcError, PruneError, UsageError
from fxcompress.prune.plan import PruningPlan
from fxcompress.prune.slots import Slot
from tests.prune.planned import example, program

#: Options -> id, and parts of the message.
BAD: dict[str, tuple[dict[str, Any], int, str]] = {
    "ratio of one": ({"ratio": 1.0}, 5, "ratio must be at least 0 and less than 1, not 1.0"),
    "ratio above one": ({"ratio": 50}, 5, "not 50.*0.5 removes half"),
    "negative ratio": ({"ratio": -0.1}, 5, "not -0.1"),
    "ratio nan": ({"ratio": float("nan")}, 5, "not nan"),
    "ratio text": ({"ratio": "0.5"}, 5, "not '0.5'"),
    "ratio bool": ({"ratio": True}, 5, "not True"),
    "ratio of a layer": ({"ratios": {"fc1": 1.0}}, 5, r"ratios\['fc1'\]"),
    "max_ratio": ({"ratio": 0.5, "max_ratio": 1.0}, 5, "max_ratio"),
    "macs of zero": ({"macs": 0.0}, 12, "macs must be more than 0 and at most 1"),
    "parameters above one": ({"parameters": 1.5}, 12, "parameters.*0.5 keeps half"),
    "latency text": ({"latency": "half"}, 12, "latency"),
    "two budgets": ({"ratio": 0.5, "macs": 0.5}, 3, "give one budget, not ratio and macs"),
    "no budget": ({}, 4, "ratio=, macs=, parameters=, latency= or ratios="),
    "round_to": ({"ratio": 0.5, "round_to": 0}, 6, "round_to must be a whole number"),
    "round_to a half": ({"ratio": 0.5, "round_to": 7.5}, 6, "round_to"),
    "min_channels": ({"ratio": 0.5, "min_channels": 0}, 6, "min_channels"),
    "scope": ({"ratio": 0.5, "scope": "layer"}, 7, "unknown scope 'layer'.*global, local"),
    "attention": ({"ratio": 0.5, "attention": "qkv"}, 7, "heads, head_dim"),
    "normalize": ({"ratio": 0.5, "normalize": "flops"}, 7, "macs, parameters"),
    "importance": ({"ratio": 0.5, "importance": "tailor"}, 41, "unknown importance 'tailor'.*taylor"),
    "reduction": ({"ratio": 0.5, "reduction": "meen"}, 43, "did you mean 'mean'"),
    "ignore": ({"ratio": 0.5, "ignore": ["inne"]}, 8, "ignore: there is no layer 'inne'.*did you mean inner"),
    "include": ({"ratio": 0.5, "include": ["fc3"]}, 8, "include: there is no layer 'fc3'.*fc[12]"),
    "ratios": ({"ratios": {"depth_wise": 0.5}}, 8, "there is no layer 'depth_wise'.*depthwise"),
    "no name near": ({"ratio": 0.5, "ignore": ["~~~"]}, 8, r"known: stem.0, stem.1, .*\.\.\."),
    "everything ignored": ({"ratio": 0.5, "ignore": ["*"]}, 9, "nothing to prune.*every group is ignored.*ignore less"),
    "ignored one by one": ({"macs": 0.5, "ignore": ["outer", "inner", "fc1"]}, 9, "every group is ignored"),
    "an output": ({"ratio": 0.5, "include": ["fc2"]}, 9, "nothing that fc2 makes can shrink.*outputs stay.*allow_outputs=True"),
    "ratio of an output": ({"ratios": {"fc2": 0.5}}, 14, "'fc2' makes can shrink.*allow_outputs=True"),
    "round_to of all": ({"ratio": 0.5, "round_to": 32}, 10, "round_to=32 is larger than every layer.*inner, has 24"),
    "taylor without data": ({"ratio": 0.5, "importance": "taylor"}, 47, "gradients missing for taylor.*backward"),
    "hessian without data": ({"ratio": 0.5, "importance": "hessian"}, 47, "hessian"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_the_request_is_refused(case: str) -> None:
    options, number, text = BAD[case]
    before = program("cnn").text()
    with pytest.raises(PruneError, match=re.compile(text, re.DOTALL)) as caught:
        fxc.plan_pruning(program("cnn"), **options)
    assert caught.value.id == f"FXC-PRUNE-{number:03d}"
    assert program("cnn").text() == before and not program("cnn").gm.training


@pytest.mark.parametrize("budget", ["macs", "parameters"])
def test_a_budget_out_of_reach_names_the_closest_and_that_one_works(budget: str) -> None:
    with pytest.raises(PruneError, match=rf"the {budget} budget cannot be met(.|\n)*leaves") as caught:
        fxc.plan_pruning(program("cnn"), **{budget: 1e-4}, ignore=["outer"])
    found = re.search(rf"{budget}=([0-9.]+) or more", caught.value.fix)
    assert caught.value.id == "FXC-PRUNE-001" and found is not None
    closest = float(found[1])
    plan = fxc.plan_pruning(program("cnn"), **{budget: closest}, ignore=["outer"])
    before, after = plan.macs if budget == "macs" else plan.parameters
    assert closest - 0.002 <= after / before <= closest
    with pytest.raises(PruneError, match="cannot be met"):
        fxc.plan_pruning(program("cnn"), **{budget: closest - 0.002}, ignore=["outer"])


def test_a_tight_frame_is_part_of_the_reason() -> None:
    with pytest.raises(PruneError, match="lower round_to and min_channels"):
        fxc.plan_pruning(program("cnn"), macs=0.5, min_channels=20)


@pytest.mark.parametrize(
    ("options", "text"),
    [({}, "no dimension of this model can shrink"), ({"include": ["1"]}, "nothing that 1 makes can shrink")],
)
def test_a_model_of_outputs_only(options: dict[str, Any], text: str) -> None:
    dense = fxc.capture(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), (torch.randn(2, 3, 4),))
    with pytest.raises(PruneError, match=rf"FXC-PRUNE-009(.|\n)*{text}(.|\n)*allow_outputs=True"):
        fxc.plan_pruning(dense, 0.5, **options)
    assert len(fxc.plan_pruning(dense, 0.5, allow_outputs=True, **options).removed["1"]) in (2, 3)


def test_residual_width_of_a_transformer_says_how_to_get_it() -> None:
    with pytest.raises(PruneError, match=r"nothing that down makes can shrink(.|\n)*width=True"):
        fxc.plan_pruning(program("block"), 0.5, include=["down"])


def test_an_unknown_operator_is_named() -> None:
    """What flows through an operator that cannot be followed stays, and the plan or the error says which."""

    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.sort(self.a(x), dim=-1).values
            return self.c(torch.relu(self.b(x)))  # type: ignore[no-any-return]

    dense = fxc.capture(Sorted(), (torch.randn(2, 6),))
    plan = fxc.plan_pruning(dense, 0.5)
    assert set(plan.removed) == {"b"} and any("sort" in note for note in plan.notes)
    with pytest.raises(PruneError, match=r"nothing to prune(.|\n)*sort"):
        fxc.plan_pruning(dense, 0.5, include=["a"])


class Grouped(nn.Module):
    """6 heads of width 4 of queries share 3 heads of keys: heads go three by three pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(8, 24), nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (6, 4)).transpose(1, 2)
        k, v = (m(x).unflatten(-1, (3, 4)).transpose(1, 2) for m in (self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("ratio", "left"), [(0.1, 3), (0.2, 2), (0.34, 2), (0.5, 1), (0.9, 1)])
def test_heads_that_do_not_divide(ratio: float, left: int) -> None:
    """A share that is no whole number of heads is rounded to whole heads of keys, with the queries that read them."""
    torch.manual_seed(0)
    dense = fxc.capture(Grouped().eval(), (torch.randn(2, 5, 8),))
    plan = fxc.plan_pruning(dense, ratio, scope="local")
    pruned = plan.apply(dense)
    counts = [pruned.gm.get_parameter(f"{n}.weight").shape[0] for n in "qkv"]
    assert counts == [8 * left, 4 * left, 4 * left]
    assert plan.certify(dense, pruned).float64 <= 1e-9


def test_round_to_that_no_head_width_meets() -> None:
    """round_to counts channels: heads of width 4 leave multiples of 12 only three by three."""
    dense = fxc.capture(Grouped().eval(), (torch.randn(2, 5, 8),))
    plan = fxc.plan_pruning(dense, 0.5, scope="local", round_to=24)
    assert plan.removed == {}
    with pytest.raises(PruneError, match="round_to=48 is larger than every layer"):
        fxc.plan_pruning(dense, 0.5, round_to=48)


# ------------------------------------------------------------------------------------------------ functions and data
def test_importance_of_the_wrong_form() -> None:
    def short(slot: Slot, tensor: Tensor) -> Tensor:
        del slot, tensor
        return torch.ones(3)

    with pytest.raises(PruneError, match=r"FXC-PRUNE-044(.|\n)*expected a real tensor of shape"):
        fxc.plan_pruning(program("cnn"), 0.5, importance=short)
    with pytest.raises(PruneError, match=r"FXC-PRUNE-013(.|\n)*choose another importance"):
        fxc.plan_pruning(program("cnn"), 0.5, importance=lambda slot, tensor: None)


@pytest.mark.parametrize(
    "inputs", [(torch.zeros(2, 1, 8, 8),), (), (torch.zeros(2, 3, 8, 8),) * 2, ("x",)], ids=range(4)
)
def test_an_example_that_does_not_fit(inputs: tuple[Any, ...]) -> None:
    with pytest.raises(UsageError):
        fxc.plan_pruning(program("cnn"), 0.5, example_inputs=inputs)


def test_a_plan_of_another_program() -> None:
    plan = fxc.plan_pruning(program("cnn"), 0.5)
    loaded = PruningPlan.from_dict(plan.to_dict())
    for act in (loaded.apply, loaded.certify):
        with pytest.raises(PruneError, match="the plan does not fit this program"):
            act(program("chain"))


def test_errors_are_of_the_family() -> None:
    assert issubclass(PruneError, FxcError) and issubclass(CertificateError, FxcError)
    with pytest.raises(FxcError, match=r"unknown target(.|\n)*onnxruntime"):
        fxc.plan_pruning(program("cnn"), latency=0.5, target="nowhere")
    assert example("cnn")[0].shape == (2, 3, 8, 8)
