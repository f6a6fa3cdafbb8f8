"""A fingerprint of everything that decides the machine code of a compile case, so that unchanged code is not compiled again."""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxcompress.kernels.epilogue_triton import CompileCase

__all__ = ["fingerprint"]


def fingerprint(case: CompileCase, sm: int) -> str:
    """Of the kernel's syntax tree and those it calls, the types, constants and options of the case, and the chip.

    Comments, docstrings, line numbers and formatting have no part in it; neither has the version of Triton.
    """
    digest = hashlib.sha256()
    for text in _sources(case.kernel, {}):
        digest.update(text.encode())
    facts = (
        *(sorted(case.signature.items()), sorted((k, str(v)) for k, v in case.constants.items())),
        *(case.num_warps, case.num_stages, sorted(case.unaligned), case.gluon, sm),
        *(case.weights, case.mma, case.budget, case.asynchronous),
    )
    digest.update(repr(facts).encode())
    return digest.hexdigest()[:16]


def _sources(kernel: Any, seen: dict[str, None]) -> Iterator[str]:
    """The syntax trees of a kernel and of the kernels and constants of the project it uses, in the order of their use."""
    plain = getattr(kernel, "fn", kernel)
    name = f"{plain.__module__}.{plain.__qualname__}"
    if name in seen:
        return
    seen[name] = None
    tree = ast.parse(textwrap.dedent(inspect.getsource(plain)))
    yield ast.dump(_bare(tree))
    for used, value in _used(tree, plain.__globals__).items():
        value = getattr(value, "value", value) if type(value).__name__ == "constexpr" else value
        if callable(getattr(value, "fn", None)):
            yield from _sources(value, seen)
        elif isinstance(value, (bool, int, float, str)):
            yield f"{used}={value!r}"


def _used(tree: ast.Module, names: Mapping[str, Any]) -> dict[str, Any]:
    """Globals that a function names, and what it names of the modules of this project, in the order of their use."""
    found: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in names:
            found.setdefault(node.id, names[node.id])
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = names.get(node.value.id)
            if inspect.ismodule(owner) and owner.__name__.startswith("fxcompress."):
                found.setdefault(f"{node.value.id}.{node.attr}", getattr(owner, node.attr))
    return found


def _bare(tree: ast.Module) -> ast.Module:
    """Without docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree
