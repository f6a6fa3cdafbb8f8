"""Small kernels for `benchmarks.kernel_lint`: one that is right, and one for everything that can be wrong."""

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from fxcompress.kernels.epilogue_triton import CompileCase


@triton.jit
def product(x, w, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        a = tl.load(x + m[:, None] * K + start + k[None, :])
        b = tl.load(w + n[None, :] * K + start + k[:, None]).to(tl.float16)
        acc = tl.dot(a, b, acc)
    tl.store(c + m[:, None] * BN + n[None, :], acc.to(tl.float16))


@triton.jit
def total(x, c, K, BK: tl.constexpr):
    k = tl.arange(0, BK)
    acc = tl.zeros((BK,), tl.float32)
    for start in range(0, K, BK):
        acc += tl.load(x + start + k)
    tl.store(c + k, acc)


def case(name: str, kernel: Callable[..., Any], blocks: tuple[int, int, int], **changes: Any) -> CompileCase:
    signature = {"x": "*fp16", "w": "*fp16", "c": "*fp16", "K": "i32"} | changes.pop("signature", {})
    constants = dict(zip(("BM", "BN", "BK"), blocks, strict=True))
    facts = {"num_stages": 3, "weights": blocks[1] * blocks[2], "mma": ("HMMA",), "budget": 8.0} | changes
    return CompileCase(name, "toy", kernel, signature, constants, **facts)


def compile_cases(sm: int) -> list[CompileCase]:
    sums = {"x": "*fp16", "c": "*fp32", "K": "i32"}
    right = (64, 64, 64)
    return [
        case("right", product, right),
        case("same code under another name", product, right),
        case("integers converted", product, right, signature={"w": "*i8"}, budget=None),
        case("one warp", product, (128, 128, 32), num_warps=1, budget=None),
        case("unaligned", product, right, unaligned=("x", "w"), budget=None),
        case("deep", product, (64, 64, 128), num_stages=7),
        case("tight budget", product, right, signature={"c": "*bf16"}, budget=1.0),
        case("wrong unit", product, (64, 64, 32), mma=("IMMA",)),
        CompileCase("no products", "toy", total, sums, {"BK": 1024}, mma=("HMMA",), asynchronous=False),
        case("odd block", product, (64, 64, 65)),
    ]
