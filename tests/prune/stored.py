"""Two small networks that are pruned, fine-tuned and saved in the tests of storage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.prune.plan import plan_pruning

FILES = ("example.safetensors", "program.json", "pruning.json", "weights.safetensors")


class Cnn(nn.Module):
    """Residual, norms, a functional weight, a buffer outside the state dict, a part the graph does not use."""

    def __init__(self, width: int = 8, hidden: int = 12, act: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.inner = nn.Conv2d(width, hidden, 3, padding=1)
        self.outer = nn.Conv2d(hidden, width, 3, padding=1)
        self.w = nn.Parameter(torch.randn(10, width))
        self.register_buffer("scale", torch.rand(10) + 0.5, persistent=False)
        self.unused = nn.Linear(2, 2)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        x = x + self.outer(self.act(self.inner(x)))
        return F.linear(x.mean((2, 3)), self.w) * self.scale


@dataclass
class Answer:
    logits: Tensor
    hidden: Tensor


class Tokens(nn.Module):
    """Token ids of any length; embedding and head are tied; attention; a dataclass comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(23, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.mix = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 23, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, *, mask: Tensor) -> Answer:
        h = self.embed(ids) * mask.unsqueeze(-1)
        h = h + self.down(F.gelu(self.up(h)))
        h = h + self.mix(h, h, h, need_weights=False)[0]
        return Answer(self.head(h), h)


def images(count: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def tokens(count: int = 2, length: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {"ids": torch.randint(0, 23, (count, length), generator=generator), "mask": torch.ones(count, length)}


def make(kind: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return (Cnn() if kind == "cnn" else Tokens()).eval()


def dense(kind: str, model: nn.Module | None = None) -> fxc.Program:
    if kind == "cnn":
        return fxc.capture(model or make(kind), (images(1),))
    length = torch.export.Dim("length", min=2, max=64)
    shapes = {n: {0: torch.export.Dim("batch"), 1: length} for n in ("ids", "mask")}
    given = tokens()
    return fxc.capture(model or make(kind), (given["ids"],), {"mask": given["mask"]}, dynamic_shapes=shapes)


def train(program: fxc.Program, kind: str, steps: int = 2) -> None:
    """A few steps that move every parameter and statistic."""
    optimizer = torch.optim.Adam([p for p in program.gm.parameters() if p.requires_grad], lr=0.01)
    program.gm.train()
    for step in range(steps):
        out = program(images(4, step)) if kind == "cnn" else program(**tokens(4)).logits
        optimizer.zero_grad()
        out.square().mean().backward()
        optimizer.step()
    program.gm.eval()


def prune(program: fxc.Program, ratio: float = 0.5) -> fxc.Program:
    return plan_pruning(program, ratio=ratio).apply(program)


@cache
def tuned(kind: str, plans: int = 1) -> fxc.Program:
    """A program pruned ``plans`` times, fine-tuned after each; its first parameter is frozen. Shared: change a clone."""
    program = dense(kind)
    for _ in range(plans):
        program = prune(program, 0.4)
        train(program, kind)
    next(program.gm.parameters()).requires_grad_(False)
    return program


def answers(program: fxc.Program, kind: str) -> list[Tensor]:
    with torch.no_grad():
        if kind == "cnn":
            return [program(images(3, 9)), program(images(1, 9))]
        return [t for n, length in ((3, 5), (1, 7)) for t in vars(program(**tokens(n, length))).values()]
