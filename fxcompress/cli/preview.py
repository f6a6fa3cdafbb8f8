"""What passes would do to a model, found out on clones: nothing is calibrated, built or written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.fx import Node

from fxcompress.analysis import layer_table
from fxcompress.errors import FxcError
from fxcompress.ir import Program
from fxcompress.layers import WEIGHTED_LAYERS, Fused
from fxcompress.passbase import Context, Pass, Refusal
from fxcompress.passes import FoldBatchNorm, FuseActivations, QuantizeStatic
from fxcompress.quant.placement import Placement, layer_name, place
from fxcompress.quant.scheme import QuantScheme

__all__ = ["LayerView", "Preview", "StepPreview", "layer_views", "preview"]

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass
class StepPreview:
    """What one pass would do.

    Attributes:
        name: Of the pass.
        config: Its recipe entry.
        changes: One line per rewrite.
        refusals: Rewrites it would refuse, with the reason.
        notes: Why it could not be tried, or what it leaves alone.
    """

    name: str
    config: dict[str, Any]
    changes: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Preview:
    """What a pipeline would do.

    Attributes:
        captured: The program before any pass.
        fused: The program after all passes that need no data.
        steps: One entry per pass.
        refused: Refusals by the name of the pass.
        placement: What static quantization would touch; None without it.
    """

    captured: Program
    fused: Program
    steps: list[StepPreview] = field(default_factory=list)
    refused: dict[str, list[Refusal]] = field(default_factory=dict)
    placement: Placement | None = None


def preview(program: Program, passes: Sequence[Pass], scheme: QuantScheme) -> Preview:
    """Run the passes that need no data on clones and ask the others what they would touch.

    Args:
        program: As captured; it stays as it is.
        passes: In order.
        scheme: Of the target.
    """
    result = Preview(program, program)
    context = Context(scheme=scheme, verify=False)
    for step in passes:
        entry = StepPreview(step.name, step.to_dict())
        result.steps.append(entry)
        if isinstance(step, QuantizeStatic):
            _preview_quantization(result, entry, step, scheme)
        else:
            _try(result, entry, step, context)
    return result


def _try(result: Preview, entry: StepPreview, step: Pass, context: Context) -> None:
    try:
        done = step(result.fused, context)
    except FxcError as error:
        entry.notes.append(f"cannot be tried without running it: {error.what}")
        return
    entry.changes, entry.notes = done.changes, done.notes
    entry.refusals = [str(r) for r in done.refusals]
    result.refused.setdefault(step.name, []).extend(done.refusals)
    result.fused = done.program


def _preview_quantization(result: Preview, entry: StepPreview, step: QuantizeStatic, scheme: QuantScheme) -> None:
    placement = result.placement = place(result.fused, scheme, step.ignore)
    entry.changes = [f"quantize {layer_name(node)}" for node in placement.layers]
    entry.notes = [f"{name} stays float: {reason}" for name, reason in placement.left]
    entry.notes.append(f"{len(placement.values)} activations observed, {len(placement.groups)} grids")


@dataclass(frozen=True)
class LayerView:
    """One row of ``fxcompress inspect``.

    Attributes:
        name: Layer or function.
        kind: Class or operator.
        shape: Output shape of the example.
        parameters: Number of parameters.
        macs: Multiply-accumulates of the example.
        fold: What BatchNorm folding does here: ``yes ...``, ``no: reason``, or empty.
        fuse: What fusion does here.
        quantize: What static quantization does here.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    macs: int
    fold: str
    fuse: str
    quantize: str


def layer_views(found: Preview) -> list[LayerView]:
    """The layers of the captured program with what each pass could touch."""
    fold, fuse = _folds(found), _fusions(found)
    quantize = _quantizations(found)
    views = []
    for row in layer_table(found.captured):
        touch = (fold.get(row.name, ""), fuse.get(row.name, ""), quantize.get(row.name, ""))
        views.append(LayerView(row.name, row.kind, row.shape, row.parameters, row.macs, *touch))
    return views


def _folds(found: Preview) -> dict[str, str]:
    """Norms that are gone after folding, the layers that took them, and the reasons of those that stay."""
    kept = {str(node.target) for node, _ in found.fused.layers()}
    refused = _refusals(found, FoldBatchNorm.__name__)
    result: dict[str, str] = {}
    for node, module in found.captured.layers():
        name = str(node.target)
        if not isinstance(module, _NORMS):
            continue
        if name in kept:
            result[name] = f"no: {refused.get(name, 'no layer next to it to fold into')}"
            continue
        result[name] = "yes"
        for layer in _weighted_neighbours(found.captured, node):
            result.setdefault(layer, f"yes: {name}")
    return result


def _weighted_neighbours(program: Program, norm: Node) -> list[str]:
    """The layer before the norm, else those behind it."""
    near = [n for n in norm.all_input_nodes if _is_weighted(program, n)] or [
        n for n in norm.users if _is_weighted(program, n)
    ]
    return [str(n.target) for n in near]


def _is_weighted(program: Program, node: Node) -> bool:
    return node.op == "call_module" and isinstance(program.module(node), WEIGHTED_LAYERS)


def _fusions(found: Preview) -> dict[str, str]:
    result = {}
    refused = _refusals(found, FuseActivations.__name__)
    for node, module in found.fused.layers():
        if isinstance(module, Fused):
            parts = ["add"] * (len(node.args) > 1) + [str(module.activation)] * (module.activation is not None)
            result[str(node.target)] = f"yes: {' + '.join(parts)}"
    for name, reason in refused.items():
        result.setdefault(name, f"no: {reason}")
    return result


def _refusals(found: Preview, step: str) -> dict[str, str]:
    """Reasons a pass gave, by layer; a function stands for the layers it reads."""
    nodes = {n.name: n for n in found.captured.graph.nodes}
    reasons: dict[str, str] = {}
    for refusal in found.refused.get(step, []):
        label = refusal.node.split(" (")[0]
        reasons[label] = refusal.reason
        node = nodes.get(label)
        for source in node.all_input_nodes if node is not None and node.op == "call_function" else []:
            if source.op == "call_module":
                reasons.setdefault(str(source.target), refusal.reason)
    return reasons


def _quantizations(found: Preview) -> dict[str, str]:
    if found.placement is None:
        return {}
    result = {_row_name(node): "yes" for node in found.placement.layers}
    return result | {name: f"no: {reason}" for name, reason in found.placement.left}


def _row_name(node: Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name
