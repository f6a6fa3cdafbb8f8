"""Importance criteria of a loss and of feature maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import CalibrationError, PruneError, UsageError
from fxcompress.ir import Program
from fxcompress.prune.importance import importance
from fxcompress.prune.slots import Slot
from tests.prune.scored import (
    BATCHES,
    SLOTS,
    captured,
    close,
    prepared,
    restored,
    rows,
    scores,
    tensor,
)


@pytest.fixture
def program() -> Iterator[Program]:
    yield from restored()


# ------------------------------------------------------------------------------------------------ of the loss
def naive_gradients(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], loss: Any = None
) -> list[dict[str, Tensor]]:
    found = []
    for x, label in batches:
        model.zero_grad(set_to_none=True)
        output = model(x)
        (F.cross_entropy(output, label) if loss is None else loss(output, (x, label))).backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    model.zero_grad(set_to_none=True)
    return found


GRADIENT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "taylor": lambda w, g: w.dot(g).abs(),
    "taylor_abs": lambda w, g: (w * g).abs().sum(),
    "taylor_squared": lambda w, g: w.dot(g).square(),
    "hessian": lambda w, g: sum(0.5 * a * a * b * b for a, b in zip(w, g, strict=True)),
}


def naive_gradient_scores(name: str, weight: Tensor, found: list[Tensor], dim: int) -> list[Any]:
    per_batch = [
        [GRADIENT[name](w, g) for w, g in zip(rows(weight, dim), rows(gradient, dim), strict=True)]
        for gradient in found
    ]
    return [sum(channel) / len(per_batch) for channel in zip(*per_batch, strict=True)]


@pytest.mark.parametrize("name", list(GRADIENT))
@pytest.mark.parametrize("own_loss", [False, True])
def test_gradient_criteria(program: Program, name: str, own_loss: bool) -> None:
    loss = (lambda output, batch: (output * batch[1][:, None]).square().mean()) if own_loss else None
    reference = naive_gradients(captured()[0], BATCHES, loss)
    program.gm.train()  # the measure is taken in eval mode all the same
    criterion = prepared(name, program, BATCHES, loss)
    for slot in SLOTS:
        expected = naive_gradient_scores(name, tensor(program, slot), [g[slot.tensor] for g in reference], slot.dim)
        torch.testing.assert_close(
            scores(criterion, program, slot),
            torch.stack(expected).double(),
            rtol=1e-3,
            atol=1e-6 * float(max(expected)),
        )


def test_taylor_is_the_change_of_a_linear_loss() -> None:
    """A loss linear in the weights: the first order is the whole change when a channel is set to zero."""
    layer = nn.Linear(5, 4, bias=False).double()
    x = torch.randn(3, 5, dtype=torch.float64)
    program = fxc.capture(nn.Sequential(layer), (x,))
    mix = torch.randn(3, 4, dtype=torch.float64)

    def loss(output: Tensor, batch: Any) -> Tensor:
        return (output * mix).sum()

    for dim, role in enumerate(("out", "in")):
        slot = Slot("0.weight", dim, role, "0", "0", layer.weight.shape[dim])
        changes = []
        for index in range(slot.size):
            cut = layer.weight.detach().clone()
            cut.select(dim, index).zero_()
            changes.append(abs(float(loss(layer(x).detach() - x @ cut.T, None))))
        for name, power in (("taylor", 1), ("taylor_squared", 2)):
            criterion = prepared(name, program, [x], loss, [slot])
            close(scores(criterion, program, slot), [c**power for c in changes], rtol=1e-9)


def test_hessian_is_the_fisher_information_of_single_samples(program: Program) -> None:
    """Batches of one sample; samples of unequal loss, so that the mean gradient would give something else."""
    x, label = BATCHES[0]
    singles = [(x[i : i + 1], label[i : i + 1]) for i in range(5)]
    slot = SLOTS[11]
    fisher = torch.stack([g[slot.tensor].double().square() for g in naive_gradients(captured()[0], singles)]).mean(0)
    expected = (0.5 * fisher * tensor(program, slot).double().square()).sum(1)
    torch.testing.assert_close(
        scores(prepared("hessian", program, singles), program, slot), expected, rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("name", list(GRADIENT))
def test_gradients_of_an_earlier_backward(program: Program, name: str) -> None:
    x, label = BATCHES[0]
    F.cross_entropy(program(x), label).backward()
    kept = {n: p.grad.clone() for n, p in program.gm.named_parameters() if p.grad is not None}
    program.gm.get_parameter("fc.weight").grad = None
    criterion = prepared(name, program)
    slot = SLOTS[0]
    expected = naive_gradient_scores(name, tensor(program, slot), [kept[slot.tensor]], slot.dim)
    torch.testing.assert_close(scores(criterion, program, slot), torch.stack(expected).double(), rtol=1e-3, atol=1e-8)
    assert criterion.score(SLOTS[11], tensor(program, SLOTS[11])) is None
    assert torch.equal(program.gm.get_parameter("conv.weight").grad, kept["conv.weight"])


def test_tied_weights_share_their_gradient() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.table(x).mean(1))

    torch.manual_seed(0)
    net, x, label = Tied(), torch.randint(0, 7, (3, 5)), torch.randint(0, 7, (3,))
    slots = [
        Slot("table.weight", 1, "out", "table", "table", 4),
        Slot("head.weight", 1, "in", "head", "head", 4),
    ]
    program = fxc.capture(net, (x,))
    criterion = prepared("taylor", program, [(x, label)], slots=slots)
    (gradient,) = naive_gradients(net, [(x, label)])
    expected = (net.table.weight.detach().double() * gradient["table.weight"]).sum(0).abs()
    for slot in slots:
        torch.testing.assert_close(scores(criterion, program, slot), expected, rtol=1e-4, atol=1e-9, check_dtype=True)


def test_what_the_loss_does_not_need_scores_zero() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    x = torch.randn(2, 3)
    program = fxc.capture(Two(), (x,))
    slots = [Slot(f"{n}.weight", 0, "out", n, n, 2) for n in "ab"]
    criterion = prepared("taylor", program, [x], lambda output, batch: output[0].square().sum(), slots)
    assert scores(criterion, program, slots[0]).gt(0).all() and scores(criterion, program, slots[1]).eq(0).all()


@pytest.mark.parametrize("name", [*GRADIENT, "activation"])
def test_reading_stops_at_enough_samples(program: Program, name: str) -> None:
    read = []

    def batches() -> Iterator[Any]:
        for batch in BATCHES * 5:
            read.append(batch)
            yield batch

    criterion: Any = importance(name)
    assert criterion.samples == 500
    criterion.samples = 6
    criterion.prepare(program, SLOTS, batches(), None)
    assert len(read) == 2


# ------------------------------------------------------------------------------------------------ of feature maps
class Maps(nn.Module):
    """The input passes through unchanged where the maps of ``conv`` and ``fc`` are read."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)
        self.conv.weight.data = torch.eye(channels)[:, :, None, None]
        self.fc = nn.Linear(channels, channels, bias=False)
        self.fc.weight.data = torch.eye(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).flatten(2).transpose(1, 2))


def of_rank(rank: int, height: int, width: int) -> Tensor:
    return torch.randn(height, rank) @ torch.randn(rank, width) if rank else torch.zeros(height, width)


def test_hrank_of_maps_of_known_rank() -> None:
    torch.manual_seed(0)
    wanted = [[0, 1, 3, 6], [2, 1, 5, 6], [1, 1, 4, 6]]
    x = torch.stack([torch.stack([of_rank(r, 6, 9) for r in sample]) for sample in wanted])
    program = fxc.capture(Maps(4), (x,))
    conv, fc = Slot("conv.weight", 0, "out", "conv", "conv", 4), Slot("fc.weight", 0, "out", "fc", "fc", 4)
    inputs = Slot("fc.weight", 1, "in", "fc", "fc", 4)
    criterion = prepared("hrank", program, [x[:2], x[2:]], slots=[conv, fc, inputs])
    close(scores(criterion, program, conv), [1, 1, 4, 6])
    # Sequences: the rank of samples against positions, here of 2 samples (weight 2) and of 1 sample.
    close(scores(criterion, program, fc), [1, (2 * 2 + 1) / 3, (2 * 2 + 1) / 3, (2 * 2 + 1) / 3])
    assert criterion.score(inputs, tensor(program, inputs)) is None


def test_activation_is_the_mean_magnitude_over_samples() -> None:
    x = torch.randn(5, 4, 3, 3)
    program = fxc.capture(Maps(4), (x,))
    slots = [Slot("conv.weight", 0, "out", "conv", "conv", 4), Slot("fc.weight", 0, "out", "fc", "fc", 4)]
    criterion = prepared("activation", program, [x[:3], x[3:]], slots=slots)
    for slot in slots:
        close(scores(criterion, program, slot), [v.abs().mean() for v in x.double().unbind(1)], rtol=1e-5)


def test_maps_are_read_behind_norm_and_activation(program: Program) -> None:
    program.gm.train()
    criterion = prepared("activation", program, BATCHES)
    model = captured()[0]
    expected = model.bn(model.conv(torch.cat([x for x, _ in BATCHES]))).relu().mean((0, 2, 3))
    for slot in (*SLOTS[:1], *SLOTS[2:5]):
        torch.testing.assert_close(scores(criterion, program, slot), expected.detach().double(), rtol=1e-4, atol=1e-6)


def test_maps_are_read_before_a_second_reader() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.fc(x)
            return h.relu() + h

    net, x = Residual(), torch.randn(4, 3)
    slot = Slot("fc.weight", 0, "out", "fc", "fc", 3)
    program = fxc.capture(net, (x,))
    criterion = prepared("activation", program, [x], slots=[slot])
    close(scores(criterion, program, slot), list(net.fc(x).detach().abs().mean(0)), rtol=1e-5)


@pytest.mark.parametrize("name", ["hrank", "activation"])
def test_slots_that_are_no_channel_of_an_output(program: Program, name: str) -> None:
    criterion = prepared(name, program, BATCHES)
    silent = [s.tensor for s in SLOTS if criterion.score(s, tensor(program, s)) is None]
    # Inputs; 3 of the 6 outputs of a grouped transposed convolution; a bare parameter; gates of an LSTM.
    assert {"up.weight", "gain", "lstm.weight_ih_l0"} <= set(silent)
    assert silent.count("conv.weight") == 1
    assert ("fc.weight" in silent) and silent.count("fc.weight") == (2 if name == "hrank" else 1)


def test_one_batch_of_odd_channel_order() -> None:
    """A linear layer in front of BatchNorm1d over positions: two channel dimensions of one value."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(5)).eval()
    x = torch.randn(2, 5, 3)
    program = fxc.capture(net, (x,))
    nodes = [n.name for n, _ in program.layers()]
    slots = [Slot("0.weight", 0, "out", "0", nodes[0], 4), Slot("1.weight", 0, "out", "1", nodes[1], 5)]
    criterion = prepared("activation", program, [x], slots=slots)
    value = net(x).detach().abs()
    close(scores(criterion, program, slots[0]), list(value.mean((0, 1))), rtol=1e-5)
    close(scores(criterion, program, slots[1]), list(value.mean((0, 2))), rtol=1e-5)


# ------------------------------------------------------------------------------------------------ bad data and losses
@pytest.mark.parametrize("name", list(GRADIENT))
def test_flags_are_restored_when_the_loss_fails(program: Program, name: str) -> None:
    program.gm.requires_grad_(False)

    def broken(output: Any, batch: Any) -> Tensor:
        raise KeyError("label")

    with pytest.raises(KeyError, match="label"):
        prepared(name, program, BATCHES, broken)
    assert not any(p.requires_grad for p in program.gm.parameters())


def test_loss_or_maps_that_are_not_finite(program: Program) -> None:
    with pytest.raises(PruneError, match=r"FXC-PRUNE-050[\s\S]*batch 1"):
        prepared("taylor", program, BATCHES, lambda y, batch: y.sum() / (len(batch[0]) - 3))
    program.gm.get_parameter("conv.weight").data[1] = torch.nan
    with pytest.raises(PruneError, match=r"FXC-PRUNE-055[\s\S]*node relu"):
        prepared("hrank", program, BATCHES)


def test_data_and_gradients_that_are_missing(program: Program) -> None:
    for name in GRADIENT:
        with pytest.raises(PruneError, match=rf"FXC-PRUNE-047 gradients missing for {name}"):
            prepared(name, program)
    for name in ("hrank", "activation"):
        criterion = importance(name)
        with pytest.raises(PruneError, match=rf"FXC-PRUNE-051 {name} needs data"):
            criterion.prepare(program, SLOTS)
        with pytest.raises(PruneError, match="FXC-PRUNE-053"):
            criterion.score(SLOTS[0], tensor(program, SLOTS[0]))
        with pytest.raises(PruneError, match="FXC-PRUNE-052"):
            prepared(name, program, BATCHES, slots=[s for s in SLOTS if s.role == "in"])
    with pytest.raises(PruneError, match="FXC-PRUNE-053"):
        importance("l2").score(SLOTS[0], torch.zeros(8, 3, 3, 3))


@pytest.mark.parametrize("name", ["taylor", "activation"])
def test_bad_data(program: Program, name: str) -> None:
    with pytest.raises(UsageError, match="must be an iterable of batches"):
        prepared(name, program, BATCHES[0][0])
    with pytest.raises(CalibrationError, match="empty"):
        prepared(name, program, [])
    with pytest.raises(CalibrationError, match="batch 1 does not fit"):
        prepared(name, program, [BATCHES[0], (torch.zeros(2, 1, 6, 6), torch.zeros(2, dtype=torch.int64))])


@pytest.mark.parametrize(
    ("batch", "number"),
    [
        (BATCHES[0][0], 48),
        ((BATCHES[0][0],), 48),
        ((BATCHES[0][0], torch.zeros(5)), 48),
        ({"x": BATCHES[0][0]}, 48),
        ((BATCHES[0][0], torch.zeros(4, dtype=torch.int64)), 54),
        ((BATCHES[0][0], torch.full((5,), 9)), 54),
    ],
)
def test_data_without_a_default_loss(program: Program, batch: Any, number: int) -> None:
    with pytest.raises(PruneError, match=rf"FXC-PRUNE-0{number}[\s\S]*pass loss="):
        prepared("taylor", program, [batch])


@pytest.mark.parametrize(
    "make", [list, lambda b: [({"x": x}, y) for x, y in b], lambda b: iter(b), lambda b: map(list, b)]
)
def test_forms_of_data(program: Program, make: Callable[[Any], Any]) -> None:
    plain = scores(prepared("taylor", program, BATCHES), program, SLOTS[0])
    assert torch.equal(scores(prepared("taylor", program, make(BATCHES)), program, SLOTS[0]), plain)


@pytest.mark.parametrize("value", [lambda y: 1.0, lambda y: y, lambda y: y.detach().sum()])
def test_losses_that_are_no_scalar(program: Program, value: Callable[[Tensor], Any]) -> None:
    with pytest.raises(PruneError, match="FXC-PRUNE-049"):
        prepared("taylor", program, BATCHES, lambda output, batch: value(output))
