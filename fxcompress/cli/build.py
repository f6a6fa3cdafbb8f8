"""``fxcompress build``: TensorRT engines for other devices, from a folder saved by fxcompress."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from fxcompress.cli import console
from fxcompress.errors import FxcError, UsageError

if TYPE_CHECKING:
    from fxcompress.engines.tensorrt_builder import BuildOptions

__all__ = ["build"]


def build(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of an engine compiled with --target tensorrt.")],
    target: Annotated[str, typer.Option("--target", "-t", help="tensorrt.")] = "tensorrt",
    compute_capability: Annotated[
        str | None,
        typer.Option(
            "--compute-capability",
            help="8.0,8.9: one engine each. Default: the device at hand, without one an engine for all from 8.0 on.",
        ),
    ] = None,
    profile: Annotated[
        list[str] | None,
        typer.Option("--profile", help="Smallest, usual and largest value of a free size: batch=1:8:32. Repeatable."),
    ] = None,
    workspace: Annotated[
        str | None, typer.Option("--workspace", help="Largest scratch memory of a layer, e.g. 2GiB.")
    ] = None,
    strip_weights: Annotated[
        bool, typer.Option("--strip-weights", help="Leave the weights out; model.onnx beside it has them.")
    ] = False,
    optimization_level: Annotated[
        int | None, typer.Option("--optimization-level", min=0, max=5, help="How long the builder searches.")
    ] = None,
    library: Annotated[
        str | None, typer.Option("--library", help="tensorrt or tensorrt_rtx; default: the one that fits.")
    ] = None,
    json_output: console.JsonOption = False,
    quiet: console.QuietOption = False,
) -> None:
    """Build TensorRT engines for other devices beside those that OUT holds.

    A device that fails does not stop the others: what could be built is saved, and the exit code is that of the first
    failure.
    """
    console.setup(json_output=json_output, quiet=quiet)
    if target != "tensorrt":
        fix = "engines of other targets need no build: fxcompress compress MODEL --target ..."
        raise UsageError(94, f"nothing is built for the target {target!r}", fix=fix)
    from fxcompress.engines.base import target as find_target
    from fxcompress.engines.tensorrt_builder import BuildOptions, memory_size
    from fxcompress.engines.tensorrt_library import library as find_library
    from fxcompress.engines.tensorrt_profile import parse_profile

    find_target(target).require()
    made = find_library(library)
    options = BuildOptions(
        workspace=memory_size(workspace),
        strip_weights=strip_weights,
        optimization_level=optimization_level,
        library=made.name,
    )
    given = None if compute_capability is None else [c.strip() for c in compute_capability.split(",") if c.strip()]
    job = _Folder(out)
    wanted = parse_profile(profile or [])
    failures = job.build(given, wanted, options)
    if len(job.built) == 0:
        raise failures[0][1]
    job.save()
    _show(job, failures)
    if failures:
        raise typer.Exit(failures[0][1].exit_code)


class _Folder:
    """A saved engine and what is built for it."""

    def __init__(self, out: Path) -> None:
        from fxcompress.artifact import FORMAT, SCHEMA, FolderKind, read_folder
        from fxcompress.engines.base import Scratch
        from fxcompress.engines.signature import IOSignature

        self.out, self.kind = out, FolderKind(FORMAT, SCHEMA, "engine")
        self.manifest = read_folder(out, self.kind)
        if self.manifest["engine"] != "tensorrt":
            name = self.manifest["engine"]
            why = f"its files are written for {name}, which quantizes in another way"
            fix = "compile the model with --target tensorrt first"
            raise UsageError(95, f"{out} holds an engine of the target {name!r}", why=why, fix=fix)
        self.details: dict[str, Any] = dict(self.manifest["details"])
        self.signature = IOSignature.from_dict(self.manifest["signature"])
        self.notes = [str(n) for n in self.manifest["notes"]]
        self.built: list[str] = []
        self.scratch = Scratch()
        self.scratch.give_to(self)
        for name in self.details["files"]:
            shutil.copyfile(out / name, self.scratch.path / name)

    def build(
        self, capabilities: list[str] | None, profile: dict[str, Any] | None, options: BuildOptions
    ) -> list[tuple[str, FxcError]]:
        """Build one engine per capability; returns those that failed."""
        from fxcompress.engines.tensorrt import build_plans
        from fxcompress.engines.tensorrt_builder import chosen_capabilities
        from fxcompress.engines.tensorrt_library import library
        from fxcompress.engines.tensorrt_profile import complete_profiles, from_json

        given = profile or from_json(self.details["plans"][0]["profiles"]) if self.details["plans"] else profile
        profiles, notes = complete_profiles(self.signature, given)
        failures: list[tuple[str, FxcError]] = []
        for wanted in capabilities or [None]:  # type: ignore[list-item]
            label = wanted or "the default device"
            try:
                chosen = chosen_capabilities(wanted, library(options.library))
                with console.progress(f"building for {label}"):
                    asked = replace(options, capabilities=chosen, profiles=profiles)
                    notes += build_plans(self.scratch.path, self.signature, self.details, asked)
                self.built += chosen
            except FxcError as error:
                failures.append((label, error))
        self.notes += [n for n in notes if n not in self.notes]
        return failures

    def save(self) -> None:
        """Write the folder again, in one step."""
        from fxcompress.artifact import write_folder

        contents = {name: self.scratch.path / name for name in self.details["files"]}
        contents |= {name: self.out / name for name in self.manifest["files"] if name not in contents}
        facts = {k: self.manifest[k] for k in ("engine", "signature")}
        write_folder(self.out, self.kind, contents, {**facts, "details": self.details, "notes": self.notes})


def _show(job: _Folder, failures: list[tuple[str, FxcError]]) -> None:
    from fxcompress.engines.tensorrt_builder import Plan

    plans = [Plan.from_dict(d) for d in job.details["plans"]]
    rows: list[dict[str, Any]] = [
        {
            "capability": p.capability,
            "file": p.file,
            "size": (job.out / p.file).stat().st_size,
            "for": p.made_for,
            "built_now": p.capability in job.built,
            "profiles": p.profiles,
            "stripped": p.stripped,
            "layers": p.report.to_dict(),
        }
        for p in plans
    ]
    failed = [{"capability": name, "error": str(error)} for name, error in failures]
    console.emit({"out": str(job.out), "engines": rows, "failed": failed, "notes": job.notes})
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for heading in ("device", "file", "size", "runs"):
        table.add_column(heading, overflow="fold")
    for row, plan in zip(rows, plans, strict=True):
        table.add_row(plan.capability, plan.file, console.size_text(row["size"]), str(plan.report))
    console.show(table, *(f"note: {note}" for note in job.notes))
    for _, error in failures:
        console.complain(error)
