"""MODEL of the command line: a text that names a model, resolved to a module with example inputs.

``py:`` runs the named Python file. The other forms run no code of the model's author, except what ``torch.export.load``
itself may run for a ``.pt2`` file; archives that hold pickles or compiled code are refused here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from fxcompress.errors import ModelSpecError
from fxcompress.modelspec.exported import from_exported_file
from fxcompress.modelspec.hf_folder import from_hf
from fxcompress.modelspec.python_file import from_python
from fxcompress.modelspec.resolved import PICKLES, ResolvedModel, parse_shape
from fxcompress.modelspec.timm_model import from_timm

__all__ = ["FORMS", "ResolvedModel", "parse_shape", "resolve"]

FORMS = (
    "py:FILE.py:FACTORY      a function without arguments that returns the module, or (module, example_inputs)",
    "timm:NAME               a timm architecture with random weights",
    "timm:NAME@FILE          ... with the weights of a .safetensors file; @pretrained downloads timm's own",
    "hf:FOLDER               a local transformers model (config.json and weights)",
    "FILE.pt2                a program saved by torch.export.save",
    "FOLDER                  an engine saved by fxcompress (inspect and benchmark only)",
)
_ENGINE_FILES = (".onnx", ".xml")
_SCHEMES: dict[str, Callable[[str, str], ResolvedModel]] = {"py": from_python, "timm": from_timm, "hf": from_hf}


def resolve(spec: str, *, input_shapes: Sequence[str] = (), seed: int = 0) -> ResolvedModel:
    """The model that ``spec`` names (see `FORMS`).

    Args:
        spec: The MODEL argument.
        input_shapes: Shapes of the example inputs (see `parse_shape`), in the order of the model's inputs. They replace
            what the model itself brings.
        seed: Seed of random weights and random example inputs.

    Raises:
        ModelSpecError: no model can be made of it; the accepted forms and the nearest one are listed.
        MissingRuntimeError: timm or transformers is not installed.
    """
    kind, _, rest = spec.partition(":")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = _SCHEMES[kind](spec, rest) if kind in _SCHEMES and rest else _from_path(spec)
        if input_shapes:
            found.args, found.kwargs = tuple(parse_shape(text) for text in input_shapes), {}
    if found.module is not None and found.kind != "pt2":  # an exported program has no modes to switch
        found.module.eval()
    return found


def _from_path(spec: str) -> ResolvedModel:
    path = Path(spec)
    if path.is_dir() and (path / "manifest.json").is_file():
        return ResolvedModel(spec, "folder", path.resolve().name, folder=path)
    if path.suffix == ".pt2" and path.is_file():
        return from_exported_file(spec, path)
    raise _unknown(spec)


def _unknown(spec: str) -> ModelSpecError:
    path = Path(spec)
    why, near = "", _nearest(spec)
    if path.suffix in PICKLES:
        why = "a pickle runs code when it is opened, and holds weights without the network they belong to"
        near = [
            "py:FILE.py:FACTORY with a factory that builds the network and loads them",
            "a .pt2 of torch.export.save",
        ]
    elif path.suffix in _ENGINE_FILES:
        why = "models are read from PyTorch; `fxcompress benchmark` can time this file"
    elif path.suffix == ".pt2":
        why = "there is no such file"
    fix = "MODEL is one of\n       " + "\n       ".join(FORMS)
    if near:
        fix = f"did you mean {' or '.join(near)}?\n       {fix}"
    return ModelSpecError(1, f"{spec!r} names no model", why=why, fix=fix)


def _nearest(spec: str) -> list[str]:
    """The forms the user may have had in mind."""
    path = Path(spec)
    prefix, colon, rest = spec.partition(":")
    if path.suffix == ".py" and path.is_file():
        return [f"py:{spec}:FACTORY"]
    if (path / "config.json").is_file():
        return [f"hf:{spec}"]
    if prefix.endswith(".py"):
        return [f"py:{spec}"]
    if colon and rest:
        return [f"{p}:{rest}" for p in difflib.get_close_matches(prefix.lower(), _SCHEMES, 1, cutoff=0.5)]
    siblings = [str(p) for p in path.parent.glob("*.pt2")] if path.parent.is_dir() else []
    close = difflib.get_close_matches(spec, siblings, 1)
    return close or ([f"timm:{spec}"] if re.fullmatch(r"[a-z0-9_.]{4,}", spec) and path.suffix not in PICKLES else [])
