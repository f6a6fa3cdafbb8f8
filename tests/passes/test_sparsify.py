"""Sparsify as a pass: the contract with every method, recipes, reports, and the way into an engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.data import CalibrationData
from fxcompress.errors import PassError, PruneError
from fxcompress.passbase import Context, Pass
from fxcompress.passes import Sparsify
from fxcompress.testing import check_pass


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.conv2 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, bias=False)
        self.hidden, self.head = nn.Linear(8, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.norm(self.conv(x))))).mean((2, 3))
        out: Tensor = self.head(F.gelu(self.hidden(x)))
        return out


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, 3, 8, 8, generator=generator) for _ in range(4)]


CASES: dict[str, dict[str, Any]] = {
    "l1": {"sparsity": 0.5},
    "l2_blocks": {"sparsity": 0.25, "method": "l2", "block": 4, "ignore": ("conv",)},
    "random_global": {"sparsity": 0.3, "method": "random", "scope": "global"},
    "two_of_four": {"pattern": "2:4"},
    "two_of_four_permuted": {"pattern": (2, 4), "permute": True},
    "wanda": {"sparsity": 0.5, "method": "wanda"},
    "wanda_two_of_four": {"pattern": "2:4", "method": "wanda", "permute": True},
    "wanda_at_once": {"sparsity": 0.5, "method": "wanda", "sequential": False},
    "sparsegpt": {"sparsity": 0.5, "method": "sparsegpt"},
    "sparsegpt_one_of_four": {"pattern": "1:4", "method": "sparsegpt", "permute": True, "include": ["h*"]},
}


@pytest.mark.parametrize("name", CASES)
def test_contract(name: str) -> None:
    """Normal form, input untouched, error reported, second run idle, metadata true, recipe round trip."""
    step = Sparsify(**CASES[name])
    result = check_pass(step, net(), (batches()[0],), context=Context(calibration=batches()))
    assert result.modified and result.error is not None and result.error > 0
    share = 0.75 if step.pattern == "1:4" else step.sparsity or 0.5
    assert result.metrics["sparsity"] == pytest.approx(share, abs=0.01)
    assert ("channels permuted" in "\n".join(result.changes)) == step.permute
    assert Pass.from_dict(step.to_dict()) == step


def test_the_report_says_what_was_left() -> None:
    data = CalibrationData([*batches() * 30, torch.full((3, 3, 8, 8), float("nan"))])
    result = Sparsify(pattern="2:4", method="wanda", samples=400)(fxc.capture(net(), (batches()[0],)), Context(data))
    assert "2:4 zeros in conv2: 50.0%" in result.changes
    notes = "\n".join(result.notes)
    assert "conv left dense: 3 input channels" in notes
    assert "1 calibration batches held NaN" in notes and "calibrated on 360 samples, 400 asked for" in notes


def test_the_pass_and_the_function_agree() -> None:
    program = fxc.capture(net(), (batches()[0],))
    passed = Sparsify(sparsity=0.5, method="sparsegpt")(program, Context(batches())).program
    fxc.sparsify(program, 0.5, method="sparsegpt", calibration=batches())
    assert all(torch.equal(a, b) for a, b in zip(passed.gm.parameters(), program.gm.parameters(), strict=True))


def test_what_cannot_be_done() -> None:
    program = fxc.capture(net(), (batches()[0],))
    with pytest.raises(PassError, match="FXC-PASS-050"):
        Sparsify(sparsity=0.5, method="wanda")(program)
    with pytest.raises(PruneError, match="FXC-PRUNE-222"):
        Sparsify()
    with pytest.raises(PruneError, match="FXC-PRUNE-200"):
        Sparsify(sparsity=0.5, ignore=("*",))(program)


def test_after_fusing_and_before_quantizing() -> None:
    """Fused layers are pruned like plain ones, and symmetric grids keep zeros zero."""
    program = fxc.capture(net(), (batches()[0],))
    steps = [fxc.FoldBatchNorm(), fxc.FuseActivations(), Sparsify(pattern="2:4", method="wanda"), fxc.QuantizeStatic()]
    result = fxc.Pipeline(passes=tuple(steps))(program, Context(batches()))
    layer: Any = result.program.gm.get_submodule("hidden")
    assert (layer.weight_fake_quantize(layer.weight) == 0).float().mean() >= 0.5


@pytest.mark.onnxruntime
def test_an_engine_runs_the_sparse_program() -> None:
    engine = fxc.compile(net(), (batches()[0],), passes=[Sparsify(sparsity=0.5)], target="onnxruntime")
    sparse = net()
    fxc.sparsify(sparse, 0.5)
    torch.testing.assert_close(torch.as_tensor(engine(batches()[1])), sparse(batches()[1]), rtol=1e-4, atol=1e-5)
