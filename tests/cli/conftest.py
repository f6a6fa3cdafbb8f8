"""A small CNN, data for it, and the command line as a function."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fxcompress.api
from fxcompress.cli import main
from fxcompress.modelspec import resolve

FACTORY = """
import torch
from torch import nn
import torch.nn.functional as F

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.branch = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 4)
        self.last = nn.LayerNorm(4)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.branch(x))
        return self.last(self.head(x.mean((2, 3))))

def build():
    return Net(), torch.randn(1, 3, 16, 16)

def bare():
    return Net()

class Branching(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x - 1

def branching():
    return Branching(), torch.randn(2, 3)
"""


@pytest.fixture(autouse=True)
def no_terminal_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables as wide as they are in a pipe, whatever terminal the tests run in."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(FACTORY)
    return "py:net.py:build"


@pytest.fixture
def data(tmp_path: Path, model: str) -> str:
    """64 images; the labels are the model's own answers, so that its accuracy is 1."""
    module = resolve(model).require_module()
    images = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        labels = module(images).argmax(1)
    np.savez(tmp_path / "data.npz", x=images.numpy(), y=labels.numpy())
    return "data.npz"


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def replace_compile(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any] | BaseException], None]:
    """Puts a function, or the raising of an error, in place of ``compile``."""

    def put(action: Callable[..., Any] | BaseException) -> None:
        def run(*args: Any, **kwargs: Any) -> Any:
            if isinstance(action, BaseException):
                raise action
            return action(*args, **kwargs)

        monkeypatch.setattr(fxcompress.api, "compile", run)

    return put
