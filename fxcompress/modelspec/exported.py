"""``FILE.pt2``: a program saved by ``torch.export.save``."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from fxcompress.errors import ModelSpecError
from fxcompress.modelspec.resolved import ResolvedModel

__all__ = ["from_exported_file"]


def from_exported_file(spec: str, path: Path) -> ResolvedModel:
    """The module of an exported program, with its own example inputs. Raises ModelSpecError for anything else."""
    _check_archive(path)
    try:
        exported = torch.export.load(path)
    except Exception as error:
        why = f"{type(error).__name__}: {str(error).strip()[:300]}"
        fix = "save it again with this version of torch"
        raise ModelSpecError(15, f"{path} cannot be loaded", why=why, fix=fix) from error
    args, kwargs = exported.example_inputs or ((), {})
    module = exported.module(check_guards=False)
    found = ResolvedModel(spec, "pt2", path.stem, module, tuple(args), dict(kwargs))
    _keep_sizes(found, module)
    return found


def _keep_sizes(found: ResolvedModel, module: GraphModule) -> None:
    """Sizes that were free at export stay free, and the others fixed: the graph may hold them as numbers."""
    vals = [n.meta.get("val") for n in module.graph.nodes if n.op == "placeholder"]
    free = iter([_free_dims(v) for v in vals])
    shapes_args, shapes_kwargs = pytree.tree_map(lambda _: next(free), (found.args, found.kwargs))
    found.dynamic_shapes = shapes_kwargs if not found.args else (*shapes_args, *shapes_kwargs.values())
    tensors = [v for v in vals if isinstance(v, Tensor) and v.dim() > 0]
    if tensors and isinstance(tensors[0].shape[0], int):
        found.fixed_batch = int(tensors[0].shape[0])
        found.notes.append(f"the program was exported for batch {found.fixed_batch} only")


def _free_dims(value: Any) -> dict[int, Any] | None:
    sizes = enumerate(value.shape) if isinstance(value, Tensor) else ()
    return {i: Dim.AUTO for i, size in sizes if not isinstance(size, int)} or None


def _check_archive(path: Path) -> None:
    """Refuse archives that are not exported programs or hold pickled tensors or compiled libraries."""
    fix = "save it with torch.export.save(torch.export.export(...), FILE)"
    if not zipfile.is_zipfile(path):
        raise ModelSpecError(14, f"{path} is not a .pt2 archive", fix=fix)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        configs = [archive.read(n).decode(errors="replace") for n in names if n.endswith("_config.json")]
    if not any("/models/" in n for n in names) or any("/data/aotinductor/" in n for n in names):
        raise ModelSpecError(16, f"{path} is not an exported program alone", why="it may hold compiled code", fix=fix)
    if any(re.search(r'"use_pickle":\s*true', text) for text in configs):
        why = "a pickle runs code when it is opened"
        raise ModelSpecError(17, f"{path} holds pickled tensors", why=why, fix="export it with plain tensors")
