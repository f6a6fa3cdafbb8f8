"""What a MODEL argument resolves to, and what all its forms share."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.errors import MissingRuntimeError, ModelSpecError, UsageError
from fxcompress.preprocess import Preprocessing

__all__ = ["PICKLES", "ResolvedModel", "import_optional", "parse_shape"]

#: File names that usually hold pickles.
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".th")


@dataclass
class ResolvedModel:
    """What a MODEL argument stands for.

    Attributes:
        spec: The argument.
        kind: ``py``, ``timm``, ``hf``, ``pt2`` or ``folder``.
        name: Short name for tables.
        module: The model in eval mode; None for a saved folder.
        args: Example positional inputs; empty together with ``kwargs`` when none are known.
        kwargs: Example keyword inputs.
        preprocessing: How images become inputs, when the model says so.
        folder: The saved folder, or None.
        dynamic_shapes: Free sizes as ``capture`` takes them; None leaves them to ``capture``.
        fixed_batch: The one batch size the model takes; None when it is free or not known.
        notes: What the user should know, one line each.
    """

    spec: str
    kind: str
    name: str
    module: nn.Module | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    preprocessing: Preprocessing | None = None
    folder: Path | None = None
    dynamic_shapes: Any = None
    fixed_batch: int | None = None
    notes: list[str] = field(default_factory=list)

    def require_module(self) -> nn.Module:
        """The module. Raises ModelSpecError for a saved folder."""
        if self.module is None:
            raise ModelSpecError(
                2,
                f"{self.spec} is a saved engine, not a model",
                fix="give the model it was made from; see `fxcompress inspect`",
            )
        return self.module

    @property
    def has_example(self) -> bool:
        """True when example inputs are known."""
        return bool(self.args or self.kwargs)


def parse_shape(text: str) -> Tensor:
    """An example input of a shape: ``1,3,224,224`` is float32 from N(0, 1), ``1,128:int64`` integers 0 and 1.

    Raises:
        UsageError: not a shape, or no such dtype.
    """
    sizes, _, kind = text.replace("x", ",").partition(":")
    dtype = getattr(torch, kind or "float32", None)
    if not re.fullmatch(r"\d+(,\d+)*", sizes.strip()) or not isinstance(dtype, torch.dtype):
        raise UsageError(
            50,
            f"{text!r} is not an input shape",
            fix="write sizes and, if not float32, a dtype: 1,3,224,224 or 1,128:int64",
        )
    shape = [int(s) for s in sizes.split(",")]
    return torch.randn(shape).to(dtype) if dtype.is_floating_point else torch.randint(0, 2, shape).to(dtype)


def import_optional(name: str) -> Any:
    """Import a package that is not a dependency. Raises MissingRuntimeError with the pip line."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise MissingRuntimeError(20, f"{name} is not installed", fix=f"pip install {name}") from None
    except (ImportError, RuntimeError) as error:
        why = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        fix = "install builds of torch, torchvision and this package that belong together"
        raise MissingRuntimeError(21, f"{name} is installed but cannot be imported", why=why, fix=fix) from error
