"""RemoveBlocks under the contract: amounts are totals, recipes, refusals, certificates."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.analysis import count_macs
from fxcompress.errors import PruneError
from fxcompress.passes import RemoveBlocks
from fxcompress.pipeline import Pipeline


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, scale: float) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.down = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        with torch.no_grad():
            self.conv2.weight *= scale
            self.conv2.bias *= scale  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.bn(self.conv1(x)))) + self.down(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        sizes = ((3, 4, 1.0), (4, 4, 0.02), (4, 4, 3.0), (4, 8, 1.0), (8, 8, 4.0))
        self.blocks = nn.Sequential(*(Block(*size) for size in sizes))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean((2, 3)))  # type: ignore[no-any-return]


@functools.cache
def model() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@functools.cache
def program() -> fxc.Program:
    return fxc.capture(model(), (images(2),))


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(count))


def labelled() -> list[tuple[Tensor, Tensor]]:
    return [(images(n), torch.arange(n) % 3) for n in (3, 4)]


def context(**options: Any) -> fxc.Context:
    return fxc.Context(calibration=[images(4), images(3)], **options)


PASSES = [
    RemoveBlocks(count=1),
    RemoveBlocks(count=2, importance="magnitude"),
    RemoveBlocks(ratio=0.7),
    RemoveBlocks(macs=0.8),
    RemoveBlocks(names=("blocks.1", "blocks.4")),
    RemoveBlocks(names="blocks.[14]"),
]


@pytest.mark.parametrize("pass_", PASSES, ids=lambda p: str(p.to_dict()))
def test_contract(pass_: RemoveBlocks) -> None:
    result = fxc.check_pass(pass_, program(), context=context())
    assert result.modified and 0 < (result.error or 0) < 10
    assert len(result.changes) == result.metrics["removed"] >= 1
    assert result.metrics["certified"] == {"error": 0.0, "tolerance": 1e-4}
    assert result.metrics["macs"][1] < result.metrics["macs"][0]
    refused = {r.node: r.reason for r in result.refusals}
    assert set(refused) == {"blocks.0", "blocks.3"} and "blocks.0.down" in refused["blocks.0"]


def test_outputs_are_those_of_the_model_without_the_block() -> None:
    reference = copy.deepcopy(model())
    reference.blocks[1] = nn.Identity()  # its input is not negative, so its last ReLU keeps it
    result = RemoveBlocks(count=1)(program(), context())
    assert result.changes == ["removed block blocks.1"]
    torch.testing.assert_close(result.program(images(5)), reference(images(5)), rtol=0, atol=1e-6)
    gone = set(model().state_dict()) - set(result.program.gm.state_dict())
    assert gone == {n for n in model().state_dict() if n.startswith("blocks.1.")}


def test_amounts_are_totals() -> None:
    first = RemoveBlocks(count=1)(program(), context()).program
    again = RemoveBlocks(count=1)(first, context())
    assert not again.modified and again.notes == ["no block to remove: the amount is met already"]
    second = RemoveBlocks(count=2)(first, context())
    assert len(second.changes) == 1 and len(second.program.history) == 2
    assert not RemoveBlocks(macs=second.metrics["macs"][1] / count_macs(program()) + 1e-6)(
        second.program, context()
    ).modified
    assert not RemoveBlocks(ratio=0.67)(second.program, context()).modified  # 2 of 3
    assert RemoveBlocks(names=("blocks.1", "blocks.4"))(first, context()).changes == ["removed block blocks.4"]
    assert not RemoveBlocks(names="blocks.1")(first, context()).modified


def test_loss_from_labels_or_a_function() -> None:
    by_labels = RemoveBlocks(count=1, importance="loss")(program(), fxc.Context(calibration=labelled()))
    assert by_labels.metrics["removed"] == 1
    x = images(4)
    expected = model()(x)
    closest = RemoveBlocks(count=1, importance="loss", evaluate=lambda m: -float((m(x) - expected).abs().max()))
    assert closest(program()).changes == ["removed block blocks.1"]  # no data needed
    assert "evaluate" not in closest.to_dict() and fxc.Pass.from_dict(closest.to_dict()) == closest


def test_in_a_pipeline_before_folding() -> None:
    passes = (RemoveBlocks(names="blocks.1"), fxc.FoldBatchNorm(), fxc.FuseActivations(), fxc.EliminateDeadCode())
    result = Pipeline(passes=passes)(program(), fxc.Context())
    plain = RemoveBlocks(names="blocks.1")(program()).program
    torch.testing.assert_close(result.program(images(3)), plain(images(3)), rtol=0, atol=1e-5)


def test_nothing_to_remove_is_said() -> None:
    result = RemoveBlocks(ratio=0.1)(program(), context())
    assert not result.modified and result.notes


def test_skipped_batches_are_noted() -> None:
    bad = images(2) * float("nan")
    result = RemoveBlocks(count=1)(program(), fxc.Context(calibration=[bad, *[images(1)] * 120]))
    assert result.notes == ["1 calibration batches held NaN or infinity and were skipped"]


BAD: dict[str, tuple[int, dict[str, Any]]] = {
    "nothing": (401, {}),
    "two": (401, {"count": 1, "names": "a"}),
    "count": (402, {"count": 0}),
    "ratio": (403, {"ratio": 1}),
    "macs": (404, {"macs": 1.5}),
    "importance": (417, {"count": 1, "importance": "l1"}),
    "samples": (418, {"count": 1, "samples": 0}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options(case: str) -> None:
    number, options = BAD[case]
    with pytest.raises(PruneError, match=f"FXC-PRUNE-{number}"):
        RemoveBlocks(**options)


def test_bad_models_and_data() -> None:
    with pytest.raises(PruneError, match=r"FXC-PRUNE-419(.|\n)*calibration=loader"):
        RemoveBlocks(count=1)(program())
    with pytest.raises(PruneError, match=r"FXC-PRUNE-406(.|\n)*blocks\.3\.down"):
        RemoveBlocks(names="blocks.3")(program())
    with pytest.raises(PruneError, match="FXC-PRUNE-408"):
        RemoveBlocks(count=4)(program(), context())
