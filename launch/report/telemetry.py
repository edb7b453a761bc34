"""Inside the optimizer and the model, of one run: the `telemetry` records as charts by kind of parameter and by layer.

A curve stands for all parameters of a kind (`kinds.kind`): their mean, with the least and the greatest in the hover.
Only one run at a time, for ten kinds fill a chart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from launch.logs import Record
from launch.report.chart import ALARM, PALETTE, Axis, Chart, Numbers, band, finite, level, line
from launch.report.history import History
from launch.report.kinds import kind, natural
from launch.report.table import Table, number

UPDATE_RMS, TOLERANCE = 0.2, 0.1
"""Muon's updates at match_rms_adamw: 0.2 is the RMS of AdamW's updates that its scale is made for (2502.16982)."""
LOGIT_ALARM = 100.0
"""Attention logits above it announce that attention saturates (2507.20534)."""
BELOW = (
    "Jordan's coefficients leave singular values from 0.7 to 1.2, so 0.15 to 0.2 is usual; much less says that "
    "many directions of the momentum are too weak for them."
)
MOST_LAYERS = 8
QUANTILES = ("least", "25 %", "median", "75 %", "greatest")


def telemetry_charts(run: History) -> list[Chart]:
    """The charts that have data."""
    return [chart for make in _CHARTS if (chart := make(run)) is not None and chart.traces]


def outside_the_band(run: History) -> Table | None:
    """The Muon parameters whose last update RMS is off `UPDATE_RMS` by more than `TOLERANCE`; the farthest first."""
    if not run.telemetry or not _has_band(run):
        return None
    last = run.telemetry[-1]
    found = [
        (abs(values["update_rms"] / UPDATE_RMS - 1), name, values["update_rms"])
        for name, values in last.get("parameters", {}).items()
        if values.get("rule") == "muon" and values.get("update_rms") is not None
    ]
    outside = sorted(((off, name, rms) for off, name, rms in found if off > TOLERANCE), reverse=True)
    if not outside:
        return None
    caption = f"{len(outside)} of {len(found)} Muon parameters had an update RMS outside {UPDATE_RMS} +- "
    caption += f"{TOLERANCE:.0%} at step {last['step']:,}" + ("; the 10 farthest" if len(outside) > 10 else "")
    caption += f". {BELOW}"
    rows = [[name, kind(name), number(rms)] for _, name, rms in outside[:10]]
    return Table(("parameter", "kind", "update RMS"), rows, caption)


def _has_band(run: History) -> bool:
    """Other scales of the update aim at no fixed RMS."""
    return bool(run.setting("optimizer.adjust_lr_fn", "match_rms_adamw") == "match_rms_adamw")


def _update_rms(run: History) -> Chart:
    chart = Chart(
        name="update_rms",
        title="Update RMS, Muon",
        about="Root mean square of a step's update before learning rate and decay.",
        y=Axis("update RMS", "per unit of lr"),
    )
    _by_kind(chart, run, "update_rms", rule="muon")
    if _has_band(run) and chart.traces:
        chart.about += f" The band is {UPDATE_RMS} +- {TOLERANCE:.0%}, where match_rms_adamw aims. {BELOW}"
        chart.shapes = [band(UPDATE_RMS * (1 - TOLERANCE), UPDATE_RMS * (1 + TOLERANCE), PALETTE[2])]
    return chart


def _of_kinds(
    key: str, title: str, about: str, y: Axis, *, rule: str | None = None, name: str = ""
) -> Callable[[History], Chart]:
    """A chart of the field `key`, with a curve for each kind of parameter of the rule; `name`: if not the key."""

    def make(run: History) -> Chart:
        return _by_kind(Chart(name=name or key, title=title, about=about, y=y), run, key, rule)

    return make


def _spectrum(key: str, title: str, about: str, unit: str, log: bool) -> Callable[[History], Chart]:
    def make(run: History) -> Chart:
        chart = Chart(name=key, title=title, about=about, y=Axis("singular value", unit, log=log))
        steps = [record["step"] for record in run.telemetry]
        pooled = [_pooled([q for q in _values(record, key, None).values()]) for record in run.telemetry]
        for place, text in enumerate(QUANTILES):
            y = [None if quantiles is None else quantiles[place] for quantiles in pooled]
            if finite(y):
                inner = place == 2
                style: dict[str, Any] = {"width": 2.5 if inner else 1.4, "dash": "solid" if 0 < place < 4 else "dot"}
                chart.traces.append(line(text, steps, y, color=PALETTE[(0, 5, 2, 1, 3)[place]], **style))
        return chart

    return make


def _latest_spectrum(key: str, title: str, unit: str, log: bool) -> Callable[[History], Chart | None]:
    def make(run: History) -> Chart | None:
        last = next((record for record in reversed(run.telemetry) if _values(record, key, None)), None)
        if last is None:
            return None
        about = (
            f"At step {last['step']:,}. The box holds the middle half, the whiskers reach to the least and greatest."
        )
        chart = Chart(
            name=f"{key}_by_kind",
            title=title,
            about=about,
            x=Axis("parameter", "kind of matrix"),
            y=Axis("singular value", unit, log=log),
        )
        groups: dict[str, list[list[float]]] = {}
        for name, quantiles in _values(last, key, None).items():
            groups.setdefault(kind(name), []).append(quantiles)
        pooled = {group: found for group, all_ in groups.items() if (found := _pooled(all_)) is not None}
        if pooled:
            columns = list(zip(*pooled.values()))
            names = ("lowerfence", "q1", "median", "q3", "upperfence")
            box = {"type": "box", "x": list(pooled), **dict(zip(names, map(list, columns)))}
            chart.traces = [{**box, "marker": {"color": PALETTE[0]}, "showlegend": False}]
        return chart

    return make


def _pooled(all_quantiles: Sequence[Sequence[float | None] | None]) -> list[float] | None:
    """Quantiles of several matrices as one row: the least, the means of the three inner ones, the greatest."""
    whole = [list(finite(row)) for row in all_quantiles if row]
    whole = [row for row in whole if len(row) == len(QUANTILES)]
    if not whole:
        return None
    least, *inner, greatest = zip(*whole)
    return [min(least), *map(fmean, inner), max(greatest)]


def _attention(run: History) -> Chart:
    chart = Chart(
        name="attention_logits",
        title="Largest attention logit",
        about=f"The largest before the softmax, by layer. Above {LOGIT_ALARM:g} attention saturates: lower the "
        "learning rate, or clip the query and key weights.",
        y=Axis("attention logit", "nats", log=True),
    )
    _by_layer(chart, run, "attention_logits")
    if chart.traces:
        found = [value for trace in chart.traces for value in finite(trace["y"])]
        chart.shapes = [level(LOGIT_ALARM, f"alarm at {LOGIT_ALARM:g}")]
        chart.y = replace(chart.y, range=(0.8 * min(found), 1.6 * max(*found, LOGIT_ALARM)))
    return chart


def _output_rms(run: History) -> Chart:
    chart = Chart(
        name="output_rms",
        title="Output RMS by layer",
        about="Root mean square of what each layer hands on.",
        y=Axis("output RMS", "units of activation", log=True),
    )
    return _by_layer(chart, run, "output_rms")


def _values(record: Record, key: str, rule: str | None) -> dict[str, Any]:
    """The field of each parameter that has it, of one rule or of all."""
    of_rule = {n: v for n, v in record.get("parameters", {}).items() if rule is None or v.get("rule") == rule}
    return {name: values[key] for name, values in of_rule.items() if values.get(key) is not None}


def _by_kind(chart: Chart, run: History, key: str, rule: str | None = None) -> Chart:
    """Add a curve for each kind: the mean over its parameters, with the extremes in the hover."""
    steps = [record["step"] for record in run.telemetry]
    every = {name: kind(name) for record in run.telemetry for name in _values(record, key, rule)}
    rules = {n: v.get("rule") for record in run.telemetry for n, v in record.get("parameters", {}).items()}
    # A kind has one colour in all charts, whichever of its parameters have the field.
    all_kinds = list(dict.fromkeys(kind(name) for record in run.telemetry[:1] for name in record.get("parameters", {})))
    all_kinds += [label for label in dict.fromkeys(every.values()) if label not in all_kinds]
    for label in dict.fromkeys(every.values()):
        groups = [
            [value for name, value in _values(record, key, rule).items() if every[name] == label]
            for record in run.telemetry
        ]
        y: Numbers = [fmean(group) if group else None for group in groups]
        adamw = all(rules[name] == "adamw" for name, its in every.items() if its == label)
        trace = line(
            label, steps, y, color=PALETTE[all_kinds.index(label) % len(PALETTE)], dash="dash" if adamw else "solid"
        )
        kept = [groups[steps.index(step)] for step in trace["x"]]
        trace["customdata"] = [[min(group), max(group), len(group)] if group else [None, None, 0] for group in kept]
        trace["hovertemplate"] = "%{y:.4~g} (%{customdata[0]:.4~g} to %{customdata[1]:.4~g}, %{customdata[2]} tensors)"
        chart.traces.append(trace)
    return chart


def _by_layer(chart: Chart, run: History, key: str) -> Chart:
    """Add a curve for each layer; of many layers only the greatest, the median and the least."""
    steps = [record["step"] for record in run.telemetry]
    found = [{n: v for n, v in (record.get(key) or {}).items() if v is not None} for record in run.telemetry]
    layers = sorted({name for values in found for name in values}, key=natural)
    if len(layers) <= MOST_LAYERS:
        for place, name in enumerate(layers):
            y = [values.get(name) for values in found]
            chart.traces.append(line(name, steps, y, color=PALETTE[place % len(PALETTE)]))
        return chart
    for text, share, color in (("greatest", 1.0, ALARM), ("median", 0.5, PALETTE[0]), ("least", 0.0, PALETTE[5])):
        ranked = [sorted(values.items(), key=lambda item: item[1]) for values in found]
        chosen = [row[min(int(share * len(row)), len(row) - 1)] if row else (None, None) for row in ranked]
        trace = line(f"{text} of {len(layers)} layers", steps, [value for _, value in chosen], color=color)
        trace["customdata"] = [chosen[steps.index(step)][0] for step in trace["x"]]
        trace["hovertemplate"] = "%{y:.4~g} (%{customdata})"
        chart.traces.append(trace)
    return chart


_ENTROPY = Axis("SVD entropy", "share of the maximum")
_CHARTS: tuple[Callable[[History], Chart | None], ...] = (
    _update_rms,
    _of_kinds(
        "update_rms",
        "Update RMS, AdamW",
        "The same for parameters that AdamW trains: Adam's quotient.",
        Axis("update RMS", "per unit of lr"),
        rule="adamw",
        name="update_rms_adamw",
    ),
    _of_kinds(
        "update_to_weight",
        "Update-to-weight ratio",
        "RMS of what a step adds, by the RMS of the weights. It follows the learning rate. Parameters of AdamW are "
        "dashed.",
        Axis("update by weight", "ratio per step", log=True),
    ),
    _of_kinds(
        "weight_rms",
        "Weight RMS",
        "Weight decay bounds it. Steady growth costs bfloat16 precision.",
        Axis("weight RMS", "units of weight", log=True),
    ),
    _of_kinds(
        "residual",
        "Distance from orthogonal",
        "Of Newton-Schulz's result O: the norm of O O^T - I by the root of its short side; 0 is orthogonal.",
        Axis("residual", "ratio", log=True),
        rule="muon",
    ),
    _spectrum(
        "update_singular_values",
        "Singular values of the updates",
        "Over all matrices: the least, the means of the quartiles, the greatest. Newton-Schulz takes them near 1.",
        "ratio",
        False,
    ),
    _latest_spectrum("update_singular_values", "Singular values of the updates by kind", "ratio", False),
    _of_kinds(
        "momentum_entropy",
        "SVD entropy of the momentum",
        "Before Newton-Schulz. Low: a few directions dominate, and the rest of the update amplifies weak ones.",
        _ENTROPY,
        rule="muon",
    ),
    _of_kinds(
        "update_entropy",
        "SVD entropy of the updates",
        "1: all directions of the matrix move alike.",
        _ENTROPY,
        rule="muon",
    ),
    _spectrum(
        "weight_singular_values",
        "Singular values of the weights",
        "Over all matrices: the least, the means of the quartiles, the greatest.",
        "units of weight",
        True,
    ),
    _latest_spectrum("weight_singular_values", "Singular values of the weights by kind", "units of weight", True),
    _of_kinds(
        "weight_entropy",
        "SVD entropy of the weights",
        "1: all directions carry alike; a fall says that the weights lose rank.",
        _ENTROPY,
        rule="muon",
    ),
    _attention,
    _output_rms,
)
