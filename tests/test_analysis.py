"""MACs and parameters against torch's own flop counter, which sees the kernels that run."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fxcompress.analysis import count_macs, count_parameters, layer_table
from fxcompress.capture import capture
from fxcompress.passes import FoldBatchNorm, FuseActivations


def counted_macs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> int:
    """Half the flops of the matrix products and convolutions that really ran (attention and LSTM as plain products)."""
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)  # one opaque operator otherwise
    plain = (sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False))
    with torch.no_grad(), plain[0], plain[1], FlopCounterMode(display=False) as counter:
        model(*args, **(kwargs or {}))
    torch.backends.mha.set_fastpath_enabled(True)
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return flops // 2


class Function(nn.Module):
    """A function of inputs and a parameter as a module."""

    def __init__(self, function: Callable[..., Tensor], *shape: int) -> None:
        super().__init__()
        self.function = function
        self.w = nn.Parameter(torch.randn(shape))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs, self.w)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return y


class First(nn.Module):
    """The first output of a recurrent layer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)[0]
        return y


class Cell(nn.Module):
    """Three steps of an LSTM cell."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], 10)
        for step in range(3):
            h, c = self.cell(x[:, step], (h, c))
        return h


def image(channels: int = 8, size: int = 13) -> tuple[Tensor]:
    return (torch.randn(2, channels, size, size),)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "conv": (lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1), image()),
    "conv grouped, dilated": (lambda: nn.Conv2d(8, 12, (3, 2), groups=4, dilation=2), image()),
    "conv depthwise": (lambda: nn.Conv2d(8, 16, 5, groups=8, padding="same"), image()),
    "conv1d": (lambda: nn.Conv1d(8, 6, 4, stride=3), (torch.randn(2, 8, 31),)),
    "conv3d": (lambda: nn.Conv3d(4, 6, (1, 3, 2), padding=1), (torch.randn(2, 4, 5, 6, 7),)),
    "conv functional": (lambda: Function(F.conv2d, 5, 8, 3, 3), image()),
    "transposed conv": (lambda: nn.ConvTranspose2d(8, 12, 3, stride=2, padding=1, output_padding=1), image()),
    "transposed conv, grouped": (lambda: nn.ConvTranspose2d(8, 12, 4, stride=3, groups=4), image()),
    "transposed conv1d": (lambda: nn.ConvTranspose1d(8, 6, 5), (torch.randn(3, 8, 9),)),
    "transposed functional": (lambda: Function(F.conv_transpose2d, 8, 5, 3, 3), image()),
    "linear, 3 dimensions": (lambda: nn.Linear(32, 24), (torch.randn(2, 7, 32),)),
    "linear functional": (lambda: Function(F.linear, 24, 32), (torch.randn(2, 7, 32),)),
    "matmul": (lambda: Function(torch.matmul, 32, 5), (torch.randn(2, 3, 7, 32),)),
    "addmm": (lambda: Function(lambda b, x, w: torch.addmm(b, x, w), 32, 5), (torch.randn(5), torch.randn(4, 32))),
    "baddbmm": (
        lambda: Function(lambda b, x, w: torch.baddbmm(b, x, w), 3, 6, 5),
        (torch.randn(3, 4, 5), torch.randn(3, 4, 6)),
    ),
    "einsum": (
        lambda: Function(lambda x, w: torch.einsum("bhqd,hkd->bhqk", x, w), 4, 9, 8),
        (torch.randn(2, 4, 7, 8),),
    ),
    "einsum, three operands": (
        lambda: Function(lambda x, y, w: torch.einsum("...ij,...jk,kl->...il", x, y, w), 6, 3),
        (torch.randn(2, 2, 4, 5), torch.randn(2, 2, 5, 6)),
    ),
    "attention": (SelfAttention, (torch.randn(2, 11, 32),)),
    "cross attention": (
        lambda: Function(lambda q, k, v, w: F.scaled_dot_product_attention(query=q, key=k, value=v) * w, 1),
        (torch.randn(2, 4, 5, 8), torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 6)),
    ),
    "transformer layer": (lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), (torch.randn(2, 11, 32),)),
    "lstm": (lambda: First(nn.LSTM(6, 10, batch_first=True)), (torch.randn(3, 5, 6),)),
    "lstm, two layers, both ways": (lambda: First(nn.LSTM(6, 10, 2, bidirectional=True)), (torch.randn(5, 3, 6),)),
    "lstm with projection": (lambda: First(nn.LSTM(6, 10, proj_size=4)), (torch.randn(5, 3, 6),)),
    "gru": (lambda: First(nn.GRU(6, 10, 2)), (torch.randn(5, 3, 6),)),
    "rnn": (lambda: First(nn.RNN(6, 10)), (torch.randn(5, 3, 6),)),
    "lstm cell": (Cell, (torch.randn(3, 3, 6),)),
}


@pytest.mark.parametrize("name", CASES)
def test_macs_of_layers(name: str) -> None:
    build, args = CASES[name]
    torch.manual_seed(0)
    model = build().eval()
    program = capture(model, args)
    expected = counted_macs(model, args)
    assert expected > 0
    assert count_macs(program) == expected
    assert sum(row.macs for row in layer_table(program)) == count_macs(program)
    assert count_parameters(program) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "vit_tiny_patch16_224"])
def test_macs_of_timm_models(name: str) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(name).eval()
    size = 224 if "224" in name else 64
    x = torch.randn(2, 3, size, size)
    program = capture(model, (x,), verify=False)
    assert count_macs(program) == counted_macs(model, (x,))
    rows = layer_table(program)
    assert (
        sum(row.parameters for row in rows) == count_parameters(program) == sum(p.numel() for p in model.parameters())
    )


def test_macs_of_transformers_models() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_size": 32,
        "intermediate_size": 64,
        "vocab_size": 50,
    }
    llama = transformers.LlamaConfig(num_key_value_heads=2, use_cache=False, **sizes)
    for model in (transformers.BertModel(transformers.BertConfig(**sizes)), transformers.LlamaModel(llama)):
        ids = torch.randint(0, 50, (2, 12))
        program = capture(model.eval(), (), {"input_ids": ids}, verify=False)
        # The rotary table of Llama, [batch, 4, 1] @ [batch, 1, 12] for heads of 8, is a product as well.
        assert count_macs(program) == counted_macs(model, (), {"input_ids": ids})


def test_the_example_counts_and_not_what_was_traced() -> None:
    """A batch of 1 is traced with another size."""
    model = nn.Conv2d(3, 8, 3).eval()
    for batch in (1, 2, 5):
        program = capture(model, (torch.randn(batch, 3, 9, 9),))
        assert count_macs(program) == batch * 8 * 49 * 27
        assert layer_table(program)[0].shape == (batch, 8, 7, 7)


def test_rows_name_layers_and_products() -> None:
    rows = layer_table(capture(SelfAttention(), (torch.randn(2, 11, 32),)))
    kinds = [row.kind for row in rows]
    assert "scaled_dot_product_attention" in kinds and all("." not in kind for kind in kinds)
    assert next(r for r in rows if r.kind == "scaled_dot_product_attention").macs == 2 * 2 * 11 * 11 * 32


def test_a_shared_layer_counts_its_parameters_once_and_its_work_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(torch.relu(self.layer(x)))
            return y

    program = capture(Twice(), (torch.randn(2, 8),))
    assert [(r.name, r.parameters, r.macs) for r in layer_table(program)] == [("layer", 72, 128), ("layer", 0, 128)]
    assert count_parameters(program) == 72


def test_fused_layers_count_as_their_plain_ones() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2), nn.ReLU()
    ).eval()
    program = capture(model, (torch.randn(2, 3, 9, 9),))
    fused = FuseActivations()(FoldBatchNorm()(program).program).program
    assert [row.kind for row in layer_table(fused)] == ["FusedConv2d", "FusedConvTranspose2d"]
    assert count_macs(fused) == count_macs(program) > 0
