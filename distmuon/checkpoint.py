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

from distmuon.buffers import BucketBuffers, Buffers, ShardPiece
from distmuon.collectives import DataParallelGroup
from distmuon.config import check_groups
from distmuon.errors import problem


def gather_full_state(buffers: Buffers, group: DataParallelGroup) -> list[dict[str, Tensor]]:
    """Per parameter its whole state on the CPU, on every rank. Collective; a bucket at a time.

    Keys: ``momentum_buffer`` (muon); ``exp_avg``, ``exp_avg_sq``, ``step`` (adamw); ``master`` where the master is not
    the parameter itself.
    """
    full: list[dict[str, Tensor]] = [{} for _ in buffers.params]
    steps = torch.zeros(len(full), dtype=torch.float32, device=buffers.params[0].device)
    for bucket in buffers.buckets:
        for key in ("momentum_buffer", "exp_avg", "exp_avg_sq", "master"):
            if key != "master" and not any(key in _keys(buffers, index) for index in bucket.bucket.params):
                continue
            shard = _shard_of(bucket, key, buffers.options.momentum_dtype)
            if shard is None:
                continue
            flat = shard.new_empty(group.dp_size * shard.numel())
            group.start_all_gather(flat, shard, stage="state_dict").wait()
            for index in bucket.bucket.params:
                if key == "master" or key in _keys(buffers, index):
                    full[index][key] = _assemble(buffers, index, flat)
        for piece in bucket.adamw:
            if piece.segment.param_offset == 0:
                steps[piece.segment.param] = piece.state["step"]
    group.start_all_reduce(steps, stage="state_dict").wait()
    for index, state in enumerate(full):
        if "step" in _keys(buffers, index):
            state["step"] = steps[index].cpu()
    return full


def full_state_dict(
    buffers: Buffers,
    group: DataParallelGroup,
    param_groups: Sequence[Mapping[str, Any]],
    packed_groups: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """torch.optim's format. `packed_groups`: the groups with parameters as numbers."""
    full = gather_full_state(buffers, group)
    order = _torch_numbering(param_groups, buffers)
    return {"state": {number: full[index] for number, index in enumerate(order)}, "param_groups": packed_groups}


def load_full_state(
    buffers: Buffers, param_groups: Sequence[Mapping[str, Any]], states: Mapping[int, Mapping[str, Any]]
) -> None:
    """Take this rank's part of `states` (by torch.optim's numbers). Missing entries start from zero."""
    _check_states(buffers, param_groups, states)
    of_param = {index: states.get(number, {}) for number, index in enumerate(_torch_numbering(param_groups, buffers))}
    for bucket in buffers.buckets:
        with bucket.masters() as masters:
            for piece in bucket.muon + bucket.adamw:
                state = of_param[piece.segment.param]
                whole = {key: value for key, value in state.items() if key != "step"}
                mine = {key: _cut(buffers, piece.segment.param, key, value, piece) for key, value in whole.items()}
                if "momentum_buffer" in mine:
                    momentum = mine["momentum_buffer"].to(masters.device, torch.float32)
                    mine.update(piece.encoded(momentum))
                for key, own in piece.state.items():
                    if key == "step" and key in state:
                        own.fill_(float(state[key]))
                    elif key in mine:
                        own.copy_(mine[key])
                    else:
                        own.zero_()
                if "master" in mine:
                    piece.cut(masters).copy_(mine["master"])


def _check_states(
    buffers: Buffers, param_groups: Sequence[Mapping[str, Any]], states: Mapping[int, Mapping[str, Any]]
) -> None:
    """Raise for states that are not numbered as torch.optim does, or that lack what their parameter's rule needs."""
    order = _torch_numbering(param_groups, buffers)
    for number, state in states.items():
        if number not in range(len(order)):
            raise problem(
                "load_state_dict", f"the state has an entry {number!r}", f"numbers below {len(order)} are needed",
                "pass what state_dict() returned",
            )  # fmt: skip
        missing = [key for key in _keys(buffers, order[number]) if state and key not in state]
        if missing:
            raise problem(
                buffers.layout.specs[order[number]].fqn, f"its state has {sorted(state)}, not {missing}",
                "the state of the same rule is needed", "make the optimizer with the routes it was saved with",
            )  # fmt: skip


def _torch_numbering(param_groups: Sequence[Mapping[str, Any]], buffers: Buffers) -> list[int]:
    """torch.optim numbers parameters group by group: per number, the index in the layout."""
    index = {id(param): i for i, param in enumerate(buffers.params)}
    return [index[id(param)] for group in param_groups for param in group["params"]]


def load_groups(saved: Sequence[Mapping[str, Any]], current: Sequence[dict[str, Any]]) -> None:
    """Take over the hyperparameters of `saved`. Raises, before anything is changed, unless it has the groups of
    `current`, the same rules and parameters in the same order, with legal values."""
    if len(saved) != len(current):
        raise problem(
            "load_state_dict", f"the state has {len(saved)} param groups, this optimizer has {len(current)}",
            "the same routing is needed", "make the optimizer with the routes it was saved with",
        )  # fmt: skip
    for theirs, ours in zip(saved, current):
        names, own_names = theirs.get("param_names"), ours["param_names"]
        if theirs.get("rule", ours["rule"]) != ours["rule"] or len(theirs["params"]) != len(ours["params"]):
            found = f"{len(theirs['params'])} parameters under {theirs.get('rule')!r}"
            raise problem(
                "load_state_dict", f"a group of the state has {found}, here {len(own_names)} under {ours['rule']!r}",
                "the same routing is needed", "make the optimizer with the routes it was saved with",
            )  # fmt: skip
        for name, own in zip(names or own_names, own_names):
            if name != own:
                raise problem(
                    "load_state_dict", f"the state has {name!r} where this optimizer has {own!r}",
                    "the same parameters in the same order are needed", "load it into the model it was saved from",
                )  # fmt: skip
    taken = [{k: deepcopy(v) for k, v in group.items() if k not in ("params", "param_names")} for group in saved]
    check_groups([{**ours, **theirs} for ours, theirs in zip(current, taken)])
    for ours, theirs in zip(current, taken):
        ours.update(theirs)


def _keys(buffers: Buffers, index: int) -> tuple[str, ...]:
    return ("momentum_buffer",) if buffers.layout.specs[index].rule == "muon" else ("exp_avg", "exp_avg_sq", "step")


def _shard_of(bucket: BucketBuffers, key: str, momentum_dtype: torch.dtype) -> Tensor | None:
    """This rank's shard of `key`, zeros where no piece has it; None for a master that is the parameter itself."""
    if key == "master":
        with bucket.masters() as masters:
            return masters if bucket.has_master else None
    kept = momentum_dtype if key == "momentum_buffer" and momentum_dtype != torch.int8 else torch.float32
    shard = torch.zeros_like(bucket.param_shard, dtype=kept)
    for piece in bucket.muon if key == "momentum_buffer" else bucket.adamw:
        piece.cut(shard).copy_(piece.momentum() if key == "momentum_buffer" else piece.state[key])
    return shard


def _assemble(buffers: Buffers, index: int, flat: Tensor) -> Tensor:
    shard_size = buffers.buckets[buffers.layout.bucket_of[index]].bucket.shard_size
    parts = []
    for segment in buffers.layout.segments_of[index]:
        start = segment.rank * shard_size + segment.shard_offset
        parts.append(flat[start : start + segment.length].cpu())
    return torch.cat(parts).view(buffers.layout.specs[index].shape)


def _cut(buffers: Buffers, index: int, key: str, whole: Tensor, piece: ShardPiece) -> Tensor:
    spec = buffers.layout.specs[index]
    if tuple(whole.shape) != spec.shape:
        raise problem(
            f"{spec.fqn}.{key}", f"the state has shape {tuple(whole.shape)}", f"{spec.shape} is needed",
            "load it into the model it was saved from",
        )  # fmt: skip
    start = piece.segment.param_offset
    return whole.reshape(-1)[start : start + piece.segment.length]
