"""Which layers and values a scheme quantizes, and which share a scale, on the blocks of known networks."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from fxcompress.ir import Program
from fxcompress.layers import ACTIVATIONS
from fxcompress.quant.fake_quantize import FakeQuantize
from fxcompress.quant.insertion import insert_quantizers
from fxcompress.quant.placement import Placement, is_move, layer_kind, place
from fxcompress.quant.scheme import QuantScheme
from tests.helpers.blocks import (
    BLOCKS,
    IMAGE,
    SCHEMES,
    Padded,
    conv,
    layers,
    placed,
    prepared,
    prepared_block,
    shared,
    values,
)

aten = torch.ops.aten


# ------------------------------------------------------------------------------------------------ known networks
def test_resnet() -> None:
    """Conv + Add + ReLU is one block; the max-pool moves integers, so its input is quantized, not its output."""
    _, found = placed("resnet")
    assert layers(found) == ["0", "3.conv1", "3.conv2"]
    assert values(found) == {"input": ["0"], "0": ["max_pool2d#0"], "3.conv1": ["3.conv2"]}
    assert shared(found) == [] and found.left == []


def test_resnet_whose_engine_fuses_no_residual() -> None:
    """Add and ReLU are one integer kernel: one scale for both sides, and a quantizer behind the ReLU only."""
    scheme = QuantScheme(fused_residual=False)
    program = prepared(nn.Sequential(BLOCKS["resnet"][0](), conv(4, 4)), 2, 3, 8, 8, scheme=scheme)
    found = place(program, scheme)
    assert values(found) == {
        "input": ["0.0"],
        "0.0": ["max_pool2d#0"],
        "0.3.conv1": ["0.3.conv2"],
        "0.3.conv2": ["add#0"],
        "relu#0": ["1"],
    }
    assert shared(found) == [{"0.0", "0.3.conv2"}]
    assert all(len(group) == 1 for group in found.groups)  # the zero points are each one's own


class _SumTwice(nn.Module):
    """A sum that is read with and without its ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(4, 4), conv(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        total = x + self.first(x)
        return self.second(torch.relu(total)) + total


def test_sum_that_is_read_without_its_activation_too() -> None:
    scheme = QuantScheme(fused_residual=False)
    found = place(prepared(_SumTwice(), 2, 4, 8, 8, scheme=scheme), scheme)
    assert values(found) == {"input": ["first"], "relu#0": ["second"]}


def test_mobilenet_v2() -> None:
    """The linear bottleneck's add joins integers: one scale on both sides, and all read its quantized result."""
    _, found = placed("mobilenet_v2")
    assert layers(found) == [f"{i}.conv.{k}" for i in (0, 1) for k in ("0.0", "1.0", "2")]
    assert values(found) == {
        "input": ["0.conv.0.0", "add#0"],
        "0.conv.0.0": ["0.conv.1.0"],
        "0.conv.1.0": ["0.conv.2"],
        "0.conv.2": ["add#0"],
        "add#0": ["1.conv.0.0", "add#1"],
        "1.conv.0.0": ["1.conv.1.0"],
        "1.conv.1.0": ["1.conv.2"],
    }
    assert shared(found) == [{"input", "0.conv.2"}]


def test_efficientnet() -> None:
    """Without an integer product, the gate is applied in float and the product is quantized."""
    _, found = placed("efficientnet")
    assert values(found) == {
        "input": ["0.expand", "add#0"],
        "adaptive_avg_pool2d#0": ["0.se.fc1"],
        "0.se.fc1": ["0.se.fc2"],
        "mul#0": ["0.project"],
        "0.project": ["add#0"],
        "add#0": ["1"],
    }
    assert shared(found) == [{"input", "0.project"}]


def test_efficientnet_with_integer_products() -> None:
    """The gate and what it gates are quantized, each on its own scale: a product needs no common one."""
    _, found = placed("efficientnet", "mul")
    assert values(found) == {
        "input": ["0.expand", "add#0"],
        "0.expand": ["mul#0"],
        "adaptive_avg_pool2d#0": ["0.se.fc1"],
        "0.se.fc1": ["0.se.fc2"],
        "0.se.fc2": ["mul#0"],
        "mul#0": ["0.project"],
        "0.project": ["add#0"],
        "add#0": ["1"],
    }
    assert shared(found) == [{"input", "0.project"}]


def test_densenet() -> None:
    """Norms read the concats: these stay in float, so the features are not rounded."""
    _, found = placed("densenet")
    assert values(found) == {
        "relu#0": ["denselayer1.conv1"],
        "denselayer1.conv1": ["denselayer1.conv2"],
        "relu#1": ["denselayer2.conv1"],
        "denselayer2.conv1": ["denselayer2.conv2"],
    }
    assert shared(found) == []


def test_inception() -> None:
    """Everything that ends in the last concat, directly or through another one, is on one scale."""
    _, found = placed("inception")
    assert values(found) == {
        "input": ["stem"],
        "stem": ["a", "b", "max_pool2d#0", "cat#1"],
        "a": ["cat#0"],
        "b": ["cat#0"],
    }
    assert shared(found) == [{"stem", "a", "b"}]


def test_inception_with_requantized_concats() -> None:
    scheme = QuantScheme(requantize_cat=True)
    found = place(prepared_block("inception", "default"), scheme)
    assert values(found) == {
        "input": ["stem"],
        "stem": ["a", "b", "max_pool2d#0", "cat#1"],
        "a": ["cat#0"],
        "b": ["cat#0"],
        "cat#0": ["cat#1"],
        "cat#1": ["head"],
    }
    assert shared(found) == [{"stem", "a", "b", "cat#0", "cat#1"}]


def test_concat_without_the_join_is_quantized_behind() -> None:
    found = place(prepared_block("inception", "default"), QuantScheme(joins=("add",)))
    assert values(found) == {"input": ["stem"], "stem": ["a", "b"], "cat#1": ["head"]}


def test_convnext() -> None:
    """The residual stream stays in float; layer norms and GELUs feed the linear layers."""
    _, found = placed("convnext")
    assert values(found) == {
        "input": ["0.block.0"],
        "0.block.2": ["0.block.3"],
        "0.block.3": ["0.block.5"],
        "add#0": ["1.block.0"],
        "1.block.2": ["1.block.3"],
        "1.block.3": ["1.block.5"],
    }
    assert shared(found) == []


def test_vit() -> None:
    """The packed projection of MultiheadAttention is a layer; transposes and reshapes move integers."""
    _, found = placed("vit")
    assert len(found.layers) == 4 and found.left == []
    assert values(found) == {
        "ln_1": ["transpose#0"],
        "scaled_dot_product_attention#0": ["permute#0"],
        "ln_2": ["mlp.0"],
        "mlp.0": ["mlp.3"],
    }
    assert shared(found) == []


def test_bert() -> None:
    """One quantizer serves query, key and value; the residual adds read the float values."""
    _, found = placed("bert")
    assert layers(found) == ["query", "key", "value", "dense", "up", "down"]
    assert values(found) == {
        "input": ["query", "key", "value"],
        "matmul#1": ["transpose#4"],
        "norm1": ["up"],
        "up": ["down"],
    }
    assert shared(found) == []


@pytest.mark.parametrize(("model", "through"), [(Padded(), True), (Padded(1.0), False), (Padded(0.0, "reflect"), True)])
def test_padding(model: Padded, through: bool) -> None:
    """Zero and copies of the data are on the grid, another constant may not be."""
    found = place(prepared(model, 2, 3, 8, 8), QuantScheme())
    first, second = values(found)
    assert first == "input" and (second == "first") == through


# ------------------------------------------------------------------------------------------------ what holds everywhere
def inserted(name: str, scheme: str) -> tuple[Program, Placement]:
    program, found = placed(name, scheme)
    insert_quantizers(program, found, lambda group: FakeQuantize(SCHEMES[scheme].activation))
    program.recompile()
    program.verify()
    return program, found


def is_quantizer(program: Program, node: Node) -> bool:
    return node.op == "call_module" and isinstance(program.module(node), FakeQuantize)


def origin(program: Program, node: Node, scheme: QuantScheme) -> list[Node]:
    """What made a value: back through data movements (and concats that pass integers on)."""
    is_cat = node.target is aten.cat.default and "cat" in scheme.joins and not scheme.requantize_cat
    if is_move(node) or is_cat:
        return [o for i in node.all_input_nodes if "val" in i.meta for o in origin(program, i, scheme)]
    return [node]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", BLOCKS)
def test_every_quantized_layer_reads_integers(name: str, scheme: str) -> None:
    program, found = inserted(name, scheme)
    assert found.layers
    for node in found.layers:
        data = node.args if node.op == "call_module" else node.args[:1]
        for value in data:
            assert isinstance(value, Node)
            sources = [o for o in origin(program, value, SCHEMES[scheme]) if isinstance(o.meta["val"], Tensor)]
            assert sources and all(is_quantizer(program, s) for s in sources), f"{node} reads {sources}"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", BLOCKS)
def test_no_quantizer_inside_a_block(name: str, scheme: str) -> None:
    """Between a layer and an activation that the engine fuses, nothing is rounded; and nothing is rounded twice."""
    program, _ = inserted(name, scheme)
    fused = {ACTIVATIONS[a] for a in SCHEMES[scheme].fused_activations}
    for node in program.graph.nodes:
        if is_quantizer(program, node):
            (source,) = node.all_input_nodes
            assert not is_quantizer(program, source)
            if layer_kind(program, source):
                assert not any(user.target in fused for user in node.users if len(source.users) == 1)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", BLOCKS)
def test_adds_and_concats_have_one_scale(name: str, scheme: str) -> None:
    """When all operands are integers: one scale for an add, one grid for a concat, its requantized result included."""
    program, found = inserted(name, scheme)
    grid_of = {v: group[0] for group in found.groups for v in group}
    scale_of = {leader: leaders[0] for leaders in found.same_scale for leader in leaders}
    for node in program.graph.nodes:
        if node.target not in (aten.add.Tensor, aten.cat.default):
            continue
        operands = [o for i in node.all_input_nodes for o in origin(program, i, SCHEMES[scheme])]
        if operands and all(is_quantizer(program, o) for o in operands) and _reads_only_integers(found, node):
            grids = {grid_of[cast(Node, o.args[0])] for o in operands}
            assert len(grids if node.target is aten.cat.default else {scale_of.get(g, g) for g in grids}) == 1


def _reads_only_integers(found: Placement, node: Node) -> bool:
    """A float add may happen to read two quantized values."""
    return any(node in users for users in found.values.values()) and node in found.values


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", BLOCKS)
def test_groups_cover_every_value_once(name: str, scheme: str) -> None:
    _, found = placed(name, scheme)
    grouped = [v for group in found.groups for v in group]
    assert len(grouped) == len(set(grouped)) and set(grouped) == set(found.values)
    assert all(users for users in found.values.values())


@pytest.mark.parametrize("name", BLOCKS)
def test_float_readers_read_floats(name: str) -> None:
    """Only integer operators (and all readers of an integer join) get the rounded value."""
    _, found = placed(name)
    for value, users in found.values.items():
        is_join = value.target in (aten.add.Tensor, aten.cat.default, aten.mul.Tensor)
        for user in users:
            integer = user in found.layers or is_move(user) or user.target in (aten.add.Tensor, aten.cat.default)
            assert integer or is_join, f"{user} reads rounded {value}"


# ------------------------------------------------------------------------------------------------ QDQ style
@pytest.mark.parametrize("name", ["resnet", "mobilenet_v2", "efficientnet", "bert", "vit"])
def test_quantized_outputs(name: str) -> None:
    """Every convolution and linear layer has a quantized output, which every reader reads, the caller too."""
    _, found = placed(name, "qdq")
    assert found.layers
    for node in found.layers:
        assert found.values[node] == list(node.users)


def test_quantized_outputs_of_some_kinds() -> None:
    model = nn.Sequential(conv(4, 4), nn.Flatten(), nn.Linear(256, 3))
    found = place(prepared(model, *IMAGE), QuantScheme(quantized_outputs=("linear",)))
    assert values(found) == {"input": ["0"], "0": ["flatten#0"], "2": ["return"]}
    found = place(prepared(model, *IMAGE), QuantScheme())
    assert values(found) == {"input": ["0"], "0": ["flatten#0"]}


def test_pooling_join() -> None:
    """An average of integers is an integer only where the engine says so; then both ends are quantized."""
    model = nn.Sequential(conv(4, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    program = prepared(model, *IMAGE)
    found = place(program, QuantScheme())
    assert values(found) == {"input": ["0"], "adaptive_avg_pool2d#0": ["flatten#0"]}
    found = place(program, QuantScheme(joins=("avg_pool",)))
    assert list(values(found)) == ["input", "0", "adaptive_avg_pool2d#0"] and shared(found) == []
