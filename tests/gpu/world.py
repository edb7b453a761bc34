"""Ranks for the GPU tests: a pool of workers, a process group for each test, and a device for each rank.

With fewer GPUs than ranks, ranks share a GPU. NCCL refuses that before 2.30, and then only takes it with the variables
below, so two ranks try all six verbs first; where that fails, gloo moves CUDA tensors instead. Without CUDA the ranks
are on the CPU: the dry mode, which shows that the tests themselves are right.

    DISTMUON_GPU_SIZES=1,2,4    the numbers of ranks to test; fewer than 5 by default
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests import pool
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
    """In the block, a host synchronisation raises (on a GPU; gloo always waits)."""
    is_gloo = dist.is_initialized() and dist.get_backend() == "gloo"
    if not active or device.type != "cuda" or is_gloo:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the mode a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class _Places(dict[tuple[int, int], tuple[int, int]]):
    """In place of the pool's groups: (rank, number of ranks), from which each run makes a group of its own."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def __missing__(self, key: tuple[int, int]) -> tuple[int, int]:
        return self._rank, key[1]


def _worker(rank: int, size: int, folder: str, connection: Connection) -> None:
    """Run what the parent sends until it hangs up."""
    with open(Path(folder, f"stack-{rank}"), "w") as stacks, suppress(EOFError, KeyboardInterrupt):
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=False)
        pool._reset(rank)
        connection.send_bytes(pickle.dumps(pool.Outcome(rank, "ready")))
        while (message := connection.recv_bytes()) != b"":
            connection.send_bytes(pool._run(rank, _Places(rank), message))
            pool._reset(rank)
    os._exit(0)


def _on_own_group(
    place: tuple[int, int], body: Callable[..., Any], backend: str, dry: bool, store: str, kwargs: dict[str, Any]
) -> Any:
    """Run `body(group, device, **kwargs)` on a group that is made for it alone."""
    rank, size = place
    device = device_of(rank, dry)
    if not dry:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    limit = timedelta(seconds=LIMIT_S)
    dist.init_process_group(
        backend,
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=limit,
        device_id=device if backend == "nccl" else None,
    )
    try:
        result = body(dist.group.WORLD, device, **kwargs)
        if not dry:
            torch.cuda.synchronize()
        return result
    finally:
        dist.destroy_process_group()


def _verbs(group: dist.ProcessGroup, device: torch.device) -> None:
    """All verbs of ours, on two groups, with values that are checked."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    backend = dist.get_backend(group)
    second = dist.new_group()
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
                dist.reduce_scatter_single(part, whole, group=one)
                values.append(part)
                wanted.append(torch.full((2,), size * (size - 1) / 2))
            for value, right in zip(values, wanted, strict=True):
                assert torch.equal(value.cpu(), right), (value, right)
    finally:
        dist.destroy_process_group(second)


class Ranks:
    """Runs functions on ranks. `backend` and `why`: what the probe found, in words."""

    def __init__(self, most: int, *, dry: bool) -> None:
        self.dry = dry
        self.backend, self.why = "gloo", "no CUDA: the dry mode"
        self._pool = Pool(most, worker=_worker)
        self._runs = tempfile.TemporaryDirectory()
        self._count = 0
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
        self._count += 1
        given = {"body": fn, "backend": self.backend, "dry": self.dry, "kwargs": kwargs}
        store = str(Path(self._runs.name, f"rendezvous-{self._count}"))
        return self._pool.spawn(_on_own_group, size, timeout=timeout, store=store, **given)

    def verbs(self, size: int) -> None:
        self.run(_verbs, size)

    def close(self) -> None:
        self._pool.close()
        self._runs.cleanup()
