"""The processes of a run: who we are, on which device, and the few collectives a recipe needs for its own numbers.

`torchrun` is recognised by its environment; without it there is one process and no process group at all. Gradients,
optimizer state and parameters are the library's business and never pass through here.

[Note: a restart's store] Ranks find each other through a key-value store, and torchrun (2.13, all its rendezvous) keeps
one store for all attempts of a run: after a restart, a rank that is early reads where its peer of the attempt before
listened. gloo is then refused or waits for ever. The number of the restart cannot tell attempts apart, for each agent
counts its own. So the ranks first agree on a name that only living processes can know, and all else stands under it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import default_pg_timeout

import distmuon
from launch.config import ParallelConfig

SET_UP_TIMEOUT = timedelta(minutes=5)
"""How long ranks wait for each other at the start; torchrun starts again what gives up."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among all of them."""

    rank: int = 0
    world_size: int = 1
    tp: int = 1
    """Ranks in a row that share a batch (tensor parallelism)."""
    device: torch.device

    @property
    def data_rank(self) -> int:
        """This process among those that read different batches."""
        return self.rank // self.tp

    @property
    def data_size(self) -> int:
        return self.world_size // self.tp

    def put(self, tensor: Tensor) -> Tensor:
        """`tensor`, of the CPU, on this process's device. A GPU copies it from pinned memory; the host runs on."""
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

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
def launched_ranks(parallel: ParallelConfig | None = None) -> Iterator[Ranks]:
    """Join the process group `torchrun` describes: NCCL with one GPU a process where there are GPUs, else gloo.

    A process group that is there already is used, and left.
    """
    parallel = ParallelConfig() if parallel is None else parallel
    parallel.mesh_shape(int(os.environ.get("WORLD_SIZE", "1")))
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
    if dist.is_initialized():  # by Ray Train, which ends it, too
        with distmuon.shared_fate():
            yield Ranks(rank=dist.get_rank(), world_size=dist.get_world_size(), tp=parallel.tp, device=device)
        return
    if "RANK" not in os.environ:
        yield Ranks(device=device)
        return
    shared, rank, world_size = next(dist.rendezvous("env://", timeout=SET_UP_TIMEOUT))
    store = store_of_the_living(shared, rank, world_size)
    store.set_timeout(default_pg_timeout)
    if device.type == "cuda":
        dist.init_process_group("nccl", store=store, rank=rank, world_size=world_size, device_id=device)
    else:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    with distmuon.shared_fate():
        yield Ranks(rank=dist.get_rank(), world_size=dist.get_world_size(), tp=parallel.tp, device=device)
    # Only after success: with one rank dead, leaving in order would wait for it.
    dist.destroy_process_group()


def store_of_the_living(
    shared: dist.Store, rank: int, world_size: int, timeout: timedelta = SET_UP_TIMEOUT
) -> dist.Store:
    """`shared` under a name that no earlier attempt knew; see [Note: a restart's store]. Collective.

    Rank 0 makes the name up. Every other rank asks for it under an id of its own, and rank 0 answers all ids it sees:
    nobody listens to the answer for a dead one. Raises TimeoutError, naming the ranks, where some do not come.
    """
    own_id, seconds = uuid4().hex, timeout.total_seconds()
    if rank > 0:
        shared.set(f"asking/{rank}", own_id)
        try:
            shared.wait([f"name_for/{own_id}"], timeout)
        except dist.DistStoreError as error:
            raise _missing(f"rank {rank}", "rank 0", seconds) from error
        name = shared.get(f"name_for/{own_id}").decode()
        shared.set(f"{name}/heard/{rank}", "")
        return dist.PrefixStore(name, shared)
    deadline = time.monotonic() + seconds
    awaited = list(range(1, world_size))
    while awaited := [peer for peer in awaited if not shared.check([f"{own_id}/heard/{peer}"])]:
        for peer in awaited:
            if shared.check([f"asking/{peer}"]):
                shared.set(f"name_for/{shared.get(f'asking/{peer}').decode()}", own_id)
        if time.monotonic() > deadline:
            raise _missing("rank 0", f"ranks {awaited}", seconds)
        time.sleep(0.01)
    return dist.PrefixStore(own_id, shared)


def _missing(rank: str, missing: str, seconds: float) -> TimeoutError:
    return TimeoutError(
        f"{rank}: found no sign of {missing} for {seconds:g} s of set-up; all must start; see what that process says, "
        "or let torchrun start all again (--max-restarts)"
    )
