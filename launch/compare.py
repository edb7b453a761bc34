"""Compare finished runs: a picture of their losses and a table of what they reached and what it cost.

    python -m launch.compare runs/quickstart/muon runs/quickstart/adamw --out runs/quickstart

Reads nothing but each run's `metrics.jsonl`; files among the folders (`runs/sweep/*`) are passed by. The baseline is
the adamw run with the lowest final validation loss, or else the last run. Of every other run the table says after how
many steps it had the baseline's final validation loss (linear between validations), what share of the baseline's steps
that is, and the same in seconds at each run's median step.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from launch.failures import run_program
from launch.logs import METRICS_FILE, Record, read_records

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = list[tuple[int, float]]
SMOOTHING = 0.9
"""Weight of the past in the drawn training curve."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one `metrics.jsonl` says."""

    label: str
    optimizer: str
    train: Curve
    val: Curve
    step_ms: float
    per_rank: list[Record]

    @property
    def steps(self) -> int:
        return self.train[-1][0]

    @property
    def final_val(self) -> float:
        return self.val[-1][1]

    @property
    def final_train(self) -> float:
        """Mean over the last twentieth of the steps: a single batch says little."""
        tail = self.train[-max(1, len(self.train) // 20) :]
        return sum(loss for _, loss in tail) / len(tail)

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
    optimizer = by_kind["run"][0]["config"]["optimizer"]
    name = {"distmuon": "Muon", "adamw": "AdamW"}[optimizer["name"]]
    return Run(
        label=f"{name} (lr {optimizer['lr']:g})",
        optimizer=optimizer["name"],
        # a diverged run's losses are null; it has no curve from there on
        train=[(record["step"], record["loss"]) for record in by_kind["train"] if record["loss"] is not None],
        val=[(record["step"], record["loss"]) for record in by_kind["val"] if record["loss"] is not None],
        step_ms=median(record["step_ms"] for record in by_kind["train"]),
        per_rank=by_kind["summary"][0]["per_rank"],
    )


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
        share = steps * run.step_ms / (baseline.steps * baseline.step_ms)
        return f"{steps * run.step_ms / 1e3:.1f}" + ("" if run is baseline else f" ({share:.2f}x)")

    rows = {
        "steps": [str(run.steps) for run in runs],
        "final training loss": [f"{run.final_train:.4f}" for run in runs],
        "final validation loss": [f"{run.final_val:.4f}" for run in runs],
        f"steps to validation loss {baseline.final_val:.4f}": [reached(run) for run in runs],
        "seconds of steps to that": [seconds(run) for run in runs],
        "median step, ms": [f"{run.step_ms:.1f}" for run in runs],
        "state, bytes a rank": [f"{run.max_over_ranks('state_bytes'):,}" for run in runs],
        **{
            f"{stage}, bytes a rank and step": [f"{run.max_over_ranks('bytes', stage):,}" for run in runs]
            for stage in stages
        },
    }
    lines = ["| | " + " | ".join(run.label for run in runs) + " |", "|---|" + "---:|" * len(runs)]
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


def draw_losses(runs: list[Run], path: Path) -> None:
    """Write the picture: validation bold, training light behind it, one colour a run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for number, run in enumerate(runs):
        color = f"C{number}"
        _plot(axes, smoothed(run.train), color=color, linewidth=0.8, alpha=0.5, label=f"{run.label}, training")
        _plot(axes, run.val, color=color, linewidth=2.2, marker="o", markersize=3.5, label=f"{run.label}, validation")
    # The fall of the first steps would flatten everything else: the top is where the slowest run soon stands.
    early = [loss for run in runs for step, loss in run.val if step >= run.steps / 20]
    lowest = min(loss for run in runs for _, loss in run.val)
    if early:
        axes.set_ylim(top=max(early) + 0.1 * (max(early) - lowest) + 1e-3)
    axes.set_xlim(left=0)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a token")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


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
    draw_losses(runs, arguments.out / "loss.png")
    table = summary_table(runs)
    (arguments.out / "summary.md").write_text(table, encoding="utf-8")
    print(table, end="")


if __name__ == "__main__":
    run_program(main)
