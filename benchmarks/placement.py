"""What a quantized model quantizes: which operators carry which kind of quantizer, and what the runtime then executes.

python -m benchmarks.placement MODEL.xml|MODEL.onnx ...
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import numpy as np

from benchmarks.harness import table


def openvino_quantizers(path: str) -> Counter[tuple[str, str, str]]:
    """FakeQuantize nodes and packed INT8 weights of an OpenVINO model: (producer, consumers, kind) and how often."""
    import openvino as ov

    model = ov.Core().read_model(path)
    found: Counter[tuple[str, str, str]] = Counter()
    for node in model.get_ordered_ops():
        if node.get_type_name() == "FakeQuantize":
            producer = node.input_value(0).get_node()
            kind = _levels(node)
            found[(_chain(producer), _consumers(node), kind)] += 1
        elif node.get_type_name() == "Constant" and str(node.get_element_type()) in (
            "<Type: 'int8_t'>",
            "<Type: 'uint8_t'>",
        ):
            found[_packed(node)] += 1
    return found


def _consumers(node: Any) -> str:
    users = {t.get_node().get_type_name() for out in node.outputs() for t in out.get_target_inputs()}
    return "+".join(sorted(users))


def _chain(node: Any) -> str:
    """The producer, with what it adds to: ``Clamp(Add(Convolution))``."""
    name = str(node.get_type_name())
    if name in ("Add", "Clamp", "Relu", "Multiply", "Swish", "Gelu", "HSwish", "Pad", "Reshape", "Transpose"):
        inner = [s.get_node() for s in node.input_values() if s.get_node().get_type_name() != "Constant"]
        kinds = sorted({_chain(i) if len(inner) == 1 else str(i.get_type_name()) for i in inner})
        return f"{name}({','.join(kinds)})" if len(name) < 60 else name
    return name


def _levels(node: Any) -> str:
    low, high = (np.asarray(node.input_value(i).get_node().get_data()) for i in (1, 2))
    levels = node.get_attributes()["levels"]
    size = f"per channel ({low.size})" if low.size > 1 else "per tensor"
    if (low >= 0).all():
        sign = "unsigned, low 0"
    elif np.allclose(
        low * (levels // 2 - 1 if levels % 2 == 0 else 1), -high * (levels // 2 if levels % 2 == 0 else 1), rtol=2e-3
    ):
        sign = "symmetric"
    else:
        sign = "asymmetric"
    return f"{levels} levels, {sign}, {size.split(' (')[0]}"


def _packed(node: Any) -> tuple[str, str, str]:
    """An INT8 constant: followed through Convert, Subtract, Multiply to the operator that uses it."""
    data = np.asarray(node.get_data())
    user, zero_point = node, False
    for _ in range(6):
        targets = list(user.output(0).get_target_inputs())
        user = targets[0].get_node()
        name = user.get_type_name()
        zero_point = zero_point or name == "Subtract"
        if name not in ("Convert", "Subtract", "Multiply", "Reshape", "FakeQuantize"):
            break
    kind = f"{node.get_element_type().get_type_name()} in [{data.min()}, {data.max()}]"
    return ("weight", str(user.get_type_name()), kind + (", zero point" if zero_point else ", no zero point"))


def openvino_executed(path: str) -> Counter[tuple[str, str]]:
    """Layers that the CPU plugin runs: (layer type, execution precision) and how often."""
    import openvino as ov

    core = ov.Core()
    model = core.read_model(path)
    compiled = core.compile_model(model, "CPU", {"PERFORMANCE_HINT": "LATENCY"})
    runtime: Any = compiled.get_runtime_model()
    found: Counter[tuple[str, str]] = Counter()
    for node in runtime.get_ordered_ops():
        info = node.get_rt_info()
        read = {
            key: str(info[key].value if hasattr(info[key], "value") else info[key])
            for key in ("layerType", "runtimePrecision")
        }
        if read["layerType"] not in ("Const", "Constant", "Input", "Output"):
            found[(read["layerType"], read["runtimePrecision"])] += 1
    return found


def onnx_quantizers(path: str) -> Counter[tuple[str, str, str]]:
    """QuantizeLinear / DequantizeLinear pairs of an ONNX model: (producer, consumers, kind) and how often."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    constants = {t.name: t for t in graph.initializer}
    producers = {out: node for node in graph.node for out in node.output}
    users: dict[str, list[str]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node.op_type)
    found: Counter[tuple[str, str, str]] = Counter()
    for node in graph.node:
        if node.op_type != "DequantizeLinear":
            continue
        scale, zero = (numpy_helper.to_array(constants[i]) for i in node.input[1:3])
        size = "per channel" if scale.size > 1 else "per tensor"
        point = "zero point 0" if not zero.any() else "zero point ≠ 0"
        if node.input[0] in constants:
            data = numpy_helper.to_array(constants[node.input[0]])
            kind = (
                f"{data.dtype} in [{data.min()}, {data.max()}], {size}"
                if data.dtype != np.int32
                else f"int32 bias, {size}"
            )
            origin = "constant"
        else:
            quantize = producers.get(node.input[0])
            source = producers.get(quantize.input[0]) if quantize is not None else None
            origin = source.op_type if source is not None else "input"
            kind = f"{zero.dtype}, {point}, {size}"
        found[(origin, "+".join(sorted(set(users.get(node.output[0], ["output"])))), kind)] += 1
    return found


def onnxruntime_executed(path: str) -> Counter[tuple[str, str]]:
    """Operators that ONNX Runtime runs after its own rewriting: (operator, domain) and how often."""
    import tempfile
    from pathlib import Path

    import onnx
    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.optimized_model_filepath, options.log_severity_level = str(Path(folder) / "optimized.onnx"), 3
        ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(options.optimized_model_filepath).graph.node
    return Counter((node.op_type, node.domain or "ai.onnx") for node in nodes)


def describe(path: str) -> str:
    """Both tables of a model file as Markdown."""
    is_onnx = path.endswith(".onnx")
    quantizers = onnx_quantizers(path) if is_onnx else openvino_quantizers(path)
    executed = onnxruntime_executed(path) if is_onnx else openvino_executed(path)
    first = table(["producer", "consumers", "quantizer", "count"], [[*key, n] for key, n in quantizers.most_common()])
    second = table(["runs", "as", "count"], [[*key, n] for key, n in executed.most_common()])
    return f"### {path}\n\n{first}\n\n{second}\n"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(describe(name))
