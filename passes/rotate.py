"""Rotate: turns the residual stream by a random Hadamard matrix, which spreads outliers; outputs stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxcompress.errors import PassError, UsageError
from fxcompress.ir import Program
from fxcompress.passbase import Context, Pass, Refusal, Result
from fxcompress.quant.fake_quantize import QUANTIZERS
from fxcompress.quant.hadamard import rotation
from fxcompress.quant.layer_weights import other_readers
from fxcompress.quant.placement import weight_axis
from fxcompress.quant.residual import Stream, find_streams

__all__ = ["Rotate"]

_ROTATED = "fxcompress_rotated"


@dataclass(frozen=True)
class Rotate(Pass):
    """Rotate every residual stream that RMS norms read (Ashkboos et al., "QuaRot", 2024, section 4, stage 1a).

    Embeddings and layers that write into the stream are rotated, layers that read it rotate back, and the weights of the
    norms go into their readers. Nothing is added to the graph. A stream that something else reads or writes (a LayerNorm,
    a convolution, an input of the model) stays as it is, with the reason. A head that shares its weight with the
    embedding gets one of its own.

    Run it before `QuantizeWeights` or `QuantizeDynamic`.

    Attributes:
        seed: Of the random signs.

    Raises:
        UsageError: the seed is no whole number of 0 or more.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise UsageError(488, f"seed={self.seed!r} is not a whole number of 0 or more", fix="pass seed=0")

    def requires(self, program: Program, context: Context) -> None:
        """A program that is not quantized yet."""
        del context
        if any(isinstance(m, QUANTIZERS) for m in program.gm.modules()):
            raise PassError(64, f"{self.name} comes before quantization", fix="put it in front of the quantizing pass")

    def run(self, program: Program, context: Context) -> Result:
        """Find the streams and rotate those that can be."""
        del context
        result = Result(program)
        streams = find_streams(program)
        if not streams:
            result.notes.append("nothing was rotated: the program has no RMS norm")
        for number, stream in enumerate(streams):
            where = f"stream {number} of {stream.size} features"
            problem = stream.problem or (
                "it is rotated already" if any(_ROTATED in n.meta for n in stream.values) else ""
            )
            if problem:
                result.refusals.append(Refusal("rotate", where, problem))
                continue
            self._rotate(program, stream, result, where)
            for node in stream.values:
                node.meta[_ROTATED] = self.seed
        return result

    def _rotate(self, program: Program, stream: Stream, result: Result, where: str) -> None:
        matrix, is_hadamard = rotation(stream.size, self.seed)
        if not is_hadamard:
            result.notes.append(f"{where}: no Hadamard matrix of this order; part of it is a random rotation")
        others = other_readers(program)
        tied = [n for n in stream.readers if program.module(n).weight.data_ptr() in others]  # type: ignore[operator]
        result.notes += [f"{n.target} has a weight of its own now, no longer that of the embedding" for n in tied]
        for gain in stream.gains:
            weight: Tensor = getattr(gain.holder, gain.name)
            for node in gain.readers:
                _put(program, node, "weight", _rows(program, node) * weight.detach().double())
            setattr(gain.holder, gain.name, nn.Parameter(torch.ones_like(weight), requires_grad=weight.requires_grad))
        for node in stream.readers:
            _put(program, node, "weight", _rows(program, node) @ matrix)
        for node in stream.embeddings:
            module = program.module(node)
            table: Tensor = module.weight  # type: ignore[assignment]
            module.weight = nn.Parameter((table.detach().double() @ matrix).to(table.dtype), table.requires_grad)
        for node in stream.writers:
            _put(program, node, "weight", matrix.t() @ _rows(program, node))
            bias = program.module(node).bias
            if isinstance(bias, Tensor):
                _put(program, node, "bias", bias.detach().double() @ matrix)
        what = f"{len(stream.embeddings)} embeddings, {len(stream.writers)} writers, {len(stream.readers)} readers"
        result.changes.append(f"rotated {where}: {what}")


def _rows(program: Program, node: Node) -> Tensor:
    """The weight of a linear layer as float64 [out, in]."""
    module = program.module(node)
    weight: Tensor = module.weight  # type: ignore[assignment]
    rows = weight.detach().double()
    return rows if weight_axis(module) == 0 else rows.t()


def _put(program: Program, node: Node, name: str, value: Tensor) -> None:
    """A new parameter for this layer alone; ``value`` as rows when it is a weight."""
    module = program.module(node)
    old: Tensor = getattr(module, name)
    laid = value.t() if name == "weight" and weight_axis(module) == 1 else value
    setattr(module, name, nn.Parameter(laid.to(old.dtype).contiguous(), requires_grad=old.requires_grad))
