"""FoldBatchNorm: exact in float64 for every kind of layer, both ways; refuses with a reason where it is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.capture import capture
from fxcompress.ir import Program
from fxcompress.passbase import Result
from fxcompress.passes import FoldBatchNorm
from fxcompress.testing import check_pass
from tests.helpers.goldens import check_golden

Case = tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]

FORWARDS: dict[str, Case] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), lambda: nn.BatchNorm1d(6), (3, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), lambda: nn.BatchNorm2d(6), (3, 4, 9, 8)),
    "conv2d_no_bias": (lambda: nn.Conv2d(4, 6, 3, bias=False), lambda: nn.BatchNorm2d(6), (3, 4, 6, 6)),
    "conv2d_groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: nn.BatchNorm2d(6), (3, 4, 6, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, dilation=2), lambda: nn.BatchNorm2d(8), (3, 4, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), lambda: nn.BatchNorm3d(3), (3, 2, 4, 5, 4)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, 2, 1, 1, 2), lambda: nn.BatchNorm1d(6), (3, 4, 7)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, 2), lambda: nn.BatchNorm2d(6), (3, 4, 5, 5)),
    "conv_transpose2d_groups": (
        lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False),
        lambda: nn.BatchNorm2d(6),
        (3, 4, 5, 5),
    ),
    "conv_transpose3d_groups": (
        lambda: nn.ConvTranspose3d(4, 2, 2, groups=2),
        lambda: nn.BatchNorm3d(2),
        (3, 4, 3, 3, 4),
    ),
    "linear": (lambda: nn.Linear(5, 7), lambda: nn.BatchNorm1d(7), (3, 5)),
    "norm_without_affine": (lambda: nn.Linear(5, 7), lambda: nn.BatchNorm1d(7, affine=False), (3, 5)),
}

BACKWARDS: dict[str, Case] = {
    "conv1d": (lambda: nn.BatchNorm1d(4), lambda: nn.Conv1d(4, 6, 3, groups=2), (3, 4, 9)),
    "conv2d": (lambda: nn.BatchNorm2d(4), lambda: nn.Conv2d(4, 6, 3, stride=2), (3, 4, 9, 8)),
    "conv2d_no_bias": (lambda: nn.BatchNorm2d(4), lambda: nn.Conv2d(4, 6, 1, bias=False), (3, 4, 6, 6)),
    "depthwise": (lambda: nn.BatchNorm2d(4), lambda: nn.Conv2d(4, 8, 3, groups=4, dilation=2), (3, 4, 9, 9)),
    "same_padding_of_1x1": (lambda: nn.BatchNorm2d(4), lambda: nn.Conv2d(4, 6, 1, padding="same"), (3, 4, 6, 6)),
    "conv3d": (lambda: nn.BatchNorm3d(2), lambda: nn.Conv3d(2, 3, 2), (3, 2, 4, 5, 4)),
    "linear": (lambda: nn.BatchNorm1d(5), lambda: nn.Linear(5, 7), (3, 5)),
}


def randomized(model: nn.Module) -> nn.Module:
    """Eval mode and float64; norms get statistics and weights that matter."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_()
            assert module.running_var is not None
            module.running_var.uniform_(0.3, 3.0)
            if module.affine:
                nn.init.uniform_(module.weight, -2.0, 2.0)
                nn.init.normal_(module.bias)
    return model.double().eval()


def norms(program: Program) -> int:
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for _, m in program.layers())


def check(model: nn.Module, *shape: int) -> tuple[Program, Result]:
    """Capture in float64, fold under the full contract, compare with the untouched eager model."""
    x = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
    program = capture(model, (x,))
    result = check_pass(FoldBatchNorm(), program)
    with torch.no_grad():
        torch.testing.assert_close(result.program(x), expected, rtol=1e-10, atol=1e-10)
    return program, result


def refusal(model: nn.Module, *shape: int) -> str:
    """The one reason for which nothing was folded."""
    program, result = check(model, *shape)
    assert not result.modified and norms(result.program) == norms(program) > 0
    reasons = {r.reason for r in result.refusals}
    assert len(reasons) == 1, reasons
    return reasons.pop()


@pytest.mark.parametrize("name", FORWARDS)
def test_forwards_is_exact(name: str) -> None:
    layer, norm, shape = FORWARDS[name]
    _, result = check(randomized(nn.Sequential(layer(), norm())), *shape)
    assert norms(result.program) == 0
    assert result.changes == ["fold norm forwards: 1 into 0"]


@pytest.mark.parametrize("name", BACKWARDS)
def test_backwards_is_exact(name: str) -> None:
    norm, layer, shape = BACKWARDS[name]
    _, result = check(randomized(nn.Sequential(norm(), layer())), *shape)
    assert norms(result.program) == 0
    assert result.changes == ["fold norm backwards: 0 into 1"]


def test_norms_on_both_sides_and_two_in_a_row() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    _, result = check(randomized(model), 3, 2, 5, 5)
    assert norms(result.program) == 0


def test_zero_shift_folds_into_a_padded_convolution() -> None:
    model = randomized(nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3, padding=1)))
    norm = model[0]
    with torch.no_grad():
        norm.bias.copy_(norm.running_mean * norm.weight / torch.sqrt(norm.running_var + norm.eps))
        norm.bias.mul_(0)
        norm.running_mean.mul_(0)
    assert norms(check(model, 3, 2, 5, 5)[1].program) == 0


def test_zero_shift_folds_into_a_transposed_convolution() -> None:
    model = randomized(nn.Sequential(nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 3, 2, groups=2)))
    nn.init.zeros_(model[0].bias)
    model[0].running_mean.zero_()
    assert norms(check(model, 3, 4, 5, 5)[1].program) == 0


def test_weight_without_bias_keeps_working() -> None:
    """A norm may have a scale and no shift."""
    model = randomized(nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)))
    model[1].bias = None
    assert norms(check(model, 3, 2, 4, 4)[1].program) == 0


def test_state_dict_keeps_the_layers_names() -> None:
    _, result = check(randomized(nn.Sequential(nn.Conv2d(2, 3, 1, bias=False), nn.BatchNorm2d(3))), 3, 2, 4, 4)
    assert set(result.program.gm.state_dict()) == {"0.weight", "0.bias"}
    assert all(p.requires_grad for p in result.program.gm.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_layers_keep_their_dtype(dtype: torch.dtype) -> None:
    model = randomized(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))).to(dtype)
    result = check_pass(FoldBatchNorm(), model, (torch.randn(2, 2, 6, 6, dtype=dtype),))
    layer = result.program.gm.get_submodule("0")
    assert layer.weight.dtype == dtype and layer.bias.dtype == dtype and norms(result.program) == 0


# ------------------------------------------------------------------------------------------------ refusals
def test_refuses_zero_padding_backwards() -> None:
    model = randomized(nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3, padding=1)))
    assert refusal(model, 3, 2, 5, 5) == "the convolution pads with zeros, which the norm would have shifted"


def test_refuses_same_padding_backwards() -> None:
    model = randomized(nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3, padding="same")))
    assert "pads with zeros" in refusal(model, 3, 2, 5, 5)


def test_refuses_transposed_convolution_backwards() -> None:
    model = randomized(nn.Sequential(nn.BatchNorm2d(2), nn.ConvTranspose2d(2, 3, 3)))
    assert "pads with zeros" in refusal(model, 3, 2, 5, 5)


def test_refuses_linear_on_another_axis() -> None:
    """BatchNorm1d over [N, C, L] counts channels on axis 1, Linear on the last."""
    forwards = randomized(nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(4)))
    assert refusal(forwards, 3, 4, 5) == "the norm counts channels on another axis than the layer"
    backwards = randomized(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(5, 7)))
    assert refusal(backwards, 3, 4, 5) == "the norm counts channels on another axis than the layer"


def test_refuses_a_convolution_without_batch() -> None:
    """[C, L] -> Conv1d -> [C', L']: BatchNorm1d takes that for a batch of C' samples."""
    model = randomized(nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(7)))
    x = torch.randn(4, 9, dtype=torch.float64)
    program = capture(model, (x,), dynamic_batch=False)
    result = check_pass(FoldBatchNorm(), program)
    assert [r.reason for r in result.refusals] == ["the norm counts channels on another axis than the layer"]


class TwoUsers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y


def test_refuses_two_users() -> None:
    assert refusal(randomized(TwoUsers()), 3, 2, 4, 4) == "conv has more than one user"


class SharedConv(nn.Module):
    def __init__(self, *, share: str) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.norm, self.other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        if share == "layer":
            self.second = self.first
        elif share == "weight":
            self.second.weight = self.first.weight
        elif share == "norm":
            self.other = self.norm

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.other(self.second(torch.relu(self.norm(self.first(x))))))


@pytest.mark.parametrize("share", ["layer", "norm"])
def test_refuses_what_is_called_twice(share: str) -> None:
    """Folding into one of two uses would change the other."""
    assert refusal(randomized(SharedConv(share=share)), 3, 3, 4, 4) == f"the {share} is called more than once"


def test_refuses_tied_weights() -> None:
    _, result = check(randomized(SharedConv(share="weight")), 3, 3, 4, 4)
    assert not result.modified
    reasons = {r.reason for r in result.refusals}
    assert reasons == {"second shares a tensor of the layer", "first shares a tensor of the layer"}


def test_unshared_layers_are_folded() -> None:
    """The model of the tests above without sharing: so it is the sharing that they refuse."""
    assert norms(check(randomized(SharedConv(share="")), 3, 3, 4, 4)[1].program) == 0


class ReadsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm(self.conv(x)), self.conv.weight.abs().sum() + self.norm.weight.sum()


def test_refuses_a_weight_that_is_read_elsewhere() -> None:
    program = capture(randomized(ReadsWeight()), (torch.randn(3, 2, 4, 4, dtype=torch.float64),))
    result = check_pass(FoldBatchNorm(), program)
    assert [r.reason for r in result.refusals] == ["conv.weight shares a tensor of the layer"]


def test_refuses_training_mode() -> None:
    model = randomized(nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)))
    program = capture(model, (torch.randn(2, 2, 4, 4).double(),))
    program.gm.train()
    result = check_pass(FoldBatchNorm(), program)
    assert [r.reason for r in result.refusals] == ["the norm is in training mode"]
    assert program.gm.training and result.program.gm.training


def test_refuses_what_the_dtype_cannot_hold() -> None:
    model = randomized(nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))).half()
    nn.init.constant_(model[0].weight, 60000.0)
    nn.init.constant_(model[1].weight, 4.0)
    nn.init.constant_(model[1].running_var, 1.0)
    program = capture(model, (torch.zeros(2, 2, 4, 4, dtype=torch.float16),))
    result = check_pass(FoldBatchNorm(), program)
    assert [r.reason for r in result.refusals] == ["the folded weight is not finite in float16"]


class BatchStatistics(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=True)


def test_batch_statistics_are_left_alone() -> None:
    """A norm without running statistics is no layer of the program: there is nothing to fold."""
    _, result = check(randomized(nn.Sequential(nn.Conv2d(2, 3, 1), BatchStatistics())), 4, 2, 4, 4)
    assert not result.modified


class NormWithChild(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: the activation, here with a slope, lives in the norm."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.act = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))  # type: ignore[no-any-return]


def test_what_lives_below_the_norm_survives() -> None:
    _, result = check(randomized(nn.Sequential(nn.Conv2d(2, 3, 1), NormWithChild(3))), 3, 2, 4, 4)
    assert norms(result.program) == 0
    assert "1.act.weight" in result.program.gm.state_dict()


# ------------------------------------------------------------------------------------------------ golden
def small(model: nn.Module) -> tuple[Program, Result]:
    torch.manual_seed(0)
    program = capture(randomized(model).float(), (torch.randn(2, 2, 5, 5),))
    return program, check_pass(FoldBatchNorm(), program)


def test_golden_forwards() -> None:
    check_golden("fold_norm_forwards", *small(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))))


def test_golden_backwards() -> None:
    check_golden("fold_norm_backwards", *small(nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3))))


def test_golden_refused() -> None:
    check_golden("fold_norm_refused", *small(nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3, padding=1))))
