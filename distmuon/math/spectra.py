"""What the singular values of a matrix say: their quantiles, their entropy, the distance from orthogonality.

This module decides the formulas of telemetry, on plain tensors. It knows no rank and no parameter. Each function waits
for the device on CUDA, since eigenvalues do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


def singular_values(matrix: Tensor) -> Tensor:
    """The singular values of an (m, n) matrix of any float dtype, ascending, (min(m, n),) float64.

    They are square roots of the eigenvalues of the Gram matrix in float64: many times as fast as an SVD, and exact to
    about 1e-8 of the largest.
    """
    x = matrix.to(torch.float64)
    gram = x @ x.mT if x.size(0) <= x.size(1) else x.mT @ x
    eigenvalues: Tensor = torch.linalg.eigvalsh(gram)
    return eigenvalues.clamp(min=0.0).sqrt()


def svd_entropy(singular: Tensor) -> Tensor:
    """``-sum(p * log p) / log k`` with ``p = s^2 / sum(s^2)``, a 0-dim tensor (arXiv 2502.16982, section 3.4).

    1 if all k singular values are equal, 0 for a matrix of rank one, for zeros, and where k is 1.
    """
    squares = singular.square()
    share = squares / squares.sum().clamp(min=torch.finfo(squares.dtype).tiny)
    entropy: Tensor = torch.special.entr(share).sum()
    return entropy / math.log(max(2, singular.numel()))


def quantiles(singular: Tensor) -> Tensor:
    """The smallest, the quartiles and the largest of ascending values, (5,), linear between neighbours."""
    at = torch.tensor(QUANTILES, dtype=singular.dtype, device=singular.device)
    return torch.quantile(singular, at)


def orthogonality_residual(singular: Tensor) -> Tensor:
    """``||X X^T - I|| / sqrt(k)``, Frobenius, of a matrix with these k singular values; 0 for a polar factor.

    X^T X in the place of X X^T if that is the smaller product.
    """
    return (singular.square() - 1.0).square().mean().sqrt()
