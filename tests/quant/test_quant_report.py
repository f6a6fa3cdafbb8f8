"""The quantization report against naive computations, its advice, and its pages."""

from __future__ import annotations

import dataclasses
import json
import math
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import UsageError
from fxcompress.quant.fake_quantize import QUANTIZERS, FakeQuantize
from fxcompress.quant.spec import QuantSpec


class Net(nn.Module):
    """Three convolutions, a residual add in front of the last one, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.third, self.head = nn.Conv2d(6, 6, 3), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.first(x))
        b = F.relu(self.second(a) + a)
        return self.head(F.relu(self.third(b)).mean((2, 3)))  # type: ignore[no-any-return]


class Heads(nn.Module):
    """Two layers that read one value."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        return torch.relu(self.a(y)) + self.b(y)


def quantized(model: nn.Module, data: list[Tensor], *passes: Any) -> fxc.Program:
    program = fxc.capture(model.eval(), (data[0],))
    for pass_ in passes or (fxc.FuseActivations(), fxc.QuantizeStatic()):
        program = pass_(program, fxc.Context(calibration=data, verify=False)).program
    return program


def images(count: int = 3, seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(2, 3, 8, 8) for _ in range(count)]


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


@contextmanager
def only(program: fxc.Program, kept: set[nn.Module]) -> Iterator[None]:
    """All quantizers but ``kept`` pass values on."""
    off = [m for m in program.gm.modules() if isinstance(m, QUANTIZERS) and m not in kept]
    for module in off:
        module.__dict__["forward"] = lambda x: x
    try:
        yield
    finally:
        for module in off:
            del module.__dict__["forward"]


def input_quantizer(program: fxc.Program, path: str) -> nn.Module:
    node = next(n for n in program.graph.nodes if n.op == "call_module" and n.target == path)
    source = node.args[0]
    while not (source.op == "call_module" and isinstance(program.module(source), FakeQuantize)):
        source = source.args[0]
    return program.module(source)


def test_errors_alone_are_those_of_a_program_with_one_layer_quantized() -> None:
    torch.manual_seed(1)
    program, data = quantized(Net(), images()), images(3, seed=5)
    report = fxc.quant_report(program, data, samples=6, alone=6)
    assert [r.name for r in report.rows if r.kind != "value"] == ["first", "second", "third", "head"]
    for path in ("first", "head"):  # what they read, nobody else reads
        layer = program.gm.get_submodule(path)
        with torch.no_grad(), only(program, set()):
            exact = torch.cat([program(x) for x in data])
        with torch.no_grad(), only(program, {layer.weight_fake_quantize, input_quantizer(program, path)}):
            alone = torch.cat([program(x) for x in data])
        assert report[path].alone == pytest.approx(relative(alone, exact), rel=1e-4)
    with torch.no_grad():
        assert report.error == pytest.approx(relative(torch.cat([program(x) for x in data]), exact), rel=1e-4)
    assert sum(r.share for r in report.rows) == pytest.approx(1)
    assert report.worst(1)[0].cost == max(r.cost for r in report.rows)


def test_a_value_that_two_layers_read_is_rounded_for_one_of_them() -> None:
    torch.manual_seed(0)
    data = [torch.randn(16, 8) for _ in range(2)]
    program = quantized(Heads(), data)
    report = fxc.quant_report(program, data[:1], samples=16, alone=16)
    x, layers = torch.tanh(data[0]), {n: program.gm.get_submodule(n) for n in ("a", "b")}
    rounded = input_quantizer(program, "a")(x)
    assert input_quantizer(program, "a") is input_quantizer(program, "b")
    with torch.no_grad():
        a, b = (F.linear(x, m.weight, m.bias) for m in layers.values())
        weight = layers["a"].weight_fake_quantize(layers["a"].weight)
        got = torch.relu(F.linear(rounded, weight, layers["a"].bias)) + b
    assert report["a"].alone == pytest.approx(relative(got, torch.relu(a) + b), rel=1e-4)
    by_input = relative(F.linear(rounded, layers["b"].weight, layers["b"].bias), b)
    assert report["b"].by_input_db == pytest.approx(-20 * math.log10(by_input), abs=0.01)
    own = report["b"].weight
    error = relative(layers["b"].weight_fake_quantize(layers["b"].weight), layers["b"].weight)
    assert own is not None and own.sqnr_db == pytest.approx(-20 * math.log10(error), abs=0.01)
    assert own.low == float(layers["b"].weight.detach().min()) and own.bits == 8


def test_operands_of_an_add_have_rows_of_their_own() -> None:
    torch.manual_seed(1)
    program = quantized(Net(), images(), fxc.QuantizeStatic())
    rows = [r for r in fxc.quant_report(program, images(), samples=2).rows if r.kind == "value"]
    assert rows and all(r.weight is None and r.alone is not None and 0 < r.alone < 0.1 for r in rows)


def test_a_program_with_dynamic_or_weight_only_layers() -> None:
    torch.manual_seed(0)
    data = [torch.randn(16, 8) for _ in range(2)]
    dynamic = fxc.quant_report(quantized(Heads(), data, fxc.QuantizeDynamic()), data)
    assert all(r.data is not None and r.data.bits == 8 and r.by_input_db is not None for r in dynamic.rows)
    rounded = quantized(Heads(), data, fxc.QuantizeWeights(bits=3, group_size=-1))
    weights = fxc.quant_report(rounded, data, samples=40, alone=0)
    assert all(r.data is not None and r.data.bits is None and r.by_input_db is None for r in weights.rows)
    assert all(r.alone is None and r.share == 0 for r in weights.rows) and weights.alone_samples == 0
    assert all("8 bits" in r.advice for r in weights.rows)
    assert "measured on 32 samples, 40 asked for" in weights.notes


def test_rounded_weights_are_compared_with_those_of_the_reference() -> None:
    torch.manual_seed(0)
    data = [torch.randn(16, 8) for _ in range(2)]
    model = Heads()
    program = quantized(model, data, fxc.QuantizeWeights(bits=4, group_size=-1, method="gptq"))
    plain = fxc.quant_report(program, data)
    assert plain.rows[0].weight is not None and plain.rows[0].weight.sqnr_db == math.inf
    assert any("pass reference=" in note for note in plain.notes)
    known = fxc.quant_report(program, data, reference=fxc.capture(model, (data[0],)))
    row = known["a"]
    error = relative(program.gm.a.weight, model.a.weight)  # type: ignore[union-attr, arg-type]
    assert row.weight is not None and row.weight.sqnr_db == pytest.approx(-20 * math.log10(error), abs=0.01)
    assert row.alone is not None and row.alone > 0 and known.reference_error == pytest.approx(known.error, rel=1e-3)
    other = fxc.quant_report(program, data, reference=fxc.capture(Heads().eval(), (data[0],)))
    assert other.reference_error is not None and other.reference_error > 0.5
    assert any("only the outputs are compared" in note for note in other.notes)


def test_a_qat_program_is_measured_as_its_conversion() -> None:
    torch.manual_seed(0)
    data = images()
    program = fxc.prepare_qat(fxc.capture(Net().eval(), (data[0],)))
    program.gm.train()
    for x in data:
        program(x)
    program.gm.eval()
    report = fxc.quant_report(program, data, samples=2)
    assert {"first", "second", "head"} <= {r.name for r in report.rows} and 0 < report.error < 0.2


# ------------------------------------------------------------------------------------------------ advice
def outlier_net() -> tuple[nn.Module, list[Tensor]]:
    """A linear layer one of whose input channels is 60 times the others, with a small weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16))
    with torch.no_grad():
        model[0].weight[:, 3] *= 0.01
    data = [torch.randn(32, 16) for _ in range(3)]
    for x in data:
        x[:, 3] *= 60
    return model, data


def test_an_outlier_channel_asks_for_smoothquant() -> None:
    model, data = outlier_net()
    row = fxc.quant_report(quantized(model, data), data).rows[0]
    assert row.data is not None and row.data.outliers[0][0] == 3 and row.data.outliers[0][1] > 20
    assert "SmoothQuant (channel 3" in row.advice and "by its input" in row.advice


def test_smoothquant_behind_a_norm_mends_it() -> None:
    model, data = outlier_net()
    norm = nn.LayerNorm(16)
    with torch.no_grad():
        norm.weight[3] *= 60
    model, data = nn.Sequential(norm, model[0]), [x / x.std(0) for x in data]
    plain = fxc.quant_report(quantized(model, data), data)
    row = next(r for r in plain.rows if r.name == "1")
    assert row.data is not None and row.data.outliers[0][0] == 3 and "SmoothQuant (channel 3" in row.advice
    smooth = quantized(model, data, fxc.SmoothQuant(), fxc.QuantizeStatic())
    assert fxc.quant_report(smooth, data).error < 0.5 * plain.error


def test_a_weight_with_one_scale_and_unlike_channels_asks_for_more_scales() -> None:
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(16, 16)), [torch.randn(32, 16)]
    with torch.no_grad():
        model[0].weight[0] *= 200
        model[0].bias.zero_()
    program = quantized(model, data, fxc.QuantizeDynamic())
    layer = program.gm.get_submodule("0")
    quantizer = FakeQuantize(QuantSpec(4, signed=True, symmetric=True))
    quantizer.set_range(model[0].weight.min().detach(), model[0].weight.max().detach())
    layer.weight_fake_quantize = quantizer
    row = fxc.quant_report(program, data).rows[0]
    assert row.weight is not None and row.weight.spread > 50
    assert "per-channel weights" in row.advice and "by its weight" in row.advice


def test_values_beyond_the_grid_ask_for_more_data() -> None:
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(16, 16)), [torch.randn(32, 16)]
    row = fxc.quant_report(quantized(model, [x * 0.1 for x in data]), data).rows[0]
    assert row.data is not None and row.data.beyond > 0.5 and row.data.clipped > 0.9
    assert "calibrate on more data" in row.advice


# ------------------------------------------------------------------------------------------------ forms
def test_the_forms_say_the_same_and_run_nothing(tmp_path: Path) -> None:
    torch.manual_seed(1)
    program = quantized(Net(), images())
    before = {k: v.clone() for k, v in program.gm.state_dict().items()}
    text = program.text()
    report = fxc.quant_report(program, images(), samples=2)
    assert program.text() == text and all(torch.equal(v, before[k]) for k, v in program.gm.state_dict().items())
    evil = "<script>alert(1)</script>&\"'"
    rows = (dataclasses.replace(report.rows[0], name=evil, advice=f"{evil}: do"), *report.rows[1:])
    report = dataclasses.replace(report, rows=rows, notes=(evil,), outputs=(evil,))
    page = report.to_html(tmp_path / "new" / "layers.html").read_text(encoding="utf-8")
    drawing = report.to_svg(tmp_path / "layers.svg").read_text(encoding="utf-8")
    for content in (page, drawing):
        assert "<script" not in content and "&lt;script&gt;" in content
        assert "src=" not in content and "href" not in content and "url(" not in content
        assert content.count("http") == content.count("http://www.w3.org/2000/svg") + content.count("http-equiv")
    assert "default-src 'none'" in page
    bars = [e for e in ET.fromstring(drawing).iter() if e.tag.endswith("rect")]
    assert len(bars) == len(report.rows) and float(bars[0].attrib["width"]) >= float(bars[-1].attrib["width"])
    content = json.loads(report.to_json(tmp_path / "layers.json").read_text(encoding="utf-8"))
    assert len(content["rows"]) == len(report.rows) and content["rows"][0]["name"] == evil
    bins = report["head"].weight.bins  # type: ignore[union-attr]
    assert sum(bins.exact) == pytest.approx(1) and sum(bins.rounded) == pytest.approx(1)
    assert len(str(report).splitlines()) == len(report.rows) + 3 + (len(report.notes) - 1)
    assert "and 2 rows more" in report.table(len(report.rows) - 2)


def test_what_cannot_be_reported() -> None:
    data = images(1)
    program = fxc.capture(Net().eval(), (data[0],))
    with pytest.raises(UsageError, match="not quantized"):
        fxc.quant_report(program, data)
    with pytest.raises(UsageError, match="takes a program, not Net"):
        fxc.quant_report(Net(), data)  # type: ignore[arg-type]
    good = quantized(Net(), data)
    with pytest.raises(UsageError, match="samples=0"):
        fxc.quant_report(good, data, samples=0)
    with pytest.raises(UsageError, match=r"nearest: head"):
        _ = fxc.quant_report(good, data, alone=0)["heat"]
