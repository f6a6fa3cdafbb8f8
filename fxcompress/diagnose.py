"""Why a model cannot be captured: every obstacle at once, with the user's file and line."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import os
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._logging.structured import INTERN_TABLE
from torch.fx import Node
from torch.utils import _pytree as pytree

from fxcompress.ir import Program, source_line

__all__ = ["explain_difference", "explain_failure", "quiet", "register_dataclasses"]

_aten = torch.ops.aten
#: Python frames that are not the user's.
_FRAMEWORK = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(__file__) + os.sep)
_KINDS = {
    "DATA_DEPENDENT_ERROR": "depends on tensor values",
    "GUARD_ADDED": "fixes a size that was to be free",
    "MISSING_FAKE_KERNEL": "calls an operator without a shape function (torch.library.register_fake)",
    "MISMATCHED_FAKE_KERNEL": "calls an operator whose shape function is wrong",
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
    """The user's lines that stop capture, one obstacle a line.

    With ``model`` given, ``torch.export.draft_export`` goes on after each obstacle, so that all of them are listed.
    """
    found = _draft_obstacles(model, args, kwargs or {}) if model is not None else []
    raised_at = _user_frame(error)
    if raised_at and not any(line.startswith(raised_at.split(" ", 1)[0] + " ") for line in found):
        found.append(raised_at)
    return _JOIN.join(found)


def _user_frame(error: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if _is_users(f.filename)]
    return _line(frames[-1].filename, frames[-1].lineno, frames[-1].name, frames[-1].line) if frames else ""


def _is_users(filename: str) -> bool:
    return not filename.startswith(("<", *_FRAMEWORK))


def _line(filename: str, number: int | None, function: str, code: str | None) -> str:
    return f"{filename}:{number} in {function}: {code or ''}".rstrip(": ")


def _draft_obstacles(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    try:
        report: Any = torch.export.draft_export(model, args, kwargs)._report  # type: ignore[attr-defined]
    except Exception as error:  # noqa: BLE001 - the draft stops at a hard obstacle: that one is all there is to tell
        return [line for line in [_user_frame(error)] if line]
    files = {index: name for name, index in INTERN_TABLE.items()} | dict(report.str_to_filename)
    found: dict[str, None] = {}
    for failure in report.failures:
        kind = failure.failure_type.name
        where = _failure_line(failure.data, files) or str(failure.data.get("op") or "unknown line")
        found[f"{where} - {_KINDS.get(kind, kind.lower().replace('_', ' '))}"] = None
    return list(found)


def _failure_line(data: dict[str, Any], files: dict[int, str]) -> str:
    for frame in reversed(list(data.get("user_stack") or data.get("stack") or [])):
        name = files.get(frame["filename"], str(frame["filename"]))
        if _is_users(name):
            return _line(name, frame["line"], frame["name"], frame.get("loc"))
    return ""


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
    """Silence what torch logs, warns and prints about failed attempts: capture tells it in its own words."""
    loggers = [
        v for k, v in logging.root.manager.loggerDict.items() if isinstance(v, logging.Logger) and _is_noise(k, v)
    ]
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.disabled = True
        try:
            yield
        finally:
            for logger in loggers:
                logger.disabled = False


def _is_noise(name: str, logger: logging.Logger) -> bool:
    """``torch.__trace`` is no noise: ``draft_export`` reads its findings from there."""
    return name.startswith("torch") and name != "torch.__trace" and not logger.disabled
