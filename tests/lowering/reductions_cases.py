"""Reductions, softmax, pools, resizing and attention in the engines equal torch eager."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.lowering_cases import bools, case, floats, ints, positive

X = floats(2, 3, 4, 5)
P = positive(2, 3, 4)
I = ints(2, 3, 4)  # noqa: E741
B = bools(2, 3, 4)
DISTINCT = torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(i)) for i in range(2)]).view(2, 3, 4)

REDUCTIONS = [
    *(
        case(f"{n} {label}", lambda x, n=n, a=args: getattr(torch, n)(x, *a), X)
        for n in ("mean", "sum", "amax", "amin")
        for label, args in (
            ("of the last", (-1,)),
            ("of two, kept", ((2, -1), True)),
            ("of all but the batch", ((1, 2, 3),)),
        )
    ),
    case("mean of everything", torch.mean, X),
    case("sum of everything", torch.sum, X),
    case("sum over the batch", lambda x: x.sum(0), X),
    case("amax of everything", torch.amax, X),
    case("sum of integers", lambda x: x.sum(1), I),
    case("sum of booleans counts", lambda x: x.sum(-1), B),
    case("mean in another type", lambda x: x.mean(1, dtype=torch.float32), I),
    case("sum as floats", lambda x: x.sum(1, dtype=torch.float32), I),
    case("prod", lambda x: x.prod(-1), P),
    case("prod kept", lambda x: x.prod(1, keepdim=True), P),
    case("max of everything", torch.max, P),
    case("min of everything", torch.min, P),
    case("max with index", lambda x: torch.max(x, -1), DISTINCT.float()),
    case("min with index, kept", lambda x: torch.min(x, 1, keepdim=True), DISTINCT.float()),
    case("argmax", lambda x: x.argmax(-1), DISTINCT.float()),
    case("argmin kept", lambda x: x.argmin(1, keepdim=True), DISTINCT.float()),
    case("argmax of everything", lambda x: (x + torch.arange(4) / 8).argmax(), P),
    case("argmax of everything, kept", lambda x: x.argmax(keepdim=True), P),
    case("any", lambda x: (x > 1).any(-1), P),
    case("any kept", lambda x: (x > 1).any(1, keepdim=True), P),
    case("all of everything", lambda x: (x > 0).all(), P),
    case("any of everything", lambda x: (x > 2).any(), P),
    case("all of integers", lambda x: x.all(-1), I),
    case("cumsum", lambda x: x.cumsum(-1), X),
    case("cumsum of booleans", lambda x: x.cumsum(1), B),
    case("logsumexp", lambda x: torch.logsumexp(x, -1), X),
    case("logsumexp of large numbers, kept", lambda x: torch.logsumexp(x * 100, (1, 2), keepdim=True), X),
]

SPREADS = [
    case("var", lambda x: x.var(-1), X),
    case("var biased", lambda x: x.var((1, -1), unbiased=False), X),
    case("var with correction, kept", lambda x: x.var((2, 3), correction=2, keepdim=True), X),
    case("std", lambda x: x.std(1), X),
    case("var_mean", lambda x: torch.var_mean(x, -1, correction=0), X),
    case("std_mean kept", lambda x: torch.std_mean(x, (1, 2), keepdim=True), X),
    case("norm", lambda x: x.norm(dim=-1), X),
    case("norm 1, kept", lambda x: x.norm(p=1, dim=1, keepdim=True), X),
    case("vector norm", lambda x: torch.linalg.vector_norm(x, dim=(1, 2)), X),
    case("vector norm of everything", torch.linalg.vector_norm, X),
    case("largest norm", lambda x: torch.linalg.vector_norm(x, ord=float("inf"), dim=-1), X),
    case("normalize", lambda x: F.normalize(x, dim=1), X),
]

SOFTMAX = [
    case("softmax", lambda x: x.softmax(-1), X),
    case("softmax of the middle", lambda x: x.softmax(1), X),
    case("softmax in another type", lambda x: F.softmax(x, -1, dtype=torch.float64), X),
    case("softmax of integers as floats", lambda x: F.softmax(x, -1, dtype=torch.float32), I),
    case("log_softmax", lambda x: x.log_softmax(1), X),
    case("softmin", lambda x: F.softmin(x, -1), X),
    case("topk", lambda x: x.topk(2, -1), DISTINCT.float()),
    case("topk smallest of the middle", lambda x: x.topk(2, 1, largest=False), DISTINCT.float()),
    case("topk of integers", lambda x: x.topk(3), DISTINCT),
    case("sort", lambda x: x.sort(-1), DISTINCT.float()),
    case("argsort descending", lambda x: x.argsort(-1, descending=True), DISTINCT.float()),
]

L, Q, V = floats(2, 3, 11), floats(2, 3, 9, 11), floats(2, 3, 5, 6, 7)

POOLS = [
    case("max pool", lambda x: F.max_pool2d(x, 2), Q),
    case("max pool 1d", lambda x: F.max_pool1d(x, 3, 2, 1), L),
    case("max pool 3d", lambda x: F.max_pool3d(x, (2, 1, 3), (1, 2, 2)), V),
    case("max pool with padding, dilated", lambda x: F.max_pool2d(x, (3, 2), 2, 1, (1, 2)), Q),
    case("max pool ceil", lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True), Q),
    case("max pool ceil without a last window", lambda x: F.max_pool2d(x, 2, 3, 1, ceil_mode=True), Q),
    case("max pool ceil 1d", lambda x: F.max_pool1d(x, 2, 2, 0, ceil_mode=True), L),
    case("average pool", lambda x: F.avg_pool2d(x, 3, 2), Q),
    case("average pool 1d", lambda x: F.avg_pool1d(x, 3, 2, 1), L),
    case("average pool 3d", lambda x: F.avg_pool3d(x, 2), V),
    case("average pool counting padding", lambda x: F.avg_pool2d(x, 3, 2, 1), Q),
    case("average pool not counting padding", lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), Q),
    case("average pool ceil", lambda x: F.avg_pool2d(x, 2, 2, 0, ceil_mode=True), Q),
    case("average pool ceil, not counting", lambda x: F.avg_pool2d(x, 3, 2, 1, True, False), Q),
    case("average pool ceil 1d", lambda x: F.avg_pool1d(x, 3, 2, ceil_mode=True), L),
    case("average pool ceil, counting", lambda x: F.avg_pool2d(x, 2, 3, 1, ceil_mode=True), Q),
    case("average pool with a divisor", lambda x: F.avg_pool2d(x, 2, divisor_override=3), Q),
    case("average pool with a divisor, padded, ceil", lambda x: F.avg_pool2d(x, 2, 3, 1, True, True, 3), Q),
    case("global average", lambda x: F.adaptive_avg_pool2d(x, 1), Q),
    case("global max", lambda x: F.adaptive_max_pool2d(x, 1), Q),
    case("global average 1d", lambda x: F.adaptive_avg_pool1d(x, 1), L),
    case("adaptive average", lambda x: F.adaptive_avg_pool2d(x, (3, 11)), Q),
    case("adaptive average of uneven windows", lambda x: F.adaptive_avg_pool2d(x, (2, 3)), Q, exporter=True),
    case("adaptive average keeping a size", lambda x: F.adaptive_avg_pool2d(x, (None, 1)), Q),
    case("adaptive max", lambda x: F.adaptive_max_pool2d(x, (3, 1)), Q),
    case("adaptive max of the same size", lambda x: F.adaptive_max_pool1d(x, 11), L),
    case("adaptive average 3d", lambda x: F.adaptive_avg_pool3d(x, (5, 2, 1)), V),
]


def resize(x: Tensor, **options: Any) -> Tensor:
    return F.interpolate(x, **options)


RESIZING = [
    case("nearest by a factor", lambda x: resize(x, scale_factor=2), Q),
    case("nearest to a size", lambda x: resize(x, size=(5, 17)), Q),
    case("nearest 1d", lambda x: resize(x, scale_factor=3), L),
    case("nearest 3d", lambda x: resize(x, scale_factor=2), V),
    case("nearest by odd factors", lambda x: resize(x, scale_factor=(1.5, 0.7)), Q),
    case("nearest exact", lambda x: resize(x, size=(5, 17), mode="nearest-exact"), Q),
    case("bilinear", lambda x: resize(x, scale_factor=2, mode="bilinear"), Q),
    case("bilinear with corners", lambda x: resize(x, size=(13, 5), mode="bilinear", align_corners=True), Q),
    case("bilinear to one row", lambda x: resize(x, size=(1, 5), mode="bilinear"), Q),
    case("bilinear by odd factors", lambda x: resize(x, scale_factor=(1.7, 0.6), mode="bilinear"), Q),
    case("linear", lambda x: resize(x, size=7, mode="linear"), L),
    case("trilinear", lambda x: resize(x, scale_factor=2, mode="trilinear"), V),
    case("bicubic", lambda x: resize(x, scale_factor=2, mode="bicubic"), Q),
    case("bicubic with corners", lambda x: resize(x, size=(12, 7), mode="bicubic", align_corners=True), Q),
    case("pixel shuffle", lambda x: F.pixel_shuffle(x, 2), floats(2, 8, 3, 5)),
    case("pixel unshuffle", lambda x: F.pixel_unshuffle(x, 2), floats(2, 2, 6, 4)),
]

QUERY, KEY, VALUE = floats(2, 4, 5, 8), floats(2, 4, 7, 8, seed=1), floats(2, 4, 7, 6, seed=2)
SELF = floats(2, 4, 5, 8, seed=3)
FEW_K, FEW_V = floats(2, 2, 5, 8, seed=4), floats(2, 2, 5, 8, seed=5)
MASK = bools(2, 1, 5, 7) | (torch.arange(7) == 3)
BIAS = floats(2, 1, 5, 7)
EMPTY_ROW = torch.tensor([[[True] * 7] * 5] * 2).unsqueeze(1)
attention = F.scaled_dot_product_attention

ATTENTION = [
    case("attention", attention, QUERY, KEY, VALUE),
    case("attention with a mask", lambda q, k, v, m: attention(q, k, v, attn_mask=m), QUERY, KEY, VALUE, MASK),
    case("attention with a bias", lambda q, k, v, m: attention(q, k, v, attn_mask=m), QUERY, KEY, VALUE, BIAS),
    case("attention with a scale", lambda q, k, v: attention(q, k, v, scale=0.3), QUERY, KEY, VALUE),
    case("causal attention", lambda q, k: attention(q, k, k, is_causal=True), QUERY, SELF),
    case("causal attention to more keys", lambda q, k, v: attention(q, k, v, is_causal=True), QUERY, KEY, VALUE),
    case("grouped queries", lambda q, k, v: attention(q, k, v, enable_gqa=True), QUERY, FEW_K, FEW_V),
    case(
        "causal grouped queries",
        lambda q, k, v: attention(q, k, v, is_causal=True, enable_gqa=True),
        QUERY,
        FEW_K,
        FEW_V,
    ),
    case("attention on three dimensions", attention, QUERY[:, 0], KEY[:, 0], VALUE[:, 0]),
]

TABLES = {
    "reductions": REDUCTIONS,
    "spreads": SPREADS,
    "softmax": SOFTMAX,
    "pools": POOLS,
    "resizing": RESIZING,
    "attention": ATTENTION,
}
