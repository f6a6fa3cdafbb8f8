"""Accuracy after INT8: EfficientNet-Lite0 on 334 ImageNet images, MiniLM-L6 on STS-B, ours and the peers'.

    python -m benchmarks.accuracy [--quick] [--peers-only] [--ours-only] [--only efficientnet_lite0|minilm]

Everything is calibrated on the same samples: the first 128 images, or the sentences of the first 150 pairs. Every
sample is run by itself (batch 1), in the engine that ships. "Held out" are the samples not calibrated on. No engine's
scores change from run to run, so ``--ours-only`` scores ours anew and keeps the other rows of the result file.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from benchmarks import data, export, harness, ours, peers
from benchmarks.harness import Contestant, Json
from benchmarks.models import CALIBRATION_SENTENCES, MODELS, Model, sts_sentences, tokenize

Array = npt.NDArray[np.float32]
Arrays = Mapping[str, npt.NDArray[np.generic]]
AVX2: Final = {"ONEDNN_MAX_CPU_ISA": "AVX2"}
"""oneDNN then uses no VNNI and no AVX-512: OpenVINO's arithmetic on most desktop processors."""


@dataclass(frozen=True)
class Task:
    """A data set with its score.

    Attributes:
        inputs: All samples.
        trim: Cut padding off each sample.
        count: Calibration samples.
        score: Measures of an engine's outputs, given the FP32 outputs.
    """

    inputs: Arrays
    trim: bool
    count: int
    score: Callable[[Array, Array], dict[str, Json]]


def images(quick: bool) -> Task:
    """EfficientNet-Lite0: top-1 and the share of images where INT8 and FP32 agree on the class."""
    pack = data.Images("lite")
    count = 32 if quick else len(pack)
    calibration = 16 if quick else data.CALIBRATION_IMAGES
    labels = pack.labels[:count]

    def score(y: Array, reference: Array) -> dict[str, Json]:
        same = y.argmax(axis=1) == reference.argmax(axis=1)
        return {
            "top1": data.top1(y, labels),
            "top1_held_out": data.top1(y[calibration:], labels[calibration:]),
            "agreement": float(same.mean()),
            "agreement_held_out": float(same[calibration:].mean()),
            "sqnr_db": _sqnr(y, reference),
        }

    return Task({"x": pack.stack(count)}, False, calibration, score)


def sentences(quick: bool) -> Task:
    """MiniLM: Spearman correlation of the cosine of two embeddings with the human score."""
    pairs = 60 if quick else 1500
    calibration = 40 if quick else CALIBRATION_SENTENCES
    _, scores = data.sts_pairs(pairs)
    encoded = tokenize(sts_sentences()[: 2 * pairs], 64)
    inputs = {
        "input_ids": np.concatenate([ids for ids, _ in encoded]),
        "attention_mask": np.concatenate([mask for _, mask in encoded]),
    }
    held = calibration // 2

    def score(y: Array, reference: Array) -> dict[str, Json]:
        return {
            "spearman": data.spearman(y[::2], y[1::2], scores),
            "spearman_held_out": data.spearman(y[2 * held :: 2], y[2 * held + 1 :: 2], scores[held:]),
            "mean_cosine_to_fp32": float(((y * reference).sum(axis=1) / np.linalg.norm(y, axis=1)).mean()),
            "sqnr_db": _sqnr(y, reference),
        }

    return Task(inputs, True, calibration, score)


def _sqnr(y: Array, reference: Array) -> float:
    """Signal to quantization noise in decibel."""
    return float(10 * np.log10((reference**2).sum() / max(float(((y - reference) ** 2).sum()), 1e-30)))


def entries(name: str, task: Task, options: argparse.Namespace) -> tuple[list[Contestant], dict[str, Json]]:
    """All engines of a network: FP32, the peers', the peers' without VNNI, ONNX Runtime's in OpenVINO, ours."""
    model = MODELS[name]
    tried = () if options.ours_only else peers.recipes(model, options.quick)
    made, failed = peers.contestants(model, task.count, tried)
    found = [*export.fp32_contestants(name, torch_too=not options.ours_only), *made]
    if options.ours_only:
        found = found[:1]  # the reference
    if not model.is_text:
        crossed = [c for c in made if c.runtime == "onnxruntime"][:2]
        found += [replace(c, name=f"{c.name}, run by OpenVINO", runtime="openvino") for c in crossed]
    if not options.peers_only:
        found += [
            ours.compile_to(model, target, task.count, measure=False) for target in ours.TARGETS
        ]  # no FP32 for speed
        found.append(made_for_avx2(model, task.count))
    narrow = [c for c in found if _is_openvino(c) and c.name.startswith(("NNCF default", "NNCF mixed", "fxcompress"))]
    return found + [replace(c, name=f"{c.name} (AVX2)", variables=AVX2) for c in narrow], failed


def made_for_avx2(model: Model, count: int) -> Contestant:
    """Our OpenVINO engine as it would be made on a processor without VNNI."""
    os.environ["FXCOMPRESS_CPU_FLAGS"] = "avx2 fma"
    try:
        name = f"{ours.OPENVINO}, made for AVX2"
        return ours.compile_to(model, "openvino", count, measure=False, name=name, folder="avx2")
    finally:
        del os.environ["FXCOMPRESS_CPU_FLAGS"]


def _is_openvino(contestant: Contestant) -> bool:
    return contestant.runtime == "openvino" or contestant.settings.get("target") == "openvino"


def measure(name: str, task: Task, options: argparse.Namespace) -> dict[str, Json]:
    """Scores of every engine of a network; an engine that cannot run is in the table with its error."""
    found, rows = entries(name, task, options)
    if options.ours_only:
        rows |= {k: row for k, row in _known(name).items() if not k.startswith("fxcompress")}
    reference = harness.predict(found[0], task.inputs, options.threads, trim=task.trim)
    for contestant in found[1:] if options.ours_only else found:
        try:
            y = reference
            if contestant is not found[0]:
                y = harness.predict(contestant, task.inputs, options.threads, trim=task.trim)
        except RuntimeError as error:
            rows[contestant.name] = {"error": str(error), "settings": contestant.settings}
            print(f"{name}: {contestant.name}: does not run", flush=True)
            continue
        measures = task.score(y, reference)
        rows[contestant.name] = {**measures, "runtime": contestant.runtime, "settings": contestant.settings}
        print(f"{name}: {contestant.name}: " + ", ".join(f"{k} {v:.4f}" for k, v in measures.items()), flush=True)
    return rows


def _known(name: str) -> dict[str, Json]:
    content = json.loads((harness.RESULTS / f"accuracy_{name}.json").read_text(encoding="utf-8"))
    return dict(content["results"])


def main() -> None:
    """Command line."""
    options = harness.arguments("Accuracy after INT8, ours and the peers'.", only="", ours_only=False)
    tasks = {"efficientnet_lite0": images, "minilm": sentences}
    for name, build in tasks.items():
        if options.only in ("", name):
            task = build(options.quick)
            settings: dict[str, Json] = {"calibration": task.count, "samples": len(next(iter(task.inputs.values())))}
            settings["ours_only"] = options.ours_only
            print(harness.write(f"accuracy_{name}", measure(name, task, options), settings, options))


if __name__ == "__main__":
    main()
