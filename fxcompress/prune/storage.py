"""Saved pruned programs: safetensors and JSON in one folder, loaded onto the original model or without it.

A folder holds ``weights.safetensors`` (every tensor once, under the user's ``state_dict`` key), ``pruning.json`` (the
plans that were applied, with the kept indices, and what each tensor is), ``program.json`` (graph and layers),
``example.safetensors`` (the example inputs, and samples of the outputs they give) and a manifest with the SHA-256 of
each file, written last. Nothing is pickled, and loading runs no code from the folder.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ShapesCollection

from fxcompress.analysis import count_parameters
from fxcompress.artifact import FolderKind, read_folder, write_folder
from fxcompress.capture import capture
from fxcompress.errors import ArtifactError, EngineError, NormalFormError, PassError, UsageError
from fxcompress.ir import Program
from fxcompress.passbase import exact_tolerance, output_error
from fxcompress.prune.block_plan import KIND as BLOCKS
from fxcompress.prune.block_plan import BlockPlan
from fxcompress.prune.plan import PruningPlan
from fxcompress.saved_program import (
    Entry,
    SavedCall,
    describe_form,
    describe_state,
    loaded_tensors,
    put_tensors,
    restore,
    state_entries,
)

__all__ = ["load_pruned", "save_pruned"]

_log = logging.getLogger("fxcompress")
_KIND = FolderKind("fxcompress pruned program", 1, "pruned program")
_PRUNING, _PROGRAM = "pruning.json", "program.json"
_WEIGHTS, _EXAMPLE = "weights.safetensors", "example.safetensors"
#: Elements of each output that are kept to compare with.
_SAMPLES = 1 << 16
#: Outputs may differ by this many times what an exact pass may change: another processor rounds in another order.
_SLACK = 10.0


# ------------------------------------------------------------------------------------------------ saving
def save_pruned(program: Program, folder: str | Path, *, verify: bool = True) -> Path:
    """Save a pruned (and perhaps fine-tuned) program.

    The example inputs the program was captured with are saved with their values.

    Args:
        program: What `PruningPlan.apply` returned; pruned several times, its plans are all saved.
        folder: Where to; missing parents are made. A folder that holds a saved pruned program is replaced in one step.
        verify: Read the graph back, run it on the example, and compare, before anything is written.

    Returns:
        The folder.

    Raises:
        ArtifactError: the folder holds something else, cannot be written, or the graph does not come back as it was.
    """
    entries, tensors = describe_state(program)
    leaves = program.signature.flatten(*program.example)
    example = {f"input.{i}": v for i, v in enumerate(v for v in leaves if isinstance(v, Tensor))}
    outputs = {f"output.{i}": _sample(v) for i, v in enumerate(program.run_example()) if isinstance(v, Tensor)}
    description: dict[str, Any] = {
        "plans": program.history,
        "tensors": [e.to_json() for e in entries],
        "notes": program.notes,
    }
    form: dict[str, Any] | None = None
    try:
        description["call"] = SavedCall.of(program).to_json()
        form = _on_cpu(describe_form(program))
    except (EngineError, UsageError) as error:
        description.setdefault("call", None)
        description["no_graph"] = str(error)
        _log.warning("the pruned program is saved without its graph, so loading it needs the model: %s", error.what)
    with tempfile.TemporaryDirectory() as scratch:
        contents: dict[str, Path | bytes] = {
            _WEIGHTS: _tensor_file(tensors, Path(scratch) / _WEIGHTS),
            _EXAMPLE: _tensor_file(example | outputs, Path(scratch) / _EXAMPLE),
            _PRUNING: _json(description),
        }
        if form is not None:
            contents[_PROGRAM] = _json(form)
            if verify:
                _check_reading(program, Path(scratch), contents)
        return write_folder(folder, _KIND, contents, {"torch": torch.__version__})


def _json(content: Any) -> bytes:
    return json.dumps(content, allow_nan=False).encode()


def _tensor_file(tensors: dict[str, Tensor], path: Path) -> Path:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    seen: set[int] = set()
    plain = {}
    for name, tensor in tensors.items():
        flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        storage = flat.untyped_storage().data_ptr()
        plain[name] = flat.clone() if storage in seen else flat
        seen.add(storage)
    try:
        save_file(plain, path)
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise ArtifactError(43, "the tensors cannot be written to a file", where=path.name, why=str(error)) from error
    return path


def _sample(output: Tensor) -> Tensor:
    """Evenly spaced elements, all of them where there are few."""
    flat = output.detach().reshape(-1)
    return flat[:: max(1, -(-flat.numel() // _SAMPLES))].clone()


def _on_cpu(content: Any) -> Any:
    """The graph's JSON with every device set to the CPU, where saved tensors come back."""
    if isinstance(content, list):
        return [_on_cpu(v) for v in content]
    if not isinstance(content, dict):
        return content
    return {k: "cpu" if k == "device" and isinstance(v, str) else _on_cpu(v) for k, v in content.items()}


def _check_reading(program: Program, scratch: Path, contents: dict[str, Path | bytes]) -> None:
    """Read what is going to be saved and compare its graph and outputs with the program's."""
    for name, content in contents.items():
        if isinstance(content, bytes):
            (scratch / name).write_bytes(content)
    saved = _Saved.read(scratch)
    again = saved.from_graph()
    wrong = _first_difference(program, again)
    if wrong:
        raise ArtifactError(44, "the saved graph does not come back as it was", why=wrong, fix="report this model")
    saved.check_outputs(again)


def _first_difference(program: Program, other: Program) -> str:
    """The first line of the graphs that differs, devices and shapes aside."""
    for ours, theirs in zip_longest(_lines(program), _lines(other), fillvalue="nothing"):
        if ours != theirs:
            return f"{ours} became {theirs}"
    return ""


def _lines(program: Program) -> list[str]:
    text = re.sub(r"device\(type='\w+'(, index=\d+)?\)", "device(type='cpu')", program.text())
    return [line.split("  # ")[0] for line in text.splitlines()]


# ------------------------------------------------------------------------------------------------ loading
def load_pruned(model: nn.Module | Program | None, folder: str | Path, *, verify: bool = True) -> Program:
    """Load what `save_pruned` saved.

    Args:
        model: The original, unpruned model (any weights), which is captured again and pruned as it was; or its captured
            program; or None to build the program from the saved graph. It is left as it is.
        folder: What `save_pruned` wrote.
        verify: Run the program on the saved example and compare with the outputs it had when it was saved.

    Returns:
        The program: the saved tensors bit for bit, ready to train. On the model's device; on the CPU without one.

    Raises:
        ArtifactError: the folder is incomplete or was changed, or the model is not the one that was pruned (the first
            tensor that does not fit is named).
        CaptureError: the model cannot be captured with the saved example.
        UsageError: ``model`` is something else.
    """
    if not (model is None or isinstance(model, (nn.Module, Program))):
        what = f"load_pruned takes a model, a program or None, not {type(model).__name__}"
        raise UsageError(172, what, fix="load_pruned(model, folder), or load_pruned(None, folder) without the model")
    folder = Path(folder)
    read_folder(folder, _KIND)
    saved = _Saved.read(folder)
    program = saved.from_graph() if model is None else saved.from_model(model)
    if verify:
        saved.check_outputs(program)
    return program


@dataclass
class _Saved:
    """What a folder holds, read and checked for its form."""

    folder: Path
    plans: list[dict[str, Any]]
    entries: list[Entry]
    notes: list[str]
    call: SavedCall | None
    no_graph: str
    weights: dict[str, Tensor]
    inputs: list[Tensor]
    outputs: dict[int, Tensor]

    @classmethod
    def read(cls, folder: Path) -> _Saved:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            content = json.loads((folder / _PRUNING).read_text(encoding="utf-8"))
            example = load_file(folder / _EXAMPLE)
            inputs = [example[f"input.{i}"] for i in range(sum(n.startswith("input.") for n in example))]
            return cls(
                folder,
                [dict(p) for p in content["plans"]],
                [Entry.from_json(e) for e in content["tensors"]],
                [str(n) for n in content["notes"]],
                None if content["call"] is None else SavedCall.from_json(content["call"]),
                str(content.get("no_graph", "")),
                load_file(folder / _WEIGHTS),
                inputs,
                {int(n.partition(".")[2]): v for n, v in example.items() if n.startswith("output.")},
            )
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise _damaged(error) from error

    def from_graph(self) -> Program:
        """The program of ``program.json``."""
        if self.no_graph or self.call is None:
            why, fix = self.no_graph, "load_pruned(model, folder) with the original model"
            raise ArtifactError(46, "the folder holds no graph", where=str(self.folder), why=why, fix=fix)
        found = loaded_tensors(self.entries, self.weights)
        try:
            form = json.loads((self.folder / _PROGRAM).read_text(encoding="utf-8"))
            kinds = {e.name: e.kind for e in self.entries}
            program = restore(self.call, form, found, self.inputs, kinds)
        except (OSError, KeyError, TypeError, ValueError, AttributeError, NormalFormError) as error:
            raise _damaged(error) from error
        except RuntimeError as error:
            what = "the saved graph does not run in this version of torch"
            fix = "load_pruned(model, folder) with the original model"
            raise ArtifactError(47, what, why=str(error)[:500], fix=fix) from error
        program.notes, program.history = list(self.notes), list(self.plans)
        return program

    def from_model(self, model: nn.Module | Program) -> Program:
        """The saved plans and tensors on the original model."""
        program = model.clone() if isinstance(model, Program) else self.captured(model)
        name = type(model).__name__ if isinstance(model, nn.Module) else "the program"
        for number, plan in enumerate(self.plans, 1):
            try:
                wrong = _first_dense_misfit(program, plan)
                if wrong:
                    raise self.unfit(name, f"before plan {number} of {len(self.plans)}, {wrong}")
                kind = BlockPlan if plan.get("kind") == BLOCKS else PruningPlan
                program = kind.from_dict(plan).apply(program)
            except PassError as error:
                why = f"plan {number} of {len(self.plans)}: {error.what}" + (f" ({error.where})" if error.where else "")
                raise self.unfit(name, why) from error
            except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
                raise _damaged(error) from error
        wrong = self.first_misfit(program)
        if wrong:
            raise self.unfit(name, wrong)
        device = _device(program)
        stored = {key: tensor.to(device) for key, tensor in self.weights.items()}
        put_tensors(program.gm, loaded_tensors(self.entries, stored))
        program.history = list(self.plans)
        return program

    def captured(self, model: nn.Module) -> Program:
        """``model`` as the pruned one was captured: the same example, the same free sizes."""
        call = self.call
        if call is None:
            fix = "capture the model yourself: load_pruned(fxc.capture(model, ...), folder)"
            raise ArtifactError(48, "the folder does not say how the model is called", why=self.no_graph, fix=fix)
        parameter = next(model.parameters(), None)
        device = torch.device("cpu") if parameter is None else parameter.device
        inputs = [v.to(device) for v in self.inputs]
        args, kwargs = call.example(inputs)
        free = call.free_dimensions()
        if free <= {0}:
            return capture(model, args, kwargs, dynamic_batch=bool(free))
        shapes = ShapesCollection()
        for tensor, dims in zip(inputs, call.dynamic_shapes(), strict=True):
            if dims:
                shapes[tensor] = dims
        return capture(model, args, kwargs, dynamic_shapes=shapes)

    def first_misfit(self, program: Program) -> str:
        """The first tensor of the replayed program that is not as it was saved, in words; ``""`` when all fit."""
        have = {name: _describe(kind, tensor) for name, kind, tensor in state_entries(program.gm)}
        for entry in self.entries:
            got = have.pop(entry.name, "nothing")
            if got != str(entry):
                return f"{entry.name}: saved as {entry}, the pruned model has {got}"
        return f"{next(iter(have))}: not saved, the model has it" if have else ""

    def unfit(self, name: str, why: str) -> ArtifactError:
        """The model is another one."""
        fix = "give the model that was pruned, in the form it was captured, or None to load the saved graph"
        return ArtifactError(49, f"{name} is not the model that was pruned", where=str(self.folder), why=why, fix=fix)

    def check_outputs(self, program: Program) -> None:
        """Compare outputs for the saved example with those at saving."""
        got = program.run_example()
        tensors = {i: _sample(v).cpu() for i, v in enumerate(got) if isinstance(v, Tensor)}
        error, limit = float("inf"), _SLACK * exact_tolerance(program, list(tensors.values()))
        if tensors.keys() == self.outputs.keys():
            error = output_error(list(self.outputs.values()), [tensors[i] for i in self.outputs])
        if not error <= limit:
            raise ArtifactError(
                50,
                "the loaded program does not compute what the saved one did",
                where=str(self.folder),
                why=f"outputs for the saved example differ by {error:.3g} (relative), more than {limit:.0e}",
                fix="give the model's code as it was when it was pruned; verify=False loads without this check",
            )


def _first_dense_misfit(program: Program, plan: dict[str, Any]) -> str:
    """Why the plan was not made for ``program``, in words; ``""`` when nothing says so.

    A vector that a plan cuts (a bias, a norm's weight) had the entries that stayed and those that went, where the two
    make up a whole range. The rest shows in the number of parameters.
    """
    shapes = {name: tuple(t.shape) for name, _, t in state_entries(program.gm) if t is not None}
    for name, dims in plan.get("edits", {}).items():
        if name not in shapes:
            return f"{name}: the plan cuts it, the model has none"
        gone = plan["removed"].get(name.rpartition(".")[0], [])
        known = sorted([*gone, *dims.get("0", [])])
        is_whole = bool(gone) and known == list(range(len(known)))
        if is_whole and len(shapes[name]) == 1 and shapes[name][0] != len(known):
            return f"{name}: the size was {len(known)}, here it is {shapes[name][0]}"
    before, have = int(plan["parameters"][0]), count_parameters(program)
    return "" if have == before else f"the model had {before:,} parameters, this one has {have:,}"


def _describe(kind: str, tensor: Tensor | None) -> str:
    return "none" if tensor is None else f"{kind} {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _device(program: Program) -> torch.device:
    tensor = next((t for _, _, t in state_entries(program.gm) if t is not None), None)
    return torch.device("cpu") if tensor is None else tensor.device


def _damaged(error: Exception) -> ArtifactError:
    return ArtifactError(45, "the saved program cannot be read", why=f"{type(error).__name__}: {error}")
