"""The documentation says what the committed measurements say, and names only files that exist."""

import argparse
import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fxcompress as fxc
from benchmarks import harness, kernel_tables, tables

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md"])


@pytest.mark.parametrize("module", [tables, kernel_tables], ids=["benchmarks", "kernels"])
def test_tables_are_those_of_the_result_files(module: ModuleType) -> None:
    """After a new measurement: ``python -m benchmarks.tables``."""
    page = module.PAGE.read_text(encoding="utf-8")
    asked = re.findall(r"<!-- table ([a-z0-9_ ]+) -->", page)
    assert set(asked) == set(module.TABLES) and page.count("<!-- end -->") == len(asked)
    assert tables.filled(page) == page


def test_a_changed_table_is_noticed() -> None:
    """Guards the test above: a figure typed by hand does not survive."""
    page = tables.PAGE.read_text(encoding="utf-8")
    assert tables.filled(page.replace("| fxcompress", "| somebody else", 1)) == page


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.name)
def test_links_and_named_files_exist(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [t for t in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in t]
    named = re.findall(r"`((?:docs|benchmarks|tests|examples|passes|fxcompress)/[\w./]*)`", text)
    missing = [t for t in links if not (path.parent / t).exists()] + [n for n in named if not (ROOT / n).exists()]
    assert not missing


def calls(text: str) -> Iterator[tuple[Any, ast.Call, str]]:
    """Calls of ``fxc.name(...)`` in the Python blocks of a page: what is called, the call, its source."""
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("fxc."):
                found: Any = fxc
                for name in ast.unparse(node.func).split(".")[1:]:
                    if not re.fullmatch(r"\w+", name):  # a call in a chain of calls
                        break
                    found = getattr(found, name)
                else:
                    yield found, node, ast.unparse(node)


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.name)
def test_examples_call_what_there_is(path: Path) -> None:
    """Names exist and arguments are taken; README's blocks are run by a test of their own."""
    for function, call, source in calls(path.read_text(encoding="utf-8")):
        given = {k.arg: None for k in call.keywords if k.arg is not None}
        places = [None for a in call.args if not isinstance(a, ast.Starred)]
        try:
            inspect.signature(function).bind_partial(*places, **given)
        except TypeError as error:
            pytest.fail(f"{path.name}: {source}: {error}")


def test_a_wrong_example_is_noticed() -> None:
    ((function, call, _),) = calls('```python\nfxc.compile(model, target="torch", colour="red")\n```')
    assert function is fxc.compile and [k.arg for k in call.keywords] == ["target", "colour"]
    with pytest.raises(AttributeError):
        list(calls("```python\nfxc.decompile(model)\n```"))
    with pytest.raises(TypeError, match="colour"):
        inspect.signature(fxc.compile).bind_partial(None, colour=None)


def test_rows_of_an_interrupted_run_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--resume``: with the same settings, without rows that failed, and only when asked for."""
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    options = argparse.Namespace(quick=False, peers_only=False, threads=1, resume=True)
    settings: dict[str, harness.Json] = {"samples": 2}
    assert harness.known("claim", settings, options) == {}
    harness.write("claim", {"a": {"s": 1.0}, "b": {"error": "no"}}, settings, options)
    assert harness.known("claim", settings, options) == {"a": {"s": 1.0}}
    assert harness.known("claim", {"samples": 3}, options) == {}
    assert harness.known("claim", settings, argparse.Namespace(**vars(options) | {"resume": False})) == {}
    assert harness.known("claim", settings, argparse.Namespace(**vars(options) | {"quick": True})) == {}
