"""8-bit convolutions: exact sums whatever the geometry, padding that stands for zero, every tile, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.kernels.configs import ASSUMED, Problem
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

NAME = "conv2d_w8a8"
ONE = [1, 1]


def launch(*arguments: Any, **named: Any) -> Tensor:
    from fxcompress.kernels.conv2d_w8a8_triton import launch as run

    with poisoned():
        return run(*arguments, **named)


def image(n: int, c: int, h: int, w: int) -> Tensor:
    """Random, stored channels last, with other memory around it."""
    return fenced(integers(n, h, w, c)).permute(0, 3, 1, 2)


def zero_point(value: int = -9) -> Tensor:
    return torch.tensor([value], dtype=torch.int32, device=device())


def direct(x: Tensor, weight: Tensor, zero: int, stride: list[int], padding: list[int], dilation: list[int]) -> Tensor:
    """Tap by tap, in int64: [N, O, OH, OW]."""
    wide = F.pad(x.long() - zero, (padding[1], padding[1], padding[0], padding[0]))
    (kh, kw), total = weight.shape[1:3], torch.zeros((), dtype=torch.int64, device=x.device)
    height, width = (wide.shape[2 + i] - dilation[i] * ((kh, kw)[i] - 1) - 1 for i in (0, 1))
    for i in range(kh):
        for j in range(kw):
            top, left = i * dilation[0], j * dilation[1]
            seen = wide[:, :, top : top + height + 1 : stride[0], left : left + width + 1 : stride[1]]
            total = total + (seen[:, None] * weight[:, i, j].long()[None, :, :, None, None]).sum(2)
    return total.int()


GEOMETRIES = [
    (32, 3, 3, ONE, ONE, ONE),
    (48, 3, 3, [2, 2], ONE, ONE),
    (40, 3, 2, [2, 1], [2, 3], [1, 2]),
    (16, 5, 5, ONE, [2, 2], ONE),
    (3, 7, 7, [2, 2], [3, 3], ONE),
    (5, 3, 3, ONE, [0, 1], [2, 2]),
    (64, 1, 1, ONE, [0, 0], ONE),
    (64, 1, 1, [2, 2], [0, 0], ONE),
    (33, 1, 1, ONE, ONE, ONE),
]


@pytest.mark.triton
@pytest.mark.parametrize(("c", "kh", "kw", "stride", "padding", "dilation"), GEOMETRIES)
def test_geometry(c: int, kh: int, kw: int, stride: list[int], padding: list[int], dilation: list[int]) -> None:
    x, weight, scale, w_scale = image(2, c, 9, 8), fenced(integers(24, kh, kw, c)), floats(1), floats(24)
    for zero in (None, -9):
        given = None if zero is None else zero_point(zero)
        args = (x, weight, scale, w_scale, given, None, stride, padding, dilation, 1, torch.int32)
        expected = direct(x, weight, zero or 0, stride, padding, dilation)
        assert torch.equal(kernel_op(NAME).reference(*args), expected)
        assert torch.equal(launch(*args), expected)


@pytest.mark.triton
@pytest.mark.parametrize(("c", "o", "groups"), [(24, 24, 24), (24, 48, 24), (20, 30, 5), (65, 65, 65)])
def test_groups(c: int, o: int, groups: int) -> None:
    x, weight = image(2, c, 9, 8), fenced(integers(o, 3, 3, c // groups))
    per_group = zip(x.chunk(groups, 1), weight.chunk(groups), strict=True)
    expected = torch.cat([direct(a, b, -9, [2, 1], ONE, ONE) for a, b in per_group], 1)
    args = (x, weight, floats(1), floats(o), zero_point(), None, [2, 1], ONE, ONE, groups)
    assert torch.equal(kernel_op(NAME).reference(*args, torch.int32), expected)
    assert torch.equal(launch(*args, torch.int32), expected)
    out = (*args[:5], floats(o), *args[6:], torch.float16, "relu6", floats(*expected.shape))
    close(kernel_op(NAME), launch(*out), kernel_op(NAME).reference(*out))


def test_reference_is_the_convolution_of_the_real_numbers() -> None:
    x, weight, scale, w_scale, bias = image(2, 32, 9, 7), integers(24, 3, 3, 32), floats(1), floats(24), floats(24)
    real = F.conv2d(
        (x.double() + 9) * scale, weight.permute(0, 3, 1, 2).double() * w_scale[:, None, None, None], bias.double(),
        padding=1,
    )  # fmt: skip
    args = (x, weight, scale, w_scale, zero_point(), bias, ONE, ONE, ONE, 1)
    for dtype, bound in ((torch.float32, 1e-6), (torch.float16, 5e-4)):
        got = kernel_op(NAME).reference(*args, dtype)
        assert got.is_contiguous(memory_format=torch.channels_last) and error(got, real) < bound


def test_contract() -> None:
    check_contract(NAME)


def test_export() -> None:
    filters = (integers(24, 3, 3, 32).cpu(), floats(1).cpu(), floats(24).cpu())
    rest = (*filters, None, None, ONE, ONE, ONE, 1, torch.float32)
    check_export(NAME, (image(2, 32, 9, 7).cpu(), *rest), image(5, 32, 9, 7).cpu())


@pytest.mark.parametrize(
    ("number", "name", "value", "match"),
    [
        (428, "x", torch.zeros(32, 9, 9, dtype=torch.int8), "x with 3"),
        (429, "stride", [0, 1], r"stride is \[0, 1\]"),
        (429, "padding", [1], r"padding is \[1\]"),
        (430, "groups", 5, "32 input and 24 output"),
        (421, "groups", 2, r"\[24, 3, 3, 32\], not \[24, 3, 3, 16\]"),
        (431, "dilation", [9, 9], "3 x 3 do not fit into images of 9 x 9"),
        (421, "x_scale", torch.ones(2), "x_scale"),
        (421, "residual", torch.zeros(1, 24, 9, 8), r"not \[1, 24, 9, 9\]"),
        (425, "out_dtype", torch.int32, "int32"),
    ],
)
def test_refuses(number: int, name: str, value: Any, match: str) -> None:
    good: dict[str, Any] = {
        "x": image(1, 32, 9, 9).cpu(), "weight": integers(24, 3, 3, 32).cpu(), "x_scale": torch.ones(1),
        "w_scale": torch.ones(24), "x_zero": None, "bias": torch.zeros(24), "stride": ONE, "padding": ONE, "dilation": ONE,
        "groups": 1, "out_dtype": torch.float32,
    }  # fmt: skip
    refused(number, kernel_op(NAME).reference, **(good | {name: value}), match=match)


@pytest.mark.triton
def test_every_tile_is_exact() -> None:
    from fxcompress.kernels.conv2d_w8a8_triton import choose

    sizes = [(m, n, c) for m in (49, 3136, 100352) for n in (64, 512) for c in (32, 512)]
    found = every_tile(choose, [Problem(NAME, m, n, 9 * c, torch.int8, c) for m, n, c in sizes])
    assert len(found) > 6 and {c.split_k for c in found} == {1, 2}
    x, weight, scale, w_scale, bias = (
        image(1, 72, 9, 8),
        fenced(integers(72, 2, 1, 72)),
        floats(1),
        floats(72),
        floats(72),
    )
    geometry = ([1, 1], [1, 0], [2, 1])
    ints = direct(x, weight, -9, *geometry)
    residual = floats(*ints.shape)
    real = ints.float() * scale * w_scale[:, None, None] + bias[:, None, None] + residual
    for config in found:
        if config.split_k > 1:
            got = launch(x, weight, scale, w_scale, zero_point(), None, *geometry, 1, torch.int32, config=config)
            assert torch.equal(got, ints), config
        else:
            args = (x, weight, scale, w_scale, zero_point(), bias, *geometry, 1, torch.float32, "relu", residual)
            torch.testing.assert_close(launch(*args, config=config), torch.relu(real), rtol=1e-6, atol=1e-6)


@pytest.mark.triton
def test_sums_of_filters_images_of_any_layout_and_alone() -> None:
    x, weight = image(3, 32, 5, 5), integers(16, 3, 3, 32)
    args = (weight, floats(1), floats(16), zero_point(), None, ONE, ONE, ONE, 1, torch.float16)
    every = launch(x, *args)
    assert torch.equal(launch(x.contiguous(), *args), every)
    assert torch.equal(launch(x, *args, "", None, weight.sum((1, 2, 3), dtype=torch.int32)), every)
    assert torch.equal(launch(x[1:2], *args), every[1:2])


@pytest.mark.triton
def test_choose_fills_the_device() -> None:
    from fxcompress.kernels.conv2d_w8a8_triton import choose

    for gpu in ASSUMED.values():
        assert choose(Problem(NAME, 49, 512, 4608, torch.int8, 512), gpu).split_k > 1
        assert choose(Problem(NAME, 100352, 512, 4608, torch.int8, 512), gpu).split_k == 1


@pytest.mark.cuda
@pytest.mark.parametrize("groups", [1, 64])
def test_on_a_gpu_repeats_captures_and_streams(groups: int) -> None:
    x, weight, scale, w_scale = image(2, 64, 14, 14), integers(64, 3, 3, 64 // groups), floats(1), floats(64)

    rest = (weight, scale, w_scale, zero_point(), None, ONE, ONE, ONE, groups, torch.float16)
    check_graph_and_streams(lambda given: kernel_op(NAME).launch(given, *rest), x)
    close(kernel_op(NAME), launch(x, *rest), kernel_op(NAME).reference(x, *rest))


@pytest.mark.cuda
def test_on_a_gpu_offsets_beyond_32_bits() -> None:
    n = 2**31 // (64 * 64 * 64) + 8
    x = torch.zeros(n, 64, 64, 64, dtype=torch.int8, device="cuda").permute(0, 3, 1, 2)
    x[-1] = integers(64, 64, 64)
    weight = integers(16, 3, 3, 64)
    got = launch(x, weight, floats(1), floats(16), None, None, ONE, ONE, ONE, 1, torch.int32)
    assert torch.equal(got[-1:], direct(x[-1:], weight, 0, ONE, ONE, ONE)) and not got[:-1].any()
