"""Conversion of state to and from torch.optim.Muon with torch.optim.AdamW: a run may leave distmuon and come back.

This module decides how torch.optim spells the state that distmuon holds; it knows no file and no shard. Values are the
same: momentum is torch.optim.Muon's moving average. Weights are converted separately, as the model's state dict
(`model.safetensors`). torch.optim has no place for the float32 master of a bfloat16 weight: to keep it, make the torch
model float32 from `full_state_dict`'s masters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from distmuon.errors import names, problem
from distmuon.math.coefficients import coefficient_schedule
from distmuon.optimizer import DistMuon
from distmuon.options import CAUTIOUS, NORMUON
from distmuon.step.storage import ROW_MOMENT

_MUON = ("lr", "weight_decay", "momentum", "nesterov", "ns_steps", "adjust_lr_fn")
_ADAMW = ("lr", "weight_decay", "betas", "eps")


def to_torch_optim(optimizer: DistMuon) -> tuple[dict[str, Any], dict[str, Any]]:
    """Full state dicts for (torch.optim.Muon, torch.optim.AdamW), on every rank. Collective.

    Make the two optimizers with the parameters and groups of `optimizer.param_groups` of their rule, in the same order
    (both dicts hold ``param_names``). Raises `ValueError` for parameters that torch.optim.Muon would train differently
    (stacks, convolutions and fused weights, which distmuon cuts into matrices), for coefficients that change between
    iterations, for cautious weight decay, and for NorMuon.
    """
    different = [s.fqn for s in optimizer.layout.specs if s.rule == "muon" and not _is_plain(s)]
    if different:
        raise problem(
            names(different),
            found="of several logical matrices or of more than 2 dimensions",
            needed="torch.optim.Muon takes a 2-D parameter as one matrix",
            cure='route these parameters to AdamW: Route(name, "adamw")',
        )
    state = optimizer.full_state_dict()
    muon = [_to_torch(group, state) for group in state["param_groups"] if group["rule"] == "muon"]
    adamw = [_to_torch(group, state) for group in state["param_groups"] if group["rule"] == "adamw"]
    return _numbered(muon), _numbered(adamw)


def from_torch_optim(
    optimizer: DistMuon, muon: Mapping[str, Any] | None, adamw: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Make the dict that `optimizer.load_state_dict` takes from torch.optim's state dicts (None: no such optimizer).

    Parameters are matched by the groups' ``param_names``. If torch's groups have no names, they are matched by order,
    which must be that of `optimizer.param_groups` of the same rule. Load the weights into the model first.
    Raises `ValueError` naming parameters that are missing, or whose group is split over several of torch's groups.
    """
    packed = torch.optim.Optimizer.state_dict(optimizer)["param_groups"]
    states: dict[int, Mapping[str, Any]] = {}
    for rule, torch_state, keys in (("muon", muon, _MUON), ("adamw", adamw, _ADAMW)):
        groups = [group for group in packed if group["rule"] == rule]
        found = _by_name(torch_state, [name for group in groups for name in group["param_names"]])
        for group in groups:
            missing = [name for name in group["param_names"] if name not in found]
            sources = [found[name][0] for name in group["param_names"] if name in found]
            if missing or any(source is not sources[0] for source in sources):
                text = names(missing or group["param_names"])
                raise problem(
                    text,
                    found=f"not in one group of torch.optim's {rule} state",
                    needed="parameters of one group must be together",
                    cure="give both optimizers the same groups",
                )
            group.update({key: sources[0][key] for key in keys})
            if rule == "muon":
                group["ns_coefficients"] = sources[0]["ns_coefficients"]
                group["adjust_lr_fn"] = sources[0]["adjust_lr_fn"] or "original"
            for number, name in zip(group["params"], group["param_names"]):
                states[number] = found[name][1]
    return {"state": states, "param_groups": packed}


def _is_plain(spec: Any) -> bool:
    return len(spec.shape) == 2 and len(spec.matrices) == 1 and not spec.matrices[0].column_split


def _to_torch(group: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[dict[str, Any], list[Mapping[str, Any]]]:
    """A group under torch.optim's keys, and the states of its parameters."""
    if group.get(CAUTIOUS, False):
        raise problem(
            CAUTIOUS,
            found=f"found True for {names(group['param_names'])}",
            needed="torch.optim decays all weights",
            cure=f'set group["{CAUTIOUS}"] = False first, if plain decay is meant from here on',
        )
    if group.get(NORMUON) is not None:
        raise problem(
            NORMUON,
            found=f"found {group[NORMUON]} for {names(group['param_names'])}",
            needed="torch.optim.Muon does not normalize rows",
            cure=f'set group["{NORMUON}"] = None first, if plain Muon is meant from here on',
        )
    muon = group["rule"] == "muon"
    found: dict[str, Any] = {key: group[key] for key in (_MUON if muon else _ADAMW)}
    found["param_names"] = list(group["param_names"])
    if muon:
        triples = set(coefficient_schedule(group["ns_coefficients"], group["ns_steps"]))
        if len(triples) > 1:
            raise problem(
                "ns_coefficients",
                found=f"{len(triples)} triples in {group['ns_steps']} steps",
                needed="torch.optim.Muon takes one triple for all steps",
                cure='continue with "jordan" or with a single triple',
            )
        found.update(ns_coefficients=triples.pop(), eps=1e-7)
    else:
        found.update(amsgrad=False, maximize=False, foreach=None, capturable=False, differentiable=False, fused=None)
        found["decoupled_weight_decay"] = True
    states = [state["state"].get(number, {}) for number in group["params"]]
    unknown_keys = ("master", "step", ROW_MOMENT) if muon else ("master",)
    return found, [{key: value for key, value in entry.items() if key not in unknown_keys} for entry in states]


def _numbered(groups: Sequence[tuple[dict[str, Any], list[Mapping[str, Any]]]]) -> dict[str, Any]:
    states: dict[int, Mapping[str, Any]] = {}
    for group, entries in groups:
        group["params"] = list(range(len(states), len(states) + len(entries)))
        states.update(zip(group["params"], entries))
    return {"state": {n: state for n, state in states.items() if state}, "param_groups": [g for g, _ in groups]}


def _by_name(state: Mapping[str, Any] | None, order: Sequence[str]) -> dict[str, tuple[Any, Mapping[str, Any]]]:
    """{fqn: (its group, its state)}; `order` gives the fqns of groups without names."""
    found: dict[str, tuple[Any, Mapping[str, Any]]] = {}
    for group in state["param_groups"] if state is not None else []:
        assert state is not None
        fqns = group.get("param_names") or order[len(found) : len(found) + len(group["params"])]
        for name, number in zip(fqns, group["params"]):
            found[name] = (group, state["state"].get(number, {}))
    return found
