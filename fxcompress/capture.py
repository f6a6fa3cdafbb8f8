"""Capture: any ``nn.Module`` into one Program. ``torch.export`` first, ``torch.fx`` second."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from fxcompress.attach import attach_layers, readable_names
from fxcompress.diagnose import explain_difference, explain_failure, quiet, register_dataclasses
from fxcompress.errors import CaptureError
from fxcompress.examples import Plan, batch_plans, copied, other_sizes, resized
from fxcompress.ir import Program, Signature, build_gm, evaluating, forward_names
from fxcompress.normalize import functional_graph
from fxcompress.preconditions import keyword_names, require_arguments, require_plain, require_tensors
from fxcompress.preserve import preserving
from fxcompress.tracing import plain_outputs, symbolic_trace
from fxcompress.tree import ParameterTree

__all__ = ["capture", "from_exported", "relative_error"]

_log = logging.getLogger("fxcompress")
_LOCK = threading.RLock()  # torch.export traces one model at a time
#: What a captured graph may differ from the model by, where export decomposed an operator.
_TOLERANCE = 1e-5
_REWRITE = (
    "replace a branch or size that depends on tensor values by torch.where, torch.cond or masking, and Python "
    "numbers or NumPy by torch operators; or keep such code outside forward, and capture the submodules without it"
)
_REGISTER = f"give that operator a shape function with torch.library.register_fake; {_REWRITE}"
_REFUSED_BY_AUTOGRAD = (
    "modified inplace",
    "in an in-place operation",
    "automatic differentiation",
    "Inference tensors",
)


def capture(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    dynamic_batch: bool = True,
    verify: bool = True,
) -> Program:
    """Capture ``model`` into one graph.

    The model is captured in eval mode; its training mode, buffers and attributes are as before afterwards. The program
    shares the model's parameters and buffers (as ``torch.fx`` and ``torch.export`` do); its layers are new objects.

    Args:
        model: Any module whose forward can be exported.
        args: Example positional inputs.
        kwargs: Example keyword inputs.
        dynamic_shapes: As in ``torch.export.export``: one entry per input, ``{dim: Dim(...)}`` or ``Dim.AUTO`` each.
            Overrides ``dynamic_batch``; use it for a dynamic sequence length.
        dynamic_batch: Make dimension 0 of every tensor input that has the batch size of the first tensor dynamic. An
            example of batch 1 is repeated, because export would fix sizes 0 and 1.
        verify: Run model and program on the example, and at other sizes where sizes are dynamic, and compare.

    Returns:
        The program. ``program.notes`` says what had to be given up, for example a dynamic batch.

    Raises:
        CaptureError: no strategy worked (every obstacle is listed with the user's line), or outputs differ.
        UsageError: ``model`` is no module, or ``args`` no tuple.
    """
    require_arguments(model, args)
    args, kwargs = tuple(args), dict(kwargs or {})
    require_tensors(model)
    with (
        _LOCK,
        evaluating(model),
        preserving(model) as kept,
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
        quiet(),
    ):
        reference = _reference(model, args, kwargs)
        assigned = kept.assigned()
        register_dataclasses((args, kwargs, reference))
        require_plain(args, kwargs, reference)
        program = _Capture(model, args, kwargs, reference, verify).run(dynamic_shapes, dynamic_batch)
    if assigned:
        more = f" and {len(assigned) - 3} more" if len(assigned) > 3 else ""
        program.notes.append(f"forward assigns {', '.join(assigned[:3])}{more}; the program does not")
    return program


def from_exported(
    exported: ExportedProgram,
    original: nn.Module | None = None,
    example: tuple[tuple[Any, ...], dict[str, Any]] | None = None,
) -> Program:
    """Bring an ``ExportedProgram`` into the normal form.

    Args:
        exported: Program exported in eval mode.
        original: The module it came from; without it, names come from the exported program alone.
        example: Example ``(args, kwargs)``; defaults to the exported program's own.

    Raises:
        CaptureError: the outputs depend on state that forward writes.
    """
    gm, notes = functional_graph(exported)
    tree = ParameterTree(gm, original)
    for node in gm.graph.nodes:
        node.meta = {k: v for k, v in node.meta.items() if k in ("val", "stack_trace", "nn_module_stack")}
    attach_layers(gm, tree, original if original is not None else gm)
    _inputs_first(gm.graph)
    readable_names(gm.graph)
    tree.prune()
    new = build_gm(tree.root, gm.graph)
    if tree.keys.names:
        tree.keys.install(new)
    example = example or cast(Any, exported.example_inputs)
    in_spec, out_spec = (
        cast(pytree.TreeSpec, exported.call_spec.in_spec),
        cast(pytree.TreeSpec, exported.call_spec.out_spec),
    )
    program = Program(new.eval(), _signature(original, in_spec, out_spec), example, notes)
    program.recompile()
    program.verify()
    return program


def _signature(original: nn.Module | None, in_spec: pytree.TreeSpec, out_spec: pytree.TreeSpec) -> Signature:
    args_spec, kwargs_spec = in_spec.children()
    n_args = len(args_spec.children())
    names = forward_names(original)[:n_args] if original is not None else []
    names += [f"input_{i}" for i in range(len(names), n_args)]
    return Signature((*names, *(kwargs_spec.context or ())), n_args, in_spec, out_spec)


def _inputs_first(graph: torch.fx.Graph) -> None:
    first = next(iter(graph.nodes))
    for node in [n for n in graph.nodes if n.op == "placeholder"]:
        if node is first:
            first = node.next
        else:
            first.prepend(node)


def _reference(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        return model(*copied(args), **copied(kwargs))
    except Exception as error:
        raise CaptureError(
            1,
            "the model itself fails on the example inputs",
            where=explain_failure(error),
            why=f"{type(error).__name__}: {str(error).strip()[:500]}",
            fix="call model(*example_inputs) in eval mode and mend that first (shapes, dtypes, devices)",
        ) from error


class _Mismatch(Exception):
    """The captured graph gives other outputs than the model."""


@dataclass
class _Capture:
    """One run of the strategies: export and trace, each with a free batch first and fixed sizes last."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reference: Any
    verify: bool
    failures: list[tuple[str, Exception]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def run(self, dynamic_shapes: Any, dynamic_batch: bool) -> Program:
        fixed = Plan("fixed sizes", self.args, self.kwargs)
        if dynamic_shapes is not None:
            plans = [Plan("the given dynamic shapes", self.args, self.kwargs, dynamic_shapes)]
        else:
            plans = [*(batch_plans(self.args, self.kwargs) if dynamic_batch else []), fixed]
        for strategy in ("torch.export", "torch.fx"):
            for plan in plans:
                program = self.attempt(strategy, plan)
                if program is not None:
                    program.notes += self.notes + self.fallback_notes(strategy, plan)
                    return program
        raise self.error()

    def attempt(self, strategy: str, plan: Plan) -> Program | None:
        if plan.is_refinement and not _is_constraint(self.failures[-1:]):
            return None
        self.notes = []
        try:
            exported = (
                _export(self.model, plan) if strategy == "torch.export" else plain_outputs(_export(self.traced(), plan))
            )
            program = from_exported(exported, self.model, example=(self.args, self.kwargs))
            if plan.frees_batch and not any(program.dynamic_dims().values()):
                raise _Mismatch("the model's code fixes the batch size")
            if self.verify:
                self.check(program)
            return program
        except CaptureError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever stops one strategy, the next is tried; the error tells all
            _log.debug("capture: %s with %s failed", strategy, plan.label, exc_info=True)
            self.failures.append((f"{strategy} with {plan.label}", error))
        return None

    def traced(self) -> GraphModule:
        gm, passed_over = symbolic_trace(self.model, self.args, self.kwargs)
        if passed_over:
            self.notes.append(f"checks of tensor values are not part of the program: {', '.join(passed_over)}")
        return gm

    # -------------------------------------------------------------------------------------------- verification
    def check(self, program: Program) -> None:
        """Compare with the model on the example and, where sizes are free, at other sizes."""
        self.compare(program, self.reference, self.args, self.kwargs)
        leaves = program.signature.flatten(self.args, self.kwargs)
        sizes = other_sizes(program.placeholders(), leaves)
        if not sizes:
            return
        args, kwargs = pytree.tree_unflatten(resized(program.placeholders(), leaves, sizes), program.signature.in_spec)
        try:
            reference = self.model(*copied(args), **copied(kwargs))
        except Exception as error:  # noqa: BLE001 - the user's model at another size: any failure is theirs, and a note
            self.notes = [
                f"checked at the example's sizes only; the model itself fails with {sizes}: {_first_line(error)}"
            ]
            return
        self.compare(program, reference, args, kwargs)

    def compare(self, program: Program, reference: Any, args: Any, kwargs: Any) -> None:
        got, structure = pytree.tree_flatten(program(*args, **kwargs))
        expected, wanted = pytree.tree_flatten(reference)
        if structure != wanted:
            raise _Mismatch(f"the output is {structure}, the model's {wanted}")
        worst = max((leaf_error(a, b) for a, b in zip(expected, got, strict=True)), default=0.0)
        if not worst <= _TOLERANCE:
            self.explain(args, kwargs, reference, program)
            raise _Mismatch(f"outputs differ by {worst:.3g} (relative) at input sizes {_shapes(args, kwargs)}")

    def explain(self, args: Any, kwargs: Any, reference: Any, program: Program) -> None:
        """Raise at once when the model does not repeat itself: no strategy can capture that."""
        again = pytree.tree_leaves(self.model(*copied(args), **copied(kwargs)))
        expected = pytree.tree_leaves(reference)
        if all(leaf_error(a, b) <= _TOLERANCE for a, b in zip(expected, again, strict=True)):
            return
        where, why = explain_difference(program)
        raise CaptureError(
            4,
            "the model does not repeat itself: two calls with the same input give other numbers",
            where=where,
            why=why,
            fix="make forward deterministic in eval mode (dropout with training=self.training, no state between calls); "
            "capture(..., verify=False) skips this check",
        )

    # -------------------------------------------------------------------------------------------- reporting
    def fallback_notes(self, strategy: str, plan: Plan) -> list[str]:
        failed = [f"{label}: {_first_line(error)}" for label, error in self.failures]
        notes = [f"sizes are fixed; failed: {failed[-1]}"] if plan.shapes is None and failed else []
        return notes + ([f"captured with torch.fx; failed: {failed[0]}"] if strategy == "torch.fx" else [])

    def error(self) -> CaptureError:
        reasons: dict[str, list[str]] = {}
        for label, e in self.failures:
            reasons.setdefault(f"{type(e).__name__.lstrip('_')}: {_first_line(e)}", []).append(label)
        tried = "; ".join(f"{', '.join(labels)}: {reason}" for reason, labels in reasons.items())
        if all(isinstance(e, _Mismatch) for _, e in self.failures):
            return CaptureError(
                7,
                f"the graph captured from {type(self.model).__name__} gives other numbers than the model",
                why=tried,
                fix="forward probably branches on values or keeps state in a way tracing cannot see; make it depend on its "
                "inputs alone; capture(..., verify=False) skips this check",
            )
        if any(isinstance(e, SyntaxError) for _, e in self.failures) and keyword_names(self.model):
            return CaptureError(
                9,
                f"{type(self.model).__name__} has submodules named like Python keywords",
                where=", ".join(keyword_names(self.model)),
                why="the code that torch generates cannot name them",
                fix="rename them",
            )
        obstacles = explain_failure(self.failures[0][1], self.model, self.args, self.kwargs)
        return CaptureError(
            2,
            f"{type(self.model).__name__} cannot be captured",
            where=obstacles,
            why=tried,
            fix=_REGISTER if "register_fake" in obstacles else _REWRITE,
        )


def _export(model: nn.Module, plan: Plan) -> ExportedProgram:
    """Export with gradients on, so that the user's own ``no_grad`` regions are seen.

    What autograd refuses (``out=``, writing into a piece of ``chunk``, a buffer made in inference mode) only ever runs
    without gradients: so it is exported.
    """
    try:
        with torch.enable_grad():
            return torch.export.export(model, plan.args, plan.kwargs, dynamic_shapes=plan.shapes, strict=False)
    except RuntimeError as error:
        if not any(words in str(error) for words in _REFUSED_BY_AUTOGRAD):
            raise
    with torch.no_grad():
        return torch.export.export(model, plan.args, plan.kwargs, dynamic_shapes=plan.shapes, strict=False)


def _is_constraint(failures: list[tuple[str, Exception]]) -> bool:
    return any("Constraints violated" in str(e) or isinstance(e, _Mismatch) for _, e in failures)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _shapes(args: Any, kwargs: Any) -> str:
    return ", ".join(str(list(v.shape)) for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor))


def leaf_error(expected: Any, got: Any) -> float:
    """``relative_error`` for two output leaves that may be no tensors."""
    if isinstance(expected, Tensor) and isinstance(got, Tensor):
        return relative_error(expected, got)
    return 0.0 if type(expected) is type(got) and expected == got else float("inf")


def relative_error(expected: Tensor, got: Tensor) -> float:
    """Largest difference relative to the largest expected value; infinite when shapes, dtypes or non-finite patterns differ."""
    if expected.shape != got.shape or expected.dtype != got.dtype:
        return float("inf")
    if expected.numel() == 0 or torch.equal(expected, got):
        return 0.0
    kind = torch.complex128 if expected.is_complex() else torch.float64
    a, b = expected.detach().to(kind), got.detach().to(kind)
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, 0.0, (a - b).abs()).max().item()
    finite = a[a.isfinite()]
    scale = finite.abs().max().item() if finite.numel() else 0.0
    return float("inf") if difference != difference else difference / max(scale, 1e-12)
