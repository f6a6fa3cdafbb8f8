"""Pruning of half the channels in more than a hundred architectures at full size, random weights.

    python -m benchmarks.pruning_architectures [--quick] [--glob GLOB] [--peer] [--peers-only] [--finished]

Each network runs in a process of its own with a time limit: capture, plan, apply, certificate, the independent oracle
of ``tests/prune/oracle.py``, forward passes at batch 1 and 3. Every result is one line in a folder, so that a run that
was stopped goes on where it was; ``--fresh`` starts again, ``--finished`` puts together what is there.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch.utils import _pytree as pytree

from benchmarks import harness, pruning_peer
from benchmarks.child import Row, call
from benchmarks.harness import Json
from benchmarks.models import work_folder
from benchmarks.pruning_zoo import ZOO, Entry

RATIO: Final = 0.5
LIMIT: Final = 400.0
PEER_LIMIT: Final = 200.0
TOLERANCE: Final = 1e-4
_QUICK: Final = ("torchvision/resnet18", "torchvision/vit_b_32", "timm/resnest14d", "transformers/llama")


def ours(name: str) -> Row:
    """Everything about one network; see the module's text."""
    import fxcompress as fxc
    from fxcompress.prune.plan import plan_pruning

    entry = ZOO[name]
    model = entry.build()
    args, kwargs = entry.inputs(1)
    begin = time.perf_counter()
    program = fxc.capture(model, args, kwargs)
    captured = time.perf_counter()
    plan = plan_pruning(program, ratio=RATIO, scope="local", width=entry.width)
    planned = time.perf_counter()
    pruned = plan.apply(program)
    applied = time.perf_counter()
    row: dict[str, Json] = {
        "capture_s": round(captured - begin, 3),
        "plan_s": round(planned - captured, 3),
        "apply_s": round(applied - planned, 3),
        "nodes": len(program.graph.nodes),
        "groups": len(plan.groups),
        "parameters": [pruning_peer.size(program.gm), pruning_peer.size(pruned.gm)],
        "pinned": _pinned(plan),
        "capture_notes": list(program.notes),
    }
    certificate = plan.certify(program, pruned)
    row["certify_s"] = round(time.perf_counter() - applied, 3)
    row["certificate"] = {"float32": certificate.float32, "float64": certificate.float64}
    row["batches"] = _batches(entry, lambda a, k: pruned(*a, **k))
    row.update(_oracle(model, plan, program.gm, pruned, args, kwargs))
    return {**row, "status": _status(row)}


def _pinned(plan: Any) -> list[str]:
    """The plan's notes on what stays, and why."""
    found = next((getattr(plan, n) for n in ("pinned", "pins", "notes") if hasattr(plan, n)), ())
    if isinstance(found, Mapping):
        return [f"{key}: {value}"[:200] for key, value in found.items()]
    return [str(note)[:200] for note in found]


def _batches(entry: Entry, run: Any) -> dict[str, Json]:
    """Batch size -> ``"ok"`` or the error."""
    found: dict[str, Json] = {}
    for batch in (1, 3):
        args, kwargs = entry.inputs(batch)
        try:
            with torch.no_grad():
                leaves = [y for y in pytree.tree_leaves(run(args, kwargs)) if isinstance(y, torch.Tensor)]
            finite = all(bool(torch.isfinite(y).all()) for y in leaves)
            found[str(batch)] = "ok" if finite else "not finite"
        except Exception as error:  # noqa: BLE001 - a network that does not run is a result
            found[str(batch)] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return found


def _oracle(model: Any, plan: Any, root: Any, pruned: Any, args: Any, kwargs: Any) -> Row:
    """Largest relative difference from the dense network with the same channels zeroed, float32."""
    from tests.prune.oracle import masked_model, relative_error

    try:
        dense = masked_model(model, plan.removed, plan.edits, root, torch.float32)
        with torch.no_grad():
            expected = dense(*args, **kwargs)
    except (TypeError, ValueError, AttributeError, IndexError) as error:  # it has no rule for this kind of layer
        return {"oracle_error": None, "oracle_note": f"{type(error).__name__}: {error}"[:300]}
    with torch.no_grad():
        got = pruned(*args, **kwargs)
    return {"oracle_error": relative_error(_tensors(expected), _tensors(got))}


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [y for y in pytree.tree_leaves(tree) if isinstance(y, torch.Tensor)]


def _status(row: Mapping[str, Any]) -> str:
    before, after = row["parameters"]
    if any(state != "ok" for state in row["batches"].values()):
        return "does not run"
    error = row.get("oracle_error")
    if error is not None and not error <= TOLERANCE:
        return "differs from the oracle"
    return "not pruned" if after >= before else "pruned" if after <= 0.6 * before else "pruned by less than 40 %"


def theirs(name: str, heads: bool) -> Row:
    """Torch-Pruning on the same network; its numbers are held against the same oracle where that has a rule."""
    from tests.prune.oracle import masked_model, relative_error

    entry = ZOO[name]
    model = entry.build()
    args, kwargs = entry.inputs(1)
    example = kwargs or args
    hints = pruning_peer.attention_layers(model)
    settings = pruning_peer.Settings(RATIO, heads, pruning_peer.output_layers(model, example), hints)
    outcome = pruning_peer.prune(model, example, settings)
    row: dict[str, Json] = {
        "seconds": round(outcome.seconds, 3),
        "parameters": [pruning_peer.size(model), pruning_peer.size(outcome.model)],
        "attention_layers": len(hints),
        "batches": _batches(entry, lambda a, k: outcome.model(*a, **k)),
    }
    if any(state != "ok" for state in row["batches"].values()):  # type: ignore[union-attr]
        return {**row, "status": "does not run"}
    try:
        with torch.no_grad():
            dense = masked_model(model, outcome.removed, outcome.kept, None, torch.float32)
            error = relative_error(_tensors(dense(*args, **kwargs)), _tensors(outcome.model(*args, **kwargs)))
        row["oracle_error"] = error
        if not error <= TOLERANCE:
            return {**row, "status": "differs from the oracle"}
    except Exception as error:  # noqa: BLE001 - the oracle has no rule: the row is kept without its verdict
        row["oracle_note"] = f"{type(error).__name__}: {error}"[:300]
    return {**row, "status": _status(row)}


def theirs_best(name: str, limit: float) -> Row:
    """Narrower heads, its default; when that fails and there are heads, fewer heads."""
    first: dict[str, Json] = dict(call(theirs, name, False, seconds=limit))
    if str(first["status"]).startswith("pruned") or first["status"] == "timeout":
        return first
    second = call(theirs, name, True, seconds=limit)
    return {**second, "heads": "whole"} if str(second["status"]).startswith("pruned") else first


class Cache:
    """One JSON line per network and tool, in ``pruning_architectures/<tool>.jsonl`` of the work folder."""

    def __init__(self, tool: str, fresh: bool) -> None:
        folder = work_folder() / "pruning_architectures"
        folder.mkdir(parents=True, exist_ok=True)
        self.path: Path = folder / f"{tool}.jsonl"
        if fresh:
            self.path.unlink(missing_ok=True)
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        self.rows: dict[str, Row] = {row["name"]: row for row in map(json.loads, lines)}

    def get(self, name: str, make: Any) -> Row:
        """The row of one network, made now when it is not there."""
        if name not in self.rows:
            row = {"name": name, "family": ZOO[name].family, **make()}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            self.rows[name] = row
        return self.rows[name]


def run(options: argparse.Namespace) -> dict[str, Json]:
    """Every network that ``--glob`` names, with the tools that were asked for."""
    names = [n for n in (_QUICK if options.quick else ZOO) if fnmatch.fnmatch(n, options.glob)]
    tools = {"fxcompress": not options.peers_only, "torch_pruning": options.peer or options.peers_only}
    results: dict[str, Json] = {}
    for tool in [tool for tool, wanted in tools.items() if wanted]:
        cache = Cache(tool, options.fresh)
        rows: dict[str, Row] = {}
        if options.finished:
            names = [name for name in names if name in cache.rows]
        for name in names if tool == "fxcompress" else [n for n in names if not ZOO[n].width]:
            if tool == "fxcompress":
                rows[name] = cache.get(name, lambda n=name: call(ours, n, seconds=options.limit))
            else:
                rows[name] = cache.get(name, lambda n=name: theirs_best(n, PEER_LIMIT))
            print(tool, name, _short(rows[name]), flush=True)
        results[tool] = {"networks": rows, "counts": dict(Counter(str(row["status"]) for row in rows.values()))}
    return results


def _short(row: Mapping[str, Any]) -> str:
    before, after = row.get("parameters", (0, 0))
    seconds = row.get("seconds", row.get("plan_s", 0) + row.get("apply_s", 0))
    kept = f"{after / before:.2f} of the parameters" if before else row.get("error", "")
    return f"{row['status']}: {kept}, {seconds:.1f} s, oracle {row.get('oracle_error')}"


def main() -> None:
    """Command line."""
    options = harness.arguments(
        "Pruning of many architectures.", glob="*", limit=LIMIT, peer=False, fresh=False, finished=False
    )
    results = run(options)
    print({tool: found["counts"] for tool, found in results.items() if isinstance(found, Mapping)})
    settings: dict[str, Json] = {
        "ratio": RATIO,
        "limit_s": options.limit,
        "glob": options.glob,
        "tolerance": TOLERANCE,
        "torch_pruning": pruning_peer.version(),
        "peer_limit_s": PEER_LIMIT,
        "peer": "MagnitudePruner, L2, local ranking; output layers ignored; num_heads given and attention attributes set",
    }
    print(harness.write("pruning_architectures", results, settings, options))


if __name__ == "__main__":
    main()
