"""The integer grid of a tensor, and the scale and zero point that lay a real range on it.

A real value ``x`` is stored as ``q = clamp(round(x / scale) + zero_point, qmin, qmax)`` and read as
``(q - zero_point) * scale``, the affine scheme of Jacob et al., "Quantization and Training of Neural Networks for
Efficient Integer-Arithmetic-Only Inference", 2018, eq. 1. Rounding is to nearest, ties to even.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from fxcompress.errors import UsageError

__all__ = ["QuantSpec", "quant_params", "stored_scale"]

_DERIVED: Final = 1 << 31  # no grid has this integer

# A quotient x / scale and an 8-bit fraction of a step must stay normal numbers on processors that flush denormals to
# zero, hence 256 times the smallest normal float32 (3.0e-36). Ranges below 255 such steps lose levels, never validity.
SCALE_FLOOR: Final = 256.0 * torch.finfo(torch.float32).tiny
# A rounded zero point lets the grid reach half a step beyond the range; ``(q - zero_point) * scale`` must stay finite.
_LARGEST: Final = torch.finfo(torch.float32).max / 2


@dataclass(frozen=True)
class QuantSpec:
    """How a tensor is quantized: the integers used and where zero lies on them.

    Args:
        bits: Width of the integer container, 2 to 16.
        signed: Two's complement container (``int8``) or unsigned (``uint8``).
        symmetric: Zero point fixed: 0 when signed, 0 for unsigned data without negative values, else the middle.
        axis: Dimension with one scale per index, or ``None`` for one scale per tensor.
        qmin: Smallest integer used. Default: the container's. A narrower range (-127 of int8, -64 for 7-bit weights in
            int8) is allowed.
        qmax: Largest integer used. Default: the container's.
        group_size: Of a matrix with an ``axis``: this many values along the other dimension share a scale; None: all.

    Raises:
        UsageError: If the width is not 2 to 16, ``[qmin, qmax]`` leaves the container or does not hold zero, or the
            group size is not positive or has no axis.
    """

    bits: int
    signed: bool
    symmetric: bool
    axis: int | None = None
    qmin: int = _DERIVED
    qmax: int = _DERIVED
    group_size: int | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise UsageError(40, f"a quantized tensor cannot have {self.bits} bits", fix="use 2 to 16 bits")
        if self.group_size is not None and (self.group_size < 1 or self.axis not in (0, 1)):
            raise UsageError(
                474,
                f"a tensor cannot have groups of {self.group_size} along axis {self.axis}",
                why="groups lie in the rows (axis 0) or columns (axis 1) of a matrix",
                fix="give a positive group size and axis 0 or 1",
            )
        least = -(1 << (self.bits - 1)) if self.signed else 0
        most = least + (1 << self.bits) - 1
        if self.qmin == _DERIVED:
            object.__setattr__(self, "qmin", least)
        if self.qmax == _DERIVED:
            object.__setattr__(self, "qmax", most)
        inside = least <= self.qmin <= 0 < self.qmax <= most
        if not inside or (self.symmetric and self.signed and self.qmin == 0):
            raise UsageError(
                41,
                f"the integer range [{self.qmin}, {self.qmax}] does not suit this grid",
                why=f"the container holds [{least}, {most}], zero must be on the grid"
                + (", and a symmetric signed grid needs negative integers" if self.symmetric else ""),
                fix="leave qmin and qmax out, or narrow them inside the container",
            )

    @property
    def steps(self) -> int:
        """Number of steps between the smallest and the largest integer, ``qmax - qmin``."""
        return self.qmax - self.qmin


def quant_params(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point whose grid covers ``[low, high]``.

    The range is first widened to hold 0, which is then represented exactly. Every ``x`` of the widened range comes back
    with an error of at most ``scale / 2`` (a scale that float32 cannot hold is rounded up for that). A range of zero
    width gets scale 1. Scales are never below 3e-36, so never denormal; ends beyond 1.7e38 are cut there, so that no
    result overflows. Arithmetic is float64.

    Args:
        low: Lower end(s) of the range, any shape and float dtype, finite.
        high: Upper end(s), same shape, ``high >= low``.
        spec: The integer grid.

    Returns:
        The scale (float32) and the zero point (int32), in the shape and on the device of ``low``.

    Raises:
        UsageError: If an end is not finite or ``low > high``.
    """
    if low.shape != high.shape:
        raise UsageError(42, "the two ends of a quantization range differ in shape", why=f"{low.shape} vs {high.shape}")
    if not bool((torch.isfinite(low) & torch.isfinite(high) & (low <= high)).all()):
        raise UsageError(
            43,
            "a quantization range is not finite or runs backwards",
            why="every low must be finite and at most its high",
            fix="check the calibration data and the weights for NaN and infinity",
        )
    scale, zero_point = solve(low, high, spec)
    return scale.to(torch.float32), zero_point.to(torch.int32)


def solve(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """`quant_params` without the checks and in float64; the scale already has a float32 value."""
    low = _float64(low).clamp(-_LARGEST, 0.0)
    high = _float64(high).clamp(0.0, _LARGEST)
    if not spec.symmetric:
        scale = _as_scale((high - low) / spec.steps)
        # -low / scale is at most ``steps``, the scale being rounded up.
        return scale, torch.round(spec.qmin - low / scale)
    zero_point = torch.zeros_like(low)
    if not spec.signed:
        zero_point = torch.where(low < 0, float((spec.qmin + spec.qmax + 1) // 2), zero_point)
    # An unsigned grid with zero point 0 has no step below zero, and then low is 0 as well: 0 / -1.
    below = low / (spec.qmin - zero_point).clamp(max=-1.0)
    return _as_scale(torch.maximum(below, high / (spec.qmax - zero_point))), zero_point


def stored_scale(scale: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The scale (float32) of a weight of ``dtype``: that of a 16-bit one has a value of its dtype; engines keep it so."""
    if dtype not in (torch.float16, torch.bfloat16):
        return scale
    return scale.to(dtype).clamp(min=torch.finfo(dtype).tiny).float()


def _float64(value: Tensor) -> Tensor:
    """Float64 copy without history."""
    return value.detach().to(torch.float64)


def _as_scale(exact: Tensor) -> Tensor:
    """Rounds up to a float32 value, keeps it normal, and replaces the scale of a zero range by 1."""
    nearest = exact.to(torch.float32)
    above = torch.nextafter(nearest, torch.full_like(nearest, torch.inf))
    scale = torch.where(nearest.to(torch.float64) < exact, above, nearest).to(torch.float64)
    return torch.where(exact == 0, 1.0, scale.clamp_(min=SCALE_FLOOR))
