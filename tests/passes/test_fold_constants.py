"""FoldConstants: constants are computed once; parameters, saved buffers and dynamic sizes are left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from fxcompress.capture import capture
from fxcompress.ir import Program
from fxcompress.passbase import Context, Result
from fxcompress.passes import FoldConstants
from fxcompress.testing import check_pass
from tests.helpers.goldens import check_golden


class Model(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(4))
        self.register_buffer("saved", torch.arange(4.0))
        self.register_buffer("table", torch.arange(4.0), persistent=False)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def run(function: Any, *shape: int, pass_: FoldConstants | None = None, **options: Any) -> tuple[Program, Result]:
    program = capture(Model(function).eval(), (torch.randn(shape or (2, 4)),), **options)
    return program, check_pass(pass_ or FoldConstants(), program)


def functions(program: Program) -> list[str]:
    return [n.target.__name__ for n in program.graph.nodes if n.op == "call_function"]


FOLDED: dict[str, Any] = {
    "arange": lambda s, x: x + torch.arange(4),
    "mask": lambda s, x: x.masked_fill(torch.ones(4, 4).tril()[1] == 0, -1.0),
    "from_a_table": lambda s, x: x * torch.exp(s.table * -0.5),
    "split": lambda s, x: x * torch.cat(list(reversed(torch.split(torch.arange(4.0), 2)))),
    "expanded": lambda s, x: x + torch.arange(4.0)[None].expand(1, 4) * 2,
    "transposed": lambda s, x: x @ torch.arange(16.0).reshape(4, 4).t().softmax(0),
}


@pytest.mark.parametrize("name", FOLDED)
def test_constant_is_computed_once(name: str) -> None:
    _, result = run(FOLDED[name])
    assert len(functions(result.program)) == 1, functions(result.program)
    assert len(result.changes) == 1
    assert not set(result.program.gm.state_dict()) - {"weight", "saved"}, "a constant must not appear in the state dict"


KEPT: dict[str, Any] = {
    "parameter": lambda s, x: x * torch.exp(s.weight),
    "saved_buffer": lambda s, x: x * torch.exp(s.saved),
    "input": lambda s, x: torch.exp(x),
    "size_of_the_input": lambda s, x: x + torch.arange(x.shape[0])[:, None],
}


@pytest.mark.parametrize("name", KEPT)
def test_what_may_change_stays(name: str) -> None:
    """A parameter can be trained, a saved buffer loaded, a batch be larger."""
    program, result = run(KEPT[name])
    assert functions(result.program) == functions(program) and not result.modified


def test_dynamic_sizes_stay_dynamic() -> None:
    shapes = ({0: Dim.AUTO, 1: Dim.AUTO},)
    _, result = run(lambda s, x: x + torch.arange(x.shape[1]), 2, 5, dynamic_shapes=shapes)
    assert result.program(torch.zeros(3, 9))[0].tolist() == list(range(9))


def test_random_values_stay_random() -> None:
    program = capture(Model(lambda s, x: x + torch.rand(4)).eval(), (torch.zeros(2, 4),), verify=False)
    program = FoldConstants()(program, Context(verify=False)).program
    assert not torch.equal(program(torch.zeros(2, 4)), program(torch.zeros(2, 4)))


def test_large_results_stay_in_the_graph() -> None:
    """A full mask would be written out into the file; its small input would not."""
    program, result = run(
        lambda s, x: x + torch.arange(4.0)[None].expand(64, 4).sum(0), pass_=FoldConstants(max_bytes=64)
    )
    assert "expand.default" in functions(result.program) and "arange.default" not in functions(result.program)
    assert functions(run(lambda s, x: x + torch.arange(4.0)[None].expand(64, 4).sum(0))[1].program) == ["add.Tensor"]
    assert len(functions(program)) > 3


def test_constants_move_with_the_program() -> None:
    """They are buffers, so ``.to()`` reaches them."""
    _, result = run(lambda s, x: x + torch.arange(4.0) * 2)
    (name,) = {n for n, _ in result.program.gm.named_buffers()} - {"saved", "table"}
    assert name.startswith("_constant")
    assert result.program.gm.to("meta").get_buffer(name).device.type == "meta"


def test_golden() -> None:
    check_golden("fold_constants", *run(lambda s, x: x * torch.exp(s.table) + torch.exp(s.saved) + torch.exp(s.weight)))
