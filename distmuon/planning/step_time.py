"""Estimate of the time of a step on a GPU, from counts and a small table of hardware. Numbers only.

This module decides nothing and knows no layout: the planner passes the load of each bucket on each rank. The formulas
are in docs/planner.md; every assumed number is defined here, with its source or the word "assumption".
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, inf, log2
from typing import Literal, NamedTuple

from distmuon.errors import problem

# The start of a bucket's all-gather. "one_group": at once, in one queue with the exchanges. "exchange_group": at once,
# and the exchanges have a separate process group. "gathers_wait": once exchanges hardly wait for it.
Order = Literal["one_group", "exchange_group", "gathers_wait"]
NODE_SIZE = 8
ORDERS: tuple[Order, ...] = ("one_group", "exchange_group", "gathers_wait")


@dataclass(frozen=True, slots=True)
class Passes:
    """Memory traffic of the rules, bytes an element, with fp32 state and a bf16 exchange."""

    momentum: int  # of Muon's shard: both lines of momentum, and the way into the stack
    normalize: int  # of the matrices that a rank orthogonalizes, on the way into Newton-Schulz
    apply: int  # of Muon's shard; of the whole bucket if updates travel
    adamw: int = 28  # of AdamW's shard: reads 16, writes 12


# On a GPU each line is one kernel, by Triton (counted: tests/unit/test_launches.py); a CPU has torch's operators.
ON_GPU = Passes(momentum=14, normalize=6, apply=10)  # reads 8, writes 6; norm 2, division 4; reads 6, writes 4
ON_CPU = Passes(momentum=30, normalize=40, apply=34)


@dataclass(frozen=True, slots=True)
class Hardware:
    """Peak rates of a GPU (of links: in one direction), and the shares of the peaks that a step is assumed to reach."""

    flops: float  # a second, dense, 16-bit
    memory: float  # bytes a second
    nvlink: float  # bytes a second to the GPUs of the same node
    network: float = 50e9  # bytes a second out of the node: one 400 Gb/s card a GPU, as in DGX H100 and B200
    node_size: int = NODE_SIZE
    hbm: float | None = None  # bytes of memory; None: not known
    passes: Passes = ON_GPU
    float32_share: float = 0.5  # assumption: share of `flops` if Newton-Schulz is not 16-bit
    flops_share: float = 0.6  # assumption, for stacked matrices with short sides of 1k and more
    memory_share: float = 0.8  # assumption
    link_share: float = 0.8  # assumption: share of a link that NCCL reaches with large messages
    latency_s: float = 20e-6  # assumption: for a collective in a node, and again for each doubling of the nodes


# Source: NVIDIA's data sheets of the SXM modules (A100 80 GB, H100, H200) and of HGX B200; the cards of DGX A100 have
# 200 Gb/s. FLOPs are dense, half of the figures printed with sparsity; NVLink is half of the printed sum of both
# directions.
HARDWARE: Mapping[str, Hardware] = {
    "a100": Hardware(flops=312e12, memory=2.039e12, nvlink=300e9, network=25e9, hbm=80e9),
    "h100": Hardware(flops=989e12, memory=3.35e12, nvlink=450e9, hbm=80e9),
    "h200": Hardware(flops=989e12, memory=4.8e12, nvlink=450e9, hbm=141e9),
    "b200": Hardware(flops=2250e12, memory=8.0e12, nvlink=900e9, hbm=180e9),
    # Measured, so without shares: 2 processes of 1 thread on an idle 2-core virtual machine (AMD Zen 5).
    # `python -m benchmarks.hardware` prints the row of a machine; the links are gloo on loopback.
    "cpu": Hardware(
        flops=4.01e11,
        memory=2.54e10,
        nvlink=1.36e9,
        network=1.36e9,
        float32_share=0.232,
        flops_share=1.0,
        memory_share=1.0,
        link_share=1.0,
        latency_s=3.7e-4,
        passes=ON_CPU,
    ),
}

# An entry of a row in text: the field, and what a unit of the text is in the field's.
_ENTRIES: Mapping[str, tuple[str, float]] = {
    "tflops": ("flops", 1e12),
    "memory_tbs": ("memory", 1e12),
    "nvlink_gbs": ("nvlink", 1e9),
    "network_gbs": ("network", 1e9),
    "hbm_gb": ("hbm", 1e9),
    "node_size": ("node_size", 1),
    "latency_us": ("latency_s", 1e-6),
    **{name: (name, 1.0) for name in ("flops_share", "memory_share", "link_share", "float32_share")},
}
_NEEDED = ("tflops", "memory_tbs", "nvlink_gbs")


def hardware_row(text: str) -> Hardware:
    """The row that `text` describes: the name of a row, entries "tflops=400,memory_tbs=2,nvlink_gbs=300,...", or a name
    with entries that replace its own: "h100,network_gbs=25".
    """
    name, *entries = text.split(",") if "=" not in text.partition(",")[0] else ("", *text.split(","))
    where, needed = "hardware", f"one of {', '.join(HARDWARE)}, or entries such as tflops=400 are needed"
    if name and name not in HARDWARE:
        raise problem(where, found=f"found {name!r}", needed=needed, cure=f"name one, or write {_EXAMPLE}")
    given: dict[str, float] = {}
    for entry in entries:
        key, _, number = entry.partition("=")
        if key not in _ENTRIES:
            known = f"one of {', '.join(_ENTRIES)} is needed"
            raise problem(where, found=f"found {entry!r}", needed=known, cure=f"write {_EXAMPLE}")
        field_name, unit = _ENTRIES[key]
        given[field_name] = _positive(entry, number) * unit
    if "node_size" in given:
        given["node_size"] = max(1, round(given["node_size"]))
    missing = [] if name else [key for key in _NEEDED if _ENTRIES[key][0] not in given]
    if missing:
        raise problem(
            where,
            found=f"found {text!r} without {', '.join(missing)}",
            needed=f"{', '.join(_NEEDED)} are needed",
            cure="add them, or begin with the name of a row",
        )
    # mypy cannot tell the keys apart
    return replace(HARDWARE[name], **given) if name else Hardware(**given)  # type: ignore[arg-type]


_EXAMPLE = "tflops=400,memory_tbs=2,nvlink_gbs=300,network_gbs=25,hbm_gb=80"


def _positive(entry: str, number: str) -> float:
    try:
        found = float(number)
    except ValueError:
        found = 0.0
    if not 0 < found < inf:
        raise problem(
            "hardware", found=f"found {entry!r}", needed="a positive number is needed", cure="correct the number"
        )
    return found


# Where a 16-bit parameter has a float32 master: masters are compared with parameters that others may have written, and
# parameters are rounded from them. By the format of the master; a remainder is never compared.
MASTERS: Mapping[str, tuple[int, int]] = {"float32": (6, 6), "remainder": (0, 16)}
GUARD = 4  # the norm reads the gradient shard
MESSAGE = 6  # an element of Muon's shard, copied into a message of updates that was made of zeros
ARRIVAL = 8  # an element of AdamW in such a message, copied out


class Coding(NamedTuple):
    """Memory traffic of updates in int8, bytes an element: plain operators of torch, many passes."""

    rounded: int = 0  # of the matrices that a rank orthogonalizes
    sent: int = 0  # of Muon's shard, on the way into a message
    arrived: int = 0  # of Muon's elements of the model


INT8 = Coding(rounded=105, sent=95, arrived=14)  # counted: tests/unit/test_launches.py
REDUCE_SUM = 2  # an element that arrives is read, by one kernel for all ranks; only where gradients have 16 bits


@dataclass(slots=True)
class HopLoad:
    """The elements that one hop of an exchange moves, by rank; `far`: those of them that leave their node."""

    dp_size: int
    sent: list[int] = field(init=False)
    received: list[int] = field(init=False)
    far_sent: list[int] = field(init=False)
    far_received: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.sent, self.received, self.far_sent, self.far_received = ([0] * self.dp_size for _ in range(4))


@dataclass(slots=True)
class BucketLoad:
    """The load of a bucket: bytes that every rank sends, and by rank elements, FLOPs and matrices."""

    dp_size: int
    reduce_scatter: int  # bytes
    all_gather: int  # bytes
    reduce_far: list[int] = field(default_factory=list)  # by rank, bytes that leave its node; empty: around a ring
    reduce_levels: int = 1  # 2: inside each node, then between nodes
    muon: list[int] = field(init=False)  # elements of the shard
    adamw: list[int] = field(init=False)
    stacked: list[int] = field(init=False)  # elements of the matrices that the rank orthogonalizes
    gather: list[HopLoad] = field(default_factory=list)  # empty: nothing travels, and there is no collective
    scatter: list[HopLoad] = field(default_factory=list)
    ns_flops: list[int] = field(init=False)  # of one Newton-Schulz iteration
    ns_matrices: list[int] = field(init=False)
    ready_last: bool = False  # holds the first layer: backward is over, so nothing hides its reduce-scatter
    staged: int = 0  # bytes of parameters that every rank copies out of the flat buffer after the all-gather
    compare: int = 0  # bytes of memory traffic an element of the shard, see MASTERS; `publish`: the same
    publish: int = 0
    updates_travel: bool = False  # every rank applies the updates of all ranks
    coding: Coding = field(default_factory=Coding)

    def __post_init__(self) -> None:
        for name in ("muon", "adamw", "stacked"):
            setattr(self, name, [0] * self.dp_size)
        self.ns_flops = [0] * self.dp_size
        self.ns_matrices = [0] * self.dp_size


@dataclass(frozen=True, slots=True)
class StepTime:
    """Estimated seconds. `step_s` runs from the last gradient until the next forward can begin on every rank.

    It includes all copies of staged parameters, also those that happen in the forward, since nothing hides them.
    """

    step_s: float
    newton_schulz_s: float  # the slowest rank's
    elementwise_s: float  # the slowest rank's
    communication_s: float  # total time on the wire, without the reduce-scatters that backward hides
    exposed_s: float  # `step_s` less the computation of the slowest rank
    left_s: float  # time of all-gathers that remain on the wire after the step, for the next forward to hide


@dataclass(slots=True, eq=False)
class _Collective:
    begin: float  # the earliest start
    left: float  # remaining seconds, if it has the wire alone
    end: float = 0.0


class _Clock:
    """A compute stream for each rank, and the wire that all ranks share, with one or two queues of collectives.

    The collectives of a queue run one after another, in order of start, as those of an NCCL communicator do. While both
    queues are busy they share the wire equally, so each runs at half speed.
    """

    def __init__(self, dp_size: int) -> None:
        self.compute = [0.0] * dp_size
        self.busy = 0.0
        self._now = 0.0  # the wire has been simulated up to this time
        self._queues: tuple[deque[_Collective], ...] = (deque(), deque())

    def work(self, seconds: Sequence[float]) -> None:
        self.compute = [now + more for now, more in zip(self.compute, seconds)]

    def start(self, seconds: float, queue: int = 0) -> _Collective:
        """Queue a collective, which begins when the last rank has reached it and earlier collectives have ended."""
        self.busy += seconds
        collective = _Collective(max(self.compute), seconds)
        self._queues[queue].append(collective)
        return collective

    def wait(self, collective: _Collective) -> None:
        until = self.end(collective)
        self.compute = [max(now, until) for now in self.compute]

    def end(self, collective: _Collective) -> float:
        """The end of `collective`. Collectives that start after a `wait` for it cannot slow it down."""
        while collective.left:
            heads = [queue[0] for queue in self._queues if queue]
            running = [head for head in heads if head.begin <= self._now]
            later = min((head.begin for head in heads if head.begin > self._now), default=inf)
            if not running:
                self._now = later
                continue
            pace = len(running)
            span = min(min(head.left for head in running) * pace, later - self._now)
            self._now += span
            for queue in self._queues:
                if queue and queue[0] in running:
                    head = queue[0]
                    head.left = head.left - span / pace if head.left * pace > span else 0.0
                    if not head.left:
                        head.end = self._now
                        queue.popleft()
        return collective.end


class _Rates:
    """Rates of the hardware in the units of `BucketLoad`."""

    def __init__(self, hardware: Hardware, dp_size: int, ns_bytes: int, wire_bytes: int) -> None:
        h = hardware
        num_nodes = max(1, ceil(dp_size / h.node_size))
        self.near_latency = h.latency_s if dp_size > 1 else 0.0
        self.latency = self.near_latency * (1 + log2(num_nodes))
        self.ring = h.link_share * (h.nvlink if num_nodes == 1 else min(h.nvlink, h.node_size * h.network))
        self.nvlink = h.link_share * h.nvlink
        self.card = h.link_share * h.network
        self.flops = h.flops * h.flops_share * (1.0 if ns_bytes == 2 else h.float32_share)
        self.memory = h.memory * h.memory_share
        self.each = h.passes
        self.wire_bytes = wire_bytes

    def passes(self, elements: Sequence[int], bytes_per_element: int) -> list[float]:
        """Seconds, by rank, to read and write `bytes_per_element` bytes for each element."""
        return [n * bytes_per_element / self.memory for n in elements]

    def ring_pass(self, sent: int) -> float:
        """Seconds for a reduce-scatter or all-gather in which every rank sends `sent` bytes; without bytes none."""
        return sent / self.ring + self.latency if sent else 0.0

    def reduction(self, load: BucketLoad) -> float:
        """Seconds for a bucket's reduce-scatter: around a ring, or by one or two exchanges of 16-bit gradients."""
        if not load.reduce_far or not load.reduce_scatter:
            return self.ring_pass(load.reduce_scatter)
        far = max(load.reduce_far)
        latency = (self.latency if far else self.near_latency) + (load.reduce_levels - 1) * self.near_latency
        return (load.reduce_scatter - far) / self.nvlink + far / self.card + latency

    def sums(self, load: BucketLoad) -> float:
        """Seconds to add up the 16-bit gradients that arrive, as many as leave."""
        return load.reduce_scatter / 2 * REDUCE_SUM / self.memory if load.reduce_far else 0.0

    def after(self, load: BucketLoad, shard: Sequence[int]) -> list[list[float]]:
        """Seconds, by rank, of the passes between the scatter and the all-gather; `shard`: elements of either rule."""
        adamw = self.passes(load.adamw, self.each.adamw)
        if load.updates_travel:
            return [adamw, self.passes(load.adamw, ARRIVAL), self.passes(load.muon, MESSAGE + load.coding.sent)]
        return [adamw, self.passes(load.muon, self.each.apply), self.passes(shard, load.publish)]

    def arrival(self, load: BucketLoad) -> float:
        """Seconds of the passes after the all-gather: staged parameters are copied out, all updates are applied."""
        num_bytes = 2 * load.staged
        if load.updates_travel:
            num_bytes += (self.each.apply + load.coding.arrived) * sum(load.muon) + ARRIVAL * sum(load.adamw)
        return num_bytes / self.memory

    def exchange(self, hops: Sequence[HopLoad]) -> float:
        """Seconds of all hops. In each the busiest rank sends and receives its elements, first inside its node, then
        through its card. A hop that leaves no node has the latency of one inside a node.
        """
        seconds = 0.0
        for hop in hops:
            ways = ((hop.sent, hop.far_sent), (hop.received, hop.far_received))
            by_rank = [(n - far) / self.nvlink + far / self.card for way in ways for n, far in zip(*way)]
            seconds += max(by_rank) * self.wire_bytes + (self.latency if any(hop.far_sent) else self.near_latency)
        return seconds


def _sums(*by_rank: Sequence[float]) -> list[float]:
    """The sums over lists of seconds by rank."""
    return [sum(seconds) for seconds in zip(*by_rank)]


def _visits(num_buckets: int, overlap: bool) -> list[tuple[int, int]]:
    """(bucket, stage) in the order of the step: a pipeline of three stages with `overlap`, else bucket by bucket."""
    if not overlap:
        return [(bucket, stage) for bucket in range(num_buckets) for stage in range(3)]
    visits = [(tick - stage, stage) for tick in range(num_buckets + 2) for stage in range(3)]
    return [(bucket, stage) for bucket, stage in visits if 0 <= bucket < num_buckets]


def estimate(
    loads: Sequence[BucketLoad],
    hardware: Hardware,
    *,
    guard_bytes: int,
    ns_bytes: int,
    wire_bytes: int,
    ns_steps: int,
    overlap: bool,
    gathers_in_forward: bool,
    order: Order = "one_group",
    gathers_started: Sequence[int] = (),
) -> StepTime:
    """Simulate the buckets in the optimizer's order, the first layers first.

    `ns_bytes`, `wire_bytes`: bytes of an element in Newton-Schulz and in the exchange.

    `gathers_in_forward`: the step ends when the first bucket's parameters have arrived, and the forward hides the other
    all-gathers. Otherwise the step ends when all parameters have arrived. `gathers_started`: `Layout.gathers_started`,
    for the order "gathers_wait".
    """
    dp_size = loads[0].dp_size
    loads = loads[::-1]
    rates = _Rates(hardware, dp_size, ns_bytes, wire_bytes)
    passes, each = rates.passes, hardware.passes
    shards = [[a + b for a, b in zip(load.muon, load.adamw)] for load in loads]
    compare = [passes(shard, load.compare) for shard, load in zip(shards, loads)]
    guard = [passes(shard, GUARD) for shard in shards]
    before = [passes(load.muon, each.momentum) for load in loads]
    normalize = [passes(load.stacked, each.normalize + load.coding.rounded) for load in loads]
    newton_schulz = [[ns_steps * n / rates.flops for n in load.ns_flops] for load in loads]
    after = [_sums(*rates.after(load, shard)) for load, shard in zip(loads, shards)]

    clock = _Clock(dp_size)
    exchange_queue = 1 if order == "exchange_group" else 0
    late = [load for load in loads if load.ready_last and load.reduce_scatter]  # backward hides the others
    reductions = [clock.start(rates.reduction(load)) for load in late]
    clock.work(_sums(*compare))
    for load, reduction in zip(late, reductions):
        clock.wait(reduction)
        clock.work([rates.sums(load)] * dp_size)
    clock.work(_sums(*guard))
    clock.wait(clock.start(guard_bytes / rates.ring + 2 * rates.latency))
    exchanged: dict[int, _Collective] = {}  # the exchange in flight, by bucket
    gathers: list[_Collective] = []  # all-gathers of parameters, by bucket
    started = gathers_started if order == "gathers_wait" else range(1, len(loads) + 1)
    for bucket, stage in _visits(len(loads), overlap):
        load = loads[bucket]
        if stage and bucket in exchanged:
            clock.wait(exchanged.pop(bucket))
        if stage == 0:
            clock.work(before[bucket])
            if load.gather:
                exchanged[bucket] = clock.start(rates.exchange(load.gather), exchange_queue)
        elif stage == 1:
            clock.work(_sums(normalize[bucket], newton_schulz[bucket]))
            if load.scatter:
                exchanged[bucket] = clock.start(rates.exchange(load.scatter), exchange_queue)
        else:
            clock.work(after[bucket])
            ready = loads[len(gathers) : started[bucket]]
            gathers += [clock.start(rates.ring_pass(earlier.all_gather)) for earlier in ready]
    last = clock.end(gathers[-1])
    step = max(gathers[0].end if gathers_in_forward else last, *clock.compute)
    ns_seconds = _sums(*newton_schulz)
    copies = sum(rates.arrival(load) for load in loads)
    fixed = copies + sum(rates.sums(load) for load in late)
    elementwise = [seconds + fixed for seconds in _sums(*compare, *guard, *before, *normalize, *after)]
    computing = max(a + b for a, b in zip(ns_seconds, elementwise))
    exposed = step + copies - computing
    left = max(0.0, last - step - copies)
    return StepTime(step + copies, max(ns_seconds), max(elementwise), clock.busy, exposed, left)
