"""Quantized layers besides products: embeddings, and LSTM and GRU with weights, and maybe activations, on integers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.ir import clone_tree
from fxcompress.quant.fake_quantize import FakeQuantize
from fxcompress.quant.layer_weights import make_quantizer
from fxcompress.quant.spec import QuantSpec

__all__ = ["QuantizedEmbedding", "QuantizedGRU", "QuantizedLSTM", "asymmetric_bytes", "quantized_layer"]

_SUFFIX = "_fake_quantize"


class QuantizedEmbedding(nn.Embedding):
    """Embedding whose rows lie on grids; ``weight_fake_quantize`` holds them."""

    def forward(self, input: Tensor) -> Tensor:
        """Integers of any shape [...] -> float [..., features]."""
        return F.embedding(input, cast(nn.Module, self.weight_fake_quantize)(self.weight))


class _Weights(nn.RNNBase):
    """Mixin: every weight matrix has its fake-quantizer as ``<name>_fake_quantize``, and forward uses their results."""

    def rounded(self, name: str) -> Tensor:
        """A parameter as forward uses it."""
        quantizer = self._modules.get(name + _SUFFIX)
        value = cast(Tensor, getattr(self, name))
        return value if quantizer is None else cast(Tensor, quantizer(value))

    def _with_rounded_weights(self, plain: type[nn.RNNBase], x: Tensor, state: Any) -> Any:
        stand_in = copy.copy(self)  # forward may run in several threads
        stand_in.__dict__["_flat_weights"] = [self.rounded(n) for n in self._flat_weights_names]
        return plain.forward(stand_in, x, state)


class QuantizedGRU(_Weights, nn.GRU):
    """GRU with quantized weights, computed in float."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """As ``nn.GRU``."""
        return cast("tuple[Tensor, Tensor]", self._with_rounded_weights(nn.GRU, input, hx))


class QuantizedLSTM(_Weights, nn.LSTM):
    """LSTM with quantized weights.

    Attributes:
        dynamic: What the weights multiply is quantized, too, as it comes: the sequence with one grid for all of it, the
            hidden state with one for each step (`asymmetric_bytes`). ONNX Runtime's ``DynamicQuantizeLSTM`` does this.
    """

    dynamic: bool = False

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        hx: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """As ``nn.LSTM``."""
        if not self.dynamic:
            return cast("tuple[Tensor, tuple[Tensor, Tensor]]", self._with_rounded_weights(nn.LSTM, input, hx))
        x = input.transpose(0, 1) if self.batch_first else input
        ends: list[tuple[Tensor, Tensor]] = []
        for number in range(self.num_layers):
            parts = [self._one_direction(x, hx, number, backwards) for backwards in range(1 + self.bidirectional)]
            x = torch.cat([y for y, _ in parts], dim=-1)
            ends += [end for _, end in parts]
        hidden, cell = (torch.stack([end[i] for end in ends]) for i in (0, 1))
        return (x.transpose(0, 1) if self.batch_first else x), (hidden, cell)

    def _one_direction(
        self, x: Tensor, state: Sequence[Tensor] | None, number: int, backwards: int
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Hidden states [length, batch, hidden] of one layer in one direction, and its last hidden and cell state."""
        suffix = f"_l{number}" + "_reverse" * backwards
        place = number * (1 + self.bidirectional) + backwards
        zeros = x.new_zeros(x.shape[1], self.hidden_size)
        hidden, cell = (zeros, zeros) if state is None else (state[0][place], state[1][place])
        bias = getattr(self, f"bias_ih{suffix}") + getattr(self, f"bias_hh{suffix}") if self.bias else None
        inputs = F.linear(asymmetric_bytes(x), self.rounded(f"weight_ih{suffix}"), bias)
        recurrent = self.rounded(f"weight_hh{suffix}")
        steps: list[Tensor] = []
        for step in inputs.flip(0) if backwards else inputs:
            i, f, g, o = (step + F.linear(asymmetric_bytes(hidden), recurrent)).chunk(4, dim=-1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            hidden = o.sigmoid() * cell.tanh()
            steps.append(hidden)
        return torch.stack(steps[::-1] if backwards else steps), (hidden, cell)


def asymmetric_bytes(x: Tensor) -> Tensor:
    """``x`` on the grid of 256 levels that covers its extremes and zero; 16-bit floats are rounded to it in float32."""
    if x.dtype in (torch.float16, torch.bfloat16):
        return asymmetric_bytes(x.float()).to(x.dtype)
    low, high = x.amin().clamp(max=0.0), x.amax().clamp(min=0.0)
    scale = torch.where(high > low, (high - low) / 255.0, torch.ones_like(high))
    zero = (-low / scale).clamp(0.0, 255.0).round()
    return ((x / scale).round() + zero).clamp(0.0, 255.0).sub(zero) * scale


_FORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Embedding: QuantizedEmbedding,
    nn.LSTM: QuantizedLSTM,
    nn.GRU: QuantizedGRU,
}


def quantized_layer(
    layer: nn.Module, spec: QuantSpec, method: Literal["minmax", "mse"], *, dynamic: bool = False
) -> nn.Module:
    """The quantized form of an embedding, LSTM or GRU; parameters are shared with ``layer``.

    Args:
        layer: Of exactly one of these types.
        spec: Grid of its weights, one scale per row (axis 0).
        method: How the range of a row is found.
        dynamic: Quantize activations at run time, which only an LSTM can.

    Raises:
        KeyError: it is another kind of layer.
    """
    new = clone_tree(layer)
    new.__class__ = _FORMS[type(layer)]
    for name, parameter in list(new.named_parameters(recurse=False)):
        if parameter.dim() == 2:
            quantizer: FakeQuantize = make_quantizer(parameter.detach(), spec, method)
            new._modules[name + _SUFFIX] = quantizer
    if isinstance(new, QuantizedLSTM):
        new.dynamic = dynamic
    return new
