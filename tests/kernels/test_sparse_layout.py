"""2:4 layouts: round trips, the order of the PTX ISA, the order PyTorch writes for CUTLASS, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.sparse import _semi_structured_conversions as conversions

from fxcompress.errors import UsageError
from fxcompress.kernels import sparse_layout as layout
from fxcompress.kernels.sp24 import sparse_sample
from tests.kernels.mma_sp_emulator import a_element, elements, metadata_place

SHAPES = [(16, 64), (1, 4), (5, 70), (33, 130), (48, 256), (16, 3)]


def floats(n: int, k: int, seed: int = 0) -> Tensor:
    return sparse_sample(n, k, torch.Generator().manual_seed(seed))


def bytes_(n: int, k: int, seed: int = 0) -> Tensor:
    return (floats(n, k, seed) * 40).clamp(-128, 127).to(torch.int8)


def nibbles(n: int, k: int, seed: int = 0) -> Tensor:
    return (floats(n, k, seed) * 4).clamp(-8, 7).to(torch.int8)


CASES: dict[str, tuple[Any, Any, Any]] = {
    "sp24_f16": (lambda n, k, seed=0: floats(n, k, seed).half(), layout.pack_sp24, layout.unpack_sp24),
    "sp24_f16 bfloat16": (lambda n, k, seed=0: floats(n, k, seed).bfloat16(), layout.pack_sp24, layout.unpack_sp24),
    "sp24_i8": (bytes_, layout.pack_sp24_i8, layout.unpack_sp24_i8),
    "sp24_w4": (nibbles, layout.pack_sp24_w4, layout.unpack_sp24_w4),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_round_trip_is_exact(name: str, n: int, k: int) -> None:
    make, pack, unpack = CASES[name]
    weight = make(n, k)
    values, meta = pack(weight)
    assert values.is_contiguous() and meta.is_contiguous() and meta.dtype == torch.int32
    back = unpack(values, meta, n, k)
    assert back.dtype == weight.dtype and torch.equal(back, weight)


@given(st.integers(1, 40), st.integers(1, 300), st.integers(0, 1000), st.sampled_from(sorted(CASES)))
@settings(max_examples=40, deadline=None)
def test_any_size_round_trips(n: int, k: int, seed: int, name: str) -> None:
    make, pack, unpack = CASES[name]
    weight = make(n, k, seed)
    assert torch.equal(unpack(*pack(weight), n, k), weight)


@pytest.mark.parametrize("pattern", [0b0011, 0b0101, 0b0110, 0b1001, 0b1010, 0b1100, 0b0001, 0b1000, 0b0000])
def test_every_pattern_of_a_group(pattern: int) -> None:
    group = torch.tensor([float(pattern >> i & 1) * (i + 1) for i in range(4)])
    weight = group.repeat(16, 16).half()
    values, meta = layout.pack_sp24(weight)
    assert torch.equal(layout.unpack_sp24(values, meta, 16, 64), weight)
    codes = {int(meta[0, 0, lane]) >> 4 * i & 15 for lane in range(32) for i in range(8)}
    assert codes <= {0b0100, 0b1000, 0b1001, 0b1100, 0b1101, 0b1110}  # all that ordered metadata allows


def test_special_values_survive() -> None:
    weight = torch.zeros(16, 64, dtype=torch.float16)
    weight[0, :8] = torch.tensor([float("nan"), 0, 0, float("inf"), 0, -float("inf"), 6e-8, 0])
    values, meta = layout.pack_sp24(weight)
    assert torch.equal(layout.unpack_sp24(values, meta, 16, 64).view(torch.int16), weight.view(torch.int16))


@pytest.mark.parametrize(("n", "k"), [(16, 64), (24, 200)])
def test_shapes(n: int, k: int) -> None:
    tiles, units = -(-n // 16), -(-k // 64)
    values, meta = layout.pack_sp24(floats(n, k).half())
    assert values.shape == (tiles, 2 * units, 32, 8) and meta.shape == (tiles, units, 32)
    values, meta = layout.pack_sp24_i8(bytes_(n, k))
    assert values.shape == (tiles, units, 32, 16) and meta.shape == (tiles, units, 32)
    values, meta = layout.pack_sp24_w4(nibbles(n, k))
    assert values.shape == (tiles, -(-k // 128), 32, 4) and meta.shape == (tiles, 2 * -(-k // 128), 32)
    assert layout.depth(values) == 128 * -(-k // 128)


# ------------------------------------------------------------------------------------------------ the order itself
def registers(values: Tensor, kind: str) -> np.ndarray:
    """Elements of operand A of every lane, step by step: [tiles, steps, 32, elements]."""
    words = values.view(torch.int32).numpy().reshape(*values.shape[:3], 4)
    return elements(words, kind)


@pytest.mark.parametrize("kind", ["f16", "s8"])
def test_lanes_hold_what_the_instruction_reads(kind: str) -> None:
    """Dense again by the formulas of the PTX ISA, lane by lane, without the layout's own code."""
    n, k, width = 32, 256, 64 if kind == "s8" else 32
    weight = bytes_(n, k) if kind == "s8" else floats(n, k).half()
    values, meta = layout.pack_sp24_i8(weight) if kind == "s8" else layout.pack_sp24(weight)
    held, words = registers(values, kind), meta.numpy().astype(np.int64) & 0xFFFFFFFF
    dense = np.zeros((n, k))
    for tile, step, lane, i in np.ndindex(held.shape):
        row, column, number = a_element(lane, i, kind)
        holder, bit = metadata_place(row, column, 0 if kind == "s8" else step % 2, kind)
        index = words[tile, step if kind == "s8" else step // 2, holder] >> (bit + 2 * number) & 3
        dense[16 * tile + row, width * step + column + index] += held[tile, step, lane, i]
    np.testing.assert_array_equal(dense, weight.double().numpy())


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
def test_metadata_agrees_with_cutlass(dtype: torch.dtype) -> None:
    """PyTorch writes metadata as CUTLASS loads it, with ldmatrix: 16 bytes a row of an 8 x 8 matrix, lane 4 g + t word t.

    For 16-bit weights such a row serves two tiles of 16 rows (the selectors), in ours two steps of K; the words are the same.
    """
    n, k = 64, 256
    weight = bytes_(n, k) if dtype == torch.int8 else floats(n, k).half()
    # give every group two nonzeros, where there is one way to write the metadata
    weight = torch.where((weight == 0) & (floats(n, k) != 0), torch.ones((), dtype=dtype), weight)
    _, reordered = conversions.sparse_semi_structured_from_dense_cutlass(weight)
    if dtype == torch.int8:
        _, meta = layout.pack_sp24_i8(weight)
        # interleaved columns of two: [K / 64][row][2] words of 32 bits; a lane's quad is two of its rows
        words = reordered.view(-1).reshape(k // 64, n // 16, 8, 4)
        assert torch.equal(words.permute(1, 0, 2, 3).reshape(n // 16, k // 64, 32), meta)
        return
    _, meta = layout.pack_sp24(weight)
    words = (
        reordered.view(-1).view(torch.int32).reshape(k // 32, n // 32, 8, 4)
    )  # [step][32 rows][g][two tiles x two lanes]
    theirs = words.reshape(
        k // 64, 2, n // 32, 8, 2, 2
    )  # unit, selector of ours, 32 rows, g, tile of 16, lane of the pair
    ours = meta.reshape(n // 32, 2, k // 64, 8, 2, 2)  # 32 rows, tile of 16, unit, g, selector, lane of the pair
    assert torch.equal(theirs.permute(2, 4, 0, 3, 1, 5), ours)


def test_four_bit_words_are_the_elements_of_the_16_bit_layout() -> None:
    weight = nibbles(32, 256)
    values, meta = layout.pack_sp24_w4(weight)
    halves, same = layout.pack_sp24(weight.half())
    assert torch.equal(meta, same)
    shifts = torch.tensor([4 * (2 * q + h) + 16 * b for q in range(2) for h in range(2) for b in range(2)])
    found = (values[..., None].long() >> shifts & 15) - 8  # [tiles, K / 128, 32, 4, 8]
    assert torch.equal(found.permute(0, 1, 3, 2, 4).reshape(halves.shape), halves.long())


# ------------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("pack", "make"), [(layout.pack_sp24, lambda w: w.half()), (layout.pack_sp24_i8, lambda w: w.to(torch.int8))]
)
def test_dense_weight_is_refused_with_its_first_bad_group(
    pack: Callable[..., Any], make: Callable[..., Tensor]
) -> None:
    weight = torch.zeros(20, 64)
    weight[7, 9:12] = 1
    weight[12, 20:24] = 1
    with pytest.raises(UsageError, match="row 7, columns 8 to 11 hold 3 nonzeros") as caught:
        pack(make(weight))
    assert caught.value.id == "FXC-USAGE-441" and "2 groups" in str(caught.value)


def test_zeros_by_column_are_not_zeros_by_row() -> None:
    weight = floats(64, 64).half()
    with pytest.raises(UsageError):
        layout.pack_sp24(weight.T.contiguous())


@pytest.mark.parametrize(
    ("call", "number"),
    [
        (lambda: layout.pack_sp24(torch.zeros(4)), 443),
        (lambda: layout.pack_sp24(torch.zeros(4, dtype=torch.half)), 440),
        (lambda: layout.pack_sp24(torch.zeros(0, 4, dtype=torch.half)), 440),
        (lambda: layout.pack_sp24_i8(torch.zeros(4, 4)), 443),
        (lambda: layout.pack_sp24_w4(torch.full((1, 4), 8, dtype=torch.int8)), 442),
        (lambda: layout.pack_sp24_w4(torch.tensor([[-9, 0, 0, 0]], dtype=torch.int8)), 442),
    ],
)
def test_refusals(call: Callable[[], Any], number: int) -> None:
    with pytest.raises(UsageError) as caught:
        call()
    assert caught.value.id == f"FXC-USAGE-{number}"


@pytest.mark.parametrize("spec", [layout.SP24_F16, layout.SP24_I8, layout.SP24_W4])
def test_version_is_checked(spec: Any) -> None:
    spec.check(spec.to_dict())
    with pytest.raises(UsageError, match="version 2"):
        spec.check(spec.to_dict() | {"version": 2})
