"""Checkpoints of a training run: safetensors and JSON, no pickle.

Whatever Python values a state is made of (numbers, text, lists, tuples, dicts with any such keys, tensors) is written as
JSON that names its tensors, and read back as the same values. The folder is replaced in one step, so that a crash while
it is written leaves the previous one whole.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from fxcompress.artifact import MANIFEST, FolderKind, read_folder, write_folder
from fxcompress.errors import ArtifactError

__all__ = ["exists", "generators", "pack", "random_state", "read", "restore_random_state", "unpack", "write"]

_KIND = FolderKind("fxcompress training checkpoint", 1, "checkpoint")
_STATE, _TENSORS, _WEIGHTS, _BEST = "state.json", "state.safetensors", "model.safetensors", "best.safetensors"


# ------------------------------------------------------------------------------------------------ values
def pack(value: Any, tensors: dict[str, Tensor], where: str = "state") -> Any:
    """``value`` as JSON; its tensors go into ``tensors`` by name.

    Raises:
        ArtifactError: a value that is none of numbers, text, lists, tuples, dicts and tensors.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, Tensor):
        name = f"{len(tensors)} {where}"  # the number keeps names apart that read the same
        tensors[name] = _plain(value)
        return {"tensor": name}
    if isinstance(value, list | tuple):
        items = [pack(item, tensors, f"{where}.{i}") for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, Mapping):
        pairs = [[pack(k, tensors, where), pack(v, tensors, f"{where}.{k}")] for k, v in value.items()]
        return {"dict": pairs}
    what = f"a {type(value).__name__} cannot be written into a checkpoint"
    raise ArtifactError(300, what, where=where, fix="train without a checkpoint, or without what holds it")


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Inverse of `pack`."""
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "float":
        return float(content)
    if kind == "tuple":
        return tuple(unpack(item, tensors) for item in content)
    return {unpack(k, tensors): unpack(v, tensors) for k, v in content}


def _plain(tensor: Tensor) -> Tensor:
    """A copy that shares no memory, which is what safetensors takes."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


# ------------------------------------------------------------------------------------------------ folders
def exists(folder: Path) -> bool:
    """True when something was written there before."""
    return (folder / MANIFEST).is_file()


def write(folder: Path, state: Any, weights: Mapping[str, Tensor], best: Mapping[str, Tensor] | None) -> None:
    """Write a checkpoint; the one that was there goes.

    Args:
        folder: Where to.
        state: Anything `pack` takes.
        weights: The model's tensors by name.
        best: The best ones so far, if there are any.

    Raises:
        ArtifactError: the folder cannot be written or holds other files, or the state holds a strange value.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(pack(state, tensors), indent=1, allow_nan=False)
    files = {_STATE: text.encode(), _TENSORS: save_tensors(tensors)}
    files[_WEIGHTS] = save_tensors({name: _plain(value) for name, value in weights.items()})
    if best is not None:
        files[_BEST] = save_tensors({name: _plain(value) for name, value in best.items()})
    write_folder(folder, _KIND, files, {})


def read(folder: Path) -> tuple[Any, dict[str, Tensor], dict[str, Tensor] | None]:
    """State, weights and best weights of a checkpoint.

    Raises:
        ArtifactError: there is none, or a file is missing or was changed.
    """
    files = read_folder(folder, _KIND)["files"]
    try:
        tensors, weights = (load_tensors((folder / name).read_bytes()) for name in (_TENSORS, _WEIGHTS))
        best = load_tensors((folder / _BEST).read_bytes()) if _BEST in files else None
        state = unpack(json.loads((folder / _STATE).read_text(encoding="utf-8")), tensors)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ArtifactError(301, "the checkpoint cannot be read", where=str(folder), why=why) from error
    return state, weights, best


# ------------------------------------------------------------------------------------------------ randomness
def random_state(loader: Any) -> dict[str, Any]:
    """State of the random generators of torch (processor and CUDA), NumPy and Python, and of a loader's own ones."""
    kind, keys, *rest = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": (str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "python": random.getstate(),
        "loader": [generator.get_state() for generator in generators(loader)],
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: Mapping[str, Any], loader: Any) -> None:
    """Inverse of `random_state`.

    Raises:
        ArtifactError: the loader has another number of generators than when the state was taken.
    """
    own = list(generators(loader))
    if len(own) != len(state["loader"]):
        what = f"the loader has {len(own)} random generators, the checkpoint {len(state['loader'])}"
        raise ArtifactError(302, what, fix="resume with the same kind of loader")
    torch.set_rng_state(state["torch"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])
    for generator, value in zip(own, state["loader"], strict=True):
        generator.set_state(value)
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def generators(loader: Any) -> Iterable[torch.Generator]:
    """The generators of a ``DataLoader`` and its samplers, each once."""
    batches = getattr(loader, "batch_sampler", None)
    holders = (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    return {id(g): g for g in found if isinstance(g, torch.Generator)}.values()
