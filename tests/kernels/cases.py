"""What the tests of the kernels share."""

import torch


def device() -> str:
    """Where kernels run: a GPU, else Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """``|got - expected| / |expected|`` in float64."""
    return float((got.double() - expected.double()).norm() / expected.double().norm())
