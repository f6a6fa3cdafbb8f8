"""Every pattern is pruned, exactly: the pruned program equals the dense network with the same channels zeroed."""

import copy
import operator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxcompress as fxc
from fxcompress.ir import Program
from fxcompress.prune.plan import plan_pruning
from tests.prune.cases import grown
from tests.prune.oracle import masked_output, relative_error
from tests.prune.patterns import PATTERNS, Case


def doubled(example: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.double() if x.is_floating_point() else x for x in example)


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def run(program: Program, example: tuple[Any, ...]) -> list[Tensor]:
    with torch.no_grad():
        return list(pytree.tree_leaves(program(*example)))


def assert_exact(model: nn.Module, dense: Program, plan: Any, pruned: Program, example: tuple[Any, ...]) -> None:
    """Equal to the oracle, at the captured batch and at another, in the dtype of the example."""
    dtype = next(model.parameters()).dtype
    for inputs in (example, grown(example)):
        expected = masked_output(model, plan, inputs, dense.gm, dtype)
        error = relative_error(expected, run(pruned, inputs))
        assert error <= (1e-9 if dtype == torch.float64 else 1e-4), (
            f"relative error {error:.3g}, removed {plan.removed}"
        )


def assert_rest_untouched(case: Case, dense: Program, pruned: Program, plan: Any) -> None:
    """A kept weight is the dense one, sliced as the plan's edits say and nothing else; same names."""
    names = set(pruned.gm.state_dict())
    extra = names - set(dense.gm.state_dict())
    assert set(dense.gm.state_dict()) <= names
    assert not extra or (case.folds and all(n.endswith("bias") for n in extra)), f"new names {extra}"
    edits = {
        id(operator.attrgetter(name)(dense.gm)): dims for name, dims in plan.edits.items()
    }  # tied: one of its names
    for name, tensor in dense.gm.named_parameters(remove_duplicate=False):
        expected = tensor.detach()
        for dim, kept in edits.get(id(tensor), {}).items():
            expected = expected.index_select(dim, torch.tensor(kept))
        got = operator.attrgetter(name)(pruned.gm).detach()
        assert got.shape == expected.shape, f"{name}: {list(got.shape)}, edits say {list(expected.shape)}"
        if not (case.folds and tensor.dim() == 1):
            assert torch.equal(got, expected), f"{name} changed"


@pytest.mark.parametrize("name", PATTERNS)
def test_exact_in_double(name: str) -> None:
    """Each group loses half of its own: exact, the named layers are pruned; the result can be pruned again."""
    case = PATTERNS[name]
    model, example = case.build().double(), doubled(case.example)
    program = fxc.capture(model, example)
    plan = plan_pruning(program, ratio=0.5, scope="local", **case.kwargs)
    pruned = plan.apply(program)
    pruned.verify()
    assert_exact(model, program, plan, pruned, example)
    missing = [n for n in case.prunes if not plan.removed.get(n)]
    assert not missing, f"not pruned: {missing}; removed {dict(plan.removed)}"
    assert not [n for n in case.keeps if plan.removed.get(n)]
    assert_rest_untouched(case, program, pruned, plan)
    assert not case.must_prune or size(pruned.gm) < size(program.gm)
    again = fxc.capture(pruned.gm, example)
    assert not again.notes, "the pruned program does not export like the dense one"
    options = {k: v for k, v in case.kwargs.items() if k != "width"}  # the oracle finds no norm in a graph
    second = plan_pruning(again, ratio=0.4, scope="local", **options)
    twice = second.apply(again)
    assert_exact(pruned.gm, again, second, twice, example)


@pytest.mark.parametrize("name", PATTERNS)
def test_default_plan_in_single(name: str) -> None:
    """Global ranking as a user types it: certified, exact to rounding, and the pruned program learns."""
    case = PATTERNS[name]
    model = case.build()
    program = fxc.capture(model, case.example)
    before = {k: v.clone() for k, v in program.gm.state_dict().items()}
    plan = plan_pruning(program, ratio=0.5, **case.kwargs)
    pruned = plan.apply(program)
    plan.certify(program, pruned)
    assert_exact(model, program, plan, pruned, case.example)
    assert not case.must_prune or size(pruned.gm) < size(program.gm)
    assert [x.shape for x in run(pruned, case.example)] == [x.shape for x in run(program, case.example)]
    assert all(torch.equal(v, before[k]) for k, v in program.gm.state_dict().items()), "the dense program changed"
    assert_learns(copy.deepcopy(pruned), case.example)


def assert_learns(program: Program, example: tuple[Any, ...]) -> None:
    """A step of SGD makes the loss smaller; many weights have a gradient, so the network is not dead."""
    program.gm.train()
    optimizer = torch.optim.SGD(program.gm.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        outputs = pytree.tree_leaves(program(*example))
        loss = torch.stack([y.float().pow(2).mean() for y in outputs]).sum()
        optimizer.zero_grad()
        loss.backward()
        gradients = [p.grad.flatten() for p in program.gm.parameters() if p.grad is not None]
        assert float((torch.cat(gradients) != 0).float().mean()) > 0.3
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
