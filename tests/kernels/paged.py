"""Cases of attention over a paged KV cache, and its definition."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fxcompress.kernels.paged_attention import pack_nibbles
from tests.kernels.cases import device

TOLERANCE = {torch.float16: 5e-4, torch.bfloat16: 4e-3}
ARGUMENTS = (
    "q", "keys", "values", "key_scale", "value_scale", "page_table", "lengths", "scale", "bits", "key_zero", "window",
    "softcap",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Arguments of ``paged_attention``."""

    q: Tensor
    keys: Tensor
    values: Tensor
    key_scale: Tensor
    value_scale: Tensor
    page_table: Tensor
    lengths: Tensor
    scale: float
    bits: int
    key_zero: Tensor | None = None
    window: int = 0
    softcap: float = 0.0

    @property
    def arguments(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in ARGUMENTS)

    def to(self, where: str) -> Case:
        moved = {n: v.to(where) for n in ARGUMENTS if isinstance(v := getattr(self, n), Tensor)}
        return replace(self, **cast("dict[str, Any]", moved))


def make(
    bits: int = 8,
    lengths: tuple[int, ...] = (0, 1, 16, 37),
    heads: tuple[int, int] = (4, 2),
    d: int = 64,
    page_size: int = 16,
    dtype: torch.dtype = torch.float16,
    zero: bool = False,
    room: int = 1,
    **options: Any,
) -> Case:
    """A random cache; whatever no sequence owns is poisoned: scales NaN, page numbers far outside."""
    random = torch.Generator().manual_seed(sum(lengths) + 1000 * bits + d)
    top = 127 if bits == 8 else 7
    needed = [-(-n // page_size) for n in lengths]
    pages = sum(needed) + 2
    shape = (pages, page_size, heads[1], d)
    keys, values = (torch.randint(-top - 1, top + 1, shape, generator=random, dtype=torch.int8) for _ in range(2))
    value_scale = torch.full(shape[:3], torch.nan)
    table = torch.full((len(lengths), max(needed, default=0) + room), 2**30, dtype=torch.int32)
    free = iter(torch.randperm(pages, generator=random).tolist())
    for b, n in enumerate(lengths):
        for i in range(needed[b]):
            table[b, i] = page = next(free)
            rows = min(page_size, n - i * page_size)
            value_scale[page, :rows] = torch.rand(rows, heads[1], generator=random) * 3 / top + 0.1 / top
    q = torch.randn(len(lengths), heads[0], d, generator=random).to(dtype)
    key_scale = (torch.rand(heads[1], d, generator=random) + 0.1) * 3 / top
    key_zero = torch.randint(-top, top, key_scale.shape, generator=random).float() * 0.5 if zero else None
    stored = (pack_nibbles(keys), pack_nibbles(values)) if bits == 4 else (keys, values)
    lengths_ = torch.tensor(lengths, dtype=torch.int32)
    return Case(q, *stored, key_scale, value_scale, table, lengths_, d**-0.5, bits, key_zero, **options)


def naive(case: Case) -> Tensor:
    """The definition in float64, token by token; nibbles taken apart by hand."""
    q, table = case.q.double(), case.page_table.tolist()
    batch, heads, d = q.shape
    kv_heads, page_size = case.keys.shape[2], case.keys.shape[1]
    zero = torch.zeros_like(case.key_scale) if case.key_zero is None else case.key_zero

    def integers(cache: Tensor, page: int, row: int, head: int) -> Tensor:
        stored = cache[page, row, head].tolist()
        if case.bits == 4:
            stored = [byte % 16 - 8 for byte in stored] + [byte // 16 - 8 for byte in stored]
        return torch.tensor(stored, dtype=torch.float64)

    out = torch.zeros(batch, heads, d, dtype=torch.float64)
    for b, h in itertools.product(range(batch), range(heads)):
        g = h // (heads // kv_heads)
        scores, rows = [], []
        length = int(case.lengths[b])
        for t in range(max(0, length - case.window) if case.window else 0, length):
            page, row = table[b][t // page_size], t % page_size
            k = (integers(case.keys, page, row, g) - zero[g].double()) * case.key_scale[g].double()
            score = float(q[b, h] @ k) * case.scale
            scores.append(case.softcap * np.tanh(score / case.softcap) if case.softcap else score)
            rows.append(integers(case.values, page, row, g) * case.value_scale[page, row, g].double())
        if scores:
            out[b, h] = torch.softmax(torch.tensor(scores, dtype=torch.float64), 0) @ torch.stack(rows)
    return out


def launched(case: Case) -> Tensor:
    """What the kernel makes of a case: on the GPU, else in the interpreter."""
    from fxcompress.kernels import paged_attention_triton

    return paged_attention_triton.attention(*case.to(device()).arguments).cpu()
