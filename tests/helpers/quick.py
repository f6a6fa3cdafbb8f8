"""A convolutional and a token network, quantized once for the tests of engines, artefacts and parity."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.capture import capture
from fxcompress.engines import Engine, target
from fxcompress.ir import Program
from fxcompress.passbase import Context
from fxcompress.passes import FoldBatchNorm, FuseActivations, QuantizeStatic
from fxcompress.pipeline import Pipeline

RUNTIMES = ("onnxruntime", "openvino")


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)) + x)


class Cnn(nn.Module):
    """Convolutions, a residual block and a linear layer, wide enough for integer kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(Block(16), Block(16))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))  # type: ignore[no-any-return]


@dataclass
class Answer:
    logits: Tensor
    hidden: Tensor


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


class Tokens(nn.Module):
    """Token ids and an optional mask as keywords; a dataclass comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.out = nn.Embedding(11, 16), nn.Linear(16, 32), nn.Linear(32, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Answer:
        hidden = F.gelu(self.inner(self.embed(ids))) * mask.unsqueeze(-1)
        return Answer(logits=self.out(hidden.sum(1)), hidden=hidden)


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def tokens(count: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 11, (count, 6), generator=generator)
    return {"ids": ids, "mask": (torch.rand(count, 6, generator=generator) > 0.3).float()}


@cache
def cnn() -> nn.Module:
    torch.manual_seed(0)
    return Cnn().eval()


@cache
def token_net() -> nn.Module:
    torch.manual_seed(0)
    return Tokens().eval()


@cache
def captured(kind: str = "cnn") -> Program:
    return capture(cnn(), (images(2),)) if kind == "cnn" else capture(token_net(), (), tokens(2))


@cache
def plain(kind: str = "cnn") -> Program:
    """The float32 program."""
    return Pipeline(passes=(FoldBatchNorm(), FuseActivations()))(captured(kind), Context()).program


@cache
def quantized(runtime: str, kind: str = "cnn") -> Program:
    """The simulation of the INT8 engine of one runtime."""
    data: Any = [images(8, 1)] if kind == "cnn" else [tokens(8, 1)]
    context = Context(calibration=data, scheme=target(runtime).scheme())
    passes = (FoldBatchNorm(), FuseActivations(), QuantizeStatic())
    return Pipeline(passes=passes)(captured(kind), context).program


@cache
def built(runtime: str, precision: str = "int8", kind: str = "cnn") -> Engine:
    """An engine on one thread; shared, so leave it as it is."""
    return target(runtime).build(quantized(runtime, kind) if precision == "int8" else plain(kind), threads=1)
