"""The peers' INT8 engines: NNCF for OpenVINO, ONNX Runtime's static and dynamic quantization.

Each recipe says everything it does in its fields, which go into the result files. Which recipe is a peer's best is
decided by measuring: the most accurate one on the benchmark's own evaluation data, the fastest one in the race.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt

from benchmarks import export
from benchmarks.harness import Contestant, Json
from benchmarks.models import Calibration, Model, work_folder

FLOAT: Final = 1
"""ONNX's number for float32, for ONNX Runtime's quantizer: shape inference does not know its fused operators."""
MATMULS: Final = ("MatMul", "Gemm", "Attention")


@dataclass(frozen=True)
class Nncf:
    """``nncf.quantize`` of a model converted to OpenVINO from torch.

    Attributes:
        preset: ``"performance"``: symmetric activations; ``"mixed"``: asymmetric ones; ``None``: NNCF's default.
        transformer: ``model_type=TRANSFORMER``.
        fast_bias: Fast bias correction (NNCF's default) or the thorough one.
        overflow_fix: ``"enable"``: 7-bit weights everywhere, ``"first_layer_only"``, ``"disable"``; ``None``: default.
        smooth: SmoothQuant's alpha for MatMul, ``None``: NNCF's default.
    """

    preset: str | None = None
    transformer: bool = False
    fast_bias: bool = True
    overflow_fix: str | None = None
    smooth: float | None = None

    runtime = "openvino"

    @property
    def name(self) -> str:
        """The recipe in a few words."""
        parts = [self.preset or "default", "transformer" * self.transformer, "thorough-bias" * (not self.fast_bias)]
        parts += [f"overflow-{self.overflow_fix}" if self.overflow_fix else ""]
        parts += [f"smooth-{self.smooth}" if self.smooth is not None else ""]
        return "NNCF " + " ".join(part for part in parts if part)

    def arguments(self, count: int) -> dict[str, Any]:
        """Keyword arguments of ``nncf.quantize``."""
        import nncf
        from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, AdvancedSmoothQuantParameters

        advanced = AdvancedQuantizationParameters()
        if self.overflow_fix is not None:
            advanced.overflow_fix = nncf.OverflowFix(self.overflow_fix)
        if self.smooth is not None:
            advanced.smooth_quant_alphas = AdvancedSmoothQuantParameters(matmul=self.smooth)
        return {
            "preset": nncf.QuantizationPreset(self.preset) if self.preset else None,
            "model_type": nncf.ModelType.TRANSFORMER if self.transformer else None,
            "fast_bias_correction": self.fast_bias,
            "subset_size": count,
            "advanced_parameters": advanced,
        }

    def build(self, model: Model, count: int) -> Path:
        """The quantized model as ``.xml``, calibrated on ``count`` samples."""

        def make(path: Path) -> None:
            import nncf
            import openvino as ov

            source = export.convert_openvino(model)
            samples = nncf.Dataset(list(Calibration(model, count)), lambda batch: tuple(t.numpy() for t in batch))
            with export.quiet():
                ov.save_model(nncf.quantize(source, samples, **self.arguments(count)), path)

        return export.cached(work_folder() / model.name / f"{_slug(self.name)}-{count}.xml", make)


class _Reader:
    """Calibration samples in the form ``quantize_static`` reads; it can be told to read a part of them."""

    def __init__(self, model: Model, count: int) -> None:
        self._samples, self._count = Calibration(model, count), count
        self.set_range(0, count)

    def __len__(self) -> int:
        return self._count

    def set_range(self, start_index: int, end_index: int) -> None:
        """Reads samples ``start_index`` to ``end_index - 1`` from now on."""
        if start_index == 0:
            self._rest: Iterator[dict[str, npt.NDArray[np.generic]]] = self._samples.arrays()
        self._left = end_index - start_index

    def get_next(self) -> dict[str, npt.NDArray[np.generic]] | None:
        """The next sample by input name, ``None`` at the end of the range."""
        if self._left == 0:
            return None
        self._left -= 1
        return next(self._rest, None)


@dataclass(frozen=True)
class OrtStatic:
    """``onnxruntime.quantization.quantize_static`` in the QDQ format, after ``quant_pre_process``.

    Attributes:
        activations: ``"u8"`` or ``"s8"``.
        per_channel: One weight scale per output channel.
        reduce_range: 7-bit weights.
        method: ``"minmax"``, ``"entropy"`` or ``"percentile"``.
        percentile: For that method.
        symmetric: Activations with zero point 0 (s8) or 128 (u8).
        operators: Operator types to quantize; empty: all that ONNX Runtime can.
        constant_only: Leave products of two activations alone.
        outputs: Quantize what products give, too; without, a product of INT8 operands gives FP32.
    """

    activations: str = "u8"
    per_channel: bool = True
    reduce_range: bool = False
    method: str = "minmax"
    percentile: float = 99.999
    symmetric: bool = False
    operators: tuple[str, ...] = ()
    constant_only: bool = False
    outputs: bool = True

    runtime = "onnxruntime"

    @property
    def name(self) -> str:
        """The recipe in a few words."""
        parts = [
            f"{self.activations}s8",
            "per-channel" if self.per_channel else "per-tensor",
            "7-bit" * self.reduce_range,
            f"{self.method}-{self.percentile}" if self.method == "percentile" else self.method,
            "symmetric" * self.symmetric,
            "+".join(self.operators),
            "constant-only" * self.constant_only,
            "fp32-outputs" * (not self.outputs),
        ]
        return "ORT static " + " ".join(part for part in parts if part)

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"ActivationSymmetric": self.symmetric}
        if not self.outputs:
            options["OpTypesToExcludeOutputQuantization"] = ["MatMul", "Gemm"]
        if self.method == "percentile":
            options["CalibPercentile"] = self.percentile
        return options

    def build(self, model: Model, count: int) -> Path:
        """The quantized model as ``.onnx``, calibrated on ``count`` samples, eight of them in memory at a time."""

        def make(path: Path) -> None:
            from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

            # Histograms need samples of one shape; sentences have each their own.
            stride = 1 if model.is_text else next(s for s in (8, 5, 4, 3, 2, 1) if count % s == 0)
            source = export.preprocessed(model)
            with export.quiet():
                quantize_static(
                    source,
                    path,
                    _Reader(model, count),
                    calibration_cache_path=self._ranges(model, count),
                    quant_format=QuantFormat.QDQ,
                    op_types_to_quantize=list(self.operators) or None,
                    nodes_to_exclude=_products(source) if self.constant_only else None,
                    per_channel=self.per_channel,
                    reduce_range=self.reduce_range,
                    activation_type={"u8": QuantType.QUInt8, "s8": QuantType.QInt8}[self.activations],
                    weight_type=QuantType.QInt8,
                    calibrate_method=CalibrationMethod[_METHODS[self.method]],
                    extra_options={**self._options(), "CalibStridedMinMax": stride},
                )

        return export.cached(work_folder() / model.name / f"{_slug(self.name)}-{count}.onnx", make)

    def _ranges(self, model: Model, count: int) -> Path:
        """Where this method's ranges are kept: recipes that differ only in what they do with them share one run."""
        same = replace(
            self, activations="u8", per_channel=True, reduce_range=False, symmetric=False, constant_only=False
        )
        same = replace(same, outputs=True)
        return work_folder() / model.name / f"{_slug(same.name)}-{count}.ranges.json"


def _products(path: Path) -> list[str]:
    """Names of the MatMul nodes of which neither operand is a constant (``MatMulConstBOnly`` does nothing in QDQ)."""
    import onnx

    graph = onnx.load(path).graph
    constants = {t.name for t in graph.initializer}
    return [n.name for n in graph.node if n.op_type == "MatMul" and not constants & set(n.input)]


_METHODS: Final = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}


@dataclass(frozen=True)
class OrtDynamic:
    """``onnxruntime.quantization.quantize_dynamic``: INT8 weights, activations quantized while it runs; no calibration.

    Attributes:
        weights: ``"s8"`` or ``"u8"``.
        per_channel: One weight scale per output channel.
        reduce_range: 7-bit weights.
        optimized: Start from the transformer optimizer's file.
    """

    weights: str = "s8"
    per_channel: bool = False
    reduce_range: bool = False
    optimized: bool = True

    runtime = "onnxruntime"

    @property
    def name(self) -> str:
        """The recipe in a few words."""
        parts = [self.weights, "per-channel" if self.per_channel else "per-tensor", "7-bit" * self.reduce_range]
        return "ORT dynamic " + " ".join(p for p in (*parts, "optimized" if self.optimized else "plain") if p)

    def build(self, model: Model, count: int) -> Path:
        """The quantized model as ``.onnx``; ``count`` is not used."""

        def make(path: Path) -> None:
            from onnxruntime.quantization import QuantType, quantize_dynamic

            with export.quiet():
                quantize_dynamic(
                    export.transformer_optimized(model) if self.optimized else export.preprocessed(model),
                    path,
                    op_types_to_quantize=list(MATMULS),
                    per_channel=self.per_channel,
                    reduce_range=self.reduce_range,
                    weight_type={"u8": QuantType.QUInt8, "s8": QuantType.QInt8}[self.weights],
                    extra_options={"DefaultTensorType": FLOAT} if self.optimized else {},
                )

        return export.cached(work_folder() / model.name / f"{_slug(self.name)}.onnx", make)


Recipe = Nncf | OrtStatic | OrtDynamic

CNN: Final[tuple[Recipe, ...]] = (
    Nncf(),
    Nncf("mixed"),
    Nncf("mixed", fast_bias=False),
    Nncf("performance", fast_bias=False),
    Nncf("mixed", overflow_fix="enable"),
    Nncf("mixed", overflow_fix="disable"),
    Nncf("mixed", fast_bias=False, overflow_fix="disable"),
    Nncf("performance", overflow_fix="disable"),
    *(
        OrtStatic(method=method, reduce_range=reduce, percentile=percentile)
        for method, percentile in (("minmax", 0.0), ("percentile", 99.99), ("percentile", 99.999), ("entropy", 0.0))
        for reduce in (False, True)
    ),
    OrtStatic("s8"),
    OrtStatic("s8", symmetric=True),
    OrtStatic("s8", method="percentile", percentile=99.99),
    OrtStatic(per_channel=False),
    # Without Clip and Relu in the list, convolutions are quantized before their activation: 80 % top-1 here.
    OrtStatic(operators=("Conv", "Clip", "Relu", "Gemm", "Add")),
    OrtStatic(operators=("Conv", "Clip", "Relu", "Gemm")),
)
ORT_TEXT: Final = OrtStatic(operators=("MatMul", "Gemm"), constant_only=True)
TEXT: Final[tuple[Recipe, ...]] = (
    Nncf(transformer=True),
    Nncf("mixed", transformer=True),
    Nncf("mixed", transformer=True, fast_bias=False),
    Nncf(transformer=True, smooth=0.5),
    Nncf(transformer=True, smooth=-1.0),
    Nncf("mixed"),
    *(OrtDynamic(weights, per_channel) for weights in ("s8", "u8") for per_channel in (False, True)),
    OrtDynamic(per_channel=True, reduce_range=True),
    OrtDynamic(per_channel=True, optimized=False),
    *(
        replace(ORT_TEXT, activations=act, method=method, outputs=outputs)
        for act, method, outputs in (
            ("u8", "minmax", True),
            ("u8", "minmax", False),
            ("u8", "percentile", False),
            ("s8", "minmax", False),
            ("s8", "percentile", False),
        )
    ),
    replace(ORT_TEXT, reduce_range=True, outputs=False),
    OrtStatic(operators=("MatMul", "Gemm")),
    OrtStatic(),
)
SPEED_CNN: Final[tuple[Recipe, ...]] = (
    Nncf(),
    Nncf("mixed"),
    Nncf("mixed", overflow_fix="disable"),
    OrtStatic(),
    OrtStatic(reduce_range=True),
    OrtStatic(per_channel=False),
    OrtStatic("s8"),
    OrtStatic("s8", symmetric=True),
    OrtStatic(operators=("Conv", "Clip", "Relu", "Gemm")),
)
"""Recipes that differ in speed: how ranges are found and biases corrected makes a model no faster."""
SPEED_TEXT: Final[tuple[Recipe, ...]] = (
    Nncf(transformer=True),
    Nncf("mixed"),
    *(OrtDynamic(weights, per_channel) for weights in ("s8", "u8") for per_channel in (False, True)),
    ORT_TEXT,
    replace(ORT_TEXT, outputs=False),
    replace(ORT_TEXT, activations="s8", outputs=False),
    OrtStatic(),
)
SHORT_CNN: Final[tuple[Recipe, ...]] = (Nncf("mixed"), OrtStatic())
SHORT_TEXT: Final[tuple[Recipe, ...]] = (Nncf(transformer=True), OrtDynamic(), ORT_TEXT)


def recipes(model: Model, quick: bool, speed: bool = False) -> tuple[Recipe, ...]:
    """The recipes tried on a network: few, those that differ in speed, or all."""
    short, fast, every = (SHORT_TEXT, SPEED_TEXT, TEXT) if model.is_text else (SHORT_CNN, SPEED_CNN, CNN)
    return short if quick else fast if speed else every


def contestant(recipe: Recipe, model: Model, count: int) -> Contestant:
    """The engine of a recipe, built if need be."""
    settings = cast(dict[str, Json], {"recipe": type(recipe).__name__, **asdict(recipe), "calibration": count})
    return Contestant(recipe.name, recipe.runtime, str(recipe.build(model, count)), settings)


def contestants(model: Model, count: int, chosen: Sequence[Recipe]) -> tuple[list[Contestant], dict[str, Json]]:
    """The engines of some recipes of a network, and what the recipes that failed said."""
    made: list[Contestant] = []
    failed: dict[str, Json] = {}
    for recipe in chosen:
        try:
            made.append(contestant(recipe, model, count))
        except (RuntimeError, ValueError) as error:
            failed[recipe.name] = {"error": f"does not build: {error}"[:400]}
            print(f"{model.name}: {recipe.name}: does not build", flush=True)
    return made, failed


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in name.lower())
