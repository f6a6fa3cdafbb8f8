"""ONNX Runtime's products with packed weights and with activations quantized at run time.

Measured on a processor with AVX-512 VNNI, one thread, against a float32 product: packed 4-bit weights with float
activations are 2 to 3 times faster at one token and no faster from some 16 tokens on; with 8-bit activations per block
(accuracy level 4) 5 to 10 times at one token. 8-bit or 2-bit packed weights with float activations run a reference
kernel, up to 20 times slower than float32, so they are unpacked when the model is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxcompress.engines.ort_norms import rms_norms
from fxcompress.engines.packed import (
    Integers,
    Product,
    bias_of,
    find_products,
    finish,
    integers_of,
    pack,
    scaled_by_largest,
    stored,
    unpack,
)
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
    """Rewrite every product with a packed weight as the fastest form that computes what is simulated; LSTMs and RMSNorms, too."""
    rms_norms(r)
    integer_lstms(r)
    unpacked = []
    for p in list(find_products(r)):
        w = integers_of(p)
        if p.block == 0 and w.symmetric and w.groups == 1:
            _integer_product(r, p, w)
            continue
        block = _block(p, w)
        if block is None:
            unpack(r, p)
            unpacked.append(p.name)
        else:
            _matmul_nbits(r, p, w, block)
    if unpacked:
        names = ", ".join(dict.fromkeys(unpacked))
        r.notes.append(
            f"{names}: unpacked to float32 when the engine is loaded: small on disk, no faster than float32 "
            "(QuantizeDynamic() behind QuantizeWeights gives integer arithmetic)"
        )


def _block(p: Product, w: Integers) -> int | None:
    """Block size for MatMulNBits; None when it cannot compute this, or only slowly."""
    group = w.group if w.groups > 1 else 0
    if p.rank < 2:
        return None
    if p.block is None:
        fitting = [s for s in _SIZES if group % s == 0]
        if w.bits == 8 or not fitting:
            return None
        return fitting[0] if group else _ROW_BLOCK
    return p.block if p.block in _SIZES and group % p.block == 0 else None


def _matmul_nbits(r: Realizer, p: Product, w: Integers, block: int) -> None:
    dynamic = p.block is not None
    bits = 2 if w.bits == 2 and dynamic and 32 <= block <= 128 else max(w.bits, 4)
    key = ("matmul_nbits", id(p.quantizer), bits, block)
    if key not in r.memo:
        r.memo[key] = _operands(r, str(p.weight.name), w, bits, block)
    rows, features = w.values.shape
    bias, _ = bias_of(p)
    inputs = [p.x, *r.memo[key], *([None, bias] if bias is not None else [])]
    if len(r.memo[key]) == 2 and bias is not None:
        inputs.insert(3, None)
    sizes = {"K": features, "N": rows, "bits": bits, "block_size": block}
    level = _INT8 if dynamic else _FLOAT
    name = f"{p.name}/MatMulNBits"
    finish(
        r,
        p,
        r.emit(p.node, "MatMulNBits", *inputs, name=name, domain=_DOMAIN, accuracy_level=level, **sizes),
        has_bias=True,
    )


def _operands(r: Realizer, name: str, w: Integers, bits: int, block: int) -> list[ir.Value]:
    """Packed weight [rows, blocks, bytes], scales [rows * blocks] and, unless it is the middle, packed zero points."""
    rows, features = w.values.shape
    blocks = -(-features // block)
    shift = (1 << (bits - 1)) if w.signed else 0
    repeats = (block_index(w, features, block),)
    scale, zero = (t[:, repeats[0]] for t in (w.scale, w.zero_point + shift))
    values = (w.values + shift).to(torch.uint8)
    values = torch.nn.functional.pad(values, (0, blocks * block - features))
    operands = [
        r.initializer(f"{name}_packed", pack(values.reshape(rows, blocks, block), bits)),
        r.initializer(f"{name}_scale", scale.reshape(-1).contiguous()),
    ]
    if bool((zero != 1 << (bits - 1)).any()):
        operands.append(r.initializer(f"{name}_zero_point", pack(zero, bits).reshape(-1).contiguous()))
    return operands


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
