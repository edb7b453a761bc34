"""`load_checkpoint`: the order of a load, what is checked before anything is changed, and what all ranks compare after.

What is in the files is `sharded` and `run_state`, what makes them a checkpoint is `snapshot` and `manifest`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distmuon.checkpoint import folder as snapshot
from distmuon.checkpoint import tensors as sharded
from distmuon.checkpoint.extras import (
    UntrainedTensors,
    check_given,
    check_path,
    restore_rng,
    rng_states,
    unpacked,
    untrained_tensors,
    why_not_taken,
    write_other,
)
from distmuon.checkpoint.manifest import Manifest, check_files, damaged, not_understood, own_file, read_manifest
from distmuon.comm.agreement import agree_on_bits, raise_together
from distmuon.comm.group import DataParallelGroup
from distmuon.errors import names, problem
from distmuon.optimizer import DistMuon
from distmuon.options import one_of
from distmuon.state_dict import load_groups, rerouted
from distmuon.step import initial_values as holdings
from distmuon.step.engine import Engine

_LOG = logging.getLogger("distmuon")
_SAME_MODEL_CURE = "make model and optimizer as they were for the save"


@dataclass(frozen=True, slots=True)
class Loaded:
    """What `load_checkpoint` found. `extra`: this rank's, or rank 0's where the number of ranks has changed.

    `dp_size`: of the run that saved. `rng_restored`: only at the same dp_size. `skipped`: newer folders that were not
    complete, each with the reason.
    """

    path: Path
    dp_size: int
    extra: Any
    rng_restored: bool
    skipped: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Read:
    """A checkpoint that was looked through. `rank`: whose own part this rank takes; `states`: beside dense tensors."""

    path: Path
    dp_size: int
    same: bool
    rank: int
    reader: sharded.Reader
    fresh: set[str]
    shared: dict[str, Any]
    own: dict[str, Any]
    states: dict[str, Any]


def load_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: DistMuon,
    *,
    scheduler: Any = None,
    on_route_change: str = "raise",
) -> Loaded:
    """Load the checkpoint at `path`, or the newest complete one in the folder `path`. Collective.

    Any dp_size, packing, placement, bucket size, parameter and momentum dtype; `model` and `optimizer` are made as for
    training, from any values. Every file's sum is compared first (each rank reads its share). Then each rank reads its
    part twice, a bucket at a time: for a test, then into masters and state. Parameters are gathered from the masters,
    and all ranks compare the bits of what they hold.
    At the number of ranks of the save each rank gets back its own RNG states, and what differed by rank beside trained
    parameters (buffers, frozen parameters, extra states of modules); at another all get rank 0's of the latter.
    Another run may save, and remove, in the folder meanwhile: what it takes away is looked for anew.

    on_route_change: "raise" where a parameter's rule is not the one it was saved under, or "reset": such a parameter
        keeps its value and its state starts from zero.

    Executes nothing that stands in the files. Raises `ValueError` on all ranks, naming the file or the parameters;
    until all checks have passed nothing is changed.
    """
    check_given(model, optimizer)
    optimizer.group.begin("load_checkpoint")

    def check() -> None:
        one_of("on_route_change", on_route_change, ("raise", "reset"))
        check_path(path, new=False)

    raise_together(optimizer.group, check)
    group, engine = optimizer.group, optimizer.quiesced(to_write=True)
    others = raise_together(group, lambda: untrained_tensors(model, engine.storage.params))
    load = _Load(model, optimizer, engine, others, scheduler, on_route_change)
    root, looking = Path(path), snapshot.Looking(Path(path))
    while True:
        found: Path | None = None
        try:
            found, skipped = _newest_whole(root, group, looking)
            loaded = load.take(found, skipped)
        except ValueError:
            if found is None or not _overtaken(root, found, group, looking):
                raise
        else:
            return loaded


class _Load:
    """A load into one model and optimizer; `take` may be called again after one that failed."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: DistMuon,
        engine: Engine,
        others: UntrainedTensors,
        scheduler: Any,
        on_change: str,
    ) -> None:
        self._model, self._optimizer, self._engine = model, optimizer, engine
        self._others, self._scheduler, self._on_change = others, scheduler, on_change
        self._group, self._storage = optimizer.group, engine.storage

    def take(self, found: Path, skipped: Sequence[str]) -> Loaded:
        """Check and load the checkpoint at `found`. Collective."""
        read = raise_together(self._group, lambda: self._check(found))
        self._try_extra_states(read)
        raise_together(self._group, lambda: self._write(read))
        self._engine.gather_all()
        held = {name for name in read.reader.unlike() if read.same}
        _verify(self._model, self._optimizer, leaving_out=held)
        if read.same:
            restore_rng(read.own["rng"], self._storage.device)
        return Loaded(found, read.dp_size, read.own["extra"], read.same, tuple(skipped))

    def _check(self, found: Path) -> _Read:
        """Read everything once; raise for whatever does not fit. Changes nothing."""
        optimizer, storage, group, scheduler = self._optimizer, self._storage, self._group, self._scheduler
        manifest = read_manifest(found)
        reader = sharded.Reader(found, manifest)
        same = manifest.dp_size == group.dp_size
        rank = group.dp_rank if same else 0
        shared_file, file = found / "shared.pt", found / own_file(rank)
        shared, own = unpacked(shared_file, "param_groups", "scheduler"), unpacked(file, "extra", "rng")
        read = _Read(found, manifest.dp_size, same, rank, reader, set(), shared, own, {})
        self._check_states(read)
        changed = _changed_routes(manifest, reader.others(rank), storage.layout.specs, self._others, self._on_change)
        fresh = {spec.fqn for spec in storage.layout.specs if spec.fqn in changed}
        read.fresh.update(fresh)
        missing = sharded.missing_from(reader, storage, fresh, self._others.plain, self._others.rows, rank)
        if missing:
            raise problem(
                names(missing),
                found=f"{len(missing)} tensors do not fit",
                needed="the model of the save is needed",
                cure=_SAME_MODEL_CURE,
            )
        try:
            if changed:
                saved = {"state": {}, "param_groups": shared["param_groups"]}
                shared["param_groups"] = rerouted(saved, optimizer.param_groups)["param_groups"]
            load_groups(shared["param_groups"], _without_params(optimizer.param_groups))
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise not_understood(shared_file, error) from error
        if scheduler is not None and shared["scheduler"] is None:
            raise problem(
                str(shared_file),
                found="no scheduler's state is in it",
                needed="one is needed",
                cure="pass scheduler=None",
            )
        if scheduler is not None:
            _dry_run(shared_file, scheduler.load_state_dict, shared["scheduler"], deepcopy(scheduler.state_dict()))
        if same:
            _dry_run(file, lambda states: restore_rng(states, storage.device), own["rng"], rng_states(storage.device))
        for bucket in storage.buckets:
            sharded.read_bucket(reader, storage, bucket, fresh)
        for fqn, tensor in self._others.plain.items():
            _check_fits(fqn, tensor, sharded.read_other(reader, fqn, tensor, rank))
        sharded.read_rows(reader, storage, self._others.rows)
        return read

    def _check_states(self, read: _Read) -> None:
        """Sparse and quantised tensors and modules' extra state: exactly what this model holds."""
        for file, state in ((read.path / "shared.pt", read.shared), (read.path / own_file(read.rank), read.own)):
            modules = state.get("modules", {})
            if not isinstance(modules, dict) or not all(isinstance(fqn, str) for fqn in modules):
                raise damaged(file, "it has no dict of modules' states")
            read.states.update(modules)
        ours = {**self._others.odd, **self._others.extra}
        surplus, missing = [f for f in read.states if f not in ours], [f for f in ours if f not in read.states]
        if "modules" not in read.shared and not surplus:  # written before they were saved
            if missing and self._group.dp_rank == 0:
                _LOG.warning("%s holds no state of %s, which keep what they have", read.path, names(missing))
        elif surplus or missing:
            found = f"it holds states of {names(surplus)}, which this model has not" if surplus else ""
            found = found or f"it holds no state of {names(missing)}"
            raise problem(str(read.path), found=found, needed="the model of the save is needed", cure=_SAME_MODEL_CURE)
        for fqn, tensor in self._others.odd.items():
            if fqn in read.states:
                _check_fits(fqn, tensor, read.states[fqn])
        for fqn, (module, _) in self._others.extra.items():
            if fqn in read.states and type(module).set_extra_state is nn.Module.set_extra_state:
                raise problem(
                    fqn,
                    found=f"a {type(module).__name__} has no set_extra_state",
                    needed="it must take its state back",
                    cure="define set_extra_state",
                )

    def _try_extra_states(self, read: _Read) -> None:
        """Before any tensor is written: what a module's own method refuses is raised, and all modules are put back.

        They are set again at the end, for they may compute from tensors of theirs.
        """
        done: list[tuple[nn.Module, Any]] = []

        def attempt() -> None:
            for fqn, (module, before) in self._others.extra.items():
                if fqn in read.states:
                    done.append((module, deepcopy(before)))
                    try:
                        module.set_extra_state(deepcopy(read.states[fqn]))
                    except Exception as error:
                        found = f"its module did not take it over ({type(error).__name__}: {error})"
                        raise problem(
                            fqn, found=found, needed="the module of the save is needed", cure=_SAME_MODEL_CURE
                        ) from error

        try:
            raise_together(self._group, attempt)
        except ValueError:
            for module, before in done:
                with suppress(Exception):  # the error that counts is on its way
                    module.set_extra_state(before)
            raise

    @torch.no_grad()
    def _write(self, read: _Read) -> None:
        optimizer, storage, scheduler = self._optimizer, self._storage, self._scheduler
        for bucket in storage.buckets:
            for piece, key, value in sharded.read_bucket(read.reader, storage, bucket, read.fresh):
                sharded.write_value(bucket, piece, key, value)
        for fqn, tensor in self._others.plain.items():
            write_other(tensor, sharded.read_other(read.reader, fqn, tensor, read.rank))
        for rows, value in sharded.read_rows(read.reader, storage, self._others.rows):
            rows.copy_(value)
        for fqn, tensor in self._others.odd.items():
            if fqn in read.states:
                write_other(tensor, read.states[fqn])
        for fqn, (module, _) in self._others.extra.items():
            if fqn in read.states:
                module.set_extra_state(read.states[fqn])
        load_groups(read.shared["param_groups"], optimizer.param_groups)
        if scheduler is not None:
            scheduler.load_state_dict(read.shared["scheduler"])


def verify_parameters(model: nn.Module, optimizer: DistMuon) -> None:
    """Raise `ValueError` on all ranks, naming tensor and ranks, unless every parameter has the same bits everywhere,
    and all ranks the same options and hyperparameters.

    Collective; waits for what is in flight and reads every parameter once. Module buffers are left out: each rank's own
    statistics (BatchNorm) may differ.
    """
    check_given(model, optimizer)
    optimizer.group.begin("verify_parameters")
    optimizer.quiesced()
    _verify(model, optimizer)


def _verify(model: nn.Module, optimizer: DistMuon, leaving_out: Collection[str] = ()) -> None:
    """`leaving_out`: what the ranks have held differently since it was saved."""
    optimizer.verify_options()
    held, _ = holdings.plain(model.named_parameters())
    held = {name: part for name, part in held.items() if name not in leaving_out}
    agree_on_bits(list(held), list(held.values()), optimizer.group)


def _newest_whole(root: Path, group: DataParallelGroup, looking: snapshot.Looking) -> tuple[Path, list[str]]:
    """The checkpoint to load, its sums compared by all ranks together; and why newer ones were skipped.

    Rank 0 lists the folder. See folder.py, [Note: looking again].
    """
    while True:
        skipped, unfinished, gone = list[str](), list[Path](), False

        def listed() -> tuple[list[Path], list[Path]]:
            if group.dp_rank > 0:
                return [], []
            if snapshot.is_checkpoint(root):
                return [root], []
            return looking.candidates(), snapshot.unfinished_in(root)

        candidates, unfinished = group.gather_objects(raise_together(group, listed), stage="checkpoint")[0]
        for candidate in candidates:
            damage = _damage(candidate, group)
            if damage is None:
                _log_skipped(skipped)
                return candidate, skipped + [f"{path}: its save has not ended" for path in unfinished]
            if candidate == root:
                raise damage
            if gone := _has_gone(candidate, group):
                break
            skipped.append(str(damage))
        if not group.gather_objects(looking.again(gone), stage="checkpoint")[0]:
            break
    _log_skipped(skipped)
    raise problem(
        str(root),
        found=f"no complete checkpoint there ({names([*skipped, *unfinished]) or 'it is empty'})",
        needed="one is needed",
        cure="start afresh where latest_checkpoint finds none",
    )


def _damage(path: Path, group: DataParallelGroup) -> ValueError | None:
    """The first file of a checkpoint that its sums do not vouch for. Collective; each rank reads its share."""
    try:
        raise_together(group, lambda: check_files(path, read_manifest(path), group.dp_rank, group.dp_size))
    except ValueError as damage:
        return damage
    return None


def _log_skipped(reasons: Sequence[str]) -> None:
    for reason in reasons:
        snapshot.log_skipped(reason)


def _has_gone(path: Path, group: DataParallelGroup) -> bool:
    """Whether some rank does not see `path` any more. Collective."""
    return any(group.gather_objects(not os.path.lexists(path), stage="checkpoint"))


def _overtaken(root: Path, found: Path, group: DataParallelGroup, looking: snapshot.Looking) -> bool:
    """Whether a load of `found` failed because another run removed it, and a newer one may be there. Collective."""
    gone = _has_gone(found, group)
    return gone and found != root and group.gather_objects(looking.again(gone), stage="checkpoint")[0]


def _changed_routes(
    manifest: Manifest, held: Collection[str], specs: Sequence[Any], others: UntrainedTensors, on_route_change: str
) -> set[str]:
    """The parameters whose rule is not that of the save. Raises for them, or for parameters this model lacks.

    `held`: the tensors that this rank, or rank 0 in its place, had beside optimizer state.
    """
    saved = {fqn: str(entry["rule"]) for fqn, entry in manifest.parameters.items()}
    for fqn in sorted(held):
        saved.setdefault(fqn, "none")
    ours = {**dict.fromkeys([*others.plain, *others.rows], "none"), **{spec.fqn: spec.rule for spec in specs}}
    surplus = [fqn for fqn in saved if fqn not in ours]
    if surplus:
        raise problem(
            names(surplus),
            found=f"{len(surplus)} tensors of the checkpoint are not in this model",
            needed="the model of the save is needed",
            cure=_SAME_MODEL_CURE,
        )
    changed = [fqn for fqn in ours if fqn in saved and saved[fqn] != ours[fqn]]
    if changed and on_route_change == "raise":
        raise problem(
            names([f"{fqn} ({saved[fqn]} -> {ours[fqn]})" for fqn in changed]),
            found=f"{len(changed)} parameters have another rule than in the checkpoint",
            needed="the same routing is needed",
            cure='make the optimizer with the routes it was saved with, or pass on_route_change="reset"',
        )
    return set(changed)


def _check_fits(fqn: str, tensor: Tensor, value: object) -> None:
    if (found := why_not_taken(tensor, value)) is not None:
        raise problem(
            fqn, found=f"the checkpoint holds {found}", needed="the model of the save is needed", cure=_SAME_MODEL_CURE
        )


def _dry_run(file: Path, load: Callable[[Any], object], state: Any, before: Any) -> None:
    """Raise, naming the file, unless `load(state)` works. Undone by `load(before)` in any case."""
    try:
        load(state)
    except Exception as error:
        raise damaged(file, f"its state cannot be taken over ({type(error).__name__}: {error})") from error
    finally:
        load(before)


def _without_params(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A copy to try a load on."""
    return [{**group, "params": list(range(len(group["params"])))} for group in groups]
