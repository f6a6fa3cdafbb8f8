"""``sp24_w4_linear`` on a GPU: sparse tensor cores, or a dense 16-bit copy and cuBLAS."""

from __future__ import annotations

from torch import Tensor

from fxcompress.kernels.configs import Config, Device, Problem, device_of
from fxcompress.kernels.epilogue_triton import CompileCase
from fxcompress.kernels.gemm_launch_triton import readable
from fxcompress.kernels.sp24_triton import float_product
from fxcompress.kernels.sp24_w4 import check
from fxcompress.kernels.sparse_common import HALVES, W4, Packed
from fxcompress.kernels.sparse_dense_triton import dense_cases
from fxcompress.kernels.sparse_triton import candidates as candidates_of
from fxcompress.kernels.sparse_triton import cases
from fxcompress.kernels.sparse_triton import choose as choose_kind

__all__ = ["candidates", "choose", "compile_cases", "launch"]


def choose(problem: Problem, device: Device) -> Config:
    """See `fxcompress.kernels.sparse_triton.choose`."""
    return choose_kind(problem, device, W4)


def candidates(problem: Problem, device: Device) -> list[Config]:
    """See `fxcompress.kernels.sparse_triton.candidates`."""
    return candidates_of(problem, device, W4)


def launch(
    x: Tensor, values: Tensor, meta: Tensor, scales: Tensor, bias: Tensor | None, group_size: int, activation: str = "",
    residual: Tensor | None = None, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """See `fxcompress.kernels.sp24_w4`; ``config`` is for tests and measurements."""
    check(x, values, meta, scales, bias, group_size, activation, residual)
    groups, n = scales.shape
    weight = Packed(values, meta, n, readable(scales), 0 if groups == 1 else group_size // 32)
    problem = Problem("sp24_w4", x.shape[:-1].numel(), n, x.shape[-1], x.dtype, group_size)
    w_scale = weight.scales[0] if groups == 1 and weight.scales is not None else None
    found = config or choose(problem, device_of(x))
    return float_product(x, weight, w_scale, bias, activation, residual, found)


def compile_cases(sm: int) -> list[CompileCase]:
    """Every configuration `choose` gives on ``sm``: a scale a row, groups of 128, of 32; and the dense copy."""
    return [*cases(W4, sm, HALVES, (0, 4, 1)), *dense_cases(W4)]
