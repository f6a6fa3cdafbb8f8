"""What capture needs of a model and its example: checked before anything is tried, said in the user's words."""

from __future__ import annotations

import keyword
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from fxcompress.errors import CaptureError, UsageError

__all__ = ["keyword_names", "require_arguments", "require_plain", "require_tensors"]

#: What inputs and outputs may be made of, besides containers.
_PLAIN = (Tensor, int, float, bool, str, type(None), torch.dtype, torch.device, torch.memory_format, torch.layout)
_TYPES = "tensors, numbers, strings, tuples, lists, dicts or dataclasses of them"


def require_arguments(model: Any, args: Any) -> None:
    """Raise ``UsageError`` unless ``model`` is a module and ``args`` a tuple."""
    if not isinstance(model, nn.Module) or not isinstance(args, (tuple, list)):
        got = f"{type(model).__name__} and {type(args).__name__}"
        raise UsageError(18, f"capture takes a module and a tuple of inputs, not {got}", fix="capture(model, (x,), {})")


def require_tensors(model: nn.Module) -> None:
    """Raise ``CaptureError`` for parameters and buffers that cannot be exported."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    lazy = [name for name, tensor in tensors if is_lazy(tensor)]
    if lazy:
        raise CaptureError(
            6,
            "the model has parameters without a shape",
            where=", ".join(lazy),
            fix="call the model once before capturing it",
        )
    made_inside = [name for name, parameter in model.named_parameters() if parameter.is_inference()]
    if made_inside and not torch.is_inference_mode_enabled():
        raise CaptureError(
            11,
            "the model was made in torch.inference_mode()",
            where=", ".join(made_inside[:3]),
            why="its tensors can be neither exported nor trained outside of that mode",
            fix="build or load the model outside torch.inference_mode()",
        )


def require_plain(args: Any, kwargs: Any, output: Any) -> None:
    """Raise ``CaptureError`` for inputs and outputs that no graph can have."""
    given = _foreign("args", args) | _foreign("kwargs", kwargs)
    if given:
        raise CaptureError(
            12,
            f"an input is something that no program can take: {', '.join(given.values())}",
            where=", ".join(given),
            fix=f"give forward {_TYPES}; settings belong into the module's __init__",
        )
    returned = _foreign("output", output)
    if returned:
        cached = any(kind.endswith("Cache") for kind in returned.values())
        way_out = "set model.config.use_cache = False (transformers), or " if cached else ""
        raise CaptureError(
            8,
            f"the model returns something that no program can: {', '.join(returned.values())}",
            where=", ".join(returned),
            fix=f"{way_out}return {_TYPES} from forward",
        )


def _foreign(name: str, tree: Any) -> dict[str, str]:
    """Place -> type of each leaf that is no plain value."""
    leaves = pytree.tree_leaves_with_path(tree)
    return {f"{name}{pytree.keystr(p)}": type(leaf).__name__ for p, leaf in leaves if not isinstance(leaf, _PLAIN)}


def keyword_names(model: nn.Module) -> list[str]:
    """Submodules whose names are Python keywords: the code that torch generates cannot say ``self.class``."""
    names = [name for name, _ in model.named_modules()]
    return [name for name in names if keyword.iskeyword(name.rpartition(".")[2])]
