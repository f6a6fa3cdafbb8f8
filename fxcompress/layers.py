"""Layers of the normal form that PyTorch does not have: fused layers and GPT-2's transposed linear.

A fused layer is the plain layer plus an epilogue in one module: ``activation(layer(x) + residual)``. Parameter names
stay ``weight`` and ``bias``, so ``state_dict`` keys do not change. A fused layer may also carry the fake-quantizer of
its weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.errors import PassError
from fxcompress.ir import clone_tree

__all__ = [
    "ACTIVATIONS", "FUSED_LAYERS", "WEIGHTED_LAYERS", "Activation", "Fused", "TransposedLinear", "cannot_fuse", "make_fused",
]  # fmt: skip

_aten = torch.ops.aten

#: Activation operators that can be fused behind a layer: name of the operator -> overload.
ACTIVATIONS: dict[str, Any] = {
    "relu": _aten.relu.default,
    "relu6": _aten.relu6.default,
    "hardtanh": _aten.hardtanh.default,
    "leaky_relu": _aten.leaky_relu.default,
    "silu": _aten.silu.default,
    "hardswish": _aten.hardswish.default,
    "gelu": _aten.gelu.default,
    "sigmoid": _aten.sigmoid.default,
}


@dataclass(frozen=True)
class Activation:
    """An elementwise function with its constants: ``hardtanh`` with ``args=(0.0, 6.0)`` is ReLU6."""

    name: str
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()

    def __call__(self, x: Tensor) -> Tensor:
        return cast(Tensor, ACTIVATIONS[self.name](x, *self.args, **dict(self.kwargs)))

    def __str__(self) -> str:
        inner = [str(a) for a in self.args] + [f"{k}={v}" for k, v in self.kwargs]
        return f"{self.name}({', '.join(inner)})" if inner else self.name


class TransposedLinear(nn.Module):
    """``x @ weight + bias`` with ``weight`` [in_features, out_features], as in GPT-2's ``Conv1D``."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.shape
        self.weight = weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """Float ``x`` [..., in_features] -> [..., out_features]."""
        return self.product(x, self.weight, self.bias)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer with another weight and bias of the same shapes."""
        if bias is None:
            return torch.matmul(x, weight)
        flat = torch.addmm(bias, x.reshape(-1, self.in_features), weight)
        return flat.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Sizes, as ``nn.Linear`` prints them."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


class Fused(nn.Module):
    """Mixin of the fused layers: ``activation(layer(x) [+ residual])``, the weight fake-quantized when asked.

    Attributes:
        activation: Elementwise function behind the layer, or None.
        weight_fake_quantize: Module applied to ``weight`` in forward, or None.
    """

    activation: Activation | None
    weight_fake_quantize: nn.Module | None
    weight: Tensor

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The plain layer with ``weight`` and ``bias``."""
        raise TypeError(f"{type(self).__name__} does not define compute()")

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Float ``x`` and optional ``residual`` of the output's shape -> output of the fused layer."""
        quantizer = self.weight_fake_quantize
        y = self.compute(x, self.weight if quantizer is None else quantizer(self.weight), cast(Any, self).bias)
        return self.epilogue(y, residual)

    def epilogue(self, y: Tensor, residual: Tensor | None) -> Tensor:
        """What follows the plain layer: ``activation(y [+ residual])``."""
        if residual is not None:
            y = y + residual
        return y if self.activation is None else self.activation(y)

    def describe(self) -> str:
        """One line for program dumps."""
        base = type(self).__name__.removeprefix("Fused")
        parts = [f"{base}[{self.extra_repr()}]"]
        if self.activation is not None:
            parts.append(str(self.activation))
        if self.weight_fake_quantize is not None:
            parts.append(f"weight:{self.weight_fake_quantize.extra_repr()}")
        return " + ".join(parts)


class _Conv(Fused):
    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        s = cast(nn.Conv2d, self)
        return cast(Tensor, s._conv_forward(x, weight, bias))  # also pads as padding_mode says


class _ConvTranspose(Fused):
    _function: ClassVar[Any]

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        s = cast(nn.ConvTranspose2d, self)
        geometry = (s.stride, s.padding, s.output_padding, s.groups, s.dilation)
        return cast(Tensor, type(self)._function(x, weight, bias, *geometry))


class FusedConv1d(_Conv, nn.Conv1d):
    """Conv1d with an epilogue."""


class FusedConv2d(_Conv, nn.Conv2d):
    """Conv2d with an epilogue."""


class FusedConv3d(_Conv, nn.Conv3d):
    """Conv3d with an epilogue."""


class FusedConvTranspose1d(_ConvTranspose, nn.ConvTranspose1d):  # type: ignore[misc]
    """ConvTranspose1d with an epilogue."""

    _function = staticmethod(F.conv_transpose1d)


class FusedConvTranspose2d(_ConvTranspose, nn.ConvTranspose2d):  # type: ignore[misc]
    """ConvTranspose2d with an epilogue."""

    _function = staticmethod(F.conv_transpose2d)


class FusedConvTranspose3d(_ConvTranspose, nn.ConvTranspose3d):  # type: ignore[misc]
    """ConvTranspose3d with an epilogue."""

    _function = staticmethod(F.conv_transpose3d)


class FusedLinear(Fused, nn.Linear):
    """Linear with an epilogue."""

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


class FusedTransposedLinear(Fused, TransposedLinear):
    """TransposedLinear with an epilogue."""

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.product(x, weight, bias)


_FUSED: dict[type[nn.Module], type[Fused]] = {
    nn.Conv1d: FusedConv1d,
    nn.Conv2d: FusedConv2d,
    nn.Conv3d: FusedConv3d,
    nn.ConvTranspose1d: FusedConvTranspose1d,
    nn.ConvTranspose2d: FusedConvTranspose2d,
    nn.ConvTranspose3d: FusedConvTranspose3d,
    nn.Linear: FusedLinear,
    TransposedLinear: FusedTransposedLinear,
}

#: Plain layers that have a fused form: those that multiply by a weight.
WEIGHTED_LAYERS: tuple[type[nn.Module], ...] = tuple(_FUSED)
FUSED_LAYERS: tuple[type[Fused], ...] = tuple(_FUSED.values())


def cannot_fuse(layer: nn.Module) -> str | None:
    """Why a layer of ``WEIGHTED_LAYERS`` has no fused form; None when it has."""
    taken = [] if isinstance(layer, Fused) else sorted({"activation", "weight_fake_quantize"} & set(layer._modules))
    return f"its submodule {taken[0]!r} has the name of an attribute of fused layers" if taken else None


def make_fused(layer: nn.Module, activation: Activation | None = None) -> Fused:
    """The fused form of a plain or already fused layer, sharing its parameters.

    Raises:
        PassError: the layer has a submodule with the name of a fused layer's own attribute.
        KeyError: the layer has no fused form (not in ``WEIGHTED_LAYERS``).
    """
    new = clone_tree(layer)
    if isinstance(new, Fused):
        new.activation = activation or new.activation
        return new
    reason = cannot_fuse(layer)
    if reason:
        raise PassError(41, f"a {type(layer).__name__} has no fused form", why=reason, fix="rename it in the model")
    new.__class__ = _FUSED[type(layer)]
    fused = cast(Fused, new)
    fused.activation = activation
    fused.weight_fake_quantize = None
    return fused
