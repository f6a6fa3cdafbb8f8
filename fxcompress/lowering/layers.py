"""Layers (``call_module`` nodes) and their functional twins as ONNX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxcompress.errors import EngineError
from fxcompress.layers import ACTIVATIONS, Fused, TransposedLinear
from fxcompress.lowering.builder import DOMAIN, Builder, Unsupported, dtype_of, lowers, lowers_module, rank_of
from fxcompress.lowering.elementwise import emit_activation
from fxcompress.quant.fake_quantize import DynamicFakeQuantize, FakeQuantize

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["emit_conv", "emit_linear", "quantized", "repeat"]

_aten = torch.ops.aten


# ------------------------------------------------------------------------------------------------ fake quantizers
@lowers_module(FakeQuantize)
def _fake_quantize(b: Builder, node: Node, module: FakeQuantize) -> Any:
    return quantized(b, b.value(node.args[0]), module, str(node.target))


@lowers_module(DynamicFakeQuantize)
def _dynamic_fake_quantize(b: Builder, node: Node, module: DynamicFakeQuantize) -> Any:
    grid = {"qmin": module.spec.qmin, "qmax": module.spec.qmax, "block": module.block or 0}
    value = b.op("DynamicFakeQuantize", b.value(node.args[0]), domain=DOMAIN, **grid)
    producer = value.producer()
    assert producer is not None
    producer.name = str(node.target)
    return value


def quantized(b: Builder, x: ir.Value, module: nn.Module, path: str) -> ir.Value:
    """``x`` through a frozen FakeQuantize; the same value through the same module is emitted once."""
    if not isinstance(module, FakeQuantize):
        raise Unsupported(f"{path} is a {type(module).__name__}, not a FakeQuantize")
    if module.observer is not None:
        raise EngineError(2, "a fake-quantizer still observes", where=path, fix="freeze the observers before building")
    key = ("fake_quantize", id(module), id(x))
    if key not in b.memo:
        spec = module.spec
        scale, zero_point = (
            b.parameter(f"{path}.scale", module.scale),
            b.parameter(f"{path}.zero_point", module.zero_point),
        )
        axis = -1 if spec.axis is None else spec.axis
        grid: dict[str, Any] = {"axis": axis, "qmin": spec.qmin, "qmax": spec.qmax, "group_size": spec.group_size}
        value = b.op("FakeQuantize", x, scale, zero_point, domain=DOMAIN, **grid)
        count = b.memo[path] = b.memo.get(path, -1) + 1
        producer = value.producer()
        assert producer is not None
        producer.name = f"{path}_{count}" if count else path
        b.memo[key] = value
    return cast("ir.Value", b.memo[key])


def _weight(b: Builder, node: Node, layer: nn.Module) -> ir.Value:
    path = str(node.target)
    weight = b.parameter(f"{path}.weight", cast(Tensor, layer.weight))
    quantizer = getattr(layer, "weight_fake_quantize", None)
    if quantizer is None:
        return weight
    key = ("weight", id(layer))
    if key not in b.memo:
        b.memo[key] = quantized(b, weight, quantizer, f"{path}.weight_fake_quantize")
    return cast("ir.Value", b.memo[key])


def _bias(b: Builder, node: Node, layer: nn.Module) -> ir.Value | None:
    bias = getattr(layer, "bias", None)
    return None if bias is None else b.parameter(f"{node.target}.bias", bias)


def _epilogue(b: Builder, node: Node, layer: nn.Module, y: ir.Value) -> ir.Value:
    """What a fused layer does behind its product: residual, then activation."""
    if len(node.args) > 1 and node.args[1] is not None:
        y = b.op("Add", y, b.value(node.args[1]))
    if isinstance(layer, Fused) and layer.activation is not None:
        a = layer.activation
        y = emit_activation(b, ACTIVATIONS[a.name], y, a.args, dict(a.kwargs), dtype_of(node))
    return y


# ------------------------------------------------------------------------------------------------ products
@lowers_module(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def _conv_layer(b: Builder, node: Node, layer: Any) -> Any:
    if layer.padding_mode != "zeros":
        raise Unsupported(f"padding mode {layer.padding_mode!r} inside a layer")
    weight, bias = _weight(b, node, layer), _bias(b, node, layer)
    pads = _pads(layer.padding, layer.kernel_size, layer.dilation)
    geometry = (layer.kernel_size, layer.stride, pads, layer.dilation, layer.groups)
    return _epilogue(b, node, layer, emit_conv(b, b.value(node.args[0]), weight, bias, *geometry))


@lowers(_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default, _aten.conv1d.padding, _aten.conv2d.padding)
def _conv_function(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    kernel = _static_shape(a["weight"])[2:]
    dims = len(kernel)
    dilation = repeat(a["dilation"], dims)
    pads = _pads(a["padding"] if isinstance(a["padding"], str) else repeat(a["padding"], dims), kernel, dilation)
    bias = None if a["bias"] is None else b.value(a["bias"])
    x, weight = b.value(a["input"]), b.value(a["weight"])
    return emit_conv(b, x, weight, bias, kernel, repeat(a["stride"], dims), pads, dilation, a["groups"])


def emit_conv(
    b: Builder, x: Any, weight: Any, bias: Any, kernel: Any, stride: Any, pads: Any, dilation: Any, groups: int
) -> Any:
    """Conv with explicit begin and end padding."""
    inputs = (x, weight) if bias is None else (x, weight, bias)
    sizes: dict[str, Any] = {
        "kernel_shape": list(kernel),
        "strides": list(stride),
        "pads": list(pads),
        "dilations": list(dilation),
    }
    return b.op("Conv", *inputs, group=groups, **sizes)


def _pads(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """ONNX pads (all begins, then all ends); ``"same"`` puts the odd element at the end, as torch does."""
    if padding == "valid":
        return [0] * (2 * len(kernel))
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [t // 2 for t in totals] + [t - t // 2 for t in totals]
    return [*padding, *padding]


def repeat(value: Any, dims: int) -> list[int]:
    """One number, or one per dimension, as one per dimension."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * dims if len(values) == 1 else values


def _static_shape(node: Any) -> list[int]:
    shape = list(node.meta["val"].shape)
    if not all(isinstance(s, int) for s in shape):
        raise Unsupported("a weight whose shape is not fixed")
    return shape


@lowers_module(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def _conv_transpose(b: Builder, node: Node, layer: Any) -> Any:
    weight, bias = _weight(b, node, layer), _bias(b, node, layer)
    inputs = [b.value(node.args[0]), weight] + ([] if bias is None else [bias])
    y = b.op(
        "ConvTranspose",
        *inputs,
        kernel_shape=list(layer.kernel_size),
        strides=list(layer.stride),
        pads=[*layer.padding, *layer.padding],
        dilations=list(layer.dilation),
        output_padding=list(layer.output_padding),
        group=layer.groups,
    )
    return _epilogue(b, node, layer, y)


@lowers_module(nn.Linear)
def _linear_layer(b: Builder, node: Node, layer: nn.Linear) -> Any:
    x = node.args[0]
    y = emit_linear(b, b.value(x), rank_of(cast(Node, x)), _weight(b, node, layer), _bias(b, node, layer))
    return _epilogue(b, node, layer, y)


@lowers_module(TransposedLinear)
def _transposed_linear(b: Builder, node: Node, layer: TransposedLinear) -> Any:
    bias = _bias(b, node, layer)
    y = b.op("MatMul", b.value(node.args[0]), _weight(b, node, layer))
    return _epilogue(b, node, layer, y if bias is None else b.op("Add", y, bias))


@lowers(_aten.linear.default)
def _linear_function(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    bias = None if a["bias"] is None else b.value(a["bias"])
    if rank_of(a["weight"]) != 2:
        raise Unsupported("a linear weight that is not a matrix")
    return emit_linear(b, b.value(a["input"]), rank_of(a["input"]), b.value(a["weight"]), bias)


def emit_linear(b: Builder, x: Any, rank: int, weight: Any, bias: Any) -> Any:
    """``x @ weight.T + bias``: Gemm for matrices, MatMul and Add for everything else."""
    if rank == 2:
        return b.op("Gemm", *((x, weight) if bias is None else (x, weight, bias)), transB=1)
    key = ("transposed", id(weight))
    if key not in b.memo:
        b.memo[key] = b.op("Transpose", weight, perm=[1, 0])
    y = b.op("MatMul", x, b.memo[key])
    return y if bias is None else b.op("Add", y, bias)


@lowers(_aten.matmul.default, _aten.mm.default, _aten.bmm.default)
def _matmul(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    first, second = (a[k] for k in ("self", "mat2" if "mat2" in a else "other"))
    return b.op("MatMul", b.value(first), b.value(second))


@lowers(_aten.addmm.default, _aten.baddbmm.default)
def _addmm(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    first, second = (a["mat1"], a["mat2"]) if "mat1" in a else (a["batch1"], a["batch2"])
    y, c = b.op("MatMul", b.value(first), b.value(second)), b.value(a["self"])
    dtype = dtype_of(node)
    y = y if a["alpha"] == 1 else b.op("Mul", y, b.scalar(b.static(a["alpha"]), dtype))
    if a["beta"] == 0:
        return y
    return b.op("Add", c if a["beta"] == 1 else b.op("Mul", c, b.scalar(b.static(a["beta"]), dtype)), y)


@lowers(_aten.einsum.default)
def _einsum(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    return b.op("Einsum", *(b.value(t) for t in a["tensors"]), equation=a["equation"].replace(" ", ""))


# ------------------------------------------------------------------------------------------------ tables
@lowers_module(nn.Embedding)
def _embedding_layer(b: Builder, node: Node, layer: nn.Embedding) -> Any:
    table = b.parameter(f"{node.target}.weight", layer.weight)
    quantizer = layer._modules.get("weight_fake_quantize")
    if quantizer is not None:
        table = quantized(b, table, quantizer, f"{node.target}.weight_fake_quantize")
    return b.op("Gather", table, b.value(node.args[0]), axis=0)


@lowers(_aten.embedding.default)
def _embedding_function(b: Builder, node: Node, a: dict[str, Any]) -> Any:
    return b.op("Gather", b.value(a["weight"]), b.value(a["indices"]), axis=0)


@lowers_module(
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout
)  # fmt: skip
def _dropout(b: Builder, node: Node, layer: nn.Module) -> Any:
    return b.value(node.args[0])
