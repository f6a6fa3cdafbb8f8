"""``sp24_w8a8_linear`` on a GPU: sparse tensor cores, cuSPARSELt, or a dense copy and the dense int8 kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from fxcompress.kernels import w8a8_triton
from fxcompress.kernels.configs import Config, Device, Problem, device_of
from fxcompress.kernels.epilogue_triton import CompileCase
from fxcompress.kernels.int8_common import scaled
from fxcompress.kernels.sp24_w8a8 import check
from fxcompress.kernels.sparse_common import I8, Packed, rows_of
from fxcompress.kernels.sparse_dense_triton import decompress, dense_cases
from fxcompress.kernels.sparse_proof import compressed, proven, sparselt_product
from fxcompress.kernels.sparse_triton import Finish, cases, multiply
from fxcompress.kernels.sparse_triton import candidates as candidates_of
from fxcompress.kernels.sparse_triton import choose as choose_kind

__all__ = ["candidates", "choose", "compile_cases", "launch"]


def choose(problem: Problem, device: Device) -> Config:
    """See `fxcompress.kernels.sparse_triton.choose`."""
    return choose_kind(problem, device, I8)


def candidates(problem: Problem, device: Device) -> list[Config]:
    """See `fxcompress.kernels.sparse_triton.candidates`."""
    return candidates_of(problem, device, I8)


def launch(
    x: Tensor, values: Tensor, meta: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None,
    out_dtype: torch.dtype, activation: str = "", residual: Tensor | None = None, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """See `fxcompress.kernels.sp24_w8a8`; ``config`` is for tests and measurements."""
    check(x, values, meta, x_scale, w_scale, bias, out_dtype, activation, residual)
    weight = Packed(values, meta, len(w_scale))
    out = x.new_empty((*x.shape[:-1], weight.n), dtype=out_dtype)
    if out.numel() == 0:
        return out
    rows = rows_of(x, values)
    found = config or choose(Problem("sp24_w8a8", rows.shape[0], weight.n, x.shape[-1], x.dtype), device_of(x))
    flat, beside = out.view(-1, weight.n), None if residual is None else residual.reshape(-1, weight.n).contiguous()
    one = x_scale if x_scale.dim() == 1 else x_scale.reshape(-1, 1).contiguous()
    copy = compressed(weight) if found.route == "cusparselt" else None
    if copy is not None:
        sums = sparselt_product(rows, weight, copy)
        return scaled(sums, one, w_scale, bias, beside, activation, out_dtype).view(out.shape)
    if found.route == "kernel" and proven(I8, x.dtype, x.device):
        raw = out_dtype == torch.int32
        after = Finish(
            None if bias is None else bias.contiguous(), beside, activation, None if raw else one,
            None if raw else w_scale.contiguous(),
        )  # fmt: skip
        multiply(rows, weight, flat, after, found)
        return out
    dense = decompress(weight)
    product = w8a8_triton.launch(rows, dense, one, w_scale, None, None, bias, out_dtype, activation, beside)
    return product.view(out.shape)


def compile_cases(sm: int) -> list[CompileCase]:
    """Every configuration `choose` gives on ``sm``, and the dense copy."""
    return [*cases(I8, sm, (torch.int8,)), *dense_cases(I8)]
