"""The nodes of a group's ranks: how many consecutive ranks share one.

This module decides when nodes are known: by the user's number, or by the environment that the launcher gives to every
process. Ranks lie on nodes in blocks of the default group's numbering, which all ranks check. A group that does not
have equally many consecutive ranks on each node, or fewer on the last one, is treated as if nodes were not known.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Literal

import torch.distributed as dist

from distmuon.comm.group import DataParallelGroup

_SIZES = ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE")  # torchrun and most launchers; srun
_NUMBERS = ("LOCAL_RANK", "SLURM_LOCALID")


def launched_per_node(environment: Mapping[str, str] = os.environ) -> int:
    """The processes that the launcher has started on this node; 0 if it does not say."""
    return max(0, next((n for name in _SIZES if (n := _number(environment, name)) is not None), 0))


def agreed_per_node(group: DataParallelGroup, environment: Mapping[str, str] = os.environ) -> int:
    """The same, if all ranks say so and each one's number on its node fits; else 0. Collective."""
    if group.dp_size == 1:
        return 0
    size = launched_per_node(environment)
    number = next((n for name in _NUMBERS if (n := _number(environment, name)) is not None), None)
    fits = size > 0 and number == dist.get_rank() % size
    said = group.gather_objects(size if fits else 0, stage="comparison of the plans")
    return size if len(set(said)) == 1 else 0


def node_size(group: DataParallelGroup, gpus_per_node: int | Literal["all"] | None, launched: int) -> int:
    """How many consecutive ranks of `group` share a node; 0 if that is not known."""
    if group.dp_size == 1 or gpus_per_node == "all":
        return group.dp_size
    per_node = launched if gpus_per_node is None else gpus_per_node
    return consecutive(group.global_ranks(), per_node) if per_node else 0


def consecutive(ranks: Sequence[int], per_node: int) -> int:
    """How many neighbours among `ranks` share a node of `per_node` global ranks, or fewer on the last node; else 0."""
    runs = [(node, len([*run])) for node, run in groupby(rank // per_node for rank in ranks)]
    size = runs[0][1]
    is_regular = len({node for node, _ in runs}) == len(runs) and runs[-1][1] <= size
    return size if is_regular and all(length == size for _, length in runs[:-1]) else 0


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "")
    return int(text) if text.isdecimal() else None
