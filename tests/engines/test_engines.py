"""What every engine promises: integer kernels, readable names, any batch, checked calls, the model's own structure."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fxcompress.capture import capture
from fxcompress.engines import Engine, registered_targets, target
from fxcompress.errors import EngineError, UsageError
from fxcompress.parity import check_parity
from tests.helpers.quick import RUNTIMES, Answer, Pair, built, cnn, images, plain, quantized, token_net, tokens

ENGINES = [pytest.param(name, marks=getattr(pytest.mark, name)) for name in RUNTIMES]
ALL = [*ENGINES, "torch"]


# ------------------------------------------------------------------------------------------------ what runs
@pytest.mark.onnxruntime
def test_onnxruntime_runs_integer_kernels(tmp_path: Path) -> None:
    """The graph it really executes: every convolution and matrix product is an integer kernel."""
    import onnx

    from fxcompress.engines.onnxruntime import open_session

    file = tmp_path / "optimized.onnx"
    open_session(str(built("onnxruntime").files()[0]), 1, {"batch": 2}, optimized=str(file))
    kinds = [n.op_type for n in onnx.load(str(file)).graph.node]
    integer = [
        k for k in kinds if k in ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat")
    ]
    assert len(integer) == 4 and kinds.count("QLinearConv") == 3, kinds
    assert not {"Conv", "Gemm", "MatMul", "FusedConv"} & set(kinds), kinds


@pytest.mark.openvino
def test_openvino_runs_integer_kernels() -> None:
    from fxcompress.engines.openvino import compile_model, read_model

    model = read_model(built("openvino").files()[0])
    model.reshape({"x": [2, 3, 16, 16]})
    runtime = compile_model(model, 1).get_runtime_model()
    found = [op.get_rt_info() for op in runtime.get_ordered_ops()]
    layers = [i for i in found if i["layerType"].astype(str) in ("Convolution", "FullyConnected", "MatMul")]
    precisions = [i["runtimePrecision"].astype(str) for i in layers]
    assert len(layers) == 4 and set(precisions) <= {"i8", "u8"}, precisions


@pytest.mark.onnxruntime
def test_names_follow_the_model() -> None:
    """So that the file reads well in a viewer; weights keep their names in the state dict."""
    import onnx

    engine = built("onnxruntime", "float32")
    model = onnx.load(str(engine.files()[0]))
    onnx.checker.check_model(model)
    assert next(o.version for o in model.opset_import if o.domain == "") >= 21
    assert {o.domain for o in model.opset_import} <= {"", "ai.onnx"}
    names = [n.name for n in model.graph.node]
    assert len(set(names)) == len(names)
    for path in ("stem", "blocks.0.conv", "blocks.1.conv", "head"):
        assert any(name.startswith(f"{path}/") for name in names), path
    weights = {i.name for i in model.graph.initializer}
    assert {"stem.weight", "blocks.0.conv.weight", "head.weight", "head.bias"} <= weights
    assert [i.name for i in model.graph.input] == ["x"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


@pytest.mark.onnxruntime
def test_weights_of_an_int8_file_are_int8() -> None:
    import onnx

    engine = built("onnxruntime")
    kinds = {i.name: i.data_type for i in onnx.load(str(engine.files()[0])).graph.initializer}
    assert not {o.domain for o in onnx.load(str(engine.files()[0])).opset_import} & {"fxcompress"}
    assert sum(k == onnx.TensorProto.INT8 and "weight" in n for n, k in kinds.items()) == 4
    assert engine.file_size() < built("onnxruntime", "float32").file_size()


# ------------------------------------------------------------------------------------------------ numbers
@pytest.mark.parametrize("runtime", ALL)
@pytest.mark.parametrize("batch", [1, 7, 3, 2])
def test_float_engine_equals_eager(runtime: str, batch: int) -> None:
    x = images(batch, seed=5)
    with torch.no_grad():
        expected = cnn()(x)
    for _ in range(4):  # the fourth call of a shape runs an executable of its own
        got = built(runtime, "float32")(x)
    assert got.shape == (batch, 10) and not got.requires_grad
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("runtime", ENGINES)
@pytest.mark.parametrize("batch", [1, 7, 3])
def test_int8_engine_equals_its_simulation(runtime: str, batch: int) -> None:
    engine, simulation = built(runtime), quantized(runtime)
    found = check_parity(engine, simulation, [images(batch, seed=7)], reference=plain())
    assert found.error <= found.tolerance and found.quantization_error is not None
    assert 1e-3 < found.quantization_error < 0.3, "it is not quantized, or badly"


@pytest.mark.parametrize("runtime", ENGINES)
def test_batch_entries_do_not_mix(runtime: str) -> None:
    """The third image gives the same row alone as among others."""
    x = images(5, seed=3)
    torch.testing.assert_close(built(runtime)(x)[2:3], built(runtime)(x[2:3]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("runtime", ALL)
def test_inputs_of_any_layout(runtime: str) -> None:
    """Slices, transposed and channels-last tensors give the numbers of their contiguous copies."""
    engine = built(runtime, "float32")
    wide = torch.randn(4, 3, 16, 32, generator=torch.Generator().manual_seed(0))
    views = [wide[::2, :, :, ::2], wide[:2, :, :, :16].transpose(2, 3), images(2).to(memory_format=torch.channels_last)]
    for view in views:
        assert not view.is_contiguous()
        torch.testing.assert_close(engine(view), engine(view.contiguous()), rtol=1e-5, atol=1e-6)
    x = images(2)
    before = x.clone()
    first = engine(x)
    kept = first.clone()
    engine(images(2, seed=9))
    assert torch.equal(first, kept), "a later call wrote into an earlier result"
    assert torch.equal(x, before)


@pytest.mark.parametrize("runtime", ENGINES)
def test_token_ids(runtime: str) -> None:
    given = tokens(3, seed=4)
    with torch.no_grad():
        expected = token_net()(**given)
    got = built(runtime, "float32", "tokens")(**given)
    assert type(got) is Answer
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.hidden, expected.hidden, rtol=1e-4, atol=1e-5)
    quick = built(runtime, "int8", "tokens")(**given)
    assert 0 < float((quick.logits - expected.logits).norm() / expected.logits.norm()) < 0.2


# ------------------------------------------------------------------------------------------------ calls
BAD: dict[str, Callable[[Engine], Any]] = {
    "dtype torch.float64|float64": lambda e: e(images(2).double()),
    "does not fit": lambda e: e(images(2)[:, :2]),
    "free sizes have a name": lambda e: e(images(2)[..., :8]),
    "got float32": lambda e: e(images(2)[0]),
    "too many positional": lambda e: e(images(2), images(2)),
    "missing x": lambda e: e(),
    "unknown y": lambda e: e(images(2), y=images(2)),
    "given twice x": lambda e: e(images(2), x=images(2)),
    "must be a tensor": lambda e: e(np.zeros((2, 3, 16, 16), np.float32)),
    "got a list": lambda e: e([images(2)]),
}


@pytest.mark.parametrize("runtime", ALL)
@pytest.mark.parametrize("message", BAD)
def test_wrong_inputs(runtime: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        BAD[message](built(runtime, "float32"))
    assert "float32[batch, 3, 16, 16]" in str(caught.value)


@pytest.mark.parametrize("runtime", ENGINES)
def test_batches_of_two_inputs_that_differ(runtime: str) -> None:
    engine = built(runtime, "float32", "tokens")
    with pytest.raises(UsageError, match="'batch' is 2"):
        engine(ids=tokens(2)["ids"], mask=tokens(3)["mask"])
    with pytest.raises(UsageError, match=r"ids.*int64|int64.*ids"):
        engine(ids=tokens(2)["ids"].float(), mask=tokens(2)["mask"])


@pytest.mark.parametrize("runtime", [ENGINES[0], "torch"])
def test_what_the_runtime_refuses_is_an_engine_error(runtime: str) -> None:
    """A token that is not in the table: the size fits, the value does not."""
    given = tokens(2) | {"ids": torch.full((2, 6), 99)}
    engine = built(runtime, "float32", "tokens")
    with pytest.raises(EngineError):
        engine(**given)


class Shaped(nn.Module):
    """Returns what it is told to build."""

    def __init__(self, build: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.build, self.fc = build, nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.build(self.fc(x), y * 2)


OUTPUTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda a, b: (a, b),
    "list": lambda a, b: [a, b],
    "dict": lambda a, b: {"b": b, "a": a},
    "nested": lambda a, b: {"inner": (a, [b, {"both": a + b}])},
    "dataclass": lambda a, b: Answer(a, b),
    "named tuple": lambda a, b: Pair(a, b),
    "with constants": lambda a, b: (a, None, 3, b),
    "twice the same": lambda a, b: (a, a, b),
    "an input": lambda a, b: (a, b / 2),
    "torch's own": lambda a, b: a.topk(2),
}


@pytest.mark.parametrize("runtime", ALL)
@pytest.mark.parametrize("kind", OUTPUTS)
def test_structure_of_outputs(runtime: str, kind: str, tmp_path: Path) -> None:
    model = Shaped(OUTPUTS[kind]).eval()
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    engine = target(runtime).build(capture(model, (torch.randn(2, 4), torch.randn(2, 4))), threads=1)
    with torch.no_grad():
        expected = model(x, y)
    for got in (engine(x, y), engine(x, y=y), engine(y=y, x=x)):
        assert _shape_of(got) == _shape_of(expected)
        for a, b in zip(_tensors(got), _tensors(expected), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert json.loads(json.dumps(engine.signature.to_dict())) == engine.signature.to_dict()


def _shape_of(value: Any) -> Any:
    if isinstance(value, Answer):
        return Answer, _shape_of((value.logits, value.hidden))
    if isinstance(value, dict):
        return [(k, _shape_of(v)) for k, v in value.items()]
    if isinstance(value, (tuple, list)):
        return type(value), [_shape_of(v) for v in value]
    return tuple(value.shape) if isinstance(value, Tensor) else value


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Answer):
        return [value.logits, value.hidden]
    if isinstance(value, (dict, tuple, list)):
        return [t for v in (value.values() if isinstance(value, dict) else value) for t in _tensors(v)]
    return [value] if isinstance(value, Tensor) else []


# ------------------------------------------------------------------------------------------------ threads, targets
@pytest.mark.onnxruntime
def test_threads_reach_onnxruntime() -> None:
    engine = target("onnxruntime").build(plain(), threads=2)
    assert engine.threads == 2
    (runner,) = engine._fixed.values()
    assert runner.session.get_session_options().intra_op_num_threads == 2  # type: ignore[attr-defined]


@pytest.mark.openvino
def test_threads_reach_openvino() -> None:
    engine = target("openvino").build(plain(), threads=2)
    (runner,) = engine._fixed.values()
    assert engine.threads == 2
    assert runner.compiled.get_property("INFERENCE_NUM_THREADS") == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("runtime", ALL)
def test_no_threads(runtime: str) -> None:
    with pytest.raises(UsageError, match="cannot run on 0 threads"):
        target(runtime).build(plain(), threads=0)


def test_target_names() -> None:
    assert set(registered_targets()) == {"onnxruntime", "openvino", "tensorrt", "torch", "triton"}
    with pytest.raises(UsageError, match="did you mean 'openvino'"):
        target("openvion")


@pytest.mark.parametrize("runtime", ALL)
def test_taps(runtime: str) -> None:
    """Inner values, under the names of the layers, are those of the model."""
    engine, x = built(runtime, "float32"), images(3)
    assert {"stem", "blocks.0.conv", "head"} <= set(engine.tap_names())
    found = engine.taps(["stem", "head"], x)
    with torch.no_grad():
        torch.testing.assert_close(found["stem"], cnn().stem(x).relu(), rtol=1e-4, atol=1e-5)  # type: ignore[operator]
        torch.testing.assert_close(found["head"], cnn()(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match=r"no tapped point is called haed(.|\n)*did you mean 'head'"):
        engine.taps(["haed"], x)


@pytest.mark.parametrize("runtime", ALL)
def test_benchmark(runtime: str) -> None:
    found = built(runtime, "float32").benchmark(images(3), seconds=0.0, runs=5)
    assert found.runs >= 5 and found.batch == 3 and found.threads >= 1
    assert 0 < found.min_ms <= found.p50_ms <= found.p95_ms
