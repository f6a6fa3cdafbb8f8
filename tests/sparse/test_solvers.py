"""Wanda and SparseGPT against plain float64 implementations of the published formulas, and their order of merit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.layerwise.statistics import InputStatistics, input_rows
from fxcompress.sparse.pattern import Pattern
from fxcompress.sparse.solvers import DAMPING, sparsegpt


def correlated(samples: int, features: int, seed: int = 0) -> Tensor:
    """Inputs with strong correlations and features of different size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features // 3, features, generator=generator)
    noise = 0.3 * torch.randn(samples, features, generator=generator)
    scale = torch.rand(features, generator=generator) * 2 + 0.1
    return (torch.randn(samples, features // 3, generator=generator) @ mixing + noise) * scale


def naive_sparsegpt(weight: Tensor, x: Tensor, target: float | Pattern, width: int = 128) -> Tensor:
    """Optimal brain surgery, row by row: the inverse Hessian of the columns still open is computed anew each time."""
    w = weight.double().clone()
    hessian = x.double().T @ x.double()
    hessian += DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    columns = w.shape[1]
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(columns)]
    cost = torch.stack([inverse[0, 0] for inverse in inverses])
    mask = torch.zeros_like(w, dtype=torch.bool)
    for j in range(columns):
        if isinstance(target, float) and j % width == 0:
            saliency = w[:, j : j + width] ** 2 / cost[j : j + width]
            count = round(target * saliency.numel())
            order = saliency.flatten().argsort()[:count]
            mask[:, j : j + width] = (
                torch.zeros(saliency.numel(), dtype=torch.bool).index_fill(0, order, True).view_as(saliency)
            )
        for row in range(len(w)):
            if isinstance(target, Pattern) and j % target.m == 0:
                saliency = w[row, j : j + target.m] ** 2 / cost[j : j + target.m]
                mask[row, j + saliency.argsort()[: target.m - target.n]] = True
            if mask[row, j]:
                w[row, j:] -= w[row, j] / inverses[j][0, 0] * inverses[j][0]
                w[row, j] = 0
    return w


@pytest.mark.parametrize("target", [0.5, 0.3, Pattern(2, 4), Pattern(1, 4), Pattern(4, 8)])
def test_sparsegpt_is_optimal_brain_surgery(target: float | Pattern) -> None:
    torch.manual_seed(1)
    weight, x = torch.randn(5, 144), correlated(400, 144)  # 144 columns: more than one block
    expected = naive_sparsegpt(weight, x, target)
    got, pruned = sparsegpt(weight[None], (x.double().T @ x.double())[None], target)
    assert torch.equal(pruned[0], expected == 0)
    torch.testing.assert_close(got[0], expected, rtol=1e-7, atol=1e-8)


def test_sparsegpt_without_inputs_is_magnitude() -> None:
    weight = torch.randn(1, 4, 16)
    got, pruned = sparsegpt(weight, torch.zeros(1, 16, 16), 0.5)
    assert torch.equal(pruned, weight.abs() <= weight.abs().flatten().kthvalue(32).values)
    assert torch.equal(got[~pruned], weight.double()[~pruned])


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_wanda_is_the_published_score(pattern: str | None) -> None:
    """Row by row in float64: the lowest |W_ij| ||X_j|| of each row, or of each four."""
    torch.manual_seed(2)
    model, x = nn.Linear(24, 7), correlated(60, 24)
    weight = model.weight.detach().clone()
    fxc.sparsify(model, None if pattern else 0.5, pattern=pattern, method="wanda", calibration=list(x.split(7)))
    for row in range(7):
        scores = [abs(float(weight[row, j])) * float(x[:, j].double().norm()) for j in range(24)]
        kept: list[int] = []
        for group in [range(24)] if pattern is None else [range(j, j + 4) for j in range(0, 24, 4)]:
            kept += sorted(group, key=lambda j: scores[j])[len(group) // 2 :]
        assert sorted(kept) == model.weight[row].nonzero().flatten().tolist()
        assert torch.equal(model.weight[row][kept], weight[row][kept])


CONVS = {
    "plain": lambda: nn.Conv2d(4, 6, 3),
    "stride_padding": lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=(2, 1)),
    "dilated_groups": lambda: nn.Conv2d(4, 6, 3, dilation=2, groups=2, padding="same"),
    "circular": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    "conv1d": lambda: nn.Conv1d(4, 6, 4, stride=3),
    "conv3d": lambda: nn.Conv3d(4, 6, 2, padding=1),
    "linear": lambda: nn.Linear(9, 6),
}


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("batched", [True, False])
def test_input_rows_times_weight_rows_are_the_layer(name: str, batched: bool) -> None:
    from fxcompress.sparse.layers import to_rows

    layer = CONVS[name]().double()
    spatial = layer.weight.dim() - 2
    x = torch.randn(3, 4, *[9, 8, 7][:spatial], dtype=torch.float64) if spatial else torch.randn(3, 5, 9).double()
    x = x if batched else x[0]
    layer.bias.data.zero_()
    rows = torch.cat(list(input_rows(layer, x)), 1)  # [groups, positions, features]
    product = rows @ to_rows(layer, layer.weight).mT  # [groups, positions, out / groups]
    expected = layer(x)
    if spatial:
        expected = expected if batched else expected[None]
        expected = expected.movedim(1, -1)
    flat = product.permute(1, 0, 2).flatten(1)
    torch.testing.assert_close(flat, expected.reshape(flat.shape))


def test_statistics_add_up_over_batches_and_skip_what_is_not_finite() -> None:
    layer, x = nn.Conv2d(4, 6, 3), torch.randn(5, 4, 6, 6)
    whole, parts, energy = (InputStatistics(layer, m) for m in (True, True, False))
    whole.update(x)
    for part in x.split(2):
        parts.update(part)
        energy.update(part)
    parts.update(torch.full_like(x, float("nan")))
    assert parts.skipped == 1 and parts.rows == whole.rows == 5 * 16
    assert whole.total is not None and parts.total is not None and energy.total is not None
    torch.testing.assert_close(parts.total, whole.total, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(energy.total, whole.total.diagonal(dim1=-2, dim2=-1), rtol=1e-5, atol=1e-4)
    unfolded = F.unfold(x, 3).double()  # features in the order (channel, tap)
    expected = torch.einsum("nip,njp->ij", unfolded, unfolded).view(4, 9, 4, 9).permute(1, 0, 3, 2).reshape(36, 36)
    torch.testing.assert_close(whole.total[0], expected, rtol=1e-5, atol=1e-4)


def test_second_moments_of_many_features_may_be_read_on_the_way() -> None:
    layer, x = nn.Linear(600, 2), torch.randn(900, 600)
    statistics = InputStatistics(layer, moments=True)
    for part in x.split(300):
        statistics.update(part)
        total = statistics.total
        assert total is not None and total.dtype == torch.float64 and bool(torch.isfinite(total).all())
        torch.testing.assert_close(total, total.mT, rtol=1e-6, atol=1e-6)
    exact = x.double().T @ x.double()
    torch.testing.assert_close(statistics.total, exact[None], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("amount", [{"sparsity": 0.5}, {"pattern": "2:4"}])
def test_sparsegpt_beats_wanda_beats_magnitude(amount: dict[str, object]) -> None:
    """Error of the layer's output on inputs that were not calibrated on."""
    x = correlated(600, 96)
    errors = {}
    for method in ("random", "l1", "wanda", "sparsegpt"):
        torch.manual_seed(3)
        model = nn.Linear(96, 64)
        dense = model(x[300:]).detach()
        fxc.sparsify(model, method=method, calibration=[x[:300]], samples=300, **amount)  # type: ignore[arg-type]
        errors[method] = float((model(x[300:]).detach() - dense).square().mean())
    assert errors["sparsegpt"] < 0.7 * errors["wanda"] < 0.7 * 0.95 * errors["l1"] < errors["random"]
