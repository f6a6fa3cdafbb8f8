"""Re-attach layers: ATen calls whose weights belong to one submodule become ``call_module`` of a plain layer there.

``torch.export`` flattens ``self.conv1(x)`` to ``aten.conv2d(x, conv1.weight, conv1.bias, ...)``. A plain layer built from
the call's own arguments is exact whatever the owner's ``forward`` did around it (timm's LayerNorm2d permutes, for
example); it takes the owner's place and holds the very same parameters under the user's names. A weight with a name of its
own (``F.conv2d(x, self.w)``, attention's ``in_proj_weight``) moves into a layer named after it; its ``state_dict`` key
stays the user's.
"""

from __future__ import annotations

import operator
import re
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from fxcompress.attach_rules import RULES, Call, Rule, dropout_layer
from fxcompress.ir import node_path
from fxcompress.tree import ParameterTree

__all__ = ["attach_layers", "readable_names"]


def attach_layers(gm: GraphModule, tree: ParameterTree, original: nn.Module) -> None:
    """Turn ATen calls of ``gm.graph`` into ``call_module`` nodes; new layers are put into ``tree``.

    Args:
        gm: Graph whose parameters are ``get_attr`` nodes; its nodes are replaced in place.
        tree: The program's modules, so far plain containers of parameters.
        original: The user's model, for what a call does not tell (a norm's momentum, an LSTM's sizes).
    """
    attacher = _Attacher(gm.graph, tree, original)
    for node in list(gm.graph.nodes):
        if node.op == "call_function":
            attacher.attach(node)
    attacher.retarget()


class _Attacher:
    def __init__(self, graph: Graph, tree: ParameterTree, original: nn.Module) -> None:
        self.graph, self.tree = graph, tree
        self.modules = dict(original.named_modules(remove_duplicate=False))
        self.placed: dict[int, str] = {}
        self.moved: dict[str, str] = {}
        self.names: dict[int, list[str]] = {}
        root = tree.root
        self.tensors: dict[str, Tensor] = {
            **dict(root.named_parameters(remove_duplicate=False)),
            **dict(root.named_buffers(remove_duplicate=False)),
        }
        for name, tensor in self.tensors.items():
            self.names.setdefault(id(tensor), []).append(name)

    def attach(self, node: Node) -> None:
        """Replace one call, when a layer does exactly the same."""
        dropout = dropout_layer(node)
        if dropout is not None:
            self._replace(node, self._place_dropout(node, dropout), [node.args[0]])
        elif node.target in RULES:
            self._attach(node, RULES[node.target])

    def retarget(self) -> None:
        """Let what still reads a moved tensor directly read it at its new place."""
        for node in self.graph.nodes:
            if node.op == "get_attr":
                node.target = self.moved.get(str(node.target), node.target)

    # -------------------------------------------------------------------------------------------- layers
    def _attach(self, node: Node, rule: Rule) -> None:
        args = _schema_args(node, rule.rename)
        recurrent = "params" in args
        if recurrent:
            params = self._recurrent_params(node, args)
        else:
            params = {layer: args[arg] for arg, layer in rule.params if args[arg] is not None}
        if not params:
            return
        path = self._owner(node, params)
        layer = rule.build(Call(node, args, self.modules.get(path or ""))) if path or rule.named_freely else None
        if layer is None:
            return
        if path is None or not self._place(path, layer, params):
            path = self._place_apart(node, layer, params) if rule.named_freely else None
        if path is not None:
            self._replace(node, path, [args[name] for name in rule.inputs if args[name] is not None], recurrent)

    def _aliases(self, node: Any) -> list[str]:
        """All names of the tensor a ``get_attr`` node reads; empty for anything else."""
        if not isinstance(node, Node) or node.op != "get_attr":
            return []
        name = str(node.target)
        tensor = self.tensors.get(self.moved.get(name, name))
        return [] if tensor is None else self.names[id(tensor)]

    def _owner(self, node: Node, params: dict[str, Any]) -> str | None:
        """Path of the one module that holds every tensor of the call under the layer's own names."""
        candidates: list[str] | None = None
        for name, value in params.items():
            prefixes = [a.removesuffix(f".{name}") for a in self._aliases(value) if a.endswith(f".{name}")]
            candidates = prefixes if candidates is None else [p for p in candidates if p in prefixes]
        if not candidates:
            return None
        home = node_path(node)
        return home if home in candidates else candidates[0]

    def _recurrent_params(self, node: Node, args: dict[str, Any]) -> dict[str, Any]:
        owner = self.modules.get(node_path(node))
        names = getattr(owner, "_flat_weights_names", [])
        return dict(zip(names, args["params"], strict=True)) if len(names) == len(args["params"]) else {}

    def _place(self, path: str, layer: nn.Module, params: dict[str, Any]) -> bool:
        """Put ``layer`` at ``path`` with the tree's tensors; False when something else already lives there."""
        identity = f"{type(layer).__name__}({layer.extra_repr()})"
        holder = self.tree.find(path)
        if holder is None or id(holder) in self.placed:
            return holder is not None and self.placed[id(holder)] == identity
        if any(holder._parameters.get(n) is not None for n, slot in layer._parameters.items() if slot is None):
            return False  # a bias of the owner's that this call does not take
        for name in params:
            _set_tensor(layer, name, self.tensors[f"{path}.{name}"])
        for kept, slots in ((holder._parameters, layer._parameters), (holder._buffers, layer._buffers)):
            slots.update({n: cast(Any, t) for n, t in kept.items() if not _is_filled(slots.get(n))})
        layer._non_persistent_buffers_set |= holder._non_persistent_buffers_set
        self.tree.replace(holder, _finished(layer, holder))
        self.placed[id(layer)] = identity
        return True

    def _place_apart(self, node: Node, layer: nn.Module, params: dict[str, Any]) -> str | None:
        """Move tensors that have names of their own into ``layer``, beside where they were; None when they are shared."""
        names = {layer_name: self._aliases(value) for layer_name, value in params.items()}
        homes = {found[0].rpartition(".")[0] for found in names.values() if found}
        if any(len(found) != 1 for found in names.values()) or len(homes) != 1:
            return None
        home = self.tree.find(homes.pop())
        if home is None or type(home) is not nn.Module:
            return None
        path = self._free_path(next(iter(names.values()))[0], node)
        container, leaf = self.tree.make(path.rpartition(".")[0]), path.rpartition(".")[2]
        for layer_name, (name,) in names.items():
            self._move(home, name, layer, layer_name, f"{path}.{layer_name}")
        self.tree.put(container, leaf, _finished(layer, home))
        self.placed[id(layer)] = f"{type(layer).__name__}({layer.extra_repr()})"
        return path

    def _free_path(self, name: str, node: Node) -> str:
        """``attn.in_proj_weight`` -> ``attn.in_proj``, ``w`` -> ``w``; named after the operator when that says nothing."""
        home, _, leaf = name.rpartition(".")
        stem = leaf.removesuffix("_weight")
        prefix = f"{home}." if home else ""
        for choice in (stem, f"{stem}_{_operator_name(node)}"):
            path = prefix + (_operator_name(node) if choice.startswith("weight") else choice)
            if self.tree.find(path) is None and (path == name or not self.tree.holds(path)):
                return path
        return f"{name}_{node.name}"

    def _move(self, home: nn.Module, name: str, layer: nn.Module, layer_name: str, new: str) -> None:
        tensor = self.tensors.pop(name)
        leaf = name.rpartition(".")[2]
        _set_tensor(layer, layer_name, tensor)
        persistent = leaf not in home._non_persistent_buffers_set
        home._parameters.pop(leaf, None)
        home._buffers.pop(leaf, None)
        home._non_persistent_buffers_set.discard(leaf)
        if persistent:
            self.tree.keys.names[new] = self.tree.keys.names.pop(name, name)
        else:
            layer._non_persistent_buffers_set.add(layer_name)
        self.tensors[new] = tensor
        self.names[id(tensor)] = [new]
        self.moved[name] = new

    # -------------------------------------------------------------------------------------------- dropout
    def _place_dropout(self, node: Node, layer: nn.Module) -> str:
        """A place for dropout: its own module's, or ``<module>.dropout`` when it was called as a function."""
        home = node_path(node)
        base = path = home if home and self._is_free(home, layer) else f"{home}.dropout".lstrip(".")
        count = 0
        while not self._is_free(path, layer):
            count += 1
            path = f"{base}_{count}"
        holder = self.tree.make(path)
        if type(holder) is nn.Module:
            layer.training = holder.training
            self.tree.replace(holder, layer)
        return path

    def _is_free(self, path: str, layer: nn.Module) -> bool:
        """True when nothing but the same dropout lives at ``path``."""
        if self.tree.holds(path):
            return False
        module = self.tree.find(path)
        if module is None:
            return True
        if type(module) is nn.Module:
            return not (module._parameters or module._buffers or module._modules)
        return type(module) is type(layer) and module.extra_repr() == layer.extra_repr()

    # -------------------------------------------------------------------------------------------- graph
    def _replace(self, node: Node, path: str, inputs: list[Any], recurrent: bool = False) -> None:
        states = tuple(tuple(v) if isinstance(v, (list, tuple)) else v for v in inputs)  # LSTM takes (h, c) as a tuple
        with self.graph.inserting_before(node):
            new = self.graph.create_node("call_module", path, states, {}, name=path.replace(".", "_"))
        new.meta = dict(node.meta)
        if recurrent:
            _regroup_states(self.graph, node, new)
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)


def _set_tensor(layer: nn.Module, name: str, tensor: Tensor) -> None:
    layer._parameters.pop(name, None)
    layer._buffers.pop(name, None)
    store = layer._parameters if isinstance(tensor, nn.Parameter) else layer._buffers
    store[name] = cast(Any, tensor)


def _finished(layer: nn.Module, owner: nn.Module) -> nn.Module:
    """The layer without the skeleton's slots that got no tensor, in its owner's mode."""
    for store in (layer._parameters, layer._buffers):
        for name in [n for n, t in store.items() if isinstance(t, Tensor) and t.is_meta]:
            del store[name]
    if isinstance(layer, nn.RNNBase):
        layer._init_flat_weights()
    layer.training = owner.training
    return layer


def _schema_args(node: Node, rename: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """Arguments by schema name (or its new name), defaults filled in."""
    names = dict(rename)
    values = {}
    for i, argument in enumerate(cast(Any, node.target)._schema.arguments):
        given = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
        values[names.get(argument.name, argument.name)] = given
    return values


def _regroup_states(graph: Graph, node: Node, new: Node) -> None:
    """``aten.lstm`` returns ``(y, h, c)``, the layer ``(y, (h, c))``."""
    val = new.meta["val"]
    if len(val) != 3:
        return
    new.meta["val"] = (val[0], (val[1], val[2]))
    for user in list(node.users):
        if user.target is operator.getitem and user.args[1] in (1, 2):
            with graph.inserting_before(user):
                pair = graph.call_function(operator.getitem, (new, 1))
            pair.meta = {**user.meta, "val": (val[1], val[2])}
            user.args = (pair, cast(int, user.args[1]) - 1)


def _operator_name(node: Node) -> str:
    return str(cast(Any, node.target)._schema.name).split("::")[1]


def readable_names(graph: Graph) -> None:
    """Name function nodes after the submodule that ran them: ``layer1_0_relu`` instead of ``relu_7``."""
    for node in graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            path = node_path(node)
            name = _operator_name(node)
            stem = path if path.rpartition(".")[2] == name else f"{path}.{name}".lstrip(".")
            node._rename(re.sub(r"\W", "_", stem))


def _is_filled(slot: Any) -> bool:
    """Whether a parameter or buffer slot of a skeleton holds a real tensor."""
    return isinstance(slot, Tensor) and not slot.is_meta
