"""Quantization ranges of weights, one per channel or one per tensor."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fxcompress.errors import CalibrationError, UsageError
from fxcompress.quant.histogram import memory_order
from fxcompress.quant.spec import QuantSpec, solve

__all__ = ["weight_range"]

# Values worked on at once: three float32 buffers of this size stay in a processor's second-level cache.
_CHUNK = 1 << 17
_FACTORS = torch.linspace(1.0, 0.2, 101, dtype=torch.float64)
# The rounding errors of few values are a matter of luck, so that every factor is worth a try; the error of more values
# is a smooth function of the factor, and it is enough to look at every fourth, then at all between its neighbours.
_EXHAUSTIVE = 256
_STRIDE = 4


@torch.no_grad()
def weight_range(w: Tensor, spec: QuantSpec, method: Literal["minmax", "mse"] = "mse") -> tuple[Tensor, Tensor]:
    """Range of each channel of a weight.

    Args:
        w: Weight, any shape, float dtype, device and memory order; not empty, finite.
        spec: The integer grid; ``spec.axis`` is the channel dimension (negative counts from the end), ``None`` gives
            one range for all.
        method: ``"minmax"``: the extremes. ``"mse"``: the extremes times the factor among 1.000, 0.992 ... 0.200 that
            makes ``sum((w - fake_quantize(w)) ** 2)`` least, channel by channel, so never worse than ``"minmax"``.
            Channels of more than 256 values are searched in two steps, every fourth factor and then around the best.

    Returns:
        The ends of the ranges, float32, ``[channels]`` or scalar, on the device of ``w``.

    Raises:
        CalibrationError: If the weight is empty, not of a float dtype, or holds NaN, infinity or values beyond float32.
        UsageError: If the method is unknown or the axis does not exist.
    """
    if method not in ("minmax", "mse"):
        raise UsageError(57, f"unknown weight range method {method!r}", fix="use 'minmax' or 'mse'")
    if not w.is_floating_point() or not w.numel():
        raise CalibrationError(41, f"a weight of dtype {w.dtype} and shape {list(w.shape)} has no quantization range")
    # 8-bit floats have no reductions.
    channels = _channels_first(w.to(torch.float32) if w.element_size() == 1 else w, spec.axis)
    low, high = _extremes(channels)
    bad = (~(torch.isfinite(low) & torch.isfinite(high))).nonzero().flatten().tolist()
    if bad:
        raise CalibrationError(
            42,
            "a weight holds NaN, infinity or values beyond float32",
            where=f"shape {list(w.shape)}" + ("" if spec.axis is None else f", channels {str(bad[:8])[1:-1]}"),
            why="no integer grid can represent them",
            fix="repair the weight, or leave the layer out of quantization",
        )
    if method == "mse":
        low, high = _shrink(channels, low, high, spec)
    return (low, high) if spec.axis is not None else (low[0], high[0])


def _channels_first(w: Tensor, axis: int | None) -> Tensor:
    """View with the channels in dimension 0; one channel for all when there is no axis."""
    if axis is None:
        return memory_order(w)[None]
    if not -w.dim() <= axis < w.dim():
        raise UsageError(45, f"a weight of shape {list(w.shape)} has no axis {axis}", fix="correct QuantSpec.axis")
    return w.movedim(axis, 0)


def _extremes(channels: Tensor) -> tuple[Tensor, Tensor]:
    if channels.dim() == 1:
        return channels.to(torch.float32), channels.to(torch.float32)
    inner = tuple(range(1, channels.dim()))
    return channels.amin(inner).to(torch.float32), channels.amax(inner).to(torch.float32)


def _shrink(channels: Tensor, low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The range of each channel times its best factor."""
    factors = _FACTORS.to(low)
    low, high = factors[:, None] * low, factors[:, None] * high
    best = torch.empty((1, low.shape[1]), dtype=torch.int64, device=low.device)
    step = max(1, _CHUNK * channels.shape[0] // channels.numel())
    for first in range(0, channels.shape[0], step):
        part = slice(first, min(first + step, channels.shape[0]))
        block = channels[part].reshape(part.stop - first, -1)
        best[:, part] = _best_grids(block, *solve(low[:, part], high[:, part], spec), spec)
    return low.gather(0, best)[0], high.gather(0, best)[0]


def _best_grids(block: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Which of the grids suits each channel best, int64 ``[1, channels]``; arguments as for `_errors`."""
    if block.shape[1] <= _EXHAUSTIVE:
        return _errors(block, scale, zero_point, spec, look=8).argmin(0, keepdim=True)
    every = slice(None, None, _STRIDE)
    best = _errors(block, scale[every], zero_point[every], spec, look=2).argmin(0, keepdim=True) * _STRIDE
    around = torch.arange(1 - _STRIDE, _STRIDE, device=best.device)[:, None]
    near = (best + around).clamp_(0, scale.shape[0] - 1)
    errors = _errors(block, scale.gather(0, near), zero_point.gather(0, near), spec, look=len(near))
    return near.gather(0, errors.argmin(0, keepdim=True))


def _errors(block: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, look: int) -> Tensor:
    """Squared error of each channel with each of some grids, infinite where it is certain not to be the least.

    Rounding adds at most ``scale ** 2 / 4`` a value. So what a grid errs beyond that is clipping, and clipping only
    grows from one grid to the next, narrower one: once it alone exceeds an error that is known to be reached, for all
    channels of the block, no later grid can win.

    Args:
        block: Values, ``[channels, n]``.
        scale: Float64 ``[grids, channels]``, decreasing; of more than ``look`` grids the first must clip nothing.
        zero_point: Like ``scale``.
        spec: The integer grid.
        look: How many grids are tried between two looks at whether to stop.

    Returns:
        Float64 ``[grids, channels]``.
    """
    square = scale.square()
    errors, clipped = torch.zeros_like(scale), torch.zeros_like(scale)
    inverse, shift = scale.reciprocal().to(torch.float32)[..., None], zero_point.to(torch.float32)[..., None]
    useful, size = scale.shape[0], block.shape[1]
    step = max(1, _CHUNK // block.shape[0])
    for start in range(0, size, step):
        values = block[:, start : start + step].to(torch.float32).contiguous()
        left = size - start - values.shape[1]
        for first in range(0, useful, look):
            group = slice(first, min(first + look, useful))
            found = _rounding_norms(values, inverse[group], shift[group], spec).square_().mul_(square[group])
            errors[group] += found
            clipped[group] += (found - square[group] * (values.shape[1] / 4)).clamp_(min=0)
            reached = errors[0] + square[0] * (left / 4) if left else errors[: group.stop].amin(0)
            if bool((clipped[group.stop - 1] > reached).all()):
                useful = group.stop
                break
    errors[useful:] = torch.inf
    return errors


def _rounding_norms(values: Tensor, inverse: Tensor, shift: Tensor, spec: QuantSpec) -> Tensor:
    """Norm over each channel of what grids round and clip away, in steps, float64 ``[grids, channels]``."""
    position, stored = torch.empty_like(values), torch.empty_like(values)
    norms = []
    for inv, zero in zip(inverse, shift, strict=True):
        torch.addcmul(zero, values, inv, out=position)
        torch.round(position, out=stored).clamp_(spec.qmin, spec.qmax)
        norms.append(torch.linalg.vector_norm(position.sub_(stored), dim=1))
    return torch.stack(norms).to(torch.float64)
