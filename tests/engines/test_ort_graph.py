"""What ONNX Runtime is given: fewer, larger operators that compute the same."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.engines import Engine
from fxcompress.passbase import Pass
from tests.helpers.products import compressed

pytestmark = pytest.mark.onnxruntime

#: Sums in another order.
EXACT = 3e-6
FREE = torch.export.Dim.AUTO


def built(model: nn.Module, inputs: tuple[Tensor, ...], *passes: Pass, **options: Any) -> tuple[Engine, Counter[str]]:
    """The engine of a model and the operators of its file."""
    import onnx

    torch.manual_seed(0)
    engine = fxc.compile(model.eval(), inputs, passes=passes, target="onnxruntime", measure=False, threads=1, **options)
    return engine, Counter(n.op_type for n in onnx.load(str(engine.files()[0])).graph.node)


def same(engine: Engine, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    with torch.no_grad():
        expected = model.double()(*(x.double() if x.is_floating_point() else x for x in inputs))
    model.float()
    found = engine(*inputs)
    pairs = zip(expected, found, strict=True) if isinstance(expected, tuple) else [(expected, found)]
    for y, z in pairs:
        assert float((y - z).norm() / y.norm()) < EXACT


# ------------------------------------------------------------------------------------------------ products
class Branches(nn.Module):
    """Three linear layers on one input, one of them without a bias, and two more behind each other."""

    def __init__(self, biases: tuple[bool, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList(nn.Linear(64, n, bias=b) for n, b in zip((32, 48, 16), biases, strict=True))
        self.a, self.b = nn.Linear(96, 64, bias=False), nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x) for part in self.parts)
        return self.b(self.a(torch.cat([q.tanh(), k.sigmoid(), v], -1)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("biases", [(False, False, False), (True, False, True), (True, True, True)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dynamic", [False, True])
def test_products_of_one_input_are_one_call(biases: tuple[bool, ...], symmetric: bool, dynamic: bool) -> None:
    import onnx

    passes: list[Pass] = [fxc.QuantizeWeights(group_size=32, symmetric=symmetric), *([fxc.QuantizeDynamic()] * dynamic)]
    torch.manual_seed(1)
    found = compressed("onnxruntime", passes, Branches(biases), torch.randn(2, 5, 64), torch.randn(2, 5, 64))
    kinds = Counter(n.op_type for n in onnx.load(str(found.engine.files()[0])).graph.node)
    assert kinds["MatMulNBits"] == 3 and kinds["Split"] == 1
    assert found.parity.error < (5e-3 if dynamic else EXACT)


def test_a_weight_of_two_products_is_stored_once() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(self.b(x)) + self.a(x)  # type: ignore[no-any-return]

    found = compressed(
        "onnxruntime", [fxc.QuantizeWeights(group_size=32)], Shared(), torch.randn(2, 64), torch.ones(1, 64)
    )
    assert found.parity.error < EXACT and found.engine.file_size() < 2 * 64 * 64 * 0.75 + 2500


# ------------------------------------------------------------------------------------------------ rotary embeddings
def tables(batch: int, tokens: int, size: int, *, equal: bool = True) -> tuple[Tensor, Tensor]:
    angles = torch.rand(batch, tokens, size // 2 if equal else size)
    angles = torch.cat([angles, angles], -1) if equal else angles
    return angles.cos(), angles.sin()


class Rotary(nn.Module):
    """Rotated queries and keys; the tables as constants, looked up by position, or computed in the graph as in Llama."""

    cos: Tensor
    sin: Tensor

    def __init__(self, how: str, *, equal: bool = True) -> None:
        super().__init__()
        self.how = how
        cos, sin = tables(1, 20, 16, equal=equal)
        self.register_buffer("cos", cos[0])
        self.register_buffer("sin", sin[0])
        self.register_buffer("frequencies", torch.rand(8))

    def half_turn(self, x: Tensor) -> Tensor:
        if self.how == "slices":
            return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)
        first, second = x.chunk(2, dim=-1)
        return torch.cat([-second, first], dim=-1)

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        if self.how == "computed":
            angles = positions[..., None] * self.get_buffer("frequencies")
            both = torch.cat([angles, angles], -1)
            cos, sin = both.cos()[:, None] * 1.5, both.sin()[:, None] * 1.5
        elif self.how == "constant":
            cos, sin = self.cos[None, None, : x.shape[2]], self.sin[None, None, : x.shape[2]]
        else:
            cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]
        first = x[:, :1]
        return x * cos + self.half_turn(x) * sin, cos * first + sin * self.half_turn(first)


@pytest.mark.parametrize("how", ["slices", "looked up", "computed", "constant"])
@pytest.mark.parametrize("batch", [1, 3])
def test_rotary_embeddings_are_one_operator(how: str, batch: int) -> None:
    torch.manual_seed(0)
    model, inputs = Rotary(how).eval(), (torch.randn(batch, 4, 5, 16), torch.randint(0, 20, (batch, 5)))
    engine, kinds = built(model, inputs, dynamic_shapes={"x": {0: FREE}, "positions": {0: FREE}})
    assert kinds["RotaryEmbedding"] == 2 and not kinds["Neg"]
    same(engine, model, inputs)
    for other in (2, 4) if batch > 1 else ():
        same(engine, model, (torch.randn(other, 4, 5, 16), torch.randint(0, 20, (other, 5))))


def test_tables_with_different_halves_are_left_alone() -> None:
    model, inputs = Rotary("looked up", equal=False).eval(), (torch.randn(2, 4, 5, 16), torch.randint(0, 20, (2, 5)))
    engine, kinds = built(model, inputs)
    assert not kinds["RotaryEmbedding"]
    same(engine, model, inputs)


# ------------------------------------------------------------------------------------------------ a decoder with a cache
class Cached(nn.Module):
    """Attention of one token over a cache that it extends."""

    def __init__(self, give_all: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))
        self.give_all = give_all

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (layer(x).unflatten(-1, (2, 16)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        y = nn.functional.scaled_dot_product_attention(q, keys, values)
        return (y.flatten(1), keys, values) if self.give_all else (y.flatten(1), k, v)


def cached(batch: int, tokens: int, past: int) -> tuple[Tensor, ...]:
    torch.manual_seed(past)
    return torch.randn(batch, tokens, 32), torch.randn(batch, 2, past, 16), torch.randn(batch, 2, past, 16)


def test_a_cache_is_read_without_copying_it() -> None:
    model, inputs = Cached().eval(), cached(2, 1, 7)
    sizes: Any = {"x": {0: FREE}, **{n: {0: FREE, 2: FREE} for n in ("keys", "values")}}
    engine, kinds = built(model, inputs, dynamic_shapes=sizes)
    assert kinds["Transpose"] == 2  # of old and new keys; heads are reshaped
    assert not kinds["Identity"]  # outputs are named, not copied
    for batch, past in ((2, 7), (1, 30), (3, 1)):
        same(engine, model, cached(batch, 1, past))


def test_a_cache_that_is_given_back_is_joined() -> None:
    model, inputs = Cached(give_all=True).eval(), cached(1, 1, 7)
    engine, kinds = built(model, inputs)
    assert kinds["Concat"] == 2 and kinds["MatMul"] == 2 + 3 * (not kinds["Gemm"])
    same(engine, model, inputs)


def test_many_new_tokens_are_joined() -> None:
    """Scores of many rows would be larger than the cache that is not copied."""
    model, inputs = Cached().eval(), cached(1, 8, 7)
    engine, kinds = built(model, inputs)
    assert kinds["Concat"] == 2
    same(engine, model, inputs)


# ------------------------------------------------------------------------------------------------ views
class Views(nn.Module):
    """Chains of reshaping: a free batch, two free sizes, one that is read twice, and a value that is an output twice."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        a = x.relu().unflatten(-1, (4, 3)).transpose(1, 2).flatten(1)
        b = y.relu().unflatten(-1, (4, 3)).flatten(2)[:, None] + 1
        c = x.exp().reshape(-1, 12)
        return a + 1, b, c.unflatten(-1, (3, 4)) * 2, c[:, None] * 3, a, a, c.unflatten(0, (-1, 1))


def test_views_of_views() -> None:
    model, inputs = Views().eval(), (torch.randn(3, 1, 12), torch.randn(3, 5, 12))
    engine, kinds = built(model, inputs, dynamic_shapes={"x": {0: FREE}, "y": {0: FREE, 1: FREE}})
    assert kinds["Transpose"] == 0 and kinds["Identity"] <= 1
    for batch, length in ((3, 5), (1, 1), (2, 9)):
        torch.manual_seed(batch)
        same(engine, model, (torch.randn(batch, 1, 12), torch.randn(batch, length, 12)))


# ------------------------------------------------------------------------------------------------ norms
class Residual(nn.Module):
    """RMSNorms of sums: of equal shapes, of a broadcast one, and over another dimension than the last."""

    def __init__(self, epsilon: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.other, self.epsilon = nn.Parameter(torch.rand(24)), nn.Parameter(torch.rand(5, 1)), epsilon

    def norm(self, x: Tensor, dim: int) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(dim, keepdim=True) + self.epsilon)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        a = x + y
        b = x + y[:, :1]
        c = x.sin() + y
        return self.weight * self.norm(a, -1), a.relu(), self.weight * self.norm(b, -1), self.other * self.norm(c, 1)


@pytest.mark.parametrize("epsilon", [1e-6, 0.3])
def test_a_norm_of_a_sum_is_one_operator(epsilon: float) -> None:
    torch.manual_seed(0)
    model, inputs = Residual(epsilon).eval(), (torch.randn(3, 5, 24) * 0.3, torch.randn(3, 5, 24) * 0.3)
    engine, kinds = built(model, inputs, dynamic_shapes={"x": {0: FREE}, "y": {0: FREE}})
    assert kinds["SkipSimplifiedLayerNormalization"] == 1
    for batch in (3, 1, 4):
        same(engine, model, (torch.randn(batch, 5, 24), torch.randn(batch, 5, 24)))


# ------------------------------------------------------------------------------------------------ float64
@pytest.mark.parametrize("kind", ["rotary", "norm", "cache"])
def test_models_in_float64(kind: str) -> None:
    """The runtime's own operators have no kernels for them, or compute in float32, so they keep the plain ones."""
    torch.manual_seed(0)
    model, inputs = {
        "rotary": (Rotary("looked up"), (torch.randn(2, 4, 5, 16), torch.randint(0, 20, (2, 5)))),
        "norm": (Residual(1e-6), (torch.randn(3, 5, 24), torch.randn(3, 5, 24))),
        "cache": (Cached(), cached(2, 1, 7)),
    }[kind]
    double = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    engine, kinds = built(model.double(), double)
    assert not kinds.keys() & {"RotaryEmbedding", "SkipSimplifiedLayerNormalization"}
    with torch.no_grad():
        for y, z in zip(model(*double), engine(*double), strict=True):
            assert z.dtype == torch.float64 and float((y - z).abs().max()) < 1e-12
