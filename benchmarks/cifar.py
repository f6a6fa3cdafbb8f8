"""CIFAR-10 for the pruning benchmarks: the images, ResNet-20, and one plain training loop that every method goes through.

The data folder (see :mod:`benchmarks.data`) holds ``cifar10_train.npz`` and ``cifar10_test.npz``: 50,000 and 10,000
JPEG images of 32 x 32 pixels, shuffled. Training uses the first 10,000, testing all 10,000.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Final

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks import data

TRAINING_IMAGES: Final = 10_000
_MEAN: Final = (125.3, 123.0, 113.9)
_DEVIATION: Final = (63.0, 62.1, 66.7)

Forward = Callable[[torch.Tensor], torch.Tensor]


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, option B: a 1x1 convolution where the shape changes)."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.shortcut = nn.Sequential()
        if inner != outer:
            self.shortcut = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images ``[n, inner, h, w]`` to ``[n, outer, h / stride, w / stride]``."""
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet20(nn.Module):
    """ResNet-20 for CIFAR (He et al. 2016, section 4.2): 16, 32 and 64 channels, three blocks each."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        blocks: list[nn.Module] = []
        for inner, outer, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2)):
            blocks += [Block(inner, outer, stride), Block(outer, outer, 1), Block(outer, outer, 1)]
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images ``[n, 3, 32, 32]`` to logits ``[n, 10]``."""
        y = functional.relu(self.bn(self.conv(x)))
        return torch.as_tensor(self.fc(self.blocks(y).mean((2, 3))))


def lay_out(module: nn.Module, memory_format: torch.memory_format = torch.channels_last) -> None:
    """Changes the memory format of the convolutions' weights in place; channels last trains twice as fast on a CPU."""
    for parameter in module.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=memory_format)


@dataclass(frozen=True)
class Split:
    """Normalised images float32 ``[n, 3, 32, 32]`` (channels last in memory) and labels int64 ``[n]``."""

    images: torch.Tensor
    labels: torch.Tensor


def load(name: str, limit: int | None = None) -> Split:
    """The first ``limit`` images (all by default) of ``cifar10_<name>.npz``."""
    from PIL import Image

    pack = np.load(data.folder() / f"cifar10_{name}.npz")
    raw, offsets = pack["data"].tobytes(), [int(i) for i in pack["offsets"]][: None if limit is None else limit + 1]
    pixels = np.stack(
        [np.asarray(Image.open(io.BytesIO(raw[a:b])).convert("RGB")) for a, b in itertools.pairwise(offsets)]
    )
    mean, deviation = np.array(_MEAN, np.float32), np.array(_DEVIATION, np.float32)
    images = torch.from_numpy((pixels.astype(np.float32) - mean) / deviation).permute(0, 3, 1, 2)
    return Split(images, torch.from_numpy(pack["labels"][: len(pixels)].astype(np.int64)))


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A random crop after padding by 4 pixels (reflected) and a random flip, drawn per image."""
    n, channels, side, _ = images.shape
    padded = functional.pad(images, (4, 4, 4, 4), mode="reflect")
    corner = torch.randint(0, 9, (2, n, 1), generator=generator)
    rows, columns = corner + torch.arange(side)
    flipped = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.where(flipped, columns.flip(1), columns)
    batch, channel = torch.arange(n).view(n, 1, 1, 1), torch.arange(channels).view(1, channels, 1, 1)
    crop = padded[batch, channel, rows.view(n, 1, side, 1), columns.view(n, 1, 1, side)]
    return crop.contiguous(memory_format=torch.channels_last)


@dataclass
class Network:
    """A network to train and to run: ``forward`` is the module itself, or the program around it."""

    module: nn.Module
    forward: Forward


def macs(network: Network) -> int:
    """Multiply-accumulates of the convolutions and the linear layers for one image, counted as they run."""
    total = 0

    def count(module: nn.Module, _: object, output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            total += module.weight[0].numel() * output[0].numel()
        elif isinstance(module, nn.Linear):
            total += module.weight.numel()

    hooks = [m.register_forward_hook(count) for m in network.module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        network.forward(torch.zeros(2, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    return total


def parameters(network: Network) -> int:
    """Numbers in the parameters."""
    return sum(p.numel() for p in network.module.parameters())


def widths(network: Network) -> dict[str, int]:
    """Output channels of every convolution."""
    return {name: m.weight.shape[0] for name, m in network.module.named_modules() if isinstance(m, nn.Conv2d)}


@dataclass(frozen=True)
class Training:
    """One training run: SGD (Nesterov momentum 0.9) under a one-cycle rate (Smith 2018).

    Attributes:
        sides: Pixels of the side of the images in each epoch: small images first are cheap (progressive resizing).
        rate: Largest learning rate.
        decay: Weight decay.
        batch: Images per step.
        warm: Share of the steps in which the rate rises.
    """

    sides: tuple[int, ...]
    rate: float
    decay: float = 5e-4
    batch: int = 64
    warm: float = 0.3

    def record(self) -> dict[str, object]:
        """For the result file."""
        return {**asdict(self), "sides": list(self.sides)}


DENSE: Final = Training((16,) * 8 + (24,) * 10 + (32,) * 7, rate=0.1)
FINE_TUNING: Final = Training((32,) * 4, rate=0.02, warm=0.1)


def train(module: nn.Module, forward: Forward, split: Split, how: Training, seed: int) -> list[float]:
    """Trains ``module`` in place through ``forward`` and gives the mean loss of each epoch.

    The order of the images and the augmentation depend on ``seed`` and the epoch alone: they are the same for every
    network trained with that seed.
    """
    steps = -(-len(split.labels) // how.batch) * len(how.sides)
    optimizer = torch.optim.SGD(module.parameters(), how.rate, momentum=0.9, weight_decay=how.decay, nesterov=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, how.rate, total_steps=steps, pct_start=how.warm)
    module.train()
    losses = []
    for epoch, side in enumerate(how.sides):
        generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        total = 0.0
        for rows in torch.randperm(len(split.labels), generator=generator).split(how.batch):
            images = augment(split.images[rows], generator)
            if side != images.shape[-1]:
                images = functional.interpolate(images, size=(side, side), mode="area")
            loss = functional.cross_entropy(forward(images), split.labels[rows], label_smoothing=0.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            total += loss.item() * len(rows)
        losses.append(total / len(split.labels))
    module.eval()
    return losses


def accuracy(module: nn.Module, forward: Forward, split: Split, batch: int = 125) -> float:
    """Top-1 accuracy in percent, in eval mode."""
    module.eval()
    right = 0
    with torch.no_grad():
        for images, labels in zip(split.images.split(batch), split.labels.split(batch), strict=True):
            right += int((forward(images).argmax(1) == labels).sum())
    return 100.0 * right / len(split.labels)
