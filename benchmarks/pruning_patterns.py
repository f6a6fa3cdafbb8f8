"""Which patterns survive pruning of half the channels: fxcompress and Torch-Pruning, each judged by one oracle.

    python -m benchmarks.pruning_patterns [--quick] [--peers-only] [--only NAME]

The oracle is the dense network with the channels zeroed that the tool says it removed, in float64
(``tests/prune/oracle.py``). Each pattern runs in a process of its own with a time limit of 60 s.

Status of a pattern:

* ``exact``;
* ``silently wrong``: other numbers and no error;
* ``drops a constant``: other numbers, because what an activation with f(0) ≠ 0 makes of a removed channel is lost;
* ``crash``: an error while pruning or in the next forward pass;
* ``not pruned``: no parameter went;
* ``timeout``;
* ``not judged``: the oracle has no rule for what was removed.

``not_reached`` names the layers the pattern is about that kept all their channels.
"""

from __future__ import annotations

import argparse
import fnmatch
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks import harness, pruning_peer
from benchmarks.child import Row, call
from benchmarks.harness import Json

LIMIT: Final = 60.0
RATIO: Final = 0.5
TOLERANCE: Final = 1e-7


def _prepared(name: str) -> tuple[Any, Any, tuple[Any, ...]]:
    from tests.prune.patterns import PATTERNS

    case = PATTERNS[name]
    example = tuple(x.double() if x.is_floating_point() else x for x in case.example)
    return case, case.build().double(), example


def _verdict(case: Any, before: int, after: int, expected: Any, got: list[Tensor]) -> Row:
    from tests.prune.oracle import relative_error

    if after >= before:
        return {"status": "not pruned", "parameters": [before, after]}
    error = relative_error(expected, got) if expected is not None else None
    wrong = "drops a constant" if case.folds else "silently wrong"
    status = "not judged" if error is None else "exact" if error <= TOLERANCE else wrong
    return {"status": status, "parameters": [before, after], "error": error}


def ours(name: str) -> Row:
    """Captures, plans, applies, and compares with the oracle."""
    import fxcompress as fxc
    from fxcompress.prune.plan import plan_pruning
    from tests.prune.oracle import masked_output

    case, model, example = _prepared(name)
    program = fxc.capture(model, example)
    plan = plan_pruning(program, ratio=RATIO, scope="local", **case.kwargs)
    pruned = plan.apply(program)
    with torch.no_grad():
        got = list(torch.utils._pytree.tree_leaves(pruned(*example)))
    expected = masked_output(model, plan, example, program.gm)
    row = _verdict(case, pruning_peer.size(program.gm), pruning_peer.size(pruned.gm), expected, got)
    return {**row, "not_reached": [n for n in case.prunes if not plan.removed.get(n)]}


def theirs(name: str, heads: bool) -> Row:
    """Torch-Pruning with the hints it asks for, compared with the oracle."""
    from tests.prune.oracle import masked_model

    case, model, example = _prepared(name)
    settings = pruning_peer.Settings(RATIO, heads, case.outputs, case.heads)
    outcome = pruning_peer.prune(model, example, settings)
    missed: list[str] = [n for n in case.prunes if not outcome.removed.get(n)]
    sizes = pruning_peer.size(model), pruning_peer.size(outcome.model)
    with torch.no_grad():
        got = list(torch.utils._pytree.tree_leaves(outcome.model(*example)))
        try:
            dense = masked_model(model, outcome.removed, outcome.kept)
        except (TypeError, ValueError) as error:
            return {**_verdict(case, *sizes, None, got), "why": str(error)[:300], "not_reached": missed}
        expected = list(torch.utils._pytree.tree_leaves(dense(*example)))
    return {**_verdict(case, *sizes, expected, got), "not_reached": missed}


_ORDER: Final = ("exact", "drops a constant", "not judged", "not pruned", "silently wrong", "crash", "timeout")


def theirs_best(name: str, limit: float) -> Row:
    """The better of narrower heads and fewer heads, where the pattern names heads."""
    from tests.prune.patterns import PATTERNS

    rows: list[Row] = [call(theirs, name, False, seconds=limit)]
    if PATTERNS[name].heads:
        rows.append(call(theirs, name, True, seconds=limit))
    best = min(rows, key=lambda row: _ORDER.index(str(row["status"])))
    return {**best, "heads": "whole" if best is not rows[0] else "narrower"} if len(rows) > 1 else best


def run(options: argparse.Namespace) -> dict[str, Json]:
    """Every pattern, both tools."""
    from tests.prune.patterns import PATTERNS

    rows: dict[str, Row] = {}
    for name, case in PATTERNS.items():
        if not fnmatch.fnmatch(name, options.only or "*") or ((options.quick or options.table) and not case.table):
            continue
        row: dict[str, Json] = {"in_table": case.table, "torch_pruning": theirs_best(name, options.limit)}
        if not options.peers_only:
            row["fxcompress"] = call(ours, name, seconds=options.limit)
        rows[name] = row
        print(name, {tool: _status(row, tool) for tool in ("fxcompress", "torch_pruning")}, flush=True)
    return {"patterns": rows, "counts": counts(rows)}


def _status(row: Mapping[str, Json], tool: str) -> str:
    found = row.get(tool)
    return str(found["status"]) if isinstance(found, Mapping) else ""


def counts(rows: Mapping[str, Row]) -> dict[str, Json]:
    """Tool -> status -> patterns, for the table's rows and for all."""
    found: dict[str, Json] = {}
    for which, chosen in (("table", [r for r in rows.values() if r["in_table"]]), ("all", list(rows.values()))):
        for tool in ("fxcompress", "torch_pruning"):
            found[f"{tool}, {which}"] = dict(Counter(s for r in chosen if (s := _status(r, tool))))
    return found


def main() -> None:
    """Command line."""
    options = harness.arguments("Patterns that survive pruning.", only="", limit=LIMIT, table=False)
    results = run(options)
    print(results["counts"])
    settings: dict[str, Json] = {
        "ratio": RATIO,
        "limit_s": options.limit,
        "tolerance": TOLERANCE,
        "torch_pruning": pruning_peer.version(),
        "peer": "MagnitudePruner, L2, local ranking; output layers ignored; num_heads given where the pattern names heads",
    }
    print(harness.write("pruning_patterns", results, settings, options))


if __name__ == "__main__":
    main()
