"""Shard state <-> plain full state: one dict of whole tensors a parameter, in the parameter's own coordinates.

Decides the format of a state dict, torch.optim's own: ``{"state": {number: {...}}, "param_groups": [...]}``. Nothing
in it depends on dp_size, packing or buckets, so it loads at any of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from distmuon.comm.group import DataParallelGroup
from distmuon.errors import problem
from distmuon.options import check_groups, is_number, one_of
from distmuon.step.storage import BucketStorage, Storage

# What torch.optim's Muon and AdamW and we keep by parameter: never taken for what a user has put beside it.
_KEPT = frozenset({"momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step", "master"})


def gather_full_state(storage: Storage, group: DataParallelGroup, keep: bool = True) -> list[dict[str, Tensor]]:
    """Per parameter its whole state on the CPU, on every rank that will `keep` it. Collective; a bucket at a time.

    Keys: ``momentum_buffer`` (muon), and ``step`` where that is kept in fewer than 32 bits; ``exp_avg``,
    ``exp_avg_sq``, ``step`` (adamw); ``master`` where the master is not the parameter itself.
    """
    full: list[dict[str, Tensor]] = [{} for _ in storage.params]
    steps = torch.zeros(len(full), dtype=torch.float32, device=storage.params[0].device)
    for bucket in storage.buckets:
        for key in ("momentum_buffer", "exp_avg", "exp_avg_sq", "master"):
            if key != "master" and not any(key in storage.keys_of(index) for index in bucket.spec.params):
                continue
            shard = _shard_of(bucket, key, storage.device)
            if shard is None:
                continue
            flat = shard.new_empty(group.dp_size * shard.numel())
            group.start_all_gather(flat, shard, stage="state_dict", label=bucket.label).wait()
            for index in bucket.spec.params if keep else ():
                if key == "master" or key in storage.keys_of(index):
                    full[index][key] = _assemble(storage, index, flat)
        for piece in bucket.muon + bucket.adamw:
            if piece.segment.param_offset == 0 and "step" in piece.state:
                steps[piece.segment.param] = piece.state["step"]
    group.start_all_reduce(steps, stage="state_dict").wait()
    for index, state in enumerate(full):
        if "step" in storage.keys_of(index):
            state["step"] = steps[index].cpu()
    return full


def numbered(
    storage: Storage, param_groups: Sequence[Mapping[str, Any]], of_param: Sequence[Mapping[str, Any]]
) -> dict[int, dict[str, Any]]:
    """What is known by parameter under the numbers that torch.optim gives parameters."""
    return {number: dict(of_param[index]) for number, index in enumerate(_torch_numbering(param_groups, storage))}


def states_of(
    storage: Storage, param_groups: Sequence[Mapping[str, Any]], state_dict: Mapping[str, Any]
) -> tuple[dict[int, Mapping[str, Any]], dict[int, dict[str, Any]]]:
    """Per parameter its state in `state_dict`, if it has any, and what others than distmuon have put beside it.

    Raises for what `load_full_state` could not take. As in torch.optim, a parameter's state stands under whatever key
    its group holds in its place: a number, or the fqn that `torch.distributed.checkpoint.state_dict` writes there.
    """
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    states, order = _by_number(_own(state_dict), keys), _torch_numbering(param_groups, storage)
    of_param: dict[int, Mapping[str, Any]] = {}
    beside: dict[int, dict[str, Any]] = {}
    for number, state in states.items():
        index = order[number]
        of_param[index], beside[index] = _split(state)
        _check_state(storage, index, of_param[index])
    return of_param, beside


def _split(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what an optimizer keeps, what users have put beside it) of one parameter's state.

    torch's unflattening leaves an empty dict for what it did not find. What torch's optimizers and the other rule keep
    is not taken for a user's.
    """
    found = {key: value for key, value in state.items() if not (isinstance(value, Mapping) and not value)}
    kept = {key: value for key, value in found.items() if key in _KEPT}
    return kept, {key: value for key, value in found.items() if key not in kept}


def entries_beside(state_dict: Mapping[str, Any]) -> dict[Any, Any]:
    """The entries of a state that belong to no parameter: a user's own, under keys of another kind than parameters'.

    What holds momentum or moments is a parameter's, whatever its key: JSON makes texts of the numbers.
    """
    keys = {key for group in state_dict["param_groups"] for key in group["params"]}
    kinds = (int, str) if any(isinstance(key, str) for key in keys) else (int,)
    others = {k: v for k, v in state_dict["state"].items() if k not in keys and not isinstance(k, kinds)}
    return {key: v for key, v in others.items() if not (isinstance(v, Mapping) and v.keys() & _KEPT)}


def _own(state_dict: Mapping[str, Any]) -> dict[Any, Any]:
    """The entries of a state that are parameters', or should be."""
    beside = entries_beside(state_dict)
    return {key: state for key, state in state_dict["state"].items() if key not in beside}


def load_full_state(storage: Storage, of_param: Mapping[int, Mapping[str, Any]]) -> None:
    """Take this rank's part of what `states_of` found. Missing entries start from zero."""
    for bucket in storage.buckets:
        with bucket.masters() as masters:
            for piece in bucket.muon + bucket.adamw:
                state = of_param.get(piece.segment.param, {})
                whole = {key: value for key, value in state.items() if key != "step"}
                start = piece.segment.param_offset
                mine = {key: t.reshape(-1)[start : start + piece.segment.length] for key, t in whole.items()}
                if "momentum_buffer" in mine:
                    momentum = mine["momentum_buffer"].to(storage.device, torch.float32)
                    mine.update(storage.momentum.encode(momentum))
                for key, own in piece.state.items():
                    if key == "step" and key in state:
                        own.fill_(float(state[key]))
                    elif key in mine:
                        own.copy_(mine[key])
                    else:
                        own.zero_()
                if "master" in mine:
                    masters(piece).copy_(mine["master"])


def _by_number(states: Mapping[Any, Mapping[str, Any]], keys: Sequence[Any]) -> dict[int, Mapping[str, Any]]:
    """`states` under the positions of their keys in the saved groups."""
    numbers = {key: number for number, key in enumerate(keys)}
    for key in states:
        if key not in numbers:
            raise problem(
                "load_state_dict",
                found=f"the state has an entry {key!r}",
                needed=f"one of the {len(keys)} in its groups is needed",
                cure="pass what state_dict() returned",
            )
    return {numbers[key]: state for key, state in states.items()}


def _check_state(storage: Storage, index: int, state: Mapping[str, Any]) -> None:
    """Raise for a state that has not all and only what its parameter's rule needs, in tensors of its shape.

    A momentum's ``step`` may be there or not, whatever `momentum_dtype` was when it was saved.
    """
    spec, needed = storage.layout.specs[index], set(storage.keys_of(index))
    optional = {"step"} if "momentum_buffer" in state else set()
    if state.keys() - {"master"} - optional not in (set(), needed - optional):
        raise problem(
            spec.fqn,
            found=f"its state has {sorted(state)}, not {sorted(needed)}",
            needed="the state of the same rule is needed",
            cure="make the optimizer with the routes it was saved with",
        )
    for key, value in state.items():
        if key == "step" and is_number(value):
            value = torch.tensor(float(value))
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta or value.is_complex():
            found = f"{value.layout} {value.dtype} on {value.device}" if isinstance(value, Tensor) else repr(value)
            raise problem(
                f"{spec.fqn}.{key}",
                found=f"found {found:.80}",
                needed="a dense real tensor is needed",
                cure="pass what was saved",
            )
        shape = spec.shape if key != "step" else (1,) * value.ndim  # older torch has steps of shape (1,)
        if tuple(value.shape) != shape:
            raise problem(
                f"{spec.fqn}.{key}",
                found=f"the state has shape {tuple(value.shape)}",
                needed=f"{shape} is needed",
                cure="load it into the model it was saved from",
            )
        if key == "step" and not 0 <= float(value) < float("inf"):
            raise problem(
                f"{spec.fqn}.step",
                found=f"found {float(value)}",
                needed="a count is needed",
                cure="pass what was saved",
            )


def _torch_numbering(param_groups: Sequence[Mapping[str, Any]], storage: Storage) -> list[int]:
    """torch.optim numbers parameters group by group: per number, the index in the layout."""
    index = {id(param): i for i, param in enumerate(storage.params)}
    return [index[id(param)] for group in param_groups for param in group["params"]]


def load_groups(saved: Sequence[Mapping[str, Any]], current: Sequence[dict[str, Any]]) -> None:
    """Take over the hyperparameters of `saved`. Raises, before anything is changed, unless it has the groups of
    `current`, the same rules and parameters in the same order, with legal values."""
    _check_routes(saved, current)
    if len(saved) != len(current):
        raise problem(
            "load_state_dict",
            found=f"the state has {len(saved)} param groups, this optimizer has {len(current)}",
            needed="the same routing is needed",
            cure="make the optimizer with the routes it was saved with",
        )
    for theirs, ours in zip(saved, current):
        names, own_names = theirs.get("param_names"), ours["param_names"]
        if theirs.get("rule", ours["rule"]) != ours["rule"] or len(theirs["params"]) != len(ours["params"]):
            found = f"{len(theirs['params'])} parameters under {theirs.get('rule')!r}"
            raise problem(
                "load_state_dict",
                found=f"a group of the state has {found}, here {len(own_names)} under {ours['rule']!r}",
                needed="the same routing is needed",
                cure="make the optimizer with the routes it was saved with",
            )
        for name, own in zip(names or own_names, own_names):
            if name != own:
                raise problem(
                    "load_state_dict",
                    found=f"the state has {name!r} where this optimizer has {own!r}",
                    needed="the same parameters in the same order are needed",
                    cure="load it into the model it was saved from",
                )
    taken = [{k: deepcopy(v) for k, v in group.items() if k not in ("params", "param_names")} for group in saved]
    check_groups([{**ours, **theirs} for ours, theirs in zip(current, taken)])
    for ours, theirs in zip(current, taken):
        ours.update(theirs)


def _check_routes(saved: Sequence[Mapping[str, Any]], current: Sequence[Mapping[str, Any]]) -> None:
    """Raise naming the parameters that are under another rule in `saved`, where it has names and rules at all."""
    theirs = {name: group.get("rule") for group in saved for name in group.get("param_names") or ()}
    ours = {name: group["rule"] for group in current for name in group["param_names"]}
    changed = [f"{n} ({theirs[n]} -> {rule})" for n, rule in ours.items() if theirs.get(n, rule) not in (rule, None)]
    if changed:
        raise problem(
            ", ".join(changed[:5]),
            found=f"{len(changed)} parameters have another rule than in the state",
            needed="the same routing is needed",
            cure='make the optimizer with the routes it was saved with, or pass on_route_change="reset"',
        )


def check_form(state_dict: object) -> None:
    """Raise unless it has the form of a state dict of torch.optim; what stands in it is checked later."""
    entry = state_dict if isinstance(state_dict, Mapping) else {}
    states, groups = entry.get("state"), entry.get("param_groups")
    if not isinstance(states, Mapping):
        found = "no dict of states under 'state'"
    elif not isinstance(groups, (list, tuple)) or not all(isinstance(group, Mapping) for group in groups):
        found = "no list of groups under 'param_groups'"
    elif not all(isinstance(group.get("params"), (list, tuple)) for group in groups):
        found = "a group without a list of 'params'"
    elif any(len(names) != len(group["params"]) for group in groups if (names := _names(group)) is not None):
        found = "a group with other 'param_names' than 'params'"
    elif not all(isinstance(state, Mapping) for state in _own(entry).values()):
        found = "no dict of states under 'state'"
    else:
        return
    raise problem(
        "load_state_dict", found=found, needed="torch.optim's form is needed", cure="pass what state_dict() returned"
    )


def _names(group: Mapping[str, Any]) -> Sequence[str] | None:
    names = group.get("param_names")
    return names if isinstance(names, (list, tuple)) else None if names is None else ()


def routed(state_dict: dict[str, Any], current: Sequence[Mapping[str, Any]], on_route_change: str) -> dict[str, Any]:
    """`state_dict` itself, or with "reset" as `rerouted`."""
    one_of("on_route_change", on_route_change, ("raise", "reset"))
    return rerouted(state_dict, current) if on_route_change == "reset" else state_dict


def rerouted(state_dict: Mapping[str, Any], current: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`state_dict` by name, as an optimizer with the groups `current` would have saved it.

    A parameter under another rule keeps its master and loses its state. A group takes the hyperparameters of the saved
    group of its rule that holds the first of its parameters to be found; where none is, it keeps its own.
    """
    home = {name: (group, key) for group in state_dict["param_groups"] for name, key in _named(group)}
    states: dict[Any, Any] = {}
    groups: list[dict[str, Any]] = []
    for ours in current:
        numbers = list(range(len(states), len(states) + len(ours["param_names"])))
        kin = [home[n][0] for n in ours["param_names"] if n in home and home[n][0]["rule"] == ours["rule"]]
        groups.append({**ours, **(kin[0] if kin else {}), "params": numbers, "param_names": ours["param_names"]})
        for number, name in zip(numbers, ours["param_names"]):
            group, key = home.get(name, ({"rule": None}, None))
            state = state_dict["state"].get(key, {})
            kept = state if group["rule"] == ours["rule"] else {k: v for k, v in state.items() if k == "master"}
            states[number] = kept
    return {"state": {**states, **entries_beside(state_dict)}, "param_groups": groups}


def _named(group: Mapping[str, Any]) -> list[tuple[str, Any]]:
    if not group.get("param_names") or "rule" not in group:
        raise problem(
            "load_state_dict",
            found="the state's groups have no param_names and rules",
            needed='on_route_change="reset" needs them',
            cure="pass what a DistMuon saved",
        )
    return list(zip(group["param_names"], group["params"]))


def is_empty(state_dict: Mapping[str, Any]) -> bool:
    """Nothing to load: it was saved before the first step. Raises for a flattened form that torch could not restore."""
    states = _own(state_dict)
    if any(state.keys() & _KEPT for state in states.values()):
        return False
    if any(isinstance(key, str) for key in states):
        raise problem(
            "load_state_dict",
            found="the state of every parameter is empty (torch unflattens what it finds in "
            "optimizer.state, and leaves an optimizer without state as it is while there are gradients)",
            needed="an optimizer that has its state is needed",
            cure="call optimizer.zero_grad() before set_optimizer_state_dict",
        )
    return True


def _shard_of(bucket: BucketStorage, key: str, device: torch.device) -> Tensor | None:
    """This rank's shard of `key`, zeros where no piece has it; None for a master that is the parameter itself."""
    if key == "master":
        return bucket.decoded_masters() if bucket.has_master else None
    if key != "momentum_buffer":
        shard = torch.zeros(bucket.spec.shard_size, dtype=torch.float32, device=device)
        for piece in bucket.adamw:
            piece.cut(shard).copy_(piece.state[key])
        return shard
    shard = torch.zeros(bucket.spec.shard_size, dtype=bucket.momentum.decoded, device=device)
    for piece in bucket.muon:
        piece.cut(shard).copy_(bucket.momentum.decode(piece.state))
    return shard


def _assemble(storage: Storage, index: int, flat: Tensor) -> Tensor:
    shard_size = storage.buckets[storage.layout.bucket_of[index]].spec.shard_size
    parts = []
    for segment in storage.layout.segments_of[index]:
        start = segment.rank * shard_size + segment.shard_offset
        parts.append(flat[start : start + segment.length].cpu())
    return torch.cat(parts).view(storage.layout.specs[index].shape)
