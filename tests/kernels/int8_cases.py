"""What the tests of the int8 kernels share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from fxcompress.kernels.configs import ASSUMED, Config
from fxcompress.ops import KernelOp, kernel_op
from tests.kernels.cases import device, error


def integers(*shape: int, low: int = -128, high: int = 128, seed: int = 0) -> Tensor:
    """Random int8."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randint(low, high, shape, generator=generator, dtype=torch.int8).to(device())


def floats(*shape: int, seed: int = 0) -> Tensor:
    """Random float32 from 0.01 to 0.02."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (0.01 + 0.01 * torch.rand(shape, generator=generator)).to(device())


def fenced(values: Tensor, sentinel: int = 127) -> Tensor:
    """The same values, contiguous, in the middle of memory full of ``sentinel``: what is read beside them shows."""
    fence = 4096
    memory = torch.full((values.numel() + 2 * fence,), sentinel, dtype=values.dtype, device=values.device)
    inside = memory[fence : fence + values.numel()].view(values.shape)
    return inside.copy_(values)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """New tensors are full of NaN, or the largest integer, until something is written to them."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(4).isnan().all() and (torch.ones(1).new_empty((4,), dtype=torch.int32) > 1 << 30).all()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def tuples(value: Any) -> tuple[Tensor, ...]:
    """The tensors of a result."""
    return value if isinstance(value, tuple) else (value,)


def close(op: KernelOp, got: Any, expected: Any) -> None:
    """Same shapes, dtypes and strides, and values within the operator's tolerance; int32 exactly."""
    for ours, theirs in zip(tuples(got), tuples(expected), strict=True):
        assert (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, theirs.dtype, theirs.stride())
        if ours.dtype == torch.int32:
            assert torch.equal(ours, theirs)
        elif ours.numel() and theirs.count_nonzero():
            assert error(ours, theirs) <= op.tolerance[ours.dtype]
        else:
            assert torch.equal(ours, theirs)


def every_tile(choose: Callable[..., Config], problems: Sequence[Any]) -> list[Config]:
    """What a heuristic chooses on the devices we know; K in two parts stands for any split.

    Without a GPU, warps and stages make no difference, and configurations that differ in them only are one.
    """
    found = [choose(problem, gpu) for gpu in ASSUMED.values() for problem in problems]
    found = [replace(c, split_k=min(c.split_k, 2)) for c in found]
    if device() == "cpu":
        found = [replace(c, num_warps=4, num_stages=4) for c in found]
    return list(dict.fromkeys(found))


def check_contract(name: str) -> None:
    """The operator's samples: kernel against reference, the registration, ``torch.compile``."""
    op = kernel_op(name)
    for place, arguments in enumerate(op.samples(device())):
        with poisoned():
            close(op, op.launch(*arguments), op.reference(*arguments))
        if place < 3:
            torch.library.opcheck(op.overload, arguments)

    torch._dynamo.reset()
    overload = op.overload
    compiled = torch.compile(lambda *given: overload(*given), fullgraph=True, dynamic=True, backend="aot_eager")
    for arguments in islice(op.samples("cpu"), 2):
        for ours, theirs in zip(tuples(compiled(*arguments)), tuples(op.reference(*arguments)), strict=True):
            assert torch.equal(ours, theirs)


class Wrapped(torch.nn.Module):
    """A module that calls an operator with its first argument, for export."""

    def __init__(self, op: Any, rest: tuple[Any, ...]) -> None:
        super().__init__()
        self.op, self.rest = op, rest

    def forward(self, x: Tensor) -> Any:
        return self.op(x, *self.rest)


def check_export(name: str, arguments: tuple[Any, ...], larger: Tensor) -> None:
    """Exported with a dynamic first dimension, the operator is one node and takes another number of rows."""
    op = kernel_op(name)
    module = Wrapped(op.overload, arguments[1:])
    exported = torch.export.export(module, (arguments[0],), dynamic_shapes={"x": {0: torch.export.Dim("rows", min=2)}})
    assert [n.target for n in exported.graph.nodes if n.op == "call_function"].count(op.overload) == 1
    got = exported.module()(larger)
    for ours, theirs in zip(tuples(got), tuples(op.reference(larger, *arguments[1:])), strict=True):
        assert torch.equal(ours, theirs)


def check_graph_and_streams(run: Callable[[Tensor], Any], x: Tensor) -> None:
    """On a GPU: the same bits again, captured in a CUDA graph and replayed, and on two streams at once."""
    expected = [t.clone() for t in tuples(run(x))]

    def same(got: Any) -> None:
        assert all(torch.equal(a, b) for a, b in zip(tuples(got), expected, strict=True))

    for _ in range(3):
        same(run(x))
    graph, held = torch.cuda.CUDAGraph(), torch.zeros_like(x)
    with torch.cuda.graph(graph):
        captured = run(held)
    held.copy_(x)
    graph.replay()
    torch.cuda.synchronize()
    same(captured)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = []
    for stream in streams:
        with torch.cuda.stream(stream):
            results.append(run(x))
    torch.cuda.synchronize()
    for got in results:
        same(got)


def refused(number: int, call: Callable[..., Any], *arguments: Any, match: str = "", **named: Any) -> None:
    """Raises that error, saying what ``match`` says."""
    from fxcompress.errors import UsageError

    with pytest.raises(UsageError, match=match) as caught:
        call(*arguments, **named)
    assert caught.value.id == f"FXC-USAGE-{number}"
