"""``fxcompress benchmark``: saved engines and model files, timed side by side."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from fxcompress.cli import console
from fxcompress.cli.options import InputShapeOption, ThreadsOption
from fxcompress.errors import FxcError, UsageError

if TYPE_CHECKING:
    from fxcompress.bench import Latency
    from fxcompress.engines import Engine

__all__ = ["Row", "benchmark"]


@dataclass
class Row:
    """One line of the table.

    Attributes:
        name: Path and, where several are asked for, runtime.
        path: Folder or file.
        backend: Runtime.
        engine: Once opened.
        size: Bytes of the engine's files.
        latency: Once timed.
        ratio: Time over the first timed row's: low end, median, high end.
        against: Name of the row that ``ratio`` was measured against.
        status: ``ok``, or why there is no time.
    """

    name: str
    path: Path
    backend: str
    engine: Engine | None = None
    size: int = 0
    latency: Latency | None = None
    ratio: tuple[float, float, float] | None = None
    against: str = ""
    status: str = "ok"
    call: tuple[tuple[Any, ...], dict[str, Any]] = field(default=((), {}))
    error: FxcError | None = None


def benchmark(
    outs: Annotated[
        list[Path], typer.Argument(metavar="OUT...", help="Folders saved by fxcompress, .onnx and .xml files.")
    ],
    backend: Annotated[
        str | None,
        typer.Option("--backend", "-b", help="onnxruntime,openvino,torch: each row on each of them that can run it."),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Batch size, where it is free.")] = 1,
    input_shape: InputShapeOption = None,
    threads: ThreadsOption = None,
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, help="Measuring time of each row.")] = 2.0,
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, help="Interleaved rounds; the interval of the ratio needs 5.")
    ] = 5,
    json_output: console.JsonOption = False,
    quiet: console.QuietOption = False,
) -> None:
    """Time engines side by side, in interleaved rounds, each in a process of its own.

    A row that fails does not stop the others; the exit code is not 0 only when all fail.
    """
    console.setup(json_output=json_output, quiet=quiet)
    rows = _rows(outs, backend)
    with console.progress("loading"):
        for row in rows:
            _open(row, threads, input_shape or [], batch)
    with console.progress(f"timing {len(rows)} rows"):
        for group in _groups(rows):
            _time(group, seconds, rounds)
    _fill_ratios(rows)
    console.emit({"batch": batch, "rows": [_facts(row) for row in rows]})
    console.show(_table(rows))
    failures = [row.error for row in rows if row.error is not None]
    for failure in failures:
        console.complain(failure)
    if len(failures) == len(rows):
        raise typer.Exit(failures[0].exit_code)


def _rows(outs: list[Path], backend: str | None) -> list[Row]:
    asked = [b.strip() for b in backend.split(",")] if backend else []
    _check_backends(asked)
    rows = []
    for path in outs:
        for name in asked or [""]:
            label = f"{path} ({name})" if len(asked) > 1 else str(path)
            rows.append(Row(label, path, name))
    return rows


def _check_backends(asked: list[str]) -> None:
    if asked:
        from fxcompress.engines import target

        for name in asked:
            target(name)


def _open(row: Row, threads: int | None, shapes: list[str], batch: int) -> None:
    from fxcompress.cli.modelfiles import backends_of, inputs_of, open_engine

    try:
        possible = backends_of(row.path)
        row.backend = row.backend or possible[0]
        if row.backend not in possible:
            raise UsageError(92, f"{row.path} cannot run in {row.backend}", fix=f"it runs in {' and '.join(possible)}")
        row.engine = open_engine(row.path, row.backend, threads, shapes, batch)
        row.call = inputs_of(row.engine, batch)
        row.engine.signature.bind(*row.call)
        row.size = row.engine.file_size()
    except FxcError as error:
        _give_up(row, error)


def _give_up(row: Row, error: FxcError) -> None:
    row.engine, row.error = None, error
    row.status = error.what


def _groups(rows: list[Row]) -> list[list[Row]]:
    """Rows that can be timed together: those that take the same inputs."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.engine is not None:
            inputs = [f"{s.dtype}{list(s.example)}" for s in row.engine.signature.tensor_inputs()]
            groups.setdefault(" ".join([*inputs, *map(str, row.call[1])]), []).append(row)
    return list(groups.values())


def _time(group: list[Row], seconds: float, rounds: int) -> None:
    """Time rows together; when one of them fails there, each alone."""
    from fxcompress.bench import compare_latency

    engines = {row.name: row.engine for row in group if row.engine is not None}
    try:
        found = compare_latency(engines, *group[0].call, budget_s=seconds * len(engines), rounds=rounds)
    except FxcError as error:
        if len(group) == 1:
            _give_up(group[0], error)
            return
        for row in group:
            _time([row], seconds, rounds)
        return
    for row in group:
        row.latency = found.latency[row.name]
        ratio = found.ratio(row.name, group[0].name)
        row.ratio, row.against = (ratio.low, ratio.median, ratio.high), group[0].name


def _fill_ratios(rows: list[Row]) -> None:
    """Rows that were not timed together with the first one get the quotient of the medians."""
    timed = [(row, row.latency.p50_ms) for row in rows if row.latency is not None]
    for row, p50 in timed:
        if row.against != timed[0][0].name:
            row.ratio = (p50 / timed[0][1],) * 3


def _facts(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "path": str(row.path),
        "backend": row.backend,
        "size": row.size,
        "latency": None if row.latency is None else row.latency.to_dict(),
        "ratio": None if row.ratio is None else dict(zip(("low", "median", "high"), row.ratio, strict=True)),
        "status": row.status,
    }


def _table(rows: list[Row]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("name", overflow="fold", min_width=min(18, max(len(row.name) for row in rows)))
    table.add_column("backend", no_wrap=True)
    for heading in ("size", "p50 ms", "p95 ms", "spread", "runs", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("status", overflow="fold", min_width=6)
    for row in rows:
        t = row.latency
        times = [f"{v:.3f}" for v in (t.p50_ms, t.p95_ms, t.iqr_ms)] + [str(t.runs)] if t is not None else [""] * 4
        ratio = "" if row.ratio is None else f"{row.ratio[1]:.3f}"
        size = console.size_text(row.size) if row.size else ""
        table.add_row(row.name, row.backend, size, *times, ratio, row.status)
    return table
