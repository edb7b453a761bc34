"""A pool of reused worker processes: one gloo world, started once, for all distributed tests.

`Pool.spawn(fn, dp_size)` runs the module-level function `fn(group, **kwargs)` on every rank of a process group of that
size and returns what each rank returned. Workers live for the whole session; a run that may have left a collective half
done (a limit was hit, a worker died, one rank raised and others wait for it) ends the pool, and the next call makes a
new one. Workers are forked (`tests/forks.py`), for an interpreter that imports torch costs seconds.
Warnings are errors inside the workers too, because pytest's own filter does not reach them.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import pickle
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests import forks

START_S = 180.0  # two imports of torch on a busy machine
CROWDED = 48  # threads of a worker; it starts with 16
_imported = 0  # modules, when the collector was last told to pass by all that lives


class WorkerError(AssertionError):
    """A rank raised, died or ran past its limit."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one rank reported: its value, or its error's message and traceback."""

    rank: int
    value: Any = None
    error: str | None = None
    trace: str = ""


def _reset(rank: int) -> None:
    """Every run starts from the same state, whatever the one before it left.

    Imports leave 300,000 objects, which would cost each collection 0.1 s: the collector passes them by. (To ask how
    many are frozen walks through them, too.) A run on some ranks may have made optimizers of the default group there
    alone, which a later run on all ranks would be told.
    """
    global _imported
    gc.collect()
    if len(sys.modules) > _imported:
        gc.freeze()
        _imported = len(sys.modules)
    torch.set_num_threads(1)
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(rank)
    random.seed(rank)
    if "distmuon.comm.group" in sys.modules:
        for counts in sys.modules["distmuon.comm.group"]._optimizer_counts.values():
            counts.made = counts.built = 0
            counts.surplus = []


def _entry(handle: int, worker: Callable[..., None], *args: Any) -> None:
    worker(*args, Connection(handle))


def _worker(rank: int, size: int, folder: str, connection: Connection) -> None:
    """Join the world, make the groups, then run what the parent sends until it hangs up."""
    with open(Path(folder, f"stack-{rank}"), "w") as stacks, contextlib.suppress(EOFError, KeyboardInterrupt):
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=False)
        _reset(rank)
        store = f"file://{folder}/rendezvous"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=300))
        groups = {(0, k): dist.new_group(ranks=list(range(k))) for k in range(1, size + 1)}
        if size > 2:  # a group that does not begin at global rank 0
            groups[size - 2, 2] = dist.new_group(ranks=[size - 2, size - 1])
        connection.send_bytes(pickle.dumps(Outcome(rank, "ready")))
        while (message := connection.recv_bytes()) != b"":
            connection.send_bytes(_run(rank, groups, message))
            _reset(rank)
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # the interpreter's own farewell takes seconds where others work, and has nothing left to do


def _run(rank: int, groups: dict[tuple[int, int], dist.ProcessGroup], message: bytes) -> bytes:
    try:
        fn, key, kwargs = pickle.loads(message)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return pickle.dumps(Outcome(rank, fn(groups[key], **kwargs)))
    except BaseException as error:
        return pickle.dumps(Outcome(rank, error=f"{type(error).__name__}: {error}", trace=traceback.format_exc()))


def _ping(group: dist.ProcessGroup) -> int:
    """Proves that the ranks of a group still agree on which collective comes next."""
    token = torch.ones(1)
    dist.all_reduce(token, group=group)
    return int(token.item())


class Pool:
    """`size` workers, started at the first `spawn`, ended by `close` or by a run that cannot be trusted to be over."""

    def __init__(
        self, size: int = 4, *, grace_s: float = 5.0, worker: Callable[..., None] = _worker, forked: bool = True
    ) -> None:
        """`forked`: False where the workers need an interpreter of their own each, as CUDA may."""
        self.size = size
        self.forked = forked
        self._worker = worker
        self.grace_s = grace_s  # how long the other ranks may run on after the first one raised
        self.num_starts = 0
        self._workers: list[tuple[Any, Connection]] = []
        self._folder = ""

    def spawn(
        self, fn: Callable[..., Any], dp_size: int, *, timeout: float = 60.0, first_rank: int = 0, **kwargs: Any
    ) -> list[Any]:
        """Per-rank results of `fn(group, **kwargs)`; raises WorkerError with the first failing rank's traceback."""
        outcomes = self._outcomes(fn, dp_size, timeout, first_rank, kwargs)
        failed = [outcome for outcome in outcomes if outcome.error is not None]
        is_crowded = self._is_crowded()
        if is_crowded:
            self.close()
        if failed:
            if not is_crowded:
                self._check_group(dp_size, first_rank)
            others = "".join(f"\nrank {o.rank} also raised {o.error}" for o in failed[1:])
            raise WorkerError(f"rank {failed[0].rank} of {dp_size} raised first:\n{failed[0].trace}{others}")
        return [outcome.value for outcome in sorted(outcomes, key=lambda outcome: outcome.rank)]

    def spawn_raises(
        self,
        fn: Callable[..., Any],
        dp_size: int,
        *,
        match: str,
        timeout: float = 60.0,
        first_rank: int = 0,
        **kwargs: Any,
    ) -> list[str]:
        """Each rank's message ("ValueError: ..."); raises WorkerError unless EVERY rank raised one that matches."""
        outcomes = sorted(self._outcomes(fn, dp_size, timeout, first_rank, kwargs), key=lambda outcome: outcome.rank)
        self._check_group(dp_size, first_rank)
        for outcome in outcomes:
            if outcome.error is None:
                raise WorkerError(f"rank {outcome.rank} of {dp_size} did not raise (wanted {match!r})")
            if not re.search(match, outcome.error):
                raise WorkerError(f"rank {outcome.rank}: the message does not match {match!r}:\n{outcome.trace}")
        return [str(outcome.error) for outcome in outcomes]

    def close(self, *, patience_s: float = 10.0) -> None:
        """Ask the workers to leave; after `patience_s` kill those that did not (only processes of this pool)."""
        for _, connection in self._workers:
            with contextlib.suppress(OSError):
                connection.send_bytes(b"")
        deadline = time.monotonic() + patience_s
        for process, connection in self._workers:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join(10.0)
            connection.close()
        self._workers = []
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> None:
        self.num_starts += 1
        self._folder = tempfile.mkdtemp(prefix="pool-")
        os.environ["OMP_NUM_THREADS"] = "1"
        if "GLOO_SOCKET_IFNAME" not in os.environ:  # the loopback device, so that no host name need resolve
            names = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
            os.environ.update({"GLOO_SOCKET_IFNAME": names[0]} if names else {})
        for rank in range(self.size):
            ours, theirs = Pipe()
            process: Any
            if self.forked:
                given = (self._worker, rank, self.size, self._folder)
                process = forks.start(_entry, *given, rank=rank, handles=[theirs.fileno()])
            else:
                arguments = (rank, self.size, self._folder, theirs)
                process = get_context("spawn").Process(target=self._worker, args=arguments, daemon=True)
                process.start()
            theirs.close()
            self._workers.append((process, ours))
        self._collect(range(self.size), START_S)

    def _outcomes(
        self, fn: Callable[..., Any], dp_size: int, timeout: float, first_rank: int, kwargs: dict[str, Any]
    ) -> list[Outcome]:
        """One outcome a rank, in the order in which they came."""
        if not self._workers:
            self._start()
        message = pickle.dumps((fn, (first_rank, dp_size), kwargs))
        ranks = range(first_rank, first_rank + dp_size)
        for rank in ranks:
            self._workers[rank][1].send_bytes(message)
        return self._collect(ranks, timeout)

    def _collect(self, ranks: range, timeout: float) -> list[Outcome]:
        waiting = {self._workers[rank][1]: rank for rank in ranks}
        outcomes: list[Outcome] = []
        deadline, reason = time.monotonic() + timeout, f"still running after {timeout:g} s"
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                self._give_up(reason, sorted(waiting.values()), outcomes)
            for connection in ready:
                rank = waiting.pop(connection)  # type: ignore[call-overload]
                try:
                    outcomes.append(pickle.loads(connection.recv_bytes()))  # type: ignore[union-attr]
                except EOFError:
                    self._workers[rank][0].join(5)
                    code = self._workers[rank][0].exitcode
                    self._give_up(f"died with exit code {code}", [rank], outcomes)
                grace_ends = time.monotonic() + self.grace_s
                if outcomes[-1].error is not None and grace_ends < deadline:
                    deadline, reason = grace_ends, f"still running {self.grace_s:g} s after rank {rank} raised"
        return outcomes

    def _give_up(self, reason: str, ranks: list[int], outcomes: list[Outcome]) -> None:
        """End the pool and raise; the stacks of ranks that are stuck are asked for first."""
        for rank in ranks:
            if self._workers[rank][0].is_alive():
                os.kill(self._workers[rank][0].pid, signal.SIGUSR1)
        time.sleep(0.3)
        stacks = [Path(self._folder, f"stack-{rank}") for rank in ranks]
        shown = "".join(
            f"\nrank {rank} stands at\n{path.read_text()}" for rank, path in zip(ranks, stacks, strict=True)
        )
        raised = "".join(f"\nrank {o.rank} raised before that:\n{o.trace}" for o in outcomes if o.error is not None)
        for process, _ in self._workers:
            process.kill()
        self.close()
        raise WorkerError(f"rank(s) {ranks}: {reason}{raised}{shown}")

    def _is_crowded(self) -> bool:
        """Whether runs have left many groups: each has three threads, and one of them wakes hundreds of times a second.
        New workers take less than a second, and torch's caches hold meshes whose groups cannot be ended one by one."""
        tasks = [Path(f"/proc/{process.pid}/task") for process, _ in self._workers]
        return any(folder.exists() and len(list(folder.iterdir())) > CROWDED for folder in tasks)

    def _check_group(self, dp_size: int, first_rank: int) -> None:
        """After an error: keep the pool only if the group's ranks still agree on the next collective."""
        with contextlib.suppress(WorkerError):
            pings = self._outcomes(_ping, dp_size, self.grace_s, first_rank, {})
            if any(ping.value != dp_size for ping in pings):
                self.close(patience_s=0.0)
