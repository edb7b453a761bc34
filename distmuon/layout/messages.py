"""The messages of an exchange: which rank sends which elements of a matrix to which other rank, in one hop or two.

This module decides the way of a piece to the ranks that orthogonalize its matrix, and the way of the result back.
`step/matrix_exchange.py` sends these messages, `planning/counts.py` counts them. Integers only.

[Note: routes of pieces] A piece on rank p is sent to every worker of its matrix except p; of replicas only one is sent,
and none if the worker holds one. After the computation p takes the piece from its result if it is a worker, else from
the first worker, the owner, and so do all replicas. With `placement="owner"` a matrix has one worker. With
"replicated", the paper's literal form, every holder is a worker, so nothing is sent back.

[Note: two hops] If a matrix lies on several nodes, what lies on others must enter the owner's node, and would do so
through one card, the owner's, while those of its neighbours idle. So a piece from another node travels in as many parts
as the owner's node has ranks, a part through the card of each. These ranks, the relays, pass the parts on inside the
node. The result leaves the node in the same way. `Layout.relays_of` says in which buckets this is shorter.

      another node               the owner's node
      piece  -- part 0 -------->  rank 0 --.
             -- part 1 -------->  rank 1 ---> owner
             -- part 2 -------->  rank 2 --'
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from distmuon.layout.layout import PlacedUnit, Segment
from distmuon.layout.packing import ALIGNMENT


class Part(NamedTuple):
    """`length` elements of a piece, from its element `start` on."""

    piece: Segment
    start: int
    length: int


class Message(NamedTuple):
    """`part` goes from rank `sender` to rank `receiver` in hop number `hop`."""

    hop: int
    sender: int
    receiver: int
    part: Part


def to_workers(placed: PlacedUnit, num_relays: int = 0) -> Iterator[Message]:
    """Yield the messages that make the matrix whole on its workers.

    `num_relays`: the ranks of a node, if pieces of other nodes travel in two hops; 0: all travel in one.
    """
    for piece in placed.sources:
        for worker in placed.workers:
            if piece.rank != worker:
                for relay, part in _parts(piece, worker, num_relays):
                    yield Message(0, piece.rank, relay, part)
                    if relay != worker:
                        yield Message(1, relay, worker, part)


def to_holders(placed: PlacedUnit, num_relays: int = 0) -> Iterator[Message]:
    """Yield the messages that bring the result to the holders of the pieces; `num_relays` as above."""
    owner = placed.workers[0]
    for piece in placed.pieces:
        if piece.rank not in placed.workers:
            for relay, part in _parts(piece, owner, num_relays):
                if relay != owner:
                    yield Message(0, owner, relay, part)
                yield Message(int(_is_far(piece, owner, num_relays)), relay, piece.rank, part)


def _is_far(piece: Segment, worker: int, num_relays: int) -> bool:
    """Whether `piece` travels in two hops."""
    return num_relays > 0 and piece.rank // num_relays != worker // num_relays


def _parts(piece: Segment, worker: int, num_relays: int) -> Iterator[tuple[int, Part]]:
    """Yield the parts in which `piece` reaches the worker's node, each with the rank that it enters or leaves by."""
    if not _is_far(piece, worker, num_relays):
        yield worker, Part(piece, 0, piece.length)
        return
    first = worker - worker % num_relays
    cuts = [piece.length * number // num_relays // ALIGNMENT * ALIGNMENT for number in range(num_relays)]
    for number, (start, end) in enumerate(zip(cuts, [*cuts[1:], piece.length])):
        if start < end:
            yield first + number, Part(piece, start, end - start)
