"""Latency of the INT8 engines at batch 1: ours against the peers' INT8 and the FP32 engines.

    python -m benchmarks.latency [--quick] [--peers-only] [--only resnet50|efficientnet_lite0|minilm]

First every recipe of the peers is timed briefly; each peer then enters the race with its fastest recipes and its most
accurate one (read from the accuracy results when they are there). MiniLM runs on 128 tokens without padding.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from typing import Any, Final

from benchmarks import export, harness, ours, peers
from benchmarks.harness import Contestant, Json, Race, Timing
from benchmarks.models import CALIBRATION_SENTENCES, MODELS, Model

COUNTS: Final = {"resnet50": 32, "efficientnet_lite0": 128, "minilm": CALIBRATION_SENTENCES}
"""Calibration samples: the same engines as in the accuracy benchmark where there is one."""


def best_by_accuracy(name: str) -> set[str]:
    """The most accurate recipe of each peer, from the accuracy benchmark's results; none if it has not run."""
    path = harness.RESULTS / f"accuracy_{name}.json"
    if not path.exists():
        return set()
    rows: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["results"]
    score = "spearman" if name == "minilm" else "top1"
    known = {k: v[score] for k, v in rows.items() if score in v and "AVX2" not in k and "run by" not in k}
    return {
        max(group, key=lambda k: known[k])
        for peer in ("NNCF", "ORT")
        if (group := [k for k in known if k.startswith(peer)])
    }


def screen(made: list[Contestant], model: Model, timing: Timing, kept: int) -> tuple[list[Contestant], dict[str, Json]]:
    """The fastest ``kept`` INT8 engines of each runtime and the most accurate one, and what the screening measured."""
    short = replace(timing, rounds=3, seconds=0.2)
    pace: dict[str, float] = {}
    failed: dict[str, Json] = {}
    for c in made:
        try:
            pace[c.name] = min(harness.race([c], model.timing_input(), short).medians(c.name))
        except RuntimeError as error:
            failed[c.name] = {"error": f"does not run: {error}"}
    made = [c for c in made if c.name in pace]
    chosen = best_by_accuracy(model.name)
    for runtime in ("openvino", "onnxruntime"):
        names = [c.name for c in made if c.runtime == runtime]
        chosen |= set(sorted(names, key=lambda n: pace[n])[:kept])
    return [c for c in made if c.name in chosen], {**{name: round(ms, 4) for name, ms in pace.items()}, **failed}


def compare(race: Race, peers_int8: list[str], mine: list[str]) -> dict[str, Json]:
    """Ratios of ours to the fastest INT8 peer, and of the fastest INT8 peer to the best FP32 engine."""
    fp32 = race.fastest([c.name for c in race.contestants if c.settings.get("precision") == "FP32"])
    best = race.fastest(peers_int8)
    pairs = [(best, fp32), *((name, other) for name in mine for other in (best, fp32))]
    rows: dict[str, Json] = {"fastest_peer_int8": best, "fastest_fp32": fp32}
    for first, second in pairs:
        ratio = race.ratio(first, second)
        rows[f"{first} / {second}"] = {
            "median": round(ratio.median, 4),
            "interval": [round(ratio.low, 4), round(ratio.high, 4)],
            "coverage": round(ratio.coverage, 4),
            "verdict": ratio.verdict,
        }
    return rows


def run(name: str, options: argparse.Namespace) -> dict[str, Json]:
    """Screens, races and compares the engines of one network."""
    model, timing = MODELS[name], harness.timing_of(options)
    count = COUNTS[name]
    tried = peers.recipes(model, options.quick, speed=True)
    best = best_by_accuracy(name)
    tried += tuple(r for r in peers.recipes(model, False) if r.name in best - {t.name for t in tried})
    made, failed = peers.contestants(model, count, tried)
    chosen, screening = screen(made, model, timing, 1 if options.quick else 2)
    mine: list[Contestant] = []
    if not options.peers_only:
        mine = [ours.compile_to(model, target, count) for target in ours.TARGETS]
        mine += [ours.file_of(c) for c in mine]
    race = harness.race([*export.fp32_contestants(name), *chosen, *mine], model.timing_input(), timing)
    comparison = compare(race, [c.name for c in chosen], [c.name for c in mine])
    return {"engines": race.summary(), "comparison": comparison, "screening_ms": screening, "failed": failed}


def show(name: str, result: dict[str, Any]) -> None:
    """Prints the race as a table."""
    rows = sorted(result["engines"].items(), key=lambda item: statistics.median(item[1]["round_medians_ms"]))
    print(harness.table([name, "p50 ms", "p95 ms", "IQR ms", "best ms"], [[n, *_times(r)] for n, r in rows]))
    print(json.dumps(result["comparison"], indent=1))


def _times(row: dict[str, float]) -> list[float]:
    return [row[key] for key in ("p50_ms", "p95_ms", "iqr_ms", "best_ms")]


def main() -> None:
    """Command line."""
    options = harness.arguments("Latency of INT8 engines at batch 1.", only="")
    results: dict[str, Json] = {}
    for name in COUNTS:
        if options.only in ("", name):
            results[name] = run(name, options)
            show(name, results[name])  # type: ignore[arg-type]
    timing = harness.timing_of(options)
    print(harness.write("latency", results, timing.record(), options))


if __name__ == "__main__":
    main()
