"""Rotate: orthogonal matrices, exactness on whole models, refusals with the reason."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import PassError, UsageError
from fxcompress.quant.hadamard import hadamard, rotation
from fxcompress.testing import check_pass


@pytest.mark.parametrize("order", [1, 2, 4, 8, 12, 16, 20, 24, 28, 36, 40, 48, 64, 80, 576])
def test_hadamard_matrices(order: int) -> None:
    matrix = hadamard(order)
    assert matrix is not None and bool((matrix.abs() == 1).all())
    assert torch.equal(matrix @ matrix.t(), order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("size", [6, 7, 64, 100, 576])
def test_rotations_are_orthogonal(size: int) -> None:
    matrix, is_hadamard = rotation(size, 3)
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(size, dtype=torch.float64))
    assert is_hadamard == (size in (64, 576))
    assert not torch.equal(matrix, rotation(size, 4)[0])


class Decoder(nn.Module):
    """Two blocks of a decoder with RMS norms spelled out, a tied head and biases."""

    def __init__(self, norm: str = "spelled", width: int = 24) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = norm
        self.embed, self.position = nn.Embedding(30, width), nn.Embedding(16, width)
        self.scales = nn.ParameterList(torch.rand(width) + 0.5 for _ in range(3))
        modules = {"rms": nn.RMSNorm, "layer": nn.LayerNorm, "plain": nn.RMSNorm}
        options = {"elementwise_affine": False} if norm == "plain" else {}
        kinds = [modules[norm](width, **options) for _ in range(3)] if norm in modules else []  # type: ignore[operator]
        self.norms = nn.ModuleList(kinds)
        for n in self.norms:
            for p in n.parameters():
                p.data += torch.rand_like(p)
        self.up = nn.ModuleList(nn.Linear(width, 40) for _ in range(2))
        self.gate = nn.ModuleList(nn.Linear(width, 40) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(40, width) for _ in range(2))
        self.head = nn.Linear(width, 30, bias=False)
        self.head.weight = self.embed.weight

    def norm(self, x: Tensor, i: int) -> Tensor:
        if self.kind != "spelled":
            y: Tensor = self.norms[i](x)
            return y
        return self.scales[i] * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position(torch.arange(tokens.shape[1]))
        for i in range(2):
            y = self.norm(x, i)
            x = x + self.down[i](nn.functional.silu(self.gate[i](y)) * self.up[i](y))
        logits: Tensor = self.head(self.norm(x, 2)[:, -4:])
        return logits


def tokens() -> Tensor:
    return torch.randint(0, 30, (3, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("norm", ["spelled", "rms", "plain"])
@pytest.mark.parametrize("width", [24, 14])
def test_outputs_stay(norm: str, width: int) -> None:
    model = Decoder(norm, width).eval()
    result = check_pass(fxc.Rotate(), model, (tokens(),))
    assert result.changes == [f"rotated stream 0 of {width} features: 2 embeddings, 2 writers, 5 readers"]
    assert any("no longer that of the embedding" in note for note in result.notes)
    assert any("no Hadamard" in note for note in result.notes) == (width == 14)
    assert result.error is not None and result.error < 1e-5
    got = dict(result.program.gm.named_parameters())["up.0.weight"]
    assert float((got - model.up[0].weight).detach().abs().max()) > 0.01  # type: ignore[operator]


def test_outliers_are_spread() -> None:
    model = Decoder("spelled", 24).eval()
    with torch.no_grad():
        model.embed.weight[:, 5] = 30.0
    program = fxc.capture(model, (tokens(),))
    rotated = fxc.Rotate()(program, fxc.Context()).program
    for p, low, high in ((program, 4.0, 100.0), (rotated, 0.0, 3.0)):
        table = p.gm.get_submodule("embed").weight.detach()  # type: ignore[operator,union-attr]
        assert isinstance(table, Tensor)
        kurtosis = float(table.abs().max() / table.square().mean().sqrt())
        assert low <= kurtosis <= high


def test_refusals() -> None:
    layer = fxc.Rotate()(fxc.capture(Decoder("layer").eval(), (tokens(),)), fxc.Context())
    assert not layer.changes and "no RMS norm" in layer.notes[0]

    class Odd(Decoder):
        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens)
            y: Tensor = self.down[0](self.up[0](self.norm(x, 0))) + x
            return y.tanh()

    class Convolved(Decoder):
        def forward(self, tokens: Tensor) -> Tensor:
            return self.norm(self.embed(tokens), 0).cumsum(-1)

    class Given(Decoder):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.up[0](self.norm(x, 0))
            return y

    cases = (
        (Odd(), tokens(), "tanh"), (Convolved(), tokens(), "reads the norm"), (Given(), torch.randn(2, 24), "input of the model")
    )  # fmt: skip
    for model, x, reason in cases:
        result = fxc.Rotate()(fxc.capture(model.eval(), (x,)), fxc.Context())
        assert not result.changes and reason in result.refusals[0].reason, result.refusals
    program = fxc.capture(Decoder().eval(), (tokens(),))
    quantized = fxc.QuantizeDynamic()(program, fxc.Context()).program
    with pytest.raises(PassError, match="before quantization"):
        fxc.Rotate()(quantized, fxc.Context())
    with pytest.raises(UsageError):
        fxc.Rotate(seed=-1)
