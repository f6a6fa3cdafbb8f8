"""8-bit by 4-bit products: exact sums, the packed layout, every tile, and what must be refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fxcompress.kernels.configs import ASSUMED, Config, Problem
from fxcompress.kernels.layouts import pack_int4x8
from fxcompress.kernels.w4a8 import w4a8_linear
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

NAME = "w4a8_linear"


def launch(*arguments: Any, **named: Any) -> Tensor:
    from fxcompress.kernels.w4a8_triton import launch as run

    with poisoned():
        return run(*arguments, **named)


def weights(n: int, k: int) -> tuple[Tensor, Tensor]:
    """Random 4-bit weights, and packed, with memory full of ones around them."""
    q = integers(n, k, low=-8, high=8)
    return q, fenced(pack_int4x8(q), 255)


def exact(x: Tensor, q: Tensor) -> Tensor:
    return (x.cpu().long() @ q.cpu().long().T).to(x.device, torch.int32)


def test_reference() -> None:
    x = integers(7, 300)
    q, packed = weights(24, 300)
    scale, w_scale, bias = floats(7, 1), floats(24), floats(24)
    assert torch.equal(w4a8_linear(x, packed, scale, w_scale, None, torch.int32), exact(x, q))
    real = (x.double() * scale.double()) @ (q.double() * w_scale.double()[:, None]).T + bias.double()
    assert error(w4a8_linear(x, packed, scale, w_scale, bias, torch.float32), real) < 1e-6
    assert error(w4a8_linear(x, packed, scale, w_scale, bias, torch.float16), real) < 5e-4


def test_contract() -> None:
    check_contract(NAME)


def test_export() -> None:
    rest = (weights(24, 64)[1].cpu(), torch.tensor([0.5]), floats(24).cpu(), None, torch.float32)
    check_export(NAME, (integers(4, 64).cpu(), *rest), integers(9, 64).cpu())


@pytest.mark.parametrize(
    ("number", "name", "value", "match"),
    [
        (420, "packed", torch.zeros(1, 24, 64, dtype=torch.int8), "packed has dtype int8"),
        (421, "packed", torch.zeros(2, 24, 64, dtype=torch.uint8), r"\[2, 24, 64\], not \[1, 24, 64\]"),
        (421, "w_scale", torch.ones(25), r"\[1, 24, 64\], not \[1, 25, 64\]"),
        (425, "out_dtype", torch.int32, "int32"),
    ],
)
def test_refuses(number: int, name: str, value: Any, match: str) -> None:
    good: dict[str, Any] = {
        "x": integers(4, 96).cpu(), "packed": weights(24, 96)[1].cpu(), "x_scale": torch.ones(4, 1),
        "w_scale": torch.ones(24), "bias": torch.zeros(24), "out_dtype": torch.float32,
    }  # fmt: skip
    refused(number, kernel_op(NAME).reference, **(good | {name: value}), match=match)


@pytest.mark.triton
@pytest.mark.parametrize(("n", "k"), [(8, 32), (72, 160), (136, 416), (33, 200)])
def test_kernel_is_exact(n: int, k: int) -> None:
    q, packed = weights(n, k)
    for m in (1, 3, 16, 17, 65, 129):
        x = fenced(integers(m, k, seed=1))
        got = launch(x, packed, floats(1), floats(n), None, torch.int32)
        assert torch.equal(got, exact(x, q)), m


@pytest.mark.triton
def test_every_tile_is_exact() -> None:
    from fxcompress.kernels.w4a8_triton import choose

    sizes = [(m, n) for m in (1, 17, 64, 100, 4096) for n in (512, 28672)]
    found = every_tile(choose, [Problem("w4a8", m, n, 8192, torch.int8) for m, n in sizes])
    assert len(found) > 6 and {c.swap_ab for c in found} == {True, False} and {c.split_k for c in found} == {1, 2}
    for config in [*found, Config(16, 64, 256, 1), Config(32, 32, 256, 2, swap_ab=True)]:
        m, n = config.block_m + 3, config.block_n + 8
        q, packed = weights(n, 288)
        x, scale, w_scale, bias, residual = fenced(integers(m, 288)), floats(m, 1), floats(n), floats(n), floats(m, n)
        if config.split_k > 1:
            got = launch(x, packed, scale, w_scale, None, torch.int32, config=config)
            assert torch.equal(got, exact(x, q)), config
        else:
            full = (x, packed, scale, w_scale, bias, torch.float32, "relu", residual)
            expected = torch.relu(exact(x, q).float() * scale * w_scale + bias + residual)
            torch.testing.assert_close(launch(*full, config=config), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.triton
def test_one_hot_rows_return_the_weights() -> None:
    q, packed = weights(72, 160)
    x = torch.eye(160, dtype=torch.int8, device=device())
    assert torch.equal(launch(x, packed, floats(1), floats(72), None, torch.int32), q.T.int())


@pytest.mark.triton
def test_a_row_does_not_depend_on_its_neighbours() -> None:
    x, packed, scale, w_scale = integers(129, 160), weights(72, 160)[1], floats(129, 1), floats(72)
    every = launch(x, packed, scale, w_scale, None, torch.float16, "silu")
    for m in (1, 17, 65):
        assert torch.equal(launch(x[:m], packed, scale[:m], w_scale, None, torch.float16, "silu"), every[:m])
    doubled = launch(x, packed, scale, 2 * w_scale, None, torch.float32)
    assert torch.equal(doubled, 2 * launch(x, packed, scale, w_scale, None, torch.float32))


@pytest.mark.triton
def test_strided_inputs_of_any_rank() -> None:
    packed, w_scale = weights(24, 96)[1], floats(24)
    x = integers(3, 96, 5).transpose(1, 2)
    scale, residual = floats(5, 3, 1).transpose(0, 1), floats(5, 3, 24).transpose(0, 1)
    args = (x, packed, scale, w_scale, floats(48)[::2], torch.float16, "", residual)
    close(kernel_op(NAME), launch(*args), kernel_op(NAME).reference(*args))
    row = integers(96)
    assert launch(row, packed, floats(1), w_scale, None, torch.float16).shape == (24,)


@pytest.mark.triton
def test_choose() -> None:
    from fxcompress.kernels.w4a8_triton import choose

    for gpu in ASSUMED.values():
        few, many = (choose(Problem("w4a8", m, 8192, 8192, torch.int8), gpu) for m in (1, 8192))
        assert few.block_m == 16 and many.block_m * many.block_n == 128 * 256 and many.split_k == 1


@pytest.mark.cuda
def test_on_a_gpu_repeats_captures_and_streams() -> None:
    packed, w_scale = weights(512, 4096)[1], floats(512)
    for m in (1, 16, 300):
        x, scale = integers(m, 4096), floats(m, 1)

        def run(given: Tensor, scale: Tensor = scale) -> Tensor:
            result: Tensor = torch.ops.fxcompress.w4a8_linear(given, packed, scale, w_scale, None, torch.float16)
            return result

        check_graph_and_streams(run, x)


@pytest.mark.cuda
def test_on_a_gpu_bfloat16() -> None:
    args = (integers(33, 512), weights(264, 512)[1], floats(33, 1), floats(264), floats(264), torch.bfloat16)
    close(kernel_op(NAME), launch(*args, "gelu"), kernel_op(NAME).reference(*args, "gelu"))


@pytest.mark.cuda
def test_on_a_gpu_offsets_beyond_32_bits() -> None:
    rows, k = 2**31 // 2048 + 64, 4096
    packed = torch.zeros(k // 128, rows, 64, dtype=torch.uint8, device="cuda")
    q = integers(64, k, low=-8, high=8)
    packed[:, -64:] = pack_int4x8(q)
    x = integers(16, k)
    got = launch(x, packed, floats(1), floats(rows), None, torch.int32)
    assert torch.equal(got[:, -64:], exact(x, q)) and not got[:, :-64].any()
