"""Counts a `Layout`: bytes held, bytes moved, Newton-Schulz FLOPs, per rank and stage. Holds no tensor.

The numbers are those that `collectives.py` will count in training, to the byte; tests compare the two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from distmuon.config import Options
from distmuon.layout import Layout, ns_cost


@dataclass(frozen=True, slots=True)
class RankPlan:
    """What one rank sends and holds. `sent_bytes` by stage and step; `ns_flops` a step."""

    sent_bytes: dict[str, int]
    state_bytes: int
    ns_matrices: int
    ns_flops: int


def sent_bytes(layout: Layout, options: Options, rank: int) -> dict[str, int]:
    """Bytes that `rank` sends in one step, by stage; stages without traffic are absent."""
    others = layout.dp_size - 1
    if not others:
        return {}
    found = {"all_gather": others * sum(b.shard_size * b.dtype.itemsize for b in layout.buckets)}
    if options.grad_reduction == "reduce_scatter":
        found["reduce_scatter"] = others * sum(b.shard_size for b in layout.buckets) * options.reduce_dtype.itemsize
    message = (1 + len(layout.specs)) * torch.float64.itemsize
    found["guard"] = 2 * others * message // layout.dp_size
    gather = scatter = 0
    for placed in layout.matrices:
        for piece in placed.pieces:
            if piece.rank == rank:
                gather += piece.length * sum(worker != rank for worker in placed.workers)
            elif placed.workers[0] == rank and piece.rank not in placed.workers:
                scatter += piece.length
    if gather or scatter or any(placed.straddling for placed in layout.matrices):
        found["dp_gather"] = gather * options.ns_dtype.itemsize
        found["scatter"] = scatter * options.ns_dtype.itemsize
    return {stage: n for stage, n in found.items() if n}


def plan_rank(layout: Layout, options: Options, rank: int, ns_steps: int = 5) -> RankPlan:
    """Count everything for one rank."""
    state = 0
    for bucket in layout.buckets:
        master = 0 if bucket.dtype == options.master_dtype else options.master_dtype.itemsize
        for segment in bucket.segments:
            if segment.rank == rank:
                muon = layout.specs[segment.param].rule == "muon"
                state += segment.length * (master + (options.momentum_dtype.itemsize if muon else 8))
    mine = [placed for placed in layout.matrices if rank in placed.workers]
    return RankPlan(
        sent_bytes=sent_bytes(layout, options, rank),
        state_bytes=state,
        ns_matrices=sum(len(placed.matrix.logical_shapes) for placed in mine),
        ns_flops=ns_steps * sum(ns_cost(placed.matrix) for placed in mine),
    )


def describe(layout: Layout, num_frozen: int = 0) -> str:
    """What went where, in a few lines: rules, logical matrices, buckets, straddlers, padding."""
    lines = []
    for rule, label in (("muon", "Muon"), ("adamw", "AdamW")):
        specs = [spec for spec in layout.specs if spec.rule == rule]
        matrices = sum(len(m.logical_shapes) for spec in specs for m in spec.matrices)
        of_matrices = f" ({matrices} matrices)" if rule == "muon" else ""
        lines.append(f"{label}: {len(specs)} tensors{of_matrices}, {sum(s.numel for s in specs):,} elements")
    total = sum(spec.numel for spec in layout.specs)
    held = layout.dp_size * sum(bucket.shard_size for bucket in layout.buckets)
    straddlers = sum(placed.straddling for placed in layout.matrices)
    loads = [0] * layout.dp_size
    for placed in layout.matrices:
        for worker in placed.workers:
            loads[worker] += ns_cost(placed.matrix)
    balance = max(loads) * layout.dp_size / sum(loads) if sum(loads) else 1.0
    staged = sum(s.numel for i, s in enumerate(layout.specs) if layout.contiguous_start(i) is None)
    lines.append(f"frozen: {num_frozen} tensors")
    lines.append(
        f"layout: dp_size {layout.dp_size}, {len(layout.buckets)} buckets, {straddlers} straddlers, "
        f"Newton-Schulz max/mean {balance:.3f}, padding {100 * (held - total) / total:.3f} %, "
        f"staged {100 * staged / total:.1f} %"
    )
    return "\n".join(lines)


def routing_table(layout: Layout) -> str:
    """One line a parameter: fqn, shape, rule, reason."""
    width = max(len(spec.fqn) for spec in layout.specs)
    return "\n".join(f"{s.fqn:<{width}}  {s.shape!s:<20} {s.rule:<6} {s.reason}" for s in layout.specs)
