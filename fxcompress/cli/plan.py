"""``fxcompress compress --dry-run``: what would be done, and what it would take; nothing is built or written."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from fxcompress.analysis import Shapes, count_macs, count_parameters
from fxcompress.api import default_passes
from fxcompress.cli import console
from fxcompress.cli.preview import Preview, preview
from fxcompress.cli.setup import capture_model, chosen_passes, example_batch, scheme_of
from fxcompress.environment import peak_memory
from fxcompress.ir import Program

if TYPE_CHECKING:
    from fxcompress.cli.compress import Options
    from fxcompress.cli.datafiles import DataSet
    from fxcompress.modelspec import ResolvedModel

__all__ = ["Estimate", "estimate", "peak_activations", "show_plan"]

#: Copies of the weights that live at once while an engine is built: torch, the portable model, its serialized form, the
#: runtime's own; each once in float32 and once for the compressed engine.
_WEIGHT_COPIES = 6


@dataclass(frozen=True)
class Estimate:
    """What a compression would take, in bytes.

    Attributes:
        weights: Parameters and buffers in memory.
        activations: Largest sum of values alive at once, for one calibration batch.
        memory: Peak of the process: what it holds now, weights in several copies, activations.
        float_file: Float32 engine on disk.
        engine_file: Resulting engine on disk.
    """

    weights: int
    activations: int
    memory: int
    float_file: int
    engine_file: int


def show_plan(options: Options, model: ResolvedModel, dataset: DataSet | None) -> None:
    """Print the plan of ``compress`` with these options."""
    name, scheme = scheme_of(options.target)
    quantize = dataset is not None
    passes = chosen_passes(options.passes, options.calibrator, options.samples, options.ignore, quantize)
    steps = passes if passes is not None else default_passes(quantize=quantize)
    with console.progress(f"capturing {model.name}"):
        program = capture_model(model)
    found = preview(program, steps, scheme)
    batch = options.batch_size if dataset is not None else example_batch(program)
    needs = estimate(found, batch)
    facts = {
        "model": model.spec,
        "target": name,
        "recipe": [step.config for step in found.steps],
        "speed_gate": options.passes is None and options.measure,
        "parameters": count_parameters(program),
        "macs": count_macs(program),
        "steps": [dataclasses.asdict(step) for step in found.steps],
        "estimate": dataclasses.asdict(needs),
        "out": None if options.out is None else str(options.out),
        "notes": [*model.notes, *program.notes, *(dataset.notes if dataset else [])],
    }
    console.emit(facts)
    console.show(
        f"{model.name} -> {name}", _steps_table(found), "", _estimate_text(needs, batch), "", _recipe_text(found)
    )
    for note in program.notes:
        console.say(f"note: {note}")
    if dataset is None:
        console.say("note: no --data, so nothing would be calibrated: the engine would stay in float32")


def _steps_table(found: Preview) -> Table:
    table = Table("pass", "changes", "refused", "for example", box=None, pad_edge=False)
    for step in found.steps:
        example = next(iter([*step.refusals, *step.notes, *step.changes]), "")
        table.add_row(step.name, str(len(step.changes)), str(len(step.refusals)), example)
    return table


def _estimate_text(needs: Estimate, batch: int) -> str:
    size = console.size_text
    return (
        f"memory  about {size(needs.memory)} (weights {size(needs.weights)}, activations {size(needs.activations)} "
        f"at batch {batch})\n"
        f"disk    about {size(needs.engine_file)} (float32: {size(needs.float_file)})"
    )


def _recipe_text(found: Preview) -> str:
    lines = []
    for step in found.steps:
        options = {k: v for k, v in step.config.items() if k != "name"}
        lines.append("  " + step.name + (f" {console.plain(options)}" if options else ""))
    return "recipe\n" + "\n".join(lines)


def estimate(found: Preview, batch: int) -> Estimate:
    """What building the previewed engine would take.

    Args:
        found: From `preview`.
        batch: Samples per calibration batch.
    """
    weights = _bytes(found.fused.gm)
    activations = peak_activations(found.captured) * batch // max(1, example_batch(found.captured))
    saved = 0
    for node in found.placement.layers if found.placement is not None else []:
        saved += _saved_by_int8(found.fused, node)
    memory = peak_memory() + _WEIGHT_COPIES * weights + 2 * activations
    return Estimate(weights, activations, memory, weights, max(0, weights - saved))


def _bytes(module: nn.Module) -> int:
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


def _saved_by_int8(program: Program, node: Node) -> int:
    """Bytes a quantized layer loses: its weight goes to one byte a value, plus a scale a channel."""
    weight: Any = program.module(node).weight if node.op == "call_module" else program.tensor(_weight_node(node))
    channels = max(weight.shape[0], weight.shape[1]) if weight.dim() > 1 else weight.shape[0]
    return int(weight.numel() * (weight.element_size() - 1) - 5 * channels)


def _weight_node(node: Node) -> Node:
    weight = node.args[1]
    assert isinstance(weight, Node)
    return weight


def peak_activations(program: Program) -> int:
    """Bytes of the largest set of values alive at once when the program runs on its example, node by node.

    A value lives from the node that makes it to its last reader. Views cost nothing and keep what they look at alive.
    """
    nodes = list(program.graph.nodes)
    owner = {node: _owner(node) for node in nodes}
    last: dict[Node, int] = {}
    for place, node in enumerate(nodes):
        for source in node.all_input_nodes:
            last[_root(owner, source)] = place
    shapes = Shapes(program)
    alive = peak = 0
    ends: dict[int, int] = {}
    for place, node in enumerate(nodes):
        if node.op not in ("get_attr", "output") and owner[node] is node:
            size = _value_bytes(node, shapes)
            alive += size
            end = last.get(node, place)
            ends[end] = ends.get(end, 0) + size
        peak = max(peak, alive)
        alive -= ends.pop(place, 0)
    return peak


def _owner(node: Node) -> Node:
    """The node whose memory ``node`` looks at: itself unless it is a view."""
    if node.op != "call_function" or not node.all_input_nodes:
        return node
    if getattr(node.target, "__name__", "") == "getitem":
        return node.all_input_nodes[0]
    schema = node.target._schema if isinstance(node.target, torch._ops.OpOverload) else None
    is_view = schema is not None and any(r.alias_info is not None for r in schema.returns)
    return node.all_input_nodes[0] if is_view else node


def _root(owner: dict[Node, Node], node: Node) -> Node:
    while owner[node] is not node:
        node = owner[node]
    return node


def _value_bytes(node: Node, shapes: Shapes) -> int:
    tensors = [v for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, Tensor)]
    return sum(math.prod(shapes.size(s) for s in v.shape) * v.element_size() for v in tensors)
