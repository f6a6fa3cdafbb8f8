"""8-bit by 8-bit products: exact sums, the epilogue, every tile, and what must be refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from fxcompress.kernels.configs import ASSUMED, Config, Device, Problem
from fxcompress.kernels.w8a8 import w8a8_linear
from fxcompress.ops import kernel_op
from tests.kernels.cases import device, error
from tests.kernels.int8_cases import (
    check_contract,
    check_export,
    check_graph_and_streams,
    close,
    every_tile,
    fenced,
    floats,
    integers,
    poisoned,
    refused,
)

NAME = "w8a8_linear"


def launch(*arguments: Any, **named: Any) -> Tensor:
    from fxcompress.kernels.w8a8_triton import launch as run

    with poisoned():
        return run(*arguments, **named)


def problem(m: int, n: int, k: int) -> Problem:
    return Problem("w8a8", m, n, k, torch.int8)


def tiles() -> list[Config]:
    from fxcompress.kernels.w8a8_triton import choose

    return every_tile(choose, [problem(m, n, 8192) for m in (1, 17, 64, 100, 4096) for n in (512, 28672)])


def exact(x: Tensor, weight: Tensor, zero: Tensor | None = None) -> Tensor:
    """By integers of PyTorch, on the processor."""
    wide = x.cpu().long() if zero is None else x.cpu().long() - zero.cpu()
    return (wide @ weight.cpu().long().T).to(x.device, torch.int32)


def test_reference_is_exact_and_scales_in_order() -> None:
    x, weight = integers(7, 300), integers(24, 300)
    zero = integers(7, 1, seed=5).int()
    args = (x, weight, floats(7, 1), floats(24), zero, None, None)
    assert torch.equal(w8a8_linear(*args, torch.int32), exact(x, weight, zero))
    expected = exact(x, weight, zero).float() * args[2] * args[3]
    assert torch.equal(w8a8_linear(*args, torch.float32), expected)
    real = ((x.double() - zero) * args[2].double()) @ (weight.double() * args[3].double()[:, None]).T
    assert error(w8a8_linear(*args, torch.float16), real) < 5e-4
    bias, residual = floats(24), floats(7, 24)
    got = w8a8_linear(*args[:6], bias, torch.float32, "relu", residual)
    assert torch.equal(got, torch.relu(expected + bias + residual))


def test_reference_takes_the_extremes() -> None:
    x = torch.full((1, 65536), -128, dtype=torch.int8)
    got = w8a8_linear(
        x, x, torch.ones(1), torch.ones(1), torch.tensor([127], dtype=torch.int32), None, None, torch.int32
    )
    assert got.item() == 255 * 128 * 65536


def test_contract() -> None:
    check_contract(NAME)


def test_export() -> None:
    weight = integers(24, 64).cpu()
    rest = (weight, torch.tensor([0.5]), floats(24).cpu(), None, None, None, torch.float32)
    check_export(NAME, (integers(4, 64).cpu(), *rest), integers(9, 64).cpu())


@pytest.mark.parametrize(
    ("number", "name", "value", "match"),
    [
        (420, "x", torch.zeros(4, 64), "x has dtype float32"),
        (420, "x_scale", torch.ones(4, 1).half(), "x_scale has dtype float16"),
        (421, "weight", torch.zeros(24, 96, dtype=torch.int8), r"\[24, 96\], not \[24, 64\]"),
        (421, "x_scale", torch.ones(4), r"\[4\], not \[1\]"),
        (421, "w_scale", torch.ones(25), r"\[25\], not \[24\]"),
        (421, "x_zero", torch.zeros(1, dtype=torch.int32), r"\[1\], not \[4, 1\]"),
        (421, "residual", torch.zeros(4, 25), r"\[4, 25\], not \[4, 24\]"),
        (422, "bias", torch.zeros(24, device="meta"), "bias lies on meta"),
        (424, "out_dtype", torch.float64, "float64"),
        (402, "activation", "swish", "swish"),
        (425, "out_dtype", torch.int32, "int32"),
    ],
)
def test_refuses(number: int, name: str, value: Any, match: str) -> None:
    good: dict[str, Any] = {
        "x": integers(4, 64).cpu(), "weight": integers(24, 64).cpu(), "x_scale": torch.ones(4, 1),
        "w_scale": torch.ones(24), "x_zero": None, "w_sum": None, "bias": torch.zeros(24), "out_dtype": torch.float32,
        "activation": "", "residual": None,
    }  # fmt: skip
    refused(number, kernel_op(NAME).reference, **(good | {name: value}), match=match)


def test_refuses_sums_that_overflow() -> None:
    x = torch.zeros(1, 65537, dtype=torch.int8)
    args = (x, x, torch.ones(1), torch.ones(1), None, None, None, torch.int32)
    refused(423, kernel_op(NAME).reference, *args, match="65537 products")


def test_refuses_no_features() -> None:
    x = torch.zeros(1, 0, dtype=torch.int8)
    refused(432, kernel_op(NAME).reference, x, x, torch.ones(1), torch.ones(1), None, None, None, torch.int32)


@pytest.mark.triton
@pytest.mark.parametrize(("n", "k"), [(8, 32), (72, 160), (136, 416), (33, 100), (256, 7)])
def test_kernel_is_exact(n: int, k: int) -> None:
    weight, scale, w_scale = fenced(integers(n, k)), floats(1), floats(n)
    for m in (1, 3, 16, 17, 65, 129):
        x = fenced(integers(m, k, seed=1))
        zero = integers(m, 1, seed=2).int()
        got = launch(x, weight, scale.expand(m, 1), w_scale, zero, None, None, torch.int32)
        assert torch.equal(got, exact(x, weight, zero)), m


@pytest.mark.triton
def test_every_tile_is_exact() -> None:
    found = tiles()
    assert len(found) > 8 and {c.swap_ab for c in found} == {True, False} and {c.split_k for c in found} == {1, 2}
    for config in found:
        m, n = config.block_m + 3, config.block_n + 8
        x, weight, scale, w_scale = fenced(integers(m, 288)), fenced(integers(n, 288)), floats(m, 1), floats(n)
        zero, bias, residual = integers(m, 1).int(), floats(n), floats(m, n)
        ints = exact(x, weight, zero)
        if config.split_k > 1:
            got = launch(x, weight, scale, w_scale, zero, None, None, torch.int32, config=config)
            assert torch.equal(got, ints), config
        else:
            full = (x, weight, scale, w_scale, zero, None, bias, torch.float32, "relu", residual)
            expected = torch.relu(ints.float() * scale * w_scale + bias + residual)
            torch.testing.assert_close(launch(*full, config=config), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.triton
@pytest.mark.parametrize("activation", ["", "relu", "relu6", "silu", "gelu", "gelu_tanh", "sigmoid", "hardswish"])
def test_epilogue(activation: str) -> None:
    x, weight = integers(2, 9, 96), integers(40, 96)
    args = (x, weight, floats(2, 9, 1), floats(40), None, None, floats(40).half(), torch.float16)
    residual = floats(2, 9, 40).half()
    for split in (1, 2):
        got = launch(*args, activation, residual, config=Config(16, 64, 32, split))
        close(kernel_op(NAME), got, kernel_op(NAME).reference(*args, activation, residual))


@pytest.mark.triton
def test_one_hot_rows_return_the_weights() -> None:
    x, weight = torch.eye(160, dtype=torch.int8, device=device()), integers(72, 160)
    got = launch(x, weight, floats(1), floats(72), None, None, None, torch.int32)
    assert torch.equal(got, weight.T.int())


@pytest.mark.triton
def test_a_row_does_not_depend_on_its_neighbours() -> None:
    x, weight, scale, w_scale, bias = integers(129, 160), integers(72, 160), floats(129, 1), floats(72), floats(72)
    every = launch(x, weight, scale, w_scale, None, None, bias, torch.float16, "silu")
    for m in (1, 2, 17, 65):
        some = launch(x[:m], weight, scale[:m], w_scale, None, None, bias, torch.float16, "silu")
        assert torch.equal(some, every[:m])
    order = torch.randperm(129, generator=torch.Generator().manual_seed(0)).to(device())
    moved = launch(x[order], weight, scale[order], w_scale, None, None, bias, torch.float16, "silu")
    assert torch.equal(moved, every[order])
    doubled = launch(x, weight, 2 * scale, w_scale, None, None, None, torch.float32)
    assert torch.equal(doubled, 2 * launch(x, weight, scale, w_scale, None, None, None, torch.float32))


@pytest.mark.triton
def test_sums_of_rows_given_or_not() -> None:
    x, weight, zero = integers(5, 96), integers(24, 96), torch.tensor([-3], dtype=torch.int32, device=device())
    sums = weight.sum(1, dtype=torch.int32)
    args = (x, weight, floats(1), floats(24), zero)
    assert torch.equal(launch(*args, sums, None, torch.float16), launch(*args, None, None, torch.float16))
    wrong = launch(*args, sums + 1, None, torch.int32)
    assert torch.equal(wrong, exact(x, weight, zero) + 3)


@pytest.mark.triton
def test_choose_fills_the_device_and_reads_tables(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fxcompress.kernels import configs
    from fxcompress.kernels.w8a8_triton import choose

    h200 = ASSUMED[90]
    assert choose(problem(1, 512, 8192), h200).split_k > 1
    assert choose(problem(4096, 8192, 8192), h200).split_k == 1
    assert choose(problem(4096, 8192, 8192), h200).block_n == 256
    assert choose(problem(1, 512, 64), h200).split_k == 1
    small = Device("a small GPU", 89, 80, 101376)
    large = choose(problem(4096, 8192, 8192), small)
    assert large.num_stages * (large.block_m + large.block_n) * large.block_k <= small.shared_memory
    entry = {problem(1, 512, 64).key(): {"block_m": 32, "block_n": 32, "split_k": 2}}
    table = {"schema": 1, "entries": {"w8a8": entry}}
    (tmp_path / configs.table_name(h200.name)).write_text(json.dumps(table))
    monkeypatch.setenv("FXCOMPRESS_CONFIGS", str(tmp_path))
    configs.forget_tables()
    try:
        assert choose(problem(1, 512, 64), h200) == Config(32, 32, split_k=2)
    finally:
        configs.forget_tables()


@pytest.mark.cuda
def test_on_a_gpu_repeats_captures_and_streams() -> None:
    weight, w_scale = integers(512, 4096), floats(512)
    for m in (1, 16, 300):
        x, scale = integers(m, 4096), floats(m, 1)
        op = torch.ops.fxcompress.w8a8_linear

        def run(given: Tensor, op: Any = op, scale: Tensor = scale) -> Tensor:
            return op(given, weight, scale, w_scale, None, None, None, torch.float16)  # type: ignore[no-any-return]

        check_graph_and_streams(run, x)


@pytest.mark.cuda
def test_on_a_gpu_bfloat16() -> None:
    args = (integers(33, 512), integers(264, 512), floats(33, 1), floats(264), None, None, floats(264), torch.bfloat16)
    close(kernel_op(NAME), launch(*args, "gelu"), kernel_op(NAME).reference(*args, "gelu"))


@pytest.mark.cuda
def test_on_a_gpu_offsets_beyond_32_bits() -> None:
    rows, k = 2**31 // 4096 + 32, 4096
    tall = torch.ones(rows, k, dtype=torch.int8, device="cuda")
    tall[-1] = integers(k)
    one = integers(16, k)
    as_x = launch(tall, one, floats(1), floats(16), None, None, None, torch.int32)
    assert torch.equal(as_x[-1:], exact(tall[-1:], one)) and torch.equal(as_x[:1], exact(tall[:1], one))
    as_weight = launch(one, tall, floats(1), floats(rows), None, None, None, torch.int32)
    assert torch.equal(as_weight.T, as_x)
