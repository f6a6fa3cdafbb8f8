"""What cannot be captured: every obstacle with its line, and what to do; and the second strategy."""

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxcompress.capture import capture
from fxcompress.errors import CaptureError, FxcError, UsageError
from fxcompress.ir import nonfinite_tensors
from tests.helpers.capture_checks import check_capture, floats, images

SOURCE = Path(__file__).read_text().splitlines()
ROOT = Path(__file__).parents[2]


def line(marker: str) -> str:
    """``test_errors.py:12`` of the line that ends with ``# marker``."""
    (number,) = [i for i, text in enumerate(SOURCE, 1) if text.endswith(f"# {marker}")]
    return f"test_errors.py:{number} "


def refused(model: nn.Module, *args: Any, **options: Any) -> CaptureError:
    """The error of capturing ``model``; its training mode must be restored."""
    model.train()
    with pytest.raises(CaptureError) as caught:
        capture(model, args, **options)
    assert model.training
    assert caught.value.fix
    return caught.value


class Branches(nn.Module):
    """Two branches on values, a size out of a value, and Python side effects."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.history: list[float] = []
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if x.sum() > 0:  # first branch
            x = x + 1
        level = x.mean().item()
        self.history.append(level)
        if level > 0:  # second branch
            x = x * 2
        return self.gated(self.fc(x))

    def gated(self, x: Tensor) -> Tensor:
        while x.norm() > 10:  # loop
            x = x / 2
        return x


def test_every_obstacle_is_listed_with_its_line() -> None:
    model = Branches()
    error = refused(model, torch.randn(2, 4))
    assert error.id == "FXC-CAPTURE-002" and "Branches" in error.what
    for marker in ("first branch", "second branch", "loop"):
        assert error.where.count(line(marker)) == 1, error.where
    assert error.where.count("\n") == 2 and "depends on tensor values" in error.where
    assert "torch.where" in error.fix
    assert model.calls == 0 and model.history == []


class Obstacles(nn.Module):
    """A branch, numbers and NumPy, before and behind a call that no tracing gets past."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.tail = nn.Linear(4, 4), Tail()

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        if x.sum() > 0:  # branch
            x = x + 1
        keep = int(x.abs().sum()) % 3 + 1  # number
        size = int(torch.tensor(2)) + x.shape[0]
        x = torch.from_numpy(np.sin(x[:, :keep].detach().numpy()))  # numpy
        return self.tail(x.repeat(1, size)[:, :4])


class Tail(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        ranks = x.argsort(1).tolist()  # list
        rows = np.asarray(x)  # array
        return x * len(ranks) + torch.from_numpy(rows) * float(x.mean())  # second number


def test_obstacles_behind_one_that_stops_tracing_are_listed() -> None:
    error = refused(Obstacles(), torch.randn(2, 4))
    listed = error.where.split("\n")
    expected = [
        ("branch", "depends on tensor values"),
        ("number", "makes a Python number"),
        ("numpy", "NumPy"),
        ("list", "makes a Python number"),
        ("array", "NumPy"),
        ("second number", "makes a Python number"),
    ]
    assert len(listed) == len(expected), error.where
    for text, (marker, how) in zip(listed, expected, strict=True):
        assert line(marker) in text and how in text, text
    assert error.why.count("torch.export") == 2 and error.why.count("GuardOnDataDependent") == 1
    assert "NumPy" in error.fix


def test_numpy_in_a_library_function_is_listed_at_the_users_line() -> None:
    class ThroughNumpy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * np.linalg.norm(x.detach())  # norm

    error = refused(ThroughNumpy(), torch.randn(2, 4))
    assert line("norm") in error.where and error.where.count("\n") == 0


def test_nothing_is_printed_about_failed_attempts(tmp_path: Path) -> None:
    """In a process of its own: torch makes some of its loggers only when it needs them."""
    script = tmp_path / "fails.py"
    script.write_text(
        "import sys\n"
        "import torch\n"
        "import fxcompress.errors\n"
        "class Branch(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x * 2 if x.sum() > 0 else x\n"
        "try:\n"
        "    fxcompress.capture(Branch(), (torch.randn(2, 4),))\n"
        "except fxcompress.errors.CaptureError as error:\n"
        "    sys.exit(0 if f'{__file__}:6' in error.where else 1)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_model_that_fails_itself() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Fails())
    error = refused(model, torch.randn(2, 4))
    assert error.id == "FXC-CAPTURE-001" and line("fails") in error.where
    assert "RuntimeError" in error.why and "shape" in error.why


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(3, 5)  # fails


def test_random_model() -> None:
    class Random(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x * 2)  # dropout without training

    error = refused(nn.Sequential(nn.Linear(50, 50), Random()), torch.randn(2, 50))
    assert error.id == "FXC-CAPTURE-004" and line("dropout without training").strip() in error.where
    assert "random" in error.why
    program = capture(nn.Sequential(nn.Linear(50, 50), Random()), (torch.randn(2, 50),), verify=False)
    assert not torch.equal(program(torch.ones(2, 50)), program(torch.ones(2, 50)))


def test_model_with_state_in_python() -> None:
    class Annealed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = 0

        def forward(self, x: Tensor) -> Tensor:
            self.step += 1
            return x * math.exp(-self.step)

    model = Annealed()
    error = refused(model, torch.randn(2, 4))
    assert error.id == "FXC-CAPTURE-004" and "state" in error.why
    assert model.step == 0


def test_branch_hidden_from_tracing() -> None:
    class Hidden(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * (2 if type(x) is Tensor else 3)

    error = refused(Hidden(), torch.randn(2, 4))
    assert error.id == "FXC-CAPTURE-007" and "differ by 0.5" in error.why


def test_output_that_is_no_tensor() -> None:
    class KeyCache:
        """As transformers' models return it by default."""

    class Cached(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"logits": x * 2, "past": (KeyCache(), x)}

    error = refused(Cached(), torch.randn(2, 4))
    assert error.id == "FXC-CAPTURE-008" and "KeyCache" in error.what
    assert error.where == "output['past'][0]" and "use_cache = False" in error.fix


def test_input_that_is_no_tensor() -> None:
    class Settings:
        scale = 2.0

    class Scaled(nn.Module):
        def forward(self, x: Tensor, settings: list[Settings]) -> Tensor:
            return x * settings[0].scale

    error = refused(Scaled(), torch.randn(2, 4), [Settings()])
    assert error.id == "FXC-CAPTURE-012" and "Settings" in error.what and error.where == "args[1][0]"


def test_wrong_arguments() -> None:
    model: Any = nn.Linear(4, 4)
    for arguments in ((model, torch.randn(2, 4)), (model, {"input": torch.randn(2, 4)}), (model.forward, ())):
        with pytest.raises(UsageError, match=r"capture\(model, \(x,\), {}\)") as caught:
            capture(*arguments)
        assert caught.value.id == "FXC-USAGE-018"


def test_operator_without_a_shape_function() -> None:
    with torch.library._scoped_library("fxcompress_test", "FRAGMENT") as library:
        library.define("double(Tensor x) -> Tensor")
        library.impl("double", lambda x: x * 2, "CPU")

        class Custom(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.ops.fxcompress_test.double(x)  # custom operator

        error = refused(Custom(), torch.randn(2, 4))
        assert "register_fake" in error.fix and line("custom operator") in error.where


def test_submodule_named_like_a_keyword() -> None:
    heads = nn.ModuleDict({"a-b": nn.Linear(4, 4), "0": nn.Linear(4, 4)})

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = heads

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {name: head(x) for name, head in self.heads.items()}

    check_capture(Heads(), floats(4))
    heads["class"] = nn.Linear(4, 4)
    error = refused(Heads(), torch.randn(2, 4))
    assert error.id == "FXC-CAPTURE-009" and error.where == "heads.class"


def test_lazy_parameters() -> None:
    error = refused(nn.Sequential(nn.LazyLinear(4)), torch.randn(2, 4))
    assert error.id == "FXC-CAPTURE-006" and "0.weight" in error.where


def test_write_without_functional_form() -> None:
    class Resizes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 1
            y.unfold(1, 2, 1).add_(1)  # overlapping windows
            return y

    error = refused(Resizes(), torch.randn(2, 4), dynamic_batch=False)
    assert error.id in ("FXC-CAPTURE-001", "FXC-CAPTURE-002", "FXC-CAPTURE-005")


def test_wrong_dynamic_shapes_are_told() -> None:
    error = refused(nn.Linear(4, 4), torch.randn(2, 4), dynamic_shapes=({1: torch.export.Dim("width")},))
    assert error.id == "FXC-CAPTURE-002" and "width" in error.why


def test_every_error_is_of_the_family() -> None:
    for model in (Branches(), Fails()):
        with pytest.raises(FxcError) as caught:
            capture(model, (torch.randn(2, 4),))
        assert re.match(r"FXC-CAPTURE-\d{3}", str(caught.value))


# ------------------------------------------------------------------------------------------------ torch.fx
class Checked(nn.Module):
    """Checks its input's values, as careful code does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.last: Tensor | None = None

    def forward(self, x: Tensor, scale: float = 2.0, mask: Tensor | None = None) -> dict[str, Tensor]:
        assert not torch.isnan(x).any(), "NaN in the input"  # check 1
        if (x.abs() > 100).any():  # check 2
            raise ValueError("the input is not normalised")
        assert (x.abs() < 1000).all()  # check 3
        x = self.norm(self.conv(x)) * scale
        self.last = x
        return {"features": x if mask is None else x * mask}


def test_checks_of_values_are_passed_over_by_the_second_strategy() -> None:
    model = Checked()
    notes = ("checks of tensor values", "captured with torch.fx; failed: torch.export", "forward assigns last")
    program = check_capture(model, images(size=6), notes=notes)
    for marker in ("check 1", "check 2", "check 3"):
        assert line(marker).strip() in program.notes[0]
    assert model.last is not None and not isinstance(model.last, torch.fx.Proxy)  # of the eager runs
    assert not program(torch.full((2, 3, 6, 6), float("nan")))["features"].isfinite().any()


def test_a_branch_is_not_taken_for_a_check() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if (x > 100).any():  # no check
                x = x / 100
            return x * 2

    assert line("no check") in refused(Branch(), torch.randn(2, 4)).where


# ------------------------------------------------------------------------------------------------ weights
def test_nonfinite_tensors_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2))
    program = capture(model, (torch.randn(1, 3, 6, 6),))
    assert nonfinite_tensors(program) == []
    with torch.no_grad():
        model[0].weight[1, 2, 0, 0] = float("nan")
        model[1].running_var[3] = float("inf")
    named = "\n".join(nonfinite_tensors(program))
    assert "0.weight" in named and "1.running_var" in named and "3." not in named


def test_floats_helper_is_random() -> None:
    """The checks above mean nothing on constant inputs."""
    (x,), _ = floats(4)(3)
    assert x.std() > 0
