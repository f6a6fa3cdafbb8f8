"""Rounded layers on disk: one safetensors file for each value whose readers were rounded, written in one step."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fxcompress.errors import ArtifactError
from fxcompress.prune.sensitivity_cache import replace_file

__all__ = ["Checkpoint"]


class Checkpoint:
    """The files of one run.

    Args:
        folder: Where they lie; made when missing. None: nothing is kept.
        key: What the results depend on. Files of another key are left alone and not read.

    Raises:
        ArtifactError: the folder cannot be made.
    """

    def __init__(self, folder: str | None, key: str) -> None:
        self.folder, self.key = None if folder is None else Path(folder), key
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise _unwritable(self.folder, error) from error

    def _path(self, number: int) -> Path | None:
        return None if self.folder is None else self.folder / f"{self.key[:16]}-{number:05d}.safetensors"

    def read(self, number: int) -> tuple[dict[str, Tensor], list[str]] | None:
        """Tensors and notes of a step; None when it was not done.

        Raises:
            ArtifactError: its file is damaged.
        """
        path = self._path(number)
        if path is None or not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                meta = file.metadata() or {}
                if meta.get("key") != self.key:
                    raise ValueError("it belongs to something else")
                return {name: file.get_tensor(name) for name in file.keys()}, list(json.loads(meta["notes"]))  # noqa: SIM118
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            why, fix = f"{type(error).__name__}: {error}", "delete it: the layer is rounded again"
            raise ArtifactError(310, "a rounded layer cannot be read", where=str(path), why=why, fix=fix) from error

    def write(self, number: int, tensors: dict[str, Tensor], notes: list[str]) -> None:
        """Keep a step.

        Raises:
            ArtifactError: the file cannot be written.
        """
        path = self._path(number)
        if path is None:
            return
        own = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        try:
            replace_file(path, save(own, {"key": self.key, "notes": json.dumps(notes)}))
        except OSError as error:
            raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> ArtifactError:
    return ArtifactError(
        311, "a rounded layer cannot be saved", where=str(path), why=error.strerror or str(error), fix="save elsewhere"
    )
