"""Sizes of a program's inputs: which are free, what they are in a call, and whether a call fits what was captured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxcompress.errors import UsageError

__all__ = ["FreeSize", "check_inputs", "fixed_size", "free_sizes"]


@dataclass(frozen=True)
class FreeSize:
    """One free size of the captured graph.

    Attributes:
        name: Its symbol, as in ``str(shape[0])``.
        value: Its value in the given inputs.
        is_batch: True when it is only ever dimension 0.
        lower: Smallest allowed value.
        upper: Largest allowed value, or None.
    """

    name: str
    value: int
    is_batch: bool
    lower: int
    upper: int | None

    def allows(self, value: int) -> bool:
        """True when ``value`` lies within the bounds."""
        return self.lower <= value and (self.upper is None or value <= self.upper)


def free_sizes(placeholders: list[Node], leaves: list[Any]) -> list[FreeSize]:
    """The free sizes of the flattened inputs ``leaves``, in order of appearance.

    Raises:
        UsageError: ``leaves`` do not fit the placeholders.
    """
    known = check_inputs(placeholders, leaves)
    symbols: dict[str, tuple[Any, Any]] = {}
    elsewhere: set[str] = set()
    for _, dim, size, _ in _dynamic(placeholders, leaves):
        for symbol in size.node.expr.free_symbols:
            symbols.setdefault(str(symbol), (symbol, size.node.shape_env))
            if dim > 0:
                elsewhere.add(str(symbol))
    return [
        FreeSize(name, known[name], name not in elsewhere, *_bounds(symbol, env))
        for name, (symbol, env) in symbols.items()
        if name in known
    ]


def fixed_size(size: Any) -> int | None:
    """A recorded size as a number; None when it is free. Tracing may turn a free size into a fixed one."""
    if isinstance(size, torch.SymInt):
        return int(size.node.expr) if size.node.expr.is_number else None
    return int(size)


def check_inputs(placeholders: list[Node], leaves: list[Any]) -> dict[str, int]:
    """Compare flattened inputs with what was captured: kind, dtype, rank, fixed sizes, equal free sizes, constants.

    Returns:
        The value of each free size.

    Raises:
        UsageError: an input does not fit, named with what was captured.
    """
    for node, value in zip(placeholders, leaves, strict=True):
        val = node.meta.get("val", node)
        if isinstance(val, Tensor):
            _check_tensor(node, val, value)
        elif isinstance(val, (int, float, str, bool, type(None))) and (type(value) is not type(val) or value != val):
            why = "values that are no tensors are fixed at capture"
            raise UsageError(
                13, f"input {node.name} was captured as {val!r}, not {value!r}", why=why, fix="capture the model again"
            )
    known: dict[str, int] = {}
    for node, dim, size, given in _dynamic(placeholders, leaves):
        _bind(node, dim, size, given, known)
    return known


def _check_tensor(node: Node, val: Tensor, value: Any) -> None:
    fits = isinstance(value, Tensor) and value.dtype == val.dtype and value.dim() == val.dim()
    if fits and all(fixed_size(want) in (None, got) for want, got in zip(val.shape, value.shape, strict=True)):
        return
    got = _describe(value) if isinstance(value, Tensor) else type(value).__name__
    fix = "give that dtype and those sizes, or capture the model again with an example like this input"
    raise UsageError(14, f"input {node.name} does not fit: captured {_describe(val)}, got {got}", fix=fix)


def _describe(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"


def _dynamic(placeholders: list[Node], leaves: list[Any]) -> Iterator[tuple[Node, int, Any, int]]:
    """(input, dimension, symbolic size, given size) of every dimension that is not fixed."""
    for node, value in zip(placeholders, leaves, strict=True):
        val = node.meta.get("val")
        if isinstance(val, Tensor):
            for dim, size in enumerate(val.shape):
                if fixed_size(size) is None:
                    yield node, dim, size, int(value.shape[dim])


def _bind(node: Node, dim: int, size: Any, given: int, known: dict[str, int]) -> None:
    """Solve ``factor * symbol + offset = given``; an expression of another form is not checked."""
    expr = size.node.expr
    if len(expr.free_symbols) != 1:
        return
    (symbol,) = expr.free_symbols
    factor = expr.coeff(symbol)
    offset = expr - factor * symbol
    if not (factor.is_Integer and offset.is_Integer and factor != 0):
        return
    value, rest = divmod(given - int(offset), int(factor))
    lower, upper = _bounds(symbol, size.node.shape_env)
    where = f"dimension {dim} of input {node.name}"
    if rest or value < lower or (upper is not None and value > upper):
        bounds = f"{symbol} from {lower} to {'any' if upper is None else upper}"
        raise UsageError(16, f"{where} cannot be {given}", why=f"it was captured as {expr}, {bounds}")
    if known.setdefault(str(symbol), value) != value:
        raise UsageError(
            15, f"{where} is {given}", why=f"{expr} with {symbol} = {known[str(symbol)]} from an earlier input"
        )


def _bounds(symbol: Any, env: Any) -> tuple[int, int | None]:
    """Bounds of a free size. Export always starts at 2, which says nothing: capture has run smaller ones."""
    found = env.var_to_range.get(symbol)
    if found is None:
        return 0, None
    lower = int(found.lower) if found.lower.is_Integer else 0
    return (0 if lower <= 2 else lower), (int(found.upper) if found.upper.is_Integer else None)
