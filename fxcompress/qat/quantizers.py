"""Fake-quantizers that train: ranges observed while training, or scales learned by gradient (LSQ, LSQ+).

Each is a `FakeQuantize` and becomes a plain one, on the very same grid, by ``to_plain``.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from fxcompress.errors import PassError
from fxcompress.ops import fake_quantize
from fxcompress.qat.ranges import fitted_range, least_error_range
from fxcompress.qat.rounding import round_learned, round_straight_through
from fxcompress.quant.fake_quantize import FakeQuantize
from fxcompress.quant.observers import MseObserver
from fxcompress.quant.spec import SCALE_FLOOR, QuantSpec, quant_params, solve

__all__ = ["ActivationQuantizer", "LearnedQuantizer", "SharedScale", "TrainedQuantizer", "WeightQuantizer", "lsq_scale"]

#: Share of a new batch in the moving average of an activation's range.
MOMENTUM = 0.01


class TrainedQuantizer(FakeQuantize):
    """Base of the quantizers of a `QATProgram`.

    Attributes:
        observing: Its range follows the data.
        quantizing: It rounds; else values pass as they are.
        ready: It has a range.
    """

    def __init__(self, spec: QuantSpec, device: torch.device | str | None = None) -> None:
        super().__init__(spec, None, device)
        self.observing = True
        self.quantizing = True
        self.ready = False

    def grid(self, x: Tensor | None = None, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scale (float32) and zero point (int32) in eval mode.

        Args:
            x: What is quantized, for a grid that depends on it.
            factor: What ``x`` was multiplied by per channel, positive; a learned scale is multiplied by it too.

        Raises:
            PassError: there is no range yet.
        """
        raise NotImplementedError

    def to_plain(self, x: Tensor | None = None, factor: Tensor | None = None) -> FakeQuantize:
        """A frozen `FakeQuantize` on the same grid; arguments as for ``grid``."""
        plain = FakeQuantize(self.spec, device=self.scale.device)
        scale, zero_point = self.grid(x, factor)
        plain.scale, plain.zero_point = scale.detach().clone(), zero_point.detach().clone()
        return plain

    def get_extra_state(self) -> Tensor:
        """The switches, so that a checkpoint keeps them."""
        return torch.tensor([self.observing, self.quantizing, self.ready, *self._more_state()], dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Inverse of ``get_extra_state``."""
        values = [bool(v) for v in state.tolist()]
        self.observing, self.quantizing, self.ready = values[:3]
        self._take_state(values[3:])

    def _more_state(self) -> list[bool]:
        return []

    def _take_state(self, values: list[bool]) -> None:
        """Take what `_more_state` gave."""

    def _check_ready(self) -> None:
        if not self.ready:
            raise PassError(
                90,
                "a quantizer has seen no data yet: there is no range to quantize with",
                why="the program was prepared without calibration data and was not trained",
                fix="pass calibration=loader to prepare_qat, or train first",
            )

    def _round(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        spec = self.spec
        axis = -1 if spec.axis is None else spec.axis
        if torch.is_grad_enabled() and x.requires_grad:
            return round_straight_through(x, scale, zero_point, axis, spec.qmin, spec.qmax)
        return cast(Tensor, fake_quantize(x, scale, zero_point, axis, spec.qmin, spec.qmax))

    def extra_repr(self) -> str:
        """Grid in short form, and what is switched off."""
        off = [name for name, on in (("observer", self.observing), ("fake_quantize", self.quantizing)) if not on]
        return super().extra_repr() + (f" without {', '.join(off)}" if off else "")


def _range(x: Tensor, spec: QuantSpec, known: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """The range of 8 bits is that of the extremes; with fewer they would leave most values too few integers.

    ``known`` is the range of the step before, from which that of least squared error is followed.
    """
    if spec.bits < 8:
        return least_error_range(x, spec) if known is None else fitted_range(x, spec, *known)
    if spec.axis is None:
        return x.amin().float(), x.amax().float()  # aminmax copies what is not contiguous
    rest = [d for d in range(x.dim()) if d != spec.axis]
    return (x.amin(rest), x.amax(rest)) if rest else (x, x)


class WeightQuantizer(TrainedQuantizer):
    """Grid over the range of the weight as it is now, per channel or tensor (Jacob et al. 2018, section 3.1).

    With 8 bits that is the range of the extremes. With fewer it is that of least squared error, which each training step
    follows. Without observing, the grid of the last training step stays.

    Args:
        spec: The grid.
        weight: The weight it begins with, finite.
    """

    def __init__(self, spec: QuantSpec, weight: Tensor) -> None:
        super().__init__(spec, weight.device)
        self.set_range(*_range(weight.detach(), spec, None))
        self.ready = True

    def forward(self, x: Tensor, factor: Tensor | None = None) -> Tensor:
        """The weight on its grid."""
        if not self.quantizing:
            return x
        if self.training and self.observing:
            self._follow(x.detach())
        return self._round(x, *self.grid(x))

    def grid(self, x: Tensor | None = None, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """With 8 bits and observing, the grid of the weight ``x``; else that of the last training step."""
        if self.spec.bits < 8 or not self.observing or x is None:
            return self.scale, self.zero_point
        scale, zero_point = solve(*_range(x.detach(), self.spec, None), self.spec)
        return scale.to(torch.float32), zero_point.to(torch.int32)

    def _follow(self, weight: Tensor) -> None:
        low, high = ((end - self.zero_point) * self.scale for end in (self.spec.qmin, self.spec.qmax))
        scale, zero_point = solve(*_range(weight, self.spec, (low, high)), self.spec)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)


class SharedScale(nn.Module):
    """The scales of the quantizers that meet in an add: all take the largest.

    Attributes:
        scales: What each would take alone, float32 [quantizers].
    """

    scales: Tensor

    def __init__(self, count: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.register_buffer("scales", torch.zeros(count, device=device))


class ActivationQuantizer(TrainedQuantizer):
    """Grid over a moving average of the range of each training batch (Jacob et al. 2018, section 3.1).

    With 8 bits that is the range of the extremes, with fewer that of least squared error. The first batch sets the
    average, unless calibration did; ranges that are not finite are left out.

    Attributes:
        low: Lower end of the range, float32 [].
        high: Upper end.
        shared: Keeps the scales of those that meet it in an add; None when there are none.
        place: Its own place in ``shared``.
    """

    low: Tensor
    high: Tensor

    def __init__(self, spec: QuantSpec, device: torch.device | str | None = None) -> None:
        super().__init__(spec, device)
        self.register_buffer("low", torch.zeros((), device=device))
        self.register_buffer("high", torch.zeros((), device=device))
        self.shared: SharedScale | None = None
        self.place = 0

    @torch.no_grad()
    def begin(self, low: Tensor, high: Tensor) -> None:
        """Take this range (two scalars)."""
        self.low.copy_(low)
        self.high.copy_(high)
        self.ready = True
        self._settle()

    def share(self, shared: SharedScale, place: int) -> None:
        """Take the largest scale of ``shared`` from now on."""
        self.shared, self.place = shared, place
        if self.ready:
            self._settle()

    def forward(self, x: Tensor, factor: Tensor | None = None) -> Tensor:
        """Observes ``x`` in training mode; returns it on the grid."""
        if self.training and self.observing and x.numel():
            self._observe(x.detach())
        if not self.quantizing:
            return x
        return self._round(x, *self.grid())

    def grid(self, x: Tensor | None = None, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The range's own grid, or the wider one with the shared scale that begins where it does."""
        self._check_ready()
        if self.shared is None:
            return self.scale, self.zero_point
        scale, spec, zero_point = self.shared.scales.max(), self.spec, self.zero_point
        if not spec.symmetric:
            low = (spec.qmin - zero_point.double()) * self.scale.double()
            zero_point = (spec.qmin - low / scale.double()).round().clamp(spec.qmin, spec.qmax).to(torch.int32)
        return scale, zero_point

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        low, high = _range(x, self.spec, (self.low, self.high) if self.ready else None)
        finite = torch.isfinite(low) & torch.isfinite(high)
        if not self.ready:
            if bool(finite):
                self.begin(low, high)
            return
        self.low.lerp_(torch.where(finite, low, self.low), MOMENTUM)
        self.high.lerp_(torch.where(finite, high, self.high), MOMENTUM)
        self._settle()

    @torch.no_grad()
    def _settle(self) -> None:
        scale, zero_point = solve(self.low, self.high, self.spec)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        if self.shared is not None:
            self.shared.scales[self.place] = self.scale


def lsq_scale(x: Tensor, spec: QuantSpec) -> Tensor:
    """LSQ's first scale, ``2 mean|x| / sqrt(qmax)`` (Esser et al. 2020, section 2.1), per channel or tensor.

    A channel of zeros takes the mean of the others, a tensor of zeros takes 1.

    Returns:
        float32, [] or [channels].
    """
    rest = [d for d in range(x.dim()) if d != spec.axis]
    scale = x.detach().abs().float().mean(rest) * (2.0 / math.sqrt(spec.qmax))
    scale = torch.where(scale > 0, scale, scale.mean())
    return torch.where(scale > 0, scale, 1.0)


class LearnedQuantizer(TrainedQuantizer):
    """Grid with a scale, and for asymmetric grids an offset, learned by gradient (LSQ; LSQ+).

    The scale in use is ``|scale|``, at least 3e-36, so it is positive whatever the optimizer does, and has a gradient
    everywhere. The offset is the real value of integer 0: ``zero_point = clamp(round(-offset / scale), qmin, qmax)``.
    Gradients of both are multiplied by ``1 / sqrt(n Q_P)``, with ``n`` the number of weights that share the scale, or the
    features of a sample, and ``Q_P`` the largest integer, counted from the smallest one where the grid is asymmetric
    (Esser et al. 2020, section 2.2). Where the data has no negative values, the grid goes on beginning at 0: the zero point
    stays, and the offset gets the gradient 0.
    ``observing`` only matters until the scale is set. Without a first scale the first batch sets it, in a process group
    that of the first process, so that all processes have to see a first batch.

    Args:
        spec: The grid.
        scale: The first scale, [] or [channels]; None: the first batch sets it.
        device: Where the parameters are, without ``scale``.
        batched: What is quantized has samples along its first dimension: an activation, no weight.

    Attributes:
        scale: Parameter, float32 [] or [channels].
        offset: Parameter, float32 []; None for a symmetric grid.
    """

    offset: nn.Parameter | None

    def __init__(
        self,
        spec: QuantSpec,
        scale: Tensor | None = None,
        device: torch.device | str | None = None,
        *,
        batched: bool = False,
    ) -> None:
        super().__init__(spec, device if scale is None else scale.device)
        self.batched = batched
        first = torch.zeros((), device=device) if scale is None else scale.detach().clone()
        del self._buffers["scale"]
        self.scale = nn.Parameter(first)
        self.zero_point = torch.zeros_like(first, dtype=torch.int32)
        self.ready = scale is not None
        self.positive_data = False
        self.register_parameter("offset", None)
        if not spec.symmetric:
            self.offset = nn.Parameter(torch.zeros_like(first))

    @torch.no_grad()
    def begin(self, scale: Tensor, zero_point: Tensor, positive: bool) -> None:
        """Take this grid (shape []); ``positive``: the data has no negative values.

        Where the parameter is shared with a quantizer that has begun, the larger scale is taken.
        """
        low = (self.spec.qmin - zero_point) * scale
        self.scale.copy_(torch.maximum(self.scale, scale))
        self.zero_point.copy_(zero_point)
        if self.offset is not None:
            self.positive_data = positive
            self.offset.copy_(low - self.spec.qmin * self.scale)
        self.ready = True

    def forward(self, x: Tensor, factor: Tensor | None = None) -> Tensor:
        """``x`` on the grid.

        Args:
            x: Float tensor.
            factor: The scale is multiplied by this, positive, in its shape: what ``x`` was multiplied by per channel.
        """
        if not self.ready and self.training:
            self._begin_with(x.detach())
        if not self.quantizing:
            return x
        scale, zero_point = self.grid(x, factor)
        spec = self.spec
        axis = -1 if spec.axis is None else spec.axis
        if not torch.is_grad_enabled():
            return cast(Tensor, fake_quantize(x, scale, zero_point, axis, spec.qmin, spec.qmax))
        moves = self.offset is not None and not self.positive_data
        limits = (spec.qmin, spec.qmax)
        return round_learned(x, scale, self.offset, zero_point, axis, limits, self._share(x), moves=moves)

    def _share(self, x: Tensor) -> float:
        """The factor of the gradients."""
        samples = x.shape[0] if self.batched and x.dim() else 1
        count = max(x.numel() // (self.scale.numel() * max(samples, 1)), 1)
        return 1.0 / math.sqrt(count * (self.spec.qmax if self.spec.symmetric else self.spec.steps))

    def grid(self, x: Tensor | None = None, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The positive scale, with its gradient, and the zero point."""
        self._check_ready()
        positive = torch.where(self.scale < 0, -self.scale, self.scale)
        positive = positive + (SCALE_FLOOR - positive).clamp_min(0).detach()
        scale = positive if factor is None else positive * factor.to(positive.dtype)
        if self.offset is None or self.positive_data:
            return scale, self.zero_point
        zero_point = (-self.offset.detach() / scale.detach()).round().clamp(self.spec.qmin, self.spec.qmax)
        return scale, zero_point.to(torch.int32)

    @torch.no_grad()
    def _begin_with(self, x: Tensor) -> None:
        """The first batch sets the grid: LSQ's formula, or the least squared error for asymmetric grids (LSQ+ eq. 9)."""
        usable = bool(x.numel()) and bool(torch.isfinite(x).all())
        scale, zero_point, positive = self._first_grid(x) if usable else (0.0, 0.0, 0.0)
        usable_there, *grid = _from_first_process([float(usable), scale, zero_point, positive], x.device)
        if usable_there:
            scale, zero_point, positive = grid
            self.begin(self.scale.new_tensor(scale), self.zero_point.new_tensor(int(zero_point)), bool(positive))

    def _first_grid(self, x: Tensor) -> tuple[float, float, float]:
        """Scale, zero point, and whether there is no negative value."""
        if self.spec.symmetric:
            low, high = x.amin().float(), x.amax().float()
            _, zero_point = quant_params(low, high, self.spec)
            scale = lsq_scale(x, self.spec)
        else:
            observer = MseObserver()
            observer.update(x)
            low, high = observer.range(self.spec)
            scale, zero_point = quant_params(low, high, self.spec)
        return float(scale), float(zero_point), float(low >= 0)

    def _more_state(self) -> list[bool]:
        return [self.positive_data]

    def _take_state(self, values: list[bool]) -> None:
        (self.positive_data,) = values

    def extra_repr(self) -> str:
        """Grid in short form."""
        return f"{super().extra_repr()} learned"


def _from_first_process(values: list[float], device: torch.device) -> list[float]:
    """In a parallel run the values of the first process, whose data sets the scale for all."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    shared = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.broadcast(shared, 0)
    return [float(v) for v in shared]
