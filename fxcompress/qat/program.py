"""QATProgram: a program that trains with quantization simulated, and what it becomes for an engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn
from torch.fx import Node

from fxcompress.errors import PassError
from fxcompress.ir import Program
from fxcompress.layers import Fused
from fxcompress.passbase import Context
from fxcompress.passes import EliminateDeadCode, FuseActivations, RemoveIdentity
from fxcompress.qat.layers import HeldNorm, TrainedFused, make_plain, release_norm
from fxcompress.qat.quantizers import LearnedQuantizer, TrainedQuantizer
from fxcompress.quant.scheme import QuantScheme
from fxcompress.rewrite import drop_layer, put_layer

__all__ = ["QATProgram", "input_quantizer"]


@dataclass
class QATProgram(Program):
    """A program with trainable fake-quantizers, made by `prepare_qat`; ``gm`` is an ordinary module to train.

    Its ``state_dict`` has the user's names; the quantizers add names of their own. In eval mode it computes what the
    engine will. Norms that were folded belong to their layers: ``freeze_bn`` is what stops them, not the mode of the
    user's norm modules.

    Attributes:
        scheme: How the target wants it quantized.
    """

    scheme: QuantScheme = field(default_factory=QuantScheme)

    def clone(self) -> QATProgram:
        """A copy to rewrite: graph and module objects are new, tensors are shared."""
        plain = super().clone()
        shared = (plain.gm, plain.signature, plain.example, plain.notes, plain.history)
        new = QATProgram(*shared, scheme=self.scheme)
        link_biases(new)
        return new

    # ---------------------------------------------------------------------------------------------- switches
    def quantizers(self) -> Iterator[tuple[str, TrainedQuantizer]]:
        """Every fake-quantizer, of weights and activations, with its path; each once."""
        for name, module in self.gm.named_modules():
            if isinstance(module, TrainedQuantizer):
                yield name, module

    def enable_observers(self) -> None:
        """Let ranges follow the data in training mode (they do from the start)."""
        self._set("observing", True)

    def disable_observers(self) -> None:
        """Keep the ranges as they are; learned scales go on learning."""
        self._set("observing", False)

    def enable_fake_quantize(self) -> None:
        """Round (done from the start)."""
        self._set("quantizing", True)

    def disable_fake_quantize(self) -> None:
        """Let all values pass unrounded; observers go on."""
        self._set("quantizing", False)

    def freeze_bn(self) -> None:
        """Use the running statistics of every norm in training mode too, and keep them.

        Layers then train exactly what runs in the end. Done for the last epochs (Krishnamoorthi 2018, section 3.2.2).
        """
        self._freeze(True)

    def unfreeze_bn(self) -> None:
        """Use the statistics of the batch in training mode again."""
        self._freeze(False)

    def scale_parameters(self) -> list[nn.Parameter]:
        """The learned scales and offsets, each once; empty without ``learn_scale``."""
        found = [
            p for _, m in self.quantizers() if isinstance(m, LearnedQuantizer) for p in m.parameters(recurse=False)
        ]
        return list({id(p): p for p in found}.values())

    def parameter_groups(self, lr: float, *, weight_decay: float = 0.0, scale_lr: float | None = None) -> list[Any]:
        """Groups for an optimizer: weights and the rest; learned scales and offsets without decay.

        Args:
            lr: Learning rate.
            weight_decay: Of everything but scales and offsets.
            scale_lr: Learning rate of scales and offsets; None: ``lr``.
        """
        scales = self.scale_parameters()
        known = {id(p) for p in scales}
        rest = [p for p in self.gm.parameters() if p.requires_grad and id(p) not in known]
        groups = [{"params": rest, "lr": lr, "weight_decay": weight_decay}]
        if scales:
            groups.append({"params": scales, "lr": lr if scale_lr is None else scale_lr, "weight_decay": 0.0})
        return groups

    def _set(self, name: str, value: bool) -> None:
        for _, quantizer in self.quantizers():
            setattr(quantizer, name, value)

    def _freeze(self, value: bool) -> None:
        for module in self.gm.modules():
            if isinstance(module, TrainedFused | HeldNorm):
                module.frozen = value

    # ---------------------------------------------------------------------------------------------- conversion
    def convert(self) -> Program:
        """The plain program that computes what this one computes in eval mode, to the last bit.

        Norms are folded, dropout is gone, quantizers are frozen `FakeQuantize` modules. Tensors that do not change are
        shared.

        Raises:
            PassError: fake-quantization is switched off, or a quantizer has no range yet.
        """
        off = [name for name, quantizer in self.quantizers() if not quantizer.quantizing]
        if off:
            why = "what is not simulated would run quantized, or not at all"
            fix = "call enable_fake_quantize() first, and look at the accuracy"
            raise PassError(91, "fake-quantization is switched off", where=", ".join(off[:3]), why=why, fix=fix)
        plain = super().clone()
        plain.gm.eval()
        for node, module in list(plain.layers()):
            if plain.module(node) is module:  # else it was put at this path just now, for another call
                _convert(plain, node, module)
        plain.recompile()
        context = Context(scheme=self.scheme)
        for step in (RemoveIdentity(), FuseActivations(), EliminateDeadCode()):
            step.run(plain, context)
        plain.recompile()
        plain.verify()
        return plain


def link_biases(program: Program) -> None:
    """Let the biases that are rounded know the quantizers of this very program."""
    for node, layer in program.layers():
        if isinstance(layer, TrainedFused) and layer.bias_grid is not None:
            source = input_quantizer(program, node)
            assert source is not None
            layer.bias_grid = dataclasses.replace(layer.bias_grid, source=source)


def input_quantizer(program: Program, layer: Node) -> TrainedQuantizer | None:
    """The one quantizer whose grid a layer's input lies on; None when there is none, or several."""
    found: dict[int, TrainedQuantizer] = {}
    queue = [cast(Node, layer.args[0])]
    while queue:
        node = queue.pop()
        module = program.module(node) if node.op == "call_module" else None
        if isinstance(module, TrainedQuantizer):
            found[id(module)] = module
        elif module is not None or node.op == "placeholder":
            return None
        else:
            queue += node.all_input_nodes
    return next(iter(found.values())) if len(found) == 1 else None


def _convert(plain: Program, node: Node, module: nn.Module) -> None:
    """Put the plain form of a module in its place."""
    path = str(node.target)
    if isinstance(module, TrainedQuantizer):
        source = cast(Node, node.args[0])
        put_layer(plain, path, module.to_plain(plain.tensor(source) if source.op == "get_attr" else None))
    elif isinstance(module, TrainedFused):
        tensors = {k: plain.tensor(v) if isinstance(v, Node) else None for k, v in node.kwargs.items()}
        put_layer(plain, path, make_plain(module, tensors))
        node.kwargs = {}
        if module.norm is not None:
            plain.recompile()  # drops the reads of the norm's tensors
            drop_layer(plain, module.norm.path)
    elif isinstance(module, HeldNorm):
        put_layer(plain, path, release_norm(cast(nn.Module, module)))
    elif isinstance(module, Fused) and isinstance(module.weight_fake_quantize, TrainedQuantizer):
        layer = cast(Any, module)
        quantizer = module.weight_fake_quantize.to_plain(cast(Tensor, layer.weight))
        layer.weight_fake_quantize = quantizer  # ``module`` is the clone's own
