"""A checkpoint folder as transformers lays it out: ``model.safetensors`` (or parts and an index) and ``config.json``."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from fxcompress.errors import ArtifactError
from fxcompress.prune.sensitivity_cache import replace_file

__all__ = ["CONFIG", "Reader", "add_tensors", "empty_quantization", "write_checkpoint"]

CONFIG: Final = "config.json"
_WEIGHTS: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"
_ADDED: Final = "model-kv-cache-scales.safetensors"


def write_checkpoint(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write both files, each in one step; ``config.json`` comes last.

    Raises:
        ArtifactError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _INDEX).unlink(missing_ok=True)  # of an older checkpoint: loaders would follow it
        _write_tensors(folder / _WEIGHTS, tensors)
        _write_json(folder / CONFIG, config)
    except OSError as error:
        raise _unwritable(folder, error) from error


def add_tensors(folder: Path, tensors: Mapping[str, Tensor], quantization: Mapping[str, Any]) -> None:
    """Add tensors and entries of ``quantization_config`` to a checkpoint.

    Raises:
        ArtifactError: there is no checkpoint, it has no module that a tensor belongs to, or it cannot be written.
    """
    reader = Reader(folder)
    known = {name.rpartition(".")[0] for name in reader.names}
    holders = {".".join(name.split(".")[:i]) for name in known for i in range(1, name.count(".") + 2)}
    strange = sorted({n.rpartition(".")[0] for n in tensors} - holders)
    if strange:
        what = f"the checkpoint has no module {strange[0]!r}"
        fix = "give prefix= what stands in front of every name in the program"
        raise ArtifactError(331, what, where=str(folder), why=f"its names begin like {min(known)!r}", fix=fix)
    config = dict(reader.config)
    config["quantization_config"] = {**(config.get("quantization_config") or empty_quantization()), **quantization}
    try:
        if reader.index is None:
            everything = {name: reader.read(name) for name in reader.names}
            _write_tensors(folder / _WEIGHTS, everything | dict(tensors))
        else:
            _write_tensors(folder / _ADDED, tensors)
            places = {**reader.index["weight_map"], **dict.fromkeys(tensors, _ADDED)}
            _write_json(folder / _INDEX, {**reader.index, "weight_map": places})
        _write_json(folder / CONFIG, config)
    except OSError as error:
        raise _unwritable(folder, error) from error


def empty_quantization() -> dict[str, Any]:
    """``quantization_config`` of a checkpoint without quantized layers."""
    return {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "quantization_status": "frozen",
        "global_compression_ratio": None,
        "config_groups": {},
        "ignore": [],
        "kv_cache_scheme": None,
    }


class Reader:
    """A checkpoint on disk; tensors are read one by one.

    Args:
        folder: With ``config.json`` and ``model.safetensors``, or parts and their index.

    Attributes:
        config: ``config.json``.
        index: The index of parts; None for a single file.
        names: Tensor names.

    Raises:
        ArtifactError: a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: dict[str, Any] = self._json(CONFIG)
        self.index: dict[str, Any] | None = self._json(_INDEX) if (folder / _INDEX).exists() else None
        try:
            places = {} if self.index is None else {str(k): str(v) for k, v in self.index["weight_map"].items()}
        except (KeyError, AttributeError) as error:
            raise self._damaged(_INDEX, error) from error
        if any(Path(place).name != place for place in places.values()):
            raise self._damaged(_INDEX, ValueError("a part lies outside the folder"))
        self._places = places or dict.fromkeys(self._names_of(_WEIGHTS), _WEIGHTS)
        self.names = list(self._places)

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.folder / self._places[name], framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
                return tensor
        except (OSError, SafetensorError) as error:
            raise self._damaged(self._places[name], error) from error

    def modules(self) -> Iterator[tuple[str, dict[str, str]]]:
        """Module path, and the last parts of its tensors' names -> full names."""
        found: dict[str, dict[str, str]] = {}
        for name in self.names:
            path, _, leaf = name.rpartition(".")
            found.setdefault(path, {})[leaf] = name
        yield from found.items()

    def _names_of(self, part: str) -> list[str]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.folder / part, framework="pt") as file:
                return list(file.keys())
        except (OSError, SafetensorError) as error:
            raise self._damaged(part, error) from error

    def _json(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads((self.folder / name).read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise ValueError("it holds no object")
        except (OSError, ValueError) as error:
            raise self._damaged(name, error) from error
        return content

    def _damaged(self, name: str, error: Exception) -> ArtifactError:
        why = f"{type(error).__name__}: {error}"
        return ArtifactError(330, "the checkpoint cannot be read", where=str(self.folder / name), why=why)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        plain = {n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
        save_file(plain, name, metadata={"format": "pt"})
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    replace_file(path, json.dumps(content, indent=2))


def _unwritable(folder: Path, error: OSError) -> ArtifactError:
    why = error.strerror or str(error)
    return ArtifactError(332, "the checkpoint cannot be written", where=str(folder), why=why)
