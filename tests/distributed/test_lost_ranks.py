"""Ranks that hang, die, raise, or go another way: the others are told which one, where, and what to do, and soon.

Most run in the pool, each in a group of its own with a time limit of seconds: a group that has lost a rank is broken.
Ranks of the group that wait fail with `LostRanks`; the pool's own groups are left alone. What needs processes that die
has processes of its own.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

import distmuon
from distmuon import collectives, roll_call
from tests.standing import make_batch
from tests.training import backward, make, train

ROOT = Path(__file__).parents[2]
LIMIT_S = 2.0  # of the groups that lose a rank
REDUCED, GATHERED = "reduce_scatter of bucket 0", "all_gather of bucket"


def _own_group(ranks: list[int], limit_s: float = LIMIT_S) -> dist.ProcessGroup:
    """Of `ranks` of the pool, all of whose workers must call this. The limit is for what comes after the set-up."""
    own = dist.new_group(ranks, timeout=timedelta(seconds=60))
    if dist.get_rank() in ranks:
        c10d._set_pg_timeout(timedelta(seconds=limit_s), own)
    return own


def _told(
    group: dist.ProcessGroup, act: Callable[[dist.ProcessGroup, int], None], ranks: tuple[int, ...] = (0, 1, 2)
) -> tuple[str, str, float]:
    """What `act(own group, rank in it)` raised: (message, that of its cause), and after how many seconds."""
    roll_call.GRACE_S, own, start = 1.0, _own_group(list(ranks)), time.monotonic()
    try:
        if dist.get_rank() in ranks:
            act(own, dist.get_rank(own))
    except Exception as error:
        return f"{type(error).__name__}: {error}", str(error.__cause__), time.monotonic() - start
    finally:
        dist.barrier(group)  # the pool's group is sound, and nobody goes on while another still waits
    return "", "", time.monotonic() - start


# --------------------------------------------------------------------------------------------- a rank that is missing


def _late_to(stage: str, **options: Any) -> Callable[[dist.ProcessGroup, int], None]:
    """Training in which the last rank sleeps before `stage` of the second step, longer than the others wait."""

    def act(own: dist.ProcessGroup, rank: int) -> None:
        model, optimizer = make(own, **options)
        late = rank == dist.get_world_size(own) - 1
        train(own, model, optimizer, [0])
        if stage == "reduce_scatter" and late:
            time.sleep(2 * LIMIT_S + 1)
        backward(model, optimizer, [make_batch(1, rank)])
        if stage != "reduce_scatter" and late:
            optimizer._conductor.source.finish()
            plain = getattr(collectives.DataParallelGroup, f"start_{stage}")

            def late_start(*args: Any, **kwargs: Any) -> Any:
                time.sleep(2 * LIMIT_S + 1)
                return plain(*args, **kwargs)

            setattr(optimizer.group, f"start_{stage}", late_start.__get__(optimizer.group))
        optimizer.step()
        optimizer.synchronize()

    return act


def _late(group: dist.ProcessGroup, stage: str, options: dict[str, Any]) -> tuple[str, str, float]:
    return _told(group, _late_to(stage, **options))


@pytest.mark.parametrize(
    ("stage", "place"),
    [
        ("reduce_scatter", r"reduce_scatter of bucket 0 \(\w+\.\w+, \w+\.\w+, .+ and \d+ more\), step 2"),
        ("all_reduce", r"guard, step 2"),
        ("all_to_all", r"(dp_gather|scatter) of bucket \d+ \(.+\), step 2"),
        ("all_gather", r"all_gather of bucket \d+ \(.+\), step 2"),
    ],
)
def test_a_rank_that_does_not_come_is_named_with_bucket_and_parameters(spawn, stage: str, place: str) -> None:
    """Wherever it stays away: by the waiting ranks at once, and by itself when it comes too late."""
    results = spawn(_late, 4, stage=stage, options={})
    for rank, (message, cause, seconds) in enumerate(results[:2]):
        assert re.match(rf"LostRanks: rank {rank} at {place}: rank 2 missing, without a word for 1 s, ", message), (
            message
        )
        assert "see the output and the machine of rank 2: it hangs, has died or is cut off" in message
        assert re.search("Timed out|Connection closed|closed", cause), cause
        assert seconds < 2 * LIMIT_S + 1
    late, _, _ = results[2]
    print(results)
    assert re.match(r"LostRanks: rank 2 at .+ step 2: ranks? .*waited here, too|.*stood at", late), late
    assert "rank 2 missing" not in late
