"""Quantization of activations to 8 bits, alone and as the last step of a normalization or activation.

All divide and round in float32, ``round_half_even(x / scale)``, bit for bit as PyTorch does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.errors import UsageError
from fxcompress.kernels.epilogue import ACTIVATIONS, check_activation
from fxcompress.kernels.int8_common import FLOATS, MAX_K, check_tensor
from fxcompress.ops import KernelOp, register

__all__ = [
    "activation_quantize",
    "check_range",
    "check_rows",
    "layer_norm_quantize",
    "quantize_per_tensor",
    "quantize_per_token",
    "rms_norm_quantize",
    "silu_mul_quantize",
]

#: Of the output, by its dtype: a sum in another order may move a value across a rounding boundary, by one step.
_TOLERANCE: Final = {torch.int8: 5e-3, torch.float32: 1e-3}


def check_rows(x: Tensor, **others: Tensor | None) -> None:
    """Check ``x`` [..., K] and what must fit it: ``weight`` and ``bias`` [K], anything else of its own shape.

    Raises:
        UsageError: dtypes, shapes or devices do not fit, or K is 0 or over 65536.
    """
    check_tensor("x", x, FLOATS, x.shape, x.device)
    k = x.shape[-1] if x.dim() else 0
    if not 1 <= k <= MAX_K:
        raise UsageError(426, f"rows of {k} values cannot be quantized", fix=f"rows hold 1 to {MAX_K} values")
    for name, other in others.items():
        own = name not in ("weight", "bias")
        check_tensor(name, other, (x.dtype,) if own else FLOATS, x.shape if own else (k,), x.device)


def check_range(qmin: int, qmax: int) -> None:
    """Raise UsageError unless ``-128 <= qmin < qmax <= 127``."""
    if not -128 <= qmin < qmax <= 127:
        raise UsageError(427, f"{qmin} to {qmax} is no range of 8-bit integers", fix="stay within -128 to 127")


def _quantize(y: Tensor) -> tuple[Tensor, Tensor]:
    y = y.float()
    # A tensor divisor: PyTorch multiplies by the reciprocal of a number on CUDA, which rounds differently.
    scale = y.abs().amax(-1, keepdim=True) / y.new_full((1,), 127.0)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return torch.round(y / scale).clamp(-127, 127).to(torch.int8).contiguous(), scale.contiguous()


def _per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize each row by its own largest magnitude, symmetrically.

    Args:
        x: Finite float [..., K], K at most 65536.

    Returns:
        int8 [..., K], -127 to 127, and float32 scales [..., 1]: the largest magnitude / 127, 1 for a row of zeros.

    Raises:
        UsageError: the dtype is no float, or K does not fit (FXC-USAGE-420, 426).
    """
    check_rows(x)
    return _quantize(x)


def _per_tensor(x: Tensor, scale: Tensor, zero: Tensor | None, qmin: int, qmax: int) -> Tensor:
    """``clamp(round(x / scale) + zero, qmin, qmax)`` with one scale that is known beforehand.

    Args:
        x: Float, any shape and memory format, which the result keeps.
        scale: float32 [1].
        zero: int32 [1]; None for 0.
        qmin: At least -128.
        qmax: At most 127.

    Returns:
        int8, shape of ``x``.

    Raises:
        UsageError: dtypes, shapes or the range do not fit (FXC-USAGE-420 to 422, 427).
    """
    check_tensor("x", x, FLOATS, x.shape, x.device)
    check_tensor("scale", scale, (torch.float32,), (1,), x.device)
    check_tensor("zero", zero, (torch.int32,), (1,), x.device)
    check_range(qmin, qmax)
    q = torch.round(x.float() / scale)
    return torch.empty_like(x, dtype=torch.int8).copy_((q if zero is None else q + zero).clamp(qmin, qmax))


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float, round_normed: bool = False) -> tuple[Tensor, Tensor]:
    """RMSNorm over the last axis, then `quantize_per_token`.

    ``x / sqrt(mean(x ** 2) + eps) * weight`` in float32, rounded once, to the dtype of ``x``, before it is quantized
    (Zhang and Sennrich 2019, equation 4).

    Args:
        x: Float [..., K].
        weight: Float [K]; None for ones.
        eps: Added to the mean square.
        round_normed: Round to the dtype of ``x`` before the product with ``weight`` too, as Llama's own code does.

    Returns:
        int8 [..., K] and float32 scales [..., 1].

    Raises:
        UsageError: dtypes or shapes do not fit (FXC-USAGE-420 to 422, 426).
    """
    check_rows(x, weight=weight)
    wide = x.float()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if round_normed:
        y = y.to(x.dtype).float()
    return _quantize((y if weight is None else y * weight.float()).to(x.dtype))


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """LayerNorm over the last axis, then `quantize_per_token`.

    ``(x - mean) / sqrt(variance + eps) * weight + bias`` in float32, rounded once, to the dtype of ``x``, before it is
    quantized (Ba et al. 2016, equation 4).

    Args:
        x: Float [..., K].
        weight: Float [K]; None for ones.
        bias: Float [K]; None for zeros.
        eps: Added to the variance.

    Returns:
        int8 [..., K] and float32 scales [..., 1].

    Raises:
        UsageError: dtypes or shapes do not fit (FXC-USAGE-420 to 422, 426).
    """
    check_rows(x, weight=weight, bias=bias)
    wide_weight, wide_bias = (value if value is None else value.float() for value in (weight, bias))
    return _quantize(F.layer_norm(x.float(), (x.shape[-1],), wide_weight, wide_bias, eps).to(x.dtype))


def _activation(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """An activation in float32, rounded to the dtype of ``x``, then `quantize_per_token`.

    Args:
        x: Float [..., K].
        activation: Name in ``fxcompress.kernels.epilogue.ACTIVATIONS``.

    Returns:
        int8 [..., K] and float32 scales [..., 1].

    Raises:
        UsageError: the activation is unknown, or ``x`` does not fit (FXC-USAGE-402, 420, 426).
    """
    check_rows(x)
    check_activation(activation)
    return _quantize(ACTIVATIONS[activation](x.float()).to(x.dtype))


def _silu_mul(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """``silu(gate) * up``, then `quantize_per_token`; SiLU and product are each rounded to the dtype of ``gate``.

    Args:
        gate: Float [..., K].
        up: Shape and dtype of ``gate``.

    Returns:
        int8 [..., K] and float32 scales [..., 1].

    Raises:
        UsageError: dtypes or shapes do not fit (FXC-USAGE-420 to 422, 426).
    """
    check_rows(gate, up=up)
    return _quantize(F.silu(gate.float()).to(gate.dtype) * up)


def _fake_rows(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


# The fakes have the arguments of their operators, defaults and all.
def _fake_rms(x: Tensor, weight: Tensor | None, eps: float, round_normed: bool = False) -> tuple[Tensor, Tensor]:
    return _fake_rows(x)


def _fake_layer(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return _fake_rows(x)


def _fake_tensor(x: Tensor, scale: Tensor, zero: Tensor | None, qmin: int, qmax: int) -> Tensor:
    return torch.empty_like(x, dtype=torch.int8)


def _values(device: str, *shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


def _tensor_samples(device: str) -> Iterator[tuple[Any, ...]]:
    scale = torch.tensor([0.02], device=device)
    yield _values(device, 5, 33), scale, None, -128, 127
    image = _values(device, 2, 3, 5, 7, dtype=torch.float32).to(memory_format=torch.channels_last)
    yield image, scale, torch.tensor([-7], dtype=torch.int32, device=device), -128, 127
    yield _values(device, 33, 5).T, scale, None, -127, 127
    yield _values(device, 0, 5), scale, None, 0, 127


def _row_samples(device: str) -> Iterator[Tensor]:
    yield _values(device, 5, 96)
    yield _values(device, 2, 33, 3, dtype=torch.float32).transpose(1, 2)
    yield torch.zeros(2, 8, device=device)
    yield _values(device, 0, 16)


def _register(name: str, reference: Any, fake: Any, samples: Any) -> Any:
    launcher = f"fxcompress.kernels.quantize_triton:{name}"
    return register(KernelOp(name, reference, fake, launcher, samples=samples, rounds=True, tolerance=_TOLERANCE))


quantize_per_token = _register(
    "quantize_per_token", _per_token, lambda x: _fake_rows(x), lambda device: ((x,) for x in _row_samples(device))
)
quantize_per_tensor = _register("quantize_per_tensor", _per_tensor, _fake_tensor, _tensor_samples)
rms_norm_quantize = _register(
    "rms_norm_quantize", _rms_norm, _fake_rms, lambda d: ((x, _values(d, x.shape[-1]), 1e-6) for x in _row_samples(d))
)
layer_norm_quantize = _register(
    "layer_norm_quantize",
    _layer_norm,
    _fake_layer,
    lambda d: ((x, _values(d, x.shape[-1]), None, 1e-5) for x in _row_samples(d)),
)
activation_quantize = _register(
    "activation_quantize",
    _activation,
    lambda x, activation: _fake_rows(x),
    lambda d: ((x, name) for x in _row_samples(d) for name in ("relu", "gelu")),
)
silu_mul_quantize = _register(
    "silu_mul_quantize",
    _silu_mul,
    lambda gate, up: _fake_rows(gate),
    lambda d: ((x, x.flip(0)) for x in _row_samples(d)),
)
