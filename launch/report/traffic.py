"""Bytes and memory of one run beside its plan. What the folder does not say, or cannot be planned, is left out."""

from __future__ import annotations

import json
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from functools import lru_cache
from io import StringIO

import torch

import distmuon
from launch.config import Config, parse
from launch.report.history import History
from launch.report.table import Table, number, size

CONFIG_FILE, MODEL_FILE = "config.yaml", "config.json"


@dataclass(frozen=True)
class Planned:
    """What `distmuon.plan` says of the run's own config, model and number of ranks."""

    first: dict[str, int]
    """Bytes that rank 0 sends in a step, by stage."""
    busiest: dict[str, int]
    state: int
    """Of the fullest rank; so are all below."""
    parameters: int
    gradients: int
    transient: int
    total: int


def plan_of(run: History) -> Planned | None:
    """None where the run's folder cannot say what was trained, or where a trainer reduces gradients its own way."""
    if run.starts[-1].get("trainer", "pretrain") != "pretrain" or not run.starts[-1].get("world_size"):
        return None
    paths = [run.folder / name for name in (CONFIG_FILE, MODEL_FILE)]
    if not all(path.is_file() for path in paths):
        return None
    config, model = (path.read_text(encoding="utf-8") for path in paths)
    return _planned(str(paths[0]), config, model, run.starts[-1]["world_size"])


@lru_cache(maxsize=8)
def _planned(path: str, config_text: str, model_text: str, world_size: int) -> Planned | None:
    """Cached by the texts, since a running report asks at every validation."""
    config = _config(path)
    if config is None:
        return None
    from launch.models import build_model  # transformers is slow to import, and `launch.tail` does not need it
    from launch.run import optimizer_options

    replicas, shards, tp = config.parallel.mesh_shape(world_size)
    # A run writes its own report: the numbers that its dropout draws must not depend on that.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = build_model(config.model, json.loads(model_text).get("vocab_size"))
    options = optimizer_options(config)
    plan = distmuon.plan(
        model,
        dp_size=replicas * shards,
        shard=config.parallel.shard,
        replicas=replicas,
        tp=tp,
        routes=options.get("routes"),
        sharding=options["sharding"],
        precision=options["precision"],
        hardware=None,
        compare=False,
    )
    held = plan.fullest
    return Planned(
        first=plan.ranks[0].sent_bytes,
        busiest={stage: plan.stage_bytes(stage) for stage in sorted({s for r in plan.ranks for s in r.sent_bytes})},
        state=held.state,
        parameters=held.parameters + held.staged,
        gradients=held.gradients,
        transient=held.transient,
        total=held.total,
    )


def _config(path: str) -> Config | None:
    """The config in the folder, or None if this version knows keys of it no more."""
    with suppress(SystemExit), redirect_stderr(StringIO()):
        return parse(["--config", path])
    return None


def bytes_table(run: History, planned: Planned | None) -> Table | None:
    """Bytes sent in the last recorded step, by stage: of the busiest rank at the end of a run, of rank 0 before."""
    by_rank = [rank["bytes"] for rank in (run.summary or {}).get("per_rank") or [] if rank.get("bytes") is not None]
    last = next((record["bytes"] for record in reversed(run.train) if record.get("bytes")), None)
    ranks = by_rank or ([last] if last else [])
    counted = {stage: max(int(rank.get(stage, 0)) for rank in ranks) for rank in ranks for stage in rank}
    if not counted:
        return None
    plan = {} if planned is None else planned.busiest if by_rank else planned.first
    rows = []
    for stage in dict.fromkeys([*counted, *plan]):
        row = [stage, f"{counted.get(stage, 0):,}"]
        rows.append(row + _beside(counted.get(stage, 0), plan.get(stage, 0)) if plan else row)
    total = ["all stages", f"{sum(counted.values()):,}"]
    rows.append(total + _beside(sum(counted.values()), sum(plan.values())) if plan else total)
    caption = f"Bytes that {'the busiest rank' if by_rank else 'rank 0'} sent in the last recorded step."
    return Table(("stage", "counted", *(("planned", "counted / planned") if plan else ())), rows, caption)


def memory_table(run: History, planned: Planned | None) -> Table | None:
    """State and peak memory of the fullest rank."""
    summary = run.summary or {}
    states = [rank["state_bytes"] for rank in summary.get("per_rank") or [] if rank.get("state_bytes") is not None]
    peaks = [peak for peak in summary.get("peak_bytes") or [] if peak is not None]
    peaks = peaks or [record["peak_bytes"] for record in run.train[-1:] if record.get("peak_bytes") is not None]
    rows: list[list[str]] = []
    if states or planned:
        row = ["optimizer state", size(max(states)) if states else "-"]
        rows.append([*row, size(planned.state)] if planned else row)
    for name in ("parameters", "gradients", "transient") if planned else ():
        label = "in a step, for a moment" if name == "transient" else name
        rows.append([label, "-", size(getattr(planned, name))])
    if peaks or planned:
        row = ["peak" if peaks else "all of these", size(max(peaks)) if peaks else "-"]
        rows.append([*row, size(planned.total)] if planned else row)
    if not rows:
        return None
    caption = "Memory of the fullest rank."
    if planned:
        caption += " The plan leaves out activations" + (", which the peak includes." if peaks else ".")
    return Table(("what", "counted", *(("planned",) if planned else ())), rows, caption)


def _beside(counted: int, planned: int) -> list[str]:
    return [f"{planned:,}", number(counted / planned) if planned else "-"]
