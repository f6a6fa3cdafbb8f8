"""FP32 networks as files of the peers' own tool chains: ONNX for ONNX Runtime, IR for OpenVINO."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from benchmarks.harness import Contestant
from benchmarks.models import MODELS, Model, work_folder

OPSET: Final = 21


def cached(path: Path, make: Callable[[Path], None]) -> Path:
    """``path``, made by ``make`` if it is not there yet; a build that fails leaves no file of that name."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name("part-" + path.name)
        make(part)
        part.replace(path)
        weights = part.with_suffix(".bin")
        if weights.exists():
            weights.replace(path.with_suffix(".bin"))
    return path


@contextlib.contextmanager
def quiet() -> Any:
    """Keeps exporters' and quantizers' progress output off the terminal."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(previous)


def _sample(model: Model) -> tuple[torch.Tensor, ...]:
    """An example of the latency's shape."""
    return tuple(torch.from_numpy(np.array(v)) for v in model.timing_input().values())


def to_onnx(model: Model, free: bool) -> Path:
    """The network as ONNX.

    Args:
        model: The network.
        free: A free sequence length (text); a batch of 1 otherwise, which is what ONNX Runtime is fastest with.
    """

    def make(path: Path) -> None:
        lengths = (
            {name: {1: torch.export.Dim("length", min=2, max=512)} for name in model.input_names} if free else None
        )
        with quiet():
            torch.onnx.export(
                model.build(),
                _sample(model),
                path,
                input_names=list(model.input_names),
                output_names=["y"],
                opset_version=OPSET,
                dynamo=True,
                dynamic_shapes=lengths,
                external_data=False,
            )

    return cached(work_folder() / model.name / f"fp32{'-free' if free else ''}.onnx", make)


def preprocessed(model: Model) -> Path:
    """The ONNX file after ONNX Runtime's own preparation for quantization (shapes, constants and BatchNorm folded)."""

    def make(path: Path) -> None:
        from onnxruntime.quantization.shape_inference import quant_pre_process

        with quiet():
            quant_pre_process(to_onnx(model, model.is_text), path, skip_symbolic_shape=True)

    return cached(work_folder() / model.name / "prepared.onnx", make)


def transformer_optimized(model: Model) -> Path:
    """MiniLM after ONNX Runtime's transformer optimizer: attention, GELU, LayerNorm as single operators.

    The optimizer finds attention only in what the TorchScript exporter makes of the "eager" attention; in the other
    three combinations of exporter and attention it leaves it in pieces (1.2 times slower).
    """

    def make(path: Path) -> None:
        from onnxruntime.transformers import optimizer

        network: Any = model.build()
        network.bert.set_attn_implementation("eager")
        plain = path.with_name("eager-torchscript.onnx")
        names, free = list(model.input_names), {name: {1: "length"} for name in model.input_names}
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                network,
                _sample(model),
                plain,
                input_names=names,
                output_names=["y"],
                opset_version=17,
                dynamo=False,
                dynamic_axes=free,
            )
            shape = {"num_heads": 12, "hidden_size": 384}
            made = optimizer.optimize_model(str(plain), model_type="bert", opt_level=0, use_gpu=False, **shape)
            made.save_model_to_file(str(path))

    return cached(work_folder() / model.name / "transformer-optimized.onnx", make)


def convert_openvino(model: Model) -> Any:
    """The network as an OpenVINO model in memory, from torch; a batch of 1, a free sequence length for text."""
    import openvino as ov

    sample = _sample(model)
    shapes = [[1, -1]] * 2 if model.is_text else [list(sample[0].shape)]
    with quiet():
        return ov.convert_model(model.build(), example_input=sample if len(sample) > 1 else sample[0], input=shapes)


def to_openvino(model: Model) -> Path:
    """The network as OpenVINO IR with FP32 weights."""

    def make(path: Path) -> None:
        import openvino as ov

        ov.save_model(convert_openvino(model), path, compress_to_fp16=False)

    return cached(work_folder() / model.name / "fp32.xml", make)


def fp32_contestants(name: str, *, torch_too: bool = True) -> list[Contestant]:
    """The FP32 engines of a network: torch (eager), ONNX Runtime, OpenVINO."""
    model = MODELS[name]
    made = {"precision": "FP32"}
    entries = [Contestant("FP32 torch", "torch", name, made)] if torch_too else []
    entries.append(Contestant("FP32 ONNX Runtime", "onnxruntime", str(to_onnx(model, model.is_text)), made))
    if model.is_text:
        path = str(transformer_optimized(model))
        entries.append(Contestant("FP32 ONNX Runtime, transformer optimizer", "onnxruntime", path, made))
    entries.append(Contestant("FP32 OpenVINO", "openvino", str(to_openvino(model)), made))
    return entries
