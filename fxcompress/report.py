"""Report: what compile did and what came out, as a table of at most 12 lines and as JSON with everything."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from fxcompress.bench import Latency
from fxcompress.pipeline import StepRecord

__all__ = ["Report"]


@dataclass
class Report:
    """Before and after of one compilation.

    Attributes:
        model: Name of the model's class.
        target: Runtime of the engine.
        precision: ``int8``, ``int8 (partly)`` or ``float32``: what the engine runs in.
        parameters: Number of parameters, before and after.
        macs: Multiply-accumulates for the example inputs, before and after.
        size: Bytes on disk of the float32 engine and of the result.
        latency: Of the float32 engine and of the result on the same runtime; empty when not measured.
        parity: Relative L2 error between engine and simulated graph, with the tolerance.
        accuracy: ``evaluate`` of the model and of the engine, with the floor; empty without ``evaluate``.
        memory: Peak resident memory of the compiling process, bytes.
        steps: One record per pass.
        left: Layers left in float32: name and reason.
        decisions: What the gates decided and why, in order.
        trials: With ``passes="auto"``: everything that was tried, with accuracy, latency, size and why it was dropped.
        notes: What else the user should know.
        seconds: Wall time by stage.
        environment: Versions and processor.
    """

    model: str
    target: str
    precision: str = "float32"
    parameters: tuple[int, int] = (0, 0)
    macs: tuple[int, int] = (0, 0)
    size: tuple[int, int] = (0, 0)
    latency: dict[str, Latency] = field(default_factory=dict)
    speedup: tuple[float, float, float] | None = None
    parity: dict[str, Any] = field(default_factory=dict)
    accuracy: dict[str, Any] = field(default_factory=dict)
    memory: int = 0
    steps: list[StepRecord] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)
    decisions: list[str] = field(default_factory=list)
    trials: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-ready."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self), default=str))
        return plain

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """Inverse of `to_dict`."""
        known = {f.name for f in dataclasses.fields(cls)}
        values = {k: v for k, v in data.items() if k in known}
        for name in ("parameters", "macs", "size"):
            values[name] = tuple(values.get(name, (0, 0)))
        speedup = values.get("speedup")
        values["speedup"] = None if speedup is None else tuple(speedup)
        values["latency"] = {k: Latency(**v) for k, v in values.get("latency", {}).items()}
        values["steps"] = [StepRecord(**s) for s in values.get("steps", [])]
        values["left"] = [tuple(x) for x in values.get("left", [])]
        return cls(**values)

    def __str__(self) -> str:
        """At most 12 lines: the table, what was left, the gates."""
        lines = [f"{self.model} -> {self.target} {self.precision}", f"{'':14}{'before':>14}{'after':>14}   change"]
        lines += self._accuracy_line() + self._size_line() + self._latency_line() + self._count_lines()
        lines += self._parity_line() + self._layers_line()
        lines += [f"{'gate':14}{d}" for d in self.decisions[-3:]]
        return "\n".join(line.rstrip() for line in lines[:12])

    def trials_table(self) -> str:
        """What ``passes="auto"`` tried, one line each; empty without it."""
        if not self.trials:
            return ""
        lines = [f"{'tried':58} {'engine':12} {'accuracy':>9} {'p50 ms':>8} {'MB':>8}  what became of it"]
        for row in self.trials:
            accuracy = "" if row["accuracy"] is None else f"{row['accuracy']:.4f}"
            latency = "" if row["latency_ms"] is None else f"{row['latency_ms']:.2f}"
            size = "" if row["size"] is None else f"{row['size'] / 1e6:.2f}"
            cells = f"{row['name']:58} {row['target']:12} {accuracy:>9} {latency:>8} {size:>8}"
            lines.append(f"{cells}  {row['verdict']}".rstrip())
        return "\n".join(lines)

    def _accuracy_line(self) -> list[str]:
        if not self.accuracy:
            return []
        before, after = self.accuracy["before"], self.accuracy["after"]
        floor = self.accuracy.get("max_drop")
        verdict = "" if floor is None else f"  (max drop {floor:g}: {'pass' if self.accuracy['passed'] else 'MISSED'})"
        return [f"{'accuracy':14}{before:>14.4f}{after:>14.4f}   {after - before:+.4f}{verdict}"]

    def _size_line(self) -> list[str]:
        before, after = self.size
        change = f"{before / after:.2f}x smaller" if after and before > after else ""
        return [f"{'size':14}{_megabytes(before):>14}{_megabytes(after):>14}   {change}"] if after else []

    def _latency_line(self) -> list[str]:
        if "before" not in self.latency or "after" not in self.latency:
            return []
        before, after = self.latency["before"], self.latency["after"]
        where = (
            f"{self.target}, {after.threads} threads, batch {after.batch}, n={after.runs}, IQR {after.iqr_ms:.2f} ms"
        )
        return [f"{'latency p50':14}{before.p50_ms:>11.2f} ms{after.p50_ms:>11.2f} ms   {self._speed_text()} ({where})"]

    def _speed_text(self) -> str:
        if self.speedup is None:
            return ""
        low, middle, high = self.speedup
        if low <= 1.0 <= high:
            return "no clear difference"
        return f"{middle:.2f}x faster" if middle > 1 else f"{1 / middle:.2f}x SLOWER"

    def _count_lines(self) -> list[str]:
        (p0, p1), (m0, m1) = self.parameters, self.macs
        same = p0 == p1 and m0 == m1
        rows = (("MACs", m0, m1), ("parameters", p0, p1))
        return [f"{name:14}{_short(a):>14}{'same' if same else _short(b):>14}" for name, a, b in rows]

    def _parity_line(self) -> list[str]:
        if not self.parity:
            return []
        return [
            f"{'parity':14}rel. L2 {self.parity['error']:.1e} to the simulated graph (tolerance {self.parity['tolerance']:.1e})"
        ]

    def _layers_line(self) -> list[str]:
        counted = [s for s in self.steps if "layers" in s.metrics]
        if not counted:
            return []
        left = f", {len(self.left)} left in float: {', '.join(n for n, _ in self.left[:2])}" if self.left else ""
        return [f"{'quantized':14}{counted[-1].metrics['layers']} layers{left}{' ...' if len(self.left) > 2 else ''}"]


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"


def _short(count: int) -> str:
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.2f}{suffix}"
    return str(count)
