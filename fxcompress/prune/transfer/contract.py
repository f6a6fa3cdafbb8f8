"""Products that sum over a dimension: matmul, einsum, attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.fx import Node

from fxcompress.prune.flow import Flow, Value
from fxcompress.prune.labels import Columns, Floats
from fxcompress.prune.transfer.pointwise import elementwise
from fxcompress.prune.transfer.registry import arguments, operator

__all__ = ["contract"]


def contract(
    flow: Flow, node: Node, terms: Sequence[Sequence[str]], result: Sequence[str], operands: Sequence[Value]
) -> Value:
    """An einsum over named dimensions.

    A name that is summed over ties its dimensions, and one operand must hold zero where an index is removed. A name that
    stays carries its channels on.
    """
    lengths: dict[str, int] = {}
    found: dict[str, list[Columns]] = {}
    for term, value in zip(terms, operands, strict=True):
        for d, name in enumerate(term):
            lengths[name] = max(lengths.get(name, 1), value.sizes[d])
            if value.sizes[d] > 1:
                found.setdefault(name, []).append(value.dims[d])
    carried: dict[str, Columns] = {}
    for name, columns in found.items():
        shared = flow.tie_all(columns, node)
        carried[name] = _product(flow, node, shared, columns, summed=name not in result)
    _tag(flow, terms, result, operands, carried)
    flow.cost(node, [flow.labels.resolve(c) for c in carried.values()])
    return Value(tuple(lengths[n] for n in result), tuple(carried.get(n, ()) for n in result))


def _product(flow: Flow, node: Node, shared: Columns, columns: list[Columns], *, summed: bool) -> Columns:
    """What a name carries behind a product: zero where any factor is zero."""
    if not shared:
        return ()
    zero = [np.zeros(len(c.atoms), dtype=np.bool_) for c in shared]
    for operand in columns:
        if summed and any(c.source is not None for c in operand):
            flow.mark_in(operand)  # a weight: its columns are not masked, what it reads must be
            continue
        zero = [z | (f == 0) for z, f in zip(zero, flow.fills(shared, operand), strict=True)]
    result = tuple(c.filled(np.where(z, 0.0, np.nan)) for c, z in zip(shared, zero, strict=True))
    if summed:
        flow.need_zero(result, node, "removed channels would leave something in the sum")
    return flow.labels.resolve(result)


def _tag(
    flow: Flow,
    terms: Sequence[Sequence[str]],
    result: Sequence[str],
    operands: Sequence[Value],
    carried: dict[str, Columns],
) -> None:
    """Products of two activations: what runs along beside the product is a head, the rest is the width of heads."""
    if len(terms) != 2 or any(c.source for v in operands for dim in v.dims for c in dim):
        return
    for name, columns in carried.items():
        beside = name in result and all(name in term for term in terms)
        flow.tag(columns, "head" if beside else "head_dim")


@operator("matmul", "bmm", "mm", "mv", "dot")
def _matmul(flow: Flow, node: Node) -> Any:
    a, b = flow.of(node.args[0]), flow.of(node.args[1])
    assert a is not None and b is not None
    return _multiply(flow, node, a, b)


def _multiply(flow: Flow, node: Node, a: Value, b: Value) -> Value:
    batch = max(len(a.sizes), len(b.sizes), 2) - 2
    names = [f"batch{i}" for i in range(batch)]
    left = [*names[batch - (len(a.sizes) - 2) :], "row", "sum"] if len(a.sizes) > 1 else ["sum"]
    right = [*names[batch - (len(b.sizes) - 2) :], "sum", "column"] if len(b.sizes) > 1 else ["sum"]
    result = names + (["row"] if "row" in left else []) + (["column"] if "column" in right else [])
    return contract(flow, node, [left, right], result, [a, b])


@operator("addmm", "baddbmm", "addbmm", "addmv")
def _addmm(flow: Flow, node: Node) -> Any:
    added, a, b = (flow.of(node.args[i]) for i in range(3))
    assert added is not None and a is not None and b is not None
    if "addbmm" in str(node.target) and "baddbmm" not in str(node.target):
        return flow.give_up(node, "it sums over a batch")
    product = _multiply(flow, node, a, b)
    return elementwise(flow, node, [added, product], product.sizes, sum_of_fills)


def sum_of_fills(fills: list[Floats | None]) -> Floats:
    """Fill of a sum; a broadcast operand is unknown."""
    n = len(next(f for f in fills if f is not None))
    result: Floats = np.sum([np.full(n, np.nan) if f is None else f for f in fills], axis=0)
    return result


@operator("einsum")
def _einsum(flow: Flow, node: Node) -> Any:
    args = arguments(node)
    inputs, arrow, result = str(args["equation"]).replace(" ", "").partition("->")
    operands = [v for v in (flow.of(t) for t in args["tensors"]) if v is not None]
    terms = [_names(t, len(v.sizes)) for t, v in zip(inputs.split(","), operands, strict=True)]
    if any(len(set(t)) < len(t) for t in terms):
        return flow.give_up(node, "a diagonal is taken")
    if arrow:
        final = _names(result, len(node.meta["val"].shape))
    else:
        every = [n for t in terms for n in t]
        final = sorted(n for n in set(every) if every.count(n) == 1 or n.startswith("..."))
    return contract(flow, node, terms, final, operands)


def _names(term: str, rank: int) -> list[str]:
    """Names of an einsum term; dimensions of ``...`` are counted from the right."""
    before, dots, after = term.partition("...")
    hidden = rank - len(before) - len(after) if dots else 0
    return [*before, *(f"...{hidden - i}" for i in range(hidden)), *after]


@operator("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu")
def _attention(flow: Flow, node: Node) -> Any:
    """Softmax over the keys makes what is left of a removed head zero only through its values."""
    args = arguments(node)
    query, key, value = (flow.of(args[n]) for n in ("query", "key", "value"))
    if query is None or key is None or value is None or not hasattr(node.meta["val"], "shape"):
        return flow.give_up(node, "an attention of another form")
    rank = len(query.sizes)
    if args.get("enable_gqa"):
        key, value = (_repeated(flow, v, query.sizes[-3]) for v in (key, value))
    sizes = flow.sizes(node.meta["val"])
    batch = range(rank - 2)
    scores = [f"batch{i}" for i in batch]
    # the scores: contraction over the width of a head
    product = contract(
        flow, node, [[*scores, "row", "sum"], [*scores, "key", "sum"]], [*scores, "row", "key"], [query, key]
    )
    mask = flow.of(args.get("attn_mask"))
    if mask is not None:
        product = elementwise(flow, node, [product, mask], product.sizes, sum_of_fills)
    flow.pin_value(product, node, "softmax runs over it", [-1])
    weights = Value(product.sizes, tuple(tuple(c.filled(np.nan) for c in flow.labels.resolve(d)) for d in product.dims))
    flow.costs.pop()
    result = contract(
        flow, node, [[*scores, "row", "key"], [*scores, "key", "column"]], [*scores, "row", "column"], [weights, value]
    )
    flow.costs.pop()
    _attention_cost(flow, node, query, value)
    return Value(sizes, result.dims)


def _attention_cost(flow: Flow, node: Node, query: Value, value: Value) -> None:
    wide = query.sizes[-1] + value.sizes[-1]
    batch = [flow.labels.resolve(d) for d in query.dims[:-2]]
    flow.cost(node, [*batch, flow.columns(query, -1)], query.sizes[-1] / wide)
    flow.cost(node, [*batch, flow.columns(value, -1)], value.sizes[-1] / wide)


def _repeated(flow: Flow, value: Value, heads: int) -> Value:
    """Keys or values with every head repeated, as grouped-query attention reads them."""
    old = value.sizes[-3]
    columns = tuple(c.take(np.repeat(np.arange(old), heads // old)) for c in flow.columns(value, -3))
    d = len(value.sizes) - 3
    return Value((*value.sizes[:d], heads, *value.sizes[d + 1 :]), (*value.dims[:d], columns, *value.dims[d + 1 :]))
