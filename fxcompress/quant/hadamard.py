"""Orthogonal matrices whose entries are all alike in size: Hadamard matrices, normalized and with random signs.

A Hadamard matrix spreads every coordinate over all, so that what is rotated by it has no outliers (Ashkboos et al.,
"QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", 2024). Orders: products of 2 and of Paley's orders ``q + 1`` and
``2 (q + 1)`` for primes ``q`` (Paley, "On Orthogonal Matrices", 1933).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["hadamard", "rotation"]


def rotation(size: int, seed: int) -> tuple[Tensor, bool]:
    """A random orthogonal matrix [size, size] in float64.

    Returns:
        ``D H / sqrt(size)`` with random signs ``D``, and True. Where no Hadamard matrix of this order is made, the
        Kronecker product of one with a random orthogonal matrix of the odd rest, and False.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size, 1), generator=generator).double() * 2 - 1
    matrix = hadamard(size)
    if matrix is not None:
        return signs * matrix / size**0.5, True
    even = size & -size
    rest = torch.linalg.qr(torch.randn(size // even, size // even, generator=generator, dtype=torch.float64))[0]
    power = hadamard(even)
    assert power is not None
    return signs * torch.kron(power / even**0.5, rest.contiguous()), False


def hadamard(order: int) -> Tensor | None:
    """A matrix of 1 and -1 with orthogonal rows, float64 [order, order]; None when no construction here has this order."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if order == 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if order % 4:
        return None
    if _prime(order - 1):
        return _paley_one(order - 1)
    if (order // 2 - 1) % 4 == 1 and _prime(order // 2 - 1):
        return _paley_two(order // 2 - 1)
    for factor in (2, *range(4, order // 2 + 1, 4)):
        if order % factor == 0:
            left = hadamard(factor)
            right = hadamard(order // factor) if left is not None else None
            if left is not None and right is not None:
                return torch.kron(left, right)
    return None


def _prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, int(number**0.5) + 1))


def _jacobsthal(q: int) -> Tensor:
    """``Q_ij``: 1 where ``i - j`` is a square modulo ``q``, 0 on the diagonal, else -1."""
    squares = {i * i % q for i in range(1, q)}
    character = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)], dtype=torch.float64)
    index = (torch.arange(q)[:, None] - torch.arange(q)) % q
    return character[index]


def _paley_one(q: int) -> Tensor:
    """Order ``q + 1`` for a prime ``q = 3 (mod 4)``: ``I + S`` with the skew ``S`` of the Jacobsthal matrix."""
    skew = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, _jacobsthal(q)
    return skew + torch.eye(q + 1, dtype=torch.float64)


def _paley_two(q: int) -> Tensor:
    """Order ``2 (q + 1)`` for a prime ``q = 1 (mod 4)``: a symmetric conference matrix doubled."""
    conference = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    conference[0, 1:], conference[1:, 0], conference[1:, 1:] = 1, 1, _jacobsthal(q)
    ones = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(conference, ones) + torch.kron(torch.eye(q + 1, dtype=torch.float64), diagonal)
