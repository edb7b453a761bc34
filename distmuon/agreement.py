"""What ranks do together: one raises, all raise; and whether all hold the same bits.

Decides nothing about training. Blocking, and slow beside a step: for checkpoints and for checks from time to time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from distmuon.collectives import DataParallelGroup, hang_up
from distmuon.errors import problem
from distmuon.roll_call import LostRanks, RollCall

_BLOCK = 1 << 20  # elements summed at once: the sums need 8 bytes for each
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
T = TypeVar("T")


def together(group: DataParallelGroup, action: Callable[[], T], *, stage: str = "checkpoint") -> T:
    """This rank's `action()`; what it raises on any rank, all raise, as a `ValueError`. Blocking; `stage`: where.

    A `ValueError` keeps its message; any other error is wrapped and names the rank.
    """
    failure, cause = None, None
    try:
        value = action()
    except Exception as error:  # of whatever kind: the other ranks must not wait for this one
        failure, cause = f"{type(error).__name__}: {error}", error
        if isinstance(error, ValueError):
            failure = str(error)
    outcomes = group.gather_objects((failure, isinstance(cause, ValueError)), stage=stage)
    for rank, (text, clear) in enumerate(outcomes):
        if text is not None:
            if clear:
                raise ValueError(text) from cause
            raise problem(f"rank {rank}", text, "all ranks must succeed", "see that rank's traceback") from cause
    return value


@contextmanager
def shared_fate(process_group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """An exception that leaves the block on one rank ends the others too, each with that rank's message.

    Put it around the training loop. What a rank raises is left in the group's store; on gloo its connections are
    closed, so the others fail at their next (or present) collective with `LostRanks`, which quotes it, also where the
    process that raised lives on; it waits up to `roll_call.GRACE_S` for them. On NCCL ranks that wait on the device
    cannot be told: there the launcher ends them. `process_group`: the optimizer's. Costs nothing while all goes well.
    """
    try:
        yield
    except Exception as error:
        known = process_group is not None or (dist.is_available() and dist.is_initialized())
        with suppress(ValueError):  # the group was destroyed inside the block
            if known and not isinstance(error, LostRanks) and dist.get_world_size(process_group) > 1:
                roll = RollCall(process_group, dist.get_rank(process_group), dist.get_world_size(process_group))
                roll.tell(error, partial(hang_up, process_group))
        raise


def bit_sums(tensor: Tensor) -> Tensor:
    """Two int64 sums of the bits of `tensor`, on its device: plain, and weighted by position. No host sync.

    One changed bit always changes the first (by a power of two, and sums wrap around at 2**64); elements that changed
    places change the second.
    """
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    bits = tensor.detach().reshape(-1).view(_INTEGERS[tensor.element_size()])
    sums = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for start in range(0, bits.numel(), _BLOCK):
        block = bits[start : start + _BLOCK].to(torch.int64)
        sums[0] += block.sum()
        sums[1] += (block * torch.arange(start + 1, start + 1 + block.numel(), device=tensor.device)).sum()
    return sums


def agree_on_bits(
    fqns: Sequence[str], tensors: Sequence[Tensor], group: DataParallelGroup, *, stage: str = "state_dict"
) -> None:
    """Raise on all ranks, naming the first tensor that differs and the ranks, unless all hold the same bits.

    Blocking. Counted under `stage`: one all-gather, 16 bytes a tensor. The tensors are on one device.
    """
    if group.dp_size == 1 or not tensors:
        return
    mine = torch.stack([bit_sums(tensor) for tensor in tensors]).view(-1)
    gathered = group.start_all_gather(mine.new_empty(group.dp_size * mine.numel()), mine, stage=stage).wait()
    everyone = gathered.view(group.dp_size, len(tensors), 2)
    differing = (everyone != everyone[0]).any(2).any(0).nonzero().view(-1).tolist()
    if not differing:
        return
    values = [tuple(sums) for sums in everyone[:, differing[0]].tolist()]
    usual = Counter(values).most_common(1)[0][0]
    odd = [rank for rank, value in enumerate(values) if value != usual]
    raise problem(
        fqns[differing[0]],
        f"its bits on ranks {odd} are not those on ranks {[r for r, v in enumerate(values) if v == usual]}"
        f" ({len(differing)} of {len(fqns)} tensors differ)",
        "all ranks must hold the same parameters",
        "go back to the last checkpoint; if it happens again, test the memory of the machine of these ranks",
    )


def names(paths: Sequence[object], most: int = 5) -> str:
    """The first few of a long list, for messages."""
    shown = ", ".join(map(str, paths[:most]))
    return shown if len(paths) <= most else f"{shown} and {len(paths) - most} more"
