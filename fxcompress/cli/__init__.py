"""The command line: ``fxcompress compress | build | inspect | benchmark | tune | env``.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 internal error, 2 wrong use, 3 unsupported model,
4 a gate was missed (what was built is kept), 5 resources or artefact, 130 cancelled. Torch and the runtimes are
imported by the commands that need them.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from fxcompress.cli import benchmark, build, compress, console, env, inspect, tune
from fxcompress.environment import package_version
from fxcompress.errors import FxcError

__all__ = ["app", "main"]

CANCELLED = 130
RESOURCES = 5
INTERNAL = 1

app = typer.Typer(
    name="fxcompress",
    help="Compress PyTorch models into checked engines. Exit codes: 0 done, 1 internal error, 2 wrong use, "
    "3 unsupported model, 4 a gate was missed, 5 resources or artefact, 130 cancelled.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        console.line(package_version("fxcompress") or "fxcompress is not installed: it runs from a checkout")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    del version


app.command("compress")(compress.compress)
app.command("build")(build.build)
app.command("inspect")(inspect.inspect)
app.command("benchmark")(benchmark.benchmark)
app.command("tune")(tune.tune)
app.command("env")(env.env)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: What follows the program's name; those of the process by default.

    Raises:
        Exception: an internal error, for its traceback, unless ``--quiet`` was given.
    """
    console.reset()
    try:
        app(args=None if arguments is None else list(arguments), prog_name="fxcompress")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except FxcError as error:
        console.fail(error, error.exit_code)
        return error.exit_code
    except KeyboardInterrupt:
        console.say("cancelled")
        return CANCELLED
    except Exception as error:
        code = _without_traceback(error)
        if code is None:
            raise
        return code
    return 0


def _without_traceback(error: Exception) -> int | None:
    """Exit code of what is no FxcError; None for an internal error that is to be shown with its traceback."""
    if isinstance(error, BrokenPipeError):  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return INTERNAL
    code = RESOURCES if _is_resource(error) else INTERNAL
    if code == INTERNAL and not console.settings.quiet:
        return None
    console.fail(error, code)
    return code


def _is_resource(error: Exception) -> bool:
    """True when memory, disk or access rights ran out."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOMEM, errno.EMFILE)
    if isinstance(error, OSError):
        return error.errno in codes
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error) or "out of memory" in str(error)
