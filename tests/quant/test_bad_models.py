"""Models that quantization must refuse, or treat with care: quantized already, nothing to quantize, tied weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import FxcError, PassError, UsageError
from fxcompress.quant.fake_quantize import QUANTIZERS


class Tied(nn.Module):
    """An embedding, a layer, and a head with the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(24, 16), nn.Linear(16, 16), nn.Linear(16, 24, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.relu(self.mix(self.embed(tokens))))  # type: ignore[no-any-return]


@cache
def tied() -> tuple[nn.Module, fxc.Program, Tensor]:
    torch.manual_seed(0)
    model, tokens = Tied().eval(), torch.randint(0, 24, (3, 5))
    return model, fxc.capture(model, (tokens,)), tokens


def run(pass_: Any, program: fxc.Program, tokens: Any) -> Any:
    return pass_(program, fxc.Context(calibration=[tokens], verify=False))


FIRST: dict[str, Any] = {
    "static": fxc.QuantizeStatic(),
    "dynamic": fxc.QuantizeDynamic(),
    "weights": fxc.QuantizeWeights(bits=4, group_size=-1),
}
AGAIN: dict[str, Callable[[fxc.Program, Tensor], object]] = {
    "QuantizeStatic": lambda p, x: run(fxc.QuantizeStatic(), p, x),
    "SmoothQuant": lambda p, x: run(fxc.SmoothQuant(), p, x),
    "Rotate": lambda p, x: run(fxc.Rotate(), p, x),
    "prepare_qat": lambda p, x: fxc.prepare_qat(p),
    "load_compressed_tensors": lambda p, x: fxc.load_compressed_tensors(p, "nowhere"),
}


@pytest.mark.parametrize("again", AGAIN)
@pytest.mark.parametrize("first", FIRST)
def test_a_program_that_is_quantized_already_is_refused(first: str, again: str) -> None:
    _, program, tokens = tied()
    quantized = run(FIRST[first], program, tokens).program
    text = quantized.text()
    with pytest.raises(FxcError, match=r"(?i)quantiz") as caught:
        AGAIN[again](quantized, tokens)
    assert "fix:" in str(caught.value) and not isinstance(caught.value, AssertionError)
    assert quantized.text() == text


def test_weights_that_have_grids_keep_them() -> None:
    """Mixing passes is allowed: the second one leaves what is quantized alone."""
    _, program, tokens = tied()
    first = run(FIRST["weights"], program, tokens).program
    second = run(fxc.QuantizeWeights(bits=8), first, tokens).program
    assert second.text() == first.text()
    both = run(fxc.QuantizeDynamic(), first, tokens).program
    assert both.gm.mix.weight_fake_quantize.spec.bits == 4  # type: ignore[union-attr]
    with pytest.raises(PassError, match="quantizers of activations already"):
        run(fxc.QuantizeDynamic(), both, tokens)


class Plain(nn.Module):
    """Nothing that multiplies by a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.norm(x), dim=-1)


@pytest.mark.parametrize("name", [*FIRST, "qat", "awq"])
def test_a_model_without_layers_to_quantize_is_refused(name: str) -> None:
    x = torch.randn(2, 8)
    program = fxc.capture(Plain().eval(), (x,))
    with pytest.raises(PassError, match=r"there is no .*layer"):
        if name == "qat":
            fxc.prepare_qat(program)
        elif name == "awq":
            run(fxc.QuantizeWeights(method="awq"), program, x)
        else:
            run(FIRST[name], program, x)
    with pytest.raises(UsageError, match="not quantized"):
        fxc.quant_report(program, [x])


def test_a_tied_head_stays_float_unless_it_is_named() -> None:
    model, program, tokens = tied()
    result = run(FIRST["weights"], program, tokens)
    assert any("head stays float: it shares its weight with embed" in note for note in result.notes)
    left = result.program
    assert left.gm.head.weight is left.gm.embed.weight is model.embed.weight  # type: ignore[union-attr]
    named = run(fxc.QuantizeWeights(bits=4, group_size=-1, include=("head",)), program, tokens)
    assert any("embed keeps the float one" in note for note in named.notes)
    head = named.program.gm.head
    rounded = head.weight_fake_quantize(head.weight)  # type: ignore[union-attr, operator]
    with torch.no_grad():
        hidden = torch.relu(model.mix(model.embed(tokens)))  # type: ignore[operator]
        torch.testing.assert_close(named.program(tokens), hidden @ rounded.t())
    assert not torch.equal(rounded, model.embed.weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["static", "dynamic", "gptq"])
def test_the_embedding_of_a_tied_head_is_not_rounded(name: str) -> None:
    model, program, tokens = tied()
    pass_ = fxc.QuantizeWeights(bits=4, group_size=-1, method="gptq", include="*") if name == "gptq" else FIRST[name]
    before = model.embed.weight.detach().clone()  # type: ignore[union-attr, operator]
    quantized = run(pass_, program, tokens).program
    assert torch.equal(quantized.gm.embed.weight, before)  # type: ignore[union-attr]
    assert torch.equal(model.embed.weight, before)  # type: ignore[arg-type]
    assert any(isinstance(m, QUANTIZERS) for m in quantized.gm.head.modules())  # type: ignore[union-attr]
    report = fxc.quant_report(quantized, [tokens], reference=program)
    assert [r.name for r in report.rows if r.kind == "linear"] == ["mix", "head"]
    assert all(r.alone is not None and 0 < r.alone < 1 for r in report.rows)


def test_embedding_and_recurrent_layers_have_rows() -> None:
    torch.manual_seed(0)

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.lstm, self.head = nn.Embedding(24, 8), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.lstm(self.embed(tokens))[0])  # type: ignore[no-any-return]

    tokens = torch.randint(0, 24, (3, 5))
    program = fxc.capture(Tagger().eval(), (tokens,))
    quantized = run(fxc.QuantizeDynamic(embeddings=True), program, tokens).program
    report = fxc.quant_report(quantized, [tokens])
    kinds = {r.name: r.kind for r in report.rows}
    assert kinds == {"embed": "embedding", "lstm": "lstm", "head": "linear"}
    for row in report.rows:
        assert row.weight is not None and row.weight.bits == 8 and 20 < (row.weight.sqnr_db or 0) < 80
        assert row.alone is not None and 0 < row.alone < 0.1
