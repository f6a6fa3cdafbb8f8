"""``fxcompress env``: what is installed here, and the pip line for what is missing."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from fxcompress.cli import console

__all__ = ["env"]


def env(json_output: console.JsonOption = False, quiet: console.QuietOption = False) -> None:
    """Show versions, processor, GPU and what is missing."""
    console.setup(json_output=json_output, quiet=quiet)
    from fxcompress.environment import describe

    facts = describe()
    console.emit(facts)
    console.show(_table(facts))


def _table(facts: dict[str, Any]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    machine = {
        "fxcompress": facts["fxcompress"] or "not installed: runs from a checkout",
        "python": facts["python"],
        "system": facts["system"],
        "processor": f"{facts['processor']}, {facts['cores']} cores",
        "cpu flags": " ".join(facts["cpu_flags"]) or "none that matter for INT8",
        "memory": console.size_text(facts["memory"]),
        "gpu": ", ".join(facts["gpu"]) or "none",
    }
    for name, value in machine.items():
        table.add_row(name, value)
    for name, version in facts["packages"].items():
        table.add_row(name, version or "not installed")
    for engine, pip_line in facts["missing"].items():
        table.add_row(f"for {engine}", pip_line)
    return table
