"""``fxcompress compress``: a model in, a checked and measured engine in a folder out."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxcompress.cli import console
from fxcompress.cli.options import InputShapeOption, ModelArgument, SeedOption, TargetOption, ThreadsOption
from fxcompress.errors import ArtifactError, GateError, UsageError

if TYPE_CHECKING:
    from fxcompress.cli.datafiles import DataSet
    from fxcompress.engines import Engine
    from fxcompress.modelspec import ResolvedModel
    from fxcompress.passbase import Pass

__all__ = ["compress"]

_PASSES = (
    "Passes by name, in order, separated by commas, or a .json file with a list of recipe entries; "
    "default: fusion and, with data, static INT8 where it is faster."
)
_DATA = "Folder of images (sub-folders are classes) or .npz with arrays named like the inputs (or x) and labels (or y)."


@dataclass
class Options:
    """What was asked for; see the options of `compress`."""

    model: str
    out: Path | None
    target: str
    data: Path | None
    samples: int
    calibrator: str
    max_drop: float | None
    ignore: tuple[str, ...]
    passes: str | None
    threads: int | None
    batch_size: int
    seed: int
    measure: bool
    strict: bool
    dump: Path | None
    random_data: bool
    mean: str | None
    std: str | None


def compress(
    model: ModelArgument,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write.", show_default=False)] = None,
    target: TargetOption = "auto",
    data: Annotated[Path | None, typer.Option("--data", "-d", help=_DATA, show_default=False)] = None,
    random_data: Annotated[
        bool, typer.Option("--random-data", help="Calibrate with noise: accuracy then means nothing.")
    ] = False,
    input_shape: InputShapeOption = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Calibration samples.")] = 300,
    calibrator: Annotated[
        str,
        typer.Option("--calibrator", help="minmax, moving_average, histogram, percentile, entropy or mse."),
    ] = "mse",
    max_drop: Annotated[
        float | None,
        typer.Option("--max-drop", min=0.0, help="Largest loss of top-1 accuracy; 0.01 when the data has labels."),
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option("--ignore", help="Glob over layers to leave in float32.", show_default=False)
    ] = None,
    passes: Annotated[str | None, typer.Option("--passes", help=_PASSES, show_default=False)] = None,
    mean: Annotated[
        str | None, typer.Option("--mean", help="Mean of the pixels in [0, 1], e.g. 0.485,0.456,0.406.")
    ] = None,
    std: Annotated[str | None, typer.Option("--std", help="Their standard deviation.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Samples per calibration batch.")] = 16,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Time the engines and keep the faster one.")
    ] = True,
    strict: Annotated[bool, typer.Option("--strict", help="Make every fallback an error.")] = False,
    dump: Annotated[
        Path | None, typer.Option("--dump", help="Folder for the program after each pass.", show_default=False)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done; build and write nothing.")
    ] = False,
    json_output: console.JsonOption = False,
    quiet: console.QuietOption = False,
) -> None:
    """Capture a model, compress it, check and measure the result, and save it.

    Exit code 4 means that a gate was missed: what was built lies in OUT.rejected.
    """
    console.setup(json_output=json_output, quiet=quiet)
    options = Options(
        model, out, target, data, samples, calibrator, max_drop, tuple(ignore or ()), passes, threads, batch_size, seed,
        measure, strict, dump, random_data, mean, std,
    )  # fmt: skip
    _check(options, dry_run)
    from fxcompress.modelspec import resolve

    with console.progress(f"loading {model}"):
        found = resolve(model, input_shapes=input_shape or (), seed=seed)
        found.require_module()
        dataset = _data(options, found, example_given=bool(input_shape))
    for note in [*found.notes, *(dataset.notes if dataset else [])]:
        console.say(f"note: {note}")
    if dry_run:
        from fxcompress.cli.plan import show_plan

        show_plan(options, found, dataset)
        return
    _build(options, found, dataset)


def _check(options: Options, dry_run: bool) -> None:
    """Refuse what cannot work before anything is loaded."""
    if options.random_data and options.data is not None:
        raise UsageError(80, "--data and --random-data exclude each other", fix="drop --random-data")
    if options.out is None and not dry_run:
        raise UsageError(81, "compress needs a folder to write to", fix="add -o out/, or --dry-run to write nothing")
    if options.out is not None and not dry_run:
        _check_folder(options.out)


def _check_folder(out: Path) -> None:
    """What ``save`` would refuse is refused now, not after the work."""
    parent = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    why = ""
    if not parent.is_dir():
        why = f"{parent} is a file"
    elif not os.access(parent, os.W_OK):
        why = f"{parent} is read-only"
    elif out.is_dir() and any(out.iterdir()) and not (out / "manifest.json").is_file():
        why = "it holds other files"
    if why:
        raise ArtifactError(20, f"{out} cannot be written", why=why, fix="give a new folder")


def _data(options: Options, model: ResolvedModel, example_given: bool) -> DataSet | None:
    """The calibration data; the model's example becomes its first sample, unless ``--input-shape`` gave one."""
    from fxcompress.cli.datafiles import open_data, random_batches
    from fxcompress.cli.setup import input_facts

    how = {"samples": options.samples, "batch": model.fixed_batch or options.batch_size}
    whole = model.fixed_batch is not None
    if options.data is not None:
        facts = input_facts(model, options.mean, options.std)
        found = open_data(options.data, facts, **how, seed=options.seed, whole=whole)
        if not example_given and not whole:
            sample = found.example()
            model.args, model.kwargs = ((), sample) if isinstance(sample, dict) else ((sample,), {})
        return found
    if options.random_data and model.has_example:
        return random_batches(model.args, model.kwargs, **how, whole=whole)
    return None


def _build(options: Options, model: ResolvedModel, dataset: DataSet | None) -> None:
    from fxcompress import api
    from fxcompress.cli.setup import chosen_passes, require_example

    require_example(model)
    passes = chosen_passes(options.passes, options.calibrator, options.samples, options.ignore, dataset is not None)
    _check_passes(dataset, passes, by_hand=options.passes is not None)
    with console.progress(f"compressing {model.name}"):
        try:
            engine = api.compile(
                model.require_module(), model.kwargs or model.args, passes, **_arguments(options, model, dataset)
            )
        except GateError as error:
            _keep_aside(options, model, error)
            raise
        assert options.out is not None
        engine.report.model = model.name
        saved = engine.save(options.out)
    _show(options, model, engine, saved, dataset)


def _arguments(options: Options, model: ResolvedModel, dataset: DataSet | None) -> dict[str, Any]:
    """Keyword arguments of ``compile``."""
    from fxcompress.cli.datafiles import top1

    scoring = dataset.scoring if dataset else None
    if options.max_drop is not None and scoring is None:
        why = "no data was given" if dataset is None else "the data has no labels that fit the model"
        raise UsageError(
            82, "--max-drop needs labelled data", why=why, fix="give --data with labels, or drop --max-drop"
        )
    allowed = 0.01 if options.max_drop is None else options.max_drop
    return {
        "target": None if options.target == "auto" else options.target,
        "dynamic_shapes": model.dynamic_shapes,
        "calibration": dataset.calibration if dataset else None,
        "evaluate": top1(scoring) if scoring is not None else None,
        "max_drop": allowed if scoring is not None else None,
        "threads": options.threads,
        "measure": options.measure,
        "speed_gate": options.measure and options.passes is None,
        "strict": options.strict,
        "dump": None if options.dump is None else str(options.dump),
    }


def _check_passes(dataset: DataSet | None, passes: tuple[Pass, ...] | None, *, by_hand: bool) -> None:
    """Say what the choice of data and passes means; refuse passes that need data where there is none."""
    lossy = [p.name for p in passes or () if not p.exact]
    if dataset is None and lossy:
        raise UsageError(86, f"{lossy[0]} needs calibration data", fix="give --data DIR_OR_NPZ")
    if dataset is None:
        console.say("note: no --data, so nothing can be calibrated: the engine stays in float32")
    elif by_hand:
        console.say("note: passes were chosen by hand: their result is kept even where float32 is faster")


def _keep_aside(options: Options, model: ResolvedModel, error: GateError) -> None:
    """Save what missed the gate beside the folder asked for, which is left alone."""
    engine: Any = error.engine
    if engine is None or options.out is None:
        return
    engine.report.model = model.name
    folder = options.out.with_name(f"{options.out.name}.rejected")
    engine.save(folder)
    console.show(str(engine.report))
    error.add_note(f"  kept: {folder}")


def _show(options: Options, model: ResolvedModel, engine: Engine, saved: Path, dataset: DataSet | None) -> None:
    command = f"fxcompress benchmark {shlex.quote(str(saved))}"
    notes = [*model.notes, *(dataset.notes if dataset else [])]
    facts = {"model": model.spec, "out": str(saved), "report": engine.report.to_dict(), "notes": notes, "next": command}
    console.emit(facts)
    console.show(str(engine.report), "", f"saved in {saved}; next: {command}")
