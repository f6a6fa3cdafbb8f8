"""What ``fxcompress.compile`` returns by default, against the best FP32 engine: it must never be slower.

    python -m benchmarks.never_slower [--quick] [--peers-only] [--only NAME]

On these networks INT8 gains little or loses: depthwise convolutions, squeeze-and-excitation, channel shuffles,
concatenations. ``compile`` is given no target: it has to find out by itself. The peers' INT8 is in the race for
comparison.
"""

from __future__ import annotations

import argparse
import json
from typing import Final

from benchmarks import export, harness, ours, peers
from benchmarks.harness import Contestant, Json
from benchmarks.latency import compare, show
from benchmarks.models import MODELS, Model

NETWORKS: Final = ("efficientnet_b0", "mobilenet_v3_large", "shufflenet_v2_x1_0", "mobilenet_v2", "densenet121")
COUNT: Final = 32
"""Calibration images: the weights are random, so only speed is measured."""
PEERS: Final = (peers.Nncf("mixed"), peers.OrtStatic())


def mine(model: Model) -> list[Contestant]:
    """The default engine, called as a user does, and its file alone."""
    engine = ours.compile_to(model, None, COUNT)
    return [engine, ours.file_of(engine)]


def run(name: str, options: argparse.Namespace) -> dict[str, Json]:
    """Races the default engine of one network against FP32 and the peers' INT8."""
    model, timing = MODELS[name], harness.timing_of(options)
    int8 = [peers.contestant(recipe, model, COUNT) for recipe in PEERS]
    default = [] if options.peers_only else mine(model)
    race = harness.race(
        [*export.fp32_contestants(name, torch_too=False), *int8, *default], model.timing_input(), timing
    )
    return {
        "engines": race.summary(),
        "comparison": compare(race, [c.name for c in int8], [c.name for c in default]),
    }


def main() -> None:
    """Command line."""
    options = harness.arguments("compile's default against the best FP32 engine.", only="")
    results: dict[str, Json] = {}
    for name in NETWORKS:
        if options.only in ("", name):
            result = run(name, options)
            results[name] = result
            show(name, json.loads(json.dumps(result)))
    timing = harness.timing_of(options)
    print(harness.write("never_slower", results, timing.record(), options))


if __name__ == "__main__":
    main()
