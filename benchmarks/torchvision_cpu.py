"""Import this before ``torchvision`` when torch has no CUDA.

The torchvision wheel on PyPI is built for CUDA. With a CPU build of torch its compiled operators do not load, and its
Python code then fails while it registers shape functions for operators that nobody has defined. Declaring the two
schemas that are asked for at import time is enough: classification models use no torchvision operator.
"""

from __future__ import annotations

import importlib.util
from typing import Final

import torch

_SCHEMAS: Final = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: torch.library.Library | None = None


def prepare() -> None:
    """Declares torchvision's operator schemas, once, if torch is a CPU build and torchvision is installed."""
    global _library
    if _library is not None or torch.version.cuda is not None or importlib.util.find_spec("torchvision") is None:
        return
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        _library.define(schema)
    known = torch._C._dispatch_has_kernel_for_dispatch_key

    def has_kernel(name: str, dispatch: str | torch._C.DispatchKey) -> bool:
        """As torch's own query, but an undeclared operator counts as present, so that no fake is registered for it."""
        try:
            return bool(known(name, dispatch))
        except RuntimeError:
            return True

    torch._C._dispatch_has_kernel_for_dispatch_key = has_kernel


prepare()
