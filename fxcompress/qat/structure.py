"""The graph that trains: norms read by their layers, dropout kept, and where its quantizers go."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor, nn
from torch.fx import Node

from fxcompress.ir import Program
from fxcompress.passbase import Context
from fxcompress.passes import EliminateCommonSubexpressions, FuseActivations
from fxcompress.passes.cleanup import is_dropout, is_identity
from fxcompress.passes.fold_batchnorm import check_common, match_forwards
from fxcompress.qat.layers import NormSettings, TrainedFused, hold_norm, make_trained
from fxcompress.quant.placement import Placement, place
from fxcompress.quant.scheme import QuantScheme
from fxcompress.rewrite import Match, Rule, apply_rules, put_layer

__all__ = ["own_tensors", "place_in_training", "restructure"]


def own_tensors(work: Program) -> None:
    """Give the program copies of its parameters and buffers; what was one tensor stays one."""
    copies: dict[int, Tensor] = {}
    for module in work.gm.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None:
                    copies.setdefault(id(tensor), _copy(tensor))
                    setattr(module, name, copies[id(tensor)])  # an LSTM notices


def _copy(tensor: Tensor) -> Tensor:
    new = tensor.detach().clone()
    return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


def restructure(work: Program, scheme: QuantScheme) -> None:
    """What `default_passes` do, but dropout stays, and norms are read by their layers instead of being folded."""
    for node in list(work.graph.nodes):
        if is_identity(work, node) and not is_dropout(work, node):
            node.replace_all_uses_with(node.all_input_nodes[0])
            work.graph.erase_node(node)
    context = Context(scheme=scheme)
    EliminateCommonSubexpressions().run(work, context)
    apply_rules(work, (Rule("read norm", match_forwards, check_common, _attach_norm),))
    FuseActivations().run(work, context)
    for node, module in list(work.layers()):
        held = hold_norm(module)
        if held is not None and work.module(node) is module:
            put_layer(work, str(node.target), held)
        if isinstance(module, TrainedFused) and module.norm is not None:
            _read_norm(work, node, module.norm.path)
    work.recompile()


def _attach_norm(program: Program, match: Match) -> str:
    layer, norm = cast(Node, match["layer"]), cast(Node, match["norm"])
    module = cast(nn.BatchNorm2d, program.module(norm))
    settings = NormSettings(str(norm.target), module.eps, module.momentum)
    put_layer(program, str(layer.target), make_trained(program.module(layer), settings))
    norm.replace_all_uses_with(layer)
    program.graph.erase_node(norm)
    return f"{norm.target} into {layer.target}"


_ARGUMENTS = {
    "gamma": "weight",
    "beta": "bias",
    "mean": "running_mean",
    "var": "running_var",
    "count": "num_batches_tracked",
}


def _read_norm(work: Program, node: Node, path: str) -> None:
    """Give the call of a layer the tensors of its norm."""
    norm = work.gm.get_submodule(path)
    made: dict[str, Any] = {}
    with work.graph.inserting_before(node):
        for argument, name in _ARGUMENTS.items():
            tensor = getattr(norm, name)
            made[argument] = None if tensor is None else work.graph.get_attr(f"{path}.{name}")
            read = made[argument]
            if read is not None:
                mode = node.meta["val"].fake_mode
                read.meta["val"] = mode.from_tensor(tensor.detach(), static_shapes=True)
    node.kwargs = made


def place_in_training(work: Program, scheme: QuantScheme, ignore: tuple[str, ...]) -> Placement:
    """The placement for the program without dropout, in terms of the one with it."""
    bare = work.clone()
    for node in list(bare.graph.nodes):
        if is_dropout(bare, node):
            node.replace_all_uses_with(node.all_input_nodes[0])
            bare.graph.erase_node(node)
    found = place(bare, scheme, ignore)
    own = {n.name: n for n in work.graph.nodes}
    values: dict[Node, list[Node]] = {}
    behind: dict[Node, list[Node]] = {}
    for value, users in found.values.items():
        parts = dict(_split(work, own[value.name], {own[u.name] for u in users}))
        values |= parts
        behind[value] = list(parts)
    groups = [[new for value in group for new in behind[value]] for group in found.groups]
    leaders = {group[0]: new[0] for group, new in zip(found.groups, groups, strict=True)}
    same_scale = [[leaders[value] for value in values_] for values_ in found.same_scale]
    return Placement([own[n.name] for n in found.layers], values, groups, same_scale, found.left)


def _split(work: Program, value: Node, readers: set[Node]) -> Iterator[tuple[Node, list[Node]]]:
    """Where a value that ``readers`` want quantized is to be quantized, and for which direct users.

    That is in front of a dropout, which would widen the range in training, unless others read it too.
    """
    direct, mixed = [], []
    for user in value.users:
        ends = set(_behind_dropout(work, user))
        if ends <= readers:
            direct.append(user)
        elif ends & readers:
            mixed.append(user)
    if direct:
        yield value, direct
    for dropout in mixed:
        yield from _split(work, dropout, readers)


def _behind_dropout(work: Program, node: Node) -> Iterator[Node]:
    if not is_dropout(work, node):
        yield node
        return
    for user in node.users:
        yield from _behind_dropout(work, user)
