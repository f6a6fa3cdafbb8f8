"""One engine in a process of its own: times it when asked. Run by ``fxcompress.bench`` as a file.

Its only argument is a JSON object: ``runtime``, ``model`` (file, or folder for the runtime ``folder``), ``inputs`` (.npz,
in the engine's order) and their ``dtypes``, ``names`` of the inputs, ``threads``. Each line on its input is
``{"seconds": s, "runs": n}``; each line on its output has the times of at least ``n`` runs in at least ``s`` seconds.
Imports only what the runtime needs.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Run = Callable[[], Any]
Job = dict[str, Any]


def onnxruntime_run(job: Job, arrays: list[Any]) -> Run:
    """An ONNX Runtime session with free sizes fixed to those of the inputs."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = job["threads"], 1
    options.log_severity_level = 3
    for name, size in job["sizes"].items():
        options.add_free_dimension_override_by_name(name, size)
    session = ort.InferenceSession(job["model"], options, providers=["CPUExecutionProvider"])
    feed = dict(zip(job["names"], arrays, strict=True))
    return lambda: session.run(None, feed)


def openvino_run(job: Job, arrays: list[Any]) -> Run:
    """An OpenVINO infer request with sizes fixed to those of the inputs."""
    import openvino as ov

    core = ov.Core()
    model = core.read_model(job["model"])
    model.reshape({name: list(x.shape) for name, x in zip(job["names"], arrays, strict=True)})
    request = core.compile_model(model, "CPU", job["options"]).create_infer_request()
    for name, x in zip(job["names"], arrays, strict=True):
        request.set_tensor(name, ov.Tensor(x, shared_memory=True))
    return lambda: request.infer()


def folder_run(job: Job, arrays: list[Any]) -> Run:
    """Any saved engine, through fxcompress."""
    import torch

    from fxcompress.artifact import load

    engine = load(job["model"], threads=job["threads"])
    tensors = [torch.from_numpy(x) for x in arrays]
    bits = [kind == "bfloat16" for kind in job["dtypes"]]  # numpy has no bfloat16: its bits were stored as integers
    inputs = [x.view(torch.bfloat16) if b else x for x, b in zip(tensors, bits, strict=True)]

    def run() -> None:
        engine.run(inputs)
        engine.synchronize()

    return run


RUNTIMES: dict[str, Callable[[Job, list[Any]], Run]] = {
    "onnxruntime": onnxruntime_run,
    "openvino": openvino_run,
    "folder": folder_run,
}


def timed(run: Run, seconds: float, runs: int) -> list[float]:
    """Milliseconds of each of at least ``runs`` runs, for at least ``seconds``."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < runs or time.perf_counter() < end:
        begin = time.perf_counter()
        run()
        times.append((time.perf_counter() - begin) * 1e3)
    return times


def peak_rss_mb() -> float | None:
    """Peak resident memory of this process; None where the system does not tell.

    Not ``getrusage``: on Linux its peak includes the parent's memory at the moment this process was started.
    """
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["VmHWM"].split()[0]) / 1024
    except (OSError, KeyError):
        return None


def main() -> None:
    """Load, then answer requests until the input ends."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # a runtime's own messages must not get between the answers
    job: Job = json.loads(sys.argv[1])
    with np.load(job["inputs"]) as pack:
        arrays = [pack[f"arr_{i}"] for i in range(len(pack.files))]
    run = RUNTIMES[job["runtime"]](job, arrays)
    for line in sys.stdin:
        request = json.loads(line)
        times = timed(run, request["seconds"], request["runs"])
        answers.write(json.dumps({"times_ms": times, "peak_rss_mb": peak_rss_mb()}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
