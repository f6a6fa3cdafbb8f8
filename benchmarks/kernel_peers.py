"""What the kernels are compared with: the same product by other libraries, those of them that are installed.

A peer gets its own random weights in its own layout, so many copies of them that none is in the cache when it is used
again, and the activations of the problem. One that cannot run here says why; that is written down beside the times.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from fxcompress.kernels.configs import Problem

__all__ = ["PEERS", "Peer", "Unavailable", "peers_of"]

Call = Callable[[], Any]
Weighted = Callable[[torch.Tensor], Any]


class Unavailable(Exception):
    """A peer that cannot compute a problem, or is not installed."""


@dataclass(frozen=True)
class Peer:
    """One way to compute the product.

    Attributes:
        name: Column of the tables.
        make: Gives, for a problem and a device, the activations and a function that makes one call's worth of weights:
            a function of the activations.
        bits: Bits of memory a weight takes.
        slow: Its first call tunes itself for a long time.
    """

    name: str
    make: Callable[[Problem, str], tuple[torch.Tensor, Callable[[], Weighted]]]
    bits: float
    slow: bool = False

    def calls(self, problem: Problem, device: str, cache: int) -> list[Call]:
        """Calls with weights of their own, three times the cache in all.

        Raises:
            Unavailable: it cannot compute this, or is not installed.
        """
        x, weights = self.make(problem, device)
        size = problem.n * problem.k * self.bits / 8
        count = 1 + -(-3 * cache // int(size)) if cache else 1
        if device == "cuda":
            count = max(1, min(count, int(0.25 * torch.cuda.mem_get_info()[0] / size)))
        made = [weights() for _ in range(count)]
        return [partial(product, x) for product in made]


def _need(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise Unavailable(f"{', '.join(missing)} is not installed")


def _half(p: Problem) -> torch.dtype:
    """The 16-bit float that a peer with float activations gets."""
    return p.dtype if p.dtype.is_floating_point else torch.float16


def _x(p: Problem, device: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.randn(p.m, p.k, device=device).to(dtype or _half(p))


def _linear(p: Problem, device: str, dtype: torch.dtype) -> torch.nn.Linear:
    return torch.nn.Linear(p.k, p.n, bias=False, device=device, dtype=dtype).requires_grad_(False)


def _dense(p: Problem, device: str) -> tuple[torch.Tensor, Callable[[], Weighted]]:
    def weights() -> Weighted:
        w = torch.randn(p.n, p.k, device=device, dtype=_half(p))
        return lambda x: F.linear(x, w)

    return _x(p, device), weights


def _int_mm(p: Problem, device: str) -> tuple[torch.Tensor, Callable[[], Weighted]]:
    if device == "cuda" and p.m <= 16:
        raise Unavailable("takes more than 16 rows")

    def weights() -> Weighted:
        w = torch.randint(-127, 128, (p.n, p.k), dtype=torch.int8, device=device).t()
        return lambda x: torch._int_mm(x, w)

    return torch.randint(-127, 128, (p.m, p.k), dtype=torch.int8, device=device), weights


def _tinygemm(p: Problem, device: str) -> tuple[torch.Tensor, Callable[[], Weighted]]:
    """The kernel of torchao's INT4 weights, which PyTorch itself carries; bfloat16 only."""
    group = p.group_size if p.group_size in (32, 64, 128, 256) else 128
    if device != "cuda":
        raise Unavailable("needs a CUDA device")

    def weights() -> Weighted:
        noise = torch.randint(0, 256, (p.n, p.k // 2), dtype=torch.uint8, device=device)
        packed = torch.ops.aten._convert_weight_to_int4pack(noise, 8)
        scales = torch.rand(p.k // group, p.n, 2, device=device).bfloat16() * 0.01
        return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, group, scales)

    return _x(p, device, torch.bfloat16), weights


def _torchao(p: Problem, device: str, config: Callable[[Any], Any], dtype: torch.dtype) -> Any:
    _need("torchao")
    quantization = importlib.import_module("torchao.quantization")

    def weights() -> Weighted:
        layer = _linear(p, device, dtype)
        quantization.quantize_(layer, config(quantization))
        return layer

    return _x(p, device, dtype), weights


def _torchao_int4(p: Problem, device: str) -> tuple[torch.Tensor, Callable[[], Weighted]]:
    group = p.group_size if p.group_size > 0 else 128

    def config(q: Any) -> Any:
        return q.Int4WeightOnlyConfig(group_size=group, int4_packing_format="tile_packed_to_4d")

    made: tuple[torch.Tensor, Callable[[], Weighted]] = _torchao(p, device, config, torch.bfloat16)
    return made


def _torchao_int8(p: Problem, device: str) -> tuple[torch.Tensor, Callable[[], Weighted]]:
    x, weights = _torchao(p, device, lambda q: q.Int8DynamicActivationInt8WeightConfig(), _half(p))
    return x, lambda: torch.compile(weights())


def _gemlite(p: Problem, device: str) -> tuple[torch.Tensor, Callable[[], Weighted]]:
    _need("gemlite")
    gemlite = importlib.import_module("gemlite")
    core = importlib.import_module("gemlite.core")
    if p.dtype != torch.float16:
        raise Unavailable("measured in float16")
    gemlite.set_packing_bitwidth(8)
    gemlite.set_autotune("max")
    bits = 4 if p.family.startswith("w4") else 8
    group = p.group_size if p.group_size > 0 else p.k

    def weights() -> Weighted:
        half = core.DType.FP16
        layer = core.GemLiteLinear(bits, group, p.k, p.n, input_dtype=half, output_dtype=half)
        integers = torch.randint(0, 2**bits, (p.n, p.k), dtype=torch.uint8, device=device)
        scales = torch.rand(p.n * p.k // group, 1, dtype=torch.float16, device=device) * 0.01
        layer.pack(integers, scales, torch.full_like(scales, 2 ** (bits - 1)), None)
        return lambda x: layer(x)

    return _x(p, device), weights


def _cusparselt(p: Problem, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, Callable[[], Weighted]]:
    if device != "cuda" or not torch.backends.cusparselt.is_available():
        raise Unavailable("cuSPARSELt is not there")
    kind = torch.sparse.SparseSemiStructuredTensorCUSPARSELT
    keep = torch.tensor([True, True, False, False], device=device).repeat(p.k // 4)

    def weights() -> Weighted:
        w = torch.randn(p.n, p.k, device=device)
        sparse = kind.from_dense(((w * 40).clamp(-127, 127).to(dtype) if dtype == torch.int8 else w.to(dtype)) * keep)
        return lambda x: F.linear(x, sparse)

    x = _x(p, device) if dtype != torch.int8 else (_x(p, device, torch.float32) * 40).clamp(-127, 127).to(torch.int8)
    return x, weights


#: Families -> peers beside the dense 16-bit product, which every family is compared with.
PEERS: Final[Mapping[str, tuple[Peer, ...]]] = {
    "w4a16": (
        Peer("tinygemm", _tinygemm, 4.25),
        Peer("torchao int4", _torchao_int4, 4.25),
        Peer("gemlite", _gemlite, 4.25, slow=True),
    ),
    "w8a16": (Peer("gemlite", _gemlite, 8, slow=True),),
    "w8a8": (Peer("torch._int_mm", _int_mm, 8), Peer("torchao int8", _torchao_int8, 8, slow=True)),
    "w4a8": (Peer("torch._int_mm", _int_mm, 8),),
    "sp24": (Peer("cuSPARSELt", lambda p, device: _cusparselt(p, device, p.dtype), 9),),
    "sp24_w8a8": (
        Peer("torch._int_mm", _int_mm, 8),
        Peer("cuSPARSELt", lambda p, device: _cusparselt(p, device, torch.int8), 5),
    ),
    "sp24_w4": (Peer("tinygemm", _tinygemm, 4.25),),
}
DENSE: Final = Peer("cuBLAS", _dense, 16)


def peers_of(family: str, *, slow: bool) -> list[Peer]:
    """The dense product, and a family's peers; those that tune themselves only when asked for."""
    return [DENSE, *(peer for peer in PEERS.get(family, ()) if slow or not peer.slow)]
