"""Ranks for the GPU tests: a pool of workers, a process group for each test, and a device for each rank.

With fewer GPUs than ranks, ranks share a GPU. NCCL refuses that before 2.30, and then only takes it with the variables
below, so two ranks try all six verbs first; where that fails, gloo moves CUDA tensors instead. Without CUDA the ranks
are on the CPU: the dry mode, which shows that the tests themselves are right.

    DISTMUON_GPU_SIZES=1,2,4    the numbers of ranks to test; fewer than 5 by default
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from tests.pool import Pool, WorkerError

SHARED = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_NVLS_ENABLE": "0", "NCCL_MAX_CTAS": "2"}
PROBE_S = 25.0
LIMIT_S = 60.0  # around each test; too few resources hang, they do not fail


def num_gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def sizes() -> list[int]:
    given = os.environ.get("DISTMUON_GPU_SIZES", "")
    if given:
        return [int(size) for size in given.split(",")]
    return sorted({1, 2, 4} | {size for size in (3, 8) if size <= num_gpus()})


def device_of(rank: int, dry: bool) -> torch.device:
    return torch.device("cpu") if dry else torch.device("cuda", rank % num_gpus())


@contextmanager
def no_host_wait(device: torch.device, active: bool = True) -> Iterator[None]:
    """In the block, a host synchronisation raises (on a GPU)."""
    if not active or device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _on_own_group(world: dist.ProcessGroup, body: Any, backend: str, dry: bool, kwargs: dict[str, Any]) -> Any:
    """Run `body(group, device, **kwargs)` on a group that is made for it alone."""
    device = device_of(dist.get_rank(world), dry)
    if not dry:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    ranks = dist.get_process_group_ranks(world)
    limit = timedelta(seconds=LIMIT_S)
    group = dist.new_group(ranks, timeout=limit, backend=backend, use_local_synchronization=True)
    try:
        result = body(group, device, **kwargs)
        if not dry:
            torch.cuda.synchronize()
        return result
    finally:
        dist.destroy_process_group(group)


def _verbs(group: dist.ProcessGroup, device: torch.device) -> None:
    """All verbs of ours, on two groups, with values that are checked."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    ranks = dist.get_process_group_ranks(group)
    backend = dist.get_backend(group)
    second = dist.new_group(ranks, backend=backend, use_local_synchronization=True)
    try:
        for one in (group, second):
            total = torch.full((4,), rank + 1.0, device=device)
            dist.all_reduce(total, group=one)
            first = torch.full((3,), float(rank), device=device)
            dist.broadcast(first, group=one, group_src=0)
            gathered = torch.empty(2 * size, device=device)
            dist.all_gather_single(gathered, torch.full((2,), float(rank), device=device), group=one)
            sends = [r for r in range(size)]  # r elements to rank r: none to the first
            sent = torch.full((sum(sends),), float(rank), device=device)
            received = torch.empty(size * rank, device=device)
            dist.all_to_all_single(received, sent, [rank] * size, sends, group=one)
            exchanged = torch.empty(size, device=device)
            dist.all_to_all_single(exchanged, torch.full((size,), float(rank), device=device), group=one)
            values = [total, first, gathered, received, exchanged]
            wanted = [
                torch.full((4,), size * (size + 1) / 2),
                torch.zeros(3),
                torch.arange(size).repeat_interleave(2).float(),
                torch.arange(size).repeat_interleave(rank).float(),
                torch.arange(size).float(),
            ]
            if backend == "nccl":
                part = torch.empty(2, device=device)
                whole = torch.full((2 * size,), float(rank), device=device)
                dist.reduce_scatter_single(part, whole, op=dist.ReduceOp.AVG, group=one)
                values.append(part)
                wanted.append(torch.full((2,), (size - 1) / 2))
            for value, right in zip(values, wanted, strict=True):
                assert torch.equal(value.cpu(), right), (value, right)
    finally:
        dist.destroy_process_group(second)


class Ranks:
    """Runs functions on ranks. `backend` and `why`: what the probe found, in words."""

    def __init__(self, most: int, *, dry: bool) -> None:
        self.dry = dry
        self.backend, self.why = "gloo", "no CUDA: the dry mode"
        self._pool = Pool(most)
        if not dry:
            if most > num_gpus():
                os.environ.update(SHARED)
            self.backend, self.why = "nccl", "NCCL, a GPU a rank" if most <= num_gpus() else "NCCL, ranks share a GPU"
            try:
                self.run(_verbs, min(2, most), timeout=PROBE_S)
            except WorkerError as error:
                self.backend, self.why = "gloo", f"gloo with CUDA tensors, for NCCL failed: {str(error)[:300]}"
                self._pool.close()

    def run(self, fn: Callable[..., Any], size: int, *, timeout: float = LIMIT_S, **kwargs: Any) -> list[Any]:
        """What `fn(group, device, **kwargs)` returned on each of `size` ranks."""
        return self._pool.spawn(
            _on_own_group, size, timeout=timeout, body=fn, backend=self.backend, dry=self.dry, kwargs=kwargs
        )

    def verbs(self, size: int) -> None:
        self.run(_verbs, size)

    def close(self) -> None:
        self._pool.close()
