"""What calibrated methods know of a layer's inputs: the energy of each feature, or all second moments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.data import all_finite

__all__ = ["InputStatistics", "input_rows"]

#: Values of one block of input rows: unfolding an image repeats each pixel once per kernel position.
_BLOCK = 1 << 24


class InputStatistics:
    """Sums over the inputs of one layer, in float64.

    With ``x`` the input of a layer in the feature order of `fxcompress.sparse.layers.to_rows`, one row per sample and
    output position, the sums are ``sum x_j^2`` (what Wanda needs) or ``X^T X`` (what SparseGPT needs). The layer's
    inputs that hold NaN or infinity are left out and counted.

    Args:
        module: A convolution or linear layer.
        moments: Keep ``X^T X`` [groups, features, features] instead of its diagonal [groups, features].

    Attributes:
        rows: Input rows seen.
        skipped: Inputs left out.
    """

    def __init__(self, module: nn.Module, moments: bool) -> None:
        self.module, self.moments = module, moments
        self.total: Tensor | None = None
        self.rows = 0
        self.skipped = 0

    def update(self, x: Tensor) -> None:
        """Add one input of the layer, as its ``forward`` takes it."""
        x = x.detach()
        if not all_finite(x):
            self.skipped += 1
            return
        for block in input_rows(self.module, x):
            block = block.float() if block.dtype in (torch.float16, torch.bfloat16) else block
            added = block.mT @ block if self.moments else block.square().sum(1, dtype=torch.float64)
            self.total = added.double() if self.total is None else self.total.add_(added)
            self.rows += block.shape[1]


def input_rows(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """``x`` as blocks ``[groups, samples, features]`` whose product with a weight row is one output value.

    Args:
        module: Linear layer or convolution (of any padding, stride, dilation, groups), not a transposed convolution.
        x: Its input; a convolution's may lack the batch dimension.
    """
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        flat = x.reshape(-1, x.shape[-1])
        for part in flat.split(max(1, _BLOCK // max(1, flat.shape[1]))):
            yield part.unsqueeze(0)
        return
    weight = cast(Tensor, module._parameters["weight"])
    batched = x if x.dim() == weight.dim() else x.unsqueeze(0)
    positions = batched[:1, :1].numel()
    each = positions * batched.shape[1] * weight[0, 0].numel()  # an upper bound for stride 1
    for part in batched.split(max(1, _BLOCK // max(1, each))):
        yield _unfolded(module, part)


def _unfolded(module: Any, x: Tensor) -> Tensor:
    """Windows of ``x`` [n, channels, ...] under a convolution, as [groups, n * positions, taps * channels / groups]."""
    padding = module._reversed_padding_repeated_twice
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, padding, mode=mode) if any(padding) else x
    spatial = len(module.kernel_size)
    for axis in range(spatial):
        size, gap = module.kernel_size[axis], module.dilation[axis]
        x = x.unfold(2 + axis, (size - 1) * gap + 1, module.stride[axis])[..., ::gap]
    x = x.unflatten(1, (module.groups, -1))  # [n, groups, channels, *positions, *taps]
    positions = range(3, 3 + spatial)
    taps = range(3 + spatial, 3 + 2 * spatial)
    windows = x.permute(1, 0, *positions, *taps, 2)
    return windows.reshape(module.groups, -1, windows[0, 0][(0,) * spatial].numel())
