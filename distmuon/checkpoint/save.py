"""`save_checkpoint`: the order of a save, and the agreement of all ranks between its stages.

This module decides only the order. `tensors` and `extras` decide the contents of the files; `folder` decides what
makes them a checkpoint.

[Note: writing behind] An asynchronous save copies this rank's shard to the CPU and returns. A thread of each rank
writes it; no thread calls a collective, because training's collectives run meanwhile. Instead each thread writes its
table last, and rank 0's thread commits once it sees all tables. So the checkpoint becomes complete without any rank
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

from distmuon.checkpoint import folder, tensors
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
    rank_file,
    sum_of,
    table_file,
    write_file,
)
from distmuon.comm.agreement import raise_together
from distmuon.errors import names, problem
from distmuon.optimizer import DistMuon
from distmuon.options import one_of
from distmuon.step.dtensors import box_of
from distmuon.step.initial_values import log_skipped

_LOG = logging.getLogger("distmuon")
PEER_S = 1800.0  # how long rank 0's thread waits for the other ranks' files


class Saving:
    """A save, which a thread may still be writing. `wait` (collective, idempotent) returns its path once complete."""

    def __init__(self, optimizer: DistMuon, path: Path, save_id: str) -> None:
        self.path = path
        self._group, self._save_id = optimizer.group, save_id
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def start_behind(self, write: Callable[[], None]) -> None:
        """Start `write` in a thread; see [Note: writing behind]."""

        def run() -> None:
            try:
                write()
            except Exception as error:
                self._error = error

        self._thread = threading.Thread(target=run, name=f"saving {self.path.name}")
        self._thread.start()

    def wait(self) -> Path:
        """Wait until the save is complete and return its path; raise any rank's error on all ranks. Collective."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self.all_do(self._raise)
        return self.path

    def all_do(self, action: Callable[[], None]) -> None:
        """Run `action` on all ranks; raise any rank's error on all ranks, and remove the staging folder."""
        try:
            raise_together(self._group, action)
        except ValueError:
            if self._group.dp_rank == 0:
                folder.abandon(self.path, self._save_id)
            raise

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


_saves: WeakKeyDictionary[DistMuon, Saving] = WeakKeyDictionary()


def _check_arguments(path: object, keep_last: object, asynchronous: object) -> None:
    if keep_last is not None and (type(keep_last) is not int or keep_last < 1):
        raise problem(
            "keep_last",
            found=f"found {keep_last!r}",
            needed="1 or more is needed",
            cure="pass None to delete nothing",
        )
    one_of("asynchronous", asynchronous, (False, True))
    check_path(path, new=True)


def _beside_trained(
    model: nn.Module, trained: Sequence[nn.Parameter], rank: int
) -> tuple[UntrainedTensors, dict[str, Any], dict[str, object]]:
    """Collect a model's untrained tensors, its extra states, and the facts of both that ranks compare.

    Rank 0 logs the names of tensors that cannot be saved.
    """
    untrained = untrained_tensors(model, trained)
    if rank == 0:
        if untrained.unknown:
            found = names(untrained.unknown)
            _LOG.warning("not saved: %s; no parameter, buffer or get_extra_state of the model holds it", found)
        log_skipped(untrained.skipped, "saved")
    states = states_of(untrained)
    return untrained, states, facts_of(untrained, states)


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

    The checkpoint holds parameters, masters, momentum and moments, step counters, param groups and `scheduler`'s
    state_dict; module buffers, frozen parameters and modules' extra states (`get_extra_state`), stored once if all
    ranks hold the same bits and by rank otherwise; each rank's RNG states (CPU, CUDA, Python, NumPy if loaded); and
    each rank's `extra`: numbers, strings, tensors and plain containers of them (data position, the run's config).

    Args:
        path: a new folder; the last digits of its name are the step ("runs/a/step-1200"), by which the newest is found.
        keep_last: afterwards delete all but this many complete checkpoints beside it; never the one just saved.
        asynchronous: return once this rank's shard is copied to the CPU; a thread writes it. Call `wait` on the result
            before the program ends; the next save does so, too.

    No rank gathers anything. A rank needs extra memory for one segment or, for an asynchronous save, for a copy of its
    shard on the CPU. Raises `ValueError` on all ranks, naming the file, if writing fails on any rank; earlier
    checkpoints are intact then. An error of an asynchronous save is raised by the next save or by `wait`.
    """
    check_given(model, optimizer)
    optimizer.group.begin("save_checkpoint")
    raise_together(optimizer.group, lambda: _check_arguments(path, keep_last, asynchronous))
    final, group = Path(path), optimizer.group
    storage = optimizer.quiesced().storage
    finish_saves(optimizer)
    rank, save_id = group.dp_rank, group.gather_objects(uuid4().hex[:8], stage="checkpoint")[0]

    untrained, states, facts = raise_together(group, lambda: _beside_trained(model, storage.params, rank))
    shared, alike = compare(group.gather_objects(facts, stage="checkpoint"))

    def pack() -> dict[str, bytes]:
        shared_states = {fqn: state for fqn, state in states.items() if fqn in shared}
        rank_states = {fqn: s for fqn, s in states.items() if fqn not in alike and (rank > 0 or fqn not in shared)}
        small = {rank_file(rank): packed(extra=extra, rng=rng_states(storage.device), modules=rank_states)}
        if rank == 0:
            groups = torch.optim.Optimizer.state_dict(optimizer)["param_groups"]
            state = None if scheduler is None else scheduler.state_dict()
            small["shared.pt"] = packed(param_groups=groups, scheduler=state, modules=shared_states)
        return small

    saving = Saving(optimizer, final, save_id)
    small = raise_together(group, pack)
    saving.all_do(lambda: folder.begin(final, save_id) if rank == 0 else None)
    saving.all_do(lambda: folder.check_shared(final, save_id))
    staging = folder.staging_folder(final, save_id)
    parts: Iterable[tensors.Part]
    boxes = group.gather_objects({fqn: box_of(tensor) for fqn, tensor in untrained.cut.items()}, stage="checkpoint")
    is_first = {fqn: [found[fqn] for found in boxes].index(boxes[rank][fqn]) == rank for fqn in untrained.cut}
    cut = {fqn: tensor for fqn, tensor in untrained.cut.items() if is_first[fqn]}
    parts = tensors.parts_of(storage, untrained.plain, cut, group.dp_size, shared, alike)
    trained = {s.fqn: {"shape": s.shape, "dtype": str(s.dtype), "rule": s.rule} for s in storage.layout.specs}
    manifest = Manifest(FORMAT, group.dp_size, versions(), repr(optimizer.options), trained, {})
    if not asynchronous:
        saving.all_do(lambda: _write_part(staging, rank, parts, small))
        saving.all_do(lambda: _commit(final, save_id, manifest, keep_last) if rank == 0 else None)
        return saving

    copies = tensors.copied(parts)

    def write_behind() -> None:
        try:
            _write_part(staging, rank, copies, small)
        except Exception as error:
            with suppress(OSError):
                (staging / f"{rank}.failed").write_text(str(error))
            raise
        finally:
            copies.clear()
        if rank == 0:
            _await_tables(staging, group.dp_size)
            _commit(final, save_id, manifest, keep_last)

    saving.start_behind(write_behind)
    _saves[optimizer] = saving
    return saving


def finish_saves(optimizer: DistMuon) -> None:
    """Wait for an asynchronous save, if there is one, and raise its error. Collective."""
    if (saving := _saves.pop(optimizer, None)) is not None:
        optimizer.quiesced()  # ranks that have begun to reduce may wait in their backward for the other ranks
        saving.wait()


def _write_part(staging: Path, rank: int, parts: Iterable[tensors.Part], small: Mapping[str, bytes]) -> None:
    """Write this rank's files; its table, which holds the sums of the other files, appears last, by a rename."""
    sums = {name: write_file(staging / name, data) for name, data in small.items()}
    folder.fault_point("before data")
    data = f"__{rank}_0.distcp"
    sums[data], table = tensors.write_parts(staging / data, parts)
    folder.fault_point("after data")
    text = json.dumps({**table, "files": {name: asdict(entry) for name, entry in sums.items()}})
    write_file(staging / f"{table_file(rank)}.new", text.encode())
    with naming(staging / table_file(rank)):
        os.rename(staging / f"{table_file(rank)}.new", staging / table_file(rank))


def _commit(final: Path, save_id: str, manifest: Manifest, keep_last: int | None) -> None:
    """Write the metadata and complete the save, on rank 0, once all tables exist."""
    staging = folder.staging_folder(final, save_id)
    written = [table_file(rank) for rank in range(manifest.dp_size)]
    tables, files = [], dict[str, FileSum]()
    for name in written:
        with naming(staging / name, "read"):
            tables.append(json.loads((staging / name).read_bytes()))
            files[name] = sum_of(staging / name)
    files |= merge_sums(tables)
    files[".metadata"] = tensors.write_metadata(staging, tables)
    folder.commit(final, save_id, replace(manifest, files=files), keep_last)


def _await_tables(staging: Path, dp_size: int) -> None:
    """Wait, in rank 0's thread, until all ranks have written; raise if a rank has failed."""
    deadline, leaving = time.monotonic() + PEER_S, False
    while missing := [rank for rank in range(dp_size) if not (staging / table_file(rank)).exists()]:
        failed = [rank for rank in missing if (staging / f"{rank}.failed").exists()]
        if not staging.is_dir():
            raise problem(
                str(staging),
                found="it disappeared while it was being written",
                needed="a folder that no other program removes is needed",
                cure="find out which other run or person deletes files there",
            )
        if failed:
            raise ValueError((staging / f"{failed[0]}.failed").read_text() or f"rank {failed[0]}: its save failed")
        if not leaving and not threading.main_thread().is_alive():
            leaving, deadline = True, min(deadline, time.monotonic() + 60)
        if time.monotonic() > deadline:
            raise problem(
                str(staging),
                found=f"ranks {missing} have not written their part",
                needed=f"the limit is {PEER_S:g} s",
                cure="check that these ranks are alive and that their file system answers",
            )
        time.sleep(0.02)
