"""The one progress bar: on a terminal, on stderr, gone when the work is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["progress_bar"]


@contextmanager
def progress_bar(what: str, total: int, shown: bool, header: str = "") -> Iterator[Callable[[], None]]:
    """A bar with the time left on a terminal, the header alone on a pipe.

    Args:
        what: Word in front of the bar, e.g. ``measured``.
        total: Steps of the work.
        shown: False: nothing at all is written.
        header: Line above the bar.

    Yields:
        What counts one step.
    """
    if not shown:
        yield lambda: None
        return
    console = Console(stderr=True)
    if header:
        console.print(header, markup=False, highlight=False, soft_wrap=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)
