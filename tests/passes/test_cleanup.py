"""Clean-up passes: what goes, what must stay."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from fxcompress.capture import capture
from fxcompress.ir import Program
from fxcompress.passbase import Context, Pass, Result
from fxcompress.passes import EliminateCommonSubexpressions, EliminateDeadCode, QuantizeStatic, RemoveIdentity
from fxcompress.testing import check_pass
from tests.helpers.goldens import check_golden

aten = torch.ops.aten


class Lambda(nn.Module):
    """A model from a function of its input (and of a few layers)."""

    def __init__(self, function: Any, **layers: Any) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def run(pass_: Pass, model: nn.Module, *shape: int, **options: Any) -> tuple[Program, Result]:
    program = capture(model.eval(), (torch.randn(shape or (2, 3, 4)),), **options)
    return program, check_pass(pass_, program)


def calls(program: Program) -> list[str]:
    """What runs: operator names and module paths."""
    return [
        str(n.target) if n.op == "call_module" else str(getattr(n.target, "__name__", n.target))
        for n in program.graph.nodes
        if n.op in ("call_module", "call_function")
    ]


# ------------------------------------------------------------------------------------------------ RemoveIdentity
IDENTITIES: dict[str, Any] = {
    "dropout": lambda s, x: F.dropout(x, 0.3, training=s.training),
    "dropout2d": lambda s, x: F.dropout2d(x, 0.3, training=s.training),
    "add_zero": lambda s, x: x + 0,
    "subtract_zero": lambda s, x: x - 0.0,
    "times_one": lambda s, x: x * 1,
    "divide_by_one": lambda s, x: x / 1.0,
    "power_one": lambda s, x: x**1,
    "same_view": lambda s, x: x.view(x.shape),
    "same_reshape": lambda s, x: x.reshape(x.shape[0], 3, 4),
    "full_slice": lambda s, x: x[:, :, 0:4],
    "longer_slice": lambda s, x: x[:, :1000],
    "same_dtype": lambda s, x: x.to(torch.float32),
    "contiguous": lambda s, x: x.contiguous(),
    "clone": lambda s, x: x.clone(),
    "detach": lambda s, x: x.detach(),
    "expand": lambda s, x: x.expand(-1, 3, 4),
    "concat_of_one": lambda s, x: torch.cat([x], 1),
    "squeeze_of_nothing": lambda s, x: x.squeeze(1),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_identity_is_removed(name: str) -> None:
    function = IDENTITIES[name]
    _, result = run(RemoveIdentity(), Lambda(lambda s, x: torch.tanh(function(s, torch.sin(x)))))
    assert calls(result.program) == ["sin.default", "tanh.default"]


KEPT: dict[str, Any] = {
    "add.Tensor": lambda x: x + 1,
    "mul.Tensor": lambda x: x * 0,
    "rsub.Scalar": lambda x: 1 - x,
    "reciprocal.default": lambda x: 1 / x,
    "view.default": lambda x: x.view(x.shape[0], 4, 3),
    "slice.Tensor": lambda x: x[:, 1:],
    "slice.Tensor, step": lambda x: x[:, ::2],
    "to.dtype": lambda x: x.double(),
    "to.dtype, and back": lambda x: x.half().float(),
    "pow.Tensor_Scalar": lambda x: x**2,
    "expand.default": lambda x: x[:, :1].expand(-1, 3, 4),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_changes_something_stays(name: str) -> None:
    function = KEPT[name]
    program, result = run(RemoveIdentity(), Lambda(lambda s, x: torch.tanh(function(torch.sin(x)))))
    operator_name = name.partition(",")[0]
    before, after = calls(program), calls(result.program)
    if operator_name == "slice.Tensor":  # x[:, 1:] is a full slice of the first dimension and another one
        assert after.count(operator_name) == 1
    else:
        assert after.count(operator_name) == before.count(operator_name) > 0


def test_integer_times_one_stays_when_it_becomes_a_float() -> None:
    _, result = run(RemoveIdentity(), Lambda(lambda s, x: (x > 0).long() * 1.0))
    assert any("mul" in c for c in calls(result.program))


def test_contiguous_before_a_view_stays() -> None:
    """The view relies on it."""
    model = Lambda(lambda s, x: torch.relu(x.transpose(1, 2).contiguous().view(x.shape[0], -1)))
    program, result = run(RemoveIdentity(), model)
    assert not result.modified and any("contiguous" in c or "clone" in c for c in calls(program))


def test_dynamic_sizes_are_compared_as_symbols() -> None:
    """``x[:, :n]`` with dynamic n: the same symbol is the same size, another one is not."""
    shapes = ({0: Dim.AUTO, 1: Dim.AUTO},)
    same = Lambda(lambda s, x: torch.tanh(torch.sin(x).view(x.shape[0], x.shape[1], 4)))
    _, result = run(RemoveIdentity(), same, 2, 6, 4, dynamic_shapes=shapes)
    assert "view.default" not in calls(result.program)
    other = Lambda(lambda s, x: torch.tanh(torch.sin(x)[:, : x.shape[0]]))
    _, result = run(RemoveIdentity(), other, 2, 6, 4, dynamic_shapes=shapes)
    assert "slice.Tensor" in calls(result.program)


def test_input_that_is_output() -> None:
    _, result = run(RemoveIdentity(), Lambda(lambda s, x: (x + 0, torch.sin(x) * 1)))
    assert calls(result.program) == ["sin.default"]


def test_dropout_module_is_removed() -> None:
    _, result = run(RemoveIdentity(), nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4)))
    assert calls(result.program) == ["0", "2"]


# ------------------------------------------------------------------------------------------------ common subexpressions
def cse(function: Any, **layers: Any) -> list[str]:
    return calls(run(EliminateCommonSubexpressions(), Lambda(function, **layers))[1].program)


def test_equal_expressions_are_computed_once() -> None:
    assert cse(lambda s, x: torch.sin(x) + torch.sin(x)) == ["sin.default", "add.Tensor"]
    assert cse(lambda s, x: torch.sin(x + 1) * torch.cos(x + 1)).count("add.Tensor") == 1
    assert cse(lambda s, x: x.sum(1, keepdim=True) * x.sum(1, keepdim=True)).count("sum.dim_IntList") == 1


def test_different_expressions_stay() -> None:
    assert cse(lambda s, x: torch.sin(x) + torch.cos(x)) == ["sin.default", "cos.default", "add.Tensor"]
    assert cse(lambda s, x: (x + 1) * (x + 2)).count("add.Tensor") == 2
    assert cse(lambda s, x: (x + 1) * (x + 1.0)).count("add.Tensor") == 2
    assert cse(lambda s, x: x.sum(1) * x.sum(1, keepdim=True)[..., 0]).count("sum.dim_IntList") == 2


def test_zeros_of_both_signs_stay_apart() -> None:
    """0.0 == -0.0, but 1 / 0.0 is not 1 / -0.0."""
    names = cse(lambda s, x: x / torch.full((4,), 0.0) + 1 / (x * 0 + torch.full((4,), -0.0)).abs())
    assert names.count("full.default") == 2


def test_a_layer_called_twice_on_one_input() -> None:
    assert cse(lambda s, x: s.fc(x) + s.fc(x), fc=nn.Linear(4, 4)) == ["fc", "add.Tensor"]
    names = cse(lambda s, x: s.a(x) + s.b(x), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    assert names == ["a", "b", "add.Tensor"]


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(3), nn.GRU(4, 4)], ids=lambda m: type(m).__name__)
def test_random_and_stateful_layers_stay(layer: nn.Module) -> None:
    """In training two dropouts differ, and a norm counts two batches: the program stays trainable."""

    def twice(s: Any, x: Tensor) -> Tensor:
        first, second = s.layer(x), s.layer(x)
        return first[0] * second[0] if isinstance(first, tuple) else first * second

    assert cse(twice, layer=layer).count("layer") == 2


def test_random_functions_stay() -> None:
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.rand_like(x) - torch.rand_like(x)

    program = capture(Noise(), (torch.randn(2, 3),), verify=False)
    result = EliminateCommonSubexpressions()(program, Context(verify=False))
    assert calls(result.program).count("rand_like.default") == 2


def test_constants_are_read_once() -> None:
    weight = nn.Parameter(torch.randn(4))
    _, result = run(EliminateCommonSubexpressions(), Lambda(lambda s, x: x * s.w + (x * s.w).sin(), w=weight))
    assert calls(result.program).count("mul.Tensor") == 1
    assert sum(n.op == "get_attr" for n in result.program.graph.nodes) == 1


# ------------------------------------------------------------------------------------------------ dead code
class Extra(nn.Module):
    """A model with a part that its forward does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 2)
        self.block = nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Sequential(nn.Linear(4, 4), nn.PReLU())})
        self.scale = nn.Parameter(torch.ones(4))
        self.spare = nn.Parameter(torch.ones(4))
        self.register_buffer("table", torch.arange(4.0))
        self.register_buffer("spare_table", torch.arange(4.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.unused(x)
        return self.block["used"](self.used(x)) * self.scale + self.table  # type: ignore[no-any-return]


def test_unused_tensors_and_modules_are_dropped() -> None:
    _, result = run(EliminateDeadCode(), Extra())
    gm = result.program.gm
    layers = {f"{path}.{name}" for path in ("used", "block.used") for name in ("weight", "bias")}
    assert set(gm.state_dict()) == {*layers, "scale", "table"}
    assert not [n for n, _ in gm.named_modules() if "unused" in n]
    assert "spare_table" not in dict(gm.named_buffers())
    dropped = {c.removeprefix("dropped ") for c in result.changes}
    assert {"spare", "spare_table", "unused", "block.unused"} <= dropped


def test_dead_nodes_are_removed() -> None:
    program = capture(Lambda(lambda s, x: torch.sin(x)), (torch.randn(2, 3),))
    with program.graph.inserting_after(program.placeholders()[-1]):
        dead = program.graph.call_function(aten.cos.default, (program.placeholders()[0],))
    dead.meta = dict(program.placeholders()[0].meta)
    result = check_pass(EliminateDeadCode(), program)
    assert result.changes == [f"removed {dead.name}"] and calls(result.program) == ["sin.default"]


def test_unused_inputs_stay() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.sin(x)

    result = check_pass(EliminateDeadCode(), Two(), (torch.randn(2, 3), torch.randn(2, 3)))
    assert [n.name for n in result.program.placeholders()] == ["x", "y"]


def test_a_module_at_two_paths_keeps_its_tensors() -> None:
    """Called as ``a``; that it is also registered as ``b`` must not cost it its weights."""

    class Alias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b = nn.Linear(4, 4)
            self.a = self.b

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b.bias  # type: ignore[no-any-return]

    check_pass(EliminateDeadCode(), Alias(), (torch.randn(2, 4),))
    program = capture(nn.Sequential(nn.Linear(4, 4)), (torch.randn(2, 4),))
    program.gm.add_module("alias", nn.Sequential(program.gm.get_submodule("0")))
    check_pass(EliminateDeadCode(), program)


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids))  # type: ignore[no-any-return]

    result = check_pass(EliminateDeadCode(), Tied(), (torch.tensor([[1, 2, 3]] * 2),))
    gm = result.program.gm
    assert gm.get_submodule("head").weight is gm.get_submodule("embed").weight


def test_what_a_called_module_holds_stays() -> None:
    """The fake-quantizer inside a fused layer is not in the graph, but it is used."""
    program = capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), (torch.randn(2, 4),))
    quantized = QuantizeStatic(samples=2)(program, Context(calibration=[torch.randn(2, 4)])).program
    result = check_pass(EliminateDeadCode(), quantized)
    assert not result.modified


# ------------------------------------------------------------------------------------------------ golden
def test_golden_remove_identity() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), Lambda(lambda s, x: x.view(x.shape) * 1 + 0))
    check_golden("remove_identity", *run(RemoveIdentity(), model))


def test_golden_common_subexpressions() -> None:
    model = Lambda(lambda s, x: torch.sin(x + 1) * s.drop(x + 1) + s.drop(x + 1), drop=nn.Dropout(0.1))
    check_golden("common_subexpressions", *run(EliminateCommonSubexpressions(), model))


def test_golden_dead_code() -> None:
    check_golden("dead_code", *run(EliminateDeadCode(), Extra()))


def test_getitem_is_compared_by_index() -> None:
    names = cse(lambda s, x: torch.split(x, 2, -1)[0] + torch.split(x, 2, -1)[1])
    assert names.count("split.Tensor") == 1 and names.count(operator.getitem.__name__) == 2
