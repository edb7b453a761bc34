"""Planning of a model on any number of ranks without running it, and comparison of ways to distribute Muon.

`plan` makes the same layout as training, also for a model on the meta device; `counts.py` counts it and `step_time.py`
estimates a step. This module decides which layouts are compared; it makes no tensor and no process group.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import nn

from distmuon.checks import check_one_group, check_options_when_cut
from distmuon.errors import problem
from distmuon.layout import memory
from distmuon.layout.layout import Layout, imbalance, make_layout, recut
from distmuon.layout.routing import ParamSpec, Route, route_params
from distmuon.options import GradReduction, Options, Precision, Sharding, one_of
from distmuon.planning.baselines import whole_matrix_layout
from distmuon.planning.counts import HeldBytes, RankPlan, between_nodes, count, guard_bytes, plan_rank, sent_bytes
from distmuon.planning.meshes import Boxes, Mesh, OwnWork, Shard, boxes_of, cuts, mesh_of, own_work
from distmuon.planning.shapes import TABLES, shape_table
from distmuon.planning.step_time import HARDWARE, NODE_SIZE, ORDERS, Hardware, Order, StepTime, estimate, hardware_row

__all__ = ["HARDWARE", "STAGES", "HeldBytes", "Plan", "RankPlan", "plan", "plan_rank", "sent_bytes"]

STAGES = ("reduce_scatter", "guard", "dp_gather", "scatter", "all_gather")
_AUTO_DIVISORS = (32, 24, 16, 12, 8, 6, 4)  # `auto_bucket` tries the model's size over each of these
_AUTO_DIVISORS_GIVEN = (16, 8, 6, 4, 3, 2, 1)  # if shards are given: many owners share a large bucket evenly


@dataclass(frozen=True, slots=True)
class Given:
    """The cut of a model by FSDP2 and tensor parallelism, and what FSDP2 itself does."""

    mesh: Mesh
    fsdp2: OwnWork
    tensor_parallel: dict[str, tuple[str, ...]]  # by kind of cut, the names of the modules; empty without
    once: str = ""  # with replicas: whether it pays to orthogonalize once over all of them


@dataclass(frozen=True, slots=True)
class Plan:
    """A model on `dp_size` ranks, distributed in one `way`; `others` are the ways that it is compared with.

    With tensor parallelism there are `dp_size` * tp ranks.
    """

    way: str
    dp_size: int
    num_elements: int
    num_matrices: int
    num_buckets: int
    largest_bucket: float  # this field, `padding` and `staged` (both ZeRO-1's) are shares of the model's elements
    padding: float
    staged: float
    straddlers: int
    ranks: tuple[RankPlan, ...]
    time: StepTime | None  # in the order of collectives that the options select; None without hardware
    orders: dict[Order, StepTime]  # in each order; a single entry without overlap, none without hardware
    others: tuple[Plan, ...] = ()
    why: str = ""
    given: Given | None = None  # None: ZeRO-1

    @property
    def sent(self) -> int:
        """The bytes that the busiest rank sends in a step, in the optimizer's collectives."""
        return max(sum(rank.sent_bytes.values()) for rank in self.ranks)

    @property
    def traffic(self) -> float | None:
        """`sent` relative to that of ZeRO-1 AdamW for the same model; None if AdamW was not planned."""
        adamw = next((other.sent for other in self.others if other.way == "adamw"), 0)
        return self.sent / adamw if adamw else None

    @property
    def ns_balance(self) -> float:
        return imbalance([rank.ns_flops for rank in self.ranks])

    @property
    def state_balance(self) -> float:
        return imbalance([rank.state_bytes for rank in self.ranks])

    @property
    def fullest(self) -> HeldBytes:
        """The bytes held by the rank that holds most."""
        return max((rank.held for rank in self.ranks), key=lambda held: held.total)

    @property
    def sent_between_nodes(self) -> int:
        """The bytes that exchanges and 16-bit reductions of a step send to other nodes, from the busiest rank."""
        return max(sum(rank.sent_between_nodes.values()) for rank in self.ranks)

    def stage_bytes(self, stage: str) -> int:
        """The bytes that the busiest rank sends in `stage`."""
        return max(rank.sent_bytes.get(stage, 0) for rank in self.ranks)

    def to_dict(self, *, ranks: bool = False) -> dict[str, object]:
        """All values as a dict for JSON; `ranks` adds the long list of each rank's work and memory."""
        kept = [name for name in self.__slots__ if name not in ("ranks", "others", "time", "orders", "given")]
        found = {
            name: getattr(self, name)
            for name in (*kept, "traffic", "ns_balance", "state_balance", "sent_between_nodes")
        }
        found["busiest_sent_bytes"] = {stage: self.stage_bytes(stage) for stage in STAGES} | {"total": self.sent}
        found["fullest_held_bytes"] = asdict(self.fullest) | {"state": self.fullest.state, "total": self.fullest.total}
        found["busiest_ns_flops"] = max(rank.ns_flops for rank in self.ranks)
        found["time"] = asdict(self.time) if self.time else None
        found["orders"] = {order: asdict(time) for order, time in self.orders.items()}
        found["ranks"] = [asdict(rank) for rank in self.ranks] if ranks else None
        if self.given:
            found["given"] = asdict(self.given)
        return found | {"others": [other.to_dict(ranks=ranks) for other in self.others]}


def plan(
    model: nn.Module | Iterable[ParamSpec] | str,
    *,
    dp_size: int,
    shard: Shard = "zero1",
    replicas: int = 1,
    tp: int = 1,
    sharding: Sharding | None = None,
    precision: Precision | None = None,
    routes: Sequence[Route] | str | None = None,
    grad_reduction: GradReduction = "reduce_scatter",
    auto_bucket: bool = False,
    ns_steps: int = 5,
    param_dtype: torch.dtype | None = None,
    exchange_group: bool = False,
    hardware: str | Hardware | None = "h100",
    compare: bool = True,
) -> Plan:
    """Plan the traffic, memory and time of `DistMuon` on `dp_size` ranks. Makes no tensor and no process group.

    Args:
        model: a module (the meta device is enough), `ParamSpec`s, or the name of a table in `shapes.py`.
        dp_size: data-parallel ranks; with tensor parallelism there are `tp` times as many ranks in all.
        shard: "zero1": `DistMuon` shards a whole model. "fsdp2": `fully_shard` over all data-parallel ranks. "hsdp":
            `fully_shard` inside each of the `replicas`.
        replicas: with "hsdp", the copies of the model; each lies on dp_size / replicas data-parallel ranks.
        tp: with "fsdp2" or "hsdp", tensor-parallel ranks, which cut large weights before `fully_shard` does.
        sharding: as for `DistMuon`. Without `gpus_per_node` a node has as many ranks as the hardware's row says, or 8.
        precision: as for `DistMuon`.
        routes: as for `DistMuon`; specs and tables are routed already and take only "adamw".
        grad_reduction: as for `DistMuon`; "external" if gradients arrive averaged.
        auto_bucket: choose the bucket size with the shortest estimated step, and ignore `sharding.bucket_mb`.
        ns_steps: Newton-Schulz iterations.
        param_dtype: float32, bfloat16 or float16; None: the parameters' dtype.
        exchange_group: estimate a step in which exchanges have a separate process group.
        hardware: a100, h100, h200, b200 or cpu (rows of `HARDWARE`); a row of one's own, as a `Hardware` or as text:
            tflops=400,memory_tbs=2,nvlink_gbs=300,network_gbs=25,hbm_gb=80; a name with other entries:
            h100,network_gbs=25. None: no estimated times.
        compare: plan also ZeRO-1 AdamW, the paper's placement, and whole matrices in padded shards. With "fsdp2" and
            "hsdp": AdamW, and matrices that every rank, or every replica, orthogonalizes by itself.

    Raises:
        ValueError: if `DistMuon` would raise it for the same arguments.
    """
    for name, value, most in (("dp_size", dp_size, 1 << 17), ("ns_steps", ns_steps, 99)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise problem(
                name,
                found=f"found {value!r}",
                needed=f"a whole number from 1 to {most} is needed",
                cure=f"correct {name}",
            )
    if not isinstance(hardware, str | Hardware | None):
        raise problem(
            "hardware",
            found=f"found {hardware!r}",
            needed=f"one of {', '.join(HARDWARE)} is needed",
            cure="name one, or pass a Hardware",
        )
    machine = hardware_row(hardware) if isinstance(hardware, str) else hardware
    sharding = Sharding() if sharding is None else sharding
    node_size = NODE_SIZE if machine is None else machine.node_size
    options = Options(
        sharding=sharding,
        precision=Precision() if precision is None else precision,
        grad_reduction=grad_reduction,
    )
    if auto_bucket and hardware is None:
        raise problem(
            "auto_bucket",
            found="found no hardware",
            needed="estimated step times are needed",
            cure="pass hardware, or bucket_mb",
        )
    if sharding.gpus_per_node is not None:
        node_size = dp_size * tp if sharding.gpus_per_node == "all" else sharding.gpus_per_node
        machine = replace(machine, node_size=node_size) if machine is not None else None
    mesh = mesh_of(shard, dp_size, replicas, tp)
    if mesh is not None:
        check_options_when_cut(options)
    one_of("param_dtype", param_dtype, (None, torch.float32, torch.bfloat16, torch.float16))
    specs = _routed(model, routes)
    specs = specs if param_dtype is None else [replace(spec, dtype=param_dtype) for spec in specs]
    if not specs:
        raise problem(
            "model", found="no trainable parameter", needed="at least one is needed", cure="pass the whole model"
        )
    size_mb = sum(spec.numel for spec in specs) * 4 / (1 << 20)
    divisors = _AUTO_DIVISORS if mesh is None else _AUTO_DIVISORS_GIVEN
    tried = [None, *(max(32.0, size_mb / part) for part in divisors)] if auto_bucket else [sharding.bucket_mb]
    options.check_dtypes([(spec.fqn, spec.dtype) for spec in specs])

    boxes = None if mesh is None else boxes_of(specs, mesh)
    way = partial(
        _plan_layout,
        options=options,
        ns_steps=ns_steps,
        hardware=machine,
        node_size=node_size,
        exchange_group=exchange_group,
        tp=tp,
    )
    packing, placement = sharding.packing, sharding.placement
    with _no_garbage_collection():
        found: dict[float | None, Plan] = {}
        layouts: dict[float | None, Layout] = {}
        for mb in dict.fromkeys(tried):
            cut = make_layout(
                specs,
                dp_size * tp,
                packing=packing,
                placement=placement,
                bucket_mb=mb,
                given=boxes,
                node_size=node_size,
            )
            layouts[mb] = cut
            found[mb] = way("distmuon", cut)
        steps = {mb: planned.time.step_s for mb, planned in found.items() if planned.time}
        best = min(steps, key=lambda mb: steps[mb]) if len(steps) > 1 else next(iter(found))
        chosen = found[best]
        if mesh is not None and boxes is not None:
            chosen = _beside_given(chosen, specs, mesh, boxes, options, best, machine, way, compare)
        elif compare:
            chosen = replace(chosen, others=_beside_zero1(specs, layouts[best], way))
    sizes = {mb: f"{mb:.0f} MiB" if mb else "None" for mb in found}
    why = ", ".join(f"{sizes[mb]} {1e3 * step:.2f} ms" for mb, step in steps.items())
    why = f"{sizes[best]} has the shortest estimated step of {why}" if auto_bucket else ""
    return replace(chosen, why=why)


def plan_blind(name: str, dp_size: int, hardware: str, sharding: Sharding) -> Plan:
    """A table's plan by the layout that knows no nodes, counted and priced over the nodes that there are."""
    row = hardware_row(hardware)
    layout = make_layout(shape_table(name), dp_size, bucket_mb=sharding.bucket_mb)
    return _plan_layout("nodes not known", layout, Options(sharding=sharding), 5, row, row.node_size, False, 1)


def _beside_zero1(specs: Sequence[ParamSpec], chosen: Layout, way: Callable[[str, Layout], Plan]) -> tuple[Plan, ...]:
    """The ways that ZeRO-1 is compared with: two in the chosen buckets, and one in buckets of an eighth or smaller."""
    adamw = recut(_all_adamw(specs), chosen, "contiguous", "owner")
    paper = recut(specs, chosen, "contiguous", "replicated")
    mb = sum(spec.numel for spec in specs) * 4 / (1 << 20) / max(8, len(chosen.buckets))
    whole = replace(whole_matrix_layout(specs, chosen.dp_size, mb), node_size=chosen.node_size)
    return way("adamw", adamw), way("paper", paper), way("whole matrices", whole)


def _beside_given(
    found: Plan,
    specs: Sequence[ParamSpec],
    mesh: Mesh,
    boxes: Boxes,
    options: Options,
    mb: float | None,
    hardware: Hardware | None,
    way: Callable[[str, Layout], Plan],
    compare: bool,
) -> Plan:
    """`found` with what FSDP2 itself does, and with the ways that it is compared with."""
    others: list[Plan] = []
    if compare:
        others.append(way("adamw", make_layout(_all_adamw(specs), mesh.num_ranks, bucket_mb=mb, given=boxes)))
    if compare and mesh.replicas == mesh.tp == 1:
        everywhere = make_layout(specs, mesh.num_ranks, placement="replicated", bucket_mb=mb, given=boxes)
        others.append(way("every rank", everywhere))
    once = ""
    if mesh.replicas > 1:
        alone = replace(mesh, replicas=1)
        layout = make_layout(specs, alone.num_ranks, bucket_mb=mb, given=boxes_of(specs, alone))
        others.append(way("each replica", layout))
        if hardware is not None:
            shared = make_layout(specs, mesh.num_ranks, bucket_mb=mb, given=boxes)
            once = _once_or_in_each(found, shared, others[-1], layout, mesh, options, hardware)
    given = Given(
        mesh,
        own_work(specs, boxes, mesh, options.precision.reduce.itemsize),
        cuts(specs) if mesh.tp > 1 else {},
        once,
    )
    return replace(found, given=given, others=tuple(others) if compare else ())


def _once_or_in_each(
    once: Plan, shared: Layout, repeated: Plan, alone: Layout, mesh: Mesh, options: Options, hardware: Hardware
) -> str:
    """Whether it pays to orthogonalize each matrix once over all replicas: less Newton-Schulz for longer exchanges.

    Bytes count that leave their node, or, if there is a single node, their rank.
    """
    assert once.time and repeated.time
    is_one_node = mesh.num_ranks <= hardware.node_size
    node_size, link = (1, hardware.nvlink) if is_one_node else (hardware.node_size, hardware.network)
    more = between_nodes(shared, options, node_size) - between_nodes(alone, options, node_size)
    saved_ms = 1e3 * (repeated.time.newton_schulz_s - once.time.newton_schulz_s)
    spent_ms = 1e3 * more / (hardware.link_share * link)
    verdict = "pays" if saved_ms > spent_ms else "does not pay"
    where = "inside the node" if is_one_node else "between nodes"
    return (
        f"{verdict}: {saved_ms:.2f} ms less Newton-Schulz on the slowest rank than in each of {mesh.replicas} "
        f"replicas, {abs(spent_ms):.2f} ms {'more' if more > 0 else 'less'} for exchanges {where} "
        f"({abs(more) / 1e6:.0f} MB)"
    )


def _plan_layout(
    way: str,
    layout: Layout,
    options: Options,
    ns_steps: int,
    hardware: Hardware | None,
    node_size: int,
    exchange_group: bool,
    tp: int,
) -> Plan:
    ranks, loads = count(layout, options, ns_steps, node_size)
    for load in loads:
        load.compare = load.compare if way == "distmuon" else 0
    sizes = [spec.numel for spec in layout.specs]
    total = sum(sizes)
    times: dict[Order, StepTime] = {}
    order: Order = "one_group"
    has_all_gathers = not layout.given
    if options.sharding.overlap and options.sharding.param_gather == "parameters":
        if exchange_group and has_all_gathers:
            order = "exchange_group"
        elif options.sharding.overlap == "forward":
            order = "gathers_wait"
    for candidate in ORDERS if options.sharding.overlap and has_all_gathers else ORDERS[:1]:
        if hardware is not None:
            times[candidate] = estimate(
                loads,
                hardware,
                guard_bytes=guard_bytes(layout),
                ns_bytes=options.precision.newton_schulz.itemsize,
                wire_bytes=options.precision.wire.itemsize,
                ns_steps=ns_steps,
                overlap=bool(options.sharding.overlap),
                gathers_in_forward=options.sharding.overlap == "forward",
                order=candidate,
                gathers_started=layout.gathers_started if candidate == "gathers_wait" else (),
            )
    return Plan(
        way=way,
        dp_size=layout.dp_size // tp,
        num_elements=total,
        num_matrices=sum(len(placed.unit.logical_shapes) for placed in layout.matrices),
        num_buckets=len(layout.buckets),
        largest_bucket=max(sum(sizes[p] for p in bucket.params) for bucket in layout.buckets) / total,
        padding=0.0 if layout.given else layout.padding,
        staged=0.0 if layout.given else layout.staged,
        straddlers=layout.num_straddlers,
        ranks=ranks,
        time=times.get(order),
        orders=times,
    )


def _routed(model: nn.Module | Iterable[ParamSpec] | str, routes: Sequence[Route] | str | None) -> list[ParamSpec]:
    """Specs of the parameters as training sees them, in registration order."""
    if isinstance(model, nn.Module):
        routed = route_params(model, routes)
        cure = "leave process_group out of the routes, and plan the parameters of each group by themselves"
        check_one_group([spec for spec, _ in routed], "plan", cure)
        stays = memory.stays([param for _, param in routed], model)
        return [replace(spec, stays=kept) for (spec, _), kept in zip(routed, stays)]
    if routes is not None and not (isinstance(routes, str) and routes == "adamw"):
        raise problem(
            "routes",
            found="patterns for parameters that are routed already",
            needed='None or "adamw" is needed',
            cure="pass the module",
        )
    try:
        specs = list(shape_table(model) if isinstance(model, str) else model)
        if not all(isinstance(spec, ParamSpec) for spec in specs):
            raise TypeError("no specs")
    except (KeyError, TypeError) as error:
        raise problem(
            "model",
            found=f"found {model!r}",
            needed=f"a module, ParamSpecs or one of {', '.join(TABLES)} is needed",
            cure="correct the name",
        ) from error
    return _all_adamw(specs) if routes == "adamw" else specs


def _all_adamw(specs: Sequence[ParamSpec]) -> list[ParamSpec]:
    return [replace(spec, rule="adamw", matrices=()) for spec in specs]


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Switch the garbage collector off: a layout has millions of values without cycles, and collecting is slow."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
