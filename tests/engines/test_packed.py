"""Packed weights and activations quantized at run time, on the CPU engines: the simulation's numbers, small, integer."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.engines import Engine, target
from fxcompress.engines.packed import Integers, pack
from fxcompress.errors import EngineError
from fxcompress.passbase import Pass
from tests.helpers.products import Attention, Products, compressed
from tests.helpers.quick import RUNTIMES

ENGINES = [pytest.param(name, marks=getattr(pytest.mark, name)) for name in RUNTIMES]
#: Kernels sum in another order: 1e-7. A few values on the other side of a rounding tie: 1e-3 in a network this small.
EXACT, FLIPS = 2e-6, 5e-3

W, D = fxc.QuantizeWeights, fxc.QuantizeDynamic
WEIGHTS = {
    "int4 groups of 64": W(bits=4, group_size=64, fit="adjust"),
    "uint4 groups of 32": W(bits=4, group_size=32, symmetric=False, fit="adjust"),
    "uint4 rows": W(bits=4, group_size=-1, symmetric=False),
    "int3 groups of 48": W(bits=3, group_size=48, fit="adjust"),
    "int2 groups of 16": W(bits=2, group_size=16, fit="adjust"),
    "int5 groups of 64": W(bits=5, group_size=64, fit="adjust"),
    "int8 rows": W(bits=8),
    "uint8 groups of 64": W(bits=8, group_size=64, symmetric=False, fit="adjust"),
    "int4 odd groups": W(bits=4, group_size=20, fit="ignore"),
}
DYNAMIC: dict[str, tuple[Pass, ...]] = {
    "int8": (D(),),
    "int4": (D(weight_bits=4),),
    **{f"{name}, dynamic": (pass_, D()) for name, pass_ in WEIGHTS.items()},
}


def data(rank: int, seed: int, features: int = 192) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(3 + seed, 5)[: rank - 1], features, generator=generator)


# ------------------------------------------------------------------------------------------------ numbers
@pytest.mark.parametrize("runtime", ENGINES)
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_alone(runtime: str, name: str) -> None:
    """Activations stay float32: OpenVINO's plug-in would quantize them if it were not told, which costs 5e-3."""
    rank = 2 if name == "uint4 rows" else 3
    found = compressed(runtime, [WEIGHTS[name]], Products(), data(rank, 0), data(rank, 1))
    assert found.parity.error < EXACT and (found.parity.quantization_error or 0) > 1e-3


@pytest.mark.parametrize("runtime", ENGINES)
@pytest.mark.parametrize("name", DYNAMIC)
def test_dynamic(runtime: str, name: str) -> None:
    rank = 2 if name in ("int8", "int4") else 3
    found = compressed(runtime, DYNAMIC[name], Products(), data(rank, 0), data(rank, 1))
    assert found.parity.error < FLIPS and (found.parity.quantization_error or 0) > 2e-3


@pytest.mark.parametrize("runtime", ENGINES)
@pytest.mark.parametrize("features", [33, 100])
def test_odd_sizes(runtime: str, features: int) -> None:
    """Rows that are no multiple of a block: the last one is shorter."""
    for passes in ([W(bits=4, group_size=-1)], [D()], [D(weight_bits=4)]):
        model = Products(features, 17)
        found = compressed(runtime, passes, model, data(3, 0, features), data(3, 1, features))
        assert found.parity.error < FLIPS


@pytest.mark.parametrize("runtime", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_models(runtime: str, dtype: torch.dtype) -> None:
    """The engine does not round between layers, which is all they differ in."""
    for passes in ([W(bits=4, group_size=32, fit="adjust")], [D()]):
        model = Products().to(dtype)
        found = compressed(runtime, passes, model, data(3, 0).to(dtype), data(3, 1).to(dtype))
        assert found.parity.error < (1e-2 if dtype == torch.float16 else 4e-2)
        assert found.engine(data(3, 1).to(dtype)).dtype == dtype


@pytest.mark.parametrize("runtime", ENGINES)
@pytest.mark.parametrize("passes", [[W(group_size=32)], [D()], [W(group_size=32), D()]], ids=str)
def test_a_transformer(runtime: str, passes: list[Pass]) -> None:
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    engine = fxc.compile(Attention(), (ids,), passes=passes, target=runtime, measure=False, threads=1)
    assert engine.report.parity["error"] < FLIPS < engine.report.parity["quantization_error"]
    assert engine(ids[:1, :]).shape == (1, 9, 50)


@pytest.mark.parametrize("runtime", ENGINES)
def test_a_program_of_the_exporter(runtime: str) -> None:
    """Quantizers are not taken apart on the second way of lowering."""

    class Angle(Products):
        def forward(self, x: Tensor) -> Tensor:
            return torch.atan2(super().forward(x), torch.ones(24))

    passes: list[Pass] = [W(bits=4, group_size=32, fit="adjust"), D()]
    found = compressed(runtime, passes, Angle(), data(3, 0), data(3, 1))
    assert any("exporter" in n for n in found.engine.notes) and found.parity.error < FLIPS


# ------------------------------------------------------------------------------------------------ what runs
def kinds(engine: Engine, tmp_path: Path) -> Counter[str]:
    """Operators that ONNX Runtime executes."""
    import onnx

    from fxcompress.engines.onnxruntime import open_session

    file = tmp_path / "optimized.onnx"
    open_session(str(engine.files()[0]), 1, {}, optimized=str(file))
    return Counter(n.op_type for n in onnx.load(str(file)).graph.node)


@pytest.mark.onnxruntime
def test_onnxruntime_runs_packed_weights(tmp_path: Path) -> None:
    import onnx

    for dynamic in (False, True):
        passes: list[Pass] = [W(bits=4, group_size=32, fit="adjust"), *([D()] if dynamic else [])]
        engine = compressed("onnxruntime", passes, Products(192, 96), data(3, 0), data(3, 1)).engine
        assert kinds(engine, tmp_path)["MatMulNBits"] == 4
        model = onnx.load(str(engine.files()[0]))
        nodes = [n for n in model.graph.node if n.op_type == "MatMulNBits"]
        for node in nodes:
            given = {a.name: a.i for a in node.attribute}
            assert given["accuracy_level"] == (4 if dynamic else 0) and given["bits"] == 4
        assert {n.name.split("/")[0] for n in nodes} >= {"a", "b"}


class RootMeanSquare(nn.Module):
    """RMSNorm spelled out as in Llama, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.linear = nn.Parameter(torch.rand(64)), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)))  # type: ignore[no-any-return]


@pytest.mark.onnxruntime
def test_onnxruntime_runs_rms_norms_as_one_operator(tmp_path: Path) -> None:
    found = compressed("onnxruntime", [W(group_size=32)], RootMeanSquare(), data(3, 0, 64), data(3, 1, 64))
    assert kinds(found.engine, tmp_path) == {"SimplifiedLayerNormalization": 1, "MatMulNBits": 1}
    assert found.parity.error < EXACT


@pytest.mark.onnxruntime
def test_onnxruntime_multiplies_integers(tmp_path: Path) -> None:
    engine = compressed("onnxruntime", [D()], Products(), data(3, 0), data(3, 1)).engine
    found = kinds(engine, tmp_path)
    assert found["MatMulIntegerToFloat"] == 4 and not {"MatMul", "Gemm", "FusedMatMul"} & set(found)


@pytest.mark.onnxruntime
def test_onnxruntime_unpacks_the_rest_at_load(tmp_path: Path) -> None:
    """A float product per layer, and nothing that turns integers into floats at every call."""
    engine = compressed("onnxruntime", [W(bits=8)], Products(), data(3, 0), data(3, 1)).engine
    found = kinds(engine, tmp_path)
    assert found["MatMul"] + found["Gemm"] + found["FusedMatMul"] + found["FusedGemm"] == 4, found
    assert not {"Cast", "DequantizeLinear"} & set(found)
    assert any("unpacked to float32" in n and "QuantizeDynamic" in n for n in engine.notes)


@pytest.mark.openvino
@pytest.mark.parametrize(
    ("pass_", "kind"),
    [(W(bits=4, group_size=64), "i4"), (W(bits=4, group_size=64, symmetric=False), "u4"), (W(bits=8), "i8")],
)
def test_openvino_keeps_weights_packed(pass_: Pass, kind: str) -> None:
    from fxcompress.engines.openvino import compile_model, read_model

    model = nn.Sequential(nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 32))
    engine = compressed("openvino", [pass_], model, data(2, 0), data(2, 1)).engine
    runtime = compile_model(read_model(engine.files()[0]), 1).get_runtime_model()
    found = [op.get_rt_info() for op in runtime.get_ordered_ops()]
    products = [i["runtimePrecision"].astype(str) for i in found if i["layerType"].astype(str) == "FullyConnected"]
    assert products == [kind, kind]


@pytest.mark.openvino
def test_openvino_is_told_its_block() -> None:
    blocks = {}
    for name, passes in {
        "weights": [W(group_size=32, fit="adjust")],
        "int8": [D()],
        "both": [W(group_size=32, fit="adjust"), D()],
    }.items():
        engine = compressed("openvino", passes, Products(), data(3, 0), data(3, 1)).engine
        (runner,) = engine._fixed.values()
        blocks[name] = runner.compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE")  # type: ignore[attr-defined]
    assert blocks == {"weights": 0, "int8": 64, "both": 32}


@pytest.mark.openvino
def test_openvino_with_both_kinds_of_layers() -> None:
    """The plug-in knows one block size for all: layers that are simulated otherwise are kept away from it."""
    model = nn.Sequential(nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 192), nn.ReLU(), nn.Linear(192, 8))
    passes = [W(group_size=64), D(include="0")]
    found = compressed("openvino", passes, model, data(2, 0), data(2, 1))
    assert found.parity.error < EXACT
    assert any("stored in float32" in n for n in found.engine.notes)


@pytest.mark.parametrize("runtime", ENGINES)
def test_a_scheme_of_another_engine(runtime: str) -> None:
    """Whole tokens on OpenVINO, blocks on ONNX Runtime: right, if slow."""
    other = "openvino" if runtime == "onnxruntime" else "onnxruntime"
    plain = fxc.capture(Products().eval(), (data(3, 0),))
    for passes in ([D()], [D(weight_bits=4)]):
        program = fxc.Pipeline(passes=tuple(passes))(plain, fxc.Context(scheme=target(other).scheme())).program
        found = fxc.check_parity(target(runtime).build(program, threads=1), program, [(data(3, 1),)])
        assert found.error < FLIPS


@pytest.mark.openvino
def test_openvino_is_not_given_groups_that_it_computes_wrongly() -> None:
    """The plug-in multiplies 4-bit groups of 48, 8-bit ones of 50 and odd rows of 4 bits by wrong weights, in silence."""
    for pass_, features in ((W(group_size=48), 96), (W(bits=8, group_size=50), 100), (W(group_size=-1), 33)):
        model = nn.Sequential(nn.Linear(features, 64))
        found = compressed("openvino", [pass_], model, data(3, 0, features), data(3, 1, features))
        assert found.parity.error < EXACT and any("unpacked to float32" in n for n in found.engine.notes)
        assert found.engine.file_size() < 64 * features + 20_000, "it is small on disk all the same"


# ------------------------------------------------------------------------------------------------ files
@pytest.mark.parametrize("runtime", ENGINES)
@pytest.mark.parametrize(
    ("pass_", "most"),
    [(D(), 0.27), (W(bits=8), 0.27), (W(bits=4, group_size=64), 0.16), (W(bits=2, group_size=64), 0.16)],
    ids=str,
)
def test_size_on_disk(runtime: str, pass_: Pass, most: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
    found = compressed(runtime, [pass_], model, data(2, 0, 512), data(2, 1, 512))
    weights = sum(p.numel() * 4 for p in model.parameters())
    graph = 16_000 if runtime == "openvino" else 4_000  # its text, which does not grow with the weights
    assert found.engine.file_size() - graph < most * weights


@pytest.mark.parametrize("runtime", ENGINES)
def test_a_saved_engine_is_the_same(runtime: str, tmp_path: Path) -> None:
    engine = compressed(runtime, [W(group_size=32, fit="adjust"), D()], Products(), data(3, 0), data(3, 1)).engine
    again = fxc.load(engine.save(tmp_path / "engine"), threads=1)
    assert torch.equal(again(data(3, 2)), engine(data(3, 2)))


def test_a_saved_simulation_keeps_its_blocks(tmp_path: Path) -> None:
    plain = fxc.capture(Products().eval(), (data(3, 0),))
    program = D()(plain, fxc.Context(scheme=dataclasses.replace(fxc.QuantScheme(), dynamic_block=32))).program
    engine = target("torch").build(program, threads=1)
    again = fxc.load(engine.save(tmp_path / "engine"), threads=1)
    with torch.no_grad():
        assert torch.equal(again(data(3, 2)), program(data(3, 2)))


# ------------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize("runtime", ENGINES)
def test_more_bits_than_there_are(runtime: str) -> None:
    plain = fxc.capture(nn.Sequential(nn.Linear(32, 8)).eval(), (torch.randn(2, 32),))
    program = W(bits=8)(plain, fxc.Context()).program
    quantizer: Any = program.gm.get_submodule("0").weight_fake_quantize
    quantizer.spec = dataclasses.replace(quantizer.spec, bits=12, qmin=-2048, qmax=2047)
    with pytest.raises(EngineError, match=r"FXC-ENGINE-060(.|\n)*where: 0"):
        target(runtime).build(program)


@pytest.mark.onnxruntime
def test_where_engine_and_simulation_part() -> None:
    """A wrong weight is found, although no quantizer is a point of the engine."""
    plain = fxc.capture(Products().eval(), (data(3, 0),))
    program = D()(plain, fxc.Context()).program
    engine = target("onnxruntime").build(program, threads=1)
    wrong = program.clone()
    layer = wrong.gm.get_submodule("b")
    layer.weight = nn.Parameter(layer.weight.detach() * 1.5)  # type: ignore[operator]
    with pytest.raises(fxc.FxcError, match="first difference at b"):
        fxc.check_parity(engine, wrong, [(data(3, 1),)])


# ------------------------------------------------------------------------------------------------ pieces
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("count", [1, 5, 16])
def test_packing(bits: int, count: int) -> None:
    values = torch.randint(0, 1 << bits, (3, count), generator=torch.Generator().manual_seed(0))
    packed = pack(values, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (3, -(-count * bits // 8))
    got = [
        [int(packed[r, i * bits // 8]) >> (i * bits % 8) & ((1 << bits) - 1) for i in range(count)] for r in range(3)
    ]
    assert got == values.tolist()


def test_real_values_of_integers() -> None:
    w = Integers(
        torch.tensor([[1, 2, 3, 4]], dtype=torch.int16), torch.tensor([[0.5, 2.0]]), torch.tensor([[1, 3]]), 2, False, 4
    )
    assert torch.equal(w.real(), torch.tensor([[0.0, 0.5, 0.0, 2.0]])) and not w.symmetric
