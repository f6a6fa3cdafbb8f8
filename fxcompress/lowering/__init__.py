"""Lowering: a Program becomes one ONNX graph with FakeQuantize nodes, the source of every engine's file."""

from fxcompress.lowering.builder import DOMAIN, OPSET
from fxcompress.lowering.portable import PortableModel, lower, strip

__all__ = ["DOMAIN", "OPSET", "PortableModel", "lower", "strip"]
