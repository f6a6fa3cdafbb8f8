"""8-bit weights, 16-bit activations: the formula, every tile and group, the epilogue, and what must be refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fxcompress.kernels.configs import ASSUMED, Config, Problem
from fxcompress.kernels.w8a16 import w8a16_linear
from fxcompress.ops import kernel_op
from tests.kernels.cases import device, error
from tests.kernels.int8_cases import (
    check_contract,
    check_export,
    check_graph_and_streams,
    every_tile,
    fenced,
    integers,
    poisoned,
    refused,
)

NAME = "w8a16_linear"
HALF = torch.float16


def launch(*arguments: Any, **named: Any) -> Tensor:
    from fxcompress.kernels.w8a16_triton import launch as run

    with poisoned():
        return run(*arguments, **named)


class Layer:
    """Random weights of a layer, and what they are in float64 by the definition."""

    def __init__(self, n: int, k: int, group: int = -1, dtype: torch.dtype = HALF) -> None:
        random = torch.Generator().manual_seed(n + k)
        groups = 1 if group == -1 else k // group
        scales = (torch.rand((groups, n), generator=random) * 0.001 + 0.0005).to(dtype)
        self.k, self.group = k, group
        self.q, self.scales = fenced(integers(n, k)), fenced(scales.to(device()))
        self.q[0, :4] = torch.tensor([-128, 127, 0, -1])
        each = [self.scales[column * groups // k].double() for column in range(k)]
        self.weight = self.q.double() * torch.stack(each, 1)

    def arguments(self, x: Tensor, bias: Tensor | None = None) -> tuple[Any, ...]:
        return x, self.q, self.scales, bias, self.group


def rows(*shape: int, dtype: torch.dtype = HALF, seed: int = 1) -> Tensor:
    return fenced(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device(), dtype), 1000)


def tiles() -> list[Config]:
    from fxcompress.kernels.w8a16_triton import choose

    sizes = [(1, 512), (9, 28672), (17, 512), (33, 512), (200, 28672), (4096, 512)]
    found = every_tile(choose, [Problem("w8a16", m, n, 8192, HALF, -1) for m, n in sizes])
    return [*found, replace(found[0], swap_ab=False, block_m=16, split_k=1)]


@pytest.mark.parametrize("group", [32, 96, -1])
def test_reference_is_the_formula(group: int) -> None:
    layer, bias = Layer(40, 288, group), rows(40)
    x, residual = rows(2, 5, 288), rows(2, 5, 40)
    wide = x.double() @ layer.weight.T + bias.double() + residual.double()
    for dtype, bound in ((torch.float64, 1e-14), (torch.float32, 1e-6), (HALF, 5e-4), (torch.bfloat16, 8e-3)):
        got = w8a16_linear(*layer.arguments(x.to(dtype), bias), "relu", residual.to(dtype))
        assert got.dtype == dtype and error(got, torch.relu(wide)) < bound


def test_contract() -> None:
    check_contract(NAME)


def test_export_and_autocast() -> None:
    layer = Layer(24, 64, 32)
    rest = tuple(a.cpu() if isinstance(a, Tensor) else a for a in layer.arguments(rows(1, 64), rows(24))[1:])
    check_export(NAME, (rows(4, 64).cpu(), *rest), rows(9, 64).cpu())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = torch.ops.fxcompress.w8a16_linear(rows(4, 64).cpu().float(), *rest)
    assert got.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("number", "name", "value", "match"),
    [
        (401, "group_size", 96, "128 % 96 = 32"),
        (402, "activation", "swish", "swish"),
        (410, "weight", torch.zeros(24, 96, dtype=torch.int8), r"\(24, 96\), but \(24, 128\)"),
        (410, "weight", torch.zeros(24, dtype=torch.int8), r"\(24,\), but \(0, 128\)"),
        (410, "scales", torch.ones(24), r"\(24,\), but \(1, 24\)"),
        (410, "bias", torch.zeros(1), r"\(1,\), but \(24,\)"),
        (410, "residual", torch.zeros(4, 25), r"\(4, 25\), but \(4, 24\)"),
        (411, "weight", torch.zeros(24, 128, dtype=torch.uint8), "weight has dtype torch.uint8"),
        (411, "scales", torch.ones(1, 24, dtype=torch.int32), "scales has dtype torch.int32"),
    ],
)
def test_refuses(number: int, name: str, value: Any, match: str) -> None:
    good: dict[str, Any] = {
        "x": torch.zeros(4, 128), "weight": torch.zeros(24, 128, dtype=torch.int8), "scales": torch.ones(1, 24),
        "bias": None, "group_size": -1, "activation": "", "residual": None,
    }  # fmt: skip
    refused(number, kernel_op(NAME).reference, **(good | {name: value}), match=match)


@pytest.mark.triton
def test_launcher_refuses_what_it_cannot_run() -> None:
    layer = Layer(24, 128)
    refused(411, launch, *layer.arguments(rows(4, 128).float()), match="use float16 or bfloat16")
    refused(412, launch, *layer.arguments(rows(4, 128), torch.zeros(24, device="meta")), match="bias is on meta")


@pytest.mark.triton
@pytest.mark.parametrize(
    ("n", "k", "group"),
    [
        (8, 32, 32),
        (64, 96, 32),
        (136, 160, -1),
        (33, 192, 64),
        (130, 384, 128),
        (96, 288, 96),
        (7, 100, -1),
        (40, 103, -1),
    ],
)
def test_kernel(n: int, k: int, group: int) -> None:
    layer, bias = Layer(n, k, group), rows(n)
    for m in (1, 17, 65) if n < 100 else (3, 16, 33):
        x = rows(m, k)
        wanted = x.double() @ layer.weight.T + bias.double()
        assert error(launch(*layer.arguments(x, bias)), wanted) < 5e-4, m


@pytest.mark.triton
@pytest.mark.parametrize("group", [-1, 96])
def test_every_tile(group: int) -> None:
    found = tiles()
    assert {c.route for c in found} == {"kernel", "dequantize"} and {c.split_k for c in found} == {1, 2}
    assert {c.swap_ab for c in found if c.route == "kernel"} == {True, False}
    layer, bias = Layer(100, 384, group), rows(100)
    for config in found:
        m = config.block_m + 3
        x, residual = rows(m, 384), rows(m, 100)
        wanted = torch.relu(x.double() @ layer.weight.T + bias.double() + residual.double())
        got = launch(*layer.arguments(x, bias), "relu", residual, config=config)
        assert error(got, wanted) < 5e-4, config


@pytest.mark.triton
@pytest.mark.parametrize("activation", ["", "relu6", "gelu"])
def test_epilogue(activation: str) -> None:
    layer, bias = Layer(40, 256), rows(40)
    x, residual = rows(2, 9, 256), rows(2, 9, 40)
    for end in ((bias, residual), (None, None)):
        args = (*layer.arguments(x, end[0]), activation, end[1])
        wanted = kernel_op(NAME).reference(x.double(), *args[1:])
        for config in (Config(16, 128, 128), Config(32, 128, 128, 2, swap_ab=True), Config(route="dequantize")):
            for fixed in (True, False):
                assert error(launch(*args, fixed, config=config), wanted) < 5e-4


@pytest.mark.triton
@pytest.mark.parametrize(("group", "block_m"), [(128, 32), (32, 64), (-1, 64)])
def test_one_hot_rows_return_the_weights(group: int, block_m: int) -> None:
    layer = Layer(72, 256, group)
    for swap in (True, False):
        config = Config(block_m, 128, 128, swap_ab=swap)
        got = launch(*layer.arguments(torch.eye(256, dtype=HALF, device=device())), config=config)
        assert torch.equal(got, layer.weight.T.to(HALF))


@pytest.mark.triton
def test_dequantized_weights_are_exact() -> None:
    from fxcompress.kernels.w8a16_triton import dequantize

    for k, group in ((416, 32), (192, 96), (103, -1)):
        layer = Layer(72, k, group)
        with poisoned():
            got = dequantize(layer.q, layer.scales, max(group, 0), HALF)
        assert torch.equal(got, layer.weight.to(HALF))


@pytest.mark.triton
def test_a_row_does_not_depend_on_its_neighbours() -> None:
    layer, x, config = Layer(72, 256, 64), rows(33, 256), Config(16, 128, 128, 2, swap_ab=True)
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
    layer = Layer(40, 256, 128)
    x = rows(256, 9).T
    wanted = x.double() @ layer.weight.T
    assert not x.is_contiguous() and error(launch(*layer.arguments(x)), wanted) < 5e-4
    assert launch(*layer.arguments(x[:0])).shape == (0, 40)
    assert error(launch(*layer.arguments(x.contiguous()[0])), wanted[0]) < 5e-4
    for dtype in (torch.float32, torch.float64):
        layer.scales = layer.scales.to(dtype)
        for block_m in (16, 64):
            assert error(launch(*layer.arguments(x), config=Config(block_m, 128, 128)), wanted) < 5e-4
    layer = Layer(40, 256, 128, torch.bfloat16)
    assert error(launch(*layer.arguments(x)), x.double() @ layer.weight.T) < 5e-4
    assert error(launch(*layer.arguments(x.bfloat16())), x.bfloat16().double() @ layer.weight.T) < 4e-3
    moved = Layer(40, 256)
    moved.q = fenced(torch.cat([moved.q.flatten(), moved.q.flatten()[:1]]))[1:].view(40, 256)  # not at a word
    assert moved.q.data_ptr() % 4
    moved.weight = moved.q.double() * moved.scales.T.double()
    assert error(launch(*moved.arguments(x)), x.double() @ moved.weight.T) < 5e-4


@pytest.mark.triton
def test_compile_cases_have_names_and_cover_the_tiles() -> None:
    from fxcompress.kernels.w8a16_triton import choose, compile_cases

    for sm in (80, 90, 100):
        cases = compile_cases(sm)
        assert len({c.name for c in cases}) == len(cases)
        chosen = [choose(Problem("w8a16", m, 28672, 8192, HALF, -1), ASSUMED[sm]) for m in (1, 9, 17, 33, 512)]
        shapes = {(c.constants.get("BLOCK_M"), c.constants.get("BLOCK_N"), c.constants.get("BLOCK_K")) for c in cases}
        assert {(c.block_m, c.block_n, c.block_k) for c in chosen} <= shapes
        assert choose(Problem("w8a16", 513, 8192, 8192, HALF, -1), ASSUMED[sm]).route == "dequantize"


@pytest.mark.triton
def test_the_tuner_cannot_choose_what_older_compilers_turn_into_a_trap() -> None:
    """sm_100, 256 features, 32 columns at a time: Triton 3.6 to 3.8 emit a kernel whose first instruction is a trap."""
    from fxcompress.kernels.candidates import candidates
    from fxcompress.kernels.w8a16_triton import _constants, _fitting

    found = candidates(Problem("w8a16", 64, 28672, 8192, HALF, -1), ASSUMED[100])
    assert any(c.block_n > 128 for c in found)
    for group in (0, 32, 64, 96, 128):
        for config in (_fitting(c, 100, group) for c in found):
            assert config.block_n <= 128 or _constants(config, 100, 4096, group, 2, True)["DEPTH"] >= 64


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16])
@pytest.mark.parametrize("group", [-1, 128, 32])
def test_on_a_gpu_every_tile_at_size(dtype: torch.dtype, group: int) -> None:
    layer = Layer(1000, 4128 if group == 32 else 4096, group, dtype)
    for config in [*tiles(), Config(16, 128, 128, 16, swap_ab=True)]:
        x = rows(config.block_m + 1, layer.k, dtype=dtype)
        wanted = x.double() @ layer.weight.T
        assert error(launch(*layer.arguments(x), config=config), wanted) < kernel_op(NAME).tolerance[dtype], config


@pytest.mark.cuda
def test_on_a_gpu_repeats_captures_and_streams() -> None:
    layer = Layer(512, 4096)
    for m in (1, 16, 300, 600):
        rest = layer.arguments(rows(1, 4096))[1:]
        check_graph_and_streams(lambda x, rest=rest: torch.ops.fxcompress.w8a16_linear(x, *rest), rows(m, 4096))


@pytest.mark.cuda
def test_on_a_gpu_offsets_beyond_32_bits() -> None:
    k, n = 32768, 2**31 // 32768 + 64
    weight = torch.zeros(n, k, dtype=torch.int8, device="cuda")
    weight[-8:] = integers(8, k)
    scales, x = torch.full((1, n), 0.001, dtype=HALF, device="cuda"), rows(3, k)
    part = kernel_op(NAME).reference(x.double(), weight[-8:], scales[:, -8:], None)
    assert error(launch(x, weight, scales, None)[:, -8:], part) < 5e-4
    assert error(launch(x, weight, scales, None, config=Config(route="dequantize"))[:, -8:], part) < 5e-4
