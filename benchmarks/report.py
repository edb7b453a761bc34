"""docs/benchmarks.md from the JSON files of `benchmarks.step` and `benchmarks.scaling`, and from nothing else.

    python -m benchmarks.report            writes docs/benchmarks.md; a test compares the two

A pure function of benchmarks/results/*.json: no figure stands in this file. Ratios are medians over rounds of the
ratio within the round.
"""

from __future__ import annotations

import json
import re
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import COLUMNS, LEFT_OUT
from benchmarks.scaling import scaling_text

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "benchmarks.md"
OURS, OURS_ADAMW = "distmuon", "distmuon AdamW"
FASTER = {512: 1.1, 1024: 1.2}  # d_model: over the best peer of the same rule, at 2 ranks and 4 layers
OVER_ADAMW, TOKENS, WIDE = 1.03, 16384, 384  # of our own AdamW's step, from so many tokens a rank and this d_model on
WIDTH = 110  # of the page's prose
OTHERS_ALLOWED = 0.05  # share of the machine that others may have taken for a figure to count


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    if len(samples) < 2:
        return (samples[0],) * 3
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, median, high


def spread(samples: Sequence[float], digits: int = 0) -> str:
    low, median, high = quartiles(samples)
    return f"**{median:.{digits}f}** ({low:.{digits}f}-{high:.{digits}f})"


def ratio(row: dict[str, Any], base: dict[str, Any], key: str) -> list[float]:
    """row / base, round by round."""
    return [a / b for a, b in zip(row[key], base[key])]


def is_ours(row: dict[str, Any]) -> bool:
    return str(row["name"]).startswith("distmuon")


def tables(found: dict[str, Any]) -> str:
    """Conditions, the two tables, verdicts and what could not run, of one run."""
    last = [*_not_run(found), *_notes(found)]
    sections = (_conditions(found), _times(found), _counts(found), verdicts(found), last)
    return "\n\n".join("\n".join(lines) for lines in sections)


def title(found: dict[str, Any]) -> str:
    setting, ranks = found["setting"], found["conditions"]["ranks"]
    tokens = setting["batch"] * setting["seq_len"]
    kind = f", {kind}" if (kind := found["conditions"].get("kind")) else ""
    size = f"d_model {setting['d_model']}, {setting['layers']} layers"
    return f"{size}, {ranks} ranks, {tokens:,} tokens a rank and step{kind}"


def is_quiet(found: dict[str, Any]) -> bool:
    return found["others"] is not None and found["others"] <= OTHERS_ALLOWED


def _conditions(found: dict[str, Any]) -> list[str]:
    c = found["conditions"]
    others = "unknown" if found["others"] is None else f"{found['others']:.0%} of the machine"
    packages = ", ".join(f"{name} {version}" for name, version in c["packages"].items() if version)
    lines = [
        f"`{c['command']}`",
        "",
        f"{c['machine']}; {c['backend']}, {c['ranks']} ranks, {c['threads']} thread(s) each; {c['date']}; "
        f"{len(found['plain'])} rounds; load average {c['load_before']} before, {c['load_after']} after; other "
        f"processes took {others} during the rounds. {packages}.",
    ]
    if not is_quiet(found):
        lines += ["", "**The machine was not alone with this run: its times are no evidence, its counts are.**"]
    return lines


def _times(found: dict[str, Any]) -> list[str]:
    rows = {row["name"]: row for row in found["rows"]}
    base = rows.get(OURS)
    lines = [
        "| row | rule | sync + step, ms | / distmuon's | blocked, ms | processor, ms | whole step, ms | / distmuon's "
        "| whole - plain, ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows.values():
        part = [whole - plain for whole, plain in zip(row["whole"], found["plain"])]
        cells = [spread(row[key]) if None not in row[key] else "not measured" for key in ("blocked", "processor")]
        ratios = [spread(ratio(row, base, key), 2) if base else "" for key in ("sync_step", "whole")]
        rule = row["rule"] if row["equal"] else f"{row['rule']}, another"
        lines.append(
            f"| {row['name']} | {rule} | {spread(row['sync_step'])} | {ratios[0]} | {' | '.join(cells)} "
            f"| {spread(row['whole'])} | {ratios[1]} | {spread(part)} |"
        )
    lines.append(f"| a plain forward and backward | | | | | | {spread(found['plain'])} | | |")
    return lines


def _counts(found: dict[str, Any]) -> list[str]:
    wire = any(row["wire_bytes"] is not None for row in found["rows"])
    lines = [
        "| row | wire, MB a rank | state, MB | matrices by rank | calls | distance, fp32 | distance, bf16 "
        "| replicas equal |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        sent = f"{row['wire_bytes'] / 1e6:.2f}" if wire else "not measured"
        matrices, calls = (
            "+".join(map(str, row[key])) if None not in row[key] else "not counted"
            for key in ("ns_matrices", "ns_calls")
        )
        if row["rule"] == "adamw":
            matrices = calls = "0"
        errors = row.get("distance", {})
        cells = [f"{errors[name]['update']:.1e}" if name in errors else "" for name in ("float32", "bfloat16")]
        same = {True: "yes", False: "NO", None: ""}[row.get("replicas_equal")]
        lines.append(
            f"| {row['name']} | {sent} | {max(row['state_bytes']) / 1e6:.2f} | {matrices} | {calls} | {cells[0]} "
            f"| {cells[1]} | {same} |"
        )
    if not wire:
        lines += ["", f"The wire was not measured: {found['conditions']['wire']}."]
    return lines


def verdicts(found: dict[str, Any]) -> list[str]:
    """The targets that this run can decide, met or missed."""
    rows = {row["name"]: row for row in found["rows"]}
    base, setting = rows.get(OURS), found["setting"]
    lines: list[str] = []
    peers = [row for row in rows.values() if row["rule"] == "muon" and row["equal"] and not is_ours(row)]
    if base and peers:
        best = min(peers, key=lambda row: quartiles(ratio(row, base, "sync_step"))[1])
        got = quartiles(ratio(best, base, "sync_step"))[1]
        wanted = FASTER.get(setting["d_model"], 1.0)
        lines.append(
            f"- Synchronisation + step, best peer of the same rule and dtype ({best['name']}) / distmuon: {got:.3f}; "
            f"target {wanted}: {'met' if got >= wanted else 'MISSED'}."
        )
    adamw, zero = rows.get(OURS_ADAMW), rows.get("DDP + ZeRO-1 AdamW (torch)")
    if adamw and zero:
        got = quartiles(ratio(adamw, zero, "sync_step"))[1]
        verdict = "met" if got <= 1.0 else "MISSED"
        lines.append(f"- Synchronisation + step, distmuon's AdamW / torch's ZeRO-1: {got:.3f}; target 1.0: {verdict}.")
    if base and adamw:
        whole = quartiles(ratio(base, adamw, "whole"))[1]
        plain = quartiles(found["plain"])[1]
        parts = [plain + quartiles(row["sync_step"])[1] for row in (base, adamw)]
        tokens = setting["batch"] * setting["seq_len"]
        decides = tokens >= TOKENS and setting["d_model"] >= WIDE
        verdict = f"target {OVER_ADAMW}: {'met' if whole <= OVER_ADAMW else 'MISSED'}"
        if not decides:
            verdict = f"no target at {tokens:,} tokens"
        lines.append(
            f"- Whole step, distmuon / distmuon's own AdamW: {whole:.3f}; {verdict}. From medians of plain forward and "
            f"backward + sync and step: {parts[0] / parts[1]:.3f}."
        )
    return lines


def _not_run(found: dict[str, Any]) -> list[str]:
    lines = [f"- {p['name']}: {_plain(p['reason'])}" for p in found["not_run"] if p["reason"] != LEFT_OUT]
    left_out = [p["name"] for p in found["not_run"] if p["reason"] == LEFT_OUT]
    lines += [f"- {LEFT_OUT}: {'; '.join(left_out)}"] if left_out else []
    return ["Did not run here:", "", *lines, ""] if lines else []


def _notes(found: dict[str, Any]) -> list[str]:
    notes = [f"- {row['name']}: {row['note']}." for row in found["rows"] if row["note"]]
    return ["Notes:", "", *notes] if notes else []


def _plain(text: str) -> str:
    """An error message inside Markdown."""
    return text.replace("|", "/").replace("<", "(").replace(">", ")").replace("`", "'")


def page(results: Path = RESULTS) -> str:
    """The whole of docs/benchmarks.md."""
    runs = [json.loads(path.read_text()) for path in sorted(results.glob("step_*.json"))]
    runs.sort(key=lambda run: (run["setting"]["batch"] * run["setting"]["seq_len"], run["setting"]["d_model"]))
    lines = [
        "# Benchmarks",
        "",
        "This page tells you how long a step of distmuon takes beside the optimizers that run on the same CPUs, how "
        "many bytes it sends and holds, and how both change with the number of ranks. Every run has its command and "
        "conditions beside it. `python -m benchmarks.report` makes the page from `benchmarks/results/*.json`; do not "
        "edit it.",
        "",
        "All rows train one GPT-3-style decoder in float32 on the same batches, from the same weights, by one rule "
        "(`benchmarks/setting.py`). Every round runs each row once, in random order, in the same processes. Shown is "
        "the **median** (quartiles) over rounds. A time is the slowest rank's; a ratio is the median of the ratios "
        "within a round.",
        "",
        *[f"- **{name}**: {text}." for name, text in COLUMNS.items()],
        "",
        'The row "distmuon, overlap in backward" shows an option that has been removed since. [options.md]'
        "(options.md#what-whole-parameters-after-step-cost) says what it costs that parameters are whole after `step`.",
    ]
    for run in runs:
        lines += ["", f"## {title(run)}", "", tables(run).rstrip()]
    scaling = results / "scaling.json"
    if scaling.exists():
        lines += ["", *scaling_text(json.loads(scaling.read_text()))]
    return "\n".join(wrapped(line) for text in lines for line in text.split("\n")).rstrip() + "\n"


def wrapped(line: str) -> str:
    """A paragraph or list item in lines of at most `WIDTH` characters; tables and code stay as they are."""
    if line.startswith(("|", "`", "!")):
        return line
    indent = "  " if line.startswith("- ") else ""
    # A line that began with "- " or "+ " would be a list item.
    glued = re.sub(r" ([-+#>]|\d+\.) ", "\0\\1 ", line)
    lines = textwrap.wrap(glued, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines).replace("\0", " ")


if __name__ == "__main__":
    PAGE.write_text(page())
