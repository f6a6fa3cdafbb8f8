"""``passes="auto"`` against the hand-picked pipeline: does it hold ``max_drop``, and is it as fast?

    python -m benchmarks.quant_auto [--quick] [--only NAME] [--resume]

Networks with real weights are scored by their task on samples that were not calibrated on: top-1, Spearman correlation.
Those with random weights are scored by the share of images whose class is the float network's. "Hand-picked" is what
``compile`` makes with its default passes for the same target, with fxcompress's own speed gate and without one for the
accuracy: where it drops further than the search may, their times say nothing. The race is that of the other
benchmarks: engines in processes of their own, paired by round.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

import fxcompress as fxc
from benchmarks import data, export, harness, ours
from benchmarks.harness import Contestant, Json
from benchmarks.models import CALIBRATION_SENTENCES, MODELS, Model, sts_sentences, tokenize

REAL: Final = ("efficientnet_lite0", "minilm_128")
RANDOM: Final = (
    "efficientnet_b0",
    "mobilenet_v3_large",
    "shufflenet_v2_x1_0",
    "mobilenet_v2",
    "densenet121",
    "resnet50",
)
Score = Callable[[Any], float]


@dataclass(frozen=True)
class Job:
    """A network, how it is scored, and the drop it may have."""

    model: Model
    evaluate: Score
    max_drop: float
    calibration: int


def job(name: str, quick: bool) -> Job:
    """The search of one network."""
    model = MODELS[name]
    if model.is_text:
        return Job(model, sentences(20 if quick else 300, model.length), 0.003, 40 if quick else CALIBRATION_SENTENCES)
    count = 16 if quick else data.CALIBRATION_IMAGES
    if name in REAL:
        return Job(model, images(model, count, 16 if quick else 206), 0.005, count)
    return Job(model, agreement(model, 8 if quick else 64), 0.05, 8 if quick else 32)


def images(model: Model, begin: int, count: int) -> Score:
    """Top-1 on images from number ``begin`` on."""
    pack = data.Images(model.preprocessing)
    x = torch.from_numpy(np.stack([pack[i] for i in range(begin, begin + count)]))
    labels = pack.labels[begin : begin + count]

    def evaluate(engine: Any) -> float:
        logits = torch.cat([engine(row) for row in x.split(1)])
        return data.top1(logits.detach().numpy(), labels)

    return evaluate


def agreement(model: Model, count: int) -> Score:
    """Share of images whose class is that of the first model scored: the float one."""
    pack = data.Images(model.preprocessing)
    x = torch.from_numpy(np.stack([pack[-1 - i + len(pack)] for i in range(count)]))
    first: list[torch.Tensor] = []

    def evaluate(engine: Any) -> float:
        classes = torch.cat([engine(row) for row in x.split(1)]).argmax(1)
        first[:] = first or [classes]
        return float((classes == first[0]).float().mean())

    return evaluate


def sentences(pairs: int, length: int | None) -> Score:
    """Spearman correlation on pairs behind those of the calibration."""
    begin = CALIBRATION_SENTENCES // 2
    _, scores = data.sts_pairs(begin + pairs)
    rows = tokenize(sts_sentences()[2 * begin : 2 * (begin + pairs)], length)

    def evaluate(engine: Any) -> float:
        y = torch.cat([engine(torch.from_numpy(ids), torch.from_numpy(mask)) for ids, mask in rows]).detach().numpy()
        return data.spearman(y[::2], y[1::2], scores[begin:])

    return evaluate


def run(name: str, options: argparse.Namespace) -> dict[str, Json]:
    """Search, and race what it found against float32 and the default pipeline, per target."""
    work = job(name, options.quick)
    timing = harness.timing_of(options)
    rows: dict[str, Json] = {}
    network = work.model.build()
    for target in ours.TARGETS:
        found: dict[str, Contestant] = {}
        for kind, passes in (("hand-picked", None), ("auto", "auto")):
            given: dict[str, Any] = {} if passes is None else {"passes": passes, "max_drop": work.max_drop}
            found[kind] = ours.compile_to(
                work.model, target, work.calibration, network=network, evaluate=work.evaluate,
                name=f"{kind} → {target}", folder=kind, **given,
            )  # fmt: skip
        floats = [c for c in export.fp32_contestants(name, torch_too=False) if c.runtime == target]
        race = harness.race([*floats, *found.values()], work.model.timing_input(), timing)
        auto, hand = (found[kind].name for kind in ("auto", "hand-picked"))
        report = fxc.load(found["auto"].path).report
        over = _ratio(race, auto, hand)
        rows[target] = {
            "engines": race.summary(),
            "accuracy": report.accuracy,
            "hand_picked_accuracy": fxc.load(found["hand-picked"].path).report.accuracy,
            "chosen": report.decisions,
            "trials": report.trials,
            "auto_over_hand_picked": over,
            "auto_over_float": {c.name: _ratio(race, auto, c.name) for c in floats},
        }
        print(name, target, report.accuracy, over, flush=True)
    return rows


def _ratio(race: harness.Race, first: str, second: str) -> dict[str, Json]:
    ratio = race.ratio(first, second)
    return {"median": ratio.median, "low": ratio.low, "high": ratio.high, "verdict": ratio.verdict}


def main() -> None:
    """Command line."""
    options = harness.arguments("The search against the hand-picked pipeline.", only="", resume=False)
    only, options.only = options.only, ""  # all rows share one file
    settings: dict[str, Json] = dict(harness.timing_of(options).record())
    rows = harness.known("quant_auto", settings, options)
    for name in (*REAL, *RANDOM):
        if only in ("", name) and name not in rows:
            rows[name] = run(name, options)
            harness.write("quant_auto", rows, settings, options)
    print(harness.write("quant_auto", rows, settings, options))


if __name__ == "__main__":
    main()
