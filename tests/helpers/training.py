"""A small network with randomness of its own, data it can learn, and a quiet fine_tune."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fxcompress.train import History, fine_tune

Batches = list[tuple[Tensor, Tensor]]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.2)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.fc(self.drop(F.relu(self.norm(self.conv(x))).mean((2, 3)))))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def data(count: int = 24) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 3, (count,), generator=generator)
    images = torch.randn(count, 1, 4, 4, generator=generator) + labels.view(-1, 1, 1, 1)
    return TensorDataset(images, labels)


def batches() -> Batches:
    images, labels = data().tensors
    return list(zip(images.split(8), labels.split(8), strict=True))


def same(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(torch.equal(first[k], second[k]) for k in first)


def quiet(model: Any, train: Any, **options: Any) -> History:
    return fine_tune(model, train, progress=False, **options)
