"""What a quantizing pass cannot take is said, and is what ``strict`` refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import PassError, UsageError
from fxcompress.quant.leftovers import left_float
from tests.helpers.quick import RUNTIMES


class Mixed(nn.Module):
    """One of each: convolution, LSTM with a projection, plain RNN, a product with a parameter, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 16, 3, padding=1), nn.BatchNorm1d(16)
        self.projected, self.rnn = nn.LSTM(16, 16, proj_size=8, batch_first=True), nn.RNN(8, 16, batch_first=True)
        self.experts = nn.Parameter(torch.randn(2, 16, 16))
        self.prior = nn.Parameter(torch.randn(1, 1, 16))
        self.head = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).transpose(1, 2)
        x = self.rnn(self.projected(x)[0])[0] + self.prior
        shown = torch.bmm(x, self.experts.transpose(1, 2)[: len(x)])
        return self.head(shown)


class Positions(nn.Module):
    """Parameters of two dimensions that no product reads."""

    def __init__(self) -> None:
        super().__init__()
        self.grid, self.place = nn.Parameter(torch.randn(1, 4, 4, 4)), nn.Parameter(torch.randn(1, 4))
        self.table, self.norm, self.head = nn.Embedding(9, 4), nn.LayerNorm((4, 4)), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        grid = F.interpolate(self.grid, size=(8, 8), mode="bilinear").mean((2, 3))
        y = self.norm(self.table(x)) + torch.lgamma(self.place.abs() + 1) + grid
        twice = (y + self.place) + self.place  # a value by now, not a weight
        return torch.matmul(self.head(y), twice.transpose(1, 2))


X = torch.randn(2, 4, 6)


def mixed() -> fxc.Program:
    torch.manual_seed(0)
    return fxc.capture(Mixed().eval(), (X,))


def left(notes: list[str]) -> set[str]:
    return {note.partition(" stays float: ")[0] for note in notes if " stays float: " in note}


def test_weights_alone_names_everything_else() -> None:
    result = fxc.QuantizeWeights(bits=4, group_size=16)(mixed(), fxc.Context())
    names = left(result.notes)
    assert result.changes == ["quantized head to 4 bits, groups of 16"]
    assert {"conv", "experts"} <= names and any(n.startswith("projected") for n in names)
    assert any(n.startswith("rnn") for n in names) and not names & {"norm", "prior", "head"}
    assert "experts stays float: a weight of bmm; QuantizeWeights rounds linear layers" in result.notes


def test_what_other_passes_take_is_not_named() -> None:
    names = left(fxc.QuantizeStatic()(mixed(), fxc.Context(calibration=[X])).notes)
    assert "experts" in names and not names & {"conv", "head"}
    lstm = fxc.capture(nn.Sequential(nn.Linear(8, 8), Recurrent()).eval(), (torch.randn(2, 3, 8),))
    assert left(fxc.QuantizeWeights(group_size=-1)(lstm, fxc.Context()).notes) == {"1.layer"}
    assert not left(fxc.QuantizeDynamic()(lstm, fxc.Context()).notes)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)[0]


def test_positions_tables_and_norms_are_no_products() -> None:
    program = fxc.capture(Positions().eval(), (torch.randint(0, 9, (2, 4)),))
    assert not left_float(program, "nothing", lambda name: True)


class Made(nn.Module):
    """Weights of products behind casts and arithmetic of weights; a bag of rows, which is a table."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.scale = (nn.Parameter(torch.randn(4, 4)) for _ in range(4))
        self.gain, self.bag = nn.Parameter(torch.ones(1, 4)), nn.EmbeddingBag(9, 4)
        self.conv = nn.Conv1d(1, 4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.conv((self.bag(tokens) * self.gain).unsqueeze(1)).squeeze(2)
        x = torch.mm(x, self.a * self.scale) + torch.mm(x.double(), self.b.to(torch.float64)).float()
        return torch.stack([torch.mv(self.c, row) for row in x.unbind()])


def test_weights_behind_casts_and_products_of_weights() -> None:
    program = fxc.capture(Made().eval(), (torch.randint(0, 9, (2, 3)),))
    found = {line.partition(" ")[0] for line in left_float(program, "nothing", lambda name: True)}
    assert found == {"a", "b", "c", "scale", "conv"}
    assert not left_float(program, "nothing", lambda name: name not in found)


def test_what_is_quantized_already_is_not_named() -> None:
    lstm = fxc.capture(nn.Sequential(nn.Linear(8, 8), Recurrent()).eval(), (torch.randn(2, 3, 8),))
    first = fxc.QuantizeDynamic(include="1.layer")(lstm, fxc.Context()).program
    assert not left(fxc.QuantizeWeights(group_size=-1)(first, fxc.Context()).notes)


def test_a_name_that_is_of_another_kind_of_layer_is_not_mistyped() -> None:
    for step in (fxc.QuantizeWeights(group_size=-1, ignore="conv"), fxc.QuantizeDynamic(ignore=("conv", "norm"))):
        notes = step(mixed(), fxc.Context()).notes
        assert not any("matches no layer" in n for n in notes) and "conv" not in left(notes)


def test_a_later_pass_that_takes_it_clears_the_report() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), Recurrent()).eval(), torch.randn(2, 3, 8)
    weights, dynamic = fxc.QuantizeWeights(bits=8), fxc.QuantizeDynamic()
    both = fxc.compile(model, (x,), passes=[weights, dynamic], target="torch", measure=False)
    assert not both.report.left
    one = fxc.compile(model, (x,), passes=[weights], target="torch", measure=False)
    assert [name for name, _ in one.report.left] == ["1.layer"]
    with pytest.raises(PassError, match=r"1\.layer"):
        fxc.compile(model, (x,), passes=[weights], target="torch", measure=False, strict=True)


def mixture(experts: str) -> tuple[Any, dict[str, Tensor]]:
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4, "use_cache": False}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads)).eval()
    model.set_experts_implementation(experts)
    return model, {"input_ids": torch.randint(3, 99, (2, 8))}


EXPERTS = {f"model.layers.0.mlp.experts.{n}_proj" for n in ("gate_up", "down")}


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
def test_experts_of_a_mixture_are_listed(experts: str) -> None:
    model, batch = mixture(experts)
    program = fxc.capture(model, (), batch)
    for step in (fxc.QuantizeWeights(group_size=32), fxc.QuantizeDynamic()):
        assert left(step(program, fxc.Context()).notes) >= EXPERTS


@pytest.mark.parametrize("runtime", [pytest.param(r, marks=getattr(pytest.mark, r)) for r in RUNTIMES])
def test_a_mixture_in_an_engine(runtime: str) -> None:
    """Parity is checked on the way; what is not quantized is in the report."""
    model, batch = mixture("batched_mm")
    engine = fxc.compile(model, batch, passes=[fxc.QuantizeWeights(group_size=32)], target=runtime, measure=False)
    assert {name for name, _ in engine.report.left} == EXPERTS
    other = torch.randint(3, 99, (2, 8))
    with torch.no_grad():
        off = engine(input_ids=other).logits - model(input_ids=other).logits
    assert off.abs().max() < 0.05


@pytest.mark.parametrize(
    "step", [fxc.QuantizeWeights(group_size=-1, ignore="haed"), fxc.QuantizeDynamic(ignore="haed")]
)
def test_mistyped_names(step: fxc.Pass) -> None:
    notes = step(mixed(), fxc.Context()).notes
    assert "ignore='haed' matches no layer" in notes


def test_mistyped_names_of_static_layers() -> None:
    notes = fxc.QuantizeStatic(weight_bits=4, eight_bits=("head", "haed"))(mixed(), fxc.Context(calibration=[X])).notes
    assert [n for n in notes if "matches no layer" in n] == ["eight_bits='haed' matches no layer"]


def test_hqq_takes_no_calibrator() -> None:
    with pytest.raises(UsageError, match="hqq fits its ranges itself"):
        fxc.QuantizeWeights(method="hqq", calibrator="minmax")
