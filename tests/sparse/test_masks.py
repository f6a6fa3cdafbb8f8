"""Masks: exact counts, kept through training, permanent, undone, saved; a model's other weights are never touched."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import fxcompress as fxc
from fxcompress.errors import CalibrationError, PruneError


class Net(nn.Module):
    """A small network with a convolution, a norm, a depthwise convolution and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.hidden, self.head = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.depthwise(F.relu(self.norm(self.conv(x)))))
        out: Tensor = self.head(F.gelu(self.hidden(x.mean((2, 3)))))
        return out


class Tied(nn.Module):
    """An embedding and a head with one weight, and two layers that share another."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.a, self.b = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight, self.b.weight = self.embed.weight, self.a.weight

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.b(F.relu(self.a(self.embed(ids)))))
        return out


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def batches(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 4, 7, 6, generator=generator) for _ in range(count)]


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


METHODS = ["l1", "l2", "random", "wanda", "sparsegpt"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("captured", [True, False])
def test_half_of_the_weights_go_and_come_back(method: Any, captured: bool) -> None:
    user = net()
    model = fxc.capture(user, (batches()[0],)) if captured else user
    root = model.gm if captured else user  # type: ignore[union-attr]
    before, parameters = values(root), dict(root.named_parameters())
    masks = fxc.sparsify(model, 0.5, method=method, ignore="depthwise", calibration=batches())
    found = masks.sparsity()
    assert found.layers == dict.fromkeys(["conv", "hidden", "head"], 0.5) and found.total == 0.5
    assert found.zeros["conv"] == int((root.get_submodule("conv").weight == 0).sum()) == 144
    assert "50.00%" in str(masks) and "total" in str(masks)
    changed = {name for name, t in root.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == {"conv.weight", "hidden.weight", "head.weight"}
    if method != "sparsegpt":
        for name, kept in masks.kept.items():
            assert torch.equal(root.get_submodule(name).weight, before[f"{name}.weight"] * kept)
    now = dict(root.named_parameters())
    assert all((now[name] is p) == (not captured or name not in changed) for name, p in parameters.items())
    assert same(values(user), before) == captured, "a program shares its tensors with the model: they stay"
    masks.restore()
    assert same(values(root), before)
    with pytest.raises(PruneError, match="FXC-PRUNE-212"):
        masks.apply()


def test_a_module_and_its_program_get_the_same_weights() -> None:
    """A module is captured for the layer-by-layer methods; a layer later sees what the sparse ones before it give."""
    module, program = net(), fxc.capture(net(), (batches()[0],))
    fxc.sparsify(module, 0.5, method="sparsegpt", calibration=batches())
    fxc.sparsify(program, 0.5, method="sparsegpt", calibration=batches())
    assert same(values(module), values(program.gm))


def test_layers_see_the_inputs_of_the_sparse_model() -> None:
    """Sequentially equals: prune the first layer, run the sparse model, prune the next one from what it sees there."""
    sequential, by_hand = net(), net()
    fxc.sparsify(sequential, 0.5, method="wanda", calibration=batches())
    for name in ("conv", "depthwise", "hidden", "head"):
        fxc.sparsify(by_hand, 0.5, method="wanda", calibration=batches(), include=name, sequential=False)
    assert same(values(sequential), values(by_hand))
    dense = net()
    fxc.sparsify(dense, 0.5, method="wanda", calibration=batches(), sequential=False)
    assert not torch.equal(dense.head.weight, by_hand.head.weight)


def test_magnitude_is_that_of_torch() -> None:
    ours, torchs = net(), net()
    fxc.sparsify(ours, 0.37, ignore="depthwise")
    for layer in (torchs.conv, torchs.hidden, torchs.head):
        prune.l1_unstructured(layer, "weight", 0.37)
        prune.remove(layer, "weight")
    assert same(values(ours), values(torchs))
    ours, torchs = net(), net()
    fxc.sparsify(ours, 0.37, scope="global", method="l2")
    layers = [torchs.conv, torchs.depthwise, torchs.hidden, torchs.head]
    prune.global_unstructured([(m, "weight") for m in layers], prune.L1Unstructured, amount=0.37)
    for layer in layers:
        prune.remove(layer, "weight")
    assert same(values(ours), values(torchs))


def test_two_of_four_is_that_of_torch_ao() -> None:
    from torch.ao.pruning import WeightNormSparsifier

    ours, theirs = nn.Sequential(nn.Linear(16, 8)), nn.Sequential(nn.Linear(16, 8))
    theirs.load_state_dict(ours.state_dict())
    fxc.sparsify(ours, pattern="2:4")
    sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    sparsifier.prepare(theirs, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    sparsifier.squash_mask()
    assert torch.equal(ours[0].weight, theirs[0].weight)


def test_torchs_semi_structured_format_takes_the_weights() -> None:
    """The axis of the pattern is the one that sparse tensor cores reduce over: packing loses nothing."""
    from torch.sparse._semi_structured_conversions import (
        sparse_semi_structured_from_dense_cutlass as pack,
    )
    from torch.sparse._semi_structured_conversions import (
        sparse_semi_structured_to_dense_cutlass as unpack,
    )

    layer = nn.Linear(64, 32).half()
    fxc.sparsify(layer, pattern="2:4")
    weight = layer.weight.detach()
    assert torch.equal(unpack(*pack(weight)), weight)
    with pytest.raises(RuntimeError):
        pack(nn.Linear(64, 32, bias=False).weight.detach().half()[:, :62])


def test_an_n_m_convolution_keeps_n_of_m_channels_at_each_kernel_position() -> None:
    model = net()
    masks = fxc.sparsify(model, pattern=(1, 4))
    assert "depthwise left dense: 1 input channels are not a multiple of 4" in masks.notes
    kept = (model.conv.weight != 0).unflatten(1, (-1, 4)).sum(2)
    assert (kept == 1).all() and kept.shape == (8, 1, 3, 3)
    assert masks.sparsity().layers == {"conv": 0.75, "hidden": 0.75, "head": 0.75}


def test_blocks_of_l1_and_l2() -> None:
    """One large weight decides in l2, two middling ones in l1."""
    for method, first in (("l1", True), ("l2", False)):
        layer = nn.Linear(4, 1)
        layer.weight.data = torch.tensor([[0.0, 3.0, 2.0, 2.0]])
        fxc.sparsify(layer, 0.5, method=method, block=2)  # type: ignore[arg-type]
        assert (layer.weight[0, :2] == 0).all() == first


def test_what_is_zero_goes_first() -> None:
    """Pruning again to the same share changes nothing, to a higher one only adds zeros, whatever the scores."""
    model = net()
    fxc.sparsify(model, 0.5, method="random", seed=0)
    once = values(model)
    fxc.sparsify(model, 0.5, method="random", seed=1)
    assert same(values(model), once)
    fxc.sparsify(model, 0.75, method="random", seed=2)
    assert all(bool((t[once[name] == 0] == 0).all()) for name, t in model.named_parameters() if t.dim() > 1)
    dead = [x * torch.tensor([1.0, 0, 0, 0]).view(1, 4, 1, 1) for x in batches()]  # three channels are always zero
    model = net()
    fxc.sparsify(model, 0.5, method="wanda", calibration=dead, include="conv")
    once = values(model)
    fxc.sparsify(model, 0.5, method="wanda", calibration=dead, include="conv")
    assert same(values(model), once)


@pytest.mark.parametrize("captured", [True, False])
def test_masks_survive_training(captured: bool) -> None:
    user = net()
    model: Any = fxc.capture(user, (batches()[0],)) if captured else user
    root: nn.Module = model.gm if captured else user
    early = torch.optim.AdamW(root.parameters(), lr=0.01)
    masks = fxc.sparsify(model, 0.5)
    optimizer = torch.optim.AdamW(root.parameters(), lr=0.01) if captured else early
    handle = masks.attach(optimizer)
    start = values(root)
    for x in batches(4):
        optimizer.zero_grad()
        root(x).square().sum().backward()
        optimizer.step()
        assert masks.sparsity().total == 0.5
    assert all(not torch.equal(t, start[name]) for name, t in root.named_parameters())
    if captured:
        with pytest.raises(PruneError, match="FXC-PRUNE-210"):
            masks.attach(early)
    handle.remove()
    root(batches()[0]).square().sum().backward()
    optimizer.step()
    assert masks.sparsity().total < 0.5, "sparsity() counts what is there"
    masks.apply()
    assert masks.sparsity().total == 0.5
    masks.remove()
    for call in (masks.apply, masks.restore, lambda: masks.attach(optimizer)):
        with pytest.raises(PruneError, match="FXC-PRUNE-212"):
            call()
    assert masks.sparsity().total == 0.5


@pytest.mark.parametrize("captured", [True, False])
def test_masks_are_saved_and_loaded(captured: bool) -> None:
    file = io.BytesIO()
    torch.save(fxc.sparsify(net(), 0.6, method="random").state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    user = net()
    model = fxc.capture(user, (batches()[0],)) if captured else user
    masks = fxc.SparsityMasks.from_state_dict(model, state)
    assert masks.sparsity().total == pytest.approx(0.6, abs=0.01) and masks.settings["method"] == "random"
    assert same(values(user), values(net())) == captured
    with pytest.raises(PruneError, match="FXC-PRUNE-211"):
        masks.restore()
    dense = net()
    known = fxc.sparsify(dense, 0.0)
    known.load_state_dict(state)
    assert known.sparsity() == masks.sparsity()
    with pytest.raises(PruneError, match="FXC-PRUNE-213"):
        fxc.SparsityMasks.from_state_dict(nn.Sequential(nn.Linear(2, 2)), state)
    state["kept"]["head"] = state["kept"]["head"][:1]
    with pytest.raises(PruneError, match="FXC-PRUNE-214"):
        fxc.SparsityMasks.from_state_dict(net(), state)


@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize("method", ["l1", "sparsegpt"])
def test_tied_weights_are_one(captured: bool, method: Any) -> None:
    torch.manual_seed(0)
    user = Tied().eval()
    ids = torch.arange(24).reshape(2, 12) % 12
    model: Any = fxc.capture(user, (ids,)) if captured else user
    root: Any = model.gm if captured else user
    masks = fxc.sparsify(model, 0.5, method=method, calibration=[ids])
    assert list(masks.kept) == ["a"] and root.a.weight is root.b.weight
    assert any("embed" in note and note.startswith("head left dense") for note in masks.notes)
    masks.restore()
    masks = fxc.sparsify(model, 0.5, method=method, calibration=[ids], include=["head"])
    assert list(masks.kept) == ["head"] and root.head.weight is root.embed.weight
    assert masks.sparsity().total == 0.5


def test_a_shared_module_is_pruned_from_all_its_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x)
            z: Tensor = self.layer(y * torch.tensor([0.0, 0.0, 100.0, 100.0]))
            return z

    torch.manual_seed(0)
    model, x = Twice(), torch.randn(8, 4) * torch.tensor([10.0, 1.0, 1e-3, 1e-3])
    weight = model.layer.weight.detach().clone()
    y = model.layer(x) * torch.tensor([0.0, 0.0, 100.0, 100.0])
    energy = (x.square().sum(0) + y.square().sum(0)).sqrt()
    fxc.sparsify(model, 0.5, method="wanda", calibration=[x])
    assert torch.equal(model.layer.weight != 0, (weight.abs() * energy).argsort().argsort() >= 2)


def test_a_failure_leaves_the_model_as_it_was() -> None:
    model = net()
    before = values(model)
    good, bad = batches()[0], torch.randn(2, 5, 7, 6)
    with pytest.raises(CalibrationError):
        fxc.sparsify(model, 0.5, method="wanda", calibration=[good, bad])
    with pytest.raises(CalibrationError, match="batch 1"):
        fxc.sparsify(model, 0.5, method="wanda", calibration=[good, bad], sequential=False)
    with pytest.raises(CalibrationError):
        fxc.sparsify(model, 0.5, method="wanda", calibration=[], sequential=False)
    assert same(values(model), before)


def test_bad_requests() -> None:
    with pytest.raises(PruneError, match="nearest: hidden"):
        fxc.sparsify(net(), 0.5, include=["hiden"])
    with pytest.raises(PruneError, match="FXC-PRUNE-201"):
        fxc.sparsify(net(), 0.5, ignore="fc")
    with pytest.raises(PruneError, match="FXC-PRUNE-200"):
        fxc.sparsify(net(), 0.5, ignore=["*"])
    with pytest.raises(PruneError, match="FXC-PRUNE-200"):
        fxc.sparsify(nn.Sequential(nn.ReLU()), 0.5)
    with pytest.raises(PruneError, match="FXC-PRUNE-204"):
        fxc.sparsify(nn.Linear(6, 4), pattern="2:4")
    with pytest.raises(PruneError, match="FXC-PRUNE-205"):
        fxc.sparsify(net(), 0.5, method="wanda")
    with pytest.raises(PruneError, match="FXC-PRUNE-206"):
        fxc.sparsify(net(), pattern="2:4", permute=True)
    broken = net()
    broken.head.weight.data[0, 0] = float("nan")
    with pytest.raises(PruneError, match=r"FXC-PRUNE-203(?s:.*)head"):
        fxc.sparsify(broken, 0.5)
    fxc.sparsify(broken, 0.5, ignore="head")


def test_layers_that_cannot_be_calibrated_are_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.ConvTranspose2d(4, 4, 2), nn.Conv2d(4, 4, 2)
            self.never = nn.Linear(4, 4)
            self.weighted = nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.weighted(self.down(self.up(x)))
            return out

    x = torch.randn(2, 4, 6, 6)
    for sequential in (True, False):
        masks = fxc.sparsify(Odd(), 0.5, method="wanda", calibration=[x], sequential=sequential)
        notes = "\n".join(masks.notes)
        assert list(masks.kept) == ["down"]
        for expected in ("up left dense: wanda", "never left dense: calibration", "weighted left dense: its weight is"):
            assert expected in notes
    assert set(fxc.sparsify(Odd(), 0.5).kept) == {"up", "down", "never"}
