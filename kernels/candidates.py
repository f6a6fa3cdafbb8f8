"""Configurations worth measuring for a problem: what the heuristic chooses, and its neighbours.

A kernel module may list its own with a function ``candidates(problem, device)``; `candidates` then returns those.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from typing import Any, Final, cast

from fxcompress.kernels.configs import Config, Device, Problem

__all__ = ["candidates", "heuristic", "neighbours"]

_LEAST: Final = {"block_m": 8, "block_n": 32, "block_k": 32, "split_k": 1, "num_warps": 2, "num_stages": 2}
_MOST: Final = {"block_m": 256, "block_n": 256, "block_k": 1024, "split_k": 32, "num_warps": 8, "num_stages": 6}
#: What a step does to each number; stages go up and down by one, the others double and halve.
_AXES: Final = tuple(_LEAST)


@cache
def _module(family: str) -> Any:
    return importlib.import_module(f"fxcompress.kernels.{family}_triton")


def heuristic(problem: Problem, device: Device) -> Config:
    """What the kernel's launcher chooses for ``problem``: an entry of the tables, else the formula's."""
    return cast(Config, _module(problem.family).choose(problem, device))


def candidates(problem: Problem, device: Device) -> list[Config]:
    """Configurations to measure, each once: the heuristic's choice, its neighbours, its choices for fewer and more rows.

    The last bring in the other routes of a family. Not each candidate must work: one that does not compile, does not fit
    or is wrong is left out by who measures.
    """
    own: Callable[[Problem, Device], Iterable[Config]] | None = getattr(_module(problem.family), "candidates", None)
    first = heuristic(problem, device)
    if own is not None:
        return list(dict.fromkeys([first, *own(problem, device)]))
    rows = [max(1, problem.m // 4), max(1, problem.m // 2), 2 * problem.m, 4 * problem.m]
    around = [heuristic(replace(problem, m=m), device) for m in rows]
    if first.route != "kernel":
        around.append(heuristic(replace(problem, m=_MIDDLE), device))
    tile = next((c for c in (first, *reversed(around)) if c.route == "kernel"), None)
    return list(dict.fromkeys([first, *around, *([] if tile is None else neighbours(tile))]))


#: Rows at which every family multiplies itself, whatever it does with more of them.
_MIDDLE: Final = 256


def neighbours(config: Config) -> list[Config]:
    """Configurations one step away, the operands swapped, and two steps away for pairs that trade against each other.

    A step doubles or halves one number (stages: one more or less). Pairs: a wider tile with more warps or more parts of
    K, a deeper block with fewer stages.
    """
    if config.route != "kernel":
        return []
    found = [made for axis in _AXES for up in (True, False) if (made := _step(config, axis, up)) is not None]
    found.append(replace(config, swap_ab=not config.swap_ab))
    for (one, one_up), (other, other_up) in _PAIRS:
        half = _step(config, one, one_up)
        whole = None if half is None else _step(half, other, other_up)
        if whole is not None:
            found.append(whole)
    return [c for c in dict.fromkeys(found) if c != config]


_PAIRS: Final = (
    (("block_n", True), ("num_warps", True)),
    (("block_n", False), ("num_warps", False)),
    (("block_m", True), ("num_warps", True)),
    (("block_n", False), ("split_k", False)),
    (("block_n", True), ("split_k", True)),
    (("block_k", True), ("num_stages", False)),
    (("block_k", False), ("num_stages", True)),
)


def _step(config: Config, axis: str, up: bool) -> Config | None:
    """``config`` with one number a step larger or smaller; None where the range ends."""
    now: int = getattr(config, axis)
    if axis == "num_stages":
        then = now + 1 if up else now - 1
    else:
        then = now * 2 if up else now // 2
    inside = _LEAST[axis] <= then <= _MOST[axis]
    return replace(config, **cast("dict[str, Any]", {axis: then})) if inside else None
