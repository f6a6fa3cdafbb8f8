"""Placement on graphs of special shapes: several calls, splits, tuples, constants, weights without a layer."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.capture import capture
from fxcompress.layers import Fused
from fxcompress.passbase import Context
from fxcompress.passes import QuantizeStatic
from fxcompress.quant.fake_quantize import FakeQuantize
from fxcompress.quant.insertion import insert_quantizers
from fxcompress.quant.placement import layer_kind, place, weight_axis
from fxcompress.quant.scheme import QuantScheme
from tests.helpers.blocks import IMAGE, conv, layers, prepared, shared, values

aten = torch.ops.aten


# ------------------------------------------------------------------------------------------------ ignore, left, kinds
def test_ignore() -> None:
    program = prepared(nn.Sequential(conv(4, 4), nn.Sequential(conv(4, 4), conv(4, 4)), conv(4, 4)), *IMAGE)
    everything = place(program, QuantScheme())
    assert layers(everything) == ["0", "1.0", "1.1", "2"]
    found = place(program, QuantScheme(), ("1.*", "2"))
    assert layers(found) == ["0"] and values(found) == {"input": ["0"]}
    assert found.left == [(name, "asked to be ignored") for name in ("1.0", "1.1", "2")]
    assert layers(place(program, QuantScheme(), ("*",))) == []


def test_kinds_the_engine_lacks() -> None:
    program = prepared(
        nn.Sequential(conv(4, 4), nn.ConvTranspose2d(4, 4, 2, 2), nn.Flatten(2), nn.Linear(256, 2)), *IMAGE
    )
    found = place(program, QuantScheme(layers=("conv",)))
    assert layers(found) == ["0"]
    assert found.left == [("1", "the engine has no 8-bit conv_transpose"), ("3", "the engine has no 8-bit linear")]
    assert layers(place(program, QuantScheme())) == ["0", "1", "3"]


def test_other_dtypes_are_left() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).double())  # type: ignore[no-any-return]

    found = place(prepared(Model(), 2, 4), QuantScheme())
    assert layers(found) == ["a"] and found.left == [("b", "its input is not float32")]


class Functional(nn.Module):
    """A weight that two layers of different kinds read, and one that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.bank = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(2, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(F.relu(F.linear(x, self.kernel)), self.bank[0] * 2)
        return y.softmax(-1)


def test_computed_weights_are_left() -> None:
    program = prepared(Functional(), 2, 4)
    found = place(program, QuantScheme())
    assert layers(found) == ["kernel"]
    assert [reason for _, reason in found.left] == ["its weight is computed in the graph"]


def test_functional_layer() -> None:
    """A call whose weight is a parameter without a layer: the weight gets a quantizer of its own in the graph."""
    program = capture(nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval(), (torch.randn(2, 4),))
    call = next(n for n in program.graph.nodes if n.op == "call_module")
    program.gm.register_parameter("kernel", nn.Parameter(torch.randn(3, 4)))
    with program.graph.inserting_before(call):
        weight = program.graph.get_attr("kernel")
        weight.meta["val"] = torch.empty(3, 4)
        call.replace_all_uses_with(new := program.graph.call_function(aten.linear.default, (call.args[0], weight)))
    new.meta = dict(call.meta)
    program.recompile()
    found = place(program, QuantScheme())
    assert layers(found) == ["kernel"] and layer_kind(program, new) == "linear"
    x = torch.randn(64, 4)
    result = QuantizeStatic(calibrator="minmax")(program, Context(calibration=[x]))
    assert result.changes == ["quantized kernel"]
    rows = program.gm.get_parameter("kernel").detach()
    scale = rows.abs().amax(1, keepdim=True) / 127
    grid = torch.round(rows / scale) * scale
    exact = torch.relu(x @ grid.T)
    assert (result.program(x) - exact).abs().max() < 0.05 and (result.program(x) - exact).abs().max() > 0


def test_weight_axis() -> None:
    program = prepared(nn.Sequential(nn.ConvTranspose2d(4, 6, 2), nn.ReLU(), conv(6, 4)), *IMAGE)
    kinds = {layer_kind(program, n): weight_axis(program.module(n)) for n in place(program, QuantScheme()).layers}
    assert kinds == {"conv_transpose": 1, "conv": 0}
    assert all(isinstance(m, (Fused, nn.Conv2d)) for _, m in program.layers())


# ------------------------------------------------------------------------------------------------ graph shapes
class Shapes(nn.Module):
    def __init__(self, forward: Any, **children: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, layer in children.items():
            self.add_module(name, layer)

    def forward(self, *args: Tensor) -> Any:
        return self.function(self, *args)


def test_layer_called_twice() -> None:
    """Each call has an input of its own, quantized on its own scale; the weight has one grid."""
    program = prepared(Shapes(lambda s, x: s.fc(torch.tanh(s.fc(x))), fc=nn.Linear(4, 4)), 2, 4)
    found = place(program, QuantScheme())
    assert values(found) == {"input": ["fc"], "tanh#0": ["fc#1"]}
    result = QuantizeStatic()(program, Context(calibration=[torch.randn(8, 4)]))
    assert result.changes == ["quantized fc"] and result.metrics["layers"] == 2
    layer = result.program.gm.get_submodule("fc")
    assert isinstance(layer, Fused) and isinstance(layer.weight_fake_quantize, FakeQuantize)


def test_graph_output_stays_float() -> None:
    """A value that is returned and read by a layer is returned as it is."""

    def forward(s: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.max_pool2d(torch.relu(s.a(x)), 2)
        return s.b(y), y

    program = prepared(Shapes(forward, a=conv(4, 4), b=conv(4, 4)), *IMAGE)
    found = place(program, QuantScheme())
    assert values(found) == {"input": ["a"], "max_pool2d#0": ["b"]}


def test_several_inputs() -> None:
    model = Shapes(lambda s, x, y: s.fc(x) + s.out(y), fc=nn.Linear(4, 4), out=nn.Linear(4, 4))
    program = capture(model, (torch.randn(2, 4), torch.randn(2, 4)))
    found = place(program, QuantScheme())
    insert_quantizers(program, found, lambda group: FakeQuantize(QuantScheme().activation))
    program.recompile()
    ops = [n.op for n in program.graph.nodes]
    assert ops[:2] == ["placeholder"] * 2 and len(found.values) == 2
    names = [n.name for n in program.graph.nodes]
    assert names[2:4] == [f"{n}_quantized" for n in names[:2]]


def test_split() -> None:
    """Chunks of an integer tensor are integers; a chunk for a float operator keeps the others from being moved."""

    def all_integer(s: Any, x: Tensor) -> Tensor:
        a, b = torch.relu(s.first(x)).chunk(2, 1)
        return s.a(a) + s.b(b)  # type: ignore[no-any-return]

    def partly(s: Any, x: Tensor) -> Tensor:
        a, b = torch.relu(s.first(x)).chunk(2, 1)
        return s.a(a) + b.exp()  # type: ignore[no-any-return]

    def children() -> dict[str, nn.Module]:
        return {"first": conv(4, 4), "a": conv(2, 2), "b": conv(2, 2)}

    found = place(prepared(Shapes(all_integer, **children()), *IMAGE), QuantScheme())
    assert list(values(found)) == ["input", "first"]
    program = prepared(Shapes(partly, **children()), *IMAGE)
    found = place(program, QuantScheme())
    last = list(found.values)[-1]
    assert last.target is operator.getitem and [u.name for u in found.values[last]] == ["a"]


def test_output_of_a_recurrent_layer() -> None:
    """An LSTM gives a tuple: what is quantized is the item."""

    def forward(s: Any, x: Tensor) -> Tensor:
        return s.fc(s.lstm(x)[0])  # type: ignore[no-any-return]

    program = prepared(Shapes(forward, lstm=nn.LSTM(4, 4, batch_first=True), fc=nn.Linear(4, 2)), 2, 3, 4)
    found = place(program, QuantScheme())
    (value,) = found.values
    assert isinstance(value.meta["val"], Tensor)
    assert QuantizeStatic()(program, Context(calibration=[torch.randn(4, 3, 4)])).metrics["values"] == 1


def test_constant_operands() -> None:
    """A learned tensor that meets a convolution in an add is quantized too, on the same scale."""

    def forward(s: Any, x: Tensor) -> Tensor:
        return s.b(s.a(x) + s.table.weight.reshape(1, 4, 8, 8))  # type: ignore[no-any-return]

    program = prepared(Shapes(forward, a=conv(4, 4), b=conv(4, 4), table=nn.Embedding(64, 4)), *IMAGE)
    found = place(program, QuantScheme())
    (group,) = shared(found)
    assert "a" in group and len(group) == 2
    assert QuantizeStatic()(program, Context(calibration=[torch.randn(IMAGE)])).modified


def test_broadcast_and_scalar_adds() -> None:
    program = prepared(Shapes(lambda s, x: s.b(s.a(x) + 1.0), a=conv(4, 4), b=conv(4, 4)), *IMAGE)
    found = place(program, QuantScheme())
    assert list(values(found)) == ["input", "add#0"]
