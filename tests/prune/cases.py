"""What every pruning pattern is made of: the case, small building blocks, and random statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

__all__ = ["Case", "Net", "case", "grown", "images", "sequence", "settle", "tokens", "unit"]


@dataclass(frozen=True)
class Case:
    """One pattern: a tiny network whose last layer is called ``head``.

    Attributes:
        build: Gives the network in eval mode, float32, always with the same numbers.
        example: Its inputs; dimension 0 is the batch.
        must_prune: Whether parameters must become fewer.
        kwargs: Options for ``plan_pruning`` beyond the ratio.
        prunes: Layers or parameters that must lose output channels when every group loses half of its own.
        keeps: Layers or parameters that must not: pruning them would change the numbers.
        heads: Layer that makes queries, keys or values -> number of heads; the hint that peers ask for.
        outputs: Layers whose outputs are the model's.
        folds: A removed channel leaves a constant, which may move into a bias.
        table: The pattern is a row of the table in the documentation.
    """

    build: Callable[[], nn.Module]
    example: tuple[Tensor, ...]
    must_prune: bool = True
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    prunes: tuple[str, ...] = ()
    keeps: tuple[str, ...] = ()
    heads: Mapping[str, int] = field(default_factory=dict)
    outputs: tuple[str, ...] = ("head",)
    folds: bool = False
    table: bool = False


def case(make: Callable[[], nn.Module], example: tuple[Tensor, ...], *prunes: str, **options: Any) -> Case:
    """A :class:`Case` whose network is seeded, has random statistics and is in eval mode."""

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return settle(make())

    return Case(build, example, prunes=prunes, **options)


def settle(model: nn.Module) -> nn.Module:
    """Random numbers everywhere, of a size that keeps the features alive: what is lost or wrong must show.

    PyTorch's own start would not do: its weights are so small that, with random running statistics, most ReLUs never
    open, and then a wrong network gives the right numbers.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() <= 1 or name.endswith("gamma"):
                scale = name.endswith(("weight", "gamma"))
                parameter.copy_(torch.empty_like(parameter).uniform_(0.5, 1.5) if scale else noise(parameter))
            else:
                parameter.normal_(0.0, (2.0 / max(parameter[0].numel(), 1)) ** 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(noise(buffer))
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return model.eval()


def noise(like: Tensor) -> Tensor:
    """Normal numbers of standard deviation 0.3."""
    return 0.3 * torch.randn_like(like)


def images(channels: int = 3, size: int = 8, batch: int = 2) -> tuple[Tensor]:
    """One batch ``[batch, channels, size, size]``."""
    return (torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1)),)


def sequence(width: int = 16, length: int = 6, batch: int = 2) -> tuple[Tensor]:
    """One batch ``[batch, length, width]``."""
    return (torch.randn(batch, length, width, generator=torch.Generator().manual_seed(2)),)


def grown(example: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The example with one more sample in the batch."""
    return tuple(torch.cat([x, x[:1].flip(-1)]) for x in example)


def tokens(vocabulary: int = 40, length: int = 6, batch: int = 2) -> tuple[Tensor]:
    """Token ids ``[batch, length]``, int64."""
    return (torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(3)),)


def unit(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Sequential:
    """Convolution that keeps the size, BatchNorm, ReLU."""
    options.setdefault("padding", kernel // 2)
    conv = nn.Conv2d(inputs, outputs, kernel, bias=False, **options)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class Net(nn.Module):
    """``body``, the mean over the image, ``head``."""

    def __init__(self, body: nn.Module, channels: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.body(x).mean((2, 3))))
