"""Patterns and shares: exact counts, the right axis, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fxcompress.errors import PruneError
from fxcompress.layers import TransposedLinear
from fxcompress.sparse.layers import from_rows, reduction_size, to_rows
from fxcompress.sparse.pattern import Pattern, lowest, lowest_of_all, parse_pattern
from fxcompress.sparse.settings import Settings

LAYERS: dict[str, Any] = {
    "linear": lambda: nn.Linear(8, 6),
    "transposed_linear": lambda: TransposedLinear(nn.Parameter(torch.randn(8, 6)), None),
    "conv1d": lambda: nn.Conv1d(8, 6, 5),
    "conv2d": lambda: nn.Conv2d(8, 6, (3, 2)),
    "conv2d_groups": lambda: nn.Conv2d(8, 6, 3, groups=2),
    "conv3d": lambda: nn.Conv3d(8, 4, 2),
    "conv_transpose2d": lambda: nn.ConvTranspose2d(8, 6, 3),
    "conv_transpose1d_groups": lambda: nn.ConvTranspose1d(8, 6, 3, groups=2),
}


@pytest.mark.parametrize("name", LAYERS)
def test_rows_come_back(name: str) -> None:
    layer = LAYERS[name]()
    rows = to_rows(layer, layer.weight.detach())
    assert rows.shape[-1] % reduction_size(layer) == 0
    assert torch.equal(from_rows(layer, rows), layer.weight)


@pytest.mark.parametrize("name", LAYERS)
def test_a_row_is_what_one_output_channel_sums_over(name: str) -> None:
    """One output channel of the layer, alone in the gradient, touches exactly one row; its inputs run fastest."""
    layer = LAYERS[name]()
    spatial = layer.weight.dim() - 2
    groups = getattr(layer, "groups", 1)
    x = torch.randn(2, 8, *[7] * spatial) if spatial else torch.randn(2, 8)
    for channel in range(3):
        (gradient,) = torch.autograd.grad(layer(x)[:, channel].sum(), layer.weight)
        rows = to_rows(layer, gradient).flatten(0, 1)
        assert (rows[channel] != 0).all()
        assert (rows != 0).any(-1).sum() == 1
    size = reduction_size(layer)
    assert size == 8 // groups
    x = x.clone()
    x[:, 1:] = 0  # only the first input channel is left
    (gradient,) = torch.autograd.grad(layer(x)[:, 0].sum(), layer.weight)
    seen = (to_rows(layer, gradient)[0, 0] != 0).nonzero().flatten()
    assert (seen % size == 0).all() and len(seen) == to_rows(layer, gradient).shape[-1] // size


@given(n=st.integers(1, 7), more=st.integers(1, 8), groups=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_n_of_every_m_are_kept(n: int, more: int, groups: int, seed: int) -> None:
    pattern = Pattern(n, n + more)
    torch.manual_seed(seed)
    scores = torch.randint(0, 4, (3, groups * pattern.m)).float()  # many ties
    pruned = pattern.prune(scores)
    grouped = pruned.unflatten(-1, (-1, pattern.m))
    assert (grouped.sum(-1) == more).all()
    values = scores.unflatten(-1, (-1, pattern.m))
    worst_kept = values.masked_fill(grouped, float("inf")).amin(-1)
    best_pruned = values.masked_fill(~grouped, -float("inf")).amax(-1)
    assert (worst_kept >= best_pruned).all()


@given(share=st.floats(0, 0.999), rows=st.integers(1, 5), columns=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_shares_are_exact(share: float, rows: int, columns: int) -> None:
    scores = torch.randint(0, 3, (1, rows, columns)).double()
    assert (lowest(scores, share, 1).sum(-1) == round(share * columns)).all()
    assert int(lowest(scores, share, 3).sum()) == round(share * rows * columns)
    both = lowest_of_all([scores, scores[..., :1]], share)
    assert sum(int(p.sum()) for p in both) == round(share * (rows * columns + rows))


def test_patterns_are_read() -> None:
    assert parse_pattern("2:4") == parse_pattern((2, 4)) == parse_pattern([2, 4]) == Pattern(2, 4)
    assert parse_pattern(None) is None
    assert str(Pattern(1, 4)) == "1:4" and Pattern(1, 4).sparsity == 0.75


@pytest.mark.parametrize("wrong", ["4", "2-4", "4:2", "4:4", "0:4", (2,), (2.0, 4), (True, 4), 3, ("2", "4")])
def test_wrong_patterns_are_refused(wrong: Any) -> None:
    with pytest.raises(PruneError, match="FXC-PRUNE-202"):
        parse_pattern(wrong)


@pytest.mark.parametrize(
    ("options", "id_"),
    [
        ({"sparsity": 0.5, "method": "movement"}, 220),
        ({"sparsity": 0.5, "scope": "block"}, 221),
        ({}, 222),
        ({"sparsity": 1.0}, 223),
        ({"sparsity": -0.1}, 223),
        ({"sparsity": True}, 223),
        ({"sparsity": 0.7, "pattern": "2:4"}, 224),
        ({"pattern": "2:4", "scope": "global"}, 225),
        ({"sparsity": 0.5, "method": "wanda", "scope": "global"}, 225),
        ({"sparsity": 0.5, "method": "sparsegpt", "scope": "global"}, 225),
        ({"pattern": "2:4", "block": 2}, 225),
        ({"sparsity": 0.5, "method": "sparsegpt", "block": 2}, 225),
        ({"sparsity": 0.5, "permute": True}, 225),
        ({"sparsity": 0.5, "samples": 0}, 226),
        ({"sparsity": 0.5, "block": 1.5}, 226),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], id_: int) -> None:
    with pytest.raises(PruneError, match=f"FXC-PRUNE-{id_}"):
        Settings(**options)
