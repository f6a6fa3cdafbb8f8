"""fxcompress's side of the races: compile, save, and the saved folder as a contestant.

A folder is timed as a user would use it: :func:`fxcompress.load`, then a call with torch tensors.
"""

from __future__ import annotations

import importlib
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from benchmarks.harness import Contestant, Json
from benchmarks.models import Calibration, Model, work_folder

TARGETS: Final = ("onnxruntime", "openvino")
OPENVINO: Final = "fxcompress → openvino"


def compile_to(
    model: Model,
    target: str | None,
    count: int,
    *,
    network: nn.Module | None = None,
    evaluate: Callable[[Any], float] | None = None,
    name: str | None = None,
    folder: str = "",
    **options: Any,
) -> Contestant:
    """Compiles a network with fxcompress's default passes and saves the engine, afresh each time.

    Args:
        model: The network.
        target: ``"onnxruntime"``, ``"openvino"`` or ``None``: fxcompress chooses.
        count: Calibration samples, one per batch.
        network: The built network, if the caller has one.
        evaluate: Handed on to ``compile``.
        name: In the tables; ``fxcompress → target`` by default.
        folder: Part of the folder's name, to keep engines of one target apart.
        **options: Handed on to ``compile``.
    """
    fxc = importlib.import_module("fxcompress")
    begin = time.perf_counter()
    keywords: dict[str, Any] = {"example_inputs": model.example(), "calibration": Calibration(model, count), **options}
    if target is not None:
        keywords["target"] = target
    if model.is_text and model.length is None:
        keywords["dynamic_shapes"] = tuple({1: torch.export.Dim("length", min=2, max=512)} for _ in model.input_names)
    if evaluate is not None:
        keywords["evaluate"] = evaluate
    engine = fxc.compile(network if network is not None else model.build(), **keywords)
    path = work_folder() / model.name / "-".join(["fxcompress", target or "default", *folder.split(), str(count)])
    shutil.rmtree(path, ignore_errors=True)
    engine.save(str(path))
    settings: Mapping[str, Json] = {
        "recipe": "fxcompress.compile",
        "target": target,
        "calibration": count,
        "compile_s": round(time.perf_counter() - begin, 2),
        "chosen": f"{engine.report.precision} in {engine.report.target}",
        "report": str(engine.report),
    }
    return Contestant(name or f"fxcompress → {target or 'default'}", "fxcompress", str(path), settings)


def file_of(contestant: Contestant) -> Contestant:
    """The model file inside a saved folder, run by the code that runs the peers': the engine without our wrapper."""
    folder = Path(contestant.path)
    files = sorted([*folder.rglob("*.onnx"), *folder.rglob("*.xml")])
    if len(files) != 1:
        raise FileNotFoundError(f"expected one .onnx or .xml in {folder}, found {[f.name for f in files]}")
    runtime = "onnxruntime" if files[0].suffix == ".onnx" else "openvino"
    return Contestant(contestant.name + ", bare file", runtime, str(files[0]), contestant.settings)
