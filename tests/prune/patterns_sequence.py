"""Recurrent layers, language models, experts and mixers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.prune.cases import Case, case, images, noise, sequence, tokens
from tests.prune.patterns_attention import RMSNorm

__all__ = ["SEQUENCE"]


class Recurrent(nn.Module):
    """Linear, a recurrent layer, another linear layer, ``head``; or the last hidden state instead of the outputs."""

    def __init__(self, layer: Callable[..., nn.RNNBase], last: bool = False, **options: Any) -> None:
        super().__init__()
        self.a = nn.Linear(16, 12)
        self.rnn, self.last = layer(12, 10, batch_first=True, **options), last
        self.b = nn.Linear(10 * (2 if options.get("bidirectional") else 1), 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        outputs, state = self.rnn(F.relu(self.a(x)))
        if self.last:
            state = state[0] if isinstance(state, tuple) else state
            return cast(Tensor, self.head(F.relu(self.b(state[-1]))))
        return cast(Tensor, self.head(F.relu(self.b(outputs)).mean(1)))


class SwiGlu(nn.Module):
    """Gate and value packed in one projection; RMSNorm and residual around it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(16, 16), RMSNorm(16)
        self.up, self.down = nn.Linear(16, 48, bias=False), nn.Linear(24, 16, bias=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        gate, value = self.up(self.norm(x)).chunk(2, -1)
        return cast(Tensor, self.head((x + self.down(F.silu(gate) * value)).mean(1)))


class Experts(nn.Module):
    """Mixture of experts with dense dispatch: every expert runs, the gate weights the two best."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.gate = nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 4, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 20), nn.GELU(), nn.Linear(20, 16)) for _ in range(4))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norm(x)
        scores = self.gate(y).softmax(-1)
        weights = scores * (scores >= scores.topk(2, -1).values[..., -1:])
        mixed = torch.stack([expert(y) for expert in self.experts], -1)
        return cast(Tensor, self.head((x + (mixed * weights[..., None, :]).sum(-1)).mean(1)))


class PackedExperts(nn.Module):
    """All experts' weights in two parameters, multiplied in one batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(16, 16)
        self.norm, self.gate, self.head = nn.LayerNorm(16), nn.Linear(16, 4, bias=False), nn.Linear(16, 5)
        self.up, self.down = nn.Parameter(torch.randn(4, 16, 40) / 4), nn.Parameter(torch.randn(4, 20, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norm(x).flatten(0, 1)
        gate, value = torch.bmm(y.expand(4, -1, -1), self.up).chunk(2, -1)
        mixed = torch.bmm(F.silu(gate) * value, self.down)
        mixed = (mixed * self.gate(y).softmax(-1).t()[..., None]).sum(0)
        return cast(Tensor, self.head((x + mixed.view_as(x)).mean(1)))


class Mixer(nn.Module):
    """Token mixing: a linear layer over the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm1, self.norm2 = nn.Conv2d(3, 16, 2, 2), nn.LayerNorm(16), nn.LayerNorm(16)
        self.norm = nn.LayerNorm(16)
        self.tokens = nn.Sequential(nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 16))
        self.channels = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(self.norm2(x))
        return cast(Tensor, self.head(self.norm(x).mean(1)))


class SpatialGate(nn.Module):
    """gMLP: half of the channels, mixed over the positions, gates the other half."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(16, 16)
        self.up, self.mix, self.down = nn.Linear(16, 32), nn.Conv1d(6, 6, 1), nn.Linear(16, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        u, v = F.gelu(self.up(x)).chunk(2, -1)
        return cast(Tensor, self.head((x + self.down(u * (self.mix(v) + 1))).mean(1)))


class Tied(nn.Module):
    """Embedding and head share one weight."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.emb, self.pos = nn.Embedding(40, 16), nn.Embedding(6, 16)
        self.norm = RMSNorm(16) if norm else nn.Identity()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids) + self.pos(torch.arange(ids.shape[1], device=ids.device))
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return cast(Tensor, self.head(x))


class Patches(nn.Module):
    """ViT's input: patches, a class token in front, a position for each; optional distillation token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cls = nn.Conv2d(3, 16, 4, 4), nn.Parameter(noise(torch.empty(1, 1, 16)))
        self.pos = nn.Parameter(noise(torch.empty(1, 5, 16)))
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.pos
        x = x + self.down(F.gelu(self.up(x)))
        return cast(Tensor, self.head(x[:, 0] + x.mean(1)))


class TwoHeads(nn.Module):
    """Two outputs of one trunk, one of them not through a layer: its channels are the model's output and must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Linear(16, 24), nn.Linear(24, 12), nn.Linear(24, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.a(x))
        return self.head(F.relu(self.c(x))), self.b(x)


class Bilinear(nn.Module):
    """``nn.Bilinear``: a parameter with two input dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.mix = nn.Linear(16, 10), nn.Linear(16, 8), nn.Bilinear(10, 8, 12)
        self.c, self.head = nn.Linear(12, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.mix(F.relu(self.a(x)), F.relu(self.b(x))))
        return cast(Tensor, self.head(F.relu(self.c(x)).mean(1)))


def _rnn(layer: type[nn.RNNBase], *prunes: str, table: bool = False, **options: Any) -> Case:
    return case(lambda: Recurrent(layer, **options), sequence(), "a", "rnn", "b", *prunes, table=table)


SEQUENCE: dict[str, Case] = {
    "lstm": _rnn(nn.LSTM, table=True),
    "lstm_bidirectional": _rnn(nn.LSTM, bidirectional=True, table=True),
    "lstm_two_layers": _rnn(nn.LSTM, num_layers=2, table=True),
    "gru": _rnn(nn.GRU, table=True),
    "packed_swiglu": case(SwiGlu, sequence(), "up", table=True),
    "experts": case(Experts, sequence(), "experts.0.0", "experts.3.0", table=True),
    "gru_bidirectional": _rnn(nn.GRU, bidirectional=True),
    "gru_two_layers": _rnn(nn.GRU, num_layers=2),
    "lstm_deep": _rnn(nn.LSTM, num_layers=2, bidirectional=True),
    "lstm_no_bias": _rnn(nn.LSTM, bias=False),
    "lstm_last_state": _rnn(nn.LSTM, last=True),
    "gru_last_state": _rnn(nn.GRU, last=True, num_layers=2),
    "packed_swiglu_width": case(SwiGlu, sequence(), "up", kwargs={"width": True}),
    "packed_experts": case(PackedExperts, sequence(), "up"),
    "mixer": case(Mixer, images(), "tokens.0", "channels.0"),
    "mixer_width": case(Mixer, images(), "tokens.0", "channels.0", "embed", kwargs={"width": True}),
    "spatial_gate": case(SpatialGate, sequence(), "up"),
    "tied_embedding": case(lambda: Tied(False), tokens(), "emb", "up", "down"),
    "tied_embedding_norm": case(lambda: Tied(True), tokens(), "up", keeps=("emb",)),
    "tied_embedding_width": case(lambda: Tied(True), tokens(), "emb", "up", "down", kwargs={"width": True}),
    "patches": case(Patches, images(), "embed", "up", "down"),
    "two_heads": case(TwoHeads, sequence(), "a", "c", keeps=("b", "head"), outputs=("b", "head")),
    "bilinear_layer": case(Bilinear, sequence(), "c"),
}
