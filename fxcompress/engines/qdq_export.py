"""A program as one ONNX file of standard operators, quantized with QuantizeLinear and DequantizeLinear only (opset 21).

This is what runtimes read that have kernels of their own for quantized weights, TensorRT for one: INT4 weights in blocks
are ``DequantizeLinear`` with ``block_size`` (ONNX operator set 21).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxcompress.engines.onnxruntime import EXTERNAL_FROM, quantize_dequantize
from fxcompress.engines.packed import Integers, Product, find_products, integers_of, stored
from fxcompress.engines.quantized import Realizer
from fxcompress.errors import EngineError, MissingRuntimeError
from fxcompress.ir import Program
from fxcompress.lowering import PortableModel, lower, widened

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["export_onnx"]


def export_onnx(model: Program | PortableModel, path: str | Path) -> Path:
    """Write a program as ONNX, for a runtime of your choice.

    Weights are int4, uint4, int8 or uint8 behind ``DequantizeLinear``, in blocks where they have groups; 2 and 3 bits are
    stored in 4. Statically quantized activations are QuantizeLinear and DequantizeLinear, those quantized at run time
    plain arithmetic. The file has the program's own inputs and outputs, and is in float32 around the quantizers.

    Args:
        model: The program.
        path: Name of the file, ending in ``.onnx``. Weights of more than 1.5 GB go to ``<name>.data`` beside it.

    Returns:
        ``path``.

    Raises:
        EngineError: the path has another ending, or the program has no ONNX form.
        MissingRuntimeError: ``onnx_ir`` is not installed.
    """
    path = Path(path)
    if path.suffix != ".onnx":
        raise EngineError(65, f"{path.name} is no name of an ONNX file", fix="end it in .onnx")
    try:
        import onnx_ir
    except ImportError as error:
        line = 'pip install "fxcompress[onnxruntime]"'
        raise MissingRuntimeError(5, "onnx_ir is not installed", why=str(error), fix=line) from error
    portable = widened(model if isinstance(model, PortableModel) else lower(model))
    ready = Realizer(portable, quantize_dequantize, packed=_dequantize_products).run()
    held = (v.const_value for v in ready.model.graph.initializers.values())
    large = sum(int(t.nbytes) for t in held if t is not None) >= EXTERNAL_FROM
    extra: dict[str, Any] = {"external_data": f"{path.name}.data"} if large else {}
    onnx_ir.save(ready.model, path, **extra)
    return path


def _dequantize_products(r: Realizer) -> None:
    for p in list(find_products(r)):
        key = ("blocks", id(p.quantizer), _by_rows(p))
        if key not in r.memo:
            r.memo[key] = _dequantized(r, p, integers_of(p))
        p.node.replace_input_with(1, r.memo[key])


def _by_rows(p: Product) -> bool:
    """True when the product reads its weight as [rows, features]."""
    return p.node.op_type == "Gemm" and "transB" in p.node.attributes and p.node.attributes["transB"].as_int() == 1


def _dequantized(r: Realizer, p: Product, w: Integers) -> ir.Value:
    """DequantizeLinear of the integers in the order in which the product reads them."""
    name, by_rows = str(p.weight.name), _by_rows(p)
    values, scale, zero = (t if by_rows else t.t().contiguous() for t in (w.values, w.scale, w.zero_point))
    per_row: dict[str, Any] = {"axis": 0 if by_rows else 1}
    blocks: dict[str, Any] = {"axis": 1 if by_rows else 0, "block_size": w.group}
    if w.groups == 1:
        scale, zero = scale.reshape(-1), zero.reshape(-1)
    inputs = [
        stored(r, f"{name}_quantized", values, w.signed, max(w.bits, 4)),
        r.initializer(f"{name}_scale", scale.contiguous()),
    ]
    if not w.symmetric:
        inputs.append(stored(r, f"{name}_zero_point", zero, w.signed, max(w.bits, 4)))
    attributes = per_row if w.groups == 1 else blocks
    return r.emit(p.quantizer, "DequantizeLinear", *inputs, name=f"{name}/DequantizeLinear", **attributes)
