"""Which calls become layers, under which names, and what stays an operator."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm, weight_norm

from fxcompress.capture import capture
from tests.helpers.capture_checks import Inputs, check_capture, floats, functions, images, layer_types

LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Inputs]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, 2, 1, groups=2), floats(4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), (1, 2), groups=2, bias=False), floats(4, 9, 9)),
    "conv2d same": (lambda: nn.Conv2d(4, 6, 4, padding="same"), floats(4, 9, 9)),
    "conv2d reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), floats(4, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 3, padding=(1, 0, 1), dilation=(1, 2, 1), groups=2), floats(2, 6, 6, 6)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, 2, 1, 1, groups=2), floats(4, 9)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, (2, 1), 1, (1, 0), 2, bias=False), floats(4, 9, 9)),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(2, 4, 3, 2, dilation=2, groups=2), floats(2, 5, 5, 5)),
    "linear": (lambda: nn.Linear(5, 7, bias=False), floats(3, 5)),
    "batch_norm1d": (lambda: nn.BatchNorm1d(4, momentum=0.3, eps=1e-3), floats(4)),
    "batch_norm1d sequence": (lambda: nn.BatchNorm1d(4, momentum=None), floats(4, 6)),
    "batch_norm2d": (lambda: nn.BatchNorm2d(4, affine=False), floats(4, 6, 6)),
    "batch_norm3d": (lambda: nn.BatchNorm3d(4), floats(4, 3, 3, 3)),
    "layer_norm": (lambda: nn.LayerNorm((4, 5), bias=False), floats(3, 4, 5)),
    "group_norm": (lambda: nn.GroupNorm(2, 4), floats(4, 5)),
    "instance_norm": (lambda: nn.InstanceNorm2d(4, affine=True), floats(4, 5, 5)),
    "instance_norm with statistics": (lambda: nn.InstanceNorm1d(4, track_running_stats=True), floats(4, 5)),
    "lstm": (lambda: nn.LSTM(4, 5, 2, batch_first=True), floats(3, 4)),
    "lstm bidirectional": (lambda: nn.LSTM(4, 5, 2, bidirectional=True, bias=False, batch_first=True), floats(3, 4)),
    "gru": (lambda: nn.GRU(4, 5, 2, bidirectional=True, batch_first=True, dropout=0.5), floats(3, 4)),
    "dropout": (lambda: nn.Dropout(0.3), floats(4)),
    "dropout2d": (lambda: nn.Dropout2d(0.3), floats(4, 5, 5)),
    "alpha_dropout": (lambda: nn.AlphaDropout(0.3), floats(4)),
}


class Wrapped(nn.Module):
    """One layer at the path ``block.layer``."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"layer": layer})

    def forward(self, x: Tensor) -> Any:
        return self.block["layer"](x)


@pytest.mark.parametrize("name", LAYERS)
def test_layer_comes_back_with_its_options(name: str) -> None:
    make, inputs = LAYERS[name]
    layer = make()
    program = check_capture(Wrapped(layer), inputs)
    (found,) = [module for _, module in program.layers()]
    assert layer_types(program) == {"block.layer": type(layer).__name__}
    if name != "conv2d reflect":  # padding is an operator of its own there
        assert found.extra_repr() == layer.extra_repr()
    for attribute in ("momentum", "eps", "dropout", "p"):
        assert getattr(found, attribute, None) == getattr(layer, attribute, None)


@pytest.mark.parametrize("name", LAYERS)
def test_layer_alone_is_a_model(name: str) -> None:
    """The root has no name to hang a layer on; the keys stay ``weight`` and ``bias`` all the same."""
    make, inputs = LAYERS[name]
    program = check_capture(make(), inputs)
    assert "state" not in program.text()


def test_embedding_and_its_padding() -> None:
    program = check_capture(Wrapped(nn.Embedding(9, 4, padding_idx=2)), lambda b: ((torch.randint(0, 9, (b, 5)),), {}))
    (layer,) = [module for _, module in program.layers()]
    assert isinstance(layer, nn.Embedding) and layer.padding_idx == 2


class OwnForward(nn.Module):
    """The owner does more than its operator: the layer is the operator alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.permute(0, 2, 3, 1), (4,), self.weight, self.bias).permute(0, 3, 1, 2) * 2


def test_owner_with_a_forward_of_its_own() -> None:
    program = check_capture(nn.Sequential(nn.Conv2d(3, 4, 1), OwnForward()), images(size=5))
    assert layer_types(program) == {"0": "Conv2d", "1": "LayerNorm"}
    assert functions(program) == ["permute", "permute", "mul"]


class Functional(nn.Module):
    """Weights with names of their own, used through functions."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(6, 3, 3, 3)), nn.Parameter(torch.randn(6))
        self.head_weight = nn.Parameter(torch.randn(5, 6))
        self.proj = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.w, self.b, padding=1)
        return F.linear(y.mean((2, 3)), self.head_weight) @ self.proj + self.w.mean()


def test_weights_used_functionally_become_layers_and_keep_their_keys() -> None:
    model = nn.Sequential(Functional())
    program = check_capture(model, images(size=6))
    assert layer_types(program) == {"0.w": "Conv2d", "0.head": "Linear", "0.proj": "TransposedLinear"}
    assert list(program.gm.state_dict()) == ["0.w", "0.b", "0.head_weight", "0.proj"]
    changed = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
    program.clone().gm.load_state_dict(changed)  # strict: every key is known; clones share tensors
    assert all(not p.any() for p in model.parameters())


def test_functional_weight_called_twice_is_one_layer() -> None:
    class Twice(Functional):
        def forward(self, x: Tensor) -> Tensor:
            y = F.conv2d(x, self.w, self.b, padding=1)
            return F.conv2d(y[:, :3], self.w, self.b, padding=1)

    program = check_capture(Twice(), images(size=6))
    assert [str(node.target) for node, _ in program.layers()] == ["w", "w"]


def test_functional_weight_called_in_two_ways_is_a_layer_once() -> None:
    class TwoWays(Functional):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.w, self.b, padding=1) + F.conv2d(x, self.w, self.b, padding=3, dilation=3)

    program = check_capture(TwoWays(), images(size=6))
    assert layer_types(program) == {"w": "Conv2d"} and "conv2d" in functions(program)


def test_bias_added_apart_is_not_lost() -> None:
    class Apart(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight) + self.bias

    program = check_capture(nn.Sequential(Apart(4, 5)), floats(4))
    assert list(layer_types(program).values()) == ["Linear"] and functions(program) == ["add"]


class Conv1D(nn.Module):
    """GPT-2's linear layer."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


def test_transposed_linear() -> None:
    program = check_capture(nn.Sequential(Conv1D(4, 6), nn.GELU(), Conv1D(6, 4)), floats(5, 4))
    assert layer_types(program) == {"0": "TransposedLinear", "2": "TransposedLinear"}


class Tied(nn.Module):
    """Embedding and head share one weight, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x))


def test_tied_weights_stay_tied() -> None:
    program = check_capture(Tied(), lambda b: ((torch.randint(0, 9, (b, 5)),), {}))
    assert layer_types(program) == {"embedding": "Embedding", "head": "Linear"}
    assert program.gm.get_submodule("embedding").weight is program.gm.get_submodule("head").weight


def test_head_that_borrows_the_embedding() -> None:
    class Borrowed(Tied):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.embedding(x), self.embedding.weight)

    program = check_capture(Borrowed(), lambda b: ((torch.randint(0, 9, (b, 5)),), {}))
    assert layer_types(program) == {"embedding": "Embedding"} and functions(program) == ["linear"]


def test_shared_module_stays_one_module() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.2))
            self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.relu(self.first(x)))

    program = check_capture(Shared(), floats(4))
    modules = [module for _, module in program.layers()]
    assert modules[0] is modules[2] and modules[1] is modules[3]
    assert program.gm.get_submodule("first.0") is program.gm.get_submodule("second.0")


@pytest.mark.parametrize("batch_first", [True, False])
def test_self_attention_has_its_projections_as_layers(batch_first: bool) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=batch_first)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.attention(x, x, x)

    program = check_capture(Attention(), floats(5, 8) if batch_first else floats(1, 8), exact=False)
    assert layer_types(program) == {"attention.in_proj": "Linear", "attention.out_proj": "Linear"}


def test_cross_attention() -> None:
    def inputs(batch: int) -> Inputs:
        return (torch.randn(batch, 5, 8), torch.randn(batch, 7, 8), torch.randn(batch, 7, 8)), {}

    program = check_capture(nn.MultiheadAttention(8, 2, batch_first=True), inputs, exact=False)
    assert layer_types(program) == {"out_proj": "Linear"}
    check_capture(nn.MultiheadAttention(8, 2, kdim=8, vdim=8, batch_first=True, add_bias_kv=True), inputs, exact=False)


def test_transformer_encoder_and_decoder() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True, norm_first=True)
    program = check_capture(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), floats(5, 8), exact=False)
    kinds = list(layer_types(program).values())
    assert kinds.count("Linear") == 8 and kinds.count("LayerNorm") == 4 and kinds.count("Dropout") == 6

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.transformer(x, x[:, :3])

    check_capture(Both(), floats(5, 8), exact=False)


NORMED: dict[str, Callable[[], nn.Module]] = {
    "weight_norm": lambda: weight_norm(nn.Conv2d(3, 4, 3)),
    "parametrized weight_norm": lambda: parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
    "spectral_norm": lambda: spectral_norm(nn.Conv2d(3, 4, 3)),
    "parametrized spectral_norm": lambda: parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("name", NORMED)
def test_computed_weight_stays_computed(name: str) -> None:
    assigned = () if "parametrized" in name else ("forward assigns 0.weight",)
    program = check_capture(nn.Sequential(NORMED[name](), nn.BatchNorm2d(4)), images(size=6), notes=assigned)
    assert "1" in layer_types(program) and "conv2d" in functions(program)


def test_own_parametrization_and_standardized_convolution() -> None:
    class Symmetric(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w.triu() + w.triu(1).transpose(-1, -2)

    class Standardized(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            w = self.weight
            w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
            return F.conv2d(x, w, self.bias, self.stride, self.padding)

    linear = nn.Linear(4, 4)
    parametrize.register_parametrization(linear, "weight", Symmetric())
    program = check_capture(
        nn.Sequential(Standardized(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear), images(size=6)
    )
    assert layer_types(program) == {}


def test_dropout_called_as_a_function() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(50, 50)

        def forward(self, x: Tensor) -> Tensor:
            x = F.dropout(self.fc(x), 0.5, self.training)
            return F.dropout(F.dropout(x, 0.5, self.training), 0.25, self.training)

    program = check_capture(nn.Sequential(Net(), nn.Dropout(0.5, inplace=True)), floats(50))
    paths = [str(node.target) for node, module in program.layers() if isinstance(module, nn.Dropout)]
    assert paths == ["0.dropout", "0.dropout", "0.dropout_1", "1"]
    x = torch.ones(4, 50)
    assert torch.equal(program(x), program(x))
    program.gm.train()
    assert not torch.equal(program(x), program(x))
    program.gm.eval()
    assert torch.equal(program(x), program(x))


def test_layers_do_not_copy_tensors() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    program = capture(model, (torch.randn(2, 3, 6, 6),))
    with torch.no_grad():
        model[0].weight.zero_()
        model[1].running_mean.fill_(7.0)
    assert not program.gm.get_parameter("0.weight").any()
    assert (program.gm.get_buffer("1.running_mean") == 7).all()
