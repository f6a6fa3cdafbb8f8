"""QuantizeStatic and its data: one pass, a limit, memory, every shape of batch."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxcompress.capture import capture
from fxcompress.data import CalibrationData
from fxcompress.passbase import Context
from fxcompress.passes import QuantizeStatic
from tests.helpers.small_net import fused, images, quantize


# ------------------------------------------------------------------------------------------------ data
class Loader:
    """Counts how often it is iterated and how many batches were taken; batches can be watched dying."""

    def __init__(self, count: int, batch: int = 2, make: Callable[[Tensor], Any] = lambda x: x) -> None:
        self.count, self.batch, self.make = count, batch, make
        self.started = self.taken = 0
        self.alive: list[weakref.ref[Tensor]] = []
        self.most_alive = 0

    def __iter__(self) -> Iterator[Any]:
        self.started += 1
        for index in range(self.count):
            x = images(self.batch, seed=index)
            self.alive.append(weakref.ref(x))
            self.taken += 1
            batch = self.make(x)
            del x
            yield batch
            del batch
            self.most_alive = max(self.most_alive, sum(r() is not None for r in self.alive))


def test_one_pass_over_the_data() -> None:
    loader = Loader(10)
    result = quantize(fused(), loader)
    assert loader.started == 1 and loader.taken == 10
    assert result.metrics["steps"][-1].metrics["samples"] == 20
    assert "calibrated on 20 samples, 300 asked for" in result.notes


@pytest.mark.parametrize(("samples", "taken"), [(1, 1), (2, 1), (3, 2), (20, 10), (21, 10)])
def test_sample_limit(samples: int, taken: int) -> None:
    """Whole batches are used; none is fetched that is not needed."""
    loader = Loader(10)
    result = quantize(fused(), loader, samples=samples)
    assert loader.taken == taken
    assert any("asked for" in n for n in result.notes) == (samples > 20)


def test_memory_does_not_grow_with_the_batches() -> None:
    loader = Loader(40)
    quantize(fused(), loader)
    assert loader.most_alive <= 2


def test_order_of_the_batches_does_not_matter_to_the_extremes() -> None:
    batches = list(images(12).split(3))
    forwards = quantize(fused(), batches, calibrator="minmax").program
    backwards = quantize(fused(), batches[::-1], calibrator="minmax").program
    for a, b in zip(forwards.run_example(), backwards.run_example(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


SHAPES: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x,),
    "list": lambda x: [x],
    "input and label": lambda x: (x, torch.zeros(len(x), dtype=torch.long)),
    "input and two labels": lambda x: [x, torch.zeros(len(x)), "name"],
    "dict": lambda x: {"x": x},
    "dict with a label": lambda x: {"x": x, "label": torch.zeros(len(x))},
    "dict and label": lambda x: ({"x": x}, torch.zeros(len(x))),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_batches(shape: str) -> None:
    expected = quantize(fused(), Loader(3)).program.run_example()
    got = quantize(fused(), Loader(3, make=SHAPES[shape])).program.run_example()
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_generator() -> None:
    expected = quantize(fused(), Loader(3)).program.run_example()
    got = quantize(fused(), iter(Loader(3))).program.run_example()
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_dataset_of_pairs_in_a_dataloader() -> None:
    dataset = torch.utils.data.TensorDataset(images(12), torch.zeros(12))
    loader = torch.utils.data.DataLoader(dataset, batch_size=5)
    result = quantize(fused(), loader)
    assert result.metrics["steps"][-1].metrics["samples"] == 12


def test_two_inputs_and_keywords() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor, *, y: Tensor) -> Tensor:
            return self.a(x) + self.b(y)  # type: ignore[no-any-return]

    program = capture(Two(), (torch.randn(2, 3),), {"y": torch.randn(2, 4)})
    x, y = torch.randn(8, 3), torch.randn(8, 4)
    results = [
        QuantizeStatic()(program, Context(calibration=[batch])).program.run_example()[0]
        for batch in ((x, y), {"x": x, "y": y, "label": 1}, (x, y, torch.zeros(8)), [x, y])
    ]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


def test_wrapped_data_is_used_as_it_is() -> None:
    data = CalibrationData(Loader(3))
    quantize(fused(), data)
    assert data.seen == 6 and data.skipped == 0
