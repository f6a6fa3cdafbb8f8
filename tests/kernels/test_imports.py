"""GPTQ, AWQ and compressed-tensors weights: against packers written word by word from the formats' descriptions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import fxcompress.kernels.w4a16
import fxcompress.kernels.w8a16  # noqa: F401  registers the operator
from fxcompress.errors import UsageError
from fxcompress.kernels.imports import (
    PackedWeight,
    from_awq,
    from_compressed_tensors,
    from_gptq,
    from_int_quantized,
    to_awq,
    to_compressed_tensors,
    to_gptq,
    to_int_quantized,
)
from fxcompress.kernels.layouts import unpack_int4


# ------------------------------------------------------------------------------------------------ naive packers
def words(rows: list[list[int]], bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Every row cut into int32 words, the first element (or element ``order[0]``) in the lowest bits."""
    each = 32 // bits
    packed = []
    for row in rows:
        line = []
        for start in range(0, len(row), each):
            part = row[start : start + each] + [0] * max(0, start + each - len(row))
            word = 0
            for place in range(each):
                word |= part[order[place] if order else place] << (bits * place)
            line.append(word - 2**32 if word >= 2**31 else word)
        packed.append(line)
    return torch.tensor(packed, dtype=torch.int64).to(torch.int32)


def down(matrix: Tensor, bits: int) -> Tensor:
    """Words along the first dimension."""
    return words(matrix.T.tolist(), bits).T.contiguous()


def across(matrix: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Words along the second dimension."""
    return words(matrix.tolist(), bits, order)


class Layer:
    """A random quantized layer: ``q`` [N, K] and ``zeros`` [G, N] unsigned, ``groups`` [K], ``scales`` [G, N]."""

    def __init__(self, n: int, k: int, groups: int, bits: int = 4, *, symmetric: bool = False, shuffled: bool = False):
        random = torch.Generator().manual_seed(n + k + groups)
        self.bits, self.n, self.k = bits, n, k
        self.q = torch.randint(0, 2**bits, (n, k), generator=random)
        middle = torch.full((groups, n), 2 ** (bits - 1))
        self.zeros = middle if symmetric else torch.randint(1, 2**bits, (groups, n), generator=random)
        self.scales = (torch.rand(groups, n, generator=random) + 0.1).half()
        self.groups = torch.arange(k) // (k // groups)
        if shuffled:
            self.groups = self.groups[torch.randperm(k, generator=random)]

    @property
    def weight(self) -> Tensor:
        """float64 [N, K]."""
        return (self.q - self.zeros[self.groups].T).double() * self.scales[self.groups].T.double()

    def gptq(self, version: int = 1) -> dict[str, Any]:
        zeros = self.zeros - 1 if version == 1 else self.zeros
        g_idx = self.groups.to(torch.int32)
        packed = down(self.q.T, self.bits), across(zeros, self.bits)
        return {"qweight": packed[0], "qzeros": packed[1], "scales": self.scales, "g_idx": g_idx}

    def awq(self) -> dict[str, Any]:
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        return {"qweight": across(self.q.T, 4, order), "qzeros": across(self.zeros, 4, order), "scales": self.scales}

    def compressed(self, symmetric: bool) -> dict[str, Any]:
        found: dict[str, Any] = {
            "weight_packed": across(self.q, self.bits),
            "weight_scale": self.scales.T.contiguous().bfloat16(),
            "weight_shape": torch.tensor([self.n, self.k]),
        }
        if not symmetric:
            found["weight_zero_point"] = down(self.zeros.T, self.bits)
        if bool((self.groups.diff() < 0).any()):
            found["weight_g_idx"] = self.groups.to(torch.int32)
        return found


def run(packed: PackedWeight, x: Tensor) -> Tensor:
    """The layer's operator."""
    if packed.permutation is not None:
        x = x[..., packed.permutation]
    if packed.bits == 8:
        y = torch.ops.fxcompress.w8a16_linear(x, packed.weight, packed.scales, None, packed.group_size)
    else:
        y = torch.ops.fxcompress.w4a16_linear(x, packed.weight, packed.scales, packed.zeros, None, packed.group_size)
    return cast(Tensor, y)


def same(got: dict[str, Tensor], expected: dict[str, Any]) -> None:
    """Same keys, dtypes, shapes and bits."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name


def check(packed: PackedWeight, layer: Layer) -> None:
    """The operator on unit vectors returns the columns of the weight, exactly."""
    scales = packed.scales.double()
    weight = run(replace(packed, scales=scales), torch.eye(layer.k, dtype=torch.float64)).T
    expected = layer.weight
    if packed.scales.dtype == torch.bfloat16:
        expected = expected / layer.scales[layer.groups].T.double()
        expected = expected * layer.scales.bfloat16()[layer.groups].T.double()
    torch.testing.assert_close(weight, expected, rtol=1e-14, atol=0)


# ------------------------------------------------------------------------------------------------ round trips
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("n", "k", "groups", "symmetric"), [(24, 256, 2, False), (8, 96, 3, True), (16, 40, 1, False)])
def test_gptq(n: int, k: int, groups: int, symmetric: bool, version: int, shuffled: bool) -> None:
    layer = Layer(n, k, groups, symmetric=symmetric, shuffled=shuffled)
    saved = layer.gptq(version)
    packed = from_gptq(**saved, version=version)
    assert packed.weight.dtype == torch.int16 and packed.weight.shape == (-(-k // 128), n, 32)
    assert (packed.zeros is None) == symmetric and packed.group_size == (-1 if groups == 1 else k // groups)
    assert (packed.permutation is not None) == (shuffled and groups > 1)
    check(packed, layer)
    same(to_gptq(packed, version=version), saved)
    if not shuffled:
        assert torch.equal(from_gptq(*list(saved.values())[:3], version=version).weight, packed.weight)


@pytest.mark.parametrize("version", [1, 2])
def test_gptq_permutation(version: int) -> None:
    """The planes hold the input features group by group, within a group in their own order."""
    layer = Layer(8, 128, 4, shuffled=True)
    packed = from_gptq(**layer.gptq(version), version=version)
    order = sorted(range(128), key=lambda i: (int(layer.groups[i]), i))
    assert packed.permutation is not None and packed.permutation.tolist() == order
    assert torch.equal(unpack_int4(packed.weight, 128).long(), layer.q[:, order])


@pytest.mark.parametrize(("n", "k", "groups", "symmetric"), [(24, 256, 2, False), (8, 96, 3, True), (16, 64, 1, False)])
def test_awq(n: int, k: int, groups: int, symmetric: bool) -> None:
    layer = Layer(n, k, groups, symmetric=symmetric)
    packed = from_awq(**layer.awq())
    assert (packed.zeros is None) == symmetric and packed.permutation is None
    check(packed, layer)
    same(to_awq(packed), layer.awq())


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize(("n", "k", "groups", "symmetric"), [(13, 256, 2, False), (8, 96, 3, True), (16, 37, 1, False)])
def test_compressed_tensors(n: int, k: int, groups: int, symmetric: bool, shuffled: bool) -> None:
    layer = Layer(n, k, groups, symmetric=symmetric, shuffled=shuffled)
    saved = layer.compressed(symmetric)
    packed = from_compressed_tensors(**saved)
    assert (packed.zeros is None) == symmetric
    check(packed, layer)
    same(to_compressed_tensors(packed), saved)
    plain: dict[str, Any] = {**saved, "weight_g_idx": torch.full((k,), -1)} if not shuffled else saved
    if not symmetric:  # zero points that are not packed yet
        plain = {**plain, "weight_zero_point": (layer.zeros.T - 8).to(torch.int8)}
    again = from_compressed_tensors(**plain)
    assert torch.equal(again.weight, packed.weight)
    if not symmetric:
        assert again.zeros is not None and packed.zeros is not None and torch.equal(again.zeros, packed.zeros)


@pytest.mark.parametrize("shuffled", [False, True])
def test_eight_bits(shuffled: bool) -> None:
    layer = Layer(12, 96, 3, bits=8, symmetric=True, shuffled=shuffled)
    for version in (1, 2):
        saved = layer.gptq(version)
        packed = from_gptq(**saved, bits=8, version=version)
        assert packed.weight.dtype == torch.int8 and packed.weight.shape == (12, 96) and packed.zeros is None
        check(packed, layer)
        same(to_gptq(packed, version=version), saved)
    stored = layer.compressed(symmetric=True)
    packed = from_compressed_tensors(**stored, bits=8)
    check(packed, layer)
    same(to_compressed_tensors(packed), stored)
    if not shuffled:
        plain = {"weight": (layer.q - 128).to(torch.int8), "weight_scale": stored["weight_scale"]}
        assert torch.equal(from_int_quantized(**plain).weight, packed.weight)
        same(to_int_quantized(from_int_quantized(**plain)), plain)


def test_from_one_format_to_another() -> None:
    layer = Layer(16, 64, 2)
    same(to_awq(from_gptq(**layer.gptq())), layer.awq())
    same(to_gptq(from_awq(**layer.awq()), version=2), layer.gptq(2))
    stored: dict[str, Any] = to_compressed_tensors(from_awq(**layer.awq()))
    same(to_awq(from_compressed_tensors(**stored)), layer.awq())


# ------------------------------------------------------------------------------------------------ fixed vectors
def test_compressed_tensors_of_the_library() -> None:
    """What ``pack_to_int32`` of compressed-tensors 0.20 returned for these integers."""
    w = (torch.arange(24).reshape(2, 12) * 7 % 16 - 8).to(torch.int8)
    stored = torch.tensor([[440163952, 55032], [1584435892, 6716]], dtype=torch.int32)
    packed = from_compressed_tensors(stored, torch.ones(2, 1), (2, 12))
    assert torch.equal(unpack_int4(packed.weight, 12).to(torch.int8) - 8, w)
    assert torch.equal(to_compressed_tensors(packed)["weight_packed"], stored)

    zeros = (torch.arange(10).reshape(10, 1) * 5 % 16 - 8).to(torch.int8)
    stored_zeros = torch.tensor([[1049950800], [216]], dtype=torch.int32)
    rows = stored[:1].expand(10, 2)
    packed = from_compressed_tensors(rows, torch.ones(10, 1), (10, 12), stored_zeros)
    assert packed.zeros is not None and torch.equal(packed.zeros.T.to(torch.int8) - 8, zeros)
    assert torch.equal(to_compressed_tensors(packed)["weight_zero_point"], stored_zeros)

    wide = (torch.arange(12).reshape(2, 6) * 53 % 256 - 128).to(torch.int8)
    stored = torch.tensor([[-1620429568, 2516], [-576163010, 18194]], dtype=torch.int32)
    packed = from_compressed_tensors(stored, torch.ones(2, 1), (2, 6), bits=8)
    assert torch.equal(packed.weight, wide)
    assert torch.equal(to_compressed_tensors(packed)["weight_packed"], stored)


def test_words_by_hand() -> None:
    """One word of each format, written down."""
    ones: dict[str, Any] = {"scales": torch.ones(1, 8, dtype=torch.float16)}
    counting = torch.tensor([[0x76543210]], dtype=torch.int32)
    zeros = torch.tensor([[0x77777777]], dtype=torch.int32)
    packed = from_gptq(counting.expand(1, 8), zeros, **ones)
    assert packed.zeros is None and packed.integers().tolist() == [list(range(8))] * 8
    packed = from_awq(counting.expand(8, 1), zeros, **ones)
    assert packed.integers()[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert packed.zero_points().tolist() == [[7] * 8]


# ------------------------------------------------------------------------------------------------ refusals
def refused(number: int, match: str, call: Callable[[], Any]) -> None:
    with pytest.raises(UsageError, match=match) as caught:
        call()
    assert caught.value.id == f"FXC-USAGE-{number}"


def test_refusals() -> None:
    layer = Layer(16, 64, 2)
    saved, stored = layer.gptq(), layer.compressed(symmetric=False)
    refused(456, r"qweight .* int32 \[8, 8\]", lambda: from_gptq(**{**saved, "qweight": saved["qweight"][:, :8]}))
    refused(456, "qweight .* int64", lambda: from_gptq(**{**saved, "qweight": saved["qweight"].long()}))
    refused(
        456, r"(?s)qzeros .* expected int32 \[2, 2\]", lambda: from_gptq(**{**saved, "qzeros": saved["qzeros"][:1]})
    )
    refused(456, "group index", lambda: from_gptq(**{**saved, "g_idx": saved["g_idx"][1:]}))
    refused(
        456, "weight_zero_point", lambda: from_compressed_tensors(**{**stored, "weight_zero_point": saved["scales"]})
    )
    refused(456, "weight_scale", lambda: from_compressed_tensors(**{**stored, "weight_scale": layer.scales}))
    refused(456, "weight .* uint8", lambda: from_int_quantized(layer.q.to(torch.uint8), layer.scales.T))
    halves = {"scales": layer.scales.repeat(2, 1), "qzeros": saved["qzeros"].repeat(2, 1)}
    refused(401, "64 input features", lambda: from_gptq(**saved | halves))
    refused(
        401, "37 input features", lambda: from_compressed_tensors(across(layer.q[:, :37], 4), layer.scales.T, (16, 37))
    )
    refused(458, "2 groups of 32", lambda: from_gptq(**{**saved, "g_idx": saved["g_idx"] * 0}))
    refused(457, "3-bit", lambda: from_gptq(**saved, bits=3))
    wide = Layer(16, 64, 2, bits=8)
    refused(457, "zero points", lambda: from_gptq(**wide.gptq(2), bits=8, version=2))
    refused(457, "zero points", lambda: from_compressed_tensors(**wide.compressed(symmetric=False), bits=8))


def test_gptq_version_1_has_no_zero() -> None:
    """A zero point of 0 is a field of 15 with or without a borrow from the next: nobody can tell."""
    layer = Layer(16, 64, 2)
    layer.zeros[1, 3] = 0
    packed = from_gptq(**layer.gptq(2), version=2)
    check(packed, layer)
    refused(457, "GPTQ version 1", lambda: to_gptq(packed))
    saved = layer.gptq(2)
    saved["qzeros"] = across((layer.zeros - 1) & 15, 4)
    refused(457, "wraps around", lambda: from_gptq(**saved))


def test_what_other_formats_lack() -> None:
    shuffled = from_gptq(**Layer(16, 64, 2, shuffled=True).gptq())
    refused(457, "AWQ", lambda: to_awq(shuffled))
    refused(457, "int-quantized", lambda: to_int_quantized(shuffled))
    odd = from_compressed_tensors(**Layer(13, 64, 2).compressed(symmetric=False))
    refused(457, "13", lambda: to_awq(odd))
    refused(457, "64, 13", lambda: to_gptq(odd))
