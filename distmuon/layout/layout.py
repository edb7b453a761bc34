"""Where every element lives: buckets, shards, segments, owners. Integers only, made before any tensor exists.

Decides the cut of the parameters into buckets and of each bucket into `dp_size` equal shards. Every rank computes the
same `Layout` from the same `ParamSpec`s. How one bucket is packed is `packing.py`; `plan.py` counts bytes.
No tensor, no process group.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heapify, heappop, heappush
from operator import attrgetter
from typing import Literal

import torch

from distmuon.layout.given import pack_given
from distmuon.layout.packing import Item, Loads, Piece, pack_balanced, pack_evenly
from distmuon.layout.routing import ParamSpec, Unit
from distmuon.options import Packing, Placement

_MIN_BUCKET_ELEMENTS = 8 << 20
_offset = attrgetter("offset")
_PARTS = (16, 14, 12, 11, 10, 9, 8.5, 8, 7.5, 7, 6.5, 6, 5.5, 5, 4.5)  # bucket sizes tried, as parts of the model


@dataclass(frozen=True, slots=True)
class Segment:
    """`length` elements of parameter `param` from `param_offset` on lie on `rank`, at `shard_offset` of its shard.

    A segment of a Muon parameter lies inside one unit (`Unit`).
    """

    param: int
    param_offset: int
    length: int
    rank: int
    shard_offset: int


@dataclass(frozen=True, slots=True)
class BucketSpec:
    """What one reduce-scatter and one all-gather move: `dp_size` shards of `shard_size` elements of one dtype.

    Where shards are given: parameters that exchange pieces together; `shard_size` is what the fullest rank holds.
    """

    index: int
    dtype: torch.dtype
    params: tuple[int, ...]
    shard_size: int
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class PlacedUnit:
    """A unit, its pieces, and the ranks that orthogonalize it: the owner alone, or every holder (`replicated`)."""

    index: int
    param: int
    unit: Unit
    bucket: int
    pieces: tuple[Segment, ...]
    workers: tuple[int, ...]

    @property
    def straddling(self) -> bool:
        return any(piece.rank != self.pieces[0].rank for piece in self.pieces)


@dataclass(frozen=True)
class Layout:
    """The whole cut. `buckets` in the order in which backward fills them."""

    dp_size: int
    specs: tuple[ParamSpec, ...]
    buckets: tuple[BucketSpec, ...]
    matrices: tuple[PlacedUnit, ...]
    given: bool = False  # the shards are FSDP2's, see given.py; then no parameter lies in a flat buffer

    @cached_property
    def segments_of(self) -> tuple[tuple[Segment, ...], ...]:
        """Per parameter, its segments by `param_offset`."""
        found: list[list[Segment]] = [[] for _ in self.specs]
        for bucket in self.buckets:
            for segment in bucket.segments:
                found[segment.param].append(segment)
        return tuple(tuple(sorted(segments, key=lambda s: s.param_offset)) for segments in found)

    @cached_property
    def bucket_of(self) -> tuple[int, ...]:
        """Per parameter, the index of its bucket."""
        where = {param: bucket.index for bucket in self.buckets for param in bucket.params}
        return tuple(where[i] for i in range(len(self.specs)))

    def unit_of(self, segment: Segment) -> Unit:
        """The unit that a Muon parameter's segment lies in."""
        spec = self.specs[segment.param]
        return spec.matrices[_unit_at(spec, segment)]

    def contiguous_start(self, param: int) -> int | None:
        """Where `param` starts in its bucket's flat buffer, if it lies there in one piece."""
        shard_size = self.buckets[self.bucket_of[param]].shard_size
        segments = self.segments_of[param]
        start = segments[0].rank * shard_size + segments[0].shard_offset
        for segment in segments:
            if segment.rank * shard_size + segment.shard_offset != start + segment.param_offset:
                return None
        return start

    def is_staged(self, param: int) -> bool:
        """Whether `param` is no view of its flat buffer: it must stay where it is, or lies in several pieces."""
        return self.specs[param].stays or self.contiguous_start(param) is None

    def message_bytes(self, bucket: BucketSpec, itemsize: int) -> int:
        """What each rank sends of `bucket` where updates travel: `itemsize` bytes a Muon element, 4 an AdamW element.

        AdamW's come first, up to a multiple of 8; all ranks send as much as the fullest, a multiple of 16.
        """
        adamw, muon = [0] * self.dp_size, [0] * self.dp_size
        for segment in bucket.segments:
            (muon if self.specs[segment.param].rule == "muon" else adamw)[segment.rank] += segment.length
        fullest = max(-(-4 * a // 8) * 8 + itemsize * m for a, m in zip(adamw, muon))
        return -(-fullest // 16) * 16

    @cached_property
    def num_elements(self) -> int:
        return sum(spec.numel for spec in self.specs)

    @property
    def num_straddlers(self) -> int:
        """Units whose pieces lie on several ranks."""
        return sum(placed.straddling for placed in self.matrices)

    @property
    def padding(self) -> float:
        """Elements of padding, as a share of the model's."""
        whole = self.dp_size * sum(bucket.shard_size for bucket in self.buckets)
        return (whole - self.num_elements) / self.num_elements

    @property
    def staged(self) -> float:
        """Elements that are copied out of flat buffers, as a share of the model's; see `is_staged`."""
        return sum(spec.numel for i, spec in enumerate(self.specs) if self.is_staged(i)) / self.num_elements

    @property
    def ns_balance(self) -> float:
        """FLOPs of Newton-Schulz on the busiest rank over the mean of all ranks."""
        loads = [0] * self.dp_size
        for placed in self.matrices:
            for worker in placed.workers:
                loads[worker] += ns_cost(placed.unit)
        return imbalance(loads)

    def fingerprint(self) -> str:
        """Text that is equal on two ranks exactly if they cut alike."""
        return repr(
            (
                (self.dp_size, self.given),
                [(s.fqn, s.shape, str(s.dtype), s.rule, s.matrices) for s in self.specs],
                self.buckets,
            )
        )


def imbalance(loads: Sequence[int]) -> float:
    """Largest over mean; 1 where there is no load."""
    return max(loads) * len(loads) / sum(loads) if sum(loads) else 1.0


def ns_cost(unit: Unit) -> int:
    """FLOPs of one Newton-Schulz step, 4*k*k*l + 2*k**3 with short side k, summed over the logical matrices."""
    cost = 0
    for m, n in unit.logical_shapes:
        k, long = min(m, n), max(m, n)
        cost += 4 * k * k * long + 2 * k**3
    return cost


def make_layout(
    specs: Sequence[ParamSpec],
    dp_size: int,
    *,
    packing: Packing | Literal["given"] = "balanced",
    placement: Placement = "owner",
    bucket_mb: float | None = None,
) -> Layout:
    """Cut `specs` (registration order) for `dp_size` ranks, or with "given" as FSDP2 has. Pure and deterministic.

    `bucket_mb`: size of a bucket in MiB of float32 gradients. None: between a sixteenth and two ninths of the model, by
    `_score`, but not below 32 MiB; smaller buckets win a tie, for they overlap better. Of what FSDP2 has cut an eighth,
    for there the size changes neither traffic nor owners.
    """
    if bucket_mb is not None:
        size = max(1, int(min(bucket_mb * (1 << 20) / 4, 1 << 62)))  # inf: one bucket a dtype
        return _cut(specs, dp_size, packing, placement, _bucket_params(specs, size, size))
    total = sum(spec.numel for spec in specs)
    cuts: list[list[list[int]]] = []  # many sizes may cut alike: where experts have buckets of their own, all do
    for parts in _PARTS if packing != "given" else (8,):
        cut = _bucket_params(specs, max(_MIN_BUCKET_ELEMENTS, int(total / parts)), _MIN_BUCKET_ELEMENTS)
        if cut not in cuts:
            cuts.append(cut)
    layouts = (_cut(specs, dp_size, packing, placement, cut) for cut in cuts)
    return next(layouts) if len(cuts) == 1 else min(layouts, key=_score)


def _cut(
    specs: Sequence[ParamSpec],
    dp_size: int,
    packing: Packing | Literal["given"],
    placement: Placement,
    params_of: list[list[int]],
) -> Layout:
    """The layout whose buckets hold these parameters."""
    loads = Loads([0] * dp_size, [0] * dp_size)
    buckets = []
    for index, params in enumerate(params_of):
        shard_size, shards = _pack(specs, params, dp_size, packing, loads)
        segments = tuple(_split_at_units(specs, shards))
        buckets.append(BucketSpec(index, specs[params[0]].dtype, tuple(params), shard_size, segments))
    matrices = _place(specs, buckets, placement, dp_size)
    return Layout(dp_size, tuple(specs), tuple(buckets), matrices, given=packing == "given")


def _score(layout: Layout) -> float:
    """How far a layout is from the ideal. The worse of two: the elements that the busiest rank sends beyond AdamW's
    bytes, in units of 0.5 %, and its Newton-Schulz work above the mean, in units of 3 %. To that, in units of 5 %, what
    the exchanges take: all ranks wait for the busiest of each bucket, which favours few straddlers in few buckets."""
    cost, sent = [0] * layout.dp_size, [0] * layout.dp_size
    busy: list[dict[int, int]] = [{} for _ in layout.buckets]  # by bucket and rank, elements sent and received
    for placed in layout.matrices:
        for worker in placed.workers:
            cost[worker] += ns_cost(placed.unit)
        owner, of_bucket = placed.workers[0], busy[placed.bucket]
        for piece in placed.pieces:
            if piece.rank != owner:  # there and back
                for rank in (piece.rank, owner):
                    sent[rank] += piece.length
                    of_bucket[rank] = of_bucket.get(rank, 0) + 2 * piece.length
    moved = max(1, (layout.dp_size - 1) * sum(bucket.shard_size for bucket in layout.buckets))
    traffic = max(sent) * 2 / (moved * 6)  # bf16; fp32 gradients and bf16 parameters
    stalled = sum(max(of_bucket.values(), default=0) for of_bucket in busy) * 2 / (moved * 6)
    imbalance = max(cost) * layout.dp_size / max(1, sum(cost)) - 1
    return max(traffic / 0.005, imbalance / 0.03) + stalled / 0.05


def _bucket_params(specs: Sequence[ParamSpec], target: int, own_bucket: int) -> list[list[int]]:
    """Runs of parameters of one dtype, last registered first, as backward finishes them; a bucket is ready with its
    first registered parameter. A large embedding, head or stack has a bucket of its own: cut evenly, it stays
    contiguous. The run around it goes on, so that what lies between stacks shares few buckets and few exchanges."""

    def alone(spec: ParamSpec) -> bool:
        return spec.numel >= own_bucket and len(spec.matrices) != 1

    buckets = []
    for dtype in dict.fromkeys(spec.dtype for spec in specs):
        bucket: list[int] = []
        filled = 0
        for param in (p for p in reversed(range(len(specs))) if specs[p].dtype == dtype):
            if alone(specs[param]):
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


def _pack(
    specs: Sequence[ParamSpec],
    params: Sequence[int],
    dp_size: int,
    packing: Packing | Literal["given"],
    loads: Loads,
) -> tuple[int, list[list[Piece]]]:
    """Pack one bucket. A parameter alone in it is cut evenly if that cuts no unit: so large stacks stay contiguous."""
    if packing == "given":
        return pack_given([(param, specs[param].shape) for param in params], dp_size)
    if packing == "contiguous" or len(params) == 1:
        shard_size, shards = pack_evenly([Item(p, 0, specs[p].numel) for p in params], dp_size)
        starts = {piece.offset for shard in shards for piece in shard}
        if packing == "contiguous" or starts <= {matrix.offset for matrix in specs[params[0]].matrices}:
            return shard_size, shards
    stones = [Item(p, m.offset, m.numel, ns_cost(m)) for p in params for m in specs[p].matrices]
    sand = [Item(p, 0, specs[p].numel) for p in params if not specs[p].matrices]
    return pack_balanced(stones, sand, dp_size, loads)


def _split_at_units(specs: Sequence[ParamSpec], shards: list[list[Piece]]) -> Iterator[Segment]:
    """Segments in (rank, shard_offset) order; a piece that covers several units of a parameter becomes several."""
    for rank, shard in enumerate(shards):
        for param, offset, length, at in shard:
            units = specs[param].matrices
            if not units:
                yield Segment(param, offset, length, rank, at)
                continue
            start, end = offset, offset + length
            number = bisect_right(units, offset, key=_offset) - 1
            while start < end:
                stop = min(end, units[number].offset + units[number].numel)
                yield Segment(param, start, stop - start, rank, at + start - offset)
                start, number = stop, number + 1


def _place(
    specs: Sequence[ParamSpec], buckets: Sequence[BucketSpec], placement: Placement, dp_size: int
) -> tuple[PlacedUnit, ...]:
    """Give every unit its workers. A straddler goes, dearest first, to its least loaded holder."""
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
    costs = [ns_cost(specs[param].matrices[unit]) for param, unit in units]
    if placement == "owner":
        load, ideal = [0] * dp_size, sum(costs) / dp_size
        for holders, cost in zip(workers, costs):
            if len(holders) == 1:
                load[holders[0]] += cost
        queue = [(done, rank) for rank, done in enumerate(load)]  # an entry that is out of date has too small a load
        heapify(queue)
        for index in sorted(range(len(units)), key=lambda i: (-costs[i], i)):
            if len(workers[index]) > 1:
                owner = min(workers[index], key=lambda rank: (load[rank], rank))
                if load[owner] + costs[index] > ideal:
                    while queue[0][0] != load[queue[0][1]]:
                        heappop(queue)
                    least, rank = queue[0]
                    owner = owner if load[owner] == least else rank
                load[owner] += costs[index]
                heappush(queue, (load[owner], owner))
                workers[index] = (owner,)
    return tuple(
        PlacedUnit(
            index,
            param,
            specs[param].matrices[unit],
            bucket_of[param],
            tuple(sorted(pieces_of[param, unit], key=lambda piece: piece.param_offset)),
            workers[index],
        )
        for index, (param, unit) in enumerate(units)
    )


def _unit_at(spec: ParamSpec, segment: Segment) -> int:
    """The index of the unit that `segment` belongs to."""
    return bisect_right(spec.matrices, segment.param_offset, key=_offset) - 1
