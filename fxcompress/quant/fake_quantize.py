"""FakeQuantize: the module that simulates a quantized tensor, and observes its range before."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from fxcompress.errors import CalibrationError
from fxcompress.ops import fake_quantize
from fxcompress.quant.observers import Observer
from fxcompress.quant.spec import QuantSpec, quant_params

__all__ = ["FakeQuantize"]


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
        scale: float32, shape [] or [channels].
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
        axis = -1 if spec.axis is None else spec.axis
        return cast(Tensor, fake_quantize(x, self.scale, self.zero_point, axis, spec.qmin, spec.qmax))

    def extra_repr(self) -> str:
        """Grid in short form: ``uint8[0, 255]`` or ``int8[-127, 127] per axis 0``."""
        spec = self.spec
        kind = f"{'int' if spec.signed else 'uint'}{spec.bits}[{spec.qmin}, {spec.qmax}]"
        return kind + ("" if spec.axis is None else f" per axis {spec.axis}")
