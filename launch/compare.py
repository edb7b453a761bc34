"""Compare finished runs: a picture of how they trained and a table of what they reached and what it cost.

    python -m launch.compare runs/quickstart/muon runs/quickstart/adamw --out runs/quickstart

Reads nothing but each run's `metrics.jsonl`; files among the folders (`runs/sweep/*`) are passed by. The baseline is
the adamw run with the lowest final validation loss, or else the last run. Of every other run the table says after how
many steps it had the baseline's final validation loss (linear between validations), what share of the baseline's steps
that is, and the same in seconds at each run's median step.

The picture has the losses over steps and over the time that steps took (without validations), the learning rates and
the gradient norms. Runs that differ by their seed only have one color.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from launch.config import leaves
from launch.failures import run_program
from launch.logs import METRICS_FILE, Record, amount, read_records

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = list[tuple[float, float]]
SMOOTHING = 0.9
"""Weight of the past in the drawn training curve."""
NO_DIFFERENCE = ("log.", "checkpoint.", "optimizer.name", "optimizer.lr", "train.seed")
"""Keys that the label of a run does not name, or names in any case."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one `metrics.jsonl` says."""

    config: dict[str, Any]
    train: Curve
    val: Curve
    grad_norm: Curve
    lr: dict[str, Curve]
    """By rule."""
    step_ms: list[float]
    tokens: int | None
    """Seen in the whole run; None: an older record does not say."""
    per_rank: list[Record]

    @property
    def optimizer(self) -> str:
        found: str = self.config["optimizer.name"]
        return found

    @property
    def setting(self) -> tuple[tuple[str, str], ...]:
        """What it shares with runs of other seeds."""
        return tuple(
            (key, str(value))
            for key, value in sorted(self.config.items())
            if not key.startswith(("log.", "checkpoint.", "train.seed"))
        )

    @property
    def steps(self) -> int:
        return int(self.train[-1][0])

    @property
    def median_step_ms(self) -> float:
        return median(self.step_ms)

    @property
    def final_val(self) -> float:
        return self.val[-1][1]

    @property
    def final_train(self) -> float:
        """Mean over the last twentieth of the steps: a single batch says little."""
        tail = self.train[-max(1, len(self.train) // 20) :]
        return sum(loss for _, loss in tail) / len(tail)

    def over_seconds(self, curve: Curve) -> Curve:
        """A curve over steps as one over the seconds that they took."""
        seconds = [0.0, *accumulate(milliseconds / 1e3 for milliseconds in self.step_ms)]
        return [(seconds[int(step)], value) for step, value in curve if step < len(seconds)]

    def max_over_ranks(self, key: str, stage: str | None = None) -> int:
        """The busiest rank's `state_bytes`, or its bytes of one stage in the last step."""
        return max(int(rank[key] if stage is None else rank[key].get(stage, 0)) for rank in self.per_rank)

    @property
    def stages(self) -> list[str]:
        return list(dict.fromkeys(stage for rank in self.per_rank for stage in rank["bytes"]))


def read_run(folder: Path) -> Run:
    """The finished run in a folder. Raises ValueError for one without a summary."""
    path = folder / METRICS_FILE
    if not path.is_file():
        raise ValueError(f"{folder}: found no {METRICS_FILE}; a run's folder is needed; run launch.pretrain first")
    records = read_records(path)
    by_kind: dict[str, list[Record]] = {"run": [], "train": [], "val": [], "summary": []}
    for record in records:
        by_kind.setdefault(record["kind"], []).append(record)
    if not by_kind["run"] or not by_kind["train"] or not by_kind["summary"]:
        raise ValueError(f"{path}: found {len(records)} records and no summary; the run has not finished; run it again")
    train = by_kind["train"]
    return Run(
        config=dict(leaves(by_kind["run"][-1]["config"])),
        # a diverged run's losses are null; it has no curve from there on
        train=_curve(train, "loss"),
        val=_curve(by_kind["val"], "loss"),
        grad_norm=_curve(train, "grad_norm"),
        lr={rule: [(record["step"], record["lr"][rule]) for record in train] for rule in train[0].get("lr", {})},
        step_ms=[record["step_ms"] for record in train],
        tokens=train[-1].get("tokens"),
        per_rank=by_kind["summary"][0]["per_rank"],
    )


def _curve(records: list[Record], key: str) -> Curve:
    return [(record["step"], record[key]) for record in records if record.get(key) is not None]


def labels(runs: Sequence[Run]) -> list[str]:
    """The optimizer and its rate, the keys in which these runs differ besides, and the seed of one among several."""
    every = [key for key in dict.fromkeys(key for run in runs for key in run.config) if not _is_named(key)]
    differing = [key for key in every if len({str(run.config.get(key)) for run in runs}) > 1]
    found = []
    for run in runs:
        name = {"distmuon": "Muon", "adamw": "AdamW"}[run.optimizer]
        words = [f"lr {run.config['optimizer.lr']:g}"]
        words += [f"{key.rpartition('.')[2]} {run.config.get(key)}" for key in differing[:3]]
        if sum(run.setting == other.setting for other in runs) > 1:
            words.append(f"seed {run.config['train.seed']}")
        found.append(f"{name} ({', '.join(words)})")
    return found


def _is_named(key: str) -> bool:
    return key.startswith(NO_DIFFERENCE)


def steps_to_reach(curve: Curve, loss: float) -> float | None:
    """The first step, linear between the points, at which a falling curve is down to `loss`; None if it never is."""
    for (step, value), (next_step, next_value) in pairwise(curve):
        if value <= loss:
            return float(step)
        if next_value <= loss:
            return step + (next_step - step) * (value - loss) / (value - next_value)
    return float(curve[-1][0]) if curve and curve[-1][1] <= loss else None


def summary_table(runs: list[Run]) -> str:
    """The markdown table, one column a run."""
    baseline = min((run for run in runs if run.optimizer == "adamw"), key=lambda run: run.final_val, default=runs[-1])
    stages = list(dict.fromkeys(stage for run in runs for stage in run.stages))

    def reached(run: Run) -> str:
        if run is baseline:
            return f"{run.steps}"
        steps = steps_to_reach(run.val, baseline.final_val)
        return "not reached" if steps is None else f"{steps:.0f} ({steps / baseline.steps:.2f}x)"

    def seconds(run: Run) -> str:
        steps = run.steps if run is baseline else steps_to_reach(run.val, baseline.final_val)
        if steps is None:
            return "not reached"
        share = steps * run.median_step_ms / (baseline.steps * baseline.median_step_ms)
        return f"{steps * run.median_step_ms / 1e3:.1f}" + ("" if run is baseline else f" ({share:.2f}x)")

    rows = {
        "steps": [str(run.steps) for run in runs],
        "tokens": ["-" if run.tokens is None else f"{run.tokens:,}" for run in runs],
        "final training loss": [f"{run.final_train:.4f}" for run in runs],
        "final validation loss": [f"{run.final_val:.4f}" for run in runs],
        f"steps to validation loss {baseline.final_val:.4f}": [reached(run) for run in runs],
        "seconds of steps to that": [seconds(run) for run in runs],
        "median step, ms": [f"{run.median_step_ms:.1f}" for run in runs],
        "state, bytes a rank": [f"{run.max_over_ranks('state_bytes'):,}" for run in runs],
        **{
            f"{stage}, bytes a rank and step": [f"{run.max_over_ranks('bytes', stage):,}" for run in runs]
            for stage in stages
        },
    }
    lines = ["| | " + " | ".join(labels(runs)) + " |", "|---|" + "---:|" * len(runs)]
    lines += [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()]
    return "\n".join(lines) + "\n"


def smoothed(curve: Curve) -> Curve:
    """Exponential mean, corrected for its start."""
    points: Curve = []
    mean = weight = 0.0
    for step, loss in curve:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        points.append((step, mean / weight))
    return points


def draw(runs: list[Run], path: Path) -> None:
    """Write the picture: losses above, over steps and over seconds; learning rates and gradient norms below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ((over_steps, over_time), (rates, norms)) = pyplot.subplots(2, 2, figsize=(12, 8), layout="constrained")
    colors = {setting: f"C{number}" for number, setting in enumerate(dict.fromkeys(run.setting for run in runs))}
    for run, label in zip(runs, labels(runs)):
        same = [other for other in runs if other.setting == run.setting]
        label = label.replace(f"seed {run.config.get('train.seed')}", f"{len(same)} seeds") if len(same) > 1 else label
        style = {"color": colors[run.setting], "label": label if run is same[0] else "_"}
        faint, bold = {"linewidth": 0.8, "alpha": 0.4}, {"linewidth": 2.2, "marker": "o", "markersize": 3.5}
        for axes, curves in (
            (over_steps, (smoothed(run.train), run.val)),
            (over_time, (run.over_seconds(smoothed(run.train)), run.over_seconds(run.val))),
        ):
            _plot(axes, curves[0], **{**style, "label": "_"}, **faint)
            _plot(axes, curves[1], **style, **bold)
        for rule, curve in run.lr.items():
            _plot(rates, curve, **style, linestyle="-" if rule == "muon" or len(run.lr) == 1 else "--")
            style["label"] = "_"
        _plot(norms, smoothed(run.grad_norm), color=colors[run.setting])
    # The fall of the first steps would flatten everything else: the top is where the slowest run soon stands.
    early = [loss for run in runs for step, loss in run.val if step >= run.steps / 20]
    lowest = min(loss for run in runs for _, loss in run.val)
    for axes, across, up in (
        (over_steps, "step", "loss, nats a token"),
        (over_time, "seconds of steps", "loss, nats a token"),
        (rates, "step", "learning rate (dashed: of AdamW's part)"),
        (norms, "step", "gradient norm before clipping, smoothed"),
    ):
        if early and axes in (over_steps, over_time):
            axes.set_ylim(top=max(early) + 0.1 * (max(early) - lowest) + 1e-3)
        axes.set_xlim(left=0)
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        axes.grid(alpha=0.25)
    figure.legend(
        handles=[line for line in over_steps.lines if not str(line.get_label()).startswith("_")],
        loc="outside lower center",
        ncols=3,
        frameon=False,
        title="bold: validation, faint: training",
    )
    norms.set_yscale("log")
    figure.suptitle(_title(runs))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _title(runs: Sequence[Run]) -> str:
    """What is the same in all runs."""
    arch = " and ".join(dict.fromkeys(str(run.config.get("model.arch", "model")) for run in runs))
    tokens = {run.tokens for run in runs}
    size = f", {amount(tokens.pop() or 0)} tokens" if len(tokens) == 1 and None not in tokens else ""
    return f"{len(runs)} runs of {arch}, {max(run.steps for run in runs)} steps{size}"


def _plot(axes: Axes, curve: Curve, **style: Any) -> None:
    axes.plot([step for step, _ in curve], [loss for _, loss in curve], **style)


def main(argv: list[str] | None = None) -> None:
    """Write `loss.png` and `summary.md`, and print the table."""
    parser = argparse.ArgumentParser(description="Compare finished runs.")
    parser.add_argument("runs", nargs="+", type=Path, help="folders of launch.pretrain, in the order to show")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder of loss.png and summary.md")
    arguments = parser.parse_args(argv)
    runs = [read_run(path) for path in arguments.runs if not path.is_file()]
    if not runs:
        raise ValueError(f"runs: found {len(arguments.runs)} files and no folder; at least one run's folder is needed")
    arguments.out.mkdir(parents=True, exist_ok=True)
    draw(runs, arguments.out / "loss.png")
    table = summary_table(runs)
    (arguments.out / "summary.md").write_text(table, encoding="utf-8")
    print(table, end="")


if __name__ == "__main__":
    run_program(main)
