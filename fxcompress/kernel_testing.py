"""check_kernel: the promises of an operator, for the kernels of this library and for users' own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxcompress.ops import KernelOp

__all__ = ["check_kernel", "relative_error"]


def relative_error(a: Tensor, b: Tensor) -> float:
    """``|a - b| / |b|`` in the L2 norm and float64; 0 for two empty or two zero tensors."""
    x, y = a.detach().double().flatten(), b.detach().double().flatten()
    difference, norm = float((x - y).norm()), float(y.norm())
    return 0.0 if difference == 0 else difference / norm if norm else float("inf")


def check_kernel(op: KernelOp, samples: Iterable[tuple[Any, ...]] | None = None, device: str = "cpu") -> int:
    """Hold an operator to its reference and to PyTorch's rules for operators.

    For every sample: the operator agrees with the reference evaluated in float64 within ``op.tolerance``, integers bit
    for bit unless that names their dtype; its fake tells shape, dtype and device; inputs are left untouched; the result
    does not depend on what the memory of the outputs held before. The first sample also goes through
    ``torch.library.opcheck``.

    Args:
        op: The operator, registered.
        samples: Argument tuples; by default ``op.samples(device)``.
        device: Where the samples are made.

    Returns:
        The number of samples.

    Raises:
        AssertionError: a promise is broken; the message names it.
    """
    count = 0
    for args in op.samples(device) if samples is None else samples:
        _check_sample(op, args, f"{op.name}, sample {count}")
        if count == 0:
            torch.library.opcheck(op.overload, args)
        count += 1
    _require(count > 0, f"{op.name}: there is no sample")
    return count


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _check_sample(op: KernelOp, args: tuple[Any, ...], where: str) -> None:
    got, again = _run(op, op.overload, args, where), _run(op, lambda *given: _poisoned(op, given), args, where)
    exact = op.reference if op.rounds else lambda *given: op.reference(*map(_float64, given))
    expected = _run(op, exact, args, where)
    fakes = _tensors(_fake(op, args))
    _require(len(got) == len(expected), f"{where}: another number of results")
    for i, (result, second, wanted) in enumerate(zip(got, again, expected, strict=True)):
        _require(_same(result, second), f"{where}, result {i}: two runs differ")
        _check_value(op, result, wanted, f"{where}, result {i}")
    for i, (result, fake) in enumerate(zip(got, fakes, strict=False)):
        told = (fake.shape, fake.dtype, fake.device.type)
        real = (result.shape, result.dtype, result.device.type)
        _require(told == real, f"{where}, result {i}: the fake tells {told}, real is {real}")


def _run(op: KernelOp, function: Callable[..., Any], args: tuple[Any, ...], where: str) -> list[Tensor]:
    """Results of a call on copies of ``args``, and the arguments that the operator writes into."""
    names = list(inspect.signature(op.reference).parameters)
    copies = [a.clone() if isinstance(a, Tensor) else a for a in args]
    result = _tensors(function(*copies))
    for name, copy, original in zip(names, copies, args, strict=False):
        if name in op.mutates:
            result.append(copy)
        elif isinstance(copy, Tensor):
            _require(_same(copy, original), f"{where}: {name} was written to")
    return result


def _check_value(op: KernelOp, result: Tensor, exact: Tensor, what: str) -> None:
    if result.dtype not in op.tolerance:
        _require(_same(result, exact.to(result.dtype)), f"{what}: integers differ")
        return
    error, allowed = relative_error(result, exact), op.tolerance.get(result.dtype, 0.0)
    _require(error <= allowed, f"{what}: relative error {error:.3g}, allowed {allowed:.3g}")


def _tensors(value: Any) -> list[Tensor]:
    return [v for v in pytree.tree_leaves(value) if isinstance(v, Tensor)]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())


def _float64(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.double() if half else value


def _poisoned(op: KernelOp, args: tuple[Any, ...]) -> Any:
    """The operator with fresh memory full of NaN (large integers), so that what is not written shows."""
    settings: Any = torch.utils.deterministic
    before = settings.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    settings.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return op.overload(*args)
    finally:
        settings.fill_uninitialized_memory = before[0]
        torch.use_deterministic_algorithms(before[1])


def _fake(op: KernelOp, args: tuple[Any, ...]) -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        return op.overload(*[mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args])
