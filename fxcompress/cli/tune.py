"""``fxcompress tune``: measure kernel configurations on this machine's GPU and keep the fastest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from fxcompress.cli import console
from fxcompress.errors import MissingRuntimeError, UsageError

if TYPE_CHECKING:
    from fxcompress.gpu_clock import Clock
    from fxcompress.kernels.configs import Device, Problem
    from fxcompress.tuning import Tuned

__all__ = ["Bench", "tune"]


class Bench:
    """The GPU that is tuned for; tests put another one in its place.

    Attributes:
        device: What kernels see of it.
        clock: What measures.
        place: Torch device of the tensors.
        cache: Bytes of its second-level cache.
    """

    def __init__(self) -> None:
        import torch

        from fxcompress.environment import installed, pip_line
        from fxcompress.gpu_clock import CudaClock
        from fxcompress.kernels.configs import device_of

        if not torch.cuda.is_available():
            raise UsageError(
                460,
                "there is no CUDA device to tune for",
                why="configurations are measured, not guessed",
                fix="run this on the machine that will run the kernels; elsewhere they use their heuristics",
            )
        if not installed("triton"):
            raise MissingRuntimeError(460, "Triton is not installed", fix=pip_line("triton"))
        self.device: Device = device_of(torch.empty(0, device="cuda"))
        self.clock: Clock = CudaClock()
        self.place = "cuda"
        self.cache = int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)


def tune(
    out: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="Folder of a saved engine: its kernels are tuned.")
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option("--shapes", help="Instead of OUT: llama-3-8b, qwen2.5-7b, ..., or NxK; several with commas."),
    ] = None,
    families: Annotated[str, typer.Option("--families", help="w4a16,w8a8,...; default: all.")] = "",
    rows: Annotated[str, typer.Option("--rows", help="Rows of activations, e.g. 1,16,64; default: 1 to 4096.")] = "",
    dtype: Annotated[str, typer.Option("--dtype", help="Of the activations, with --shapes.")] = "float16",
    group_size: Annotated[int, typer.Option("--group-size", help="Of INT4 weights, with --shapes.")] = 128,
    gpu_time: Annotated[
        float | None, typer.Option("--gpu-time", min=1.0, help="Seconds after which no further problem is begun.")
    ] = None,
    json_output: console.JsonOption = False,
    quiet: console.QuietOption = False,
) -> None:
    """Measure kernel configurations on this GPU and keep the fastest right one of each problem.

    Kernels never tune themselves: they use this table, and a heuristic for what is not in it.
    """
    console.setup(json_output=json_output, quiet=quiet)
    if (out is None) == (shapes is None):
        raise UsageError(465, "tune takes either OUT or --shapes", fix="give one of them")
    problems = _problems(out, shapes, families, rows, dtype, group_size)
    bench = Bench()
    from fxcompress.kernels.configs import overlay_folder, table_name
    from fxcompress.tuning import tune as run

    with console.progress(f"tuning {len(problems)} problems on {bench.device.name}"):
        results = run(
            problems,
            bench.device,
            bench.clock,
            place=bench.place,
            cache=bench.cache,
            gpu_time=gpu_time,
            found=_note,
        )
    table = overlay_folder() / table_name(bench.device.name)
    left = len(problems) - len(results)
    console.emit({"gpu": bench.device.name, "table": str(table), "left": left, "tuned": [t.to_dict() for t in results]})
    console.show(_table(results))
    console.say(f"{len(results)} of {len(problems)} problems are in {table}")


def _problems(
    out: Path | None, shapes: str | None, families: str, rows: str, dtype: str, group_size: int
) -> list[Problem]:
    import torch

    from fxcompress.kernels.configs import M_BUCKETS
    from fxcompress.tuning_shapes import check_families, problems_of_engine, problems_of_shapes, shapes_of

    wanted = _rows(rows) or list(M_BUCKETS)
    names = check_families(families.split(","))
    if out is not None:
        return problems_of_engine(out, names, rows=wanted)
    if dtype not in ("float16", "bfloat16"):
        raise UsageError(466, f"--dtype {dtype} is no dtype of the kernels", fix="use float16 or bfloat16")
    kind: torch.dtype = getattr(torch, dtype)
    return problems_of_shapes(shapes_of(shapes or ""), names, dtype=kind, group_size=group_size, rows=wanted)


def _rows(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(467, f"--rows {text} is no list of numbers", fix="give e.g. --rows 1,16,64")
    return [int(part) for part in parts]


def _note(problem: Problem, tuned: Tuned | None) -> None:
    name = f"{problem.family} {problem.key()}"
    if tuned is None:
        console.say(f"  {name}: no configuration runs and is right")
    else:
        gain = "" if tuned.heuristic_us is None else f", the heuristic's takes {tuned.heuristic_us:.1f}"
        console.say(f"  {name}: {tuned.us:.1f} us{gain}")


def _table(results: list[Tuned]) -> Table:
    from fxcompress.tuning import config_text

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for heading in ("family", "M", "N", "K", "heuristic us", "best us"):
        table.add_column(heading, justify="left" if heading == "family" else "right", no_wrap=True)
    table.add_column("configuration")
    for one in results:
        p: Any = one.problem
        before = "" if one.heuristic_us is None else f"{one.heuristic_us:.1f}"
        cells = (str(p.m), str(p.n), str(p.k), before, f"{one.us:.1f}", config_text(one.config))
        table.add_row(p.family, *cells)
    return table
