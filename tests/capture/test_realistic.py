"""Modules as users write them: attention by hand, recurrent loops, audio front ends, U-Nets, detection heads."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.helpers.capture_checks import Inputs, check_capture, floats, images, layer_types


class Patches(nn.Module):
    """What einops' ``rearrange`` comes down to."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        x = x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(b, (h // 2) * (w // 2), 4 * c)
        return self.fc(x).reshape(b, h // 2, w // 2, 8).permute(0, 3, 1, 2)


class LastState(nn.Module):
    """A classifier on the last step, and the states."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        start = x.new_zeros(1, x.shape[0], 5)
        y, (h, c) = self.lstm(x, (start, start + 1))
        return {"logits": self.head(y[:, -1]), "states": (h, c)}


class Cells(nn.Module):
    """A Python loop over time."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTMCell(8, 5), nn.GRUCell(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = c = g = x.new_zeros(x.shape[0], 5)
        outputs = []
        for t in range(3):
            h, c = self.lstm(x[:, t], (h, c))
            g = self.gru(x[:, t], g)
            outputs.append(h + g)
        return torch.stack(outputs, 1)


class GroupedAttention(nn.Module):
    """Causal attention with rotary positions and fewer key heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("frequencies", 1 / (100 ** (torch.arange(0, 2, 2) / 2)), persistent=False)

    def rotated(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * self.frequencies
        a, b = x.chunk(2, -1)
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.rotated(self.q(x).view(b, t, 4, 2).transpose(1, 2))
        k, v = (part.transpose(1, 2) for part in self.kv(x).view(b, t, 2, 2, 2).unbind(2))
        y = F.scaled_dot_product_attention(q, self.rotated(k), v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Audio(nn.Module):
    """A wave and its spectrogram."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv1d(1, 8, 10, 5), nn.GroupNorm(4, 8), nn.GELU(), nn.BatchNorm1d(8))
        self.position = nn.Conv1d(8, 8, 16, padding=8, groups=4)
        self.slope = nn.PReLU(8)
        self.register_buffer("window", torch.hann_window(32))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.features(x)
        y = self.slope(y + F.gelu(self.position(y)[..., :-1]))
        spectrum = torch.stft(x.squeeze(1), 32, 16, window=self.window, return_complex=True)
        return y.mean(-1), spectrum.abs()


def block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle, self.up = block(3, 4), block(4, 8), nn.ConvTranspose2d(8, 8, 2, 2)
        self.merge, self.out = block(12, 4), nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down(x)
        b = self.up(self.middle(F.max_pool2d(a, 2)))
        rows, columns = a.size(2) - b.size(2), a.size(3) - b.size(3)
        b = F.pad(b, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
        y = self.out(self.merge(torch.cat([a, b], 1)))
        return F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(6, 16),
            nn.Unflatten(1, (4, 2, 2)),
            nn.ConvTranspose2d(4, 4, 4, 2, 1),
            nn.InstanceNorm2d(4),
            nn.LeakyReLU(0.2, True),
            nn.ConvTranspose2d(4, 3, 3, 2, 1, output_padding=1),
            nn.Tanh(),
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.body(z)


class Tabular(nn.Module):
    """One nested dict as input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(5, 2)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        return self.fc(torch.cat([self.conv(batch["image"]).mean((2, 3)), batch["meta"]["age"]], 1))


class BoxHead(nn.Module):
    """YOLO's decoding, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = block(3, 4), nn.Conv2d(4, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.body(x))
        b, _, rows, columns = y.shape
        y = y.view(b, 2, 5, rows, columns).permute(0, 1, 3, 4, 2).sigmoid()
        grid = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), 2)
        y[..., 0:2] = y[..., 0:2] * 2 - 0.5 + grid.flip(-1)
        y[..., 2:4] = (y[..., 2:4] * 2) ** 2
        return y.reshape(b, -1, 5)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 4), nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weight, index = self.gate(x).softmax(-1).topk(2, -1)
        y = torch.stack([expert(x) for expert in self.experts], -2)
        chosen = y.gather(-2, index.unsqueeze(-1).expand(-1, -1, -1, 8))
        return (chosen * weight.unsqueeze(-1)).sum(-2)


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.bag, self.fc = nn.Embedding(9, 8, padding_idx=0), nn.EmbeddingBag(9, 4), nn.Linear(8, 2)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        mask = (ids != 0).unsqueeze(-1)
        return self.fc((self.words(ids) * mask).sum(1) / mask.sum(1).clamp(min=1)), self.bag(ids)


class Parametrized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
        self.spectral = parametrizations.spectral_norm(nn.Linear(4, 4))
        self.orthogonal = parametrizations.orthogonal(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.orthogonal(self.spectral(self.conv(x).mean((2, 3))))


class SharedConvolution(nn.Module):
    """One convolution at every scale, a norm for each (as in RetinaNet's and EfficientDet's heads)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norms = nn.Conv2d(4, 4, 3, padding=1), nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [norm(self.conv(F.avg_pool2d(x, i + 1))) for i, norm in enumerate(self.norms)]


def ids(batch: int) -> Inputs:
    return (torch.randint(0, 9, (batch, 5)),), {}


def record(batch: int) -> Inputs:
    return ({"image": torch.randn(batch, 3, 8, 8), "meta": {"age": torch.randn(batch, 1)}},), {}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Inputs]]] = {
    "patches": (Patches, images(4, 8)),
    "last state": (LastState, floats(6, 8)),
    "cells": (Cells, floats(3, 8)),
    "grouped attention": (GroupedAttention, floats(6, 8)),
    "audio": (Audio, floats(1, 400)),
    "unet": (UNet, images(3, 9)),
    "generator": (Generator, floats(6)),
    "tabular": (Tabular, record),
    "box head": (BoxHead, images(3, 8)),
    "experts": (Experts, floats(6, 8)),
    "bags": (Bags, ids),
    "parametrized": (Parametrized, images(3, 6)),
    "shared convolution": (SharedConvolution, images(4, 8)),
}


@pytest.mark.parametrize("name", MODELS)
def test_realistic_module(name: str) -> None:
    make, inputs = MODELS[name]
    check_capture(make(), inputs)


def test_channels_last_model_and_input() -> None:
    model = nn.Sequential(block(3, 8), nn.Conv2d(8, 8, 3, groups=8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.to(memory_format=torch.channels_last)
    inputs = lambda b: ((torch.randn(b, 3, 8, 8).to(memory_format=torch.channels_last),), {})  # noqa: E731
    program = check_capture(model, inputs, exact=False)
    assert program.gm.get_parameter("0.0.weight").is_contiguous(memory_format=torch.channels_last)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_scripted_submodule_comes_in_by_the_second_strategy() -> None:
    class Scripted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.out = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.ReLU())), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.body(x))

    program = check_capture(Scripted(), floats(8), notes=("captured with torch.fx",))
    assert layer_types(program) == {"body.0": "Linear", "out": "Linear"}
    program(torch.randn(2, 8)).sum().backward()
    assert program.gm.get_parameter("body.0.weight").grad is not None


def test_code_that_autograd_refuses_still_trains_elsewhere() -> None:
    """Writing into a piece of ``chunk`` runs only without gradients; the layers are trainable all the same."""

    class Pieces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            left, right = self.fc(x).chunk(2, 1)
            left.relu_()
            return left + right

    program = check_capture(Pieces(), floats(4))
    program(torch.randn(2, 4)).sum().backward()
    assert program.gm.get_parameter("fc.weight").grad is not None
