"""The exchange of matrix pieces: updates go to the ranks that orthogonalize them, stacked by shape, and results return.

This module decides once, from the layout, which piece each rank sends to which rank. A matrix that lies whole on its
owner never travels; a bucket without straddlers makes no collective at all. The module knows no mathematics: it returns
what the caller put into the stacks.

      update pieces (shard) --start_gather--> stacks (B, m, n) on the workers
      pieces (shard)       <--start_scatter-- results (B, m, n)

[Note: routes of pieces] A piece on rank p is sent to every worker of its matrix except p; of replicas only one is sent,
and none if the worker holds one. After the computation p takes the piece from its result if it is a worker, else from
the first worker, the owner, and so do all replicas. With `placement="owner"` a matrix has one worker. With
"replicated", the paper's literal form, every holder is a worker, so nothing is sent back.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor

from distmuon.comm.group import DataParallelGroup, Pending
from distmuon.layout.layout import PlacedUnit, Segment
from distmuon.step.storage import elements_of


class StackKey(NamedTuple):
    """Matrices that are orthogonalized together: one param group, one shape."""

    group: int
    rows: int
    columns: int
    column_split: tuple[int, ...]


Stacks = dict[StackKey, Tensor]


def is_sent_to(source: Segment, placed: PlacedUnit, rank: int) -> bool:
    """Whether `source`, one of the sources of `placed`, is sent to `rank`, which computes the matrix."""
    return rank in placed.workers and rank != source.rank


def returns_from(piece: Segment, placed: PlacedUnit) -> int | None:
    """The rank that sends the result back to the holder of `piece`; None if the holder computes it itself."""
    return None if piece.rank in placed.workers else placed.workers[0]


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
    ) -> None:
        """Decide the routes of the bucket's `units`.

        `muon_segments`: this rank's pieces, in the order of the updates that `start_gather` gets; only pieces of a
        single matrix are sent. `group_of`: the param group of each parameter. `dtype`: that of the stacks and of the
        messages. `label`: a name for errors.
        """
        self._group = group
        self.dtype = dtype
        self.device = device
        self._label = label
        me = group.dp_rank
        self._segments = list(muon_segments)
        self._number = {(s.param, s.param_offset): i for i, s in enumerate(self._segments)}
        self._place_stacks(units, group_of, me)
        self._list_pieces(units, me, group.dp_size)
        # These are the same on all ranks, so that all make the same collectives.
        self.has_exchange = any(is_sent_to(s, u, worker) for u in units for s in u.sources for worker in u.workers)
        self._scatters = any(returns_from(p, u) is not None for u in units for p in u.pieces)

    def _list_pieces(self, units: Sequence[PlacedUnit], me: int, dp_size: int) -> None:
        """By peer, which segments go there and come from there, in an order all ranks share. In one pass: under FSDP2
        every rank holds a piece of every matrix."""
        self._gather_out: list[list[Segment]] = [[] for _ in range(dp_size)]
        self._gather_in: list[list[Segment]] = [[] for _ in range(dp_size)]
        self._scatter_out: list[list[Segment]] = [[] for _ in range(dp_size)]
        self._scatter_in: list[list[Segment]] = [[] for _ in range(dp_size)]
        for placed in units:
            for source in placed.sources:
                if is_sent_to(source, placed, me):
                    self._gather_in[source.rank].append(source)
                if source.rank == me:
                    for worker in placed.workers:
                        if is_sent_to(source, placed, worker):
                            self._gather_out[worker].append(source)
            for piece in placed.pieces:
                home = returns_from(piece, placed)
                if home == me:
                    self._scatter_out[piece.rank].append(piece)
                if piece.rank == me and home is not None:
                    self._scatter_in[home].append(piece)

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
        pending = None
        if self.has_exchange:
            outgoing = [updates[self._number[s.param, s.param_offset]] for peer in self._gather_out for s in peer]
            pending = self._start(outgoing, self._gather_out, self._gather_in, stage)
        for place, update in zip(places, updates):
            if place is not None and place is not update:
                place.copy_(update.view(place.shape))
        return Gathering(self, pending, stacks)

    def start_scatter(self, results: Stacks) -> Scattering:
        """Start to send results back; `wait` returns a 1-D tensor for each Muon piece."""
        pending = None
        if self._scatters:
            outgoing = [self._piece(results, segment) for peer in self._scatter_out for segment in peer]
            pending = self._start(outgoing, self._scatter_out, self._scatter_in, "scatter")
        return Scattering(self, pending, results)

    def finish_gather(self, pending: Pending | None, stacks: Stacks) -> Stacks:
        """Fill `stacks` with the pieces that arrive."""
        if pending is not None:
            for segment, arrived in self._arrived(pending, self._gather_in):
                place = self._piece(stacks, segment)
                place.copy_(arrived.view(place.shape))
        return stacks

    def finish_scatter(self, pending: Pending | None, results: Stacks) -> list[Tensor]:
        """This rank's pieces: those that arrive, and those of its results."""
        back = {} if pending is None else dict(self._arrived(pending, self._scatter_in))
        return [back[s] if s in back else self._piece(results, s).reshape(-1) for s in self._segments]

    def _start(
        self, outgoing: list[Tensor], out: list[list[Segment]], into: list[list[Segment]], stage: str
    ) -> Pending:
        send_counts = [sum(s.length for s in peer) for peer in out]
        receive_counts = [sum(s.length for s in peer) for peer in into]
        sent = torch.empty(sum(send_counts), dtype=self.dtype, device=self.device)
        for place, piece in zip(torch.split(sent, [piece.numel() for piece in outgoing]), outgoing):
            place.view(piece.shape).copy_(piece)
        received = torch.empty(sum(receive_counts), dtype=self.dtype, device=self.device)
        return self._group.start_all_to_all(received, sent, receive_counts, send_counts, stage=stage, label=self._label)

    @staticmethod
    def _arrived(pending: Pending, into: list[list[Segment]]) -> list[tuple[Segment, Tensor]]:
        segments = [segment for peer in into for segment in peer]
        return list(zip(segments, torch.split(pending.wait(), [segment.length for segment in segments])))

    def _piece(self, stacks: Stacks, segment: Segment) -> Tensor:
        """The elements of `segment` inside its matrix in the stacks, as `elements_of`; a rank may have none."""
        if not segment.length:
            return torch.empty(0, dtype=self.dtype, device=self.device)
        key, base = self._places[segment.param, segment.param_offset]
        return elements_of(stacks[key].view(-1), segment, base)


class Gathering:
    """Pieces in flight to the workers of their matrices."""

    def __init__(self, exchange: MatrixExchange, pending: Pending | None, stacks: Stacks) -> None:
        self._exchange = exchange
        self._pending = pending
        self._stacks = stacks

    def wait(self) -> Stacks:
        """Wait for the pieces; return the matrices that this rank orthogonalizes, (B, m, n) by shape."""
        return self._exchange.finish_gather(self._pending, self._stacks)


class Scattering:
    """Results in flight to the holders of the pieces."""

    def __init__(self, exchange: MatrixExchange, pending: Pending | None, results: Stacks) -> None:
        self._exchange = exchange
        self._pending = pending
        self._results = results

    def wait(self) -> list[Tensor]:
        """Wait for the results; return a 1-D tensor for each Muon piece of this rank."""
        return self._exchange.finish_scatter(self._pending, self._results)
