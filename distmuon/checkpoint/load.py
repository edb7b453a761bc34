"""`load_checkpoint`: the order of a load, the checks before anything is changed, and the comparison of ranks after.

This module decides only the order. `tensors` and `extras` know the contents of the files; `folder` and `manifest` know
what makes them a checkpoint.
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

from distmuon.checkpoint import folder, tensors
from distmuon.checkpoint.extras import (
    UntrainedTensors,
    check_given,
    check_path,
    restore_rng,
    rng_states,
    unpacked,
    untrained_tensors,
    why_not_taken,
    write_untrained,
)
from distmuon.checkpoint.manifest import Manifest, check_files, damaged, not_understood, rank_file, read_manifest
from distmuon.comm.agreement import agree_on_bits, raise_together
from distmuon.comm.group import DataParallelGroup
from distmuon.errors import names, problem
from distmuon.optimizer import DistMuon
from distmuon.options import one_of
from distmuon.state_dict import load_groups, rerouted
from distmuon.step import initial_values
from distmuon.step.engine import Engine

_LOG = logging.getLogger("distmuon")
_SAME_MODEL_CURE = "make model and optimizer as they were for the save"


@dataclass(frozen=True, slots=True)
class Loaded:
    """The result of `load_checkpoint`. `extra` is this rank's, or rank 0's if the number of ranks has changed.

    `dp_size` is that of the save; `rng_restored` is true only at the same dp_size. `skipped` lists newer folders that
    were not complete, with the reasons.
    """

    path: Path
    dp_size: int
    extra: Any
    rng_restored: bool
    skipped: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Checked:
    """A checkpoint that has passed the checks. `rank`: the saved rank whose state this rank takes.

    `states`: values of non-dense tensors and extra states. `fresh`: parameters whose state starts from zero.
    """

    path: Path
    dp_size: int
    same_size: bool
    rank: int
    reader: tensors.Reader
    fresh: set[str]
    shared_state: dict[str, Any]
    rank_state: dict[str, Any]
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

    dp_size, packing, placement, bucket size, parameter dtype and momentum dtype may differ from the save. Make `model`
    and `optimizer` as for training, with any values. First the sum of every file is compared (each rank reads its
    share). Then each rank reads its part twice, a bucket at a time: as a test, then into masters and state. Parameters
    are gathered from the masters, and all ranks compare the bits of their parameters.
    At the number of ranks of the save, each rank gets back its RNG states and its buffers, frozen parameters and extra
    states of modules; at another number, all ranks get rank 0's buffers, frozen parameters and extra states.
    Other runs may save and remove checkpoints in the folder meanwhile; if the chosen checkpoint goes, the search starts
    again.

    on_route_change: "raise" if a parameter was saved under another rule, or "reset": such a parameter keeps its value
        and its state starts from zero.

    Executes nothing in the files. Raises `ValueError` on all ranks, naming the file or the parameters; nothing is
    changed before all checks have passed.
    """
    check_given(model, optimizer)
    optimizer.group.begin("load_checkpoint")

    def check() -> None:
        one_of("on_route_change", on_route_change, ("raise", "reset"))
        check_path(path, new=False)

    raise_together(optimizer.group, check)
    group, engine = optimizer.group, optimizer.quiesced(to_write=True)
    untrained = raise_together(group, lambda: untrained_tensors(model, engine.storage.params))
    load = _Load(model, optimizer, engine, untrained, scheduler, on_route_change)
    root, search = Path(path), folder.NewestSearch(Path(path))
    while True:
        found: Path | None = None
        try:
            found, skipped = _newest_whole(root, group, search)
            loaded = load.take(found, skipped)
        except ValueError:
            if found is None or not _overtaken(root, found, group, search):
                raise
        else:
            return loaded


class _Load:
    """A load into a model and its optimizer; `take` may be called again after a failure."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: DistMuon,
        engine: Engine,
        untrained: UntrainedTensors,
        scheduler: Any,
        on_change: str,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._engine = engine
        self._untrained = untrained
        self._scheduler = scheduler
        self._on_change = on_change
        self._group, self._storage = optimizer.group, engine.storage

    def take(self, found: Path, skipped: Sequence[str]) -> Loaded:
        """Check and load the checkpoint at `found`. Collective."""
        checked = raise_together(self._group, lambda: self._check(found))
        self._try_extra_states(checked)
        raise_together(self._group, lambda: self._write(checked))
        self._engine.gather_all()
        held = {name for name in checked.reader.differing_fqns() if checked.same_size}
        _verify(self._model, self._optimizer, leaving_out=held)
        if checked.same_size:
            restore_rng(checked.rank_state["rng"], self._storage.device)
        return Loaded(found, checked.dp_size, checked.rank_state["extra"], checked.same_size, tuple(skipped))

    def _check(self, found: Path) -> _Checked:
        """Read everything once; raise if anything does not fit. Changes nothing."""
        optimizer = self._optimizer
        storage = self._storage
        group = self._group
        scheduler = self._scheduler
        manifest = read_manifest(found)
        reader = tensors.Reader(found, manifest)
        same_size = manifest.dp_size == group.dp_size
        rank = group.dp_rank if same_size else 0
        shared_file, file = found / "shared.pt", found / rank_file(rank)
        shared_state, rank_state = unpacked(shared_file, "param_groups", "scheduler"), unpacked(file, "extra", "rng")
        checked = _Checked(found, manifest.dp_size, same_size, rank, reader, set(), shared_state, rank_state, {})
        self._check_states(checked)
        changed = _changed_routes(
            manifest, reader.fqns_of(rank), storage.layout.specs, self._untrained, self._on_change
        )
        fresh = {spec.fqn for spec in storage.layout.specs if spec.fqn in changed}
        checked.fresh.update(fresh)
        missing = tensors.missing_from(reader, storage, fresh, self._untrained.plain, self._untrained.cut, rank)
        if missing:
            raise problem(
                names(missing),
                found=f"{len(missing)} tensors do not fit",
                needed="the model of the save is needed",
                cure=_SAME_MODEL_CURE,
            )
        try:
            if changed:
                saved = {"state": {}, "param_groups": shared_state["param_groups"]}
                shared_state["param_groups"] = rerouted(saved, optimizer.param_groups)["param_groups"]
            load_groups(shared_state["param_groups"], _without_params(optimizer.param_groups))
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise not_understood(shared_file, error) from error
        if scheduler is not None and shared_state["scheduler"] is None:
            raise problem(
                str(shared_file),
                found="no scheduler's state is in it",
                needed="the state of a scheduler is needed",
                cure="pass scheduler=None",
            )
        if scheduler is not None:
            _dry_run(
                shared_file, scheduler.load_state_dict, shared_state["scheduler"], deepcopy(scheduler.state_dict())
            )
        if same_size:
            _dry_run(
                file, lambda states: restore_rng(states, storage.device), rank_state["rng"], rng_states(storage.device)
            )
        for bucket in storage.buckets:
            tensors.read_bucket(reader, storage, bucket, fresh)
        tensors.read_row_moments(reader, storage, fresh)
        for fqn, tensor in self._untrained.plain.items():
            _check_fits(fqn, tensor, tensors.read_untrained(reader, fqn, tensor, rank))
        tensors.read_cut(reader, self._untrained.cut)
        return checked

    def _check_states(self, checked: _Checked) -> None:
        """Raise unless the non-dense tensors and extra states are exactly those of this model."""
        for file, state in (
            (checked.path / "shared.pt", checked.shared_state),
            (checked.path / rank_file(checked.rank), checked.rank_state),
        ):
            modules = state.get("modules", {})
            if not isinstance(modules, dict) or not all(isinstance(fqn, str) for fqn in modules):
                raise damaged(file, "it has no dict of modules' states")
            checked.states.update(modules)
        held = {**self._untrained.non_dense, **self._untrained.extra}
        surplus = [fqn for fqn in checked.states if fqn not in held]
        missing = [fqn for fqn in held if fqn not in checked.states]
        if "modules" not in checked.shared_state and not surplus:  # older versions did not save these states
            if missing and self._group.dp_rank == 0:
                _LOG.warning("%s holds no state of %s, which keep their values", checked.path, names(missing))
        elif surplus or missing:
            found = f"it holds states of {names(surplus)}, which this model lacks" if surplus else ""
            found = found or f"it holds no state of {names(missing)}"
            raise problem(
                str(checked.path), found=found, needed="the model of the save is needed", cure=_SAME_MODEL_CURE
            )
        for fqn, tensor in self._untrained.non_dense.items():
            if fqn in checked.states:
                _check_fits(fqn, tensor, checked.states[fqn])
        for fqn, (module, _) in self._untrained.extra.items():
            if fqn in checked.states and type(module).set_extra_state is nn.Module.set_extra_state:
                raise problem(
                    fqn,
                    found=f"a {type(module).__name__} has no set_extra_state",
                    needed="the module must be able to load its state",
                    cure="define set_extra_state",
                )

    def _try_extra_states(self, checked: _Checked) -> None:
        """Load the extra states before any tensor is written; if a module refuses, restore all modules and raise.

        `_write` loads them again at the end, since a module may compute from its tensors.
        """
        done: list[tuple[nn.Module, Any]] = []

        def attempt() -> None:
            for fqn, (module, before) in self._untrained.extra.items():
                if fqn in checked.states:
                    done.append((module, deepcopy(before)))
                    try:
                        module.set_extra_state(deepcopy(checked.states[fqn]))
                    except Exception as error:
                        found = f"its module refused it ({type(error).__name__}: {error})"
                        raise problem(
                            fqn, found=found, needed="the module of the save is needed", cure=_SAME_MODEL_CURE
                        ) from error

        try:
            raise_together(self._group, attempt)
        except ValueError:
            for module, before in done:
                with suppress(Exception):  # the module's first error is raised below
                    module.set_extra_state(before)
            raise

    @torch.no_grad()
    def _write(self, checked: _Checked) -> None:
        optimizer = self._optimizer
        storage = self._storage
        scheduler = self._scheduler
        for bucket in storage.buckets:
            for piece, key, value in tensors.read_bucket(checked.reader, storage, bucket, checked.fresh):
                tensors.write_value(bucket, piece, key, value)
        for moment, value in tensors.read_row_moments(checked.reader, storage, checked.fresh):
            moment.copy_(value)
        for fqn, tensor in self._untrained.plain.items():
            write_untrained(tensor, tensors.read_untrained(checked.reader, fqn, tensor, checked.rank))
        for elements, value in tensors.read_cut(checked.reader, self._untrained.cut):
            elements.copy_(value)
        for fqn, tensor in self._untrained.non_dense.items():
            if fqn in checked.states:
                write_untrained(tensor, checked.states[fqn])
        for fqn, (module, _) in self._untrained.extra.items():
            if fqn in checked.states:
                module.set_extra_state(checked.states[fqn])
        load_groups(checked.shared_state["param_groups"], optimizer.param_groups)
        if scheduler is not None:
            scheduler.load_state_dict(checked.shared_state["scheduler"])


def verify_parameters(model: nn.Module, optimizer: DistMuon) -> None:
    """Raise `ValueError` on all ranks unless all ranks hold the same parameters, bit for bit, and the same options.

    The error names the tensor and the ranks. Hyperparameters are compared, too. Collective; waits for collectives in
    flight and reads every parameter once. Module buffers may differ by rank (BatchNorm's statistics) and are left out.
    """
    check_given(model, optimizer)
    optimizer.group.begin("verify_parameters")
    optimizer.quiesced()
    _verify(model, optimizer)


def _verify(model: nn.Module, optimizer: DistMuon, leaving_out: Collection[str] = ()) -> None:
    """Compare options and parameters of all ranks, without `leaving_out`: tensors that differed at the save."""
    optimizer.verify_options()
    found, _ = initial_values.plain(model.named_parameters())
    compared = {name: part for name, part in found.items() if name not in leaving_out}
    agree_on_bits(list(compared), list(compared.values()), optimizer.group)


def _newest_whole(root: Path, group: DataParallelGroup, search: folder.NewestSearch) -> tuple[Path, list[str]]:
    """Find the checkpoint to load, comparing its sums on all ranks; return it and why newer ones were skipped.

    Rank 0 lists the folder. See folder.py, [Note: looking again].
    """
    while True:
        skipped = list[str]()
        unfinished = list[Path]()
        gone = False

        def listed() -> tuple[list[Path], list[Path]]:
            if group.dp_rank > 0:
                return [], []
            if folder.is_checkpoint(root):
                return [root], []
            return search.candidates(), folder.unfinished_in(root)

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
        if not group.gather_objects(search.again(gone), stage="checkpoint")[0]:
            break
    _log_skipped(skipped)
    raise problem(
        str(root),
        found=f"no complete checkpoint there ({names([*skipped, *unfinished]) or 'it is empty'})",
        needed="a complete checkpoint is needed",
        cure="start from the beginning if latest_checkpoint finds none",
    )


def _damage(path: Path, group: DataParallelGroup) -> ValueError | None:
    """The error of the first file that does not match its sum, or None. Collective; each rank reads its share."""
    try:
        raise_together(group, lambda: check_files(path, read_manifest(path), group.dp_rank, group.dp_size))
    except ValueError as damage:
        return damage
    return None


def _log_skipped(reasons: Sequence[str]) -> None:
    for reason in reasons:
        folder.log_skipped(reason)


def _has_gone(path: Path, group: DataParallelGroup) -> bool:
    """Whether any rank no longer sees `path`. Collective."""
    return any(group.gather_objects(not os.path.lexists(path), stage="checkpoint"))


def _overtaken(root: Path, found: Path, group: DataParallelGroup, search: folder.NewestSearch) -> bool:
    """Whether a load of `found` failed because another run removed it, so that a newer one may exist. Collective."""
    gone = _has_gone(found, group)
    return gone and found != root and group.gather_objects(search.again(gone), stage="checkpoint")[0]


def _changed_routes(
    manifest: Manifest, held: Collection[str], specs: Sequence[Any], untrained: UntrainedTensors, on_route_change: str
) -> set[str]:
    """The parameters whose rule differs from the save. Raises for them, or for tensors that this model lacks.

    `held`: the fqns of the model's tensors that the saved rank held.
    """
    saved = {fqn: str(entry["rule"]) for fqn, entry in manifest.parameters.items()}
    for fqn in sorted(held):
        saved.setdefault(fqn, "none")
    rules = {**dict.fromkeys([*untrained.plain, *untrained.cut], "none"), **{spec.fqn: spec.rule for spec in specs}}
    surplus = [fqn for fqn in saved if fqn not in rules]
    if surplus:
        raise problem(
            names(surplus),
            found=f"{len(surplus)} tensors of the checkpoint are not in this model",
            needed="the model of the save is needed",
            cure=_SAME_MODEL_CURE,
        )
    changed = [fqn for fqn in rules if fqn in saved and saved[fqn] != rules[fqn]]
    if changed and on_route_change == "raise":
        raise problem(
            names([f"{fqn} ({saved[fqn]} -> {rules[fqn]})" for fqn in changed]),
            found=f"{len(changed)} parameters have another rule than in the checkpoint",
            needed="the same routing is needed",
            cure='make the optimizer with the routes of the save, or pass on_route_change="reset"',
        )
    return set(changed)


def _check_fits(fqn: str, tensor: Tensor, value: object) -> None:
    if (found := why_not_taken(tensor, value)) is not None:
        raise problem(
            fqn, found=f"the checkpoint holds {found}", needed="the model of the save is needed", cure=_SAME_MODEL_CURE
        )


def _dry_run(file: Path, load: Callable[[Any], object], state: Any, before: Any) -> None:
    """Load `state`, then restore `before`; raise naming the file if loading fails."""
    try:
        load(state)
    except Exception as error:
        raise damaged(file, f"its state cannot be loaded ({type(error).__name__}: {error})") from error
    finally:
        load(before)


def _without_params(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copy param groups with numbers in place of parameters, to try a load on."""
    return [{**group, "params": list(range(len(group["params"])))} for group in groups]
