"""Latency budgets: what a pruned program costs on its target, measured once per structure and cached."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from fxcompress.bench import compare_latency
from fxcompress.engines import build_engine
from fxcompress.engines import target as find_target
from fxcompress.environment import describe
from fxcompress.prune.dependencies import Bools, Dependencies
from fxcompress.prune.surgery import cut_program
from fxcompress.selection import available_targets

__all__ = ["Staircase", "cache_file"]


def cache_file() -> Path:
    """Where measured latencies are kept: ``FXCOMPRESS_CACHE``, or the user's cache folder."""
    folder = (
        os.environ.get("FXCOMPRESS_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fxcompress"
    )
    return Path(folder) / "latency.json"


class Staircase:
    """Latency of what is left when units go, as a share of the dense program's.

    Latency is a staircase over channel counts: only the counts matter, not which channels go. So every step is
    measured once, dense and pruned engine side by side, and kept in a file for this machine.

    Attributes:
        dense: Latency of the dense program, 1.0 by definition.
        measured: Number of steps that were timed and not found in the cache.
    """

    dense = 1.0

    def __init__(self, found: Dependencies, target: str | None, file: Path | None = None) -> None:
        self.found = found
        self.target = available_targets()[0] if target is None else find_target(target)
        self.target.require()
        self.file = cache_file() if file is None else file
        shapes = [list(v.shape) for v in pytree.tree_leaves(found.program.example) if isinstance(v, Tensor)]
        machine = json.dumps(describe(), default=str, sort_keys=True)
        identity = [found.program.text(), self.target.name, str(shapes), machine]
        self._key = hashlib.sha256("\n".join(identity).encode()).hexdigest()[:16]
        self.measured = 0

    def __call__(self, removed: Bools) -> float:
        counts = self.found.counts(removed)
        step = hashlib.sha256(counts.tobytes()).hexdigest()[:16]
        known = self._read()
        if step not in known.get(self._key, {}):
            known.setdefault(self._key, {})[step] = self._measure(removed)
            self._write(known)
        return float(known[self._key][step])

    def _measure(self, removed: Bools) -> float:
        if not removed.any():
            return self.dense
        self.measured += 1
        pruned, _ = cut_program(self.found, removed)
        engines = {
            "dense": build_engine(self.target, self.found.program),
            "pruned": build_engine(self.target, pruned),
        }
        args, kwargs = self.found.program.example
        return float(compare_latency(engines, args, kwargs).ratio("pruned", "dense").median)

    def _read(self) -> dict[str, dict[str, float]]:
        if not self.file.exists():
            return {}
        try:
            found: dict[str, dict[str, float]] = json.loads(self.file.read_text())
        except ValueError:  # cut off or not ours: measured anew and written over
            return {}
        return found

    def _write(self, known: dict[str, Any]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.file.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps(known, indent=1, sort_keys=True))
        fresh.replace(self.file)
