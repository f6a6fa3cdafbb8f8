"""ONNX Runtime's products with packed weights and with activations quantized at run time.

Measured on a processor with AVX-512 VNNI, one thread, against a float32 product: packed 4-bit weights with float
activations are 2 to 3 times faster at one token and no faster from some 16 tokens on; with 8-bit activations per block
(accuracy level 4) 5 to 10 times at one token. 8-bit or 2-bit packed weights with float activations run a reference
kernel, up to 20 times slower than float32, so they are unpacked when the model is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxcompress.engines.ort_attention import products_in_parts
from fxcompress.engines.ort_norms import rms_norms
from fxcompress.engines.ort_rotary import rotary_embeddings
from fxcompress.engines.packed import (
    Integers,
    Product,
    bias_of,
    find_products,
    finish,
    integers_of,
    pack,
    readers,
    scaled_by_largest,
    stored,
    unpack,
)
from fxcompress.engines.quantized import as_torch
from fxcompress.engines.stored_tables import integer_lstms

if TYPE_CHECKING:
    import onnx_ir as ir

    from fxcompress.engines.quantized import Realizer

__all__ = ["packed_products"]

_DOMAIN = "com.microsoft"
_FLOAT, _INT8 = 0, 4  # accuracy levels: what the product computes in
_SIZES = (256, 128, 64, 32, 16)
#: Of a row that is one group; larger blocks make the file smaller.
_ROW_BLOCK = 128


def packed_products(r: Realizer) -> None:
    """Rewrite every product with a packed weight as the fastest form that computes what is simulated.

    LSTMs, RMSNorms and rotary embeddings become one operator each, too, and a cache is read without copying it.
    """
    rms_norms(r)
    rotary_embeddings(r)
    products_in_parts(r)
    integer_lstms(r)
    unpacked = []
    for p in find_products(r):
        w = integers_of(p)
        if p.block == 0 and w.symmetric and w.groups == 1:
            _integer_product(r, p, w)
            continue
        form = _form(p, w)
        if form is None:
            unpack(r, p)
            unpacked.append(p.name)
        else:
            _matmul_nbits(r, [(p, w), *_beside(r, p, form)], form)
    if unpacked:
        names = ", ".join(dict.fromkeys(unpacked))
        r.notes.append(
            f"{names}: unpacked to float32 when the engine is loaded: small on disk, no faster than float32 "
            "(QuantizeDynamic() behind QuantizeWeights gives integer arithmetic)"
        )


@dataclass(frozen=True)
class _Form:
    """Attributes of a MatMulNBits."""

    bits: int
    block_size: int
    accuracy_level: int


def _form(p: Product, w: Integers) -> _Form | None:
    """The MatMulNBits for a product; None when there is none for it, or only a slow one."""
    block = _block(p, w)
    if block is None:
        return None
    dynamic = p.block is not None
    bits = 2 if w.bits == 2 and dynamic and 32 <= block <= 128 else max(w.bits, 4)
    return _Form(bits, block, _INT8 if dynamic else _FLOAT)


def _block(p: Product, w: Integers) -> int | None:
    group = w.group if w.groups > 1 else 0
    if p.rank < 2:
        return None
    if p.block is None:
        fitting = [s for s in _SIZES if group % s == 0]
        if w.bits == 8 or not fitting:
            return None
        return fitting[0] if group else _ROW_BLOCK
    return p.block if p.block in _SIZES and group % p.block == 0 else None


def _beside(r: Realizer, p: Product, form: _Form) -> list[tuple[Product, Integers]]:
    """Other products of the same input in the same form, as of queries, keys and values: one call does them all."""
    if not _alone(p):
        return []
    others = [(q, integers_of(q)) for q in readers(r, p.x) if q.node is not p.node and _alone(q)]
    return [(q, w) for q, w in others if q.block == p.block and _form(q, w) == form]


def _alone(p: Product) -> bool:
    """The weight is that of one product only; others are stored once."""
    return len(p.quantizer.outputs[0].uses()) == 1 and len(p.weight.uses()) == 1


def _matmul_nbits(r: Realizer, parts: list[tuple[Product, Integers]], form: _Form) -> None:
    """One MatMulNBits for some products of the same input, and a Split behind it if they are several."""
    key = ("matmul_nbits", form, *(id(p.quantizer) for p, _ in parts))
    if key not in r.memo:
        r.memo[key] = _operands(r, str(parts[0][0].weight.name), [w for _, w in parts], form)
    rows = [int(w.values.shape[0]) for _, w in parts]
    operands, bias, p = r.memo[key], _bias(r, [q for q, _ in parts], rows), parts[0][0]
    inputs = [p.x, *operands] if bias is None else [p.x, *operands, *[None] * (4 - len(operands)), bias]
    sizes = {"K": int(parts[0][1].values.shape[1]), "N": sum(rows), "bits": form.bits, "block_size": form.block_size}
    name = f"{p.name}/MatMulNBits"
    level = {"accuracy_level": form.accuracy_level}
    product = r.emit(p.node, "MatMulNBits", *inputs, name=name, domain=_DOMAIN, **level, **sizes)
    pieces = [product]
    if len(parts) > 1:
        pieces = r.split(p.node, product, r.shape_constant(rows), len(rows), name=f"{p.name}/Split")
    for (q, _), piece in zip(parts, pieces, strict=True):
        finish(r, q, piece, has_bias=True)


def _bias(r: Realizer, parts: list[Product], rows: list[int]) -> ir.Value | None:
    """The biases behind each other; zeros for a product without one."""
    values = [bias_of(p)[0] for p in parts]
    if len(parts) == 1 or not any(values):
        return values[0]
    tensors = [torch.zeros(n) if v is None else as_torch(v).float() for v, n in zip(values, rows, strict=True)]
    return r.initializer(f"{parts[0].name}.bias_of_all", torch.cat(tensors))


def _operands(r: Realizer, name: str, weights: list[Integers], form: _Form) -> list[ir.Value]:
    """Packed weight [rows, blocks, bytes], scales [rows * blocks] and, unless it is the middle, packed zero points."""
    packed, scales, zeros = zip(*(_packed(w, form) for w in weights), strict=True)
    operands = [
        r.initializer(f"{name}_packed", torch.cat(packed)),
        r.initializer(f"{name}_scale", torch.cat(scales).reshape(-1)),
    ]
    zero = torch.cat(zeros)
    if bool((zero != 1 << (form.bits - 1)).any()):
        operands.append(r.initializer(f"{name}_zero_point", pack(zero, form.bits).reshape(-1).contiguous()))
    return operands


def _packed(w: Integers, form: _Form) -> tuple[Tensor, Tensor, Tensor]:
    """Packed integers, scales and zero points [rows, blocks] of a weight."""
    (rows, features), block = w.values.shape, form.block_size
    blocks = -(-features // block)
    shift = (1 << (form.bits - 1)) if w.signed else 0
    groups = block_index(w, features, block)
    values = torch.nn.functional.pad((w.values + shift).to(torch.uint8), (0, blocks * block - features))
    return pack(values.reshape(rows, blocks, block), form.bits), w.scale[:, groups], (w.zero_point + shift)[:, groups]


def block_index(w: Integers, features: int, block: int) -> Tensor:
    """Group of every block."""
    return torch.arange(0, features, block) // w.group


def _integer_product(r: Realizer, p: Product, w: Integers) -> None:
    """8-bit integers times 8-bit integers; scales of tokens behind it."""
    assert p.dynamic is not None
    key = ("tokens", id(p.dynamic))
    if key not in r.memo:
        r.memo[key] = _quantized_tokens(r, p.dynamic, p.x)
    x, token_scale = r.memo[key]
    weight_key = ("columns of integers", id(p.quantizer))
    if weight_key not in r.memo:
        name = f"{p.weight.name}_quantized"
        columns = stored(r, name, w.values.t().contiguous(), True, max(w.bits, 4))
        if w.bits < 8:
            columns = r.emit(p.quantizer, "Cast", columns, name=f"{name}/Cast", to=3)
        r.memo[weight_key] = columns, r.initializer(f"{p.weight.name}_scale", w.scale.reshape(-1).contiguous())
    columns, scale = r.memo[weight_key]
    one, middle = r.constant(torch.tensor(1.0)), r.constant(torch.tensor(128, dtype=torch.uint8))
    inputs = (x, columns, one, scale, middle)
    y = r.emit(p.node, "MatMulIntegerToFloat", *inputs, name=f"{p.name}/MatMulIntegerToFloat", domain=_DOMAIN)
    finish(r, p, r.emit(p.node, "Mul", y, token_scale, name=f"{p.name}/Mul"), has_bias=False)


def _quantized_tokens(r: Realizer, node: ir.Node, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """uint8 around 128 (products of two signed bytes run a reference kernel), and the scale of every token."""
    scaled, scale = scaled_by_largest(r, node, x, node.attributes["qmax"].as_int())
    one, middle = r.constant(torch.tensor(1.0)), r.constant(torch.tensor(128, dtype=torch.uint8))
    return r.emit(node, "QuantizeLinear", scaled, one, middle, name=f"{node.name}/QuantizeLinear"), scale
