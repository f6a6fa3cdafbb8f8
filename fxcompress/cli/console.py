"""Where the command line writes: results to stdout, notes, progress and errors to stderr."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.markup import escape

from fxcompress.errors import FxcError

__all__ = [
    "JsonOption",
    "QuietOption",
    "complain",
    "count_text",
    "emit",
    "fail",
    "line",
    "progress",
    "reset",
    "say",
    "settings",
    "setup",
    "show",
    "size_text",
]

#: Columns where the output is no terminal: nothing is cut, and a file has no width.
WIDE = 200

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, to stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes, no tracebacks.")]


@dataclass
class Settings:
    """What the running command was asked for."""

    json: bool = False
    quiet: bool = False


settings = Settings()


def reset() -> None:
    """Forget the settings of an earlier command in this process."""
    setup(json_output=False, quiet=False)


def setup(*, json_output: bool, quiet: bool) -> None:
    """Called first by every command."""
    settings.json, settings.quiet = json_output, quiet


def _console(*, stderr: bool) -> Console:
    """A console on the current stream; ``NO_COLOR`` is respected, and a pipe gets wide plain lines."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else WIDE
    return Console(stderr=stderr, width=width, highlight=False)


def show(*parts: RenderableType) -> None:
    """Print tables or text to stdout; nothing with ``--json``."""
    if not settings.json:
        console = _console(stderr=False)
        for part in parts:
            console.print(part, markup=False, soft_wrap=isinstance(part, str))


def line(text: str) -> None:
    """One plain line to stdout."""
    _console(stderr=False).print(text, markup=False, soft_wrap=True)


def emit(data: Mapping[str, Any]) -> None:
    """Print JSON to stdout when ``--json`` was given. Not-a-number and infinity become null."""
    if settings.json:
        sys.stdout.write(json.dumps(plain(data), indent=2, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """``value`` as what JSON can hold."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)


def say(text: str) -> None:
    """One line to stderr, unless ``--quiet`` was given."""
    if not settings.quiet:
        _console(stderr=True).print(text, markup=False, soft_wrap=True)


def complain(error: BaseException) -> None:
    """Print an error to stderr without its traceback, also when quiet."""
    text = "\n".join([_text(error), *getattr(error, "__notes__", [])])
    _console(stderr=True).print(text, markup=False, soft_wrap=True)


def fail(error: BaseException, code: int) -> None:
    """Print an error: text to stderr and, with ``--json``, an object to stdout."""
    complain(error)
    parts = ("id", "what", "where", "why", "fix")
    facts = {n: getattr(error, n) for n in parts} if isinstance(error, FxcError) else {"what": _text(error)}
    emit({"error": facts | {"notes": list(getattr(error, "__notes__", []))}, "exit_code": code})


def _text(error: BaseException) -> str:
    return str(error) if isinstance(error, FxcError) else f"{type(error).__name__}: {error}"


class _Listener(logging.Handler):
    def __init__(self, write: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self.write = write

    def emit(self, record: logging.LogRecord) -> None:
        self.write(record.getMessage())


@contextmanager
def progress(text: str) -> Iterator[None]:
    """Say what is going on while the body runs: a live line on a terminal, plain lines on a pipe, nothing if quiet."""
    console = _console(stderr=True)
    if settings.quiet:
        yield
    elif console.is_terminal:
        with console.status(escape(text)) as status, _listening(lambda m: status.update(escape(f"{text}: {m}"))):
            yield
    else:
        say(text)
        with _listening(lambda m: say(f"  {m}")):
            yield


@contextmanager
def _listening(write: Callable[[str], None]) -> Iterator[None]:
    logger = logging.getLogger("fxcompress")
    level, listener = logger.level, _Listener(write)
    logger.addHandler(listener)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(listener)
        logger.setLevel(level)


def size_text(size: float) -> str:
    """Bytes for people: ``12.3 MB`` (powers of ten)."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= limit:
            return f"{size / limit:.1f} {unit}"
    return f"{size:.0f} B"


def count_text(count: float) -> str:
    """A count for people: ``1.82 G``."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.2f} {unit}"
    return f"{count:.0f}"
