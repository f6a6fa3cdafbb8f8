"""The TensorRT target: what the builder makes of known networks, read from its layer list, and the numbers of the file."""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.engines import target
from fxcompress.engines.tensorrt import TensorRtEngine
from fxcompress.errors import EngineError
from fxcompress.parity import check_parity
from fxcompress.passbase import Context
from fxcompress.passes import FoldBatchNorm, FuseActivations, QuantizeDynamic, QuantizeStatic, QuantizeWeights
from fxcompress.pipeline import Pipeline
from fxcompress.quant.placement import layer_kind, place
from fxcompress.quant.scheme import QuantScheme
from tests.helpers.tensorrt_nets import NETS, PRECISIONS, captured, plain, samples, simulated

pytestmark = pytest.mark.tensorrt

#: The builder runs no 4-bit weights where there is no linear layer.
CASES = [(net, precision) for net in NETS for precision in PRECISIONS if (net, precision) != ("unet", "int4")]


@cache
def built(net: str, precision: str) -> TensorRtEngine:
    made = target("tensorrt").build(simulated(net, precision), threads=1, **FAST)
    return cast(TensorRtEngine, made)


FAST: dict[str, Any] = {"optimization_level": 0}  # which kernels are tried, not which types they have


def quantized_layers(net: str, precision: str) -> set[str]:
    """Layers of the simulation whose weight is on a grid: what has to be found in the engine."""
    program = simulated(net, precision)
    found = set()
    for node, module in program.layers():
        if layer_kind(program, node) and getattr(module, "weight_fake_quantize", None) is not None:
            found.add(str(node.target))
    return found


# ------------------------------------------------------------------------------------------------ known networks
@pytest.mark.parametrize(("net", "precision"), CASES)
def test_quantized_layers_run_on_integers(net: str, precision: str) -> None:
    """Every layer with a grid is there, with integers on both sides, and nothing lies between two of them."""
    engine = built(net, precision)
    report = engine.plans[0].report
    expected = quantized_layers(net, precision)
    assert set(report.layers) == expected
    assert (len(expected) > 0) == (precision != "fp16")
    wanted = "int8" if precision == "int8" else "int4 weights"
    assert set(report.layers.values()) <= {wanted}, report.layers
    assert set(report.adds.values()) <= {"int8", "fused"}, report.adds
    assert report.stray == [] and report.reformats <= 3, report
    types = " ".join(engine.layers()["8.0+"])
    assert ("Half" in types) == (precision != "int8")


@pytest.mark.parametrize(("net", "precision"), CASES)
def test_the_file_computes_what_the_graph_simulates(net: str, precision: str) -> None:
    """In ONNX Runtime, node by node; float32 files agree to the last bits, 16-bit ones to the last bits of those."""
    engine, program = built(net, precision), simulated(net, precision)
    for count in (1, 3):
        found = check_parity(engine, program, [samples(net, count, 7)], reference=plain(net))
        assert found.error < (1e-5 if precision == "int8" else 5e-3), found
        assert found.quantization_error is not None
        assert found.quantization_error > (1e-4 if precision != "int8" else 1e-3), "it is not quantized"


@pytest.mark.parametrize(("net", "count"), [("resnet", 3), ("mobilenet_v2", 2), ("efficientnet", 2)])
def test_residual_adds_run_on_integers(net: str, count: int) -> None:
    report = built(net, "int8").plans[0].report
    assert len(report.adds) == count, "an add that was not looked for proves nothing"
    assert "int8" in report.adds.values()


@pytest.mark.parametrize("net", ["resnet", "vit", "gpt2"])
@pytest.mark.parametrize("half", ["fp16", "bf16"])
def test_integers_between_16_bit_floats(net: str, half: str) -> None:
    """INT8 layers, everything else in 16 bits; scales stay float32, so nothing is rounded twice."""
    precision = f"int8+{half}"
    engine = built(net, precision)
    assert set(engine.plans[0].report.layers.values()) == {"int8"}
    found = check_parity(engine, simulated(net, precision), [samples(net, 3, 7)], reference=plain(net))
    assert found.error <= found.tolerance
    model = onnx.load(str(engine.files()[0]))
    kind = onnx.TensorProto.FLOAT16 if half == "fp16" else onnx.TensorProto.BFLOAT16
    weights = {i.name: i for i in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear":
            assert weights[node.input[1]].data_type == onnx.TensorProto.FLOAT
            assert [a.i for a in node.attribute if a.name == "output_dtype"] == [kind]


@pytest.mark.parametrize("form", ["split", "unbind", "select", "interleaved"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_one_layer_for_query_key_and_value(form: str, dynamic: bool) -> None:
    """However its result is cut; interleaved by heads it is left as it is, and the numbers stay."""
    auto = torch.export.Dim.AUTO
    torch.manual_seed(0)
    model, x = Cut(form).eval(), torch.randn(2, 8, 32)
    shapes = ({0: auto, 1: auto},) if dynamic else None
    context = Context(scheme=target("tensorrt").scheme(), calibration=[x])
    program = Pipeline(passes=(QuantizeStatic(),))(fxc.capture(model, (x,), dynamic_shapes=shapes), context).program
    options = {"profile": {"x_dim1": (1, 8, 16)}} if dynamic else {}
    engine = cast(TensorRtEngine, target("tensorrt").build(program, threads=1, **FAST, **options))
    assert check_parity(engine, program, [torch.randn(3, 11 if dynamic else 8, 32)]).error < 1e-5
    names = [n.name for n in onnx.load(str(engine.files()[0])).graph.node if n.op_type == "MatMul"]
    assert sum("/part" in n for n in names) == (0 if form == "interleaved" else 3)
    if form != "interleaved":
        assert engine.plans[0].report.layers == {"qkv": "int8", "proj": "int8"}


class Cut(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.qkv, self.proj = form, nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        y, (batch, length, width) = self.qkv(x), x.shape
        if self.form == "split":
            parts = [t.reshape(batch, length, 2, 16).transpose(1, 2) for t in y.split(32, -1)]
        elif self.form == "unbind":
            parts = list(y.reshape(batch, length, 3, 2, 16).permute(2, 0, 3, 1, 4).unbind(0))
        else:
            order, dim = ((3, 2), 2) if self.form == "select" else ((2, 3), 3)
            whole = y.reshape(batch, length, *order, 16)
            parts = [whole.select(dim, i).transpose(1, 2) for i in range(3)]
        z = F.scaled_dot_product_attention(*parts)
        return self.proj(z.transpose(1, 2).reshape(batch, length, width))  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------ the file
def test_explicit_quantization_as_tensorrt_wants_it() -> None:
    """Zero points 0, scales of activations without a dimension, of weights one per output channel, int8 both."""
    model = onnx.load(str(built("resnet", "int8").files()[0]))
    onnx.checker.check_model(model)
    weights = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    made = {out: node for node in model.graph.node for out in node.output}
    pairs = 0
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = weights[node.input[2]]
            assert zero.dtype == "int8" and not zero.any()
        if node.op_type == "QuantizeLinear":
            assert weights[node.input[1]].shape == ()
        if node.op_type in ("Conv", "Gemm"):
            x, w = made[node.input[0]], made[node.input[1]]
            while x.op_type in ("Reshape", "Flatten", "MaxPool"):
                x = made[x.input[0]]
            assert x.op_type == w.op_type == "DequantizeLinear"
            stored, scale = weights[w.input[0]], weights[w.input[1]]
            assert stored.dtype == "int8" and scale.shape == (stored.shape[0],) and stored.min() >= -127
            assert not [i for i in node.input[2:] if i in made], "the bias stays float"
            pairs += 1
    assert pairs == len(quantized_layers("resnet", "int8")) == 11
    assert {o.domain for o in model.opset_import} <= {"", "ai.onnx"}


def test_int4_weights_lie_in_blocks() -> None:
    engine = built("gpt2", "int4")
    model = onnx.load(str(engine.files()[0]))
    kinds = {i.name: i for i in model.graph.initializer}
    nodes = [n for n in model.graph.node if n.op_type == "DequantizeLinear"]
    assert len(nodes) == len(quantized_layers("gpt2", "int4")) >= 4
    for node in nodes:
        values, scale = kinds[node.input[0]], kinds[node.input[1]]
        assert values.data_type == onnx.TensorProto.INT4 and scale.data_type == onnx.TensorProto.FLOAT16
        block = next(a.i for a in node.attribute if a.name == "block_size")
        axis = next(a.i for a in node.attribute if a.name == "axis")
        assert block in (16, 32) and values.dims[axis] == block * scale.dims[axis]


@pytest.mark.parametrize(
    ("passes", "how", "word"),
    [
        ((QuantizeWeights(bits=8),), {"int8 weights"}, ""),
        ((QuantizeWeights(bits=4, group_size=-1),), {"int4 weights"}, ""),
        ((QuantizeWeights(bits=4, group_size=32, symmetric=False),), set(), "no zero points"),
        ((QuantizeDynamic(),), {"int8 weights"}, "computed in floating point"),
    ],
)
def test_other_weights(passes: tuple[Any, ...], how: set[str], word: str) -> None:
    """What has no kernel keeps the simulated numbers, and a note says so."""
    program = Pipeline(passes=passes)(plain("llama"), Context(scheme=target("tensorrt").scheme())).program
    engine = cast(TensorRtEngine, target("tensorrt").build(program, threads=1, **FAST))
    assert set(engine.plans[0].report.layers.values()) == how
    assert not word or any(word in note for note in engine.notes)
    assert check_parity(engine, program, [samples("llama", 2, 3)], reference=plain("llama")).error < 1e-4


def test_scales_that_16_bits_round_are_reported() -> None:
    passes = (QuantizeWeights(bits=4, group_size=32), fxc.passes.Cast())
    program = Pipeline(passes=passes)(plain("mixer"), Context()).program
    engine = target("tensorrt").build(program, threads=1, **FAST)
    assert any("Cast before QuantizeWeights" in note for note in engine.notes)
    check_parity(engine, program, [samples("mixer", 2, 3)], reference=plain("mixer"))


# ------------------------------------------------------------------------------------------------ placement
def test_only_the_residual_of_an_add_is_quantized() -> None:
    """The convolution's own result stays float: one kernel adds to it what is read as integers."""
    context = Context(scheme=target("tensorrt").scheme())
    program = Pipeline(passes=(FoldBatchNorm(), FuseActivations()))(captured("mobilenet_v2"), context).program
    found = place(program, target("tensorrt").scheme())
    adds = [n for n in program.graph.nodes if "aten.add" in str(n.target)]
    assert len(adds) == 2 and found.same_scale == []
    for add in adds:
        operands = [n in found.values for n in add.all_input_nodes]
        assert sorted(operands) == [False, True]
        assert add in found.values, "the sum is read as integers by what follows"
    both = place(program, QuantScheme())
    assert all(n in both.values for n in adds[0].all_input_nodes), "other engines want both"


def test_a_scheme_of_another_engine_is_refused() -> None:
    """uint8 around another zero than 0 has no kernel."""
    context = Context(scheme=QuantScheme(), calibration=[samples("mixer", 2, 1)])
    program = Pipeline(passes=(QuantizeStatic(),))(plain("mixer"), context).program
    with pytest.raises(EngineError, match="no integers for this grid") as caught:
        target("tensorrt").build(program, **FAST)
    assert "target='tensorrt'" in caught.value.fix and "0 to 255" in caught.value.why


# ------------------------------------------------------------------------------------------------ compile, the engine
class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(x)).mean((2, 3)))  # type: ignore[no-any-return]


def test_compile(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model, x = Small().eval(), torch.randn(2, 3, 16, 16)
    engine = fxc.compile(model, (x,), target="tensorrt", calibration=[x], engine_options=FAST)
    assert engine.report.precision == "int8" and engine.report.parity["error"] < 1e-5
    if not torch.cuda.is_available():
        assert any("no CUDA device" in note for note in engine.notes), "it says what it runs"
        assert any("speed was not measured" in decision for decision in engine.report.decisions)
    again = fxc.load(engine.save(tmp_path / "out"))
    assert isinstance(again, TensorRtEngine) and again.plans == cast(TensorRtEngine, engine).plans
    torch.testing.assert_close(again(x), engine(x))
    names = {path.name for path in again.files()}
    assert names == {"model.onnx", again.plans[0].file}
    inner = again.taps(["conv"], x)["conv"]
    assert inner.shape == (2, 16, 16, 16)
