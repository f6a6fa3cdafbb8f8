"""Attention over a quantized, paged KV cache: the reference against a naive loop, the kernel against float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from fxcompress.errors import UsageError
from fxcompress.kernels.configs import ASSUMED, Config, Problem
from fxcompress.kernels.paged_attention import unpack_nibbles
from fxcompress.ops import kernel_op
from tests.kernels.cases import device, error
from tests.kernels.paged import TOLERANCE, Case, launched, make, naive

attention = torch.ops.fxcompress.paged_attention
write = torch.ops.fxcompress.paged_cache_write


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and workspaces start as NaN."""
    empty = torch.empty

    def poison(*args: Any, **kwargs: Any) -> Tensor:
        made = empty(*args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poison)


def configure(monkeypatch: pytest.MonkeyPatch, parts: int, block_n: int = 32) -> None:
    """Make the launcher cut sequences into ``parts`` parts, of 32 tokens at least."""
    from fxcompress.kernels import paged_attention_triton

    config = Config(16, block_n, split_k=parts, num_warps=4, num_stages=3)
    monkeypatch.setattr(paged_attention_triton, "choose", lambda problem, device: config)
    monkeypatch.setattr(paged_attention_triton, "_FEWEST", 32)
    monkeypatch.setattr(paged_attention_triton, "_TILE", 4)


# ------------------------------------------------------------------------------------------------ reference
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 9},
        {"softcap": 2.0, "zero": True},
        {"zero": True, "heads": (3, 1), "page_size": 7, "d": 16},
        {"heads": (2, 2), "d": 80, "window": 1000},
    ],
)
def test_reference_is_the_definition(bits: int, options: dict[str, Any]) -> None:
    case = make(bits, **options)
    expected = naive(case)
    assert error(attention(*replace(case, q=case.q.double()).arguments), expected) < 1e-12
    for dtype, tolerance in TOLERANCE.items():
        q = case.q.to(dtype)
        got = attention(*replace(case, q=q).arguments)
        assert got.dtype == dtype and got[0].count_nonzero() == 0
        assert error(got, naive(replace(case, q=q))) < tolerance


# ------------------------------------------------------------------------------------------------ kernel
@pytest.mark.triton
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("d", "heads", "page_size", "options"),
    [
        (64, (4, 2), 16, {}),
        (80, (3, 3), 16, {"window": 20}),
        (96, (10, 2), 7, {"softcap": 3.0}),
        (128, (8, 1), 16, {"softcap": 3.0, "zero": True}),
        (128, (20, 1), 32, {"zero": True}),  # more query heads than a program takes
        (256, (2, 1), 16, {}),
        (16, (2, 1), 64, {}),
    ],
)
def test_kernel(bits: int, d: int, heads: tuple[int, int], page_size: int, options: dict[str, Any]) -> None:
    case = make(bits, (0, 1, 129, 32), heads, d, page_size, **options)
    got = launched(case)
    assert got.dtype == torch.float16 and got.is_contiguous() and got[0].count_nonzero() == 0
    assert error(got, naive(case)) < TOLERANCE[torch.float16]


@pytest.mark.triton
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("bits", "parts", "window"), [(8, 3, 0), (4, 3, 0), (8, 12, 0), (8, 3, 65)])
def test_parts(bits: int, parts: int, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences cut into parts: more parts than tokens fill, several steps to add them, and always the same bits."""
    case = make(bits, (0, 5, 97, 260), (2, 1), room=2, window=window)
    configure(monkeypatch, parts)
    got = launched(case)
    assert error(got, naive(case)) < TOLERANCE[torch.float16] and got[0].count_nonzero() == 0
    for b in (1, 3):  # alone as in the batch
        one = slice(b, b + 1)
        alone = replace(case, q=case.q[one], page_table=case.page_table[one], lengths=case.lengths[one])
        assert torch.equal(launched(alone), got[one])


@pytest.mark.triton
def test_bfloat16_and_strides() -> None:
    case = make(8, (33, 64), (4, 2), 64, dtype=torch.bfloat16)
    expected = naive(case)
    wide = torch.full((2, 9, 64), torch.nan, dtype=torch.bfloat16)
    wide[:, 1::2] = case.q
    storage = torch.full((case.keys.shape[0], 2, *case.keys.shape[1:]), 127, dtype=torch.int8)
    storage[:, 0], storage[:, 1] = case.keys, case.values
    storage = storage.to(device())
    strided = replace(case.to(device()), q=wide.to(device())[:, 1::2], keys=storage[:, 0], values=storage[:, 1])
    from fxcompress.kernels import paged_attention_triton

    got = paged_attention_triton.attention(*strided.arguments).cpu()
    assert error(got, expected) < TOLERANCE[torch.bfloat16]
    assert torch.equal(got, launched(case))


@pytest.mark.triton
@pytest.mark.parametrize("run", [lambda case: attention(*case.arguments), launched])
def test_edges(run: Callable[[Case], Tensor]) -> None:
    case = make(8, (16, 3, 2), (2, 1), room=0)
    got = run(replace(case, lengths=torch.tensor([17, -4, 2], dtype=torch.int32)))
    assert got[0].isnan().all(), "longer than its page table"
    assert got[1].count_nonzero() == 0 and not got[2].isnan().any()
    nothing = replace(case, q=case.q[:0], page_table=case.page_table[:0], lengths=case.lengths[:0])
    assert run(nothing).shape == (0, 2, 64)


@pytest.mark.triton
@pytest.mark.parametrize("bits", [8, 4])
def test_one_token_is_its_value(bits: int) -> None:
    """Softmax over one token is 1: every element must come back in its place, exactly, whatever the scores."""
    case = make(bits, (1, 1, 1), (4, 2), 96)
    case.q[1] *= 500
    rows = [case.page_table[b, 0] for b in range(3)]
    stored = torch.stack([case.values[page, 0] for page in rows])
    integers = unpack_nibbles(stored) if bits == 4 else stored
    scales = torch.stack([case.value_scale[page, 0] for page in rows])
    expected = (integers.float() * scales[..., None]).to(torch.float16).repeat_interleave(2, 1)
    assert torch.equal(launched(case), expected)


@pytest.mark.triton
def test_scales_and_pages() -> None:
    """Powers of two in the scales come out exactly, however small; where pages lie does not matter at all."""
    case = make(8, (37, 5), (4, 2))
    got = launched(replace(case, q=case.q.bfloat16()))
    small = replace(case, q=case.q.bfloat16(), value_scale=case.value_scale * 2**-30)
    assert torch.equal(launched(small).float(), got.float() * 2**-30)
    swapped = replace(case, key_scale=case.key_scale * 2**-20, scale=case.scale * 2**20)
    assert torch.equal(launched(swapped), launched(case))
    order = torch.randperm(case.keys.shape[0], generator=torch.Generator().manual_seed(0))
    table = torch.where(case.page_table < 2**30, order.argsort()[case.page_table.clamp(max=0) * 0 + 0], 0)
    table = torch.tensor(
        [[order.tolist().index(p) if p < 2**30 else p for p in row] for row in case.page_table.tolist()]
    )
    moved = replace(
        case, keys=case.keys[order], values=case.values[order], value_scale=case.value_scale[order],
        page_table=table.to(torch.int32),
    )  # fmt: skip
    assert torch.equal(launched(moved), launched(case))


# ------------------------------------------------------------------------------------------------ operators
@pytest.mark.parametrize("name", ["paged_attention", "paged_cache_write"])
def test_opcheck(name: str) -> None:
    op = kernel_op(name)
    for sample in op.samples("cpu"):
        torch.library.opcheck(op.overload, sample)


class Step(torch.nn.Module):
    """Writes a token and attends, as a decoder layer does."""

    def forward(self, q: Tensor, kv: Tensor, slots: Tensor, lengths: Tensor, cache: tuple[Tensor, ...]) -> Tensor:
        keys, values, key_scale, value_scale, table = cache
        write(kv[0], kv[1], keys, values, key_scale, value_scale, slots, 8)
        return cast(Tensor, attention(q, keys, values, key_scale, value_scale, table[: q.shape[0]], lengths, 0.125, 8))


def step(batch: int) -> tuple[Any, ...]:
    case = make(8, (16, 3, 20), (4, 2))
    cache = (case.keys, case.values, case.key_scale, case.value_scale, case.page_table)
    kv = torch.randn(2, batch, 2, 64, generator=torch.Generator().manual_seed(1)).half()
    slots = case.page_table[:batch, 0].long() * 16 + 1
    return case.q[:batch], kv, slots, case.lengths[:batch], tuple(t.clone() for t in cache)


def test_compile_and_export() -> None:
    compiled = torch.compile(Step(), fullgraph=True, dynamic=True, backend="aot_eager")
    batch = torch.export.Dim("batch", min=1, max=3)
    shapes = ({0: batch}, {1: batch}, {0: batch}, {0: batch}, (None,) * 5)
    exported = torch.export.export(Step(), step(3), dynamic_shapes=shapes).module()
    for size in (3, 2):
        expected, mine, theirs = step(size), step(size), step(size)
        y = Step()(*expected)
        assert torch.equal(compiled(*mine), y) and torch.equal(exported(*theirs), y)
        for a, b, c in zip(expected[4], mine[4], theirs[4], strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.nan_to_num(), c.nan_to_num())


def test_autocast_casts_the_queries() -> None:
    case = make(8)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(*replace(case, q=case.q.float()).arguments).dtype == torch.bfloat16


def test_refusals() -> None:
    case = make(8)

    def fails(number: int, match: str, **changes: Any) -> None:
        for q in (case.q, case.q.to("meta")):
            given = replace(case, **({"q": q} | changes))
            with pytest.raises(UsageError, match=match) as caught:
                attention(*given.arguments)
            assert caught.value.id == f"FXC-USAGE-{number}"

    fails(450, r"q of a paged KV cache is float16 \[4, 256\]", q=case.q.flatten(1))
    fails(450, r"value_scale .* float64", value_scale=case.value_scale.double())
    fails(450, r"page_table .* int64", page_table=case.page_table.long())
    fails(450, r"lengths .* \[3\]", lengths=case.lengths[1:])
    fails(450, r"expected uint8 \[\d+, 16, 2, 32\]", bits=4)
    fails(451, "2-bit", bits=2)
    fails(452, "heads of 40", q=case.q[..., :40], key_scale=case.key_scale[:, :40])
    fails(453, "strides", keys=case.keys.transpose(1, 2).contiguous().transpose(1, 2))
    fails(454, "3 query heads cannot share 2", q=case.q[:, :3])
    fails(455, "window=-1", window=-1)
    fails(455, "softcap=-2", softcap=-2.0)


@pytest.mark.triton
def test_kernel_takes_16_bits_only() -> None:
    with pytest.raises(UsageError, match="expected float16 or bfloat16"):
        launched(replace(make(8), q=make(8).q.float()))


# ------------------------------------------------------------------------------------------------ on a GPU
@pytest.mark.cuda
@pytest.mark.triton
@pytest.mark.parametrize("bits", [8, 4])
def test_graph_and_streams(bits: int) -> None:
    """Capture and replay with new lengths, and the same bits on every stream."""
    case = make(bits, (5, 300, 0, 77), (8, 2), 128).to("cuda")
    expected = attention(*case.arguments)
    assert torch.equal(attention(*case.arguments), expected)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = []
    for stream in streams:
        with torch.cuda.stream(stream):
            results.append(attention(*case.arguments))
    torch.cuda.synchronize()
    assert all(torch.equal(r, expected) for r in results)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention(*case.arguments)
    for lengths in ((5, 300, 0, 77), (1, 16, 0, 2)):
        case.lengths.copy_(torch.tensor(lengths))
        graph.replay()
        assert torch.equal(captured, attention(*case.arguments))
    assert error(captured.cpu(), naive(case.to("cpu"))) < TOLERANCE[torch.float16]


@pytest.mark.cuda
@pytest.mark.triton
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("d", "heads"), [(64, (8, 8)), (80, (4, 4)), (96, (6, 2)), (128, (32, 8)), (256, (20, 1))])
def test_configurations_agree(bits: int, d: int, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is chosen for any batch, and every number of parts."""
    case = make(bits, (513, 1024, 33), heads, d)
    expected = attention(*replace(case, q=case.q.double()).arguments)
    assert error(launched(case), expected) < TOLERANCE[torch.float16]
    for parts in (1, 2, 5, 16):
        configure(monkeypatch, parts)
        assert error(launched(case), expected) < TOLERANCE[torch.float16]
    for dtype, tolerance in TOLERANCE.items():
        given = replace(case, q=case.q.to(dtype), softcap=20.0)
        assert error(launched(given), attention(*replace(given, q=given.q.double()).arguments)) < tolerance


@pytest.mark.cuda
@pytest.mark.triton
def test_offsets_past_31_bits() -> None:
    """The last page of a cache of 2.2e9 bytes, written and read."""
    pages, page_size, heads, d = 135_000, 16, 8, 128
    keys, values = (torch.zeros(pages, page_size, heads, d, dtype=torch.int8, device="cuda") for _ in range(2))
    value_scale = torch.zeros(pages, page_size, heads, device="cuda")
    key_scale = torch.full((heads, d), 0.05, device="cuda")
    k, v = torch.randn(2, 16, heads, d, device="cuda", dtype=torch.float16)
    slots = (pages - 1) * page_size + torch.arange(16, device="cuda")
    write(k, v, keys, values, key_scale, value_scale, slots, 8)
    assert keys[0].count_nonzero() == 0 and keys[-1].count_nonzero() > 0
    table = torch.tensor([[pages - 1]], dtype=torch.int32, device="cuda")
    q = torch.randn(1, 8, d, device="cuda", dtype=torch.float16)
    short = (keys[-1:].clone(), values[-1:].clone(), key_scale, value_scale[-1:].clone(), table * 0)
    lengths = torch.tensor([16], dtype=torch.int32, device="cuda")
    expected = attention(q, *short, lengths, 0.1, 8)
    assert torch.equal(attention(q, keys, values, key_scale, value_scale, table, lengths, 0.1, 8), expected)


# ------------------------------------------------------------------------------------------------ configurations
@pytest.mark.triton
def test_choice() -> None:
    from fxcompress.kernels.paged_attention_triton import choose, compile_cases

    problem = Problem("paged_attention_int8", 8, 128, 8192, torch.float16, 4)
    for gpu in ASSUMED.values():
        alone = choose(problem, gpu)
        assert alone.split_k > 1 and 8192 // alone.split_k >= 256
        assert choose(replace(problem, m=8192), gpu).split_k == 1
        assert choose(replace(problem, k=100), gpu).split_k == 1
        parts = {choose(replace(problem, m=m), gpu).split_k for m in range(1, 2000)}
        assert len(parts) < 10, "each costs nothing to compile, but results differ in the last bits"
        assert choose(replace(problem, family="paged_attention_int4", n=64), gpu).num_warps == 1
    for sm in ASSUMED:
        names = [case.name for case in compile_cases(sm)]
        assert len(set(names)) == len(names) > 15
