"""How training went, of one or several runs: losses, learning rates, gradient norms, speed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launch.compare import smoothed
from launch.logs import Record
from launch.report.chart import PALETTE, STEP, Axis, Chart, Numbers, finite, line, upright
from launch.report.history import History, column

DASHES = {"muon": "solid", "adamw": "dash"}
RULES = {"muon": "Muon", "adamw": "AdamW"}


def training_charts(runs: Sequence[History]) -> list[Chart]:
    """The charts that have data."""
    found = [_loss(runs), _learning_rate(runs), _gradient_norm(runs), _speed(runs), _utilization(runs), _memory(runs)]
    return [chart for chart in found if chart.traces]


def color_of(number: int) -> str:
    return PALETTE[number % len(PALETTE)]


def named(run: History, text: str, runs: Sequence[History]) -> str:
    """The name of a curve: of several runs it begins with the run's label."""
    return f"{run.label}, {text}" if len(runs) > 1 else text


def _loss(runs: Sequence[History]) -> Chart:
    seconds = max((run.clock(record["step"])[1] or 0.0 for run in runs for record in run.train[-1:]), default=0.0)
    divisor, unit = next((d, u) for d, u, most in _TIMES if seconds <= most)
    chart = Chart(
        name="loss",
        title="Loss",
        about="Validation is bold, training light, and its moving mean between the two. The fall of the first steps is "
        "cut off at the top; a double click shows it. Time is the sum of the steps' times, without validations and "
        "checkpoints.",
        y=Axis("loss", "nats per token"),
        choices={"steps": STEP, "tokens": Axis("tokens seen", "count"), "time": Axis("time of all steps", unit)},
        wide=True,
    )
    shown: list[float] = []
    for number, run in enumerate(runs):
        color = color_of(number)

        def add(
            text: str, records: Sequence[Record], y: Numbers, run: History = run, color: str = color, **style: Any
        ) -> None:
            steps = [record["step"] for record in records]
            if finite(y):
                xs = _choices(run, steps, divisor)
                chart.traces.append(line(named(run, text, runs), steps, y, color=color, xs=xs, form=".4f", **style))
                shown.extend(value for step, value in zip(steps, y) if value is not None and step >= run.steps / 20)

        kept = [record for record in run.train if record.get("loss") is not None]
        mean = [value for _, value in smoothed([(record["step"], record["loss"]) for record in kept])]
        add("training", run.train, [record.get("loss") for record in run.train], width=1, opacity=0.45)
        if len(kept) > 20:
            add("training, moving mean", kept, mean, width=1.2, opacity=0.85)
        add("validation", run.val, [record.get("loss") for record in run.val], width=2.5, markers=len(run.val) <= 60)
        if run.skipped_at and shown:
            marks = upright(
                named(run, f"skipped steps ({len(run.skipped_at)})", runs),
                run.skipped_at,
                min(shown),
                max(shown),
                xs=_choices(run, run.skipped_at, divisor),
            )
            chart.traces.append(marks)
    if shown and max(run.steps for run in runs) >= 20:
        margin = 0.05 * (max(shown) - min(shown)) + 1e-3
        chart.y = Axis("loss", "nats per token", range=(min(shown) - margin, max(shown) + margin))
    known = {key for trace in chart.traces for key, values in trace["xs"].items() if finite(values)}
    chart.choices = {key: axis for key, axis in chart.choices.items() if key in known}
    return chart


_TIMES = ((1, "s", 300), (60, "min", 3 * 3600), (3600, "h", float("inf")))


def _choices(run: History, steps: Sequence[int], divisor: int) -> dict[str, Sequence[Any]]:
    clock = [run.clock(step) for step in steps]
    seconds = [None if spent is None else round(spent / divisor, 4) for _, spent in clock]
    return {"steps": list(steps), "tokens": [tokens for tokens, _ in clock], "time": seconds}


def _learning_rate(runs: Sequence[History]) -> Chart:
    chart = Chart(
        name="lr",
        title="Learning rates",
        about="Muon's solid, AdamW's dashed; one lies on the other where they are equal.",
        y=Axis("learning rate", "per step"),
    )
    for number, run in enumerate(runs):
        with_lr = [record for record in run.train if record.get("lr")]
        for rule in dict.fromkeys(rule for record in with_lr for rule in record["lr"]):
            steps, values = [record["step"] for record in with_lr], [record["lr"].get(rule) for record in with_lr]
            name, dash = named(run, RULES.get(rule, rule), runs), DASHES.get(rule, "dot")
            chart.traces.append(line(name, steps, values, color=color_of(number), dash=dash))
    return chart


def _gradient_norm(runs: Sequence[History]) -> Chart:
    chart = Chart(
        name="grad_norm",
        title="Gradient norm",
        about="Over all parameters and before clipping. A step without a finite norm is skipped and changes no weight; "
        "it is marked by a red stroke.",
        y=Axis("gradient norm", "L2 norm", log=True),
    )
    for number, run in enumerate(runs):
        steps, norms = column(run.train, lambda record: record.get("grad_norm"))
        known = [norm for norm in finite(norms) if norm > 0]
        if known:
            chart.traces.append(line(named(run, "norm", runs), steps, norms, color=color_of(number), width=1.3))
        if run.skipped_at:
            low, high = (min(known), max(known)) if known else (0.1, 10.0)
            name = named(run, f"skipped steps ({len(run.skipped_at)})", runs)
            chart.traces.append(upright(name, run.skipped_at, low, high))
    clips = {run.setting("train.max_grad_norm") for run in runs}
    if len(clips) == 1 and (clip := clips.pop()) and chart.traces:
        label = {"text": f"clipped to {clip:g}", "textposition": "end", "font": {"size": 12}}
        where = {"xref": "paper", "x0": 0, "x1": 1, "yref": "y", "y0": clip, "y1": clip}
        chart.shapes.append({"type": "line", "line": {"width": 1, "dash": "dot"}, "label": label, **where})
    return chart


def _speed(runs: Sequence[History]) -> Chart:
    chart = Chart(
        name="tokens_per_s",
        title="Speed",
        about="All ranks together. The first step of a start builds buffers and is slow.",
        y=Axis("speed", "tokens per second", zero=True),
    )
    return _of_each_run(chart, runs, "tokens_per_s", "tokens per second")


def _utilization(runs: Sequence[History]) -> Chart:
    chart = Chart(
        name="mfu",
        title="Model FLOPs utilization",
        about="The model's own floating-point work as a share of what the GPUs could do at their peak.",
        y=Axis("utilization", "share of peak FLOP/s", zero=True),
    )
    return _of_each_run(chart, runs, "mfu", "utilization")


def _memory(runs: Sequence[History]) -> Chart:
    chart = Chart(
        name="peak_bytes",
        title="Peak memory",
        about="The most that tensors have taken on rank 0's GPU since the start.",
        y=Axis("memory", "bytes", zero=True),
    )
    return _of_each_run(chart, runs, "peak_bytes", "peak")


def _of_each_run(chart: Chart, runs: Sequence[History], key: str, text: str) -> Chart:
    for number, run in enumerate(runs):
        steps, values = column(run.train, lambda record: record.get(key))
        if finite(values):
            chart.traces.append(line(named(run, text, runs), steps, values, color=color_of(number), width=1.3))
    return chart
