"""Quantization of activations: bit for bit where nothing is summed, one step at most where something is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.ops import kernel_op
from tests.kernels.cases import device
from tests.kernels.int8_cases import check_contract, check_export, check_graph_and_streams, fenced, poisoned, refused

ROWS = ["quantize_per_token", "rms_norm_quantize", "layer_norm_quantize", "activation_quantize", "silu_mul_quantize"]


def values(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device(), dtype)


def launch(name: str, *arguments: Any) -> Any:
    from fxcompress.kernels import quantize_triton

    with poisoned():
        return getattr(quantize_triton, name)(*arguments)


def more(name: str, x: Tensor) -> tuple[Any, ...]:
    """Further arguments of an operator on rows."""
    k = x.shape[-1]
    return {
        "quantize_per_token": (),
        "rms_norm_quantize": (values(k, dtype=x.dtype), 1e-6),
        "layer_norm_quantize": (values(k, dtype=x.dtype), values(k, dtype=torch.float32), 1e-5),
        "activation_quantize": ("gelu_tanh",),
        "silu_mul_quantize": (values(*x.shape, dtype=x.dtype, seed=9),),
    }[name]


@pytest.mark.parametrize("name", [*ROWS, "quantize_per_tensor"])
def test_contract(name: str) -> None:
    check_contract(name)


@pytest.mark.parametrize("name", ["quantize_per_token", "rms_norm_quantize", "quantize_per_tensor"])
def test_export(name: str) -> None:
    rest = (torch.tensor([0.02]), None, -128, 127) if name == "quantize_per_tensor" else more(name, values(4, 32).cpu())
    rest = tuple(r.cpu() if isinstance(r, Tensor) else r for r in rest)
    check_export(name, (values(4, 32).cpu(), *rest), values(9, 32).cpu())


def test_reference_rounds_half_to_even_and_survives_zeros() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5], [0.0, 0.0, 0.0, 0.0], [1e-44, 0.0, 0.0, 0.0]])
    q, scale = torch.ops.fxcompress.quantize_per_token(x)
    assert q.tolist() == [[127, 0, 2, -2], [0] * 4, [0] * 4] and scale.flatten().tolist() == [1.0, 1.0, 1.0]
    zero = torch.tensor([3], dtype=torch.int32)
    got = torch.ops.fxcompress.quantize_per_tensor(x[0], torch.tensor([0.5]), zero, -8, 100)
    assert got.tolist() == [100, 4, 6, -2]


#: The layers that the operators stand for, one after the other in the dtype of x.
UNFUSED: dict[str, Callable[..., Tensor]] = {
    "rms_norm_quantize": lambda x, w, eps: F.rms_norm(x.float(), w.shape, w.float(), eps).to(x.dtype),
    "layer_norm_quantize": lambda x, w, b, eps: F.layer_norm(x, w.shape, w, b.to(x.dtype), eps),
    "activation_quantize": lambda x, name: F.gelu(x, approximate="tanh"),
    "silu_mul_quantize": lambda gate, up: F.silu(gate) * up,
}


@pytest.mark.parametrize("name", UNFUSED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_reference_is_the_layers_in_turn(name: str, dtype: torch.dtype) -> None:
    x = values(64, 256, dtype=dtype).cpu()
    rest = tuple(r.cpu() if isinstance(r, Tensor) else r for r in more(name, x))
    if name == "layer_norm_quantize":
        rest = (rest[0], rest[1].to(dtype), rest[2])
    q, scale = kernel_op(name).reference(x, *rest)
    other, other_scale = torch.ops.fxcompress.quantize_per_token(UNFUSED[name](x, *rest))
    assert (q.int() - other.int()).abs().max() <= 1 and (q != other).float().mean() < 1e-2
    torch.testing.assert_close(scale, other_scale, rtol=1e-2 if dtype == torch.bfloat16 else 1e-3, atol=0)


@pytest.mark.parametrize(
    ("number", "call", "match"),
    [
        (420, lambda: kernel_op("quantize_per_token").reference(torch.zeros(2, 8, dtype=torch.int8)), "int8"),
        (426, lambda: kernel_op("quantize_per_token").reference(torch.zeros(2, 65537)), "65537"),
        (426, lambda: kernel_op("quantize_per_token").reference(torch.tensor(1.0)), "0 values"),
        (421, lambda: kernel_op("rms_norm_quantize").reference(torch.zeros(2, 8), torch.ones(9), 1e-6), "weight"),
        (421, lambda: kernel_op("silu_mul_quantize").reference(torch.zeros(2, 8), torch.ones(2, 9)), "up has shape"),
        (420, lambda: kernel_op("silu_mul_quantize").reference(torch.zeros(2, 8), torch.ones(2, 8).half()), "up has"),
        (402, lambda: kernel_op("activation_quantize").reference(torch.zeros(2, 8), "swish"), "swish"),
        (
            427,
            lambda: kernel_op("quantize_per_tensor").reference(torch.zeros(2), torch.ones(1), None, 0, 255),
            "0 to 255",
        ),
    ],
)
def test_refuses(number: int, call: Callable[[], Any], match: str) -> None:
    refused(number, call, match=match)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_per_token_is_bit_exact(dtype: torch.dtype) -> None:
    for m, k in ((3, 1), (5, 96), (2, 1000), (1, 8193), (2, 20000)):
        x = fenced(values(m, k, dtype=dtype), 10000)
        x[0, 0] = -6.0
        for got, expected in zip(
            launch("quantize_per_token", x), kernel_op("quantize_per_token").reference(x), strict=True
        ):
            assert torch.equal(got, expected), (m, k)


@pytest.mark.triton
def test_per_token_divides_as_pytorch_does_halfway_between_steps() -> None:
    largest = values(24, 1, dtype=torch.float32).abs() + 0.1
    x = torch.cat([largest, (torch.arange(127, device=device()) - 0.5) * (largest / 127)], 1)
    got, expected = launch("quantize_per_token", x), kernel_op("quantize_per_token").reference(x)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    assert not torch.equal(torch.round(x * (1 / expected[1])), expected[0].float())  # the reciprocal would not do


@pytest.mark.triton
@pytest.mark.parametrize("name", ROWS[1:])
@pytest.mark.parametrize("k", [1, 33, 768, 8192, 12000])
def test_fused_rows(name: str, k: int) -> None:
    x = fenced(values(3, k) * 3 + 1, 1000)
    rest = more(name, x)
    (q, scale), (expected, expected_scale) = launch(name, x, *rest), kernel_op(name).reference(x, *rest)
    assert (q.int() - expected.int()).abs().max() <= 1 and (q != expected).float().mean() < 1e-3
    torch.testing.assert_close(scale, expected_scale, rtol=1e-3, atol=0)


@pytest.mark.triton
@pytest.mark.parametrize("name", ROWS)
def test_a_row_does_not_depend_on_its_neighbours(name: str) -> None:
    x = values(2, 9, 130).transpose(0, 1)
    rest = more(name, x)
    every = launch(name, x, *rest)
    one = tuple(r[4:5] if isinstance(r, Tensor) and r.shape == x.shape else r for r in rest)
    for got, expected in zip(launch(name, x[4:5], *one), every, strict=True):
        assert torch.equal(got, expected[4:5])


@pytest.mark.triton
def test_optional_weights() -> None:
    x = values(3, 64)
    ones, zeros = torch.ones(64, device=device()), torch.zeros(64, device=device())
    for got, expected in zip(
        (*launch("rms_norm_quantize", x, None, 1e-6), *launch("layer_norm_quantize", x, None, None, 1e-5)),
        (*launch("rms_norm_quantize", x, ones, 1e-6), *launch("layer_norm_quantize", x, ones, zeros, 1e-5)),
        strict=True,
    ):
        assert torch.equal(got, expected)


@pytest.mark.triton
def test_per_tensor_is_bit_exact() -> None:
    scale, zero = torch.tensor([0.037], device=device()), torch.tensor([-11], dtype=torch.int32, device=device())
    halves = torch.arange(-300, 300, device=device()) * scale / 2
    reference = kernel_op("quantize_per_tensor").reference
    for x in (values(5000), halves, values(3, 70000) * 1e4, values(9, 9, dtype=torch.float32)[:, ::2]):
        for z, low, high in ((None, -127, 127), (zero, -128, 127), (zero, 0, 15)):
            assert torch.equal(launch("quantize_per_tensor", x, scale, z, low, high), reference(x, scale, z, low, high))


@pytest.mark.cuda
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    for k in (64, 4096, 65536):
        x = values(7, k, dtype=dtype)
        rest = more(name, x)
        op = getattr(torch.ops.fxcompress, name)
        (q, scale), (expected, expected_scale) = op(x, *rest), kernel_op(name).reference(x, *rest)
        assert (q.int() - expected.int()).abs().max() <= 1 and (q != expected).float().mean() < 1e-2
        torch.testing.assert_close(scale, expected_scale, rtol=1e-2 if dtype == torch.bfloat16 else 1e-3, atol=0)

        def run(given: Tensor, op: Any = op, rest: tuple[Any, ...] = rest) -> Any:
            return op(given, *rest)

        check_graph_and_streams(run, x)


@pytest.mark.cuda
def test_on_a_gpu_more_than_2_to_the_31_values() -> None:
    x = torch.zeros(2**31 + 4096, dtype=torch.float16, device="cuda")
    x[-1] = 0.5
    got = launch("quantize_per_tensor", x, torch.tensor([0.25], device="cuda"), None, -128, 127)
    assert got[-1] == 2 and not got[:-1].any()
    q, scale = launch("quantize_per_token", x.view(-1, 4096))
    assert q[-1, -1] == 127 and scale[-1] == 0.5 / 127 and not q[:-1].any()
