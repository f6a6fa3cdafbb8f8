"""QuantizeDynamic: weights to integers ahead of time, activations of linear layers to 8 bits at run time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

from torch.fx import Node

from fxcompress.errors import PassError, UsageError
from fxcompress.ir import Program
from fxcompress.passbase import Context, Pass, Result
from fxcompress.quant.fake_quantize import QUANTIZERS, DynamicFakeQuantize
from fxcompress.quant.insertion import add_quantizer
from fxcompress.quant.layer_weights import as_globs, check_weight, linear_layers, quantize_weight, weight_quantizer
from fxcompress.quant.placement import layer_name
from fxcompress.quant.scheme import QuantScheme
from fxcompress.quant.spec import QuantSpec

__all__ = ["QuantizeDynamic"]


@dataclass(frozen=True)
class QuantizeDynamic(Pass):
    """Quantize linear layers without calibration data: activations get their scales as they come.

    Every token has its own scale, or one for each block of features, as the target's kernels want it. Behind
    ``QuantizeWeights`` this pass keeps the weights' grids and quantizes the activations only.

    Attributes:
        weight_bits: 8, or 4 for weights that are packed in pairs; one scale per output feature. Weights that were
            quantized before keep what they have.
        calibrator: Range of a weight row: ``minmax`` or ``mse``.
        include: Globs over layer names: only these.
        ignore: Globs over layer names to leave in floating point.

    Raises:
        UsageError: an option is out of range.
    """

    exact: ClassVar[bool] = False
    weight_bits: int = 8
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
        if not chosen:
            raise PassError(37, "there is no linear layer for dynamic quantization", why="; ".join(notes) or "none")
        spec = self._weight_grid(scheme)
        for node in chosen:
            check_weight(program, node)
            quantize_weight(program, node, spec, self.calibrator)
        _insert(program, chosen, scheme)
        names = dict.fromkeys(layer_name(n) for n in chosen)
        return Result(program, [f"quantized {n}" for n in names], notes=notes, metrics={"layers": len(names)})

    def _weight_grid(self, scheme: QuantScheme) -> QuantSpec:
        """8-bit weights as the target wants them (7 bits where its sums saturate), 4-bit ones on the whole range."""
        half = 1 << (self.weight_bits - 1)
        wanted = scheme.weight if self.weight_bits == 8 and scheme.weight.signed and scheme.weight.bits == 8 else None
        low, high = (1 - half, half - 1) if wanted is None else (wanted.qmin, wanted.qmax)
        return QuantSpec(self.weight_bits, signed=True, symmetric=True, axis=0, qmin=low, qmax=high)


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
