"""Quantizers as single operators while torch's ONNX exporter traces a program, so that it does not take them apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fxcompress.errors import MissingRuntimeError
from fxcompress.ir import clone_tree
from fxcompress.lowering.builder import DOMAIN
from fxcompress.quant.fake_quantize import DynamicFakeQuantize, FakeQuantize, grouped, ungrouped
from fxcompress.quant.spec import QuantSpec

__all__ = ["exportable", "translations"]


@torch.library.custom_op("fxcompress::grouped_fake_quantize", mutates_args=())
def grouped_fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, group_size: int, qmin: int, qmax: int
) -> Tensor:
    """``fxcompress::fake_quantize`` of a matrix with one scale per group; see `FakeQuantize`."""
    spec = QuantSpec(16, qmin < 0, False, axis, qmin, qmax, group_size)
    rows = torch.ops.fxcompress.fake_quantize(grouped(x, spec), scale.flatten(), zero_point.flatten(), 0, qmin, qmax)
    return ungrouped(rows, x, spec).clone()


@grouped_fake_quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, group_size: int, qmin: int, qmax: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("fxcompress::dynamic_fake_quantize", mutates_args=())
def dynamic_fake_quantize(x: Tensor, qmin: int, qmax: int, block: int) -> Tensor:
    """`DynamicFakeQuantize`; a ``block`` of 0 is the whole token."""
    return DynamicFakeQuantize(QuantSpec(8, True, True, None, qmin, qmax), block or None)(x).clone()  # type: ignore[no-any-return]


@dynamic_fake_quantize.register_fake
def _(x: Tensor, qmin: int, qmax: int, block: int) -> Tensor:
    return torch.empty_like(x)


class _Grouped(nn.Module):
    scale: Tensor
    zero_point: Tensor

    def __init__(self, original: FakeQuantize) -> None:
        super().__init__()
        self.spec = original.spec
        self.register_buffer("scale", original.scale)
        self.register_buffer("zero_point", original.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        s = self.spec
        numbers = (cast(int, s.axis), cast(int, s.group_size), s.qmin, s.qmax)
        return cast(Tensor, grouped_fake_quantize(x, self.scale, self.zero_point, *numbers))


class _Dynamic(nn.Module):
    def __init__(self, original: DynamicFakeQuantize) -> None:
        super().__init__()
        self.spec, self.block = original.spec, original.block

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, dynamic_fake_quantize(x, self.spec.qmin, self.spec.qmax, self.block or 0))


def exportable(root: nn.Module) -> nn.Module:
    """A copy of the module tree, tensors shared, whose quantizers call one operator each."""
    new = clone_tree(root)
    for module in list(new.modules()):
        for name, child in module._modules.items():
            if isinstance(child, FakeQuantize) and child.spec.group_size is not None:
                module._modules[name] = _Grouped(child)
            elif isinstance(child, DynamicFakeQuantize):
                module._modules[name] = _Dynamic(child)
    return new


# ------------------------------------------------------------------------------------------------ as ONNX
@dataclass(frozen=True)
class _Schema:
    name: str
    inputs: tuple[str, ...]
    attributes: tuple[str, ...]


def translations() -> dict[Any, Any]:
    """The exporter's translations of all quantizer operators.

    Raises:
        MissingRuntimeError: onnxscript is not installed.
    """
    values = ("x", "scale", "zero_point")
    static = _operator(_Schema("FakeQuantize", values, ("axis", "qmin", "qmax")))
    in_groups = _operator(_Schema("FakeQuantize", values, ("axis", "qmin", "qmax", "group_size")))
    dynamic = _operator(_Schema("DynamicFakeQuantize", ("x",), ("qmin", "qmax", "block")))

    def fake_quantize(x: Any, scale: Any, zero_point: Any, axis: int, qmin: int, qmax: int) -> Any:
        return static(x, scale, zero_point, axis=axis, qmin=qmin, qmax=qmax)

    def by_groups(x: Any, scale: Any, zero_point: Any, axis: int, group_size: int, qmin: int, qmax: int) -> Any:
        return in_groups(x, scale, zero_point, axis=axis, qmin=qmin, qmax=qmax, group_size=group_size)

    def by_tokens(x: Any, qmin: int, qmax: int, block: int) -> Any:
        return dynamic(x, qmin=qmin, qmax=qmax, block=block)

    ops = torch.ops.fxcompress
    return {
        ops.fake_quantize.default: fake_quantize,
        ops.grouped_fake_quantize.default: by_groups,
        ops.dynamic_fake_quantize.default: by_tokens,
    }


def _operator(given: _Schema) -> Any:
    """A quantizer of the domain ``fxcompress`` as onnxscript calls it."""
    try:
        import onnx
        from onnxscript.values import Op, Opset
    except ImportError as error:
        line = 'pip install "fxcompress[onnxruntime]" or "fxcompress[openvino]"'
        raise MissingRuntimeError(3, "onnxscript is not installed", why=str(error), fix=line) from error
    defs = onnx.defs.OpSchema
    kinds = {"x": "T", "scale": "tensor(float)", "zero_point": "tensor(int32)"}
    floats = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
    schema = defs(
        given.name,
        DOMAIN,
        1,
        inputs=[defs.FormalParameter(n, kinds[n]) for n in given.inputs],
        outputs=[defs.FormalParameter("y", "T")],
        type_constraints=[("T", floats, "")],
        attributes=[defs.Attribute(n, defs.AttrType.INT) for n in given.attributes],
    )
    return Op(Opset(DOMAIN, 1), given.name, schema)
