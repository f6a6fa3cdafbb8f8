"""Views, joins, slices, indexing and new tensors in the engines equal torch eager, at every batch size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.lowering_cases import bools, case, floats, ints

X = floats(2, 3, 4, 5)
Y = floats(2, 3, 4, 5, seed=1)
M = floats(2, 6, 4)
I = ints(2, 3, 4)  # noqa: E741
B = bools(2, 6, 4)
ONES = floats(2, 1, 3, 1)

VIEWS = [
    case("flatten", lambda x: x.flatten(1), X),
    case("flatten the batch too", lambda x: x.flatten(0, 1), X),
    case("flatten everything", lambda x: x.flatten(), X),
    case("reshape with an inferred size", lambda x: x.reshape(x.shape[0], -1, 10), X),
    case("reshape with a computed size", lambda x: x.reshape(x.shape[0] * 3, 4, 5), X),
    case("reshape two computed sizes", lambda x: x.reshape(x.shape[0] * 3, 2, x.shape[0] * 10 // x.shape[0]), X),
    case("batch in the middle", lambda x: x.permute(1, 0, 2, 3).reshape(3, x.shape[0], 20), X),
    case("batch behind and merged", lambda x: x.permute(1, 0, 2, 3).reshape(3, -1), X),
    case("view", lambda x: x.view(x.size(0), 3, 20), X),
    case("view_as", lambda x, y: x.view_as(y.permute(0, 1, 2, 3)), X, Y),
    case("unflatten", lambda x: x.unflatten(1, (2, 3)), M),
    case("heads of attention", lambda x: x.view(x.shape[0], 6, 2, 2).transpose(1, 2).reshape(-1, 6, 2), M),
    case("unsqueeze", lambda x: x.unsqueeze(1), X),
    case("unsqueeze behind", lambda x: x.unsqueeze(-1), X),
    case("squeeze", lambda x: x.squeeze(1), ONES),
    case("squeeze every one", torch.squeeze, ONES),
    case("squeeze of several", lambda x: x.squeeze((1, -1)), ONES),
    case("squeeze of another size", lambda x: x.squeeze(2), ONES),
    case("permute", lambda x: x.permute(0, -1, 1, 2), X),
    case("transpose", lambda x: x.transpose(1, -1), X),
    case("swapaxes", lambda x: x.swapaxes(-2, -1), X),
    case("T of the last two", lambda x: x.mT, X),
    case("t", lambda x: x[:, 0, 0].t(), X),
    case("movedim", lambda x: x.movedim(1, -1), X),
    case("movedim of several", lambda x: x.movedim((1, 2), (-1, 1)), X),
    case("contiguous behind permute", lambda x: x.permute(0, 2, 3, 1).contiguous().view(x.shape[0], -1), X),
    case("size arithmetic", lambda x: x.reshape(x.shape[0] * x.shape[1] // 3, (x.shape[2] + 1) * 12 // 3 * 3 // 1), X),
]

REPEATS = [
    case("expand", lambda x: x.expand(-1, 4, -1, 2), ONES),
    case("expand with the batch", lambda x: x.expand(x.shape[0], 4, 3, 1), ONES),
    case("expand a token to the batch", lambda x: torch.ones(1, 1, 4).expand(x.shape[0], -1, -1) + x[:, :1], M),
    case("expand in front", lambda x: x.expand(5, -1, -1, -1, -1), ONES),
    case("expand_as", lambda x, y: x[:, :1].expand_as(y), M, M),
    case("broadcast_to", lambda x: x.broadcast_to(x.shape[0], 4, 3, 2), ONES),
    case("repeat", lambda x: x.repeat(1, 2, 3), M),
    case("repeat in front", lambda x: x.repeat(2, 1, 1, 1), M),
    case("repeat the batch", lambda x: x.repeat(3, 1, 1), M),
    case("tile", lambda x: x.tile((2, 1)), M),
    case("repeat_interleave", lambda x: x.repeat_interleave(3, dim=1), M),
    case("roll", lambda x: x.roll(1, 1), M),
    case("roll backwards in two", lambda x: x.roll((-2, 1), (1, 2)), M),
    case("roll by more than the size", lambda x: x.roll(8, 1), M),
    case("roll the batch by more than its size", lambda x: x.roll(-5, 0), M),
    case("roll by the size", lambda x: x.roll(6, 1), M),
    case("roll the batch", lambda x: x.roll(1, 0), M),
    case("flip", lambda x: x.flip(1, -1), M),
    case("flip the batch", lambda x: x.flip(0), M),
]

SLICES = [
    case("slice", lambda x: x[:, 1:3], M),
    case("slice with steps", lambda x: x[:, 1::2], M),
    case("slice from the end", lambda x: x[:, -3:-1], M),
    case("slice beyond the end", lambda x: x[:, 2:100], M),
    case("slice the batch", lambda x: x[:-1], M, fixed=True),
    case("ellipsis", lambda x: x[..., 1], X),
    case("select", lambda x: x.select(1, 2), M),
    case("select the last", lambda x: x[:, -1], M),
    case("select of the batch", lambda x: x[-1], M),
    case("narrow", lambda x: x.narrow(1, 1, 3), M),
    case("narrow from the end", lambda x: x.narrow(1, -2, 2), M),
    case("diff", lambda x: x.diff(dim=1), M),
    case("diff of booleans", lambda x: x.diff(dim=-1), B),
    case("diff with something in front", lambda x: x.diff(dim=1, prepend=x[:, :1] * 2), M),
    case("split", lambda x: x.split(4, 1), M),
    case("split in sizes", lambda x: x.split([1, 2, 3], -2), M),
    case("chunk", lambda x: x.chunk(4, 1), M),
    case("chunk in one", lambda x: x.chunk(1, 1), M),
    case("tensor_split", lambda x: x.tensor_split(4, 1), M),
    case("unbind", lambda x: x.unbind(1), M),
    case("cat", lambda x, y: torch.cat([x, y], 1), X, Y),
    case("cat behind", lambda x, y: torch.cat([x, y, x], -1), X, Y),
    case("cat of the batch", lambda x, y: torch.cat([x, y]), X, Y),
    case("cat of mixed types", lambda x, y: torch.cat([x, y[..., 0]], 1), I, X),
    case("stack", lambda x, y: torch.stack([x, y], 1), X, Y),
    case("stack behind", lambda x, y: torch.stack([x, y], -1), X, Y),
    case("assign a slice", lambda x: _assigned(x), M),
    case("unfold", lambda x: x.unfold(1, 3, 2), M, exporter=True),
]


def _assigned(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 1:3] = x[:, 3:5] * 2
    y[:, -1:] = 0
    return y


ROWS = torch.tensor([2, 0, 1, 2])
PLACES = ints(2, 6, 4, low=0, high=6)
TOKENS = ints(2, 5, low=0, high=6)

INDEXING = [
    case("index_select", lambda x: x.index_select(1, torch.tensor([2, 0, 5])), M),
    case("index_select behind", lambda x: x.index_select(-1, torch.tensor([3, 3])), M),
    case("gather", lambda x, i: x.gather(1, i), M, PLACES),
    case("gather fewer", lambda x, i: x.gather(-2, i[:, :2, :3]), M, PLACES, only="onnxruntime"),
    case("index by a tensor", lambda x: x[:, torch.tensor([1, -1])], M),
    case("index by a matrix", lambda x: x[:, torch.tensor([[1, 2], [0, -1]])], M),
    case("index two dimensions", lambda x: x.transpose(0, 1)[torch.tensor([1, 2]), torch.tensor([0, 1])], M),
    case("index of each sample", lambda x, i: x[torch.arange(x.shape[0]), i[:, 0]], M, TOKENS),
    case("index two behind the batch", lambda x: x[:, torch.tensor([1, 2]), torch.tensor([0, 3])], M, exporter=True),
    case("take_along_dim", lambda x, i: torch.take_along_dim(x, i, 1), M, PLACES, fixed=True, exporter=True),
    case("one_hot", lambda i: F.one_hot(i, 6), TOKENS),
    case("embedding", lambda i: F.embedding(i, torch.arange(12.0).view(6, 2)), TOKENS),
]

PADDING = [
    case("pad", lambda x: F.pad(x, (1, 2)), M),
    case("pad with a number", lambda x: F.pad(x, (1, 2, 0, 3), value=-1.5), M),
    case("pad of integers", lambda x: F.pad(x, (1, 1), value=3), I),
    case("crop", lambda x: F.pad(x, (-1, -1, 1, 0)), M),
    case("pad the batch", lambda x: F.pad(x, (0, 0, 0, 0, 0, 1)), M),
    case("reflect", lambda x: F.pad(x, (1, 2, 2, 1), mode="reflect"), X),
    case("replicate", lambda x: F.pad(x, (1, 2, 3, 0), mode="replicate"), X),
    case("replicate 1d", lambda x: F.pad(x, (2, 1), mode="replicate"), M),
    case("circular", lambda x: F.pad(x, (1, 2, 2, 1), mode="circular"), X),
]

CREATION = [
    case("arange", lambda x: x + torch.arange(4), M),
    case("arange of the batch", lambda x: torch.arange(x.shape[0]).float() + x.sum((1, 2)), M),
    case("arange with steps", lambda x: x[:, :3] + torch.arange(8.0, 0.0, -2.0), M),
    case("linspace", lambda x: x * torch.linspace(-1, 1, 4), M),
    case("zeros", lambda x: torch.cat([x, torch.zeros(x.shape[0], 1, 4)], 1), M),
    case("full", lambda x: torch.full((x.shape[0], 3), 2.5), M),
    case("large full", lambda x: torch.full((40, 40), 2.5) + x[0, 0, 0], M),
    case("ones_like", lambda x: torch.ones_like(x), M),
    case("zeros_like of another type", lambda x: torch.zeros_like(x, dtype=torch.int64), M),
    case("full_like", lambda x: torch.full_like(x, -2.0), M),
    case("new_zeros", lambda x: x.new_zeros(x.shape[0], 2), M),
    case("new_full", lambda x: x.new_full((x.shape[0], 2), 7.0), M),
    case("scalar_tensor", lambda x: torch.where(x > 0, torch.tensor(1.5), x), M),
    case("tril", lambda x: x.tril(), M),
    case("triu above", lambda x: x.triu(1), M),
    case("tril of a mask", lambda x: torch.ones(4, 4, dtype=torch.bool).tril(-1) & (x[:, :4] > 0), M),
    case("eye", lambda x: x[:, :4] @ torch.eye(4), M),
    case(
        "meshgrid",
        lambda x: x[:, :2, :3] + torch.meshgrid(torch.arange(2), torch.arange(3), indexing="ij")[0],
        M,
        exporter=True,
    ),
]

TABLES = {
    "views": VIEWS,
    "repeats": REPEATS,
    "slices": SLICES,
    "indexing": INDEXING,
    "padding": PADDING,
    "creation": CREATION,
}
