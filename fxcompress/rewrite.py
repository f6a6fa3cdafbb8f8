"""Rules and the one rewriter: match, check (or refuse with a reason), replace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg

from fxcompress.errors import PassError
from fxcompress.ir import Program, source_line
from fxcompress.passbase import Refusal

__all__ = ["Analysis", "Match", "Rule", "apply_rules", "drop_layer", "put_layer", "single_user"]


class Analysis:
    """What checks need to know about the whole program: one walk per round, so that rewriting stays linear.

    It describes the program at the start of the round. A layer that a rule puts at an old path keeps the old count.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self._module_at: dict[str, nn.Module] = {}
        self._calls: Counter[int] = Counter()
        self._readers: dict[int, set[str]] = {}
        self._tensors: list[Tensor] = []  # kept alive: an id says nothing about a freed tensor
        for node in program.graph.nodes:
            if node.op == "call_module":
                self._add_call(str(node.target), program.module(node))
            elif node.op == "get_attr":
                self._add_reader(program.tensor(node), str(node.target))

    def _add_call(self, path: str, module: nn.Module) -> None:
        self._calls[id(module)] += 1
        if path not in self._module_at:
            self._module_at[path] = module
            for tensor in (*module.parameters(), *module.buffers()):
                self._add_reader(tensor, path)

    def _add_reader(self, tensor: Tensor, name: str) -> None:
        self._tensors.append(tensor)
        self._readers.setdefault(id(tensor), set()).add(name)

    def calls(self, node: Node) -> int:
        """How often the graph calls the module of a ``call_module`` node, under whatever path."""
        module = self._module_at.get(str(node.target))
        return 1 if module is None else self._calls[id(module)]

    def shared_with(self, node: Node) -> str | None:
        """Another layer or ``get_attr`` that reads a tensor of this ``call_module`` node's own, or None."""
        path = str(node.target)
        module = self.program.module(node)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            others = self._readers.get(id(tensor), set()) - {path}
            if others:
                return min(others)
        return None


@dataclass
class Match:
    """Nodes a rule matched, by role; ``root`` is the last one in execution order."""

    root: Node
    nodes: dict[str, Any]

    def __getitem__(self, role: str) -> Any:
        return self.nodes[role]


@dataclass(frozen=True)
class Rule:
    """One rewrite.

    Attributes:
        name: Shown in reports, e.g. ``fold norm forwards``.
        match: The match whose root is the given node, or None.
        check: Why the match may not be rewritten, or None. The reason is kept in the report.
        replace: Rewrites the match; returns one line that says what was done.
    """

    name: str
    match: Callable[[Program, Node], Match | None]
    check: Callable[[Analysis, Match], str | None]
    replace: Callable[[Program, Match], str]


def apply_rules(program: Program, rules: Sequence[Rule], max_rounds: int = 100) -> tuple[list[str], list[Refusal]]:
    """Apply ``rules`` everywhere, in execution order, until nothing changes.

    Args:
        program: Rewritten in place.
        rules: Tried in this order at every node; after a rewrite the next node is looked at.
        max_rounds: More rounds than this mean that the rules undo each other.

    Returns:
        One line per rewrite, and the refusals of the last round (earlier ones may have been resolved).

    Raises:
        PassError: the rules do not come to rest.
    """
    changes: list[str] = []
    for _ in range(max_rounds):
        refusals: list[Refusal] = []
        done = _one_round(program, rules, refusals)
        if not done:
            return changes, refusals
        changes += done
    names = ", ".join(rule.name for rule in rules)
    raise PassError(40, f"the rules {names} do not come to rest", where=changes[-1], fix="a rule must not undo another")


def _one_round(program: Program, rules: Sequence[Rule], refusals: list[Refusal]) -> list[str]:
    analysis = Analysis(program)
    done = []
    for node in list(program.graph.nodes):
        if not node._erased:
            done += _apply_at(analysis, node, rules, refusals)
    if done:
        program.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    return done


def _apply_at(analysis: Analysis, node: Node, rules: Sequence[Rule], refusals: list[Refusal]) -> list[str]:
    program = analysis.program
    for rule in rules:
        match = rule.match(program, node)
        if match is None:
            continue
        reason = rule.check(analysis, match)
        if reason is None:
            return [f"{rule.name}: {rule.replace(program, match)}"]
        refusals.append(Refusal(rule.name, _where(node), reason))
    return []


def _where(node: Node) -> str:
    line = source_line(node)
    return f"{node.target if node.op == 'call_module' else node.name}" + (f" ({line})" if line else "")


def single_user(node: Node) -> bool:
    """True when exactly one node reads ``node``, once."""
    if len(node.users) != 1:
        return False
    reads: list[Node] = []
    user = next(iter(node.users))
    map_arg((user.args, user.kwargs), lambda n: reads.append(n) if n is node else None)
    return len(reads) == 1


def put_layer(program: Program, path: str, layer: nn.Module) -> None:
    """Let ``layer`` take the place of the module at ``path``."""
    parent, _, name = path.rpartition(".")
    program.gm.get_submodule(parent)._modules[name] = layer


def drop_layer(program: Program, path: str) -> None:
    """Remove the layer at ``path`` with its own tensors; what else lives below (a dropout, a PReLU's slope) stays."""
    parent, _, name = path.rpartition(".")
    below = program.gm.get_submodule(path)._modules
    if below:
        container = nn.Module()
        container._modules.update(below)
        put_layer(program, path, container)
    else:
        del program.gm.get_submodule(parent)._modules[name]
