"""The house plan as tests: who may import whom, what an import may cost, how long a file may be."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RUNTIMES = {
    "triton",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "onnx_ir",
    "openvino",
    "tensorrt",
    "tensorrt_rtx",
    "transformers",
}
HEAVY = RUNTIMES | {"nncf", "timm", "torchvision", "sklearn", "sentence_transformers"}

# A ranked module may import only what ranks lower or equal (equal ranks must not form a cycle).
RANKS = {"errors": 0, "ir": 1, "passbase": 2, "rewrite": 2, "pipeline": 3, "report": 3, "recipe": 3}


def project_files() -> list[Path]:
    """Files that git tracks or would track, as absolute paths; the links are left out."""
    listing = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listing, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        found = [ROOT / name for name in done.stdout.split("\0") if name]
    else:  # an unpacked source archive
        found = [path for path in ROOT.rglob("*") if not {".venv", "build"} & set(path.relative_to(ROOT).parts)]
    return sorted(path for path in found if path.is_file() and not path.is_symlink())


PYTHON_FILES = [path for path in project_files() if path.suffix == ".py"]


def module_name(path: Path) -> str:
    """``passes/fold.py`` -> ``fxcompress.passes.fold``, ``fxcompress/__init__.py`` -> ``fxcompress``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("fxcompress", *parts) if parts[0] in ("passes", "kernels") else parts
    return ".".join(part for part in parts if part != "__init__")


LIBRARY = {
    module_name(path): ast.parse(path.read_text(), filename=str(path))
    for path in PYTHON_FILES
    if path.relative_to(ROOT).parts[0] in ("fxcompress", "passes", "kernels")
}


def is_type_checking(node: ast.AST) -> bool:
    """True for ``if TYPE_CHECKING:``, whose imports never run."""
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def running_nodes(node: ast.AST, *, into_functions: bool) -> Iterator[ast.AST]:
    """The nodes below ``node`` that run: all of them, or only those that run at import time."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            continue
        if not into_functions and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        yield child
        yield from running_nodes(child, into_functions=into_functions)


def imports(tree: ast.AST, *, lazy: bool = True) -> set[str]:
    """Absolute names that ``tree`` imports; ``from a import b`` counts as ``a.b``, and as ``a`` if that is no module."""
    names: set[str] = set()
    for node in running_nodes(tree, into_functions=lazy):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            base = node.module or ""
            found = {f"{base}.{alias.name}" for alias in node.names}
            names |= found if found <= LIBRARY.keys() else found | {base}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return names


def own_imports(name: str, *, lazy: bool = True) -> set[str]:
    """Modules of this project that module ``name`` imports."""
    return {found for found in imports(LIBRARY[name], lazy=lazy) if found in LIBRARY and found != name}


def part(name: str) -> str:
    """Second part of a dotted name: ``fxcompress.engines.onnx`` -> ``engines``."""
    return name.partition(".")[2].partition(".")[0]


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


# ------------------------------------------------------------------------------------------------ import direction
def test_the_scan_sees_the_library() -> None:
    """Guards the other tests: an empty scan would pass them all."""
    assert {"fxcompress", "fxcompress.errors", "fxcompress.ir", "fxcompress.passes"} <= set(LIBRARY)
    assert "fxcompress.errors" in own_imports("fxcompress.ir")


@pytest.mark.parametrize("name", sorted(LIBRARY))
def test_import_direction(name: str) -> None:
    """errors <- ir <- passbase, rewrite <- pipeline, report, recipe; only the package and the CLI import api."""
    found = own_imports(name)
    rank = RANKS.get(part(name))
    if rank is not None:
        above = {other for other in found if RANKS.get(part(other), -1) > rank}
        assert not above, f"{name} imports {sorted(above)}, which stand above it"
    if name not in ("fxcompress", "fxcompress.__main__") and part(name) != "cli":
        assert "fxcompress.api" not in found, f"{name} imports fxcompress.api"


@pytest.mark.parametrize("name", sorted(LIBRARY))
def test_who_knows_passes_and_kernels(name: str) -> None:
    """Engines never import passes, passes reach kernels only as operators, kernels know only ops and errors."""
    found = {part(other) for other in own_imports(name)}
    if part(name) == "engines":
        assert "passes" not in found, f"engine {name} imports passes"
    if part(name) == "passes":
        assert "kernels" not in found, f"pass {name} imports a kernel: call torch.ops.fxcompress.* instead"
    if part(name) == "kernels":
        assert found <= {"ops", "errors", "kernels"}, f"kernel {name} imports {sorted(found)}"


def test_errors_stand_alone() -> None:
    assert not own_imports("fxcompress.errors")


def test_no_cycles_at_import_time() -> None:
    graph = {name: own_imports(name, lazy=False) - {"fxcompress"} for name in LIBRARY}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_passes_and_kernels_have_one_name() -> None:
    for name, tree in LIBRARY.items():
        tops = {found.split(".")[0] for found in imports(tree)}
        assert not tops & {"passes", "kernels"}, f"{name} imports passes or kernels by the bare name"


# ------------------------------------------------------------------------------------------------ cost of an import
@pytest.mark.parametrize("name", sorted(LIBRARY))
def test_no_heavy_import_at_module_level(name: str) -> None:
    allowed = {"triton"} if part(name) == "kernels" else set()  # @triton.jit needs it; ops imports kernels lazily
    found = {other.split(".")[0] for other in imports(LIBRARY[name], lazy=False)} & HEAVY
    assert found <= allowed, f"{name} imports {sorted(found - allowed)} at module level; import inside the function"


_PROBE = """
import sys, torch
before = set(sys.modules)
import fxcompress
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(new & set(sys.argv[1:])), torch.cuda.is_initialized())
"""


def test_importing_fxcompress_is_light() -> None:
    """No runtime is imported beyond what torch itself imports, and CUDA is not touched."""
    probe = [sys.executable, "-c", _PROBE, *sorted(HEAVY)]
    done = subprocess.run(probe, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[] False"


@pytest.mark.parametrize("name", ["passes", "kernels"])
def test_bare_names_do_not_hide_other_packages(name: str) -> None:
    """``import passes`` is refused; ``kernels`` stays free for the package that owns the name."""
    link = ROOT / "fxcompress" / name
    assert link.is_symlink() and link.readlink() == Path("..", name), f"fxcompress/{name} is not the link to ../{name}"
    if name == "kernels":
        assert not (ROOT / "kernels" / "__init__.py").exists()
        return
    probe = [sys.executable, "-c", "import passes"]
    done = subprocess.run(probe, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode != 0 and "import them as 'fxcompress.passes'" in done.stderr


# ------------------------------------------------------------------------------------------------ sizes and paths
@pytest.mark.parametrize("path", PYTHON_FILES, ids=label)
def test_file_length(path: Path) -> None:
    """A file stays under 400 lines, a pass under 200."""
    limit = 200 if path.parent == ROOT / "passes" else 400
    lines = len(path.read_text().splitlines())
    assert lines < limit, f"{label(path)} has {lines} lines, the limit is {limit}"


def test_no_absolute_paths_of_one_machine() -> None:
    pattern = re.compile(r"(?<![\w.~$}>-])/(?:work|root|home|Users|mnt)/\w")
    offenders = []
    for path in project_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        lines = enumerate(text.splitlines(), 1)
        offenders += [f"{label(path)}:{number}: {line.strip()}" for number, line in lines if pattern.search(line)]
    assert not offenders, "\n".join(offenders)


def test_ci_runs_the_readme_test_command() -> None:
    assert re.search(r"^exec make test$", (ROOT / ".ci" / "run").read_text(), flags=re.MULTILINE)
    assert re.search(r"^(\$ )?make test\b", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
