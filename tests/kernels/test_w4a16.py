"""4-bit weights, 16-bit activations: the formula, every tile and group, the epilogue, and what must be refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fxcompress.kernels.configs import ASSUMED, Config, Problem
from fxcompress.kernels.layouts import pack_int4
from fxcompress.kernels.w4a16 import w4a16_linear
from fxcompress.ops import kernel_op
from tests.kernels.cases import device, error
from tests.kernels.int8_cases import (
    check_contract,
    check_export,
    check_graph_and_streams,
    close,
    every_tile,
    fenced,
    poisoned,
    refused,
)

NAME = "w4a16_linear"
HALF = torch.float16


def launch(*arguments: Any, **named: Any) -> Tensor:
    from fxcompress.kernels.w4a16_triton import launch as run

    with poisoned():
        return run(*arguments, **named)


class Layer:
    """Random weights of a layer, and what they are in float64 by the definition."""

    def __init__(
        self, n: int, k: int, group: int, zeros: bool = False, dtype: torch.dtype = HALF, seed: int = 0
    ) -> None:
        random = torch.Generator().manual_seed(seed + n + k)
        groups = 1 if group == -1 else k // group
        q = torch.randint(0, 16, (n, k), generator=random)
        scales = (torch.rand((groups, n), generator=random) * 0.02 + 0.01).to(dtype)
        points = torch.randint(0, 16, (groups, n), generator=random, dtype=torch.uint8)
        self.k, self.group = k, group
        self.packed, self.scales = fenced(pack_int4(q).to(device()), 0x7777), fenced(scales.to(device()))
        self.zeros = fenced(points.to(device()), 99) if zeros else None
        self.weight = torch.empty((n, k), dtype=torch.float64)
        for column in range(k):
            g = column * groups // k
            zero = points[g].double() if zeros else 8.0
            self.weight[:, column] = (q[:, column].double() - zero) * scales[g].double()
        self.weight = self.weight.to(device())

    def arguments(self, x: Tensor, bias: Tensor | None = None) -> tuple[Any, ...]:
        return x, self.packed, self.scales, self.zeros, bias, self.group


def rows(*shape: int, dtype: torch.dtype = HALF, seed: int = 1) -> Tensor:
    return fenced(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device(), dtype), 1000)


def tiles() -> list[Config]:
    from fxcompress.kernels.w4a16_triton import choose

    sizes = [(1, 512), (9, 28672), (17, 512), (33, 512), (200, 28672), (4096, 512)]
    found = every_tile(choose, [Problem("w4a16", m, n, 8192, HALF, 128) for m, n in sizes])
    return [*found, replace(found[0], swap_ab=False, block_m=16, split_k=1)]


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group", [32, 96, -1])
def test_reference_is_the_formula(group: int, zeros: bool) -> None:
    layer, bias = Layer(40, 288, group, zeros), rows(40)
    x, residual = rows(2, 5, 288), rows(2, 5, 40)
    wide = x.double() @ layer.weight.T + bias.double() + residual.double()
    for dtype, bound in ((torch.float64, 1e-14), (torch.float32, 1e-6), (HALF, 5e-4), (torch.bfloat16, 8e-3)):
        got = w4a16_linear(*layer.arguments(x.to(dtype), bias), "relu", residual.to(dtype))
        assert got.dtype == dtype and error(got, torch.relu(wide)) < bound


def test_contract() -> None:
    check_contract(NAME)


def test_export_and_autocast() -> None:
    layer = Layer(24, 64, 32, True)
    rest = tuple(a if a is None or isinstance(a, int) else a.cpu() for a in layer.arguments(rows(1, 64), rows(24))[1:])
    check_export(NAME, (rows(4, 64).cpu(), *rest), rows(9, 64).cpu())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = torch.ops.fxcompress.w4a16_linear(rows(4, 64).cpu().float(), *rest)
    assert got.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("number", "name", "value", "match"),
    [
        (401, "group_size", 96, "128 % 96 = 32"),
        (401, "group_size", 16, "groups of 16"),
        (402, "activation", "swish", "swish"),
        (410, "packed", torch.zeros(2, 24, 32, dtype=torch.int16), r"\(2, 24, 32\), but \(1, 24, 32\)"),
        (410, "packed", torch.zeros(24, 32, dtype=torch.int16), r"\(24, 32\), but \(1, 0, 32\)"),
        (410, "scales", torch.ones(3, 24), r"\(3, 24\), but \(4, 24\)"),
        (410, "zeros", torch.zeros(1, 24, dtype=torch.uint8), r"\(1, 24\), but \(4, 24\)"),
        (410, "bias", torch.zeros(1), r"\(1,\), but \(24,\)"),
        (410, "residual", torch.zeros(4, 25), r"\(4, 25\), but \(4, 24\)"),
        (411, "x", torch.zeros(4, 128, dtype=torch.int8), "x has dtype torch.int8"),
        (411, "packed", torch.zeros(1, 24, 32, dtype=torch.int32), "packed has dtype torch.int32"),
        (411, "zeros", torch.zeros(4, 24), "zeros has dtype torch.float32"),
    ],
)
def test_refuses(number: int, name: str, value: Any, match: str) -> None:
    good: dict[str, Any] = {
        "x": torch.zeros(4, 128), "packed": torch.zeros(1, 24, 32, dtype=torch.int16), "scales": torch.ones(4, 24),
        "zeros": None, "bias": None, "group_size": 32, "activation": "", "residual": None,
    }  # fmt: skip
    refused(number, kernel_op(NAME).reference, **(good | {name: value}), match=match)


@pytest.mark.triton
def test_launcher_refuses_what_it_cannot_run() -> None:
    layer = Layer(24, 128, 32)
    refused(411, launch, *layer.arguments(rows(4, 128).float()), match="use float16 or bfloat16")
    refused(412, launch, *layer.arguments(rows(4, 128), torch.zeros(24, device="meta")), match="bias is on meta")
    n = 1 << 29
    packed, scales = (
        torch.zeros(1, 1, 32, dtype=torch.int16).expand(1, n, 32),
        torch.zeros(1, 1, dtype=HALF).expand(4, n),
    )
    many = (rows(1, 128).cpu(), packed, scales, None, None, 32)
    refused(413, launch, *many, match="2147483648 scales")


@pytest.mark.triton
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(
    ("n", "k", "group"),
    [
        (8, 32, 32),
        (64, 96, 32),
        (136, 160, -1),
        (33, 192, 64),
        (130, 384, 128),
        (96, 288, 96),
        (72, 416, -1),
        (7, 100, -1),
    ],
)
def test_kernel(n: int, k: int, group: int, zeros: bool) -> None:
    layer, bias = Layer(n, k, group, zeros), rows(n)
    for m in (1, 17, 65) if n < 100 else (3, 16, 33):
        x = rows(m, k)
        wanted = x.double() @ layer.weight.T + bias.double()
        assert error(launch(*layer.arguments(x, bias)), wanted) < 5e-4, m


@pytest.mark.triton
@pytest.mark.parametrize(("group", "zeros"), [(128, False), (96, True)])
def test_every_tile(group: int, zeros: bool) -> None:
    found = tiles()
    assert {c.route for c in found} == {"kernel", "dequantize"} and {c.split_k for c in found} == {1, 2}
    assert {c.swap_ab for c in found if c.route == "kernel"} == {True, False}
    layer, bias = Layer(100, 384, group, zeros), rows(100)
    for config in found:
        m = config.block_m + 3
        x, residual = rows(m, 384), rows(m, 100)
        wanted = torch.relu(x.double() @ layer.weight.T + bias.double() + residual.double())
        got = launch(*layer.arguments(x, bias), "relu", residual, config=config)
        assert error(got, wanted) < 5e-4, config


@pytest.mark.triton
@pytest.mark.parametrize("activation", ["", "relu", "relu6", "silu", "gelu", "gelu_tanh", "sigmoid", "hardswish"])
def test_epilogue(activation: str) -> None:
    layer, bias = Layer(40, 256, 128), rows(40)
    x, residual = rows(2, 9, 256), rows(2, 9, 40)
    plain = x.double() @ layer.weight.T
    for end in ((bias, residual), (None, None)):
        args = (*layer.arguments(x, end[0]), activation, end[1])
        y = plain if end[0] is None else plain + end[0].double()
        wanted = kernel_op(NAME).reference(x.double(), *args[1:])
        assert activation or error(wanted, y if end[1] is None else y + end[1].double()) < 1e-12
        for config in (Config(16, 128, 128), Config(32, 128, 128, 2, swap_ab=True), Config(route="dequantize")):
            assert error(launch(*args, config=config), wanted) < 5e-4


@pytest.mark.triton
@pytest.mark.parametrize(("group", "block_m"), [(128, 32), (128, 64), (32, 64), (-1, 64)])
def test_one_hot_rows_return_the_weights(group: int, block_m: int) -> None:
    layer = Layer(72, 256, group, True)
    got = launch(
        *layer.arguments(torch.eye(256, dtype=HALF, device=device())), config=Config(block_m, 128, 256, swap_ab=True)
    )
    assert torch.equal(got, layer.weight.T.to(HALF))


@pytest.mark.triton
def test_dequantized_weights_are_exact() -> None:
    from fxcompress.kernels.w4a16_triton import dequantize

    for k, group, zeros in ((416, 32, True), (192, 96, False), (100, -1, True)):
        layer = Layer(72, k, group, zeros)
        with poisoned():
            got = dequantize(layer.packed, layer.scales, layer.zeros, k, max(group, 0), HALF)
        assert torch.equal(got, layer.weight.to(HALF))


@pytest.mark.triton
def test_a_row_does_not_depend_on_its_neighbours() -> None:
    layer, x, config = Layer(72, 256, 64, True), rows(33, 256), Config(16, 128, 128, 2, swap_ab=True)
    every = launch(*layer.arguments(x), config=config)
    for m in (1, 17):
        assert torch.equal(launch(*layer.arguments(x[:m]), config=config), every[:m])
    order = torch.randperm(33, generator=torch.Generator().manual_seed(0)).to(device())
    assert torch.equal(launch(*layer.arguments(x[order]), config=config), every[order])
    layer.scales *= 2
    assert torch.equal(launch(*layer.arguments(x), config=config), 2 * every)
    assert not launch(*layer.arguments(torch.zeros_like(x))).count_nonzero()


@pytest.mark.triton
def test_layouts_and_dtypes_of_arguments() -> None:
    layer = Layer(40, 256, 128, True)
    x = rows(256, 9).T
    wanted = x.double() @ layer.weight.T
    assert not x.is_contiguous() and error(launch(*layer.arguments(x)), wanted) < 5e-4
    assert launch(*layer.arguments(x[:0])).shape == (0, 40)
    assert launch(*layer.arguments(x[None, :3])).shape == (1, 3, 40)
    assert error(launch(*layer.arguments(x.contiguous()[0])), wanted[0]) < 5e-4
    for dtype in (torch.float32, torch.float64):
        layer.scales = layer.scales.to(dtype)
        for block_m in (16, 64):
            assert error(launch(*layer.arguments(x), config=Config(block_m, 128, 128)), wanted) < 5e-4
    layer = Layer(40, 256, 128, True, torch.bfloat16)
    assert error(launch(*layer.arguments(x)), x.double() @ layer.weight.T) < 5e-4
    assert error(launch(*layer.arguments(x.bfloat16())), x.bfloat16().double() @ layer.weight.T) < 4e-3


@pytest.mark.triton
def test_parts_added_in_any_order() -> None:
    layer, x, bias = Layer(100, 512, 128), rows(9, 512), rows(100)
    wanted = torch.relu(x.double() @ layer.weight.T + bias.double())
    for split in (2, 8):  # more parts than steps, too
        config = Config(16, 128, 128, split, swap_ab=True)
        for fixed in (True, False):
            got = launch(*layer.arguments(x, bias), "relu", None, fixed, config=config)
            assert error(got, wanted) < 5e-4


@pytest.mark.triton
def test_choose() -> None:
    from fxcompress.kernels.w4a16_triton import choose

    h200, a100 = ASSUMED[90], ASSUMED[80]

    def problem(m: int, n: int, k: int) -> Problem:
        return Problem("w4a16", m, n, k, HALF, 128)

    assert choose(problem(1, 4096, 4096), h200).split_k == 8
    assert choose(problem(1, 28672, 8192), h200).split_k == 1
    assert choose(problem(1, 128, 512), h200).split_k == 1
    assert [choose(problem(m, 8192, 8192), h200).block_m for m in (1, 8, 9, 32, 64, 512)] == [8, 8, 16, 32, 64, 128]
    assert choose(problem(513, 8192, 8192), a100).route == "dequantize"


@pytest.mark.triton
def test_compile_cases_have_names_and_cover_the_tiles() -> None:
    from fxcompress.kernels.w4a16_triton import choose, compile_cases

    for sm in (80, 90, 100):
        cases = compile_cases(sm)
        assert len({c.name for c in cases}) == len(cases)
        chosen = [choose(Problem("w4a16", m, 28672, 8192, HALF, 128), ASSUMED[sm]) for m in (1, 9, 17, 33, 65, 512)]
        shapes = {(c.constants.get("BLOCK_M"), c.constants.get("BLOCK_N"), c.constants.get("BLOCK_K")) for c in cases}
        assert {(c.block_m, c.block_n, c.block_k) for c in chosen} <= shapes


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16])
@pytest.mark.parametrize(("group", "zeros"), [(128, False), (128, True), (32, True), (-1, False)])
def test_on_a_gpu_every_tile_at_size(dtype: torch.dtype, group: int, zeros: bool) -> None:
    layer = Layer(1000, 4128 if group == 32 else 4096, group, zeros, dtype)
    for config in [*tiles(), Config(16, 128, 128, 16, swap_ab=True)]:
        x = rows(config.block_m + 1, layer.k, dtype=dtype)
        wanted = x.double() @ layer.weight.T
        assert error(launch(*layer.arguments(x), config=config), wanted) < kernel_op(NAME).tolerance[dtype], config


@pytest.mark.cuda
def test_on_a_gpu_repeats_captures_and_streams() -> None:
    layer = Layer(512, 4096, 128, True)
    for m in (1, 16, 300, 600):
        rest = layer.arguments(rows(1, 4096))[1:]
        check_graph_and_streams(lambda x, rest=rest: torch.ops.fxcompress.w4a16_linear(x, *rest), rows(m, 4096))


@pytest.mark.cuda
def test_on_a_gpu_many_rows_compile_few_kernels() -> None:
    from fxcompress.kernels.w4a16_triton import w4a16_kernel

    layer, before = Layer(512, 512, 128), len(next(iter(w4a16_kernel.device_caches.values()), [{}])[0])
    for m in range(1, 65):
        launch(*layer.arguments(rows(m, 512)))
    assert len(next(iter(w4a16_kernel.device_caches.values()))[0]) - before <= 4


@pytest.mark.cuda
def test_on_a_gpu_offsets_beyond_32_bits() -> None:
    k, n = 65536, 2**33 // 65536 + 128  # more than 2^31 words
    packed = torch.zeros(k // 128, n, 32, dtype=torch.int16, device="cuda")
    packed[-1, -64:] = torch.randint(-(2**15), 2**15, (64, 32), dtype=torch.int16, device="cuda")
    scales = torch.full((1, n), 0.01, dtype=HALF, device="cuda")
    x = torch.zeros(3, k, dtype=HALF, device="cuda")
    x[:, -128:] = rows(3, 128)
    got = launch(x, packed, scales, None, None, -1)
    part = kernel_op(NAME).reference(x[:, -128:].double(), packed[-1:, -64:], scales[:, -64:], None, None, -1)
    assert error(got[:, -64:], part) < 5e-4
    tall = torch.zeros(2**31 // 512 + 8, 512, dtype=HALF, device="cuda")
    tall[-5:] = rows(5, 512)
    layer = Layer(1024, 512, 128)
    for config in (Config(128, 128, 128, num_warps=8, num_stages=2, swap_ab=True), Config(route="dequantize")):
        got = launch(*layer.arguments(tall), config=config)
        assert error(got[-5:], tall[-5:].double() @ layer.weight.T) < 5e-4


@pytest.mark.cuda
def test_on_a_gpu_close_to_the_contract() -> None:
    for arguments in kernel_op(NAME).samples("cuda"):
        close(kernel_op(NAME), kernel_op(NAME).overload(*arguments), kernel_op(NAME).reference(*arguments))
