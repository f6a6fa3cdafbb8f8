"""``sp24_w4_linear``: reference, interpreter (dense copy), the emulated sparse kernel with groups of every size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fxcompress.errors import UsageError
from fxcompress.kernels.configs import Config
from fxcompress.kernels.sparse_common import HALVES, W4
from fxcompress.ops import kernel_op
from tests.kernels.cases import device, error
from tests.kernels.sparse_problems import Sparse, multiplied, padded_by_nan, problem

triton = pytest.mark.triton
op = kernel_op("sp24_w4_linear")


def tile(m: int, n: int, k: int, split: int = 1, stages: int = 2) -> Config:
    return Config(m, n, k, split, 4, stages)


def group_size(case: Sparse) -> int:
    return 32 * case.weight.group if case.weight.group else -1


def launched(case: Sparse, x: Tensor | None = None, **more: Any) -> Tensor:
    from fxcompress.kernels import sp24_w4_triton

    there = case.to(device())
    weight = there.weight
    assert weight.scales is not None
    rows = there.x if x is None else x
    bias = more.pop("bias", None)
    return sp24_w4_triton.launch(rows, weight.values, weight.meta, weight.scales, bias, group_size(case), **more)


# ------------------------------------------------------------------------------------------------ reference, operator
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("k", "group"), [(160, 0), (192, 32), (384, 96), (256, 128), (512, 256)])
def test_reference_against_float64(k: int, group: int, dtype: torch.dtype) -> None:
    case = problem(W4, 5, 40, k, group, dtype)
    given = (case.weight.values, case.weight.meta, case.weight.scales, None, group_size(case))
    got = op.overload(case.x, *given)
    assert got.dtype == dtype and error(got, case.expected) <= op.tolerance[dtype]
    assert error(op.overload(case.x.double(), *given), case.expected) < 1e-14


@pytest.mark.parametrize("sample", [0, 1, 3, 6])
def test_opcheck(sample: int) -> None:
    torch.library.opcheck(op.overload, list(op.samples(device()))[sample])


def test_linear_in_the_scales() -> None:
    case = problem(W4, 5, 40, 256, 64)
    weight = case.weight
    assert weight.scales is not None
    once = op.overload(case.x, weight.values, weight.meta, weight.scales, None, 64)
    twice = op.overload(case.x, weight.values, weight.meta, 2 * weight.scales, None, 64)
    assert torch.equal(twice, 2 * once)


@pytest.mark.parametrize(
    ("change", "number"),
    [
        ({"group_size": 48}, 401),
        ({"group_size": 160}, 401),
        ({"group_size": 128}, 421),
        ({"scales": torch.ones(4, 49).half()}, 421),
        ({"scales": torch.ones(40).half()}, 421),
        ({"scales": torch.ones(4, 40, dtype=torch.int8)}, 420),
        ({"values": torch.zeros(3, 8, 32, 8).half()}, 446),
        ({"x": torch.zeros(2, 400).half()}, 421),
        ({"meta": torch.zeros(3, 3, 32, dtype=torch.int32)}, 421),
    ],
)
def test_refusals(change: dict[str, Any], number: int) -> None:
    case = problem(W4, 2, 40, 256, 64)
    given: dict[str, Any] = {
        "x": case.x, "values": case.weight.values, "meta": case.weight.meta, "scales": case.weight.scales, "bias": None,
        "group_size": 64,
    }  # fmt: skip
    with pytest.raises(UsageError) as caught:
        op.reference(**(given | change))
    assert caught.value.id == f"FXC-USAGE-{number}"


def test_rest_of_a_group_is_told() -> None:
    case = problem(W4, 2, 40, 256, 64)
    with pytest.raises(UsageError, match="256 % 160 = 96"):
        op.reference(case.x, case.weight.values, case.weight.meta, case.weight.scales, None, 160)


# ------------------------------------------------------------------------------------------------ launcher
@triton
@pytest.mark.parametrize(("k", "group"), [(160, 0), (192, 32), (384, 96), (256, 128)])
def test_launch(k: int, group: int) -> None:
    case = problem(W4, 5, 40, k, group)
    assert error(launched(case), case.expected.to(device())) <= op.tolerance[torch.float16]


@triton
def test_launch_with_everything() -> None:
    case = problem(W4, 6, 40, 192, 64)
    there = case.x.to(device()).view(2, 3, 192).transpose(1, 2).contiguous()
    bias, residual = torch.randn(40, device=device()), torch.randn(2, 3, 40, device=device())
    got = launched(case, padded_by_nan(there).transpose(1, 2), bias=bias, activation="silu", residual=residual)
    want = torch.nn.functional.silu(case.expected.to(device()) + bias + residual.view(6, 40))
    assert got.shape == (2, 3, 40) and error(got.view(6, 40), want) <= 2 * op.tolerance[torch.float16]
    assert launched(case, case.x[:0].to(device())).shape == (0, 40)


# ------------------------------------------------------------------------------------------------ the sparse kernel
TILES = [
    (5, 40, 192, 32, tile(8, 32, 256)),
    (5, 29, 384, 128, tile(8, 32, 512)),
    (5, 40, 384, 192, tile(8, 32, 256)),  # a scale for one and a half units
    (3, 40, 384, 96, tile(8, 32, 256)),
    (5, 40, 384, 0, tile(8, 32, 256)),
    (17, 72, 256, 64, tile(16, 64, 256)),
    (66, 136, 256, 128, tile(64, 128, 128, stages=3)),
    (66, 72, 256, 128, Config(64, 64, 256, 1, 8, 3)),
    (9, 32, 768, 256, tile(8, 32, 256, split=3)),
    (9, 32, 640, 0, tile(8, 32, 256, split=2)),
]


@triton
@pytest.mark.parametrize(("m", "n", "k", "group", "config"), TILES)
def test_sparse_kernel(m: int, n: int, k: int, group: int, config: Config) -> None:
    case = problem(W4, m, n, k, group)
    got = multiplied(case, config)
    assert error(got, case.expected.to(got.device)) < 1e-6


@triton
@pytest.mark.parametrize("group", [0, 64])
def test_sparse_kernel_bfloat16(group: int) -> None:
    case = problem(W4, 5, 40, 192, group, torch.bfloat16)
    got = multiplied(case, tile(8, 32, 256))
    assert error(got, case.expected.to(got.device)) < 1e-6


@triton
@pytest.mark.parametrize("dtype", HALVES)
def test_dequantization_of_all_nibbles(dtype: torch.dtype) -> None:
    """The assembly, run operation by operation: every nibble at every place."""
    from fxcompress.kernels import sparse_gluon
    from tests.kernels.mma_sp_emulator import elements, run_ptx

    asm = (sparse_gluon._HALF if dtype == torch.float16 else sparse_gluon._BRAIN).value
    words = np.array([sum(((i + shift) % 16) << 4 * shift for shift in range(8)) for i in range(16)], np.uint32)
    found = run_ptx(asm, {f"${16 + i}": words.view(np.int32) for i in range(4)}, 16)
    for word in range(4):
        registers = np.stack(found[4 * word : 4 * word + 4], -1)
        values = elements(registers, "f16" if dtype == torch.float16 else "bf16").reshape(16, 4, 2)
        for register in range(4):
            for half in range(2):
                nibble = (words.astype(np.int64) >> (4 * register + 16 * half)) & 15
                np.testing.assert_array_equal(values[:, register, half], nibble - 8)


# ------------------------------------------------------------------------------------------------ a device
@pytest.mark.cuda
@triton
@pytest.mark.parametrize("m", [1, 2, 3, 8, 15, 16, 17, 33, 64, 65, 127, 129, 257, 600])
@pytest.mark.parametrize(("n", "k", "group"), [(8, 96, 32), (136, 4160, 64), (1000, 128, 0), (96, 8192, 128)])
@pytest.mark.parametrize("dtype", HALVES)
def test_grid(m: int, n: int, k: int, group: int, dtype: torch.dtype) -> None:
    case = problem(W4, m, n, k, group, dtype)
    assert error(launched(case), case.expected.to(device())) <= op.tolerance[dtype]


@pytest.mark.cuda
@triton
def test_repetition_and_graph() -> None:
    case = problem(W4, 4, 256, 2048, 128).to("cuda")
    expected = launched(case)
    assert all(torch.equal(launched(case), expected) for _ in range(20))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = launched(case)
    captured.fill_(float("nan"))
    graph.replay()
    assert torch.equal(captured, expected)


@triton
def test_scales_of_one_group_are_scales_of_rows() -> None:
    """A group as wide as the row, and -1: the same numbers."""
    case = problem(W4, 5, 40, 256, 0)
    whole = launched(case)
    weight = replace(case.weight, group=8)
    assert torch.equal(launched(Sparse(case.x, weight, case.dense)), whole)
