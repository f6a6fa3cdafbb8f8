"""Small networks with every kind of linear layer, compressed for one engine and compared with their simulation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.capture import capture
from fxcompress.engines import Engine, target
from fxcompress.ir import Program
from fxcompress.parity import Parity, check_parity
from fxcompress.passbase import Context, Pass
from fxcompress.pipeline import Pipeline


class Products(nn.Module):
    """A linear layer with and one without bias, GPT-2's transposed one, and one whose weight is used functionally."""

    def __init__(self, features: int = 192, hidden: int = 100) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(features, hidden), nn.Linear(hidden, features, bias=False)
        self.norm = nn.LayerNorm(features)
        self.w, self.c = nn.Parameter(torch.randn(features, 40) / features**0.5), nn.Parameter(torch.randn(40))
        self.v = nn.Parameter(torch.randn(24, 40))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x + self.b(F.gelu(self.a(x))))
        z = torch.addmm(self.c, y.reshape(-1, y.shape[-1]), self.w).reshape(*x.shape[:-1], 40)
        return F.linear(z.relu(), self.v)


class Attention(nn.Module):
    """One transformer block over token ids, with tied embedding and head."""

    def __init__(self, width: int = 64, words: int = 50) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(words, width), nn.Linear(width, words, bias=False)
        self.head.weight = self.embed.weight
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        y = self.norm1(x)
        q, k, v = (layer(y).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return self.head(x + self.down(F.gelu(self.up(self.norm2(x)))))  # type: ignore[no-any-return]


@dataclass
class Case:
    """A compressed program, its engine, and how far they are apart."""

    program: Program
    engine: Engine
    parity: Parity


def compressed(runtime: str, passes: Sequence[Pass], model: nn.Module, x: Tensor, other: Tensor) -> Case:
    """``model`` captured on ``x``, compressed for ``runtime``, compared on ``other``."""
    plain = capture(model.eval(), (x,))
    program = Pipeline(passes=tuple(passes))(plain, Context(scheme=target(runtime).scheme())).program
    engine = target(runtime).build(program, threads=1)
    found: Any = check_parity(engine, program, [(other,)], reference=plain)
    return Case(program, engine, found)
