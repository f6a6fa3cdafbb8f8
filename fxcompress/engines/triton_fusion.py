"""Quantization of activations joins the norm or activation in front of it: one kernel reads and writes once.

Looked for behind `triton_lowering`: a ``quantize_per_token`` whose input is made by LayerNorm, RMSNorm (the operator, or
the arithmetic that models spell out), a product ``silu(gate) * up`` or an activation, and is read by nobody else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.fx import Node

from fxcompress.ir import Program
from fxcompress.rewrite import single_user

__all__ = ["fuse_quantization"]

_aten = torch.ops.aten
_Call = tuple[Any, tuple[Any, ...]]
_NAMES = {
    _aten.relu.default: "relu",
    _aten.silu.default: "silu",
    _aten.sigmoid.default: "sigmoid",
    _aten.hardswish.default: "hardswish",
    _aten.relu6.default: "relu6",
}


def fuse_quantization(program: Program) -> list[str]:
    """Fuse in place; one line per fusion."""
    done = []
    for node in list(program.graph.nodes):
        if node.target is not torch.ops.fxcompress.quantize_per_token.default:
            continue
        source = cast(Node, node.args[0])
        if not single_user(source):
            continue
        for find in (_layer_norm, _rms_norm, _spelled_rms_norm, _gated, _activation):
            found = find(program, source)
            if found is not None:
                _put(program, node, found)
                done.append(f"{found[0]._schema.name.split('::')[1]}: {source.name}")
                break
    if done:
        program.graph.eliminate_dead_code()
        program.recompile()
    return done


def _put(program: Program, node: Node, found: _Call) -> None:
    target, args = found
    with program.graph.inserting_before(node):
        new = program.graph.call_function(target, args)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)


def _parameter(program: Program, before: Node, path: str) -> Node:
    with program.graph.inserting_before(before):
        made = program.graph.get_attr(path)
    made.meta["val"] = program.tensor(made)
    return made


def _layer_norm(program: Program, source: Node) -> _Call | None:
    if source.op != "call_module":
        return None
    norm = program.module(source)
    if type(norm) is not nn.LayerNorm or len(norm.normalized_shape) != 1 or norm.weight is None:
        return None
    weight = _parameter(program, source, f"{source.target}.weight")
    bias = None if norm.bias is None else _parameter(program, source, f"{source.target}.bias")
    return torch.ops.fxcompress.layer_norm_quantize.default, (source.args[0], weight, bias, norm.eps)


def _rms_norm(program: Program, source: Node) -> _Call | None:
    del program
    if source.target is not _aten.rms_norm.default:
        return None
    x, shape, weight, eps = (*source.args, None, None)[:4]
    if len(cast("list[int]", shape)) != 1 or not isinstance(weight, Node) or eps is None:
        return None
    return torch.ops.fxcompress.rms_norm_quantize.default, (x, weight, eps)


def _spelled_rms_norm(program: Program, source: Node) -> _Call | None:
    """``weight * (x32 * rsqrt(mean(x32 ** 2, -1) + eps)).to(dtype)`` with ``x32 = x.float()``."""
    scaled = _product(source, lambda n: n.op == "get_attr" and program.tensor(n).dim() == 1)
    if scaled is None:
        return None
    weight, normed = scaled
    normed = _uncast(normed)
    parts = _product(normed, lambda n: n.target is _aten.rsqrt.default)
    if parts is None:
        return None
    root, x = parts
    total = cast(Node, root.args[0])
    if not _is(total, _aten.add.Tensor) or not isinstance(total.args[1], float):
        return None
    mean = cast(Node, total.args[0])
    if not _is(mean, _aten.mean.dim) or mean.args[1:] != ([-1], True):
        return None
    square = cast(Node, mean.args[0])
    if not _is(square, _aten.pow.Tensor_Scalar) or square.args[1] != 2 or square.args[0] is not x:
        return None
    value = _uncast(x)
    same = value.meta["val"].dtype == source.meta["val"].dtype and x.meta["val"].dtype == torch.float32
    return (torch.ops.fxcompress.rms_norm_quantize.default, (value, weight, total.args[1], True)) if same else None


def _gated(program: Program, source: Node) -> _Call | None:
    """``silu(gate) * up``."""
    del program
    pair = _product(source, lambda n: n.target is _aten.silu.default and single_user(n))
    if pair is None:
        return None
    silu, up = pair
    gate = cast(Node, silu.args[0])
    alike = gate.meta["val"].shape == up.meta["val"].shape and gate.meta["val"].dtype == up.meta["val"].dtype
    return (torch.ops.fxcompress.silu_mul_quantize.default, (gate, up)) if alike else None


def _activation(program: Program, source: Node) -> _Call | None:
    del program
    name = _NAMES.get(cast(Any, source.target))
    if source.target is _aten.gelu.default:
        name = "gelu_tanh" if source.kwargs.get("approximate", "none") == "tanh" else "gelu"
    return None if name is None else (torch.ops.fxcompress.activation_quantize.default, (source.args[0], name))


def _is(node: Any, target: Any) -> bool:
    return isinstance(node, Node) and node.target is target


def _product(node: Any, first: Callable[[Node], bool]) -> tuple[Node, Node] | None:
    """Both factors of a product, the one that ``first`` knows in front."""
    if not _is(node, _aten.mul.Tensor) or not all(isinstance(a, Node) for a in node.args):
        return None
    a, b = cast("tuple[Node, Node]", node.args)
    return (a, b) if first(a) else (b, a) if first(b) else None


def _uncast(node: Any) -> Node:
    """What a conversion to another dtype converts; the node itself when it is none."""
    return cast(Node, node.args[0] if _is(node, _aten.to.dtype) else node)
