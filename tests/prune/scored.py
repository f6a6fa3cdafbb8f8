"""A small network with the slots of its channels, for the tests of the importance criteria."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.ir import Program
from fxcompress.prune.importance import Importance, importance
from fxcompress.prune.slots import Slot


class Net(nn.Module):
    """Convolutions of both kinds, norms, a linear layer, an LSTM, a bare parameter and an integer buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 6, 3, groups=2, padding=1)
        self.gain = nn.Parameter(torch.randn(6))
        self.norm = nn.LayerNorm(6)
        self.lstm = nn.LSTM(6, 5, batch_first=True)
        self.fc = nn.Linear(5, 4)
        self.register_buffer("steps", torch.arange(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(self.bn(self.conv(x)).relu()).flatten(2).transpose(1, 2)
        h = self.lstm(self.norm(h * self.gain))[0]
        return self.fc(h.mean(1)) + self.steps


SLOTS = [
    Slot("conv.weight", 0, "out", "conv", "conv", 8),
    Slot("conv.weight", 1, "in", "conv", "conv", 3),
    Slot("conv.bias", 0, "out", "conv", "conv", 8),
    Slot("bn.weight", 0, "out", "bn", "bn", 8),
    Slot("bn.bias", 0, "out", "bn", "bn", 8),
    Slot("up.weight", 0, "in", "up", "up", 8),
    Slot("up.weight", 1, "out", "up", "up", 3),
    Slot("gain", 0, "out", "gain", "gain", 6),
    Slot("norm.weight", 0, "out", "norm", "norm", 6),
    Slot("lstm.weight_ih_l0", 0, "out", "lstm", "lstm_1", 20),
    Slot("lstm.weight_ih_l0", 1, "in", "lstm", "lstm_1", 6),
    Slot("fc.weight", 0, "out", "fc", "fc", 4),
    Slot("fc.weight", 1, "in", "fc", "fc", 5),
]
BUFFERS = [
    Slot("bn.running_mean", 0, "out", "bn", "bn", 8),
    Slot("bn.running_var", 0, "out", "bn", "bn", 8),
    Slot("steps", 0, "out", "steps", "steps", 4),
]
WEIGHTS = [s for s in SLOTS if "weight" in s.tensor and s.layer not in ("bn", "norm")]


def batch_of(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 3, 6, 6, generator=generator), torch.randint(0, 4, (samples,), generator=generator)


BATCHES = [batch_of(5, 1), batch_of(3, 2)]


@functools.cache
def captured() -> tuple[Net, Program]:
    """The network, in eval mode, and its program; they share their tensors."""
    torch.manual_seed(0)
    net = Net()
    for norm in (net.bn, net.norm):
        nn.init.normal_(norm.weight)
    return net.eval(), fxc.capture(net, (BATCHES[0][0],))


def restored() -> Iterator[Program]:
    """The program for one test: what the test does to it is undone."""
    program = captured()[1]
    state = {n: t.clone() for n, t in program.gm.state_dict().items()}
    yield program
    program.gm.load_state_dict(state)
    program.gm.requires_grad_(True).zero_grad(set_to_none=True)
    program.gm.eval()


def tensor(program: Program, slot: Slot) -> Tensor:
    return program.gm.state_dict()[slot.tensor]


def prepared(name: Any, program: Program, data: Any = None, loss: Any = None, slots: Any = None) -> Importance:
    found = importance(name)
    found.prepare(program, SLOTS + BUFFERS if slots is None else slots, data, loss)
    return found


def scores(criterion: Importance, program: Program, slot: Slot) -> Tensor:
    found = criterion.score(slot, tensor(program, slot))
    assert found is not None and found.dtype == torch.float64 and found.shape == (slot.size,)
    return found


def rows(values: Tensor, dim: int) -> list[Tensor]:
    """What each channel holds, flat, float64."""
    return [values.double().select(dim, index).flatten() for index in range(values.shape[dim])]


def close(actual: Tensor, expected: list[Any], rtol: float = 1e-6) -> None:
    torch.testing.assert_close(
        actual, torch.tensor([float(e) for e in expected], dtype=torch.float64), rtol=rtol, atol=1e-12
    )
