"""Embeddings, LSTM and GRU on integers, and the ONNX file of standard operators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.engines import target
from fxcompress.errors import EngineError, PassError
from fxcompress.passbase import Pass
from fxcompress.quant.sequence_layers import asymmetric_bytes
from tests.helpers.products import Products, compressed
from tests.helpers.quick import RUNTIMES

ENGINES = [pytest.param(name, marks=getattr(pytest.mark, name)) for name in RUNTIMES]
#: Kernels sum in another order; a value on the other side of a rounding tie.
EXACT, FLIPS = 2e-6, 5e-3


class Reader(nn.Module):
    """Token ids through an embedding, a recurrent layer and a linear one; gives the last state, too."""

    def __init__(self, kind: type[nn.LSTM | nn.GRU], **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.read = nn.Embedding(50, 24), kind(24, 32, **options)
        self.head = nn.Linear(64 if options.get("bidirectional") else 32, 5)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        y, state = self.read(self.embed(ids))
        return self.head(y), state[0] if isinstance(state, tuple) else state


CASES: dict[str, tuple[type[nn.LSTM | nn.GRU], dict[str, Any]]] = {
    "LSTM": (nn.LSTM, {"batch_first": True}),
    "LSTM, both directions, two layers": (nn.LSTM, {"bidirectional": True, "num_layers": 2, "batch_first": True}),
    "GRU, both directions, no bias": (nn.GRU, {"bidirectional": True, "bias": False, "batch_first": True}),
}


def ids(seed: int) -> Tensor:
    return torch.randint(0, 50, (3 + seed, 7), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("runtime", ENGINES)
@pytest.mark.parametrize("name", CASES)
def test_recurrent_layers(runtime: str, name: str) -> None:
    kind, options = CASES[name]
    found = compressed(runtime, [fxc.QuantizeDynamic(embeddings=True)], Reader(kind, **options), ids(0), ids(1))
    assert found.parity.error < FLIPS < 5e-2 and (found.parity.quantization_error or 0) > 1e-3
    integer = runtime == "onnxruntime" and kind is nn.LSTM
    assert any("read: unpacked to float32" in n for n in found.engine.notes) != integer


@pytest.mark.parametrize("runtime", ENGINES)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_in_16_bits(runtime: str, kind: type[nn.LSTM | nn.GRU]) -> None:
    passes: list[Pass] = [fxc.Cast("bf16"), fxc.QuantizeDynamic(embeddings=True)]
    found = compressed(runtime, passes, Reader(kind, batch_first=True), ids(0), ids(1))
    assert found.parity.error < 4e-2
    assert found.engine(ids(2))[0].dtype == torch.float32


@pytest.mark.onnxruntime
def test_onnxruntime_runs_integers() -> None:
    import onnx

    model = Reader(nn.LSTM, batch_first=True)
    engine = compressed("onnxruntime", [fxc.QuantizeDynamic(embeddings=True)], model, ids(0), ids(1)).engine
    loaded = onnx.load(str(engine.files()[0]))
    assert [n.op_type for n in loaded.graph.node].count("DynamicQuantizeLSTM") == 1
    stored = {i.name: i.data_type for i in loaded.graph.initializer}
    large = [i for i in loaded.graph.initializer if int(np.prod(i.dims)) >= 150 and "bias" not in i.name]
    assert large and all(stored[i.name] == onnx.TensorProto.INT8 for i in large)


@pytest.mark.onnxruntime
def test_onnxruntime_with_several_threads() -> None:
    """A thread quantizes the hidden states of its own part of a large batch, which is no worse."""
    x = torch.randint(0, 50, (16, 7), generator=torch.Generator().manual_seed(0))
    plain = fxc.capture(Reader(nn.LSTM, batch_first=True).eval(), (x,))
    program = fxc.QuantizeDynamic()(plain, fxc.Context(scheme=target("onnxruntime").scheme())).program
    engine = target("onnxruntime").build(program, threads=2)
    assert fxc.check_parity(engine, program, [(x,)], reference=plain).error < FLIPS


def test_the_simulated_lstm_is_the_published_one() -> None:
    """Against the cell's equations in float64, one time step and one sample after the other."""
    plain = fxc.capture(Reader(nn.LSTM, batch_first=True).eval(), (ids(0),))
    scheme = target("onnxruntime").scheme()
    program = fxc.QuantizeDynamic(include="read")(plain, fxc.Context(scheme=scheme)).program
    layer: Any = program.gm.get_submodule("read")
    x = torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(3))
    w, r = (layer.rounded(f"weight_{k}_l0").detach().double().numpy() for k in ("ih", "hh"))
    bias = (layer.bias_ih_l0 + layer.bias_hh_l0).detach().double().numpy()
    h, c = np.zeros((2, 32)), np.zeros((2, 32))
    on_grid = _bytes(x.double().numpy())
    for t in range(6):
        i, f, g, o = np.split(on_grid[:, t] @ w.T + bias + _bytes(h) @ r.T, 4, axis=1)
        c = c / (1 + np.exp(-f)) + np.tanh(g) / (1 + np.exp(-i))
        h = np.tanh(c) / (1 + np.exp(-o))
    with torch.no_grad():
        _, (hidden, cell) = layer(x)
    assert np.abs(hidden[0].numpy() - h).max() < 1e-3 and np.abs(cell[0].numpy() - c).max() < 2e-3


def _bytes(x: Any) -> Any:
    """256 levels over the extremes and zero, by the formula."""
    low, high = min(x.min(), 0.0), max(x.max(), 0.0)
    scale = (high - low) / 255 or 1.0
    zero = np.rint(-low / scale)
    return (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale


def test_bytes() -> None:
    x = torch.randn(5, 7, dtype=torch.float64)
    assert np.allclose(asymmetric_bytes(x).numpy(), _bytes(x.numpy()), atol=1e-12)
    assert not bool(asymmetric_bytes(torch.zeros(3)).any())


@pytest.mark.parametrize("runtime", [*ENGINES, "torch"])
def test_saved_and_loaded(runtime: str, tmp_path: Path) -> None:
    model = Reader(nn.LSTM, batch_first=True)
    engine = compressed(runtime, [fxc.QuantizeDynamic(embeddings=True)], model, ids(0), ids(1)).engine
    again = fxc.load(engine.save(tmp_path / "engine"), threads=1)
    for a, b in zip(again(ids(2)), engine(ids(2)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("runtime", ENGINES)
def test_size_on_disk(runtime: str) -> None:
    class Large(Reader):
        def __init__(self) -> None:
            super().__init__(nn.LSTM)
            self.embed, self.read, self.head = (
                nn.Embedding(2000, 256),
                nn.LSTM(256, 256, batch_first=True),
                nn.Linear(256, 256),
            )

    model = Large()
    engine = compressed(runtime, [fxc.QuantizeDynamic(embeddings=True)], model, ids(0), ids(1)).engine
    assert engine.file_size() - 20_000 < 0.27 * sum(p.numel() * 4 for p in model.parameters())


@pytest.mark.openvino
@pytest.mark.onnxruntime
def test_an_lstm_made_for_another_engine() -> None:
    plain = fxc.capture(Reader(nn.LSTM).eval(), (ids(0),))
    program = fxc.QuantizeDynamic()(plain, fxc.Context(scheme=target("onnxruntime").scheme())).program
    with pytest.raises(EngineError, match=r"FXC-ENGINE-063(.|\n)*compile it for this target"):
        target("openvino").build(program)


def test_what_is_left_out() -> None:
    plain = fxc.capture(Reader(nn.GRU).eval(), (ids(0),))
    result = fxc.QuantizeDynamic(ignore="read")(plain, fxc.Context())
    assert type(result.program.gm.get_submodule("read")) is nn.GRU and "read stays float: ignored" in result.notes
    assert type(result.program.gm.get_submodule("embed")) is nn.Embedding
    with torch.no_grad():
        plain.gm.get_submodule("read").weight_hh_l0[0, 0] = float("nan")  # type: ignore[operator,index]
    with pytest.raises(PassError, match=r"NaN or infinity(.|\n)*read"):
        fxc.QuantizeDynamic()(plain, fxc.Context())


# ------------------------------------------------------------------------------------------------ standard operators
EXPORTS: dict[str, tuple[Pass, ...]] = {
    "int4 blocks": (fxc.QuantizeWeights(bits=4, group_size=32, fit="adjust"),),
    "uint4 blocks": (fxc.QuantizeWeights(bits=4, group_size=64, symmetric=False, fit="adjust"),),
    "int3 blocks": (fxc.QuantizeWeights(bits=3, group_size=48, fit="adjust"),),
    "uint8 rows": (fxc.QuantizeWeights(bits=8, symmetric=False),),
    "dynamic": (fxc.QuantizeDynamic(),),
}


@pytest.mark.onnxruntime
@pytest.mark.parametrize("name", EXPORTS)
def test_export(name: str, tmp_path: Path) -> None:
    """Nothing but standard operators, checked by ONNX itself, with the simulation's numbers."""
    import onnx
    import onnxruntime

    x = torch.randn(3, 5, 192, generator=torch.Generator().manual_seed(0))
    program = fxc.Pipeline(passes=EXPORTS[name])(fxc.capture(Products(192, 96).eval(), (x,)), fxc.Context()).program
    file = fxc.export_onnx(program, tmp_path / "model.onnx")
    model = onnx.load(str(file))
    onnx.checker.check_model(model, full_check=True)
    assert {n.domain for n in model.graph.node} == {""} and model.opset_import[0].version >= 21
    dequantized = [n for n in model.graph.node if n.op_type == "DequantizeLinear"]
    assert len(dequantized) == 4
    in_blocks = [n for n in dequantized if any(a.name == "block_size" for a in n.attribute)]
    assert len(in_blocks) == (3 if "blocks" in name else 0), "a row of 40 is one group"
    if name == "int4 blocks":
        kinds = {i.name: i.data_type for i in model.graph.initializer}
        assert {kinds[n.input[0]] for n in dequantized} == {onnx.TensorProto.INT4}
    options = onnxruntime.SessionOptions()  # as it optimizes, ONNX Runtime quantizes activations of its own accord
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        expected = program(x)
    error = float((torch.from_numpy(got) - expected).norm() / expected.norm())
    assert error < (FLIPS if name == "dynamic" else EXACT)


def test_export_wants_a_name(tmp_path: Path) -> None:
    program = fxc.capture(nn.Linear(4, 4), (torch.randn(2, 4),))
    with pytest.raises(EngineError, match=r"FXC-ENGINE-065(.|\n)*end it in .onnx"):
        fxc.export_onnx(program, tmp_path / "model.bin")
