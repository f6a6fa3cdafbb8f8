"""Norms that fold while training: the published formulas, the float network, frozen norms, norms no layer can take in."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.ir import Program
from fxcompress.qat.layers import HeldNorm
from fxcompress.qat.quantizers import WeightQuantizer


def evaluated(program: Program, x: Tensor) -> Tensor:
    program.gm.eval()
    with torch.no_grad():
        return torch.as_tensor(program(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def block(seed: int = 0, gamma: float | None = None) -> tuple[fxc.QATProgram, Tensor]:
    """A block with norm, weights alone quantized to 4 bits: activations in float keep the reference short."""
    torch.manual_seed(seed)
    model = Block()
    nn.init.uniform_(model.bn.weight, 0.5, 1.5)
    model.bn.weight.data[1] *= -1
    if gamma is not None:
        model.bn.weight.data[2] = gamma
    model.bn.running_mean = torch.randn(4)
    model.bn.running_var = torch.rand(4) + 0.5
    x = torch.randn(6, 3, 5, 5)
    program = fxc.prepare_qat(fxc.capture(model.eval(), (x,)), weight_bits=4, calibration=[x])
    for _, quantizer in program.quantizers():
        quantizer.quantizing = isinstance(quantizer, WeightQuantizer)
    return program, x


class Naive:
    """Krishnamoorthi 2018, section 3.2.2, in float64: fold with the running statistics, round, correct to the batch's."""

    def __init__(self, program: fxc.QATProgram) -> None:
        state = {k: v.detach().double() for k, v in program.gm.state_dict().items() if v.is_floating_point()}
        self.w, self.b = (state[f"conv.{k}"].requires_grad_() for k in ("weight", "bias"))
        self.gamma, self.beta = (state[f"bn.{k}"].requires_grad_() for k in ("weight", "bias"))
        self.mean, self.var = state["bn.running_mean"], state["bn.running_var"]
        self.scale = state["conv.weight_fake_quantize.scale"]

    def quantized(self, w: Tensor) -> Tensor:
        """Each step fits the scale to the integers of the weight, ``<w, q> / <q, q>``; clipped weights have no gradient."""
        rows = w.detach().flatten(1)
        old = (rows / self.scale[:, None]).round().clamp(-8, 7)
        self.scale = (rows * old).sum(1) / old.square().sum(1)
        scale = self.scale[:, None, None, None]
        steps = w.detach() / scale
        q = steps.round().clamp(-8, 7) * scale
        passing = w * ((steps >= -8) & (steps <= 7))
        return passing + (q - passing).detach()

    def step(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Output in the paper's form, and the running statistics behind it."""
        sigma = (self.var + 1e-5).sqrt()
        f = (self.gamma.detach() / sigma)[:, None, None, None]
        q = self.quantized(self.w * f)
        u = F.conv2d(x.double(), q / f, self.b, padding=1)  # the statistics are those of the quantized convolution
        mean, var = u.mean((0, 2, 3)), u.var((0, 2, 3), correction=0)
        sigma_b = (var + 1e-5).sqrt()
        # conv(x, Q(w gamma / sigma)) sigma / sigma_B + beta + gamma (b - mean_B) / sigma_B, with gamma's own gradient
        ratio = (self.gamma / self.gamma.detach())[:, None, None]
        y = F.conv2d(x.double(), q, padding=1) * ratio * (sigma / sigma_b)[:, None, None]
        y = y + (self.beta + self.gamma * (self.b - mean) / sigma_b)[:, None, None]
        unbiased = u.detach().var((0, 2, 3))
        return F.relu(y), 0.9 * self.mean + 0.1 * mean.detach(), 0.9 * self.var + 0.1 * unbiased


def test_a_training_step_with_norm_is_the_naive_one() -> None:
    program, x = block()
    naive = Naive(program)
    program.gm.train()
    y = program(x)
    want, mean, var = naive.step(x)
    torch.testing.assert_close(y.double(), want, atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    (want * weight).sum().backward()
    state = program.gm.state_dict()
    torch.testing.assert_close(state["bn.running_mean"].double(), mean, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(state["bn.running_var"].double(), var, atol=1e-6, rtol=1e-5)
    assert int(state["bn.num_batches_tracked"]) == 1
    gradients = {n: p.grad for n, p in program.gm.named_parameters()}
    for name, tensor in {"conv.weight": naive.w, "bn.weight": naive.gamma, "bn.bias": naive.beta}.items():
        torch.testing.assert_close(gradients[name].double(), tensor.grad, atol=1e-3, rtol=1e-4)  # type: ignore[union-attr]


def test_without_rounding_a_training_step_is_that_of_the_float_network() -> None:
    """Folding alone changes nothing: outputs, gradients and running statistics of the layer with its norm behind it."""
    for momentum in (0.1, 0.3, None):
        torch.manual_seed(0)
        model = Block()
        model.bn.momentum = momentum
        nn.init.uniform_(model.bn.weight, -1.0, 1.0)
        model.bn.running_mean, model.bn.running_var = torch.randn(4), torch.rand(4) + 0.5
        x = torch.randn(6, 3, 5, 5)
        program = fxc.prepare_qat(fxc.capture(model.eval(), (x,)), weight_bits=4, activation_bits=4, calibration=[x])
        program.disable_fake_quantize()
        program.gm.train()
        model.train()
        for seed in range(3):
            x = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
            upstream = torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(seed + 9))
            got, want = program(x), model(x)
            torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)
            program.gm.zero_grad()
            model.zero_grad()
            (got * upstream).sum().backward()
            (want * upstream).sum().backward()
            for name, parameter in model.named_parameters():
                torch.testing.assert_close(program.gm.get_parameter(name).grad, parameter.grad, atol=1e-4, rtol=1e-4)
            state = program.gm.state_dict()
            for name, buffer in model.named_buffers():
                torch.testing.assert_close(state[name], buffer, atol=1e-6, rtol=1e-5)
        model.eval()
        with torch.no_grad():
            torch.testing.assert_close(evaluated(program, x), model(x), atol=2e-6, rtol=1e-5)


def test_a_frozen_norm_trains_the_folded_layer() -> None:
    program, x = block()
    program.freeze_bn()
    program.gm.train()
    before = {k: v.clone() for k, v in program.gm.state_dict().items()}
    naive = Naive(program)
    factor = naive.gamma / (naive.var + 1e-5).sqrt()
    weight = naive.quantized(naive.w * factor[:, None, None, None])
    want = F.relu(F.conv2d(x.double(), weight, (naive.b - naive.mean) * factor + naive.beta, padding=1))
    y = program(x)
    torch.testing.assert_close(y.double(), want, atol=1e-5, rtol=1e-5)
    y.square().sum().backward()
    want.square().sum().backward()
    for name, tensor in {"conv.weight": naive.w, "conv.bias": naive.b, "bn.weight": naive.gamma}.items():
        got = program.gm.get_parameter(name).grad
        torch.testing.assert_close(got.double(), tensor.grad, atol=1e-3, rtol=1e-4)  # type: ignore[union-attr]
    after = program.gm.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before if k.startswith("bn."))
    with torch.no_grad():
        assert torch.equal(program(x), evaluated(program, x)), "frozen training and eval are one"
    program.unfreeze_bn()
    program.gm.train()
    program(x)
    assert not torch.equal(before["bn.running_mean"], program.gm.state_dict()["bn.running_mean"])


@pytest.mark.parametrize("learn", [False, True])
def test_a_gamma_of_zero_trains(learn: bool) -> None:
    program, x = block(gamma=0.0)
    if learn:
        program = fxc.prepare_qat(fxc.capture(Block().eval(), (x,)), learn_scale=True, calibration=[x])
        with torch.no_grad():
            program.gm.get_parameter("bn.weight")[2] = 0.0
    program.gm.train()
    program(x).square().sum().backward()
    for _, parameter in program.gm.named_parameters():
        assert parameter.grad is None or bool(torch.isfinite(parameter.grad).all())
    got = evaluated(program, x)
    beta = program.gm.get_parameter("bn.bias")[2].relu().item()
    torch.testing.assert_close(got[:, 2], torch.full_like(got[:, 2], beta), atol=0.02, rtol=0)


class Before(nn.Module):
    """A norm that no layer can take in."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.conv(self.bn(x)))


def test_a_norm_alone_can_be_frozen_too() -> None:
    x = torch.randn(4, 3, 6, 6)
    program = fxc.prepare_qat(fxc.capture(Before().eval(), (x,)), calibration=[x])
    assert isinstance(program.gm.get_submodule("bn"), HeldNorm)
    program.gm.train()
    program.freeze_bn()
    before = program.gm.state_dict()["bn.running_mean"].clone()
    program(x)
    assert torch.equal(program.gm.state_dict()["bn.running_mean"], before)
    program.unfreeze_bn()
    program(x)
    assert not torch.equal(program.gm.state_dict()["bn.running_mean"], before)
    plain = program.convert()
    assert type(plain.gm.get_submodule("bn")) is nn.BatchNorm2d
    assert torch.equal(evaluated(plain, x), evaluated(program, x))
