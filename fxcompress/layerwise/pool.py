"""Memory for many small tensors of few sizes that live long, in large pieces, so that the heap is not torn to shreds."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Pool"]

#: Bytes taken from the system at once; allocators give pieces of this size back when they are freed.
_SLAB = 1 << 26
_ALIGNMENT = 64


class Pool:
    """Keeps copies of tensors. Buffers are used again for tensors of the same size; all are freed with the pool."""

    def __init__(self) -> None:
        self._free: dict[tuple[int, torch.device], list[Tensor]] = {}
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}  # id of a copy -> the copy, its buffer

    def keep(self, value: Tensor) -> Tensor:
        """A contiguous copy of ``value``."""
        size = -(-max(1, value.numel() * value.element_size()) // _ALIGNMENT) * _ALIGNMENT
        free = self._free.setdefault((size, value.device), [])
        if not free:
            slab = torch.empty(max(1, _SLAB // size) * size, dtype=torch.uint8, device=value.device)
            free += slab.split(size)
        buffer = free.pop()
        copy = buffer[: value.numel() * value.element_size()].view(value.dtype).view(value.shape).copy_(value)
        self._buffers[id(copy)] = copy, buffer
        return copy

    def release(self, copy: Tensor) -> None:
        """Let a tensor go that `keep` gave; others are left alone. Nobody may read it, or a view of it, any more."""
        found = self._buffers.pop(id(copy), None)
        if found is not None:
            buffer = found[1]
            self._free[buffer.numel(), buffer.device].append(buffer)
