"""Pieces of updates -> whole matrices, stacked by shape on the ranks that orthogonalize them, and back.

Decides who sends what to whom, once, from the layout. A matrix that lies whole on its owner never travels; a bucket
without straddlers makes no collective at all. Knows no mathematics: what comes back is whatever the caller put into
the stacks.

      update pieces (shard) --start_gather--> stacks (B, m, n) on the workers
      pieces (shard)       <--start_scatter-- results (B, m, n)

[Note: who needs which piece] A piece on rank p is sent to every worker of its matrix except p. After the computation
p takes the piece from its own result if it is a worker, else from the first worker, the owner. With
`placement="owner"` there is one worker; with "replicated" every holder is one, so nothing is ever sent back: the
paper's literal form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distmuon.comm.group import DataParallelGroup, Pending
from distmuon.layout.layout import PlacedMatrix, Segment
from distmuon.step.storage import ShardPiece


class StackKey(NamedTuple):
    """Matrices that are orthogonalized together: one param group, one shape."""

    group: int
    rows: int
    columns: int
    column_split: tuple[int, ...]


class MatrixGather:
    """The exchange of one bucket's matrices, seen from one rank."""

    def __init__(
        self,
        matrices: Sequence[PlacedMatrix],
        muon_pieces: Sequence[ShardPiece],
        group_of: Sequence[int],
        group: DataParallelGroup,
        dtype: torch.dtype,
        device: torch.device,
        about: str = "",
    ) -> None:
        """`matrices`: all of the bucket; `muon_pieces`: this rank's, in the order in which updates will be handed in;
        `group_of`: param group of each parameter; `dtype`: of the stacks and of what travels; `about`: for messages."""
        self._group, self.dtype, self._device, self._about = group, dtype, device, about
        me, ranks = group.dp_rank, range(group.dp_size)
        self._mine = [piece.segment for piece in muon_pieces]
        self._number = {(s.param, s.param_offset): i for i, s in enumerate(self._mine)}

        self._places: dict[tuple[int, int], tuple[StackKey, int]] = {}  # by segment: its stack, first element there
        self.stack_sizes: dict[StackKey, int] = {}
        for matrix in matrices:
            if me in matrix.workers:
                unit = matrix.matrix
                key = StackKey(group_of[matrix.param], unit.rows, unit.columns, unit.column_split)
                position = self.stack_sizes.setdefault(key, 0)
                self.stack_sizes[key] += 1
                for p in matrix.pieces:
                    start = position * unit.numel + p.param_offset - unit.offset
                    self._places[p.param, p.param_offset] = (key, start)

        def listed(wanted: Callable[[PlacedMatrix, Segment, int], bool]) -> list[list[Segment]]:
            """Per peer, the segments that `wanted(matrix, piece, peer)` picks, in an order all ranks share."""
            return [[p for m in matrices for p in m.pieces if wanted(m, p, peer)] for peer in ranks]

        self._gather_out = listed(lambda m, p, peer: p.rank == me != peer and peer in m.workers)
        self._gather_in = listed(lambda m, p, peer: p.rank == peer != me and me in m.workers)
        self._scatter_out = listed(lambda m, p, peer: p.rank == peer not in m.workers and m.workers[0] == me)
        self._scatter_in = listed(lambda m, p, peer: p.rank == me not in m.workers and m.workers[0] == peer)
        self.exchanges = any({p.rank for p in m.pieces} != set(m.workers) or len(m.workers) > 1 for m in matrices)
        self._scatters = any(p.rank not in m.workers for m in matrices for p in m.pieces)

    def start_gather(self, updates: Sequence[Tensor]) -> Callable[[], dict[StackKey, Tensor]]:
        """Send `updates` (one 1-D tensor a muon piece) on their way. Call the result to get the whole stacks."""
        pending = None
        if self.exchanges:
            outgoing = [updates[self._number[s.param, s.param_offset]] for peer in self._gather_out for s in peer]
            pending = self._start(outgoing, self._gather_out, self._gather_in, "dp_gather")
        stacks = {
            key: torch.empty(count, key.rows, key.columns, dtype=self.dtype, device=self._device)
            for key, count in self.stack_sizes.items()
        }
        for segment, update in zip(self._mine, updates):
            if (segment.param, segment.param_offset) in self._places:
                self._piece(stacks, segment).copy_(update)

        def finish() -> dict[StackKey, Tensor]:
            if pending is not None:
                for segment, arrived in self._arrived(pending, self._gather_in):
                    self._piece(stacks, segment).copy_(arrived)
            return stacks

        return finish

    def start_scatter(self, results: dict[StackKey, Tensor]) -> Callable[[], list[Tensor]]:
        """Send results home. Call the result to get one 1-D tensor a muon piece."""
        pending = None
        if self._scatters:
            outgoing = [self._piece(results, segment) for peer in self._scatter_out for segment in peer]
            pending = self._start(outgoing, self._scatter_out, self._scatter_in, "scatter")

        def finish() -> list[Tensor]:
            back = {} if pending is None else dict(self._arrived(pending, self._scatter_in))
            return [back[s] if s in back else self._piece(results, s) for s in self._mine]

        return finish

    def _start(
        self, outgoing: list[Tensor], out: list[list[Segment]], into: list[list[Segment]], stage: str
    ) -> Pending:
        send_counts = [sum(s.length for s in peer) for peer in out]
        receive_counts = [sum(s.length for s in peer) for peer in into]
        sent = torch.empty(sum(send_counts), dtype=self.dtype, device=self._device)
        for place, piece in zip(torch.split(sent, [piece.numel() for piece in outgoing]), outgoing):
            place.copy_(piece)
        received = torch.empty(sum(receive_counts), dtype=self.dtype, device=self._device)
        return self._group.start_all_to_all(received, sent, receive_counts, send_counts, stage=stage, about=self._about)

    @staticmethod
    def _arrived(pending: Pending, into: list[list[Segment]]) -> list[tuple[Segment, Tensor]]:
        segments = [segment for peer in into for segment in peer]
        return list(zip(segments, torch.split(pending.wait(), [segment.length for segment in segments])))

    def _piece(self, stacks: dict[StackKey, Tensor], segment: Segment) -> Tensor:
        """The elements of `segment` inside its matrix in the stacks, as a 1-D view."""
        key, start = self._places[segment.param, segment.param_offset]
        return stacks[key].view(-1)[start : start + segment.length]
