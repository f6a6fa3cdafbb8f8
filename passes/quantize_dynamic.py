"""QuantizeDynamic: weights to integers ahead of time, activations to 8 bits at run time."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

from torch import nn
from torch.fx import Node

from fxcompress.errors import PassError, UsageError
from fxcompress.ir import Program
from fxcompress.passbase import Context, Pass, Result
from fxcompress.quant.fake_quantize import QUANTIZERS, DynamicFakeQuantize
from fxcompress.quant.insertion import add_quantizer
from fxcompress.quant.layer_weights import (
    as_globs,
    asked_for,
    check_weight,
    finite_weight,
    linear_layers,
    quantize_weight,
    weight_quantizer,
)
from fxcompress.quant.leftovers import left_float, unused_globs
from fxcompress.quant.placement import layer_name
from fxcompress.quant.scheme import QuantScheme
from fxcompress.quant.sequence_layers import quantized_layer
from fxcompress.quant.spec import QuantSpec
from fxcompress.rewrite import put_layer

__all__ = ["QuantizeDynamic"]


@dataclass(frozen=True)
class QuantizeDynamic(Pass):
    """Quantize linear layers, LSTMs and GRUs without calibration data: activations get their scales as they come.

    In front of linear layers every token has its own scale, or one for each block of features, as the target's kernels
    want it. Behind ``QuantizeWeights`` this pass keeps the weights' grids and quantizes the activations only. LSTMs get
    8-bit weights, and activations as ONNX Runtime's operator quantizes them where that is the target; GRUs get 8-bit
    weights, which are unpacked when an engine is loaded.

    Attributes:
        weight_bits: 8, or 4 for weights of linear layers that are packed in pairs; one scale per output feature. Weights
            that were quantized before keep what they have.
        embeddings: Store embedding tables in 8 bits, too, with one scale per row.
        calibrator: Range of a weight row: ``minmax`` or ``mse``.
        include: Globs over layer names: only these.
        ignore: Globs over layer names to leave in floating point.

    Raises:
        UsageError: an option is out of range.
    """

    exact: ClassVar[bool] = False
    weight_bits: int = 8
    embeddings: bool = False
    calibrator: Literal["minmax", "mse"] = "mse"
    include: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("include", "ignore"):
            object.__setattr__(self, name, as_globs(getattr(self, name)))
        if self.weight_bits not in (4, 8) or self.calibrator not in ("minmax", "mse"):
            what = f"weight_bits={self.weight_bits}, calibrator={self.calibrator!r}: not known"
            raise UsageError(473, what, fix="weight_bits: 4 or 8; calibrator: minmax or mse")

    @property
    def precision(self) -> str:
        """What reports call the result."""
        return "int8" if self.weight_bits == 8 else "int8 with int4 weights"

    def requires(self, program: Program, context: Context) -> None:
        """A program whose activations are not quantized yet."""
        del context
        for node, module in program.layers():
            if isinstance(module, QUANTIZERS) and cast(Node, node.args[0]).op != "get_attr":
                what = "the program has quantizers of activations already"
                raise PassError(36, what, where=node.name, fix="capture the float model again")

    def run(self, program: Program, context: Context) -> Result:
        """Attach grids to weights, and one dynamic quantizer to every value that quantized layers read."""
        scheme = context.scheme or QuantScheme()
        chosen, notes = linear_layers(program, self.include, self.ignore, rounded=True)
        names = dict.fromkeys(layer_name(n) for n in chosen) | dict.fromkeys(self._others(program, scheme, notes))
        if not names:
            raise PassError(37, "there is no layer for dynamic quantization", why="; ".join(notes) or "none")
        spec = _weight_grid(scheme, self.weight_bits)
        for node in chosen:
            check_weight(program, node)
            quantize_weight(program, node, spec, self.calibrator)
        _insert(program, chosen, scheme)
        known = {note.partition(" stays float: ")[0] for note in notes} | set(names)
        what = f"{self.name} takes linear layers, LSTM, GRU and embeddings"
        notes += left_float(program, what, lambda n: n not in known and asked_for([n], self.include, self.ignore))
        notes += unused_globs(program, known, include=self.include, ignore=self.ignore)
        return Result(program, [f"quantized {n}" for n in names], notes=notes, metrics={"layers": len(names)})

    def _others(self, program: Program, scheme: QuantScheme, notes: list[str]) -> list[str]:
        """Replace recurrent layers and embeddings that are asked for; their names."""
        kinds: tuple[type[nn.Module], ...] = (nn.LSTM, nn.GRU, *([nn.Embedding] if self.embeddings else []))
        layers = {str(n.target): m for n, m in program.layers() if type(m) in kinds}
        for name in list(layers):
            kept = "ignored" if _matches(name, self.ignore) else ""
            kept = kept or ("not included" if self.include and not _matches(name, self.include) else "")
            if kept:
                notes.append(f"{name} stays float: {kept}")
                del layers[name]
        for name, module in layers.items():
            for parameter in module.parameters(recurse=False):
                finite_weight(parameter, name)
            dynamic = scheme.dynamic_lstm and isinstance(module, nn.LSTM)
            spec = _weight_grid(scheme, 8) if dynamic else _weight_grid(QuantScheme(), 8)
            put_layer(program, name, quantized_layer(module, spec, self.calibrator, dynamic=dynamic))
            if not dynamic and not isinstance(module, nn.Embedding):
                notes.append(f"{name}: weights in 8 bits, computed in float (the target has no integer kernel for it)")
        return list(layers)


def _matches(name: str, globs: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, g) for g in globs)


def _weight_grid(scheme: QuantScheme, bits: int) -> QuantSpec:
    """8-bit weights as the target wants them (7 bits where its sums saturate), 4-bit ones on the whole range."""
    half = 1 << (bits - 1)
    wanted = scheme.weight if bits == 8 and scheme.weight.signed and scheme.weight.bits == 8 else None
    low, high = (1 - half, half - 1) if wanted is None else (wanted.qmin, wanted.qmax)
    return QuantSpec(bits, signed=True, symmetric=True, axis=0, qmin=low, qmax=high)


def _insert(program: Program, layers: list[Node], scheme: QuantScheme) -> None:
    """One quantizer of each granularity behind every value that ``layers`` read as data."""
    made: dict[tuple[Node, int | None], Node] = {}
    wanted = [scheme.dynamic_granularity(weight_quantizer(program, node).spec) for node in layers]
    smallest = min((b for b in wanted if b is not None), default=None)
    for node, own in zip(layers, wanted, strict=True):
        value = cast(Node, node.args[0])
        block = own if own is None or not scheme.dynamic_uniform else smallest
        if (value, block) not in made:
            name = value.name if not any(v is value for v, _ in made) else f"{value.name}_{block or 'token'}"
            grid = DynamicFakeQuantize(QuantSpec(8, signed=True, symmetric=True, qmin=-127), block)
            path = add_quantizer(program, name, grid)
            with program.graph.inserting_before(node):
                new = program.graph.create_node("call_module", path, (value,), {}, name=f"{name}_quantized")
            new.meta = dict(value.meta)
            made[value, block] = new
        arguments: tuple[Any, ...] = (made[value, block], *node.args[1:])
        node.args = arguments
