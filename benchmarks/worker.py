"""One engine in a process of its own: times it, or runs samples through it, and prints one line of JSON.

    python -m benchmarks.worker time    --runtime openvino --path m.xml --inputs x.npz --threads 2
    python -m benchmarks.worker predict --runtime onnxruntime --path m.onnx --inputs x.npz --outputs y.npy

Two runtimes in one process distort each other: their thread pools spin while they wait. So nothing but the runtime
asked for is loaded here, and the harness keeps one such process alive at a time.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

Arrays = dict[str, npt.NDArray[np.generic]]
Prepared = Callable[[], npt.NDArray[np.float32]]
Runner = Callable[[Arrays], Prepared]
"""Given the inputs, a function that runs the engine once on them: what is timed is a call of that function."""


def onnxruntime_runner(path: str, threads: int, static: Arrays | None) -> Runner:
    """An ONNX Runtime session on the CPU: all graph optimisations, ``threads`` threads.

    Args:
        path: The ``.onnx`` file.
        threads: ``intra_op_num_threads``.
        static: Inputs whose sizes the model's free dimensions are fixed to, for latency; ``None`` keeps them free.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    if static is not None:
        for node, value in zip(session.get_inputs(), _ordered(static, names), strict=True):
            for size, dimension in zip(value.shape, node.shape, strict=True):
                if isinstance(dimension, str):
                    options.add_free_dimension_override_by_name(dimension, size)
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def prepare(arrays: Arrays) -> Prepared:
        feed = dict(zip(names, _ordered(arrays, names), strict=True))
        return lambda: np.asarray(session.run(None, feed)[0])

    return prepare


def openvino_runner(path: str, threads: int, static: Arrays | None) -> Runner:
    """An OpenVINO model on the CPU: latency hint, ``threads`` threads, one synchronous request.

    Args:
        path: The ``.xml`` or ``.onnx`` file.
        threads: ``INFERENCE_NUM_THREADS``.
        static: Inputs whose sizes the model is reshaped to, for latency; ``None`` keeps dynamic sizes.
    """
    import openvino as ov

    core = ov.Core()
    model = core.read_model(path)
    if static is not None:
        values = _ordered(static, [_any_name(port) for port in model.inputs])
        model.reshape({port: list(v.shape) for port, v in zip(model.inputs, values, strict=True)})
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(model, "CPU", settings)
    names = [_any_name(port) for port in compiled.inputs]
    request = compiled.create_infer_request()

    def prepare(arrays: Arrays) -> Prepared:
        for index, value in enumerate(_ordered(arrays, names)):
            request.set_input_tensor(index, ov.Tensor(np.ascontiguousarray(value)))

        def run() -> npt.NDArray[np.float32]:
            request.infer()
            return np.asarray(request.get_output_tensor(0).data)

        return run

    return prepare


def torch_runner(path: str, threads: int, _: Arrays | None) -> Runner:
    """A model of :data:`benchmarks.models.MODELS` (``path`` is its name) in eager torch."""
    import torch

    from benchmarks import models

    torch.set_num_threads(threads)
    model = models.MODELS[path]
    network = model.build()

    def prepare(arrays: Arrays) -> Prepared:
        tensors = [torch.from_numpy(v) for v in _ordered(arrays, list(model.input_names))]

        def run() -> npt.NDArray[np.float32]:
            with torch.inference_mode():
                return np.asarray(network(*tensors).numpy())

        return run

    return prepare


def fxcompress_runner(path: str, threads: int, static: Arrays | None) -> Runner:
    """A saved fxcompress engine, called as a user calls it: torch tensors in, torch tensors out.

    Args:
        path: The folder.
        threads: Threads of torch and, through ``load``, of the engine's runtime.
        static: Unused: the engine decides by itself what to do about sizes.
    """
    import torch

    torch.set_num_threads(threads)
    fxc = importlib.import_module("fxcompress")
    engine = fxc.load(path, threads=threads)

    def prepare(arrays: Arrays) -> Prepared:
        tensors = [torch.from_numpy(v) for v in arrays.values()]

        def run() -> npt.NDArray[np.float32]:
            output = engine(*tensors)
            first = output[0] if isinstance(output, (list, tuple)) else output
            return np.asarray(first.numpy())

        return run

    return prepare


RUNTIMES: dict[str, Callable[[str, int, Arrays | None], Runner]] = {
    "onnxruntime": onnxruntime_runner,
    "openvino": openvino_runner,
    "torch": torch_runner,
    "fxcompress": fxcompress_runner,
}


def _any_name(port: object) -> str:
    names: set[str] = getattr(port, "names", set())
    return sorted(names)[0] if names else ""


def _ordered(arrays: Arrays, names: list[str]) -> list[npt.NDArray[np.generic]]:
    """The arrays in the engine's order: by name when every name is known, else as they come."""
    return [arrays[name] for name in names] if set(names) == set(arrays) else list(arrays.values())


def measure(run: Prepared, runs: int, seconds: float, warmup: float) -> list[float]:
    """Milliseconds of each run, at least ``runs`` of them and ``seconds`` long, after 3 runs and ``warmup`` seconds."""
    end, count = time.perf_counter() + warmup, 0
    while count < 3 or time.perf_counter() < end:
        run()
        count += 1
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < runs or time.perf_counter() < end:
        begin = time.perf_counter()
        run()
        times.append((time.perf_counter() - begin) * 1e3)
    return times


def predict(runner: Runner, arrays: Arrays, trim: bool) -> npt.NDArray[np.float32]:
    """Runs the samples one at a time and stacks the first output's rows.

    Args:
        runner: The engine.
        arrays: Inputs ``[samples, ...]``.
        trim: Cut each sample to the length its ``attention_mask`` says.
    """
    rows = []
    for i in range(len(next(iter(arrays.values())))):
        sample = {name: value[i : i + 1] for name, value in arrays.items()}
        if trim:
            length = int(np.sum(sample["attention_mask"].astype(np.int64)))
            sample = {name: np.ascontiguousarray(value[:, :length]) for name, value in sample.items()}
        rows.append(np.array(runner(sample)(), dtype=np.float32))
    return np.concatenate(rows)


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("act", choices=("time", "predict"))
    parser.add_argument("--runtime", choices=sorted(RUNTIMES), required=True)
    parser.add_argument("--path", required=True)
    parser.add_argument("--inputs", type=Path, required=True, help=".npz with the inputs by name")
    parser.add_argument("--outputs", type=Path, help=".npy to write (predict)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--trim", action="store_true")
    options = parser.parse_args()
    with np.load(options.inputs) as pack:
        arrays: Arrays = {name: pack[name] for name in pack.files}
    timed = options.act == "time"
    runner = RUNTIMES[options.runtime](options.path, options.threads, arrays if timed else None)
    if timed:
        serve(runner(arrays))
        return
    np.save(options.outputs, predict(runner, arrays, options.trim))
    print("{}")


def serve(run: Prepared) -> None:
    """Answers each line of standard input, ``{"runs": …, "seconds": …, "warmup": …}``, with the milliseconds of runs."""
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(run, **json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
