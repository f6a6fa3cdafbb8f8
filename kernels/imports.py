"""Weights as other tools save them, to the layouts of the kernels and back: GPTQ, AWQ, compressed-tensors.

All of them put 4-bit (or 8-bit) fields into int32 words, lowest bits first, and mean ``(q - zero) * scale``:

- GPTQ (AutoGPTQ, GPTQModel): ``qweight`` [K * bits / 32, N], a word is consecutive input features; ``qzeros``
  [G, N * bits / 32]; ``scales`` [G, N]; ``g_idx`` [K], the group of every input feature. Version 1 stores zero points
  less one, version 2 as they are.
- AWQ (4 bits): ``qweight`` [K, N / 8], a word is eight output features in the order 0 2 4 6 1 3 5 7; ``qzeros``
  [G, N / 8] likewise; ``scales`` [G, N].
- compressed-tensors, ``pack-quantized``: ``weight_packed`` [N, ceil(K * bits / 32)], a word is consecutive input
  features, plus 8 (128); ``weight_scale`` [N, G]; ``weight_zero_point`` [ceil(N * bits / 32), G] or absent.
- compressed-tensors, ``int-quantized``: ``weight`` int8 [N, K] and ``weight_scale`` [N, G].

Going there and back gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from fxcompress.errors import UsageError
from fxcompress.kernels.layouts import check_groups, pack_int4, unpack_int4

__all__ = [
    "PackedWeight",
    "from_awq",
    "from_compressed_tensors",
    "from_gptq",
    "from_int_quantized",
    "to_awq",
    "to_compressed_tensors",
    "to_gptq",
    "to_int_quantized",
]

_AWQ_ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class PackedWeight:
    """Weights of a linear layer, [N, K], as ``w4a16_linear`` and ``w8a16_linear`` take them.

    Attributes:
        weight: 4 bits: int16 [ceil(K / 128), N, 32], layout ``planes4``; 8 bits: int8 [N, K].
        scales: Floats [G, N].
        zeros: uint8 [G, N]; None: the middle of the range. Always None for 8 bits.
        permutation: int64 [K]: input features were reordered so that groups are consecutive; the layer must be given
            ``x[..., permutation]``. None: they are where they were.
        bits: 4 or 8.
        features: K.
    """

    weight: Tensor
    scales: Tensor
    zeros: Tensor | None
    permutation: Tensor | None
    bits: int
    features: int

    @property
    def group_size(self) -> int:
        """Input features that share a scale, -1 for all, as the operators take it."""
        return -1 if self.scales.shape[0] == 1 else self.features // self.scales.shape[0]

    def integers(self) -> Tensor:
        """uint8 [N, K], 0 to 15 (255), input features in their own order."""
        q = unpack_int4(self.weight, self.features) if self.bits == 4 else (self.weight.to(torch.int16) + 128)
        q = q.to(torch.uint8)
        return q if self.permutation is None else q[:, self.permutation.argsort()]

    def zero_points(self) -> Tensor:
        """uint8 [G, N], also where `zeros` is None."""
        if self.zeros is not None:
            return self.zeros
        return torch.full(self.scales.shape, 1 << (self.bits - 1), dtype=torch.uint8, device=self.scales.device)


# ------------------------------------------------------------------------------------------------ fields of words
def _unpack(words: Tensor, bits: int, dim: int) -> Tensor:
    """int32 words [R, C] -> their fields, unsigned, as int32, along ``dim``."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    fields = (words.unsqueeze(dim + 1) >> (shifts if dim == 1 else shifts[:, None])) & ((1 << bits) - 1)
    return fields.flatten(dim, dim + 1)


def _pack(fields: Tensor, bits: int, dim: int) -> Tensor:
    """Inverse of `_unpack`; the last word is filled with zero bits."""
    each = 32 // bits
    padding = -fields.shape[dim] % each
    fields = torch.nn.functional.pad(fields.to(torch.int64), (0, padding) if dim == 1 else (0, 0, 0, padding))
    shifts = torch.arange(0, 32, bits, device=fields.device)
    words = (fields.unflatten(dim, (-1, each)) << (shifts if dim == 1 else shifts[:, None])).sum(dim + 1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _expect(name: str, value: Tensor, shape: Sequence[int], dtypes: Sequence[torch.dtype] = ()) -> None:
    if tuple(value.shape) != tuple(shape) or (dtypes and value.dtype not in dtypes):
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise UsageError(
            456,
            f"{name} of the packed weights is {str(value.dtype).removeprefix('torch.')} {list(value.shape)}",
            why=f"expected {f'{wanted} ' if wanted else ''}{list(shape)}",
        )


def _sizes(matrix: Tensor) -> tuple[int, int]:
    """Rows and columns; zeros for what is no matrix, which then fits nothing."""
    return (matrix.shape[0], matrix.shape[1]) if matrix.dim() == 2 else (0, 0)


def _cannot(holder: str, bits: int, why: str, fix: str = "") -> UsageError:
    return UsageError(457, f"{holder} cannot hold these {bits}-bit weights", why=why, fix=fix)


def _check_bits(bits: int) -> None:
    if bits not in (4, 8):
        raise _cannot("the kernels", bits, "fields have 4 or 8 bits")


def _order(groups: Tensor | None, k: int, count: int) -> Tensor | None:
    """The permutation that makes groups consecutive; None when they are.

    Args:
        groups: Group of every input feature [K]; None or -1: consecutive ones.
        k: Input features.
        count: Groups.
    """
    check_groups(k, -1 if count == 1 else k // count if count else 0)
    if groups is None or bool((groups == -1).all()):
        return None
    _expect("the group index", groups, (k,))
    consecutive = torch.arange(k, device=groups.device) // (k // count)
    order = groups.to(torch.int64).argsort(stable=True)
    if not torch.equal(groups.to(torch.int64)[order], consecutive):
        raise UsageError(
            458,
            f"the group index does not split {k} input features into {count} groups of {k // count}",
            why="the kernels need groups of one size",
        )
    return None if torch.equal(order, torch.arange(k, device=order.device)) else order


def _packed(q: Tensor, scales: Tensor, zeros: Tensor | None, order: Tensor | None, bits: int) -> PackedWeight:
    """From integers [N, K] in their own order and zero points [G, N], both unsigned."""
    if order is not None:
        q = q[:, order]
    if bits == 8:
        if zeros is not None and bool((zeros != 128).any()):
            raise _cannot("the kernels", 8, "their zero points are not all in the middle", "quantize symmetrically")
        weight, zeros = (q.to(torch.int16) - 128).to(torch.int8).contiguous(), None
    else:
        weight = pack_int4(q)
    zeros = None if zeros is None else zeros.to(torch.uint8).contiguous()
    return PackedWeight(weight, scales.contiguous(), zeros, order, bits, q.shape[1])


def _unless_middle(zeros: Tensor, bits: int) -> Tensor | None:
    return None if bool((zeros == 1 << (bits - 1)).all()) else zeros


def _group_index(packed: PackedWeight) -> Tensor:
    """Group of every input feature, int32 [K]."""
    groups = torch.arange(packed.features, device=packed.scales.device) * packed.scales.shape[0] // packed.features
    if packed.permutation is not None:
        groups = groups[packed.permutation.argsort()]
    return groups.to(torch.int32)


# ------------------------------------------------------------------------------------------------ GPTQ
def from_gptq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None = None, *, bits: int = 4, version: int = 1
) -> PackedWeight:
    """GPTQ, with or without reordered activations (``desc_act``).

    Args:
        qweight: int32 [K * bits / 32, N].
        qzeros: int32 [G, N * bits / 32].
        scales: Floats [G, N].
        g_idx: Integers [K]; None: consecutive groups.
        bits: 4 or 8.
        version: Of the format: 1 (``checkpoint_format: gptq``) or 2 (``gptq_v2``).

    Raises:
        UsageError: shapes that do not fit, unequal groups, 8 bits with zero points; version 1 with a field of 15
            (255): its writers disagree whether the neighbour has lost a carry.
    """
    _check_bits(bits)
    each, (groups, n) = 32 // bits, _sizes(scales)
    _expect("qweight", qweight, (_sizes(qweight)[0], n), (torch.int32,))
    _expect("qzeros", qzeros, (groups, n // each), (torch.int32,))
    order = _order(g_idx, qweight.shape[0] * each, groups)
    zeros = _unpack(qzeros, bits, 1)
    if version == 1:
        if bool((zeros == (1 << bits) - 1).any()):
            raise _cannot("GPTQ version 1", bits, "a zero point of 0 wraps around", "save them as version 2")
        zeros = zeros + 1
    return _packed(_unpack(qweight, bits, 0).T, scales, _unless_middle(zeros, bits), order, bits)


def to_gptq(packed: PackedWeight, *, version: int = 1) -> dict[str, Tensor]:
    """Inverse of `from_gptq`: ``qweight``, ``qzeros``, ``scales``, ``g_idx``.

    Raises:
        UsageError: version 1 with a zero point of 0, or sizes that do not fill words.
    """
    zeros = packed.zero_points().to(torch.int32)
    _whole_words("GPTQ", packed, packed.features, zeros.shape[1])
    if version == 1:
        if bool((zeros == 0).any()):
            raise _cannot("GPTQ version 1", packed.bits, "a zero point of 0 wraps around", "save them as version 2")
        zeros = zeros - 1
    return {
        "qweight": _pack(packed.integers().T, packed.bits, 0),
        "qzeros": _pack(zeros, packed.bits, 1),
        "scales": packed.scales,
        "g_idx": _group_index(packed),
    }


def _whole_words(holder: str, packed: PackedWeight, *sizes: int) -> None:
    each = 32 // packed.bits
    if any(size % each for size in sizes):
        raise _cannot(holder, packed.bits, f"{', '.join(map(str, sizes))}: not all multiples of {each}")


# ------------------------------------------------------------------------------------------------ AWQ
def from_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> PackedWeight:
    """AWQ, the ``gemm`` version.

    Args:
        qweight: int32 [K, N / 8].
        qzeros: int32 [G, N / 8].
        scales: Floats [G, N].

    Raises:
        UsageError: shapes that do not fit.
    """
    groups, n = _sizes(scales)
    _expect("qweight", qweight, (_sizes(qweight)[0], n // 8), (torch.int32,))
    _expect("qzeros", qzeros, (groups, n // 8), (torch.int32,))
    order = _order(None, qweight.shape[0], groups)
    place = torch.tensor(_AWQ_ORDER, device=qweight.device).argsort()
    q, zeros = (_unpack(t, 4, 1).unflatten(1, (-1, 8))[..., place].flatten(1) for t in (qweight, qzeros))
    return _packed(q.T, scales, _unless_middle(zeros, 4), order, 4)


def to_awq(packed: PackedWeight) -> dict[str, Tensor]:
    """Inverse of `from_awq`: ``qweight``, ``qzeros``, ``scales``.

    Raises:
        UsageError: 8 bits, reordered input features, or output features that do not fill words.
    """
    if packed.bits != 4 or packed.permutation is not None:
        raise _cannot("AWQ", packed.bits, "it has 4 bits and consecutive groups only")
    _whole_words("AWQ", packed, packed.scales.shape[1])
    order = torch.tensor(_AWQ_ORDER, device=packed.scales.device)
    q, zeros = (t.unflatten(1, (-1, 8))[..., order].flatten(1) for t in (packed.integers().T, packed.zero_points()))
    return {"qweight": _pack(q, 4, 1), "qzeros": _pack(zeros, 4, 1), "scales": packed.scales}


# ------------------------------------------------------------------------------------------------ compressed-tensors
def from_compressed_tensors(
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_shape: Tensor | Sequence[int],
    weight_zero_point: Tensor | None = None,
    weight_g_idx: Tensor | None = None,
    *,
    bits: int = 4,
) -> PackedWeight:
    """compressed-tensors, format ``pack-quantized``, with one scale per group or per output feature.

    Args:
        weight_packed: int32 [N, ceil(K * bits / 32)].
        weight_scale: Floats [N, G].
        weight_shape: N and K.
        weight_zero_point: int32 [ceil(N * bits / 32), G], or int8 [N, G] before packing; None: symmetric.
        weight_g_idx: Integers [K]; None or -1 everywhere: consecutive groups.
        bits: 4 or 8.

    Raises:
        UsageError: shapes that do not fit, unequal groups, 8 bits with zero points.
    """
    _check_bits(bits)
    n, k = (int(size) for size in weight_shape)
    groups = _sizes(weight_scale)[1]
    _expect("weight_packed", weight_packed, (n, -(-k * bits // 32)), (torch.int32,))
    _expect("weight_scale", weight_scale, (n, groups))
    order = _order(weight_g_idx, k, groups)
    zeros = None
    if weight_zero_point is not None and weight_zero_point.dtype == torch.int8:
        _expect("weight_zero_point", weight_zero_point, (n, groups))
        zeros = (weight_zero_point.to(torch.int32) + (1 << (bits - 1))).T
    elif weight_zero_point is not None:
        _expect("weight_zero_point", weight_zero_point, (-(-n * bits // 32), groups), (torch.int32,))
        zeros = _unpack(weight_zero_point, bits, 0)[:n].T
    return _packed(_unpack(weight_packed, bits, 1)[:, :k], weight_scale.T, zeros, order, bits)


def to_compressed_tensors(packed: PackedWeight) -> dict[str, Tensor]:
    """Inverse of `from_compressed_tensors`; zero points and ``weight_g_idx`` only where there are any."""
    found: dict[str, Any] = {
        "weight_packed": _pack(packed.integers(), packed.bits, 1),
        "weight_scale": packed.scales.T.contiguous(),
        "weight_shape": torch.tensor([packed.scales.shape[1], packed.features]),
    }
    if packed.zeros is not None:
        found["weight_zero_point"] = _pack(packed.zeros.T, packed.bits, 0)
    if packed.permutation is not None:
        found["weight_g_idx"] = _group_index(packed)
    return found


def from_int_quantized(weight: Tensor, weight_scale: Tensor) -> PackedWeight:
    """compressed-tensors, format ``int-quantized``, 8 bits and symmetric.

    Args:
        weight: int8 [N, K].
        weight_scale: Floats [N, G].

    Raises:
        UsageError: shapes that do not fit.
    """
    n, k = _sizes(weight)
    _expect("weight", weight, (n, k), (torch.int8,))
    _expect("weight_scale", weight_scale, (n, _sizes(weight_scale)[1]))
    _order(None, k, weight_scale.shape[1])
    return PackedWeight(weight.contiguous(), weight_scale.T.contiguous(), None, None, 8, k)


def to_int_quantized(packed: PackedWeight) -> dict[str, Tensor]:
    """Inverse of `from_int_quantized`: ``weight`` and ``weight_scale``.

    Raises:
        UsageError: 4 bits, or reordered input features.
    """
    if packed.bits != 8 or packed.permutation is not None:
        raise _cannot("int-quantized", packed.bits, "it has 8 bits and consecutive groups only")
    return {"weight": packed.weight, "weight_scale": packed.scales.T.contiguous()}
