"""Writing into a quantized, paged KV cache, end to end errors, and the assembly that takes its elements apart."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fxcompress.kernels.paged_attention import pack_nibbles, unpack_nibbles
from tests.kernels.cases import device, error
from tests.kernels.paged import TOLERANCE, Case, launched

attention = torch.ops.fxcompress.paged_attention
write = torch.ops.fxcompress.paged_cache_write


def test_nibbles_round_trip() -> None:
    q = torch.randint(-8, 8, (3, 5, 2, 48), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    packed = pack_nibbles(q)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 5, 2, 24)
    assert torch.equal(unpack_nibbles(packed), q)
    assert int(packed[0, 0, 0, 0]) == int(q[0, 0, 0, 0]) + 8 + 16 * (int(q[0, 0, 0, 24]) + 8)


# ------------------------------------------------------------------------------------------------ writing
def fresh(bits: int, pages: int, page_size: int, heads: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """A cache full of 101, so that what is not written is seen."""
    shape = (pages, page_size, heads, d * bits // 8)
    keys, values = (torch.full(shape, 101, dtype=torch.int8 if bits == 8 else torch.uint8) for _ in range(2))
    return keys, values, torch.full(shape[:3], 101.0)


@pytest.mark.triton
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("heads", "d", "dtype", "zero"), [(2, 64, torch.float16, False), (5, 80, torch.float32, True)])
def test_write(bits: int, heads: int, d: int, dtype: torch.dtype, zero: bool) -> None:
    from fxcompress.kernels import paged_cache_triton

    random = torch.Generator().manual_seed(d)
    fused = torch.randn(6, 3 * heads, d, generator=random).to(dtype)
    k, v = fused[:, heads : 2 * heads], fused[:, 2 * heads :]
    v[2, 0], v[3] = 0, v[3] * 1e-6
    top = 127 if bits == 8 else 7
    scale = k.float().abs().amax(0).clamp(min=0.1) * 0.9 / top  # some keys are clamped
    offset = torch.full((heads, d), 1.5) if zero else None
    slots = torch.tensor([0, 33, -1, 7, 48, 15])  # 48: just outside
    cache = fresh(bits, 3, 16, heads, d)
    write(k, v, *cache[:2], scale, cache[2], slots, bits, offset)
    mine = [t.to(device()) for t in fresh(bits, 3, 16, heads, d)]
    k_, v_, scale_, slots_ = (t.to(device()) for t in (k, v, scale, slots))
    offset_ = None if offset is None else offset.to(device())
    paged_cache_triton.write(k_, v_, mine[0], mine[1], scale_, mine[2], slots_, bits, offset_)
    for here, there in zip(cache, mine, strict=True):
        assert torch.equal(here, there.cpu())

    keys, values = (unpack_nibbles(t) if bits == 4 else t for t in cache[:2])
    kept = {0: 0, 33: 1, 7: 3, 15: 5}
    for slot in range(48):
        at = slot // 16, slot % 16
        if slot not in kept:
            assert all(bool((t[at] == 101).all()) for t in cache)
            continue
        x, y = k[kept[slot]].double(), v[kept[slot]].double()
        integers = torch.round(x / scale.double() + (1.5 if zero else 0)).clamp(-top - 1, top)
        assert (keys[at].double() - integers).abs().max() <= 1 and (keys[at] == integers).double().mean() > 0.99
        step = y.abs().amax(-1) / top
        torch.testing.assert_close(cache[2][at].double(), step, rtol=1e-6, atol=0)
        assert bool(((values[at] * cache[2][at].double()[:, None] - y).abs() <= step[:, None] * 0.5001).all())


@pytest.mark.triton
@pytest.mark.parametrize(("bits", "least"), [(8, 40.0), (4, 14.0)])
def test_end_to_end(bits: int, least: float) -> None:
    """Tokens written, then attended to: signal to quantization noise against attention over what was written."""
    random = torch.Generator().manual_seed(5)
    heads, d, page_size, lengths = 2, 64, 16, (40, 96)
    outliers = torch.ones(heads, d)
    outliers[:, ::16] = 8.0  # a few channels of the keys are large, as in language models
    k = [torch.randn(n, heads, d, generator=random) * outliers for n in lengths]
    v = [torch.randn(n, heads, d, generator=random) for n in lengths]
    key_scale = torch.cat(k).abs().amax(0) / (127 if bits == 8 else 7)
    keys, values, value_scale = fresh(bits, 10, page_size, heads, d)
    table = torch.tensor([[3, 0, 8, *[-1] * 3], [1, 2, 4, 5, 6, 7]], dtype=torch.int32)
    q = torch.randn(2, 8, d, generator=random).half() * 0.5
    for b, n in enumerate(lengths):
        t = torch.arange(n)
        slots = table[b, t // page_size].long() * page_size + t % page_size
        write(k[b].half(), v[b].half(), keys, values, key_scale, value_scale, slots, bits)
    given = torch.tensor(lengths, dtype=torch.int32)
    case = Case(q, keys, values, key_scale, value_scale, table, given, d**-0.5, bits)
    got = launched(case).double()
    exact = torch.zeros_like(got)
    for b in range(2):
        scores = torch.einsum("hgd,thd->hgt", q[b].double().reshape(heads, -1, d), k[b].double()) * d**-0.5
        exact[b] = torch.einsum("hgt,thd->hgd", scores.softmax(-1), v[b].double()).reshape(8, d)
    ratio = float(20 * torch.log10(exact.norm() / (got - exact).norm()))
    assert ratio > least, f"{ratio:.1f} dB"
    assert error(got, attention(*replace(case, q=q.double()).arguments)) < TOLERANCE[torch.float16]


# ------------------------------------------------------------------------------------------------ inline assembly
@pytest.mark.triton
@pytest.mark.parametrize(
    ("name", "planes"), [("bytes_of", 1), ("nibbles_of", 2), ("bytes_of_words", 2), ("nibbles_of_words", 4)]
)
def test_assembly(name: str, planes: int) -> None:
    """What runs on GPUs only gives the same numbers, for every byte and every word."""
    from fxcompress.kernels import paged_cache_triton
    from tests.kernels import ptx

    source = inspect.getsource(getattr(paged_cache_triton, name).fn)
    (assembly,) = re.findall(r'"""\{(.*?)\}"""', source, re.DOTALL)
    constraints = re.findall(r'"(=r[=r,]*)"', source)[0].split(",")
    registers = constraints.count("=r")
    words = np.arange(2**16, dtype=np.uint16)
    if name.endswith("words"):  # a register is two words, from different tokens
        elements = [words, np.random.default_rng(0).permutation(words)]
        register = elements[0].astype(np.uint32) | elements[1].astype(np.uint32) << np.uint32(16)
        pair = np.stack(elements, -1).astype(np.int32)
        shifts = (0, 4, 8, 12) if planes == 4 else (0, 8)
        parts = [(pair >> s) & (15 if planes == 4 else 255) for s in shifts]
    else:  # a register is four bytes
        register = words.astype(np.uint32) * np.uint32(0x10001) ^ np.uint32(0x5AC30000)
        four = register.view(np.uint8).reshape(-1, 4).astype(np.int32)
        parts = [four & 15, four >> 4] if planes == 2 else [four]
    out = ptx.run(assembly, [register], registers)
    per = registers // planes
    for i, part in enumerate(parts):
        halves = np.stack(out[i * per : (i + 1) * per], -1).view(np.float16).reshape(part.shape)
        signed = part - 8 if "nibbles" in name else part.astype(np.uint8).view(np.int8)
        np.testing.assert_array_equal(halves, signed)
