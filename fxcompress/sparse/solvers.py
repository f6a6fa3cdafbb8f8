"""The methods: a score for each weight, or new weights.

* ``l1``, ``l2``: magnitude. The score of a block of weights is the mean of ``|w|``, or the root of the mean of ``w^2``.
  For single weights (no ``block``) both are ``|w|`` and give the same mask.
* ``random``: the baseline every method has to beat.
* ``wanda``: ``|W_ij| * ||X_j||_2`` (Sun et al., "A Simple and Effective Pruning Approach for Large Language Models",
  2023, equation 1), compared within each output row.
* ``sparsegpt``: optimal brain surgery, one column after the other; the weights to the right take up the error of each
  removed weight (Frantar and Alistarh, "SparseGPT", 2023, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxcompress.sparse.pattern import Pattern, lowest

__all__ = ["BLOCK_COLUMNS", "DAMPING", "METHODS", "block_scores", "magnitude", "sparsegpt", "wanda"]

#: ``method`` -> whether it needs calibration data.
METHODS = {"l1": False, "l2": False, "random": False, "wanda": True, "sparsegpt": True}
#: Columns whose mask SparseGPT chooses together, and after which the columns to the right are updated.
BLOCK_COLUMNS = 128
#: SparseGPT adds this share of the mean of the Hessian's diagonal to it.
DAMPING = 0.01


def magnitude(method: str, seed: int, block: int = 1) -> Callable[[Tensor], Tensor]:
    """Scores of weights for ``l1``, ``l2`` or ``random``: a function of the rows, of the same shape and on one scale.

    ``random`` draws from a generator of its own with ``seed``, layer after layer.
    """
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        return lambda rows: torch.rand(rows.shape, generator=generator).to(rows.device)
    if method == "l2" and block > 1:
        return lambda rows: _at_least_float32(rows).square()  # the mean of a block; its root has the same order
    return lambda rows: _at_least_float32(rows).abs()


def _at_least_float32(rows: Tensor) -> Tensor:
    return rows if rows.dtype == torch.float64 else rows.float()


def wanda(rows: Tensor, energy: Tensor) -> Tensor:
    """``|W_ij| * ||X_j||_2`` in float64.

    Args:
        rows: Weight [groups, rows, features].
        energy: ``sum x_j^2`` [groups, features].
    """
    return rows.double().abs() * energy.double().sqrt().unsqueeze(1)


def block_scores(scores: Tensor, rows: Tensor, block: int) -> Tensor:
    """Mean score of each block of ``block`` neighbours along the last axis; -1 where all its weights are zero.

    Blocks of zeros are thus the lowest whatever the method: pruning again changes nothing.
    """
    blocks = scores if block == 1 else scores.unflatten(-1, (-1, block)).mean(-1)
    empty = rows == 0 if block == 1 else (rows == 0).unflatten(-1, (-1, block)).all(-1)
    return torch.where(empty, torch.full_like(blocks, -1), blocks)


def sparsegpt(rows: Tensor, moments: Tensor, target: float | Pattern) -> tuple[Tensor, Tensor]:
    """New weights and where they are zero.

    With ``H = X^T X + damping``, ``C`` the upper Cholesky factor of ``H^-1``, and ``w`` a row: removing ``w_j`` costs
    ``(w_j / C_jj)^2``, and ``w_k -= (w_j / C_jj) C_jk`` for all ``k > j`` takes the error up as well as those columns can.

    Args:
        rows: Weight [groups, rows, features].
        moments: ``X^T X`` [groups, features, features].
        target: Share of zeros, chosen in each block of 128 columns over all rows; or N of every M columns, chosen row by
            row when the first of the M is reached.

    Returns:
        Weights [groups, rows, features] in float64, and bool of that shape, True where a weight was removed.
    """
    work = rows.double().clone()
    factor = _inverse_factor(moments.double())
    pruned = torch.zeros_like(work, dtype=torch.bool)
    width = BLOCK_COLUMNS
    if isinstance(target, Pattern):
        width = max(1, BLOCK_COLUMNS // target.m) * target.m
    for begin in range(0, work.shape[-1], width):
        end = min(begin + width, work.shape[-1])
        square = factor[:, begin:end, begin:end]
        block, chosen, errors = _solve_block(work[..., begin:end].clone(), square, target)
        work[..., begin:end], pruned[..., begin:end] = block, chosen
        work[..., end:] -= errors @ factor[:, begin:end, end:]
    return work, pruned


def _solve_block(block: Tensor, factor: Tensor, target: float | Pattern) -> tuple[Tensor, Tensor, Tensor]:
    """New weights, what is zero, and the scaled errors of a block of columns [groups, rows, columns]."""
    diagonal = factor.diagonal(dim1=-2, dim2=-1).unsqueeze(1)  # [groups, 1, columns]
    chosen, errors = torch.zeros_like(block, dtype=torch.bool), torch.zeros_like(block)
    if not isinstance(target, Pattern):
        chosen = lowest((block / diagonal).square(), target, 2)
    for j in range(block.shape[-1]):
        if isinstance(target, Pattern) and j % target.m == 0:
            ahead = slice(j, j + target.m)
            chosen[..., ahead] = target.prune((block[..., ahead] / diagonal[..., ahead]).square())
        removed = torch.where(chosen[..., j], block[..., j], torch.zeros_like(block[..., j]))
        errors[..., j] = removed / diagonal[..., j]
        block[..., j + 1 :] -= errors[..., j].unsqueeze(-1) * factor[:, j, None, j + 1 :]
        block[..., j] -= removed
    return block, chosen, errors


def _inverse_factor(moments: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped Hessian, per group.

    Inputs that are always zero say nothing: their group's Hessian becomes the identity.
    """
    diagonal = moments.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    damping = torch.where(mean > 0, DAMPING * mean, torch.ones_like(mean))
    damped = moments + torch.diag_embed(damping.expand_as(diagonal))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor
