"""Which problems to tune: the linear layers of well-known language models, or the kernel operators of a saved engine."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter

from fxcompress.errors import UsageError
from fxcompress.kernels.configs import M_BUCKETS, Problem
from fxcompress.kernels.workloads import WORKLOADS, problem_of, workload

if TYPE_CHECKING:
    from fxcompress.engines.signature import IOSignature, TensorSpec

__all__ = ["MODELS", "check_families", "problems_of_engine", "problems_of_shapes", "shapes_of"]

#: hidden size, width of the feed-forward layers, heads x head size of queries, the same of keys and values.
_SIZES: Final[dict[str, tuple[int, int, int, int]]] = {
    "gemma-2-9b": (3584, 14336, 4096, 2048),
    "llama-2-7b": (4096, 11008, 4096, 4096),
    "llama-2-13b": (5120, 13824, 5120, 5120),
    "llama-3-8b": (4096, 14336, 4096, 1024),
    "llama-3-70b": (8192, 28672, 8192, 1024),
    "llama-3.2-1b": (2048, 8192, 2048, 512),
    "llama-3.2-3b": (3072, 8192, 3072, 1024),
    "mistral-7b": (4096, 14336, 4096, 1024),
    "qwen2.5-0.5b": (896, 4864, 896, 128),
    "qwen2.5-1.5b": (1536, 8960, 1536, 256),
    "qwen2.5-3b": (2048, 11008, 2048, 256),
    "qwen2.5-7b": (3584, 18944, 3584, 512),
    "qwen2.5-14b": (5120, 13824, 5120, 1024),
    "qwen2.5-32b": (5120, 27648, 5120, 1024),
    "qwen2.5-72b": (8192, 29568, 8192, 1024),
    "smollm2-135m": (576, 1536, 576, 192),
}


def _layers(hidden: int, wide: int, queries: int, keys: int) -> tuple[tuple[int, int], ...]:
    """(N, K) of the linear layers, the largest first: up (and gate), down, queries, output, keys (and values)."""
    shapes = [(wide, hidden), (hidden, wide), (queries, hidden), (hidden, queries), (keys, hidden)]
    return tuple(dict.fromkeys(sorted(shapes, key=lambda s: -s[0] * s[1])))


#: Model -> (N, K) of its linear layers, from the sizes in its public configuration.
MODELS: Final = {name: _layers(*sizes) for name, sizes in _SIZES.items()}


def shapes_of(text: str) -> list[tuple[int, int]]:
    """(N, K) of names of models and of shapes like ``14336x4096`` (N x K), separated by commas.

    Raises:
        UsageError: a part is neither.
    """
    found: list[tuple[int, int]] = []
    for part in (p.strip().lower() for p in text.split(",") if p.strip()):
        sizes = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", part)
        if sizes:
            found.append((int(sizes[1]), int(sizes[2])))
        elif part in MODELS:
            found += MODELS[part]
        else:
            raise UsageError(461, f"no set of shapes is called {part!r}", fix=f"use NxK, or one of {', '.join(MODELS)}")
    return list(dict.fromkeys(found))


def check_families(names: Iterable[str]) -> list[str]:
    """The names, each checked; all families for none.

    Raises:
        UsageError: no family is called so.
    """
    given = [name.strip() for name in names if name.strip()]
    for name in given:
        if name not in WORKLOADS:
            raise UsageError(462, f"no kernel family is called {name!r}", fix=f"use {', '.join(WORKLOADS)}")
    return given or list(WORKLOADS)


def problems_of_shapes(
    shapes: Sequence[tuple[int, int]],
    families: Sequence[str],
    *,
    dtype: torch.dtype = torch.float16,
    group_size: int = 128,
    rows: Sequence[int] = M_BUCKETS,
) -> list[Problem]:
    """Every family at every shape and number of rows; what a family cannot compute is left out."""
    found = []
    for m in rows:
        for n, k in shapes:
            for family in families:
                made = workload(family).problem(m, n, k, dtype, group_size)
                found += [made] if made is not None else []
    return list(dict.fromkeys(found))


# ------------------------------------------------------------------------------------------------ a saved engine
def problems_of_engine(folder: Path, families: Sequence[str], *, rows: Sequence[int] = M_BUCKETS) -> list[Problem]:
    """What the kernel operators of a saved engine compute, at every number of rows.

    The graph runs on fake tensors of the captured example's shapes: nothing is computed.

    Raises:
        UsageError: it is no saved engine, or no operator of these families occurs in it.
    """
    from fxcompress.engines.program_file import GRAPH
    from fxcompress.engines.signature import IOSignature

    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        signature = IOSignature.from_dict(manifest["signature"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            463, f"{folder} is no folder saved by fxcompress", why=f"{type(error).__name__}: {error}"
        ) from error
    calls = _kernel_calls(folder, signature) if (folder / GRAPH).is_file() else []
    own = [problem for problem in calls if problem.family in families]
    if not own:
        raise UsageError(
            464,
            f"{folder} calls no kernels of the families {', '.join(families)}",
            why="its target is " + str(manifest.get("engine", "unknown")),
            fix='compile with target="triton"',
        )
    return list(dict.fromkeys(with_rows(problem, m) for m in rows for problem in own))


def with_rows(problem: Problem, m: int) -> Problem:
    """The same weights, multiplied with ``m`` rows."""
    return Problem(problem.family, m, problem.n, problem.k, problem.dtype, problem.group_size)


def _kernel_calls(folder: Path, signature: IOSignature) -> list[Problem]:
    """The problems of the graph's calls of fxcompress operators, each once."""
    from fxcompress.engines.program_file import read_graph
    from fxcompress.engines.signature import TensorSpec

    graph = read_graph(folder)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        inputs = [_fake(spec) if isinstance(spec, TensorSpec) else spec for spec in signature.inputs]
        recorder = _Recorder(graph)
        recorder.run(*inputs)
    return list(dict.fromkeys(recorder.found))


def _fake(spec: TensorSpec) -> Tensor:
    return torch.empty(spec.example, dtype=spec.torch_dtype)


class _Recorder(Interpreter):
    """Runs a graph and keeps the problems its kernel operators solve."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.found: list[Problem] = []

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record calls of this library's operators."""
        if isinstance(target, torch._ops.OpOverload) and target.namespace == "fxcompress":
            problem = problem_of(target._opname, args, kwargs)
            self.found += [problem] if problem is not None else []
        return super().call_function(target, args, kwargs)
