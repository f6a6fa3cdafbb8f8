"""Why a model cannot be captured: every obstacle at once, with the user's file and line."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import linecache
import logging
import os
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._logging.structured import INTERN_TABLE
from torch.fx import Node
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from fxcompress.ir import Program, source_line

__all__ = ["explain_difference", "explain_failure", "quiet", "register_dataclasses"]

_aten = torch.ops.aten
#: Python frames that are not the user's.
_FRAMEWORK = tuple(os.path.dirname(file) + os.sep for file in (torch.__file__, np.__file__, __file__))
#: What ``draft_export`` logs -> what it means to the user.
_KINDS = {
    "propagate_real_tensors_provenance": "depends on tensor values",
    "missing_fake_kernel": "calls an operator without a shape function (torch.library.register_fake)",
    "mismatched_fake_kernel": "calls an operator whose shape function is wrong",
}
_TRACE = "torch.__trace"
_NUMBER, _NUMPY = "makes a Python number of tensor values", "hands tensor values to NumPy"
#: Tensor methods that hand values to Python.
_READS = {
    "__bool__": "depends on tensor values",
    "__contains__": "depends on tensor values",
    **dict.fromkeys(("item", "tolist", "__int__", "__float__", "__index__", "__complex__"), _NUMBER),
    **dict.fromkeys(("numpy", "__array__"), _NUMPY),
}
_JOIN = "\n         "


def register_dataclasses(tree: Any) -> None:
    """Make plain dataclasses among a model's inputs and outputs known to torch.export, nested ones included."""
    for leaf in pytree.tree_leaves(tree):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            torch.export.register_dataclass(type(leaf))
            register_dataclasses([getattr(leaf, f.name) for f in dataclasses.fields(leaf)])


def explain_failure(
    error: BaseException,
    model: nn.Module | None = None,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
) -> str:
    """The user's lines that stop capture, one obstacle a line, in the order they run.

    With ``model`` given, ``torch.export.draft_export`` goes on after each branch on values. It stops where values leave
    torch for good (``.numpy()``): then one run of the model itself names every line that reads values.
    """
    found: dict[str, str] = {}
    reads: dict[str, str] = {}
    if model is not None:
        found, is_complete = _draft_obstacles(model, args, kwargs or {})
        reads = _value_reads(model, args, kwargs or {})
        found |= {line: how for line, how in reads.items() if line in found or not is_complete}
    raised_at = _user_frame(error)
    if raised_at:
        found.setdefault(raised_at, "")
    order = list(reads)
    lines = sorted(found, key=lambda line: order.index(line) if line in reads else len(order))
    return _JOIN.join(f"{line} - {found[line]}" if found[line] else line for line in lines)


def _user_frame(error: BaseException) -> str:
    return _last_users(traceback.extract_tb(error.__traceback__))


def _last_users(stack: traceback.StackSummary) -> str:
    frames = [f for f in stack if _is_users(f.filename)]
    return _line(frames[-1].filename, frames[-1].lineno, frames[-1].name, frames[-1].line) if frames else ""


def _is_users(filename: str) -> bool:
    return not filename.startswith(("<", *_FRAMEWORK))


def _line(filename: str, number: int | None, function: str, code: str | None) -> str:
    return f"{filename}:{number} in {function}: {code or ''}".rstrip(": ")


class _Findings(logging.Handler):
    """What ``draft_export`` logs on its way, kept also when it stops."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, Any]]] = []
        self.files = {index: name for name, index in INTERN_TABLE.items()}

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one record."""
        metadata: dict[str, Any] = getattr(record, "metadata", {})
        if "str" in metadata:
            name, index = metadata["str"]
            self.files[index] = name
        self.found += [(kind, metadata[kind]) for kind in _KINDS if kind in metadata]


def _draft_obstacles(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, str], bool]:
    """Line -> kind of each obstacle the draft came across, and whether it came to the end of forward."""
    findings, logger = _Findings(), logging.getLogger(_TRACE)
    logger.addHandler(findings)
    stopped_at = ""
    try:
        torch.export.draft_export(model, args, kwargs)
        is_complete = True
    except Exception as error:  # noqa: BLE001 - the draft stops at a hard obstacle, which is one to tell
        stopped_at, is_complete = _user_frame(error), False
    finally:
        logger.removeHandler(findings)
    found = {}
    for kind, data in findings.found:
        line = _recorded_line(data, findings.files) or str(data.get("op") or "unknown line")
        found[line] = _KINDS[kind]
    if stopped_at:
        found.setdefault(stopped_at, "")
    return found, is_complete


def _recorded_line(data: dict[str, Any], files: dict[int, str]) -> str:
    for frame in reversed(list(data.get("user_stack") or data.get("stack") or [])):
        name = files.get(frame["filename"], str(frame["filename"]))
        if _is_users(name):
            return _line(name, frame["line"], frame["name"], linecache.getline(name, frame["line"]).strip())
    return ""


def _value_reads(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, str]:
    """Line -> how it reads values of tensors that are no constants, in the order of one run of the model."""
    args, kwargs = pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, (args, kwargs))
    reads = _ValueReads()
    try:
        with reads:
            model(*args, **kwargs)
    except Exception:  # noqa: BLE001 - the run is for its findings; that the model works was seen before
        return reads.found
    return reads.found


class _ValueReads(TorchFunctionMode):
    """Notes where tensor values go to Python; those of constants, made by operators without inputs, may."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self._constants = WeakIdKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` and note what it reads."""
        kwargs = kwargs or {}
        constant = all(v in self._constants for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor))
        how = None if constant else _READS.get(getattr(func, "__name__", ""))
        frame = _last_users(traceback.extract_stack()) if how else None
        if how and frame:
            self.found.setdefault(frame, how)
        result = func(*args, **kwargs)
        for value in pytree.tree_leaves(result) if constant else []:
            if isinstance(value, Tensor):
                self._constants[value] = True
        return result


def explain_difference(program: Program) -> tuple[str, str]:
    """Where and why a model gives other numbers each time: its random operators, else its state."""
    random = [n for n in program.graph.nodes if _is_random(n)]
    if random:
        lines = dict.fromkeys(f"{source_line(n) or n.name}: {n.target}" for n in random)
        return _JOIN.join(lines), "random operators run in eval mode"
    return "", "forward keeps state between calls, in attributes or buffers"


def _is_random(node: Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    if node.target is _aten.scaled_dot_product_attention.default:
        return bool(node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0))
    return True


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what torch logs, warns and prints about failed attempts: capture tells it in its own words.

    ``torch.__trace`` goes on: ``draft_export`` reads its findings from there.
    """
    root = logging.getLogger("torch")
    known = logging.root.manager.loggerDict
    loggers = [v for k, v in known.items() if k.startswith("torch.") and k != _TRACE and isinstance(v, logging.Logger)]
    before = [(v, v.handlers, v.propagate) for v in [root, *loggers]]
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger, _, _ in before:  # loggers that are made meanwhile hand their records up to these
            logger.handlers, logger.propagate = [logging.NullHandler()], False
        try:
            yield
        finally:
            for logger, handlers, propagate in before:
                logger.handlers, logger.propagate = handlers, propagate
