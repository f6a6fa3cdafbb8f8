"""Checks of a pruning request: ratios, names, rounding; and what to tell the user about what stays."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fxcompress.environment import channel_multiple
from fxcompress.errors import PruneError
from fxcompress.ir import Program
from fxcompress.prune.dependencies import Dependencies
from fxcompress.prune.groups import Group

__all__ = ["allowed", "checked", "matching", "notes", "ratios_by_group", "roundable"]

_KEPT = (
    *(
        "ratio",
        "scope",
        "reduction",
        "normalize",
        "round_to",
        "macs",
        "parameters",
        "latency",
        "target",
        "min_channels",
        "max_ratio",
    ),
    *("attention", "width", "allow_outputs", "seed"),
)

#: Why a layer may not shrink, for errors.
_UNLESS = "the model's outputs stay as they are unless allow_outputs=True, what norms run over stays unless width=True"


def checked(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``plan_pruning`` that a plan keeps.

    Raises:
        PruneError: a value is out of its range, or two budgets are given.
    """
    budgets = [n for n in ("ratio", "macs", "parameters", "latency") if given[n] is not None]
    if len(budgets) > 1:
        raise PruneError(3, f"give one budget, not {' and '.join(budgets)}")
    if not budgets and not given["ratios"]:
        raise PruneError(4, "how much to prune is missing", fix="give ratio=, macs=, parameters=, latency= or ratios=")
    _check_shares(given)
    given = {**given, "round_to": multiple(given["round_to"]), "normalize": _normalize(given)}
    for name in ("round_to", "min_channels"):
        if not isinstance(given[name], int) or given[name] < 1:
            raise PruneError(6, f"{name} must be a whole number from 1 on, not {given[name]!r}")
    known_by = ("mean", "macs", "parameters", "none")
    for name, known in (("normalize", known_by), ("scope", ("global", "local")), ("attention", ("heads", "head_dim"))):
        if given[name] not in known:
            raise PruneError(7, f"unknown {name} {given[name]!r}", fix=f"known: {', '.join(known)}")
    importance = given["importance"]
    label = (
        importance
        if isinstance(importance, str)
        else getattr(importance, "name", getattr(importance, "__name__", "user"))
    )
    options = {n: given[n] for n in _KEPT} | {"importance": label}
    return options | {
        "ignore": globs(given["ignore"]),
        "include": globs(given["include"]),
        "ratios": dict(given["ratios"] or {}),
    }


def multiple(round_to: int | str) -> int | str:
    """A number of channels; ``"target"`` is what the kernels of the target's processor handle at once."""
    return channel_multiple() if round_to == "target" else round_to


def _normalize(given: Mapping[str, Any]) -> str:
    """What scores are divided by, unless said: the cost that the budget limits."""
    if given["normalize"] is not None:
        return str(given["normalize"])
    if given["macs"] is not None or given["latency"] is not None:
        return "macs"
    return "mean" if given["parameters"] is None else "parameters"


def globs(given: str | Sequence[str]) -> list[str]:
    """A list of globs; one may be given alone."""
    return [given] if isinstance(given, str) else list(given)


def _check_shares(given: Mapping[str, Any]) -> None:
    shares = {"ratio": given["ratio"], "max_ratio": given["max_ratio"]}
    shares |= {f"ratios[{name!r}]": value for name, value in (given["ratios"] or {}).items()}
    for name, value in shares.items():
        if value is not None and not (_is_number(value) and 0 <= value < 1):
            raise PruneError(
                5, f"{name} must be at least 0 and less than 1, not {value!r}", fix="0.5 removes half of the channels"
            )
    for name in ("macs", "parameters", "latency"):
        if given[name] is not None and not (_is_number(given[name]) and 0 < given[name] <= 1):
            raise PruneError(12, f"{name} must be more than 0 and at most 1, not {given[name]!r}", fix="0.5 keeps half")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def matching(patterns: Iterable[str], names: Sequence[str], what: str) -> set[str]:
    """Names that match any of the globs. A pattern also matches everything below it: ``layer1`` takes ``layer1.0.conv1``.

    Raises:
        PruneError: a pattern matches nothing; the nearest names are offered.
    """
    found: set[str] = set()
    for pattern in patterns:
        hits = {n for n in names if fnmatch.fnmatchcase(n, pattern) or fnmatch.fnmatchcase(n, f"{pattern}.*")}
        if not hits:
            close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4)
            fix = f"did you mean {', '.join(close)}?" if close else f"known: {', '.join(list(names)[:8])}, ..."
            raise PruneError(8, f"{what}: there is no layer {pattern!r}", fix=fix)
        found |= hits
    return found


def _layers(program: Program, groups: Sequence[Group]) -> list[str]:
    modules = [str(n.target) for n in program.graph.nodes if n.op == "call_module"]
    return list(dict.fromkeys([*modules, *(layer for g in groups for layer in g.layers), *(g.name for g in groups)]))


def ratios_by_group(
    found: Dependencies, groups: Sequence[Group], ratios: Mapping[str, float], program: Program
) -> dict[str, float]:
    """Share to remove by group name, from globs over groups and the layers that make their channels.

    Raises:
        PruneError: a pattern matches nothing, or only layers that cannot shrink.
    """
    result: dict[str, float] = {}
    names = _layers(program, groups)
    for pattern, ratio in ratios.items():
        hits = matching([pattern], names, "ratios")
        chosen = [g.name for g in groups if g.name in hits or g.layers[0] in hits]
        chosen = chosen or [g.name for g in groups if _makers(found, g) & hits]
        if not chosen:
            raise PruneError(14, f"ratios: nothing that {pattern!r} makes can shrink", fix=_UNLESS)
        result.update(dict.fromkeys(chosen, ratio))
    return result


def allowed(
    found: Dependencies, groups: Sequence[Group], ignore: Sequence[str], include: Sequence[str], program: Program
) -> list[Group]:
    """Groups that may be pruned: none of their makers is ignored, and all is included when ``include`` is given.

    Raises:
        PruneError: nothing is left.
    """
    names = _layers(program, groups)
    ignored = matching(ignore, names, "ignore")
    included = matching(include, names, "include") if include else None
    result = []
    for group in groups:
        makers = _makers(found, group)
        wanted = included is None or group.name in included or bool(makers & included)
        if not group.alternative and wanted and not (makers & ignored) and group.name not in ignored:
            result.append(group)
    if not result:
        makes = included is not None and not any(_makers(found, g) & included for g in groups)
        why, fix = "every group is ignored", "ignore less"
        if not groups or makes:
            why = (
                f"nothing that {', '.join(include)} makes can shrink"
                if makes
                else "no dimension of this model can shrink"
            )
            fix = _UNLESS
        more = "; ".join(found.reasons[:3])
        raise PruneError(9, "there is nothing to prune", why=f"{why}{'; ' + more if more else ''}", fix=fix)
    return result


def _makers(found: Dependencies, group: Group) -> set[str]:
    return {u.slot.layer for u in found.slots if u.dimension in group.dimensions and u.slot.role == "out"}


def scored(groups: Sequence[Group], scores: NDArray[np.float64]) -> list[Group]:
    """Groups that the criterion says something about; units it is silent about rank last (``scores`` is filled in).

    Raises:
        PruneError: there is none.
    """
    result = [g for g in groups if not np.isnan(scores[g.units]).all()]
    for group in result:
        own = scores[group.units]
        scores[group.units] = np.where(np.isnan(own), np.nanmax(own), own)  # what it is silent about goes last
    if not result:
        why = "the criterion says nothing about any group that may be pruned"
        raise PruneError(13, "there is nothing to rank", why=why, fix="choose another importance, such as l2")
    return result


def unscored(groups: Sequence[Group], ranked: Sequence[Group]) -> list[str]:
    """A note on groups that have no score."""
    names = {g.name for g in ranked}
    silent = [g.name for g in groups if g.name not in names]
    return [f"the importance says nothing about: {', '.join(silent)}"] if silent else []


def roundable(groups: Sequence[Group], round_to: int) -> list[Group]:
    """Groups with at least ``round_to`` channels.

    Raises:
        PruneError: there is none.
    """
    result = [g for g in groups if g.size * g.width >= round_to]
    if not result:
        largest = max(groups, key=lambda g: g.size * g.width)
        why = f"the largest, {largest.name}, has {largest.size * largest.width}"
        raise PruneError(10, f"round_to={round_to} is larger than every layer", why=why, fix="lower round_to")
    return result


def notes(
    found: Dependencies,
    groups: Sequence[Group],
    free: Sequence[Group],
    rounded: Sequence[Group],
    options: Mapping[str, Any],
) -> list[str]:
    """What the user should know about what stays."""
    lines = [f"stays whole: what flows through {reason}" for reason in found.reasons]
    names = {g.name for g in rounded}
    small = [g.name for g in free if g.name not in names]
    if small:
        lines.append(f"fewer than round_to={options['round_to']} channels: {', '.join(small)}")
    crossed = [g for g in groups if g.alternative]
    lines += [f"{g.name} ({g.kind}) crosses {g.alternative}, which is pruned instead" for g in crossed]
    if options["width"] and found.statistics:
        lines.append("width: certified against a dense model whose norm statistics run over the kept channels")
    return lines
