"""OpenVINO's compressed weights, and which of its products quantize their input at run time."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from fxcompress.engines.packed import Product, container_bits, find_products, rounded, unpack
from fxcompress.environment import has_vnni

if TYPE_CHECKING:
    from fxcompress.engines.quantized import Realizer

__all__ = ["PackedProducts"]

_STEP = 16  # blocks are a multiple of it


class PackedProducts:
    """Rewrites products with packed weights for OpenVINO.

    The plug-in quantizes the inputs of all compressed products of a model in blocks of one size, ``block`` (0: of none).
    Products that are simulated otherwise are written so that it leaves them alone.

    Attributes:
        block: Value of the plug-in's option ``DYNAMIC_QUANTIZATION_GROUP_SIZE``.
    """

    def __init__(self) -> None:
        self.block = 0

    def __call__(self, r: Realizer) -> None:
        """Rewrite them all."""
        products = list(find_products(r))
        self.block = _common_block(products)
        slow: list[str] = []
        floating: list[str] = []
        for p in products:
            touched = self.block > 0 and _takes(p, self.block)
            if touched and p.block == self.block and p.dynamic is not None:
                p.node.replace_input_with(0, p.x)
            elif p.dynamic is not None:
                slow.append(p.name)
            if touched and p.block != self.block:
                rounded(r, p)
                r.notes.append(
                    f"{p.name}: its weight is stored in float32, because inputs are quantized in other blocks"
                )
            else:
                unpack(r, p, at_load=not _kernel_reads(p))
                floating += [] if _kernel_reads(p) else [p.name]
        if floating:
            names = ", ".join(dict.fromkeys(floating))
            r.notes.append(
                f"{names}: unpacked to float32 when the engine is loaded: small on disk, no faster than float32 "
                "(OpenVINO has no right kernel for groups of this size; take 16, or a multiple of 32)"
            )
        if slow:
            names = ", ".join(dict.fromkeys(slow))
            r.notes.append(
                f"{names}: quantization of the input is computed in float32, which is slow (OpenVINO has no kernel)"
            )


def _common_block(products: list[Product]) -> int:
    """The block size that most multiplications want; 0 when none can be had on this processor."""
    if not has_vnni():
        return 0
    wanted: Counter[int] = Counter()
    for p in products:
        if p.block and _takes(p, p.block):
            wanted[p.block] += p.shape[0] * p.shape[1]
    return wanted.most_common(1)[0][0] if wanted else 0


def _kernel_reads(p: Product) -> bool:
    """True when the plug-in's product with the compressed weight is right.

    Measured with OpenVINO 2026.4, AVX2 and AVX-512: with other groups, and with an odd number of 4-bit integers in a row,
    it computes wrong numbers without a warning.
    """
    _, features = p.shape
    group = p.grid.group
    if container_bits(p.grid, p.name) == 8:
        return group % 4 == 0
    return features % 2 == 0 and (group % 32 == 0 or (group < 32 and group % 2 == 0))


def _takes(p: Product, block: int) -> bool:
    """True when the plug-in quantizes the input of this product in blocks of that size."""
    if not _kernel_reads(p):
        return False
    rows, features = p.shape
    whole = p.grid.group == 0
    return block % _STEP == 0 and rows > 1 and (block <= features if whole else p.grid.group % block == 0)
