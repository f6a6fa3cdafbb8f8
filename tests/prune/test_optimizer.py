"""Optimizers that go on with a pruned module: their state is cut where the weights are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, Optimizer

from fxcompress.errors import PruneError
from fxcompress.prune.optimizer import move_optimizer
from tests.helpers.optimizers import OPTIMIZERS


def chain(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, width, 3, bias=False), nn.ReLU(), nn.Conv2d(width, 4, 3, bias=False))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moved_state_trains_like_the_masked_dense_network(name: str) -> None:
    """Channels that are zero on both sides get no gradient: masked dense and pruned must stay equal while they train."""
    torch.manual_seed(0)
    dense, small, keep = chain(6).double(), chain(4).double(), [0, 2, 3, 5]
    optimizer = OPTIMIZERS[name](dense.parameters())
    inputs = torch.randn(8, 1, 6, 6, dtype=torch.float64)

    def train(model: nn.Module, chosen: Optimizer, steps: int) -> None:
        for _ in range(steps):
            loss = (model(inputs).mean((2, 3)) - 1).square().mean()
            chosen.zero_grad()
            loss.backward()
            chosen.step()

    train(dense, optimizer, 3)
    gone = [i for i in range(6) if i not in keep]
    with torch.no_grad():
        for index, dim in ((0, 0), (2, 1)):
            weight = dense.get_submodule(str(index)).weight
            weight.index_fill_(dim, torch.tensor(gone), 0.0)
            for value in optimizer.state[weight].values():
                if isinstance(value, Tensor) and value.shape == weight.shape:
                    value.index_fill_(dim, torch.tensor(gone), 0.0)
            small.get_submodule(str(index)).weight.copy_(weight.index_select(dim, torch.tensor(keep)))
    twin = OPTIMIZERS[name](dense.parameters())
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    move_optimizer(twin, dense, small, {"0.weight": {0: keep}, "2.weight": {1: keep}})
    train(dense, optimizer, 5)
    train(small, twin, 5)
    torch.testing.assert_close(small(inputs), dense(inputs), rtol=1e-9, atol=1e-12)


def test_adafactor_keeps_factored_state() -> None:
    torch.manual_seed(0)
    old, new, keep = nn.Linear(6, 5), nn.Linear(6, 3), [0, 1, 4]
    optimizer = Adafactor(old.parameters(), 0.1)
    old(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    before = {key: value.clone() for key, value in optimizer.state[old.weight].items()}
    move_optimizer(optimizer, old, new, {"weight": {0: keep}, "bias": {0: keep}})
    after = optimizer.state[new.weight]
    assert torch.equal(after["row_var"], before["row_var"][keep]) and torch.equal(after["col_var"], before["col_var"])
    assert torch.equal(after["step"], before["step"])
    assert old.weight not in optimizer.state


def test_state_of_a_strange_shape_is_refused_and_nothing_changes() -> None:
    old, new = nn.Linear(6, 5), nn.Linear(6, 3)
    optimizer = SGD(old.parameters(), 0.1)
    optimizer.state[old.weight]["sketch"] = torch.zeros(7, 7)
    with pytest.raises(PruneError, match=r"FXC-PRUNE-327 .*'sketch' of shape \[7, 7\]"):
        move_optimizer(optimizer, old, new, {"weight": {0: [0, 1, 4]}, "bias": {0: [0, 1, 4]}})
    assert optimizer.param_groups[0]["params"] == [old.weight, old.bias]
    assert "sketch" in optimizer.state[old.weight]


def test_added_bias_joins_the_group_of_its_layer_and_a_lost_layer_leaves() -> None:
    old = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    new = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    groups = [{"params": list(old["b"].parameters()), "lr": 0.1}, {"params": [old["a"].weight, *old["c"].parameters()]}]
    optimizer = SGD(groups, 0.2)
    move_optimizer(optimizer, old, new, {})
    first, second = (group["params"] for group in optimizer.param_groups)
    assert [id(p) for p in first] == [id(new["b"].weight), id(new["b"].bias)]
    assert [id(p) for p in second] == [id(new["a"].weight), id(new["a"].bias)]
