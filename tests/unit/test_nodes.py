"""Which ranks share a node: the user's number, the launcher's environment, and groups that lie across nodes."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from distmuon.comm.group import DataParallelGroup
from distmuon.comm.nodes import agreed_per_node, consecutive, launched_per_node, node_size


@pytest.mark.parametrize(
    ("ranks", "per_node", "found"),
    [
        (range(8), 4, 4),
        (range(8), 8, 8),
        (range(8), 1, 1),
        (range(8), 16, 8),
        (range(6), 4, 4),  # nodes of four and of two
        (range(2, 8), 4, 0),  # of two and of four
        (range(0, 16, 2), 8, 4),  # tensor parallelism over neighbours
        (range(0, 16, 8), 8, 1),  # over whole nodes
        ([0, 4, 1, 5], 4, 0),  # a group that jumps to and fro
        ([2, 3, 4, 5, 6, 7, 8, 9], 4, 0),  # begins in the middle of a node
    ],
)
def test_neighbours_that_share_a_node(ranks: Any, per_node: int, found: int) -> None:
    assert consecutive([*ranks], per_node) == found


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({"LOCAL_WORLD_SIZE": "8", "SLURM_NTASKS_PER_NODE": "1"}, 8),  # torchrun inside srun
        ({"SLURM_NTASKS_PER_NODE": "4"}, 4),
        ({}, 0),
        ({"LOCAL_WORLD_SIZE": "many"}, 0),
        ({"LOCAL_WORLD_SIZE": "-8"}, 0),
    ],
)
def test_what_a_launcher_says(environment: dict[str, str], found: int) -> None:
    assert launched_per_node(environment) == found


def test_a_single_rank_asks_nobody() -> None:
    group = DataParallelGroup(None, lambda *counted: None)
    assert agreed_per_node(group, {"LOCAL_WORLD_SIZE": "8", "LOCAL_RANK": "0"}) == 0
    assert node_size(group, 8, 0) == node_size(group, "all", 0) == node_size(group, None, 0) == 1


def _agreed(process_group: dist.ProcessGroup, environments: list[list[dict[str, str]]]) -> list[tuple[int, int]]:
    group = DataParallelGroup(process_group, lambda *counted: None)
    found = []
    for by_rank in environments:
        per_node = agreed_per_node(group, by_rank[group.dp_rank])
        found.append((per_node, node_size(group, None, per_node)))
    return found


def test_all_ranks_must_say_the_same_and_lie_in_blocks(spawn) -> None:
    def launched(sizes: list[int], numbers: list[int]) -> list[dict[str, str]]:
        return [{"LOCAL_WORLD_SIZE": str(size), "LOCAL_RANK": str(number)} for size, number in zip(sizes, numbers)]

    blocks = launched([2] * 4, [0, 1, 0, 1])
    turns = launched([2] * 4, [0, 0, 1, 1])  # rank 1 is the first of the second node
    unequal = launched([3, 3, 3, 1], [0, 1, 2, 0])
    silent = [*blocks[:3], {}]
    found = spawn(_agreed, 4, environments=[blocks, turns, unequal, silent])
    assert found == [[(2, 2), (0, 0), (0, 0), (0, 0)]] * 4
