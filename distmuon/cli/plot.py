"""The picture of `distmuon plan`: traffic, memory, balance and time over the number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distmuon.errors import problem
from distmuon.planning.plan import Plan
from distmuon.planning.verdict import Verdict


def draw(plans: Sequence[Plan], verdicts: Sequence[Verdict], title: str, path: Path) -> None:
    """Plot four panels over dp_size. Earlier lines are wider, so that a line which another covers stays visible."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise problem(
            "--plot", found="matplotlib is not installed", needed="it draws the plot", cure="pip install matplotlib"
        ) from None
    figure: Any
    figure, axes = pyplot.subplots(1, 4, figsize=(16, 4), layout="constrained")
    plans = sorted(plans, key=lambda found: found.dp_size)
    sizes = [found.dp_size for found in plans]
    ways = [plans[0].way, *(other.way for other in plans[0].others)]
    for number, way in enumerate(ways):
        series = [(found, *found.others)[number] for found in plans]
        style: dict[str, Any] = {
            "label": way,
            "linewidth": 2.0 + 2.5 * (len(ways) - 1 - number),
            "marker": "o",
            "markersize": 4 + 3 * (len(ways) - 1 - number),
            "alpha": 0.55 if number == 0 else 0.9,
            "zorder": 2 + number,
        }
        axes[0].plot(sizes, [planned.sent / 1e9 for planned in series], **style)
        axes[1].plot(sizes, [planned.fullest.total / 1e9 for planned in series], **style)
        axes[2].plot(sizes, [planned.ns_balance for planned in series], **style)
        times = [planned.time for planned in series if planned.time]
        if len(times) == len(series):
            axes[3].plot(sizes, [1e3 * time.step_s for time in times], **style)
    hbm = verdicts[0].hbm
    if hbm is not None:
        axes[1].axhline(hbm / 1e9, color="black", linestyle="--", linewidth=1, label=f"{hbm / 1e9:g} GB")
    titles = (
        "sent by the busiest rank",
        "held by the fullest rank",
        "Newton-Schulz, max/mean",
        "optimizer's step, estimate",
    )
    units = ("GB a step", "GB, without activations", "busiest rank / mean", "ms")
    for axis, name, unit in zip(axes, titles, units):
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
        axis.set_title(name)
        axis.set_xlabel("data-parallel ranks")
        axis.set_ylabel(unit)
        axis.set_ylim(bottom=1 if axis is axes[2] else 0)
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
