"""Channel permutations: more magnitude kept, outputs unchanged, and refused where they would not be."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.ir import Program
from fxcompress.layerwise.store import WeightStore
from fxcompress.passbase import output_error
from fxcompress.rewrite import Analysis
from fxcompress.sparse.absorb import find_chain, node_of, permute_inputs
from fxcompress.sparse.pattern import Pattern
from fxcompress.sparse.permutation import find_permutation, kept_magnitude

TWO_OF_FOUR = Pattern(2, 4)


def test_the_search_finds_the_best_of_all_orders() -> None:
    """Eight channels: all 35 splits are known."""
    torch.manual_seed(0)
    magnitudes = torch.rand(3, 8)
    best = max(kept_magnitude(magnitudes[:, list(p)], TWO_OF_FOUR) for p in itertools.permutations(range(8)))
    permutation = find_permutation(magnitudes, TWO_OF_FOUR)
    assert permutation is not None and sorted(permutation.tolist()) == list(range(8))
    assert kept_magnitude(magnitudes[:, permutation], TWO_OF_FOUR) == pytest.approx(best)


def test_crowded_stripes_are_spread() -> None:
    """All large channels lie in a quarter of the stripes; spread evenly, nothing large is lost."""
    magnitudes = torch.full((6, 32), 0.01)
    magnitudes[:, :16] = 1
    permutation = find_permutation(magnitudes, TWO_OF_FOUR)
    assert permutation is not None
    assert kept_magnitude(magnitudes, TWO_OF_FOUR) < 0.52
    assert kept_magnitude(magnitudes[:, permutation], TWO_OF_FOUR) > 0.98


@pytest.mark.parametrize("pattern", [Pattern(1, 4), Pattern(4, 8), Pattern(2, 3)])
def test_other_patterns(pattern: Pattern) -> None:
    torch.manual_seed(1)
    magnitudes = torch.rand(5, pattern.m * 5) ** 4
    permutation = find_permutation(magnitudes, pattern)
    assert permutation is not None
    assert kept_magnitude(magnitudes[:, permutation], pattern) > kept_magnitude(magnitudes, pattern) + 0.01


def test_nothing_to_gain() -> None:
    assert find_permutation(torch.ones(3, 16), TWO_OF_FOUR) is None
    assert find_permutation(torch.rand(3, 4), TWO_OF_FOUR) is None
    assert find_permutation(torch.tensor([[1.0, 1, 0, 0] * 4]), TWO_OF_FOUR) is None


class Conv(nn.Module):
    """Convolution, norm, activation, depthwise convolution, pooling, convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.dw = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8)
        self.b = nn.Conv2d(8, 4, 2)
        for tensor in (self.norm.running_mean, self.norm.running_var, self.norm.weight, self.norm.bias):
            assert tensor is not None
            nn.init.uniform_(tensor, 0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(F.max_pool2d(F.hardswish(self.dw(F.relu(self.norm(self.a(x))))), 2))
        return out


class Mlp(nn.Module):
    """Linear, LayerNorm, a scale and an activation, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.rand(8) + 0.5)
        nn.init.uniform_(self.norm.weight)
        nn.init.uniform_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(F.gelu(self.norm(self.a(x)) * self.scale + 0.5))
        return out


class Gated(nn.Module):
    """A gated MLP: two producers."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.a, self.b = nn.Linear(3, 8, bias=False), nn.Linear(3, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(F.silu(self.gate(x)) * self.a(x))
        return out


class Gpt(nn.Module):
    """Transposed linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(3, 8)), nn.Parameter(torch.randn(8))
        self.w2, self.b2 = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.b2, torch.tanh(torch.addmm(self.b1, x, self.w1)), self.w2)


class Viewed(nn.Module):
    """Views that regroup what stands before the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(F.relu(self.a(x).reshape(-1, 8)).reshape(x.shape[0], 2, 2, 8))
        return out


class Up(nn.Module):
    """Transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.ConvTranspose2d(3, 8, 2), nn.ConvTranspose2d(8, 4, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(F.leaky_relu(self.a(x)))
        return out


IMAGE, ROWS = (2, 3, 9, 9), (5, 3)
EXACT: dict[str, tuple[Any, tuple[int, ...], int]] = {
    "conv": (Conv, IMAGE, 9),
    "mlp": (Mlp, ROWS, 6),
    "gated": (Gated, ROWS, 4),
    "gpt": (Gpt, ROWS, 3),
    "up": (Up, IMAGE, 3),
    "viewed": (Viewed, (2, 4, 3), 3),
}


def program_of(model: nn.Module, shape: tuple[int, ...]) -> Program:
    return fxc.capture(model.double().eval(), (torch.randn(shape, dtype=torch.float64),))


def last_layer(program: Program) -> Any:
    return [(node, module) for node, module in program.layers() if isinstance(getattr(module, "weight", None), Tensor)][
        -1
    ]


@pytest.mark.parametrize("name", EXACT)
def test_a_permutation_is_exact(name: str) -> None:
    make, shape, tensors = EXACT[name]
    torch.manual_seed(0)
    program = program_of(make(), shape)
    expected, before = program.run_example(), {n: t.clone() for n, t in program.gm.state_dict().items()}
    node, _ = last_layer(program)
    chain = find_chain(Analysis(program), node)
    assert not isinstance(chain, str), chain
    assert len(chain.moved) == tensors
    store = WeightStore(program.gm, replace=True)
    permutation = torch.randperm(8)
    permute_inputs(chain, permutation, store)
    changed = [n for n, t in program.gm.state_dict().items() if not torch.equal(t, before[n])]
    assert len(changed) == tensors
    assert output_error(expected, program.run_example()) < 1e-12
    permute_inputs(chain, torch.randperm(8), store)
    assert output_error(expected, program.run_example()) < 1e-12
    store.undo()
    assert all(torch.equal(t, before[n]) for n, t in program.gm.state_dict().items())


class Refused(nn.Module):
    """Two linear layers with something between them."""

    def __init__(self, between: Any, shared: bool = False, shape: tuple[int, int, int] = (3, 8, 8)) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(shape[0], shape[1]), nn.Linear(shape[2], 4)
        self.between = between
        if shared:
            self.a = nn.Linear(8, 8)
            self.b = self.a

    def forward(self, x: Tensor) -> Any:
        hidden = self.a(x)
        return self.b(self.between(self, hidden, x))


REFUSED: dict[str, tuple[Any, str]] = {
    "reader": (lambda m, h, x: h + 0 * F.linear(h, torch.ones(8, 8, dtype=h.dtype)), "reads|shape|mix"),
    "softmax": (lambda m, h, x: F.softmax(h, -1), "may mix or regroup channels"),
    "reshape": (lambda m, h, x: h.reshape(-1, 2, 4).transpose(1, 2).reshape(-1, 8), "may mix or regroup channels"),
    "input": (lambda m, h, x: x.repeat(1, 3)[:, :8] + 0 * h.sum(), "may mix or regroup channels"),
    "residual": (lambda m, h, x: h + torch.cat([x, x, x[:, :2]], 1), "may mix or regroup channels"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_exact_is_refused(name: str) -> None:
    import re

    between, reason = REFUSED[name]
    program = program_of(Refused(between), ROWS)
    node = node_of(program, program.gm.get_submodule("b").weight)
    assert node is not None
    found = find_chain(Analysis(program), node)
    assert isinstance(found, str) and re.search(reason, found), found


def test_a_second_reader_is_named() -> None:
    class Reader(Mlp):
        def forward(self, x: Tensor) -> Any:
            hidden = F.relu(self.a(x))
            return self.b(hidden), hidden

    program = program_of(Reader(), ROWS)
    found = find_chain(Analysis(program), last_layer(program)[0])
    assert isinstance(found, str) and "reads" in found


def test_shared_and_grouped_layers_are_refused() -> None:
    program = program_of(Refused(lambda m, h, x: F.relu(h), shared=True), (5, 8))
    found = find_chain(Analysis(program), last_layer(program)[0])
    assert isinstance(found, str) and "called more than once" in found
    grouped = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1, groups=2))
    found = find_chain(Analysis(program := program_of(grouped, IMAGE)), last_layer(program)[0])
    assert isinstance(found, str) and "has groups" in found
    norm = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1))
    found = find_chain(Analysis(program := program_of(norm, IMAGE)), last_layer(program)[0])
    assert isinstance(found, str) and "GroupNorm" in found


@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize("method", ["l1", "wanda", "sparsegpt"])
def test_permuted_sparsity_keeps_more_and_is_undone(captured: bool, method: Any) -> None:
    torch.manual_seed(0)
    user = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16)).eval()
    user[2].weight.data[:, :8] *= 20  # crowded stripes
    x = torch.randn(64, 8)
    before = {n: t.clone() for n, t in user.state_dict().items()}
    dense = user(x).detach()
    errors = {}
    for permute in (False, True):
        model: Any = fxc.capture(user, (x,)) if captured else user
        masks = fxc.sparsify(model, pattern="2:4", method=method, permute=permute, calibration=[x], include="2")
        assert masks.sparsity().total == 0.5
        errors[permute] = float((model(x) - dense).detach().square().mean())
        masks.restore()
        assert output_error([dense], [model(x).detach()]) < 1e-6
        assert all(torch.equal(t, before[n]) for n, t in user.state_dict().items())
    assert errors[True] < 0.5 * errors[False]
