"""``sp24_linear``: reference, operator, dense route in the interpreter, the sparse kernel emulated, the proof, the routes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fxcompress.errors import UsageError
from fxcompress.kernels.configs import Config
from fxcompress.kernels.epilogue import ACTIVATIONS
from fxcompress.kernels.sparse_common import F16, HALVES, Packed
from fxcompress.kernels.sparse_layout import pack_sp24, unpack_sp24
from fxcompress.ops import kernel_op
from tests.kernels.cases import device, error
from tests.kernels.sparse_problems import BOTH, KINDS, Sparse, multiplied, padded_by_nan, problem

triton = pytest.mark.triton
op = kernel_op("sp24_linear")


def tile(m: int, n: int, k: int, split: int = 1, warps: int = 4, stages: int = 2) -> Config:
    return Config(m, n, k, split, warps, stages)


def call(case: Sparse, **more: Any) -> Tensor:
    result: Tensor = op.overload(case.x, case.weight.values, case.weight.meta, case.weight.n, **more)
    return result


def launched(case: Sparse, x: Tensor | None = None, **more: Any) -> Tensor:
    """The launcher, on the device or in the interpreter, where it makes a dense copy."""
    from fxcompress.kernels import sp24_triton

    there = case.to(device())
    rows = there.x if x is None else x.to(device())
    return sp24_triton.launch(rows, there.weight.values, there.weight.meta, there.weight.n, **more)


# ------------------------------------------------------------------------------------------------ reference, operator
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 4), (5, 40, 200), (33, 48, 256)])
def test_reference_against_float64(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    case = problem(F16, m, n, k, dtype=dtype)
    got = call(case)
    assert got.dtype == dtype and error(got, case.expected) <= op.tolerance[dtype]
    exact = Sparse(case.x.double(), case.weight, case.dense)
    assert error(call(exact), case.expected) < 1e-14


def test_one_hot_rows_return_weights() -> None:
    case = problem(F16, 1, 24, 136)
    eye = Sparse(torch.eye(136).half(), case.weight, case.dense)
    assert torch.equal(call(eye).T.double(), case.dense)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogue(activation: str) -> None:
    case = problem(F16, 5, 40, 64)
    bias, residual = torch.randn(40), torch.randn(5, 40).half()
    got = call(case, bias=bias, activation=activation, residual=residual)
    expected = ACTIVATIONS[activation](case.expected + bias.double() + residual.double())
    assert error(got, expected) <= op.tolerance[torch.float16]


@pytest.mark.parametrize("sample", range(3))
def test_opcheck(sample: int) -> None:
    torch.library.opcheck(op.overload, list(op.samples(device()))[sample])


def test_compiles_and_exports_with_any_number_of_rows() -> None:
    case = problem(F16, 5, 40, 200)

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.values, self.places = case.weight.values, case.weight.meta

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = op.overload(x, self.values, self.places, 40, None, "relu", None)
            return result

    expected = call(case, activation="relu")
    compiled = torch.compile(Layer(), fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(compiled(case.x), expected) and torch.equal(compiled(case.x[:3]), expected[:3])
    exported = torch.export.export(Layer(), (case.x,), dynamic_shapes={"x": {0: torch.export.Dim("rows")}})
    assert torch.equal(exported.module()(case.x[:2]), expected[:2])


def test_autocast_casts_weights_along() -> None:
    case = problem(F16, 5, 40, 200)
    with torch.autocast("cpu", torch.bfloat16):
        got = op.overload(case.x.float(), case.weight.values, case.weight.meta, 40)
    assert got.dtype == torch.bfloat16 and error(got, case.expected) < 1e-2


@pytest.mark.parametrize(
    ("change", "number"),
    [
        ({"n": 49}, 421),
        ({"n": 0}, 445),
        ({"x": torch.zeros(2, 300).half()}, 421),
        ({"x": torch.zeros(()).half()}, 445),
        ({"x": torch.zeros(2, 200).bfloat16()}, 420),
        ({"x": torch.zeros(2, 200, dtype=torch.int8)}, 420),
        ({"values": torch.zeros(3, 8, 32, 8, dtype=torch.int64)}, 444),
        ({"values": torch.zeros(3, 8, 32, 8)}, 420),
        ({"values": torch.zeros(3, 4, 32, 16, dtype=torch.int8)}, 446),
        ({"meta": torch.zeros(3, 3, 32, dtype=torch.int32)}, 421),
        ({"meta": torch.zeros(3, 4, 32, dtype=torch.int64)}, 420),
        ({"bias": torch.zeros(41)}, 421),
        ({"activation": "tanh"}, 402),
        ({"residual": torch.zeros(2, 41)}, 421),
    ],
)
def test_refusals(change: dict[str, Any], number: int) -> None:
    values, meta = pack_sp24(problem(F16, 1, 40, 200).dense.half())
    given: dict[str, Any] = {"x": torch.zeros(2, 200).half(), "values": values, "meta": meta, "n": 40} | change
    with pytest.raises(UsageError) as caught:
        op.reference(**given)
    assert caught.value.id == f"FXC-USAGE-{number}"


# ------------------------------------------------------------------------------------------------ dense route
@triton
@pytest.mark.parametrize(("kind", "dtype"), BOTH)
@pytest.mark.parametrize(("n", "k"), [(16, 128), (40, 384), (7, 640)])
def test_dense_copy_is_exact(kind: str, dtype: torch.dtype, n: int, k: int) -> None:
    from fxcompress.kernels.sparse_dense_triton import decompress

    case = problem(KINDS[kind], 1, n, k, 32 if kind == "sp24_w4" else 0, dtype).to(device())
    dense = decompress(case.weight, dtype if kind == "sp24_w4" else None)
    assert dense.shape == (n, -(-k // case.weight.kind.unit) * case.weight.kind.unit)
    assert torch.equal(dense[:, :k].double(), case.dense.to(dense.dtype).double()) and not dense[:, k:].any()


@triton
@pytest.mark.parametrize("m", [1, 17])
def test_launch(m: int) -> None:
    case = problem(F16, m, 40, 200)
    assert error(launched(case), case.expected.to(device())) <= op.tolerance[torch.float16]


@triton
def test_launch_with_everything() -> None:
    case = problem(F16, 12, 40, 200)
    bias, residual = torch.randn(40).to(device()), torch.randn(3, 4, 40).half().to(device())
    x = padded_by_nan(case.x.reshape(3, 4, 200).transpose(1, 2).contiguous()).transpose(1, 2)  # not contiguous
    got = launched(case, x, bias=bias, activation="silu", residual=residual)
    expected = torch.nn.functional.silu(case.expected.to(device()) + bias + residual.view(12, 40))
    assert got.shape == (3, 4, 40) and error(got.view(12, 40), expected) <= 2 * op.tolerance[torch.float16]


@triton
@pytest.mark.parametrize("shape", [(0, 200), (2, 0, 200)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    case = problem(F16, 1, 40, 200)
    assert launched(case, torch.zeros(shape).half()).shape == (*shape[:-1], 40)


@triton
def test_float32_activations_are_refused_by_the_kernel() -> None:
    case = problem(F16, 2, 40, 200)
    with pytest.raises(UsageError, match="float32") as caught:
        launched(case, case.x.float())
    assert caught.value.id == "FXC-USAGE-448"


# ------------------------------------------------------------------------------------------------ the sparse kernel
TILES = [
    (5, 40, 200, tile(8, 32, 256)),  # warps share K, everything has a tail
    (1, 16, 512, tile(8, 32, 512, stages=3)),
    (17, 72, 256, tile(16, 64, 128)),
    (20, 72, 192, tile(32, 64, 128, stages=3)),
    (70, 136, 192, tile(64, 128, 64, stages=3)),
    (70, 64, 192, tile(128, 64, 64, stages=3)),
    (9, 32, 640, tile(8, 32, 128, split=3)),
    (9, 32, 768, tile(8, 32, 256, split=3)),
]


@triton
@pytest.mark.parametrize(("m", "n", "k", "config"), TILES)
def test_sparse_kernel(m: int, n: int, k: int, config: Config) -> None:
    case = problem(F16, m, n, k)
    got = multiplied(case, config)
    assert error(got, case.expected.to(got.device)) < 1e-6


@triton
def test_sparse_kernel_bfloat16() -> None:
    case = problem(F16, 5, 40, 200, dtype=torch.bfloat16)
    got = multiplied(case, tile(8, 32, 256))
    assert error(got, case.expected.to(got.device)) < 1e-6


@triton
def test_sparse_kernel_epilogue() -> None:
    case = problem(F16, 5, 40, 200).to(device())
    bias, residual = torch.randn(40, device=device()), torch.randn(5, 40, device=device())
    got = multiplied(case, tile(8, 32, 256), bias=bias, residual=residual, activation="relu")
    assert error(got, torch.relu(case.expected + bias + residual)) < 1e-6


@triton
def test_rows_do_not_depend_on_each_other() -> None:
    case = problem(F16, 20, 32, 256)
    whole = multiplied(case, tile(16, 32, 128))
    for m in (1, 7, 16):
        part = multiplied(Sparse(case.x[:m], case.weight, case.dense), tile(16, 32, 128))
        assert torch.equal(part.view(torch.int32), whole[:m].view(torch.int32))


@triton
def test_other_metadata_give_another_result() -> None:
    """The emulator reads the metadata: lanes of a quad exchanged are noticed."""
    case = problem(F16, 5, 16, 64)
    meta = case.weight.meta.view(1, 1, 8, 4).flip(3).reshape(1, 1, 32)
    wrong = multiplied(Sparse(case.x, Packed(case.weight.values, meta, 16), case.dense), tile(8, 32, 256))
    assert error(wrong, case.expected.to(wrong.device)) > 0.1


# ------------------------------------------------------------------------------------------------ a device
@pytest.mark.cuda
@triton
@pytest.mark.parametrize("m", [1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 257])
@pytest.mark.parametrize(("n", "k"), [(8, 96), (64, 160), (136, 4160), (1000, 128), (96, 8192)])
@pytest.mark.parametrize("dtype", HALVES)
def test_grid(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    case = problem(F16, m, n, k, dtype=dtype)
    assert error(launched(case), case.expected.to(device())) <= op.tolerance[dtype]
    dense = launched(case, config=Config(route="dense"))
    assert error(dense, case.expected.to(device())) <= op.tolerance[dtype]


@pytest.mark.cuda
@triton
@pytest.mark.parametrize("m", [1, 40])
def test_graph_streams_and_repetition(m: int) -> None:
    case = problem(F16, m, 256, 2048).to("cuda")
    expected = launched(case)
    assert all(torch.equal(launched(case), expected) for _ in range(20))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = launched(case)
    captured.fill_(float("nan"))
    graph.replay()
    assert torch.equal(captured, expected)
    results = []
    for _ in range(2):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results.append(launched(case))
    torch.cuda.synchronize()
    assert all(torch.equal(r, expected) for r in results)


@pytest.mark.cuda
@triton
def test_offsets_beyond_32_bits() -> None:
    """More than 2 ** 31 values: the last tile is right."""
    n, k = 1 << 17, 1 << 15
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GiB")
    tiles, steps = n // 16, k // 32
    one = problem(F16, 1, 16, k).to("cuda")
    values = one.weight.values.expand(tiles, steps, 32, 8).contiguous()
    meta = one.weight.meta.expand(tiles, steps // 2, 32).contiguous()
    x = torch.randn(3, k, device="cuda").half()
    got = launched(Sparse(x, Packed(values, meta, n), one.dense))
    assert error(got[:, -16:], x.double() @ one.dense.T) <= op.tolerance[torch.float16]
    assert torch.equal(unpack_sp24(values[:1], meta[:1], 16, k).double(), one.dense)
