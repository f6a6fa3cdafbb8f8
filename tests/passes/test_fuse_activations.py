"""FuseActivations: fused and unfused compute the same; what may not be fused is refused with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.capture import capture
from fxcompress.errors import UsageError
from fxcompress.ir import Program
from fxcompress.layers import Fused, TransposedLinear
from fxcompress.passbase import Context, Result
from fxcompress.passes import FuseActivations
from fxcompress.quant.scheme import QuantScheme
from fxcompress.testing import check_pass
from tests.helpers.goldens import check_golden

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "hardtanh": nn.ReLU6,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "gelu": lambda: nn.GELU(approximate="tanh"),
    "sigmoid": nn.Sigmoid,
}


class Transposed(nn.Module):
    """GPT-2's linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding="same", groups=2), (2, 4, 7, 6)),
    "conv3d": (lambda: nn.Conv3d(4, 2, 2, stride=2), (2, 4, 4, 5, 6)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, 2, 1, 1), (2, 4, 7)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, dilation=2), (2, 4, 5, 5)),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(4, 2, 2, groups=2), (2, 4, 3, 3, 3)),
    "linear": (lambda: nn.Linear(4, 6), (2, 5, 4)),
    "transposed_linear": (Transposed, (2, 4)),
}


def check(model: nn.Module, *shape: int, pass_: FuseActivations | None = None, context: Any = None) -> Result:
    """Fuse under the contract in float64 and compare with the eager model."""
    x = torch.randn(shape, dtype=torch.float64)
    model = model.double().eval()
    with torch.no_grad():
        expected = model(x)
    result = check_pass(pass_ or FuseActivations(), model, (x,), context=context)
    with torch.no_grad():
        torch.testing.assert_close(result.program(x), expected, rtol=1e-10, atol=1e-10)
    return result


def fused(program: Program) -> dict[str, str]:
    """Path -> activation of every fused layer."""
    return {str(n.target): str(m.activation) for n, m in program.layers() if isinstance(m, Fused)}


def functions(program: Program) -> list[str]:
    return [n.name for n in program.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer(layer: str) -> None:
    make, shape = LAYERS[layer]
    result = check(nn.Sequential(make(), nn.ReLU()), *shape)
    assert fused(result.program) == {"0": "relu"} and functions(result.program) == []
    assert set(result.program.gm.state_dict()) == {"0.weight", "0.bias"}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation(name: str) -> None:
    result = check(nn.Sequential(nn.Conv2d(2, 3, 1), ACTIVATIONS[name]()), 2, 2, 4, 4)
    assert functions(result.program) == []
    assert fused(result.program)["0"].startswith(name)


def test_relu6_of_torchvision_and_of_functional() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu6(self.conv(x * 20))

    result = check(Model(), 2, 2, 4, 4)
    assert list(fused(result.program)) == ["conv"]


class Residual(nn.Module):
    """``act(conv2(relu(conv1(x))) + shortcut(x))``"""

    def __init__(self, *, down: bool = False, act: bool = True, swap: bool = False) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.down = nn.Conv2d(3, 3, 1) if down else nn.Identity()
        self.act, self.swap = nn.ReLU() if act else nn.Identity(), swap

    def forward(self, x: Tensor) -> Tensor:
        y, shortcut = self.conv2(torch.relu(self.conv1(x))), self.down(x)
        return self.act(shortcut + y if self.swap else y + shortcut)  # type: ignore[no-any-return]


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("down", [False, True])
def test_residual(down: bool, swap: bool) -> None:
    """The add and the activation behind it join one convolution; with two, the other stays plain."""
    result = check(Residual(down=down, swap=swap), 2, 3, 5, 5)
    assert functions(result.program) == []
    layers = fused(result.program)
    assert layers.pop("conv1") == "relu"
    if down:
        assert layers == ({"down": "relu"} if swap else {"conv2": "relu"})
    else:
        assert layers == {"conv2": "relu"}


def test_residual_computed_after_the_layer() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return torch.relu(y + torch.tanh(x * 2))

    result = check(Model(), 2, 3, 4, 4)
    assert fused(result.program) == {"conv": "relu"}
    assert [n.target for n in result.program.graph.nodes if n.op == "call_module"] == ["conv"]


def test_add_without_activation_stays() -> None:
    """MobileNetV2's linear bottleneck: the add is a join of its own."""
    result = check(Residual(act=False), 2, 3, 5, 5)
    assert fused(result.program) == {"conv1": "relu"} and len(functions(result.program)) == 1


def test_residual_false_fuses_activations_only() -> None:
    result = check(Residual(), 2, 3, 5, 5, pass_=FuseActivations(residual=False))
    assert fused(result.program) == {"conv1": "relu"} and len(functions(result.program)) == 2


def test_activations_option_and_scheme() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.Linear(3, 3), nn.ReLU())
    assert list(fused(check(model, 2, 3, pass_=FuseActivations(activations=("relu",))).program)) == ["2"]
    scheme = Context(scheme=QuantScheme(fused_activations=("gelu",), fused_residual=False))
    assert list(fused(check(model, 2, 3, context=scheme).program)) == ["0"]
    assert list(fused(check(Residual(), 2, 3, 4, 4, context=scheme).program)) == []


def test_unknown_activation_is_an_error() -> None:
    with pytest.raises(UsageError, match="swishy cannot be fused"):
        FuseActivations(activations=("relu", "swishy"))


# ------------------------------------------------------------------------------------------------ refusals
class Twice(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.how = nn.Conv2d(3, 3, 1), how

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        if self.how == "users":
            return torch.relu(y) + torch.sigmoid(y)
        if self.how == "output":
            return torch.relu(y), y
        if self.how == "itself":
            return torch.relu(y + y)
        if self.how == "add":
            z = y + x
            return torch.relu(z) * z
        return torch.relu(self.conv(torch.relu(y)))


@pytest.mark.parametrize(
    ("how", "reasons"),
    [
        ("users", ["conv has more than one user"] * 2),
        ("output", ["conv has more than one user"]),
        ("itself", ["conv has more than one user"]),
        ("add", ["add has more than one user"]),
        ("calls", ["the layer is called more than once"] * 2),
    ],
)
def test_refuses(how: str, reasons: list[str]) -> None:
    result = check(Twice(how), 2, 3, 4, 4)
    assert not result.modified and fused(result.program) == {}
    assert [r.reason for r in result.refusals] == reasons


def test_residual_of_another_shape_is_no_residual() -> None:
    """A broadcast add is not what the engines fuse."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.conv(x) + x.mean((2, 3), keepdim=True))

    result = check(Model(), 2, 3, 4, 4)
    assert not result.modified and result.refusals == []


def test_scaled_add_is_no_residual() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(torch.add(self.conv(x), x, alpha=2))

    assert not check(Model(), 2, 3, 4, 4).modified


def test_tied_weights_may_be_fused() -> None:
    """Fusing changes no weight, so layers that share one can be fused; the parameter stays shared."""
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU())
    model[2].weight = model[0].weight
    gm = check(model, 2, 3).program.gm
    assert gm.get_submodule("0").weight is gm.get_submodule("2").weight


def test_fused_layer_is_trainable() -> None:
    program = capture(Residual(down=True).train(), (torch.randn(2, 3, 5, 5),))
    result = FuseActivations()(program)
    x = torch.randn(2, 3, 5, 5)
    result.program(x).square().sum().backward()
    program(x).square().sum().backward()  # the same parameters: the gradients add up
    once = [p.grad.clone() for p in program.gm.parameters() if p.grad is not None]
    program.gm.zero_grad()
    program(x).square().sum().backward()
    torch.testing.assert_close(once, [2 * p.grad for p in program.gm.parameters() if p.grad is not None])


def test_padding_mode_of_a_users_own_layer() -> None:
    """A pass may insert a layer that capture would not make: circular padding must survive the fusion."""
    program = capture(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU()), (torch.randn(2, 2, 5, 5),))
    program.gm._modules["0"] = nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")
    x = torch.randn(2, 2, 5, 5)
    before = program(x)
    torch.testing.assert_close(check_pass(FuseActivations(), program).program(x), before)


def test_transposed_linear_prints_its_sizes() -> None:
    layer = TransposedLinear(nn.Parameter(torch.zeros(4, 6)), None)
    assert layer(torch.ones(2, 4)).shape == (2, 6)
    assert layer.extra_repr() == "in_features=4, out_features=6"


# ------------------------------------------------------------------------------------------------ golden
def small(model: nn.Module) -> tuple[Program, Result]:
    program = capture(model.eval(), (torch.randn(2, 3, 5, 5),))
    return program, check_pass(FuseActivations(), program)


def test_golden_activation() -> None:
    check_golden(
        "fuse_activation", *small(nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU6(), nn.Conv2d(2, 2, 1), nn.SiLU()))
    )


def test_golden_residual() -> None:
    check_golden("fuse_residual", *small(Residual(down=True)))


def test_golden_refused() -> None:
    check_golden("fuse_activation_refused", *small(Twice("users")))
