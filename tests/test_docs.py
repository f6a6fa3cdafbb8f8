"""The documentation says what the committed measurements say, and names only files that exist."""

import re
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import kernel_tables, tables

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
