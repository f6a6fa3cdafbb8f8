"""Small networks and their programs, captured once, for the tests of plans and certificates."""

from __future__ import annotations

import functools
import itertools
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from tests.prune.cases import images, sequence, settle


class Cnn(nn.Module):
    """A stem, a depthwise layer, a residual block, two linear layers; every kind of name for globs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        self.inner = nn.Conv2d(16, 24, 3, padding=1)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.outer = nn.Conv2d(24, 16, 1)
        self.fc1, self.fc2 = nn.Linear(16, 20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.outer(F.relu(self.depthwise(F.relu(self.inner(x))))))
        return cast(Tensor, self.fc2(F.relu(self.fc1(x.mean((2, 3))))))


class Chain(nn.Module):
    """Three convolutions without anything between them but ReLU: every group has its own layers."""

    def __init__(self, widths: tuple[int, ...] = (3, 16, 24, 32)) -> None:
        super().__init__()
        pairs = itertools.pairwise(widths)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairs)
        self.head = nn.Linear(widths[-1], 5)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = F.relu(conv(x))
        return cast(Tensor, self.head(x.mean((2, 3))))


class Block(nn.Module):
    """One transformer block of width 16 with 4 heads of width 4, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 16)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(16) for _ in range(3))
        self.q, self.k, self.v, self.proj = (nn.Linear(16, 16) for _ in range(4))
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norm1(x)
        q, k, v = (m(y).unflatten(-1, (4, 4)).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.proj(y)
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return cast(Tensor, self.head(self.norm3(x)))


class Sigmoids(nn.Module):
    """Sigmoid is 0.5 at zero: behind the first layer a convolution without padding, behind the second one with."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 10, 3, bias=False)
        self.c, self.d = nn.Conv2d(10, 6, 3, padding=1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.a(x))
        x = torch.sigmoid(self.b(x))
        return cast(Tensor, self.d(F.relu(self.c(x))))


_NETS = {"cnn": Cnn, "chain": Chain, "block": Block, "sigmoids": Sigmoids}


def example(name: str) -> tuple[Tensor]:
    """Inputs of a network."""
    return sequence(12) if name == "block" else images()


def model(name: str) -> nn.Module:
    """A network in eval mode; always the same numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return settle(_NETS[name]())


@functools.cache
def program(name: str) -> fxc.Program:
    """The network's program. Shared between tests: never change it."""
    return fxc.capture(model(name), example(name))
