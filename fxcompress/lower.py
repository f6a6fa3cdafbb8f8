"""lower(): a program as it is becomes an engine that is checked against it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch.fx import Node

from fxcompress.analysis import count_macs, count_parameters
from fxcompress.data import CalibrationData
from fxcompress.engines import Engine, Target, build_engine
from fxcompress.engines import target as find_target
from fxcompress.environment import describe, peak_memory
from fxcompress.errors import ParityError, UsageError
from fxcompress.ir import Program
from fxcompress.layers import Fused
from fxcompress.parity import Parity, check_parity, first_difference
from fxcompress.qat.program import QATProgram
from fxcompress.quant.fake_quantize import QUANTIZERS, DynamicFakeQuantize, FakeQuantize
from fxcompress.report import Report

__all__ = ["lower"]

_SAMPLES = 8


def lower(
    program: Program,
    target: str | Target,
    *,
    data: Iterable[Any] | None = None,
    threads: int | None = None,
    tolerance: float | None = None,
    engine_options: Mapping[str, Any] | None = None,
) -> Engine:
    """Build an engine of a program as it is, and compare it with what the program computes in eval mode.

    No pass runs: what is quantized, fused or pruned is what the program says. A `QATProgram` is converted first.

    Args:
        program: Any program; left untouched.
        target: ``"onnxruntime"``, ``"openvino"``, ``"triton"``, ``"torch"``, or a target.
        data: Batches to compare on (see ``fxcompress.data``), at most 8 samples of them; by default the program's example.
        threads: Threads of the engine; by default the physical cores.
        tolerance: Largest relative L2 difference of an output. By default 1e-3 for float programs and 0.02 for quantized
            ones; the latter may differ by more, as far as rounding itself changes the output, when every layer alone
            agrees: networks of few bits amplify a single rounding that falls on the other side.
        engine_options: Options of the target's ``build``, e.g. ``{"torch_compile": True}`` for ``triton``.

    Returns:
        The engine: torch in, torch out, in the model's own structure; ``engine.program`` is what it was compared with,
        ``engine.report`` has sizes, parity and notes.

    Raises:
        UsageError: no program, or an unknown target.
        PassError: a quantizer of a `QATProgram` has no range yet, or is switched off.
        MissingRuntimeError: the runtime is not installed; the pip line is given.
        EngineError: the runtime refuses the program.
        ParityError: the engine computes something else; the first layer is named.
        CalibrationError: ``data`` is empty or does not fit.
    """
    if not isinstance(program, Program):
        fix = "capture it first: fxc.lower(fxc.capture(model, (x,)), target=...)"
        raise UsageError(515, f"a {type(program).__name__} cannot be lowered", fix=fix)
    made = find_target(target) if isinstance(target, str) else target
    made.require()
    start = time.perf_counter()
    plain = program.convert() if isinstance(program, QATProgram) else program
    engine = build_engine(made, plain, threads=threads, **dict(engine_options or {}))
    built = time.perf_counter()
    samples = [plain.example] if data is None else list(CalibrationData(data).calls(plain, _SAMPLES))
    parity = _parity(engine, plain, samples, tolerance)
    seconds = {"build": round(built - start, 3), "parity": round(time.perf_counter() - built, 3)}
    engine.report = _report(engine, plain, _precision(program), parity, seconds)
    return engine


def _parity(engine: Engine, plain: Program, samples: list[Any], tolerance: float | None) -> Parity:
    """The usual gate; where rounding is amplified, every layer alone has to agree."""
    try:
        return check_parity(engine, plain, samples, tolerance=tolerance)
    except ParityError:
        quantized = any(isinstance(m, QUANTIZERS) for m in plain.gm.modules())
        if tolerance is not None or not quantized:
            raise
        found = check_parity(engine, plain, samples, reference=_without_rounding(plain))
        if found.layer_by_layer:
            return found
        for args, kwargs in samples:
            if first_difference(engine, plain, *args, **kwargs) is not None:
                raise
        return found


def _without_rounding(plain: Program) -> Program:
    """The program without its quantizers: how far rounding moves the outputs is what a difference is measured by."""
    bare = plain.clone()
    for node, module in list(bare.layers()):
        if isinstance(module, QUANTIZERS):
            node.replace_all_uses_with(cast(Node, node.args[0]))
            bare.graph.erase_node(node)
        elif isinstance(module, Fused):
            module.weight_fake_quantize = None
    bare.recompile()
    return bare


def _report(engine: Engine, plain: Program, precision: str, parity: Parity, seconds: dict[str, float]) -> Report:
    parameters, macs = count_parameters(plain), count_macs(plain)
    floats = sum(p.numel() * p.element_size() for p in plain.gm.parameters())
    left = [n.partition(" stays float: ")[::2] for n in plain.notes if " stays float: " in n]
    notes = [n for n in plain.notes if " stays float: " not in n]
    return Report(
        model="Program",
        target=engine.name,
        precision=precision,
        parameters=(parameters, parameters),
        macs=(macs, macs),
        size=(floats, engine.file_size()),
        parity=parity.to_dict(),
        memory=peak_memory(),
        left=[(name, reason) for name, reason in left],
        notes=notes + engine.notes,
        seconds=seconds,
        environment=describe(),
    )


def _precision(program: Program) -> str:
    """``int8``, or ``w4a8`` when weights or activations have fewer bits; ``float32`` (the parameters' dtype) without."""
    weights: set[int] = set()
    activations: set[int] = set()
    for node, module in program.layers():
        quantizer = module.weight_fake_quantize if isinstance(module, Fused) else module
        of_weight = isinstance(module, Fused) or cast(Node, node.args[0]).op == "get_attr"
        if isinstance(quantizer, FakeQuantize | DynamicFakeQuantize):
            (weights if of_weight else activations).add(quantizer.spec.bits)
    if not weights and not activations:
        dtypes = {p.dtype for p in program.gm.parameters() if p.is_floating_point()} or {torch.float32}
        return "/".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
    if weights == activations == {8}:
        return "int8"
    return f"w{min(weights, default=32)}a{min(activations, default=32)}"
