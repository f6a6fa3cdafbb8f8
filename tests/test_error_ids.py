"""Every error id means one thing: it is raised with one message only."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from fxcompress import errors

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = {
    name: kind.family
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.FxcError)
}


def raised(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """The errors that a file makes: class name and call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FAMILIES:
            yield node.func.id, node


def uses(files: dict[str, ast.AST]) -> dict[str, dict[str, str]]:
    """Id -> message, as written -> the first place that raises it."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for name, tree in files.items():
        for kind, call in raised(tree):
            number, what = call.args[:2]
            assert isinstance(number, ast.Constant) and isinstance(number.value, int), (
                f"{name}:{call.lineno}: no fixed id"
            )
            found[f"{FAMILIES[kind]}-{number.value:03d}"].setdefault(ast.unparse(what), f"{name}:{call.lineno}")
    return found


def library() -> dict[str, ast.AST]:
    paths = [*(ROOT / "fxcompress").rglob("*.py"), *(ROOT / "passes").glob("*.py"), *(ROOT / "kernels").glob("*.py")]
    own = {p.resolve() for p in paths}
    return {str(p.relative_to(ROOT)): ast.parse(p.read_text(encoding="utf-8")) for p in sorted(own)}


def test_an_id_has_one_message() -> None:
    found = uses(library())
    assert len(found) > 100
    clashes = {id_: places for id_, places in found.items() if len(places) > 1}
    assert not clashes


def test_the_scan_sees_a_clash() -> None:
    code = "raise UsageError(1, 'a')\nraise UsageError(1, f'b {x}')\nraise PassError(1, 'a')"
    assert uses({"file.py": ast.parse(code)})["USAGE-001"] == {"'a'": "file.py:1", "f'b {x}'": "file.py:2"}
    with pytest.raises(AssertionError, match="no fixed id"):
        uses({"file.py": ast.parse("raise UsageError(number, 'a')")})


def test_families_differ() -> None:
    assert len(set(FAMILIES.values())) == len(FAMILIES)
