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
    total = sum(spec.numel for spec in layout.specs)
    for rule, label in (("muon", "Muon"), ("adamw", "AdamW")):
        specs = [spec for spec in layout.specs if spec.rule == rule]
        matrices = sum(len(m.logical_shapes) for spec in specs for m in spec.matrices)
        num_matrices = f" ({_count(matrices, 'matrix', 'matrices')})" if rule == "muon" else ""
        elements = sum(spec.numel for spec in specs)
        share = f" ({elements / total:.1%})" if total else ""
        lines.append(f"{label}: {_count(len(specs), 'tensor')}{num_matrices}, {elements:,} elements{share}")
    lines.append(f"frozen: {_count(num_frozen, 'tensor')}")
    lines += [_cut(part) for part in parts or (layout,) if part.specs]
    return "\n".join(lines)


def _count(number: int, one: str, several: str = "") -> str:
    return f"{number} {one if number == 1 else several or f'{one}s'}"


def _cut(layout: Layout) -> str:
    buckets = _count(len(layout.buckets), "bucket")
    if layout.given:
        held = sum(segment.length for bucket in layout.buckets for segment in bucket.segments)
        return (
            f"layout: given shards on {_count(layout.dp_size, 'rank')}, {held / layout.num_elements:.3g} copies of the "
            f"model, {buckets}, {layout.num_straddlers} matrices on several ranks, Newton-Schulz max/mean "
            f"{layout.ns_balance:.3f}"
        )
    return (
        f"layout: dp_size {layout.dp_size}, {buckets}, {_count(layout.num_straddlers, 'straddler')}, "
        f"Newton-Schulz max/mean {layout.ns_balance:.3f}, padding {100 * layout.padding:.3f} %, "
        f"staged {100 * layout.staged:.1f} %{_nodes(layout)}"
    )


def _nodes(layout: Layout) -> str:
    if not 1 < layout.node_size < layout.dp_size:
        return ""
    if layout.dp_size % layout.node_size:
        return f"; nodes of {layout.node_size} ranks and a smaller one, which the layout leaves out of account"
    return f"; {layout.dp_size // layout.node_size} nodes of {layout.node_size} ranks"


def routing_table(layout: Layout) -> str:
    """A line for each parameter: fqn, shape, rule, reason."""
    width = max(len(spec.fqn) for spec in layout.specs)
    return "\n".join(f"{s.fqn:<{width}}  {s.shape!s:<20} {s.rule:<6} {s.reason}" for s in layout.specs)
