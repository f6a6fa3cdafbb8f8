"""Checks that a pass keeps the contract, for the passes of this library and for users' own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

from fxcompress.capture import capture
from fxcompress.errors import FxcError, NormalFormError, PassError
from fxcompress.ir import Program, evaluating
from fxcompress.passbase import Context, Pass, Result, exact_tolerance, fingerprint, output_error

__all__ = ["check_pass"]

#: What the contract itself raises: the pass crashed, changed outputs, wrote into its input, or broke the program.
_BROKEN = {"FXC-PASS-001", "FXC-PASS-002", "FXC-PASS-003", "FXC-PASS-004"}


def check_pass(
    pass_: Pass,
    model: nn.Module | Program,
    example_inputs: tuple[Any, ...] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    context: Context | None = None,
) -> Result:
    """Run ``pass_`` on a model and check everything the contract asks for.

    The program is in normal form before and after. The input program stays as it was: graph, tensors bit for bit,
    training modes, outputs. Outputs are equal for an exact pass, also for another batch size when the batch is
    dynamic; for a lossy one the error is reported. A second run changes nothing (a lossy pass may refuse it). Every
    ``meta["val"]`` tells the shape, dtype and device that really occur. The recipe entry makes an equal pass, through
    JSON too.

    Args:
        pass_: The pass, one of your own or of this library.
        model: A module to capture, or a program.
        example_inputs: Positional example inputs of a module.
        example_kwargs: Keyword example inputs of a module.
        context: Calibration data and target, when the pass needs them.

    Returns:
        The result of the first run: ``changes`` and ``refusals`` are yours to check.

    Raises:
        AssertionError: a promise is broken; the message says which one and where.
        PassError: the pass refuses the model or lacks data.
        CaptureError: the module cannot be captured.
    """
    program = model if isinstance(model, Program) else capture(model, example_inputs, example_kwargs)
    context = context or Context()
    _check_recipe(pass_)
    _check_normal_form(pass_, program, "before")
    snapshot = _Snapshot(program)
    result = _run(pass_, program, context)
    snapshot.check_untouched(pass_)
    _check_normal_form(pass_, result.program, "after")
    _check_interface(pass_, program, result.program)
    _check_outputs(pass_, program, result)
    _check_metadata(pass_, result.program)
    _check_second_run(pass_, result.program, context)
    return result


def _require(condition: bool, pass_: Pass, message: str) -> None:
    if not condition:
        raise AssertionError(f"{pass_.name}: {message}")


def _check_recipe(pass_: Pass) -> None:
    entry = pass_.to_dict()
    _require(Pass.from_dict(entry) == pass_, pass_, f"the recipe entry {entry} makes another pass")
    try:
        plain = json.loads(json.dumps(entry))
    except TypeError as error:
        raise AssertionError(f"{pass_.name}: the recipe entry {entry} is not JSON: {error}") from error
    _require(Pass.from_dict(plain) == pass_, pass_, f"the recipe entry {plain}, read from JSON, makes another pass")


def _check_normal_form(pass_: Pass, program: Program, when: str) -> None:
    try:
        program.verify()
    except (NormalFormError, RuntimeError) as error:
        raise AssertionError(f"{pass_.name}: the program is not in normal form {when} the pass: {error}") from error


def _run(pass_: Pass, program: Program, context: Context) -> Result:
    try:
        return pass_(program, context)
    except FxcError as error:
        if error.id in _BROKEN or isinstance(error, NormalFormError):
            raise AssertionError(f"{pass_.name}: {error}") from error
        raise


class _Snapshot:
    """Everything about a program that a pass must leave alone."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.fingerprint = fingerprint(program)
        self.tensors = {name: t.detach().clone() for name, t in _tensors(program).items()}
        self.modes = {name: m.training for name, m in program.gm.named_modules()}
        self.outputs = program.run_example()

    def check_untouched(self, pass_: Pass) -> None:
        """Compare with the program as it is now."""
        now = _tensors(self.program)
        changed = [n for n, t in self.tensors.items() if n not in now or not _identical(t, now[n])]
        _require(not changed, pass_, f"the input program's tensors were written to: {', '.join(changed)}")
        _require(fingerprint(self.program) == self.fingerprint, pass_, "the input program was changed")
        modes = {name: m.training for name, m in self.program.gm.named_modules()}
        _require(modes == self.modes, pass_, "the training mode of the input program was changed")
        error = output_error(self.outputs, self.program.run_example())
        _require(error == 0, pass_, f"the input program computes something else (relative error {error:.3g})")


def _tensors(program: Program) -> dict[str, Tensor]:
    gm = program.gm
    return {**dict(gm.named_parameters(remove_duplicate=False)), **dict(gm.named_buffers(remove_duplicate=False))}


def _identical(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, NaN included."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())


def _check_interface(pass_: Pass, before: Program, after: Program) -> None:
    _require(after.signature == before.signature, pass_, "the signature was changed")
    names = [n.name for n in before.placeholders()], [n.name for n in after.placeholders()]
    _require(names[0] == names[1], pass_, f"the inputs were changed from {names[0]} to {names[1]}")
    dims = before.dynamic_dims(), after.dynamic_dims()
    _require(dims[0] == dims[1], pass_, f"the dynamic dimensions were changed from {dims[0]} to {dims[1]}")


def _check_outputs(pass_: Pass, before: Program, result: Result) -> None:
    after = result.program
    if not pass_.exact:
        reported = result.error is not None and result.error < float("inf")
        _require(reported or not result.modified, pass_, f"a lossy pass must report a finite error, not {result.error}")
    for what, example in (("the example", before.example), ("a batch twice as large", _doubled(before))):
        expected = _outputs(before, example)
        try:
            got = _outputs(after, example)
        except RuntimeError as failure:
            raise AssertionError(f"{pass_.name}: on {what}, the rewritten program fails: {failure}") from failure
        tolerance = exact_tolerance(after, expected) if pass_.exact else float("inf")
        shapes = _shapes(expected), _shapes(got)
        _require(shapes[0] == shapes[1], pass_, f"on {what}, outputs are {shapes[1]} instead of {shapes[0]}")
        error = output_error(expected, got)
        _require(
            error <= tolerance, pass_, f"on {what}, outputs differ by {error:.3g} (relative, tolerance {tolerance:.0e})"
        )


def _outputs(program: Program, example: Any) -> list[Any]:
    with torch.no_grad(), evaluating(program.gm):
        return list(pytree.tree_leaves(program(*example[0], **example[1])))


def _shapes(values: list[Any]) -> list[str]:
    def text(value: Any) -> str:
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"

    return [text(v) if isinstance(v, Tensor) else repr(v) for v in values]


def _doubled(program: Program) -> Any:
    """The example with every dynamic dimension 0 repeated."""
    leaves, spec = pytree.tree_flatten(program.example)
    for index, node in enumerate(program.placeholders()):
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.dim() and isinstance(value.shape[0], torch.SymInt):
            leaves[index] = torch.cat((leaves[index], leaves[index]))
    return pytree.tree_unflatten(leaves, spec)


class _Truth(Interpreter):
    """Runs a program and compares every value with the node's metadata."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.gm)
        self.sizes: dict[Any, int] = {}
        self.lies: list[str] = []

    def run_node(self, n: Node) -> Any:
        """Run one node and check it."""
        value = super().run_node(n)
        if n.op == "placeholder":
            self._bind(n.meta.get("val"), value)
        if n.op != "output":
            problem = self._compare(n.meta.get("val"), value)
            if problem:
                self.lies.append(f"%{n.name}: {problem}")
        return value

    def _bind(self, told: Any, value: Any) -> None:
        """Learn what the symbolic sizes of an input are this time."""
        if isinstance(told, torch.SymInt):
            self.sizes[told.node.expr] = int(value)
        elif isinstance(told, Tensor) and isinstance(value, Tensor):
            for symbol, size in zip(told.shape, value.shape, strict=True):
                if isinstance(symbol, torch.SymInt) and symbol.node.expr.is_Symbol:
                    self.sizes[symbol.node.expr] = size

    def _compare(self, told: Any, value: Any) -> str:
        if isinstance(value, (list, tuple)):
            if not isinstance(told, (list, tuple)) or len(told) != len(value):
                return f"metadata tells {told}, the value is a {type(value).__name__} of {len(value)}"
            return next(filter(None, (self._compare(t, v) for t, v in zip(told, value, strict=True))), "")
        if not isinstance(value, Tensor):
            return ""
        if not isinstance(told, Tensor):
            return f"metadata tells {told}, the value is a tensor"
        shape = [self._size(s) for s in told.shape]
        known = len(shape) == value.dim() and all(s is None or s == v for s, v in zip(shape, value.shape, strict=True))
        if known and (told.dtype, told.device) == (value.dtype, value.device):
            return ""
        return (
            f"metadata tells {told.dtype} {list(told.shape)} on {told.device}, "
            f"the value is {value.dtype} {list(value.shape)} on {value.device}"
        )

    def _size(self, size: Any) -> int | None:
        """A size as a number; None for one that depends on data."""
        if not isinstance(size, torch.SymInt):
            return int(size)
        number = size.node.expr.subs(self.sizes)
        return int(number) if number.is_number else None


def _check_metadata(pass_: Pass, program: Program) -> None:
    leaves = program.signature.flatten(*program.example)
    truth = _Truth(program)
    with torch.no_grad(), evaluating(program.gm):
        truth.run(*leaves, enable_io_processing=False)
    _require(not truth.lies, pass_, "metadata is not true: " + "; ".join(truth.lies[:8]))


def _check_second_run(pass_: Pass, program: Program, context: Context) -> None:
    try:
        again = pass_(program, context)
    except PassError as error:
        if pass_.exact or error.id in _BROKEN:
            raise AssertionError(f"{pass_.name}: a second run fails: {error}") from error
        return
    _require(not again.modified, pass_, f"a second run changes the program again: {'; '.join(again.changes[:8])}")
