"""A small network with every kind of block, and how the tests quantize it."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.capture import capture
from fxcompress.ir import Program
from fxcompress.passbase import Context, Result
from fxcompress.passes import FoldBatchNorm, FuseActivations, QuantizeStatic
from fxcompress.pipeline import Pipeline


class Net(nn.Module):
    """Convolution, depthwise convolution, residual block, pooling, linear: every kind of block once."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.point = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.point(F.relu6(self.depthwise(x))) + x)
        return self.head(F.max_pool2d(x, 4).flatten(1))  # type: ignore[no-any-return]


def net() -> Net:
    torch.manual_seed(0)
    model = Net().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def images(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@cache
def fused() -> Program:
    """`net` captured and fused; passes leave it alone."""
    return FuseActivations()(capture(net(), (images(2),))).program


def quantize(model: nn.Module | Program, data: Any, example: Tensor | None = None, **options: Any) -> Result:
    """Fused and quantized; ``scheme`` may be given."""
    scheme = options.pop("scheme", None)
    context = Context(calibration=data, scheme=scheme)
    example = images(2) if example is None else example
    passes = (FoldBatchNorm(), FuseActivations(), QuantizeStatic(**options))
    program = model if isinstance(model, Program) else capture(model.eval(), (example,))
    return Pipeline(passes=passes)(program, context)
