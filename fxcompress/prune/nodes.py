"""Rewriting nodes: every size that was burnt into the graph follows the channels that are left."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from fxcompress.ir import Program
from fxcompress.prune.dependencies import Bools, Dependencies
from fxcompress.prune.flow import Value
from fxcompress.prune.transfer.registry import arguments

__all__ = ["Surgeon"]


@dataclass
class Surgeon:
    """Rewrites the graph of ``program`` (a clone) so that the units in ``removed`` are gone.

    Attributes:
        program: Rewritten in place.
        found: Dependencies of the program it was cloned from.
        removed: bool [units].
    """

    program: Program
    found: Dependencies
    removed: Bools

    def __post_init__(self) -> None:
        self._kept: dict[int, Bools] = {}
        self._made: dict[Any, Tensor] = {}
        self.same_value: dict[Node, Node] = {}
        self._old = {n.name: v for n, v in self.found.flow.values.items()}
        self._originals = {n.name: n for n in self.found.program.graph.nodes}

    def kept(self, number: int) -> Bools:
        """Which indices of a dimension stay."""
        if number not in self._kept:
            self._kept[number] = self.found.kept(number, self.removed)
        return self._kept[number]

    def left(self, name: str, dim: int) -> Bools | None:
        """Which indices stay of a dimension of the value a node yields; None when all do."""
        numbers = self.found.values.get(name, ())
        if not isinstance(numbers, tuple) or not numbers:
            return None
        number = numbers[dim % len(numbers)]
        if number < 0 or self.kept(number).all():
            return None
        return self.kept(number)

    def size(self, name: str, dim: int) -> int | None:
        """New length of a dimension of a node's value; None when it did not change."""
        kept = self.left(name, dim)
        return None if kept is None else int(kept.sum())

    def touched(self, name: str) -> bool:
        """True when a value a node yields, or its parts, shrink."""
        return any(not self.kept(n).all() for n in _numbers(self.found.values.get(name, ())))

    def run(self) -> None:
        """Rewrite all nodes."""
        for node in list(self.program.graph.nodes):
            sources = [n.name for n in node.all_input_nodes]
            if node.op == "call_function" and any(self.touched(n) for n in (node.name, *sources)):
                self._rewrite(node)
        for node in self.program.graph.nodes:
            if self.touched(node.name):
                node.meta = {**node.meta, "val": self._value(node.meta.get("val"), self.found.values[node.name])}

        for node, source in self.same_value.items():
            node.meta = dict(source.meta)

    def _rewrite(self, node: Node) -> None:
        if node.name in self.found.flow.shuffles:
            self._reorder(node)
            return
        name = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
        rewrite = _REWRITES.get(name)
        if rewrite is not None:
            rewrite(self, node, arguments(node))

    def _value(self, val: Any, numbers: Any) -> Any:
        """The recorded value with its new sizes."""
        if isinstance(val, (list, tuple)):
            return type(val)(self._value(v, n) for v, n in zip(val, numbers, strict=True))
        if not isinstance(val, Tensor) or not any(n >= 0 for n in numbers):
            return val
        shape = [s if n < 0 else self._resized(s, n) for s, n in zip(val.shape, numbers, strict=True)]
        key = (
            str(shape),
            val.dtype,
            val.device,
        )  # fakes with free sizes are slow to make, and many values have one shape
        if key not in self._made:
            self._made[key] = _empty_like(val, shape)
        return self._made[key]

    def _resized(self, size: Any, number: int) -> Any:
        kept = self.kept(number)
        new, old = int(kept.sum()), len(kept)
        return new if isinstance(size, int) else size * new // old if new != old else size

    # ------------------------------------------------------------------------------------------- arguments
    def put(self, node: Node, name: str, value: Any) -> None:
        """Set an argument of an ATen call by its name."""
        for index, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
            if argument.name == name:
                if index < len(node.args):
                    node.update_arg(index, value)
                else:
                    node.update_kwarg(name, value)

    def new_sizes(self, node: Node, given: list[Any], first: int = 0) -> list[Any]:
        """The sizes of a view or a new tensor, from dimension ``first`` of the node's value on."""
        result = []
        for offset, size in enumerate(given):
            new = self.size(node.name, first + offset)
            if new is None or (isinstance(size, int) and size == -1):
                result.append(size)
            elif isinstance(size, int):
                result.append(new)
            else:
                result.append(self._scaled(node, size, first + offset, new))
        return result

    def _scaled(self, node: Node, size: Node, dim: int, new: int) -> Node:
        """A computed size, times what is left of the channels in it."""
        kept = self.left(node.name, dim)
        assert kept is not None
        graph, val = self.program.graph, size.meta["val"]
        with graph.inserting_before(node):
            times = graph.call_function(operator.mul, (size, new))
            times.meta["val"] = val * new
            result = graph.call_function(operator.floordiv, (times, len(kept)))
            result.meta["val"] = times.meta["val"] // len(kept)
        return result

    def constant(self, node: Node, stem: str, values: Any) -> Node:
        """A new buffer that holds indices, read before ``node``."""
        name = f"{stem}_indices"
        while hasattr(self.program.gm, name):
            name += "_"
        buffer = torch.as_tensor(values, dtype=torch.int64)
        self.program.gm.register_buffer(name, buffer, persistent=False)
        val = node.meta["val"]
        with self.program.graph.inserting_before(node):
            read = self.program.graph.get_attr(name)
        read.meta["val"] = _empty_like(val.new_empty(0, dtype=torch.int64), list(buffer.shape))
        return read

    def _reorder(self, node: Node) -> None:
        """A channel shuffle of which channels are gone: the order of what is left, by index."""
        shuffle = self.found.flow.shuffles[node.name]
        kept = self.left(shuffle.source.name, shuffle.dim)
        if kept is None:
            return
        order = shuffle.order[kept[shuffle.order]]
        source = next(n for n in self.program.graph.nodes if n.name == shuffle.source.name)
        index = self.constant(node, node.name, _ranks(kept)[order])
        node.target = torch.ops.aten.index_select.default
        node.args, node.kwargs = (source, shuffle.dim, index), {}

    def source_left(self, node: Node, dim: int) -> Bools | None:
        """Which indices stay of a dimension of the node's first input."""
        source = node.args[0]
        return self.left(source.name, dim) if isinstance(source, Node) else None

    def source_rank(self, node: Node) -> int:
        """Number of dimensions of the node's first input."""
        value = self._old.get(node.args[0].name) if isinstance(node.args[0], Node) else None
        return len(value.sizes) if isinstance(value, Value) else 0


def _empty_like(val: Tensor, shape: list[Any]) -> Tensor:
    if isinstance(val, torch._subclasses.FakeTensor):
        with val.fake_mode:
            return torch.empty(shape, dtype=val.dtype, device=val.device)
    return val.new_empty(shape)


def _numbers(value: Any) -> list[int]:
    if isinstance(value, list):
        return [n for v in value for n in _numbers(v)]
    return [n for n in value if n >= 0]


def _ranks(kept: Bools) -> Any:
    """New position of each kept index."""
    return np.cumsum(kept) - 1


def _sizes(surgeon: Surgeon, node: Node, args: dict[str, Any]) -> None:
    name = next((n for n in ("size", "shape") if n in args), None)
    if name is not None and isinstance(args[name], (list, tuple)):
        surgeon.put(node, name, surgeon.new_sizes(node, list(args[name])))


def _unflatten(surgeon: Surgeon, node: Node, args: dict[str, Any]) -> None:
    first = args["dim"] % surgeon.source_rank(node)
    surgeon.put(node, "sizes", surgeon.new_sizes(node, list(args["sizes"]), first))


def _repeat(surgeon: Surgeon, node: Node, args: dict[str, Any]) -> None:
    """Only where one index is repeated are the repeats channels."""
    name = "repeats" if "repeats" in args else "dims"
    repeats = list(args[name])
    offset = len(repeats) - surgeon.source_rank(node)
    for d in range(len(repeats)):
        new = surgeon.size(node.name, d)
        if new is not None and (d < offset or surgeon.source_left(node, d - offset) is None):
            repeats[d] = new
    surgeon.put(node, name, repeats)


def _repeat_interleave(surgeon: Surgeon, node: Node, args: dict[str, Any]) -> None:
    new = surgeon.size(node.name, args["dim"])
    if new is not None and surgeon.source_left(node, args["dim"]) is None:
        surgeon.put(node, "repeats", new)


def _slice(surgeon: Surgeon, node: Node, args: dict[str, Any]) -> None:
    kept = surgeon.source_left(node, args["dim"])
    if kept is None:
        return
    if "length" in args:
        start, stop, step = args["start"] % len(kept), args["start"] % len(kept) + args["length"], 1
    else:
        start, stop, step = slice(args["start"], args["end"], args["step"]).indices(len(kept))
    if step == 1:
        first, last = int(kept[:start].sum()), int(kept[:stop].sum())
        surgeon.put(node, "start", first)
        surgeon.put(node, *(("length", last - first) if "length" in args else ("end", last)))
        return
    chosen = np.arange(len(kept))[start:stop:step]
    _select_indices(surgeon, node, args["dim"], _ranks(kept)[chosen[kept[chosen]]])


def _select_indices(surgeon: Surgeon, node: Node, dim: int, indices: Any) -> None:
    index = surgeon.constant(node, node.name, indices)
    source = node.args[0]
    node.target = torch.ops.aten.index_select.default
    node.args, node.kwargs = (source, dim, index), {}


def _picked(surgeon: Surgeon, node: Node, args: dict[str, Any]) -> None:
    """Indices from a constant list."""
    if "indices" in args:
        dim = next(d for d, index in enumerate(args["indices"]) if index is not None)
        index = args["indices"][dim]
    else:
        dim, index = args["dim"], args["index"]
    kept = surgeon.source_left(node, dim)
    if kept is None:
        return
    chosen = surgeon.program.tensor(index).detach().cpu().numpy() % len(kept)
    _select_indices(surgeon, node, dim, _ranks(kept)[chosen[kept[chosen]]])


def _split(surgeon: Surgeon, node: Node, args: dict[str, Any]) -> None:
    """Parts have the lengths that are left: one list of sizes for every kind of split."""
    dim = args.get("dim", 0)
    if surgeon.source_left(node, dim) is None:
        return
    old = surgeon._old[node.name]
    lengths = []
    for value, numbers in zip(old, surgeon.found.values[node.name], strict=True):
        number = numbers[dim % len(numbers)]
        lengths.append(value.sizes[value.dim(dim)] if number < 0 else int(surgeon.kept(number).sum()))
    source = node.args[0]
    node.target = torch.ops.aten.split_with_sizes.default
    node.args, node.kwargs = (source, lengths, dim), {}


def _pad(surgeon: Surgeon, node: Node, args: dict[str, Any]) -> None:
    name = "pad" if "pad" in args else "padding"
    amounts = list(args[name])
    rank = surgeon.source_rank(node)
    for i in range(len(amounts) // 2):
        kept = surgeon.left(node.name, rank - 1 - i)
        if kept is not None and (amounts[2 * i] or amounts[2 * i + 1]):
            before, after = amounts[2 * i], amounts[2 * i + 1]
            amounts[2 * i], amounts[2 * i + 1] = int(kept[:before].sum()), int(kept[len(kept) - after :].sum())
    surgeon.put(node, name, amounts)


def _attention(surgeon: Surgeon, node: Node, args: dict[str, Any]) -> None:
    """The scale was one over the root of the old width of a head."""
    query = args["query"]
    if args.get("scale") is None and surgeon.size(query.name, -1) is not None:
        surgeon.put(node, "scale", surgeon._old[query.name].sizes[-1] ** -0.5)


def _mean(surgeon: Surgeon, node: Node, args: dict[str, Any]) -> None:
    """A mean over channels that are zero where they go: the same sum, divided by the old number."""
    rank = surgeon.source_rank(node)
    given = args.get("dim")
    dims = list(range(rank)) if given in (None, []) else [given] if isinstance(given, int) else list(given)
    kept = [k for k in (surgeon.source_left(node, d) for d in dims) if k is not None]
    if not kept or node.name in surgeon.found.statistics:
        return
    share = float(np.prod([k.mean() for k in kept]))
    with surgeon.program.graph.inserting_after(node):
        scaled = surgeon.program.graph.call_function(torch.ops.aten.mul.Tensor, (node, share))
    surgeon.same_value[scaled] = node
    node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)


def _conv(surgeon: Surgeon, node: Node, args: dict[str, Any]) -> None:
    if args["groups"] == 1:
        return
    transposed = "transpose" in str(node.target)
    weight = args["weight"]
    whole = node.name if transposed else args["input"].name
    channels = surgeon.size(whole, 1) or surgeon._old[whole].sizes[1]
    inside = surgeon.size(weight.name, 1) or surgeon._old[weight.name].sizes[1]
    surgeon.put(node, "groups", channels // inside)


def _norm(surgeon: Surgeon, node: Node, args: dict[str, Any]) -> None:
    if "normalized_shape" in args:
        shape = list(args["normalized_shape"])
        news = [surgeon.size(node.name, d - len(shape)) for d in range(len(shape))]
        surgeon.put(node, "normalized_shape", [o if n is None else n for o, n in zip(shape, news, strict=True)])
        return
    new = surgeon.size(node.name, 1)
    if new is not None:
        old = surgeon._old[node.name].sizes[1]
        surgeon.put(node, "num_groups", args["num_groups"] * new // old)


_REWRITES: dict[str, Callable[[Surgeon, Node, dict[str, Any]], None]] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "expand", "broadcast_to", "expand_copy"), _sizes),
    **dict.fromkeys(("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty"), _sizes),
    "unflatten": _unflatten,
    "mean": _mean,
    **dict.fromkeys(("repeat", "tile"), _repeat),
    "repeat_interleave": _repeat_interleave,
    **dict.fromkeys(("slice", "narrow"), _slice),
    **dict.fromkeys(("index_select", "index"), _picked),
    **dict.fromkeys(("split", "chunk", "split_with_sizes", "tensor_split", "unsafe_split", "unsafe_chunk"), _split),
    **dict.fromkeys(("hsplit", "vsplit"), _split),
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    **dict.fromkeys(("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu"), _attention),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _conv),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _conv),
    **dict.fromkeys(("layer_norm", "rms_norm", "group_norm"), _norm),
}
