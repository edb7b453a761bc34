"""Agreement between ranks: an error on any rank becomes the error of all, and all ranks must hold the same bits.

This module decides nothing about training. Its calls block and are slow compared with a step; they serve checkpoints
and occasional checks.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import zip_longest
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from distmuon.comm.group import DataParallelGroup, hang_up
from distmuon.comm.lost_ranks import LostRanks, RollCall
from distmuon.errors import problem

_CPU_BLOCK = 1 << 19  # bytes summed at once: they fit into a cache
_GPU_BLOCK = 1 << 26  # enough for every core of a GPU
# Both multipliers are odd, so different factors give different products modulo 2**64.
_MIXER = 0x1E3779B97F4A7C15
_POSITION_MIXER = 0x3F58476D1CE4E5B9
T = TypeVar("T")


def raise_together(group: DataParallelGroup, action: Callable[[], T], *, stage: str = "checkpoint") -> T:
    """Return this rank's `action()`; if it raises on any rank, raise a `ValueError` on all ranks. Blocking.

    A `ValueError` keeps its message; any other error is wrapped and names the rank. Messages quote `stage`.
    """
    failure, cause = None, None
    try:
        value = action()
    except Exception as error:  # of any kind: the other ranks must not wait for this rank
        failure, cause = f"{type(error).__name__}: {error}", error
        if isinstance(error, ValueError):
            failure = str(error)
    try:
        outcomes = group.gather_objects((failure, isinstance(cause, ValueError)), stage=stage)
        for rank, (text, is_value_error) in enumerate(outcomes):
            if text is not None:
                if is_value_error:
                    raise ValueError(text) from cause
                needed, remedy = "all ranks must succeed", "see that rank's traceback"
                raise problem(f"rank {rank}", found=text, needed=needed, cure=remedy) from cause
        return value
    finally:
        del cause  # its traceback keeps this frame alive, and with it all that `action` refers to


def in_each_group(
    groups: Sequence[DataParallelGroup], action: Callable[[int, DataParallelGroup], None], *, stage: str
) -> None:
    """Run `action(number, group)` for each of `groups`, which lie inside the first. Blocking.

    What it raises must be raised on all ranks of the group; if there are others, they raise it, too.
    """
    action(0, groups[0])
    for number, group in enumerate(groups[1:], 1):
        raise_together(groups[0], partial(action, number, group), stage=stage)


@contextmanager
def shared_fate(process_group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """End all ranks, with the same message, when an exception leaves the block on one rank.

    Put it around the training loop. The failing rank writes its error into the group's store, waits up to
    `lost_ranks.GRACE_S` for the other ranks, and on gloo closes its connections. The other ranks then fail with
    `LostRanks`, which quotes the error, at their current or next collective, even if the failing process lives on.
    On NCCL, ranks that wait on the device cannot be told; there the launcher ends them. `process_group` is the
    optimizer's. The block costs nothing while no rank fails.
    """
    try:
        yield
    except Exception as error:
        distributed = process_group is not None or (dist.is_available() and dist.is_initialized())
        with suppress(ValueError):  # the group was destroyed inside the block
            if distributed and not isinstance(error, LostRanks) and dist.get_world_size(process_group) > 1:
                roll = RollCall(process_group, dist.get_rank(process_group), dist.get_world_size(process_group))
                roll.report_failure(error, partial(hang_up, process_group))
        raise


def bit_sums(tensor: Tensor) -> Tensor:
    """Two int64 sums over the bits of a dense `tensor`, on its device: of the words, and of words mixed with positions.

    One changed bit always changes the first sum (by a power of two; sums wrap around at 2**64). The second sum also
    changes where the first cannot, as when elements swap places; two tensors share both by a chance of about 2**-64.
    There is no host sync.
    """
    data = tensor.detach().resolve_conj().resolve_neg().reshape(-1).contiguous().view(torch.uint8)
    sums = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    length = _CPU_BLOCK if data.device.type == "cpu" else _GPU_BLOCK
    for start in range(0, data.numel(), length):
        block = data[start : start + length]
        padding = -block.numel() % 8
        # The copy is aligned to 8 bytes, and it may be overwritten.
        words = torch.nn.functional.pad(block, (0, padding)) if padding else block.clone()
        words = words.view(torch.int64)
        sums[0] += words.sum()
        words += torch.arange(start // 8, start // 8 + words.numel(), device=tensor.device) * _POSITION_MIXER
        words ^= (words >> 32) & 0xFFFFFFFF
        words *= _MIXER
        words ^= (words >> 29) & 0x7FFFFFFFF
        words *= _MIXER
        sums[1] += words.sum()
    return sums


def agree_on_bits(
    fqns: Sequence[str], tensors: Sequence[Tensor], group: DataParallelGroup, *, stage: str = "state_dict"
) -> None:
    """Raise on all ranks, naming the first tensor that differs and the ranks, unless all ranks hold the same bits.

    Blocking: one all-gather of 16 bytes a tensor, counted under `stage`. All tensors must be on one device.
    """
    if group.dp_size == 1 or not tensors:
        return
    local = torch.stack([bit_sums(tensor) for tensor in tensors]).view(-1)
    gathered = group.start_all_gather(local.new_empty(group.dp_size * local.numel()), local, stage=stage).wait()
    sums_by_rank = gathered.view(group.dp_size, len(tensors), 2)
    differing = (sums_by_rank != sums_by_rank[0]).any(2).any(0).nonzero().view(-1).tolist()
    if not differing:
        return
    values = [tuple(sums) for sums in sums_by_rank[:, differing[0]].tolist()]
    usual = Counter(values).most_common(1)[0][0]
    odd = [rank for rank, value in enumerate(values) if value != usual]
    raise problem(
        fqns[differing[0]],
        found=f"its bits on ranks {odd} are not those on ranks {[r for r, v in enumerate(values) if v == usual]}"
        f" ({len(differing)} of {len(fqns)} tensors differ)",
        needed="all ranks must hold the same parameters",
        cure="go back to the last checkpoint; if it happens again, test the memory of these ranks' machine",
    )


def agree_on_plan(fingerprint: str, items: Sequence[str], group: DataParallelGroup) -> None:
    """Raise the same `ValueError` on all ranks unless they made the same layout. Blocking; called once.

    `items` has a text for each parameter and option, in order; the message quotes the first that differs.
    """
    digest = hashlib.sha256(fingerprint.encode()).hexdigest()
    if len(set(group.gather_objects(digest, stage="comparison of the plans"))) == 1:
        return
    items_by_rank = group.gather_objects(list(items), stage="comparison of the plans")
    for rank, found in enumerate(items_by_rank):
        for first, item in zip_longest(items_by_rank[0], found, fillvalue="nothing"):
            if first != item:
                raise problem(
                    f"rank {rank}",
                    found=f"found {item}, on rank 0 {first}",
                    needed="all ranks must build the same model and options in the same order",
                    cure="make the model, the arguments and the learning rate independent of the rank",
                )
    raise problem(
        "plan",
        found="ranks agree on parameters and options but not on the layout or the kernels",
        needed="all ranks need the same versions of distmuon and of its kernels",
        cure="install the same versions everywhere",
    )
