"""Whether 2:4 products may use the sparse tensor cores of a device, and what has to be made ready before the first one.

The kernel of `fxcompress.kernels.sparse_gluon` relies on where ``mma.sp`` expects which bits of which lane. It is used on
a device only after it has multiplied a small random problem there exactly as the dense product does: once for each device,
kind of numbers and process. Where it fails, a warning says so, and the weight is written out as a dense matrix for each
product instead.

Call `prepare` when a model is built: the proof waits for the device, which a CUDA graph that is being captured cannot.
With ``cusparselt=True`` it also makes cuSPARSELt's own copy of a weight (0.56 of the dense size), which products of more
than `fxcompress.kernels.sparse_triton.MOST_ROWS` rows then use.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Final

import torch
from torch import Tensor

from fxcompress.errors import UsageError
from fxcompress.kernels.sparse_common import F16, I8, W4, Kind, Packed
from fxcompress.kernels.sparse_layout import pack_sp24, pack_sp24_i8, pack_sp24_w4

__all__ = ["compressed", "forget_proofs", "prepare", "proven", "random_weight", "sparselt_product"]

#: (kind, activations' dtype, device) -> what the proof found.
_PROVEN: dict[tuple[Kind, torch.dtype, int], bool] = {}
#: Address of packed values -> (the values, their version, cuSPARSELt's copy).
_COPIES: dict[int, tuple[weakref.ref[Tensor], int, Tensor]] = {}
_TOLERANCE: Final = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.int8: 0.0}


def prepare(weight: Packed, dtype: torch.dtype, *, cusparselt: bool = False) -> bool:
    """Make products with ``weight`` ready to run, and to be captured in a CUDA graph.

    Args:
        weight: Packed, on the device it will be used on.
        dtype: Of the activations: float16, bfloat16 or int8.
        cusparselt: Make cuSPARSELt's copy too, where PyTorch has it; not for 4-bit weights, which it does not know.

    Returns:
        Whether the sparse tensor cores will be used. Always False for a weight in main memory.
    """
    if not weight.values.is_cuda:
        return False
    if cusparselt and weight.kind is not W4 and torch.backends.cusparselt.is_available():
        _compress(weight)
    return proven(weight.kind, dtype, weight.values.device)


def proven(kind: Kind, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel gives right results on ``device``; tried at the first call, with a warning when it does not.

    Raises:
        UsageError: the first call comes while a CUDA graph is captured.
    """
    if device.type != "cuda":
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    key = (kind, dtype, index)
    if key not in _PROVEN:
        if torch.cuda.is_current_stream_capturing():
            raise UsageError(
                447,
                f"the 2:4 kernels were not proven on {device} before a CUDA graph is captured",
                fix="call fxcompress.kernels.sparse_proof.prepare, or run the model once before capturing",
            )
        wrong = _fault(kind, dtype, torch.device("cuda", index))
        if wrong:
            warnings.warn(
                f"{kind.family}_linear does not use the sparse tensor cores of {torch.cuda.get_device_name(index)}: {wrong}; "
                "each product makes a dense copy of its weight instead",
                stacklevel=3,
            )
        _PROVEN[key] = not wrong
    return _PROVEN[key]


def forget_proofs() -> None:
    """Prove again at the next call; drop cuSPARSELt's copies."""
    _PROVEN.clear()
    _COPIES.clear()


def _fault(kind: Kind, dtype: torch.dtype, device: torch.device) -> str:
    """What is wrong with the kernel on ``device``; empty when nothing is."""
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"compute capability {major}.{minor} has none"
    try:
        from triton.errors import TritonError
    except ImportError as error:
        return str(error)
    try:
        errors = [_error(kind, dtype, device, m, n, k, group) for m, n, k, group in _problems(kind)]
    except (TritonError, ImportError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        # what a Triton that is too old, too new or without Gluon raises, and a kernel that does not compile or launch
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else 'no message'}"
    worst = max(errors)
    return "" if worst <= _TOLERANCE[dtype] else f"wrong results (relative error {worst:.2g})"


def _problems(kind: Kind) -> tuple[tuple[int, int, int, int], ...]:
    """M, N, K, group size: few and many rows, tails of everything."""
    if kind is W4:
        return (3, 88, 640, 64), (37, 88, 640, 0), (65, 136, 384, 128)
    return (3, 88, 1088, 0), (37, 88, 576, 0), (129, 136, 192, 0)


def _error(kind: Kind, dtype: torch.dtype, device: torch.device, m: int, n: int, k: int, group_size: int) -> float:
    """Relative error of one random product against the dense one in float64."""
    from fxcompress.kernels.configs import Problem, device_of
    from fxcompress.kernels.sparse_triton import Finish, choose, multiply

    weight, dense = random_weight(kind, dtype, n, k, group_size, device)
    generator = torch.Generator().manual_seed(1)
    if dtype == torch.int8:
        x = torch.randint(-128, 128, (m, k), generator=generator, dtype=torch.int8).to(device)
    else:
        x = torch.randn(m, k, generator=generator).to(device, dtype)
    rows = torch.nn.functional.pad(x, (0, -k % kind.unit))
    out = torch.empty(m, n, dtype=torch.int32 if dtype == torch.int8 else dtype, device=device)
    config = choose(Problem(kind.family, m, n, k, dtype), device_of(x), kind)
    after = Finish(w_scale=weight.scales[0] if weight.scales is not None and not weight.group else None)
    multiply(rows, weight, out, after, config)
    expected = x.double() @ dense.double().T
    return float((out.double() - expected).norm() / expected.norm())


def random_weight(
    kind: Kind, dtype: torch.dtype, n: int, k: int, group_size: int, device: torch.device
) -> tuple[Packed, Tensor]:
    """A random packed weight and the dense one, the same for the same arguments; ``group_size`` 0: scales of rows."""
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(n, k // 4, 4, generator=generator).argsort(-1) < 2
    dense = torch.randn(n, k, generator=generator) * keep.reshape(n, k)
    if kind is F16:
        dense = dense.to(dtype)
        values, meta = pack_sp24(dense)
        return Packed(values.to(device), meta.to(device), n), dense.to(device)
    if kind is I8:
        integers = (dense * 40).clamp(-128, 127).to(torch.int8)
        values, meta = pack_sp24_i8(integers)
        return Packed(values.to(device), meta.to(device), n), integers.to(device)
    integers = (dense * 4).clamp(-8, 7).to(torch.int8)
    values, meta = pack_sp24_w4(integers)
    groups = k // group_size if group_size else 1
    scales = (torch.rand(groups, n, generator=generator) * 0.1 + 0.05).to(dtype)
    scaled = integers.double() * scales.double().T.repeat_interleave(k // groups, 1)
    return Packed(values.to(device), meta.to(device), n, scales.to(device), group_size // 32), scaled.to(device)


# ------------------------------------------------------------------------------------------------ cuSPARSELt
def compressed(weight: Packed) -> Tensor | None:
    """The copy cuSPARSELt has of ``weight``, if `prepare` made one of these very values and they are as they were."""
    values, version, copy = _COPIES.get(weight.values.data_ptr(), (lambda: None, 0, None))
    original = values()
    if original is None or original.shape != weight.values.shape or original._version != version:
        return None
    return copy


def _compress(weight: Packed) -> None:
    if compressed(weight) is not None:
        return
    from fxcompress.kernels.sparse_dense_triton import decompress

    dense = decompress(weight)
    copy = torch._cslt_compress(torch.nn.functional.pad(dense, (0, 0, 0, -weight.n % 32)))
    values, address = weight.values, weight.values.data_ptr()

    def drop(_: object) -> None:
        _COPIES.pop(address, None)

    _COPIES[address] = (weakref.ref(values, drop), values._version, copy)


def sparselt_product(rows: Tensor, weight: Packed, copy: Tensor) -> Tensor:
    """``rows`` [M, K'] times the weight by cuSPARSELt: [M, N] in the dtype of ``rows``, int32 for int8."""
    m = rows.shape[0]
    filled = torch.nn.functional.pad(rows, (0, 0, 0, -m % 16))
    out_dtype = torch.int32 if rows.dtype == torch.int8 else None
    product: Tensor = torch._cslt_sparse_mm(copy, filled.t(), out_dtype=out_dtype)
    return product[: weight.n, :m].t()
