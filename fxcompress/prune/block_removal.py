"""Removing residual blocks, and the oracle that a removal is held to.

Removal cuts: readers of the block's output read its skip, and what is dead then goes, layers and parameters too.
The oracle masks: the dense program with the branch's result replaced by zeros, ``y = s + 0``. Nothing of the cut is
used to make it, so the two agreeing on the example is evidence (`certify`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node

from fxcompress.errors import CertificateError
from fxcompress.ir import Program, evaluating
from fxcompress.passbase import exact_tolerance, output_error
from fxcompress.prune.blocks import Block

__all__ = ["certify_removal", "mask_blocks", "remove_blocks"]

_aten = torch.ops.aten


def remove_blocks(program: Program, blocks: Sequence[Block]) -> Program:
    """A copy of ``program`` without ``blocks``: skips in their place, their own layers and parameters gone.

    A module or tensor that something else reads stays, and so do all other names of the state dict.

    Args:
        program: Left untouched.
        blocks: Blocks of this very program that can be bypassed.
    """
    new = program.clone()
    before = _targets(new)
    for output, side in _sums(new, blocks):
        skip = cast(Node, output.args[side])
        output.replace_all_uses_with(_laid_out(skip, output))
    new.recompile()
    gone = before - _targets(new)
    _Sweep(new).run([*sorted(gone), *(b.name for b in blocks)])
    return new


def mask_blocks(program: Program, blocks: Sequence[Block]) -> Program:
    """A copy of ``program`` in which the branches of ``blocks`` are computed and then replaced by zeros."""
    new = program.clone()
    for output, side in _sums(new, blocks):
        branch = cast(Node, output.args[1 - side])
        with new.graph.inserting_before(output):
            zeros = new.graph.call_function(_aten.zeros_like.default, (branch,))
        zeros.meta = {**branch.meta}
        output.replace_input_with(branch, zeros)
    new.recompile()
    return new


def certify_removal(program: Program, pruned: Program, blocks: Sequence[Block]) -> tuple[float, float]:
    """Compare ``pruned`` with the masked dense program on the example, in eval mode.

    Args:
        program: The dense program.
        pruned: What is left of it.
        blocks: The blocks that were removed.

    Returns:
        The largest output difference relative to the largest output, and the tolerance: 1e-4 in float32, 1e-9 in
        float64.

    Raises:
        CertificateError: the programs differ; names the block behind which they first do.
    """
    masked = mask_blocks(program, blocks)
    expected, got = _outputs(masked), _outputs(pruned)
    tolerance = exact_tolerance(program, expected)
    error = output_error(expected, got)
    if not error <= tolerance:
        raise CertificateError(
            20,
            f"removing blocks changed more than bypassing them (relative error {error:.3g})",
            where=_first_difference(masked, pruned, blocks, tolerance),
            why=f"the pruned program must equal the dense one whose branches give zero (tolerance {tolerance:.0e})",
            fix="certify before fine-tuning, with the program that the plan was applied to; else report this model",
        )
    return error, tolerance


def _sums(program: Program, blocks: Iterable[Block]) -> list[tuple[Node, int]]:
    """The add of each block and which of its operands is the skip, looked up before anything is changed."""
    nodes = {n.name: n for n in program.graph.nodes}
    sums = []
    for block in blocks:
        output = nodes[block.output]
        sums.append((output, [cast(Node, a).name for a in output.args].index(block.skip)))
    return sums


def _laid_out(skip: Node, output: Node) -> Node:
    """``skip``, copied to the plain layout where a view that reads ``output`` might not fit its strides."""
    a, b = skip.meta["val"], output.meta["val"]
    plain = str(_plain_strides(a.shape))
    if str(list(a.stride())) in (str(list(b.stride())), plain):  # as text: comparing sizes would guard them
        return skip
    with output.graph.inserting_before(output):
        copy = output.graph.call_function(_aten.contiguous.default, (skip,))
    copy.meta = {**output.meta}
    return copy


def _plain_strides(shape: Sequence[Any]) -> list[Any]:
    strides: list[Any] = [1] if shape else []
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return strides


def _targets(program: Program) -> set[str]:
    return {str(n.target) for n in program.graph.nodes if n.op in ("call_module", "get_attr")}


class _Sweep:
    """Deletes modules and tensors below given paths that the graph does not read."""

    def __init__(self, program: Program) -> None:
        self.root = program.gm
        called = {str(n.target) for n in program.graph.nodes if n.op == "call_module"}
        read = {str(n.target).rpartition(".")[::2] for n in program.graph.nodes if n.op == "get_attr"}
        # By object: a module at two paths keeps what is read under either.
        self.kept = {id(m) for path in called for m in self.root.get_submodule(path).modules()}
        self.leaves = {(id(self.root.get_submodule(parent)), name) for parent, name in read}

    def run(self, paths: Iterable[str]) -> None:
        """Empty what lies at ``paths``, then drop the containers that nothing is left in."""
        for path in paths:
            chain: list[nn.Module] = [self.root]
            for name in path.split("."):
                child = chain[-1]._modules.get(name)
                if child is None:
                    self._drop_tensor(chain[-1], name)
                    break
                chain.append(child)
            else:
                self._empty(chain[-1])
            self._drop_empty(chain, path.split("."))

    def _empty(self, module: nn.Module) -> None:
        if id(module) in self.kept:
            return
        for name in [*module._parameters, *module._buffers]:
            self._drop_tensor(module, name)
        for name, child in list(module._modules.items()):
            if child is not None:
                self._empty(child)
            self._drop_empty([module, *([] if child is None else [child])], [name])

    def _drop_tensor(self, module: nn.Module, name: str) -> None:
        if id(module) in self.kept or (id(module), name) in self.leaves:
            return
        for store in (module._parameters, module._buffers):
            store.pop(name, None)

    def _drop_empty(self, chain: list[nn.Module], names: list[str]) -> None:
        for parent, child, name in reversed(list(zip(chain, chain[1:], names, strict=False))):
            holds = [
                v for s in (child._modules, child._parameters, child._buffers) for v in s.values() if v is not None
            ]
            if not holds and id(child) not in self.kept:
                del parent._modules[name]


def _outputs(program: Program) -> list[Any]:
    return program.run_example()


class _Values(Interpreter):
    """Runs a program and shows every value to a function."""

    def __init__(self, program: Program, see: Callable[[Node, Any], None]) -> None:
        super().__init__(program.gm)
        self.see = see

    def run_node(self, n: Node) -> Any:
        """Run one node and show its value."""
        value = super().run_node(n)
        self.see(n, value)
        return value


def _first_difference(masked: Program, pruned: Program, blocks: Sequence[Block], tolerance: float) -> str:
    """The block behind which the values of the two programs first differ, and the node where they do."""
    order = [n.name for n in masked.graph.nodes]
    values: dict[str, Any] = {}
    _run(pruned, lambda node, value: values.__setitem__(node.name, value))
    wrong: list[str] = []

    def compare(node: Node, value: Any) -> None:
        if not wrong and isinstance(value, Tensor) and isinstance(values.get(node.name), Tensor):
            wrong.extend([node.name] if not output_error([value], [values[node.name]]) <= tolerance else [])

    _run(masked, compare)
    at = wrong[0] if wrong else order[-1]
    before = [b for b in blocks if order.index(b.output) < order.index(at)] or list(blocks)
    last = max(before, key=lambda b: order.index(b.output))
    return f"{last.name} (%{last.output}), first seen at %{at}"


def _run(program: Program, see: Callable[[Node, Any], None]) -> None:
    leaves = program.signature.flatten(*program.example)
    with torch.no_grad(), evaluating(program.gm):
        _Values(program, see).run(*leaves, enable_io_processing=False)
