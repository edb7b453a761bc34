"""Measures all rows in one run: checks each against the oracle, then times them in interleaved rounds.

Every figure of a time is the slowest rank's, between two barriers. What each column means is said in `COLUMNS`, which
`report.py` prints. Every rank calls `measure`; rank 0's return value is complete.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import importlib
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from statistics import mean
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.peers import Peer, System
from benchmarks.setting import Setting, Trainee, copied, distance, make_batch, make_gradients, make_trainee
from benchmarks.setting import oracle_weights as oracle_of
from tests.distributed.loopback import loopback_bytes

COLUMNS = {
    "whole": "forward, backward, synchronisation and update, until all ranks hold the new parameters",
    "part": "whole less a plain forward and backward without any synchronisation in the same round (negative: noise)",
    "sync_step": "gradient synchronisation and optimizer step with the gradients already there: they enter by autograd "
    "from a backward that computes nothing, last layer first, through each system's own hooks",
    "blocked": "exposed communication: sync_step less the processor time of a rank's main thread in it, mean over "
    "ranks. It contains waiting for slower ranks and for a core; not measured on CUDA",
    "processor": "processor time of sync_step, all threads of a process, mean over ranks: the cost to a machine "
    "without idle cores, nearly independent of other processes there; not measured on CUDA",
    "wire": "bytes that the loopback device carried in one sync_step, headers and barriers included, a rank",
    "state": "bytes of optimizer state on the fullest rank, masters included, gradients and communication buffers not",
    "ns": "matrices orthogonalized in one step, by rank, and calls of the orthogonalizing function",
    "distance": "||W - W_ref|| / ||W_ref - W_0|| after the first steps on the same batches, W_ref from "
    "tests/reference.py in float32 throughout, and with Newton-Schulz in bfloat16",
}


LEFT_OUT = "left out by the command"
TIMES = ("sync_step", "blocked", "processor")


class Ranks:
    """Barriers and agreement over a gloo group of their own, so that no row's collectives are in their way."""

    def __init__(self) -> None:
        on = dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if on else (0, 1)
        self._group = dist.new_group(backend="gloo", timeout=timedelta(minutes=15)) if on else None

    def gather(self, value: Any, what: str = "") -> list[Any]:
        """`value` of every rank; a barrier as well. Ends the run if the ranks have come to different places."""
        values = [(what, value)] * self.size
        if self._group is not None:
            dist.all_gather_object(values, (what, value), group=self._group)
        if len({place for place, _ in values}) > 1:
            raise SystemExit(f"rank {self.rank}: one rank failed alone, so the others cannot go on: {values}")
        return [value for _, value in values]


def timed(ranks: Ranks, device: torch.device, work: Callable[[], object]) -> tuple[float, float, float]:
    """ms: of the slowest rank; mean in which a rank's main thread did not compute; mean that its processor worked."""
    ranks.gather(None)
    _synchronize(device)
    start, thread, process = time.perf_counter(), time.thread_time(), time.process_time()
    work()
    _synchronize(device)
    took = time.perf_counter() - start, time.thread_time() - thread, time.process_time() - process
    wall, main_thread, processor = zip(*ranks.gather(took))
    slowest, computed, worked = 1e3 * max(wall), 1e3 * mean(main_thread), 1e3 * mean(processor)
    return slowest, slowest - computed, worked


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def counting(targets: Sequence[str]) -> Iterator[dict[str, int]]:
    """Count calls and matrices of "module:function" while the block runs. Unknown targets count nothing."""
    found = {"calls": 0, "matrices": 0}
    patched: list[tuple[Any, str, Any]] = []
    for target in targets:
        name, attribute = target.split(":")
        module = sys.modules.get(name) or importlib.import_module(name)
        function = getattr(module, attribute)

        @functools.wraps(function)
        def counted(first: Any, *args: Any, function: Any = function, **kwargs: Any) -> Any:
            tensors = first if isinstance(first, (list, tuple)) else [first]
            found["calls"] += 1
            found["matrices"] += sum(t.shape[:-2].numel() for t in tensors)
            return function(first, *args, **kwargs)

        setattr(module, attribute, counted)
        patched.append((module, attribute, function))
    try:
        yield found
    finally:
        for module, attribute, function in patched:
            setattr(module, attribute, function)


class _Bench:
    """What the rows of one run share."""

    def __init__(self, setting: Setting, device: torch.device, check_steps: int, wire: bool) -> None:
        self.setting, self.device, self.check_steps, self.wire = setting, device, check_steps, wire
        self.ranks = Ranks()
        self.trainee: Trainee = make_trainee(setting, device)
        self.start = {fqn: param.detach().clone() for fqn, param in self.trainee.named_parameters()}
        self.gradients = make_gradients(self.trainee, self.ranks.rank)

    @functools.cache  # noqa: B019 (one instance a run)
    def oracle(self, rule: str) -> dict[str, dict[str, Tensor]]:
        """Only rank 0 computes."""
        dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
        found: dict[str, dict[str, Tensor]] = {}
        for name in ("float32",) if rule == "adamw" else dtypes:
            if self.ranks.rank == 0:
                found[name] = oracle_of(
                    self.trainee, self.setting, self.check_steps, all_adamw=rule == "adamw", ns_dtype=dtypes[name]
                )
        return found

    def train(self, system: System, step: int) -> None:
        """One whole step on this rank's batch."""
        system.step(system.model(make_batch(self.setting, step, self.ranks.rank, self.device)))

    def plain(self, step: int) -> None:
        """Forward and backward and nothing else."""
        self.trainee(make_batch(self.setting, step, self.ranks.rank, self.device)).backward()

    def given(self) -> dict[str, Tensor]:
        return {fqn: grad.clone() for fqn, grad in self.gradients.items()}

    def sync_step(self, system: System, given: dict[str, Tensor]) -> None:
        """One step on gradients that are there already."""
        system.step(system.model(torch.zeros((), device=self.device), given))

    def enter(self, peer: Peer) -> tuple[System, dict[str, Any]]:
        """Make the row, check it against the oracle, count what does not depend on time."""
        system = peer.make(copied(self.trainee), self.setting)
        for step in range(max(1, self.check_steps)):
            self.train(system, step)
        row: dict[str, Any] = {"name": peer.name, "rule": peer.rule, "equal": peer.equal, "note": peer.note}
        if self.check_steps:
            weights = system.weights()
            bits = b"".join(w.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for w in weights.values())
            row["replicas_equal"] = len(set(self.ranks.gather(hashlib.sha256(bits).digest()))) == 1
            oracles = self.oracle(peer.rule)
            row["distance"] = {name: distance(weights, wanted, self.start) for name, wanted in oracles.items()}
        self.sync_step(system, self.given())  # the first step on given gradients may allocate or compile
        self.ranks.gather(None)
        before = loopback_bytes() if self.wire else 0
        with counting(peer.counted) as counts:
            self.sync_step(system, self.given())
        self.ranks.gather(None)
        row["wire_bytes"] = (loopback_bytes() - before) // self.ranks.size if self.wire else None
        row["state_bytes"] = self.ranks.gather(system.state_bytes())
        every = self.ranks.gather(counts if peer.counted else None)
        row["ns_calls"], row["ns_matrices"] = ([c and c[key] for c in every] for key in ("calls", "matrices"))
        return system, row


def measure(
    peers: Sequence[Peer],
    setting: Setting,
    *,
    rounds: int,
    check_steps: int,
    device: torch.device,
    wire: bool,
    minutes: float = 60.0,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """{"rows", "plain", "not_run", "others"}: samples in ms by row and round; reasons; others' share of the machine."""
    bench = _Bench(setting, device, check_steps, wire)
    ranks, systems, rows, not_run = bench.ranks, [], [], []
    for peer in peers:
        start, error, made = time.perf_counter(), "", None
        try:
            made = bench.enter(peer)
        except Exception as problem:  # whatever it is, it is this row's reason
            error = f"{type(problem).__name__}: {' '.join(str(problem).split())}"[:300]
        errors = [e for e in ranks.gather(error, "made") if e]
        say(f"{peer.name}: {errors[0] if errors else f'ready in {time.perf_counter() - start:.1f} s'}")
        if errors or made is None:
            not_run.append({"name": peer.name, "reason": errors[0], "note": peer.note})
            continue
        systems.append(made[0])
        rows.append({**made[1], "whole": [], **{key: [] for key in TIMES}})

    plain: list[float] = []
    before = ranks.gather(_processor_seconds())
    began = time.perf_counter()
    for number in range(rounds):
        if ranks.gather(time.perf_counter() - began)[0] > 60 * minutes:
            break
        order = [-1, *range(len(rows))]
        random.Random(number).shuffle(order)
        gc.collect()
        gc.disable()
        for index in order:
            if index < 0:
                plain.append(timed(ranks, device, partial(bench.plain, number))[0])
                bench.trainee.zero_grad()
                continue
            system, row = systems[index], rows[index]
            row["whole"].append(timed(ranks, device, partial(bench.train, system, number))[0])
            times = timed(ranks, device, partial(bench.sync_step, system, bench.given()))
            for key, ms in zip(TIMES, times if device.type == "cpu" else (times[0], None, None)):
                row[key].append(ms)
        gc.enable()
        say(f"round {number + 1} of {rounds}: {time.perf_counter() - began:.0f} s")
    after = ranks.gather(_processor_seconds())
    all_of, ours = after[0][0] - before[0][0], sum(a[1] - b[1] for a, b in zip(after, before))
    others = (all_of - ours) / ((time.perf_counter() - began) * (os.cpu_count() or 1)) if all_of else None
    return {"rows": rows, "plain": plain, "not_run": not_run, "others": others}


def _processor_seconds() -> tuple[float, float]:
    """(all processes of the machine, this one); 0 for the first where the system does not say."""
    try:
        with open("/proc/stat") as file:
            user, nice, system, _, _, *interrupts = (int(number) for number in file.readline().split()[1:9])
    except OSError:
        return 0.0, 0.0
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK"), sum(os.times()[:2])
