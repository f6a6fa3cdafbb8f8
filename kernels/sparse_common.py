"""What the three 2:4 operators share: the kinds of packed weights, the checks of their arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from fxcompress.errors import UsageError
from fxcompress.kernels.int8_common import check_tensor
from fxcompress.kernels.sparse_layout import TILE, depth, padded

__all__ = ["F16", "HALVES", "I8", "W4", "Kind", "Packed", "check_packed", "kind_of", "rows_of"]

#: Activations that a float kernel multiplies.
HALVES: Final = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Kind:
    """How a layout of `fxcompress.kernels.sparse_layout` is read.

    Attributes:
        family: ``sp24``, ``sp24_w8a8``, ``sp24_w4``.
        unit: Width of a piece of K that has its own metadata words.
        vectors: 16-byte loads of values a lane makes for a unit.
        metas: Words of metadata of a lane for a unit.
        steps: Instructions for a unit; each takes 64 bytes of a row of activations.
        step: Input features of one instruction.
    """

    family: str
    unit: int
    vectors: int
    metas: int
    steps: int

    @property
    def step(self) -> int:
        """Width of K of one instruction."""
        return self.unit // self.steps


F16: Final = Kind("sp24", 64, 2, 1, 2)
I8: Final = Kind("sp24_w8a8", 64, 1, 1, 1)
W4: Final = Kind("sp24_w4", 128, 1, 2, 4)
#: By the dtype of the packed values; those of float32 and float64 are for references only.
_KINDS: Final = {
    **dict.fromkeys((torch.float16, torch.bfloat16, torch.float32, torch.float64), F16), torch.int8: I8, torch.int32: W4
}  # fmt: skip
_ELEMENTS: Final = {F16: 8, I8: 16, W4: 4}


@dataclass(frozen=True)
class Packed:
    """A packed weight as a kernel takes it.

    Attributes:
        values: In one of the three layouts.
        meta: Its metadata.
        n: Output features.
        scales: Of 4-bit weights, [groups, n]; None otherwise.
        group: Steps of 32 along K that share a scale; 0 where the whole row does.
    """

    values: Tensor
    meta: Tensor
    n: int
    scales: Tensor | None = None
    group: int = 0

    @property
    def kind(self) -> Kind:
        """How it is read."""
        return kind_of(self.values)

    @property
    def units(self) -> int:
        """Pieces of K."""
        return self.values.shape[1] // self.kind.vectors

    @property
    def groups(self) -> int:
        """Rows of the scales."""
        return 1 if self.scales is None else self.scales.shape[0]


def kind_of(values: Tensor) -> Kind:
    """The kind of packed ``values``, which their dtype tells."""
    if values.dtype not in _KINDS:
        raise UsageError(
            444,
            f"packed 2:4 values have dtype {str(values.dtype).removeprefix('torch.')}",
            fix="pack with pack_sp24 (float16, bfloat16), pack_sp24_i8 (int8) or pack_sp24_w4 (int32)",
        )
    return _KINDS[values.dtype]


def check_packed(x: Tensor, values: Tensor, meta: Tensor, n: int, kind: Kind) -> None:
    """Raise UsageError unless ``values`` and ``meta`` are ``kind`` and hold ``n`` output features for ``x`` [..., K]."""
    if x.dim() == 0 or n < 1:
        raise UsageError(445, f"a product of x {list(x.shape)} with {n} output features does not exist")
    k = x.shape[-1]
    tiles, units = padded(n, TILE) // TILE, padded(k, kind.unit) // kind.unit
    if kind_of(values) is not kind:
        raise UsageError(446, f"these values are packed for {kind_of(values).family}_linear, not {kind.family}_linear")
    shape = (tiles, units * kind.vectors, 32, _ELEMENTS[kind])
    check_tensor("values", values, (values.dtype,), shape, x.device)
    check_tensor("meta", meta, (torch.int32,), (tiles, units * kind.metas, 32), x.device)


def rows_of(x: Tensor, values: Tensor) -> Tensor:
    """``x`` [..., K] as contiguous, 16-byte aligned rows [M, K'], K filled with zeros to the depth of ``values``."""
    rows = x.reshape(-1, x.shape[-1])
    missing = depth(values) - rows.shape[1]
    if missing:
        return torch.nn.functional.pad(rows, (0, missing))
    rows = rows.contiguous()
    return rows.clone() if rows.data_ptr() % 16 else rows
