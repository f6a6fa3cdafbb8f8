"""Measurements on disk: one JSON file per program, weights and options, replaced in one step for each new number."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.environment import package_version
from fxcompress.errors import ArtifactError, UsageError
from fxcompress.ir import Program

__all__ = ["Cache", "fingerprint", "replace_file"]

_FORMAT, _SCHEMA = "fxcompress sensitivity cache", 1
#: Two runs of one evaluation may differ by this much (relative): threads add in another order.
_SAME = 1e-4


def fingerprint(program: Program, importance: Any, options: Mapping[str, Any]) -> str:
    """SHA-256 of what measurements depend on: graph, weights, importance, options, version. The data are not part."""
    digest = hashlib.sha256()
    known = {"importance": _plain(importance), "options": _plain(options), "version": package_version("fxcompress")}
    digest.update(json.dumps(known, sort_keys=True).encode())
    digest.update(program.text().encode())
    tensors = [
        *program.gm.named_parameters(remove_duplicate=False),
        *program.gm.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in tensors:
        digest.update(name.encode() + _digest(tensor))
    return digest.hexdigest()


def _digest(tensor: Tensor) -> bytes:
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    head = f"{tensor.dtype}{list(tensor.shape)}".encode()
    return hashlib.sha256(head + flat.view(torch.uint8).numpy().tobytes()).digest()


def _plain(value: Any) -> Any:
    """An option as JSON that says what it is, without addresses."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        return _digest(value).hex()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted(str(v) for v in value)
    kind = value if hasattr(value, "__qualname__") else type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, nn.Module)):
        return [name, {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}]
    return name


class Cache:
    """The measurements of one fingerprint.

    Args:
        folder: Where the file lies; made when missing.
        key: The fingerprint.

    Raises:
        ArtifactError: the folder cannot be made, or the file is damaged.
    """

    def __init__(self, folder: str | Path, key: str) -> None:
        self.path = Path(folder) / f"sensitivity-{key[:16]}.json"
        self.key = key
        self.baseline: float | None = None
        self._points: dict[tuple[str, float], dict[str, Any]] = {}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(self.path, error) from error
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if (content["format"], content["schema"], content["key"]) != (_FORMAT, _SCHEMA, self.key):
                raise ValueError("it belongs to something else")
            self.baseline = float(content["baseline"])
            for group, point in content["points"]:
                self._points[str(group), float(point["ratio"])] = _checked(point)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            why, fix = f"{type(error).__name__}: {error}", "delete it: it is measured again"
            raise ArtifactError(
                61, "the cache of measurements is damaged", where=str(self.path), why=why, fix=fix
            ) from error

    def check_baseline(self, baseline: float) -> None:
        """Note the metric of the whole program.

        Raises:
            UsageError: it was another one when the cached measurements were made.
        """
        if self.baseline is None:
            self.baseline = baseline
        elif not math.isclose(self.baseline, baseline, rel_tol=_SAME, abs_tol=1e-12):
            raise UsageError(
                185,
                "the cached measurements were made with another evaluate",
                where=str(self.path),
                why=f"it gave {self.baseline:.6g} for the program as it is, and now gives {baseline:.6g}",
                fix="give another cache folder, or delete the file; evaluate must repeat itself",
            )

    def get(self, group: str, ratio: float) -> dict[str, Any] | None:
        """The measurement as a dict of its fields; None when there is none."""
        return self._points.get((group, ratio))

    def points(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Group and measurement, all of them."""
        for (group, _), point in self._points.items():
            yield group, dict(point)

    def add(self, group: str, point: Mapping[str, Any]) -> None:
        """Keep a measurement, on disk too.

        Raises:
            ArtifactError: the file cannot be written.
        """
        self._points[group, float(point["ratio"])] = dict(point)
        points = [[name, values] for name, values in self.points()]
        head = {"format": _FORMAT, "schema": _SCHEMA, "key": self.key, "baseline": self.baseline}
        try:
            replace_file(self.path, json.dumps(head | {"points": points}, allow_nan=False))
        except OSError as error:
            raise _unwritable(self.path, error) from error


def _checked(point: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: float(point[name]) for name in ("ratio", "metric")}
    if not all(math.isfinite(v) for v in found.values()):
        raise ValueError("a measurement is not finite")
    return found | {name: int(point[name]) for name in ("removed", "parameters", "macs")}


def replace_file(path: Path, content: str | bytes) -> None:
    """Write ``path`` in one step: another process, or a crash, sees the old content or the new."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _unwritable(path: Path, error: OSError) -> ArtifactError:
    return ArtifactError(
        62, "a measurement cannot be saved", where=str(path), why=error.strerror or str(error), fix="save elsewhere"
    )
