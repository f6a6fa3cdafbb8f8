"""AdaRound: whether each weight is rounded up or down is learned from the error of the layer's output.

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", 2020. A weight ``w`` becomes
``s clip(floor(w / s) + h(V) + z, qmin, qmax) - s z`` with the rectified sigmoid ``h`` (eq. 22 and 23), and ``V`` makes the
squared error of the output plus ``lambda * sum(1 - |2 h(V) - 1|^beta)`` least (eq. 21 and 24), which drives every ``h``
to 0 or 1 as ``beta`` falls.

The output of a layer is linear in its weight, so the error needs no data once the second moments of its inputs are known
(the paper's eq. 20): for inputs ``x`` of the float layer and ``y`` of the quantized one it is, up to a constant,
``sum_rows q H q^T - 2 G q^T`` with ``H = Y^T Y`` and ``G = W X^T Y``. A step then costs one product with ``H``, whatever the
number of samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fxcompress.quant.fake_quantize import FakeQuantize, grouped, ungrouped

__all__ = [
    "GAMMA",
    "ZETA",
    "Annealing",
    "RowsOnGrid",
    "learn_rounding",
    "rectified_sigmoid",
    "regularizer",
    "unrectified",
]

#: Stretch of the sigmoid (paper, eq. 23).
ZETA, GAMMA = 1.1, -0.1
#: Up to so many features every choice of up and down is tried.
_ALL = 9
#: So many values are tried as the first of a pair.
_FIRSTS = 4


def rectified_sigmoid(v: Tensor) -> Tensor:
    """``h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1)`` (eq. 23)."""
    return (torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)


def unrectified(h: Tensor) -> Tensor:
    """The ``V`` with ``rectified_sigmoid(V) = h`` for ``h`` in [0, 1]."""
    return -torch.log((ZETA - GAMMA) / (h - GAMMA) - 1.0)


def regularizer(h: Tensor, beta: float) -> Tensor:
    """``sum(1 - |2 h - 1|^beta)`` (eq. 24): 0 when every ``h`` is 0 or 1."""
    return (1.0 - (2.0 * h - 1.0).abs().pow(beta)).sum()


@dataclass(frozen=True)
class Annealing:
    """How ``V`` is learned.

    Attributes:
        iterations: Steps of Adam.
        learning_rate: Of Adam.
        strength: ``lambda``, the weight of the regularizer, for an error in steps of the grid and inputs of mean square 1.
        warm_start: Share of the steps without it.
        beta: First and last exponent; it falls as a cosine.
    """

    iterations: int = 300
    learning_rate: float = 0.03
    strength: float = 0.1
    warm_start: float = 0.2
    beta: tuple[float, float] = (20.0, 2.0)

    def beta_at(self, step: int) -> float | None:
        """The exponent at a step; None while there is no regularizer."""
        begin = self.warm_start * self.iterations
        if step < begin:
            return None
        first, last = self.beta
        done = (step - begin) / max(1.0, self.iterations - begin)
        return last + 0.5 * (first - last) * (1.0 + math.cos(done * math.pi))


@dataclass
class RowsOnGrid:
    """A weight in steps of its grid: what is between the two integers beside each value.

    Attributes:
        scale: Step of every value, in the shape of the weight.
        low: Integers (as float) below the values, the zero point taken off.
        fraction: Values minus ``low``, in [0, 1]; outside where the grid ends.
        least: Smallest integer minus the zero point, per value.
        most: Largest.
    """

    scale: Tensor
    low: Tensor
    fraction: Tensor
    least: Tensor
    most: Tensor

    @classmethod
    def of(cls, weight: Tensor, quantizer: FakeQuantize) -> RowsOnGrid:
        """The grid of ``quantizer`` under ``weight``, all in float32."""
        scale, zero = (_spread(t.float(), weight, quantizer) for t in (quantizer.scale, quantizer.zero_point))
        steps = weight.detach().float() / scale
        low = steps.floor()
        return cls(scale, low, steps - low, quantizer.spec.qmin - zero, quantizer.spec.qmax - zero)

    def mapped(self, function: object) -> RowsOnGrid:
        """Every tensor in another layout."""
        assert callable(function)
        return RowsOnGrid(*(function(t) for t in (self.scale, self.low, self.fraction, self.least, self.most)))

    def nearest(self) -> Tensor:
        """0 or 1 for each value: what rounding to the nearest does (ties to even)."""
        return (self.low + self.fraction).round() - self.low

    def steps(self, up: Tensor) -> Tensor:
        """Integers minus the zero point for ``up`` in [0, 1]."""
        return torch.minimum(torch.maximum(self.low + up, self.least), self.most)

    def values(self, up: Tensor) -> Tensor:
        """Weights for ``up`` in [0, 1] (eq. 22)."""
        return self.steps(up) * self.scale


def _spread(values: Tensor, weight: Tensor, quantizer: FakeQuantize) -> Tensor:
    """Scale or zero point for each element of ``weight``."""
    spec = quantizer.spec
    if spec.group_size is not None:
        rows = grouped(weight, spec)
        return ungrouped(values.flatten()[:, None].expand_as(rows), weight, spec)
    if spec.axis is None or not values.dim():
        return values.expand_as(weight)
    return values.reshape([-1 if d == spec.axis else 1 for d in range(weight.dim())]).expand_as(weight)


def learn_rounding(grid: RowsOnGrid, second: Tensor, cross: Tensor, how: Annealing) -> Tensor:
    """Learn ``up`` for the rows of a layer, never worse than rounding to the nearest in ``q H q^T - 2 G q^T``.

    Args:
        grid: Of the rows [groups, rows, features].
        second: ``H`` [groups, features, features] of the quantized layer's inputs, float64.
        cross: ``G`` [groups, rows, features], rows of the float weight times ``X^T Y``, float64.
        how: The schedule.

    Returns:
        0 or 1 for each value, float32 [groups, rows, features].
    """
    # In steps of the grid, and for inputs of mean square 1: one strength of the regularizer suits every layer.
    unit = second.diagonal(dim1=1, dim2=2).mean().clamp(min=1e-30)
    step = grid.scale.double().square().mean(2, keepdim=True).sqrt().clamp(min=1e-30)
    h, g = (second / unit).float(), (cross / unit / step).float()
    relative = (grid.scale / step).float()
    if grid.low.shape[2] <= _ALL:
        return _best_of_all(grid, second, cross)
    up, nearest = _descend(grid, relative, h, g, how), grid.nearest()
    found = [_polished(grid, relative, h, g, start) for start in (up, nearest)]
    errors = [_errors(grid, second, cross, rows) for rows in (*found, nearest)]
    best = torch.stack(errors).argmin(0)  # [groups, rows]
    choices = torch.stack([*found, nearest])
    return choices.gather(0, best[None, :, :, None].expand(1, *choices.shape[1:]))[0]


def _best_of_all(grid: RowsOnGrid, second: Tensor, cross: Tensor) -> Tensor:
    """Of few features (a depthwise convolution of 3 x 3) every choice is tried."""
    features = grid.low.shape[2]
    best, least = grid.nearest(), _errors(grid, second, cross, grid.nearest())
    for number in range(1 << features):
        up = torch.tensor([float(number >> i & 1) for i in range(features)], device=best.device).expand_as(best)
        errors = _errors(grid, second, cross, up)
        better = errors < least
        least = torch.where(better, errors, least)
        best = torch.where(better.unsqueeze(2), up, best)
    return best


def _descend(grid: RowsOnGrid, relative: Tensor, h: Tensor, g: Tensor, how: Annealing) -> Tensor:
    """Adam on ``V``; the gradient of the quadratic error is written down, that of ``h`` left to autograd."""
    v = unrectified(grid.fraction.clamp(0.0, 1.0)).clone().requires_grad_(True)
    adam = torch.optim.Adam([v], how.learning_rate)
    for number in range(how.iterations):
        adam.zero_grad()
        with torch.enable_grad():
            soft = rectified_sigmoid(v)
            q = grid.steps(soft) * relative
            beta = how.beta_at(number)
            penalty = 0.0 if beta is None else how.strength * regularizer(soft, beta)
            slope = 2.0 * (torch.bmm(q.detach(), h) - g)
            ((q * slope).sum() + penalty).backward()
        adam.step()
    return (rectified_sigmoid(v.detach()) >= 0.5).float()


def _polished(grid: RowsOnGrid, relative: Tensor, h: Tensor, g: Tensor, up: Tensor, rounds: int = 48) -> Tensor:
    """Turn the value of each row over, or the pair, that lowers its error most, as long as that lowers it."""
    up = up.clone()
    diagonal = h.diagonal(dim1=1, dim2=2).unsqueeze(1)
    q = grid.steps(up) * relative
    slope = torch.bmm(q, h) - g
    for _ in range(rounds):
        change = grid.steps(1.0 - up) * relative - q
        gain = change * (2.0 * slope + change * diagonal)
        least, one, other = _best_pair(gain, change, h)
        turned = least < -1e-6
        if not bool(turned.any()):
            break
        for at, active in ((one, turned), (other, turned & (other != one))):
            delta = torch.where(active, change.gather(2, at), 0.0)
            up.scatter_(2, at, torch.where(active, 1.0 - up.gather(2, at), up.gather(2, at)))
            q.scatter_add_(2, at, delta)
            slope += delta * _columns(h, at[..., 0])
    return up


def _best_pair(gain: Tensor, change: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Least gain of turning one value, or two, and which; twice the same index where one is best. All [groups, rows, 1].

    The first of a pair is one of the few that alone cost least.
    """
    count = min(_FIRSTS, gain.shape[2])
    firsts = gain.topk(count, dim=2, largest=False).indices
    least, one = gain.min(2, keepdim=True)
    other = one
    for number in range(count):
        first = firsts[:, :, number : number + 1]
        both = gain + gain.gather(2, first) + 2.0 * change * change.gather(2, first) * _columns(h, first[..., 0])
        both.scatter_(2, first, math.inf)
        found, second = both.min(2, keepdim=True)
        better = found < least
        least, one, other = (torch.where(better, a, b) for a, b in ((found, least), (first, one), (second, other)))
    return least, one, other


def _columns(h: Tensor, at: Tensor) -> Tensor:
    """Rows of the symmetric ``h`` [groups, features, features] at indices [groups, rows]: [groups, rows, features]."""
    return h.gather(1, at.unsqueeze(2).expand(-1, -1, h.shape[2]))


def _errors(grid: RowsOnGrid, second: Tensor, cross: Tensor, up: Tensor) -> Tensor:
    """``q H q^T - 2 G q^T`` of every row, float64 [groups, rows]."""
    q = grid.values(up).double()
    return ((torch.bmm(q, second) - 2.0 * cross) * q).sum(2)
