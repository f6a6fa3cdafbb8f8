"""QuantScheme: how one engine on one processor wants a network quantized."""

from __future__ import annotations

from dataclasses import dataclass

from fxcompress.quant.spec import QuantSpec

__all__ = ["QuantScheme"]

ALL_ACTIVATIONS = ("relu", "relu6", "hardtanh", "leaky_relu", "silu", "hardswish", "gelu", "sigmoid")
_UINT8 = QuantSpec(8, signed=False, symmetric=False)
_INT8 = QuantSpec(8, signed=True, symmetric=True, axis=0, qmin=-127, qmax=127)


@dataclass(frozen=True)
class QuantScheme:
    """What an engine can run in 8 bits, and how it wants that written down.

    Attributes:
        activation: Grid of activations.
        weight: Grid of weights; ``axis`` is replaced by the layer's own output-channel axis (None: per tensor).
        layers: Kinds of layers whose data input and weight are quantized: ``conv``, ``conv_transpose``, ``linear``.
        joins: Operators that run on integers when a quantized layer reads their result: ``add``, ``cat``, ``mul``,
            ``avg_pool``, ``sigmoid``, ``silu``. The inputs of ``add`` and ``cat`` share one scale.
        joined_activations: Clipping activations the engine runs in one kernel with the add before: ``relu``, ``relu6``,
            ``hardtanh``.
        quantized_outputs: Kinds of layers that only run on integers when their own output is quantized as well.
        fused_activations: Activations the engine runs in one kernel with the layer before.
        fused_residual: The engine also runs the residual add in that kernel.
        float_add_operand: In a joined add the operand that a quantized convolution makes for it alone stays float: the
            add runs behind that convolution, in one kernel. Scales of operands are then not shared.
        integer_bias: Biases are stored as int32 with the scale of input times weight.
        requantize_cat: A concat needs its result quantized again (with the shared scale) to run on integers.
        dynamic_block: Activations that are quantized at run time share a scale over so many features of a token in front
            of symmetric 8-bit weights with one scale per row; None: over the whole token.
        dynamic_block_packed: The same in front of other weights, whose groups it must divide.
        dynamic_uniform: All layers of a model must have the same such block.
        dynamic_lstm: LSTMs can quantize their activations at run time; else only their weights are integers.
        reason: Why this scheme and not a wider one, for the report.
    """

    activation: QuantSpec = _UINT8
    weight: QuantSpec = _INT8
    layers: tuple[str, ...] = ("conv", "conv_transpose", "linear")
    joins: tuple[str, ...] = ("add", "cat")
    joined_activations: tuple[str, ...] = ("relu", "relu6", "hardtanh")
    quantized_outputs: tuple[str, ...] = ()
    fused_activations: tuple[str, ...] = ALL_ACTIVATIONS
    fused_residual: bool = True
    float_add_operand: bool = False
    integer_bias: bool = False
    requantize_cat: bool = False
    dynamic_block: int | None = None
    dynamic_block_packed: int | None = None
    dynamic_uniform: bool = False
    dynamic_lstm: bool = False
    reason: str = ""

    def dynamic_granularity(self, weight: QuantSpec) -> int | None:
        """Features that share a scale when the input of a layer is quantized at run time; None: the whole token.

        Args:
            weight: Grid of the layer's weight.
        """
        group = weight.group_size
        if weight.bits == 8 and weight.symmetric and group is None:
            return self.dynamic_block
        block = self.dynamic_block_packed
        if block is None or group is None:
            return block
        shared = min(block, group & -group)  # the largest power of two in both
        return shared if shared >= 16 else None
