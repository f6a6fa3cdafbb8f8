"""The layer list: parsed from the builder's log, in the form of TensorRT-RTX and in TensorRT's older one."""

from __future__ import annotations

import pytest

from fxcompress.engines.tensorrt_layers import LayerReport, parse_layers, report_layers
from fxcompress.errors import EngineError


def tensor(name: str, kind: str) -> str:
    return f"{{ Name: {name}, Dimensions: [-1,32], Strides: [32,1], StrideOrder: [1,0], Datatype: {kind}, Format: (Linear) x }}"


def line(name: str, kind: str, inputs: str, constants: str, outputs: str, nodes: str) -> str:
    lists = [f"{title}: [{', '.join(tensor('t', k) for k in kinds.split())}]" for title, kinds in
             (("Inputs", inputs), ("Constants", constants), ("Outputs", outputs))]  # fmt: skip
    meta = "".join(f"[ONNX Layer: {n}]" for n in nodes.split())
    return f"Name: {name}, LayerType: {kind}, {', '.join(lists)}, TacticName: t, StreamId: 0, Metadata: {meta}"


RTX = "Layers:\n" + "\n".join(
    [
        line("__mye1_myl0_0", "shape_call", "", "", "", ""),
        line("__myl_MulRounCast_myl0_1", "kgen", "Float", "Float", "Int8", "x/QuantizeLinear"),
        line("a/Conv_myl0_2", "correlation", "Int8", "Int8 Float", "Float", "a/Conv x/DequantizeLinear"),
        line("__myl_TranMove_myl0_3", "kgen", "Int8", "", "Int8", ""),
        line("__myl_CastMulAddRounCast_myl0_4", "kgen", "Float Int8", "Float", "Int8", "a/Conv a/Add y/QuantizeLinear"),
        line(
            "__myl_CastFc_myl0_5", "runtime_fusion", "Half", "Int4 Half", "Half", "c.weight/DequantizeLinear c/MatMul"
        ),
        line("b/Gemm_myl0_6", "gemm", "Float", "Float", "Float", "b/Gemm"),
        line("__myl_Cast_myl0_7", "kgen", "Float", "", "Half", ""),
    ]
)
RTX += "\n\nI/O Tensors:\n Name: x, IOMode: Input, LayerType: none, Datatype: Int8"
PRODUCTS = {
    "a/Conv": {"layer": "a", "weight": "Int8", "input": "Int8"},
    "b/Gemm": {"layer": "b", "weight": "Int8", "input": "Int8"},
    "c/MatMul": {"layer": "c", "weight": "Int4", "input": ""},
}


def test_the_list_of_tensorrt_rtx() -> None:
    layers = parse_layers([("INFO", "before"), ("VERBOSE", RTX)])
    assert len(layers) == 8
    conv = layers[2]
    assert (conv.kind, conv.inputs, conv.constants, conv.outputs) == (
        "correlation",
        ("Int8",),
        ("Int8", "Float"),
        ("Float",),
    )
    assert conv.nodes == ("a/Conv", "x/DequantizeLinear") and "a/Conv" in str(conv)
    assert [layer.moves for layer in layers] == [False, False, False, True, False, False, False, True]


def test_what_was_quantized_is_looked_up() -> None:
    report = report_layers(parse_layers([("VERBOSE", RTX)]), PRODUCTS, {"a/Add": "z/QuantizeLinear", "b/Add": "q"})
    assert report.layers == {"a": "int8", "b": "float", "c": "int4 weights"}
    assert report.adds == {"a/Add": "int8", "b/Add": "float"}
    assert report.reformats == 2 and report.stray == ["__myl_TranMove_myl0_3"] and report.count == 7
    assert report.floats() == ["b", "b/Add"]
    assert "3 quantized layers: 1 int8, 1 int4 weights, 1 float" in str(report)
    assert LayerReport.from_dict(report.to_dict()) == report


def test_the_models_own_transposition_is_no_reformat() -> None:
    own = line("__myl_MoveTran_myl0_1", "kgen", "Int8", "", "Int8", "attention/Transpose")
    added = line("__myl_MoveTran_myl0_2", "kgen", "Int8", "", "Int8", "x/DequantizeLinear")
    layers = parse_layers([("VERBOSE", f"Layers:\n{own}\n{added}")])
    assert [layer.moves for layer in layers] == [False, True]


def test_a_residual_that_never_leaves_the_kernel() -> None:
    text = "Layers:\n" + line("k", "kgen", "Float Float", "Float", "Int8", "d/Add r/QuantizeLinear s/QuantizeLinear")
    layers = parse_layers([("VERBOSE", text)])
    assert report_layers(layers, {}, {"d/Add": "r/QuantizeLinear"}).adds == {"d/Add": "fused"}
    assert report_layers(layers, {}, {"d/Add": "other"}).adds == {"d/Add": "float"}


def test_the_older_list_of_tensorrt() -> None:
    """Type and layout in one text, weights by themselves, fused layers with several names."""
    text = (
        "Layers:\nName: a/Conv + a/Relu, LayerType: CaskConvolution, Inputs: [ { Name: q, Location: Device, Dimensions: "
        "[1,32,8,8], Format/Datatype: Thirty-two wide channel vectorized row major Int8 format }], Outputs: [ { Name: r, "
        "Location: Device, Dimensions: [1,32,8,8], Format/Datatype: Thirty-two wide channel vectorized row major Int8 format "
        '}], ParameterType: Convolution, Weights: {"Type": "Int8", "Count": 9216}, Bias: {"Type": "Float", "Count": 32}, '
        "TacticName: sm80, StreamId: 0, Metadata: [ONNX Layer: a/Conv]\x1e[ONNX Layer: a/Relu]\n"
        "Name: Reformatting CopyNode for Input Tensor 0 to b, LayerType: Reformat, Inputs: [ { Name: r, Dimensions: [1], "
        "Format/Datatype: Row major linear FP32 }], Outputs: [ { Name: s, Dimensions: [1], Format/Datatype: Row major linear "
        "FP16 format }], TacticName: 0x0, StreamId: 0, Metadata: \n\nBindings:\nx"
    )
    layers = parse_layers([("VERBOSE", text)])
    assert [la.kind for la in layers] == ["CaskConvolution", "Reformat"]
    assert (
        layers[0].inputs == ("Int8",) and layers[0].constants == ("Int8",) and layers[0].nodes == ("a/Conv", "a/Relu")
    )
    assert (layers[1].inputs, layers[1].outputs, layers[1].moves) == (("Float",), ("Half",), True)
    assert report_layers(layers, {"a/Conv": PRODUCTS["a/Conv"]}, {}).layers == {"a": "int8"}


def test_a_layer_called_twice_is_integer_only_when_every_call_is() -> None:
    products = {"a/Conv": PRODUCTS["a/Conv"], "a/Conv_1": PRODUCTS["a/Conv"]}
    assert report_layers(parse_layers([("VERBOSE", RTX)]), products, {}).layers == {"a": "float"}


@pytest.mark.parametrize("messages", [[], [("INFO", "Layers are fine")], [("VERBOSE", "Layers:\n")]])
def test_no_list_is_an_error(messages: list[tuple[str, str]]) -> None:
    """Without it nothing is known, and nothing must seem to be fine."""
    with pytest.raises(EngineError, match="no layer list"):
        parse_layers(messages)
