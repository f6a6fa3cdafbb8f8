"""The kernels that are no plain matrix products: quantization, convolution, attention over a quantized cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.kernel_measure import Bench, Ceilings, Row, difference, last_line, times
from fxcompress.ops import kernel_op
from fxcompress.tuning import exact_reference, relative_error

__all__ = ["Other", "measure_other", "others"]


@dataclass(frozen=True)
class Other:
    """One thing to measure.

    Attributes:
        op: The operator.
        case: Its sizes, in words.
        make: Gives its arguments, new ones each time.
        bytes: Read and written at least.
        operations: Integer or float operations; 0 where memory decides.
        peer: Name of what it is compared with.
        make_peer: Gives a call of that, on data of its own.
    """

    op: str
    case: str
    make: Callable[[], tuple[Any, ...]]
    bytes: float
    operations: float
    peer: str
    make_peer: Callable[[], Callable[[], Any]]


def others(place: str, *, tiny: bool) -> Iterator[Other]:
    """Everything to measure, the smallest first; ``tiny`` for a dry run."""
    for tokens, width in ((3, 64),) if tiny else ((1, 8192), (64, 8192), (4096, 8192)):
        yield from _rows(place, tokens, width)
    for bits in (8, 4):
        for batch, length in ((2, 40),) if tiny else ((1, 8192), (32, 4096)):
            yield _attention(place, bits, batch, length, 64 if tiny else 128)
    sizes = ((1, 16, 8, 3),) if tiny else ((32, 64, 56, 3), (32, 256, 14, 3), (32, 1024, 14, 1))
    for images, channels, side, kernel in sizes:
        yield _convolution(place, images, channels, side, kernel)


def _rows(place: str, tokens: int, width: int) -> Iterator[Other]:
    half = partial(torch.randn, device=place, dtype=torch.float16)
    case, moved = f"{tokens} x {width}", tokens * (3.0 * width + 4)

    def eager() -> Callable[[], Any]:
        x = half(tokens, width)
        return lambda: (x / x.abs().amax(-1, keepdim=True) * 127).round().to(torch.int8)

    def norm() -> Callable[[], Any]:
        x, w = half(tokens, width), half(width)
        return lambda: F.rms_norm(x, (width,), w)

    def gate() -> Callable[[], Any]:
        x, y = half(tokens, width), half(tokens, width)
        return lambda: F.silu(x) * y

    yield Other("quantize_per_token", case, lambda: (half(tokens, width),), moved, 0, "eager", eager)
    make_norm = lambda: (half(tokens, width), half(width), 1e-6)  # noqa: E731
    yield Other("rms_norm_quantize", case, make_norm, moved + 2 * width, 0, "rms_norm alone, 16 bits", norm)
    make_gate = lambda: (half(tokens, width), half(tokens, width))  # noqa: E731
    yield Other("silu_mul_quantize", case, make_gate, moved + 2.0 * tokens * width, 0, "silu and product alone", gate)


def _attention(place: str, bits: int, batch: int, length: int, d: int) -> Other:
    heads, kv_heads, page = (4, 2, 16) if d == 64 else (32, 8, 16)
    pages = -(-length // page)

    def make() -> tuple[Any, ...]:
        shape = (batch * pages, page, kv_heads, d * bits // 8)
        dtype, low, high = (torch.int8, -127, 128) if bits == 8 else (torch.uint8, 0, 256)
        keys, values = (torch.randint(low, high, shape, dtype=dtype, device=place) for _ in range(2))
        key_scale = torch.rand(kv_heads, d, device=place) * 0.02
        value_scale = torch.rand(shape[:3], device=place) * 0.02
        table = torch.randperm(batch * pages, device=place).to(torch.int32).reshape(batch, pages)
        lengths = torch.full((batch,), length, dtype=torch.int32, device=place)
        q = torch.randn(batch, heads, d, device=place).half()
        return q, keys, values, key_scale, value_scale, table, lengths, d**-0.5, bits

    def dense() -> Callable[[], Any]:
        q = torch.randn(batch, heads, 1, d, device=place).half()
        k, v = (torch.randn(batch, kv_heads, length, d, device=place).half() for _ in range(2))
        return lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    moved = 2.0 * batch * length * kv_heads * d * bits / 8 + 4.0 * batch * length * kv_heads
    case = f"INT{bits}, {batch} sequences of {length}, {heads}/{kv_heads} heads of {d}"
    return Other("paged_attention", case, make, moved, 0, "SDPA, 16-bit cache", dense)


def _convolution(place: str, images: int, channels: int, side: int, kernel: int) -> Other:
    pad = kernel // 2
    count = images * channels * side * side

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-127, 128, shape, dtype=torch.int8, device=place)

    def make() -> tuple[Any, ...]:
        x = integers(images, channels, side, side).to(memory_format=torch.channels_last)
        scale = torch.full((1,), 0.01, device=place)
        scales = torch.rand(channels, device=place) * 0.002 + 0.001
        weight = integers(channels, kernel, kernel, channels)
        return x, weight, scale, scales, None, None, [1, 1], [pad, pad], [1, 1], 1, torch.float16

    def dense() -> Callable[[], Any]:
        last = torch.channels_last
        x = torch.randn(images, channels, side, side, device=place).half().to(memory_format=last)
        w = torch.randn(channels, channels, kernel, kernel, device=place).half().to(memory_format=last)
        return lambda: F.conv2d(x, w, padding=pad)

    moved, work = 3.0 * count + (channels * kernel) ** 2, 2.0 * count * channels * kernel**2
    case = f"{images} x {channels} x {side} x {side}, {kernel} x {kernel}"
    return Other("conv2d_w8a8", case, make, moved, work, "cuDNN, 16 bits", dense)


def measure_other(other: Other, bench: Bench, roof: Ceilings) -> Row:
    """Error and times of one of them, with its peer's."""
    op = kernel_op(other.op)
    floor = max(other.bytes / roof.copy, other.operations / roof.int8) * 1e6
    row: Row = {"op": other.op, "case": other.case, "floor_us": floor, "us": None, "eager_us": None, "speedup": None}
    try:
        count = 1 + -(-3 * bench.cache // int(other.bytes)) if bench.cache else 1
        sets = [other.make() for _ in range(min(count, 64))]
        found, wanted = op.launch(*sets[0]), exact_reference(op, *sets[0])
        row |= {"error": relative_error(found, wanted), "status": difference(op, found, wanted) or "ok"}
        del found, wanted
        row |= times([partial(op.launch, *s) for s in sets], bench)
        row["share"] = floor / row["us"]
        del sets
        row["peers"] = {other.peer: times([other.make_peer() for _ in range(min(count, 64))], bench)}
        row["speedup"] = row["peers"][other.peer]["us"] / row["us"]
    except Exception as error:  # noqa: BLE001 - whatever a kernel raises is its result; the other rows go on
        row["status"] = f"{type(error).__name__}: {last_line(error)}"
    return row
