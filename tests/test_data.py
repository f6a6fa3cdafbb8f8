"""Calibration data: how batches become calls."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxcompress.capture import capture
from fxcompress.data import CalibrationData, as_call, example_from, input_problem
from fxcompress.errors import CalibrationError, UsageError

X, Y = torch.zeros(2, 3), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("batch", "names", "expected"),
    [
        (X, None, ((X,), {})),
        (X, ("x",), ((X,), {})),
        ((X,), None, ((X,), {})),
        ((X, 1), None, ((X,), {})),
        ([X, Y, 1], None, ((X, Y), {})),
        ([X, Y, 1], ("x",), ((X,), {})),
        ([X, Y, 1], ("x", "y"), ((X, Y), {})),
        ({"x": X, "label": 1}, ("x",), ((), {"x": X})),
        ({"x": X, "label": 1}, None, ((), {"x": X, "label": 1})),
        (UserDict({"x": X, "label": 1}), ("x",), ((), {"x": X})),
        (({"x": X}, 1), ("x",), ((), {"x": X})),
        (({"x": X}, 1), None, ((), {"x": X})),
        (({"pixels": X}, 1), ("x",), (({"pixels": X},), {})),
    ],
)
def test_as_call(batch: Any, names: tuple[str, ...] | None, expected: Any) -> None:
    args, kwargs = as_call(batch, names)
    assert len(args) == len(expected[0]) and all(a is b or a == b for a, b in zip(args, expected[0], strict=True))
    assert kwargs.keys() == expected[1].keys() and all(kwargs[k] is expected[1][k] for k in kwargs)


class Counted:
    def __init__(self, count: int) -> None:
        self.count, self.started, self.taken = count, 0, 0

    def __iter__(self) -> Iterator[Tensor]:
        self.started += 1
        for index in range(self.count):
            self.taken += 1
            yield torch.full((2, 3), float(index))


def program() -> Any:
    return capture(nn.Linear(3, 1), (X,))


def test_example_does_not_start_the_loader_twice() -> None:
    loader = Counted(3)
    data = CalibrationData(loader)
    assert example_from(data)[0][0].tolist() == X.tolist()
    assert example_from(data)[0][0].tolist() == X.tolist()
    assert (loader.started, loader.taken) == (1, 1)
    assert [args[0][0, 0].item() for args, _ in data.calls(program())] == [0.0, 1.0, 2.0]
    assert (loader.started, loader.taken) == (1, 3) and data.seen == 6
    assert len(list(data.calls(program()))) == 3 and loader.started == 2


def test_example_from_plain_data() -> None:
    assert example_from([(X, 1)])[0][0] is X
    with pytest.raises(UsageError, match="needs example_inputs or calibration data"):
        example_from(None)
    with pytest.raises(CalibrationError, match="empty"):
        example_from([])


def test_a_generator_is_read_once_and_can_be_read_again() -> None:
    loader = Counted(4)
    data = CalibrationData(iter(loader))
    p = program()
    assert example_from(data)[0][0][0, 0] == 0
    assert len(list(data.calls(p, limit=3))) == 2 and loader.taken == 2
    assert len(list(data.calls(p))) == 4 and len(list(data.calls(p))) == 4 and len(list(data)) == 4
    assert (loader.started, loader.taken) == (1, 4)


@pytest.mark.parametrize("bad", [X, {"x": X}, "folder", 3, None])
def test_what_is_no_loader_is_refused(bad: Any) -> None:
    with pytest.raises(UsageError, match="must be an iterable of batches"):
        CalibrationData(bad)


def test_limit_counts_samples() -> None:
    data = CalibrationData(Counted(10))
    p = program()
    for limit, batches in ((1, 1), (2, 1), (3, 2), (20, 10), (99, 10)):
        assert len(list(data.calls(p, limit))) == batches and data.seen == 2 * batches


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (torch.zeros(7, 3), ""),
        (torch.zeros(7, 4), r"shape \[7, 4\], expected \['any', 3\]"),
        (torch.zeros(3), "shape"),
        (torch.zeros(2, 3, dtype=torch.float64), "dtype torch.float64, expected torch.float32"),
        (3, "int instead of a tensor"),
    ],
)
def test_input_problem(value: Any, problem: str) -> None:
    import re

    fake = program().placeholders()[0].meta["val"]
    found = input_problem(fake, value)
    assert bool(found) == bool(problem) and re.match(problem, found)
    assert input_problem(3, 4) == "" and input_problem(3, X) == "a tensor where the captured call had none"
