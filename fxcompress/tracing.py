"""The second strategy: symbolic tracing, for what stops ``torch.export`` but computes nothing.

Export runs forward on fake tensors and stops where Python asks for a value. Code that only checks its input
(``assert (x >= 0).all()``, ``if x.isnan().any(): raise ...``) asks, but the result of forward does not depend on it: here
such checks are passed over, and named.
"""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
import os
from types import FrameType
from typing import Any, cast

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Proxy, Tracer
from torch.utils import _pytree as pytree

from fxcompress.preserve import preserving

__all__ = ["plain_outputs", "symbolic_trace"]

_TORCH = os.path.dirname(torch.__file__) + os.sep


def symbolic_trace(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[GraphModule, list[str]]:
    """Trace ``model`` on proxies; what forward leaves in the model is taken out again.

    Args:
        model: The model.
        args: Example positional inputs; those that hold no tensor are fixed.
        kwargs: Example keyword inputs.

    Returns:
        A module that runs the traced operators, and the ``file:line`` of each check that was passed over.
    """
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    fixed = {
        name: value for name, value in bound.arguments.items() if isinstance(value, (int, float, str, bool, type(None)))
    }
    tracer = _Tracer()
    with preserving(model):
        graph = tracer.trace(model, fixed)
    return GraphModule(model, graph, type(model).__name__), list(dict.fromkeys(tracer.passed_over))


def plain_outputs(exported: ExportedProgram) -> ExportedProgram:
    """The program with lists and dicts in its output where tracing left immutable ones."""
    signature = cast(Any, exported.module_call_graph[0].signature)
    spec = signature.out_spec
    signature.out_spec = pytree.tree_structure(_plain(pytree.tree_unflatten(range(spec.num_leaves), spec)))
    return exported


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return tuple(map(_plain, value)) if type(value) is tuple else value


class _Tracer(Tracer):
    def __init__(self) -> None:
        super().__init__()
        self.record_stack_traces = True
        self.passed_over: list[str] = []

    def to_bool(self, obj: Proxy) -> bool:
        """The outcome of a check that lets forward go on; an error for any other branch."""
        frame = _user_frame(inspect.currentframe())
        outcome = None if frame is None else _passing_outcome(frame.f_code.co_filename, frame.f_lineno)
        if frame is None or outcome is None:
            return bool(super().to_bool(obj))
        self.passed_over.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return outcome


def _user_frame(frame: FrameType | None) -> FrameType | None:
    while frame is not None and (frame.f_code.co_filename.startswith(_TORCH) or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    return frame


def _passing_outcome(filename: str, line: int) -> bool | None:
    """What the condition on that line must be for forward to go on; None when it is no mere check."""
    for node in _checks(filename):
        if node.lineno <= line <= (node.test.end_lineno or node.lineno):
            negated = isinstance(node.test, ast.UnaryOp) and isinstance(node.test.op, ast.Not)
            return isinstance(node, ast.Assert) != negated
    return None


@functools.lru_cache(maxsize=64)
def _checks(filename: str) -> tuple[ast.Assert | ast.If, ...]:
    """Asserts, and ifs that do nothing but raise; a condition out of several is left out."""
    try:
        tree = ast.parse("".join(linecache.getlines(filename)))
    except SyntaxError:
        return ()
    found = [n for n in ast.walk(tree) if isinstance(n, (ast.Assert, ast.If)) and _is_check(n)]
    return tuple(found)


def _is_check(node: ast.Assert | ast.If) -> bool:
    raises = isinstance(node, ast.Assert) or (not node.orelse and all(isinstance(s, ast.Raise) for s in node.body))
    return raises and not any(isinstance(n, (ast.BoolOp, ast.IfExp)) for n in ast.walk(node.test))
