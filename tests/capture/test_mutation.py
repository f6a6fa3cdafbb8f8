"""In-place code: the program computes what eager PyTorch computes, without one in-place operator."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.capture import capture
from fxcompress.errors import CaptureError
from fxcompress.mutation import is_mutable
from tests.helpers.capture_checks import check_capture, floats, functions


class Inline(nn.Module):
    """A module out of one function and a linear layer in front."""

    def __init__(self, body: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.body = body

    def forward(self, x: Tensor) -> object:
        return self.body(self.fc(x))


def chain(x: Tensor) -> Tensor:
    y = x.relu_()
    y += 1
    return x.mul_(2) + y  # x and y are one tensor


def view_then_base(x: Tensor) -> Tensor:
    v = x.view(-1)
    v.mul_(2)
    return x + 1


def base_then_view(x: Tensor) -> Tensor:
    v = x.t()
    x.add_(1)
    return v * 2


def slices(x: Tensor) -> Tensor:
    x[:, 1:3] = 0
    x[:, -1] += 5
    x[:, ::2] *= 3
    return x


def rows(x: Tensor) -> Tensor:
    y = x.new_zeros(x.shape[0], 3, 6)
    for i in range(3):
        y[:, i] = x * i
    return y


def pieces(x: Tensor) -> tuple[Tensor, ...]:
    a, b, c = x.chunk(3, 1)
    a.relu_()
    b += a
    return a, b, c, x


def overlapping(x: Tensor) -> tuple[Tensor, ...]:
    left, right = x[:, :4], x[:, 2:]
    left.add_(1)
    right.mul_(2)
    return left, right, x


def nested_views(x: Tensor) -> tuple[Tensor, ...]:
    a = x.view(-1, 2, 3)
    b = a.transpose(1, 2)
    c = b[:, 1]
    c.neg_()
    old = a + 0
    x.add_(10)
    return a, b, c, x, old


def through_unbind(x: Tensor) -> Tensor:
    for i, column in enumerate(x.view(-1, 2, 3).unbind(1)):
        column.add_(i)
    return x


def through_permute(x: Tensor) -> Tensor:
    x.view(-1, 1, 2, 3).permute(3, 0, 2, 1)[1].fill_(4)
    return x


def split_sizes(x: Tensor) -> tuple[Tensor, Tensor]:
    a, _ = torch.split(x, [2, 4], 1)
    y = x * 1
    a.zero_()
    return x, y


def reshaped_in_place(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x * 1
    y.unsqueeze_(1)
    y.transpose_(0, 1).add_(1)
    z = y.squeeze_(0)
    return y, z.relu_()


def masks(x: Tensor) -> Tensor:
    mask = torch.zeros(6, 6)
    mask[2:, :3] = float("-inf")
    mask.diagonal().fill_(1)
    x.masked_fill_(mask[0] == 1, 7.0)
    return x.view(-1, 1, 6) + mask.masked_fill(mask < 0, 0)


def copies(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    out.copy_(x.sum(1, keepdim=True))
    out[:, 0].copy_(x[:, 1])
    x[:, 0] = x[:, 1]
    x[:, 1] = 3
    return out + x


def dtypes(x: Tensor) -> Tensor:
    half = x.to(torch.bfloat16)
    half += x  # stays bfloat16
    count = torch.ones(6, dtype=torch.int64)
    count[1:] = x.shape[1]
    return half.float() * count


def dropout_alias(x: Tensor) -> tuple[Tensor, Tensor]:
    y = F.dropout(x, 0.5, training=False)  # the very same tensor in eval mode
    y.add_(1)
    return x, y


def aliases_without_annotation(x: Tensor) -> tuple[Tensor, ...]:
    y = torch.einsum("bi->ib", x)  # a view
    x.mul_(3)
    z = x.type_as(x)
    z.add_(1)
    return x, y, z


def written_before_the_piece_is_taken(x: Tensor) -> Tensor:
    parts = x.split(2, 1)
    x.add_(1)
    return parts[1] * 1


def indexed(x: Tensor) -> Tensor:
    x[torch.tensor([0]), torch.tensor([1, 2])] = 0.5
    x.index_add_(1, torch.tensor([3]), torch.ones_like(x[:, :1]))
    x.scatter_(1, torch.zeros_like(x[:, :1], dtype=torch.long), 2.0)
    return x


def without_functional_form(x: Tensor) -> Tensor:
    return x.fill_diagonal_(1)


def out_argument(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    torch.add(x, 1, out=y)
    return y


def input_itself(x: Tensor) -> Tensor:
    return x


BODIES = [
    chain, view_then_base, base_then_view, slices, rows, pieces, overlapping, nested_views, through_unbind, through_permute,
    split_sizes, reshaped_in_place, masks, copies, dtypes, dropout_alias, aliases_without_annotation,
    written_before_the_piece_is_taken, indexed,
]  # fmt: skip


@pytest.mark.parametrize("body", BODIES, ids=lambda f: f.__name__)
def test_in_place(body: Callable[[Tensor], object]) -> None:
    program = check_capture(Inline(body), floats(6), again=False)
    assert not any(is_mutable(node) for node in program.graph.nodes)


@pytest.mark.parametrize("body", [out_argument, without_functional_form], ids=lambda f: f.__name__)
def test_operators_without_functional_form_are_decomposed(body: Callable[[Tensor], object]) -> None:
    check_capture(Inline(body), floats(6), notes=("operators were decomposed",), again=False)


def test_what_nothing_reads_costs_nothing() -> None:
    """A written view is not copied back into a base that nobody reads; disjoint pieces do not touch each other."""
    program = check_capture(Inline(lambda x: [p.relu_() for p in x.split(2, 1)]), floats(6))
    assert functions(program) == ["split", "relu", "relu", "relu"]


def test_constant_mask_is_computed_once() -> None:
    program = check_capture(Inline(masks), floats(6))
    assert not {"zeros", "diagonal", "full_like", "cat"} & set(functions(program))
    assert not any(name.startswith("_constant") for name in program.gm.state_dict())


def test_the_callers_input_is_not_written() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 6))
    x = -torch.ones(2, 6)
    program = capture(model, (x,))
    assert (x == -1).all()
    program(x)
    assert (x == -1).all()
    check_capture(model, floats(6))


class Counter(nn.Module):
    """Counts its calls; the outputs do not depend on the count."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.register_buffer("calls", torch.zeros(()))
        self.python_calls = 0
        self.seen: list[int] = []
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.python_calls += 1
        self.seen.append(x.shape[0])
        return self.fc(x)


def test_state_that_no_output_reads_is_dropped_with_a_note() -> None:
    model = Counter()
    program = capture(model, (torch.randn(1, 6),))
    assert (
        len(program.notes) == 1
        and "forward writes calls" in program.notes[0]
        and "test_mutation.py:" in program.notes[0]
    )
    assert model.calls == 0 and model.python_calls == 0 and model.seen == []
    x = torch.randn(3, 6)
    assert torch.equal(program(x), model.eval()(x))


def test_scratch_buffer_that_is_overwritten_before_it_is_read() -> None:
    class Scratch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scratch", torch.zeros(4, 6), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            self.scratch.copy_(x)
            return self.scratch * 2

    program = capture(Scratch(), (torch.randn(4, 6),))
    x = torch.randn(4, 6)
    assert torch.equal(program(x), x * 2)
    assert (
        "forward writes scratch" in program.notes[0] and "sizes are fixed" in program.notes[1]
    )  # the scratch has 4 rows


def test_state_that_outputs_depend_on_is_refused() -> None:
    class Running(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(6))

        def forward(self, x: Tensor) -> Tensor:
            self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
            return x - self.mean

    model = Running()
    with pytest.raises(CaptureError) as caught:
        capture(model, (torch.randn(3, 6),))
    assert caught.value.id == "FXC-CAPTURE-003"
    assert "mean" in caught.value.where and "test_mutation.py:" in caught.value.where
    assert not model.mean.any(), "the model's buffer was changed"
