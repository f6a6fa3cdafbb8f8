"""Optimization profiles: for which values of the free sizes an engine is built, and whether inputs lie in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fxcompress.engines.signature import IOSignature
from fxcompress.errors import EngineError, UsageError

__all__ = [
    "Profile",
    "Profiles",
    "bounds",
    "complete_profiles",
    "from_json",
    "parse_profile",
    "profile_of",
    "shape_bounds",
]

#: Smallest, usual and largest value of each free size.
Profile = dict[str, tuple[int, int, int]]
Profiles = list[Profile]
Given = Mapping[str, Sequence[int]] | Sequence[Mapping[str, Sequence[int]]] | None

#: Largest batch when nothing is said; at least the example's.
_BATCH = 16


def complete_profiles(signature: IOSignature, given: Given) -> tuple[Profiles, list[str]]:
    """Check the profiles that were given, and add that of the batch.

    Args:
        signature: Inputs of the model.
        given: One profile or several: name of a free size -> smallest, usual and largest value.

    Returns:
        The profiles, empty when no size is free, and notes.

    Raises:
        UsageError: a name that is no free size, or values that are not ``1 <= smallest <= usual <= largest``.
        EngineError: a free size other than the batch has no values.
    """
    examples = _examples(signature)
    listed: list[Mapping[str, Sequence[int]]] = [given] if isinstance(given, Mapping) else list(given or [{}])
    profiles, notes = [], []
    for asked in listed or [{}]:
        profile = {name: _checked(name, values, examples) for name, values in asked.items()}
        for name, example in examples.items():
            if name not in profile:
                profile[name] = _default(name, example, examples)
                low, usual, high = profile[name]
                notes.append(f"no profile given for {name!r}: the engine takes {low} to {high}, best {usual}")
        profiles.append(profile)
    return (profiles if examples else []), list(dict.fromkeys(notes))


def _examples(signature: IOSignature) -> dict[str, int]:
    """Free sizes of the inputs and their value in the example."""
    found: dict[str, int] = {}
    for spec in signature.tensor_inputs():
        for size, example in zip(spec.shape, spec.example, strict=True):
            if isinstance(size, str) and size.isidentifier():
                found.setdefault(size, example)
    return found


def _checked(name: str, values: Sequence[int], examples: Mapping[str, int]) -> tuple[int, int, int]:
    if name not in examples:
        fix = f"free sizes: {', '.join(examples)}" if examples else "no size of this model is free"
        raise UsageError(603, f"the profile names {name!r}, which is no free size of the inputs", fix=fix)
    numbers = tuple(values) if isinstance(values, (tuple, list)) else ()
    if (
        len(numbers) != 3
        or not all(isinstance(v, int) for v in numbers)
        or not 1 <= numbers[0] <= numbers[1] <= numbers[2]
    ):
        fix = f"give the smallest, the usual and the largest value, e.g. {name}=(1, 8, 32)"
        raise UsageError(604, f"profile {name}={values!r} does not fit", fix=fix)
    return numbers[0], numbers[1], numbers[2]


def _default(name: str, example: int, examples: Mapping[str, int]) -> tuple[int, int, int]:
    if name != "batch":
        known = ", ".join(f"{n!r}: (1, {e}, {4 * e})" for n, e in examples.items())
        raise EngineError(
            604,
            f"the size {name!r} is free and has no profile",
            why="TensorRT chooses kernels for a range of shapes, which it must be told",
            fix=f"give one: profile={{{known}}}, on the command line --profile {name}=1:{example}:{4 * example}, "
            "or fix the size when capturing (dynamic_shapes)",
        )
    return 1, example, max(_BATCH, example)


def parse_profile(texts: Sequence[str]) -> dict[str, tuple[int, ...]] | None:
    """``batch=1:8:32`` as the command line has it; None for no text.

    Raises:
        UsageError: a text of another form.
    """
    found: dict[str, tuple[int, ...]] = {}
    for text in texts:
        name, _, values = text.partition("=")
        parts = values.split(":")
        if not name or len(parts) != 3 or not all(p.isdigit() for p in parts):
            raise UsageError(605, f"--profile {text}: not understood", fix="write --profile batch=1:8:32")
        found[name] = tuple(map(int, parts))
    return found or None


def shape_bounds(signature: IOSignature, profile: Profile) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Smallest, usual and largest shape of every input.

    Raises:
        EngineError: a size is computed from others, which a profile cannot say.
    """
    found: dict[str, tuple[tuple[int, ...], ...]] = {}
    for spec in signature.tensor_inputs():
        for size in spec.shape:
            if isinstance(size, str) and size not in profile:
                fix = "fix that size when capturing (dynamic_shapes)"
                raise EngineError(605, f"a size of input {spec.name} is computed from others: {size}", fix=fix)
        shapes = tuple(tuple(s if isinstance(s, int) else profile[s][i] for s in spec.shape) for i in range(3))
        found[spec.name] = shapes
    return found


def profile_of(signature: IOSignature, profiles: Profiles, shapes: Sequence[Sequence[int]]) -> int:
    """Index of the first profile that holds inputs of these shapes; 0 when no size is free.

    Raises:
        UsageError: none does.
    """
    sizes: dict[str, int] = {}
    for spec, shape in zip(signature.tensor_inputs(), shapes, strict=True):
        sizes |= {n: int(v) for n, v in zip(spec.shape, shape, strict=True) if isinstance(n, str)}
    for index, profile in enumerate(profiles):
        if all(profile[n][0] <= v <= profile[n][2] for n, v in sizes.items()):
            return index
    if not profiles:
        return 0
    got = ", ".join(f"{n}={v}" for n, v in sizes.items())
    fix = "build the engine again with a profile that holds them: fxcompress build OUT --target tensorrt --profile ..."
    raise UsageError(606, f"the engine was not built for {got}", why=f"it takes {bounds(profiles)}", fix=fix)


def bounds(profiles: Profiles) -> str:
    """The ranges of the profiles in words."""
    texts = [", ".join(f"{n} {low} to {high}" for n, (low, _, high) in p.items()) for p in profiles]
    return "; or ".join(texts) or "fixed shapes"


def from_json(found: Sequence[Mapping[str, Any]]) -> Profiles:
    """Profiles as a manifest holds them."""
    return [{str(n): (int(v[0]), int(v[1]), int(v[2])) for n, v in p.items()} for p in found]
