"""Which tile a kernel uses: a table measured on the device, else a heuristic. Nothing is tuned at a call.

Tables are JSON, one per GPU model: those of the package (``kernels/configs_<gpu>.json``, read-only) and the user's own
(``fxcompress tune`` writes them into `overlay_folder`), which win. Schema 1::

    {"schema": 1, "gpu": "NVIDIA H200", "sm": 90, "sm_count": 132, "source": "measured",
     "entries": {"w4a16": {"<M bucket>,<N>,<K>,<dtype>,<group>": {"block_m": 16, ...}}}}

M is the number of rows of the activations, rounded up to one of `M_BUCKETS`.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch

from fxcompress.errors import UsageError

__all__ = [
    "M_BUCKETS",
    "SCHEMA",
    "Config",
    "Device",
    "Problem",
    "device_of",
    "forget_tables",
    "lookup",
    "overlay_folder",
    "read_table",
    "table_name",
]

SCHEMA: Final = 1
M_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Config:
    """One way to run a kernel.

    Attributes:
        block_m: Rows of activations a program works on.
        block_n: Rows of weights (output features) a program works on.
        block_k: Depth of one step of the loop.
        split_k: Programs that share one output tile, each with a part of K; their sums are added in a fixed order.
        num_warps: Warps of a program.
        num_stages: Depth of the software pipeline.
        swap_ab: Multiply ``W x^T`` instead of ``x W^T``: the dequantized weights stay in registers.
        route: ``kernel``, or another way the family offers, e.g. ``dequantize`` (to 16 bits once, then cuBLAS).
    """

    block_m: int = 16
    block_n: int = 128
    block_k: int = 128
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 4
    swap_ab: bool = False
    route: str = "kernel"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Device:
    """What of a GPU matters to the choice.

    Attributes:
        name: ``NVIDIA H200``.
        sm: Compute capability times ten: 80, 90, 100.
        sm_count: Streaming multiprocessors.
        shared_memory: Bytes a program may use.
    """

    name: str
    sm: int
    sm_count: int
    shared_memory: int


#: Devices by compute capability, for compiling and testing without one.
ASSUMED: Final = {
    80: Device("NVIDIA A100", 80, 108, 166912),
    90: Device("NVIDIA H200", 90, 132, 232448),
    100: Device("NVIDIA B200", 100, 148, 232448),
}


@dataclass(frozen=True)
class Problem:
    """One product ``[M, K] x [K, N]``.

    Attributes:
        family: ``w4a16``, ``w8a8`` ...
        m: Rows of activations.
        n: Output features.
        k: Input features.
        dtype: Of the activations.
        group_size: Of the scales; -1 for one per row, 0 where it plays no part.
    """

    family: str
    m: int
    n: int
    k: int
    dtype: torch.dtype
    group_size: int = 0

    def key(self) -> str:
        """Key of this problem in a table."""
        bucket = next((b for b in M_BUCKETS if b >= self.m), M_BUCKETS[-1])
        return f"{bucket},{self.n},{self.k},{str(self.dtype).removeprefix('torch.')},{self.group_size}"


@cache
def _device(index: int) -> Device:
    found = torch.cuda.get_device_properties(index)
    return Device(
        found.name,
        found.major * 10 + found.minor,
        found.multi_processor_count,
        getattr(found, "shared_memory_per_block_optin", 101376),
    )


def device_of(x: torch.Tensor) -> Device:
    """The device ``x`` lies on; an A100 is assumed for a tensor in main memory (Triton's interpreter)."""
    return _device(x.device.index or 0) if x.is_cuda else ASSUMED[80]


def overlay_folder() -> Path:
    """Where the user's tables lie: ``$FXCOMPRESS_CONFIGS``, else ``~/.cache/fxcompress/configs``."""
    given = os.environ.get("FXCOMPRESS_CONFIGS")
    return Path(given) if given else Path.home() / ".cache" / "fxcompress" / "configs"


def table_name(gpu: str) -> str:
    """File name of a GPU model's table: ``configs_nvidia-h200.json``."""
    return f"configs_{gpu.lower().replace(' ', '-')}.json"


def read_table(path: Path) -> dict[str, dict[str, Config]]:
    """Entries of a table: family -> key -> config; empty when the file does not exist.

    Raises:
        UsageError: it is no table, or of another schema.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise UsageError(
                403, f"{path.name} has schema {content['schema']}", why=f"this version reads {SCHEMA}", fix="tune again"
            )
        return {
            family: {key: Config(**c) for key, c in entries.items()} for family, entries in content["entries"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            404, f"{path.name} is no table of kernel configurations", why=str(error), fix="delete it and tune again"
        ) from error


@cache
def _tables(gpu: str, overlay: Path) -> tuple[dict[str, dict[str, Config]], ...]:
    name = table_name(gpu)
    return read_table(overlay / name), read_table(Path(__file__).resolve().parent / name)


def forget_tables() -> None:
    """Read the tables again at the next call."""
    _tables.cache_clear()


def lookup(problem: Problem, device: Device) -> Config | None:
    """What the tables say about a problem: the user's first, then the package's; None when neither knows it."""
    key = problem.key()
    for table in _tables(device.name, overlay_folder()):
        found = table.get(problem.family, {}).get(key)
        if found is not None:
            return found
    return None
