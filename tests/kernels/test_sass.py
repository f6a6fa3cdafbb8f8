"""The machine code of the shipped configurations, and that the lint which judges it can fail."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.sass import Report, inspect, loops, main_loop, parse

ROOT = Path(__file__).resolve().parents[2]
#: Cases of a family that are compiled for a chip here. All of them stand in the lint's result file, which is checked too.
MOST = {80: 4, 90: 3, 100: 2}


def run(*options: str) -> subprocess.CompletedProcess[str]:
    """`benchmarks.kernel_lint` in a process where Triton compiles (here it may interpret)."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.kernel_lint", *options]
    return subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, check=False)


def lint(folder: Path, *options: str) -> dict[str, Any]:
    """The rows it writes."""
    out = folder / "rows.json"
    done = run("--json", str(out), *options)
    assert out.exists(), done.stderr
    (rows,) = json.loads(out.read_text())["results"].values()
    assert done.returncode == int(any(row["problems"] for row in rows.values()))
    return dict(rows)


@pytest.mark.triton
@pytest.mark.slow
@pytest.mark.parametrize("sm", sorted(MOST))
def test_code_of_the_shipped_configurations(sm: int, tmp_path: Path) -> None:
    rows = lint(tmp_path, "--sm", str(sm), "--most", str(MOST[sm]))
    assert {name: row["problems"] for name, row in rows.items() if row["problems"]} == {}
    assert len({row["family"] for row in rows.values()}) >= 7 and all(row["sm"] == sm for row in rows.values())


@pytest.mark.triton
def test_the_result_file_is_that_of_the_kernels() -> None:
    """After a change of a kernel or a heuristic: ``make kernels-lint``."""
    content = json.loads((ROOT / "benchmarks" / "results" / "kernel_lint.json").read_text())
    newest, *older = content["results"].values()
    assert {name: row["problems"] for name, row in newest.items() if row["problems"]} == {}
    for rows in older:  # slower code is told in docs/kernels.md, wrong code is nowhere
        found = [p for row in rows.values() for p in row["problems"]]
        assert [p for p in found if " per weight, " not in p and " of local memory" not in p] == []
    done = run("--check")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.triton
def test_the_lint_finds_what_is_wrong(tmp_path: Path) -> None:
    rows = lint(tmp_path, "--sm", "80", "--families", "tests.kernels.toy_kernels")
    found = {name.removeprefix("sm_80 "): row["problems"] for name, row in rows.items()}
    assert found.pop("right") == []
    assert "same code under another name" not in found
    expected = {
        "integers converted": ("I2F in the loop",),
        "one warp": ("loads and stores of local memory",),
        "unaligned": ("no asynchronous 16-byte copy",),
        "deep": ("of shared memory, the limit is 166912",),
        "tight budget": ("instructions per weight, the budget is 1",),
        "wrong unit": ("not IMMA",),
        "no products": ("no tensor core instruction in the loop, HMMA expected",),
        "odd block": ("does not compile",),
    }
    assert found.keys() == expected.keys()
    for name, words in expected.items():
        assert len(found[name]) == len(words) and all(w in p for w, p in zip(words, found[name], strict=True)), found[
            name
        ]


SASS = """
.text.kernel:
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;
.L_x_1:
        /*0010*/              @!P0 LDGSTS.E.BYPASS.LTC128B.128 [R3], [R4.64], P2 ;
        /*0020*/                   LDGSTS.E.64 [R3+0x400], [R4.64] ;
.L_x_0:
        /*0030*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0040*/                   I2FP.F32.S32 R9, R9 ;
        /*0050*/              @!P1 BRA `(.L_x_4) ;
.L_x_3:
        /*0060*/              @P0  BRA `(.L_x_0) ;
        /*0070*/                   STL [R1], R4 ;
        /*0080*/              @UP0 BRA `(.L_x_1) ;
        /*0090*/                   EXIT ;
.L_x_4:
        /*00a0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R2] ;
        /*00b0*/                   BRA `(.L_x_3) ;
.L_x_5:
        /*00c0*/                   BRA `(.L_x_5);
"""


def test_parse_and_loops() -> None:
    code = parse(SASS)
    assert [i.base for i in code[:4]] == ["IMAD", "LDGSTS", "LDGSTS", "HMMA"] and len(code) == 13
    assert code[6].target == 3 and code[5].target == 10 and code[0].target is None
    assert loops(code) == [(1, 8), (3, 6), (12, 12)], "the way back from a wait behind the end is no loop"
    assert [i.base for i in main_loop(code)] == ["HMMA", "I2FP", "BRA", "BRA"]


def test_inspect_counts_the_inner_loop() -> None:
    report = inspect(SASS, 80, lanes=128, weights=256, registers=40, stack=8, shared=1024)
    assert report.instructions == 4 and report.per_weight == 4 * 128 / 256
    assert report.mma == {"HMMA.16816.F32": 1} and report.conversions == 1 and report.spills == 1
    assert (report.copies, report.narrow_copies) == (0, 0), "the copies stand in the outer loop"
    flat = inspect(SASS.replace("HMMA.16816.F32", "FFMA"), 80, lanes=32)
    assert flat.mma == {} and flat.per_weight is None and flat.instructions == 4
    straight = inspect(SASS.replace("BRA", "NOP"), 80, lanes=32)
    assert not straight.loops and straight.instructions == 13 and (straight.copies, straight.narrow_copies) == (1, 1)


def test_a_report_is_plain_json() -> None:
    report = inspect(SASS, 90, lanes=32)
    assert report == Report.from_dict(json.loads(json.dumps(report.to_dict() | {"more": 1})))
