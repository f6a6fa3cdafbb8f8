"""Golden graphs: what a pass makes of a small model, as text. ``FXC_UPDATE_GOLDEN=1 pytest`` writes them anew."""

from __future__ import annotations

import os
from pathlib import Path

from fxcompress.ir import Program
from fxcompress.passbase import Result

FOLDER = Path(__file__).resolve().parent.parent / "golden"
UPDATE = "FXC_UPDATE_GOLDEN"


def check_golden(name: str, before: Program, result: Result) -> None:
    """Compare ``<name>.before.txt`` and ``<name>.after.txt``; the latter ends with what was changed and refused."""
    changes = [f"# changed: {line}\n" for line in result.changes]
    refusals = [f"# refused: {r.rule}: {r.reason}\n" for r in result.refusals]
    _check(f"{name}.before.txt", before.text())
    _check(f"{name}.after.txt", result.program.text() + "".join(changes + refusals))


def _check(name: str, text: str) -> None:
    path = FOLDER / name
    if os.environ.get(UPDATE):
        FOLDER.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.exists(), f"{path} is missing: run with {UPDATE}=1 and look at what it writes"
    assert text == path.read_text(encoding="utf-8"), f"{name} differs; when that is right, run with {UPDATE}=1"
