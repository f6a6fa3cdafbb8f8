"""Parity: does the engine compute what the simulated graph computes? And where do two of them part?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

from fxcompress.differences import ErrorSums, Row
from fxcompress.engines import Engine
from fxcompress.errors import ParityError, UsageError
from fxcompress.ir import Program, evaluating, source_line
from fxcompress.lowering.builder import tap_names
from fxcompress.precise import summation_error
from fxcompress.quant.fake_quantize import QUANTIZERS, FakeQuantize

__all__ = ["Comparison", "Parity", "Row", "check_parity", "compare", "first_difference"]

#: Float graphs: kernels differ in the order of float32 sums, which costs 1e-7 to 1e-5 in relative L2 on real networks
#: (1e-4 in very deep ones); a wrong weight, axis or constant costs 1e-2 and more.
FLOAT_TOLERANCE = 1e-3
#: Where the graph rounds every value to 16 bits and an engine perhaps none: some ten roundings add up.
HALF_TOLERANCES = {torch.float16: 5e-3, torch.bfloat16: 0.04}
#: Quantized graphs: sums that differ in the last bit land on the other side of a rounding tie (1 to 5 values in 10,000 of
#: a layer), and the flipped steps spread through the layers behind. Small or below half the quantization error is fine.
QUANTIZED_TOLERANCE = 0.02
QUANTIZED_SHARE = 0.5
#: Up to this share a network may amplify flips as it amplifies the quantization error itself (two independent roundings of
#: one network are sqrt(2) times their own error apart); then every layer alone must agree.
QUANTIZED_LIMIT = 1.5
#: An engine may be that many times as far from the simulation as this is from itself in double precision: flips in both.
SUMMATION_LIMIT = 2.0
#: One layer alone, fed with the engine's own inputs: nothing accumulates, only ties flip (measured: below 1e-3).
LAYER_TOLERANCE = 0.01
#: A value that near to a rounding tie, relative to the largest one, may fall on either side: float32 sums differ by 1e-5,
#: and engines round a bias to the grid of their sums. Few values are, unless a channel is constant over an image.
TIE = 2e-5

Subject = Engine | Program | nn.Module


@dataclass
class Comparison:
    """Outputs, and inner points that both sides have, side by side; inner points come in execution order."""

    rows: list[Row] = field(default_factory=list)

    def outputs(self) -> list[Row]:
        """The rows of the outputs."""
        return [r for r in self.rows if r.kind == "output"]

    def worst(self) -> Row:
        """The row with the largest relative error."""
        return max(self.rows, key=lambda r: r.rel_l2)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"rows": [asdict(r) for r in self.rows]}

    def __str__(self) -> str:
        width = max([len(r.name) for r in self.rows] + [4])
        head = f"{'name':{width}}  {'max abs':>10}  {'rel. L2':>9}  {'SQNR dB':>8}  {'cosine':>9}"
        lines = [
            f"{r.name:{width}}  {r.max_abs:10.3g}  {r.rel_l2:9.2e}  {r.sqnr_db:8.1f}  {r.cosine:9.6f}"
            for r in self.rows
        ]
        return "\n".join([head, *lines])


def compare(a: Subject, b: Subject, *args: Any, **kwargs: Any) -> Comparison:
    """Run two of engine, program and module on the same inputs and compare them, ``b`` being the reference.

    Args:
        a: Engine, program or module.
        b: The reference.
        *args: Inputs.
        **kwargs: Keyword inputs.

    Returns:
        Inner points both have under the same name and shape, in execution order, then the outputs.

    Raises:
        UsageError: the outputs are not built alike.
    """
    inner_a, inner_b = (_inner(s, args, kwargs) for s in (a, b))
    shared = [n for n in inner_a if n in inner_b and inner_a[n].shape == inner_b[n].shape]
    rows = [Row.of(n, "inner", inner_a[n], inner_b[n]) for n in shared]
    del inner_a, inner_b
    outputs_a, outputs_b = (dict(_outputs(s, args, kwargs)) for s in (a, b))
    if len(outputs_a) != len(outputs_b):
        raise UsageError(
            73, "the two give different numbers of outputs", why=f"{list(outputs_a)} and {list(outputs_b)}"
        )
    pairs = zip(outputs_b, outputs_a.values(), outputs_b.values(), strict=True)
    return Comparison(rows + [Row.of(name, "output", x, y) for name, x, y in pairs])


def _outputs(subject: Subject, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    with torch.no_grad():
        if isinstance(subject, Engine):
            result = subject(*args, **kwargs)
        else:
            with evaluating(subject.gm if isinstance(subject, Program) else subject):
                result = subject(*args, **kwargs)
    for path, value in pytree.tree_flatten_with_path(result)[0]:
        if isinstance(value, Tensor):
            yield "output" + pytree.keystr(path), value


def _inner(subject: Subject, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    if isinstance(subject, Engine):
        return subject.taps(None, *args, **kwargs)
    if not isinstance(subject, Program):
        return {}
    recorder = _Recorder(subject)
    recorder.run_program(args, kwargs)
    return recorder.found


class _Recorder(Interpreter):
    """Runs a program and keeps the tensor of every layer and operator by tap name."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.gm)
        self.program = program
        self.names = tap_names(program)
        self.found: dict[str, Tensor] = {}

    def run_program(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run on a call's inputs."""
        leaves = self.program.signature.flatten(args, kwargs)
        with torch.no_grad(), evaluating(self.program.gm):
            self.run(*leaves, enable_io_processing=False)

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor) and n.op in ("call_module", "call_function"):
            return self.seen(n, result)
        return result

    def seen(self, node: Node, value: Tensor) -> Tensor:
        """Called for every value; what it returns is what later nodes read."""
        self.found[self.names[node]] = value
        return value


# ------------------------------------------------------------------------------------------------ the gate
@dataclass(frozen=True)
class Parity:
    """Result of the gate.

    Attributes:
        error: Relative L2 difference between engine and simulation, the worst output over all samples.
        tolerance: What was allowed.
        quantization_error: The same between simulation and float32 reference; None without one.
        samples: How many samples were compared.
        layer_by_layer: The network amplifies rounding: outputs differ by more than usual, every single layer agrees.
    """

    error: float
    tolerance: float
    quantization_error: float | None
    samples: int
    layer_by_layer: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def check_parity(
    engine: Engine,
    program: Program,
    samples: Iterable[Any],
    *,
    reference: Program | None = None,
    tolerance: float | None = None,
) -> Parity:
    """Compare an engine with the graph it was built from; raise when they part.

    Args:
        engine: The engine.
        program: The simulation.
        samples: Batches: a tensor, a tuple of positional inputs, a dict of keyword inputs, or ``(args, kwargs)``.
        reference: The float32 program; its distance to the simulation is the yardstick for a quantized one.
        tolerance: Largest relative L2 difference of any output. Default: 1e-3 for float32 graphs, 5e-3 for float16, 0.04
            for bfloat16, for quantized ones 0.02 or half the quantization error; except in float32 also 1.5 times the
            error of rounding, or for quantized ones twice what the order of summation changes in the simulation itself,
            when every single layer, fed with the engine's own inputs, agrees with the simulation.

    Raises:
        ParityError: beyond tolerance; names the first layer whose result differs when fed the engine's own inputs.
        UsageError: there is no sample.
    """
    sums = ErrorSums()
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    count, worst = 0, (-1.0, None)
    for sample in samples:
        args, kwargs = as_call(sample)
        calls.append((args, kwargs))
        got, simulated = (dict(_outputs(s, args, kwargs)) for s in (engine, program))
        exact = None if reference is None else dict(_outputs(reference, args, kwargs))
        error = sums.add(list(got.values()), list(simulated.values()), None if exact is None else list(exact.values()))
        worst = max(worst, (error, sample), key=lambda w: w[0])
        count += 1
    if not count:
        raise UsageError(74, "there is no sample to compare engine and graph on", fix="give at least one batch")
    error, noise = sums.error(), sums.noise() if reference is not None else None
    quantized, plain = any(isinstance(m, QUANTIZERS) for m in program.gm.modules()), _plain_tolerance(program)
    allowed = tolerance if tolerance is not None else _tolerance(plain, quantized, noise)
    if error <= allowed:
        return Parity(error, allowed, noise, count)
    args, kwargs = as_call(worst[1])
    found = first_difference(engine, program, *args, **kwargs)
    limit = QUANTIZED_LIMIT * (noise or 0.0) if tolerance is None and (quantized or plain > FLOAT_TOLERANCE) else 0.0
    if found is None and limit and quantized and error > limit:
        limit = max(limit, SUMMATION_LIMIT * _summation(program, calls))
    if found is None and error <= limit:
        return Parity(error, limit, noise, count, layer_by_layer=True)
    raise _parted(engine, found, error, max(allowed, limit if found is None else 0.0))


def _summation(program: Program, calls: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> float:
    try:
        return summation_error(program, calls)
    except RuntimeError:  # an operator has no double precision: nothing more is allowed
        return 0.0


def as_call(sample: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A sample as positional and keyword inputs."""
    if isinstance(sample, Mapping):
        return (), dict(sample)
    if isinstance(sample, tuple) and len(sample) == 2 and isinstance(sample[0], tuple) and isinstance(sample[1], dict):
        return sample[0], sample[1]
    return tuple(sample) if isinstance(sample, (tuple, list)) else (sample,), {}


def _plain_tolerance(program: Program) -> float:
    dtypes = {v.dtype for n in program.graph.nodes if isinstance(v := n.meta.get("val"), Tensor)}
    return max([FLOAT_TOLERANCE, *(HALF_TOLERANCES[d] for d in dtypes if d in HALF_TOLERANCES)])


def _tolerance(plain: float, quantized: bool, noise: float | None) -> float:
    return max(plain, QUANTIZED_TOLERANCE, QUANTIZED_SHARE * (noise or 0.0)) if quantized else plain


# ------------------------------------------------------------------------------------------------ where they part
@dataclass(frozen=True)
class Difference:
    """One point where engine and simulation part although both saw the same inputs."""

    name: str
    layers: tuple[str, ...]
    error: float
    where: str

    def __str__(self) -> str:
        through = f" (value {self.name})" if self.layers and self.name not in self.layers else ""
        place = " + ".join(self.layers) or self.name
        return f"{place}{through}, error {self.error:.3g}" + (f", {self.where}" if self.where else "")


def first_difference(
    engine: Engine, program: Program, *args: Any, tolerance: float = LAYER_TOLERANCE, **kwargs: Any
) -> Difference | None:
    """The first layer, in execution order, that the engine computes differently.

    The program is run node by node; after each tapped point the engine's own value is put in place of the simulated
    one, so that every layer is compared on the engine's inputs and nothing accumulates.

    Args:
        engine: The engine.
        program: The simulation.
        *args: Inputs.
        tolerance: Relative L2 difference of one layer's result that counts as parting.
        **kwargs: Keyword inputs.
    """
    checker = _Checker(engine, program, tolerance, args, kwargs)
    checker.run_program(args, kwargs)
    return checker.first


class _Checker(_Recorder):
    def __init__(self, engine: Engine, program: Program, tolerance: float, args: Any, kwargs: Any) -> None:
        super().__init__(program)
        quantized = {self.names[n] for n, m in program.layers() if isinstance(m, QUANTIZERS)}
        points = [t for t in engine.tap_names() if t in quantized] or engine.tap_names()
        self.own = engine.taps(points, *args, **kwargs)
        engine.release(taps_only=True)
        self.tolerance = tolerance
        self.first: Difference | None = None

    def seen(self, node: Node, value: Tensor) -> Tensor:
        engine_value = self.own.get(self.names[node])
        if engine_value is None:
            return value
        error = Row.of("", "", engine_value, value).rel_l2
        if self.first is None and not error <= self.tolerance:
            error = Row.of("", "", engine_value, self._ties_broken(node, value, engine_value)).rel_l2
        if self.first is None and not error <= self.tolerance:
            self.first = Difference(self.names[node], tuple(self._layers(node)), error, source_line(node))
        return engine_value.to(value.dtype) if engine_value.shape == value.shape else value

    def _ties_broken(self, node: Node, value: Tensor, engine_value: Tensor) -> Tensor:
        """``value``, with the engine's where its input is so near to a rounding tie that either side is right."""
        quantizer = self.program.module(node) if node.op == "call_module" else None
        if not isinstance(quantizer, FakeQuantize) or quantizer.scale.numel() != 1 or engine_value.shape != value.shape:
            return value
        x, value, engine_value = self.env[node.all_input_nodes[0]].float(), value.float(), engine_value.float()
        largest = value.abs().max()  # on the grid: an input far beyond it allows nothing more
        if not bool(largest.isfinite()):
            return value
        margin = torch.minimum(TIE * largest, quantizer.scale.float() / 4)
        for side in (quantizer(x - margin), quantizer(x + margin)):
            same = torch.isclose(engine_value, side.float(), rtol=1e-5, atol=1e-6 * float(largest))
            value = torch.where(same, engine_value, value)
        return value

    def _layers(self, node: Node) -> list[str]:
        """Layers between this point and the tapped points before it, in execution order."""
        found: list[str] = []
        queue, met = [node], {node}
        while queue:
            current = queue.pop()
            if current.op == "call_module" and not isinstance(self.program.module(current), QUANTIZERS):
                found.append(str(current.target))
            for source in current.all_input_nodes:
                if source not in met and self.names.get(source) not in self.own:
                    met.add(source)
                    queue.append(source)
        return found[::-1]


def _parted(engine: Engine, found: Difference | None, error: float, allowed: float) -> ParityError:
    where = f"first difference at {found}" if found else "no single layer stands out: small differences add up"
    return ParityError(
        1,
        f"the {engine.name} engine gives other numbers than the simulated graph (relative error {error:.3g})",
        where=where,
        why=f"at most {allowed:.3g} is allowed",
        fix="leave that layer out of quantization (ignore=...), or report it with fxc.compare(engine, program, x)",
    )
