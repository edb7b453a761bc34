"""Packing of a bucket's items into equal shards ("stones and sand").

This module decides, for a list of items in blocks of `ALIGNMENT` elements, which elements lie on which rank, and where.
Both packings return the same type, the pieces of each rank. The module works on integers only; it knows no rule and no
tensor, and `layout.py` decides what the items are.

[Note: stones and sand] A bucket is a flat buffer cut into equal shards; a parameter may lie anywhere in it.
  1. Muon matrices are stones. Stones larger than a shard are laid over whole shards first. Then, largest first, each
     stone goes whole into a shard with room, on the rank with the fewest Newton-Schulz FLOPs so far.
  2. A stone that fits into no shard whole is a straddler: it is cut over the remaining room, filling up the ranks with
     the fewest Muon elements so far, so that state stays even.
  3. AdamW parameters are sand: cut anywhere, they fill the remaining room.

[Note: order inside a shard] An item that continues from the previous shard comes first, an item that continues into the
next shard comes last, and whole stones lie between. So an item that crosses one boundary is contiguous in the flat
buffer, and its parameter can be a plain view of it. If two items cross the same boundary, or an item spans a whole
shard, a parameter cannot be a view: `Layout.contiguous_start` is None and `flat_storage.py` stages it.

      shard 0              shard 1                     shard 2
    | stone  stone  A.. | ..A  stone  sand  B.. | ..B  stone  sand |       A, B: straddlers
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace
from itertools import accumulate, groupby
from math import ceil
from typing import NamedTuple

ALIGNMENT = 64  # every item starts at a multiple of 64 elements: 16-bit weights are 128-byte aligned for GEMMs


class Item(NamedTuple):
    """`length` elements of parameter `param` from `offset` on. A stone's `cost` is its Newton-Schulz FLOPs a step."""

    param: int
    offset: int
    length: int
    cost: int = 0

    @property
    def blocks(self) -> int:
        return -(-self.length // ALIGNMENT)


class Piece(NamedTuple):
    """Elements of a parameter and their place in a shard; `run`, `stride` and `replica` as in `layout.Segment`."""

    param: int
    offset: int
    length: int
    shard_offset: int
    run: int = 0
    stride: int = 0
    replica: int = 0


@dataclass(slots=True)
class Loads:
    """Load of each rank over all buckets packed so far: the cost of whole stones, and the blocks of Muon elements."""

    cost: list[int]
    muon_blocks: list[int]


Shards = list[list[Item]]  # per rank


def pack_evenly(items: Sequence[Item], dp_size: int) -> tuple[int, list[list[Piece]]]:
    """Lay items back to back and cut them evenly, as Megatron and the paper do.

    Returns (shard size in elements, pieces per rank).
    """
    shard_blocks = ceil(sum(item.blocks for item in items) / dp_size)
    empty: Shards = [[] for _ in range(dp_size)]
    return shard_blocks * ALIGNMENT, _lay_out(empty, _stream(items, [shard_blocks] * dp_size), empty)


def pack_balanced(
    stones: Sequence[Item], sand: Sequence[Item], dp_size: int, loads: Loads
) -> tuple[int, list[list[Piece]]]:
    """See [Note: stones and sand]. Returns (shard size in elements, pieces per rank); adds to `loads`."""
    shard_blocks = ceil(sum(item.blocks for item in (*stones, *sand)) / dp_size)
    stones = sorted(stones, key=lambda s: -s.blocks)
    large_stones = _lay_large_stones([s for s in stones if s.blocks > shard_blocks], shard_blocks, loads)
    room = [shard_blocks - sum(piece.blocks for piece in pieces) for pieces in large_stones]
    for rank, blocks in enumerate(room):
        loads.muon_blocks[rank] += shard_blocks - blocks
    whole: Shards = [[] for _ in room]
    straddlers = []
    for _, same in groupby((s for s in stones if s.blocks <= shard_blocks), key=lambda s: s.blocks):
        queue: list[tuple[int, int, int, int]] = []  # a heap of the ranks with room for stones of this size
        for number, stone in enumerate(same):
            if number == 0:
                queue = [_priority(loads, room, r) for r in range(dp_size) if room[r] >= stone.blocks]
                heapify(queue)
            if not queue:
                straddlers.append(stone)
                continue
            rank = queue[0][-1]
            whole[rank].append(stone)
            room[rank] -= stone.blocks
            loads.cost[rank] += stone.cost
            loads.muon_blocks[rank] += stone.blocks
            if room[rank] >= stone.blocks:
                heapreplace(queue, _priority(loads, room, rank))
            else:
                heappop(queue)
    quota = _fill_level(loads.muon_blocks, room, sum(stone.blocks for stone in straddlers))
    for rank, blocks in enumerate(quota):
        room[rank] -= blocks
        loads.muon_blocks[rank] += blocks
    cut = _merge(large_stones, _stream(straddlers, quota))
    return shard_blocks * ALIGNMENT, _lay_out(whole, cut, _stream(sand, room))


def _priority(loads: Loads, room: Sequence[int], rank: int) -> tuple[int, int, int, int]:
    """Sort key of ranks for the next stone: fewest FLOPs, then fewest Muon elements, then most room."""
    return loads.cost[rank], loads.muon_blocks[rank], -room[rank], rank


def _lay_large_stones(large_stones: Sequence[Item], shard_blocks: int, loads: Loads) -> Shards:
    """Lay stones larger than a shard over consecutive whole shards, on the ranks with the fewest Muon elements."""
    if not large_stones:
        return [[] for _ in loads.cost]
    dp_size = len(loads.cost)
    width = ceil(sum(item.blocks for item in large_stones) / shard_blocks)
    before = [0, *accumulate(loads.muon_blocks)]  # for each rank, the Muon blocks on all ranks before it
    start = min(range(dp_size - width + 1), key=lambda first: before[first + width] - before[first])
    return _stream(large_stones, [shard_blocks if start <= rank else 0 for rank in range(dp_size)])


def _fill_level(heights: Sequence[int], room: Sequence[int], amount: int) -> list[int]:
    """Share `amount` blocks among ranks that hold `heights` blocks and have `room`, so that the lowest rise first."""
    if not amount:
        return [0] * len(heights)
    low, high = min(heights), max(heights) + max(room) + 1
    while low < high:  # the lowest level that takes the whole amount
        level = (low + high) // 2
        taken = sum([min(r, level - h) for h, r in zip(heights, room) if h < level])
        low, high = (low, level) if taken >= amount else (level + 1, high)
    quota = [min(r, max(0, low - h)) for h, r in zip(heights, room)]
    surplus = sum(quota) - amount
    for rank in range(len(quota)):  # at most one block a rank
        if surplus and quota[rank] and heights[rank] + quota[rank] == low:
            quota[rank] -= 1
            surplus -= 1
    return quota


def _stream(items: Sequence[Item], rooms: Sequence[int]) -> Shards:
    """Cut the items, one after another, to fill `rooms`, the free blocks of each rank, in rank order."""
    filled: Shards = [[] for _ in rooms]
    rank, left = 0, rooms[0]
    for item in items:
        offset, end = item.offset, item.offset + item.length
        while offset < end:
            while left == 0:
                rank += 1
                left = rooms[rank]
            piece = Item(item.param, offset, min(end - offset, left * ALIGNMENT))
            filled[rank].append(piece)
            left -= piece.blocks
            offset += piece.length
    return filled


def _lay_out(whole: Shards, straddlers: Shards, sand: Shards) -> list[list[Piece]]:
    """Order each shard and give every piece its place; see [Note: order inside a shard]."""
    cut = _merge(straddlers, sand)
    starts = [[(item.param, item.offset) for item in items] for items in cut]
    ends = [[(item.param, item.offset + item.length) for item in items] for items in cut]
    shards = []
    for rank, stones in enumerate(whole):
        first: list[Item] = []
        middle = sorted(stones, key=lambda s: (s.param, s.offset)) if len(stones) > 1 else [*stones]
        last: list[Item] = []
        for item, start, end in zip(cut[rank], starts[rank], ends[rank]):
            if rank > 0 and start in ends[rank - 1]:
                first.append(item)
            elif rank + 1 < len(cut) and end in starts[rank + 1]:
                last.insert(0, item)
            else:
                middle.append(item)
        pieces, at = [], 0
        for item in first + middle + last:
            pieces.append(Piece(item.param, item.offset, item.length, at))
            at += item.blocks * ALIGNMENT
        shards.append(pieces)
    return shards


def _merge(left: Shards, right: Shards) -> Shards:
    return [a + b for a, b in zip(left, right)]
