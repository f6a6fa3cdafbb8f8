"""Repair of INT8 and INT4: EfficientNet-Lite0 on 334 ImageNet images in both engines, before and after.

    python -m benchmarks.quant_repair [--quick] [--only TEXT] [--blocks] [--resume]

Calibration is the first 128 images; every image is run by itself in the engine that ships. "Held out" are the other 206.
W4A8 keeps the first and the last layer's weights in 8 bits, as the papers' tables do; "all layers" does not, "depthwise"
also keeps those of the depthwise layers (4 % of the weights). ``--blocks``
adds reconstruction of whole blocks (half an hour an engine). ``--resume`` keeps the rows of an interrupted run with the same
settings; ``--only`` runs the rows whose name holds the text.
"""

from __future__ import annotations

import time
from typing import Any, Final

import fxcompress as fxc
from benchmarks import accuracy, export, harness, ours
from benchmarks.harness import Json
from benchmarks.models import MODELS
from fxcompress.passbase import Pass

NETWORK: Final = "efficientnet_lite0"
ENDS: Final = ("_conv_stem", "_fc")
DEPTHWISE: Final = "*_depthwise_conv"
FLOAT: Final = "float32"


def recipes(samples: int, blocks: bool, quick: bool) -> dict[str, list[Pass]]:
    """Name of a row -> its passes behind fusion."""
    steps: dict[str, Any] = {"iterations": 10, "block_iterations": 2} if quick else {}
    eight, learned = fxc.QuantizeStatic(samples=samples), fxc.AdaRound(samples=samples, **steps)
    four = fxc.QuantizeStatic(samples=samples, weight_bits=4, eight_bits=ENDS)
    deep = fxc.QuantizeStatic(samples=samples, weight_bits=4, eight_bits=(*ENDS, DEPTHWISE))
    every = fxc.QuantizeStatic(samples=samples, weight_bits=4)
    found: dict[str, list[Pass]] = {
        "W8A8": [eight],
        "W4A8": [four],
        "W4A8, AdaRound": [four, learned],
        "W4A8, depthwise in 8 bits": [deep],
        "W4A8, depthwise in 8 bits, AdaRound": [deep, learned],
        "W8A8, AdaRound": [eight, learned],
        "W8A8, equalized": [fxc.EqualizeLayers(), eight],
        "W4A8 all layers": [every],
        "W4A8 all layers, AdaRound": [every, learned],
    }
    if blocks:
        found["W4A8, AdaRound of blocks"] = [four, fxc.AdaRound(samples=samples, block=True, **steps)]
    return found


def main() -> None:
    """Command line."""
    options = harness.arguments("Repair of INT8 and INT4.", only="", blocks=False, resume=False)
    only, options.only = options.only, ""  # all rows share one file
    task, model = accuracy.images(options.quick), MODELS[NETWORK]
    settings: dict[str, Json] = {"calibration": task.count, "samples": len(task.inputs["x"])}
    rows = harness.known("quant_repair", settings, options)
    reference = harness.predict(export.fp32_contestants(NETWORK, torch_too=False)[0], task.inputs, options.threads)
    rows[FLOAT] = task.score(reference, reference)
    exact = list(fxc.default_passes(quantize=False))
    for name, passes in recipes(task.count, options.blocks, options.quick).items():
        for target in ours.TARGETS:
            label = f"{name}, {target}"
            if only not in label or label in rows:
                continue
            begin = time.perf_counter()
            folder = label.replace(",", "")
            how: dict[str, Any] = {"measure": False, "name": label, "folder": folder, "passes": [*exact, *passes]}
            try:
                engine = ours.compile_to(model, target, task.count, **how)
            except fxc.FxcError as error:
                rows[label] = {"error": str(error)[:600]}
                print(f"{label}: {error}", flush=True)
                continue
            measures = task.score(harness.predict(engine, task.inputs, options.threads), reference)
            rows[label] = {**measures, "seconds": round(time.perf_counter() - begin, 1)}
            print(f"{label}: " + ", ".join(f"{k} {v:.4f}" for k, v in measures.items()), flush=True)
            harness.write("quant_repair", rows, settings, options)
    print(harness.write("quant_repair", rows, settings, options))


if __name__ == "__main__":
    main()
