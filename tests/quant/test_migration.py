"""Channel factors move exactly: outputs stay, or the graph is refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.layerwise.store import WeightStore
from fxcompress.quant.migration import Migration, find_migration
from fxcompress.rewrite import Analysis


class Net(nn.Module):
    """``out(body(x))``, the channels of ``body`` being divided."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor], features: int = 16, **layers: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = body
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.scale = nn.Parameter(torch.rand(16) + 0.5)
        self.shift = nn.Parameter(torch.randn(16))
        self.out, self.other = nn.Linear(features, 6), nn.Linear(features, 5)
        for parameter in self.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(self, x)
        return torch.cat([self.out(y), self.other(y)], -1)


def spelled_rms(m: Any, x: Tensor) -> Tensor:
    return m.scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def spelled_norm(m: Any, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.var(-1, keepdim=True) + 1e-6) * m.scale + m.shift


def attention(kv_heads: int, repeat: bool) -> Callable[[Any, Tensor], Tensor]:
    def body(m: Any, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q = m.q(x).view(batch, tokens, 4, 4).transpose(1, 2)
        k, v = (layer(x).view(batch, tokens, kv_heads, 4).transpose(1, 2) for layer in (m.k, m.v))
        if repeat and kv_heads != 4:
            k, v = (
                t[:, :, None].expand(batch, kv_heads, 4 // kv_heads, tokens, 4).reshape(batch, 4, tokens, 4)
                for t in (k, v)
            )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=not repeat and kv_heads != 4)
        return y.transpose(1, 2).reshape(batch, tokens, 16)

    return body


def spelled_attention(m: Any, x: Tensor) -> Tensor:
    q, k, v = (layer(x).unflatten(-1, (4, 4)).transpose(1, 2) for layer in (m.q, m.k, m.v))
    weights = torch.softmax(q @ k.transpose(-1, -2), -1)
    return (weights @ v).transpose(1, 2).flatten(2)


def heads(kv: int) -> dict[str, nn.Module]:
    return {"q": nn.Linear(16, 16), "k": nn.Linear(16, 4 * kv), "v": nn.Linear(16, 4 * kv)}


#: name -> the model, factors there are, who makes the channels
EXACT: dict[str, tuple[Callable[[], Net], int, list[str]]] = {
    "layer_norm": (lambda: Net(lambda m, x: m.norm(x), norm=nn.LayerNorm(16)), 16, ["norm"]),
    "rms_norm": (lambda: Net(lambda m, x: m.norm(x), norm=nn.RMSNorm(16)), 16, ["norm.weight"]),
    "functional_norm": (
        lambda: Net(lambda m, x: F.layer_norm(x, (16,), m.scale, m.shift)), 16, ["scale", "shift"]
    ),
    "spelled_rms": (lambda: Net(spelled_rms), 16, ["scale"]),
    "spelled_norm": (lambda: Net(spelled_norm), 16, ["scale", "shift"]),
    "linear_relu": (lambda: Net(lambda m, x: m.first(x).relu(), first=nn.Linear(16, 16)), 16, ["first"]),
    "gated": (
        lambda: Net(lambda m, x: F.silu(m.gate(x)) * m.up(x), gate=nn.Linear(16, 16), up=nn.Linear(16, 16)), 16, ["up"]
    ),
    "gated_the_other_way": (
        lambda: Net(lambda m, x: m.up(x) * F.silu(m.gate(x)), gate=nn.Linear(16, 16), up=nn.Linear(16, 16)), 16, ["up"]
    ),
    "sum": (
        lambda: Net(lambda m, x: m.a(x) + m.b(x).relu(), a=nn.Linear(16, 16), b=nn.Linear(16, 16)), 16, ["a", "b"]
    ),
    "attention": (lambda: Net(attention(4, True), **heads(4)), 16, ["v"]),
    "grouped_attention": (lambda: Net(attention(2, True), **heads(2)), 8, ["v"]),
    "one_head_for_all": (lambda: Net(attention(1, True), **heads(1)), 4, ["v"]),
    "grouped_in_the_operator": (lambda: Net(attention(2, False), **heads(2)), 8, ["v"]),
    "spelled_attention": (lambda: Net(spelled_attention, **heads(4)), 16, ["v"]),
}  # fmt: skip


def value_of(program: fxc.Program) -> Any:
    return next(n for n, _ in program.layers() if n.target == "out").args[0]


@pytest.mark.parametrize("name", EXACT)
def test_outputs_stay(name: str) -> None:
    make, count, producers = EXACT[name]
    model, x = make().double().eval(), torch.randn(3, 7, 16, dtype=torch.float64)
    program = fxc.capture(model, (x,))
    before = program(x).detach()
    migration = find_migration(Analysis(program), value_of(program))
    assert isinstance(migration, Migration), migration
    assert (migration.count, sorted(migration.producers)) == (count, producers)
    changed = program.clone()
    migration = find_migration(Analysis(changed), value_of(changed))
    assert isinstance(migration, Migration)
    factors = torch.logspace(-2, 2, count, dtype=torch.float64)
    outs = {m: m.weight.detach().clone() for n, m in changed.gm.named_modules() if n in ("out", "other")}
    migration.apply(changed, WeightStore(changed.gm, replace=True), factors)
    torch.testing.assert_close(changed(x), before, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(program(x), before, rtol=0, atol=0)
    for module, weight in outs.items():
        torch.testing.assert_close(module.weight, weight * factors[migration.groups])


def test_pooled_statistics() -> None:
    make, _, _ = EXACT["grouped_attention"]
    program = fxc.capture(make().eval(), (torch.randn(3, 7, 16),))
    migration = find_migration(Analysis(program), value_of(program))
    assert isinstance(migration, Migration)
    pooled = migration.pooled(torch.arange(16.0))
    # heads 0 and 1 share the first key-value head: channels i and i + 4
    assert sorted(pooled.tolist()) == [2.0, 3.0, 4.0, 5.0, 10.0, 11.0, 12.0, 13.0]


class Shared(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.body(self, x)
        return self.out(y) + y[..., :6]


#: name -> the model, part of the reason
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "gelu": (lambda: Net(lambda m, x: F.gelu(m.first(x)), first=nn.Linear(16, 16)), "gelu"),
    "input": (lambda: Net(lambda m, x: x), "input of the model"),
    "no_weight": (lambda: Net(lambda m, x: F.layer_norm(x, (16,))), "layer_norm"),
    "square": (lambda: Net(lambda m, x: (y := m.first(x)) * y, first=nn.Linear(16, 16)), "twice"),
    "swish": (lambda: Net(lambda m, x: (y := m.first(x)) * y.sigmoid(), first=nn.Linear(16, 16)), "reads first too"),
    "plus_one": (lambda: Net(lambda m, x: m.first(x) + 1.0, first=nn.Linear(16, 16)), "adds a number"),
    "plus_input": (lambda: Net(lambda m, x: m.first(x) + x, first=nn.Linear(16, 16)), "input of the model"),
    "softmax": (lambda: Net(lambda m, x: m.first(x).softmax(-1), first=nn.Linear(16, 16)), "softmax"),
    "another_axis": (
        lambda: Net(lambda m, x: m.first(x).transpose(1, 2), features=16, first=nn.Linear(16, 16)), "another axis"
    ),
    "norm_twice": (lambda: Net(lambda m, x: m.norm(x) * m.norm(x + 1), norm=nn.LayerNorm(16)), "called more than once"),
    "read_elsewhere": (lambda: Shared(lambda m, x: m.scale * x.relu()), "slice"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_have_a_reason(name: str) -> None:
    make, reason = REFUSED[name]
    x = torch.randn(3, 16, 16)
    program = fxc.capture(make().eval(), (x,))
    found = find_migration(Analysis(program), value_of(program))
    assert isinstance(found, str) and reason in found, found
