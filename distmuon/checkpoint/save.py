"""`save_checkpoint`: the order of a save, and what all ranks agree on between its stages.

What is in the files is `sharded` and `run_state`, what makes them a checkpoint is `snapshot`.

[Note: writing behind] An asynchronous save copies this rank's shard to the CPU and returns. A thread of each rank
writes it; no thread calls a collective, because training's own run meanwhile. Instead each leaves its table, last, in
the folder, and rank 0's thread commits once it sees them all. So the checkpoint becomes complete without any rank
waiting, and an error is kept until the next save or `wait`, which are collective and raise it on all ranks.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from uuid import uuid4
from weakref import WeakKeyDictionary

import torch
from torch import nn

from distmuon.checkpoint import folder as snapshot
from distmuon.checkpoint import tensors as sharded
from distmuon.checkpoint.extras import (
    UntrainedTensors,
    check_given,
    check_path,
    compare,
    facts_of,
    packed,
    rng_states,
    states_of,
    untrained_tensors,
    versions,
)
from distmuon.checkpoint.manifest import (
    FORMAT,
    FileSum,
    Manifest,
    merge_sums,
    naming,
    own_file,
    sum_of,
    table_file,
    write_file,
)
from distmuon.comm.agreement import raise_together
from distmuon.errors import names, problem
from distmuon.optimizer import DistMuon
from distmuon.options import one_of
from distmuon.step.initial_values import log_left

_LOG = logging.getLogger("distmuon")
PEER_S = 1800.0  # how long rank 0's thread waits for the other ranks' files


class Saving:
    """A save, perhaps still being written. `wait` (collective, idempotent) returns its path once it is complete."""

    def __init__(self, optimizer: DistMuon, path: Path, save_id: str) -> None:
        self.path = path
        self._group, self._save_id = optimizer.group, save_id
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def start_behind(self, write: Callable[[], None]) -> None:
        """`write` in a thread; see [Note: writing behind]."""

        def run() -> None:
            try:
                write()
            except Exception as error:
                self._error = error

        self._thread = threading.Thread(target=run, name=f"saving {self.path.name}")
        self._thread.start()

    def wait(self) -> Path:
        """Raises what any rank's writing raised, on all ranks."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self.all_do(self._raise)
        return self.path

    def all_do(self, action: Callable[[], None]) -> None:
        """`action` on all ranks; an error on any is raised on all, and what was written aside is removed."""
        try:
            raise_together(self._group, action)
        except ValueError:
            if self._group.dp_rank == 0:
                snapshot.abandon(self.path, self._save_id)
            raise

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


_saves: WeakKeyDictionary[DistMuon, Saving] = WeakKeyDictionary()


def _check_arguments(path: object, keep_last: object, asynchronous: object) -> None:
    if keep_last is not None and (type(keep_last) is not int or keep_last < 1):
        raise problem(
            "keep_last", found=f"found {keep_last!r}", needed="1 or more is needed", cure="None: delete nothing"
        )
    one_of("asynchronous", asynchronous, (False, True))
    check_path(path, new=True)


def _beside_trained(
    model: nn.Module, trained: Sequence[nn.Parameter], rank: int
) -> tuple[UntrainedTensors, dict[str, Any], dict[str, object]]:
    """What a model holds beside trained parameters, its extra states, and what ranks compare of both.

    Rank 0 names in the log what cannot be saved.
    """
    others = untrained_tensors(model, trained)
    if rank == 0:
        if others.unknown:
            found = names(others.unknown)
            _LOG.warning("not saved: %s; no parameter, buffer or get_extra_state stands behind it", found)
        log_left(others.left, "saved")
    states = states_of(others)
    return others, states, facts_of(others, states)


def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: DistMuon,
    *,
    scheduler: Any = None,
    extra: Any = None,
    keep_last: int | None = None,
    asynchronous: bool = False,
) -> Saving:
    """Write a checkpoint folder at `path`, on a file system that all ranks share. Collective.

    Saved: parameters, masters, momentum and moments, step counters, param groups, `scheduler`'s state_dict; module
    buffers, frozen parameters and what modules return from `get_extra_state`, once where all ranks hold the same bits
    and each rank's own where they do not; each rank's RNG states (CPU, CUDA, Python, NumPy if loaded), and each rank's
    `extra`: numbers, strings, tensors and plain containers of them (the position in the data, the run's config).

    Args:
        path: new; its name's last digits are the step ("runs/a/step-1200"), by which the newest is found.
        keep_last: afterwards delete all but this many complete checkpoints beside it; never the one just saved.
        asynchronous: return once this rank's shard is copied to the CPU; a thread writes it. Call `wait` on the result
            before the program ends; the next save does it, too.

    No rank gathers anything. Besides what it holds it needs memory for one segment, or, asynchronously, for a copy of
    its shard on the CPU. Raises `ValueError` on all ranks, naming the file, where writing fails on any; what was saved
    before is intact then. An error of an asynchronous save is raised by the next save or by `wait`.
    """
    check_given(model, optimizer)
    optimizer.group.begin("save_checkpoint")
    raise_together(optimizer.group, lambda: _check_arguments(path, keep_last, asynchronous))
    final, group = Path(path), optimizer.group
    storage = optimizer.quiesced().storage
    finish_saves(optimizer)
    rank, save_id = group.dp_rank, group.gather_objects(uuid4().hex[:8], stage="checkpoint")[0]

    others, states, facts = raise_together(group, lambda: _beside_trained(model, storage.params, rank))
    shared, alike = compare(group.gather_objects(facts, stage="checkpoint"))

    def pack() -> dict[str, bytes]:
        of_all = {fqn: state for fqn, state in states.items() if fqn in shared}
        own = {fqn: s for fqn, s in states.items() if fqn not in alike and (rank > 0 or fqn not in shared)}
        small = {own_file(rank): packed(extra=extra, rng=rng_states(storage.device), modules=own)}
        if rank == 0:
            groups = torch.optim.Optimizer.state_dict(optimizer)["param_groups"]
            state = None if scheduler is None else scheduler.state_dict()
            small["shared.pt"] = packed(param_groups=groups, scheduler=state, modules=of_all)
        return small

    saving = Saving(optimizer, final, save_id)
    small = raise_together(group, pack)
    saving.all_do(lambda: snapshot.begin(final, save_id) if rank == 0 else None)
    saving.all_do(lambda: snapshot.check_shared(final, save_id))
    aside = snapshot.aside_of(final, save_id)
    parts: Iterable[sharded.Part]
    parts = sharded.parts_of(storage, others.plain, others.rows, group.dp_size, shared, alike)
    trained = {s.fqn: {"shape": s.shape, "dtype": str(s.dtype), "rule": s.rule} for s in storage.layout.specs}
    manifest = Manifest(FORMAT, group.dp_size, versions(), repr(optimizer.options), trained, {})
    if not asynchronous:
        saving.all_do(lambda: _write_part(aside, rank, parts, small))
        saving.all_do(lambda: _commit(final, save_id, manifest, keep_last) if rank == 0 else None)
        return saving

    copies = sharded.copied(parts)

    def write_behind() -> None:
        try:
            _write_part(aside, rank, copies, small)
        except Exception as error:
            with suppress(OSError):
                (aside / f"{rank}.failed").write_text(str(error))
            raise
        finally:
            copies.clear()
        if rank == 0:
            _await_tables(aside, group.dp_size)
            _commit(final, save_id, manifest, keep_last)

    saving.start_behind(write_behind)
    _saves[optimizer] = saving
    return saving


def finish_saves(optimizer: DistMuon) -> None:
    """Wait for what is being written behind, and raise its error. Collective."""
    if (saving := _saves.pop(optimizer, None)) is not None:
        optimizer.quiesced()  # a rank that has begun to reduce may wait for the others in its backward
        saving.wait()


def _write_part(aside: Path, rank: int, parts: Iterable[sharded.Part], small: Mapping[str, bytes]) -> None:
    """This rank's files; its table, which sums the others, appears last and at once."""
    sums = {name: write_file(aside / name, data) for name, data in small.items()}
    snapshot.fault_point("before data")
    data = f"__{rank}_0.distcp"
    sums[data], table = sharded.write_parts(aside / data, parts)
    snapshot.fault_point("after data")
    text = json.dumps({**table, "files": {name: asdict(entry) for name, entry in sums.items()}})
    write_file(aside / f"{table_file(rank)}.new", text.encode())
    with naming(aside / table_file(rank)):
        os.rename(aside / f"{table_file(rank)}.new", aside / table_file(rank))


def _commit(final: Path, save_id: str, manifest: Manifest, keep_last: int | None) -> None:
    """Rank 0, once all tables are there."""
    aside = snapshot.aside_of(final, save_id)
    written = [table_file(rank) for rank in range(manifest.dp_size)]
    tables, files = [], dict[str, FileSum]()
    for name in written:
        with naming(aside / name, "read"):
            tables.append(json.loads((aside / name).read_bytes()))
            files[name] = sum_of(aside / name)
    files |= merge_sums(tables)
    files[".metadata"] = sharded.write_metadata(aside, tables)
    snapshot.commit(final, save_id, replace(manifest, files=files), keep_last)


def _await_tables(aside: Path, dp_size: int) -> None:
    """Rank 0's thread: until all ranks have written, or one has failed."""
    deadline, leaving = time.monotonic() + PEER_S, False
    while missing := [rank for rank in range(dp_size) if not (aside / table_file(rank)).exists()]:
        failed = [rank for rank in missing if (aside / f"{rank}.failed").exists()]
        if not aside.is_dir():
            raise problem(
                str(aside),
                found="it has gone while it was written",
                needed="a folder that nobody else removes is needed",
                cure="see which other run, or person, tidies up there",
            )
        if failed:
            raise ValueError((aside / f"{failed[0]}.failed").read_text() or f"rank {failed[0]}: its save failed")
        if not leaving and not threading.main_thread().is_alive():
            leaving, deadline = True, min(deadline, time.monotonic() + 60)
        if time.monotonic() > deadline:
            raise problem(
                str(aside),
                found=f"ranks {missing} have not written their part",
                needed=f"{PEER_S:g} s are the limit",
                cure="see whether these ranks are alive and their file system answers",
            )
        time.sleep(0.02)
