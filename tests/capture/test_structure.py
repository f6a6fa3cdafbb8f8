"""Inputs, outputs and modes: how a captured program is called, what it returns, and what it leaves alone."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from fxcompress.capture import capture
from fxcompress.errors import UsageError
from tests.helpers.capture_checks import (
    Inputs,
    assert_same_outputs,
    check_capture,
    floats,
    images,
)


@dataclass
class Part:
    score: Tensor
    label: str


@dataclass
class Result:
    logits: Tensor
    parts: list[Part]
    loss: Tensor | None = None


class Pair(NamedTuple):
    first: Tensor
    second: dict[str, Tensor]


class Outputs(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.fc, self.kind = nn.Linear(4, 4), kind

    def forward(self, x: Tensor) -> Any:
        y = self.fc(x)
        if self.kind == "dict":
            return {"b": y, "a": (x, y, y), "n": 3, "none": None, "text": "t", "weight": self.fc.weight}
        if self.kind == "list":
            return [y, [y + 1], ()]
        if self.kind == "named tuple":
            return Pair(y, {"z": y * 2})
        if self.kind == "dataclass":
            return Result(y, [Part(y.sum(1), "a"), Part(y.mean(1), "b")])
        return y[0, 0] * 0 + 2 if self.kind == "scalar" else y


@pytest.mark.parametrize("kind", ["tensor", "dict", "list", "named tuple", "dataclass", "scalar"])
def test_output_structure(kind: str) -> None:
    check_capture(Outputs(kind), floats(4))


class Inputs4(nn.Module):
    """Positional, keyword, nested, optional and constant inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(
        self,
        x: Tensor,
        pair: tuple[Tensor, dict[str, Tensor]],
        *,
        scale: float = 1.0,
        mask: Tensor | None = None,
        flag: bool = True,
    ) -> Tensor:
        y = self.fc(x) * scale + pair[0] - pair[1]["b"] * 2 + pair[1]["a"]
        return y if mask is None or not flag else y * mask


def nested(batch: int) -> Inputs:
    a, b, c, d = (torch.randn(batch, 4) for _ in range(4))
    return (a, (b, {"a": c, "b": d})), {"mask": torch.ones(batch, 4), "scale": 0.5}


def test_nested_and_keyword_inputs() -> None:
    program = check_capture(Inputs4(), nested)
    assert program.signature.names == ("x", "pair", "mask", "scale")
    (x, pair), kwargs = nested(2)
    expected = program(x, pair, **kwargs)
    assert torch.equal(
        program(scale=0.5, pair=(pair[0], dict(reversed(pair[1].items()))), mask=kwargs["mask"], x=x), expected
    )


MISTAKES: dict[str, tuple[str, Any]] = {
    "missing": ("FXC-USAGE-011", lambda p, a, k: p(*a)),
    "unknown": ("FXC-USAGE-011", lambda p, a, k: p(*a, **k, other=1)),
    "too many": ("FXC-USAGE-010", lambda p, a, k: p(*a, 1, 2, 3)),
    "structure": ("FXC-USAGE-012", lambda p, a, k: p(a[0], (a[1][0], {"a": a[0]}), **k)),
    "constant": ("FXC-USAGE-013", lambda p, a, k: p(*a, **{**k, "scale": 2.0})),
    "dtype": ("FXC-USAGE-014", lambda p, a, k: p(a[0].double(), a[1], **k)),
    "width": ("FXC-USAGE-014", lambda p, a, k: p(torch.randn(2, 5), a[1], **k)),
    "rank": ("FXC-USAGE-014", lambda p, a, k: p(a[0][0], a[1], **k)),
    "no tensor": ("FXC-USAGE-014", lambda p, a, k: p([1.0], a[1], **k)),
    "batches differ": ("FXC-USAGE-015", lambda p, a, k: p(torch.randn(3, 4), a[1], **k)),
}


@pytest.fixture(scope="module")
def nested_program() -> Any:
    args, kwargs = nested(2)
    return capture(Inputs4(), args, kwargs)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_call_that_does_not_fit_is_refused(mistake: str, nested_program: Any) -> None:
    identifier, call = MISTAKES[mistake]
    with pytest.raises(UsageError) as caught:
        call(nested_program, *nested(2))
    assert caught.value.id == identifier


def test_positional_and_keyword_inputs_in_any_order() -> None:
    class Net(nn.Module):
        def forward(self, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
            return a - 2 * b + 3 * c - 4 * d

    def inputs(batch: int) -> Inputs:
        a, b, c, d = (torch.randn(batch, 4) for _ in range(4))
        return (a,), {"d": d, "c": c, "b": b}

    check_capture(Net(), inputs)


def test_variadic_inputs() -> None:
    class Positional(nn.Module):
        def forward(self, *xs: Tensor) -> Tensor:
            return xs[0] - xs[1] * 2

    class Keyword(nn.Module):
        def forward(self, **named: Tensor) -> Tensor:
            return named["z"] - named["y"] * 2

    check_capture(Positional(), lambda b: ((torch.randn(b, 4), torch.randn(b, 4)), {}))
    # torch.export takes no dynamic shapes for **named: the batch is fixed, and a note says so
    pair = lambda b: ((), {"z": torch.randn(b, 4), "y": torch.randn(b, 4)})  # noqa: E731
    check_capture(Keyword(), pair, batches=(1,), notes=("sizes are fixed",))


def test_dataclass_input() -> None:
    class Net(nn.Module):
        def forward(self, part: Part) -> Tensor:
            return part.score * 2

    check_capture(Net(), lambda b: ((Part(torch.randn(b, 4), "a"),), {}))


# ------------------------------------------------------------------------------------------------ sizes
def test_batch_is_free_and_nothing_else() -> None:
    program = check_capture(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 5)), images(size=6), batches=(1, 3, 7)
    )
    assert [list(dims) for dims in program.dynamic_dims().values()] == [[0]]


def test_static_batch_on_request() -> None:
    program = capture(nn.Linear(4, 4), (torch.randn(2, 4),), dynamic_batch=False)
    assert program.notes == [] and list(program.dynamic_dims().values()) == [{}]
    with pytest.raises(UsageError, match="captured float32"):
        program(torch.randn(3, 4))


class FixesBatch(nn.Module):
    """Window code of the old kind: the batch size becomes a Python number."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.fc, self.kind = nn.Linear(4, 4), kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "int":
            return self.fc(x).view(int(x.shape[0] * 1.0), 2, 2)
        if self.kind == "branch":
            return self.fc(x) * (2 if x.shape[0] == 1 else 3)
        return self.fc(x) + torch.zeros(len([*x]), 1)


@pytest.mark.parametrize("kind", ["int", "loop"])
@pytest.mark.parametrize("example", [1, 4])
def test_a_fixed_batch_is_said_and_kept(kind: str, example: int) -> None:
    model = FixesBatch(kind)
    program = check_capture(model, floats(4), example=example, batches=(example,), notes=("sizes are fixed",))
    with pytest.raises(UsageError):
        program(torch.randn(example + 1, 4))


@pytest.mark.parametrize("example", [1, 4])
def test_a_branch_on_batch_one_is_found(example: int) -> None:
    """Export takes the branch of the traced batch without a word: running batch 1 as well tells."""
    program = check_capture(
        FixesBatch("branch"), floats(4), example=example, batches=(example,), notes=("sizes are fixed",)
    )
    assert "differ" in program.notes[0]


def test_sizes_that_only_the_batch_shares_by_chance() -> None:
    """A batch of 4 among four channels, four heads, four rows: nothing may be taken for the batch."""
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 4))
    check_capture(model, images(channels=4, size=4), example=4, batches=(1, 4, 5))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(9, 8), nn.Embedding(32, 8)
        self.qkv = nn.Linear(8, 24)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        batch, length = ids.shape
        x = self.embedding(ids) + self.position(torch.arange(length))
        q, k, v = self.qkv(x).view(batch, length, 3, 2, 4).permute(2, 0, 3, 1, 4)
        bias = torch.where(mask[:, None, None, :] > 0, 0.0, float("-inf"))
        causal = torch.triu(torch.full((length, length), -1e4), 1)
        return F.scaled_dot_product_attention(q, k, v, bias + causal).transpose(1, 2).reshape(batch, length, 8)


def tokens(batch: int, length: int = 6) -> Inputs:
    return (torch.randint(0, 9, (batch, length)), torch.ones(batch, length, dtype=torch.long)), {}


@pytest.mark.parametrize("dims", [(Dim.AUTO, Dim.AUTO), (Dim("batch"), Dim("length", max=32))], ids=["auto", "named"])
def test_dynamic_sequence_length(dims: tuple[Any, Any]) -> None:
    model = Attention().eval()
    shapes = ({0: dims[0], 1: dims[1]}, {0: dims[0], 1: dims[1]})
    program = capture(model, tokens(2)[0], dynamic_shapes=shapes)
    for batch, length in ((1, 6), (3, 6), (2, 5), (1, 1), (4, 31)):
        args, _ = tokens(batch, length)
        assert_same_outputs(model(*args), program(*args))
    assert program.notes == []
    if dims[0] is not Dim.AUTO:
        with pytest.raises(UsageError, match="cannot be 33"):
            program(*tokens(1, 33)[0])


def test_dynamic_image_size() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1)).eval()
    size = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}
    program = capture(model, (torch.randn(1, 3, 32, 32),) * 1, dynamic_shapes=({2: Dim.AUTO, 3: Dim.AUTO},))
    x = torch.randn(1, 3, 40, 24)
    assert torch.equal(program(x), model(x))
    program = capture(model, (torch.randn(2, 3, 32, 32),), dynamic_shapes=(size,))
    x = torch.randn(1, 3, 40, 24)
    assert torch.equal(program(x), model(x))


def test_multiple_of_a_size() -> None:
    class Pairs(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(x.shape[0], -1, 2).sum(-1)

    model = Pairs()
    program = capture(model, (torch.randn(2, 6),), dynamic_shapes=({0: Dim.AUTO, 1: 2 * Dim("half", min=1, max=8)},))
    x = torch.randn(3, 10)
    assert torch.equal(program(x), model(x))
    with pytest.raises(UsageError, match="cannot be 7"):
        program(torch.randn(3, 7))


# ------------------------------------------------------------------------------------------------ train and eval
