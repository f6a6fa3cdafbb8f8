"""Measured speed-up of ResNet-50 at half its multiply-accumulates, channels rounded for the machine, in both engines.

    python -m benchmarks.pruning_latency [--quick]

Dense and pruned engines of ONNX Runtime and OpenVINO, float32, batch 1, each in a process of its own, in interleaved
rounds. Random weights: latency does not depend on them.
"""

from __future__ import annotations

from typing import Any, Final

import torch

import fxcompress as fxc
from benchmarks import harness
from benchmarks.pruning_zoo import ZOO
from fxcompress.analysis import count_macs, count_parameters
from fxcompress.bench import compare_latency
from fxcompress.engines import Engine
from fxcompress.lowering import lower

NETWORK: Final = "torchvision/resnet50"
MACS: Final = 0.5
BAR: Final = 1.6
ENGINES: Final = ("onnxruntime", "openvino")
ROUND_TO: Final[tuple[int | str, ...]] = (1, "target", 32)


def programs(round_to: tuple[int | str, ...]) -> tuple[Any, dict[str, Any], dict[str, dict[str, float]]]:
    """The dense program, pruned ones by ``round_to``, and their sizes."""
    torch.manual_seed(0)
    entry = ZOO[NETWORK]
    args, kwargs = entry.inputs(1)
    dense = fxc.Pipeline((fxc.FoldBatchNorm(),))(fxc.capture(entry.build(), args, kwargs)).program
    made = {}
    sizes = {}
    for multiple in round_to:
        plan = fxc.plan_pruning(dense, macs=MACS, scope="local", round_to=multiple)
        name = f"round_to={multiple}"
        made[name] = plan.apply(dense)
        certificate = plan.certify(dense, made[name])
        sizes[name] = {
            "macs_ratio": count_macs(made[name]) / count_macs(dense),
            "parameters_ratio": count_parameters(made[name]) / count_parameters(dense),
            "certificate_float64": certificate.float64,
        }
    return dense, made, sizes


def measure(quick: bool) -> dict[str, Any]:
    """Rows by engine and rounding, with the ratio of dense to pruned time."""
    dense, made, sizes = programs(ROUND_TO[1:2] if quick else ROUND_TO)
    args, kwargs = dense.example
    rows: dict[str, Any] = {}
    for name in ENGINES:
        target = fxc.target(name)
        engines: dict[str, Engine] = {"dense": target.build(lower(dense))}
        engines |= {label: target.build(lower(program)) for label, program in made.items()}
        found = compare_latency(engines, args, kwargs, budget_s=6.0 if quick else 40.0, rounds=5 if quick else 15)
        for label in made:
            ratio = found.ratio("dense", label)
            rows[f"{name} {label}"] = {
                "engine": name,
                **sizes[label],
                "dense_ms": found.latency["dense"].p50_ms,
                "pruned_ms": found.latency[label].p50_ms,
                "speedup": ratio.median,
                "low": ratio.low,
                "high": ratio.high,
            }
    return rows


def main() -> None:
    """Measure and write the JSON."""
    options = harness.arguments("Speed-up of pruned ResNet-50.")
    rows = measure(options.quick)
    best = max(rows, key=lambda n: rows[n]["speedup"])
    settings: dict[str, Any] = {"network": NETWORK, "macs": MACS, "bar": BAR}
    print(harness.write("pruning_latency", {"best": best, "rows": rows}, settings, options))
    for name, row in rows.items():
        print(
            f"{name}: {row['speedup']:.2f} x ({row['dense_ms']:.2f} -> {row['pruned_ms']:.2f} ms, MACs {row['macs_ratio']:.3f})"
        )


if __name__ == "__main__":
    main()
