"""``sp24_w8a8_linear``: exact integers by reference, interpreter and the emulated sparse kernel; scales and what follows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fxcompress.errors import UsageError
from fxcompress.kernels import sparse_proof
from fxcompress.kernels.configs import Config
from fxcompress.kernels.sparse_common import I8
from fxcompress.kernels.sparse_layout import pack_sp24_i8
from fxcompress.ops import kernel_op
from tests.kernels.cases import device, error
from tests.kernels.sparse_problems import Sparse, multiplied, padded_by_nan, problem

triton = pytest.mark.triton
op = kernel_op("sp24_w8a8_linear")


def tile(m: int, n: int, k: int, split: int = 1, stages: int = 2) -> Config:
    return Config(m, n, k, split, 4, stages)


def scales(case: Sparse, per_row: bool = True) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x_scale = torch.rand(case.x.shape[0], 1, generator=generator) * 0.01 + 0.001
    return (x_scale if per_row else x_scale[0]), torch.rand(case.weight.n, generator=generator) * 0.1 + 0.01


def expected(case: Sparse, x_scale: Tensor, w_scale: Tensor) -> Tensor:
    return case.expected * x_scale.double() * w_scale.double()


def arguments(case: Sparse, x_scale: Tensor, w_scale: Tensor) -> tuple[Any, ...]:
    return tuple(t.to(device()) for t in (case.x, case.weight.values, case.weight.meta, x_scale, w_scale))


def launched(case: Sparse, out_dtype: torch.dtype, per_row: bool = True, **more: Any) -> Tensor:
    from fxcompress.kernels import sp24_w8a8_triton

    run: Any = sp24_w8a8_triton.launch
    given = arguments(case, *scales(case, per_row))
    more = {k: v.to(device()) if isinstance(v, Tensor) else v for k, v in more.items()}
    result: Tensor = run(*given, more.pop("bias", None), out_dtype, **more)
    return result


# ------------------------------------------------------------------------------------------------ reference, operator
@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int32])
@pytest.mark.parametrize("per_row", [True, False])
def test_reference(out_dtype: torch.dtype, per_row: bool) -> None:
    case = problem(I8, 5, 40, 200)
    x_scale, w_scale = scales(case, per_row)
    got = op.overload(case.x, case.weight.values, case.weight.meta, x_scale, w_scale, None, out_dtype)
    if out_dtype == torch.int32:
        assert torch.equal(got, case.expected.to(torch.int32))
    else:
        assert got.dtype == out_dtype and error(got, expected(case, x_scale, w_scale)) <= op.tolerance[out_dtype]


def test_extremes_are_exact() -> None:
    """The largest sum: every kept product 128 * 128, beyond what float32 counts exactly."""
    weight = torch.tensor([-128, -128, 0, 0], dtype=torch.int8).repeat(3, 16384)
    values, meta = pack_sp24_i8(weight)
    x = torch.full((1, 65536), -128, dtype=torch.int8)
    x[0, 0] = -127
    got = op.overload(x, values, meta, torch.ones(1), torch.ones(3), None, torch.int32)
    assert got.tolist() == [[32768 * 16384 - 128] * 3]


@pytest.mark.parametrize("sample", range(4))
def test_opcheck(sample: int) -> None:
    torch.library.opcheck(op.overload, list(op.samples(device()))[sample])


@pytest.mark.parametrize(
    ("change", "number"),
    [
        ({"w_scale": torch.ones(49)}, 421),
        ({"w_scale": torch.ones(40, dtype=torch.half)}, 420),
        ({"w_scale": torch.ones(1, 40)}, 421),
        ({"x": torch.zeros(2, 200)}, 420),
        ({"x": torch.zeros(2, 264, dtype=torch.int8)}, 421),
        ({"x_scale": torch.ones(3, 1)}, 421),
        ({"values": torch.zeros(3, 8, 32, 8).half()}, 446),
        ({"out_dtype": torch.float64}, 424),
        ({"out_dtype": torch.int32, "activation": "relu"}, 425),
        ({"bias": torch.zeros(41)}, 421),
    ],
)
def test_refusals(change: dict[str, Any], number: int) -> None:
    case = problem(I8, 2, 40, 200)
    x_scale, w_scale = scales(case)
    given = {
        "x": case.x, "values": case.weight.values, "meta": case.weight.meta, "x_scale": x_scale, "w_scale": w_scale,
        "bias": None, "out_dtype": torch.float16,
    }  # fmt: skip
    with pytest.raises(UsageError) as caught:
        op.reference(**(given | change))
    assert caught.value.id == f"FXC-USAGE-{number}"


# ------------------------------------------------------------------------------------------------ launcher
@triton
@pytest.mark.parametrize("m", [1, 17])
def test_launch_is_exact(m: int) -> None:
    case = problem(I8, m, 40, 200)
    assert torch.equal(launched(case, torch.int32), case.expected.to(device(), torch.int32))


@triton
def test_launch_with_everything() -> None:
    case = problem(I8, 5, 40, 200)
    bias, residual = torch.randn(40), torch.randn(5, 40)
    got = launched(case, torch.float32, bias=bias, residual=residual, activation="relu")
    want = torch.relu(expected(case, *scales(case)) + bias + residual)
    assert error(got, want.to(device())) <= op.tolerance[torch.float32]


@triton
def test_launch_with_leading_dimensions_and_strides() -> None:
    from fxcompress.kernels import sp24_w8a8_triton

    case = problem(I8, 6, 40, 200)
    x, values, meta, x_scale, w_scale = arguments(case, *scales(case))
    strided = padded_by_nan(x.view(2, 3, 200).transpose(1, 2).contiguous()).transpose(1, 2)
    got = sp24_w8a8_triton.launch(strided, values, meta, x_scale.view(2, 3, 1), w_scale, None, torch.float32)
    want = expected(case, *scales(case)).to(device())
    assert got.shape == (2, 3, 40) and error(got.view(6, 40), want) <= op.tolerance[torch.float32]
    assert sp24_w8a8_triton.launch(x[:0], values, meta, x_scale[:0], w_scale, None, torch.float16).shape == (0, 40)


# ------------------------------------------------------------------------------------------------ the sparse kernel
TILES = [
    (5, 40, 200, tile(8, 32, 256)),
    (1, 16, 512, tile(8, 32, 512, stages=3)),
    (17, 72, 256, tile(16, 64, 128)),
    (70, 136, 192, tile(64, 128, 64, stages=3)),
    (70, 64, 192, tile(128, 64, 64, stages=3)),
    (9, 32, 640, tile(8, 32, 256, split=3)),
]


@triton
@pytest.mark.parametrize(("m", "n", "k", "config"), TILES)
def test_sparse_kernel_is_exact(m: int, n: int, k: int, config: Config) -> None:
    case = problem(I8, m, n, k)
    assert torch.equal(multiplied(case, config), case.expected.to(device(), torch.int32))


@triton
def test_sparse_kernel_one_hot() -> None:
    case = problem(I8, 1, 32, 64)
    eye = Sparse(torch.eye(64, dtype=torch.int8), case.weight, case.dense)
    assert torch.equal(multiplied(eye, tile(64, 64, 64)).T.double(), case.dense.to(device()))


@triton
@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("per_row", [True, False])
def test_sparse_kernel_epilogue(split: int, per_row: bool) -> None:
    case = problem(I8, 5, 40, 512).to(device())
    x_scale, w_scale = (s.to(device()) for s in scales(case, per_row))
    bias, residual = torch.randn(40, device=device()), torch.randn(5, 40, device=device())
    got = multiplied(
        case, tile(8, 32, 256, split), x_scale=x_scale, w_scale=w_scale, bias=bias, residual=residual, activation="relu"
    )
    assert error(got, torch.relu(expected(case, x_scale, w_scale) + bias + residual)) < 1e-6


@triton
def test_route_to_cusparselt(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxcompress.kernels import sp24_w8a8_triton

    seen = []

    def product(copy: Tensor, x: Tensor, out_dtype: Any = None) -> Tensor:
        seen.append((tuple(copy.shape), tuple(x.shape), out_dtype))
        return (copy.double() @ x.double()).to(out_dtype)

    monkeypatch.setattr(torch, "_cslt_compress", lambda dense: dense, raising=False)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", product, raising=False)
    sparse_proof.forget_proofs()
    case = problem(I8, 7, 40, 200).to(device())
    sparse_proof._compress(case.weight)
    given = arguments(case, *scales(case))
    run: Any = sp24_w8a8_triton.launch
    got = run(*given, None, torch.int32, config=Config(route="cusparselt"))
    assert seen == [((64, 256), (256, 16), torch.int32)] and torch.equal(got, case.expected.to(torch.int32))
    sparse_proof.forget_proofs()


# ------------------------------------------------------------------------------------------------ a device
@pytest.mark.cuda
@triton
@pytest.mark.parametrize("m", [1, 2, 3, 8, 15, 16, 17, 33, 64, 65, 127, 129, 257, 600])
@pytest.mark.parametrize(("n", "k"), [(8, 96), (136, 4160), (1000, 128), (96, 8192)])
def test_grid(m: int, n: int, k: int) -> None:
    case = problem(I8, m, n, k)
    assert torch.equal(launched(case, torch.int32), case.expected.to(device(), torch.int32))
    want = expected(case, *scales(case)).to(device())
    assert error(launched(case, torch.float16), want) <= op.tolerance[torch.float16]


@pytest.mark.cuda
@triton
def test_graph() -> None:
    case = problem(I8, 3, 256, 2048)
    want = launched(case, torch.int32)
    given = arguments(case, *scales(case))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = op.overload(*given, None, torch.int32)
    captured.fill_(-1)
    graph.replay()
    assert torch.equal(captured, want)
