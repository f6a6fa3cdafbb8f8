"""Every operator of the lowering against torch eager: the cases of each table in one program, in each runtime."""

import pytest

from tests.helpers.lowering_cases import ENGINES, Case, alone, check, check_all
from tests.lowering import elementwise_cases, layers_cases, reductions_cases, shapes_cases

MODULES = (elementwise_cases, layers_cases, reductions_cases, shapes_cases)
TABLES = {name: cases for module in MODULES for name, cases in module.TABLES.items()}


def test_no_table_is_lost() -> None:
    """Two tables of one name would be one."""
    assert len(TABLES) == sum(len(module.TABLES) for module in MODULES) and all(TABLES.values())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("table", TABLES)
def test_table(table: str, engine: str) -> None:
    """Structure, dtypes, shapes and values, at two batch sizes; see `check_all`, which names the cases that differ."""
    check_all(TABLES[table], engine)


@pytest.mark.parametrize("found", alone([c for cases in TABLES.values() for c in cases]))
@pytest.mark.onnxruntime
def test_alone(found: Case) -> None:
    """Cases that cannot share a program; `check` compares as above."""
    check(found)
