"""The layers of a built engine, read from the builder's log: what runs on integers, and what only moves data.

The engine inspector needs a GPU; with detailed profiling verbosity the builder writes the same list at the end of its log.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fxcompress.errors import EngineError

__all__ = ["EngineLayer", "LayerReport", "parse_layers", "report_layers"]

_START = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<kind>[^,]*), ", re.MULTILINE)
_TYPE = re.compile(r"Datatype: (\w+)")
#: TensorRT's older lists name type and layout in one text.
_OLD_FORMAT = re.compile(r"Format/Datatype: ([^}\]]*)")
_OLD_TYPES = {"Int8": "Int8", "INT8": "Int8", "Int4": "Int4", "INT4": "Int4", "FP16": "Half", "Half": "Half",
              "BF16": "BFloat16", "FP32": "Float", "Float": "Float"}  # fmt: skip
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_WEIGHTS = re.compile(r"Weights: \{\s*\"?Type\"?: \"?(\w+)")
#: Steps of a generated kernel that only move values or change their type.
_MOVES = frozenset({"Tran", "Move", "Resh", "Copy", "Cast"})
#: Nodes of the file that a change of type may carry the name of.
_CONVERSIONS = ("QuantizeLinear", "DequantizeLinear", "Cast")
_NO_KERNEL = ("shape_call", "Constant", "NoOp", "constant")


@dataclass(frozen=True)
class EngineLayer:
    """One layer of an engine.

    Attributes:
        name: As the builder calls it.
        kind: ``correlation``, ``gemm``, ``kgen``, ``CaskConvolution``, ``Reformat`` ...
        inputs: Types of its inputs.
        constants: Types of its weights and other constants.
        outputs: Types of its outputs.
        nodes: Names of the ONNX nodes it runs.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[str, ...]

    @property
    def moves(self) -> bool:
        """True when the builder put it in to change layout or type; the model's own transpositions are not meant."""
        if self.kind.lower() == "reformat":
            return True
        if any(not node.rpartition("/")[2].startswith(_CONVERSIONS) for node in self.nodes):
            return False
        steps = re.findall(r"[A-Z][a-z0-9]*", self.name.removeprefix("__myl_").split("_myl")[0])
        return self.kind == "kgen" and bool(steps) and set(steps) <= _MOVES

    def __str__(self) -> str:
        types = f"{' '.join(self.inputs) or '-'} | {' '.join(self.constants) or '-'} -> {' '.join(self.outputs) or '-'}"
        return f"{self.kind:14} {types:40} {' '.join(self.nodes) or self.name}"


def parse_layers(messages: Iterable[tuple[str, str]]) -> list[EngineLayer]:
    """The layer list in a builder's messages, in execution order.

    Raises:
        EngineError: there is none (a version whose log is not known).
    """
    text = next((m for _, m in messages if m.startswith("Layers:")), "")
    text = re.split(r"\n\n(?:I/O Tensors|Bindings|Engine Metadata)", text)[0]
    starts = list(_START.finditer(text))
    if not starts:
        fix = "use the versions in constraints.txt"
        raise EngineError(603, "the builder wrote no layer list", why="its log is of an unknown form", fix=fix)
    ends = [s.start() for s in starts[1:]] + [len(text)]
    return [_layer(s, text[s.end() : end]) for s, end in zip(starts, ends, strict=True)]


def _layer(start: re.Match[str], text: str) -> EngineLayer:
    inputs, constants, outputs = (_types(_section(text, name)) for name in ("Inputs", "Constants", "Outputs"))
    constants += tuple(_OLD_TYPES.get(t, t) for t in _WEIGHTS.findall(text))
    nodes = tuple(dict.fromkeys(_NODE.findall(text.partition("Metadata: ")[2])))
    return EngineLayer(start["name"], start["kind"].strip(), inputs, constants, outputs, nodes)


def _section(text: str, name: str) -> str:
    """Text of a list such as ``Inputs: [ { ... }, { ... }]``; brackets inside it are balanced."""
    begin = text.find(f"{name}: [")
    if begin < 0:
        return ""
    depth, at = 0, begin + len(name) + 2
    for place in range(at, len(text)):
        depth += {"[": 1, "]": -1}.get(text[place], 0)
        if depth == 0:
            return text[at : place + 1]
    return text[at:]


def _types(section: str) -> tuple[str, ...]:
    found = _TYPE.findall(section) if "Format/Datatype" not in section else []
    if found:
        return tuple(found)
    return tuple(_old_type(text) for text in _OLD_FORMAT.findall(section))


def _old_type(text: str) -> str:
    return next((kind for word, kind in _OLD_TYPES.items() if word in text.split()), text.strip())


# ------------------------------------------------------------------------------------------------ what was asked for
@dataclass(frozen=True)
class LayerReport:
    """How an engine runs what was quantized.

    Attributes:
        layers: Path of each quantized layer -> ``int8``, ``int8 weights``, ``int4 weights``, or ``float``.
        adds: Name of each residual add between quantized convolutions -> ``int8``: one kernel reads the residual as
            integers, adds and writes integers; ``fused``: one kernel also quantizes the residual, which never leaves
            it; or ``float``.
        reformats: Layers that the builder put in to change layout or type, everywhere in the engine.
        stray: Those of them that read and write integers: between two quantized layers.
        count: Layers of the engine.
    """

    layers: dict[str, str]
    adds: dict[str, str]
    reformats: int
    stray: list[str]
    count: int

    def floats(self) -> list[str]:
        """Quantized layers and adds that the engine runs in floating point."""
        return [name for found in (self.layers, self.adds) for name, how in found.items() if how == "float"]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "layers": self.layers,
            "adds": self.adds,
            "reformats": self.reformats,
            "stray": self.stray,
            "count": self.count,
        }

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> LayerReport:
        """Inverse of ``to_dict``."""
        return cls(dict(d["layers"]), dict(d["adds"]), int(d["reformats"]), list(d["stray"]), int(d["count"]))

    def __str__(self) -> str:
        kinds = list(self.layers.values())
        counts = [f"{kinds.count(k)} {k}" for k in ("int8", "int8 weights", "int4 weights", "float") if k in kinds]
        joined = len(self.adds) - list(self.adds.values()).count("float")
        adds = f", {joined} of {len(self.adds)} residual adds in int8" if self.adds else ""
        what = f"{len(kinds)} quantized layers: {', '.join(counts)}" if kinds else "no quantized layer"
        return f"{what}{adds}; {self.reformats} reformats, {len(self.stray)} between quantized layers"


def report_layers(
    layers: Sequence[EngineLayer], products: Mapping[str, Mapping[str, str]], adds: Mapping[str, str]
) -> LayerReport:
    """Look up quantized nodes in an engine.

    Args:
        layers: Of the engine.
        products: Of `tensorrt_onnx.ExplicitModel`.
        adds: Of `tensorrt_onnx.ExplicitModel`.
    """
    running: dict[str, list[EngineLayer]] = {}
    for layer in layers:
        for node in layer.nodes:
            running.setdefault(node, []).append(layer)
    found: dict[str, str] = {}
    for node, wanted in products.items():
        how = _how(running.get(node, []), wanted)
        found[wanted["layer"]] = how if found.get(wanted["layer"], how) == how else "float"
    joined = {name: _how_added(running.get(name, []), quantizer) for name, quantizer in adds.items()}
    real = [x for x in layers if x.kind not in _NO_KERNEL]
    moves = [x for x in real if x.moves]
    stray = [x.name for x in moves if {*x.inputs, *x.outputs} == {"Int8"}]
    return LayerReport(found, joined, len(moves), stray, len(real))


def _how(layers: Sequence[EngineLayer], wanted: Mapping[str, str]) -> str:
    weight, x = wanted["weight"], wanted["input"]
    fitting = [la for la in layers if weight in la.constants and (not x or x in la.inputs)]
    if not fitting:
        return "float"
    return "int8" if x else f"{weight.lower()} weights"


def _how_added(layers: Sequence[EngineLayer], quantizer: str) -> str:
    found = [layer for layer in layers if "Int8" in layer.outputs]
    if any("Int8" in layer.inputs for layer in found):
        return "int8"
    return "fused" if any(quantizer in layer.nodes for layer in found) else "float"
