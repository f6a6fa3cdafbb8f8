"""What every matrix product does last: bias, residual, activation, rounding to the output dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.errors import UsageError

__all__ = ["ACTIVATIONS", "check_activation", "finish"]

#: Activations the kernels know: name -> function of a float tensor. "" is none.
ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "hardswish": F.hardswish,
}


def check_activation(name: str) -> None:
    """Raise UsageError for an activation that no kernel has."""
    if name not in ACTIVATIONS:
        raise UsageError(
            402, f"no kernel has the activation {name!r}", fix=f"use one of {', '.join(map(repr, ACTIVATIONS))}"
        )


def finish(y: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, dtype: torch.dtype) -> Tensor:
    """``activation(y + bias + residual)`` in float32, then ``dtype``.

    Args:
        y: float32 or float64 [..., N].
        bias: [N], any float dtype.
        residual: Shape of ``y``, any float dtype.
        activation: One of ``ACTIVATIONS``.
        dtype: Of the result.
    """
    check_activation(activation)
    if bias is not None:
        y = y + bias.to(y.dtype)
    if residual is not None:
        y = y + residual.to(y.dtype)
    return ACTIVATIONS[activation](y).to(dtype)
