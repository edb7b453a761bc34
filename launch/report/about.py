"""Where runs come from and how they were configured: facts, environment, configs and their differences."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

import yaml

from launch.compare import smoothed
from launch.config import leaves
from launch.logs import duration
from launch.report.chart import finite
from launch.report.history import History
from launch.report.table import Table, number, size

Facts = list[tuple[str, str]]


def results(run: History) -> Facts:
    """What a reader asks first."""
    found: Facts = []
    known = [(record["loss"], record["step"]) for record in run.val if record.get("loss") is not None]
    if known:
        last, best = known[-1], min(known)
        found.append(("validation loss", f"{last[0]:.4f} at step {last[1]:,}"))
        if best[1] != last[1]:
            found.append(("best validation loss", f"{best[0]:.4f} at step {best[1]:,}"))
    losses = [(record["step"], record["loss"]) for record in run.train if record.get("loss") is not None]
    if losses:
        found.append(("training loss, moving mean", f"{smoothed(losses)[-1][1]:.4f} at step {losses[-1][0]:,}"))
    tokens, seconds = run.clock(run.train[-1]["step"]) if run.train else (None, None)
    if tokens:
        found.append(("tokens seen", f"{tokens:,}"))
    if seconds:
        found.append(("time of all steps", duration(seconds)))
    if run.step_ms:
        found.append(("median step", f"{number(run.step_ms)} ms"))
    speeds = finite([record.get("tokens_per_s") for record in run.train])
    if speeds:
        found.append(("median speed", f"{median(speeds):,.0f} tokens/s"))
    mfu = finite([record.get("mfu") for record in run.train])
    if mfu:
        found.append(("median MFU", f"{median(mfu):.1%}"))
    peaks = finite((run.summary or {}).get("peak_bytes") or [record.get("peak_bytes") for record in run.train[-1:]])
    if peaks:
        found.append(("peak memory", size(int(max(peaks)))))
    found.append(("skipped steps", f"{run.skipped:,}"))
    return found


def environment(run: History) -> Facts:
    """The header of the run's last start, as far as it says."""
    header = run.starts[-1]
    found: Facts = []

    def add(name: str, value: Any) -> None:
        if value not in (None, "", [], {}):
            found.append((name, str(value)))

    add("command", " ".join(header.get("command") or []))
    commit = header.get("commit")
    add("commit", commit and commit + (", with uncommitted changes" if header.get("uncommitted_changes") else ""))
    add("trainer", header.get("trainer"))
    add("ranks", header.get("world_size"))
    add("device", header.get("device"))
    add("GPUs of rank 0's host", ", ".join(header.get("gpus") or []))
    add("host", header.get("host"))
    versions = header.get("versions") or {key: header[key] for key in ("torch",) if key in header}
    add("versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version))
    count = header.get("num_parameters")
    add("model", f"{run.setting('model.arch', '')}, {count:,} parameters" if count else run.setting("model.arch"))
    add("data", ", ".join(f"{key} {_plain(value)}" for key, value in (header.get("data") or {}).items()))
    add("micro-batches a rank and step", header.get("accumulation"))
    starts = [f"step {start.get('resumed_from', 0):,} on {start.get('world_size', '?')} ranks" for start in run.starts]
    add("starts", "; ".join(starts) if len(starts) > 1 else None)
    add("folder", run.folder)
    return found


def config_text(run: History) -> str:
    return str(yaml.safe_dump(run.config, sort_keys=False))


def config_difference(runs: Sequence[History]) -> Table | None:
    """The keys that are not alike in all runs."""
    if len(runs) < 2:
        return None
    flat = [dict(leaves(run.config)) for run in runs]
    keys = list(dict.fromkeys(key for values in flat for key in values))
    rows = [[key, *(_plain(values.get(key, "not set")) for values in flat)] for key in keys]
    different = [row for row in rows if len(set(row[1:])) > 1]
    caption = f"{len(different)} of {len(keys)} keys differ." if different else "All keys are alike."
    return Table(("key", *(run.label for run in runs)), different, caption)


def _plain(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000 else str(value)
