"""What ranks do together: one raises, all raise; and whether all hold the same bits.

Decides nothing about training. Blocking, and slow beside a step: for checkpoints and for checks from time to time.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from distmuon.comm.group import DataParallelGroup, hang_up
from distmuon.comm.lost_ranks import LostRanks, RollCall
from distmuon.errors import problem

_BLOCK, _GPU_BLOCK = 1 << 19, 1 << 26  # bytes summed at once: a cache's worth, or enough for every core of a GPU
_ODD, _PLACES = 0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9  # odd: products modulo 2**64 are as different as the factors
T = TypeVar("T")


def raise_together(group: DataParallelGroup, action: Callable[[], T], *, stage: str = "checkpoint") -> T:
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
    try:
        outcomes = group.gather_objects((failure, isinstance(cause, ValueError)), stage=stage)
        for rank, (text, clear) in enumerate(outcomes):
            if text is not None:
                if clear:
                    raise ValueError(text) from cause
                needed, remedy = "all ranks must succeed", "see that rank's traceback"
                raise problem(f"rank {rank}", found=text, needed=needed, cure=remedy) from cause
        return value
    finally:
        del cause  # whose traceback holds this frame, and with it whatever `action` holds


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
                roll.report_failure(error, partial(hang_up, process_group))
        raise


def bit_sums(tensor: Tensor) -> Tensor:
    """Two int64 sums of the bits of a dense `tensor`, on its device: plain, and of each word mixed with its position.

    One changed bit always changes the first (by a power of two, and sums wrap around at 2**64). The second tells apart
    what the first cannot, as elements that changed places, or two counts of the same total: other bits come to the same
    by a chance of 2**-64. No host sync.
    """
    data = tensor.detach().resolve_conj().resolve_neg().reshape(-1).contiguous().view(torch.uint8)
    sums = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    length = _BLOCK if data.device.type == "cpu" else _GPU_BLOCK
    for start in range(0, data.numel(), length):
        block = data[start : start + length]
        padding = -block.numel() % 8
        # A copy begins where words of 8 bytes may begin, and may be changed.
        words = torch.nn.functional.pad(block, (0, padding)) if padding else block.clone()
        words = words.view(torch.int64)
        sums[0] += words.sum()
        words += torch.arange(start // 8, start // 8 + words.numel(), device=tensor.device) * _PLACES
        words ^= (words >> 32) & 0xFFFFFFFF
        words *= _ODD
        words ^= (words >> 29) & 0x7FFFFFFFF
        words *= _ODD
        sums[1] += words.sum()
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
        found=f"its bits on ranks {odd} are not those on ranks {[r for r, v in enumerate(values) if v == usual]}"
        f" ({len(differing)} of {len(fqns)} tensors differ)",
        needed="all ranks must hold the same parameters",
        cure="go back to the last checkpoint; if it happens again, test the memory of the machine of these ranks",
    )


def agree_on_plan(fingerprint: str, items: Sequence[str], group: DataParallelGroup) -> None:
    """Raise the same `ValueError` on all ranks unless they made the same layout. Blocking, once.

    `items`: one text a parameter or option, in order, to name the first difference.
    """
    digest = hashlib.sha256(fingerprint.encode()).hexdigest()
    if len(set(group.gather_objects(digest, stage="comparison of the plans"))) == 1:
        return
    everyone = group.gather_objects(list(items), stage="comparison of the plans")
    for rank, theirs in enumerate(everyone):
        for position in range(max(len(theirs), len(everyone[0]))):
            ours, other = (dict(enumerate(texts)).get(position, "nothing") for texts in (everyone[0], theirs))
            if ours != other:
                raise problem(
                    f"rank {rank}",
                    found=f"found {other}, on rank 0 {ours}",
                    needed="all ranks must build the same model and options in the same order",
                    cure="make the model, the arguments and the learning rate independent of the rank",
                )
    raise problem(
        "plan",
        found="ranks agree on parameters and options but not on the layout or the kernels",
        needed="all ranks need the same versions of distmuon and of its kernels",
        cure="install the same everywhere",
    )
