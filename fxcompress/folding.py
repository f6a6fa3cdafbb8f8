"""The formulas that fold a BatchNorm into the layer in front of it, differentiable; see `passes.fold_batchnorm`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.layers import TransposedLinear

__all__ = ["fold_bias", "fold_weight", "norm_affine", "per_output"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def norm_affine(
    gamma: Tensor | None, beta: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """``s`` and ``t`` with ``BN(x) = s x + t``: ``s = gamma / sqrt(var + eps)``, ``t = beta - s mean``.

    Args:
        gamma: Weight of the norm [channels], None for ones.
        beta: Bias of the norm [channels], None for zeros.
        mean: Mean [channels].
        var: Variance [channels].
        eps: Added to the variance.

    Returns:
        Both in float64 [channels].
    """
    scale = torch.rsqrt(var.double() + eps)
    if gamma is not None:
        scale = scale * gamma.double()
    shift = -mean.double() * scale
    return scale, shift if beta is None else shift + beta.double()


def fold_weight(layer: Any, weight: Tensor, scale: Tensor) -> Tensor:
    """The weight of ``layer`` times ``scale`` of its output channel, in the wider dtype of the two."""
    return weight * per_output(layer, scale)


def fold_bias(bias: Tensor | None, scale: Tensor, shift: Tensor) -> Tensor:
    """``scale bias + shift`` [channels], in the dtype of ``scale``."""
    return shift if bias is None else bias.to(scale.dtype) * scale + shift


def per_output(layer: Any, values: Tensor) -> Tensor:
    """Values per output channel, shaped to multiply ``layer.weight``."""
    weight = layer.weight
    if isinstance(layer, TransposedLinear):
        return values
    if not isinstance(layer, _TRANSPOSED):
        return values.reshape(-1, *[1] * (weight.dim() - 1))
    grouped = values.reshape(layer.groups, 1, -1).expand(-1, weight.shape[0] // layer.groups, -1)
    return grouped.reshape(*weight.shape[:2], *[1] * (weight.dim() - 2))  # [in, out / groups, 1 ...]
