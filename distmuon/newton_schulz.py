"""Newton-Schulz: a stack of matrices goes in, their (nearly) polar factors come out. Knows no rank and no parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Triple = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Table:
    triples: tuple[Triple, ...]
    source: str
    repeat: int = 0  # how many of the last triples a longer request repeats; 0: none


COEFFICIENTS: Mapping[str, Table] = {
    "jordan": Table(((3.4445, -4.7750, 2.0315),), "https://kellerjordan.github.io/posts/muon/", repeat=1),
}


def resolve(coefficients: str | tuple[float, ...] | tuple[Triple, ...], steps: int) -> tuple[Triple, ...]:
    """The (a, b, c) of each step. Raises ValueError when the table cannot serve that many steps."""
    if not isinstance(coefficients, str):
        triples = coefficients if isinstance(coefficients[0], tuple) else (coefficients,) * steps
        return tuple((float(a), float(b), float(c)) for a, b, c in triples)  # type: ignore[misc]
    table = COEFFICIENTS[coefficients]
    return tuple(table.triples[min(i, len(table.triples) - 1)] for i in range(steps))


def flops(m: int, n: int, steps: int) -> int:
    """FLOPs of the standard form for one m x n matrix; k short side, l long side."""
    k, l = min(m, n), max(m, n)  # noqa: E741
    return steps * (4 * k * k * l + 2 * k**3)


def orthogonalize(
    matrices: Tensor,
    *,
    steps: int,
    coefficients: str | tuple[float, ...] | tuple[Triple, ...],
    dtype: torch.dtype | None = None,
) -> Tensor:
    """(B, m, n) -> (B, m, n) in `dtype` (None: bfloat16). The input is never written."""
    dtype = torch.bfloat16 if dtype is None else dtype
    tall = matrices.size(-2) > matrices.size(-1)
    x = (matrices.mT if tall else matrices).float()
    if x.numel():
        x = x / x.abs().amax(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    x = x.to(dtype)
    for a, b, c in resolve(coefficients, steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
