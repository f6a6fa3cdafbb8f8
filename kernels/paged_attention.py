"""Decode attention over a paged KV cache of 8-bit or 4-bit integers, and writing into that cache.

The cache of one layer is two tensors [pages, page_size, Hkv, width]: int8 with ``width = D``, or uint8 with ``width =
D / 2``, where byte ``i`` holds elements ``i`` (low nibble) and ``D / 2 + i`` (high nibble) of a head, each plus 8. Keys
are quantized per channel (their outliers lie in a few channels), values per token (KIVI, Liu et al. 2024, section 3):

    key = (integer - key_zero) * key_scale        value = integer * value_scale

A sequence's token ``t`` lies in page ``page_table[b, t // page_size]``, row ``t % page_size``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import Tensor

from fxcompress.errors import UsageError
from fxcompress.ops import KernelOp, register

__all__ = ["check_attention", "check_write", "pack_nibbles", "unpack_nibbles"]

_FLOATS: Final = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_STORED: Final = {8: torch.int8, 4: torch.uint8}
_LARGEST_HEAD: Final = 256


def pack_nibbles(q: Tensor) -> Tensor:
    """Integers -8 to 7, [..., D] -> uint8 [..., D / 2]: the first half in the low nibbles, the second in the high."""
    low, high = ((q.to(torch.int16) + 8) & 15).chunk(2, -1)
    return (low | (high << 4)).to(torch.uint8)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Inverse of `pack_nibbles`: int8 [..., D]."""
    words = packed.to(torch.int16)
    return (torch.cat((words & 15, words >> 4), -1) - 8).to(torch.int8)


def _expect(name: str, value: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    if tuple(value.shape) != shape or value.dtype not in dtypes:
        raise UsageError(
            450,
            f"{name} of a paged KV cache is {str(value.dtype).removeprefix('torch.')} {list(value.shape)}",
            why=f"expected {' or '.join(str(d).removeprefix('torch.') for d in dtypes)} {list(shape)}",
            fix="see fxcompress.kernels.paged_attention for the layout",
        )


def _check_cache(keys: Tensor, values: Tensor, value_scale: Tensor, heads: int, d: int, bits: int) -> None:
    """Raise UsageError unless the three tensors are a cache of ``heads`` heads of ``d`` elements."""
    if bits not in _STORED:
        raise UsageError(451, f"a KV cache cannot hold {bits}-bit integers", fix="use bits=8 or bits=4")
    if d % 16 or not 0 < d <= _LARGEST_HEAD:
        raise UsageError(
            452,
            f"the KV cache kernels do not take heads of {d} elements",
            fix=f"use 16, 32, 48, ... {_LARGEST_HEAD} elements",
        )
    pages, page_size = (keys.shape[0], keys.shape[1]) if keys.dim() == 4 else (0, 0)
    shape = (pages, page_size, heads, d * bits // 8)
    _expect("keys", keys, shape, (_STORED[bits],))
    _expect("values", values, shape, (_STORED[bits],))
    _expect("value_scale", value_scale, shape[:3], (torch.float32,))
    for name, tensor in (("keys", keys), ("values", values), ("value_scale", value_scale)):
        dense = 1
        for size, stride in zip(reversed(tensor.shape[1:]), reversed(tensor.stride()[1:]), strict=True):
            if size != 1 and stride != dense:
                raise UsageError(
                    453,
                    f"the pages of {name} have strides {tensor.stride()[1:]}",
                    why=f"a page of shape {list(tensor.shape[1:])} must lie in one piece, and a cache is never copied",
                )
            dense *= size


def _check_key_grid(key_scale: Tensor, key_zero: Tensor | None, heads: int, d: int) -> None:
    _expect("key_scale", key_scale, (heads, d), _FLOATS)
    if key_zero is not None:
        _expect("key_zero", key_zero, (heads, d), _FLOATS)


def check_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scale: Tensor,
    value_scale: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    bits: int,
    key_zero: Tensor | None,
    window: int,
    softcap: float,
    dtypes: tuple[torch.dtype, ...] = _FLOATS,
) -> None:
    """Raise UsageError unless the arguments of ``paged_attention`` fit together."""
    if q.dim() != 3:
        _expect("q", q, (-1, -1, -1), dtypes)
    batch, heads, d = q.shape
    _expect("q", q, (batch, heads, d), dtypes)
    kv_heads = key_scale.shape[0] if key_scale.dim() == 2 else 0
    _check_key_grid(key_scale, key_zero, kv_heads, d)
    _check_cache(keys, values, value_scale, kv_heads, d, bits)
    if kv_heads == 0 or heads % kv_heads:
        raise UsageError(454, f"{heads} query heads cannot share {kv_heads} key heads evenly")
    _expect("page_table", page_table, (batch, page_table.shape[-1]), (torch.int32,))
    _expect("lengths", lengths, (batch,), (torch.int32,))
    if window < 0 or softcap < 0:
        raise UsageError(455, f"window={window}, softcap={softcap}: neither may be negative", fix="0 means without")


def check_write(
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scale: Tensor,
    value_scale: Tensor,
    slots: Tensor,
    bits: int,
    key_zero: Tensor | None,
) -> None:
    """Raise UsageError unless the arguments of ``paged_cache_write`` fit together."""
    if k.dim() != 3:
        _expect("k", k, (-1, -1, -1), _FLOATS)
    tokens, heads, d = k.shape
    _expect("k", k, (tokens, heads, d), _FLOATS)
    _expect("v", v, (tokens, heads, d), _FLOATS)
    _check_key_grid(key_scale, key_zero, heads, d)
    _check_cache(keys, values, value_scale, heads, d, bits)
    _expect("slots", slots, (tokens,), (torch.int64,))


def _integers(stored: Tensor, bits: int) -> Tensor:
    return unpack_nibbles(stored) if bits == 4 else stored


def _attention_reference(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scale: Tensor,
    value_scale: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    scale: float,
    bits: int,
    key_zero: Tensor | None = None,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Attention of one new token per sequence over its quantized, paged keys and values.

    ``softmax(scale * q k^T) v`` with ``k`` and ``v`` dequantized as the module says; sums in float32 (float64 when ``q``
    is float64).

    Args:
        q: float16 or bfloat16 [B, H, D] (float32, float64: the reference only); D a multiple of 16, 256 at most.
        keys: int8 [pages, page_size, Hkv, D] or uint8 [pages, page_size, Hkv, D / 2]; H is a multiple of Hkv, and
            query heads ``i * H / Hkv`` to ``(i + 1) * H / Hkv - 1`` read key head ``i``.
        values: Like ``keys``.
        key_scale: Float [Hkv, D].
        value_scale: float32 [pages, page_size, Hkv].
        page_table: int32 [B, max_pages]; entries past a sequence's last page are not read.
        lengths: int32 [B]: tokens of each sequence. 0: the result is 0. More than ``max_pages * page_size``: NaN.
        scale: Of the scores, ``1 / sqrt(D)`` as a rule.
        bits: 8 or 4.
        key_zero: Float [Hkv, D], in steps of ``key_scale``; None: 0.
        window: Only the last ``window`` tokens are attended to; 0: all.
        softcap: Scores become ``softcap * tanh(score / softcap)`` (Gemma 2); 0: they stay.

    Returns:
        [B, H, D] in the dtype of ``q``.
    """
    check_attention(q, keys, values, key_scale, value_scale, page_table, lengths, bits, key_zero, window, softcap)
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    kv_heads, d = key_scale.shape
    page_size = keys.shape[1]
    grid = key_scale.to(work)
    zero = torch.zeros_like(grid) if key_zero is None else key_zero.to(work)
    grouped = q.to(work).reshape(q.shape[0], kv_heads, q.shape[1] // kv_heads, d)
    out = torch.zeros(grouped.shape, dtype=work, device=q.device)
    for b, length in enumerate(lengths.tolist()):
        if length > page_table.shape[1] * page_size:
            out[b] = torch.nan
        elif length > 0:
            t = torch.arange(max(length - window, 0) if window else 0, length, device=q.device)
            page, row = page_table[b, t // page_size].long(), t % page_size
            k = (_integers(keys[page, row], bits).to(work) - zero) * grid
            v = _integers(values[page, row], bits).to(work) * value_scale[page, row].to(work)[..., None]
            scores = torch.einsum("hgd,thd->hgt", grouped[b], k) * scale
            if softcap > 0:
                scores = softcap * torch.tanh(scores / softcap)
            out[b] = torch.einsum("hgt,thd->hgd", scores.softmax(-1), v)
    return out.reshape(q.shape).to(q.dtype)


def _attention_fake(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scale: Tensor,
    value_scale: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    scale: float,
    bits: int,
    key_zero: Tensor | None = None,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    check_attention(q, keys, values, key_scale, value_scale, page_table, lengths, bits, key_zero, window, softcap)
    return q.new_empty(q.shape)


def _write_reference(
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scale: Tensor,
    value_scale: Tensor,
    slots: Tensor,
    bits: int,
    key_zero: Tensor | None = None,
) -> None:
    """Quantize new tokens and write them into the cache; ``keys``, ``values`` and ``value_scale`` change in place.

    Keys become ``round(k / key_scale + key_zero)``, values ``round(v / s)`` with ``s = max |v| / 127`` (``/ 7`` for 4
    bits) of the token's head, which goes to ``value_scale``; rounded half to even, clamped to -128..127 (-8..7). All
    arithmetic is float32, so every device stores the same integers.

    Args:
        k: Any float dtype [T, Hkv, D].
        v: Like ``k``.
        keys: As in ``paged_attention``.
        values: As in ``paged_attention``.
        key_scale: As in ``paged_attention``.
        value_scale: As in ``paged_attention``.
        slots: int64 [T]: ``page * page_size + row`` of each token, no slot twice. Slots outside the cache are skipped,
            -1 for example.
        bits: 8 or 4.
        key_zero: As in ``paged_attention``.
    """
    check_write(k, v, keys, values, key_scale, value_scale, slots, bits, key_zero)
    low, high = (-128, 127) if bits == 8 else (-8, 7)
    used = (slots >= 0) & (slots < keys.shape[0] * keys.shape[1])
    page, row = slots[used] // keys.shape[1], slots[used] % keys.shape[1]
    zero = torch.zeros_like(key_scale) if key_zero is None else key_zero
    key = torch.round(k[used].float() / key_scale.float() + zero.float()).clamp(low, high)
    value = v[used].float()
    step = value.abs().amax(-1) / high
    value = torch.round(value / torch.where(step > 0, step, 1.0)[..., None]).clamp(low, high)
    pack = pack_nibbles if bits == 4 else lambda q: q.to(torch.int8)
    keys[page, row] = pack(key)
    values[page, row] = pack(value)
    value_scale[page, row] = step


def _write_fake(
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scale: Tensor,
    value_scale: Tensor,
    slots: Tensor,
    bits: int,
    key_zero: Tensor | None = None,
) -> None:
    check_write(k, v, keys, values, key_scale, value_scale, slots, bits, key_zero)


def _cache(device: str, bits: int, pages: int, page_size: int, heads: int, d: int) -> tuple[Tensor, ...]:
    """A random cache: keys, values, key_scale, value_scale."""
    random = torch.Generator().manual_seed(bits)
    shape = (pages, page_size, heads, d)
    low, high = (-127, 128) if bits == 8 else (-7, 8)
    keys, values = (torch.randint(low, high, shape, generator=random, dtype=torch.int8) for _ in range(2))
    if bits == 4:
        keys, values = pack_nibbles(keys), pack_nibbles(values)
    key_scale = (torch.rand(heads, d, generator=random) + 0.5) * 2 / high
    value_scale = (torch.rand(shape[:3], generator=random) + 0.5) * 2 / high
    return tuple(t.to(device) for t in (keys, values, key_scale, value_scale))


def _attention_samples(device: str) -> Iterable[tuple[Any, ...]]:
    for bits, heads, kv_heads, d in ((8, 8, 2, 64), (4, 3, 3, 80)):
        cache = _cache(device, bits, 12, 16, kv_heads, d)
        table = torch.randperm(12, generator=torch.Generator().manual_seed(1)).to(torch.int32).reshape(3, 4).to(device)
        lengths = torch.tensor([0, 33, 64], dtype=torch.int32, device=device)
        q = torch.randn(3, d, heads, generator=torch.Generator().manual_seed(2)).to(device, torch.float16).mT
        yield q, *cache, table, lengths, d**-0.5, bits
        yield q[:0], *cache, table[:0], lengths[:0], d**-0.5, bits


def _write_samples(device: str) -> Iterable[tuple[Any, ...]]:
    for bits in (8, 4):
        keys, values, key_scale, value_scale = _cache(device, bits, 3, 16, 2, 64)
        k, v = torch.randn(2, 5, 2, 64, generator=torch.Generator().manual_seed(3)).to(device, torch.float16)
        slots = torch.tensor([7, 40, -1, 0, 16], device=device)
        yield k, v, keys, values, key_scale, value_scale, slots, bits


register(
    KernelOp(
        name="paged_attention",
        reference=_attention_reference,
        fake=_attention_fake,
        launcher="fxcompress.kernels.paged_attention_triton:attention",
        autocast=("q",),
        samples=_attention_samples,
    )
)
register(
    KernelOp(
        name="paged_cache_write",
        reference=_write_reference,
        fake=_write_fake,
        launcher="fxcompress.kernels.paged_cache_triton:write",
        mutates=("keys", "values", "value_scale"),
        samples=_write_samples,
    )
)
