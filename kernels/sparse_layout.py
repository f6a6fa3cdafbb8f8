"""How 2:4 sparse weights lie in memory for the sparse tensor cores: packing, unpacking, the versions saved files carry.

In every group of four consecutive weights along K at most two are nonzero. Two weights a group are stored, and for each
of them its place 0 to 3 in two bits, the lower place first: a nibble ``i0 | i1 << 2`` a group, six of them possible. The
order is that of the registers of ``mma.sp::ordered_metadata`` (PTX ISA, "Matrix fragments for multiply-accumulate
operation with sparse matrix A"), so a lane loads 16 bytes and multiplies. With 16 output features ``n = 16 tile + 8 h + g``
and lane ``4 g + t`` of a warp (g 0 to 7, t 0 to 3), all version 1:

``sp24_f16``, m16n8k32: values [tiles, K / 32, 32 lanes, 8] of float16 or bfloat16. Lane (g, t) holds the stored weights
``8 q + 2 t + b`` of row (h, g) at element ``4 q + 2 h + b``. Metadata int32 [tiles, K / 64, 32 lanes]: lane (g, t) holds the
nibbles of the weights ``16 t`` to ``16 t + 15`` of each 64 of K, row h = 0 in the low half, h = 1 in the high one. Lanes
t = 0, 1 serve the first 32 of K (sparsity selector 0), t = 2, 3 the second 32 (selector 1).

``sp24_i8``, m16n8k64: values int8 [tiles, K / 64, 32 lanes, 16], stored weights ``16 q + 4 t + b`` at element
``8 q + 4 h + b``. Metadata int32 [tiles, K / 64, 32 lanes]: lane (g, t) holds row h = t % 2, weights ``32 (t // 2)`` and up.

``sp24_w4``, four m16n8k32: values int32 [tiles, K / 128, 32 lanes, 4]. Word s of a lane is its element of ``sp24_f16`` for
step s, each weight plus 8 as a nibble: element ``4 q + 2 h + b`` in the bits from ``4 (2 q + h) + 16 b``. Metadata as
``sp24_f16``.

Output features are filled up to 16 and K to 64 (``sp24_w4``: 128) with zeros whose places are 0 and 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from fxcompress.errors import UsageError
from fxcompress.kernels.layouts import Layout

__all__ = [
    "SP24_F16",
    "SP24_I8",
    "SP24_W4",
    "TILE",
    "check_sp24",
    "depth",
    "pack_sp24",
    "pack_sp24_i8",
    "pack_sp24_w4",
    "padded",
    "unpack_sp24",
    "unpack_sp24_i8",
    "unpack_sp24_w4",
]

SP24_F16: Final = Layout("sp24_f16", 1)
SP24_I8: Final = Layout("sp24_i8", 1)
SP24_W4: Final = Layout("sp24_w4", 1)
#: Output features of a tile.
TILE: Final = 16
_LANES: Final = 32


def padded(size: int, to: int) -> int:
    """``size`` rounded up to a multiple of ``to``."""
    return -(-size // to) * to


def depth(values: Tensor) -> int:
    """Input features, with the filling, of packed ``values`` of any of the three layouts."""
    return values.shape[1] * {torch.int8: 64, torch.int32: 128}.get(values.dtype, 32)


def check_sp24(weight: Tensor) -> None:
    """Raise UsageError, naming the first bad group, unless [N, K] ``weight`` has at most 2 nonzeros in 4 along K."""
    if weight.dim() != 2 or 0 in weight.shape:
        raise UsageError(440, f"a 2:4 weight has shape [N, K], not {list(weight.shape)}")
    counts = (_groups(weight, 4) != 0).sum(2)
    bad = (counts > 2).nonzero()
    if len(bad):
        row, group = bad[0].tolist()
        raise UsageError(
            441,
            f"the weight is not 2:4 sparse: row {row}, columns {4 * group} to {4 * group + 3} hold "
            f"{int(counts[row, group])} nonzeros",
            why=f"{len(bad)} groups of 4 along K hold more than 2",
            fix="prune to 2:4 along the input features first",
        )


def _groups(weight: Tensor, to: int) -> Tensor:
    """[N, K] -> [N, groups, 4], K filled with zeros up to a multiple of ``to``."""
    n, k = weight.shape
    return torch.nn.functional.pad(weight, (0, padded(k, to) - k)).reshape(n, -1, 4)


def _compress(weight: Tensor, to: int) -> tuple[Tensor, Tensor]:
    """Stored weights [N', K' / 2] and the nibbles of their places [N', K' / 4]; N' and K' filled up."""
    check_sp24(weight)
    n = weight.shape[0]
    groups = _groups(torch.nn.functional.pad(weight, (0, 0, 0, padded(n, TILE) - n)), to)
    place = torch.arange(4, device=weight.device)
    # nonzeros come first, then the first zeros; the two kept, in ascending order
    first = torch.argsort((groups == 0) * 4 + place, dim=2)[..., :2]
    kept = first.sort(dim=2).values
    stored = groups.gather(2, kept).flatten(1)
    return stored, (kept[..., 0] | kept[..., 1] << 2).to(torch.int64)


def _nibbles(nibbles: Tensor) -> Tensor:
    """[..., 8] nibbles, the first in the lowest bits -> int32 [...]."""
    shifts = torch.arange(0, 32, 4, device=nibbles.device)
    word = (nibbles.to(torch.int64) << shifts).sum(-1)
    return torch.where(word >= 1 << 31, word - (1 << 32), word).to(torch.int32)


def _split_nibbles(words: Tensor) -> Tensor:
    """Inverse of `_nibbles`."""
    shifts = torch.arange(0, 32, 4, device=words.device)
    return (words.to(torch.int64)[..., None] >> shifts) & 15


# Each order is how the parts (tile, h, g, block of K, ...) of a row-major matrix are permuted, and back.
_VALUES: Final = (0, 3, 2, 5, 4, 1, 6)  # tile, h, g, block, q, t, b -> tile, block, g, t, q, h, b
_META_F16: Final = (0, 3, 2, 4, 1, 5)  # tile, h, g, block, t, j -> tile, block, g, t, h, j
_META_I8: Final = (0, 3, 2, 4, 1, 5)  # tile, h, g, block, u, j -> tile, block, g, u, h, j
_W4: Final = (0, 3, 2, 6, 4, 7, 5, 1)  # tile, h, g, block, s, q, t, b -> tile, block, g, t, s, b, q, h


def _permuted(matrix: Tensor, inner: Sequence[int], order: Sequence[int]) -> Tensor:
    """Cut rows into (tile, 2, 8) and columns into (block, *inner), and permute."""
    return matrix.reshape(-1, 2, 8, matrix.shape[1] // _product(inner), *inner).permute(*order).contiguous()


def _restored(parts: Tensor, order: Sequence[int]) -> Tensor:
    """Inverse of `_permuted`: a row-major matrix."""
    back = [order.index(i) for i in range(len(order))]
    whole = parts.permute(*back)
    return whole.reshape(whole.shape[0] * TILE, -1)


def _product(sizes: Sequence[int]) -> int:
    out = 1
    for size in sizes:
        out *= size
    return out


def _pack_meta(nibbles: Tensor) -> Tensor:
    parts = _permuted(nibbles, (4, 4), _META_F16)
    return _nibbles(parts.reshape(*parts.shape[:2], _LANES, 8))


def _unpack_meta(meta: Tensor) -> Tensor:
    return _restored(_split_nibbles(meta).reshape(*meta.shape[:2], 8, 4, 2, 4), _META_F16)


def _expand(stored: Tensor, nibbles: Tensor, n: int, k: int) -> Tensor:
    """Dense [n, k] of stored weights [N', K' / 2] and nibbles [N', K' / 4]."""
    rows, groups = nibbles.shape
    places = torch.stack((nibbles & 3, nibbles >> 2), 2)
    dense = stored.new_zeros(rows, groups, 4).scatter_(2, places, stored.reshape(rows, groups, 2))
    return dense.reshape(rows, -1)[:n, :k].contiguous()


def pack_sp24(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Pack 16-bit floats to ``sp24_f16``.

    Args:
        weight: [N, K], float16 or bfloat16, at most two nonzeros in every four along K. (-0.0 counts as zero.)

    Returns:
        Values [ceil(N / 16), 2 ceil(K / 64), 32, 8] in the dtype of ``weight`` and metadata int32
        [ceil(N / 16), ceil(K / 64), 32].

    Raises:
        UsageError: not 2:4, or another dtype.
    """
    _check_dtype(weight, torch.float16, torch.bfloat16)
    stored, nibbles = _compress(weight, 64)
    values = _permuted(stored, (2, 4, 2), _VALUES)
    return values.reshape(*values.shape[:2], _LANES, 8), _pack_meta(nibbles)


def unpack_sp24(values: Tensor, meta: Tensor, n: int, k: int) -> Tensor:
    """Inverse of `pack_sp24`: [``n``, ``k``] in the dtype of ``values``."""
    stored = _restored(values.reshape(*values.shape[:2], 8, 4, 2, 2, 2), _VALUES)
    return _expand(stored, _unpack_meta(meta), n, k)


def pack_sp24_i8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Pack 8-bit integers to ``sp24_i8``.

    Args:
        weight: int8 [N, K], at most two nonzeros in every four along K.

    Returns:
        Values int8 [ceil(N / 16), ceil(K / 64), 32, 16] and metadata int32 [ceil(N / 16), ceil(K / 64), 32].

    Raises:
        UsageError: not 2:4, or another dtype.
    """
    _check_dtype(weight, torch.int8)
    stored, nibbles = _compress(weight, 64)
    values = _permuted(stored, (2, 4, 4), _VALUES)
    parts = _permuted(nibbles, (2, 8), _META_I8)
    return values.reshape(*values.shape[:2], _LANES, 16), _nibbles(parts.reshape(*parts.shape[:2], _LANES, 8))


def unpack_sp24_i8(values: Tensor, meta: Tensor, n: int, k: int) -> Tensor:
    """Inverse of `pack_sp24_i8`: int8 [``n``, ``k``]."""
    stored = _restored(values.reshape(*values.shape[:2], 8, 4, 2, 2, 4), _VALUES)
    nibbles = _restored(_split_nibbles(meta).reshape(*meta.shape[:2], 8, 2, 2, 8), _META_I8)
    return _expand(stored, nibbles, n, k)


def pack_sp24_w4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Pack 4-bit integers to ``sp24_w4``.

    Args:
        weight: Integers -8 to 7, int8 [N, K], at most two nonzeros in every four along K.

    Returns:
        Values int32 [ceil(N / 16), ceil(K / 128), 32, 4] and metadata int32 [ceil(N / 16), 2 ceil(K / 128), 32].

    Raises:
        UsageError: not 2:4, another dtype, or integers out of range.
    """
    _check_dtype(weight, torch.int8)
    if weight.numel() and not -8 <= int(weight.min()) <= int(weight.max()) <= 7:
        raise UsageError(442, f"4-bit weights are -8 to 7, not {int(weight.min())} to {int(weight.max())}")
    stored, nibbles = _compress(weight, 128)
    values = _permuted(stored + 8, (4, 2, 4, 2), _W4)
    return _nibbles(values.reshape(*values.shape[:2], _LANES, 4, 8)), _pack_meta(nibbles)


def unpack_sp24_w4(values: Tensor, meta: Tensor, n: int, k: int) -> Tensor:
    """Inverse of `pack_sp24_w4`: int8 [``n``, ``k``]."""
    parts = _split_nibbles(values).reshape(*values.shape[:2], 8, 4, 4, 2, 2, 2)
    return _expand(_restored(parts, _W4).to(torch.int8) - 8, _unpack_meta(meta), n, k)


def _check_dtype(weight: Tensor, *dtypes: torch.dtype) -> None:
    if weight.dtype not in dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise UsageError(443, f"this 2:4 layout holds {names}, not {str(weight.dtype).removeprefix('torch.')}")
