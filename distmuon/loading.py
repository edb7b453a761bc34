"""`load_checkpoint`: the order of a load, what is checked before anything is changed, and what all ranks compare after.

What is in the files is `sharded` and `run_state`, what makes them a checkpoint is `snapshot` and `manifest`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distmuon import holdings, sharded, snapshot
from distmuon.agreement import agree_on_bits, names, together
from distmuon.checkpoint import load_groups, rerouted
from distmuon.config import one_of
from distmuon.errors import problem
from distmuon.manifest import Manifest, check_files, damaged, not_understood, own_file, read_manifest
from distmuon.optimizer import DistMuon
from distmuon.run_state import check_given, check_path, others_of, restore_rng, rng_states, unpacked

_SAME = "make model and optimizer as they were for the save"


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
    RNG states are restored where the number of ranks is that of the save.

    on_route_change: "raise" where a parameter's rule is not the one it was saved under, or "reset": such a parameter
        keeps its value and its state starts from zero.

    Executes nothing that stands in the files. Raises `ValueError` on all ranks, naming the file or the parameters;
    until all checks have passed nothing is changed.
    """
    one_of("on_route_change", on_route_change, ("raise", "reset"))
    check_path(path, new=False)
    check_given(model, optimizer)
    group, gather = optimizer.group, optimizer.at_rest(to_write=True)
    found, skipped = _newest_whole(Path(path), optimizer)
    buffers = gather.buffers
    others = others_of(model, buffers.params)

    def check() -> tuple[Manifest, sharded.Reader, set[str], dict[str, Any], dict[str, Any]]:
        manifest = read_manifest(found)
        reader = sharded.Reader(found, manifest)
        same = manifest.dp_size == group.dp_size
        shared_file, file = found / "shared.pt", found / own_file(group.dp_rank if same else 0)
        shared, own = unpacked(shared_file, "param_groups", "scheduler"), unpacked(file, "extra", "rng")
        changed = _changed_routes(manifest, reader, buffers.layout.specs, others, on_route_change)
        fresh = {spec.fqn for spec in buffers.layout.specs if spec.fqn in changed}
        missing = sharded.missing_from(reader, buffers, fresh, others)
        if missing:
            raise problem(
                names(missing), f"{len(missing)} tensors do not fit", "the model of the save is needed", _SAME
            )
        try:
            if changed:
                saved = {"state": {}, "param_groups": shared["param_groups"]}
                shared["param_groups"] = rerouted(saved, optimizer.param_groups)["param_groups"]
            load_groups(shared["param_groups"], _bare(optimizer.param_groups))
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise not_understood(shared_file, error) from error
        if scheduler is not None and shared["scheduler"] is None:
            raise problem(str(shared_file), "no scheduler's state is in it", "one is needed", "pass scheduler=None")
        if scheduler is not None:
            _try(shared_file, scheduler.load_state_dict, shared["scheduler"], deepcopy(scheduler.state_dict()))
        if same:
            _try(file, lambda states: restore_rng(states, buffers.device), own["rng"], rng_states(buffers.device))
        for bucket in buffers.buckets:
            sharded.read_bucket(reader, buffers, bucket, fresh)
        for fqn, tensor in others.items():
            sharded.read_other(reader, fqn, tensor)
        return manifest, reader, fresh, shared, own

    manifest, reader, fresh, shared, own = together(group, check)

    @torch.no_grad()
    def load() -> None:
        for bucket in buffers.buckets:
            for piece, key, value in sharded.read_bucket(reader, buffers, bucket, fresh):
                sharded.write_value(bucket, piece, key, value)
        for fqn, tensor in others.items():
            holdings.write(tensor, sharded.read_other(reader, fqn, tensor))
        load_groups(shared["param_groups"], optimizer.param_groups)
        if scheduler is not None:
            scheduler.load_state_dict(shared["scheduler"])

    together(group, load)
    gather.publish()
    verify_parameters(model, optimizer)
    same = manifest.dp_size == group.dp_size
    if same:
        restore_rng(own["rng"], buffers.device)
    return Loaded(found, manifest.dp_size, own["extra"], same, tuple(skipped))


def verify_parameters(model: nn.Module, optimizer: DistMuon) -> None:
    """Raise `ValueError` on all ranks, naming tensor and ranks, unless every parameter has the same bits everywhere,
    and all ranks the same options and hyperparameters.

    Collective; waits for what is in flight and reads every parameter once. Module buffers are left out: each rank's own
    statistics (BatchNorm) may differ.
    """
    check_given(model, optimizer)
    optimizer.at_rest()
    optimizer.verify_options()
    held, _ = holdings.plain(model.named_parameters())
    agree_on_bits(list(held), list(held.values()), optimizer.group)


def _newest_whole(root: Path, optimizer: DistMuon) -> tuple[Path, list[str]]:
    """The checkpoint to load, its sums compared by all ranks together; and why newer ones were skipped."""
    group, skipped = optimizer.group, list[str]()
    candidates, unfinished = together(group, lambda: snapshot.candidates(root) if group.dp_rank == 0 else ([], []))
    candidates, unfinished = group.gather_objects((candidates, unfinished), stage="checkpoint")[0]
    for candidate in candidates:

        def check(path: Path = candidate) -> None:
            check_files(path, read_manifest(path), group.dp_rank, group.dp_size)

        try:
            together(group, check)
        except ValueError as damaged:
            if candidate == root:
                raise
            skipped.append(str(damaged))
            snapshot.log_skipped(damaged)
        else:
            return candidate, skipped + [f"{path}: its save never ended" for path in unfinished]
    raise problem(
        str(root), f"no complete checkpoint there ({names([*skipped, *unfinished]) or 'it is empty'})",
        "one is needed", "start afresh where latest_checkpoint finds none",
    )  # fmt: skip


def _changed_routes(
    manifest: Manifest,
    reader: sharded.Reader,
    specs: Sequence[Any],
    others: Mapping[str, Tensor],
    on_route_change: str,
) -> set[str]:
    """The parameters whose rule is not that of the save. Raises for them, or for parameters this model lacks."""
    saved = {fqn: str(entry["rule"]) for fqn, entry in manifest.parameters.items()}
    for name in reader.tensors:
        if name.startswith("model."):
            saved.setdefault(name.removeprefix("model."), "none")
    ours = {**dict.fromkeys(others, "none"), **{spec.fqn: spec.rule for spec in specs}}
    surplus = [fqn for fqn in saved if fqn not in ours]
    if surplus:
        raise problem(
            names(surplus), f"{len(surplus)} tensors of the checkpoint are not in this model",
            "the model of the save is needed", _SAME,
        )  # fmt: skip
    changed = [fqn for fqn in ours if fqn in saved and saved[fqn] != ours[fqn]]
    if changed and on_route_change == "raise":
        raise problem(
            names([f"{fqn} ({saved[fqn]} -> {ours[fqn]})" for fqn in changed]),
            f"{len(changed)} parameters have another rule than in the checkpoint", "the same routing is needed",
            'make the optimizer with the routes it was saved with, or pass on_route_change="reset"',
        )  # fmt: skip
    return set(changed)


def _try(file: Path, load: Callable[[Any], object], state: Any, before: Any) -> None:
    """Raise, naming the file, unless `load(state)` works. Undone by `load(before)` in any case."""
    try:
        load(state)
    except Exception as error:
        raise damaged(file, f"its state cannot be taken over ({type(error).__name__}: {error})") from error
    finally:
        load(before)


def _bare(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A copy to try a load on."""
    return [{**group, "params": list(range(len(group["params"])))} for group in groups]
