"""Plans a model on any number of ranks without running it, and compares ways of distributing Muon. Holds no tensor.

`plan` makes training's own layout, also for a model on the meta device; `counts.py` counts it and `step_time.py`
estimates a step. Here stands what is compared with what, and the short texts of `DistMuon.report`.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from heapq import heapreplace

import torch
from torch import nn

from distmuon import memory
from distmuon.config import GradReduction, MasterFormat, Options, Overlap, Packing, ParamGather, Placement, one_of
from distmuon.counts import HeldBytes, RankPlan, count, guard_bytes, plan_rank, sent_bytes
from distmuon.errors import problem
from distmuon.layout import Bucket, Layout, PlacedMatrix, Segment, make_layout
from distmuon.packing import ALIGNMENT, Item, pack_evenly
from distmuon.routing import ParamSpec, Route, route_params
from distmuon.shapes import TABLES, shape_table
from distmuon.step_time import HARDWARE, ORDERS, Hardware, Order, StepTime, estimate

__all__ = ["HARDWARE", "STAGES", "HeldBytes", "Plan", "RankPlan", "describe", "plan", "plan_rank", "routing_table",
           "sent_bytes", "whole_matrix_layout"]  # fmt: skip

STAGES = ("reduce_scatter", "guard", "dp_gather", "scatter", "all_gather")
_AUTO_PARTS = (32, 24, 16, 12, 8, 6, 4)  # bucket sizes that "auto" tries, as parts of the model


@dataclass(frozen=True, slots=True)
class Plan:
    """One model on `dp_size` ranks in one way. `others`: the same model in the ways it is compared with."""

    way: str
    dp_size: int
    num_elements: int
    num_matrices: int
    num_buckets: int
    largest_bucket: float  # this and the next as shares of the model's elements, but straddlers: matrices
    padding: float
    staged: float
    straddlers: int
    ranks: tuple[RankPlan, ...]
    time: StepTime | None  # in the order of collectives that was asked for
    orders: dict[Order, StepTime]  # in each order; one where nothing overlaps, none without hardware
    others: tuple[Plan, ...] = ()
    why: str = ""

    @property
    def sent(self) -> int:
        """Bytes that the busiest rank sends in a step."""
        return max(sum(rank.sent_bytes.values()) for rank in self.ranks)

    @property
    def traffic(self) -> float | None:
        """`sent` relative to that of ZeRO-1 AdamW for the same model; None where that was not planned."""
        adamw = next((other.sent for other in self.others if other.way == "adamw"), 0)
        return self.sent / adamw if adamw else None

    @property
    def ns_balance(self) -> float:
        return _balance([rank.ns_flops for rank in self.ranks])

    @property
    def state_balance(self) -> float:
        return _balance([rank.state_bytes for rank in self.ranks])

    @property
    def fullest(self) -> HeldBytes:
        """What the rank that holds most holds."""
        return max((rank.held for rank in self.ranks), key=lambda held: held.total)

    def stage_bytes(self, stage: str) -> int:
        """Bytes that the busiest rank of `stage` sends in it."""
        return max(rank.sent_bytes.get(stage, 0) for rank in self.ranks)

    def to_dict(self, *, ranks: bool = False) -> dict[str, object]:
        """Everything, fit for JSON; `ranks`: also the long list of what each rank does and holds."""
        kept = [name for name in self.__slots__ if name not in ("ranks", "others", "time", "orders")]
        found = {name: getattr(self, name) for name in (*kept, "traffic", "ns_balance", "state_balance")}
        found["busiest_sent_bytes"] = {stage: self.stage_bytes(stage) for stage in STAGES} | {"total": self.sent}
        found["fullest_held_bytes"] = asdict(self.fullest) | {"state": self.fullest.state, "total": self.fullest.total}
        found["busiest_ns_flops"] = max(rank.ns_flops for rank in self.ranks)
        found["time"] = asdict(self.time) if self.time else None
        found["orders"] = {order: asdict(time) for order, time in self.orders.items()}
        found["ranks"] = [asdict(rank) for rank in self.ranks] if ranks else None
        return found | {"others": [other.to_dict(ranks=ranks) for other in self.others]}


def plan(
    model: nn.Module | Iterable[ParamSpec] | str,
    *,
    dp_size: int,
    routes: Sequence[Route] | str | None = None,
    packing: Packing = "balanced",
    placement: Placement = "owner",
    grad_reduction: GradReduction = "reduce_scatter",
    bucket_mb: float | str | None = None,
    reduce_dtype: torch.dtype = torch.float32,
    release_grads: bool = False,
    param_gather: ParamGather = "parameters",
    master_format: MasterFormat = "float32",
    momentum_dtype: torch.dtype = torch.float32,
    ns_dtype: torch.dtype = torch.bfloat16,
    exchange_dtype: torch.dtype | None = None,
    ns_steps: int = 5,
    param_dtype: torch.dtype | None = None,
    overlap: Overlap = True,
    exchange_group: bool = False,
    hardware: str | Hardware | None = "h100",
    compare: bool = True,
) -> Plan:
    """What `DistMuon` with these options does and holds on `dp_size` ranks. Makes no tensor and no process group.

    `model`: a module (the meta device is enough), `ParamSpec`s, or the name of a table in `shapes.py`. `routes`: as for
    `DistMuon`; specs and tables are routed already and take only "adamw". `param_dtype`: None: as the parameters are.
    `bucket_mb`: as for `DistMuon`, or "auto": the size with the shortest estimated step, None where none is shorter.
    `exchange_group`: of the estimates, take the one in which exchanges have a process group of their own. `compare`:
    plan also ZeRO-1 AdamW, the paper's placement, and whole matrices in padded shards. Raises ValueError where
    `DistMuon` would.
    """
    for name, value, most in (("dp_size", dp_size, 1 << 17), ("ns_steps", ns_steps, 99)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise problem(name, f"found {value!r}", f"a whole number from 1 to {most} is needed", f"correct {name}")
    if not (hardware is None or isinstance(hardware, Hardware) or hardware in [*HARDWARE]):
        raise problem("hardware", f"found {hardware!r}", f"one of {', '.join(HARDWARE)} is needed", "or pass Hardware")
    auto = isinstance(bucket_mb, str) and bucket_mb == "auto"
    if isinstance(bucket_mb, str) and (not auto or hardware is None):
        raise problem("bucket_mb", f"found {bucket_mb!r}", 'MiB, None, or "auto" and hardware is needed', "correct it")
    one_of("param_dtype", param_dtype, (None, torch.float32, torch.bfloat16, torch.float16))
    specs = _routed(model, routes)
    specs = specs if param_dtype is None else [replace(spec, dtype=param_dtype) for spec in specs]
    if not specs:
        raise problem("model", "no trainable parameter", "one at least is needed", "pass the whole model")
    given_mb = None if isinstance(bucket_mb, str) else bucket_mb
    size_mb = sum(spec.numel for spec in specs) * 4 / (1 << 20)
    tried = [None, *(max(32.0, size_mb / part) for part in _AUTO_PARTS)] if auto else [given_mb]
    options = Options(
        packing=packing, placement=placement, grad_reduction=grad_reduction, param_gather=param_gather,
        bucket_mb=given_mb, reduce_dtype=reduce_dtype, release_grads=release_grads, master_format=master_format,
        momentum_dtype=momentum_dtype, ns_dtype=ns_dtype, exchange_dtype=exchange_dtype, overlap=overlap,
    )  # fmt: skip
    options.check_dtypes([(spec.fqn, spec.dtype) for spec in specs])
    machine = HARDWARE[hardware] if isinstance(hardware, str) else hardware

    def way(name: str, layout: Layout) -> Plan:
        return _plan_layout(name, layout, options, ns_steps, machine, exchange_group)

    def cut(specs: Sequence[ParamSpec], packing: Packing, placement: Placement, mb: float | None) -> Layout:
        return make_layout(specs, dp_size, packing=packing, placement=placement, bucket_mb=mb)

    with _no_garbage_collection():
        found = {mb: way("distmuon", cut(specs, packing, placement, mb)) for mb in dict.fromkeys(tried)}
        steps = {mb: one.time.step_s for mb, one in found.items() if one.time}
        best = min(steps, key=lambda mb: steps[mb]) if len(steps) > 1 else next(iter(found))
        others: list[Plan] = []
        if compare:
            mb = size_mb / found[best].num_buckets
            others.append(way("adamw", cut(_all_adamw(specs), "contiguous", "owner", mb)))
            others.append(way("paper", cut(specs, "contiguous", "replicated", mb)))
            others.append(way("whole matrices", whole_matrix_layout(specs, dp_size, mb)))
    sizes = {mb: f"{mb:.0f} MiB" if mb else "None" for mb in found}
    why = ", ".join(f"{sizes[mb]} {1e3 * step:.2f} ms" for mb, step in steps.items())
    why = f"{sizes[best]} has the shortest estimated step of {why}" if auto else ""
    return replace(found[best], others=tuple(others), why=why)


def whole_matrix_layout(specs: Sequence[ParamSpec], dp_size: int, bucket_mb: float) -> Layout:
    """Megatron-core's layer-wise optimizer: every matrix whole on one rank, and padding instead of an exchange.

    A bucket of matrices closes at `bucket_mb` or 0.9*dp_size times its largest matrix, each goes to the rank with the
    fewest elements so far (largest first), and all shards are padded to the tallest. The rest is cut evenly.
    """
    specs = [part for spec in specs for part in _separate(spec)]
    buckets: list[Bucket] = []
    matrices: list[PlacedMatrix] = []

    def close(params: list[int]) -> None:
        index, segments = len(buckets), []
        if not specs[params[0]].matrices:
            size, shards = pack_evenly([Item(p, 0, specs[p].numel) for p in params], dp_size)
            for rank, shard in enumerate(shards):
                segments += [
                    Segment(piece.param, piece.offset, piece.length, rank, piece.shard_offset) for piece in shard
                ]
        else:
            heights = [(0, rank) for rank in range(dp_size)]  # a heap
            for param in sorted(params, key=lambda p: -specs[p].numel):
                height, rank = heights[0]
                segments.append(Segment(param, 0, specs[param].numel, rank, height))
                heapreplace(heights, (height + Item(param, 0, specs[param].numel).blocks * ALIGNMENT, rank))
                unit = specs[param].matrices[0]
                matrices.append(PlacedMatrix(len(matrices), param, unit, index, (segments[-1],), (rank,)))
            size = max(heights)[0]
        buckets.append(Bucket(index, specs[params[0]].dtype, tuple(params), size, tuple(segments)))

    for dtype in dict.fromkeys(spec.dtype for spec in specs):
        of_dtype = [p for p in reversed(range(len(specs))) if specs[p].dtype == dtype]
        bucket: list[int] = []
        filled = largest = 0
        for param in (p for p in of_dtype if specs[p].matrices):
            bucket.append(param)
            filled, largest = filled + specs[param].numel, max(largest, specs[param].numel)
            if filled >= max(bucket_mb * (1 << 20) / 4, 0.9 * dp_size * largest):
                close(bucket)
                bucket, filled, largest = [], 0, 0
        rest = [p for p in of_dtype if not specs[p].matrices]
        for params in (bucket, rest):
            if params:
                close(params)
    return Layout(dp_size, tuple(specs), tuple(buckets), tuple(matrices))


def _separate(spec: ParamSpec) -> Iterator[ParamSpec]:
    """Each matrix as a parameter of its own: what Megatron's models have where others fuse and stack."""
    for number, unit in enumerate(spec.matrices):
        own = replace(unit, offset=0)
        yield replace(spec, fqn=f"{spec.fqn}.{number}", shape=(unit.rows, unit.columns), matrices=(own,))
    if not spec.matrices:
        yield spec


def describe(layout: Layout, num_frozen: int = 0) -> str:
    """What went where, in a few lines: rules, logical matrices, buckets, straddlers, padding."""
    lines = []
    for rule, label in (("muon", "Muon"), ("adamw", "AdamW")):
        specs = [spec for spec in layout.specs if spec.rule == rule]
        matrices = sum(len(m.logical_shapes) for spec in specs for m in spec.matrices)
        of_matrices = f" ({matrices} matrices)" if rule == "muon" else ""
        lines.append(f"{label}: {len(specs)} tensors{of_matrices}, {sum(s.numel for s in specs):,} elements")
    counted = _plan_layout("distmuon", layout, Options(), 1, None)
    lines.append(f"frozen: {num_frozen} tensors")
    lines.append(
        f"layout: dp_size {layout.dp_size}, {counted.num_buckets} buckets, {counted.straddlers} straddlers, "
        f"Newton-Schulz max/mean {counted.ns_balance:.3f}, padding {100 * counted.padding:.3f} %, "
        f"staged {100 * counted.staged:.1f} %"
    )
    return "\n".join(lines)


def routing_table(layout: Layout) -> str:
    """One line a parameter: fqn, shape, rule, reason."""
    width = max(len(spec.fqn) for spec in layout.specs)
    return "\n".join(f"{s.fqn:<{width}}  {s.shape!s:<20} {s.rule:<6} {s.reason}" for s in layout.specs)


def _plan_layout(
    way: str, layout: Layout, options: Options, ns_steps: int, hardware: Hardware | None, exchange_group: bool = False
) -> Plan:
    ranks, loads = count(layout, options, ns_steps)
    sizes = [spec.numel for spec in layout.specs]
    total = sum(sizes)
    times: dict[Order, StepTime] = {}
    order: Order = "one_group"
    if options.overlap and options.param_gather == "parameters":
        if exchange_group:
            order = "exchange_group"
        elif options.overlap == "forward":
            order = "gathers_last"
    for each in ORDERS if options.overlap else ORDERS[:1]:
        if hardware is not None:
            times[each] = estimate(
                loads, hardware, guard_bytes=guard_bytes(layout), ns_bytes=options.ns_dtype.itemsize,
                ns_steps=ns_steps, overlap=bool(options.overlap),
                gathers_in_forward=options.overlap == "forward", order=each,
            )  # fmt: skip
    return Plan(
        way=way,
        dp_size=layout.dp_size,
        num_elements=total,
        num_matrices=sum(len(placed.matrix.logical_shapes) for placed in layout.matrices),
        num_buckets=len(layout.buckets),
        largest_bucket=max(sum(sizes[p] for p in bucket.params) for bucket in layout.buckets) / total,
        padding=(layout.dp_size * sum(bucket.shard_size for bucket in layout.buckets) - total) / total,
        staged=sum(n for i, n in enumerate(sizes) if layout.is_staged(i)) / total,
        straddlers=sum(placed.straddling for placed in layout.matrices),
        ranks=ranks,
        time=times.get(order),
        orders=times,
    )


def _routed(model: nn.Module | Iterable[ParamSpec] | str, routes: Sequence[Route] | str | None) -> list[ParamSpec]:
    """The parameters as training sees them, in registration order."""
    if isinstance(model, nn.Module):
        routed = route_params(model, routes)
        stays = memory.stays([param for _, param in routed], model)
        return [replace(spec, stays=kept) for (spec, _), kept in zip(routed, stays)]
    if routes is not None and not (isinstance(routes, str) and routes == "adamw"):
        raise problem(
            "routes", "patterns for parameters that are routed already", 'None or "adamw" is needed', "pass the module"
        )
    try:
        specs = list(shape_table(model) if isinstance(model, str) else model)
        if not all(isinstance(spec, ParamSpec) for spec in specs):
            raise TypeError("no specs")
    except (KeyError, TypeError) as error:
        raise problem(
            "model", f"found {model!r}", f"a module, specs or one of {', '.join(TABLES)} is needed", "correct the name"
        ) from error
    return _all_adamw(specs) if routes == "adamw" else specs


def _all_adamw(specs: Sequence[ParamSpec]) -> list[ParamSpec]:
    return [replace(spec, rule="adamw", matrices=()) for spec in specs]


def _balance(loads: Sequence[int]) -> float:
    """Largest over mean; 1 where there is no load."""
    return max(loads) * len(loads) / sum(loads) if sum(loads) else 1.0


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A layout is millions of small values without a circle; the collector would take most of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
