"""The one progress bar, on stderr: on a terminal gone when the work is done, on a pipe a line now and then."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["Advance", "progress_bar"]

#: Seconds between two lines on a pipe.
_INTERVAL = 30.0


class Advance(Protocol):
    """Counts steps that are done."""

    def __call__(self, steps: int = 1) -> None: ...


@contextmanager
def progress_bar(what: str, total: int, shown: bool, header: str = "") -> Iterator[Advance]:
    """A bar with the time left on a terminal, a line with it every half minute on a pipe.

    Args:
        what: Word in front of the bar, e.g. ``measured``.
        total: Steps of the work.
        shown: False: nothing at all is written.
        header: Line above the bar.

    Yields:
        What counts one step, or as many as it is told.
    """
    if not shown:
        yield lambda steps=1: None
        return
    console = Console(stderr=True)
    if header:
        console.print(header, markup=False, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        yield _Lines(what, total, console)
        return
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda steps=1: bar.advance(task, steps)


class _Lines:
    """Counts steps; says how far it is and how long it will take, as the mean of the steps so far promises."""

    def __init__(self, what: str, total: int, console: Console) -> None:
        self.what, self.total, self.console = what, total, console
        self.done = 0
        self.begin = self.said = time.monotonic()

    def __call__(self, steps: int = 1) -> None:
        self.done += steps
        now = time.monotonic()
        if now - self.said < _INTERVAL or self.done >= self.total:
            return
        self.said = now
        left = timedelta(seconds=round((now - self.begin) / self.done * (self.total - self.done)))
        line = f"{self.what} {self.done}/{self.total}, {left} left"
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)
