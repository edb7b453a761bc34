"""Where a step's time goes, of one run: `stage_ms` of the train records over steps, and one step as a timeline.

[Note: what the timeline can show] A record holds the host's milliseconds by stage of the optimizer, summed over
buckets, and the length of the whole step. It holds no moments. So the timeline puts the stages one behind the other in
the order of a bucket's life; really the buckets take turns. What a collective travels is drawn as the longest stretch
in which it may have been under way: from its launch to the end of its wait. Work that hides it lies above that stretch;
what the host waited for is what was not hidden. On a GPU the host only queues kernels, so its times say when work was
asked for; a stage that waits for the device takes the blame for what was queued before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from launch.report.chart import PALETTE, Axis, Chart, line, thin
from launch.report.history import History
from launch.report.table import Table, number

Sort = Literal["model", "work", "wait", "launch"]
SORTS: dict[Sort, tuple[str, str]] = {
    "model": ("forward, backward, data", PALETTE[9]),
    "work": ("the optimizer's work", PALETTE[0]),
    "wait": ("waiting for other ranks", PALETTE[1]),
    "launch": ("starting collectives", PALETTE[2]),
}
# In the order of a bucket's life; a stage that is not here counts as work.
STAGES: dict[str, tuple[Sort, str]] = {
    "finish_reduce_scatter": ("wait", "waits for the gradients' reduce-scatter"),
    "guard": ("wait", "agrees with all ranks that the gradients are finite"),
    "verify": ("wait", "compares parameters across ranks"),
    "momentum": ("work", "momentum on the shard"),
    "start_dp_gather": ("launch", "sends pieces of matrices to their owners"),
    "dp_gather": ("wait", "waits for the pieces"),
    "newton_schulz": ("work", "orthogonalizes whole matrices"),
    "start_scatter": ("launch", "sends pieces of the results home"),
    "scatter": ("wait", "waits for them"),
    "apply": ("work", "writes the weights, AdamW's too"),
    "start_all_gather": ("launch", "starts sending the parameters"),
}
# What travels: its name in `bytes` and on the page, the stage that launches it, and the one that waits for it.
TRAVELS: tuple[tuple[str, str, str | None, str | None], ...] = (
    ("reduce_scatter", "reduce-scatter", None, "finish_reduce_scatter"),
    ("dp_gather", "to owners", "start_dp_gather", "dp_gather"),
    ("scatter", "back home", "start_scatter", "scatter"),
    ("all_gather", "all-gather", "start_all_gather", None),
)


@dataclass(frozen=True)
class Span:
    stage: str
    sort: Sort
    start: float
    length: float


@dataclass(frozen=True)
class MedianStep:
    """The medians over the steps, in milliseconds; `spans` one behind the other."""

    step_ms: float
    spans: tuple[Span, ...]
    sent: dict[str, int]

    @property
    def waited(self) -> float:
        return sum(span.length for span in self.spans if span.sort == "wait")

    def total(self, sort: Sort) -> float:
        return sum(span.length for span in self.spans if span.sort == sort)


def median_step(run: History) -> MedianStep | None:
    """None without stage times. The first step of a start, which builds buffers, does not count."""
    first = {start.get("resumed_from", 0) + 1 for start in run.starts}
    records = [r for r in run.train if r.get("stage_ms") and r.get("step_ms") and r["step"] not in first]
    if not records:
        return None
    step_ms = median(record["step_ms"] for record in records)
    lengths = {stage: median(r["stage_ms"].get(stage, 0.0) for r in records) for stage in _stages(records)}
    spans, now = [Span("model", "model", 0.0, max(0.0, step_ms - sum(lengths.values())))], 0.0
    for stage, length in lengths.items():
        now = spans[-1].start + spans[-1].length
        spans.append(Span(stage, _sort(stage), now, length))
    return MedianStep(step_ms, tuple(spans), records[-1].get("bytes") or {})


def timing_charts(run: History, typical: MedianStep | None) -> list[Chart]:
    """Step times, and where the records have them the stages and the timeline."""
    found = [_step_ms(run)]
    if typical is not None:
        found += [_stage_ms(run), _timeline(typical)]
    return [chart for chart in found if chart.traces]


def timing_sentence(run: History, typical: MedianStep | None) -> str:
    """What the medians say."""
    if typical is None:
        return ""
    share = {sort: typical.total(sort) / typical.step_ms for sort in SORTS}
    text = f"Medians of rank 0: a step takes {number(typical.step_ms)} ms. Of it the optimizer works "
    text += f"{number(typical.total('work'))} ms ({share['work']:.1%}), waits for other ranks "
    text += f"{number(typical.waited)} ms ({share['wait']:.1%}) and starts collectives in "
    text += f"{number(typical.total('launch'))} ms ({share['launch']:.1%})."
    if run.starts[-1].get("device") != "cpu":
        text += " These are times of the host. On a GPU the host queues kernels and goes on, so a stage's kernels may "
        text += "run later than its bar, and a stage that reads the device waits for all that was queued before it. "
        text += "torch.profiler shows the kernels; every stage has a label there, distmuon::stage/bucket."
    else:
        text += " On a CPU the host's times are those of the work itself."
    return text


def stage_table(typical: MedianStep | None) -> Table | None:
    if typical is None:
        return None
    rows = [
        [
            span.stage,
            STAGES.get(span.stage, ("work", ""))[1],
            f"{number(span.length)}",
            f"{span.length / typical.step_ms:.1%}",
        ]
        for span in typical.spans[1:]
    ]
    model = typical.spans[0]
    rows.insert(0, ["all else", SORTS["model"][0], number(model.length), f"{model.length / typical.step_ms:.1%}"])
    return Table(("stage", "what the host does", "ms", "of the step"), rows, "Median of each stage, rank 0.")


def _stages(records: Sequence[dict[str, Any]]) -> list[str]:
    found = list(dict.fromkeys(stage for record in records for stage in record["stage_ms"]))
    order = list(STAGES)
    return sorted(found, key=lambda stage: order.index(stage) if stage in order else order.index("apply"))


def _sort(stage: str) -> Sort:
    return STAGES.get(stage, ("work", ""))[0]


def _step_ms(run: History) -> Chart:
    chart = Chart(
        name="step_ms",
        title="Time of a step",
        about="Where the device is read only every few steps, an interval's time is spread evenly over its steps.",
        y=Axis("step time", "ms", log=True),
    )
    times = [record.get("step_ms") for record in run.train]
    if any(times):
        chart.traces = [line("step", [r["step"] for r in run.train], times, color=PALETTE[0], width=1.3)]
    return chart


def _stage_ms(run: History) -> Chart:
    records = [record for record in run.train if record.get("stage_ms")]
    chart = Chart(
        name="stage_ms",
        title="The optimizer's stages",
        about="Stacked, on rank 0's host.",
        y=Axis("host time", "ms per step"),
    )
    sums = [sum(record["stage_ms"].values()) for record in records]
    keep = thin(sums, 400)
    for place, stage in enumerate(_stages(records)):
        y = [records[index]["stage_ms"].get(stage, 0.0) for index in keep]
        trace = line(
            stage, [records[index]["step"] for index in keep], y, color=PALETTE[place % len(PALETTE)], width=0.5
        )
        chart.traces.append({**trace, "stackgroup": "stages", "mode": "lines"})
    # The first step builds buffers and would flatten all others.
    typical = sorted(sums)[int(0.98 * (len(sums) - 1))]
    chart.y = Axis("host time", "ms per step", range=(0.0, 1.1 * typical or 1.0))
    return chart


def _timeline(typical: MedianStep) -> Chart:
    """See [Note: what the timeline can show]."""
    chart = Chart(
        name="timeline",
        title="One step, and what travels meanwhile",
        about="Medians. Stages stand one behind the other, summed over buckets; really the buckets take turns. A pale "
        "bar is the longest stretch in which its bytes may have been under way: what stands above it can hide it. "
        "Orange is time in which the host waited, so what was not hidden. Records hold no moments.",
        x=Axis("time since the step began", "ms"),
        y=Axis("what", "by row"),
        wide=True,
    )
    host = "host"
    for sort, (text, color) in SORTS.items():
        spans = [span for span in typical.spans if span.sort == sort and span.length > 0]
        if spans:
            labels = [text if span.stage == "model" else span.stage for span in spans]
            bar = _bars(text, host, [(span.start, span.length) for span in spans], color, labels)
            chart.traces.append(bar)
    start = {span.stage: span.start for span in typical.spans}
    end = {span.stage: span.start + span.length for span in typical.spans}
    rows, last = [host], max(end.values())
    for key, text, launched, awaited in TRAVELS:
        if typical.sent.get(key):
            begin = 0.0 if launched is None else start.get(launched, 0.0)
            finish = last if awaited is None else end.get(awaited, last)
            label = f"{typical.sent[key]:,} bytes sent by rank 0"
            if awaited is None:
                label += "; it may go on under the next forward"
            if launched is None:
                label += "; launched during backward"
            bar = _bars(text, text, [(begin, finish - begin)], PALETTE[4], [label])
            chart.traces.append({**bar, "opacity": 0.35, "showlegend": False})
            rows.append(text)
    chart.layout = {
        "barmode": "overlay",
        "bargap": 0.35,
        "hovermode": "closest",
        "height": 150 + 42 * len(rows),
    }
    chart.layout["yaxis"] = {
        "type": "category",
        "categoryorder": "array",
        "categoryarray": rows[::-1],
        "automargin": True,
    }
    return chart


def _bars(
    name: str, row: str, spans: Sequence[tuple[float, float]], color: str, labels: Sequence[str]
) -> dict[str, Any]:
    return {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "y": [row] * len(spans),
        "x": [length for _, length in spans],
        "base": [start for start, _ in spans],
        "marker": {"color": color},
        "customdata": list(labels),
        "hovertemplate": "%{customdata}: %{x:.4~g} ms<extra></extra>",
    }
