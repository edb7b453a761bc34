"""The exchange of matrix pieces: updates go to the ranks that orthogonalize them, stacked by shape, and results return.

This module sends the messages of `layout/messages.py`, which says what goes where. A matrix that lies whole on its
owner never travels; a bucket without straddlers makes no collective at all. The module knows no mathematics: it returns
what the caller put into the stacks.

      update pieces (shard) --start_gather--> stacks (B, m, n) on the workers
      pieces (shard)       <--start_scatter-- results (B, m, n)

[Note: second hop] What arrives at a relay is sent on. On a GPU both hops are queued when the exchange starts, on a
stream of their own (group.py, [Note: beside the current stream]). On a CPU the second one starts in `wait`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from distmuon.comm.group import DataParallelGroup, Pending
from distmuon.layout.layout import PlacedUnit, Segment
from distmuon.layout.messages import Message, Part, to_holders, to_workers
from distmuon.step.storage import elements_of


class StackKey(NamedTuple):
    """Matrices that are orthogonalized together: one param group, one shape."""

    group: int
    rows: int
    columns: int
    column_split: tuple[int, ...]


Stacks = dict[StackKey, Tensor]


@dataclass(slots=True)
class _Hop:
    """By peer, the parts that this rank sends and receives, in an order that all ranks share."""

    out: list[list[Part]]
    into: list[list[Part]]


Arrivals = list[tuple[Part, Tensor]]


class MatrixExchange:
    """The exchange of a bucket's matrices, on this rank."""

    def __init__(
        self,
        units: Sequence[PlacedUnit],
        muon_segments: Sequence[Segment],
        group_of: Sequence[int],
        group: DataParallelGroup,
        dtype: torch.dtype,
        device: torch.device,
        label: str = "",
        num_relays: int = 0,
    ) -> None:
        """List what this rank sends and receives for the bucket's `units`.

        `muon_segments`: this rank's pieces, in the order of the updates that `start_gather` gets; only pieces of a
        single matrix are sent. `group_of`: the param group of each parameter. `dtype`: that of the stacks and of the
        messages. `label`: a name for errors. `num_relays`: see `to_workers`.
        """
        self._group = group
        self.dtype = dtype
        self.device = device
        self._label = label
        me = group.dp_rank
        self._segments = list(muon_segments)
        self._number = {(s.param, s.param_offset): i for i, s in enumerate(self._segments)}
        self._place_stacks(units, group_of, me)
        # As many on all ranks, so that all make the same collectives; none if nothing travels.
        self._gather_hops = self._hops(message for placed in units for message in to_workers(placed, num_relays))
        self._scatter_hops = self._hops(message for placed in units for message in to_holders(placed, num_relays))

    def _hops(self, messages: Iterable[Message]) -> list[_Hop]:
        """In one pass: under FSDP2 every rank holds a piece of every matrix."""
        me, peers = self._group.dp_rank, range(self._group.dp_size)
        hops: list[_Hop] = []
        for number, sender, receiver, part in messages:
            while number >= len(hops):
                hops.append(_Hop([[] for _ in peers], [[] for _ in peers]))
            if sender == me:
                hops[number].out[receiver].append(part)
            elif receiver == me:
                hops[number].into[sender].append(part)
        return hops

    def _place_stacks(self, units: Sequence[PlacedUnit], group_of: Sequence[int], me: int) -> None:
        self._places: dict[
            tuple[int, int], tuple[StackKey, int]
        ] = {}  # by segment: its stack, and the element of the parameter with which the stack would begin
        self.units: dict[StackKey, list[PlacedUnit]] = {}  # the matrices of each stack, in its order
        for placed in units:
            if me in placed.workers:
                unit = placed.unit
                key = StackKey(group_of[placed.param], unit.rows, unit.columns, unit.column_split)
                stack = self.units.setdefault(key, [])
                for p in placed.pieces:
                    self._places[p.param, p.param_offset] = (key, unit.offset - len(stack) * unit.numel)
                stack.append(placed)

    def in_dtype(self, dtype: torch.dtype) -> MatrixExchange:
        """The same routes, with stacks and messages of another dtype."""
        other = copy(self)
        other.dtype = dtype
        return other

    def new_stacks(self) -> Stacks:
        """Memory for the matrices that this rank orthogonalizes."""
        return {
            key: torch.empty(len(units), key.rows, key.columns, dtype=self.dtype, device=self.device)
            for key, units in self.units.items()
        }

    def places(self, stacks: Stacks) -> list[Tensor | None]:
        """For each Muon piece its elements in `stacks`, as `elements_of`; None if they are only sent."""
        return [self._piece(stacks, s) if (s.param, s.param_offset) in self._places else None for s in self._segments]

    def start_gather(
        self, updates: Sequence[Tensor], stacks: Stacks, places: Sequence[Tensor | None], *, stage: str = "dp_gather"
    ) -> Gathering:
        """Start to gather `updates`, a 1-D tensor for each Muon piece; `wait` returns the stacks of whole matrices.

        An update that is its place in `stacks` is there already; any other is copied.
        """
        journey = self._start(
            self._gather_hops, lambda piece: updates[self._number[piece.param, piece.param_offset]], stage
        )
        for place, update in zip(places, updates):
            if place is not None and place is not update:
                place.copy_(update.view(place.shape))
        return Gathering(self, journey, stacks)

    def start_scatter(self, results: Stacks) -> Scattering:
        """Start to send results back; `wait` returns a 1-D tensor for each Muon piece."""
        return Scattering(self, self._start(self._scatter_hops, partial(self._piece, results), "scatter"), results)

    def finish_gather(self, arrivals: Arrivals, stacks: Stacks) -> Stacks:
        """Fill `stacks` with what has arrived for this rank; the rest it has passed on."""
        for part, arrived in arrivals:
            if (part.piece.param, part.piece.param_offset) in self._places:
                place = _elements(self._piece(stacks, part.piece), part)
                place.copy_(arrived.view(place.shape))
        return stacks

    def finish_scatter(self, arrivals: Arrivals, results: Stacks) -> list[Tensor]:
        """This rank's pieces: those that have arrived, and those of its results."""
        parts: dict[Segment, list[tuple[int, Tensor]]] = {}
        for part, arrived in arrivals:
            parts.setdefault(part.piece, []).append((part.start, arrived))
        found = []
        for segment in self._segments:
            in_order = [arrived for _, arrived in sorted(parts.get(segment, ()), key=itemgetter(0))]
            if not in_order:
                found.append(self._piece(results, segment).reshape(-1))
            else:
                found.append(in_order[0] if len(in_order) == 1 else torch.cat(in_order))
        return found

    def _start(self, hops: Sequence[_Hop], piece_of: Callable[[Segment], Tensor], stage: str) -> Journey:
        """Start to send; `piece_of` tells the elements of a piece that this rank has from the first."""
        arrivals: Arrivals = []
        if not hops:
            return Journey(None, arrivals)

        first, *others = hops
        sent = self._packed([_elements(piece_of(part.piece), part) for peer in first.out for part in peer])
        coming = {part for peer in first.into for part in peer} if others else set()
        held = {
            part: _elements(piece_of(part.piece), part)
            for hop in others
            for peer in hop.out
            for part in peer
            if part not in coming
        }

        def start() -> Pending:
            pending = self._send(first, sent, stage)
            pending.then = partial(go_on, pending.result)
            return pending

        def go_on(received: Tensor) -> None:
            arrivals.extend(self._arrived(received, first))
            for hop in others:
                here = held | dict(arrivals)
                pending = self._send(hop, self._packed([here[part] for peer in hop.out for part in peer]), stage)
                arrivals.extend(self._arrived(pending.wait(), hop))

        if others and self.device.type == "cuda":
            return Journey(self._group.start_aside(start, self.device, holds=(sent, *held.values())), arrivals)
        return Journey(start(), arrivals)

    def _packed(self, outgoing: Sequence[Tensor]) -> Tensor:
        """What this rank sends in a hop, by receiver, as one message."""
        lengths = [elements.numel() for elements in outgoing]
        sent = torch.empty(sum(lengths), dtype=self.dtype, device=self.device)
        for place, elements in zip(torch.split(sent, lengths), outgoing):
            place.view(elements.shape).copy_(elements)
        return sent

    def _send(self, hop: _Hop, sent: Tensor, stage: str) -> Pending:
        send_counts = [sum(part.length for part in peer) for peer in hop.out]
        receive_counts = [sum(part.length for part in peer) for peer in hop.into]
        received = torch.empty(sum(receive_counts), dtype=self.dtype, device=self.device)
        return self._group.start_all_to_all(received, sent, receive_counts, send_counts, stage=stage, label=self._label)

    @staticmethod
    def _arrived(received: Tensor, hop: _Hop) -> Arrivals:
        parts = [part for peer in hop.into for part in peer]
        return list(zip(parts, torch.split(received, [part.length for part in parts])))

    def _piece(self, stacks: Stacks, segment: Segment) -> Tensor:
        """The elements of `segment` inside its matrix in the stacks, as `elements_of`; a rank may have none."""
        if not segment.length:
            return torch.empty(0, dtype=self.dtype, device=self.device)
        key, base = self._places[segment.param, segment.param_offset]
        return elements_of(stacks[key].view(-1), segment, base)


def _elements(piece: Tensor, part: Part) -> Tensor:
    """The elements of `part`, given those of its piece."""
    is_whole = part.length == part.piece.length
    return piece if is_whole else piece.view(-1)[part.start : part.start + part.length]


class Journey:
    """Parts in flight, through all their hops."""

    def __init__(self, pending: Pending | None, arrivals: Arrivals) -> None:
        self._pending = pending
        self._arrivals = arrivals

    def wait(self) -> Arrivals:
        """Wait until all parts have arrived, those included that this rank has passed on."""
        if self._pending is not None:
            self._pending.wait()
        return self._arrivals


class Gathering:
    """Pieces in flight to the workers of their matrices."""

    def __init__(self, exchange: MatrixExchange, journey: Journey, stacks: Stacks) -> None:
        self._exchange = exchange
        self._journey = journey
        self._stacks = stacks

    def wait(self) -> Stacks:
        """Wait for the pieces; return the matrices that this rank orthogonalizes, (B, m, n) by shape."""
        return self._exchange.finish_gather(self._journey.wait(), self._stacks)


class Scattering:
    """Results in flight to the holders of the pieces."""

    def __init__(self, exchange: MatrixExchange, journey: Journey, results: Stacks) -> None:
        self._exchange = exchange
        self._journey = journey
        self._results = results

    def wait(self) -> list[Tensor]:
        """Wait for the results; return a 1-D tensor for each Muon piece of this rank."""
        return self._exchange.finish_scatter(self._journey.wait(), self._results)
