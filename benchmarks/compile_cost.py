"""What quantizing costs: wall time and peak memory of ``fxcompress.compile`` and of NNCF.

    python -m benchmarks.compile_cost [--quick] [--peers-only] [--repeats 3]

Each runs in a process of its own from the network in torch to the engine on disk, ResNet-50, batch 1, target
OpenVINO. The time is that of the work after the imports and the building of the network; the memory is the process's
largest resident set, which includes torch and the network on both sides. Images are decoded as they are asked for.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from benchmarks import harness
from benchmarks.harness import Json
from benchmarks.models import MODELS, Calibration

NETWORK: Final = "resnet50"


def nncf_side(folder: Path, count: int) -> Callable[[], None]:
    """NNCF: convert, quantize with its defaults, compile, save."""
    import nncf
    import openvino as ov

    model = MODELS[NETWORK]
    network, example = model.build(), model.example()[0]

    def run() -> None:
        converted = ov.convert_model(network, example_input=example)
        samples = nncf.Dataset(Calibration(model, count), lambda batch: batch[0].numpy())
        quantized = nncf.quantize(converted, samples, subset_size=count)
        ov.Core().compile_model(quantized, "CPU", {"PERFORMANCE_HINT": "LATENCY"})
        ov.save_model(quantized, folder / "model.xml")

    return run


def fxcompress_side(folder: Path, count: int) -> Callable[[], None]:
    """fxcompress: compile with its defaults, its gates and its speed check included, save."""
    import openvino as ov

    import fxcompress as fxc

    del ov  # imported before the clock starts, as on the other side
    model = MODELS[NETWORK]
    network, example = model.build(), model.example()

    def run() -> None:
        engine = fxc.compile(network, example_inputs=example, target="openvino", calibration=Calibration(model, count))
        engine.save(str(folder / "engine"))

    return run


def idle_side(folder: Path, count: int) -> Callable[[], None]:
    """Neither: what the imports and the network alone take."""
    import openvino as ov

    del ov, folder, count
    network = MODELS[NETWORK].build()

    def run() -> None:
        network.eval()

    return run


SIDES: Final = {"fxcompress": fxcompress_side, "NNCF": nncf_side, "neither": idle_side}


def child(side: str, count: int) -> None:
    """One side's process: does the work and prints what it took."""
    with tempfile.TemporaryDirectory() as folder:
        run = SIDES[side](Path(folder), count)
        before = resource.getrusage(resource.RUSAGE_SELF)
        begin = time.perf_counter()
        run()
        wall = time.perf_counter() - begin
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(
        json.dumps(
            {"wall_s": wall, "cpu_s": cpu, "peak_rss_mb": after.ru_maxrss / 1024, "before_mb": before.ru_maxrss / 1024}
        )
    )


def measure(side: str, count: int) -> dict[str, float]:
    """Runs a side's process and gives what it printed last.

    Raises:
        RuntimeError: The process failed.
    """
    command = [sys.executable, "-m", "benchmarks.compile_cost", "--child", side, "--count", str(count)]
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).resolve().parents[1])
    if done.returncode != 0:
        raise RuntimeError(f"{side}: {harness.last_line(done.stderr)}")
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return {**result, "process_s": time.perf_counter() - begin}


def compare(rows: dict[str, list[dict[str, float]]]) -> dict[str, Json]:
    """Ratios fxcompress / NNCF, paired by repetition, with the interval of the harness."""
    ratios: dict[str, Json] = {}
    for key in ("wall_s", "cpu_s", "peak_rss_mb"):
        ratio = harness.paired_ratio([r[key] for r in rows["fxcompress"]], [r[key] for r in rows["NNCF"]])
        ratios[key] = {"median": ratio.median, "interval": [ratio.low, ratio.high], "verdict": ratio.verdict}
    return ratios


def races(options: argparse.Namespace) -> None:
    """Runs the sides in turn and writes the result."""
    count, repeats = (16, 1) if options.quick else (options.count, options.repeats)
    sides = ["NNCF", "neither"] if options.peers_only else list(SIDES)
    rows: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for turn in range(repeats):
        start = turn % len(sides)
        for side in sides[start:] + sides[:start]:
            rows[side].append(measure(side, count))
            print(side, {key: round(value, 2) for key, value in rows[side][-1].items()}, flush=True)
    results: dict[str, Json] = {"runs": rows}
    if "fxcompress" in rows:
        results["fxcompress / NNCF"] = compare(rows)
    print(harness.write("compile_cost", results, {"images": count, "repeats": repeats}, options))


def main() -> None:
    """Command line."""
    options = harness.arguments("Wall time and memory of compile and NNCF.", child="", count=300, repeats=6)
    if options.child:
        child(options.child, options.count)
    else:
        races(options)


if __name__ == "__main__":
    main()
