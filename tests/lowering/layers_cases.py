"""Layers and products in the engines equal torch eager."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.lowering_cases import case, floats, ints

L, Q, V = floats(2, 4, 11), floats(2, 4, 9, 11), floats(2, 4, 5, 6, 7)
ROWS = floats(2, 6)
SEQUENCE = floats(2, 5, 6)
A, B = floats(2, 3, 4, 5), floats(2, 3, 5, 6)
TOKENS = ints(2, 5, low=0, high=7)
torch.manual_seed(0)


def spread(layer: nn.Module) -> nn.Module:
    """A norm with parameters and statistics as training leaves them."""
    for name, tensor in layer.state_dict().items():
        if tensor.is_floating_point():
            torch.nn.init.uniform_(tensor, 0.5 if "var" in name else -1.0, 1.5)
    return layer.eval()


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]  # type: ignore[no-any-return]


CONVOLUTIONS = [
    case("conv1d", nn.Conv1d(4, 6, 3, padding=1), L),
    case("conv2d", nn.Conv2d(4, 6, 3), Q),
    case("conv3d", nn.Conv3d(4, 2, 2, stride=(1, 2, 1)), V),
    case("conv2d without a bias", nn.Conv2d(4, 6, 1, bias=False), Q),
    case("grouped", nn.Conv2d(4, 6, 3, groups=2, stride=2), Q),
    case("depthwise", nn.Conv2d(4, 4, 3, groups=4, padding=1), Q),
    case("dilated, with a rectangular kernel", nn.Conv2d(4, 6, (3, 2), dilation=(2, 3), padding=(2, 1)), Q),
    case("same padding of an even kernel", nn.Conv2d(4, 6, (4, 3), padding="same"), Q),
    case("same padding, dilated", nn.Conv2d(4, 6, 2, padding="same", dilation=3), Q),
    case("valid padding", nn.Conv2d(4, 6, 3, padding="valid"), Q),
    case("reflect padding", nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), Q),
    case("circular padding", nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), L),
    case(
        "asymmetric padding in front",
        nn.Sequential(nn.ZeroPad2d((0, 1, 2, 1)), nn.Conv2d(4, 6, 3, stride=2, padding=1)),
        Q,
    ),
    case("padding with ones in front", nn.Sequential(nn.ConstantPad2d(1, 1.0), nn.Conv2d(4, 6, 3)), Q),
    case("negative padding in front", nn.Sequential(nn.ZeroPad2d((-1, 1, 0, 0)), nn.Conv2d(4, 6, 3)), Q),
    case(
        "functional, with a computed weight",
        lambda x: F.conv2d(x, x.mean(0).mean((1, 2)).expand(2, 4).reshape(2, 4, 1, 1)),
        Q,
    ),
    case("transposed", nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), Q),
    case("transposed, grouped, dilated", nn.ConvTranspose2d(4, 6, 3, groups=2, dilation=2), Q),
    case("transposed 1d", nn.ConvTranspose1d(4, 2, 4, stride=3, padding=2), L),
    case("transposed 3d without a bias", nn.ConvTranspose3d(4, 2, 2, stride=2, bias=False), V),
]

PRODUCTS = [
    case("linear of rows", nn.Linear(6, 3), ROWS),
    case("linear of a sequence", nn.Linear(6, 3), SEQUENCE),
    case("linear of many dimensions", nn.Linear(5, 3), A),
    case("linear without a bias", nn.Linear(6, 3, bias=False), SEQUENCE),
    case("linear with a computed weight", lambda x: F.linear(x, x.sum((0, 1)).expand(3, 6)), SEQUENCE),
    case("matmul", torch.matmul, A, B),
    case("matmul broadcast", lambda x, y: x @ y[:, :1], A, B),
    case("matmul of a lower rank", lambda x, y: x @ y[0, 0], A, B),
    case("matmul by a vector", lambda x: x @ torch.arange(5.0), A),
    case("bmm", lambda x, y: torch.bmm(x[:, 0], y[:, 0]), A, B),
    case("mm", lambda x: torch.mm(x, torch.ones(6, 2)), ROWS),
    case("addmm", lambda x: torch.addmm(torch.ones(2), x, torch.ones(6, 2), beta=0.5, alpha=2), ROWS),
    case("baddbmm", lambda x, y: torch.baddbmm(x[:, 0, :, :1], x[:, 0], y[:, 0], beta=0.3), A, B),
    case("einsum", lambda x, y: torch.einsum("bhik, bhkj -> bhij", x, y), A, B),
    case("einsum transposed", lambda x, y: torch.einsum("bhik,bhkj->bjih", x, y), A, B),
    case("bilinear scores", lambda x: torch.einsum("bid,bjd->bij", x, x), SEQUENCE),
]

NORMS = [
    case("batch norm", spread(nn.BatchNorm2d(4)), Q),
    case("batch norm of rows", spread(nn.BatchNorm1d(6)), ROWS),
    case("batch norm 1d", spread(nn.BatchNorm1d(4)), L),
    case("batch norm 3d", spread(nn.BatchNorm3d(4)), V),
    case("batch norm without parameters", spread(nn.BatchNorm2d(4, affine=False)), Q),
    case(
        "batch norm without statistics",
        spread(nn.BatchNorm2d(4, track_running_stats=False)),
        floats(1, 4, 9, 11),
        static=True,
    ),
    case("layer norm", spread(nn.LayerNorm(6)), SEQUENCE),
    case("layer norm of two dimensions", spread(nn.LayerNorm((9, 11))), Q),
    case("layer norm without parameters", nn.LayerNorm(6, elementwise_affine=False), SEQUENCE),
    case("layer norm without a bias", spread(nn.LayerNorm(6, bias=False)), SEQUENCE),
    case("group norm", spread(nn.GroupNorm(2, 4)), Q),
    case("group norm without parameters", nn.GroupNorm(2, 4, affine=False), Q),
    case("group norm of rows", spread(nn.GroupNorm(3, 6)), ROWS),
    case("instance norm", spread(nn.InstanceNorm2d(4, affine=True)), Q),
    case("instance norm without parameters", nn.InstanceNorm1d(4), L),
    case("rms norm", spread(nn.RMSNorm(6)), SEQUENCE),
    case("local response norm", nn.LocalResponseNorm(3), Q),
    case("weight norm", nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)), SEQUENCE),
    case("embedding", nn.Embedding(7, 3), TOKENS),
    case("embedding with padding", nn.Embedding(7, 3, padding_idx=0), TOKENS),
    case("dropout", nn.Dropout(0.5), SEQUENCE),
    case("dropout of channels", nn.Sequential(nn.Conv2d(4, 4, 1), nn.Dropout2d(0.5)), Q),
    case("alpha dropout", nn.Sequential(nn.Linear(6, 6), nn.AlphaDropout(0.5)), SEQUENCE),
    case("multi-head attention", SelfAttention(), SEQUENCE),
]


class WithStates(nn.Module):
    """A recurrent layer that is given its first states."""

    def __init__(self, layer: nn.Module, pair: bool) -> None:
        super().__init__()
        self.layer, self.pair = layer, pair

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        h, c = h.transpose(0, 1).contiguous(), c.transpose(0, 1).contiguous()
        y, states = self.layer(x, (h, c) if self.pair else h)
        return y, states[1] if self.pair else states


class LengthFirst(nn.Module):
    """A recurrent layer whose batch is dimension 1."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, (h, _) = self.layer(x.transpose(0, 1))
        return y, h


H, C = floats(2, 2, 3), floats(2, 2, 3, seed=1)
RECURRENT = [
    case("lstm, batch first", nn.LSTM(6, 3, batch_first=True), SEQUENCE),
    case("lstm, both directions, two layers", nn.LSTM(6, 3, 2, batch_first=True, bidirectional=True), SEQUENCE),
    case("lstm without a bias", nn.LSTM(6, 3, bias=False, batch_first=True), SEQUENCE),
    case("lstm, length first", LengthFirst(), SEQUENCE),
    case("lstm with states", WithStates(nn.LSTM(6, 3, 2, batch_first=True), True), SEQUENCE, H, C),
    case("gru, batch first", nn.GRU(6, 3, batch_first=True), SEQUENCE),
    case("gru, both directions, two layers", nn.GRU(6, 3, 2, batch_first=True, bidirectional=True), SEQUENCE),
    case(
        "gru, two directions, states",
        WithStates(nn.GRU(6, 3, bidirectional=True, batch_first=True), False),
        SEQUENCE,
        H,
        C,
    ),
    case("one sequence", nn.GRU(6, 3), floats(5, 6), static=True),
]

TABLES = {"convolutions": CONVOLUTIONS, "products": PRODUCTS, "norms": NORMS, "recurrent": RECURRENT}
