"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["InputShapeOption", "ModelArgument", "SeedOption", "TargetOption", "ThreadsOption"]

_MODEL = (
    "py:FILE.py:FACTORY (runs that file), timm:NAME, timm:NAME@FILE.safetensors, hf:FOLDER, FILE.pt2, "
    "or a folder saved by fxcompress. Load .pt2 files and Python files only from people you trust."
)

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL, show_default=False)]
TargetOption = Annotated[
    str, typer.Option("--target", "-t", help="openvino, onnxruntime, tensorrt, torch, or auto: the installed ones.")
]
InputShapeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--input-shape", help="Example input, e.g. 1,3,224,224 or 1,128:int64; once per input.", show_default=False
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of random weights, inputs and of the sample chosen.")]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, help="Threads of the engine; default: the physical cores.")
]
