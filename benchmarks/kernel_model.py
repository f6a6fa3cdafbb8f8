"""What the kernels should reach on GPUs nobody has measured them on: instruction counts and a roofline. A prediction.

    python -m benchmarks.kernel_model     reads benchmarks/results/kernel_lint.json, writes kernel_predictions.json

A product takes as long as the slowest of three: its bytes at a share of the memory's speed, its multiplications at a share
of the tensor cores', and the instructions of its main loop (instructions per weight x weights x tiles along M) at the rate
the chip issues them; and 2 us. The shares are what comparable kernels reach, cuBLAS those of published figures.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from benchmarks.harness import RESULTS, environment

if TYPE_CHECKING:
    from fxcompress.kernels.configs import Config, Problem
    from fxcompress.kernels.workloads import Workload

__all__ = ["CHIPS", "Chip", "Time", "cublas_us", "main", "ours", "predict", "tile"]

SHAPES: Final = ((28672, 8192), (14336, 4096), (4096, 4096))
ROWS: Final = (1, 16, 64, 256, 1024)
_LAUNCH_US: Final = 2.0
#: Weights of the dense product in bytes -> share of the memory's speed: cuBLAS, ours.
_SMALL, _LARGE = 50e6, 300e6
_MEMORY: Final = {"small": (0.75, 0.60), "mid": (0.82, 0.72), "large": (0.89, 0.80)}
_CUBLAS_MATH, _OURS_MATH = 0.886, 0.70


@dataclass(frozen=True)
class Chip:
    """Rates of a GPU.

    Attributes:
        name: As `torch.cuda.get_device_name` has it.
        sm: Compute capability times ten.
        memory: Bytes per second: the data sheet's, or a measured copy.
        half: Dense 16-bit operations per second; 8-bit ones and sparse ones are twice as many.
        issue: Instructions of a lane per second: multiprocessors x 4 x 32 x clock.
        cache: Bytes of the second-level cache.
    """

    name: str
    sm: int
    memory: float
    half: float
    issue: float
    cache: float


CHIPS: Final = (
    Chip("NVIDIA A100", 80, 2.04e12, 312e12, 108 * 128 * 1.41e9, 40e6),
    Chip("NVIDIA H200", 90, 4.3e12, 790e12, 132 * 128 * 1.98e9, 60e6),
)


@dataclass(frozen=True)
class Time:
    """A predicted time.

    Attributes:
        us: Microseconds.
        limit: What it is spent on: ``memory``, ``tensor cores``, ``instructions``.
    """

    us: float
    limit: str


def _shares(n: int, k: int) -> tuple[float, float]:
    dense = 2.0 * n * k
    return _MEMORY["small" if dense < _SMALL else "mid" if dense < _LARGE else "large"]


def cublas_us(chip: Chip, m: int, n: int, k: int) -> float:
    """Microseconds of the dense 16-bit product."""
    size = 2.0 * (n * k + m * k + m * n)
    return max(size / (chip.memory * _shares(n, k)[0]), 2.0 * m * n * k / (chip.half * _CUBLAS_MATH)) * 1e6


def ours(chip: Chip, work: Workload, problem: Problem, config: Config, per_weight: float | None) -> Time:
    """Microseconds of a kernel.

    Args:
        chip: The GPU.
        work: The kernel's family.
        problem: What it computes.
        config: How.
        per_weight: Instructions per weight of its main loop; None: not counted.
    """
    p, speed = problem, chip.memory * _shares(problem.n, problem.k)[1]
    if config.route in ("dequantize", "dense"):  # the weights in 16 bits once, written and read, then the dense product
        once = p.n * p.k * (work.bits / 8 + 2.0) / speed * 1e6
        return Time(once + cublas_us(chip, p.m, p.n, p.k) + _LAUNCH_US, "tensor cores" if p.m > 256 else "memory")
    parts = config.split_k * p.m * p.n * 8.0 if config.split_k > 1 else 0.0  # written and read in 32 bits
    parts *= 0.5 if parts < chip.cache else 1.0  # half of it is in the cache at a time, which is twice as fast
    rate = chip.half * _OURS_MATH * (2.0 if work.integer else 1.0) * (2.0 if work.sparse else 1.0)
    tiles = -(-p.m // config.block_m) if config.route == "kernel" else 0  # cuSPARSELt counts no instructions of ours
    times = {
        "memory": (work.bytes(p) + parts) / speed,
        "tensor cores": work.operations(p) / rate,
        "instructions": (per_weight or 0.0) * p.n * p.k * tiles / chip.issue,
    }
    limit = max(times, key=lambda name: times[name])
    launches = 2 if config.split_k > 1 else 1
    return Time(times[limit] * 1e6 + launches * _LAUNCH_US, limit)


# ------------------------------------------------------------------------------------------------ from the lint
_NAMES: Final = {
    "BLOCK_M": "block_m",
    "BLOCK_N": "block_n",
    "BLOCK_K": "block_k",
    "SPLIT_K": "split_k",
    "SWAP": "swap_ab",
}


def tile(constants: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a configuration that a kernel's constants tell; tiles of ``mma.sp`` are 16 features by 8 rows."""
    found = {field: constants[name] for name, field in _NAMES.items() if name in constants}
    if "MT" in constants and "NT" in constants:
        found |= {"block_m": 8 * constants["NT"], "block_n": 16 * constants["MT"]}
    return found


def per_weight(rows: Sequence[Mapping[str, Any]], problem: Problem, config: Config) -> float | None:
    """Instructions per weight of a configuration: the most of the lint's rows that fit it best; None without any."""
    counted = [r for r in rows if r["family"] == problem.family and r.get("per_weight")]
    scores = [_score(r, config) for r in counted]
    best = max(scores, default=0)
    return max((r["per_weight"] for r, score in zip(counted, scores, strict=True) if score == best), default=None)


def _score(row: Mapping[str, Any], config: Config) -> int:
    """How many fields of a configuration a row of the lint has; the size of the tile counts most."""
    same = [name for name, value in tile(row["constants"]).items() if getattr(config, name) == value]
    return sum(4 if name in ("block_m", "block_n") else 1 for name in same) + int(row["warps"] == config.num_warps)


def predict(rows: Sequence[Mapping[str, Any]], chip: Chip) -> list[dict[str, Any]]:
    """Predicted times of every family, shape and number of rows on a chip.

    Args:
        rows: The lint's, of that chip.
        chip: The GPU.
    """
    import torch

    from fxcompress.kernels.candidates import heuristic
    from fxcompress.kernels.configs import ASSUMED
    from fxcompress.kernels.workloads import WORKLOADS

    found = []
    for family, work in WORKLOADS.items():
        for n, k in SHAPES:
            for m in ROWS:
                problem = work.problem(m, n, k, torch.float16, 128)
                assert problem is not None, f"{family} cannot compute {n} x {k}"
                config = heuristic(problem, ASSUMED[chip.sm])
                count = per_weight(rows, problem, config)
                time, dense = ours(chip, work, problem, config, count), cublas_us(chip, m, n, k)
                facts = {"gpu": chip.name, "family": family, "m": m, "n": n, "k": k, "config": config.to_dict()}
                numbers = {"per_weight": count, "us": round(time.us, 2), "cublas_us": round(dense, 2)}
                found.append({**facts, **numbers, "limit": time.limit, "speedup": round(dense / time.us, 3)})
    return found


def main() -> int:
    """Writes the predictions."""
    content = json.loads((RESULTS / "kernel_lint.json").read_text(encoding="utf-8"))
    newest = next(iter(content["results"].values()))
    rows = [row for chip in CHIPS for row in predict([r for r in newest.values() if r["sm"] == chip.sm], chip)]
    settings = {"chips": [vars(chip) for chip in CHIPS], "launch_us": _LAUNCH_US, "memory_shares": _MEMORY}
    out = {
        "claim": "kernel_predictions",
        "environment": environment(1),
        "settings": settings,
        "results": {"rows": rows},
    }
    path = RESULTS / "kernel_predictions.json"
    path.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
