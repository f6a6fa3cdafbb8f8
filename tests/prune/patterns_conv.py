"""Convolutional patterns: what ties channels of different layers together."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.prune.cases import Case, Net, case, images, unit

__all__ = ["CONV"]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(3, 16)
        self.a = unit(16, 24)
        self.b = nn.Sequential(nn.Conv2d(24, 16, 3, padding=1), nn.BatchNorm2d(16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return F.relu(x + self.b(self.a(x)))


class DenseConcat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(3, 12)
        self.a = unit(12, 8)
        self.b = nn.Sequential(nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 8, 3, padding=1))
        self.last = nn.Sequential(nn.BatchNorm2d(28), nn.ReLU(), nn.Conv2d(28, 16, 1), nn.BatchNorm2d(16))

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.stem(x)]
        parts.append(self.a(parts[0]))
        parts.append(self.b(torch.cat(parts, 1)))
        return F.relu(self.last(torch.cat(parts, 1)))


class CatSelf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = unit(3, 12), nn.BatchNorm2d(24)
        self.b = unit(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(F.relu(self.norm(torch.cat([x, x], 1))))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = unit(3, 16), unit(16, 16)
        self.squeeze, self.excite = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        gate = self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))).sigmoid()
        return self.b(x * gate)


class FlattenFc(nn.Module):
    def __init__(self, channels_last: bool = False) -> None:
        super().__init__()
        self.channels_last = channels_last
        self.a, self.pool = unit(3, 12), nn.MaxPool2d(2)
        self.fc = nn.Linear(12 * 16, 20)
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.a(x))
        if self.channels_last:
            x = x.permute(0, 2, 3, 1)
        return self.head(F.relu(self.fc(torch.flatten(x, 1))))


class Shared(nn.Module):
    """One convolution used three times, on its own output: its input and output are the same channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared = unit(3, 16), nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = F.relu(self.shared(x))
        return x


class TwoInputs(nn.Module):
    """One layer used on two different features."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = unit(3, 12), unit(3, 12, 5)
        self.both, self.join = unit(12, 16), unit(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(torch.cat([self.both(self.a(x)), self.both(self.b(x).abs())], 1))


class Grouped(nn.Module):
    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.stem = unit(3, inputs)
        self.grouped = unit(inputs, outputs, groups=groups)
        self.last = unit(outputs, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.grouped(self.stem(x)))


class Transposed(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.stem = unit(3, 16)
        self.up = nn.ConvTranspose2d(16, 12, 4, stride=2, padding=1, groups=groups)
        self.norm, self.last = nn.BatchNorm2d(12), unit(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.norm(self.up(self.stem(x)))))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = unit(3, 12)
        self.w, self.c = nn.Parameter(torch.randn(16, 12, 3, 3) / 10), nn.Parameter(torch.zeros(16))
        self.b = unit(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(F.conv2d(self.a(x), self.w, self.c, padding=1)))


class Standardized(nn.Conv2d):
    """Weight standardization: the weight is computed in forward, over its input channels too."""

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.weight.mean((1, 2, 3), keepdim=True), self.weight.var((1, 2, 3), keepdim=True)
        weight = (self.weight - mean) * torch.rsqrt(var + 1e-4)
        return F.conv2d(x, weight, self.bias, padding=self.padding)


class WeightStandardized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = unit(3, 12), Standardized(12, 16, 3, padding=1), unit(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(self.a(x))))


class Between(nn.Module):
    """A function between two convolutions; where f(0) is not 0 a removed channel leaves a constant."""

    def __init__(self, function: nn.Module, padding: int = 0) -> None:
        super().__init__()
        self.a, self.function = nn.Conv2d(3, 16, 3, padding=1), function
        self.b, self.norm = nn.Conv2d(16, 12, 3, padding=padding), nn.BatchNorm2d(12)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.b(self.function(self.a(x)))))


class Normed(nn.Module):
    def __init__(self, norm: nn.Module, **options: Any) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 16, 3, padding=1, **options), norm, unit(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.norm(self.a(x))))


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class ConvNextBlock(nn.Module):
    """Depthwise, LayerNorm over the channels, MLP in channels-last order, per-channel scale ``gamma``."""

    def __init__(self, grn: bool = False) -> None:
        super().__init__()
        self.stem, self.depthwise = unit(3, 16), nn.Conv2d(16, 16, 7, padding=3, groups=16)
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.gamma, self.grn = nn.Parameter(torch.ones(16)), grn

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.gelu(self.up(self.norm(self.depthwise(x).permute(0, 2, 3, 1))))
        if self.grn:
            energy = y.pow(2).sum((1, 2), keepdim=True).sqrt()
            y = y + y * (energy / (energy.mean(-1, keepdim=True) + 1e-6))
        return x + (self.gamma * self.down(y)).permute(0, 3, 1, 2)


class PadShortcut(nn.Module):
    """The parameter-free shortcut of the first ResNets on CIFAR: every second pixel, zero channels around."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a = unit(3, 16), unit(16, 24, stride=2)
        self.b = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1), nn.BatchNorm2d(24))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return F.relu(self.b(self.a(x)) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))


class Cbam(nn.Module):
    """Channel attention (shared MLP), then a gate from the mean and the largest of the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = unit(3, 16), unit(16, 12)
        self.mlp = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 16))
        self.spatial = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        gate = torch.sigmoid(self.mlp(x.mean((2, 3))) + self.mlp(x.amax((2, 3))))
        x = x * gate[:, :, None, None]
        both = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return self.b(x * torch.sigmoid(self.spatial(both)))


class SplitAttention(nn.Module):
    """ResNeSt's radix-2 unit: groups, softmax over the radix, burnt-in sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = unit(3, 16), unit(16, 32, groups=2)
        self.fc1, self.norm, self.fc2 = nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 32, 1)
        self.last = unit(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.stem(x))
        batch, channels, height, width = x.shape
        x = x.reshape(batch, 2, channels // 2, height, width)
        gap = x.sum(1).mean((2, 3), keepdim=True)
        weights = self.fc2(F.relu(self.norm(self.fc1(gap)))).view(batch, 2, -1).softmax(1)
        return self.last((x * weights.view(batch, 2, channels // 2, 1, 1)).sum(1))


class Bilinear(nn.Module):
    """Products of all pairs of channels of two features, flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = unit(3, 8), unit(3, 6), nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.einsum("bchw,bdhw->bcd", self.a(x), self.b(x)).flatten(1) / 64)


class Plain(nn.Module):
    """Convolutions of any dimension."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        conv, norm = ((nn.Conv1d, nn.BatchNorm1d), (nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d))[
            dimensions - 1
        ]
        self.a, self.norm, self.b, self.head = conv(3, 12, 3), norm(12), conv(12, 16, 3), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(F.relu(self.norm(self.a(x)))))
        return self.head(x.flatten(2).mean(2))


def _net(make: Any, channels: int, *prunes: str, **options: Any) -> Case:
    return case(lambda: Net(make(), channels), images(), *(f"body.{name}" for name in prunes), **options)


def _between(make: Any, padding: int, *prunes: str, **options: Any) -> Case:
    return _net(lambda: Between(make(), padding), 12, "b", *prunes, **options)


CONV: dict[str, Case] = {
    "conv_bn_relu": _net(lambda: nn.Sequential(unit(3, 16), unit(16, 24)), 24, "0.0", "0.1", "1.0", table=True),
    "residual": _net(Residual, 16, "stem.0", "a.0", "b.0", table=True),
    "dense_concat": _net(DenseConcat, 16, "stem.0", "a.0", "b.2", "last.2", table=True),
    "cat_self": _net(CatSelf, 12, "a.0", "norm", "b.0", table=True),
    "se_gate": _net(SqueezeExcite, 16, "a.0", "squeeze", "excite", "b.0", table=True),
    "flatten_fc": case(FlattenFc, images(), "a.0", "fc", table=True),
    "shared_module": _net(Shared, 16, "stem.0", "shared", table=True),
    "group_conv": _net(lambda: Grouped(16, 24, 4), 12, "stem.0", "grouped.0", "last.0", table=True),
    "depthwise": _net(lambda: Grouped(16, 16, 16), 12, "stem.0", "grouped.0", "grouped.1", table=True),
    "depthwise_multiplier": _net(lambda: Grouped(12, 24, 12), 12, "stem.0", "grouped.0", table=True),
    "conv_transpose_groups": _net(lambda: Transposed(2), 8, "stem.0", "up", "norm", table=True),
    "nhwc_flatten": case(lambda: FlattenFc(True), images(), "a.0", "fc", table=True),
    "functional_conv": _net(Functional, 8, "a.0", "w", "b.0", table=True),
    "conv_transpose": _net(lambda: Transposed(1), 8, "stem.0", "up", "norm"),
    "two_inputs": _net(TwoInputs, 16, "a.0", "b.0", "both.0", "join.0"),
    "weight_standardized": _net(WeightStandardized, 12, "b.weight", "c.0"),
    "sigmoid_between": _between(nn.Sigmoid, 0, "a", folds=True),
    "sigmoid_between_padded": _between(nn.Sigmoid, 1, folds=True),
    "softplus_between": _between(nn.Softplus, 0, "a", folds=True),
    "softplus_between_padded": _between(nn.Softplus, 1, folds=True),
    "prelu": _between(lambda: nn.PReLU(16), 1, "a"),
    "group_norm": _net(lambda: Normed(nn.GroupNorm(4, 16)), 12, "a", "norm", "b.0"),
    "group_norm_one": _net(lambda: Normed(nn.GroupNorm(1, 16)), 12, "b.0", keeps=("body.a",)),
    "instance_norm": _net(lambda: Normed(nn.InstanceNorm2d(16)), 12, "a", "b.0"),
    "instance_norm_affine": _net(lambda: Normed(nn.InstanceNorm2d(16, affine=True)), 12, "a", "norm", "b.0"),
    "batch_norm_plain": _net(lambda: Normed(nn.BatchNorm2d(16, affine=False)), 12, "a", "b.0"),
    "layer_norm_2d": _net(lambda: Normed(LayerNorm2d(16)), 12, "b.0", keeps=("body.a",)),
    "layer_norm_2d_width": _net(lambda: Normed(LayerNorm2d(16)), 12, "a", "norm", "b.0", kwargs={"width": True}),
    "reflect_padding": _net(
        lambda: nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, padding_mode="reflect"), nn.ReLU(), unit(16, 12)),
        12,
        "0",
        "2.0",
    ),
    "convnext_block": _net(ConvNextBlock, 16, "up"),
    "convnext_block_width": _net(
        ConvNextBlock, 16, "up", "stem.0", "depthwise", "norm", "down", "gamma", kwargs={"width": True}
    ),
    "global_response_norm": case(
        lambda: Net(nn.Sequential(ConvNextBlock(True), unit(16, 12)), 12), images(), "body.1.0", "body.0.up"
    ),
    "pad_shortcut": _net(PadShortcut, 24, "stem.0", "a.0", "b.0"),
    "cbam": _net(Cbam, 12, "mlp.0", "b.0"),
    "split_attention": _net(SplitAttention, 12, "stem.0", "fc1", "last.0"),
    "bilinear_pooling": case(Bilinear, images(), "a.0"),
    "conv1d": case(lambda: Plain(1), (torch.randn(2, 3, 12),), "a", "b"),
    "conv3d": case(lambda: Plain(3), (torch.randn(2, 3, 6, 6, 6),), "a", "b"),
}
