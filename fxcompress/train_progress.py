"""What `fine_tune` shows while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["reporting"]


@contextmanager
def reporting(show: bool, run: Any) -> Iterator[Callable[[Any], None]]:
    """A bar on a terminal, a line per epoch elsewhere, nothing if not asked for.

    Args:
        show: Whether it is asked for.
        run: The run: its ``train`` data, ``total`` epochs, and ``advance``, which is set to move the bar.

    Yields:
        What takes the record of each epoch.
    """
    console = Console(stderr=True, highlight=False)
    if not show:
        yield lambda record: None
    elif not console.is_terminal:
        yield lambda record: console.print(_line(record, run.total), markup=False, soft_wrap=True)
    else:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            length = len(run.train) if hasattr(run.train, "__len__") else None
            task = bar.add_task("training", total=length)
            run.advance = lambda loss: bar.update(task, advance=1, description=f"loss {loss:.4f}")

            def report(record: Any) -> None:
                console.print(_line(record, run.total), markup=False)
                bar.reset(task)

            yield report


def _line(record: Any, total: int) -> str:
    score = "" if record.score is None else f"  score {record.score:.4f}"
    return f"epoch {record.epoch + 1}/{total}  loss {record.loss:.4f}{score}  {record.seconds:.1f} s"
