"""What `optimizer.state` shows: this rank's part of every parameter's state, as torch.optim's users look for it.

Decides nothing about training. The entries are views of the buffers, so what is written into them counts, and what
measures them measures this rank's bytes. A parameter of which nothing lies here has its keys with empty tensors:
torch's `set_optimizer_state_dict` reads the keys, on every rank.

[Note: what users write into state] Beside our keys an entry may hold others (a wrapper's slow weights), and `state`
may hold other entries than parameters'. They are this rank's own, go into `state_dict` and come back from it as in
torch.optim. Our own keys may be exchanged for tensors that fit (a state that was moved away and back), and a
parameter's entry may be taken out, which ends its momentum and moments as in torch.optim: `take_back` writes both into
the buffers.
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
from distmuon.step.storage import BucketStorage, ShardPiece, Storage


class LocalState:
    """By parameter, the entries that `optimizer.state` shows.

    (length,) where this rank holds a part, in order; the parameter's shape where it holds all of it in one run. In the
    format in which they are kept: int8 momentum without its scales, 16-bit remainders of masters.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._homes: list[list[tuple[BucketStorage, ShardPiece]]] = [[] for _ in storage.params]
        for bucket in storage.buckets:
            for piece in sorted(bucket.muon + bucket.adamw, key=lambda piece: piece.segment.param_offset):
                self._homes[piece.segment.param].append((bucket, piece))
        self._shown = [self._entry(index) for index in range(len(storage.params))]
        self._tensors = [tensor for entry in self._shown for tensor in entry.values()]
        self._placed: list[dict[str, Any]] = []  # the dicts that stand in `optimizer.state`

    def show(self, state: MutableMapping[Any, Any]) -> None:
        """Put all entries into `state`, beside what stands there."""
        self._put(state, self.extra_of(state))

    def extra_of(self, state: Mapping[Any, Any]) -> list[dict[str, Any]]:
        """By parameter, what users have put into its entry of `state`."""
        return [_extra(state.get(param), entry) for param, entry in zip(self._storage.params, self._shown)]

    def load_extra(self, state: MutableMapping[Any, Any], of_param: Mapping[int, Mapping[str, Any]]) -> None:
        """Put `of_param`, by parameter, in the place of what users have put into the entries of `state`."""
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
                if key != "step" and self._pieces_of(index, value) is None:
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
        """Write into the buffers what stands in `state` instead of their views; see the note above.

        Raises, before anything is written, for what does not fit. Every step asks, so where all is as it was nothing
        but pointers is compared, without a hash of any parameter.
        """
        if self._is_as_placed(state):
            return
        changed = [index for index, entry in enumerate(self._shown) if not self._is_shown(index, entry, state)]
        given = {index: self._given(index, state.get(self._storage.params[index])) for index in changed}
        for index, own in given.items():
            self._check(index, own)
        with torch.no_grad():
            for index, own in given.items():
                self._write(index, own)
        if changed:
            self.show(state)

    def _put(self, state: MutableMapping[Any, Any], extras: Sequence[Mapping[str, Any]]) -> None:
        self._placed = [{**entry, **extra} for entry, extra in zip(self._shown, extras)]
        state.update(zip(self._storage.params, self._placed))

    def _is_as_placed(self, state: Mapping[Any, Any]) -> bool:
        """May say no where users have added something, or in another order."""
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
        if not homes:
            keys = [*known, *["master"] * has_master]
            return {key: torch.empty(0, device=self._storage.device) for key in keys}
        entry: dict[str, Any] = {}
        for key in known:
            views = [piece.state[key] for _, piece in homes]
            entry[key] = bucket.shown(index, views) if key != "step" else views[0]
        if has_master:
            entry["master"] = bucket.shown(index, [kept for b, p in homes if (kept := b.kept_of(p)) is not None])
        return entry

    def _bucket(self, index: int) -> BucketStorage:
        return self._storage.buckets[self._storage.layout.bucket_of[index]]

    def _given(self, index: int, entry: object) -> dict[str, Any]:
        """What `entry` has under our keys."""
        return {k: v for k, v in entry.items() if k in self._shown[index]} if isinstance(entry, Mapping) else {}

    def _check(self, index: int, given: Mapping[str, Any]) -> None:
        for key, own in self._shown[index].items() if given else ():  # an entry without any was taken out
            value = given.get(key)
            if value is own or (key == "step" and is_number(value)):
                continue
            if not isinstance(value, Tensor) or (key != "step" and self._pieces_of(index, value) is None):
                found = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else repr(value)
                raise problem(
                    f"optimizer.state[{self._storage.layout.specs[index].fqn}][{key!r}]",
                    found=f"found {found:.80} in place of distmuon's own tensor",
                    needed="a tensor of its shape or of the parameter's is needed",
                    cure="write into the tensor that stands there (copy_, zero_), or use load_state_dict",
                )

    def _write(self, index: int, given: Mapping[str, Any]) -> None:
        """The entry `given`, which fits, into this rank's pieces; {}: zeros, but masters stay."""
        for key, own in self._shown[index].items():
            value = given.get(key)
            if value is own or (value is None and key == "master"):
                continue
            if key == "step":
                for _, piece in self._homes[index]:
                    piece.state["step"].fill_(float(value or 0))
                continue
            parts = self._pieces_of(index, value) if value is not None else None
            for number, (bucket, piece) in enumerate(self._homes[index]):
                _write_piece(bucket, piece, key, parts[number] if parts is not None else None)

    def _pieces_of(self, index: int, value: Tensor) -> list[Tensor] | None:
        """`value` cut as this rank's pieces are, if it is as long as they are together, or whole."""
        plain = self._bucket(index).as_shown(index, value)
        if plain is None:
            return None
        segments = [piece.segment for _, piece in self._homes[index]]
        elements, lengths = plain.reshape(-1), [segment.length for segment in segments]
        if tuple(plain.shape) == self._storage.layout.specs[index].shape:
            return [elements[s.param_offset : s.param_offset + s.length] for s in segments]
        if elements.numel() != sum(lengths):
            return None
        return list(torch.split(elements, lengths)) if lengths else []


def _extra(given: object, entry: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in given.items() if k not in entry} if isinstance(given, Mapping) else {}


def _write_piece(bucket: BucketStorage, piece: ShardPiece, key: str, value: Tensor | None) -> None:
    """`value` (length,), any dtype, any device, or zeros for None, into this piece's `key`."""
    if key == "master":
        assert value is not None
        kept = bucket.kept_of(piece)
        if kept is not None and value.dtype == torch.int16:  # remainders, as they are shown
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
