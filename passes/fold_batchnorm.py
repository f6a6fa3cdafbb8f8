"""FoldBatchNorm: an inference BatchNorm disappears into the convolution or linear layer next to it.

With ``s = gamma / sqrt(var + eps)`` and ``t = beta - s mean`` (Jacob et al. 2018, section 3.2):

* forwards, ``BN(W x + b)``: ``W' = s W`` per output channel, ``b' = s b + t``;
* backwards, ``W BN(x) + b``: ``W' = W s`` per input channel, ``b' = b + sum(W t)``; with zero padding the border would
  see 0 instead of ``t``, so a padded convolution is refused unless ``t`` is zero.

Both are computed in float64 and stored in the weight's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxcompress.data import all_finite
from fxcompress.folding import fold_bias, fold_weight, norm_affine
from fxcompress.ir import Program
from fxcompress.layers import WEIGHTED_LAYERS, TransposedLinear
from fxcompress.passbase import Context, Pass, Result
from fxcompress.rewrite import Analysis, Match, Rule, apply_rules, drop_layer, single_user

__all__ = ["FoldBatchNorm"]

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LINEAR = (nn.Linear, TransposedLinear)


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold BatchNorm into Conv1d/2d/3d, ConvTranspose1d/2d/3d and Linear, forwards and (where exact) backwards."""

    exact: ClassVar[bool] = True

    def run(self, program: Program, context: Context) -> Result:
        """See the module docstring for the formulas."""
        changes, refusals = apply_rules(program, (_FORWARDS, _BACKWARDS))
        return Result(program, changes, refusals)


def _module_is(program: Program, node: Any, kinds: tuple[type[nn.Module], ...]) -> bool:
    plain = isinstance(node, Node) and node.op == "call_module" and len(node.args) == 1 and not node.kwargs
    return plain and type(program.module(node)) in kinds


def match_forwards(program: Program, node: Node) -> Match | None:
    """A norm behind a layer."""
    if _module_is(program, node, _NORMS) and _module_is(program, node.args[0], WEIGHTED_LAYERS):
        return Match(node, {"layer": node.args[0], "norm": node, "first": node.args[0]})
    return None


def _match_backwards(program: Program, node: Node) -> Match | None:
    if _module_is(program, node, WEIGHTED_LAYERS) and _module_is(program, node.args[0], _NORMS):
        return Match(node, {"layer": node, "norm": node.args[0], "first": node.args[0]})
    return None


def _check_forwards(analysis: Analysis, match: Match) -> str | None:
    return check_common(analysis, match) or _fold(analysis.program, match, _folded_forwards)


def _check_backwards(analysis: Analysis, match: Match) -> str | None:
    reason = check_common(analysis, match)
    if reason:
        return reason
    layer = analysis.program.module(match["layer"])
    _, shift = _affine(analysis.program.module(match["norm"]))
    if _pads_with_zeros(layer) and bool((shift != 0).any()):
        return "the convolution pads with zeros, which the norm would have shifted"
    return _fold(analysis.program, match, _folded_backwards)


def check_common(analysis: Analysis, match: Match) -> str | None:
    """Why a layer and a norm next to each other cannot become one, whichever comes first."""
    program = analysis.program
    layer, norm = match["layer"], match["norm"]
    for role, node in (("layer", layer), ("norm", norm)):
        if analysis.calls(node) > 1:
            return f"the {role} is called more than once"
        other = analysis.shared_with(node)
        if other:
            return f"{other} shares a tensor of the {role}"
    module = program.module(norm)
    if module.training:
        return "the norm is in training mode"
    if module.running_mean is None:
        return "the norm has no running statistics"
    if _channel_dim(program.module(layer), match["first"].meta["val"]) != 1:
        return "the norm counts channels on another axis than the layer"
    return None if single_user(match["first"]) else f"{match['first'].name} has more than one user"


def _channel_dim(layer: nn.Module, value: Tensor) -> int:
    """Dimension of the layer's channels in ``value``, its input or output."""
    if isinstance(layer, _LINEAR):
        return value.dim() - 1
    return value.dim() - cast(Tensor, layer.weight).dim() + 1  # 0 without a batch


def _pads_with_zeros(layer: Any) -> bool:
    if isinstance(layer, _TRANSPOSED):
        return True  # its border sees fewer input pixels, so a constant input shift is no constant output shift
    padding = getattr(layer, "padding", 0)
    if getattr(layer, "padding_mode", "zeros") != "zeros" or padding == "valid":
        return False
    if padding == "same":
        return any(k > 1 for k in layer.kernel_size)
    return any(padding) if isinstance(padding, tuple) else bool(padding)


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    """``s`` and ``t`` in float64 with ``BN(x) = s x + t``."""
    gamma, beta = (None if p is None else p.detach() for p in (norm.weight, norm.bias))
    return norm_affine(gamma, beta, norm.running_mean, norm.running_var, norm.eps)


def _fold(program: Program, match: Match, folded: Any) -> str | None:
    """Keep the folded weight and bias for the replacement; a reason when the weight's dtype cannot hold them."""
    layer: Any = program.module(match["layer"])
    weight, bias = folded(layer, *_affine(program.module(match["norm"])))
    dtype = layer.weight.dtype
    match.nodes["weight"], match.nodes["bias"] = weight.to(dtype), bias.to(dtype)
    finite = all_finite(match["weight"]) and all_finite(match["bias"])
    return None if finite else f"the folded weight is not finite in {str(dtype).removeprefix('torch.')}"


def _folded_forwards(layer: Any, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    bias = None if layer.bias is None else layer.bias.detach()
    return fold_weight(layer, layer.weight.detach(), scale), fold_bias(bias, scale, shift)


def _folded_backwards(layer: Any, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    weight = layer.weight.detach()
    moved = _sum_per_output(layer, weight * _per_input(layer, shift))
    return weight * _per_input(layer, scale), _bias(layer) + moved


def _bias(layer: Any) -> Tensor:
    """The bias in float64, zero when there is none."""
    if layer.bias is not None:
        return cast(Tensor, layer.bias.detach().double())
    size = layer.out_features if isinstance(layer, _LINEAR) else layer.out_channels
    return torch.zeros(size, dtype=torch.float64, device=layer.weight.device)


def _per_input(layer: Any, values: Tensor) -> Tensor:
    """Values per input channel, shaped to multiply ``layer.weight``."""
    weight = layer.weight
    if isinstance(layer, (TransposedLinear, *_TRANSPOSED)):
        return values.reshape(-1, *[1] * (weight.dim() - 1))
    groups = getattr(layer, "groups", 1)
    rows = values.reshape(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1)
    return rows.reshape(*weight.shape[:2], *[1] * (weight.dim() - 2))  # [out, in / groups, 1 ...]


def _sum_per_output(layer: Any, weight: Tensor) -> Tensor:
    if isinstance(layer, _TRANSPOSED):  # only reached with a zero shift
        return torch.zeros(layer.out_channels, dtype=weight.dtype, device=weight.device)
    return weight.sum(0) if isinstance(layer, TransposedLinear) else weight.flatten(1).sum(1)


def _replace(program: Program, match: Match) -> str:
    norm: Node = match["norm"]
    layer: Any = program.module(match["layer"])
    for name in ("weight", "bias"):
        layer._parameters[name] = nn.Parameter(match[name], requires_grad=layer.weight.requires_grad)
    norm.replace_all_uses_with(cast(Node, norm.args[0]))
    program.graph.erase_node(norm)
    drop_layer(program, str(norm.target))
    return f"{norm.target} into {match['layer'].target}"


_FORWARDS = Rule("fold norm forwards", match_forwards, _check_forwards, _replace)
_BACKWARDS = Rule("fold norm backwards", _match_backwards, _check_backwards, _replace)
