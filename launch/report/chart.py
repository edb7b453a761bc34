"""A chart as plain data: what plotly.js draws, in the few forms that the report uses.

Every axis has a quantity and a unit. Long curves are thinned to recorded points (`thin`), never averaged: what the page
shows stands in the records.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite, log10
from typing import Any

PALETTE = ("#4269d0", "#e07b12", "#3ca951", "#d9466b", "#8a5cd6", "#2a9d9d", "#9c6b4e", "#b59a00", "#e377c2", "#7a8190")
"""Readable on white and on near-black."""
ALARM = "#d62f2f"
MOST_POINTS = 1200
Numbers = Sequence[float | None]


@dataclass(frozen=True)
class Axis:
    quantity: str
    unit: str
    log: bool = False
    range: tuple[float, float] | None = None
    """In the axis's own values."""
    zero: bool = False
    """Whether the axis begins at 0."""

    @property
    def title(self) -> str:
        return f"{self.quantity} ({self.unit})"

    def layout(self) -> dict[str, Any]:
        kind = {"type": "log", "exponentformat": "power", "nticks": 6} if self.log else {"exponentformat": "SI"}
        found: dict[str, Any] = {"title": {"text": self.title}, "automargin": True, **kind}
        if self.zero:
            found["rangemode"] = "tozero"
        if self.range:
            found["range"] = [log10(value) if self.log else value for value in self.range]
        return found


STEP = Axis("step", "count")


@dataclass(kw_only=True)
class Chart:
    """One drawing with its axes; `about` says how to read it."""

    name: str
    title: str
    about: str
    x: Axis = STEP
    y: Axis
    traces: list[dict[str, Any]] = field(default_factory=list)
    shapes: list[dict[str, Any]] = field(default_factory=list)
    layout: dict[str, Any] = field(default_factory=dict)
    choices: dict[str, Axis] = field(default_factory=dict)
    """Other x axes that the reader may choose; each trace holds its x values for them under "xs"."""
    wide: bool = False

    def plotly(self) -> dict[str, Any]:
        """What `page.js` hands to plotly.js."""
        layout = {"xaxis": self.x.layout(), "yaxis": self.y.layout(), "shapes": self.shapes, **self.layout}
        choices = {name: axis.title for name, axis in self.choices.items()}
        return {"traces": self.traces, "layout": layout, "choices": choices}


def thin(y: Numbers, most: int = MOST_POINTS) -> list[int]:
    """Indices of at most about `most` points: of each stretch the lowest and the highest, and a gap where one is."""
    if len(y) <= most:
        return list(range(len(y)))
    kept = {0, len(y) - 1}
    stretches = most // 3
    for number in range(stretches):
        begin, end = number * len(y) // stretches, (number + 1) * len(y) // stretches
        known = [(value, index) for index, value in enumerate(y[begin:end], start=begin) if value is not None]
        kept.update((min(known)[1], max(known)[1]) if known else (begin,))
        gap = next((index for index in range(begin, end) if y[index] is None), None)
        if gap is not None:
            kept.add(gap)
    return sorted(kept)


def line(
    name: str,
    x: Sequence[Any],
    y: Numbers,
    *,
    color: str,
    width: float = 2,
    dash: str = "solid",
    opacity: float = 1.0,
    markers: bool = False,
    legend: bool = True,
    group: str | None = None,
    xs: dict[str, Sequence[Any]] | None = None,
    form: str = ".4~g",
) -> dict[str, Any]:
    """A curve; None is a gap. A single point is drawn as a marker, for a line of one point cannot be seen."""
    keep = thin(y)
    alone = sum(value is not None for value in y) == 1
    found: dict[str, Any] = {
        "type": "scatter",
        "mode": "lines+markers" if markers or alone else "lines",
        "name": name,
        "x": [x[index] for index in keep],
        "y": [y[index] for index in keep],
        "line": {"color": color, "width": width, "dash": dash},
        "marker": {"color": color, "size": 6},
        "opacity": opacity,
        "showlegend": legend,
        "hovertemplate": f"%{{y:{form}}}",
    }
    if group:
        found["legendgroup"] = group
    if xs:
        found["xs"] = {key: [values[index] for index in keep] for key, values in xs.items()}
    return found


def upright(name: str, x: Sequence[Any], low: float, high: float, *, xs: dict[str, Sequence[Any]] | None = None) -> Any:
    """Vertical strokes that mark steps; at most `MOST_POINTS` of them."""
    stride = max(1, -(-len(x) // MOST_POINTS))

    def strokes(values: Sequence[Any]) -> list[Any]:
        return [part for value in values[::stride] for part in (value, value, None)]

    found: dict[str, Any] = {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": strokes(x),
        "y": [low, high, None] * len(x[::stride]),
        "line": {"color": ALARM, "width": 1},
        "opacity": 0.5,
        "hoverinfo": "skip",
    }
    if xs:
        found["xs"] = {key: strokes(values) for key, values in xs.items()}
    return found


def band(low: float, high: float, color: str) -> dict[str, Any]:
    """A horizontal band behind the curves."""
    where = {"xref": "paper", "x0": 0, "x1": 1, "yref": "y", "y0": low, "y1": high}
    return {"type": "rect", "layer": "below", "line": {"width": 0}, "fillcolor": color, "opacity": 0.15, **where}


def level(value: float, text: str) -> dict[str, Any]:
    """A dashed line across the chart, with its meaning."""
    where = {"xref": "paper", "x0": 0, "x1": 1, "yref": "y", "y0": value, "y1": value}
    label = {"text": text, "textposition": "start", "font": {"color": ALARM, "size": 12}}
    return {"type": "line", "line": {"color": ALARM, "width": 1.5, "dash": "dash"}, "label": label, **where}


def finite(values: Numbers) -> list[float]:
    return [value for value in values if value is not None and isfinite(value)]
