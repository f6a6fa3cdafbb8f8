"""FakeQuantize: the module that simulates a quantized tensor, and observes its range before."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from fxcompress.errors import CalibrationError, UsageError
from fxcompress.ops import fake_quantize
from fxcompress.quant.observers import Observer
from fxcompress.quant.spec import QuantSpec, quant_params

__all__ = ["QUANTIZERS", "DynamicFakeQuantize", "FakeQuantize", "grouped", "ungrouped"]


def grouped(x: Tensor, spec: QuantSpec) -> Tensor:
    """A matrix with groups as one row per group, [channels * groups, group_size]."""
    assert spec.group_size is not None and spec.axis is not None
    return x.movedim(spec.axis, 0).reshape(-1, spec.group_size)


def ungrouped(rows: Tensor, like: Tensor, spec: QuantSpec) -> Tensor:
    """Inverse of `grouped`: ``rows`` in the shape of ``like``."""
    assert spec.axis is not None
    return rows.reshape(like.movedim(spec.axis, 0).shape).movedim(0, spec.axis)


class FakeQuantize(nn.Module):
    """Simulates quantization of one tensor (or of several that share a scale).

    With an ``observer`` it passes values through and watches them; ``freeze`` turns what was seen into ``scale`` and
    ``zero_point``, and from then on the output lies on the grid.

    Args:
        spec: The integer grid.
        observer: Watches values first; None when the range is set by `set_range`.
        device: Where ``scale`` and ``zero_point`` lie; that of the values.

    Attributes:
        spec: The integer grid.
        scale: float32, shape [] or [channels]; [channels, groups] for a grid with groups.
        zero_point: int32, same shape.
        observer: Watches values until ``freeze``; then None.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self, spec: QuantSpec, observer: Observer | None = None, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.spec = spec
        self.observer = observer
        self.register_buffer("scale", torch.ones((), device=device))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32, device=device))

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Take the grid that covers ``[low, high]`` (shape [] or [channels]); ends observation."""
        scale, zero_point = quant_params(low, high, self.spec)
        self.scale, self.zero_point = scale.to(self.scale.device), zero_point.to(self.scale.device)
        self.observer = None

    def freeze(self, name: str) -> None:
        """Turn the observed range into the grid.

        Args:
            name: What is quantized, for the error.

        Raises:
            CalibrationError: no finite value was observed.
        """
        if self.observer is None:
            return
        if not self.observer.count:
            raise CalibrationError(
                20, "no finite value was observed", where=name, fix="check the calibration data for NaN and infinity"
            )
        self.set_range(*self.observer.range(self.spec))

    def widen(self, scale: Tensor) -> None:
        """Take a larger ``scale`` (shape []): the grid starts where it did and reaches further."""
        spec = self.spec
        if not spec.symmetric:
            low = (spec.qmin - self.zero_point.double()) * self.scale.double()
            zero_point = (spec.qmin - low / scale.double()).round().clamp(spec.qmin, spec.qmax)
            self.zero_point = zero_point.to(torch.int32)
        self.scale = scale.clone()

    def forward(self, x: Tensor) -> Tensor:
        """Float ``x`` of any shape; returned as it is while observing, else on the grid."""
        if self.observer is not None:
            self.observer.update(x)
            return x
        spec = self.spec
        if spec.group_size is not None:
            rows, scale, zero = grouped(x, spec), self.scale.flatten(), self.zero_point.flatten()
            return ungrouped(cast(Tensor, fake_quantize(rows, scale, zero, 0, spec.qmin, spec.qmax)), x, spec)
        axis = -1 if spec.axis is None else spec.axis
        return cast(Tensor, fake_quantize(x, self.scale, self.zero_point, axis, spec.qmin, spec.qmax))

    def extra_repr(self) -> str:
        """Grid in short form: ``uint8[0, 255]`` or ``int8[-127, 127] per axis 0``."""
        return _describe(self.spec) + ("" if self.spec.axis is None else f" per axis {self.spec.axis}")


class DynamicFakeQuantize(nn.Module):
    """Simulates quantization of activations whose range is taken from each token as it comes.

    Every vector along the last dimension, or every ``block`` values of it, has its own scale ``max|x| / qmax`` and zero
    point 0.

    Args:
        spec: The integer grid: signed, symmetric, no axis.
        block: This many values along the last dimension share a scale (fewer in the last block); None: all.
    """

    block: int | None = None  # of files that are older than blocks

    def __init__(self, spec: QuantSpec, block: int | None = None) -> None:
        super().__init__()
        if block is not None and block < 1:
            raise UsageError(
                500, f"a block of {block} activations", fix="give a positive size, or None for whole tokens"
            )
        if not (spec.signed and spec.symmetric and spec.axis is None):
            raise UsageError(
                37, "a dynamic grid must be signed and symmetric, without an axis", fix="QuantSpec(8, True, True)"
            )
        self.spec = spec
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """Float ``x`` [..., features] on its grids."""
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        features = x.shape[-1]
        if self.block is None or self.block >= features:
            return self._on_grid(wide).to(x.dtype)
        blocks = nn.functional.pad(wide, (0, -features % self.block)).unflatten(-1, (-1, self.block))
        return self._on_grid(blocks).flatten(-2)[..., :features].to(x.dtype)

    def _on_grid(self, x: Tensor) -> Tensor:
        # A tensor divisor: PyTorch multiplies by the reciprocal of a number on CUDA, which rounds differently.
        scale = x.abs().amax(-1, keepdim=True) / x.new_full((1,), float(self.spec.qmax))
        scale = torch.where(scale > 0, scale, 1.0)
        return torch.round(x / scale).clamp(self.spec.qmin, self.spec.qmax) * scale

    def extra_repr(self) -> str:
        """Grid in short form."""
        return f"{_describe(self.spec)} per " + ("token" if self.block is None else f"{self.block} values of a token")


#: Every module that puts values on a grid.
QUANTIZERS = (FakeQuantize, DynamicFakeQuantize)


def _describe(spec: QuantSpec) -> str:
    kind = f"{'int' if spec.signed else 'uint'}{spec.bits}[{spec.qmin}, {spec.qmax}]"
    return kind + ("" if spec.group_size is None else f" groups of {spec.group_size}")
