"""Custom operators, registered in one place under ``torch.ops.fxcompress``."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

__all__ = ["KERNEL_MODULES", "KernelOp", "fake_quantize", "kernel_op", "kernel_ops", "register"]

_NAMESPACE = "fxcompress"
_LIBRARY = torch.library.Library(_NAMESPACE, "FRAGMENT")
_KERNELS: dict[str, KernelOp] = {}

#: Modules that register kernels; `kernel_ops` imports them all.
KERNEL_MODULES: tuple[str, ...] = (
    "fxcompress.kernels.w4a16",
    "fxcompress.kernels.w8a16",
    "fxcompress.kernels.w8a8",
    "fxcompress.kernels.w4a8",
    "fxcompress.kernels.sp24",
    "fxcompress.kernels.sp24_w8a8",
    "fxcompress.kernels.sp24_w4",
    "fxcompress.kernels.quantize",
    "fxcompress.kernels.conv2d_w8a8",
    "fxcompress.kernels.paged_attention",
)


@dataclass(frozen=True)
class KernelOp:
    """One operator with its implementations.

    Attributes:
        name: ``w4a16_linear`` becomes ``torch.ops.fxcompress.w4a16_linear``.
        reference: Plain PyTorch; its annotations are the schema. It is the oracle and what runs on a processor.
        fake: Shapes and dtypes only, same arguments.
        launcher: ``module:function`` that runs the kernel on a CUDA device, same arguments; imported at the first call.
        autocast: Arguments that ``torch.autocast`` casts; the others keep their dtypes.
        mutates: Arguments that it writes into.
        dtypes: Of the first argument, that the kernel takes; with others the reference runs on every device. Empty: all.
        samples: Small argument tuples (odd sizes, non-contiguous, empty) on a device, for `testing.check_kernel`.
        rounds: Rounding to the inputs' dtypes is part of what it computes, so that float64 would be something else.
        tolerance: Relative error ``|a - b| / |b|`` against float64 that the output may have, by its dtype.
    """

    name: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    launcher: str
    autocast: tuple[str, ...] = ()
    mutates: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    samples: Callable[[str], Iterable[tuple[Any, ...]]] = lambda device: ()
    rounds: bool = False
    tolerance: Mapping[torch.dtype, float] = field(
        default_factory=lambda: {torch.float16: 5e-4, torch.bfloat16: 4e-3, torch.float32: 1e-5}
    )

    @property
    def overload(self) -> Any:
        """``torch.ops.fxcompress.<name>.default``."""
        return getattr(torch.ops.fxcompress, self.name).default

    def launch(self, *args: Any, **kwargs: Any) -> Any:
        """Run the kernel; the reference for other dtypes, and, with one warning, where Triton is not installed."""
        first = args[0] if args else next(iter(kwargs.values()))
        known = not self.dtypes or first.dtype in self.dtypes
        launcher = _launcher(self.launcher) if known else None
        if launcher is None:
            return self.reference(*args, **kwargs)
        return launcher(*args, **kwargs)


@cache
def _launcher(path: str) -> Callable[..., Any] | None:
    """The function ``module:function``; None, with a warning, without Triton."""
    if importlib.util.find_spec("triton") is None:
        warnings.warn(
            "Triton is not installed: fxcompress operators run their slow references on this device; pip install triton",
            stacklevel=3,
        )
        return None
    module, _, name = path.partition(":")
    return cast("Callable[..., Any]", getattr(importlib.import_module(module), name))


def register(op: KernelOp) -> Any:
    """Make ``op`` callable as ``torch.ops.fxcompress.<name>`` on every device; returns the custom operator.

    The operator takes no gradients. Under ``torch.autocast`` the arguments named in ``op.autocast`` are cast.
    """
    made = torch.library.custom_op(f"{_NAMESPACE}::{op.name}", op.reference, mutates_args=op.mutates)
    made.register_fake(op.fake)
    made.register_kernel("cuda")(op.launch)
    if op.autocast:
        for device, key in (("cuda", "AutocastCUDA"), ("cpu", "AutocastCPU")):
            _LIBRARY.impl(op.name, _autocast(op, device, key), key)
    _KERNELS[op.name] = op
    return made


def _autocast(op: KernelOp, device: str, key: str) -> Callable[..., Any]:
    names = list(inspect.signature(op.reference).parameters)
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast_one(name: str, value: Any) -> Any:
        castable = name in op.autocast and isinstance(value, Tensor) and value.is_floating_point()
        return value.to(torch.get_autocast_dtype(device)) if castable else value

    def rule(*args: Any, **kwargs: Any) -> Any:
        given = [cast_one(n, v) for n, v in zip(names, args, strict=False)]
        named = {n: cast_one(n, v) for n, v in kwargs.items()}
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return op.overload(*given, **named)

    return rule


def kernel_ops() -> dict[str, KernelOp]:
    """Every kernel of this library by name."""
    for module in KERNEL_MODULES:
        importlib.import_module(module)
    return dict(_KERNELS)


def kernel_op(name: str) -> KernelOp:
    """The kernel of that name."""
    return kernel_ops()[name]


def _wide(x: Tensor) -> Tensor:
    """``x`` in a dtype in which 8-bit grids can be laid on it: 16-bit floats have too few digits."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _broadcast(values: Tensor, x: Tensor, axis: int) -> Tensor:
    """Per-channel ``values`` [C] in the dtype of ``x``, shaped to broadcast along ``axis``."""
    typed = values if values.dtype == x.dtype else values.to(x.dtype)
    return typed if axis < 0 else typed.reshape([-1 if i == axis else 1 for i in range(x.dim())])


@torch.library.custom_op("fxcompress::fake_quantize", mutates_args=())
def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, qmin: int, qmax: int) -> Tensor:
    """Round ``x`` to the integer grid and back.

    ``(clamp(round(x / scale) + zero_point, qmin, qmax) - zero_point) * scale``

    Rounding is half to even, as in ONNX ``QuantizeLinear``; 16-bit floats are computed with in float32. The gradient
    is the straight-through estimator: 1 inside the representable range, 0 outside (Bengio et al. 2013; Jacob et al.
    2018).

    Args:
        x: Float tensor of any shape.
        scale: float32, shape [] or [C].
        zero_point: int32, same shape as ``scale``.
        axis: Dimension of ``x`` that ``scale`` runs along; -1 for one scale.
        qmin: Smallest integer.
        qmax: Largest integer.

    Returns:
        A tensor like ``x`` on the grid.
    """
    wide = _wide(x)
    s, z = _broadcast(scale, wide, axis), _broadcast(zero_point, wide, axis)
    q = torch.div(wide, s).round_().add_(z).clamp_(qmin, qmax)
    return q.sub_(z).mul_(s).to(x.dtype)


@fake_quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, qmin: int, qmax: int) -> Tensor:
    return torch.empty_like(x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, zero_point, axis, qmin, qmax = inputs
    x = _wide(x)
    s, z = _broadcast(scale, x, axis), _broadcast(zero_point, x, axis)
    q = torch.round(x / s) + z
    ctx.save_for_backward((q >= qmin) & (q <= qmax))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (inside,) = ctx.saved_tensors
    return cast(Tensor, grad * inside), None, None, None, None, None


fake_quantize.register_autograd(_backward, setup_context=_setup)
