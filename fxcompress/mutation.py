"""In-place operators out of the graph: every write makes a new value, every later read of that memory sees it.

This is functionalization on the graph itself. Tensors that share memory form a tree: a base (the result of an operator,
an input, a buffer) and views of it. A write into one of them makes the others stale. A stale tensor is brought up to date
only when something reads it: views are replayed on their parent, the base takes the written values back through the
inverse of each view. What nothing reads costs nothing, so the time is linear in the number of nodes.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fxcompress.ir import source_line
from fxcompress.views import MutationError, call, put_back, sizes_of

__all__ = ["MutationError", "Mutations", "is_mutable", "remove_mutation"]

_aten = torch.ops.aten
#: Change a tensor's shape in place, not its values.
_RESHAPING = ("unsqueeze_", "squeeze_", "transpose_", "t_", "swapdims_", "swapaxes_", "detach_")
#: Give back their very input in eval mode; the recorded fake tensors do not tell.
_SAME_IN_EVAL = (_aten.dropout.default, _aten.feature_dropout.default, _aten.alpha_dropout.default)


@dataclass
class Mutations:
    """What ``remove_mutation`` did.

    Attributes:
        written: The nodes that replaced in-place operators.
        state: Parameters and buffers the model writes: name -> the user's line. The graph no longer writes them.
    """

    written: set[Node] = field(default_factory=set)
    state: dict[str, str] = field(default_factory=dict)


@dataclass(eq=False)
class _Alias:
    """One tensor object: the base of a memory, or a view of its parent.

    ``key`` and ``piece`` tell views that cannot overlap: pieces of one ``split`` have one key and different numbers.
    Times count writes; ``below`` is the last write into this tensor or a view of it, ``lately`` the last writes into its
    views, newest first, for the two newest keys.
    """

    node: Node
    time: int
    parent: _Alias | None = None
    view: Node | None = None
    source: Node | None = None
    key: object = None
    piece: int | None = None
    written: int = 0
    below: int = 0
    lately: list[tuple[int, object]] = field(default_factory=list)
    pending: list[tuple[_Alias, Node]] = field(default_factory=list)
    members: list[Node] = field(default_factory=list)

    def is_stale(self) -> bool:
        if self.below > self.time:
            return True
        child, parent = self, self.parent
        while parent is not None:
            if parent.written > self.time or any(t > self.time for t, key in parent.lately if key is not child.key):
                return True
            child, parent = parent, parent.parent
        return False

    def chain(self) -> list[_Alias]:
        """The views from the base (left out) down to this one."""
        views: list[_Alias] = []
        alias = self
        while alias.parent is not None:
            views.append(alias)
            alias = alias.parent
        return views[::-1]

    def root(self) -> _Alias:
        alias = self
        while alias.parent is not None:
            alias = alias.parent
        return alias


def is_mutable(node: Node) -> bool:
    """True for operators that write into an argument."""
    return (
        node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
    )


def remove_mutation(gm: GraphModule) -> Mutations:
    """Rewrite ``gm.graph`` without in-place operators.

    Inputs, parameters and buffers are not written any more; ``Mutations.state`` names those that were.

    Raises:
        MutationError: a write that cannot be expressed (an operator without functional form, an unusual view).
    """
    done = Mutations()
    if any(is_mutable(n) for n in gm.graph.nodes):
        _Remover(gm, done).run()
    return done


class _Remover:
    def __init__(self, gm: GraphModule, done: Mutations) -> None:
        self.graph, self.done = gm.graph, done
        self.clock = 0
        self.aliases: dict[Node, _Alias] = {}  # by the nodes of the original graph
        self.sources: dict[Node, dict[Node, _Alias]] = {}  # of a view: its inputs as they are now, and what they alias
        self.list_times: dict[Node, int] = {}
        self.pieces: dict[tuple[Node, int], _Alias] = {}
        self.replayed: dict[tuple[Node, int | None, Node], Node] = {}
        self.replaced: list[Node] = []
        self.memory = _memory(gm)
        self.roots: dict[int, _Alias] = {}
        self.touched = {self.memory.get(_written_argument(n), -1) for n in gm.graph.nodes if is_mutable(n)}

    def run(self) -> None:
        for node in list(self.graph.nodes):
            target = _written_argument(node) if is_mutable(node) else None
            self.refresh_inputs(node)
            if target is not None:
                self.write(node, target)
            elif self.memory.get(node) in self.touched:
                self.track(node)
            elif isinstance(node.meta.get("val"), (list, tuple)):
                self.list_times[node] = self.clock
        for node in reversed(self.replaced):
            self.graph.erase_node(node)

    # -------------------------------------------------------------------------------------------- reading
    def refresh_inputs(self, node: Node) -> None:
        """Let ``node`` read the current values of its inputs."""
        known = {given: self.aliases[given] for given in node.all_input_nodes if given in self.aliases}
        if not known:
            return
        shape_only = _reads_shape_only(node)
        current = {given: alias.node if shape_only else self.read(alias, node) for given, alias in known.items()}
        node.args = map_arg(node.args, lambda n: current.get(n, n))
        node.kwargs = map_arg(node.kwargs, lambda n: current.get(n, n))
        self.sources[node] = {current[given]: alias for given, alias in known.items()}

    def read(self, alias: _Alias, before: Node) -> Node:
        """The current value, made in front of ``before`` when a write left the last one behind."""
        if alias.is_stale():
            with self.graph.inserting_before(before):
                if alias.parent is None:
                    self.take_back(alias)
                else:
                    alias.node = self.replay(alias, self.read(alias.parent, before))
            alias.time = self.clock
        return alias.node

    def take_back(self, base: _Alias) -> None:
        """Bring the values written into views back into their base."""
        for alias, value in base.pending:
            views = alias.chain()
            parents = [base.node]
            for view in views[:-1]:
                parents.append(self.replay(view, parents[-1]))
            for view, parent in zip(reversed(views), reversed(parents), strict=True):
                value = put_back(cast(Node, view.view), view.piece, parent, value)
            base.node = value
        base.pending.clear()

    def replay(self, alias: _Alias, parent: Node) -> Node:
        """The view operator of ``alias`` on another value of its parent."""
        view = cast(Node, alias.view)
        node = self.replayed.get((view, None, parent)) or self.copy(view, {cast(Node, alias.source): parent})
        self.replayed[view, None, parent] = node
        if alias.piece is None:
            return node
        piece = self.replayed.get((view, alias.piece, parent))
        if piece is None:
            piece = self.graph.call_function(operator.getitem, (node, alias.piece))
            piece.meta = {**node.meta, "val": node.meta["val"][alias.piece]}
            self.replayed[view, alias.piece, parent] = piece
        return piece

    def copy(self, node: Node, inputs: dict[Node, Node]) -> Node:
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: inputs.get(n, n))
        new = self.graph.call_function(cast(Any, node.target), args, kwargs)
        new.meta = dict(node.meta)
        return new

    # -------------------------------------------------------------------------------------------- tracking
    def track(self, node: Node) -> None:
        """Remember a tensor whose memory is written somewhere: a view of a known one, or a base."""
        memory = self.memory[node]
        is_piece = node.target is operator.getitem
        view = cast(Node, node.args[0]) if is_piece else node
        for source, alias in self.sources.get(view, {}).items():
            if alias.root() is self.roots.get(memory):
                self.add(node, self.view_of(alias, view, source, node, is_piece))
                return
        if memory in self.roots:
            raise MutationError(
                f"{node.name} shares memory with {self.roots[memory].node.name} in a way that is not known"
            )
        self.roots[memory] = _Alias(node, self.clock)
        self.add(node, self.roots[memory])

    def view_of(self, parent: _Alias, view: Node, source: Node, node: Node, is_piece: bool) -> _Alias:
        if not is_piece:
            alias = _Alias(node, self.clock, parent, view, source)
            alias.key = alias
            return alias
        piece = cast(int, node.args[1])
        if (view, piece) not in self.pieces:
            time = self.list_times.get(view, self.clock)
            self.pieces[view, piece] = _Alias(node, time, parent, view, source, key=view, piece=piece)
        return self.pieces[view, piece]

    def add(self, node: Node, alias: _Alias) -> None:
        self.aliases[node] = alias
        alias.members.append(node)

    # -------------------------------------------------------------------------------------------- writing
    def write(self, node: Node, target: Node) -> None:
        """Replace one in-place operator; its result is one more name of ``target``."""
        alias = self.aliases.get(target)
        if alias is None:
            raise MutationError(f"{node.name} writes into {target.name}, whose memory is not known")
        name = _operator_name(node)
        before = alias.node
        with self.graph.inserting_before(node):
            value = _functional(self.graph, node, name)
        self.replaced.append(node)
        self.add(node, alias)
        if name in _RESHAPING:
            self.reshape(alias, value, before)
            return
        self.done.written.add(value)
        self.mark_written(alias, value)
        base = alias.root().members[0]
        if base.op == "get_attr":
            self.done.state.setdefault(str(base.target), source_line(node))

    def mark_written(self, alias: _Alias, value: Node) -> None:
        self.clock += 1
        alias.node, alias.time, alias.written, alias.below = value, self.clock, self.clock, self.clock
        child, parent = alias, alias.parent
        while parent is not None:
            parent.below = self.clock
            parent.lately = [(self.clock, child.key), *(p for p in parent.lately if p[1] is not child.key)][:2]
            child, parent = parent, parent.parent
        if child is alias:
            alias.pending.clear()
        else:
            child.pending.append((alias, value))

    def reshape(self, alias: _Alias, value: Node, source: Node) -> None:
        """After ``x.unsqueeze_(0)`` every name of ``x`` means the new view; views of ``x`` stay what they were."""
        view = _Alias(value, self.clock, alias, value, source)
        view.key = view
        names, alias.members = alias.members, alias.members[:1]
        for name in names:
            self.add(name, view)


def _memory(gm: GraphModule) -> dict[Node, int]:
    """Node -> the storage its recorded fake tensor lives in."""
    found: dict[Node, int] = {}
    same: dict[int, int] = {}
    for node in gm.graph.nodes:
        val = node.meta.get("val")
        if isinstance(val, Tensor) and val.layout == torch.strided:
            storage = val.untyped_storage()._cdata
            if node.target in _SAME_IN_EVAL and not node.args[2]:
                same[storage] = found[cast(Node, node.args[0])]
            found[node] = same.get(storage, storage)
    return found


def _reads_shape_only(node: Node) -> bool:
    return node.op == "call_function" and "::sym_" in str(getattr(node.target, "_schema", ""))


def _written_argument(node: Node) -> Node:
    arguments = cast(Any, node.target)._schema.arguments
    written = [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
    if written != [0] or not node.args or not isinstance(node.args[0], Node):
        raise MutationError(f"{node.target} writes into something else than its first argument")
    return node.args[0]


def _operator_name(node: Node) -> str:
    return str(cast(Any, node.target)._schema.name).split("::")[1]


def _functional(graph: torch.fx.Graph, node: Node, name: str) -> Node:
    """A node that computes what ``node`` leaves in its first argument, in that argument's dtype."""
    target, *rest = node.args
    val = cast(Node, target).meta["val"]
    if name == "copy_" or (name == "fill_" and isinstance(rest[0], Node)):
        return _broadcast(graph, cast(Node, rest[0]), cast(Node, target))
    if name == "zero_":
        new = graph.call_function(_aten.zeros_like.default, (target,))
    elif name == "fill_":
        new = graph.call_function(_aten.full_like.default, (target, rest[0]))
    else:
        new = graph.call_function(_functional_overload(cast(Any, node.target)), node.args, node.kwargs)
    new.meta = dict(node.meta)
    dtype = _result_dtype(new, val)
    if dtype != val.dtype:
        new.meta["val"] = val.to(dtype)
        new = graph.call_function(_aten.to.dtype, (new, val.dtype))
        new.meta = dict(node.meta)
    return new


def _broadcast(graph: torch.fx.Graph, source: Node, target: Node) -> Node:
    """``source`` in the dtype and shape of ``target``."""
    val, wanted = source.meta["val"], target.meta["val"]
    if val.device != wanted.device:
        raise MutationError(f"{source.name} is copied to another device")
    if val.dtype != wanted.dtype:
        source = call(graph, _aten.to.dtype, (source, wanted.dtype), val.to(wanted.dtype), target)
    if val.shape != wanted.shape:
        source = call(graph, _aten.expand.default, (source, sizes_of(graph, target)), wanted, target)
    return source


def _functional_overload(overload: Any) -> Any:
    if overload is _aten.transpose_.default:
        return _aten.transpose.int
    namespace, name = overload._schema.name.split("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    functional = None if packet is None else getattr(packet, overload._overloadname, None)
    if functional is None or functional._schema.is_mutable:
        raise MutationError(f"{overload} has no functional form")
    return functional


def _result_dtype(node: Node, val: Tensor) -> torch.dtype:
    """``x.add_(y)`` keeps x's dtype; ``x + y`` promotes."""
    tensors = [n.meta.get("val") for n in node.all_input_nodes]
    if all(not isinstance(t, Tensor) or t.dtype == val.dtype for t in tensors):
        return val.dtype
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
    result = cast(Any, node.target)(*args, **kwargs)
    return cast(Tensor, result).dtype
