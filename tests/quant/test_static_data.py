"""QuantizeStatic and its data: one pass, a limit, memory, every shape of batch."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxcompress.capture import capture
from fxcompress.data import CalibrationData, grouped
from fxcompress.errors import CalibrationError
from fxcompress.ir import Program
from fxcompress.passbase import Context
from fxcompress.passes import QuantizeStatic
from fxcompress.quant.calibration import TOGETHER, calibrate, freeze, insert_observers
from fxcompress.quant.fake_quantize import FakeQuantize
from fxcompress.quant.placement import place
from fxcompress.quant.scheme import QuantScheme
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
    assert loader.most_alive <= 2 * TOGETHER // loader.batch  # a run and the next one


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


# ------------------------------------------------------------------------------------------------ batches run together
def seen_by(program: Program, batches: list[Any], calibrator: str = "minmax") -> tuple[list[int], FakeQuantize]:
    """Samples of each run during calibration, and the quantizer of the input."""
    scheme = QuantScheme()
    quantizers = insert_observers(program, place(program, scheme), scheme, calibrator)
    sizes: list[int] = []
    layer = next(m for m in program.gm.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    handle = layer.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    calibrate(program, CalibrationData(batches), 300)
    handle.remove()
    freeze(quantizers, [])
    return sizes, quantizers["x" if "x" in quantizers else next(iter(quantizers))]


def network(batch: int, **shapes: Any) -> Program:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    return capture(model.eval(), (images(batch),), **shapes)


@pytest.mark.parametrize(
    ("batches", "sizes"),
    [([1] * 10, [8, 2]), ([3, 3, 3, 1], [6, 4]), ([16, 1, 1], [16, 2]), ([1], [1])],
)
def test_small_batches_run_together(batches: list[int], sizes: list[int]) -> None:
    data = [images(size, seed=n) for n, size in enumerate(batches)]
    found, quantizer = seen_by(network(2), data)
    assert found == sizes
    alone = FakeQuantize(quantizer.spec)
    everything = torch.cat(data)
    alone.set_range(everything.min(), everything.max())
    assert torch.equal(quantizer.scale, alone.scale) and torch.equal(quantizer.zero_point, alone.zero_point)


def test_batches_stay_apart_where_they_must() -> None:
    """An average over batches, a fixed batch, other shapes, large inputs."""
    ones = [images(1, seed=n) for n in range(4)]
    assert seen_by(network(2), ones, "moving_average")[0] == [1] * 4
    assert seen_by(network(1, dynamic_shapes=({},)), ones)[0] == [1] * 4
    free = network(2, dynamic_shapes=({0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO},))
    wide = torch.cat([ones[1], ones[1]], dim=2)
    assert seen_by(free, [ones[0], ones[0], wide, ones[1]])[0] == [2, 1, 1]
    huge = torch.zeros(1, 3, 700, 700)
    assert [len(g) for g in grouped([((huge,), {})] * 3, lambda call: call, 8)] == [1, 1, 1]


def test_batch_that_fails_among_others_is_named() -> None:
    program = capture(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2)), (torch.tensor([[1, 2]] * 2),))
    good, bad = torch.tensor([[1, 2]]), torch.tensor([[1, 7]])
    with pytest.raises(CalibrationError, match="calibration batch 3"):
        quantize(program, [good, good, good, bad, good])
