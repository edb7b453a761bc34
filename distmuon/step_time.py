"""How long a step would take on a GPU: an estimate from counts and a small table of hardware. Numbers only.

Decides nothing and knows no layout: the planner hands in what each bucket asks of each rank. The formulas are in
docs/planner.md; every assumed number stands here, with its source or the word "assumption".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, log2


@dataclass(frozen=True, slots=True)
class Hardware:
    """Peak rates of one GPU, each link in one direction, and the shares of them that we assume are reached."""

    flops: float  # a second, dense, 16-bit; other dtypes of Newton-Schulz are taken at half the rate
    memory: float  # bytes a second
    nvlink: float  # bytes a second to the GPUs of the same node
    network: float = 50e9  # bytes a second out of the node: one 400 Gb/s card a GPU, as in DGX H100 and B200
    node_size: int = 8
    flops_share: float = 0.6  # assumption: stacked matrices with short sides of 1k and more
    memory_share: float = 0.8  # assumption
    link_share: float = 0.8  # assumption: what NCCL reaches of a wire with large messages
    latency_s: float = 20e-6  # assumption: one collective in one node, and once more a doubling of the nodes


# Source: NVIDIA's data sheets of the SXM modules (H100, H200) and of HGX B200. FLOPs are dense, half of the figures
# printed with sparsity; NVLink is half of the printed sum of both directions.
HARDWARE: Mapping[str, Hardware] = {
    "h100": Hardware(flops=989e12, memory=3.35e12, nvlink=450e9),
    "h200": Hardware(flops=989e12, memory=4.8e12, nvlink=450e9),
    "b200": Hardware(flops=2250e12, memory=8.0e12, nvlink=900e9),
}

# Memory traffic of the rules, bytes an element of the shard, counted from rules.py with fp32 state and bf16 exchange.
MUON_BEFORE = 42  # two lerps and a commit, 12 each; a copy into the stack, 6
MUON_AFTER = 36  # decay 8, add 10, commit 12, publish 6
ADAMW_AFTER = 34  # fused: reads 16, writes 12; publish 6
GUARD = 4  # the norm reads the gradient shard


@dataclass(slots=True)
class BucketLoad:
    """What a bucket asks of every rank: bytes that each sends alike, and per rank elements, FLOPs and matrices."""

    dp_size: int
    reduce_scatter: int  # bytes
    all_gather: int  # bytes
    muon: list[int] = field(init=False)  # elements of the shard
    adamw: list[int] = field(init=False)
    stacked: list[int] = field(init=False)  # elements of the matrices that the rank orthogonalizes
    gather_out: list[int] = field(init=False)  # elements sent to other ranks, and so on
    gather_in: list[int] = field(init=False)
    scatter_out: list[int] = field(init=False)
    scatter_in: list[int] = field(init=False)
    ns_flops: list[int] = field(init=False)  # of one Newton-Schulz step
    ns_matrices: list[int] = field(init=False)
    gathers: bool = False  # whether the collective takes place at all
    scatters: bool = False

    def __post_init__(self) -> None:
        for name in ("muon", "adamw", "stacked", "gather_out", "gather_in", "scatter_out", "scatter_in"):
            setattr(self, name, [0] * self.dp_size)
        self.ns_flops, self.ns_matrices = [0] * self.dp_size, [0] * self.dp_size


@dataclass(frozen=True, slots=True)
class StepTime:
    """Estimated seconds. `step_s` runs from the last gradient until the next forward can begin on every rank."""

    step_s: float
    newton_schulz_s: float  # the slowest rank's
    elementwise_s: float  # the slowest rank's
    communication_s: float  # on the wire in all, without the reduce-scatters under backward
    exposed_s: float  # `step_s` less the computation of the rank that computes longest
    left_s: float  # all-gathers still on the wire after that, for the next forward to hide


class _Clock:
    """One compute stream a rank and one communication stream that all share; collectives run in order of start."""

    def __init__(self, dp_size: int) -> None:
        self.compute = [0.0] * dp_size
        self.wire, self.busy = 0.0, 0.0

    def work(self, seconds: Sequence[float]) -> None:
        self.compute = [now + more for now, more in zip(self.compute, seconds)]

    def start(self, seconds: float) -> float:
        """A collective begins when the last rank has come to it; returns when it is over."""
        self.wire = max(self.wire, max(self.compute)) + seconds
        self.busy += seconds
        return self.wire

    def wait(self, until: float) -> None:
        self.compute = [max(now, until) for now in self.compute]


def estimate(
    loads: Sequence[BucketLoad], hardware: Hardware, *, guard_bytes: int, ns_bytes: int, ns_steps: int, overlap: bool
) -> StepTime:
    """Walk the buckets as the optimizer does, the first layers' first. `ns_bytes`: of an orthogonalized element."""
    dp_size, h, loads = loads[0].dp_size, hardware, loads[::-1]
    one_node = dp_size <= h.node_size
    latency = h.latency_s * (1 + log2(max(1, ceil(dp_size / h.node_size)))) if dp_size > 1 else 0.0
    ring = h.link_share * (h.nvlink if one_node else min(h.nvlink, h.node_size * h.network))
    direct = h.link_share * (h.nvlink if one_node else h.network)
    flops = h.flops * h.flops_share * (1.0 if ns_bytes == 2 else 0.5)
    memory = h.memory * h.memory_share

    def passes(elements: Sequence[int], each: int) -> list[float]:
        return [n * each / memory for n in elements]

    def exchange(out: Sequence[int], into: Sequence[int]) -> float:
        return max(*out, *into) * ns_bytes / direct + latency

    before = [passes(load.muon, MUON_BEFORE) for load in loads]
    newton_schulz = [[ns_steps * n / flops for n in load.ns_flops] for load in loads]
    after = [[a + b for a, b in zip(passes(load.muon, MUON_AFTER), passes(load.adamw, ADAMW_AFTER))] for load in loads]
    guard = passes([sum(both) for both in zip(*(load.muon for load in loads), *(load.adamw for load in loads))], GUARD)

    clock, done = _Clock(dp_size), [0.0] * len(loads)
    if dp_size > 1 and loads[0].reduce_scatter:
        clock.wait(clock.start(loads[0].reduce_scatter / ring + latency))  # the others ran under backward
    clock.work(guard)
    clock.wait(clock.start(guard_bytes / ring + 2 * latency))
    stages = range(3)
    order = [(tick - stage, stage) for tick in range(len(loads) + 2) for stage in stages]
    if not overlap:
        order = [(bucket, stage) for bucket in range(len(loads)) for stage in stages]
    for bucket, stage in order:
        if not 0 <= bucket < len(loads):
            continue
        load = loads[bucket]
        if stage == 0:
            clock.work(before[bucket])
            done[bucket] = clock.start(exchange(load.gather_out, load.gather_in)) if load.gathers else 0.0
        elif stage == 1:
            clock.wait(done[bucket])
            clock.work(newton_schulz[bucket])
            done[bucket] = clock.start(exchange(load.scatter_out, load.scatter_in)) if load.scatters else 0.0
        else:
            clock.wait(done[bucket])
            clock.work(after[bucket])
            done[bucket] = clock.start(load.all_gather / ring + latency)
    step = max(done[0] if overlap else clock.wire, *clock.compute)
    ns_of = [sum(of_rank) for of_rank in zip(*newton_schulz)]
    rest_of = [sum(of_rank) for of_rank in zip(guard, *before, *after)]
    computing = max(a + b for a, b in zip(ns_of, rest_of))
    return StepTime(step, max(ns_of), max(rest_of), clock.busy, step - computing, max(0.0, clock.wire - step))
