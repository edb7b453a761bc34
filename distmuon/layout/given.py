"""A cut that others have made: FSDP2, HSDP, tensor and expert parallelism. Integers only; knows no rule and no tensor.

Decides nothing: every rank holds a box of each parameter, or nothing, and several ranks may hold the same box
(replicas). This module turns boxes into pieces. A shard has no flat buffer; its `shard_offset`s count what a rank holds
of a bucket, parameter after parameter, for whoever gathers whole state.
"""

from __future__ import annotations

from collections.abc import Sequence

from distmuon.layout.boxes import Box, runs_of
from distmuon.layout.packing import Piece

HeldBoxes = Sequence[Box | None]  # of one parameter: the box that each rank holds


def rows_of(rows: int, num_ranks: int, rank: int) -> tuple[int, int]:
    """[start, stop): the rows of `rows` that `fully_shard` puts on `rank`: the last ranks may hold fewer, or none."""
    most = -(-rows // num_ranks)
    return min(rank * most, rows), min((rank + 1) * most, rows)


def pack_given(params: Sequence[tuple[int, tuple[int, ...], HeldBoxes]], dp_size: int) -> tuple[int, list[list[Piece]]]:
    """`params`: (number, shape, boxes) of each. Returns (elements of the fullest rank, pieces per rank)."""
    shards: list[list[Piece]] = [[] for _ in range(dp_size)]
    filled = [0] * dp_size
    for param, shape, held in params:
        replicas: dict[Box, int] = {}
        for rank, box in enumerate(held):
            if box is None or 0 in box[1]:
                continue
            replica = replicas.get(box, 0)
            replicas[box] = replica + 1
            for start, length, run, stride in runs_of(shape, box):
                shards[rank].append(Piece(param, start, length, filled[rank], run, stride, replica))
                filled[rank] += length
    return max(filled), shards


def replicas_of(held: HeldBoxes) -> list[Box]:
    """The boxes that are held, each once."""
    return list(dict.fromkeys(box for box in held if box is not None and 0 not in box[1]))
