"""Saved folders, above all engines: files, report and environment, and a manifest that is written last.

The folder appears under its name only when it is complete: everything is written into a temporary folder on the same
file system, synced, and renamed. Loading checks size and SHA-256 of every file, and unpickles and imports nothing.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import json
import os
import shutil
import stat
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxcompress.engines import Engine, engine_class, target
from fxcompress.engines.signature import IOSignature
from fxcompress.environment import describe, has_vnni
from fxcompress.errors import ArtifactError, UsageError

__all__ = [
    "ENVIRONMENT",
    "FORMAT",
    "MANIFEST",
    "REPORT",
    "SCHEMA",
    "FolderKind",
    "load",
    "read_folder",
    "save",
    "write_folder",
]

FORMAT = "fxcompress engine"
SCHEMA = 1
MANIFEST, REPORT, ENVIRONMENT = "manifest.json", "report.json", "env.json"
_LARGEST_MANIFEST = 64 << 20
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
_HERE = -100  # AT_FDCWD


@dataclass(frozen=True)
class FolderKind:
    """A kind of saved folder.

    Attributes:
        format: What its manifest calls it.
        schema: Newest layout that this version reads; the one it writes.
        noun: What errors call it.
    """

    format: str
    schema: int
    noun: str


_ENGINE = FolderKind(FORMAT, SCHEMA, "engine")


# ------------------------------------------------------------------------------------------------ saving
def save(
    engine: Engine,
    folder: str | Path,
    *,
    report: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
    extra: Mapping[str, bytes | str] | None = None,
) -> Path:
    """Write an engine.

    Args:
        engine: A built or loaded engine.
        folder: Where to; missing parents are made. A folder that holds a saved engine is replaced in one step.
        report: JSON-ready report; by default what ``engine.report`` gives.
        environment: JSON-ready environment; by default this machine's.
        extra: Further files by plain name.

    Returns:
        The folder.

    Raises:
        ArtifactError: the folder holds something else, or it cannot be written (rights, space); nothing of a new
            folder is left behind and an old one stays whole.
        UsageError: a name in ``extra`` is no plain file name or is taken.
    """
    texts = _texts(engine, report, environment, extra)
    facts = {
        "engine": engine.name,
        "signature": engine.signature.to_dict(),
        "details": engine.details,
        "notes": engine.notes,
    }
    return write_folder(folder, _ENGINE, {**{path.name: path for path in engine.files()}, **texts}, facts)


def write_folder(
    folder: str | Path, kind: FolderKind, contents: Mapping[str, Path | bytes], facts: Mapping[str, Any]
) -> Path:
    """Write a folder that appears under its name only when it is complete.

    Args:
        folder: Where to; missing parents are made. A folder of the same kind is replaced in one step.
        kind: What it is.
        contents: Files by plain name: a file to copy, or the bytes.
        facts: Further entries of the manifest, JSON-ready.

    Returns:
        The folder.

    Raises:
        ArtifactError: as `save`.
    """
    folder = Path(os.path.abspath(folder))
    _check_replaceable(folder, kind)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _check_space(folder.parent, contents)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise _unwritable(folder, kind, error) from error
    try:
        work.chmod(0o755)
        files = {name: _write(work / name, content) for name, content in contents.items()}
        head = {"format": kind.format, "schema": kind.schema, "fxcompress": _version()}
        _write(work / MANIFEST, json.dumps(head | dict(facts) | {"files": files}, indent=1).encode())
        _sync_folder(work)
        _put_in_place(work, folder)
        _sync_folder(folder.parent)
    except OSError as error:
        raise _unwritable(folder, kind, error) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _texts(engine: Engine, report: Any, environment: Any, extra: Mapping[str, bytes | str] | None) -> dict[str, bytes]:
    if report is None and engine.report is not None:
        report = engine.report.to_dict() if hasattr(engine.report, "to_dict") else engine.report
    contents: dict[str, bytes] = {ENVIRONMENT: json.dumps(environment or describe(), indent=1, default=str).encode()}
    if report is not None:
        contents[REPORT] = json.dumps(report, indent=1, default=str).encode()
    taken = {MANIFEST, *contents, *(p.name for p in engine.files())}
    for name, content in (extra or {}).items():
        if not _is_plain(name) or name in taken:
            raise UsageError(
                75, f"{name!r} cannot be the name of an extra file", fix="give a plain name that is not taken"
            )
        contents[name] = content.encode() if isinstance(content, str) else bytes(content)
    return contents


def _version() -> str | None:
    try:
        return importlib.metadata.version("fxcompress")
    except importlib.metadata.PackageNotFoundError:
        return None


def _check_replaceable(folder: Path, kind: FolderKind) -> None:
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ArtifactError(1, "the output is not a folder", where=str(folder), fix="give a new folder")
    if folder.is_dir() and any(folder.iterdir()) and not _is_ours(folder, kind):
        raise ArtifactError(
            2, "the output folder holds other files", where=str(folder), fix="give a new or empty folder"
        )


def _is_ours(folder: Path, kind: FolderKind) -> bool:
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("format") == kind.format


def _check_space(parent: Path, contents: Mapping[str, Path | bytes]) -> None:
    needed = sum(c.stat().st_size if isinstance(c, Path) else len(c) for c in contents.values())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ArtifactError(
            3,
            f"not enough space: {needed / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free",
            where=str(parent),
            fix="free some space or save elsewhere",
        )


def _write(path: Path, content: Path | bytes) -> dict[str, Any]:
    """Write one file, synced to disk; returns its size and hash as written."""
    digest, size = hashlib.sha256(), 0
    with open(path, "xb") as out:
        for block in _blocks(content) if isinstance(content, Path) else [content]:
            out.write(block)
            digest.update(block)
            size += len(block)
        out.flush()
        os.fsync(out.fileno())
    return {"sha256": digest.hexdigest(), "size": size}


def _blocks(path: Path, size: int = 1 << 20) -> Any:
    with open(path, "rb") as file:
        while block := file.read(size):
            yield block


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _put_in_place(work: Path, folder: Path) -> None:
    """Give ``work`` the name ``folder``; what was there before ends up in ``work``."""
    if not folder.exists() or not any(folder.iterdir()):
        work.rename(folder)
        return
    if _exchange(work, folder):
        return
    aside = work.with_name(f"{work.name}.old")
    folder.rename(aside)
    try:
        work.rename(folder)
    except OSError:
        aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step where the system can (Linux); False where it cannot."""
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return int(swap(_HERE, os.fsencode(first), _HERE, os.fsencode(second), _EXCHANGE)) == 0


def _unwritable(folder: Path, kind: FolderKind, error: OSError) -> ArtifactError:
    why = f"{error.strerror or error}" + (f" ({Path(error.filename).name})" if error.filename else "")
    return ArtifactError(
        4, f"the {kind.noun} cannot be saved", where=str(folder), why=why, fix="nothing was written; save elsewhere"
    )


# ------------------------------------------------------------------------------------------------ loading
def load(folder: str | Path, *, threads: int | None = None) -> Engine:
    """Load a saved engine.

    Args:
        folder: What ``save`` wrote.
        threads: Threads of the engine; by default the physical cores.

    Returns:
        The engine; its ``report`` is the saved report as a dict, or None.

    Raises:
        ArtifactError: the folder is incomplete, was changed, or was written by a newer version.
        MissingRuntimeError: the engine's runtime is not installed.
    """
    folder = Path(folder)
    manifest = read_folder(folder, _ENGINE)
    try:
        name, details = str(manifest["engine"]), dict(manifest["details"])
        signature, notes = IOSignature.from_dict(manifest["signature"]), [str(n) for n in manifest["notes"]]
        if not set(details["files"]) <= set(manifest["files"]):
            raise ArtifactError(5, "the manifest names an engine file it does not list", where=MANIFEST)
        target(name).require()
        engine = engine_class(name)(folder, signature, threads=threads, details=details, notes=notes)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            6, "the manifest is damaged", where=MANIFEST, why=f"{type(error).__name__}: {error}"
        ) from error
    except UsageError as error:
        if error.id == "FXC-USAGE-071":
            raise ArtifactError(
                7, "the folder was made for an engine this version does not have", why=error.what
            ) from error
        raise
    _check_processor(engine)
    if REPORT in manifest["files"]:
        engine.report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    return engine


def _check_processor(engine: Engine) -> None:
    """Warn when sums that were exact where the engine was made saturate here."""
    if engine.details.get("full_range_weights") and not has_vnni():
        note = (
            "the engine was made for a processor that adds 8-bit products in 32 bits (VNNI); this one adds them in 16, "
            "where they saturate, so outputs may be far off: compile on this processor, or for it with "
            "FXCOMPRESS_CPU_FLAGS"
        )
        engine.notes.append(note)
        warnings.warn(note, UserWarning, stacklevel=4)


def read_folder(folder: Path, kind: FolderKind) -> dict[str, Any]:
    """The manifest of what `write_folder` wrote, after every file was compared with it.

    Raises:
        ArtifactError: there is none, it is of another kind or a newer version, or a file was changed.
    """
    manifest = _read_manifest(folder, kind)
    _verify(folder, manifest, kind)
    return manifest


def _read_manifest(folder: Path, kind: FolderKind) -> dict[str, Any]:
    path = folder / MANIFEST
    if not _is_regular(path):
        why, fix = f"no {MANIFEST} in it", f"give the folder that the {kind.noun} was saved to"
        raise ArtifactError(8, f"there is no saved {kind.noun}", where=str(folder), why=why, fix=fix)
    if path.stat().st_size > _LARGEST_MANIFEST:
        raise ArtifactError(6, "the manifest is damaged", where=str(path), why="it is too large")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        schema = manifest["schema"]
        if manifest["format"] != kind.format or not isinstance(schema, int) or not isinstance(manifest["files"], dict):
            raise ValueError(f"it is not a manifest of the format {kind.format!r}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(
            6, "the manifest is damaged", where=str(path), why=f"{type(error).__name__}: {error}"
        ) from error
    if schema > kind.schema:
        why = f"its schema is {schema}, this version reads up to {kind.schema}"
        raise ArtifactError(
            9, "the folder was written by a newer version", where=str(path), why=why, fix="upgrade fxcompress"
        )
    return dict(manifest)


def _verify(folder: Path, manifest: dict[str, Any], kind: FolderKind) -> None:
    """Every listed file is there, regular and unchanged, and there is no other."""
    listed = manifest["files"]
    odd = [name for name in listed if not _is_plain(name)]
    if odd:
        raise ArtifactError(10, "the manifest lists a path outside the folder", where=repr(odd[0]))
    present = {entry.name for entry in os.scandir(folder)} - {MANIFEST}
    problems = [f"{n} is missing" for n in sorted(set(listed) - present)]
    problems += [f"{n} does not belong here" for n in sorted(present - set(listed))]
    problems += [f"{n} {p}" for n in sorted(set(listed) & present) if (p := _file_problem(folder / n, listed[n]))]
    if problems:
        fix = "copy or build the folder again"
        raise ArtifactError(
            11, f"the saved {kind.noun} was changed", where=str(folder), why="; ".join(problems), fix=fix
        )


def _file_problem(path: Path, entry: Any) -> str:
    if not _is_regular(path):
        return "is not a regular file"
    if not isinstance(entry, dict) or path.stat().st_size != entry.get("size"):
        return "has another size"
    digest = hashlib.sha256()
    for block in _blocks(path):
        digest.update(block)
    return "" if digest.hexdigest() == entry.get("sha256") else "has another content"


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}
