"""The cut that FSDP2 has made: where the rows of each parameter lie. Integers only; knows no rule and no tensor.

Decides nothing: `fully_shard` gives rank r the rows [r*c, min((r+1)*c, n)) of n, with c = ceil(n / dp_size), so every
rank computes the same layout without asking. The last ranks may hold fewer rows, or none. A shard has no flat buffer;
its `shard_offset`s count what a rank holds of a bucket, parameter after parameter, for whoever gathers whole state.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from distmuon.layout.packing import Piece


def rows_of(rows: int, dp_size: int, rank: int) -> tuple[int, int]:
    """[start, stop): the rows of `rows` that lie on `rank`."""
    most = -(-rows // dp_size)
    return min(rank * most, rows), min((rank + 1) * most, rows)


def pack_given(params: Sequence[tuple[int, tuple[int, ...]]], dp_size: int) -> tuple[int, list[list[Piece]]]:
    """`params`: (number, shape) of each. Returns (elements of the fullest rank, pieces per rank)."""
    shards: list[list[Piece]] = []
    fullest = 0
    for rank in range(dp_size):
        pieces, at = [], 0
        for param, shape in params:
            start, stop = rows_of(shape[0], dp_size, rank)
            row = prod(shape[1:])
            if stop > start:
                pieces.append(Piece(param, start * row, (stop - start) * row, at))
                at += (stop - start) * row
        shards.append(pieces)
        fullest = max(fullest, at)
    return fullest, shards
