"""Data movement: channels that are cut, mixed, folded into pixels or met by a constant of their own."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.prune.cases import Case, Net, case, images, noise, unit

__all__ = ["MOVE"]


class Shuffle(nn.Module):
    """ShuffleNet: two groups interleaved, with sizes taken from the input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = unit(3, 16), unit(16, 16, groups=16)
        self.c = unit(16, 12, 1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).contiguous()
        return self.c(self.b(x.view(batch, -1, height, width)))


class ShuffleUnit(nn.Module):
    """ShuffleNet V2: half of the channels passes by, the other half is worked on, then both are interleaved."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.work, self.last = unit(3, 16), nn.Sequential(unit(8, 8, 1), unit(8, 8, groups=8)), unit(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(2):
            left, right = x.chunk(2, 1)
            x = torch.cat([left, self.work(right)], 1)
            x = F.channel_shuffle(x, 2)
        return self.last(x)


class Slice(nn.Module):
    """One slice of the channels goes on; where the rest goes too, indices of both must be kept apart."""

    def __init__(self, first: int, last: int | None) -> None:
        super().__init__()
        self.a, self.b = unit(3, 16), unit(8, 12)
        self.c, self.cut = unit(16, 12, 1), slice(first, last)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x[:, self.cut]) + self.c(x)


class Leading(nn.Module):
    """The first k channels, k being an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.k = 6
        self.a, self.b = unit(3, 16), unit(6, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)[:, : self.k])


class C2f(nn.Module):
    """YOLO's block: chunk, a chain of bottlenecks on the second half, everything concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.split = unit(3, 12), unit(12, 16, 1)
        self.blocks = nn.ModuleList(nn.Sequential(unit(8, 8), unit(8, 8)) for _ in range(2))
        self.join = unit(32, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.split(self.stem(x)).chunk(2, 1))
        for block in self.blocks:
            parts.append(parts[-1] + block(parts[-1]))
        return self.join(torch.cat(parts, 1))


class Upsample(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.up, self.norm = unit(3, 12), nn.Conv2d(12, 32, 3, padding=1), nn.BatchNorm2d(8)
        self.shuffle, self.b = nn.PixelShuffle(2), unit(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.norm(self.shuffle(self.up(self.a(x))))))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.glu, self.c = unit(3, 12), nn.Conv2d(12, 32, 3, padding=1), nn.GLU(1), unit(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.glu(self.b(self.a(x))))


class Constant(nn.Module):
    """A buffer per channel, multiplied or added."""

    constant: Tensor

    def __init__(self, add: bool, padding: int = 1) -> None:
        super().__init__()
        self.a, self.b, self.add = unit(3, 16), unit(16, 12, padding=padding), add
        self.register_buffer("constant", noise(torch.empty(1, 16, 1, 1)) + 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x + self.constant if self.add else x * self.constant)


class Einsum(nn.Module):
    """A product over the channels with a parameter, without a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.w = unit(3, 16), unit(20, 12), nn.Parameter(torch.randn(16, 20) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(torch.einsum("bchw,cd->bdhw", self.a(x), self.w)))


class Matmul(nn.Module):
    """Pixels times parameters, both as [in, out] and as a transposed [out, in]."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = unit(3, 16), nn.Linear(12, 5)
        self.w, self.v = nn.Parameter(torch.randn(16, 20) / 4), nn.Parameter(torch.randn(12, 20) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).flatten(2).transpose(1, 2)
        return self.head((F.relu(x @ self.w) @ self.v.t()).mean(1))


class Parts(nn.Module):
    """Split in unequal sizes; every part has a layer of its own, one part is unused."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = unit(3, 16), unit(4, 12), unit(10, 12, 5)

    def forward(self, x: Tensor) -> Tensor:
        first, second, _ = torch.split(self.a(x), [4, 10, 2], 1)
        return self.b(first) + self.c(second)


class Permuted(nn.Module):
    permutation: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = unit(3, 16), unit(16, 12, groups=2)
        self.register_buffer("permutation", torch.randperm(16))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.index_select(self.a(x), 1, self.permutation))


class Moved(nn.Module):
    """Any function of the features between two convolutions."""

    def __init__(self, move: Callable[[Tensor], Tensor], inner: int = 16, outer: int = 16) -> None:
        super().__init__()
        self.a, self.b, self.move = unit(3, inner), unit(outer, 12), move

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.move(self.a(x)))


class Detour(nn.Module):
    """As ``Moved``, but the function may stop the pruning of ``a``; ``c`` and ``b`` stay free."""

    def __init__(self, move: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.move = unit(3, 16), unit(16, 12), unit(12, 12), move

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.move(self.a(x))))


def interleave(x: Tensor) -> Tensor:
    return torch.stack([x, -x], 2).flatten(1, 2)


def space_to_depth(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 3, 5, 1, 2, 4)
    return x.reshape(batch, 4 * channels, height // 2, width // 2)


def focus(x: Tensor) -> Tensor:
    return torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)


def tail(x: Tensor) -> Tensor:
    """Negative bounds and steps."""
    return torch.cat([x[:, -6:], x[:, 0:10:2], x[:, 3:8]], 1)


def pooled(x: Tensor) -> Tensor:
    """Pyramid pooling: every branch has the channels again, resized."""
    coarse = F.interpolate(F.adaptive_avg_pool2d(x, 2), size=x.shape[2:], mode="bilinear", align_corners=False)
    return torch.cat([x, coarse, F.max_pool2d(x, 3, 1, 1)], 1)


def _net(make: Callable[[], nn.Module], *prunes: str, keeps: tuple[str, ...] = (), **options: bool) -> Case:
    prunes, keeps = tuple(f"body.{n}" for n in prunes), tuple(f"body.{n}" for n in keeps)
    return case(lambda: Net(make(), 12), images(), *prunes, keeps=keeps, **options)


MOVE: dict[str, Case] = {
    "channel_shuffle": _net(Shuffle, "a.0", "b.0", "c.0", table=True),
    "slice_middle": _net(lambda: Slice(4, 12), "a.0", "b.0", table=True),
    "slice_leading": _net(Leading, "a.0", "b.0", table=True),
    "c2f": _net(C2f, "stem.0", "split.0", "blocks.0.0.0", "join.0", table=True),
    "pixel_shuffle": _net(Upsample, "a.0", "up", "norm", "b.0", table=True),
    "pixel_unshuffle": _net(lambda: Moved(nn.PixelUnshuffle(2), 16, 64), "a.0", "b.0", table=True),
    "glu": _net(Gated, "a.0", "b", "c.0", table=True),
    "buffer_multiply": _net(lambda: Constant(False), "a.0", "b.0", table=True),
    "einsum_parameter": _net(Einsum, "a.0", "w", "b.0", table=True),
    "buffer_add": _net(lambda: Constant(True), "b.0", folds=True),
    "buffer_add_unpadded": _net(lambda: Constant(True, 0), "a.0", "b.0", folds=True),
    "shuffle_unit": _net(ShuffleUnit, "last.0"),
    "matmul_parameter": case(Matmul, images(), "a.0", "w"),
    "split_unequal": _net(Parts, "a.0", "b.0"),
    "index_permutation": _net(Permuted, "a.0", "b.0"),
    "slice_tail": _net(lambda: Moved(tail), "a.0", "b.0"),
    "roll_pixels": _net(lambda: Moved(lambda x: torch.roll(x, (1, 2), (2, 3))), "a.0"),
    "roll_channels": _net(lambda: Moved(lambda x: torch.roll(x, 3, 1)), "a.0", "b.0"),
    "flip_channels": _net(lambda: Moved(lambda x: x.flip(1)), "a.0", "b.0"),
    "interpolate": _net(lambda: Moved(lambda x: F.interpolate(x, scale_factor=2.0)), "a.0"),
    "interleave": _net(lambda: Moved(interleave, 16, 32), "a.0", "b.0"),
    "space_to_depth": _net(lambda: Moved(space_to_depth, 16, 64), "a.0", "b.0"),
    "focus": _net(lambda: Moved(focus, 8, 32), "a.0", "b.0"),
    "repeat_channels": _net(lambda: Moved(lambda x: x.repeat(1, 2, 1, 1), 12, 24), "a.0", "b.0"),
    "repeat_interleave": _net(lambda: Moved(lambda x: x.repeat_interleave(2, 1), 12, 24), "a.0", "b.0"),
    "maxout": _net(lambda: Moved(lambda x: x.unflatten(1, (2, -1)).amax(1), 32, 16), "a.0", "b.0"),
    "where": _net(lambda: Moved(lambda x: torch.where(x > 0.3, x, 0.1 * x)), "a.0"),
    "pyramid_pooling": _net(lambda: Moved(pooled, 8, 24), "a.0", "b.0"),
    "softmax_channels": _net(lambda: Detour(lambda x: x.softmax(1)), "b.0", keeps=("a.0",)),
    "cumsum_channels": _net(lambda: Detour(lambda x: x.cumsum(1)), "b.0"),
    "unknown_operator": _net(lambda: Detour(lambda x: torch.fft.fft(x, dim=1).real), "b.0", keeps=("a.0",)),
}
