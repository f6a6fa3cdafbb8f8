"""The 8x8 digits of scikit-learn, and two networks small enough to train on them in a second."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batches = list[tuple[Tensor, Tensor]]


@cache
def digits() -> tuple[Tensor, Tensor]:
    """1797 images [n, 1, 8, 8] of mean 0 and deviation 1 in a fixed random order, and their labels."""
    from sklearn.datasets import load_digits

    pack = load_digits()
    order = torch.randperm(len(pack.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(pack.images).float()[order, None]
    return (images - images.mean()) / images.std(), torch.from_numpy(pack.target).long()[order]


def training(batch: int = 64) -> Batches:
    """1280 images in batches."""
    images, labels = digits()
    return list(zip(images[:1280].split(batch), labels[:1280].split(batch), strict=True))


def held_out() -> tuple[Tensor, Tensor]:
    """The other 517 images."""
    images, labels = digits()
    return images[1280:], labels[1280:]


class Convolutions(nn.Module):
    """A plain and a depthwise convolution with norms, a residual add, pooling, dropout, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn1 = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.deep, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16)
        self.point, self.bn3 = nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.stem(x)))
        y = self.bn3(self.point(F.relu(self.bn2(self.deep(x)))))
        x = F.max_pool2d(F.relu(x + y), 2)
        return torch.as_tensor(self.head(self.drop(x.flatten(1))))


class Attention(nn.Module):
    """A transformer encoder of one layer over the rows of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.place = nn.Parameter(0.1 * torch.randn(8, 32))
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(1, 2)) + self.place
        q, k, v = (t.unflatten(2, (2, 16)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, 2))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return torch.as_tensor(self.head(x.mean(1)))


@cache
def trained(kind: Any, epochs: int = 6) -> nn.Module:
    """A network trained in float, the same with any number of threads; do not change it."""
    torch.manual_seed(0)
    model: nn.Module = kind()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(epochs):
        for images, labels in training():
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    torch.set_num_threads(threads)
    return model.eval()


def accuracy(model: object) -> float:
    """Top-1 on the held-out images, of any callable."""
    images, labels = held_out()
    assert callable(model)
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())
