"""TensorRT engines on a GPU: the numbers of the simulation, other shapes, threads, and faster than the FP16 twin."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import cast

import pytest
import torch

from fxcompress.artifact import load
from fxcompress.bench import compare_latency
from fxcompress.engines import target
from fxcompress.engines.tensorrt import TensorRtEngine
from fxcompress.engines.tensorrt_library import device_capability, installed_libraries, library
from fxcompress.errors import UsageError
from fxcompress.parity import check_parity
from tests.helpers.tensorrt_nets import NETS, plain, samples, simulated


def supported() -> bool:
    """A library that builds for the device at hand."""
    here = device_capability()
    return here is not None and any(here in library(name).capabilities() for name in installed_libraries())


pytestmark = [
    pytest.mark.tensorrt_gpu,
    pytest.mark.skipif(not supported(), reason="no TensorRT for this machine's device"),
]


@cache
def built(net: str, precision: str) -> TensorRtEngine:
    return cast(TensorRtEngine, target("tensorrt").build(simulated(net, precision)))


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("precision", ["float32", "fp16", "int8", "int8+fp16"])
def test_the_engine_computes_what_the_graph_simulates(net: str, precision: str) -> None:
    engine = built(net, precision)
    assert engine.plan is not None and not any("no CUDA device" in note for note in engine.notes)
    for count in (2, 5):
        check_parity(engine, simulated(net, precision), [samples(net, count, 7)], reference=plain(net))


def test_stripped_engines_get_their_weights_back(tmp_path: Path) -> None:
    program, x = simulated("resnet", "int8"), samples("resnet", 2)
    engine = target("tensorrt").build(program, strip_weights=True)
    again = load(engine.save(tmp_path / "out"))
    torch.testing.assert_close(again(x), built("resnet", "int8")(x), rtol=1e-3, atol=1e-3)


def test_threads_and_profiles() -> None:
    engine = target("tensorrt").build(simulated("resnet", "int8"), profile=[{"batch": (1, 1, 2)}, {"batch": (3, 4, 8)}])
    batches = [samples("resnet", 1 + i % 8, i) for i in range(32)]
    expected = [engine(x) for x in batches]
    with ThreadPoolExecutor(4) as pool:
        for got, want in zip(pool.map(engine, batches), expected, strict=True):
            torch.testing.assert_close(got, want)
    with pytest.raises(UsageError, match="not built for batch=9"):
        engine(samples("resnet", 9))


def test_int8_is_not_slower_than_fp16() -> None:
    engines = {"int8": built("resnet", "int8+fp16"), "fp16": built("resnet", "fp16")}
    found = compare_latency(engines, (samples("resnet", 16),))
    assert found.ratio("int8", "fp16").low < 1.5
