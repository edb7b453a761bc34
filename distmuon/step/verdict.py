"""The verdict on a step's gradients: one small all-reduce, the same answer on all ranks.

Decides whether a step may touch state, and how it then writes. The all-reduce carries the sum of squares of the
averaged gradient, the number of ranks that hold a gradient of AdamW's too large to be squared, and for each parameter
the number of ranks on which it had a gradient. Non-finite values show in the sum of squares.

[Note: writing under a verdict] Nothing writes parameters or state but a `Decision`. On a CPU the host reads the verdict
for nothing: a step that is skipped computes nothing, and one that counts writes in place (`OnHost`). On a GPU reading
would make the host wait for the device, so new values are computed beside the old ones and written where the verdict,
a 0-dim bool on the device, says so (`OnDevice`): a skipped step leaves every bit as it was.

[Note: large gradients] A step is taken wherever all that it writes is finite. Norms are summed up in float64, so that
they are right for whatever float32 can hold. Below a norm of 2^127, half of the largest float32, no moving average and
no difference of two can overflow. AdamW keeps squares in float32, whose elements must stay below 2^64 = 1.8e19; so if
one does not, the step is taken only if clipping has brought the norm below that (`Verdict.of_clipped`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Protocol

import torch
from torch import Tensor

from distmuon.comm.group import DataParallelGroup

SQUARABLE = 2.0**64  # below it float32 holds the square
LARGEST_NORM = 2.0**127  # half of the largest float32
_EXACT = (2.0**-80, 2.0**128)  # between these a sum of float32's squares has neither under- nor overflown


@dataclass(frozen=True, slots=True)
class Verdict:
    """The same on all ranks. `total_norm` (0-dim float32) and `ok` (0-dim bool) stay on the device.

    `present[i]`: some rank had a gradient for parameter i (a parameter without any is left alone). `ok_on_host`: what
    `ok` says, where the host may read it for nothing; None on a GPU. `apart` (0-dim bool): the ranks step by different
    hyperparameters, or different optimizers; then `ok` is False. `squarable` (0-dim bool): float32 holds the square of
    each of AdamW's elements.
    """

    total_norm: Tensor
    ok: Tensor
    present: Sequence[bool]
    ok_on_host: bool | None
    apart: Tensor
    squarable: Tensor

    def of_clipped(self) -> Verdict:
        """What holds when nobody scales the gradients any more; see [Note: large gradients]."""
        ok = self.ok & (self.squarable | (self.total_norm < SQUARABLE))
        return replace(self, ok=ok, ok_on_host=None if self.ok_on_host is None else read_on_host(ok))

    @property
    def decision(self) -> Decision:
        """How a step that is not skipped writes."""
        return OnHost() if self.ok_on_host else OnDevice(self.ok)


class Decision(Protocol):
    """How new values replace old ones; see [Note: writing under a verdict]."""

    def scratch(self, old: Tensor) -> Tensor | None:
        """Where the new value of `old` may be computed: `old` itself, or None for new memory."""

    def write(self, old: Tensor, new: Tensor) -> None:
        """``old <- new`` where the step counts, cast to `old`'s dtype; else `old` stays, bit for bit."""


class OnHost:
    """The host knows that the step counts."""

    def scratch(self, old: Tensor) -> Tensor | None:
        return old

    def write(self, old: Tensor, new: Tensor) -> None:
        if new is not old:
            old.copy_(new)


class OnDevice:
    """Only the device knows: `ok` is a 0-dim bool there."""

    def __init__(self, ok: Tensor) -> None:
        self._ok = ok

    def scratch(self, old: Tensor) -> Tensor | None:
        return None

    def write(self, old: Tensor, new: Tensor) -> None:
        torch.where(self._ok, new.to(old.dtype), old, out=old)


def judge(
    grad_shards: Sequence[Tensor],
    adamw_grads: Sequence[Tensor],
    present: Sequence[bool],
    group: DataParallelGroup,
    fingerprint: int = 0,
) -> Verdict:
    """One all-reduce. The host reads the device only if some parameter had no gradient here.

    `adamw_grads`: the parts of `grad_shards` that AdamW will square. `fingerprint`: below 2**16, of what must be equal
    on all ranks. It is where dp_size times the sum of its squares is the square of its sum: whole numbers that float64
    holds exactly up to 1,024 ranks.
    """
    squares = (squares_on_cpu if grad_shards[0].device.type == "cpu" else squares_on_device)(grad_shards)
    flags = torch.ones(len(present), dtype=torch.float64, device=squares.device)
    if not all(present):
        flags.copy_(torch.tensor(present, dtype=torch.float64))
    prints = flags.new_full((2,), fingerprint)
    prints[1:].square_()
    large = _has_large(adamw_grads, squares).to(torch.float64)
    message = torch.cat([torch.stack([squares, large]), prints, flags])
    reduced = group.start_all_reduce(message, stage="guard").wait()
    total_norm = reduced[0].sqrt()
    if not all(present):
        present = [count > 0 for count in reduced[4:].tolist()]
    apart = reduced[2].square() != group.dp_size * reduced[3]
    ok = (total_norm < LARGEST_NORM) & ~apart
    return Verdict(total_norm.float(), ok, present, read_on_host(ok), apart, reduced[1] == 0)


def squares_on_device(shards: Sequence[Tensor]) -> Tensor:
    """0-dim float64: the sum of squares of all elements of the float32 `shards`, right from the smallest to the largest
    float32. On CUDA one pass over all, with float64 in registers only; nothing waits."""
    return torch.stack(torch._foreach_norm(list(shards), 2.0, dtype=torch.float64)).square().sum()


def squares_on_cpu(shards: Sequence[Tensor]) -> Tensor:
    """The same on a CPU, where a conversion is a pass, and where reading the result is free: a second look at what the
    squares of float32 could not hold."""
    # By rows: over all elements at once the CPU's float32 sum loses a thousandth at 30 million of them.
    rows = [torch.linalg.vector_norm(shard.view(-1, gcd(shard.numel(), 1024)), dim=1) for shard in shards]
    total = torch.stack([norms.double().square().sum() for norms in rows]).sum()
    if _EXACT[0] <= total < _EXACT[1]:
        return total
    parts = [part for shard in shards for part in torch.split(shard, 2**16)]  # so small, in cache also as float64
    return torch.stack([part.double().square_().sum() for part in parts]).sum()


def _has_large(grads: Sequence[Tensor], squares: Tensor) -> Tensor:
    """0-dim bool: float32 cannot hold the square of some element. `squares`: at least the sum of all of them."""
    if not grads or (squares.device.type == "cpu" and squares < SQUARABLE**2):
        return torch.zeros((), dtype=torch.bool, device=squares.device)
    return torch.stack(torch._foreach_norm(list(grads), float("inf"))).amax() >= SQUARABLE


def read_on_host(ok: Tensor) -> bool | None:
    """What `ok` says, if reading it waits for no device."""
    return bool(ok) if ok.device.type == "cpu" else None
