"""Keys and values of attention in a captured decoder, as a cache would store them: behind the rotation, not repeated."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxcompress.ir import Program, node_path

__all__ = ["Attention", "find_attention"]

_aten = torch.ops.aten
_ATTENTION = {_aten.scaled_dot_product_attention}
_SOFTMAX = {_aten.softmax, _aten._softmax}
_PRODUCTS = {_aten.matmul, _aten.bmm}
#: Repeat heads for groups of queries, or do nothing.
_REPEATS = {
    _aten.unsqueeze, _aten.expand, _aten.reshape, _aten.view, _aten.clone, _aten.contiguous, _aten.repeat_interleave,
    _aten.alias, _aten.detach,
}  # fmt: skip
#: Between the product with the keys and the softmax: scale, mask, dtype.
_SCORES = {_aten.add, _aten.mul, _aten.div, _aten.to, _aten.masked_fill, _aten._to_copy, _aten.clone}
#: Between the softmax and the product with the values.
_WEIGHTS = {_aten.to, _aten.dropout, _aten._to_copy, _aten.clone, _aten.alias}


@dataclass(frozen=True)
class Attention:
    """One attention layer.

    Attributes:
        name: Path of the user's module, e.g. ``model.layers.0.self_attn``.
        key: Float [batch, heads, tokens, features], rotated by the positions where the model does that.
        value: Float [batch, heads, tokens, features].
        rotary: The keys are rotated by halves: ``k * cos + cat(-k2, k1) * sin``.
    """

    name: str
    key: Node
    value: Node
    rotary: bool


def find_attention(program: Program) -> list[Attention]:
    """Attention layers in execution order: calls of the fused operator, and softmax between two products."""
    found: list[Attention] = []
    for node in program.graph.nodes:
        operands = _operands(program, node)
        if operands is None:
            continue
        key, value = (_unrepeated(n) for n in operands)
        if _rank(key) == _rank(value) == 4:
            name = node_path(node) or f"attention_{len(found)}"
            found.append(Attention(name, key, value, _is_rotated(key)))
    return found


def _packet(node: Any) -> Any:
    return getattr(node.target, "overloadpacket", None) if isinstance(node, Node) else None


def _rank(node: Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else -1


def _operands(program: Program, node: Node) -> tuple[Node, Node] | None:
    """Keys and values as the product takes them."""
    if _packet(node) in _ATTENTION:
        return node.args[1], node.args[2]  # type: ignore[return-value]
    if _packet(node) not in _SOFTMAX:
        return None
    scores = node.args[0]
    while _packet(scores) in _SCORES:
        scores = scores.args[0]  # type: ignore[union-attr]
    value = _weighted(program, node)
    if value is None or not isinstance(scores, Node) or _packet(scores) not in _PRODUCTS:
        return None
    key = scores.args[1]
    while _packet(key) in _REPEATS:  # the transposition may come before the heads are repeated
        key = key.args[0]  # type: ignore[union-attr]
    if isinstance(key, Node) and _packet(key) in (_aten.transpose, _aten.permute) and isinstance(key.args[0], Node):
        return key.args[0], value
    return None


def _weighted(program: Program, node: Node) -> Node | None:
    """What the softmax ``node`` weights."""
    for user in node.users:
        if _packet(user) in _PRODUCTS and user.args[0] is node:
            return user.args[1] if isinstance(user.args[1], Node) else None
        if _packet(user) in _WEIGHTS or (user.op == "call_module" and isinstance(program.module(user), nn.Dropout)):
            return _weighted(program, user)
    return None


def _unrepeated(node: Node) -> Node:
    """The value whose heads ``node`` repeats: the earliest one of four dimensions."""
    best = node
    while _packet(node) in _REPEATS or _is_whole_slice(node):
        node = node.all_input_nodes[0]
        best = node if _rank(node) == 4 else best
    return best


def _is_whole_slice(node: Node) -> bool:
    """A slice that keeps everything."""
    if _packet(node) is not _aten.slice:
        return False
    given: list[Any] = [*node.args[1:], *(0, 0, sys.maxsize, 1)[len(node.args) - 1 :]]
    return given[1] in (0, None) and given[2] in (None, sys.maxsize) and given[3] == 1


def _is_rotated(key: Node) -> bool:
    """``add(mul(k, cos), mul(cat(neg(k2), k1), sin))``."""
    if _packet(key) is not _aten.add:
        return False
    products = [n for n in key.all_input_nodes if _packet(n) is _aten.mul]
    turned = [n for p in products for n in p.all_input_nodes if _packet(n) is _aten.cat]
    return len(products) == 2 and any(_packet(n) is _aten.neg for cat in turned for n in cat.all_input_nodes)
