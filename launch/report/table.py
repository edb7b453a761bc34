"""A table of the page, and how the page writes numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


def number(value: float | None) -> str:
    """Four significant digits, with separators where it is large."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def size(count: int | None) -> str:
    """Bytes as a reader says them."""
    if count is None:
        return "-"
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if abs(count) >= 1 << power:
            return f"{count / (1 << power):.4g} {unit}"
    return f"{count:,} bytes"
