"""Training, modes, dtypes and what a captured program leaves alone."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from fxcompress.capture import capture, from_exported
from fxcompress.errors import CaptureError
from tests.helpers.capture_checks import (
    check_capture,
    floats,
    functions,
    layer_types,
)


def small_cnn() -> nn.Sequential:
    block = [
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8, momentum=0.2),
        nn.ReLU(inplace=True),
        nn.Dropout2d(0.0),
    ]
    return nn.Sequential(*block, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 6), nn.BatchNorm1d(6, momentum=None))


def test_training_the_program_trains_like_the_model() -> None:
    """Three steps of SGD on a program and on a deep copy of its model: same losses, weights and statistics."""
    model = small_cnn()
    program = capture(copy.deepcopy(model), (torch.randn(1, 3, 6, 6),))
    model.train()
    program.gm.train()
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (model, program.gm)]
    for _ in range(3):
        x, y = torch.randn(5, 3, 6, 6), torch.randint(0, 6, (5,))
        losses = []
        for runner, optimizer in zip((model, program), optimizers, strict=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(runner(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)
    assert int(model[1].num_batches_tracked) == 3
    for key, value in model.state_dict().items():
        torch.testing.assert_close(program.gm.state_dict()[key], value, rtol=0, atol=0)
    model.eval()
    program.gm.eval()
    assert torch.equal(model(x), program(x))


def test_no_grad_region_stays_without_gradient() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                features = self.body(x)
                scale = torch.arange(4) * 1.0
            return self.head(features * scale)

    program = check_capture(Frozen(), floats(4))
    assert functions(program).count("detach") == 1  # the arange needs none
    program(torch.randn(2, 4)).sum().backward()
    assert program.gm.get_parameter("body.weight").grad is None
    assert program.gm.get_parameter("head.weight").grad is not None


def test_modes_hooks_and_attributes_of_the_model_are_restored() -> None:
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.cache: dict[int, Tensor] = {}
            self.mask: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if 4 not in self.cache:
                self.cache[4] = torch.arange(4).view(1, 4, 1, 1) * 1.0
            self.mask = self.cache[4] > 1
            return self.norm(self.conv(x)) * self.mask

    model = Caching()
    seen: list[str] = []
    model.conv.register_forward_hook(lambda m, i, o: o + 1)
    model.norm.register_forward_pre_hook(lambda m, i: (i[0] * 2,))
    model.register_forward_hook(lambda m, i, o: seen.append("called"))
    model.conv.train()
    model.norm.eval()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    program = capture(model, (torch.ones(1, 3, 6, 6),))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.conv.training and not model.norm.training and model.training
    assert model.cache == {} and model.mask is None
    for name, module in model.named_modules():
        assert set(module.__dict__) == set(before[name])
        assert all(value is before[name][key] for key, value in module.__dict__.items())
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    x = torch.randn(3, 3, 6, 6)
    assert torch.equal(model.eval()(x), program(x))
    assert "forward assigns mask" in program.notes[0]


def test_capture_from_an_exported_program() -> None:
    model = small_cnn().eval()
    x = torch.randn(2, 3, 6, 6)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: Dim.AUTO},))
    program = from_exported(exported)
    assert set(program.gm.state_dict()) == set(model.state_dict())
    assert sorted(layer_types(program).values()) == sorted(
        type(m).__name__ for m in model if not isinstance(m, (nn.ReLU, nn.MaxPool2d, nn.Flatten))
    )
    y = torch.randn(5, 3, 6, 6)
    assert torch.equal(program(y), model(y))


def test_unused_parameters_keep_their_keys() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)
            self.lonely = nn.Parameter(torch.ones(2))
            self.register_buffer("table", torch.ones(3))
            self.register_buffer("scratch", torch.ones(3), persistent=False)
            self.many = nn.ParameterList([nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(4))])

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x) * self.many[1]

    check_capture(Unused(), floats(4))


def test_nonfinite_weights_are_captured() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
        model[1].bias[1] = float("inf")
    check_capture(model, floats(4))


def test_bfloat16_and_double() -> None:
    for dtype in (torch.bfloat16, torch.float64):
        check_capture(
            nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).to(dtype),
            lambda b, d=dtype: ((torch.randn(b, 4, dtype=d),), {}),
        )


def test_autocast_inside_forward() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.fc(x)
            with torch.autocast("cpu", enabled=False):
                return self.out(y.float())

    program = check_capture(Mixed(), floats(4), notes=("operators were decomposed",), again=False)
    assert "out" in layer_types(program)


def test_inference_mode() -> None:
    """Capture inside of it, an example made inside of it; a model made inside of it cannot leave it."""
    with torch.inference_mode():
        x = torch.randn(1, 3, 6, 6)
        made_inside = small_cnn()
        program = capture(made_inside, (x,))
        assert program.notes == [] and torch.equal(program(x), made_inside.eval()(x))
    with pytest.raises(CaptureError) as caught:
        capture(made_inside, (x,))
    assert caught.value.id == "FXC-CAPTURE-011" and "0.weight" in caught.value.where
    model = small_cnn()
    with torch.inference_mode():
        program = capture(model, (x,))
    program.gm.train()
    program(torch.randn(4, 3, 6, 6)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_table_made_in_inference_mode() -> None:
    """As rotary embeddings cache theirs when the model has run in inference mode before."""

    class Scaled(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.register_buffer("table", None)

        def forward(self, x: Tensor) -> Tensor:
            if self.table is None:
                self.table = torch.arange(4) * 1.0
            return super().forward(x) * self.table

    model = Scaled()
    with torch.inference_mode():
        model(torch.randn(1, 4))
    assert model.table is not None and model.table.is_inference()
    check_capture(model, floats(4), again=False)


def test_threads_capture_one_after_the_other() -> None:
    models = [small_cnn() for _ in range(3)]
    x = torch.randn(1, 3, 6, 6)
    with ThreadPoolExecutor(3) as pool:
        programs = list(pool.map(lambda m: capture(m, (x,)), models))
    for model, program in zip(models, programs, strict=True):
        assert program.notes == [] and torch.equal(program(x), model.eval()(x))
