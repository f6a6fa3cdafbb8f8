"""Engines: how a program is run, one file per runtime; runtimes are imported when an engine is built or loaded."""

from fxcompress.engines import onnxruntime, openvino, torch
from fxcompress.engines.base import Engine, Target, engine_class, registered_targets, target

__all__ = ["Engine", "Target", "engine_class", "onnxruntime", "openvino", "registered_targets", "target", "torch"]
