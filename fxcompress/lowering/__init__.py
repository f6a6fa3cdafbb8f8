"""Lowering: a Program becomes one ONNX graph with FakeQuantize nodes, the source of every engine's file."""

from fxcompress.lowering.builder import DOMAIN, OPSET
from fxcompress.lowering.portable import PortableModel, lower, strip
from fxcompress.lowering.widen import HALF, widened

__all__ = ["DOMAIN", "HALF", "OPSET", "PortableModel", "lower", "strip", "widened"]
