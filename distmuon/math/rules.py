"""The two update rules on plain tensors: momentum, the scaled Muon step, the AdamW step.

This module decides the formulas; it knows no rank and no bucket, and does not decide whether a step happens. Line
numbers are those of the algorithm in docs/design.md, section 1. `Bucket.update` (step/bucket.py) calls these functions.
With `out`, which may be the old tensor, Muon's functions write in place; without it the caller writes the result by a
`Decision` (step/verdict.py). Kernels write by themselves under a verdict that only the device knows: AdamW's, torch's
own, and where the device has them those of fused.py. They do nothing if `unless` (0-dim float32; torch's `found_inf`)
is 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from distmuon.errors import problem
from distmuon.math import fused


def muon_momentum(
    grad: Tensor,
    momentum_buffer: Tensor,
    *,
    momentum: float,
    nesterov: bool,
    out: Tensor | None = None,
    unless: Tensor | None = None,
    update_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Line 2 of the algorithm: (new momentum buffer, update), of any shape; float32, but for an `update_out`.

    ``M <- mu*M + (1-mu)*G``; ``U = (1-mu)*G + mu*M`` with Nesterov, else ``M``. This is torch.optim.Muon's moving
    average. The paper's sum ``M <- mu*M + G`` (arXiv 2502.16982, eq. 1) is the same divided by (1-mu), and
    Newton-Schulz ignores scale; the average keeps its scale when momentum is scheduled.
    `out`: float32 memory for the new buffer, which may be the old buffer; None: new memory. `update_out`: memory for
    the update. `unless`, only where `fused.ready`: the old buffer is written, see the module; the update is that of a
    step that is taken.
    """
    if unless is not None:
        update = torch.empty_like(grad) if update_out is None else update_out
        fused.momentum(grad, momentum_buffer, update, unless, 1.0 - momentum, momentum if nesterov else 1.0)
        return momentum_buffer, update
    buffer = torch.lerp(momentum_buffer.float(), grad, 1.0 - momentum, out=out)
    if update_out is None:
        return buffer, torch.lerp(grad, buffer, momentum) if nesterov else buffer
    if not nesterov:
        return buffer, update_out.copy_(buffer)
    if update_out.dtype == buffer.dtype:
        return buffer, torch.lerp(grad, buffer, momentum, out=update_out)
    return buffer, update_out.copy_(torch.lerp(grad, buffer, momentum))


def lr_scale(m: int, n: int, adjust_lr_fn: str) -> float:
    """The factor on lr for a logical (m, n) matrix stored (out, in).

    "match_rms_adamw": ``0.2*sqrt(max(m, n))``, AdamW's update RMS (arXiv 2502.16982, eq. 4).
    "original": ``sqrt(max(1, m/n))`` (https://kellerjordan.github.io/posts/muon/).
    """
    return 0.2 * math.sqrt(max(m, n)) if adjust_lr_fn == "match_rms_adamw" else math.sqrt(max(1.0, m / n))


def row_second_moment(polar_factor: Tensor, old: Tensor, beta2: float) -> Tensor:
    """NorMuon's moment of each row, (..., m) float32: ``v <- beta2*v + (1-beta2)*mean(O*O over the row)``.

    `polar_factor` (..., m, n), stored (out, in), so that a row is a neuron (arXiv 2510.05491, Algorithm 1).
    """
    return torch.lerp(old, polar_factor.float().square().mean(dim=-1), 1.0 - beta2)


def normalized_rows(polar_factor: Tensor, moment: Tensor) -> Tensor:
    """``O / (sqrt(v) + 1e-8)`` by rows, (..., m, n) float32, with the Frobenius norm sqrt(min(m, n)) of exact factors.

    With that norm and the scale of line 6, ``0.2*sqrt(max(m, n))``, the update has NorMuon's RMS of 0.2
    (arXiv 2510.05491, Algorithm 1).
    """
    scaled = polar_factor.float() / (moment.sqrt() + 1e-8).unsqueeze(-1)
    norm = torch.linalg.vector_norm(scaled, dim=(-2, -1), keepdim=True)
    smallest = torch.finfo(torch.float32).tiny  # the polar factor of zeros is zero
    return scaled.mul_(math.sqrt(min(scaled.shape[-2:])) / norm.clamp_min(smallest))


def cautious_decay(weight: Tensor, update: Tensor, *, lr: float, weight_decay: float) -> Tensor:
    """What `weight` is multiplied by: ``1 - lr*wd`` where `update`, which is subtracted, also shrinks it, else 1.

    Cautious weight decay (arXiv 2510.12402, eq. 2). Only the signs of `update` count.
    """
    return torch.where(update.to(weight.dtype) * weight >= 0, 1.0 - lr * weight_decay, 1.0).to(weight.dtype)


def muon_weight(
    master: Tensor,
    polar_factor: Tensor,
    *,
    lr: float,
    weight_decay: float,
    scale: float,
    cautious: bool = False,
    out: Tensor | None = None,
    unless: Tensor | None = None,
) -> Tensor:
    """Line 6 of the algorithm: ``W - lr*(scale*O + wd*W)`` in `master`'s dtype (arXiv 2502.16982, eq. 4).

    `cautious`: weight decay as in `cautious_decay`.
    `out` may be `master`. Three kernels round once each: on a CPU a single kernel might use fused multiply-adds in the
    vector part of its loop only, and the bits must not depend on the position of an element in a tensor. `unless`, only
    where `fused.ready` and not together with `cautious`: `master` is written, see the module; the same bits.
    """
    if unless is not None:
        fused.weight(master, polar_factor, unless, 1.0 - lr * weight_decay, -lr * scale)
        return master
    step = polar_factor.to(master.dtype, copy=True).mul_(-lr * scale)
    if cautious:
        decay = cautious_decay(master, polar_factor, lr=lr, weight_decay=weight_decay)
        return torch.mul(master, decay, out=out).add_(step)
    return torch.mul(master, 1.0 - lr * weight_decay, out=out).add_(step)


def adamw_step(
    masters: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[dict[str, Tensor]],
    unless: Tensor | None,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """AdamW in place, by torch's fused kernel; float32 tensors, with the same shapes in all lists."""
    if not masters:
        return
    adamw(
        list(masters),
        [grad.to(master.dtype) for grad, master in zip(grads, masters)],
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        fused=True,
        found_inf=unless,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )


def scalar(value: float | Tensor) -> float:
    """A hyperparameter as a number. A tensor lr must be on the CPU: reading it on a GPU waits for the device."""
    return float(value)


def clip_coefficient(total_norm: Tensor, max_norm: float, norm_type: float = 2.0) -> Tensor:
    """``min(1, max_norm / (total_norm + 1e-6))`` as in torch.nn.utils.clip_grad_norm_; a 0-dim tensor."""
    if not isinstance(norm_type, (int, float)) or norm_type != 2.0:
        raise problem(
            "norm_type",
            found=f"found {norm_type}",
            needed="only the 2-norm is reduced across ranks",
            cure="pass norm_type=2",
        )
    if isinstance(max_norm, bool) or not isinstance(max_norm, Real) or not max_norm > 0:
        raise problem(
            "max_norm",
            found=f"found {max_norm!r}",
            needed="a positive number is needed",
            cure="pass inf to only compute the norm",
        )
    return (float(max_norm) / (total_norm + 1e-6)).clamp(max=1.0)
