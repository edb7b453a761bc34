"""A layout as text, for `DistMuon.report`.

This module decides the wording only; it reads a `Layout` and knows no tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

from distmuon.layout.layout import Layout


def describe(layout: Layout, num_frozen: int = 0, parts: Sequence[Layout] = ()) -> str:
    """Summary of a layout in a few lines: rules, logical matrices, buckets, straddlers, padding.

    `parts`: the layouts that it was joined from, one for each process group.
    """
    lines = []
    for rule, label in (("muon", "Muon"), ("adamw", "AdamW")):
        specs = [spec for spec in layout.specs if spec.rule == rule]
        matrices = sum(len(m.logical_shapes) for spec in specs for m in spec.matrices)
        num_matrices = f" ({matrices} matrices)" if rule == "muon" else ""
        lines.append(f"{label}: {len(specs)} tensors{num_matrices}, {sum(s.numel for s in specs):,} elements")
    lines.append(f"frozen: {num_frozen} tensors")
    lines += [_cut(part) for part in parts or (layout,) if part.specs]
    return "\n".join(lines)


def _cut(layout: Layout) -> str:
    if layout.given:
        held = sum(segment.length for bucket in layout.buckets for segment in bucket.segments)
        return (
            f"layout: given shards on {layout.dp_size} ranks, {held / layout.num_elements:.3g} copies of the model, "
            f"{len(layout.buckets)} buckets, {layout.num_straddlers} matrices on several ranks, Newton-Schulz max/mean "
            f"{layout.ns_balance:.3f}"
        )
    return (
        f"layout: dp_size {layout.dp_size}, {len(layout.buckets)} buckets, {layout.num_straddlers} straddlers, "
        f"Newton-Schulz max/mean {layout.ns_balance:.3f}, padding {100 * layout.padding:.3f} %, "
        f"staged {100 * layout.staged:.1f} %"
    )


def routing_table(layout: Layout) -> str:
    """A line for each parameter: fqn, shape, rule, reason."""
    width = max(len(spec.fqn) for spec in layout.specs)
    return "\n".join(f"{s.fqn:<{width}}  {s.shape!s:<20} {s.rule:<6} {s.reason}" for s in layout.specs)
