"""Is the machine code of every kernel configuration what it should be? Compiled for GPUs that need not be here.

    python -m benchmarks.kernel_lint                       writes benchmarks/results/kernel_lint.json
    python -m benchmarks.kernel_lint --triton 3.6 3.7 3.8  the same for other versions of Triton, beside the installed one
    python -m benchmarks.kernel_lint --sm 80 --json FILE   one chip, to a file of your own
    python -m benchmarks.kernel_lint --check               compiles nothing: does the file describe the kernels as they are?

Rows whose kernel, configuration and Triton are unchanged are taken from the file. The exit code is 1 when a configuration
has a problem. What counts as one: `benchmarks.sass.problems`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks.harness import RESULTS, environment
from benchmarks.kernel_code import fingerprint
from benchmarks.sass import Report, compile_case, problems

if TYPE_CHECKING:
    from fxcompress.kernels.epilogue_triton import CompileCase

__all__ = ["cases_of", "lint", "main"]

CHIPS: Final = (80, 90, 100)
ROOT: Final = Path(__file__).resolve().parent.parent
_TOP: Final = 8  # names of the histogram that are written down


def cases_of(sm: int, families: Sequence[str] = ()) -> list[CompileCase]:
    """The compile cases of every kernel module for a chip, each piece of code once.

    Args:
        sm: Compute capability times ten.
        families: Modules to look at: of the library (``w4a16``), or any by its full name; the library's by default.
    """
    from fxcompress.ops import KERNEL_MODULES

    own = {name.rpartition(".")[2]: f"{name}_triton" for name in KERNEL_MODULES}
    found: dict[tuple[Any, ...], CompileCase] = {}
    for name in families or own:
        for case in importlib.import_module(own.get(name, name)).compile_cases(sm):
            found.setdefault(_code_key(case), case)
    return list(found.values())


def _code_key(case: CompileCase) -> tuple[Any, ...]:
    kernel: Any = case.kernel
    plain = (sorted(case.signature.items()), sorted((k, str(v)) for k, v in case.constants.items()), case.unaligned)
    return (kernel.__module__, kernel.__name__, case.num_warps, case.num_stages, repr(plain))


def thinned(cases: Sequence[CompileCase], most: int) -> list[CompileCase]:
    """At most ``most`` of the cases of every family, evenly spread over its list; all of them for 0."""
    if not most:
        return list(cases)
    kept: list[CompileCase] = []
    for family in dict.fromkeys(case.family for case in cases):
        own = [case for case in cases if case.family == family]
        count = min(most, len(own))
        kept += [own[place * len(own) // count] for place in range(count)]
    return kept


def lint(
    sm: int, families: Sequence[str] = (), most: int = 0, known: Mapping[str, dict[str, Any]] | None = None
) -> dict[str, dict[str, Any]]:
    """Compile and judge: name of the case -> what was found; ``problems`` is empty where all is well.

    Args:
        sm: Compute capability times ten.
        families: As in `cases_of`.
        most: As in `thinned`.
        known: Earlier rows by name; what has not changed since is not compiled again.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name, case in _named(sm, families, most).items():
        code = fingerprint(case, sm)
        earlier = (known or {}).get(name, {})
        if earlier.get("code") == code and "instructions" in earlier:
            rows[name] = earlier | {"problems": problems(case, Report.from_dict(earlier))}
        else:
            rows[name] = _row(case, sm) | {"code": code}
        if rows[name]["problems"]:
            print(f"{name}: {'; '.join(rows[name]['problems'])}", file=sys.stderr)
    return rows


def _named(sm: int, families: Sequence[str], most: int = 0) -> dict[str, CompileCase]:
    """The cases by name; those that share one get the warps and stages, and if need be a number, behind it."""
    found = thinned(cases_of(sm, families), most)
    shared = Counter(case.name for case in found)
    named: dict[str, CompileCase] = {}
    for case in found:
        name = f"sm_{sm} {case.name}"
        if shared[case.name] > 1:
            name += f" {case.num_warps} warps {case.num_stages} stages"
        same = sum(taken == name or taken.startswith(f"{name} (") for taken in named)
        named[f"{name} ({same + 1})" if same else name] = case
    return named


def stale(rows: Mapping[str, Mapping[str, Any]], chips: Sequence[int], families: Sequence[str] = ()) -> list[str]:
    """What of the result file no longer fits: cases it lacks, cases whose code has changed, cases that are gone."""
    now = {name: fingerprint(case, sm) for sm in chips for name, case in _named(sm, families).items()}
    found = [f"{name}: not compiled yet" for name in now if name not in rows]
    found += [f"{name}: changed" for name, code in now.items() if name in rows and rows[name].get("code") != code]
    return found + [f"{name}: gone" for name in rows if name not in now]


def _row(case: CompileCase, sm: int) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "family": case.family,
        "sm": sm,
        "warps": case.num_warps,
        "stages": case.num_stages,
        "budget": case.budget,
    }
    facts["constants"] = {k: v for k, v in case.constants.items() if isinstance(v, (bool, int, str))}
    try:
        report = compile_case(case, sm)
    except Exception as error:  # noqa: BLE001 - a compiler raises what it likes, and that is the finding
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return facts | {
            "problems": [f"does not compile: {type(error).__name__}: {(lines or ['no message'])[-1][:300]}"]
        }
    content = report.to_dict()
    content["histogram"] = dict(list(content["histogram"].items())[:_TOP])
    return facts | content | {"problems": problems(case, report)}


# ------------------------------------------------------------------------------------------------ versions of Triton
@contextlib.contextmanager
def _installed(version: str) -> Iterator[Path]:
    """A folder with that version of Triton: a path that exists already, else installed for as long as it is needed."""
    if Path(version).is_dir():
        yield Path(version)
        return
    with tempfile.TemporaryDirectory(prefix=f"triton-{version}-") as folder:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        wanted = version if version.count(".") > 1 else f"{version}.*"
        subprocess.run([*pip, "--target", folder, f"triton=={wanted}"], check=True)
        yield Path(folder)


def _with_version(version: str, options: argparse.Namespace) -> dict[str, Any]:
    """The lint in a process that imports another Triton."""
    with _installed(version) as folder, tempfile.TemporaryDirectory(prefix="fxc-lint-") as scratch:
        out = Path(scratch) / "rows.json"
        command = [sys.executable, "-m", "benchmarks.kernel_lint", "--json", str(out), "--most", str(options.most)]
        command += ["--known", str(options.json)] if options.json.exists() else []
        command += ["--sm", *map(str, options.sm), *(["--families", *options.families] if options.families else [])]
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
        variables.pop("TRITON_INTERPRET", None)
        done = subprocess.run(command, env=variables, cwd=ROOT)
        if not out.exists():
            raise SystemExit(f"the lint with Triton {version} ended with exit code {done.returncode}")
        content: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return dict(content["results"])


def _own(options: argparse.Namespace) -> dict[str, Any]:
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    import triton

    rows: dict[str, Any] = {}
    known = _known(options.known or options.json).get(triton.__version__, {})
    for sm in options.sm:
        rows |= lint(sm, options.families, options.most, known)
    return {triton.__version__: rows}


def _known(path: Path) -> dict[str, Any]:
    """The rows of a result file by version of Triton; none where there is no file."""
    return dict(json.loads(path.read_text(encoding="utf-8"))["results"]) if path.exists() else {}


def _check(options: argparse.Namespace) -> int:
    """Says what `stale` finds in the rows of the first version of Triton."""
    every = _known(options.json)
    rows: dict[str, Any] = next(iter(every.values()), {})
    trouble = stale(rows, options.sm, options.families)
    print("\n".join(trouble) if trouble else f"{len(rows)} configurations, as they are: {options.json}")
    return int(bool(trouble))


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernel_lint", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--sm", type=int, nargs="+", default=list(CHIPS), help="compute capabilities times ten")
    parser.add_argument("--families", nargs="+", default=[], help="kernel modules, e.g. w4a16; default: all")
    parser.add_argument("--most", type=int, default=0, help="cases of a family at most, spread over its list; 0: all")
    parser.add_argument("--triton", nargs="+", default=[], help="further versions (3.6) or folders that hold one")
    parser.add_argument("--json", type=Path, default=RESULTS / "kernel_lint.json", help="file to write")
    parser.add_argument("--known", type=Path, help="file whose unchanged rows are kept; default: the one to write")
    parser.add_argument("--check", action="store_true", help="only say whether the file is up to date")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the lint; returns the number of the exit code."""
    options = _parsed(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("kernels cannot be compiled while TRITON_INTERPRET=1 is set")
    if options.check:
        return _check(options)
    results = _own(options)
    _write(results, options)
    for version in options.triton:
        results |= _with_version(version, options)
        _write(results, options)
    rows = [row for found in results.values() for row in found.values()]
    bad = sum(bool(row["problems"]) for row in rows)
    print(f"{len(rows)} configurations, {bad} with problems: {options.json}")
    return int(bad > 0)


def _write(results: Mapping[str, Mapping[str, Any]], options: argparse.Namespace) -> None:
    """Replaces the file; what this run does not look at stays in it."""
    known = _known(options.json)
    if options.families or options.most or set(options.sm) != set(CHIPS):
        results = {version: known.get(version, {}) | dict(rows) for version, rows in results.items()}
    everything = {**results, **{version: rows for version, rows in known.items() if version not in results}}
    settings = {"sm": options.sm, "families": options.families, "most": options.most}
    content = {"claim": "kernel_lint", "environment": environment(1), "settings": settings, "results": everything}
    part = options.json.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(part, options.json)


if __name__ == "__main__":
    sys.exit(main())
