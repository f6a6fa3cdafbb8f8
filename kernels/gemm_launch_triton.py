"""How the launchers of products with 16-bit activations choose, split, run and finish."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from fxcompress.errors import UsageError
from fxcompress.kernels.configs import Config, Device
from fxcompress.kernels.epilogue_triton import INTERPRETED, CompileCase
from fxcompress.kernels.gemm_triton import add_parts_kernel
from fxcompress.kernels.w4a16 import check_device, check_dtype

__all__ = [
    "Epilogue",
    "common_constants",
    "dense",
    "describe",
    "multiply",
    "packing",
    "parts_case",
    "parts_of_k",
    "readable",
    "rows_and_end",
    "type_name",
]


class Epilogue(NamedTuple):
    """What happens to the sums.

    Attributes:
        scales: Per column [1, N], or None.
        bias: [N], or None.
        residual: [M, N], or None.
        activation: See `activate`.
    """

    scales: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    activation: str


def type_name(dtype: torch.dtype) -> str:
    """What Triton's signatures call a float dtype."""
    return {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


def _scale_on(config: Config, group: int) -> str:
    """Where a scale is multiplied at the fewest instructions: a group's sum has ``block_m`` values for every weight row."""
    if group == 0:
        return "row"
    return "acc" if config.block_m <= min(group & -group, 128) // 4 else "weights"


def describe(config: Config) -> str:
    """Short name of a tile."""
    split = f" /{config.split_k}" if config.split_k > 1 else ""
    swap = " swap" if config.swap_ab else ""
    return f"{config.block_m}x{config.block_n}x{config.block_k} w{config.num_warps} s{config.num_stages}{swap}{split}"


def readable(scales: Tensor) -> Tensor:
    """Contiguous scales of a type kernels read: float64 becomes float32."""
    return (scales.float() if scales.dtype == torch.float64 else scales).contiguous()


def rows_and_end(
    x: Tensor, n: int, scales: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> tuple[Tensor, Epilogue]:
    """Contiguous ``x`` as [M, K], and the epilogue with a residual [M, ``n``]; types that kernels run.

    Raises:
        UsageError: ``x`` is no 16-bit float, something lies on another device, or offsets would pass 31 bits.
    """
    check_dtype("x", x, (torch.float16, torch.bfloat16))
    for name, tensor in (("scales", scales), ("bias", bias), ("residual", residual)):
        check_device(name, tensor, x.device)
    if scales.numel() >= 1 << 31:
        raise UsageError(413, f"{scales.numel()} scales are too many", fix="use larger groups, or split the layer")
    end = Epilogue(
        None,
        None if bias is None else readable(bias),
        None if residual is None else readable(residual.reshape(-1, n)),
        activation,
    )
    return x.reshape(-1, x.shape[-1]).contiguous(), end


def packing(values: Tensor, n: int) -> int:
    """How many of the per-row ``values`` [groups, n] can be loaded as one 32-bit word."""
    count = 4 // values.element_size()
    return count if n % count == 0 and values.data_ptr() % 4 == 0 else 1


def parts_of_k(tiles: int, k: int, device: Device) -> int:
    """Parts of K that fill the device with two programs a multiprocessor, none shorter than 512; a power of two."""
    wanted = min(2 * device.sm_count // max(tiles, 1), k // 512, 16) if tiles < device.sm_count else 1
    return 1 << max(wanted.bit_length() - 1, 0)


def common_constants(config: Config, k: int, group: int, depth: int, deterministic: bool) -> dict[str, Any]:
    """The constants both kernels have; ``depth`` is how many columns one product may have."""
    scale = _scale_on(config, group)
    return {
        "SCALE": scale,
        "DEPTH": min(depth, group & -group) if scale == "acc" else depth,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "SPLIT_K": config.split_k,
        "STAGES": config.num_stages,
        "SWAP": config.swap_ab,
        "TAIL": k % config.block_k != 0,
        "ATOMIC": config.split_k > 1 and not deterministic,
        "USE_ASM": not INTERPRETED,
    }


def _add_parts(parts: Tensor, end: Epilogue, y: Tensor) -> Tensor:
    count, (m, n) = parts.shape[0], y.shape
    block_m, block_n = 4, 128
    add_parts_kernel[triton.cdiv(m, block_m), triton.cdiv(n, block_n)](
        parts, end.scales, end.bias, end.residual, y, m, n, count, end.activation, block_m, block_n, num_warps=4
    )
    return y


def multiply(
    kernel: Any, operands: tuple[Any, ...], n: int, end: Epilogue, config: Config, constants: dict[str, Any]
) -> Tensor:
    """Run a kernel over all tiles and parts of K, and finish.

    Args:
        kernel: Takes ``operands``, bias, residual, output, M, N, K and ``constants``.
        operands: x [M, K] and the weights with what belongs to them.
        n: Output features.
        end: Its scales are applied by the kernel itself unless K is split.
        config: Tile.
        constants: Of the kernel.

    Returns:
        [M, n] in the dtype of x.
    """
    x: Tensor = operands[0]
    m, k = x.shape
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n), config.split_k)
    bias, residual, out, activation = end.bias, end.residual, y, end.activation
    if config.split_k > 1:
        make = torch.zeros if constants["ATOMIC"] else torch.empty
        parts = 1 if constants["ATOMIC"] else config.split_k
        out = make((parts, m, n), dtype=torch.float32, device=x.device)
        bias, residual, activation = None, None, ""
    kernel[grid](
        *operands, bias, residual, out, m, n, k, ACTIVATION=activation, **constants,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return _add_parts(out, end, y) if config.split_k > 1 else y


def dense(x: Tensor, weight: Tensor, end: Epilogue) -> Tensor:
    """``x`` [M, K] times dequantized ``weight`` [N, K] by the vendor's library, then bias, residual and activation."""
    if end.residual is None and not end.activation:
        return F.linear(x, weight, None if end.bias is None else end.bias.to(x.dtype))
    y = F.linear(x, weight)
    return _add_parts(y[None], end._replace(scales=None), torch.empty_like(y))


def parts_case(family: str, dtype: torch.dtype, split_k: int) -> CompileCase:
    """The kernel that adds parts, for the lint."""
    name = type_name(dtype)
    return CompileCase(
        name=f"{family} {name} adds {split_k} parts",
        family=family,
        kernel=add_parts_kernel,
        signature={"parts": "*fp32", "scales": f"*{name}", "bias": f"*{name}", "y": f"*{name}", "M": "i32", "N": "i32"},
        constants={"residual": None, "SPLIT_K": split_k, "ACTIVATION": "silu", "BLOCK_M": 4, "BLOCK_N": 128},
        unaligned=("M",),
        asynchronous=False,
    )
