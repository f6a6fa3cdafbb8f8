"""The certificate: it holds for what the library prunes, and for nothing else."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import CertificateError
from fxcompress.ir import Program
from fxcompress.precise import as_double
from fxcompress.prune import certificate, surgery
from fxcompress.prune.certificate import Certificate, masked_program
from fxcompress.prune.dependencies import Bools, Dependencies
from fxcompress.prune.plan import PruningPlan
from tests.prune.cases import images
from tests.prune.oracle import masked_output, relative_error
from tests.prune.planned import example, model, program

NAMES = ("cnn", "chain", "block", "sigmoids")


def planned(name: str, **options: Any) -> tuple[PruningPlan, Program]:
    plan = fxc.plan_pruning(program(name), 0.5, scope="local", **options)
    return plan, plan.apply(program(name))


def internals(plan: PruningPlan) -> tuple[Dependencies, Bools]:
    assert plan._found is not None and plan._units is not None
    return plan._found, plan._units


def damaged(pruned: Program, name: str) -> Program:
    """The program with one number of one tensor changed by a thousandth."""
    clone = pruned.clone()
    old = clone.gm.get_parameter(name)
    data = old.detach().clone()
    data.view(-1)[0] += 1e-3 * data.abs().max()
    surgery.replace_tensors(clone, {id(old): nn.Parameter(data)})
    return clone


# ------------------------------------------------------------------------------------------------ holds
@pytest.mark.parametrize("name", NAMES)
def test_holds(name: str) -> None:
    plan, pruned = planned(name)
    found = plan.certify(program(name), pruned, per_group=True)
    assert found.float64 <= 1e-9 and found.float32 <= 1e-4 and found.batches == (2, 1)
    assert set(found.groups) == {g.name for g in plan.groups if g.removed}
    assert max(found.groups.values()) <= 1e-9
    assert plan.certify(program(name)).groups == {}, "each group by itself only on request"


@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_a_reference_that_knows_nothing_of_it(name: str) -> None:
    """The masked program computes what the user's own module does with these channels zeroed, in float64."""
    plan, pruned = planned(name)
    if name == "sigmoids":  # a moved constant is rounded to float32 when it is stored
        limit = 1e-6
    else:
        limit = 1e-9
    masked = as_double(masked_program(*internals(plan)))
    doubles = tuple(x.double() for x in example(name))
    expected = masked_output(model(name), plan, example(name))
    with torch.no_grad():
        assert relative_error(expected, [masked.gm(*doubles)]) <= 1e-12
        assert relative_error(expected, [as_double(pruned).gm(*doubles)]) <= limit
        assert relative_error(expected, [program(name)(*example(name))]) > 1e-2, "pruning changes nothing here"


def test_as_text_and_as_data() -> None:
    found = Certificate(1e-7, 2e-16, (2, 1), {"fc1": 0.0})
    assert str(found) == "certified: masked dense = pruned within 2.0e-16 (float64), 1.0e-07 (float32)"
    assert Certificate(**found.to_dict()) == dataclasses.replace(found, batches=[2, 1])  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ does not
@pytest.mark.parametrize("name", ["inner.weight", "stem.1.weight", "fc2.bias", "outer.weight"])
def test_a_changed_weight_is_seen(name: str) -> None:
    plan, pruned = planned("cnn")
    with pytest.raises(CertificateError, match=r"FXC-CERT-001(.|\n)*changed after pruning") as caught:
        plan.certify(program("cnn"), damaged(pruned, name))
    assert "no single group" in caught.value.where and "input program is untouched" in caught.value.fix


def test_the_dense_program_is_no_certified_result() -> None:
    plan, _ = planned("cnn")
    with pytest.raises(CertificateError):
        plan.certify(program("cnn"), program("cnn"))


def test_another_choice_of_channels_is_seen() -> None:
    plan, _ = planned("cnn")
    other = fxc.plan_pruning(program("cnn"), 0.5, scope="local", importance="random")
    assert other.parameters == plan.parameters
    with pytest.raises(CertificateError):
        plan.certify(program("cnn"), other.apply(program("cnn")))


def sabotaged(layer: str) -> Any:
    """``cut_program`` that keeps the wrong rows of one layer whenever that layer shrinks."""

    def cut(found: Dependencies, removed: Bools) -> tuple[Program, list[str]]:
        pruned, notes = surgery.cut_program(found, removed)
        module: Any = pruned.gm.get_submodule(layer)
        dense: Any = found.program.gm.get_submodule(layer)
        if module.weight.shape[0] < dense.weight.shape[0]:
            module.weight = nn.Parameter(module.weight.detach().roll(1, 0))
        return pruned, notes

    return cut


@pytest.mark.parametrize(("layer", "group"), [("fc1", "fc1"), ("depthwise", "inner"), ("stem.1", "stem.0")])
def test_the_group_is_named(monkeypatch: pytest.MonkeyPatch, layer: str, group: str) -> None:
    monkeypatch.setattr("fxcompress.prune.plan.cut_program", sabotaged(layer))
    monkeypatch.setattr(certificate, "cut_program", sabotaged(layer))
    plan, pruned = planned("cnn")
    with pytest.raises(CertificateError, match=rf"FXC-CERT-001(.|\n)*where: group {group}\n"):
        plan.certify(program("cnn"), pruned)
    monkeypatch.setattr("fxcompress.prune.plan.cut_program", surgery.cut_program)
    with pytest.raises(CertificateError, match=f"group {group}"):
        plan.certify(program("cnn"), plan.apply(program("cnn")), per_group=True)


def test_a_group_that_does_not_run_alone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(found: Dependencies, removed: Bools) -> tuple[Program, list[str]]:
        pruned, notes = surgery.cut_program(found, removed)
        if pruned.gm.get_parameter("fc1.weight").shape[0] < 20:
            module: Any = pruned.gm.get_submodule("fc2")
            module.weight = nn.Parameter(torch.zeros(5, 20))
        return pruned, notes

    plan, pruned = planned("cnn")
    monkeypatch.setattr(certificate, "cut_program", cut)
    with pytest.raises(CertificateError, match=r"group fc1\n  why: RuntimeError: .*mat1 and mat2"):
        plan.certify(program("cnn"), damaged(pruned, "fc2.bias"))


def test_nan_is_no_proof() -> None:
    plan, pruned = planned("cnn")
    clone = pruned.clone()
    old = clone.gm.get_parameter("fc2.bias")
    surgery.replace_tensors(clone, {id(old): nn.Parameter(old.detach() * torch.nan)})
    with pytest.raises(CertificateError):
        plan.certify(program("cnn"), clone)


# ------------------------------------------------------------------------------------------------ constants
def test_a_constant_moves_into_a_new_bias_and_stays_where_padding_meets_it() -> None:
    plan, pruned = planned("sigmoids")
    assert len(plan.removed["a"]) == 4 and "b" not in plan.removed and len(plan.removed["c"]) == 3
    assert any(note.startswith("b: a new bias") for note in plan.notes)
    dense: Any = program("sigmoids").gm
    assert dense.get_submodule("b").bias is None
    weight = dense.get_submodule("b").weight.detach()[:, list(plan.removed["a"])]
    expected = 0.5 * weight.double().sum((1, 2, 3))
    torch.testing.assert_close(pruned.gm.get_parameter("b.bias").detach().double(), expected, rtol=1e-6, atol=1e-6)


def test_a_constant_moves_into_the_bias_there_is() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.cos(self.b(torch.cos(self.a(x)))))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    net, x = Twice().eval(), torch.randn(3, 6)
    dense = fxc.capture(net, (x,))
    plan = fxc.plan_pruning(dense, 0.5, scope="local")
    pruned = plan.apply(dense)
    assert len(plan.removed["a"]) == 4 and len(plan.removed["b"]) == 3
    gone, kept = list(plan.removed["a"]), [i for i in range(6) if i not in plan.removed["b"]]
    expected = (net.b.bias + net.b.weight[:, gone].sum(1))[kept]
    torch.testing.assert_close(pruned.gm.get_parameter("b.bias"), expected)
    assert plan.certify(dense, pruned).float64 <= 1e-9


def test_a_grouped_convolution_whose_weight_is_computed() -> None:
    """Statistics of the weight run over its input channels: only whole groups of them may go."""

    class Standardized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3, groups=2), nn.Conv2d(12, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            weight = self.b.weight / (1 + self.b.weight.std((1, 2, 3), keepdim=True))
            x = nn.functional.conv2d(self.a(x).relu(), weight, self.b.bias, groups=2)
            return self.head(x.relu())  # type: ignore[no-any-return]

    torch.manual_seed(0)
    dense = fxc.capture(Standardized().eval(), images())
    plan = fxc.plan_pruning(dense, 0.5, scope="local")
    assert set(plan.removed.get("a", ())) in ({*range(4)}, {*range(4, 8)}, set())
    assert plan.removed and plan.certify(dense, per_group=True).float64 <= 1e-9


# ------------------------------------------------------------------------------------------------ masked program
def test_masking_leaves_the_dense_program_alone() -> None:
    dense = program("cnn")
    plan, _ = planned("cnn")
    before = {k: v.clone() for k, v in dense.gm.state_dict().items()}
    text = dense.text()
    masked = masked_program(*internals(plan))
    plan.certify(dense)
    assert dense.text() == text and all(torch.equal(v, before[k]) for k, v in dense.gm.state_dict().items())
    for layer, indices in plan.removed.items():
        gone = torch.tensor(indices)
        for part in ("weight", "bias"):
            name = f"{layer}.{part}"
            if name in before:
                now = masked.gm.state_dict()[name]
                assert not now[gone].any() and torch.equal(now.index_fill(0, gone, 0.0), now)
                assert torch.equal(now, before[name].index_fill(0, gone, 0.0)), name


def test_nothing_removed_is_the_dense_program() -> None:
    found, units = internals(planned("cnn")[0])
    masked = masked_program(found, np.zeros_like(units))
    assert all(torch.equal(v, masked.gm.state_dict()[k]) for k, v in program("cnn").gm.state_dict().items())


def test_training_mode_stays_and_does_not_disturb() -> None:
    """Dropout draws nothing while the proof runs, and every module is in the mode it was in afterwards."""

    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.drop = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5)
            self.fc = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.drop(self.norm(self.conv(x)).relu().mean((2, 3))))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    dense = fxc.capture(Dropped(), images())
    plan = fxc.plan_pruning(dense, 0.5)
    pruned = plan.apply(dense)
    dense.gm.train()
    pruned.gm.train()
    pruned.gm.get_submodule("norm").eval()  # a frozen norm
    modes = [[m.training for m in p.gm.modules()] for p in (dense, pruned)]
    statistics = dense.gm.get_buffer("norm.running_mean").clone()
    assert plan.certify(dense, pruned).float64 <= 1e-9
    assert [[m.training for m in p.gm.modules()] for p in (dense, pruned)] == modes
    assert torch.equal(dense.gm.get_buffer("norm.running_mean"), statistics)


def test_half_precision_is_judged_in_double() -> None:
    dense = fxc.capture(model("chain").bfloat16(), (example("chain")[0].bfloat16(),))
    plan = fxc.plan_pruning(dense, 0.5)
    found = plan.certify(dense)
    assert found.float64 <= 1e-9
