"""The walk through a program: what each layer reads, whatever is kept in memory on the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import CalibrationError
from fxcompress.ir import evaluating
from fxcompress.layerwise.statistics import InputStatistics
from fxcompress.layerwise.walk import Walk


class Blocks(nn.Module):
    """Residual blocks with a wide middle, a mask that depends on sizes only, and a norm spelled out."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.scale = nn.Parameter(torch.rand(8) + 0.5)
        self.up = nn.ModuleList(nn.Linear(8, 64) for _ in range(count))
        self.down = nn.ModuleList(nn.Linear(64, 8) for _ in range(count))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        positions = torch.arange(tokens.shape[1], device=tokens.device).float().cos()
        for up, down in zip(self.up, self.down, strict=True):
            normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.scale
            x = x + down(up(normed).relu() * positions[:, None])
        return x


def calls(count: int = 5) -> list[Tensor]:
    return [torch.randint(0, 20, (2, 6), generator=torch.Generator().manual_seed(i)) for i in range(count)]


def visited(program: fxc.Program, budget: int | None, change: bool) -> tuple[dict[str, list[Tensor]], list[int]]:
    """Every linear layer's inputs; with ``change`` each layer's weight is halved after its visit."""
    found: dict[str, list[Tensor]] = {}
    bases = []
    walk = Walk(program, [((c,), {}) for c in calls()], budget)
    with torch.no_grad(), evaluating(program.gm):
        for node, module in list(program.layers()):
            if not isinstance(module, nn.Linear):
                continue
            seen: list[Tensor] = []
            source: Any = node.args[0]
            walk.visit(node, [source], lambda _, values, seen=seen: seen.append(values[0].clone()))
            bases.append(walk._base)
            found[str(node.target)] = seen
            if change:
                module.weight = nn.Parameter(module.weight / 2)
    return found, bases


def listened(model: nn.Module) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {}

    def listen(name: str) -> Any:
        return lambda _, args: found.setdefault(name, []).append(args[0].clone())

    handles = [m.register_forward_pre_hook(listen(n)) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    with torch.no_grad():
        for call in calls():
            model(call)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("budget", [None, 0, 2000])
def test_layers_see_what_hooks_see(budget: int | None) -> None:
    torch.manual_seed(0)
    model = Blocks().eval()
    expected = listened(model)
    found, _ = visited(fxc.capture(model, (calls()[0],)), budget, change=False)
    assert set(found) == set(expected)
    for name, seen in found.items():
        torch.testing.assert_close(torch.stack(seen), torch.stack(expected[name]))


@pytest.mark.parametrize("budget", [None, 0])
def test_later_layers_see_what_changed_layers_give(budget: int | None) -> None:
    torch.manual_seed(0)
    model = Blocks().eval()
    halved = Blocks().eval()
    halved.load_state_dict(model.state_dict())
    with torch.no_grad():
        for module in halved.modules():
            if isinstance(module, nn.Linear):
                module.weight /= 2
    expected = listened(halved)
    program = fxc.capture(model, (calls()[0],))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    found, _ = visited(program.clone(), budget, change=True)
    for name, seen in found.items():
        torch.testing.assert_close(torch.stack(seen), torch.stack(expected[name]))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_small_budget_keeps_the_residual_stream() -> None:
    """5 calls x 12 tokens x 8 features x 4 bytes = 1,920 bytes of residual stream; the wide middle is eight times that."""
    torch.manual_seed(0)
    program = fxc.capture(Blocks().eval(), (calls()[0],))
    _, all_kept = visited(program, None, change=False)
    _, narrow = visited(program, 2000, change=False)
    places = {str(n.target): i for i, n in enumerate(program.graph.nodes) if n.op == "call_module"}
    assert all_kept == [places[f"{kind}.{i}"] for i in range(3) for kind in ("up", "down")]
    widest = 12 * 5 * 64 * 4
    walk = Walk(program, [((c,), {}) for c in calls()], 2000)
    assert all(walk._width[base] <= 2000 for base in narrow) and max(walk._width) >= widest


def test_the_way_from_what_is_kept_stays_short() -> None:
    """The residual stream does not fit, the tokens would; going back to them for every layer would cost layers squared."""
    torch.manual_seed(0)
    program = fxc.capture(Blocks(12).eval(), (calls()[0],))
    _, bases = visited(program, 1000, change=False)
    order = list(program.graph.nodes)
    layers = [i for i, n in enumerate(order) if n.op == "call_module" and isinstance(program.module(n), nn.Linear)]
    for stop, base in zip(layers, bases, strict=True):
        assert sum(base <= i < stop for i in layers) <= 8
    assert len(set(bases)) > 6


def test_a_token_out_of_the_vocabulary_is_named() -> None:
    program = fxc.capture(Blocks().eval(), (calls()[0],))
    linear = next(n for n, m in program.layers() if isinstance(m, nn.Linear))
    with pytest.raises(CalibrationError, match="token 20") as caught, torch.no_grad():
        Walk(program, [((calls()[0],), {}), ((torch.full((1, 6), 20),), {})]).visit(linear, [], lambda *_: None)
    assert "0 to 19" in str(caught.value) and "batch 1" in str(caught.value)


def test_first_tokens_are_left_out() -> None:
    x = torch.randn(3, 5, 4)
    statistics = InputStatistics(nn.Linear(4, 2), moments=True, skip=2, magnitudes=True)
    statistics.update(x)
    rows = x[:, 2:].reshape(-1, 4).double()
    assert statistics.rows == 9 and statistics.total is not None and statistics.absolute is not None
    torch.testing.assert_close(statistics.total[0], rows.T @ rows, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(statistics.absolute[0], rows.abs().sum(0), rtol=1e-5, atol=1e-5)
    statistics.update(x.reshape(-1, 4))
    assert statistics.unskipped == 1 and statistics.rows == 24
