"""Counts of a `Layout` by rank and stage: bytes moved, bytes held, Newton-Schulz work.

The counts equal those that `group.py`, `metrics.py` and `flat_storage.py` make in training, to the byte; tests compare
the two. `plan.py` decides which layouts are counted. This module makes no tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from distmuon.comm.two_levels import num_nodes, slices_sent
from distmuon.layout.layout import BucketSpec, Layout, PlacedUnit, ns_cost
from distmuon.layout.messages import to_holders, to_workers
from distmuon.math.codecs import master_codec, momentum_codec
from distmuon.options import Options
from distmuon.planning.step_time import INT8, MASTERS, BucketLoad, Coding, HopLoad


@dataclass(frozen=True, slots=True)
class HeldBytes:
    """The bytes that a rank holds. `transient` is an upper estimate of what a step allocates in addition.

    `accumulation` is not part of `total`: a step of several micro-batches holds float32 sums instead of 16-bit or
    released buffers, which is so much more than `gradients`, until the reduction of each bucket starts. Nor is
    `arrivals`, which is held on a CPU alone: the buffers in which the gradients of other ranks arrive.
    """

    parameters: int  # flat buffers, padding included; if shards are given, those, without padding
    staged: int  # separate storage of parameters that are not views of a flat buffer
    gradients: int  # flat gradient buffers, padding included; if shards are given, `param.grad`
    master: int  # this field, `momentum` and `moments` are without padding, as in `metrics()["state_bytes"]`
    momentum: int
    moments: int
    transient: int
    accumulation: int
    arrivals: int

    @property
    def state(self) -> int:
        return self.master + self.momentum + self.moments

    @property
    def total(self) -> int:
        return self.parameters + self.staged + self.gradients + self.state + self.transient


@dataclass(frozen=True, slots=True)
class RankPlan:
    """A rank's work in a step, by stage (stages without traffic are absent), and the bytes that it holds."""

    sent_bytes: dict[str, int]
    sent_between_nodes: dict[str, int]  # of them, those of exchanges and 16-bit reductions that leave the rank's node
    calls: dict[str, int]
    ns_matrices: int
    ns_flops: int  # of the standard form, `newton_schulz.flops`
    held: HeldBytes

    @property
    def state_bytes(self) -> int:
        return self.held.state


def count(
    layout: Layout, options: Options, ns_steps: int = 5, node_size: int = 0
) -> tuple[tuple[RankPlan, ...], list[BucketLoad]]:
    """(plan of each rank, load of each bucket). `node_size`: ranks of a node, if not those that the layout knows."""
    node_size = node_size or layout.node_size or layout.dp_size
    loads = _load(layout, options, node_size)
    wire_bytes = options.precision.wire.itemsize
    same = {
        "reduce_scatter": sum(load.reduce_scatter for load in loads),
        "guard": guard_bytes(layout),
        "all_gather": sum(load.all_gather for load in loads),
    }
    calls = {stage: 1 if stage == "guard" else len(loads) for stage, n in same.items() if n}
    hops = {"dp_gather": [hop for load in loads for hop in load.gather]}
    hops["scatter"] = [hop for load in loads for hop in load.scatter]
    calls |= {stage: len(all_of_stage) for stage, all_of_stage in hops.items() if all_of_stage}
    if same["reduce_scatter"]:
        calls["reduce_scatter"] = sum(load.reduce_levels for load in loads)
    sums = zip(*(_by_rank(loads, name) for name in ("ns_matrices", "ns_flops")))
    ranks: list[RankPlan] = []
    for (matrices, flops), held in zip(sums, _held(layout, options, loads)):
        rank = len(ranks)
        sent = same | {stage: wire_bytes * sum(hop.sent[rank] for hop in hops[stage]) for stage in hops}
        sent = {stage: n for stage, n in sent.items() if n}
        far = {"reduce_scatter": sum(load.reduce_far[rank] for load in loads if load.reduce_far)}
        far |= {stage: wire_bytes * sum(hop.far_sent[rank] for hop in hops[stage]) for stage in hops}
        far = {stage: n for stage, n in far.items() if n}
        ranks.append(RankPlan(sent, far, calls, matrices, ns_steps * flops, held))
    return tuple(ranks), loads


def plan_rank(layout: Layout, options: Options, rank: int, ns_steps: int = 5) -> RankPlan:
    """The plan of a single rank."""
    return count(layout, options, ns_steps)[0][rank]


def sent_bytes(layout: Layout, options: Options, rank: int) -> dict[str, int]:
    """The bytes that `rank` sends in a step, by stage; stages without traffic are absent."""
    return plan_rank(layout, options, rank).sent_bytes


def between_nodes(layout: Layout, options: Options, node_size: int) -> int:
    """The bytes that a step's exchanges move between nodes, of the busiest rank in each, for which all others wait."""
    hops = (hop for load in _load(layout, options, node_size) for hop in (*load.gather, *load.scatter))
    return options.precision.wire.itemsize * sum(max(*hop.far_sent, *hop.far_received) for hop in hops)


def guard_bytes(layout: Layout) -> int:
    """The bytes that a rank sends in the guard's all-reduce, around a ring.

    The message has float64 values: the norm, the number of ranks with elements too large to square, the fingerprint of
    the hyperparameters and its square, and a value for each parameter.
    """
    return 2 * (layout.dp_size - 1) * (4 + len(layout.specs)) * torch.float64.itemsize // layout.dp_size


def _load(layout: Layout, options: Options, node_size: int) -> list[BucketLoad]:
    """The load of each bucket, from one pass over segments and units."""
    num_peers = layout.dp_size - 1
    loads = []
    together = (min(bucket.params) for bucket in layout.buckets if len(bucket.params) > 1)
    first_layer = min((placed.param for placed in layout.matrices), default=min(together, default=0))
    reduction = _reduction(layout, options, node_size)
    for bucket in layout.buckets:
        slice_bytes = options.precision.reduce.itemsize * bucket.shard_size
        gathered = 0 if layout.given else bucket.shard_size * bucket.dtype.itemsize
        if options.sharding.param_gather == "updates" and num_peers:
            gathered = layout.message_bytes(bucket, options.precision.update_codec)
        load = BucketLoad(layout.dp_size, reduction.slices * slice_bytes, num_peers * gathered)
        load.reduce_levels = reduction.levels
        load.reduce_far = [n * slice_bytes for n in reduction.far]
        load.ready_last = min(bucket.params) <= first_layer  # an embedding before it in its own bucket takes no time
        staged = [param for param in bucket.params if not layout.given and layout.is_staged(param)]
        load.updates_travel = options.sharding.param_gather == "updates" and num_peers > 0
        load.coding = INT8 if options.precision.updates == torch.int8 else Coding()
        if bucket.dtype != torch.float32:
            master = options.precision.master if bucket.dtype == torch.bfloat16 else "float32"
            load.compare, load.publish = MASTERS[master]
        load.staged = sum(layout.specs[param].numel for param in staged) * bucket.dtype.itemsize
        for segment in bucket.segments:
            by_rank = load.muon if layout.specs[segment.param].rule == "muon" else load.adamw
            by_rank[segment.rank] += segment.length
        loads.append(load)
    for placed in layout.matrices:
        _add_matrix(loads[placed.bucket], placed, node_size, layout.relays_of(placed.bucket))
    return loads


class _Reduction(NamedTuple):
    """The reduction of each bucket, in slices of a rank."""

    slices: int  # that every rank sends
    far: Sequence[
        int
    ] = ()  # of them, by rank, those that leave its node; empty for float32, whose way is the library's
    levels: int = 1


def _reduction(layout: Layout, options: Options, node_size: int) -> _Reduction:
    dp_size = layout.dp_size
    if layout.given or options.grad_reduction == "external":
        return _Reduction(slices=0)
    if options.precision.reduce == torch.float32:
        return _Reduction(slices=dp_size - 1)
    known = layout.node_size or dp_size
    by_rank = [slices_sent(rank, dp_size, node_size, known) for rank in range(dp_size)]
    levels = 2 if num_nodes(dp_size, known) > 1 else 1
    return _Reduction(slices=by_rank[0][0], far=[far for _, far in by_rank], levels=levels)


def _add_matrix(load: BucketLoad, placed: PlacedUnit, node_size: int, num_relays: int) -> None:
    """Add a matrix to the load of its bucket; `num_relays`: see `to_workers`."""
    for worker in placed.workers:
        load.ns_flops[worker] += ns_cost(placed.unit)
        load.ns_matrices[worker] += len(placed.unit.logical_shapes)
        load.stacked[worker] += placed.unit.numel
    if len(placed.workers) > 1:
        _add_gather_to_all(load, placed, node_size)
        return
    ways = ((load.gather, to_workers(placed, num_relays)), (load.scatter, to_holders(placed, num_relays)))
    for hops, messages in ways:
        for number, sender, receiver, part in messages:
            while number >= len(hops):
                hops.append(HopLoad(load.dp_size))
            hop = hops[number]
            hop.sent[sender] += part.length
            hop.received[receiver] += part.length
            if sender // node_size != receiver // node_size:
                hop.far_sent[sender] += part.length
                hop.far_received[receiver] += part.length


def _add_gather_to_all(load: BucketLoad, placed: PlacedUnit, node_size: int) -> None:
    """Add the messages of `to_workers` if every holder works: of each pair of holders there would be one."""
    if not load.gather:
        load.gather.append(HopLoad(load.dp_size))
    (hop,) = load.gather
    workers_of = Counter(worker // node_size for worker in placed.workers)
    lengths = Counter[int]()  # of the pieces, by rank
    by_node = Counter[int]()
    for source in placed.sources:
        lengths[source.rank] += source.length
        by_node[source.rank // node_size] += source.length
    for worker in placed.workers:
        node, own = worker // node_size, lengths[worker]
        hop.sent[worker] += (len(placed.workers) - 1) * own
        hop.received[worker] += placed.unit.numel - own
        hop.far_sent[worker] += (len(placed.workers) - workers_of[node]) * own
        hop.far_received[worker] += placed.unit.numel - by_node[node]


def _by_rank(loads: Sequence[BucketLoad], name: str) -> list[int]:
    """The sum over the buckets of the count `name`, by rank."""
    return [sum(counts) for counts in zip(*(getattr(load, name) for load in loads))]


def _held(layout: Layout, options: Options, loads: Sequence[BucketLoad]) -> Iterator[HeldBytes]:
    """Yield the bytes held by each rank. Ranks differ only in state and in transient memory."""
    dp_size = layout.dp_size
    if layout.given:
        yield from _held_of_given(layout, options, loads)
        return
    parameters = dp_size * sum(bucket.shard_size * bucket.dtype.itemsize for bucket in layout.buckets)
    gradients = sum(_gradient_bytes(layout, options, bucket) for bucket in layout.buckets)
    stays = 0 if options.sharding.release_grads else options.precision.reduce.itemsize
    more = torch.float32.itemsize - stays if options.grad_reduction == "reduce_scatter" else 0
    accumulation = more * dp_size * sum(bucket.shard_size for bucket in layout.buckets)
    arrivals = 0 if options.sharding.release_grads else sum(_arriving(layout, options, loads))
    momentum = _momentum_bytes(layout, options)
    staged = sum(load.staged for load in loads)
    master_bytes = [_master_bytes(options, bucket) for bucket in layout.buckets]
    for rank in range(dp_size):
        muon = [load.muon[rank] for load in loads]
        adamw = [load.adamw[rank] for load in loads]
        masters = sum((m + a) * itemsize for m, a, itemsize in zip(muon, adamw, master_bytes))
        transient = _transient(layout, loads, options, rank)
        moments = 8 * sum(adamw)
        yield HeldBytes(
            parameters, staged, gradients, masters, momentum[rank], moments, transient, accumulation, arrivals
        )


def _held_of_given(layout: Layout, options: Options, loads: Sequence[BucketLoad]) -> Iterator[HeldBytes]:
    """Yield the bytes held by each rank where others have cut the parameters. FSDP2's own buffers are not counted."""
    momentum = _momentum_bytes(layout, options)
    itemsizes = [bucket.dtype.itemsize for bucket in layout.buckets]
    for rank in range(layout.dp_size):
        held = [load.muon[rank] + load.adamw[rank] for load in loads]
        parameters = sum(n * itemsize for n, itemsize in zip(held, itemsizes))
        masters = sum(n * _master_bytes(options, bucket) for n, bucket in zip(held, layout.buckets))
        copies = sum(4 * n for n, itemsize in zip(held, itemsizes) if itemsize < 4)  # float32 copies of gradients
        transient = copies + _transient(layout, loads, options, rank)
        moments = 8 * sum(load.adamw[rank] for load in loads)
        yield HeldBytes(parameters, 0, parameters, masters, momentum[rank], moments, transient, 0, 0)


def _momentum_bytes(layout: Layout, options: Options) -> list[int]:
    """The bytes of momentum, by rank."""
    found = [0] * layout.dp_size
    codec = momentum_codec(options.precision.momentum)
    for segment in (s for bucket in layout.buckets for s in bucket.segments):
        if layout.specs[segment.param].rule == "muon":
            found[segment.rank] += codec.bytes(segment.length)
    return found


def _master_bytes(options: Options, bucket: BucketSpec) -> int:
    """The bytes an element that are kept beside a parameter to make its float32 master."""
    return master_codec(bucket.dtype, options.precision.master).bytes_per_element


def _gradient_bytes(layout: Layout, options: Options, bucket: BucketSpec) -> int:
    """The bytes held between steps: the flat buffer, if it stays, and a float32 shard, if it is not part of it."""
    stays = not options.grads_stay(layout.dp_size) and not options.sharding.release_grads
    flat = layout.dp_size * bucket.shard_size * options.precision.reduce.itemsize if stays else 0
    return flat + (0 if stays and options.precision.reduce == torch.float32 else 4 * bucket.shard_size)


def _arriving(layout: Layout, options: Options, loads: Sequence[BucketLoad]) -> list[int]:
    """By bucket, the bytes that arrive in a reduction in which every rank sends to others what they sum up."""
    if options.grads_stay(layout.dp_size):
        return []
    each = layout.dp_size * options.precision.reduce.itemsize
    return [each * bucket.shard_size * load.reduce_levels for bucket, load in zip(layout.buckets, loads)]


def _transient(layout: Layout, loads: Sequence[BucketLoad], options: Options, rank: int) -> int:
    """The most bytes that a step has allocated at once on `rank`, with a bucket in each stage; see docs/planner.md."""
    ns = max(options.precision.newton_schulz.itemsize, options.precision.wire.itemsize)
    peak = 0
    gathered = computing = finished = 0  # held by the previous bucket: after its gather, in Newton-Schulz, after it
    last = 0  # held by the bucket before the previous, until its update is applied
    messages = [0]  # updates that travel, two at once
    for bucket, load in zip(reversed(layout.buckets), reversed(loads)):
        stacks = ns * load.stacked[rank]
        holds = stacks + ns * sum(hop.sent[rank] + hop.received[rank] for hop in load.gather)
        opened = 4 * bucket.shard_size if _master_bytes(options, bucket) == 2 else 0  # masters made from remainders
        updates = 4 * load.muon[rank]
        peak = max(peak, holds + updates + gathered + last, holds + computing + last, opened + last)
        last = finished if options.sharding.overlap else 0
        finished = stacks + ns * sum(hop.sent[rank] + hop.received[rank] for hop in load.scatter)
        finished += ns * sum(hop.received[rank] for hop in load.scatter[1:])  # parts, joined to pieces
        computing = holds + finished + 16 * load.stacked[rank]  # Newton-Schulz: four float32 stacks, with Gram matrices
        gathered = holds
        if not options.sharding.overlap:
            peak = max(peak, computing)
            gathered = 0
            computing = 0
        if options.sharding.param_gather == "updates" and layout.dp_size > 1:
            opened = options.precision.update_codec.opened_bytes * max(load.muon)
            messages.append(load.all_gather + load.all_gather // (layout.dp_size - 1) + opened)
    flat = [layout.dp_size * bucket.shard_size * options.precision.reduce.itemsize for bucket in layout.buckets]
    at_once = _largest_pair(flat) if options.sharding.overlap else sum(flat)  # in backward
    in_backward = at_once if options.sharding.release_grads and not options.grads_stay(layout.dp_size) else 0
    if options.precision.reduce != torch.float32:  # on a GPU too, one after the other
        in_backward += max(_arriving(layout, options, loads), default=0)
    return max(peak, computing + last, in_backward) + _largest_pair(messages)


def _largest_pair(sizes: Sequence[int]) -> int:
    """The largest sum of two neighbours."""
    return max(a + b for a, b in zip(sizes, [*sizes[1:], 0]))
