"""Transfer functions by operator and by layer class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.fx import Node

from fxcompress.prune.flow import Flow

__all__ = ["LAYERS", "OPERATORS", "Transfer", "arguments", "layer", "operator"]

#: Takes the state and a node; returns what the node yields: a Value, a list of them, or None.
Transfer = Callable[[Flow, Node], Any]

OPERATORS: dict[Any, Transfer] = {}
LAYERS: dict[type[nn.Module], Transfer] = {}


def operator(*names: str) -> Callable[[Transfer], Transfer]:
    """Register a transfer for all overloads of ATen operators."""

    def register(function: Transfer) -> Transfer:
        for name in names:
            packet = getattr(torch.ops.aten, name, None)
            if packet is not None:
                OPERATORS[packet] = function
        return function

    return register


def layer(*classes: type[nn.Module]) -> Callable[[Transfer], Transfer]:
    """Register a transfer for layer classes and their subclasses."""

    def register(function: Transfer) -> Transfer:
        for cls in classes:
            LAYERS[cls] = function
        return function

    return register


def arguments(node: Node) -> dict[str, Any]:
    """Arguments of an ATen call by the names of its schema, defaults put in."""
    schema = cast(Any, node.target)._schema
    found = {}
    for index, argument in enumerate(schema.arguments):
        given = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
        found[argument.name] = given
    return found
