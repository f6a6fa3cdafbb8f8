"""Engines: how a program is run, one file per runtime; runtimes are imported when an engine is built or loaded."""

from fxcompress.engines import onnxruntime, openvino, tensorrt, torch, triton
from fxcompress.engines.base import Engine, Target, build_engine, engine_class, registered_targets, target

__all__ = [
    "Engine",
    "Target",
    "build_engine",
    "engine_class",
    "onnxruntime",
    "openvino",
    "registered_targets",
    "target",
    "tensorrt",
    "torch",
    "triton",
]
