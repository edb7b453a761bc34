"""Conversion between shard state and the plain full state: for each parameter a dict of whole tensors.

This module decides the format of a state dict, which is torch.optim's:
``{"state": {number: {...}}, "param_groups": [...]}``. It knows no file. Nothing in a state dict depends on dp_size,
packing or buckets, so it loads at any of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from distmuon.comm.group import DataParallelGroup
from distmuon.errors import problem
from distmuon.options import NORMUON, check_groups, is_number, one_of
from distmuon.step.storage import ROW_MOMENT, UNCUT, BucketStorage, Storage, elements_of

# Keys of torch.optim's Muon and AdamW and of distmuon; all other keys of a parameter's state belong to the user.
_KEPT = frozenset({"momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step", "master", ROW_MOMENT})


def gather_full_state(
    storage: Storage, groups: Sequence[DataParallelGroup], keep: bool = True
) -> list[dict[str, Tensor]]:
    """Gather the full state of each parameter, on the CPU of every rank with `keep`. Collective; a bucket at a time.

    `groups`: the process groups that parameters are cut over, by `ParamSpec.group`.
    Keys: ``momentum_buffer`` (muon), and ``step`` if momentum has fewer than 32 bits; ``exp_avg``, ``exp_avg_sq``,
    ``step`` (adamw); ``master`` if the master is not the parameter itself; ``row_exp_avg_sq``, (rows,), with NorMuon.
    """
    full: list[dict[str, Tensor]] = [{} for _ in storage.params]
    for bucket in storage.buckets:
        group = groups[bucket.spec.group]
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
    steps = _gather_steps(storage, groups)
    for index, state in enumerate(full):
        if "step" in storage.keys_of(index):
            state["step"] = steps[index].cpu()
        if keep and index in storage.row_moments:
            state[ROW_MOMENT] = storage.row_moments[index].to("cpu", copy=True)
    return full


def _gather_steps(storage: Storage, groups: Sequence[DataParallelGroup]) -> Tensor:
    """``step`` of each parameter, (parameters,) float32. Collective."""
    steps = torch.zeros(len(storage.params), dtype=torch.float32, device=storage.params[0].device)
    for bucket in storage.buckets:
        for piece in bucket.muon + bucket.adamw:
            if piece.segment.param_offset == piece.segment.replica == 0 and "step" in piece.state:
                steps[piece.segment.param] = piece.state["step"]
    for number, group in enumerate(groups):
        members = storage.layout.members(number)
        steps[members] = group.start_all_reduce(steps[members], stage="state_dict").wait()
    return steps


def numbered(
    storage: Storage, param_groups: Sequence[Mapping[str, Any]], by_param: Sequence[Mapping[str, Any]]
) -> dict[int, dict[str, Any]]:
    """Convert a list by parameter to a dict under the numbers that torch.optim gives parameters."""
    return {number: dict(by_param[index]) for number, index in enumerate(_torch_numbering(param_groups, storage))}


def states_of(
    storage: Storage, param_groups: Sequence[Mapping[str, Any]], state_dict: Mapping[str, Any]
) -> tuple[dict[int, Mapping[str, Any]], dict[int, dict[str, Any]]]:
    """The optimizer state of each parameter in `state_dict`, by layout index, and the user's entries beside it.

    Raises for states that `load_full_state` could not load. As in torch.optim, the key of a parameter's state is the
    entry of its group: a number, or the fqn that `torch.distributed.checkpoint.state_dict` writes.
    """
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    states = _by_number(_param_entries(state_dict), keys)
    order = _torch_numbering(param_groups, storage)
    by_param: dict[int, Mapping[str, Any]] = {}
    beside: dict[int, dict[str, Any]] = {}
    for number, state in states.items():
        index = order[number]
        by_param[index], beside[index] = _split_entry(state)
        _check_state(storage, index, by_param[index])
    return by_param, beside


def _split_entry(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(optimizer's entries, user's entries) of a parameter's state.

    Empty dicts are dropped: torch's unflattening leaves them for entries that it did not find.
    """
    found = {key: value for key, value in state.items() if not (isinstance(value, Mapping) and not value)}
    kept = {key: value for key, value in found.items() if key in _KEPT}
    return kept, {key: value for key, value in found.items() if key not in kept}


def entries_beside(state_dict: Mapping[str, Any]) -> dict[Any, Any]:
    """The entries of a state that belong to no parameter: a user's entries, whose keys have another type.

    An entry with momentum or moments belongs to a parameter, whatever its key: JSON turns numbers into strings.
    """
    keys = {key for group in state_dict["param_groups"] for key in group["params"]}
    kinds = (int, str) if any(isinstance(key, str) for key in keys) else (int,)
    found = {k: v for k, v in state_dict["state"].items() if k not in keys and not isinstance(k, kinds)}
    return {key: v for key, v in found.items() if not (isinstance(v, Mapping) and v.keys() & _KEPT)}


def _param_entries(state_dict: Mapping[str, Any]) -> dict[Any, Any]:
    """The entries of a state that belong to parameters, or should."""
    beside = entries_beside(state_dict)
    return {key: state for key, state in state_dict["state"].items() if key not in beside}


def load_full_state(storage: Storage, by_param: Mapping[int, Mapping[str, Any]]) -> None:
    """Load this rank's part of the states that `states_of` returned. Missing entries start from zero."""
    for bucket in storage.buckets:
        with bucket.masters() as masters:
            for piece in bucket.muon + bucket.adamw:
                state = by_param.get(piece.segment.param, {})
                full = {key: value for key, value in state.items() if key not in UNCUT}
                part = {key: elements_of(t.reshape(-1), piece.segment).reshape(-1) for key, t in full.items()}
                if "momentum_buffer" in part:
                    momentum = part["momentum_buffer"].to(storage.device, torch.float32)
                    part.update(storage.momentum.encode(momentum))
                for key, tensor in piece.state.items():
                    if key == "step" and key in state:
                        tensor.fill_(float(state[key]))
                    elif key in part:
                        tensor.copy_(part[key])
                    else:
                        tensor.zero_()
                if "master" in part:
                    masters(piece).copy_(part["master"])
    for index, moment in storage.row_moments.items():
        moment.copy_(by_param.get(index, {}).get(ROW_MOMENT, torch.zeros(())))


def _by_number(states: Mapping[Any, Mapping[str, Any]], keys: Sequence[Any]) -> dict[int, Mapping[str, Any]]:
    """Replace the keys of `states` by their positions in the saved groups."""
    numbers = {key: number for number, key in enumerate(keys)}
    for key in states:
        if key not in numbers:
            raise problem(
                "load_state_dict",
                found=f"the state has an entry {key!r}",
                needed=f"one of the {len(keys)} keys in its groups is needed",
                cure="pass what state_dict() returned",
            )
    return {numbers[key]: state for key, state in states.items()}


def _check_state(storage: Storage, index: int, state: Mapping[str, Any]) -> None:
    """Raise unless a state has exactly the entries that its parameter's rule needs, in tensors of its shape.

    The ``step`` of momentum is optional, since it depends on the momentum dtype of the save, and so are the
    moments of NorMuon, which then start from zero.
    """
    spec = storage.layout.specs[index]
    needed = set(storage.keys_of(index))
    optional = {"step", ROW_MOMENT} if "momentum_buffer" in state else set()
    if state.keys() - {"master"} - optional not in (set(), needed - optional):
        raise problem(
            spec.fqn,
            found=f"its state has {sorted(state)}, not {sorted(needed)}",
            needed="the state of the same rule is needed",
            cure="make the optimizer with the routes of the save",
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
                cure="pass the state as it was saved",
            )
        shape = spec.shape
        if key == "step":
            shape = (1,) * value.ndim  # older torch has steps of shape (1,)
        elif key == ROW_MOMENT:
            shape = (sum(unit.rows for unit in spec.matrices),)
        if tuple(value.shape) != shape:
            raise problem(
                f"{spec.fqn}.{key}",
                found=f"the state has shape {tuple(value.shape)}",
                needed=f"{shape} is needed",
                cure="load it into the model of the save",
            )
        if key == "step" and not 0 <= float(value) < float("inf"):
            raise problem(
                f"{spec.fqn}.step",
                found=f"found {float(value)}",
                needed="a count is needed",
                cure="pass the state as it was saved",
            )


def _torch_numbering(param_groups: Sequence[Mapping[str, Any]], storage: Storage) -> list[int]:
    """The layout index of each parameter, in the order in which torch.optim numbers them: group by group."""
    index = {id(param): i for i, param in enumerate(storage.params)}
    return [index[id(param)] for group in param_groups for param in group["params"]]


def load_groups(saved: Sequence[Mapping[str, Any]], current: Sequence[dict[str, Any]]) -> None:
    """Load the hyperparameters of `saved` into `current`.

    Raises, before anything is changed, unless `saved` has the same groups, rules and parameters in the same order, with
    legal values.
    """
    _check_routes(saved, current)
    if len(saved) != len(current):
        raise problem(
            "load_state_dict",
            found=f"the state has {len(saved)} param groups, this optimizer has {len(current)}",
            needed="the same routing is needed",
            cure="make the optimizer with the routes of the save",
        )
    for saved_group, group in zip(saved, current):
        names, expected_names = saved_group.get("param_names"), group["param_names"]
        rule = saved_group.get("rule", group["rule"])
        if rule != group["rule"] or len(saved_group["params"]) != len(group["params"]):
            found = f"{len(saved_group['params'])} parameters under {saved_group.get('rule')!r}"
            raise problem(
                "load_state_dict",
                found=f"a group of the state has {found}, here {len(expected_names)} under {group['rule']!r}",
                needed="the same routing is needed",
                cure="make the optimizer with the routes of the save",
            )
        for name, expected in zip(names or expected_names, expected_names):
            if name != expected:
                raise problem(
                    "load_state_dict",
                    found=f"the state has {name!r} where this optimizer has {expected!r}",
                    needed="the same parameters in the same order are needed",
                    cure="load it into the model of the save",
                )
    loaded = [{k: deepcopy(v) for k, v in group.items() if k not in ("params", "param_names")} for group in saved]
    for group, entries in zip(current, loaded):
        if entries.get(NORMUON) is not None and group.get(NORMUON) is None:
            raise problem(
                "load_state_dict",
                found=f"the state has {NORMUON} = {entries[NORMUON]}, this optimizer has none",
                needed="the same rule is needed",
                cure=f"pass {NORMUON}={entries[NORMUON]} to DistMuon",
            )
    check_groups([{**group, **entries} for group, entries in zip(current, loaded)])
    for group, entries in zip(current, loaded):
        group.update(entries)


def _check_routes(saved: Sequence[Mapping[str, Any]], current: Sequence[Mapping[str, Any]]) -> None:
    """Raise naming the parameters that have another rule in `saved`, if `saved` has names and rules."""
    before = {name: group.get("rule") for group in saved for name in group.get("param_names") or ()}
    now = {name: group["rule"] for group in current for name in group["param_names"]}
    changed = [f"{n} ({before[n]} -> {rule})" for n, rule in now.items() if before.get(n, rule) not in (rule, None)]
    if changed:
        raise problem(
            ", ".join(changed[:5]),
            found=f"{len(changed)} parameters have another rule than in the state",
            needed="the same routing is needed",
            cure='make the optimizer with the routes of the save, or pass on_route_change="reset"',
        )


def check_form(state_dict: object) -> None:
    """Raise unless `state_dict` has the form of torch.optim's state dicts; its values are checked later."""
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
    elif not all(isinstance(state, Mapping) for state in _param_entries(entry).values()):
        found = "no dict of states under 'state'"
    else:
        return
    raise problem(
        "load_state_dict", found=found, needed="torch.optim's form is needed", cure="pass what state_dict() returned"
    )


def _names(group: Mapping[str, Any]) -> Sequence[str] | None:
    names = group.get("param_names")
    if names is None or isinstance(names, (list, tuple)):
        return names
    return ()


def routed(state_dict: dict[str, Any], current: Sequence[Mapping[str, Any]], on_route_change: str) -> dict[str, Any]:
    """Return `state_dict`, or with "reset" its `rerouted` form."""
    one_of("on_route_change", on_route_change, ("raise", "reset"))
    return rerouted(state_dict, current) if on_route_change == "reset" else state_dict


def rerouted(state_dict: Mapping[str, Any], current: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Convert `state_dict`, by parameter names, to what an optimizer with the groups `current` would have saved.

    A parameter under another rule keeps its master and loses its state. A group gets the hyperparameters of the first
    saved group that has its rule and one of its parameters; without such a group its hyperparameters stay.
    """
    saved = {name: (group, key) for group in state_dict["param_groups"] for name, key in _named(group)}
    states: dict[Any, Any] = {}
    groups: list[dict[str, Any]] = []
    for group in current:
        numbers = list(range(len(states), len(states) + len(group["param_names"])))
        sources = [saved[n][0] for n in group["param_names"] if n in saved and saved[n][0]["rule"] == group["rule"]]
        source = sources[0] if sources else {}
        groups.append({**group, **source, "params": numbers, "param_names": group["param_names"]})
        for number, name in zip(numbers, group["param_names"]):
            saved_group, key = saved.get(name, ({"rule": None}, None))
            state = state_dict["state"].get(key, {})
            if saved_group["rule"] != group["rule"]:
                state = {k: v for k, v in state.items() if k == "master"}
            states[number] = state
    return {"state": {**states, **entries_beside(state_dict)}, "param_groups": groups}


def _named(group: Mapping[str, Any]) -> list[tuple[str, Any]]:
    if not group.get("param_names") or "rule" not in group:
        raise problem(
            "load_state_dict",
            found="the state's groups have no param_names and rules",
            needed='on_route_change="reset" needs them',
            cure="pass a state that a DistMuon saved",
        )
    return list(zip(group["param_names"], group["params"]))


def is_empty(state_dict: Mapping[str, Any]) -> bool:
    """Whether there is nothing to load, since the state was saved before the first step.

    Raises for a flattened form that torch could not restore.
    """
    states = _param_entries(state_dict)
    if any(state.keys() & _KEPT for state in states.values()):
        return False
    if any(isinstance(key, str) for key in states):
        raise problem(
            "load_state_dict",
            found="the state of every parameter is empty (torch unflattens the entries that optimizer.state has, and "
            "does not initialise the state of an optimizer while there are gradients)",
            needed="an optimizer with state is needed",
            cure="call optimizer.zero_grad() before set_optimizer_state_dict",
        )
    return True


def _shard_of(bucket: BucketStorage, key: str, device: torch.device) -> Tensor | None:
    """This rank's shard of `key`, with zeros where no piece has it; None if the master is the parameter itself."""
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
    spec = storage.layout.specs[index]
    whole = torch.empty(spec.numel, dtype=flat.dtype)
    for segment in storage.layout.segments_of[index]:
        start = segment.rank * shard_size + segment.shard_offset
        place = elements_of(whole, segment)
        place.copy_(flat[start : start + segment.length].view(place.shape))
    return whole.view(spec.shape)
