"""Attention: heads and their widths, however the queries, keys and values are packed."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.prune.cases import Case, case, images, sequence

__all__ = ["ATTENTION", "RMSNorm"]

WIDTH, HEADS, SIZE = 16, 4, 4


class Block(nn.Module):
    """``embed``, ``x + attention(norm(x))``, ``x + mlp(norm(x))``, mean over the tokens, ``head``."""

    def __init__(self, attention: nn.Module, norm: bool = True, embed: bool = True) -> None:
        super().__init__()
        self.embed = nn.Linear(16, WIDTH) if embed else nn.Identity()
        self.norm1 = nn.LayerNorm(WIDTH) if norm else nn.Identity()
        self.attention = attention
        self.norm2 = nn.LayerNorm(WIDTH) if norm else nn.Identity()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return cast(Tensor, self.head(x.mean(1)))


class Separate(nn.Module):
    """Three projections and plain matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out, self.heads = nn.Linear(WIDTH, WIDTH), HEADS

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
        return cast(Tensor, self.out((weights @ v).transpose(1, 2).reshape(x.shape[0], x.shape[1], -1)))


class FusedQkv(nn.Module):
    """One projection; literal sizes, arithmetic on the input's sizes, or sizes that are attributes as in timm."""

    def __init__(self, how: str = "attributes", norm: bool = False) -> None:
        super().__init__()
        self.qkv, self.out, self.how = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), how
        self.heads, self.size = HEADS, SIZE
        self.q_norm = nn.LayerNorm(SIZE) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        if self.how == "literal":
            qkv = self.qkv(x).reshape(-1, 6, 3, 4, 4).permute(2, 0, 3, 1, 4)
        else:
            size = width // self.heads if self.how == "arithmetic" else self.size
            qkv = self.qkv(x).reshape(batch, length, 3, self.heads, size).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = F.scaled_dot_product_attention(self.q_norm(q), k, v).transpose(1, 2)
        if self.how == "literal":
            return cast(Tensor, self.out(y.reshape(-1, 6, 16)))
        inner = width if self.how == "arithmetic" else self.heads * self.size
        return cast(Tensor, self.out(y.reshape(batch, length, inner)))


class ChunkedQkv(nn.Module):
    """Heads first, then queries, keys and values within each head, as in GPT-NeoX and BLOOM."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, HEADS, 3 * SIZE).transpose(1, 2).chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return cast(Tensor, self.out(y.transpose(1, 2).reshape(batch, length, -1)))


class Grouped(nn.Module):
    """Grouped-query attention: 4 query heads on 2 key heads."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.q, self.out, self.how = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), how
        self.heads, self.size = HEADS, SIZE
        self.k, self.v = nn.Linear(WIDTH, 2 * SIZE), nn.Linear(WIDTH, 2 * SIZE)

    def spread(self, x: Tensor) -> Tensor:
        batch, heads, length, size = x.shape
        if self.how == "repeat":
            return x.repeat_interleave(2, 1)
        return x[:, :, None].expand(batch, heads, 2, length, size).reshape(batch, heads * 2, length, size)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (y.view(batch, length, -1, self.size).transpose(1, 2) for y in (self.q(x), self.k(x), self.v(x)))
        if self.how == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            y = F.scaled_dot_product_attention(q, self.spread(k), self.spread(v))
        return cast(Tensor, self.out(y.transpose(1, 2).reshape(batch, length, -1)))


class MultiHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.mha(x, x, x, need_weights=False)[0])


class CrossHead(nn.Module):
    """Keys and values of another width: three weights instead of a packed one."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.Linear(WIDTH, 12)
        self.mha = nn.MultiheadAttention(WIDTH, HEADS, kdim=12, vdim=12, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        memory = F.relu(self.memory(x))
        return cast(Tensor, self.mha(x, memory, memory, need_weights=False)[0])


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(16, WIDTH)
        self.layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.layer(self.embed(x)).mean(1)))


class Rotary(nn.Module):
    """Rotary embedding: halves of a head turn into each other; sines and cosines are buffers."""

    cos: Tensor
    sin: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        angle = torch.arange(6.0)[:, None] * torch.tensor([1.0, 0.1]).repeat(2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def turn(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return x * self.cos + torch.cat([-x[..., half:], x[..., :half]], -1) * self.sin

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(self.turn(q), self.turn(k), v, is_causal=True)
        return cast(Tensor, self.out(y.transpose(1, 2).flatten(2)))


class RMSNorm(nn.Module):
    """Root mean square norm over the last dimension, as most language models write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Latent(nn.Module):
    """Multi-head latent attention: low ranks, one shared rotary key, value heads of a width of their own."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.q_down, self.q_up = nn.Linear(WIDTH, 12, bias=False), nn.Linear(12, HEADS * 6, bias=False)
        self.kv_down, self.kv_up = nn.Linear(WIDTH, 8 + 2, bias=False), nn.Linear(8, HEADS * (4 + 5), bias=False)
        self.q_norm: nn.Module = RMSNorm(12) if norm else nn.Identity()
        self.kv_norm: nn.Module = RMSNorm(8) if norm else nn.Identity()
        self.out = nn.Linear(HEADS * 5, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q_up(self.q_norm(self.q_down(x))).view(batch, length, HEADS, 6).transpose(1, 2)
        latent, shared = self.kv_down(x).split([8, 2], -1)
        kv = self.kv_up(self.kv_norm(latent)).view(batch, length, HEADS, 9).transpose(1, 2)
        k, v = kv.split([4, 5], -1)
        shared = shared[:, None].expand(batch, HEADS, length, 2)
        y = F.scaled_dot_product_attention(q, torch.cat([k, shared], -1), v, is_causal=True, scale=6**-0.5)
        return cast(Tensor, self.out(y.transpose(1, 2).reshape(batch, length, -1)))


class DeltaNet(nn.Module):
    """Gated delta rule: a state per head, short convolution, decay and gate per head, norm over each head's width."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.gate = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.conv = nn.Conv1d(3 * WIDTH, 3 * WIDTH, 3, padding=2, groups=3 * WIDTH, bias=False)
        self.beta, self.decay = nn.Linear(WIDTH, HEADS, bias=False), nn.Linear(WIDTH, HEADS, bias=False)
        self.a_log, self.dt_bias = nn.Parameter(torch.zeros(HEADS)), nn.Parameter(torch.zeros(HEADS))
        self.norm, self.out = RMSNorm(SIZE), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        mixed = F.silu(self.conv(self.qkv(x).transpose(1, 2))[..., :length]).transpose(1, 2)
        q, k, v = (y.reshape(batch, length, HEADS, SIZE) for y in mixed.split([WIDTH] * 3, -1))
        q, k = (y * torch.rsqrt(y.pow(2).sum(-1, keepdim=True) + 1e-6) for y in (q, k))
        beta = self.beta(x).sigmoid()[..., None]
        decay = (-self.a_log.exp() * F.softplus(self.decay(x) + self.dt_bias)).exp()[..., None, None]
        state = x.new_zeros(batch, HEADS, SIZE, SIZE)
        outputs = []
        for t in range(4):
            state = state * decay[:, t]
            memory = (state * k[:, t, :, :, None]).sum(-2)
            state = state + k[:, t, :, :, None] * ((v[:, t] - memory) * beta[:, t])[:, :, None]
            outputs.append((state * q[:, t, :, :, None]).sum(-2))
        y = torch.stack(outputs, 1)
        y = self.norm(y) * F.silu(self.gate(x)[:, :4].view(batch, 4, HEADS, SIZE))
        return F.pad(self.out(y.reshape(batch, 4, -1)), (0, 0, 0, length - 4))


class Window(nn.Module):
    """Swin: shifted windows of 2 × 2 of a 4 × 4 image, a table of relative positions with one column per head."""

    index: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Conv2d(3, WIDTH, 2, 2), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.table = nn.Parameter(torch.randn(9, HEADS))
        place = torch.cartesian_prod(torch.arange(2), torch.arange(2))
        apart = place[:, None] - place[None] + 1
        self.register_buffer("index", apart[..., 0] * 3 + apart[..., 1])
        self.mlp, self.head = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH)), nn.Linear(WIDTH, 5)

    def attend(self, x: Tensor) -> Tensor:
        windows, length, width = x.shape
        qkv = self.qkv(x).reshape(windows, length, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0] * SIZE**-0.5, qkv[1], qkv[2]
        bias = self.table[self.index.view(-1)].view(length, length, -1).permute(2, 0, 1).contiguous()
        weights = (q @ k.transpose(-2, -1) + bias.unsqueeze(0)).softmax(-1)
        return cast(Tensor, self.out((weights @ v).transpose(1, 2).reshape(windows, length, width)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).permute(0, 2, 3, 1)
        batch, height, width, channels = x.shape
        y = torch.roll(self.norm(x), (-1, -1), (1, 2))
        y = y.view(batch, height // 2, 2, width // 2, 2, channels).permute(0, 1, 3, 2, 4, 5)
        y = self.attend(y.reshape(-1, 4, channels))
        y = y.view(batch, height // 2, width // 2, 2, 2, channels).permute(0, 1, 3, 2, 4, 5)
        x = x + torch.roll(y.reshape(batch, height, width, channels), (1, 1), (1, 2))
        x = x + self.mlp(x)
        return cast(Tensor, self.head(x.mean((1, 2))))


def _block(make: Any, *prunes: str, norm: bool = True, **options: Any) -> Case:
    prunes = (*(f"attention.{n}" for n in prunes), "mlp.0")
    return case(lambda: Block(make(), norm), sequence(), *prunes, **options)


_QKV, _THREE = {"attention.qkv": HEADS}, {"attention.q": HEADS, "attention.k": HEADS, "attention.v": HEADS}
_GQA, _WIDE = {"attention.q": 4, "attention.k": 2, "attention.v": 2}, {"width": True}

ATTENTION: dict[str, Case] = {
    "multihead_attention": _block(MultiHead, "mha.in_proj", table=True),
    "transformer_encoder_layer": case(Encoder, sequence(), "layer.linear1", "layer.self_attn.in_proj", table=True),
    "qkv_arithmetic": _block(lambda: FusedQkv("arithmetic"), "qkv", table=True),
    "qkv_literal": _block(lambda: FusedQkv("literal"), "qkv", table=True),
    "qkv_heads": _block(FusedQkv, "qkv", heads=_QKV, table=True),
    "gqa_expand": _block(lambda: Grouped("expand"), "q", "k", "v", heads=_GQA, table=True),
    "gqa_no_hint": _block(lambda: Grouped("expand"), "q", "k", "v", table=True),
    "mla": _block(lambda: Latent(False), "q_down", "kv_down", table=True),
    "gated_delta_net": _block(DeltaNet, "qkv", "conv", table=True),
    "gqa_repeat": _block(lambda: Grouped("repeat"), "q", "k", "v", heads=_GQA),
    "gqa_sdpa": _block(lambda: Grouped("sdpa"), "q", "k", "v", heads=_GQA),
    "mla_normed": _block(lambda: Latent(True), "q_down", "kv_down", kwargs=_WIDE),
    "attention_separate": _block(Separate, "q", "k", "v", heads=_THREE),
    "attention_no_norm": _block(Separate, "q", "out", norm=False, heads=_THREE),
    "attention_width": _block(Separate, "q", "out", heads=_THREE, kwargs=_WIDE),
    "residual_to_input": case(
        lambda: Block(Separate(), False, embed=False),
        sequence(),
        "attention.q",
        "mlp.0",
        keeps=("mlp.2",),
        heads=_THREE,
    ),
    "cross_attention": _block(CrossHead, "memory", "mha.q_proj_weight"),
    "qkv_chunked_heads": _block(ChunkedQkv, "qkv"),
    "qkv_query_norm": _block(lambda: FusedQkv(norm=True), "qkv"),
    "rotary": _block(Rotary, "q", "k", "v"),
    "window_attention": case(Window, images(3), "qkv", "table", "mlp.0", heads={"qkv": HEADS}),
}
