"""The processes of a run: who we are, on which device, and the few collectives a recipe needs for its own numbers.

`torchrun` is recognised by its environment; without it there is one process and no process group at all. Gradients,
optimizer state and parameters are the library's business and never pass through here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among all of them."""

    rank: int = 0
    world_size: int = 1
    device: torch.device

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over all ranks, in place; every rank gets it."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """One picklable value of every rank, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


@contextmanager
def launched_ranks() -> Iterator[Ranks]:
    """Join the process group `torchrun` describes: NCCL with one GPU a process where there are GPUs, else gloo."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local_rank, num_gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local_rank >= num_gpus:
            raise ValueError(
                f"local rank {local_rank}: found {num_gpus} GPUs; each process needs its own; lower --nproc_per_node, "
                "or run on the CPU with CUDA_VISIBLE_DEVICES="
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        yield Ranks(device=device)
        return
    if device.type == "cuda":
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    yield Ranks(rank=dist.get_rank(), world_size=dist.get_world_size(), device=device)
    # Only after success: with one rank dead, leaving in order would wait for it.
    dist.destroy_process_group()
