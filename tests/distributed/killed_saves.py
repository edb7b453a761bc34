"""Runs that are killed, each in processes of its own; prints a line of JSON a run.

    python -m tests.distributed.killed_saves FOLDER "in data:1" "before rename:0"     by rank at that stage of a save
    python -m tests.distributed.killed_saves FOLDER 0.25 0.5                          all ranks, at that part of the run

This process only forks: it never trains and never joins a group, so its children start clean without importing torch
anew. Every child is a rank of a run of three steps that saves each one and keeps the last.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import distmuon
from distmuon.checkpoint import folder as snapshot
from tests.standing import make_batch
from tests.training import backward, digest, make, state_tensors, weights

SIZE, STEPS = 2, 3


def run(folder: Path, rank: int, store: Path, stage: str = "", victim: int = 0, at_step: int = 2) -> None:
    """Steps 1 to STEPS from the newest checkpoint on, if there is one; its own death in the save of `at_step`."""
    options = {"init_method": f"file://{store}", "rank": rank, "world_size": SIZE}
    dist.init_process_group("gloo", **options)  # type: ignore[arg-type]
    model, optimizer = make(dist.group.WORLD)
    start, order = 0, "afresh"
    if distmuon.latest_checkpoint(folder) is not None:
        loaded = distmuon.load_checkpoint(folder, model, optimizer)
        start, order = loaded.extra["step"], loaded.path.name
    for step in range(start + 1, STEPS + 1):
        backward(model, optimizer, [make_batch(step, rank, int(1000 * torch.rand(())))])
        optimizer.step()
        optimizer.zero_grad()
        if stage and step == at_step and rank == victim:
            snapshot.fault_point = lambda now: _die_at(now, stage)
        distmuon.save_checkpoint(folder / f"step-{step}", model, optimizer, extra={"step": step}, keep_last=1)
    end = digest({**weights(model, optimizer), **state_tensors(optimizer)})
    if rank == 0:
        (folder / "end.json").write_text(json.dumps({"from": order, "end": end}))


_seen: list[str] = []


def _die_at(now: str, stage: str) -> None:
    """At the stage; in the data, once some of it is written."""
    _seen.append(now)
    if now == stage and (now != "in data" or _seen.count(now) == 5):
        os.kill(os.getpid(), signal.SIGKILL)


def fork_ranks(folder: Path, kill_after: float = 60.0, **options: object) -> list[int]:
    """Exit codes (negative: signal) of all ranks; killed after that many seconds, or 10 s after the first has ended."""
    store = folder.with_name(f"{folder.name}.{time.monotonic_ns()}")
    children: dict[int, int] = {}
    for rank in range(SIZE):
        if (child := os.fork()) == 0:
            try:
                run(folder, rank, store, **options)  # type: ignore[arg-type]
                os._exit(0)
            except BaseException as error:
                print(f"rank {rank}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
                os._exit(1)
        children[child] = rank
    codes = [0] * SIZE
    deadline = time.monotonic() + kill_after
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            codes[children.pop(child)] = os.waitstatus_to_exitcode(status)
            deadline = min(deadline, time.monotonic() + 10)
        elif time.monotonic() > deadline:
            for left in children:
                os.kill(left, signal.SIGKILL)
        else:
            time.sleep(0.01)
    return codes


def main(root: Path, deaths: list[str]) -> None:
    """The unbroken run, then for each death a killed run and its resumption."""
    torch.set_num_threads(1)
    unbroken_s = 0.0
    for death in ["", *deaths]:
        folder = root / f"run {death}"
        folder.mkdir()
        began = time.monotonic()
        stage, _, victim = death.partition(":")
        if victim or not death:
            codes = fork_ranks(folder, stage=stage, victim=int(victim or 0))
        else:
            codes = fork_ranks(folder, kill_after=unbroken_s * float(death))
        unbroken_s = unbroken_s or time.monotonic() - began
        left = sorted(path.name for path in folder.iterdir())
        codes += fork_ranks(folder) if death else []
        found = json.loads((folder / "end.json").read_text())
        kept = sorted(path.name for path in folder.iterdir() if path.is_dir())
        print(json.dumps({"death": death, "codes": codes, "left": left, "kept": kept, **found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
