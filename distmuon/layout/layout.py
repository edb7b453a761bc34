"""The place of every element: buckets, shards, segments, owners. Integers only, made before any tensor exists.

This module decides how the parameters are cut into buckets, and each bucket into `dp_size` equal shards. Every rank
computes the same `Layout` from the same `ParamSpec`s. `packing.py` packs a bucket; `planning/counts.py` counts bytes.
The module knows no tensor and no process group.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from heapq import heapify, heappop, heappush
from itertools import groupby
from math import inf
from operator import attrgetter

import torch

from distmuon.layout.given import HeldBoxes, pack_given
from distmuon.layout.packing import Item, Loads, Piece, pack_balanced, pack_evenly
from distmuon.layout.routing import ParamSpec, Unit
from distmuon.math.codecs import UpdateCodec
from distmuon.options import Packing, Placement

_MIN_BUCKET_ELEMENTS = 8 << 20
_offset = attrgetter("offset")
# Bucket sizes that are tried: the model's size over each of these.
_SIZE_DIVISORS = (16, 14, 12, 11, 10, 9, 8.5, 8, 7.5, 7, 6.5, 6, 5.5, 5, 4.5)
# Over several nodes also buckets that grow, see `_growing_buckets`: the divisor of the last one, and the growth.
_GROWTHS = ((48, 4), (16, 4), (32, 8), (8, 8), (64, 12), (24, 12), (12, 12))
_MOST_UNITS = 12  # matrices a rank in a bucket of stacks
_NVLINK = 9  # bytes inside a node in the time of one through a card: 450 and 50 GB/s
_FLOPS_PER_BYTE = (
    15_000  # FLOPs of Newton-Schulz in the time of a byte through a card: 0.6 * 989 TFLOP/s, 0.8 * 50 GB/s
)
_NS_STEPS = 5
# Elements of an exchange that a card moves in 100 us, which a second hop must save: the planner's 20 us of latency,
# copies at the relays, and a margin.
_SECOND_HOP = 2_000_000


@dataclass(frozen=True, slots=True)
class Segment:
    """`length` elements of parameter `param` from `param_offset` on, at `shard_offset` of the shard of `rank`.

    They follow one another, or, in given shards only, are runs of `run` elements, `stride` apart ([Note: runs] in
    boxes.py). A segment of a Muon parameter lies inside a single unit (`Unit`). Of the ranks that hold the same
    elements, the first has `replica` 0, the next 1.
    """

    param: int
    param_offset: int
    length: int
    rank: int
    shard_offset: int
    run: int = 0
    stride: int = 0
    replica: int = 0


@dataclass(frozen=True, slots=True)
class BucketSpec:
    """The unit of communication: `dp_size` shards of `shard_size` elements, which a single collective moves.

    `group`: whose ranks hold the shards, by the number of `ParamSpec.group`. If shards are given: the parameters that
    exchange pieces together; `shard_size` is the fullest rank's.
    """

    index: int
    dtype: torch.dtype
    params: tuple[int, ...]
    shard_size: int
    segments: tuple[Segment, ...]
    dp_size: int
    group: int = 0


@dataclass(frozen=True, slots=True)
class PlacedUnit:
    """A unit, its pieces, and the ranks that orthogonalize it: its owner, or every holder (`"replicated"`).

    `sources`: the pieces that the workers gather: of replicas only one.
    """

    index: int
    param: int
    unit: Unit
    bucket: int
    pieces: tuple[Segment, ...]
    workers: tuple[int, ...]
    sources: tuple[Segment, ...]

    @property
    def straddling(self) -> bool:
        return any(piece.rank != self.pieces[0].rank for piece in self.pieces)


@dataclass(frozen=True)
class Layout:
    """The cut of all parameters. `buckets` are in the order in which backward fills them."""

    dp_size: int
    specs: tuple[ParamSpec, ...]
    buckets: tuple[BucketSpec, ...]
    matrices: tuple[PlacedUnit, ...]
    given: tuple[HeldBoxes, ...] = ()  # if others have cut the parameters, see given.py: the boxes of each
    node_size: int = 0  # as many consecutive ranks share a node, or fewer the last; dp_size if nodes are not known

    @cached_property
    def segments_of(self) -> tuple[tuple[Segment, ...], ...]:
        """The segments of each parameter, in order of `param_offset`."""
        found: list[list[Segment]] = [[] for _ in self.specs]
        for bucket in self.buckets:
            for segment in bucket.segments:
                found[segment.param].append(segment)
        return tuple(tuple(sorted(segments, key=lambda s: s.param_offset)) for segments in found)

    @cached_property
    def bucket_of(self) -> tuple[int, ...]:
        """The index of each parameter's bucket."""
        where = {param: bucket.index for bucket in self.buckets for param in bucket.params}
        return tuple(where[i] for i in range(len(self.specs)))

    def members(self, group: int) -> list[int]:
        """The parameters that are cut over a process group."""
        return [index for index, spec in enumerate(self.specs) if spec.group == group]

    def unit_of(self, segment: Segment) -> Unit:
        """The unit that a Muon parameter's segment lies in."""
        spec = self.specs[segment.param]
        return spec.matrices[_unit_at(spec, segment)]

    def contiguous_start(self, param: int) -> int | None:
        """The start of `param` in its bucket's flat buffer; None if it is not contiguous there."""
        shard_size = self.buckets[self.bucket_of[param]].shard_size
        segments = self.segments_of[param]
        start = segments[0].rank * shard_size + segments[0].shard_offset
        for segment in segments:
            if segment.rank * shard_size + segment.shard_offset != start + segment.param_offset:
                return None
        return start

    def is_staged(self, param: int) -> bool:
        """Whether `param` is not a view of its flat buffer: it keeps its memory, or is not contiguous in the buffer."""
        return self.specs[param].stays or self.contiguous_start(param) is None

    def blocks_of(self, segment: Segment, block: int) -> tuple[int, int]:
        """(elements of the blocks that a Muon segment touches, how many of them lie before it).

        A block has `block` elements of a matrix, from its first one on.
        """
        before = (segment.param_offset - self.unit_of(segment).offset) % block
        return -(-(before + segment.length) // block) * block, before

    def message_bytes(self, bucket: BucketSpec, codec: UpdateCodec) -> int:
        """The bytes that each rank sends of `bucket` if updates travel: 4 an AdamW element, Muon's as `codec` says.

        AdamW's elements come first, padded to a multiple of 8 bytes. All ranks send as many bytes as the fullest rank,
        rounded up to a multiple of 16.
        """
        adamw, muon = [0] * self.dp_size, [0] * self.dp_size
        for segment in bucket.segments:
            if self.specs[segment.param].rule == "muon":
                muon[segment.rank] += self.blocks_of(segment, codec.block)[0]
            else:
                adamw[segment.rank] += segment.length
        fullest = max(-(-4 * a // 8) * 8 + codec.bytes(m) for a, m in zip(adamw, muon))
        return -(-fullest // 16) * 16

    @cached_property
    def gathers_started(self) -> tuple[int, ...]:
        """`start_gathers` of a step, which updates the last bucket first; by the rates above."""
        buckets = self.buckets[::-1]
        cards = min(self.node_size, _NVLINK) if 0 < self.node_size < self.dp_size else _NVLINK  # of a ring, at once
        gathers = [(b.dp_size - 1) * b.shard_size * b.dtype.itemsize / cards for b in buckets]
        work = [[0] * bucket.dp_size for bucket in buckets]
        for placed in self.matrices:
            for worker in placed.workers:
                work[len(buckets) - 1 - placed.bucket][worker] += ns_cost(placed.unit)
        beside = [_NS_STEPS * min(of_ranks) / _FLOPS_PER_BYTE for of_ranks in work]
        exchanges = [2 * min(costs) for costs in _exchanges(self)[::-1]]  # in 16 bits
        return start_gathers(gathers, beside, exchanges)

    @cached_property
    def two_hops(self) -> tuple[bool, ...]:
        """By bucket, whether pieces of other nodes reach the owners in two hops; [Note: two hops] in messages.py.

        Only between nodes of equally many ranks, in buckets of the first group, whose nodes are those that are known.
        """
        return tuple(in_two < in_one for in_one, in_two in _exchanges(self))

    def relays_of(self, bucket: int) -> int:
        """The ranks of a node if the exchange of `bucket` takes two hops, else 0."""
        return self.node_size if self.two_hops[bucket] else 0

    @cached_property
    def num_elements(self) -> int:
        return sum(spec.numel for spec in self.specs)

    @property
    def num_straddlers(self) -> int:
        """The number of units whose pieces lie on several ranks."""
        return sum(placed.straddling for placed in self.matrices)

    @property
    def padding(self) -> float:
        """The elements of padding, as a share of the model's elements."""
        padded = self.dp_size * sum(bucket.shard_size for bucket in self.buckets)
        return (padded - self.num_elements) / self.num_elements

    @property
    def staged(self) -> float:
        """The elements of staged parameters, as a share of the model's elements; see `is_staged`."""
        return sum(spec.numel for i, spec in enumerate(self.specs) if self.is_staged(i)) / self.num_elements

    @property
    def ns_balance(self) -> float:
        """The FLOPs of Newton-Schulz on the busiest rank, over the mean of all ranks."""
        loads = [0] * self.dp_size
        for placed in self.matrices:
            for worker in placed.workers:
                loads[worker] += ns_cost(placed.unit)
        return imbalance(loads)

    def fingerprint(self) -> str:
        """A text that two ranks share exactly if their layouts are equal."""
        return repr(
            (
                (self.dp_size, bool(self.given), self.node_size),
                [(s.common_name, s.shape, str(s.dtype), s.rule, s.matrices) for s in self.specs],
                self.buckets,
            )
        )


def start_gathers(gathers: Sequence[float], beside: Sequence[float], exchanges: Sequence[float]) -> tuple[int, ...]:
    """How many all-gathers of parameters have started once 1, 2, ... buckets are done, so that exchanges hardly wait.

    In the order of a step, the times of the buckets' all-gathers, of the Newton-Schulz of the rank with the least, and
    of an exchange, one way. When bucket k is done, the scatter of k+1 is on the wire. What starts then must arrive
    while the Newton-Schulz of k+2 lasts, and with it the pieces of k+3, whose Newton-Schulz is the next; a tenth of its
    time may be missing, for it gains more than it delays. After the last exchange nothing waits.
    """
    last = max((number for number, seconds in enumerate(exchanges) if seconds), default=-1)
    exchanges = [*exchanges, 0.0, 0.0]
    found: list[int] = []
    started = 0
    for done in range(1, len(gathers) + 1):
        room = beside[done + 1] - exchanges[done] - exchanges[done + 2] if done < last else inf
        for seconds in gathers[started:done]:
            if seconds - room > 0.1 * seconds:
                break
            room -= seconds
            started += 1
        found.append(started)
    return tuple(found)


def imbalance(loads: Sequence[int]) -> float:
    """The largest load over the mean load; 1 without load."""
    return max(loads) * len(loads) / sum(loads) if sum(loads) else 1.0


def ns_cost(unit: Unit) -> int:
    """The FLOPs of a Newton-Schulz iteration, 4*k*k*l + 2*k**3 with short side k, summed over the logical matrices."""
    cost = 0
    for m, n in unit.logical_shapes:
        k, long = min(m, n), max(m, n)
        cost += 4 * k * k * long + 2 * k**3
    return cost


def make_layout(
    specs: Sequence[ParamSpec],
    dp_size: int,
    *,
    packing: Packing = "balanced",
    placement: Placement = "owner",
    bucket_mb: float | None = None,
    given: Sequence[HeldBoxes] | None = None,
    node_size: int = 0,
) -> Layout:
    """Cut `specs` (registration order) for `dp_size` ranks, or take the cut that is `given`. Pure and deterministic.

    `bucket_mb`: size of a bucket in MiB of float32 gradients. None: the size between a sixteenth and two ninths of the
    model with the best `_score`, but at least 32 MiB; the smaller size wins a tie, since small buckets overlap better.
    If shards are given, their boxes by parameter and rank: an eighth of the model, or more, so that a bucket has about
    two matrices a rank: in an exchange only the owners of its matrices have something to send back.

    `node_size`: as many consecutive ranks share a node; 0: not known. With several nodes of several ranks each, which
    have equally many, matrices keep inside nodes ([Note: nodes] in packing.py), and further buckets are tried.
    """
    if not 0 < node_size <= dp_size:
        node_size = dp_size
    by_node = packing == "balanced" and given is None and node_size > 1 and dp_size % node_size == 0
    cut = partial(_cut, specs, dp_size, packing, placement, given, node_size, dp_size // node_size if by_node else 1)
    if bucket_mb is not None:
        size = max(1, int(min(bucket_mb * (1 << 20) / 4, 1 << 62)))  # inf: one bucket a dtype
        return cut(_bucket_params(specs, size, size))
    total = sum(spec.numel for spec in specs)
    num_units = sum(len(spec.matrices) for spec in specs)
    several_nodes = by_node and node_size < dp_size
    divisors = _SIZE_DIVISORS if given is None else (max(1, min(8, round(num_units / (2 * dp_size)))),)
    cuts: list[list[list[int]]] = []  # without duplicates: if most experts have their own bucket, sizes hardly matter
    for parts in divisors:
        cuts.append(_bucket_params(specs, max(_MIN_BUCKET_ELEMENTS, int(total / parts)), _MIN_BUCKET_ELEMENTS))
    if several_nodes:
        cuts = [_growing_buckets(specs, dp_size, node_size, *growth) for growth in _GROWTHS] + cuts[::3]
    cuts = [params for number, params in enumerate(cuts) if params not in cuts[:number]]
    layouts = map(cut, cuts)
    return next(layouts) if len(cuts) == 1 else min(layouts, key=_score_of_nodes if several_nodes else _score)


def _cut(
    specs: Sequence[ParamSpec],
    dp_size: int,
    packing: Packing,
    placement: Placement,
    given: Sequence[HeldBoxes] | None,
    node_size: int,
    num_nodes: int,
    params_of: list[list[int]],
) -> Layout:
    """Make the layout whose buckets hold these parameters; matrices keep inside each of `num_nodes` nodes."""
    loads = Loads([0] * dp_size, [0] * dp_size, [[0] * (dp_size // num_nodes) for _ in range(num_nodes)])
    buckets = []
    for index, params in enumerate(params_of):
        if given is not None:
            shard_size, shards = pack_given([(p, specs[p].shape, given[p]) for p in params], dp_size)
        else:
            shard_size, shards = _pack(specs, params, dp_size, packing, loads)
        segments = tuple(_split_at_units(specs, shards))
        buckets.append(BucketSpec(index, specs[params[0]].dtype, tuple(params), shard_size, segments, dp_size))
    matrices = _place(specs, buckets, placement, dp_size, num_nodes)
    return Layout(dp_size, tuple(specs), tuple(buckets), matrices, tuple(given or ()), node_size)


def recut(specs: Sequence[ParamSpec], like: Layout, packing: Packing, placement: Placement) -> Layout:
    """The buckets of another layout of the same parameters, each cut in another way."""
    params_of = [[*bucket.params] for bucket in like.buckets]
    return _cut(specs, like.dp_size, packing, placement, None, like.node_size, 1, params_of)


def join(specs: Sequence[ParamSpec], layouts: Sequence[Layout]) -> Layout:
    """The layout of all `specs`, made of those of each process group's parameters, by group.

    Backward fills the buckets of all groups in one order, which is the same on all ranks.
    """
    if len(layouts) == 1:
        return layouts[0]
    members = [[index for index, spec in enumerate(specs) if spec.group == group] for group in range(len(layouts))]
    cut = [(group, bucket) for group, layout in enumerate(layouts) for bucket in layout.buckets]
    cut.sort(key=lambda entry: -min(members[entry[0]][param] for param in entry[1].params))
    number = {(group, bucket.index): index for index, (group, bucket) in enumerate(cut)}

    def renamed(group: int, segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
        return tuple(replace(segment, param=members[group][segment.param]) for segment in segments)

    buckets = []
    for index, (group, bucket) in enumerate(cut):
        params = tuple(members[group][param] for param in bucket.params)
        segments = renamed(group, bucket.segments)
        buckets.append(replace(bucket, index=index, params=params, segments=segments, group=group))
    matrices: list[PlacedUnit] = []
    for group, layout in enumerate(layouts):
        for placed in layout.matrices:
            changed = replace(
                placed,
                index=len(matrices),
                param=members[group][placed.param],
                bucket=number[group, placed.bucket],
                pieces=renamed(group, placed.pieces),
                sources=renamed(group, placed.sources),
            )
            matrices.append(changed)
    return Layout(layouts[0].dp_size, tuple(specs), tuple(buckets), tuple(matrices), node_size=layouts[0].node_size)


def _score(layout: Layout) -> float:
    """Distance of a layout from the ideal; smaller is better.

    It is the larger of two excesses of the busiest rank, traffic beyond AdamW's in units of 0.5 % and Newton-Schulz
    work above the mean in units of 3 %, plus the time of the exchanges in units of 5 %. In an exchange all ranks wait
    for the busiest rank of the bucket, so this favours few straddlers in few buckets.
    """
    cost = [0] * layout.dp_size
    sent = [0] * layout.dp_size
    exchanged: list[dict[int, int]] = [{} for _ in layout.buckets]  # by bucket and rank: elements sent and received
    for placed in layout.matrices:
        for worker in placed.workers:
            cost[worker] += ns_cost(placed.unit)
        owner = placed.workers[0]
        by_rank = exchanged[placed.bucket]
        for piece in placed.pieces:
            if piece.rank != owner:  # the piece goes to the owner and back
                for rank in (piece.rank, owner):
                    sent[rank] += piece.length
                    by_rank[rank] = by_rank.get(rank, 0) + 2 * piece.length
    moved = max(1, (layout.dp_size - 1) * sum(bucket.shard_size for bucket in layout.buckets))
    bytes_moved = moved * 6  # fp32 gradients and bf16 parameters; the exchange moves bf16
    traffic = max(sent) * 2 / bytes_moved
    stalled = sum(max(by_rank.values(), default=0) for by_rank in exchanged) * 2 / bytes_moved
    excess_work = max(cost) * layout.dp_size / max(1, sum(cost)) - 1
    return max(traffic / 0.005, excess_work / 0.03) + stalled / 0.05


def _score_of_nodes(layout: Layout) -> float:
    """The time of a step over several nodes as far as the layout decides it, in bytes that a card sends meanwhile.

    It is the sum of three: the reduce-scatters that no backward hides, since their buckets hold the first matrix or
    what comes before it; each exchange's busiest rank; and the Newton-Schulz of the busiest rank, or, if that is more,
    half of the sum over buckets of their busiest ranks', for each bucket waits for its exchange, and two overlap.

    Exchanges count as in one hop. Layouts chosen by two hops had longer steps at dp 64 and 1024, by the planner.
    """
    num_nodes = layout.dp_size // layout.node_size
    work = [0] * layout.dp_size
    by_bucket: list[dict[int, int]] = [{} for _ in layout.buckets]  # Newton-Schulz, by rank
    for placed in layout.matrices:
        cost = ns_cost(placed.unit)
        owner = placed.workers[0]
        work[owner] += cost
        by_rank = by_bucket[placed.bucket]
        by_rank[owner] = by_rank.get(owner, 0) + cost
    first = min((placed.param for placed in layout.matrices), default=0)
    late = sum(bucket.shard_size for bucket in layout.buckets if min(bucket.params) <= first) * layout.dp_size
    reduced = 4 * late * (num_nodes - 1) / num_nodes / layout.node_size
    stalled = 2 * sum(in_one for in_one, _ in _exchanges(layout))
    waiting = sum(max(by_rank.values(), default=0) for by_rank in by_bucket) / 2
    return reduced + stalled + _NS_STEPS * max(*work, waiting) / _FLOPS_PER_BYTE


def _exchanges(layout: Layout) -> list[tuple[float, float]]:
    """By bucket, the time in which pieces go to the owners, in one hop and in two, in elements through a card.

    That is what the busiest rank receives or sends. An element that stays in its node counts as the part of one that a
    card moves meanwhile. Where there is nothing to choose, the time of two hops is infinite.
    """
    dp_size, node_size = layout.dp_size, layout.node_size or layout.dp_size
    has_relays = not layout.given and node_size > 1 and dp_size % node_size == 0
    sums = [(Counter[int](), Counter[int](), Counter[int]()) for _ in layout.buckets]
    for placed in layout.matrices:
        owner = placed.workers[0]
        near, far, cards = sums[placed.bucket]  # by rank; by rank; by node
        for piece in placed.pieces:
            if piece.rank != owner:
                is_far = piece.rank // node_size != owner // node_size
                by_rank = far if is_far else near
                by_rank[owner] += piece.length
                by_rank[dp_size + piece.rank] += piece.length
                cards[owner // node_size] += piece.length if is_far else 0
        has_relays = has_relays and len(placed.workers) == 1
    found = []
    for bucket, (near, far, cards) in zip(layout.buckets, sums):
        in_one = max((near[rank] / _NVLINK + far[rank] for rank in {*near, *far}), default=0.0)
        in_two = inf
        if far and has_relays and bucket.group == 0:
            between = max(max(cards.values()) / node_size, *(n for rank, n in far.items() if rank >= dp_size))
            passed_on = {rank: n * (1 - 1 / node_size) for rank, n in far.items() if rank < dp_size}
            inside = max(near[rank] + passed_on.get(rank, 0.0) for rank in {*near, *passed_on})
            in_two = between + inside / _NVLINK + _SECOND_HOP
        found.append((in_one, in_two))
    return found


def _bucket_params(specs: Sequence[ParamSpec], target: int, alone_from: int) -> list[list[int]]:
    """Cut the parameters into buckets of one dtype, in the order in which backward finishes them.

    That order is last registered first; a bucket is ready when its first registered parameter is. An embedding, head or
    stack of at least `alone_from` elements gets its own bucket, since it stays contiguous if it is cut evenly. The
    current bucket goes on after it, so that the parameters between stacks share few buckets and few exchanges.
    """

    def has_own_bucket(spec: ParamSpec) -> bool:
        return spec.numel >= alone_from and len(spec.matrices) != 1

    buckets = []
    for dtype in dict.fromkeys(spec.dtype for spec in specs):
        bucket: list[int] = []
        filled = 0
        for param in (p for p in reversed(range(len(specs))) if specs[p].dtype == dtype):
            if has_own_bucket(specs[param]):
                buckets.append([param])
                continue
            if filled >= target:
                buckets.append(bucket)
                bucket, filled = [], 0
            bucket.append(param)
            filled += specs[param].numel
        if bucket:
            buckets.append(bucket)
    return sorted(buckets, key=lambda params: -min(params))


def _growing_buckets(
    specs: Sequence[ParamSpec], dp_size: int, node_size: int, divisor: int, growth: int
) -> list[list[int]]:
    """Buckets for several nodes: the last one small, and each at most `growth` times as large as the one after it.

    A node's part of a bucket must hold whole matrices, so buckets are large; but nothing hides the reduce-scatter of
    the last one, which has 1/`divisor` of the elements that do not lie in buckets of their own, and a backward that is
    `growth` times as fast as needed hides the others. An embedding, a head and stacks with a matrix for each node have
    buckets of their own. Neighbouring stacks of equal matrices share one until all ranks have equally many matrices.
    """
    num_nodes = dp_size // node_size
    buckets = []
    for dtype in dict.fromkeys(spec.dtype for spec in specs):
        shared: list[int] = []
        stacks: list[int] = []
        num_units = 0
        for param in (p for p in reversed(range(len(specs))) if specs[p].dtype == dtype):
            units = specs[param].matrices
            if specs[param].numel < _MIN_BUCKET_ELEMENTS or 0 < len(units) < num_nodes:
                shared.append(param)
                continue
            if not units:
                buckets.append([param])
                continue
            is_whole = num_units % dp_size == 0 or num_units >= _MOST_UNITS * dp_size
            if stacks and (is_whole or specs[stacks[0]].matrices[0].numel != units[0].numel):
                buckets.append(stacks)
                stacks, num_units = [], 0
            stacks.append(param)
            num_units += len(units)
        target = max(_MIN_BUCKET_ELEMENTS, sum(specs[param].numel for param in shared) // divisor)
        filled = 0
        bucket: list[int] = []
        for param in reversed(shared):
            if filled >= target:
                buckets.append(bucket[::-1])
                bucket = []
                filled = 0
                target *= growth
            bucket.append(param)
            filled += specs[param].numel
        buckets += [bucket[::-1] if bucket else [], stacks]
    return sorted(filter(None, buckets), key=lambda params: -min(params))


def _pack(
    specs: Sequence[ParamSpec],
    params: Sequence[int],
    dp_size: int,
    packing: Packing,
    loads: Loads,
) -> tuple[int, list[list[Piece]]]:
    """Pack a bucket. A single parameter is cut evenly if that cuts no unit, so that large stacks stay contiguous."""
    several_nodes = len(loads.of_node) > 1
    is_stacks = several_nodes and all(len(specs[p].matrices) >= len(loads.of_node) for p in params)
    if packing == "contiguous" or len(params) == 1 or is_stacks:
        shard_size, shards = pack_evenly([Item(p, 0, specs[p].numel) for p in params], dp_size)
        starts = {piece.offset for shard in shards for piece in shard}
        if packing == "contiguous" or is_stacks or starts <= {matrix.offset for matrix in specs[params[0]].matrices}:
            return shard_size, shards
    stones = [Item(p, m.offset, m.numel, ns_cost(m)) for p in params for m in specs[p].matrices]
    sand = [Item(p, 0, specs[p].numel) for p in params if not specs[p].matrices]
    return pack_balanced(stones, sand, dp_size, loads)


def _split_at_units(specs: Sequence[ParamSpec], shards: list[list[Piece]]) -> Iterator[Segment]:
    """Yield segments in (rank, shard_offset) order; a piece that covers several units is cut into one segment each."""
    for rank, shard in enumerate(shards):
        for piece in shard:
            units = specs[piece.param].matrices
            if not units:
                yield Segment(piece.param, piece.offset, piece.length, rank, *piece[3:])
                continue
            at = piece.shard_offset
            for start, length, run, stride in _cut_at_units(piece, units):
                yield Segment(piece.param, start, length, rank, at, run, stride, piece.replica)
                at += length


def _cut_at_units(piece: Piece, units: Sequence[Unit]) -> Iterator[tuple[int, int, int, int]]:
    """Yield (start, length, run, stride) of the parts of `piece`, each inside a single unit."""
    if piece.stride and piece.stride != units[0].columns:  # rows of each matrix in a stack: one part a matrix
        for start in range(piece.offset, piece.offset + piece.length // piece.run * piece.stride, piece.stride):
            yield from _cut_at_units(Piece(piece.param, start, piece.run, 0), units)
        return
    run, stride = piece.run or 1, piece.stride or 1
    start, left = piece.offset, piece.length // run
    number = bisect_right(units, start, key=_offset) - 1
    while left:
        end = units[number].offset + units[number].numel
        count = min(left, -((start - end) // stride))
        yield start, count * run, piece.run, piece.stride
        start += count * stride
        left -= count
        number += 1


def _place(
    specs: Sequence[ParamSpec], buckets: Sequence[BucketSpec], placement: Placement, dp_size: int, num_nodes: int
) -> tuple[PlacedUnit, ...]:
    """Give every unit its workers: its owner, or all holders."""
    pieces_of: dict[tuple[int, int], list[Segment]] = {}
    for bucket in buckets:
        for segment in bucket.segments:
            if specs[segment.param].matrices:
                pieces_of.setdefault((segment.param, _unit_at(specs[segment.param], segment)), []).append(segment)
    units = [
        (param, unit) for bucket in buckets for param in bucket.params for unit in range(len(specs[param].matrices))
    ]
    bucket_of = {param: bucket.index for bucket in buckets for param in bucket.params}
    workers = [tuple(sorted({piece.rank for piece in pieces_of[unit]})) for unit in units]
    if placement == "owner":
        costs = [ns_cost(specs[param].matrices[unit]) for param, unit in units]
        workers = [(owner,) for owner in _owners(costs, workers, dp_size, dp_size // num_nodes)]
    placed = []
    copy_of = {segment.rank: segment.replica for bucket in buckets for segment in bucket.segments}
    for index, (param, unit) in enumerate(units):
        pieces = tuple(sorted(pieces_of[param, unit], key=attrgetter("param_offset", "replica")))
        sources = _sources(pieces, workers[index][0], copy_of)
        placed.append(
            PlacedUnit(index, param, specs[param].matrices[unit], bucket_of[param], pieces, workers[index], sources)
        )
    return tuple(placed)


def _owners(costs: Sequence[int], holders_of: Sequence[tuple[int, ...]], dp_size: int, node_size: int) -> list[int]:
    """The owner of each matrix. Straddlers, most costly first, go to their least loaded holder.

    If that would exceed the mean load, the least loaded rank of the holders' nodes gets the straddler.
    """
    owners = [holders[0] for holders in holders_of]
    load = [0] * dp_size
    ideal = sum(costs) / dp_size
    for holders, cost in zip(holders_of, costs):
        if len(holders) == 1:
            load[holders[0]] += cost
    queue = [(done, rank) for rank, done in enumerate(load)]  # outdated entries have too small a load
    heapify(queue)
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        holders, cost = holders_of[index], costs[index]
        if len(holders) == 1:
            continue
        owner = min(holders, key=lambda rank: (load[rank], rank))
        if load[owner] + cost > ideal:
            while queue[0][0] != load[queue[0][1]]:
                heappop(queue)
            near = queue[0][1]
            if node_size < dp_size:
                nodes = dict.fromkeys(rank // node_size for rank in holders)
                ranks = (rank for node in nodes for rank in range(node * node_size, (node + 1) * node_size))
                near = min(ranks, key=lambda rank: (load[rank], rank))
            owner = near if load[near] < load[owner] else owner
        owners[index] = owner
        load[owner] += cost
        heappush(queue, (load[owner], owner))
    return owners


def _sources(pieces: tuple[Segment, ...], owner: int, copy_of: Mapping[int, int]) -> tuple[Segment, ...]:
    """Of replicas one: the owner's own, or else the one in the same copy of the model, which has the same number.

    Under HSDP that is the owner's shard group, so that pieces reach the owner inside a node. `copy_of`: the number by
    rank, for an owner that holds no piece.
    """
    if not any(piece.replica for piece in pieces):
        return pieces
    number = next((piece.replica for piece in pieces if piece.rank == owner), copy_of.get(owner, 0))
    found = []
    for _, replicas in groupby(pieces, key=attrgetter("param_offset")):
        candidates = list(replicas)
        own = [piece for piece in candidates if piece.rank == owner]
        found.append(own[0] if own else candidates[min(number, len(candidates) - 1)])
    return tuple(found)


def _unit_at(spec: ParamSpec, segment: Segment) -> int:
    """The index of the unit that `segment` belongs to."""
    return bisect_right(spec.matrices, segment.param_offset, key=_offset) - 1
