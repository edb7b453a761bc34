"""The verdict on a step's gradients: a small all-reduce that gives the same answer on all ranks.

This module decides whether a step may write state, and how it writes; `Engine.update` obeys. It knows no bucket. The
all-reduce sums the squares of the averaged gradient, the number of ranks with a gradient of AdamW that is too large to
square, and for each parameter the number of ranks on which it had a gradient. Non-finite values show in the sum of
squares.

[Note: writing under a verdict] A step writes Muon's momentum and all masters through a `Decision`; AdamW's kernel takes
the verdict itself, and parameters are then rounded from the masters. On a CPU the host can read the verdict without
waiting: a skipped step computes nothing, and other steps write in place (`OnHost`). On a GPU the host would wait for
the device, so the verdict stays a 0-dim tensor on it (`OnDevice`). Fused kernels obey it by themselves, torch's AdamW
and those of math/fused.py; other new values are computed in new memory and written where it allows. A skipped step
leaves every bit as it was.

[Note: parameters without a gradient] A parameter that has no gradient on any rank is left alone. A rank on which all
parameters had one knows that there is none, and so does a CPU. Another rank would have to wait for its device, so there
such a parameter has a verdict of its own: of the step, and of the ranks that had a gradient.

[Note: large gradients] A step is taken if every value that it writes is finite. Norms are summed in float64, so that
they are right for all float32 gradients. Below a norm of 2^127, half of the largest float32, no moving average and no
difference of two can overflow. AdamW keeps squares in float32, so its elements must stay below 2^64 = 1.8e19; if an
element does not, the step is taken only if clipping has brought the norm below that (`Verdict.final`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Protocol

import torch
from torch import Tensor

from distmuon.comm.group import DataParallelGroup

SQUARABLE = 2.0**64  # float32 holds the square of smaller numbers
LARGEST_NORM = 2.0**127  # half of the largest float32
_EXACT = (2.0**-80, 2.0**128)  # in this range a float32 sum of squares has neither under- nor overflowed


@dataclass(frozen=True, slots=True)
class Verdict:
    """A verdict, equal on all ranks. `total_norm` (0-dim float32) and `ok` (0-dim bool; `final` may still
    refuse) stay on the device.

    `present[i]`: whether this rank had a gradient for parameter i, or, as far as the host knows, any other. `somewhere`
    (n,) bool: whether any rank had, where the host does not know; see [Note: parameters without a gradient].
    `ok_on_host`: the value of `ok`, or None on a GPU, where the host would have to wait. `disagree` (0-dim bool): the
    ranks have different hyperparameters or optimizers; then `ok` is False. `squarable` (0-dim bool): float32 holds the
    square of every gradient element of AdamW.
    """

    total_norm: Tensor
    ok: Tensor
    present: Sequence[bool]
    ok_on_host: bool | None
    disagree: Tensor
    squarable: Tensor
    somewhere: Tensor | None = None

    def final(self) -> Verdict:
        """The verdict that the update obeys, after all clipping; see [Note: large gradients]."""
        ok = self.ok & (self.squarable | (self.total_norm < SQUARABLE))
        return replace(self, ok=ok, ok_on_host=None if self.ok_on_host is None else read_on_host(ok))

    @property
    def known_to_skip(self) -> bool:
        """The host knows that the step must be skipped: the engine then updates no bucket."""
        return self.ok_on_host is False

    def decisions(self) -> list[Decision | None]:
        """By parameter, how this step writes; None: the parameter is left alone, as the host knows."""
        decision: Decision = OnHost() if self.ok_on_host else OnDevice(self.ok, _found_inf(self.ok))
        if self.somewhere is None:
            return [decision if present else None for present in self.present]
        each = self.ok & self.somewhere
        skips = _found_inf(each)
        return [decision if present else OnDevice(each[i], skips[i]) for i, present in enumerate(self.present)]

    def present_on_host(self) -> Sequence[bool]:
        """By parameter, whether any rank had a gradient. May wait for the device."""
        return self.present if self.somewhere is None else self.somewhere.tolist()


class Decision(Protocol):
    """How new values replace old ones; see [Note: writing under a verdict]."""

    found_inf: Tensor | None
    """1.0 (0-dim float32 on the device) if the step is skipped, for fused kernels; None: the host knows it is taken."""

    def scratch(self, old: Tensor) -> Tensor | None:
        """Memory in which the new value of `old` may be computed: `old` itself, or None for new memory."""

    def write(self, old: Tensor, new: Tensor) -> None:
        """Write `new`, cast to `old`'s dtype, into `old` if the step is taken; else leave `old`, bit for bit."""


class OnHost:
    """The host knows that the step is taken."""

    found_inf: Tensor | None = None

    def scratch(self, old: Tensor) -> Tensor | None:
        return old

    def write(self, old: Tensor, new: Tensor) -> None:
        if new is not old:
            old.copy_(new)


class OnDevice:
    """Only the device knows whether the step is taken: `ok` is a 0-dim bool on it."""

    def __init__(self, ok: Tensor, found_inf: Tensor) -> None:
        self._ok = ok
        self.found_inf: Tensor | None = found_inf

    def scratch(self, old: Tensor) -> Tensor | None:
        return None

    def write(self, old: Tensor, new: Tensor) -> None:
        if new is not old:
            torch.where(self._ok, new.to(old.dtype), old, out=old)


def _found_inf(ok: Tensor) -> Tensor:
    return (~ok).to(torch.float32)


def judge(
    grad_shards: Sequence[Tensor],
    adamw_grads: Sequence[Tensor],
    present: Sequence[bool],
    group: DataParallelGroup,
    fingerprint: int = 0,
    replicas: Sequence[Tensor] = (),
    model_group: DataParallelGroup | None = None,
    copies: Mapping[int, Sequence[Tensor]] | None = None,
    elsewhere: Sequence[tuple[DataParallelGroup, list[int]]] = (),
) -> Verdict:
    """Reach the verdict by an all-reduce. The host does not wait for a device.

    `adamw_grads`: the parts of `grad_shards` that AdamW will square. `fingerprint`: a hash below 2**16 of the values
    that must be equal on all ranks. It is equal if dp_size times the sum of its squares is the square of its sum; these
    are integers that float64 holds exactly for up to 1,024 ranks. `replicas`: gradients that another rank has among its
    `grad_shards`; they must be finite, too, and do not add to the norm. `model_group`: the ranks that hold the other
    parts of the model, for a second all-reduce, of the norm and of what forbids the step. `copies`: the parts of
    `grad_shards` that n of those ranks hold, by n. `elsewhere`: the groups inside `group` that hold parameters of their
    own, with their indices: another rank's parameter of this index is another, so each group counts its gradients. Each
    element lies on a single rank of `group`, so a single all-reduce sums the squares of all of them.
    """
    squares_of = squares_on_cpu if grad_shards[0].device.type == "cpu" else squares_on_device
    squares = squares_of(grad_shards)
    if replicas:
        squares = squares + 0.0 * squares_of(replicas)  # NaN and inf times 0 are NaN
    for number, held in (copies or {}).items():
        squares = squares - (1 - 1 / number) * squares_of(held)
    flags = torch.ones(len(present), dtype=torch.float64, device=squares.device)
    if not all(present):  # from pinned memory, or else the host would wait for the device
        flags = torch.tensor(present, dtype=torch.float64, pin_memory=squares.is_cuda)
        flags = flags.to(squares.device, non_blocking=True)
    fingerprints = flags.new_full((2,), fingerprint)
    fingerprints[1:].square_()
    large = _has_large(adamw_grads, squares).to(torch.float64)
    counts = [other.start_all_reduce(flags[members], stage="guard") for other, members in elsewhere]
    message = torch.cat([torch.stack([squares, large]), fingerprints, flags])
    reduced = group.start_all_reduce(message, stage="guard").wait()
    for (_, members), count in zip(elsewhere, counts):
        reduced[4:][members] = count.wait()
    disagree = reduced[2].square() != group.dp_size * reduced[3]
    whole = torch.stack([reduced[0], reduced[1], disagree.to(torch.float64)])
    if model_group is not None:
        whole = model_group.start_all_reduce(whole, stage="model_guard").wait()
    total_norm = whole[0].sqrt()
    ok = (total_norm < LARGEST_NORM) & (whole[2] == 0)
    ok_on_host = read_on_host(ok)
    somewhere = None if all(present) else reduced[4:] > 0
    if somewhere is not None and ok_on_host is not None:
        present, somewhere = somewhere.tolist(), None
    return Verdict(total_norm.float(), ok, present, ok_on_host, disagree, whole[1] == 0, somewhere)


def squares_on_device(shards: Sequence[Tensor]) -> Tensor:
    """The sum of squares of all elements of the float32 `shards`, 0-dim float64, exact for all magnitudes.

    On CUDA this is a single pass with float64 only in registers; the host does not wait.
    """
    return torch.stack(torch._foreach_norm(list(shards), 2.0, dtype=torch.float64)).square().sum()


def squares_on_cpu(shards: Sequence[Tensor]) -> Tensor:
    """The same as `squares_on_device` on a CPU, in float32 first, and in float64 if float32 squares under- or overflow.

    On a CPU a conversion costs a pass, but reading the first result is free.
    """
    # Sum by rows: a CPU's float32 sum over 30 million elements at once loses a thousandth.
    rows = [torch.linalg.vector_norm(shard.view(-1, gcd(shard.numel(), 1024)), dim=1) for shard in shards]
    total = torch.stack([norms.double().square().sum() for norms in rows]).sum()
    if _EXACT[0] <= total < _EXACT[1]:
        return total
    parts = [part for shard in shards for part in torch.split(shard, 2**16)]  # a part fits into cache as float64
    return torch.stack([part.double().square_().sum() for part in parts]).sum()


def _has_large(grads: Sequence[Tensor], squares: Tensor) -> Tensor:
    """Whether float32 cannot hold the square of some element, 0-dim bool. `squares`: at least the sum of squares."""
    if not grads or (squares.device.type == "cpu" and squares < SQUARABLE**2):
        return torch.zeros((), dtype=torch.bool, device=squares.device)
    return torch.stack(torch._foreach_norm(list(grads), float("inf"))).amax() >= SQUARABLE


def read_on_host(ok: Tensor) -> bool | None:
    """The value of `ok`, or None if the host would have to wait for a device."""
    return bool(ok) if ok.device.type == "cpu" else None
