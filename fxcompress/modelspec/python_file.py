"""``py:FILE.py:FACTORY``: the one form that runs the user's code."""

from __future__ import annotations

import difflib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from torch import nn

from fxcompress.errors import ModelSpecError
from fxcompress.modelspec.resolved import ResolvedModel

__all__ = ["from_python"]

_FORM = "write it as py:FILE.py:FACTORY"


def from_python(spec: str, rest: str) -> ResolvedModel:
    """The module that a factory of a Python file returns; a module-level ``nn.Module`` works too.

    Raises:
        ModelSpecError: no such file or function, the code fails (its line is named), or it returns something else.
    """
    file, _, name = rest.rpartition(":")
    path = Path(file or rest)
    if not path.is_file():
        raise ModelSpecError(3, f"there is no file {path}", where=spec, fix=_FORM)
    source = cast(ModuleType, _run_user_code(spec, lambda: _load_file(path)))
    factory = getattr(source, name, None) if file else None
    if not callable(factory):
        raise _no_factory(spec, path, name if file else "", source)
    made = factory if isinstance(factory, nn.Module) else _run_user_code(spec, cast(Callable[[], Any], factory))
    module, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, nn.Module):
        what = f"{name}() returned {type(made).__name__}"
        raise ModelSpecError(5, what, where=str(path), fix="return an nn.Module, or a pair (module, example_inputs)")
    args, kwargs = _as_example(example)
    return ResolvedModel(spec, "py", type(module).__name__, module, args, kwargs)


def _as_example(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A tensor, a tuple or list of positional inputs, or a dict of keyword inputs."""
    if isinstance(example, dict):
        return (), example
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    return (() if example is None else (example,)), {}


def _load_file(path: Path) -> ModuleType:
    """Import a file under a name of its own; its folder becomes importable, as for a script."""
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    name = f"_fxcompress_model_{path.stem}"
    loader_spec = importlib.util.spec_from_file_location(name, path)
    if loader_spec is None or loader_spec.loader is None:
        raise ImportError(f"{path} does not end in .py")
    module = importlib.util.module_from_spec(loader_spec)
    sys.modules[name] = module
    loader_spec.loader.exec_module(module)
    return module


def _run_user_code(spec: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except (Exception, SystemExit) as error:
        where = _failing_line(error)
        why = f"{type(error).__name__}: {error}"
        raise ModelSpecError(
            4, f"the code of {spec} fails", where=where, why=why, fix="mend it; it must run by itself"
        ) from error


def _failing_line(error: BaseException) -> str:
    """``file:line`` of the innermost frame below ours; a syntax error names its own."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<")]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames[-1].filename != __file__ else ""


def _no_factory(spec: str, path: Path, name: str, source: ModuleType) -> ModelSpecError:
    own = [n for n, v in vars(source).items() if callable(v) and getattr(v, "__module__", "") == source.__name__]
    near = difflib.get_close_matches(name, own, 1)
    choices = f"did you mean py:{path}:{near[0]}?" if near else f"it has: {', '.join(own) or 'no function at all'}"
    what = f"{path} has no function {name}" if name else f"which function of {path} builds the model?"
    return ModelSpecError(6, what, where=spec, fix=choices)
