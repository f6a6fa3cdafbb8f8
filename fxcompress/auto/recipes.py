"""What is tried: families of recipes with the same kernels, so the same speed, from the plain one to its repairs."""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Sequence
from dataclasses import dataclass

from fxcompress.analysis import Shapes, node_macs
from fxcompress.auto.options import AutoSearch
from fxcompress.engines import Target
from fxcompress.ir import Program
from fxcompress.passbase import Pass
from fxcompress.passes import (
    AdaRound,
    Cast,
    EqualizeLayers,
    QuantizeDynamic,
    QuantizeStatic,
    QuantizeWeights,
    SmoothQuant,
)
from fxcompress.quant.placement import layer_kind

__all__ = ["Family", "Recipe", "families", "with_layers_raised"]

#: Engines that compute 16-bit programs in float32, so that a cast only saves memory.
_WIDE = ("onnxruntime", "openvino", "torch")


@dataclass(frozen=True)
class Recipe:
    """Passes behind fusion, with a name."""

    name: str
    passes: tuple[Pass, ...]


@dataclass(frozen=True)
class Family:
    """Recipes that lead to the same kernels, the cheapest first; the later ones defend the accuracy better."""

    name: str
    recipes: tuple[Recipe, ...]
    static: bool = False


def families(
    plain: Program, target: Target, has_data: bool, options: AutoSearch
) -> tuple[list[Family], list[tuple[str, str]]]:
    """What is worth a trial for this program on this target, and what is not: name and reason.

    Args:
        plain: The fused float program.
        target: Where it is to run.
        has_data: There is calibration data.
        options: What is asked for.
    """
    conv, linear = _products(plain)
    found: list[Family] = []
    left: list[tuple[str, str]] = []
    text = linear > conv
    if conv + linear and has_data:
        found.append(_static(text))
    elif conv + linear:
        left.append(("static INT8", "not tried: it needs calibration data"))
    if text:
        found += _for_linear_layers(has_data)
    elif conv + linear:
        left.append(("dynamic INT8, INT4 and INT8 weights", "not tried: linear layers are the smaller part"))
    if target.name not in _WIDE or options.wants_small:
        found.append(Family("FP16", (Recipe("FP16", (Cast("fp16"),)),)))
        found.append(Family("BF16", (Recipe("BF16", (Cast("bf16"),)),)))
    else:
        left.append(("FP16, BF16", f"not tried: {target.name} computes them in float32, which gains no time"))
    return found, left


def _products(program: Program) -> tuple[int, int]:
    """Multiply-accumulates of convolutions and of linear layers."""
    shapes = Shapes(program)
    totals = {True: 0, False: 0}
    for node in program.graph.nodes:
        kind = layer_kind(program, node)
        if kind is not None:
            totals[kind == "linear"] += node_macs(program, node, shapes)
    return totals[False], totals[True]


def _static(text: bool) -> Family:
    plain, repair = QuantizeStatic(), AdaRound()
    smooth = (Recipe("static INT8, SmoothQuant", (SmoothQuant(alpha="auto"), plain)),) if text else ()
    recipes = (
        Recipe("static INT8", (plain,)),
        *smooth,
        Recipe("static INT8, equalized", (EqualizeLayers(), plain)),
        Recipe("static INT8, AdaRound", (plain, repair)),
    )
    return Family("static INT8", recipes, static=True)


def _for_linear_layers(has_data: bool) -> list[Family]:
    """Without calibration data there are no repairs."""
    four = QuantizeWeights(bits=4, group_size=32, fit="adjust")
    repaired = dataclasses.replace(four, method="gptq")
    dynamic = QuantizeDynamic()

    def family(name: str, passes: tuple[Pass, ...], repair: str, repairs: tuple[Pass, ...]) -> Family:
        second = (Recipe(f"{name}, {repair}", repairs),) if has_data else ()
        return Family(name, (Recipe(name, passes), *second))

    smooth = SmoothQuant(alpha="auto", activations="token")
    return [
        family("dynamic INT8", (dynamic,), "SmoothQuant", (smooth, dynamic)),
        family("INT4 weights, dynamic INT8 activations", (four, dynamic), "GPTQ", (repaired, dynamic)),
        family("INT4 weights", (four,), "GPTQ", (repaired,)),
        Family("INT8 weights", (Recipe("INT8 weights", (QuantizeWeights(bits=8),)),)),
    ]


def with_layers_raised(passes: Sequence[Pass], names: Sequence[str]) -> tuple[Pass, ...]:
    """The same passes with some layers one step up: from INT4 weights to INT8 ones, from those to floating point."""
    if not names:
        return tuple(passes)
    wanted = tuple(glob.escape(name) for name in names)
    raised: list[Pass] = []
    done = False
    for step in passes:
        if isinstance(step, QuantizeWeights) and not done:
            raised.append(dataclasses.replace(step, ignore=step.ignore + wanted))
            if step.bits < 8:
                raised.append(QuantizeWeights(bits=8, include=wanted))
            done = True
        elif isinstance(step, QuantizeStatic | QuantizeDynamic) and not done:
            raised.append(dataclasses.replace(step, ignore=step.ignore + wanted))
        elif isinstance(step, Cast):
            raised.append(dataclasses.replace(step, keep=step.keep + wanted))
        else:
            raised.append(step)
    return tuple(raised)
