"""Make docs/experiments.md and its pictures of the results in the repository.

    python -m experiments.page

Every number on the page is computed here from experiments/results; a test compares the page with what this makes.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments import finetune, images, overhead, shardings
from experiments.analysis import (
    AGREES,
    CANNOT_TELL,
    DISAGREES,
    NOT_RUN,
    UNTESTED,
    Interval,
    Verdict,
    View,
    interval,
    on_side,
    visible,
)
from experiments.grids import ROOT, read_all
from experiments.pictures import PICTURES, drawn
from experiments.trial import RESULTS, Results

DOCS = ROOT / "docs"
COMMITTED = ("full", "small")
"""Sizes of the page, the first that has run."""
WIDTH = 116

INTRODUCTION = """\
# Experiments: does it train better?

After this page you know which claims about Muon hold in models that train on two processor cores, with which
uncertainty, and which do not. The claims are those of the paper behind this project, arXiv 2502.16982, whose models are
a thousand times larger, and of a few others. **A small model can contradict a claim about large ones only for small
models.** What disagrees stands here as plainly as what agrees.
"""

METHOD = """\
## How to read it

- **Losses** are validation losses at the end of a whole schedule, in nats a byte, on files of Python's standard library
  that are never trained on; for the ResNet in nats an image, on digits that are never trained on. The mean over seeds
  has Student's 95 % interval.
- **Tuning.** A side with rates is tuned first: every rate of its list once, at seed 0. The best rate then runs with the
  other seeds, and only these count. "Edge" says that the best rate was the smallest or the largest of the list.
- **Differences** are taken seed by seed: trials of a seed start at the same weights and read the same data.
- **A claim** agrees if its whole interval is on the expected side, or within the margin; it disagrees if the whole
  interval is on the other side, or outside; otherwise the data cannot tell. "As good as" also disagrees where a side is
  better: its difference of losses is then negative.
- **Visible** is the power of a test: the smallest true difference that so many seeds show with a probability of 80 %,
  at the spread that they have. A claim of "as good as (1 %)" can hardly agree where this is above 1 %, which is about
  0.02.
- **The number of seeds** was 3 to 8 at first. Where the data could not tell, experiment 1, the Llama and GPT-2 of
  experiment 4, and experiments 6 and 11 then were to get more. The spread of the first seeds gave the number for
  each: enough to see 1 % of a loss, or 0.05 of a share, but at most 20. It was fixed before any of them ran, whatever
  differences the first had shown. SOAP and experiments 6 and 11 got fewer, because time ran out: whole seeds, and
  none in the arms of two ranks. Lion and SGD keep 3, of which the data could tell. These experiments were chosen with
  their first verdicts known, so an interval there may miss in up to one of ten cases, not one of twenty. The ResNet's
  number was fixed before its first trial.
- **The size is the caveat.** A run of 200 steps reads less than one token a parameter, the source's read 26 and more.
  Where a result may be one of short runs, a longer one stands beside it.
- **Steps to equal loss** are read off the curve of one run with its whole schedule. A run with a shorter schedule would
  reach the loss sooner, so this understates the faster side. A share is infinite if a seed never gets there, and so is
  the mean. **Seconds** are processor seconds of whole trials, with their validations; neighbours on the machine can
  nearly double them.
- Many claims are tested at once: of twenty intervals of 95 %, one misses.
"""


FINETUNE_READING = """\
The third claim is the one that the source is about: it takes out which optimizer is faster in tuning, and leaves
whether it helps to keep the one of the pretraining. The first two do not, since Muon is faster here in everything.
Pretraining of so few steps leaves AdamW's model far behind, so tuning is mostly more pretraining. The source's models
are thousands of times larger and train thousands of times longer; a mismatch that grows in long pretraining cannot
show here."""


def render(results: Results, sizes: Sequence[str] = COMMITTED) -> str:
    """The page."""
    views = views_of(results, sizes)
    parts = [
        (1, *sharding_section()),
        *((view.experiment.number, *section(view)) for view in views),
        (9, *finetune_section()),
        (11, *overhead_section()),
    ]
    parts.sort(key=lambda part: part[0])
    verdicts = [(number, title, verdict) for number, title, _, found in parts for verdict in found]
    return "\n".join(
        [
            INTRODUCTION,
            summary(verdicts),
            METHOD,
            conditions(views, results),
            *(text for _, _, text, _ in parts),
        ]
    )


def views_of(results: Results, sizes: Sequence[str]) -> list[View]:
    """Each experiment at the first of these sizes that has run whole, or else at the last."""
    found = {experiment.name: experiment for experiment in read_all(sizes[-1])}
    for size in reversed(sizes[:-1]):
        found |= {other.name: other for other in read_all(size) if other.all_there(results.loss)}
    return [View(experiment, results) for experiment in found.values()]


def summary(verdicts: Sequence[tuple[int, str, Verdict]]) -> str:
    """All claims that have been tested, and the experiments that still have some."""
    lines = ["## In one table", "", "| | claim | found | verdict |", "|---:|---|---:|---|"]
    tested = [(number, verdict) for number, _, verdict in verdicts if verdict.word not in UNTESTED]
    lines += [f"| {number} | {verdict.text} | {cell(verdict)} | {verdict.word} |" for number, verdict in tested]
    count = {word: sum(verdict.word == word for _, verdict in tested) for word in (AGREES, DISAGREES, CANNOT_TELL)}
    told = f"{count[AGREES]} agree, {count[DISAGREES]} disagree, of {count[CANNOT_TELL]} the data cannot tell."
    left: dict[str, int] = {}
    for number, title, verdict in verdicts:
        if verdict.word in UNTESTED:
            left[f"{number} ({title})"] = left.get(f"{number} ({title})", 0) + 1
    if left:
        told += f" Not tested yet: {'; '.join(f'{claims} of experiment {name}' for name, claims in left.items())}."
    return "\n".join([*lines, "", *wrapped(told), ""])


def cell(verdict: Verdict) -> str:
    return "-" if verdict.found is None else str(verdict.found)


def conditions(views: Sequence[View], results: Results) -> str:
    """What was run, when, and on what."""
    rows = list(results.rows.values())
    hours = sum(row["cpu_s"] for row in rows) / 3600
    tuning = json.loads(finetune.RESULTS.read_text())["cpu_seconds"] / 3600
    steps = sum(overhead.read()["cpu_seconds"].values()) / 3600
    dates = sorted({row["date"] for row in rows})
    lines = ["## What was run", ""]
    if rows:
        data = rows[0]["data"]
        machines, torches, pythons = (_list(row[key] for row in rows) for key in ("machine", "torch", "python"))
        lines += wrapped(
            f"**{hours + tuning + steps:.1f} hours of processor time in all:** {hours:.2f} for {len(rows)} trials of "
            f"{len(views)} grids, {tuning:.2f} for experiment 9, {steps:.2f} for the overheads of experiment 11. The "
            f"time of the first part of experiment 1 was not recorded. {_span(dates)}, on {machines}, one thread a "
            f"process, with torch {torches} and Python {pythons}. Others used the machine at the same time, so wall "
            f"time says nothing. The text has {data['train_tokens']:,} bytes to train and "
            f"{data['val_tokens']:,} to validate. Each line of `experiments/results/trials.jsonl` has its settings, "
            "its commit and its processor time."
        )
    lines += [
        "",
        "| | experiment | size | trials run | not run yet | hours |",
        "|---:|---|---|---:|---:|---:|",
    ]
    for view in views:
        experiment = view.experiment
        mine = view.all_rows()
        missing = experiment.missing(results.loss)
        rest = "0" if not missing else f"{len(missing)} or more"
        spent = sum(row["cpu_s"] for row in mine) / 3600
        lines.append(
            f"| {experiment.number} | {experiment.title} | {experiment.size} | {len(mine)} | {rest} | {spent:.2f} |"
        )
    lines += [
        "",
        *wrapped(
            "Experiments share trials that are the same, so the hours of this table add up to more than the total. "
            "What has not run is run by"
        ),
        "",
        "```bash",
        "python -m experiments.runner                # small: what this page shows; goes on where it stopped",
        "python -m experiments.runner --size full    # five seeds, longer runs; four hours on two cores",
        "python -m experiments.runner --size gpu     # 0.8 B parameters, eight GPUs; no one has run it",
        "python -m experiments.runner --quick        # a few steps of everything, to see that it runs",
        "python -m experiments.page                  # this page, from the results",
        "```",
        "",
    ]
    return "\n".join(lines)


def _span(dates: Sequence[str]) -> str:
    return dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"


def _list(values: Any) -> str:
    return ", ".join(sorted(set(values)))


def wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, break_on_hyphens=False, break_long_words=False)


# ---- one experiment

Part = tuple[str, str, list[Verdict]]


def section(view: View) -> Part:
    """Title, text and verdicts."""
    experiment = view.experiment
    verdicts = [view.verdict(claim) for claim in experiment.claims]
    rows = view.all_rows()
    lines = [f"## {experiment.number}. {experiment.title}", ""]
    lines += wrapped(f"**Hypothesis.** {experiment.hypothesis} **Source:** {experiment.source}.")
    command = f"python -m experiments.runner {experiment.name}"
    command += "" if experiment.size == "small" else f" --size {experiment.size}"
    if not rows:
        lines += ["", f"Not run yet: `{command}`", ""]
        return experiment.title, "\n".join(lines), verdicts
    tokens, parameters = (sorted({row[key] for row in rows}) for key in ("tokens", "parameters"))
    each = sorted(row["tokens"] / row["parameters"] for row in rows)
    lengths = f"{each[0]:.1f}" + ("" if each[0] == each[-1] else f" to {each[-1]:.1f}")
    if rows[0]["data"]["source"] == images.SOURCE:
        seen = f"{_range(tokens)} images a run."
    else:
        seen = f"{_range(tokens)} tokens a run, which are {lengths} a parameter."
    setting = f"**Setting.** {experiment.about} {_range(parameters)} parameters, {seen}"
    lines += ["", *wrapped(setting + " " + budget(view)), "", *arms_table(view), ""]
    if drawn(view):
        lines += [f"![{experiment.title}](experiments/{experiment.name}.png)", ""]
    lines += [*ratio_table(view), *kinds_table(view), *verdict_table(verdicts)]
    lines += [*(["", *wrapped(experiment.reading)] if experiment.reading else []), "", f"`{command}`", ""]
    return experiment.title, "\n".join(lines), verdicts


def ratio_table(view: View) -> list[str]:
    """Best rates of both optimizers, and what it costs to take the other's; nothing for an experiment without."""
    lines = []
    arms = view.experiment.arms
    for arm, to, reused in view.experiment.ratios:
        if not {arm, to, reused} <= arms.keys() or not (view.rows(arm) and view.rows(to)):
            continue
        mine, other = view.rate(arm) or math.nan, view.rate(to) or math.nan
        found = (list(view.losses(name).values()) for name in (reused, arm))
        losses = (loss_text(interval(values)) if values else "not run" for values in found)
        lines.append(f"| {arm.partition(', ')[2]} | {other:g} | {mine:g} | {mine / other:g} | {' | '.join(losses)} |")
    if not lines:
        return []
    head = ["| run | AdamW's best lr | Muon's best lr | ratio | Muon's loss at AdamW's lr | at its own |"]
    return [*head, "|---|---:|---:|---:|---:|---:|", *lines, ""]


def kinds_table(view: View) -> list[str]:
    """RMS of the weights at the end, by kind of matrix, in the mean over seeds; nothing for an experiment without."""
    lines, kinds = [], []
    for arm in filter(view.experiment.arms.__contains__, view.experiment.by_kind):
        ends = [row["telemetry"][-1]["weight_rms"] for row in view.rows(arm).values() if row["telemetry"]]
        if ends:
            kinds = list(ends[0])
            lines.append(f"| {arm} | {' | '.join(f'{fmean(end[kind] for end in ends):.3f}' for kind in kinds)} |")
    if not lines:
        return []
    return [f"| RMS of weights at the end | {' | '.join(kinds)} |", "|---" + "|---:" * len(kinds) + "|", *lines, ""]


def verdict_table(verdicts: Sequence[Verdict]) -> list[str]:
    """The claims of an experiment, with what its seeds could have shown."""
    lines = ["| claim | found | seeds | visible | verdict |", "|---|---:|---:|---:|---|"]
    for verdict in verdicts:
        seeds = str(verdict.seeds or "-")
        seen = f"{verdict.visible:.2g}" if math.isfinite(verdict.visible) else "-"
        lines.append(f"| {verdict.text} | {cell(verdict)} | {seeds} | {seen} | {verdict.word} |")
    return lines


def _range(values: Sequence[int]) -> str:
    return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,} to {values[-1]:,}"


def budget(view: View) -> str:
    """How many rates each side was tuned over."""
    counts: dict[int, list[str]] = {}
    for arm in view.experiment.arms.values():
        if arm.rates:
            counts.setdefault(len(view.experiment.rates[arm.rates]), []).append(arm.name)
    told = [f"{number} rates for each of {'; '.join(arms)}" for number, arms in counts.items()]
    tuning = f"Tuning: {', and '.join(told)}." if told else "Nothing is tuned."
    return f"{tuning} Seeds: {', '.join(consecutive(view.experiment.seeds))}."


def consecutive(seeds: Sequence[int]) -> list[str]:
    """Runs of numbers that follow each other, by their ends."""
    runs: list[list[int]] = []
    for seed in seeds:
        if runs and seed == runs[-1][-1] + 1:
            runs[-1].append(seed)
        else:
            runs.append([seed])
    return [f"{run[0]}" if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]


def arms_table(view: View) -> list[str]:
    """A row an arm."""
    lines = ["| arm | rates tried | lr | validation loss | seeds | processor s |", "|---|---:|---:|---:|---:|---:|"]
    for arm in view.experiment.arms.values():
        rows, rate = view.rows(arm.name), view.rate(arm.name)
        tried = f"{len(view.tuned(arm.name))}" if arm.rates else "-"
        if not rows or rate is None:
            lines.append(f"| {arm.name} | {tried} | - | not run | 0 | - |")
            continue
        shown = f"{rate:g}" + (", edge" if view.is_on_edge(arm.name) else "")
        loss = interval(list(view.losses(arm.name).values()))
        seconds = fmean(row["cpu_s"] for row in rows.values())
        lines.append(f"| {arm.name} | {tried} | {shown} | {loss_text(loss)} | {len(rows)} | {seconds:.0f} |")
    return lines


def loss_text(loss: Interval) -> str:
    if not math.isfinite(loss.mean):
        return "diverged"
    half = loss.high - loss.mean
    return f"{loss.mean:.4f}" + (f" ± {half:.4f}" if math.isfinite(half) else "")


# ---- the two experiments with runners of their own


def sharding_section() -> Part:
    """Experiment 1, from the results of experiments.shardings."""
    curves = json.loads(shardings.RESULTS.read_text())
    found = shardings.differences(curves)
    equal = max(largest for _, name, largest, _ in found if name != shardings.CONTROL)
    off = min(largest for _, name, largest, _ in found if name == shardings.CONTROL)
    verdicts = [
        Verdict(
            text=f"No loss under any sharding differs from one process by more than {shardings.TOLERANCE:g}",
            found=Interval(mean=equal, low=-math.inf, high=math.inf),
            word=AGREES if equal <= shardings.TOLERANCE else DISAGREES,
        ),
        Verdict(
            text=f"Newton-Schulz on each shard alone leaves that line by more than {100 * shardings.TOLERANCE:g}",
            found=Interval(mean=off, low=-math.inf, high=math.inf),
            word=AGREES if off > 100 * shardings.TOLERANCE else DISAGREES,
        ),
    ]
    lines = ["## 1. The cut does not matter, and where it would", ""]
    lines += wrapped(
        "**Hypothesis.** In float32 the curves of one process, ZeRO-1, FSDP2, HSDP and tensor parallelism are one "
        "line, because every matrix is orthogonalized whole. The control, in which each of four ranks orthogonalizes "
        "the rows that it holds, must leave the line. **Source:** this project's design; step 3 of algorithm 1 of "
        "arXiv 2502.16982."
    )
    steps = len(next(iter(curves.values())))
    seeds = ", ".join(map(str, shardings.SEEDS))
    lines += ["", *wrapped(f"**Setting.** {steps} steps, seeds {seeds}, one rate, gloo."), ""]
    lines += ["| model | sharding | largest difference of a loss | last difference, mean of seeds |"]
    lines += ["|---|---|---:|---:|"]
    lines += [
        f"| {model} | {name} | {largest:.1e} | {last:+.1e} |"
        for model, name, largest, last in found
        if name != "one process"
    ]
    lines += ["", "![Losses under every sharding, and their distance from one process](shardings.png)", ""]
    lines += [*verdict_table(verdicts), "", "`python -m experiments.shardings`", ""]
    return "The cut does not matter", "\n".join(lines), verdicts


def finetune_section() -> Part:
    """Experiment 9, from the results of experiments.finetune."""
    rows = json.loads(finetune.RESULTS.read_text())["finetune"]
    names = finetune.OPTIMIZERS

    def gains(before: str) -> list[float]:
        """What tuning with the optimizer of the pretraining gains over tuning with the other, by seed."""
        other = next(name for name in names if name != before)
        same, changed = (finetune.counted(rows, pretrained=before, tuned=tuner) for tuner in (before, other))
        return [left["prose"] - right["prose"] for left, right in zip(same, changed, strict=True)]

    def judged(text: str, values: Sequence[float]) -> Verdict:
        gap = interval(values)
        seen = visible(gap, len(values))
        return Verdict(text=text, found=gap, word=on_side(gap, "lower"), seeds=len(values), visible=seen)

    after = {before: gains(before) for before in ("adamw", "distmuon")}
    verdicts = [
        judged("Pretrained with AdamW, tuning with AdamW ends lower than with Muon", after["adamw"]),
        judged("Pretrained with Muon, tuning with Muon ends lower than with AdamW", after["distmuon"]),
        judged(
            "To keep the optimizer of the pretraining is better, in the mean of both",
            [fmean(pair) for pair in zip(after["adamw"], after["distmuon"], strict=True)],
        ),
    ]
    lines = ["## 9. Pretrained with one, fine-tuned with the other", ""]
    lines += wrapped(
        "**Hypothesis.** A model is fine-tuned best with the optimizer that it was pretrained with. **Source:** arXiv "
        "2502.16982, section 3.5 and tables 6 and 7."
    )
    lines += ["", *finetune.table().splitlines(), "", *verdict_table(verdicts)]
    lines += ["", *wrapped(FINETUNE_READING), "", "`python -m experiments.finetune`", ""]
    return "Pretrained with one, fine-tuned with the other", "\n".join(lines), verdicts


OVERHEAD_BOUND = 0.03
"""The source's 1 to 3 % of a step."""


def overhead_section() -> Part:
    """What Muon adds to a step, from the results of experiments.overhead."""
    found = overhead.read()
    lines = ["## 11. What Muon adds to the time of a step", ""]
    lines += wrapped(
        "**Hypothesis.** Muon makes a step 1 to 3 % longer than AdamW. **Source:** arXiv 2502.16982, section 2.3. "
        "Newton-Schulz costs the same however many tokens a step has, so the share falls with the tokens of a rank."
    )
    verdicts = [*_measured_verdicts(found), *_planned_verdicts(found)]
    if found["measured"]:
        lines += ["", *wrapped(_measured_setting(found)), "", *_measured_table(found)]
    lines += [
        "",
        *wrapped(
            f"**Planned** by `distmuon plan` for {overhead.GPU.upper()} GPUs, eight a node, forward and backward at "
            f"{100 * found['assumed']['mfu']:.0f} % of the peak, beside AdamW in the same buckets. Nothing of this "
            "ran. Gbit/s are those of a GPU to other nodes."
        ),
        "",
        *_planned_table(found),
        "",
        *verdict_table(verdicts),
        "",
        "`python -m experiments.overhead measured 1 2 4; python -m experiments.overhead planned`",
        "",
    ]
    return "What Muon adds to the time of a step", "\n".join(lines), verdicts


def _measured_setting(found: dict[str, Any]) -> str:
    return (
        f"**Measured.** A Llama of {found['parameters']:,} parameters, byte-level, on {found['machine']}, one thread a "
        f"rank, gloo, {found['date']}, torch {found['torch']}: forward and backward in float32, Newton-Schulz in "
        f"bfloat16. {overhead.ROUNDS} rounds in which both optimizers step once, in random order; the mean of a "
        "round's ratio with its 95 % interval. Processor time is that of all ranks together; with a load average of "
        f"{min(found['load'].values()):g} to {max(found['load'].values()):g} on two cores, wall time says little."
    )


def overheads(found: dict[str, Any], key: str, ranks: int, tokens: int) -> list[float]:
    """The overhead of each round: how much longer Muon's step is, as a share of AdamW's."""
    rows = [row for row in found["measured"] if (row["ranks"], row["tokens"]) == (ranks, tokens)]
    return [row[key]["distmuon"] / row[key]["adamw"] - 1 for row in rows]


def _percent(values: Interval) -> str:
    return f"{100 * values.mean:.1f} % ({100 * values.low:.1f} to {100 * values.high:.1f})"


def _measured_cells(found: dict[str, Any]) -> list[tuple[int, int]]:
    return sorted({(row["ranks"], row["tokens"]) for row in found["measured"]})


def _measured_table(found: dict[str, Any]) -> list[str]:
    lines = ["| ranks | tokens of a rank and step | wall time | processor time |", "|---:|---:|---:|---:|"]
    for ranks, tokens in _measured_cells(found):
        wall, busy = (_percent(interval(overheads(found, key, ranks, tokens))) for key in ("wall_ms", "processor_ms"))
        lines.append(f"| {ranks} | {tokens:,} | {wall} | {busy} |")
    return lines


def _measured_verdicts(found: dict[str, Any]) -> list[Verdict]:
    if not found["measured"]:
        return [Verdict(text="Measured: at most 3 % more processor time", found=None, word=NOT_RUN)]
    verdicts = []
    for ranks in sorted({ranks for ranks, _ in _measured_cells(found)}):
        values = overheads(found, "processor_ms", ranks, overhead.TOKENS[-1])
        share = interval(values)
        word = on_side(share.minus(OVERHEAD_BOUND), "lower")
        size = f"{ranks} rank{'s' * (ranks > 1)}, {overhead.TOKENS[-1]:,} tokens each"
        text = f"Measured, {size}: at most 3 % more processor time"
        verdicts.append(Verdict(text=text, found=share, word=word))
    return verdicts


def _planned_verdicts(found: dict[str, Any]) -> list[Verdict]:
    """The longest of a kind of cluster against the bound; the planner has no interval."""
    tokens = overhead.PLANNED_TOKENS[-1]
    verdicts = []
    for text, chosen in (
        ("on one node", [row for row in found["planned"] if row["nodes"] == 1]),
        *(
            (f"on {overhead.NODES[1]} nodes and more at {gbit} Gbit/s a GPU", rows)
            for gbit in overhead.NETWORKS
            if (rows := [row for row in found["planned"] if row["nodes"] > 1 and row["network_gbit"] == gbit])
        ),
    ):
        most = max(row["overhead"] for row in chosen if row["tokens"] == tokens)
        verdicts.append(
            Verdict(
                text=f"Planned, {tokens:,} tokens a GPU, {text}: at most 3 % longer",
                found=Interval(mean=most, low=-math.inf, high=math.inf),
                word=AGREES if most <= OVERHEAD_BOUND else DISAGREES,
            )
        )
    return verdicts


def _planned_table(found: dict[str, Any]) -> list[str]:
    """A row for each model, number of nodes and bandwidth, a column for each number of tokens."""
    columns = [f"{tokens:,} tokens a GPU" for tokens in overhead.PLANNED_TOKENS]
    lines = [f"| model | nodes | Gbit/s | added ms | {' | '.join(columns)} |", "|---" + "|---:" * 5 + "|"]
    cells: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for row in found["planned"]:
        cells.setdefault((row["model"], row["nodes"], row["network_gbit"]), []).append(row)
    for (model, nodes, network), rows in cells.items():
        shares = " | ".join(f"{100 * row['overhead']:.1f} %" for row in rows)
        across = str(network) if nodes > 1 else "-"
        lines.append(f"| {model} | {nodes} | {across} | {rows[0]['added_ms']:.1f} | {shares} |")
    return lines


# ---- all of it


def write(results: Results, folder: Path, sizes: Sequence[str] = COMMITTED) -> None:
    """The page and its pictures in `folder`."""
    (folder / "experiments.md").write_text(render(results, sizes), encoding="utf-8")
    pictures = folder / "experiments"
    pictures.mkdir(exist_ok=True)
    for stale in pictures.glob("*.png"):
        stale.unlink()
    for view in views_of(results, sizes):
        experiment = view.experiment
        if drawn(view):
            figure = PICTURES[experiment.picture["kind"]](view)
            figure.savefig(pictures / f"{experiment.name}.png", dpi=80)
            figure.clear()


def main() -> None:
    write(Results(RESULTS), DOCS)


if __name__ == "__main__":
    main()
