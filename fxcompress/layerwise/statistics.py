"""What calibrated methods know of a layer's inputs: the energy of each feature, or all second moments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.data import all_finite
from fxcompress.errors import CalibrationError

__all__ = ["InputStatistics", "input_rows", "not_finite_note"]

#: Values of one block of input rows: unfolding an image repeats each pixel once per kernel position.
_BLOCK = 1 << 24
#: Rows of the second moments that are computed at once.
_ROWS = 256
#: Share of inputs that may hold NaN or infinity.
_MAX_BAD = 0.01


def not_finite_note(bad: int, seen: int, where: str) -> list[str]:
    """A line for the report when some of a layer's inputs held NaN or infinity.

    Args:
        bad: Inputs that did.
        seen: All inputs.
        where: Names of the layers.

    Raises:
        CalibrationError: more than 1 % of them did.
    """
    if bad > _MAX_BAD * seen:
        raise CalibrationError(
            209,
            "a layer's inputs hold NaN or infinity",
            where=where,
            why=f"those of {bad} of {seen} calibration batches, though the batches themselves are finite",
            fix="check the layers in front of it on this data (float16 overflows at 65504), or name it in ignore=...",
        )
    return [f"{where}: {bad} of {seen} inputs held NaN or infinity: left out"] if bad else []


class InputStatistics:
    """Sums over the inputs of one layer, in float64.

    With ``x`` the input of a layer in the feature order of `fxcompress.sparse.layers.to_rows`, one row per sample and
    output position, the sums are ``sum x_j^2`` (what Wanda needs) or ``X^T X`` (what SparseGPT and GPTQ need). The
    layer's inputs that hold NaN or infinity are left out and counted. Products of one input are float32.

    Args:
        module: A convolution or linear layer.
        moments: Keep ``X^T X`` [groups, features, features] instead of its diagonal [groups, features].
        skip: Leave out that many tokens at the start of every sequence, where the input is [samples, tokens, features].
        magnitudes: Sum up ``|x_j|``, too.

    Attributes:
        rows: Input rows seen.
        seen: Inputs, usable or not.
        skipped: Inputs left out.
        unskipped: Inputs whose first tokens could not be told, because they are no sequences.
        absolute: ``sum |x_j|`` [groups, features], float64; None unless asked for.
    """

    def __init__(self, module: nn.Module, moments: bool, skip: int = 0, *, magnitudes: bool = False) -> None:
        self.module, self.moments, self.skip, self.magnitudes = module, moments, skip, magnitudes
        self.rows = self.seen = self.skipped = self.unskipped = 0
        self.absolute: Tensor | None = None
        self._total: Tensor | None = None  # of second moments the upper part; the lower one is its mirror image

    @property
    def total(self) -> Tensor | None:
        """The sums; None when there was no usable input."""
        if self.moments and self._total is not None:
            for begin in range(0, self._total.shape[2], _ROWS):
                end = begin + _ROWS
                self._total[:, end:, begin:end] = self._total[:, begin:end, end:].mT
        return self._total

    def forget(self) -> None:
        """Let the sums go, which may be large."""
        self._total = None

    def update(self, x: Tensor) -> None:
        """Add one input of the layer, as its ``forward`` takes it."""
        x = x.detach()
        self.seen += 1
        if not all_finite(x):
            self.skipped += 1
            return
        if self.skip and x.dim() == 3:
            x = x[:, self.skip :]
        elif self.skip:
            self.unskipped += 1
        for block in input_rows(self.module, x):
            self._add(block.float() if block.dtype in (torch.float16, torch.bfloat16) else block)

    def _add(self, block: Tensor) -> None:
        """One block [groups, rows, features]."""
        if block.shape[1] == 0:
            return
        if self.magnitudes:
            total = block.abs().sum(1, dtype=torch.float64)
            self.absolute = total if self.absolute is None else self.absolute.add_(total)
        if self.moments:
            self._add_moments(block)
        else:
            added = block.square().sum(1, dtype=torch.float64)
            self._total = added if self._total is None else self._total.add_(added)
        self.rows += block.shape[1]

    def _add_moments(self, block: Tensor) -> None:
        groups, _, features = block.shape
        if self._total is None:
            self._total = block.new_zeros((groups, features, features), dtype=torch.float64)
        for begin in range(0, features, _ROWS):  # in parts: float32 products beside the sums take memory, too
            end = begin + _ROWS
            self._total[:, begin:end, begin:].add_(block[..., begin:end].mT @ block[..., begin:])


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
