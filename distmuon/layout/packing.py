"""Stones and sand: how the items of one bucket are packed into equal shards. Integers; knows no rule and no tensor.

Decides, for a list of items in blocks of `ALIGNMENT` elements, which elements lie on which rank and where.
Two packings, one result: per rank its pieces. What the items are is `layout.py`'s business.

[Note: stones and sand] A bucket is one flat buffer cut into equal shards; where a parameter lies inside is free.
  1. Muon matrices are stones: largest first, each goes whole into a shard with room, to the rank with the fewest
     Newton-Schulz FLOPs so far.
  2. A stone that fits nowhere whole is a straddler: it is cut over the room that is left, filling up the ranks that
     hold the fewest Muon elements so far, so that state stays even.
  3. AdamW parameters are sand: cut anywhere, they fill what remains.

[Note: order inside a shard] An item that continues from the shard before comes first, one that continues into the
next shard comes last, whole stones between. So what crosses one boundary is contiguous in the flat buffer, and the
parameter can be a plain view of it. Where two items cross one boundary, or an item passes over a shard, the
parameter cannot be a view: `Layout.contiguous_start` is None and `flat_storage.py` stages it.

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

ALIGNMENT = 64  # elements: every item starts at a multiple, so that 16-bit weights are 128-byte aligned for GEMMs


class Item(NamedTuple):
    """`length` elements of parameter `param` from `offset` on. A stone has a `cost`, its Newton-Schulz FLOPs a step."""

    param: int
    offset: int
    length: int
    cost: int = 0

    @property
    def blocks(self) -> int:
        return -(-self.length // ALIGNMENT)


class Piece(NamedTuple):
    """A run of one parameter's elements and its place in a shard."""

    param: int
    offset: int
    length: int
    shard_offset: int


@dataclass(slots=True)
class Loads:
    """Per rank, over all buckets packed so far: cost of the whole stones, and Muon elements in blocks."""

    cost: list[int]
    muon_blocks: list[int]


Shards = list[list[Item]]  # per rank


def pack_evenly(items: Sequence[Item], dp_size: int) -> tuple[int, list[list[Piece]]]:
    """Items back to back, cut wherever the even cut falls (Megatron's and the paper's way). Returns (shard size in
    elements, pieces per rank)."""
    shard_blocks = ceil(sum(item.blocks for item in items) / dp_size)
    nothing: Shards = [[] for _ in range(dp_size)]
    return shard_blocks * ALIGNMENT, _lay_out(nothing, _stream(items, [shard_blocks] * dp_size), nothing)


def pack_balanced(
    stones: Sequence[Item], sand: Sequence[Item], dp_size: int, loads: Loads
) -> tuple[int, list[list[Piece]]]:
    """See [Note: stones and sand]. Returns (shard size in elements, pieces per rank); adds to `loads`."""
    shard_blocks = ceil(sum(item.blocks for item in (*stones, *sand)) / dp_size)
    stones = sorted(stones, key=lambda s: -s.blocks)
    boulders = _pour_boulders([s for s in stones if s.blocks > shard_blocks], shard_blocks, loads)
    room = [shard_blocks - sum(piece.blocks for piece in pieces) for pieces in boulders]
    for rank, blocks in enumerate(room):
        loads.muon_blocks[rank] += shard_blocks - blocks
    whole: Shards = [[] for _ in room]
    straddlers = []
    for _, same in groupby((s for s in stones if s.blocks <= shard_blocks), key=lambda s: s.blocks):
        queue: list[tuple[int, int, int, int]] = []  # ranks with room for stones of this size, the next one first
        for number, stone in enumerate(same):
            if number == 0:
                queue = [_key(loads, room, r) for r in range(dp_size) if room[r] >= stone.blocks]
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
                heapreplace(queue, _key(loads, room, rank))
            else:
                heappop(queue)
    quota = _fill_level(loads.muon_blocks, room, sum(stone.blocks for stone in straddlers))
    for rank, blocks in enumerate(quota):
        room[rank] -= blocks
        loads.muon_blocks[rank] += blocks
    cut = _both(boulders, _stream(straddlers, quota))
    return shard_blocks * ALIGNMENT, _lay_out(whole, cut, _stream(sand, room))


def _key(loads: Loads, room: Sequence[int], rank: int) -> tuple[int, int, int, int]:
    """The smallest gets the next stone: fewest FLOPs, then fewest Muon elements, then most room."""
    return loads.cost[rank], loads.muon_blocks[rank], -room[rank], rank


def _pour_boulders(boulders: Sequence[Item], shard_blocks: int, loads: Loads) -> Shards:
    """Lay stones larger than a shard over whole shards, one after another, where the fewest Muon elements lie."""
    if not boulders:
        return [[] for _ in loads.cost]
    dp_size = len(loads.cost)
    width = ceil(sum(item.blocks for item in boulders) / shard_blocks)
    before = [0, *accumulate(loads.muon_blocks)]  # Muon elements on the ranks before each
    start = min(range(dp_size - width + 1), key=lambda first: before[first + width] - before[first])
    return _stream(boulders, [shard_blocks if start <= rank else 0 for rank in range(dp_size)])


def _fill_level(heights: Sequence[int], room: Sequence[int], amount: int) -> list[int]:
    """Pour `amount` blocks onto ranks of these `heights`, at most `room` each, so that the lowest rise first."""
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
    """Cut the items, one after another, into the rooms of the ranks, in rank order."""
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
    """Order each shard, see [Note: order inside a shard], and give every piece its place."""
    cut = _both(straddlers, sand)
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


def _both(left: Shards, right: Shards) -> Shards:
    return [a + b for a, b in zip(left, right)]
