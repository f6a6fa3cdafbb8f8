"""``sp24_linear`` on a GPU: sparse tensor cores, cuSPARSELt, or a dense copy and cuBLAS."""

from __future__ import annotations

from torch import Tensor

from fxcompress.errors import UsageError
from fxcompress.kernels.configs import Config, Device, Problem, device_of
from fxcompress.kernels.epilogue import finish
from fxcompress.kernels.epilogue_triton import CompileCase
from fxcompress.kernels.gemm_launch_triton import Epilogue, dense, readable
from fxcompress.kernels.sp24 import check
from fxcompress.kernels.sparse_common import F16, HALVES, Packed, rows_of
from fxcompress.kernels.sparse_dense_triton import decompress, dense_cases
from fxcompress.kernels.sparse_proof import compressed, proven, sparselt_product
from fxcompress.kernels.sparse_triton import Finish, cases, multiply
from fxcompress.kernels.sparse_triton import candidates as candidates_of
from fxcompress.kernels.sparse_triton import choose as choose_kind

__all__ = ["candidates", "choose", "compile_cases", "float_product", "launch"]


def choose(problem: Problem, device: Device) -> Config:
    """See `fxcompress.kernels.sparse_triton.choose`."""
    return choose_kind(problem, device, F16)


def candidates(problem: Problem, device: Device) -> list[Config]:
    """See `fxcompress.kernels.sparse_triton.candidates`."""
    return candidates_of(problem, device, F16)


def launch(
    x: Tensor, values: Tensor, meta: Tensor, n: int, bias: Tensor | None = None, activation: str = "",
    residual: Tensor | None = None, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """See `fxcompress.kernels.sp24`; ``config`` is for tests and measurements."""
    check(x, values, meta, n, bias, activation, residual)
    found = config or choose(Problem("sp24", x.shape[:-1].numel(), n, x.shape[-1], x.dtype), device_of(x))
    return float_product(x, Packed(values, meta, n), None, bias, activation, residual, found)


def float_product(
    x: Tensor, weight: Packed, w_scale: Tensor | None, bias: Tensor | None, activation: str, residual: Tensor | None,
    config: Config,
) -> Tensor:  # fmt: skip
    """16-bit ``x`` [..., K] times ``weight``, whose scales of rows are ``w_scale``, finished: [..., N].

    Raises:
        UsageError: ``x`` is no 16-bit float.
    """
    if x.dtype not in HALVES:
        raise UsageError(
            448,
            f"no 2:4 kernel multiplies {str(x.dtype).removeprefix('torch.')} activations",
            fix="use float16 or bfloat16",
        )
    out = x.new_empty((*x.shape[:-1], weight.n))
    if out.numel() == 0:
        return out
    rows, flat = rows_of(x, weight.values), out.view(-1, weight.n)
    bias = None if bias is None else readable(bias)
    beside = None if residual is None else readable(residual.reshape(-1, weight.n))
    if config.route == "kernel" and proven(weight.kind, x.dtype, x.device):
        multiply(rows, weight, flat, Finish(bias, beside, activation, None, w_scale), config)
        return out
    copy = compressed(weight) if config.route == "cusparselt" else None
    if copy is not None:
        product = sparselt_product(rows, weight, copy)
        return finish(product.float(), bias, beside, activation, x.dtype).view(out.shape)
    return dense(rows, decompress(weight, x.dtype), Epilogue(None, bias, beside, activation)).view(out.shape)


def compile_cases(sm: int) -> list[CompileCase]:
    """Every configuration `choose` gives on ``sm``, and the dense copy."""
    return [*cases(F16, sm, HALVES), *dense_cases(F16)]
