"""``fxcompress inspect``: the layers of a model and what each pass could touch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from fxcompress.cli import console
from fxcompress.cli.options import InputShapeOption, ModelArgument, SeedOption, TargetOption
from fxcompress.errors import ArtifactError

if TYPE_CHECKING:
    from fxcompress.cli.preview import LayerView, Preview
    from fxcompress.modelspec import ResolvedModel

__all__ = ["inspect"]


def inspect(
    model: ModelArgument,
    target: TargetOption = "auto",
    input_shape: InputShapeOption = None,
    seed: SeedOption = 0,
    json_output: console.JsonOption = False,
    quiet: console.QuietOption = False,
) -> None:
    """Show layers, shapes, parameters, MACs and what each pass could touch.

    A saved folder is shown as what it holds: its manifest and its report.
    """
    console.setup(json_output=json_output, quiet=quiet)
    from fxcompress.modelspec import resolve

    with console.progress(f"loading {model}"):
        found = resolve(model, input_shapes=input_shape or (), seed=seed)
    if found.folder is not None:
        _show_folder(found.folder)
    else:
        _show_model(found, target)


def _show_model(model: ResolvedModel, target: str) -> None:
    from fxcompress.api import default_passes
    from fxcompress.cli.preview import layer_views, preview
    from fxcompress.cli.setup import capture_model, scheme_of

    name, scheme = scheme_of(target)
    with console.progress(f"capturing {model.name}"):
        program = capture_model(model)
    found = preview(program, default_passes(quantize=True), scheme)
    views = layer_views(found)
    facts = _facts(model, found, views, name)
    console.emit(facts)
    console.show(_layer_table(views, name), _summary(facts))
    for note in [*model.notes, *program.notes]:
        console.say(f"note: {note}")


def _facts(model: ResolvedModel, found: Preview, views: list[LayerView], target: str) -> dict[str, Any]:
    from fxcompress.analysis import count_macs, count_parameters
    from fxcompress.cli.setup import example_batch
    from fxcompress.lowering.names import input_names, size_names

    program, sizes = found.captured, size_names(found.captured)
    values = {name: n.meta.get("val") for name, n in zip(input_names(program), program.placeholders(), strict=True)}
    shapes = {name: [_size(s, sizes) for s in getattr(value, "shape", ())] for name, value in values.items()}
    quantized = sum(v.macs for v in views if v.quantize == "yes")
    total = count_macs(program)
    return {
        "model": model.name,
        "spec": model.spec,
        "target": target,
        "inputs": {name: {"dtype": _dtype(value), "shape": shapes[name]} for name, value in values.items()},
        "parameters": count_parameters(program),
        "macs": total,
        "batch": example_batch(program),
        "quantizable_macs": quantized,
        "steps": [dataclasses.asdict(s) for s in found.steps],
        "layers": [dataclasses.asdict(v) for v in views],
        "notes": [*model.notes, *program.notes],
    }


def _size(size: Any, names: dict[str, str]) -> int | str:
    """A fixed size, or the name of a free one."""
    return size if isinstance(size, int) else names.get(str(size), str(size))


def _dtype(value: Any) -> str:
    return str(getattr(value, "dtype", type(value).__name__)).removeprefix("torch.")


def _layer_table(views: list[LayerView], target: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("layer", "kind", "output"):
        table.add_column(heading, overflow="fold")
    for heading in ("params", "MACs"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("fold BatchNorm", "fuse", f"INT8 ({target})"):
        table.add_column(heading, overflow="fold")
    for v in views:
        shape = "x".join(map(str, v.shape))
        counts = (console.count_text(v.parameters), console.count_text(v.macs))
        table.add_row(v.name, v.kind, shape, *counts, v.fold, v.fuse, v.quantize)
    return table


def _summary(facts: dict[str, Any]) -> str:
    share = 100 * facts["quantizable_macs"] / max(1, facts["macs"])
    lines = [
        "",
        f"{facts['model']}: {console.count_text(facts['parameters'])} parameters, "
        f"{console.count_text(facts['macs'])} MACs at batch {facts['batch']}, {share:.1f} % of them in INT8 layers",
        *(f"input {name}: {i['dtype']}[{', '.join(map(str, i['shape']))}]" for name, i in facts["inputs"].items()),
    ]
    for step in facts["steps"]:
        refused = f", {len(step['refusals'])} refused" if step["refusals"] else ""
        lines.append(f"{step['name']}: {len(step['changes'])} changes{refused}")
    return "\n".join(lines)


def _show_folder(folder: Path) -> None:
    from fxcompress.report import Report

    manifest, facts = _json(folder / "manifest.json"), _json(folder / "report.json")
    console.emit({"folder": str(folder), "manifest": manifest, "report": facts})
    console.show(_files_table(folder))
    if facts is not None:
        console.show("", str(Report.from_dict(facts)))


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text()) if path.is_file() else None
    except (OSError, ValueError) as error:
        raise ArtifactError(
            21, f"{path.name} of the saved engine cannot be read", where=str(path), why=str(error)
        ) from error


def _files_table(folder: Path) -> Table:
    table = Table("file", "size", box=None, pad_edge=False)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        table.add_row(str(path.relative_to(folder)), console.size_text(path.stat().st_size))
    return table
