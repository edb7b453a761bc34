"""The pictures of docs/experiments.md, one kind a function. Decides nothing; matplotlib is imported to draw one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from experiments.analysis import View, interval, is_measured
from experiments.trial import kind_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def drawn(view: View) -> list[Any]:
    """The arms, or pairs of arms, that the picture can show."""
    picture = view.experiment.picture
    if "pairs" in picture:
        return [pair for pair in picture["pairs"] if all(view.rows(arm) for arm in pair)]
    there = view.tuned if picture["kind"] == "over_rates" else view.rows
    arms = [arm for arm in picture.get("arms", view.experiment.arms) if arm in view.experiment.arms and there(arm)]
    return arms if len(arms) > 1 else []  # one side is no comparison


def over_steps(view: View) -> Figure:
    """Validation losses over steps; with `beside`, the RMS of weights and, where it was measured, of outputs."""
    arms, beside = drawn(view), view.experiment.picture.get("beside", ())
    shown = [key for key in beside if all(is_measured(key, row) for arm in arms for row in view.rows(arm).values())]
    figure, (losses, *others) = _figure(1 + len(shown))
    for number, arm in enumerate(arms):
        rows = list(view.rows(arm).values())
        style = {"color": f"C{number}", "label": arm}
        curves = [[(step, loss) for step, loss in row["val"] if loss is not None] for row in rows]
        losses.plot(*_mean_curve(curves), **style)
        for axes, key in zip(others, shown):
            axes.plot(
                *_mean_curve([[(at["step"], _level(at[key])) for at in row["telemetry"]] for row in rows]), **style
            )
    last = [row["val"][-1][1] for arm in arms for row in view.rows(arm).values() if row["val"][-1][1] is not None]
    losses.set_ylim(min(last) - 0.05, max(last) + 0.8)
    _labels(losses, "step", "validation loss")
    for axes, key in zip(others, shown):
        _labels(axes, "step", LABELS[key])
        axes.set_ylim(bottom=0)
    losses.legend(frameon=False, fontsize=8)
    return figure


LABELS = {
    "weight_rms": "RMS of hidden weights",
    "output_rms": "largest RMS of a block's output",
    "attention_logits": "largest attention logit",
}


def _level(value: Any) -> float:
    """A measured number, or the mean over kinds of matrices."""
    return fmean(value.values()) if isinstance(value, dict) else float(value)


def over_arms(view: View) -> Figure:
    """The final loss of each arm with its interval."""
    arms = drawn(view)
    figure, (axes,) = _figure(1)
    for number, arm in enumerate(arms):
        loss = interval(list(view.losses(arm).values()))
        if math.isfinite(loss.mean):
            half = loss.high - loss.mean if math.isfinite(loss.high) else 0.0
            axes.errorbar(loss.mean, number, xerr=half, marker="o", capsize=3, color="C0")
            axes.plot(list(view.losses(arm).values()), [number] * len(view.losses(arm)), ".", color="C1", markersize=4)
    axes.set_yticks(range(len(arms)), labels=arms)
    axes.invert_yaxis()
    _labels(axes, "validation loss; bars: 95 %, dots: seeds", "")
    return figure


def over_rates(view: View) -> Figure:
    """The loss of each tuned arm over the rates that were tried."""
    figure, (axes,) = _figure(1)
    for arm in drawn(view):
        points = [(rate, loss) for rate, loss in view.tuned(arm) if math.isfinite(loss)]
        axes.plot(*zip(*points), marker="o", markersize=3, label=arm)
    axes.set_xscale("log")
    _labels(axes, "lr", "validation loss, seed 0")
    axes.legend(frameon=False, fontsize=7)
    return figure


def entropy(view: View) -> Figure:
    """SVD entropy of each matrix under one optimizer over that under the other."""
    pairs = drawn(view)
    figure, axes = _figure(len(pairs))
    for plot, (arm, to) in zip(axes, pairs):
        kinds: dict[str, list[tuple[float, float]]] = {}
        for seed, row in view.rows(arm).items():
            other = view.rows(to).get(seed, {"entropy": {}})["entropy"]
            for name, value in row["entropy"].items():
                if name in other:
                    kinds.setdefault(kind_of(name), []).append((other[name], value))
        for kind, points in kinds.items():
            plot.plot(*zip(*points), "o", markersize=3, label=kind)
        low = min(min(point) for points in kinds.values() for point in points)
        plot.plot([low, 1], [low, 1], color="gray", linewidth=0.8)
        _labels(plot, f"SVD entropy, {to}", arm)
        plot.legend(frameon=False, fontsize=7)
    return figure


def shares(view: View) -> Figure:
    """Steps to equal loss as a share of the other side's."""
    pairs = drawn(view)
    figure, (axes,) = _figure(1)
    for number, (arm, to) in enumerate(pairs):
        share = view.steps_share(arm, to)
        if math.isfinite(share.mean):
            half = share.high - share.mean if math.isfinite(share.high) else 0.0
            axes.errorbar(share.mean, number, xerr=half, marker="o", capsize=3, color="C0")
    axes.set_yticks(range(len(pairs)), labels=[f"{arm} to {to}" for arm, to in pairs])
    axes.invert_yaxis()
    _labels(axes, "share of AdamW's steps to its final loss; bars: 95 %", "")
    return figure


PICTURES: dict[str, Callable[[View], Figure]] = {
    "over_steps": over_steps,
    "over_arms": over_arms,
    "over_rates": over_rates,
    "entropy": entropy,
    "shares": shares,
}


def _figure(columns: int) -> tuple[Figure, Sequence[Axes]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(3.6 * columns if columns > 1 else 6, 3.2), layout="constrained")
    return figure, axes if columns > 1 else [axes]


def _labels(axes: Axes, across: str, up: str) -> None:
    axes.set_xlabel(across, fontsize=9)
    axes.set_ylabel(up, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)


def _mean_curve(curves: Sequence[Sequence[tuple[float, float]]]) -> tuple[list[float], list[float]]:
    """The mean over the curves, at the steps that all have."""
    by_step = [dict(curve) for curve in curves]
    steps = sorted(set.intersection(*(set(curve) for curve in by_step)))
    return steps, [fmean(curve[step] for curve in by_step) for step in steps]
