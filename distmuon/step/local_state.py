"""The contents of `optimizer.state`: this rank's part of every parameter's state, under torch.optim's keys.

This module decides nothing about training, and it knows no collective. The entries are views of the buffers, so writing
into them changes the state, and their size is that of this rank's state. A parameter without elements on this rank has
the keys with empty tensors: torch's `set_optimizer_state_dict` reads the keys on every rank.

[Note: user entries in state] An entry may hold additional keys (a wrapper's slow weights), and `state` may hold entries
of other objects than parameters. They belong to this rank, and are saved and loaded by `state_dict` as in torch.optim.
The user may replace tensors under distmuon's keys by tensors that fit (state that was moved away and back), or remove a
parameter's entry, which resets its momentum and moments as in torch.optim: `take_back` writes both to the buffers.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor

from distmuon.errors import problem
from distmuon.options import is_number
from distmuon.step.storage import ROW_MOMENT, BucketStorage, ShardPiece, Storage, elements_of


class LocalState:
    """The entries that `optimizer.state` shows for each parameter.

    Tensors are (length,) if this rank holds a part of the parameter, and have the parameter's shape if it holds all of
    it contiguously. They have the format of the buffers: int8 momentum without scales, 16-bit remainders of masters.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._homes: list[list[tuple[BucketStorage, ShardPiece]]] = [[] for _ in storage.params]
        for bucket in storage.buckets:
            for piece in sorted(bucket.muon + bucket.adamw, key=_place):
                self._homes[piece.segment.param].append((bucket, piece))
        self._shown = [self._entry(index) for index in range(len(storage.params))]
        self._tensors = [tensor for entry in self._shown for tensor in entry.values()]
        self._placed: list[dict[str, Any]] = []  # the dicts in `optimizer.state`

    def show(self, state: MutableMapping[Any, Any]) -> None:
        """Put all entries into `state`, and keep the user's keys."""
        self._put(state, self.extra_of(state))

    def extra_of(self, state: Mapping[Any, Any]) -> list[dict[str, Any]]:
        """The user's keys in the entry of each parameter in `state`."""
        return [_extra(state.get(param), entry) for param, entry in zip(self._storage.params, self._shown)]

    def load_extra(self, state: MutableMapping[Any, Any], of_param: Mapping[int, Mapping[str, Any]]) -> None:
        """Replace the user's keys in the entries of `state` by those in `of_param`."""
        extras = [of_param.get(index, {}) for index in range(len(self._shown))]
        device = self._storage.device
        self._put(
            state, [{k: v.to(device) if isinstance(v, Tensor) else v for k, v in extra.items()} for extra in extras]
        )

    def load(self, of_param: Mapping[int, Mapping[str, Any]]) -> None:
        """Write `of_param`, by parameter, into this rank's pieces: each value whole, or in the form that is shown.

        Missing entries start from zero, but masters stay. Raises, before anything is written, for what does not fit.
        """
        for index, entry in of_param.items():
            for key, value in entry.items():
                if key != "step" and not self._fits(index, key, value):
                    raise problem(
                        f"{self._storage.layout.specs[index].fqn}.{key}",
                        found=f"the state is a {type(value).__name__} of shape {tuple(value.shape)}, cut otherwise",
                        needed="a DTensor with the parameter's mesh and placement, or the whole tensor, is needed",
                        cure="load it by torch.distributed.checkpoint into what get_optimizer_state_dict returns",
                    )
        with torch.no_grad():
            for index in range(len(self._shown)):
                entry = of_param.get(index, {})
                self._write(index, entry)
                parts = self._pieces_of(index, entry["master"]) if "master" in entry else None
                for (bucket, piece), part in zip(self._homes[index], parts or ()):
                    if not bucket.has_master:
                        bucket.write_master(piece, part)

    def take_back(self, state: MutableMapping[Any, Any]) -> None:
        """Write tensors that replace views in `state` to the buffers; see [Note: user entries in state].

        Raises, before anything is written, for tensors that do not fit. Every step calls this, so unchanged entries are
        recognized by comparing pointers only, without hashing parameters.
        """
        if self._is_as_placed(state):
            return
        changed = [index for index, entry in enumerate(self._shown) if not self._is_shown(index, entry, state)]
        given = {index: self._given(index, state.get(self._storage.params[index])) for index in changed}
        for index, entry in given.items():
            self._check(index, entry)
        with torch.no_grad():
            for index, entry in given.items():
                self._write(index, entry)
        if changed:
            self.show(state)

    def _put(self, state: MutableMapping[Any, Any], extras: Sequence[Mapping[str, Any]]) -> None:
        self._placed = [{**entry, **extra} for entry, extra in zip(self._shown, extras)]
        state.update(zip(self._storage.params, self._placed))

    def _is_as_placed(self, state: Mapping[Any, Any]) -> bool:
        """Whether `state` is as placed; may be False although only the user's keys or the order have changed."""
        if len(state) < len(self._placed) or not all(map(is_, state.values(), self._placed)):
            return False
        values = chain.from_iterable(map(dict.values, self._placed))
        return sum(map(len, self._placed)) == len(self._tensors) and all(map(is_, values, self._tensors))

    def _is_shown(self, index: int, entry: dict[str, Any], state: Mapping[Any, Any]) -> bool:
        given = state.get(self._storage.params[index])
        if not isinstance(given, dict) or len(given) < len(entry):
            return False
        if len(given) == len(entry) and all(map(is_, given.values(), entry.values())):
            return True
        return all(given.get(key) is value for key, value in entry.items())

    def _entry(self, index: int) -> dict[str, Any]:
        homes, known, bucket = self._homes[index], self._storage.keys_of(index), self._bucket(index)
        has_master = bucket.has_master
        entry: dict[str, Any] = {}
        for key in known:
            views = [piece.state[key] for _, piece in homes if key in piece.state]
            if key == ROW_MOMENT:
                entry[key] = self._storage.row_moments[index]
            elif not views:
                entry[key] = torch.empty(0, device=self._storage.device)
            else:
                entry[key] = bucket.shown(index, views) if key != "step" else views[0]
        if has_master and not homes:
            entry["master"] = torch.empty(0, device=self._storage.device)
        elif has_master:
            entry["master"] = bucket.shown(index, [kept for b, p in homes if (kept := b.kept_of(p)) is not None])
        return entry

    def _bucket(self, index: int) -> BucketStorage:
        return self._storage.buckets[self._storage.layout.bucket_of[index]]

    def _given(self, index: int, entry: object) -> dict[str, Any]:
        """The items of `entry` under distmuon's keys."""
        return {k: v for k, v in entry.items() if k in self._shown[index]} if isinstance(entry, Mapping) else {}

    def _check(self, index: int, given: Mapping[str, Any]) -> None:
        for key, shown in self._shown[index].items() if given else ():  # an empty entry was removed by the user
            value = given.get(key)
            if value is shown or (key == "step" and is_number(value)):
                continue
            if not isinstance(value, Tensor) or (key != "step" and not self._fits(index, key, value)):
                found = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else repr(value)
                raise problem(
                    f"optimizer.state[{self._storage.layout.specs[index].fqn}][{key!r}]",
                    found=f"found {found:.80} in place of distmuon's tensor",
                    needed="a tensor of its shape or of the parameter's shape is needed",
                    cure="write into the existing tensor (copy_, zero_), or use load_state_dict",
                )

    def _write(self, index: int, given: Mapping[str, Any]) -> None:
        """Write the entry `given`, which fits, to this rank's pieces; {} resets all but masters."""
        for key, shown in self._shown[index].items():
            value = given.get(key)
            if value is shown or (value is None and key == "master"):
                continue
            if key == "step":
                for _, piece in self._homes[index]:
                    piece.state["step"].fill_(float(value or 0))
                continue
            if key == ROW_MOMENT:
                self._storage.row_moments[index].copy_(torch.zeros(()) if value is None else value)
                continue
            parts = self._pieces_of(index, value) if value is not None else None
            for number, (bucket, piece) in enumerate(self._homes[index]):
                _write_piece(bucket, piece, key, parts[number] if parts is not None else None)

    def _fits(self, index: int, key: str, value: Tensor) -> bool:
        if key == ROW_MOMENT:
            moment = self._storage.row_moments.get(index)
            return moment is None or value.shape == moment.shape
        return self._pieces_of(index, value) is not None

    def _pieces_of(self, index: int, value: Tensor) -> list[Tensor] | None:
        """Cut `value` into this rank's pieces, if it has their total length or the parameter's shape; else None."""
        plain = self._bucket(index).as_shown(index, value)
        if plain is None:
            return None
        segments = [piece.segment for _, piece in self._homes[index]]
        elements, lengths = plain.reshape(-1), [segment.length for segment in segments]
        if tuple(plain.shape) == self._storage.layout.specs[index].shape:
            return [elements_of(elements, s).reshape(-1) for s in segments]
        if elements.numel() != sum(lengths):
            return None
        return list(torch.split(elements, lengths)) if lengths else []


def _place(piece: ShardPiece) -> tuple[int, int]:
    """The sort key of pieces: by parameter, in the order of its elements."""
    return piece.segment.param, piece.segment.param_offset


def _extra(given: object, entry: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in given.items() if k not in entry} if isinstance(given, Mapping) else {}


def _write_piece(bucket: BucketStorage, piece: ShardPiece, key: str, value: Tensor | None) -> None:
    """Write `value`, (length,) of any dtype and device (None: zeros), to the piece's `key`."""
    if key == "master":
        assert value is not None
        kept = bucket.kept_of(piece)
        if kept is not None and value.dtype == torch.int16:  # remainders, as `optimizer.state` shows them
            kept.copy_(value)
        else:
            bucket.write_master(piece, value)
    elif key == "momentum_buffer" and (value is None or value.is_floating_point()):
        device = piece.state[key].device
        momentum = torch.zeros(piece.segment.length) if value is None else value
        momentum = momentum.to(device, torch.float32)
        for name, encoded in bucket.momentum.encode(momentum).items():
            piece.state[name].copy_(encoded)
    elif value is None:
        piece.state[key].zero_()
    else:
        piece.state[key].copy_(value)
