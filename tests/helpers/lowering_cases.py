"""One operator at a time: captured, lowered, run in an engine, compared with torch eager at two batch sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxcompress.capture import capture
from fxcompress.engines import target
from fxcompress.errors import FxcError
from fxcompress.ir import Program
from fxcompress.lowering import PortableModel, lower

#: The engines, as parameters that carry their marker.
ENGINES = [pytest.param(name, marks=getattr(pytest.mark, name)) for name in ("onnxruntime", "openvino")]


@dataclass(frozen=True)
class Case:
    """A function or module with its inputs; dimension 0 of all inputs of equal size is the batch.

    Attributes:
        name: Shown when it fails.
        fn: What is captured.
        inputs: For two samples.
        exporter: torch's exporter has to lower it: the table cannot.
        fixed: The batch cannot be dynamic.
        static: Capture with fixed sizes.
        only: The one engine that can do this.
    """

    name: str
    fn: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    exporter: bool = False
    fixed: bool = False
    static: bool = False
    only: str = ""

    @property
    def alone(self) -> bool:
        """Needs a program of its own."""
        return self.exporter or self.fixed or self.static


def case(name: str, fn: Callable[..., Any], *inputs: Tensor, **options: Any) -> Case:
    """A named case."""
    return Case(name, fn, inputs, **options)


def alone(cases: list[Case]) -> list[Any]:
    """Pytest parameters of the cases that need a program of their own."""
    return [pytest.param(c, id=c.name.replace(" ", "_")) for c in cases if c.alone]


def floats(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def positive(*shape: int, seed: int = 0) -> Tensor:
    return floats(*shape, seed=seed).abs() + 0.1


def ints(*shape: int, low: int = -9, high: int = 10, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def bools(*shape: int, seed: int = 0) -> Tensor:
    return floats(*shape, seed=seed) > 0


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *args: Tensor) -> Any:
        return self.fn(*args)


def module_of(fn: Callable[..., Any]) -> nn.Module:
    return (fn if isinstance(fn, nn.Module) else Function(fn)).eval()


def grown(inputs: tuple[Tensor, ...], program: Program) -> tuple[Tensor, ...]:
    """Three samples: those given, and the first once more, where the program lets the size vary."""
    found = []
    for x, node in zip(inputs, program.placeholders(), strict=True):
        free = isinstance(node.meta["val"].shape[0], torch.SymInt) if x.dim() else False
        found.append(torch.cat([x, x[:1]]) if free else x)
    return tuple(found)


def assert_equal(got: Any, expected: Any) -> None:
    """Same structure, dtypes and shapes; integers exactly, floats to 1e-4."""
    mine = pytree.tree_leaves(got)
    assert pytree.tree_structure(got) == pytree.tree_structure(expected), "another structure"
    for (path, y), x in zip(pytree.tree_leaves_with_path(expected), mine, strict=True):
        where = pytree.keystr(path)
        if not isinstance(y, Tensor):
            assert x == y, where
            continue
        assert x.dtype == y.dtype, f"{where}: {x.dtype} instead of {y.dtype}"
        assert x.shape == y.shape, f"{where}: {list(x.shape)} instead of {list(y.shape)}"
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5, equal_nan=True, msg=f"{where}: {x} instead of {y}")


class Together(nn.Module):
    """Many functions in one module: a dict of their results."""

    def __init__(self, cases: list[Case]) -> None:
        super().__init__()
        self.cases = cases
        self.layers = nn.ModuleList(module_of(c.fn) for c in cases)
        distinct = {id(x): x for c in cases for x in c.inputs}
        self.inputs = tuple(distinct.values())
        places = {key: i for i, key in enumerate(distinct)}
        self.places = [[places[id(x)] for x in c.inputs] for c in cases]

    def forward(self, *inputs: Tensor) -> dict[str, Any]:
        taken = zip(self.cases, self.layers, self.places, strict=True)
        return {c.name: layer(*(inputs[i] for i in places)) for c, layer, places in taken}


def check_all(cases: list[Case], engine_name: str) -> None:
    """Check cases in one program, which takes a fraction of the time; when that fails, one by one to say which."""
    together = [c for c in cases if not c.alone and c.only in ("", engine_name)]
    assert len({c.name for c in cases}) == len(cases), "every case needs a name of its own"
    model = Together(together)
    try:
        check(Case("together", model, model.inputs), engine_name)
    except (AssertionError, FxcError) as error:
        failed = {c.name: why for c in together if (why := _failure(c, engine_name))}
        text = "\n".join(f"{name}: {why}" for name, why in failed.items())
        raise AssertionError(text or f"only together: {error}") from error


def _failure(found: Case, engine_name: str) -> str:
    try:
        check(found, engine_name)
    except (AssertionError, FxcError) as error:
        return str(error)[:300] or "failed"
    return ""


def check(found: Case, engine_name: str = "onnxruntime") -> PortableModel:
    """Lower ``found`` and compare the engine with eager at batch 2 and 3."""
    model = module_of(found.fn)
    program = capture(model, found.inputs, dynamic_batch=not found.static, verify=False)
    free = any(program.dynamic_dims().values())
    assert free != (found.fixed or found.static), "the batch is fixed" if not free else "the batch is dynamic"
    portable = lower(program)
    by_exporter = any("exporter" in note for note in portable.notes)
    assert by_exporter == found.exporter, portable.notes or "lowered by the table"
    engine = target(engine_name).build(portable, threads=1)
    for inputs in (found.inputs, grown(found.inputs, program)):
        with torch.no_grad():
            expected = model(*inputs)
        assert_equal(engine(*inputs), expected)
    return portable
