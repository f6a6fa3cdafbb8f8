"""How 4-bit weights lie in memory for the kernels: packing, unpacking and the version that is saved with them.

``planes4``, version 1, for 16-bit activations. The K axis is cut into blocks of 128; a block of a row is 32 words of
16 bits, and nibble ``j`` of word ``i`` is weight ``k = 128 * block + 32 * j + i``. So the four nibbles of a loaded tile
are four tiles of 32 consecutive K, no lane shuffles, and a tile of one block is one contiguous piece of memory.

``planes4x8``, version 1, for 8-bit activations: a block is 64 bytes, the low nibbles are the block's first 64 weights
and the high nibbles its last 64, in two's complement.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from fxcompress.errors import UsageError

__all__ = [
    "K_BLOCK",
    "PLANES4",
    "PLANES4X8",
    "Layout",
    "check_groups",
    "pack_int4",
    "pack_int4x8",
    "unpack_int4",
    "unpack_int4x8",
]

K_BLOCK: Final = 128
_PLANE: Final = 32


@dataclass(frozen=True)
class Layout:
    """Name and version of a memory layout, as saved files carry it.

    Attributes:
        name: Which layout.
        version: Raised whenever the bytes of the same weights change.
    """

    name: str
    version: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"name": self.name, "version": self.version}

    def check(self, saved: dict[str, Any]) -> None:
        """Raise UsageError when ``saved`` (from `to_dict`) is another layout or version."""
        if saved != self.to_dict():
            raise UsageError(
                110,
                f"the packed weights have layout {saved.get('name')} version {saved.get('version')}",
                why=f"this version of fxcompress reads {self.name} version {self.version}",
                fix="compile the model again",
            )


PLANES4: Final = Layout("planes4", 1)
PLANES4X8: Final = Layout("planes4x8", 1)


def check_groups(k: int, group_size: int) -> int:
    """Number of groups of ``group_size`` (-1: the whole row) in a row of ``k`` weights.

    Raises:
        UsageError: the size is neither -1 nor a positive multiple of 32 that divides ``k``.
    """
    if group_size == -1:
        return 1
    if group_size < 1 or group_size % _PLANE or k % group_size:
        raise UsageError(
            401,
            f"{k} input features cannot be cut into groups of {group_size}",
            why=f"{k} % {group_size} = {k % group_size}"
            if group_size > 0 and k % group_size
            else "groups hold 32, 64, 96, ...",
            fix="use a multiple of 32 that divides the features, or -1 for one group",
        )
    return k // group_size


def _blocks(q: Tensor) -> Tensor:
    """[N, K] -> [N, blocks, 128], the tail filled with zero bits."""
    padding = -q.shape[1] % K_BLOCK
    return torch.nn.functional.pad(q, (0, padding)).reshape(q.shape[0], -1, K_BLOCK)


def pack_int4(q: Tensor) -> Tensor:
    """Pack to ``planes4``.

    Args:
        q: Integers 0 to 15, [N, K], any integer dtype.

    Returns:
        int16 [ceil(K / 128), N, 32].
    """
    planes = _blocks(q).to(torch.int32).reshape(q.shape[0], -1, 4, _PLANE)
    shifts = torch.arange(0, 16, 4, dtype=torch.int32, device=q.device)[:, None]
    words = (planes << shifts).sum(2, dtype=torch.int32)
    return words.to(torch.int16).permute(1, 0, 2).contiguous()


def unpack_int4(packed: Tensor, k: int) -> Tensor:
    """Inverse of `pack_int4`: uint8 [N, ``k``]."""
    words = packed.permute(1, 0, 2).to(torch.int32)
    shifts = torch.arange(0, 16, 4, dtype=torch.int32, device=packed.device)[:, None]
    planes = (words[:, :, None, :] >> shifts) & 15
    return planes.reshape(packed.shape[1], -1)[:, :k].to(torch.uint8)


def pack_int4x8(q: Tensor) -> Tensor:
    """Pack to ``planes4x8``.

    Args:
        q: Integers -8 to 7, [N, K], any integer dtype.

    Returns:
        uint8 [ceil(K / 128), N, 64].
    """
    halves = (_blocks(q).to(torch.int32) & 15).reshape(q.shape[0], -1, 2, K_BLOCK // 2)
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).to(torch.uint8).permute(1, 0, 2).contiguous()


def unpack_int4x8(packed: Tensor, k: int) -> Tensor:
    """Inverse of `pack_int4x8`: int8 [N, ``k``]."""
    halves = packed.permute(1, 0, 2).to(torch.int32)
    nibbles = torch.stack((halves & 15, halves >> 4), 2).reshape(packed.shape[1], -1)[:, :k]
    return ((nibbles ^ 8) - 8).to(torch.int8)
