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

[Note: nodes] Pieces of a straddler travel in each step, and links between nodes are slow. So where ranks lie on several
nodes, each stone gets a node first: largest first, the node with room whose least loaded rank has the fewest
Newton-Schulz FLOPs. The rules above then hold inside each node. Only a stone that fits into no node is cut over more.
Those larger than a node are laid over whole nodes first, and the others over the room that all nodes have left.
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
    """Load over all buckets packed so far.

    By rank: the cost of whole stones, and the blocks of Muon elements. By node: a heap with a value for each of its
    ranks, the cost of all stones that lie in the node, shared out as if any rank might own any of them.
    """

    cost: list[int]
    muon_blocks: list[int]
    of_node: list[list[int]]


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
    """See [Note: stones and sand]; `loads.of_node` says how many nodes of equally many ranks there are.

    Returns (shard size in elements, pieces per rank); adds to `loads`.
    """
    shard_blocks = ceil(sum(item.blocks for item in (*stones, *sand)) / dp_size)
    stones = sorted(stones, key=lambda s: -s.blocks)
    room = [shard_blocks] * dp_size
    num_nodes = len(loads.of_node)
    node_size = dp_size // num_nodes
    boulders = [s for s in stones if num_nodes > 1 and s.blocks > node_size * shard_blocks]
    cut = _lay_large_stones(boulders, shard_blocks, loads.muon_blocks, room, unit=node_size)
    _take(loads, room, cut)
    homes, homeless = _choose_nodes(stones[len(boulders) :], loads, room)
    whole: Shards = []
    for node, at_home in enumerate(homes):
        ranks = range(node * node_size, (node + 1) * node_size)
        whole += _pack_node(at_home, ranks, shard_blocks, loads, room, cut)
    quota = _fill_level(loads.muon_blocks, room, sum(stone.blocks for stone in homeless))
    between = _stream(homeless, quota)
    _take(loads, room, between)
    return shard_blocks * ALIGNMENT, _lay_out(whole, _merge(cut, between), _stream(sand, room))


def _choose_nodes(stones: Sequence[Item], loads: Loads, room: Sequence[int]) -> tuple[list[list[Item]], list[Item]]:
    """(the stones of each node, those that fit into no node); largest first, to the node of the least loaded rank."""
    num_nodes = len(loads.of_node)
    if num_nodes == 1:
        return [[*stones]], []
    node_size = len(room) // num_nodes
    left = [sum(room[node * node_size : (node + 1) * node_size]) for node in range(num_nodes)]
    homes: list[list[Item]] = [[] for _ in left]
    homeless = []
    for _, same in groupby(stones, key=lambda s: s.blocks):
        queue: list[tuple[int, int, int, int]] = []  # a heap of the nodes with room for stones of this size
        for number, stone in enumerate(same):
            if number == 0:
                queue = [
                    (loads.of_node[n][0], sum(loads.of_node[n]), -left[n], n)
                    for n in range(num_nodes)
                    if left[n] >= stone.blocks
                ]
                heapify(queue)
            if not queue:
                homeless.append(stone)
                continue
            node = queue[0][-1]
            homes[node].append(stone)
            left[node] -= stone.blocks
            heapreplace(loads.of_node[node], loads.of_node[node][0] + stone.cost)
            if left[node] >= stone.blocks:
                heapreplace(queue, (loads.of_node[node][0], sum(loads.of_node[node]), -left[node], node))
            else:
                heappop(queue)
    return homes, homeless


def _pack_node(
    stones: Sequence[Item], ranks: range, shard_blocks: int, loads: Loads, room: list[int], cut: Shards
) -> Shards:
    """Pack the stones of a node on its ranks. Returns the whole stones of each; adds the pieces of others to `cut`."""
    low, high = ranks[0], ranks[-1] + 1
    large_stones = [s for s in stones if s.blocks > shard_blocks]
    laid = _lay_large_stones(large_stones, shard_blocks, loads.muon_blocks[low:high], room[low:high])
    whole: Shards = [[] for _ in ranks]
    straddlers = []
    _take(loads, room, laid, low)
    for _, same in groupby((s for s in stones if s.blocks <= shard_blocks), key=lambda s: s.blocks):
        queue: list[tuple[int, int, int, int]] = []  # a heap of the ranks with room for stones of this size
        for number, stone in enumerate(same):
            if number == 0:
                queue = [_priority(loads, room, r) for r in ranks if room[r] >= stone.blocks]
                heapify(queue)
            if not queue:
                straddlers.append(stone)
                continue
            rank = queue[0][-1]
            whole[rank - low].append(stone)
            room[rank] -= stone.blocks
            loads.cost[rank] += stone.cost
            loads.muon_blocks[rank] += stone.blocks
            if room[rank] >= stone.blocks:
                heapreplace(queue, _priority(loads, room, rank))
            else:
                heappop(queue)
    quota = _fill_level(loads.muon_blocks[low:high], room[low:high], sum(stone.blocks for stone in straddlers))
    pieces = _stream(straddlers, quota)
    _take(loads, room, pieces, low)
    cut[low:high] = _merge(cut[low:high], _merge(laid, pieces))
    return whole


def _take(loads: Loads, room: list[int], pieces: Shards, first: int = 0) -> None:
    """Count the pieces of cut stones that lie on the ranks from `first` on."""
    for rank, held in enumerate(pieces, first):
        blocks = sum(piece.blocks for piece in held)
        room[rank] -= blocks
        loads.muon_blocks[rank] += blocks


def _priority(loads: Loads, room: Sequence[int], rank: int) -> tuple[int, int, int, int]:
    """Sort key of ranks for the next stone: fewest FLOPs, then fewest Muon elements, then most room."""
    return loads.cost[rank], loads.muon_blocks[rank], -room[rank], rank


def _lay_large_stones(
    large_stones: Sequence[Item], shard_blocks: int, heights: Sequence[int], room: Sequence[int], unit: int = 1
) -> Shards:
    """Lay stones larger than a shard over consecutive whole shards, on the ranks with the fewest Muon elements.

    `heights`: the Muon blocks of each rank. `unit`: they begin at a multiple of so many ranks, and end at one.
    """
    if not large_stones:
        return [[] for _ in room]
    amount = sum(item.blocks for item in large_stones)
    width = ceil(amount / (shard_blocks * unit)) * unit
    before = [0, *accumulate(heights)]  # for each rank, the Muon blocks on all ranks before it
    starts = range(0, len(room) - width + 1, unit) if min(room) == shard_blocks else range(1)
    start = min(starts, key=lambda first: before[first + width] - before[first]) if len(starts) > 1 else 0
    return _stream(large_stones, [blocks if start <= rank else 0 for rank, blocks in enumerate(room)])


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
