"""The pool itself: results in rank order, the first traceback, limits, dead workers, and that it serves again."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from tests.pool import Pool, WorkerError


@pytest.fixture(scope="module")
def small_pool() -> Iterator[Pool]:
    """A pool of its own: these tests end it on purpose."""
    pool = Pool(2, grace_s=1.0)
    yield pool
    pool.close()


def _sum_of_ranks(group: dist.ProcessGroup, scale: float) -> float:
    total = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(total, group=group)
    return scale * total.item()


def _rank_one_raises(group: dist.ProcessGroup) -> None:
    if dist.get_rank(group) == 1:
        raise ValueError("planted on rank 1")
    dist.barrier(group)


def _all_raise(group: dist.ProcessGroup) -> None:
    raise ValueError(f"planted on rank {dist.get_rank(group)}")


def _rank_zero_sleeps(group: dist.ProcessGroup) -> None:
    time.sleep(30 if dist.get_rank(group) == 0 else 0)


def _rank_one_dies(group: dist.ProcessGroup) -> None:
    if dist.get_rank(group) == 1:
        os._exit(17)
    dist.barrier(group)


def _warns(group: dist.ProcessGroup) -> None:
    warnings.warn("planted warning", stacklevel=1)


def _uneven_collectives(group: dist.ProcessGroup) -> None:
    if dist.get_rank(group) == 0:
        dist.all_reduce(torch.ones(3), group=group, async_op=True)
    raise ValueError("planted, with a collective left in flight on one rank")


def test_results_come_in_rank_order_from_any_group(spawn) -> None:
    assert spawn(_sum_of_ranks, 3, scale=2.0) == [6.0] * 3
    assert spawn(_sum_of_ranks, 1, scale=2.0) == [0.0]
    assert spawn(_sum_of_ranks, 2, first_rank=2, scale=1.0) == [5.0] * 2


def test_errors_are_shown_and_the_pool_serves_again(small_pool: Pool) -> None:
    with pytest.raises(WorkerError, match=r"(?s)raised first:.*_all_raise.*planted on rank"):
        small_pool.spawn(_all_raise, 2)
    assert small_pool.spawn_raises(_all_raise, 2, match="planted on") == [
        "ValueError: planted on rank 0",
        "ValueError: planted on rank 1",
    ]
    with pytest.raises(WorkerError, match="does not match"):
        small_pool.spawn_raises(_all_raise, 2, match="planted on rank 0")
    with pytest.raises(WorkerError, match="rank 0 of 2 did not raise"):
        small_pool.spawn_raises(_sum_of_ranks, 2, match="anything", scale=1.0)
    with pytest.raises(WorkerError, match="planted warning"):
        small_pool.spawn(_warns, 2)
    assert small_pool.spawn(_sum_of_ranks, 2, scale=1.0) == [1.0, 1.0]
    assert small_pool.num_starts == 1, "nothing above leaves a collective half done, so nothing above costs a new pool"


def _makes_groups(group: dist.ProcessGroup, count: int) -> int:
    for _ in range(count):
        dist.new_group([0, 1])
    return os.getpid()


def _makes_groups_and_raises(group: dist.ProcessGroup) -> None:
    _makes_groups(group, count=20)
    raise ValueError("planted in a crowd")


def test_an_error_in_a_crowd_is_raised(small_pool: Pool) -> None:
    with pytest.raises(WorkerError, match="planted in a crowd"):
        small_pool.spawn(_makes_groups_and_raises, 2)


def test_workers_that_many_groups_crowd_are_exchanged(small_pool: Pool) -> None:
    few = [small_pool.spawn(_makes_groups, 2, count=1) for _ in range(2)]
    assert few[0] == few[1], "the same processes"
    many = small_pool.spawn(_makes_groups, 2, count=20)
    after = small_pool.spawn(_makes_groups, 2, count=0)
    assert many == few[0] and not set(many) & set(after)


@pytest.mark.parametrize(
    ("fn", "timeout", "match"),
    [
        (
            _rank_one_raises,
            60.0,
            r"(?s)rank\(s\) \[0\]: still running 1 s after rank 1 raised.*planted on rank 1.*"
            r"rank 0 stands at.*_rank_one_raises",
        ),
        (_rank_zero_sleeps, 1.0, r"(?s)rank\(s\) \[0\]: still running after 1 s.*_rank_zero_sleeps"),
        (_rank_one_dies, 60.0, r"rank\(s\) \[1\]: died with exit code 17"),
        (_uneven_collectives, 60.0, "collective left in flight"),
    ],
)
def test_a_run_that_cannot_end_costs_the_pool_and_nothing_else(
    small_pool: Pool, fn, timeout: float, match: str
) -> None:
    small_pool.spawn(_sum_of_ranks, 2, scale=1.0)
    before = small_pool.num_starts
    with pytest.raises(WorkerError, match=match):
        small_pool.spawn(fn, 2, timeout=timeout)
    assert small_pool.spawn(_sum_of_ranks, 2, scale=1.0) == [1.0, 1.0]
    assert small_pool.num_starts == before + 1
